//! What was seen of a NAT, its kind in the terms of RFC 4787 and RFC 5780, and whom an agent behind it meets.

use std::{fmt, net::SocketAddr};

use serde_json::{Value, json};

use crate::bench::turn::Transport;

/// What the probes saw, as far as they could.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Our own address and port.
    pub local: Option<SocketAddr>,
    /// As the server sees it; none if nothing came back.
    pub mapped: Option<SocketAddr>,
    /// As another port of the server sees it.
    pub mapped_elsewhere: Option<SocketAddr>,
    /// Whether a packet came in from a port that was never written to.
    pub lets_in_other_ports: Option<bool>,
    /// Whether a packet came in from an address that was never written to.
    pub lets_in_strangers: Option<bool>,
    /// Whether two of our own sockets meet by their mapped addresses.
    pub hairpin: Option<bool>,
    /// Whether other sockets' ports were kept.
    pub keeps_ports: Option<bool>,
    /// Behind the first router there is another one with a private address, or one of a carrier's (RFC 6598).
    pub behind_another: Option<Behind>,
}

/// What kind of network is between us and the world, beside our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    Private,
    Carrier,
}

/// How a mapping depends on whom one writes to (RFC 4787 §4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    EndpointIndependent,
    AddressAndPortDependent,
}

/// Who is let in (RFC 4787 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    EndpointIndependent,
    AddressDependent,
    /// One of these two: to tell them apart takes a server at two addresses.
    NotByPort,
    AddressAndPortDependent,
}

/// The kinds as people know them (RFC 3489 named most).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    None,
    /// No NAT, but a firewall that lets in only what was asked for.
    Firewall,
    FullCone,
    AddressRestricted,
    FullConeOrAddressRestricted,
    PortRestricted,
    Symmetric,
    Nat64,
    UdpBlocked,
    Unknown,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Firewall => "firewall",
            Self::FullCone => "fullCone",
            Self::AddressRestricted => "addressRestricted",
            Self::FullConeOrAddressRestricted => "fullConeOrAddressRestricted",
            Self::PortRestricted => "portRestricted",
            Self::Symmetric => "symmetric",
            Self::Nat64 => "nat64",
            Self::UdpBlocked => "udpBlocked",
            Self::Unknown => "unknown",
        }
    }

    fn what(self) -> &'static str {
        match self {
            Self::None => "no NAT",
            Self::Firewall => "no NAT, and a firewall that lets in only what was asked for",
            Self::FullCone => "a full-cone NAT: whoever knows the mapped address gets in",
            Self::AddressRestricted => {
                "an address-restricted NAT: whoever was written to gets in, from any port"
            }
            Self::FullConeOrAddressRestricted => {
                "a full-cone or address-restricted NAT: they meet the same peers"
            }
            Self::PortRestricted => "a port-restricted NAT: whoever was written to gets in, from that port",
            Self::Symmetric => "a symmetric NAT: each destination sees another port",
            Self::Nat64 => "NAT64: IPv6 here, IPv4 for the server",
            Self::UdpBlocked => "UDP is blocked",
            Self::Unknown => "a NAT that could not be told",
        }
    }
}

/// What a NAT does, and what it therefore is.
#[derive(Clone, Debug)]
pub struct Behaviour {
    pub kind: Kind,
    pub mapping: Option<Mapping>,
    pub filtering: Option<Filtering>,
    pub seen: Seen,
}

impl Behaviour {
    /// What the probes saw, put into words.
    #[must_use]
    pub fn of(seen: &Seen) -> Self {
        let mapping = match (seen.mapped, seen.mapped_elsewhere) {
            (Some(one), Some(other)) if one != other => Some(Mapping::AddressAndPortDependent),
            (Some(_), Some(_)) => Some(Mapping::EndpointIndependent),
            // Where there is no NAT, there is but one address.
            (Some(one), None) if seen.local == Some(one) => Some(Mapping::EndpointIndependent),
            _ => None,
        };
        let filtering = match (seen.lets_in_strangers, seen.lets_in_other_ports) {
            (Some(true), _) => Some(Filtering::EndpointIndependent),
            (Some(false), Some(true)) => Some(Filtering::AddressDependent),
            (None, Some(true)) => Some(Filtering::NotByPort),
            (_, Some(false)) => Some(Filtering::AddressAndPortDependent),
            (_, None) => None,
        };
        Self { kind: kind(seen, mapping, filtering), mapping, filtering, seen: seen.clone() }
    }

