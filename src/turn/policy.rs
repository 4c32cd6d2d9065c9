//! Which peers may be reached.
//!
//! In this order: a live relayed address of this host, yes; one of its own listeners, no; `deny_peers`, no;
//! `allow_peers`, yes; any other address of this host, no; the default list, no; the rest, yes. Where `peer_policy` is
//! `signaled`, each yes but the first is for agents who were told of the address.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{RelayAddress, RelayPort};
use crate::{clock::Now, credentials::signaled::Signaled};

/// How a denied peer is answered (`turn.denied_peers`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeniedPeers {
    /// 403, signed, at once.
    Refuse,
    /// Granted, and every packet dropped: for clients that one refusal breaks.
    Discard,
}

/// Whether a peer must have been signaled (`turn.peer_policy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerPolicy {
    /// It need not.
    Open,
    /// Another agent of the room must have told the agent of it.
    Signaled,
}

/// What a permission for an IP address is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Every port.
    Open,
    /// An address of our own: the port decides, packet by packet.
    Checked,
    /// An address of our own that nobody was told of: live relayed addresses alone.
    Relayed,
    /// No port: granted for the client's sake only.
    Discarded,
}

/// The rules, and what this host is.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The addresses that relay sockets use.
    pub relays: Vec<RelayAddress>,
    /// All addresses of this host's interfaces.
    pub own_addresses: Vec<IpAddr>,
    /// Where this host listens; an unspecified address means all of its family (IPv6: of both).
    pub listeners: Vec<SocketAddr>,
    /// CIDRs that may be relayed to although the default list denies them.
    pub allow: Vec<IpNet>,
    /// CIDRs denied on top of the default list.
    pub deny: Vec<IpNet>,
    /// How a denied peer is answered.
    pub denied: DeniedPeers,
    /// The relayed addresses that are live, in all shards.
    pub live: LivePorts,
    /// What agents were told, where that matters.
    pub signaled: Option<Signaled>,
}

/// A peer that may not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied;

impl Policy {
    /// Whether a permission for `ip` may be had, and what it is worth.
    ///
    /// # Errors
    /// [`Denied`] where the answer is 403.
    pub fn permit(&self, ip: IpAddr) -> Result<Reach, Denied> {
        if self.relays.iter().any(|relay| relay.public == ip) {
            return Ok(Reach::Checked);
        }
        if listed(&self.deny, ip) {
            return self.deny(ip);
        }
        if listed(&self.allow, ip) {
            return Ok(if self.is_own(ip) { Reach::Checked } else { Reach::Open });
        }
        if self.is_own(ip) || denied_by_default(ip) { self.deny(ip) } else { Ok(Reach::Open) }
    }

    /// The same for one agent, who may have to be told of the address first.
    ///
    /// # Errors
    /// [`Denied`] where the answer is 403.
    pub fn permit_agent(&self, now: Now, agent: &str, ip: IpAddr) -> Result<Reach, Denied> {
        let reach = self.permit(ip)?;
        let is_told = |signaled: &Signaled| signaled.has_told(now, agent, ip);
        if reach == Reach::Discarded || self.signaled.as_ref().is_none_or(is_told) {
            Ok(reach)
        } else if self.relays.iter().any(|relay| relay.public == ip) {
            Ok(Reach::Relayed)
        } else {
            self.deny(ip)
        }
    }

    /// The same for one port: a channel to a listener of our own, or to port 0, is never granted.
    ///
    /// # Errors
    /// [`Denied`] where the answer is 403.
    pub fn permit_port(&self, now: Now, agent: &str, peer: SocketAddr) -> Result<Reach, Denied> {
        if peer.port() == 0 || (self.is_listener(peer) && self.live_relay(peer).is_none()) {
            return Err(Denied);
        }
        self.permit_agent(now, agent, peer.ip())
    }

    /// Whether a packet may go to `peer`, an address that was answered with this `reach`: [`Reach::Checked`] or
    /// [`Reach::Relayed`].
    #[must_use]
    pub fn admits(&self, peer: SocketAddr, reach: Reach) -> bool {
        self.live_relay(peer).is_some()
            || self.relay_port(peer).is_some_and(|port| self.live.is_elsewhere(port))
            || (reach == Reach::Checked
                && !self.is_listener(peer)
                && !listed(&self.deny, peer.ip())
                && listed(&self.allow, peer.ip()))
    }

