//! Options of UDP sockets, and what this kernel has of them.
#![expect(unsafe_code, reason = "the options have no safe wrapper")]

use std::{
    io, mem,
    net::{SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd,
};

use socket2::SockRef;

/// What the kernel can do for many datagrams at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offload {
    /// Coalesces datagrams of one flow that arrive together (UDP_GRO, Linux 5.0).
    pub receive: bool,
    /// Cuts what is sent into datagrams (UDP_SEGMENT, Linux 4.18).
    pub send: bool,
}

impl Offload {
    /// Asks the kernel.
    #[must_use]
    pub fn probe() -> Self {
        let Ok(socket) = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("[::1]:0")) else {
            return Self { receive: false, send: false };
        };
        let send = set(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, 1_200).is_ok();
        Self { receive: coalesce(&socket).is_ok(), send }
    }
}

/// Lets the kernel coalesce datagrams of one flow that arrive together.
///
/// # Errors
/// What the kernel says; one without the option knows no such thing.
pub fn coalesce(socket: &impl AsRawFd) -> io::Result<()> {
    set(socket, libc::SOL_UDP, libc::UDP_GRO, 1)
}

/// Asks the kernel to tell the local address of each datagram.
///
/// # Errors
/// What the kernel says.
pub fn tell_local_address(socket: &impl AsRawFd, v6: bool) -> io::Result<()> {
    if v6 {
        set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
    } else {
        set(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
    }
}

/// Asks for so many bytes of buffer each way. The kernel gives no more than its limits (`net.core.rmem_max` and
/// `wmem_max`), unless the process may pass them (CAP_NET_ADMIN).
///
/// # Errors
/// What the kernel says; never that it was too much.
pub fn size_buffers(socket: &impl AsRawFd, bytes: usize) -> io::Result<()> {
    let asked = i32::try_from(bytes).unwrap_or(i32::MAX);
    for (force, ask) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        set(socket, libc::SOL_SOCKET, force, asked).or_else(|_| set(socket, libc::SOL_SOCKET, ask, asked))?;
    }
    Ok(())
}

/// Datagrams that did not fit into the socket's buffer, since it was opened; counts up to 2³² and on from 0.
#[must_use]
pub fn receive_drops(socket: &impl AsRawFd) -> u32 {
    // SK_MEMINFO_DROPS of sock_diag(7), which counts nine numbers.
    const NUMBERS: usize = 9;
    let mut numbers = [0u32; NUMBERS];
    let mut length = mem::size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `numbers`.
    unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut length,
        );
    }
    numbers[NUMBERS - 1]
}

/// What a socket of IPv6 calls an address.
#[must_use]
pub fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0)),
        SocketAddr::V6(_) => address,
    }
}

fn set(socket: &impl AsRawFd, level: i32, option: i32, value: libc::c_int) -> io::Result<()> {
    let size = mem::size_of_val(&value) as libc::socklen_t;
    // SAFETY: these options take an int, and are given one with its size.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), size) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes of buffer that a socket has got for what arrives. The kernel counts its own bookkeeping in: half of it, it says.
#[must_use]
pub fn receive_buffer(socket: &UdpSocket) -> usize {
    SockRef::from(socket).recv_buffer_size().unwrap_or(0) / 2
}