    /// Where no answer came over UDP.
    #[must_use]
    pub fn blocked() -> Self {
        Self::of(&Seen::default())
    }

    /// Camel case, as all JSON here.
    #[must_use]
    pub fn json(&self) -> Value {
        let mapping = self.mapping.map(|mapping| match mapping {
            Mapping::EndpointIndependent => "endpointIndependent",
            Mapping::AddressAndPortDependent => "addressAndPortDependent",
        });
        let filtering = self.filtering.map(|filtering| match filtering {
            Filtering::EndpointIndependent => "endpointIndependent",
            Filtering::AddressDependent => "addressDependent",
            Filtering::NotByPort => "endpointIndependentOrAddressDependent",
            Filtering::AddressAndPortDependent => "addressAndPortDependent",
        });
        json!({
            "kind": self.kind.name(),
            "why": self.kind.what(),
            "mapping": mapping,
            "filtering": filtering,
            "local": self.seen.local,
            "mapped": self.seen.mapped,
            "hairpin": self.seen.hairpin,
            "portPreserved": self.seen.keeps_ports,
            "doubleNat": self.seen.behind_another.is_some(),
            "carrierGrade": self.seen.behind_another == Some(Behind::Carrier),
        })
    }
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.what())?;
        match (self.kind, self.filtering) {
            (Kind::None, Some(_)) => f.write_str(" and no firewall")?,
            (Kind::None, None) => f.write_str("; whether a firewall, the relay cannot ask")?,
            _ => {}
        }
        match self.seen.behind_another {
            Some(Behind::Carrier) => f.write_str("; and one more of the carrier's behind it")?,
            Some(Behind::Private) => f.write_str("; and one more behind it")?,
            None => {}
        }
        if self.seen.hairpin == Some(true) {
            f.write_str("; agents behind it meet at its outer address")?;
        }
        Ok(())
    }
}

fn kind(seen: &Seen, mapping: Option<Mapping>, filtering: Option<Filtering>) -> Kind {
    let (Some(local), Some(mapped)) = (seen.local, seen.mapped) else { return Kind::UdpBlocked };
    if local.is_ipv4() != mapped.is_ipv4() {
        return Kind::Nat64;
    }
    if local == mapped {
        return match filtering {
            Some(Filtering::AddressDependent | Filtering::AddressAndPortDependent) => Kind::Firewall,
            _ => Kind::None,
        };
    }
    match (mapping, filtering) {
        (Some(Mapping::AddressAndPortDependent), _) => Kind::Symmetric,
        (Some(_), Some(Filtering::EndpointIndependent)) => Kind::FullCone,
        (Some(_), Some(Filtering::AddressDependent)) => Kind::AddressRestricted,
        (Some(_), Some(Filtering::NotByPort)) => Kind::FullConeOrAddressRestricted,
        (Some(_), Some(Filtering::AddressAndPortDependent)) => Kind::PortRestricted,
        // Without the mapping, it may as well be symmetric.
        (None, _) | (_, None) => Kind::Unknown,
    }
}

/// The ways to the relay that work from here.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach {
    pub udp: bool,
    pub tcp: bool,
    pub tls: bool,
}

impl Reach {
    #[must_use]
    pub fn any(self) -> bool {
        self.udp || self.tcp || self.tls
    }

    /// Their names.
    #[must_use]
    pub fn ways(self) -> Vec<&'static str> {
        let ways = [(self.udp, Transport::Udp), (self.tcp, Transport::Tcp), (self.tls, Transport::Tls)];
        ways.into_iter().filter(|(works, _)| *works).map(|(_, way)| way.name()).collect()
    }

    fn best(self) -> Way {
        match self {
            Self { udp: true, .. } => Way::RelayedOverUdp,
            Self { tcp: true, .. } => Way::RelayedOverTcp,
            Self { tls: true, .. } => Way::RelayedOverTls,
            _ => Way::No,
        }
    }
}