    /// The allocation's port, if `peer` is the relayed address of one that lives on this host.
    #[must_use]
    pub fn live_relay(&self, peer: SocketAddr) -> Option<RelayPort> {
        self.relay_port(peer).filter(|port| self.live.contains(*port))
    }

    /// The port of ours that peers call `peer`, if they call one so.
    fn relay_port(&self, peer: SocketAddr) -> Option<RelayPort> {
        let relay = self.relays.iter().position(|relay| relay.public == peer.ip())?;
        Some(RelayPort { relay: relay as u8, port: peer.port() })
    }

    /// Another process on this host says whether an allocation of its own holds `bound`, a local address.
    pub fn set_elsewhere(&self, bound: SocketAddr, is_live: bool) {
        if let Some(port) = self.relay_port(self.outward(bound)) {
            self.live.set_elsewhere(port, is_live);
        }
    }

    /// What peers call a port of ours.
    #[must_use]
    pub fn relayed_address(&self, at: RelayPort) -> SocketAddr {
        SocketAddr::new(self.relays[usize::from(at.relay)].public, at.port)
    }

    /// Where to send what is meant for `peer`: behind 1:1 NAT our own public address is not one that we can reach.
    #[must_use]
    pub fn inward(&self, peer: SocketAddr) -> SocketAddr {
        let relay = self.relays.iter().find(|relay| relay.public == peer.ip());
        relay.map_or(peer, |relay| SocketAddr::new(relay.bound, peer.port()))
    }

    /// What `from`, the source of a packet on a relay socket, is called outside: the reverse of [`Self::inward`].
    #[must_use]
    pub fn outward(&self, from: SocketAddr) -> SocketAddr {
        let relay = self.relays.iter().find(|relay| relay.bound == from.ip());
        relay.map_or(from, |relay| SocketAddr::new(relay.public, from.port()))
    }

    /// A denied address is granted for discarding only where a client may meet it by honest means.
    fn deny(&self, ip: IpAddr) -> Result<Reach, Denied> {
        let never = self.is_own(ip)
            || ip.is_loopback()
            || METADATA.contains(&ip)
            || embedded(ip).is_some_and(is_hard);
        match self.denied {
            DeniedPeers::Discard if !never => Ok(Reach::Discarded),
            DeniedPeers::Discard | DeniedPeers::Refuse => Err(Denied),
        }
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        let relayed = self.relays.iter().any(|relay| relay.public == ip || relay.bound == ip);
        relayed || ip.is_loopback() || ip.is_unspecified() || self.own_addresses.contains(&ip)
    }

    fn is_listener(&self, peer: SocketAddr) -> bool {
        let at = |listener: &SocketAddr| {
            listener.port() == peer.port()
                && (listener.ip() == peer.ip() || (listener.ip().is_unspecified() && self.is_own(peer.ip())))
        };
        self.listeners.iter().any(at)
    }
}

fn is_hard(ip: Ipv4Addr) -> bool {
    ip.is_loopback() || METADATA.contains(&IpAddr::V4(ip))
}

fn listed(nets: &[IpNet], ip: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&ip))
}

/// Whether `ip` is loopback, private, CGNAT, link-local, multicast, broadcast, a metadata service, in any
/// special-purpose range of IANA's registries, or an IPv6 form that embeds such an address.
#[must_use]
pub fn denied_by_default(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => denied_v4(v4),
        IpAddr::V6(v6) => {
            DENIED_V6.iter().any(|net| net.contains(&v6)) || embedded(ip).is_some_and(denied_v4)
        }
    }
}

fn denied_v4(ip: Ipv4Addr) -> bool {
    DENIED_V4.iter().any(|net| net.contains(&ip)) || METADATA.contains(&IpAddr::V4(ip))
}

