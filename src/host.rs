//! This machine: its own addresses, which of them relay, and how many files it lets us have open.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use nix::{
    ifaddrs::InterfaceAddress,
    sys::resource::{Resource, getrlimit, setrlimit},
};
use socket2::{Domain, Socket, Type};

use crate::turn::RelayAddress;

/// This machine's addresses, read once.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Of all interfaces, loopback too.
    pub addresses: Vec<IpAddr>,
    /// Where the default routes leave: at most one of each family, IPv4 first.
    pub default_routes: Vec<IpAddr>,
    pub ipv6: bool,
}

impl Host {
    /// Asks the kernel. No packet is sent.
    ///
    /// # Errors
    /// When the kernel does not list its interfaces.
    pub fn look() -> io::Result<Self> {
        let addresses = interface_addresses()?;
        let ipv6 = addresses.iter().any(IpAddr::is_ipv6) && can_bind_ipv6();
        let sources = [source(OUTSIDE_V4), source(OUTSIDE_V6).filter(|_| ipv6)];
        Ok(Self { addresses, default_routes: sources.into_iter().flatten().collect(), ipv6 })
    }

    fn has(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(&address)
    }

    /// What a relay socket binds to when peers know it under an address that this machine does not have.
    fn behind(&self, public: IpAddr) -> Option<IpAddr> {
        let same_family = |address: &&IpAddr| address.is_ipv4() == public.is_ipv4();
        let reaches_far = |address: &&IpAddr| !address.is_loopback() && !is_link_local(**address);
        let attached = || self.addresses.iter().filter(same_family).find(reaches_far);
        self.default_routes.iter().find(same_family).or_else(attached).copied()
    }
}

/// Why a listener cannot be had, in one line for people; `setting` is where to choose another address.
#[must_use]
pub fn cannot_listen(what: &str, at: SocketAddr, setting: &str, error: &io::Error) -> String {
    let hint = match error.kind() {
        io::ErrorKind::AddrInUse => "another program uses this port; stop it, or choose another",
        io::ErrorKind::AddrNotAvailable => "this host has no such address",
        io::ErrorKind::PermissionDenied => "ports below 1024 need CAP_NET_BIND_SERVICE",
        _ => "the system refuses",
    };
    format!("cannot listen on {at} for {what}: {error} ({hint}; see {setting})")
}

/// The addresses to relay on, and what the operator should know about them, a line each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relays {
    pub addresses: Vec<RelayAddress>,
    pub warnings: Vec<String>,
}

impl Relays {
    /// From `turn.relay_ips` and `public_ips`, each possibly empty.
    #[must_use]
    pub fn resolve(host: &Host, relay_ips: &[IpAddr], public_ips: &[IpAddr]) -> Self {
        let mut relays = Self::default();
        if !relay_ips.is_empty() {
            relays.add_configured(host, relay_ips, public_ips);
        } else if !public_ips.is_empty() {
            relays.add_public(host, public_ips);
        } else {
            relays.add_default_routes(host);
        }
        if public_ips.is_empty() {
            relays.warn_of_private();
        }
        relays
    }

    /// The n-th of a family is known as the n-th public address of that family, or, where there is none, as itself.
    fn add_configured(&mut self, host: &Host, relay_ips: &[IpAddr], public_ips: &[IpAddr]) {
        let mut v4 = public_ips.iter().copied().filter(IpAddr::is_ipv4);
        let mut v6 = public_ips.iter().copied().filter(IpAddr::is_ipv6);
        for &bound in relay_ips {
            let public = if bound.is_ipv4() { v4.next() } else { v6.next() };
            if !host.has(bound) {
                self.warnings.push(format!("turn.relay_ips: {bound} is no address of this host"));
            }
            self.addresses.push(RelayAddress { bound, public: public.unwrap_or(bound) });
        }
    }

    fn add_public(&mut self, host: &Host, public_ips: &[IpAddr]) {
        for &public in public_ips {
            let bound = if host.has(public) { Some(public) } else { host.behind(public) };
            match bound {
                None => self.warnings.push(format!(
                    "public_ips: {public} is not used, for this host has no address of its family to relay from"
                )),
                Some(bound) if self.addresses.iter().any(|relay| relay.bound == bound) => {
                    self.warnings.push(format!(
                        "public_ips: {public} is not used, for it would relay from {bound} like the one before it; \
                         give each public address its own in turn.relay_ips"
                    ));
                }
                Some(bound) => self.addresses.push(RelayAddress { bound, public }),
            }
        }
    }