/// How two agents meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Direct,
    RelayedOverUdp,
    RelayedOverTcp,
    RelayedOverTls,
    No,
}

impl Way {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::RelayedOverUdp => "relayed over UDP",
            Self::RelayedOverTcp => "relayed over TCP",
            Self::RelayedOverTls => "relayed over TLS",
            Self::No => "no",
        }
    }
}

/// Where the other agent may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    None,
    FullCone,
    AddressRestricted,
    PortRestricted,
    Symmetric,
    UdpBlocked,
    Ipv6Only,
}

impl Peer {
    const ALL: [Self; 7] = [
        Self::None,
        Self::FullCone,
        Self::AddressRestricted,
        Self::PortRestricted,
        Self::Symmetric,
        Self::UdpBlocked,
        Self::Ipv6Only,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FullCone => "fullCone",
            Self::AddressRestricted => "addressRestricted",
            Self::PortRestricted => "portRestricted",
            Self::Symmetric => "symmetric",
            Self::UdpBlocked => "udpBlocked",
            Self::Ipv6Only => "ipv6Only",
        }
    }

    #[must_use]
    pub fn what(self) -> &'static str {
        match self {
            Self::None => "no NAT",
            Self::FullCone => "a full-cone NAT",
            Self::AddressRestricted => "an address-restricted NAT",
            Self::PortRestricted => "a port-restricted NAT",
            Self::Symmetric => "a symmetric NAT",
            Self::UdpBlocked => "a firewall that blocks UDP",
            Self::Ipv6Only => "IPv6 alone",
        }
    }

    /// What it does; none if no packet reaches it.
    fn does(self) -> Option<(Mapping, Filtering)> {
        let independent = Mapping::EndpointIndependent;
        match self {
            Self::None | Self::FullCone => Some((independent, Filtering::EndpointIndependent)),
            Self::AddressRestricted => Some((independent, Filtering::AddressDependent)),
            Self::PortRestricted | Self::Ipv6Only => Some((independent, Filtering::AddressAndPortDependent)),
            Self::Symmetric => Some((Mapping::AddressAndPortDependent, Filtering::AddressAndPortDependent)),
            Self::UdpBlocked => None,
        }
    }
}

/// How an agent here meets one elsewhere, and why so.
#[derive(Clone, Debug)]
pub struct Path {
    pub peer: Peer,
    pub way: Way,
    pub why: &'static str,
}

/// Whom an agent here meets.
#[must_use]
pub fn paths(ipv4: Option<&Behaviour>, ipv6: Option<&Behaviour>, reach: Reach) -> Vec<Path> {
    Peer::ALL
        .into_iter()
        .map(|peer| path(peer, if peer == Peer::Ipv6Only { ipv6 } else { ipv4 }, reach))
        .collect()
}

fn path(peer: Peer, own: Option<&Behaviour>, reach: Reach) -> Path {
    let relayed = |why| Path {
        peer,
        way: reach.best(),
        why: if reach.any() { why } else { "no way to the relay is open" },
    };
    if peer == Peer::UdpBlocked {
        return relayed("nothing but the relay reaches the peer");
    }
    let does = own.and_then(|own| match own.kind {
        Kind::UdpBlocked | Kind::Nat64 | Kind::Unknown => None,
        _ => Some((
            own.mapping.unwrap_or(Mapping::EndpointIndependent),
            own.filtering.unwrap_or(Filtering::AddressAndPortDependent),
        )),
    });
    match (does, peer.does()) {
        (None, _) if own.is_none() => relayed("no address of a family that the peer has was seen here"),
        (None, _) => relayed("no packet from the peer reaches an agent here"),
        (Some(here), Some(there)) if arrives(there, here) || arrives(here, there) => Path {
            peer,
            way: Way::Direct,
            why: "one of the two can be written to at the address that the server sees",
        },
        _ => relayed("neither can be written to: ports change, and filters look at them"),
    }
}