/// The IPv4 address inside an IPv6 address: mapped, compatible, translated (RFC 2765), NAT64 (RFC 6052), 6to4 (RFC
/// 3056), ISATAP (RFC 5214).
fn embedded(ip: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = ip else { return None };
    let last = |octets: [u8; 16]| Ipv4Addr::new(octets[12], octets[13], octets[14], octets[15]);
    let octets = v6.octets();
    match v6.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, _, _]
        | [0, 0, 0, 0, 0xffff, 0, _, _]
        | [0x64, 0xff9b, 0, 0, 0, 0, _, _] => Some(last(octets)),
        [0x2002, ..] => Some(Ipv4Addr::new(octets[2], octets[3], octets[4], octets[5])),
        [_, _, _, _, 0 | 0x200, 0x5efe, _, _] => Some(last(octets)),
        _ => None,
    }
}

/// Metadata services of cloud providers; the last three lie in ranges that are denied anyway.
const METADATA: [IpAddr; 5] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

const fn v4(a: u8, b: u8, c: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), prefix)
}

/// IANA's IPv4 Special-Purpose Address Registry, multicast and class E.
const DENIED_V4: [Ipv4Net; 18] = [
    v4(0, 0, 0, 8),
    v4(10, 0, 0, 8),
    v4(100, 64, 0, 10),
    v4(127, 0, 0, 8),
    v4(169, 254, 0, 16),
    v4(172, 16, 0, 12),
    v4(192, 0, 0, 24),
    v4(192, 0, 2, 24),
    v4(192, 31, 196, 24),
    v4(192, 52, 193, 24),
    v4(192, 88, 99, 24),
    v4(192, 168, 0, 16),
    v4(192, 175, 48, 24),
    v4(198, 18, 0, 15),
    v4(198, 51, 100, 24),
    v4(203, 0, 113, 24),
    v4(224, 0, 0, 4),
    v4(240, 0, 0, 4),
];

const fn v6(first: u16, second: u16, third: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, second, third, 0, 0, 0, 0, 0), prefix)
}

/// IANA's IPv6 Special-Purpose Address Registry, the deprecated and the embedding ranges, and multicast.
const DENIED_V6: [Ipv6Net; 17] = [
    v6(0, 0, 0, 64), // ::, ::1, IPv4-compatible, -mapped and -translated
    v6(0x64, 0xff9b, 0, 96),
    v6(0x64, 0xff9b, 1, 48),
    v6(0x100, 0, 0, 64),
    Ipv6Net::new_assert(Ipv6Addr::new(0x100, 0, 0, 1, 0, 0, 0, 0), 64),
    v6(0x2001, 0, 0, 23),
    v6(0x2001, 0xdb8, 0, 32),
    v6(0x2002, 0, 0, 16),
    v6(0x2620, 0x4f, 0x8000, 48),
    v6(0x3ffe, 0, 0, 16),
    v6(0x3fff, 0, 0, 20),
    v6(0x5f00, 0, 0, 16),
    v6(0xfc00, 0, 0, 7),
    v6(0xfe80, 0, 0, 10),
    v6(0xfec0, 0, 0, 10),
    v6(0xff00, 0, 0, 8),
    Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0xffff, 0, 0), 96),
];

/// Which relayed addresses are live, for all shards to see. A bit a port: readers never wait.
#[derive(Clone, Debug)]
pub struct LivePorts {
    here: Arc<[Bits]>,
    /// In the process before this one, or after, while there are two.
    elsewhere: Arc<[Bits]>,
}

type Bits = [AtomicU64; 1024];

impl LivePorts {
    /// None is live, for that many relay addresses.
    #[must_use]
    pub fn new(relays: usize) -> Self {
        let none = || (0..relays).map(|_| std::array::from_fn(|_| AtomicU64::new(0))).collect();
        Self { here: none(), elsewhere: none() }
    }

    /// Whether an allocation holds it.
    #[must_use]
    pub fn contains(&self, at: RelayPort) -> bool {
        is_set(&self.here, at)
    }

    /// Whether an allocation of another process on this host holds it.
    #[must_use]
    pub fn is_elsewhere(&self, at: RelayPort) -> bool {
        is_set(&self.elsewhere, at)
    }

    /// Another process says whether an allocation of its own holds it.
    pub fn set_elsewhere(&self, at: RelayPort, is_live: bool) {
        set(&self.elsewhere, at, is_live);
    }