    fn add_default_routes(&mut self, host: &Host) {
        self.addresses
            .extend(host.default_routes.iter().map(|&own| RelayAddress { bound: own, public: own }));
        if self.addresses.is_empty() {
            let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            let usable = loopback.into_iter().filter(|address| address.is_ipv4() || host.ipv6);
            self.addresses.extend(usable.map(|own| RelayAddress { bound: own, public: own }));
            self.warnings.push(
                "this host has no default route: it relays on loopback, for agents on this host alone; \
                 set --public-ip to the address that peers reach"
                    .to_owned(),
            );
        }
    }

    fn warn_of_private(&mut self) {
        for relay in self.addresses.iter().filter(|relay| is_private(relay.public)) {
            self.warnings.push(format!(
                "{} is a private address: peers outside this network cannot reach it; \
                 set --public-ip to the address that they see",
                relay.public
            ));
        }
    }
}

/// Whether hosts elsewhere on the Internet have no route to it: private, CGNAT, link-local, unique local.
#[must_use]
pub fn is_private(address: IpAddr) -> bool {
    let kind = match address {
        IpAddr::V4(v4) => v4.is_private() || (v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64),
        IpAddr::V6(v6) => v6.is_unique_local(),
    };
    kind || is_link_local(address)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn interface_addresses() -> io::Result<Vec<IpAddr>> {
    // systemd's unit grants no netlink sockets, for which there is no other use.
    let mut addresses = by_netlink().or_else(|_| by_proc())?;
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

fn by_netlink() -> io::Result<Vec<IpAddr>> {
    Ok(nix::ifaddrs::getifaddrs()?.filter_map(|interface| address_of(&interface)).collect())
}

/// The IP address of an interface, if this is one.
#[must_use]
pub fn address_of(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    let v4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
}

/// IPv4 from the routes to this host itself, IPv6 from a list of addresses; without IPv6 there is no such list.
fn by_proc() -> io::Result<Vec<IpAddr>> {
    let routes = fs::read_to_string("/proc/self/net/fib_trie")?;
    let lines = || routes.lines().map(str::trim);
    let own = lines().zip(lines().skip(1)).filter(|(_, kind)| *kind == "/32 host LOCAL");
    let v4 = own.filter_map(|(address, _)| address.strip_prefix("|-- ")?.parse().ok());
    let listed = fs::read_to_string("/proc/self/net/if_inet6").unwrap_or_default();
    let hex = |line: &str| u128::from_str_radix(line.split(' ').next()?, 16).ok();
    let v6 = listed.lines().filter_map(hex).map(|bits| Ipv6Addr::from_bits(bits).into());
    Ok(v4.chain(v6).collect())
}

/// Lifts the soft limit of open files, which is for programs that use `select`, to the hard one; gives that.
///
/// # Errors
/// What the kernel says.
pub fn raise_descriptor_limit() -> nix::Result<u64> {
    getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard))
}

fn can_bind_ipv6() -> bool {
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    Socket::new(Domain::IPV6, Type::DGRAM, None).and_then(|socket| socket.bind(&any.into())).is_ok()
}

// Any address far outside asks for the default route; these two have belonged to a DNS root server for decades.
const OUTSIDE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 41, 0, 4));
const OUTSIDE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30));

/// The address that packets to `target` would carry. Connecting a UDP socket sends nothing.
fn source(target: IpAddr) -> Option<IpAddr> {
    let target = SocketAddr::from((target, 9));
    let socket = Socket::new(Domain::for_address(target), Type::DGRAM, None).ok()?;
    if target.is_ipv6() {
        prefer_lasting(&socket);
    }
    socket.connect(&target.into()).ok()?;
    let own = socket.local_addr().ok()?.as_socket()?.ip();
    (!own.is_unspecified() && !own.is_loopback()).then_some(own)
}

