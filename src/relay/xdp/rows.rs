//! The memory that this process and the program in the kernel share, as `xdp/relay.c` lays it out. All addresses and ports
//! are as on the wire.
#![expect(unsafe_code, reason = "the memory is the kernel's, and has no safe wrapper")]

use std::{
    cell::UnsafeCell,
    hash::{BuildHasher, RandomState},
    io, mem,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    ptr,
    sync::atomic::{
        AtomicU64,
        Ordering::{Relaxed, Release},
    },
};

use crate::turn::{Channel, bandwidth::Account};

/// A UDP five-tuple as it arrives, and the channel that its payload names; for packets from peers, none.
pub type Key = [u8; 40];

/// Which flow a [`Key`] belongs to, and of which generation.
pub type Route = [u32; 2];

/// An IPv6 address, or an IPv4 address in its mapped form, aligned as in the program.
type Address = [u64; 2];

/// One end of a flow: our address there, and who is reached from it.
#[derive(Clone, Copy, Debug)]
pub struct End {
    addresses: [Address; 2],
    rest: OfEnd,
    link: Link,
}

/// A way out of this machine, and who is next on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Our interface there.
    pub interface: Interface,
    /// The address of the next machine on that link, if it is known.
    pub next: Option<[u8; 6]>,
}

/// An interface that has the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The index of the interface where packets arrive.
    pub index: u32,
    /// Its address.
    pub address: [u8; 6],
    /// The VLAN's number in its packets.
    pub vlan: Option<u16>,
    /// What packets are learned from: its index, or [`Interface::ANY`].
    pub way: u32,
}

impl Interface {
    /// Where there is but one, or where packets arrive at several that are one (bonds), its index is of no use.
    pub const ANY: u32 = u32::MAX;
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct OfEnd {
    sum: u32,
    label: [u8; 4],
    local_port: [u8; 2],
    remote_port: [u8; 2],
    v6: u8,
    zero: [u8; 3],
}

/// Learned by the program, or told to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    header: [u8; 20],
    length: u16,
    heard: u16,
    interface: u32,
    way: u32,
}

impl Link {
    /// The header by which it would send to us, if that is known.
    fn of(hop: &Hop) -> Self {
        let Interface { index: interface, address, vlan, way } = hop.interface;
        let Some(next) = hop.next else { return Self { interface, way, ..Self::default() } };
        let mut header = [0; 20];
        header[..6].copy_from_slice(&address);
        header[6..12].copy_from_slice(&next);
        if let Some(vlan) = vlan {
            header[12..14].copy_from_slice(&VLAN);
            header[14..16].copy_from_slice(&vlan.to_be_bytes());
        }
        let length = if vlan.is_some() { 18 } else { 14 };
        Self { header, length, heard: 0, interface, way }
    }
}

/// The type of a tag (IEEE 802.1Q).
const VLAN: [u8; 2] = [0x81, 0x00];

/// Where one end is, and what the program has sent there.
#[repr(C)]
#[derive(Debug)]
pub struct Far {
    addresses: UnsafeCell<[Address; 2]>,
    packets: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    last: AtomicU64,
}

/// What a [`Far`] has counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Relayed.
    pub packets: u64,
    /// Of payload.
    pub bytes: u64,
    /// More than the agent may relay.
    pub dropped: u64,
    /// When the last one came, in nanoseconds of CLOCK_MONOTONIC.
    pub last: u64,
}

/// A channel of a client.
#[repr(C)]
#[derive(Debug)]
pub struct Flow {
    until: AtomicU64,
    rest: UnsafeCell<Rest>,
    links: UnsafeCell<[Link; 2]>,
    /// From the peer.
    pub to_client: Far,
    /// From the client.
    pub to_peer: Far,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Rest {
    generation: u32,
    account: u32,
    ends: [OfEnd; 2],
    channel: [u8; 2],
    here: u8,
    crosses: u8,
    zero: [u8; 12],
}

/// All that the program must know of a channel.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Towards the client.
    pub client: End,
    /// Towards the peer.
    pub peer: End,
    /// In nanoseconds of CLOCK_MONOTONIC.
    pub until: u64,
    /// Tells this use of the memory from those before.
    pub generation: u32,
    /// The account's number and one; 0: without a limit.
    pub account: u32,
    /// Its number.
    pub channel: Channel,
    /// Whether the peer is a relayed address of this host.
    pub here: bool,
    /// Whether packets may leave by another interface than they came by.
    pub crosses: bool,
}

// SAFETY: what is not atomic is written by the one shard that has the flow, at times when no route leads the program there.
unsafe impl Sync for Flow {}

impl Flow {
    /// Writes everything anew. No route may lead here, and none may have for as long as the program may run.
    pub fn write(&self, facts: &Facts) {
        let Facts { client, peer, until, generation, account, channel, here, crosses } = *facts;
        let (ends, channel) = ([client.rest, peer.rest], channel.number().to_be_bytes());
        let (here, crosses) = (here.into(), crosses.into());
        let rest = Rest { generation, account, ends, channel, here, crosses, zero: [0; 12] };
        // SAFETY: nobody else reads or writes this flow now, says the caller.
        unsafe {
            self.rest.get().write_volatile(rest);
            self.links.get().write_volatile([client.link, peer.link]);
        }
        self.to_client.write(client.addresses);
        self.to_peer.write(peer.addresses);
        self.until.store(until, Release);
    }