    /// There is no other process any more.
    pub fn clear_elsewhere(&self) {
        self.elsewhere.iter().flatten().for_each(|word| word.store(0, Relaxed));
    }

    /// An allocation has it from now on.
    pub fn insert(&self, at: RelayPort) {
        set(&self.here, at, true);
    }

    /// No allocation has it any more.
    pub fn remove(&self, at: RelayPort) {
        set(&self.here, at, false);
    }
}

fn is_set(all: &[Bits], at: RelayPort) -> bool {
    let (word, bit) = locate(all, at);
    word.load(Relaxed) & bit != 0
}

fn set(all: &[Bits], at: RelayPort, is_live: bool) {
    let (word, bit) = locate(all, at);
    if is_live {
        word.fetch_or(bit, Relaxed)
    } else {
        word.fetch_and(!bit, Relaxed)
    };
}

fn locate(all: &[Bits], at: RelayPort) -> (&AtomicU64, u64) {
    (&all[usize::from(at.relay)][usize::from(at.port / 64)], 1 << (at.port % 64))
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use super::{Denied, DeniedPeers, LivePorts, Policy, Reach, Signaled, denied_by_default};
    use crate::{
        clock,
        turn::{RelayAddress, RelayPort},
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn policy(allow: &[&str], deny: &[&str], denied: DeniedPeers) -> Policy {
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let relays = vec![RelayAddress { bound: ip("10.0.0.5"), public: ip("5.5.5.5") }];
        Policy {
            live: LivePorts::new(relays.len()),
            relays,
            own_addresses: vec![ip("10.0.0.5"), ip("9.9.9.9")],
            listeners: vec![at("[::]:3478"), at("127.0.0.1:9478")],
            allow: nets(allow),
            deny: nets(deny),
            denied,
            signaled: None,
        }
    }

    #[test]
    fn every_special_address_and_every_ipv6_form_that_embeds_one() {
        let special = "0.0.0.0 0.1.2.3 127.0.0.1 127.255.255.254 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 \
            100.64.0.1 100.100.100.200 169.254.169.254 168.63.129.16 192.0.0.1 192.0.0.192 192.0.2.1 198.18.0.1 \
            198.19.255.255 198.51.100.1 203.0.113.1 192.88.99.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255";
        for text in special.split_whitespace() {
            assert!(denied_by_default(ip(text)), "{text}");
            for form in ["::", "::ffff:", "::ffff:0:", "64:ff9b::", "2a00:1::5efe:", "2a00:1::200:5efe:"] {
                assert!(denied_by_default(ip(&format!("{form}{text}"))), "{form}{text}");
            }
            let [a, b, c, d] =
                ip(text).to_string().split('.').map(|n| n.parse::<u8>().unwrap()).collect::<Vec<_>>()[..]
            else {
                unreachable!()
            };
            assert!(
                denied_by_default(ip(&format!("2002:{a:02x}{b:02x}:{c:02x}{d:02x}::1"))),
                "6to4 of {text}"
            );
        }
        let special = ":: ::1 64:ff9b:1::1 2001::1 2001:0:1:2::3 100::1 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 \
            fec0::1 ff00::1 ff02::1 5f00::1 3fff::1 2002::1";
        for text in special.split_whitespace() {
            assert!(denied_by_default(ip(text)), "{text}");
        }
        for text in ["1.1.1.1", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2a00:1450::1", "2606:4700::1111"] {
            assert!(!denied_by_default(ip(text)), "{text}");
        }
    }

    #[test]
    fn the_order_of_the_rules() {
        let policy =
            policy(&["10.0.0.0/8", "127.0.0.0/8"], &["10.9.0.0/16", "8.8.0.0/16"], DeniedPeers::Refuse);
        assert_eq!(policy.permit(ip("10.1.1.1")), Ok(Reach::Open), "allowed although private");
        assert_eq!(policy.permit(ip("10.9.1.1")), Err(Denied), "deny wins");
        assert_eq!(policy.permit(ip("8.8.8.8")), Err(Denied));
        assert_eq!(policy.permit(ip("9.9.9.9")), Err(Denied), "an address of this host");
        assert_eq!(policy.permit(ip("192.168.0.1")), Err(Denied), "the default list");
        assert_eq!(policy.permit(ip("1.1.1.1")), Ok(Reach::Open));
        assert_eq!(policy.permit(ip("127.0.0.1")), Ok(Reach::Checked), "allowed, but ours");
        assert!(policy.admits(at("127.0.0.1:80"), Reach::Checked));
        assert!(!policy.admits(at("127.0.0.1:9478"), Reach::Checked), "a listener");
        assert!(!policy.admits(at("127.0.0.1:3478"), Reach::Checked), "a listener on all addresses");
        let now = clock::now();
        assert_eq!(policy.permit_port(now, "a", at("127.0.0.1:3478")), Err(Denied));
        assert_eq!(policy.permit_port(now, "a", at("1.1.1.1:0")), Err(Denied));
    }

    #[test]
    fn where_it_matters_an_agent_is_told_of_its_peers_first() {
        let mut policy = policy(&["127.0.0.0/8", "9.9.9.9/32"], &["8.0.0.0/8"], DeniedPeers::Refuse);
        let (now, signaled) = (clock::now(), Signaled::default());
        policy.signaled = Some(signaled.clone());
        let permit = |agent: &str, text: &str| policy.permit_agent(now, agent, ip(text));
        for unknown in ["1.1.1.1", "8.8.8.8", "127.0.0.1", "9.9.9.9", "192.168.1.1"] {
            assert_eq!(permit("alice", unknown), Err(Denied), "{unknown}");
        }
        assert_eq!(
            permit("alice", "5.5.5.5"),
            Ok(Reach::Relayed),
            "relayed addresses of ours need no telling"
        );
        signaled.tell(now, "alice", ["1.1.1.1", "8.8.8.8", "127.0.0.1", "5.5.5.5", "192.168.1.1"].map(ip));
        assert_eq!(permit("alice", "1.1.1.1"), Ok(Reach::Open));
        assert_eq!(permit("alice", "127.0.0.1"), Ok(Reach::Checked));
        assert_eq!(permit("alice", "5.5.5.5"), Ok(Reach::Checked));
        assert_eq!(permit("alice", "8.8.8.8"), Err(Denied), "what is denied stays denied");
        assert_eq!(permit("alice", "192.168.1.1"), Err(Denied));
        assert_eq!(permit("bob", "1.1.1.1"), Err(Denied));
        assert!(policy.permit_port(now, "alice", at("1.1.1.1:7")).is_ok());
        policy.denied = DeniedPeers::Discard;
        assert_eq!(policy.permit_agent(now, "bob", ip("192.168.1.1")), Ok(Reach::Discarded));
    }

    #[test]
    fn live_relayed_addresses_are_always_reachable_and_nothing_else_of_ours() {
        let policy = policy(&[], &["5.0.0.0/8"], DeniedPeers::Refuse);
        assert_eq!(policy.permit(ip("5.5.5.5")), Ok(Reach::Checked));
        assert!(!policy.admits(at("5.5.5.5:50000"), Reach::Checked));
        policy.live.insert(RelayPort { relay: 0, port: 50000 });
        assert!(policy.admits(at("5.5.5.5:50000"), Reach::Checked));
        assert!(!policy.admits(at("5.5.5.5:50001"), Reach::Checked));
        assert_eq!(policy.inward(at("5.5.5.5:50000")), at("10.0.0.5:50000"));
        assert_eq!(policy.outward(at("10.0.0.5:50000")), at("5.5.5.5:50000"));
        policy.live.remove(RelayPort { relay: 0, port: 50000 });
        assert!(!policy.admits(at("5.5.5.5:50000"), Reach::Checked));
        assert_eq!(policy.permit(ip("10.0.0.5")), Err(Denied), "the bound address is no peer");
    }

    #[test]
    fn discarding_is_for_addresses_that_honest_clients_name() {
        let policy = policy(&[], &[], DeniedPeers::Discard);
        assert_eq!(policy.permit(ip("192.168.1.1")), Ok(Reach::Discarded));
        assert_eq!(policy.permit(ip("fe80::1")), Ok(Reach::Discarded));
        for hard in
            ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "fd00:ec2::254", "9.9.9.9", "0.0.0.0"]
        {
            assert_eq!(policy.permit(ip(hard)), Err(Denied), "{hard}");
        }
    }
}