/// RFC 5014: not a temporary privacy address, which would be gone tomorrow. Where the kernel refuses, its own choice does.
#[expect(unsafe_code, reason = "the option has no safe wrapper")]
fn prefer_lasting(socket: &Socket) {
    let public = libc::IPV6_PREFER_SRC_PUBLIC;
    // SAFETY: the option takes one int, which lives across the call.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            libc::IPV6_ADDR_PREFERENCES,
            (&raw const public).cast(),
            size_of_val(&public) as libc::socklen_t,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::{Host, Relays, is_private};
    use crate::turn::RelayAddress;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn host(addresses: &[&str], default_routes: &[&str]) -> Host {
        Host { addresses: ips(addresses), default_routes: ips(default_routes), ipv6: true }
    }

    /// `bound>public`, in order.
    fn pairs(relays: &Relays) -> Vec<String> {
        relays.addresses.iter().map(|RelayAddress { bound, public }| format!("{bound}>{public}")).collect()
    }

    #[track_caller]
    fn check(
        host: &Host,
        relay_ips: &[&str],
        public_ips: &[&str],
        expected: &[&str],
        warnings: usize,
    ) -> Relays {
        let relays = Relays::resolve(host, &ips(relay_ips), &ips(public_ips));
        assert_eq!(pairs(&relays), expected);
        assert_eq!(relays.warnings.len(), warnings, "{:?}", relays.warnings);
        relays
    }

    #[test]
    fn the_default_routes_are_the_default() {
        let public = host(&["127.0.0.1", "203.0.113.5", "2001:db8::5"], &["203.0.113.5", "2001:db8::5"]);
        check(&public, &[], &[], &["203.0.113.5>203.0.113.5", "2001:db8::5>2001:db8::5"], 0);
    }

    #[test]
    fn a_private_address_is_warned_of_unless_the_public_one_is_known() {
        let behind_nat = host(&["127.0.0.1", "10.0.0.5"], &["10.0.0.5"]);
        let relays = check(&behind_nat, &[], &[], &["10.0.0.5>10.0.0.5"], 1);
        assert!(relays.warnings[0].contains("--public-ip"), "{:?}", relays.warnings);
        check(&behind_nat, &[], &["203.0.113.5"], &["10.0.0.5>203.0.113.5"], 0);
        for private in ["100.64.0.1", "100.127.255.255", "192.168.1.1", "169.254.0.1", "fd00::1", "fe80::1"] {
            assert!(is_private(private.parse().unwrap()), "{private}");
        }
        for public in ["100.128.0.1", "203.0.113.5", "2001:db8::1"] {
            assert!(!is_private(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn a_public_address_of_this_host_is_bound_itself() {
        let two = host(&["127.0.0.1", "10.0.0.5", "203.0.113.5"], &["10.0.0.5"]);
        check(&two, &[], &["203.0.113.5"], &["203.0.113.5>203.0.113.5"], 0);
        check(&two, &[], &["127.0.0.1", "::1"], &["127.0.0.1>127.0.0.1", "::1>::1"], 0);
        check(&two, &[], &["127.0.0.9"], &["127.0.0.9>127.0.0.9"], 0);
    }

    #[test]
    fn an_address_binds_once() {
        let one = host(&["10.0.0.5"], &["10.0.0.5"]);
        check(&one, &[], &["203.0.113.5", "203.0.113.6"], &["10.0.0.5>203.0.113.5"], 1);
        check(&one, &[], &["203.0.113.5", "2001:db8::5"], &["10.0.0.5>203.0.113.5"], 1);
    }

    #[test]
    fn relay_addresses_map_to_public_ones_in_order() {
        let many = host(&["10.0.0.5", "10.0.0.6", "fd00::5"], &[]);
        check(
            &many,
            &["10.0.0.6", "fd00::5", "10.0.0.5"],
            &["203.0.113.6", "203.0.113.5"],
            &["10.0.0.6>203.0.113.6", "fd00::5>fd00::5", "10.0.0.5>203.0.113.5"],
            0,
        );
        check(&many, &["10.0.0.9"], &["203.0.113.6"], &["10.0.0.9>203.0.113.6"], 1);
    }

    #[test]
    fn without_a_default_route() {
        check(&host(&["127.0.0.1", "10.0.0.5"], &[]), &[], &[], &["127.0.0.1>127.0.0.1", "::1>::1"], 1);
        check(&Host { ipv6: false, ..host(&[], &[]) }, &[], &[], &["127.0.0.1>127.0.0.1"], 1);
        check(&host(&["127.0.0.1", "10.0.0.5"], &[]), &[], &["203.0.113.5"], &["10.0.0.5>203.0.113.5"], 0);
        check(&host(&["127.0.0.1", "fe80::1"], &[]), &[], &["2001:db8::5"], &[], 1);
    }

    #[test]
    fn without_netlink_this_host_has_the_same_addresses() {
        let sorted = |mut addresses: Vec<IpAddr>| {
            addresses.sort_unstable();
            addresses.dedup();
            addresses
        };
        assert_eq!(sorted(super::by_proc().unwrap()), sorted(super::by_netlink().unwrap()));
    }

    #[test]
    fn this_host_has_addresses() {
        let host = Host::look().unwrap();
        assert!(host.default_routes.iter().all(|route| host.addresses.contains(route)), "{host:?}");
    }
}
