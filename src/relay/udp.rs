//! Datagrams in and out through the kernel: batches by recvmmsg, and the local address each one came to.
#![expect(unsafe_code, reason = "recvmmsg and sendmsg with control data have no safe wrapper")]

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use crate::turn::indication::HEADROOM;

/// Datagrams read at once.
pub const BATCH: usize = 32;
/// The largest UDP payload, and room for padding behind it.
const SLOT: usize = HEADROOM + 65_536;
/// Room for one IPV6_PKTINFO.
const CONTROL: usize = 64;

/// Room for one batch, and the last batch read. Each datagram lies with [`HEADROOM`] bytes free before it, so that a
/// header can be written in front of it.
pub struct Batch {
    buffers: Vec<u8>,
    names: [libc::sockaddr_storage; BATCH],
    controls: [Control; BATCH],
    lengths: [usize; BATCH],
}

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; CONTROL]);

/// One datagram of a batch.
pub struct Datagram<'a> {
    /// Who sent it; IPv4 is never in its IPv6-mapped form.
    pub from: SocketAddr,
    /// The local address it was sent to, if the socket was opened to tell.
    pub local: Option<IpAddr>,
    /// [`HEADROOM`] bytes, the datagram, and at least three bytes more.
    pub buffer: &'a mut [u8],
    /// Length of the datagram.
    pub length: usize,
}

impl Datagram<'_> {
    /// What was sent.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[HEADROOM..HEADROOM + self.length]
    }
}

impl Batch {
    /// Pages are touched only as datagrams fill them.
    pub fn new() -> Self {
        // SAFETY: sockaddr_storage is plain data for which all zeroes are valid.
        let names = unsafe { mem::zeroed() };
        Self {
            buffers: vec![0; BATCH * SLOT],
            names,
            controls: [Control([0; CONTROL]); BATCH],
            lengths: [0; BATCH],
        }
    }

    /// Reads what there is, without waiting. Gives the number of datagrams; each may be [taken](Self::get) once.
    ///
    /// # Errors
    /// What the kernel says; `WouldBlock` when there is nothing.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        // SAFETY: both are plain data for which all zeroes are valid.
        let (mut headers, mut vectors): ([libc::mmsghdr; BATCH], [libc::iovec; BATCH]) =
            unsafe { mem::zeroed() };
        let slots = self.buffers.chunks_exact_mut(SLOT);
        for (index, (slot, vector)) in slots.zip(&mut vectors).enumerate() {
            // Three bytes stay free behind the longest datagram, for padding.
            let space = &mut slot[HEADROOM..SLOT - 4];
            *vector = libc::iovec { iov_base: space.as_mut_ptr().cast(), iov_len: space.len() };
            let header = &mut headers[index].msg_hdr;
            header.msg_name = ptr::from_mut(&mut self.names[index]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as u32;
            header.msg_iov = vector;
            header.msg_iovlen = 1;
            header.msg_control = self.controls[index].0.as_mut_ptr().cast();
            header.msg_controllen = CONTROL;
        }
        // SAFETY: the headers point to buffers that live in `self` and on this stack until the call is over, with
        // their true sizes.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BATCH as u32,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (index, header) in headers[..count].iter().enumerate() {
            let truncated = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            self.lengths[index] = if truncated { 0 } else { header.msg_len as usize };
            self.controls[index].0[header.msg_hdr.msg_controllen.min(CONTROL)..].fill(0);
        }
        Ok(count)
    }

    /// Datagram `index` of the last batch; `None` if its source address makes no sense.
    pub fn get(&mut self, index: usize) -> Option<Datagram<'_>> {
        Some(Datagram {
            from: read_name(&self.names[index])?,
            local: local_address(&self.controls[index].0),
            buffer: &mut self.buffers[index * SLOT..(index + 1) * SLOT],
            length: self.lengths[index],
        })
    }
}

