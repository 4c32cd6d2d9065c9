//! Addresses and control messages, as the kernel lays them out (cmsg(3), ip(7), ipv6(7), udp(7)).

use std::{
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    ptr,
};

/// Bytes of a control message's header, and where its data begins.
const HEADER: usize = mem::size_of::<libc::cmsghdr>();
/// Room for one IPV6_PKTINFO and one number.
pub(super) const ROOM: usize = 64;

/// Control messages of one datagram.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct Control([u8; ROOM]);

/// What the kernel told of a datagram beside its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    /// The local address it was sent to.
    pub(super) local: Option<IpAddr>,
    /// How long each datagram is of those that were coalesced into it.
    pub(super) segment: Option<usize>,
}

impl Control {
    /// What [`Self::write_segment`] adds.
    pub(super) const SEGMENT: usize = (HEADER + 2).next_multiple_of(mem::size_of::<usize>());

    pub(super) const fn new() -> Self {
        Self([0; ROOM])
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    /// Of the first `length` bytes, which the kernel has written.
    pub(super) fn read(&self, length: usize) -> Told {
        let mut told = Told::default();
        let mut rest = &self.0[..length.min(ROOM)];
        while let Some((level, kind, data, after)) = first_message(rest) {
            match (level, kind) {
                // in_pktinfo: interface, local address, destination in the header.
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let octets = data.get(8..).and_then(|address| address.first_chunk::<4>());
                    told.local = octets.map(|octets| Ipv4Addr::from(*octets).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let octets = data.first_chunk::<16>();
                    told.local = octets.map(|octets| Ipv6Addr::from(*octets).to_canonical());
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let size = data.first_chunk::<4>().map(|size| i32::from_ne_bytes(*size));
                    told.segment = size.and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
                }
                _ => {}
            }
            rest = after;
        }
        told
    }

    /// Adds the source address behind `length` bytes; gives the new length. `v6` says what kind of socket sends.
    pub(super) fn write_source(&mut self, length: usize, v6: bool, from: IpAddr) -> usize {
        match (v6, from) {
            (false, IpAddr::V4(ip)) => {
                let mut info = [0; 12];
                info[4..8].copy_from_slice(&ip.octets());
                self.write(length, libc::IPPROTO_IP, libc::IP_PKTINFO, &info)
            }
            (_, ip) => {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                let mut info = [0; 20];
                info[..16].copy_from_slice(&ip.octets());
                self.write(length, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)
            }
        }
    }

    /// Adds that the kernel is to cut what is sent into datagrams of `segment` bytes.
    pub(super) fn write_segment(&mut self, length: usize, segment: u16) -> usize {
        self.write(length, libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes())
    }

    fn write(&mut self, at: usize, level: i32, kind: i32, data: &[u8]) -> usize {
        let message = &mut self.0[at..];
        message[..8].copy_from_slice(&(HEADER + data.len()).to_ne_bytes());
        message[8..12].copy_from_slice(&level.to_ne_bytes());
        message[12..16].copy_from_slice(&kind.to_ne_bytes());
        message[HEADER..HEADER + data.len()].copy_from_slice(data);
        at + aligned(HEADER + data.len())
    }
}

/// Level, kind and data of the first control message, and what follows it.
fn first_message(control: &[u8]) -> Option<(i32, i32, &[u8], &[u8])> {
    let length = usize::from_ne_bytes(*control.first_chunk()?);
    let number = |at: usize| control.get(at..)?.first_chunk().map(|number| i32::from_ne_bytes(*number));
    let data = control.get(HEADER..length)?;
    let after = control.get(aligned(length)..).unwrap_or_default();
    Some((number(8)?, number(12)?, data, after))
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(mem::size_of::<usize>())
}

/// A socket address; IPv4 is never in its IPv6-mapped form. `None` if it makes no sense.
#[expect(unsafe_code, reason = "a sockaddr_storage is read by its family")]
pub(super) fn read_name(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
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

/// Room for the address of either family.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union Name {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    pub(super) const LENGTH_V4: u32 = mem::size_of::<libc::sockaddr_in>() as u32;
    pub(super) const LENGTH_V6: u32 = mem::size_of::<libc::sockaddr_in6>() as u32;

    /// The address, and how many bytes of it count.
    pub(super) fn of(address: SocketAddr) -> (Self, u32) {
        match address {
            SocketAddr::V4(v4) => {
                let v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                (Self { v4 }, Self::LENGTH_V4)
            }
            SocketAddr::V6(v6) => {
                let v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                (Self { v6 }, Self::LENGTH_V6)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{Control, Told};

    #[test]
    fn what_is_written_is_read() {
        for (v6, from) in [(false, "192.0.2.1"), (true, "2001:db8::1"), (true, "192.0.2.1")] {
            let from: IpAddr = from.parse().unwrap();
            let mut control = Control::new();
            let length = control.write_source(0, v6, from);
            // The sender's in_pktinfo names its source where the receiver's names the destination.
            if v6 {
                assert_eq!(control.read(length), Told { local: Some(from), segment: None });
            }
            let both = control.write_segment(length, 1_200);
            assert!(both <= super::ROOM && both > length);
        }
    }

    #[test]
    fn what_lies_about_its_length_is_not_read() {
        let mut control = Control::new();
        control.0[..8].copy_from_slice(&1_000usize.to_ne_bytes());
        assert_eq!(control.read(64), Told::default());
        assert_eq!(control.read(3), Told::default());
        assert_eq!(control.read(0), Told::default());
    }
}
