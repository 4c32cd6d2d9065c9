//! Send and Data indications (RFC 8656 §11): read as a view, and a head for the payload where it lies.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::Deref,
};

use super::{PeerAddr, demux::SEND_INDICATION};

/// Bytes before the payload of a Data indication at most: header, XOR-PEER-ADDRESS for IPv6, DATA's own header.
const LONGEST_HEAD: usize = 20 + 24 + 4;

/// The longest Data indication on a stream: Firefox reads no longer message there, and ends the connection.
pub const LONGEST_ON_STREAM: usize = 2_048;

const COOKIE: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const HEADER: usize = 20;
const DATA_INDICATION: [u8; 2] = [0x00, 0x17];
const XOR_PEER_ADDRESS: u16 = 0x0012;
const DATA: u16 = 0x0013;
/// Attributes from here on need not be understood (RFC 8489 §14).
const OPTIONAL: u16 = 0x8000;

/// The peer and the payload of a Send indication. `None` if it is broken, or asks for something that we do not do
/// (DONT-FRAGMENT among it): indications have no answer.
#[must_use]
pub fn parse_send(message: &[u8]) -> Option<(PeerAddr, &[u8])> {
    let (header, attributes) = message.split_first_chunk::<HEADER>()?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let honest = header.starts_with(&SEND_INDICATION) && header[4..8] == COOKIE && length == attributes.len();
    if !honest {
        return None;
    }
    let (mut peer, mut data) = (None, None);
    let mut rest = attributes;
    while let Some((kind, value, after)) = next_attribute(rest) {
        match kind {
            XOR_PEER_ADDRESS if peer.is_none() => peer = Some(parse_address(value, header)?),
            DATA if data.is_none() => data = Some(value),
            XOR_PEER_ADDRESS | DATA | OPTIONAL.. => {}
            _ => return None,
        }
        rest = after;
    }
    rest.is_empty().then_some(())?;
    Some((PeerAddr(peer?), data?))
}

/// Type, value, and what follows the padding.
fn next_attribute(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<4>()?;
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let value = rest.get(..length)?;
    let after = rest.get(length.next_multiple_of(4)..)?;
    Some((u16::from_be_bytes([header[0], header[1]]), value, after))
}

fn parse_address(value: &[u8], header: &[u8; HEADER]) -> Option<SocketAddr> {
    let (start, address) = value.split_first_chunk::<4>()?;
    let port = u16::from_be_bytes([start[2] ^ COOKIE[0], start[3] ^ COOKIE[1]]);
    let ip = match start[1] {
        1 => IpAddr::V4(Ipv4Addr::from(xor::<4>(address, header)?)),
        2 => IpAddr::V6(Ipv6Addr::from(xor::<16>(address, header)?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// XOR with the cookie and the transaction id (RFC 8489 §14.2).
fn xor<const N: usize>(address: &[u8], header: &[u8; HEADER]) -> Option<[u8; N]> {
    let mut octets: [u8; N] = address.try_into().ok()?;
    octets.iter_mut().zip(&header[4..]).for_each(|(octet, mask)| *octet ^= mask);
    Some(octets)
}

/// Bytes of a Data indication from `peer` with `length` bytes of payload.
#[must_use]
pub fn data_length(peer: PeerAddr, length: usize) -> usize {
    overhead(peer) + length.next_multiple_of(4)
}

fn overhead(peer: PeerAddr) -> usize {
    HEADER + 4 + address_length(peer) + 4
}

fn address_length(peer: PeerAddr) -> usize {
    if peer.0.is_ipv4() { 8 } else { 20 }
}

/// What stands before the payload of a Data indication.
#[derive(Clone, Copy, Debug)]
pub struct DataHead {
    bytes: [u8; LONGEST_HEAD],
    length: usize,
}

impl Deref for DataHead {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The head of a Data indication with `length` bytes of payload, which are to be [padded](padding). `transaction` should
/// differ from message to message.
#[must_use]
pub fn data_head(length: usize, peer: PeerAddr, transaction: [u8; 12]) -> DataHead {
    let address = address_length(peer);
    let mut head = DataHead { bytes: [0; LONGEST_HEAD], length: overhead(peer) };
    let (header, attributes) = head.bytes[..head.length].split_at_mut(HEADER);
    header[..2].copy_from_slice(&DATA_INDICATION);
    header[2..4].copy_from_slice(&((data_length(peer, length) - HEADER) as u16).to_be_bytes());
    header[4..8].copy_from_slice(&COOKIE);
    header[8..].copy_from_slice(&transaction);

    attributes[..2].copy_from_slice(&XOR_PEER_ADDRESS.to_be_bytes());
    attributes[2..4].copy_from_slice(&(address as u16).to_be_bytes());
    write_address(&mut attributes[4..4 + address], peer.0, header);
    attributes[4 + address..][..2].copy_from_slice(&DATA.to_be_bytes());
    attributes[6 + address..].copy_from_slice(&(length as u16).to_be_bytes());
    head
}

/// Zeroes behind `length` bytes, up to the next multiple of four.
#[must_use]
pub fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

fn write_address(value: &mut [u8], peer: SocketAddr, header: &[u8]) {
    value[0] = 0;
    value[1] = if peer.is_ipv4() { 1 } else { 2 };
    value[2..4].copy_from_slice(&peer.port().to_be_bytes());
    match peer.ip() {
        IpAddr::V4(ip) => value[4..].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => value[4..].copy_from_slice(&ip.octets()),
    }
    value[2..4].iter_mut().zip(&COOKIE).for_each(|(octet, mask)| *octet ^= mask);
    value[4..].iter_mut().zip(&header[4..]).for_each(|(octet, mask)| *octet ^= mask);
}
