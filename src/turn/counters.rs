//! What one shard has counted since it started. Plain numbers: the shell publishes copies.

use super::{
    allocation::Why,
    refusal::{CODES, Refusal},
};

/// One shard's counters; add them up over shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Allocations alive now.
    pub allocations: u64,
    /// Of these, the ones whose client is on TCP or TLS.
    pub allocations_on_streams: u64,
    /// Clients whose allocations the process before this one has, and whose datagrams go there.
    pub handed_over: u64,
    /// Ports of relayed addresses.
    pub ports: PortCounts,
    /// Deadlines that wait for their time.
    pub deadlines: u64,
    /// Relay clients on TCP without TLS, and with it.
    pub streams: [u64; 2],
    /// Allocations ever made.
    pub allocations_made: u64,
    /// Allocations that have ended, in the order of [`Why::ALL`].
    pub ended: [u64; Why::ALL.len()],
    /// Bytes for clients on streams that the kernel has not taken yet.
    pub waiting: u64,
    /// The shell's turns.
    pub turns: Turns,
    /// STUN Binding requests answered.
    pub bindings: u64,
    /// From clients to their peers.
    pub to_peers: Traffic,
    /// From peers to their clients.
    pub to_clients: Traffic,
    /// Error responses, in the order of [`CODES`].
    pub refusals: [u64; CODES.len()],
    /// Packets dropped, in the order of [`Dropped::ALL`].
    pub drops: [u64; Dropped::ALL.len()],
    /// What another path than this one has done of all that.
    pub elsewhere: Elsewhere,
}

/// The path that follows the routes and relays beside this one (`turn.xdp`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Elsewhere {
    /// Interfaces that have it in their drivers, and in the stack.
    pub interfaces: [u64; 2],
    /// Channels that it knows.
    pub channels: u64,
    /// From clients to their peers; in [`Counters::to_peers`], too.
    pub to_peers: Traffic,
    /// From peers to their clients; in [`Counters::to_clients`], too.
    pub to_clients: Traffic,
    /// Packets of channels that it left to this one, in the order of [`PASSED`].
    pub passed: [u64; PASSED.len()],
}

/// Why the other path left a packet to this one, in the order of its own numbers, by the names in metrics.
pub const PASSED: [&str; 10] = [
    "link_unknown",
    "no_channel_back",
    "last_hop",
    "unfinished_checksum",
    "no_checksum",
    "too_long",
    "ended",
    "no_room",
    "other_way",
    "no_crossing",
];

impl std::ops::AddAssign<&Self> for Elsewhere {
    fn add_assign(&mut self, other: &Self) {
        self.interfaces.iter_mut().zip(other.interfaces).for_each(|(sum, more)| *sum += more);
        self.channels += other.channels;
        self.to_peers += other.to_peers;
        self.to_clients += other.to_clients;
        self.passed.iter_mut().zip(other.passed).for_each(|(sum, more)| *sum += more);
    }
}

/// Ports of relayed addresses, of all families together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounts {
    /// Not bound by us.
    pub free: u64,
    /// Bound ahead of demand.
    pub bound: u64,
    /// Held by an allocation.
    pub live: u64,
}

impl std::ops::AddAssign for PortCounts {
    fn add_assign(&mut self, other: Self) {
        self.free += other.free;
        self.bound += other.bound;
        self.live += other.live;
    }
}

/// How long turns took, each from the wake-up to the last packet sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    /// Those that took as long as one of [`Turns::BOUNDS`] at most, and longer than the one before; then those above all.
    pub counts: [u64; Self::BOUNDS.len() + 1],
    /// All together.
    pub micros: u64,
}

impl Turns {
    /// Microseconds.
    pub const BOUNDS: [u64; 9] = [50, 100, 250, 500, 1_000, 2_500, 10_000, 50_000, 250_000];

    /// One more.
    pub fn add(&mut self, micros: u64) {
        self.counts[Self::BOUNDS.partition_point(|bound| *bound < micros)] += 1;
        self.micros += micros;
    }
}

impl std::ops::AddAssign for Turns {
    fn add_assign(&mut self, other: Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(sum, more)| *sum += more);
        self.micros += other.micros;
    }
}

/// Relayed payload, without any header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Datagrams.
    pub packets: u64,
    /// Bytes of payload.
    pub bytes: u64,
}

impl Traffic {
    /// So many more datagrams with `length` bytes of payload each.
    pub fn add(&mut self, packets: usize, length: usize) {
        self.packets += packets as u64;
        self.bytes += (packets * length) as u64;
    }
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// Why a packet went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// Neither STUN nor ChannelData, or broken.
    Malformed,
    /// From a client without an allocation, or to a relayed address without one.
    NoAllocation,
    /// On a channel that is not bound.
    NoChannel,
    /// To or from a peer without a permission.
    NoPermission,
    /// To a peer that policy denies.
    Denied,
    /// From a peer, and longer as a Data indication than clients on streams can read.
    TooLarge,
    /// Over what its agent may relay in a second.
    Bandwidth,
    /// An answer to a stranger, whose source prefix has had its share.
    Budget,
    /// The kernel would not take it: a full socket buffer, no route. Or another shard would not: too much waits there.
    Unsendable,
    /// It came faster than it was read: the socket's receive buffer was full.
    Overflow,
}

impl Dropped {
    /// All reasons, in the order of [`Counters::drops`].
    pub const ALL: [Self; 10] = [
        Self::Malformed,
        Self::NoAllocation,
        Self::NoChannel,
        Self::NoPermission,
        Self::Denied,
        Self::TooLarge,
        Self::Bandwidth,
        Self::Budget,
        Self::Unsendable,
        Self::Overflow,
    ];

    /// The name in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoAllocation => "no_allocation",
            Self::NoChannel => "no_channel",
            Self::NoPermission => "no_permission",
            Self::Denied => "denied",
            Self::TooLarge => "too_large",
            Self::Bandwidth => "bandwidth",
            Self::Budget => "budget",
            Self::Unsendable => "unsendable",
            Self::Overflow => "overflow",
        }
    }
}

impl Counters {
    /// So many more packets that went nowhere.
    pub fn dropped(&mut self, why: Dropped, packets: u64) {
        self.drops[why as usize] += packets;
    }

    /// One more error response.
    pub fn refused(&mut self, refusal: &Refusal) {
        let index = CODES.binary_search(&refusal.code()).expect("CODES holds the code of every refusal");
        self.refusals[index] += 1;
    }
}

impl std::ops::AddAssign<&Self> for Counters {
    fn add_assign(&mut self, other: &Self) {
        self.allocations += other.allocations;
        self.allocations_on_streams += other.allocations_on_streams;
        self.handed_over += other.handed_over;
        self.ports += other.ports;
        self.deadlines += other.deadlines;
        self.streams.iter_mut().zip(other.streams).for_each(|(sum, more)| *sum += more);
        self.allocations_made += other.allocations_made;
        self.ended.iter_mut().zip(other.ended).for_each(|(sum, more)| *sum += more);
        self.waiting += other.waiting;
        self.turns += other.turns;
        self.bindings += other.bindings;
        self.to_peers += other.to_peers;
        self.to_clients += other.to_clients;
        self.refusals.iter_mut().zip(other.refusals).for_each(|(sum, more)| *sum += more);
        self.drops.iter_mut().zip(other.drops).for_each(|(sum, more)| *sum += more);
        self.elsewhere += &other.elsewhere;
    }
}