    /// Whether the client has been heard by the program, and the peer.
    pub fn heard(&self) -> [bool; 2] {
        // SAFETY: any number that the program may be writing will do.
        unsafe { self.links.get().read_volatile() }.map(|link| link.heard != 0)
    }

    /// It ends then; 0: now.
    pub fn set_until(&self, until: u64) {
        self.until.store(until, Release);
    }
}

impl Far {
    /// The numbers, each for itself.
    pub fn read(&self) -> Counted {
        let Self { packets, bytes, dropped, last, .. } = self;
        Counted {
            packets: packets.load(Relaxed),
            bytes: bytes.load(Relaxed),
            dropped: dropped.load(Relaxed),
            last: last.load(Relaxed),
        }
    }

    fn write(&self, addresses: [Address; 2]) {
        // SAFETY: as in `Flow::write`, which alone calls this.
        unsafe { self.addresses.get().write_volatile(addresses) };
        [&self.packets, &self.bytes, &self.dropped, &self.last]
            .iter()
            .for_each(|count| count.store(0, Relaxed));
    }
}

impl End {
    /// Both addresses are of one family. `labels` gives IPv6 its flow labels (RFC 6437).
    pub fn new(local: SocketAddr, remote: SocketAddr, labels: &RandomState, hop: Option<Hop>) -> Self {
        let v6 = remote.is_ipv6();
        let label = if v6 { labels.hash_one((local, remote)) as u32 & 0x000f_ffff } else { 0 };
        let rest = OfEnd {
            sum: folded(sum(local) + sum(remote)),
            label: label.to_be_bytes(),
            local_port: local.port().to_be_bytes(),
            remote_port: remote.port().to_be_bytes(),
            v6: v6.into(),
            zero: [0; 3],
        };
        let link = hop.map_or_else(Link::default, |hop| Link::of(&hop));
        Self { addresses: [address(local.ip()), address(remote.ip())], rest, link }
    }
}

/// Of what arrives at `local` from `remote`.
pub fn key(local: SocketAddr, remote: SocketAddr, channel: Option<Channel>) -> Key {
    let mut key = [0; 40];
    key[..16].copy_from_slice(&octets(local.ip()));
    key[16..32].copy_from_slice(&octets(remote.ip()));
    key[32..34].copy_from_slice(&local.port().to_be_bytes());
    key[34..36].copy_from_slice(&remote.port().to_be_bytes());
    key[36..38].copy_from_slice(&channel.map_or(0, Channel::number).to_be_bytes());
    key
}

fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn address(ip: IpAddr) -> Address {
    let octets = octets(ip);
    [0, 8].map(|at| u64::from_ne_bytes(*octets[at..].first_chunk().expect("there are 16")))
}

/// What an address and a port add to the checksum of a packet, in the byte order of this machine.
fn sum(at: SocketAddr) -> u32 {
    let word = |pair: &[u8]| u32::from(u16::from_ne_bytes([pair[0], pair[1]]));
    let words = |octets: &[u8]| octets.chunks(2).map(word).sum::<u32>();
    let ip = match at.ip() {
        IpAddr::V4(v4) => words(&v4.octets()),
        IpAddr::V6(v6) => words(&v6.octets()),
    };
    ip + word(&at.port().to_be_bytes())
}

/// As checksums add up: what is carried over the top counts at the bottom.
fn folded(mut sum: u32) -> u32 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// A value of a map that both sides may read and write.
///
/// # Safety
/// Every pattern of bits that the program may write is one of these, and all that changes is atomic, or in a cell.
pub unsafe trait Shared: Sync + 'static {}

// SAFETY: what the program writes are atomic numbers, and the links of ends, which are plain bytes in a cell.
unsafe impl Shared for Flow {}
// SAFETY: all of it is atomic.
unsafe impl Shared for Account {}

/// The values of an array in the kernel, for as long as this process lives.
///
/// # Errors
/// What the kernel says.
pub fn mapped<T: Shared>(map: BorrowedFd<'_>, count: usize) -> io::Result<&'static [T]> {
    const { assert!(mem::size_of::<T>().is_multiple_of(8)) };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses the place, and checks the length.
    let at = unsafe {
        libc::mmap(ptr::null_mut(), count * mem::size_of::<T>(), access, libc::MAP_SHARED, map.as_raw_fd(), 0)
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: so long is what was mapped, zeroes at first, for `T` as [`Shared`] says, and it is never unmapped.
    Ok(unsafe { std::slice::from_raw_parts(at.cast::<T>(), count) })
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::{Far, Flow};
    use crate::turn::bandwidth::Account;

    #[test]
    fn the_layout_is_that_of_the_program() {
        assert_eq!((size_of::<Flow>(), size_of::<Far>(), size_of::<Account>()), (256, 64, 40));
        assert_eq!((offset_of!(Flow, links), offset_of!(Flow, to_client)), (64, 128));
    }
}