/// Sends one datagram without waiting, from the local address `from` if the socket has several.
///
/// # Errors
/// What the kernel says; `WouldBlock` when the socket's buffer is full.
pub fn send(
    socket: &UdpSocket,
    v6: bool,
    from: Option<IpAddr>,
    to: SocketAddr,
    bytes: &[u8],
) -> io::Result<()> {
    let name = socket2::SockAddr::from(if v6 { mapped(to) } else { to });
    let mut control = Control([0; CONTROL]);
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is plain data for which all zeroes are valid.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = name.as_ptr().cast_mut().cast();
    header.msg_namelen = name.len();
    header.msg_iov = &raw mut vector;
    header.msg_iovlen = 1;
    if let Some(from) = from {
        header.msg_controllen = write_source(&mut control, v6, from);
        header.msg_control = control.0.as_mut_ptr().cast();
    }
    // SAFETY: the header points to `name`, `bytes` and `control`, which outlive the call; the kernel only reads them.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Asks the kernel to tell the local address of each datagram.
///
/// # Errors
/// What the kernel says.
pub fn tell_local_address(socket: &impl AsRawFd, v6: bool) -> io::Result<()> {
    let (level, option) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO) } else { (libc::IPPROTO_IP, libc::IP_PKTINFO) };
    let on: libc::c_int = 1;
    let size = mem::size_of_val(&on) as libc::socklen_t;
    // SAFETY: the option takes an int, and is given one with its size.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn mapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) => SocketAddr::V6(SocketAddrV6::new(v4.ip().to_ipv6_mapped(), v4.port(), 0, 0)),
        SocketAddr::V6(_) => address,
    }
}

fn read_name(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(name.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that this storage holds a sockaddr_in.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(u32::from_be(name.sin_addr.s_addr));
            Some(SocketAddr::new(ip.into(), u16::from_be(name.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: the family says that this storage holds a sockaddr_in6.
            let name = unsafe { &*ptr::from_ref(name).cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(name.sin6_addr.s6_addr);
            let port = u16::from_be(name.sin6_port);
            // The scope tells which link a link-local client is on: without it there is no way back.
            Some(match ip.to_ipv4_mapped() {
                Some(v4) => SocketAddr::new(v4.into(), port),
                None => SocketAddrV6::new(ip, port, 0, name.sin6_scope_id).into(),
            })
        }
        _ => None,
    }
}

/// Bytes of a control message's header, and where its data begins.
const CMSG: usize = mem::size_of::<libc::cmsghdr>();

/// The destination in the first control message; we ask the kernel for one kind only.
fn local_address(control: &[u8; CONTROL]) -> Option<IpAddr> {
    let length = usize::from_ne_bytes(*control.first_chunk()?);
    let number = |at: usize| i32::from_ne_bytes(*control[at..].first_chunk().expect("CONTROL is longer"));
    let data = control.get(CMSG..length)?;
    match (number(8), number(12)) {
        // in_pktinfo: interface, local address, destination in the header.
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            Some(Ipv4Addr::from(*data.get(8..)?.first_chunk::<4>()?).into())
        }
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            Some(Ipv6Addr::from(*data.first_chunk::<16>()?).to_canonical())
        }
        _ => None,
    }
}

/// The source address as a control message; gives its length.
fn write_source(control: &mut Control, v6: bool, from: IpAddr) -> usize {
    let (level, kind, data) = match (v6, from) {
        (false, IpAddr::V4(ip)) => {
            let mut info = [0; 20];
            info[4..8].copy_from_slice(&ip.octets());
            (libc::IPPROTO_IP, libc::IP_PKTINFO, (info, 12))
        }
        (_, ip) => {
            let ip = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            let mut info = [0; 20];
            info[..16].copy_from_slice(&ip.octets());
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, (info, 20))
        }
    };
    let (data, length) = data;
    control.0[..8].copy_from_slice(&(CMSG + length).to_ne_bytes());
    control.0[8..12].copy_from_slice(&level.to_ne_bytes());
    control.0[12..16].copy_from_slice(&kind.to_ne_bytes());
    control.0[CMSG..CMSG + length].copy_from_slice(&data[..length]);
    (CMSG + length).next_multiple_of(8)
}