/// Whether a packet ever gets through, from an agent to the address that the server saw of another one.
fn arrives((mapping, _): (Mapping, Filtering), (own_mapping, own_filtering): (Mapping, Filtering)) -> bool {
    match (own_mapping, own_filtering) {
        (_, Filtering::EndpointIndependent) => true,
        // That address is for the server alone.
        (Mapping::AddressAndPortDependent, _) => false,
        (_, Filtering::AddressDependent | Filtering::NotByPort) => true,
        (_, Filtering::AddressAndPortDependent) => mapping == Mapping::EndpointIndependent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(
        local: &str,
        mapped: &str,
        elsewhere: &str,
        ports: Option<bool>,
        strangers: Option<bool>,
    ) -> Seen {
        let address = |text: &str| text.parse().ok();
        Seen {
            local: address(local),
            mapped: address(mapped),
            mapped_elsewhere: address(elsewhere),
            lets_in_other_ports: ports,
            lets_in_strangers: strangers,
            ..Seen::default()
        }
    }

    #[test]
    fn each_kind_is_told_by_what_was_seen() {
        let (here, out, other) = ("10.0.0.2:5000", "5.9.1.2:5000", "5.9.1.2:6000");
        for (local, mapped, elsewhere, ports, strangers, kind) in [
            (out, out, out, Some(true), Some(true), Kind::None),
            (out, out, out, None, None, Kind::None),
            (out, out, out, Some(false), Some(false), Kind::Firewall),
            (here, out, out, Some(true), Some(true), Kind::FullCone),
            (here, out, out, Some(true), Some(false), Kind::AddressRestricted),
            (here, out, out, Some(true), None, Kind::FullConeOrAddressRestricted),
            (here, out, out, Some(false), Some(false), Kind::PortRestricted),
            (here, out, out, Some(false), None, Kind::PortRestricted),
            (here, out, other, Some(false), None, Kind::Symmetric),
            ("[fd00::2]:5000", out, out, Some(false), None, Kind::Nat64),
            (here, out, out, None, None, Kind::Unknown),
            (here, out, "", Some(false), None, Kind::Unknown),
            (here, "", "", None, None, Kind::UdpBlocked),
        ] {
            let told = Behaviour::of(&seen(local, mapped, elsewhere, ports, strangers));
            assert_eq!(told.kind, kind, "{local} {mapped} {elsewhere} {ports:?} {strangers:?}");
        }
    }

    #[test]
    fn hole_punching_fails_where_both_sides_look_at_ports_and_one_changes_them() {
        let reach = Reach { udp: true, tcp: true, tls: true };
        let (here, out, other) = ("10.0.0.2:5000", "5.9.1.2:5000", "5.9.1.2:6000");
        let way = |behaviour: &Seen, peer| path(peer, Some(&Behaviour::of(behaviour)), reach).way;
        let restricted = seen(here, out, out, Some(false), Some(false));
        let symmetric = seen(here, out, other, Some(false), None);
        let cone = seen(here, out, out, Some(true), None);
        for peer in [Peer::None, Peer::FullCone, Peer::AddressRestricted, Peer::PortRestricted] {
            assert_eq!(way(&restricted, peer), Way::Direct, "{peer:?}");
        }
        assert_eq!(way(&restricted, Peer::Symmetric), Way::RelayedOverUdp);
        assert_eq!(way(&symmetric, Peer::PortRestricted), Way::RelayedOverUdp);
        assert_eq!(way(&symmetric, Peer::Symmetric), Way::RelayedOverUdp);
        assert_eq!(way(&symmetric, Peer::AddressRestricted), Way::Direct);
        assert_eq!(way(&cone, Peer::Symmetric), Way::Direct);
        assert_eq!(way(&cone, Peer::UdpBlocked), Way::RelayedOverUdp);
    }

    #[test]
    fn without_udp_the_relay_is_reached_by_what_is_left() {
        for (reach, way) in [
            (Reach { tcp: true, tls: true, ..Reach::default() }, Way::RelayedOverTcp),
            (Reach { tls: true, ..Reach::default() }, Way::RelayedOverTls),
            (Reach::default(), Way::No),
        ] {
            for path in paths(Some(&Behaviour::blocked()), None, reach) {
                assert_eq!(path.way, way, "{:?}", path.peer);
            }
        }
    }
}
