//! The TURN server as a state machine (RFC 8656 on RFC 8489): bytes and `now` in, replies and effects out.
//!
//! One [`server::Server`] is one shard's world. A packet's way: [`demux`] says what it is; ChannelData and Send
//! indications touch [`forward`] and nothing else; a request goes through [`server`], [`auth`] and its [`method`].

pub mod allocation;
mod answers;
pub mod auth;
pub mod bandwidth;
pub mod channel_data;
pub mod counters;
pub mod demux;
pub mod forward;
pub mod framing;
pub mod indication;
mod method;
pub mod nonce;
pub mod policy;
pub mod ports;
pub mod quota;
mod rate;
pub mod refusal;
mod reply;
pub mod server;
pub mod strangers;
mod timers;

use std::net::{IpAddr, SocketAddr};

/// What a client speaks over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// A stream, TLS or not.
    Tcp,
}

impl Transport {
    /// The name in metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }
}

/// Who talks to us, where, and over what: the identity of an allocation (RFC 8656 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FiveTuple {
    /// The client's transport address as we see it.
    pub client: SocketAddr,
    /// Our address that the client sent to.
    pub server: SocketAddr,
    /// UDP or TCP.
    pub transport: Transport,
}

/// The transport address of a peer, as the client names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerAddr(pub SocketAddr);

/// A pair of addresses that relay sockets use: where they are bound, and what the world sees (they differ behind 1:1
/// NAT). Both are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayAddress {
    /// A local address.
    pub bound: IpAddr,
    /// What peers see.
    pub public: IpAddr,
}

/// One port of one relay address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayPort {
    /// Index into the relay addresses.
    pub relay: u8,
    /// The port, the same inside and outside of a 1:1 NAT.
    pub port: u16,
}

/// A channel number, 0x4000–0x7FFF. RFC 8656 §12 stops at 0x4FFF; clients in use do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Channel(u16);

impl Channel {
    /// `None` outside of the range.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        (0x4000..=0x7fff).contains(&number).then_some(Self(number))
    }

    /// The number on the wire.
    #[must_use]
    pub fn number(self) -> u16 {
        self.0
    }
}

/// Names one allocation of one server; may be reused after the allocation has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AllocationId(pub(crate) usize);

/// An address family that relayed addresses have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// 0x01 on the wire.
    V4,
    /// 0x02 on the wire.
    V6,
}

impl Family {
    /// The family of `ip`.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The name in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}
