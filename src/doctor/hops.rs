//! The routers on the way: a packet that may pass so many of them and no more makes the next one say who it is.

use std::{
    io::IoSliceMut,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsRawFd,
    time::Duration,
};

use nix::{
    cmsg_space,
    libc::{sock_extended_err, sockaddr_in},
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, setsockopt, sockopt::Ipv4RecvErr},
};
use tokio::{io::Interest, net::UdpSocket, time::timeout};

use super::{any, nat::Behind};

/// The first router is our own; these are behind it.
const LOOKED_AT: [u32; 3] = [2, 3, 4];
const WAIT: Duration = Duration::from_millis(600);

/// What kind of private network a packet crosses behind the first router. For IPv4 alone; none if nobody said anything.
pub(super) async fn behind_another(server: SocketAddr) -> Option<Behind> {
    let [two, three, four] = LOOKED_AT.map(|hops| router(server, hops));
    let routers: [_; 3] = tokio::join!(two, three, four).into();
    routers.into_iter().flatten().find_map(|router| match router {
        IpAddr::V4(address) if is_carriers(address) => Some(Behind::Carrier),
        IpAddr::V4(address) if address.is_private() => Some(Behind::Private),
        _ => None,
    })
}

/// RFC 6598.
fn is_carriers(address: Ipv4Addr) -> bool {
    let [first, second, ..] = address.octets();
    first == 100 && second & 0b1100_0000 == 64
}

/// Who is `hops` routers away.
async fn router(server: SocketAddr, hops: u32) -> Option<IpAddr> {
    if server.is_ipv6() {
        return None;
    }
    let socket = UdpSocket::bind(any(server)).await.ok()?;
    socket.set_ttl(hops).ok()?;
    setsockopt(&socket, Ipv4RecvErr, &true).ok()?;
    socket.connect(server).await.ok()?;
    socket.send(b"halfway").await.ok()?;
    timeout(WAIT, async {
        loop {
            socket.ready(Interest::ERROR).await.ok()?;
            if let Ok(router) = socket.try_io(Interest::ERROR, || Ok(sender_of_error(&socket)?)) {
                break Some(router);
            }
        }
    })
    .await
    .ok()?
}

fn sender_of_error(socket: &UdpSocket) -> nix::Result<IpAddr> {
    let (mut payload, mut control) = ([0; 64], cmsg_space!(sock_extended_err, sockaddr_in));
    let mut into = [IoSliceMut::new(&mut payload)];
    let message =
        recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut into, Some(&mut control), MsgFlags::MSG_ERRQUEUE)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::Ipv4RecvErr(_, Some(sender)) = control {
            return Ok(SockaddrIn::from(sender).ip().into());
        }
    }
    Err(nix::errno::Errno::EAGAIN)
}
