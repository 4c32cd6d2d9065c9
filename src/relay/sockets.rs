//! Relay sockets: bound ahead of demand, and live.

use std::{
    collections::HashMap,
    io, mem,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{turn::RelayPort, udp};

/// Asked of the kernel for each listener; it may give less (`net.core.rmem_max`).
pub const LISTENER_BUFFER: usize = 4 << 20;
/// Asked of the kernel for each relay socket.
const RELAY_BUFFER: usize = 512 << 10;

/// The relay sockets of one shard, bound or live.
#[derive(Debug, Default)]
pub struct RelaySockets {
    open: HashMap<RelayPort, (UdpSocket, Overflow)>,
}

/// How many datagrams a socket's receive buffer had no room for, as far as that has been asked. Each look at it is a call
/// of the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overflow(u32);

impl Overflow {
    /// Nothing of what has been lost so far is new.
    pub fn so_far(socket: &UdpSocket) -> Self {
        Self(udp::receive_drops(socket))
    }

    /// How many more there are.
    pub fn since_last(&mut self, socket: &UdpSocket) -> u64 {
        let now = udp::receive_drops(socket);
        u64::from(now.wrapping_sub(mem::replace(&mut self.0, now)))
    }
}

impl RelaySockets {
    /// Binds a port ahead of demand.
    ///
    /// # Errors
    /// What the kernel says; `AddrInUse` when another program holds it.
    pub fn bind(&mut self, ip: IpAddr, at: RelayPort) -> io::Result<()> {
        let socket = udp_socket(SocketAddr::new(ip, at.port), RELAY_BUFFER, |socket| {
            if ip.is_ipv6() { socket.set_only_v6(true) } else { Ok(()) }
        })?;
        self.open.insert(at, (socket, Overflow::default()));
        Ok(())
    }

    /// A bound or live socket.
    pub fn get(&self, at: RelayPort) -> Option<&UdpSocket> {
        self.open.get(&at).map(|(socket, _)| socket)
    }

    /// Datagrams that did not fit into its buffer since this was last asked.
    pub fn overflow(&mut self, at: RelayPort) -> u64 {
        self.open.get_mut(&at).map_or(0, |(socket, overflow)| overflow.since_last(socket))
    }

    /// Closes one.
    pub fn close(&mut self, at: RelayPort) {
        self.open.remove(&at);
    }
}

/// A socket that clients send to; with `shared`, one of several at the same address.
///
/// # Errors
/// What the kernel says.
pub fn listener(at: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    udp_socket(at, LISTENER_BUFFER, |socket| {
        if at.is_ipv6() {
            // `[::]` is for both families, as everywhere in the configuration.
            socket.set_only_v6(!at.ip().is_unspecified())?;
        }
        udp::tell_local_address(socket, at.is_ipv6())?;
        socket.set_reuse_port(shared)
    })
}

/// Makes a socket that somebody else has bound into a [`listener`].
///
/// # Errors
/// What the kernel says.
pub fn adopt(socket: &UdpSocket) -> io::Result<()> {
    udp::tell_local_address(socket, socket.local_addr()?.is_ipv6())?;
    socket.set_nonblocking(true)?;
    udp::size_buffers(socket, LISTENER_BUFFER)?;
    // Where the kernel cannot, it reads one by one.
    let _ = udp::coalesce(socket);
    Ok(())
}

fn udp_socket(
    at: SocketAddr,
    buffer: usize,
    options: impl FnOnce(&Socket) -> io::Result<()>,
) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP))?;
    options(&socket)?;
    socket.set_nonblocking(true)?;
    udp::size_buffers(&socket, buffer)?;
    // Where the kernel cannot, it reads one by one.
    let _ = udp::coalesce(&socket);
    socket.bind(&at.into())?;
    Ok(socket.into())
}
