//! Ethernet frames with UDP in them, written and read without a look at how the program does it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The header of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub to: [u8; 6],
    pub from: [u8; 6],
    /// Of VLANs, with their types.
    pub tags: Vec<[u8; 4]>,
}

impl Link {
    pub fn reversed(&self) -> Self {
        Self { to: self.from, from: self.to, tags: self.tags.clone() }
    }
}

/// What a router changes, or must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    pub traffic_class: u8,
    pub hops: u8,
    /// Of IPv4.
    pub dont_fragment: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    Right,
    /// IPv4 may do without.
    None,
    /// As the kernel hands it to a card that is to finish it.
    Unfinished,
    /// Of another packet.
    Wrong,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub link: Link,
    pub ip: Ip,
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub payload: Vec<u8>,
    pub checksum: Checksum,
}

/// What a frame must have to be relayed where it arrives.
impl Frame {
    pub fn write(&self) -> Vec<u8> {
        let mut bytes = [&self.link.to[..], &self.link.from].concat();
        self.link.tags.iter().for_each(|tag| bytes.extend(tag));
        let udp = self.udp();
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                bytes.extend([8, 0]);
                bytes.extend(ipv4(&self.ip, from, to, udp.len()));
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                bytes.extend([
                    0x86,
                    0xdd,
                    0x60 | self.ip.traffic_class >> 4,
                    self.ip.traffic_class << 4,
                    0,
                    0,
                ]);
                bytes.extend((udp.len() as u16).to_be_bytes());
                bytes.extend([17, self.ip.hops]);
                bytes.extend(from.octets());
                bytes.extend(to.octets());
            }
            both => panic!("{both:?}"),
        }
        bytes.extend(udp);
        bytes
    }

    fn udp(&self) -> Vec<u8> {
        let length = (8 + self.payload.len()) as u16;
        let [from, to, length] = [self.from.port(), self.to.port(), length].map(u16::to_be_bytes);
        let mut udp = [&from[..], &to, &length, &[0, 0], &self.payload].concat();
        let pseudo = pseudo(self.from.ip(), self.to.ip(), udp.len());
        let right = !folded(pseudo + sum(&udp));
        let checksum = match self.checksum {
            Checksum::Right if right == 0 => 0xffff,
            Checksum::Right => right,
            Checksum::None => 0,
            Checksum::Unfinished => folded(pseudo),
            Checksum::Wrong => right ^ 0x5a5a,
        };
        udp[6..8].copy_from_slice(&checksum.to_be_bytes());
        udp
    }

    /// `None` for all that is not one whole UDP packet without options, to one machine, under two tags at most.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        Self::read_as(bytes, false)
    }

    /// The same for what the program has sent, which has a checksum or none.
    pub fn read_sent(bytes: &[u8]) -> Option<Self> {
        Self::read_as(bytes, true)
    }

    fn read_as(bytes: &[u8], was_sent: bool) -> Option<Self> {
        let (macs, mut rest) = bytes.split_at_checked(12)?;
        let mut link = Link { to: *macs.first_chunk()?, from: *macs[6..].first_chunk()?, tags: Vec::new() };
        while let [0x81, 0, ..] | [0x88, 0xa8, ..] = rest {
            link.tags.push(*rest.first_chunk()?);
            rest = &rest[4..];
        }
        if link.tags.len() > 2 || (link.to[0] | link.from[0]) & 1 == 1 {
            return None;
        }
        let (kind, packet) = rest.split_at_checked(2)?;
        let (ip, [from, to], udp) = match kind {
            [8, 0] => read_ipv4(packet)?,
            [0x86, 0xdd] => read_ipv6(packet)?,
            _ => return None,
        };
        let word = |at: usize| Some(u16::from_be_bytes([*udp.get(at)?, *udp.get(at + 1)?]));
        if usize::from(word(4)?) != udp.len() || udp.len() < 8 {
            return None;
        }
        let checksum = match (word(6)?, folded(pseudo(from, to, udp.len()))) {
            (0, _) => Checksum::None,
            // One packet in 65,536 is right and looks unfinished, too.
            (written, unfinished) if written == unfinished && !was_sent => Checksum::Unfinished,
            _ if folded(pseudo(from, to, udp.len()) + sum(udp)) == 0xffff => Checksum::Right,
            _ => Checksum::Wrong,
        };
        let [from, to] = [SocketAddr::new(from, word(0)?), SocketAddr::new(to, word(2)?)];
        Some(Self { link, ip, from, to, payload: udp[8..].to_vec(), checksum })
    }
}

/// Addresses and UDP of one packet.
type Packet<'a> = (Ip, [IpAddr; 2], &'a [u8]);

fn read_ipv4(packet: &[u8]) -> Option<Packet<'_>> {
    let header: &[u8; 20] = packet.first_chunk()?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let fragments = u16::from_be_bytes([header[6], header[7]]);
    if header[0] != 0x45 || header[9] != 17 || fragments & !0x4000 != 0 || folded(sum(header)) != 0xffff {
        return None;
    }
    let [from, to] = [12, 16].map(|at| *header[at..].first_chunk::<4>().expect("there are 20 bytes"));
    let ip = Ip { traffic_class: header[1], hops: header[8], dont_fragment: fragments != 0 };
    Some((ip, [Ipv4Addr::from(from).into(), Ipv4Addr::from(to).into()], packet.get(20..total)?))
}

fn read_ipv6(packet: &[u8]) -> Option<Packet<'_>> {
    let header: &[u8; 40] = packet.first_chunk()?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || header[6] != 17 {
        return None;
    }
    let [from, to] = [8, 24].map(|at| *header[at..].first_chunk::<16>().expect("there are 40 bytes"));
    let traffic_class = header[0] << 4 | header[1] >> 4;
    let ip = Ip { traffic_class, hops: header[7], dont_fragment: true };
    Some((ip, [Ipv6Addr::from(from).into(), Ipv6Addr::from(to).into()], packet.get(40..40 + length)?))
}

fn ipv4(ip: &Ip, from: Ipv4Addr, to: Ipv4Addr, udp: usize) -> Vec<u8> {
    let mut header = vec![0x45, ip.traffic_class];
    header.extend(((20 + udp) as u16).to_be_bytes());
    header.extend([0x12, 0x34, if ip.dont_fragment { 0x40 } else { 0 }, 0, ip.hops, 17, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let checksum = !folded(sum(&header));
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
    header
}

/// Makes the checksum of an IPv4 header without options right again, where one begins behind 14 bytes.
pub fn mend_header(bytes: &mut [u8]) {
    if bytes.len() >= 34 && bytes[14] >> 4 == 4 {
        bytes[24..26].fill(0);
        let checksum = !folded(sum(&bytes[14..34]));
        bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    }
}

fn pseudo(from: IpAddr, to: IpAddr, udp: usize) -> u64 {
    let of = |ip| match ip {
        IpAddr::V4(v4) => sum(&Ipv4Addr::octets(&v4)),
        IpAddr::V6(v6) => sum(&Ipv6Addr::octets(&v6)),
    };
    of(from) + of(to) + 17 + udp as u64
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn folded(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
