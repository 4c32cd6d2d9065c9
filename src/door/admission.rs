//! Who gets as far as a TLS handshake: connections and handshakes per address, and connections in all.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::{
    config,
    signaling::limits::{Bucket, Rate},
};

/// Addresses remembered before those without a connection and at rest are forgotten for the first time; after that so many
/// more, or as many again as were left, so that nobody's connection waits for it often.
const REMEMBERED: usize = 65_536;

/// Counts connections by who opened them.
#[derive(Clone, Debug)]
pub struct Admission(Arc<Mutex<Open>>);

#[derive(Debug)]
struct Limits {
    per_address: usize,
    total: usize,
    handshakes: Option<Rate>,
}

#[derive(Debug)]
struct Open {
    limits: Limits,
    total: usize,
    by_source: HashMap<Source, Visitor>,
    /// So many are remembered before some are forgotten.
    most: usize,
}

#[derive(Debug)]
struct Visitor {
    connections: usize,
    handshakes: Bucket,
}

/// One host, as far as one can tell: an IPv4 address or an IPv6 /64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    V4([u8; 4]),
    V6([u8; 8]),
}

impl Source {
    fn of(ip: IpAddr) -> Self {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Self::V4(ip.octets()),
            IpAddr::V6(ip) => {
                let [a, b, c, d, e, f, g, h, ..] = ip.octets();
                Self::V6([a, b, c, d, e, f, g, h])
            }
        }
    }
}

/// A place for one connection, given back when dropped.
#[derive(Debug)]
pub struct Permit {
    source: Source,
    open: Arc<Mutex<Open>>,
}

impl Admission {
    /// `connections` is what this process can hold, whatever the configuration says.
    #[must_use]
    pub fn new(config: &config::Http, connections: usize) -> Self {
        Self::within(Limits::new(config, connections))
    }

    fn within(limits: Limits) -> Self {
        Self(Arc::new(Mutex::new(Open { limits, total: 0, by_source: HashMap::new(), most: REMEMBERED })))
    }

    /// Other limits from now on. Connections that are open stay.
    pub fn adopt(&self, config: &config::Http, connections: usize) {
        lock(&self.0).limits = Limits::new(config, connections);
    }

    /// Everybody gets in.
    #[cfg(test)]
    pub(crate) fn unlimited() -> Self {
        Self::within(Limits { per_address: usize::MAX, total: usize::MAX, handshakes: None })
    }

    /// `None`: this connection is one too many.
    pub fn admit(&self, now: Instant, ip: IpAddr) -> Option<Permit> {
        let source = Source::of(ip);
        let mut open = lock(&self.0);
        let Open { limits, total, by_source, most } = &mut *open;
        if *total >= limits.total {
            return None;
        }
        if by_source.len() >= *most {
            by_source.retain(|_, visitor| visitor.connections > 0 || !visitor.handshakes.is_full(now));
            *most = REMEMBERED.max(2 * by_source.len());
        }
        let visitor = by_source
            .entry(source)
            .or_insert_with(|| Visitor { connections: 0, handshakes: Bucket::new(now) });
        let in_time = limits.handshakes.is_none_or(|rate| visitor.handshakes.take(now, rate).is_ok());
        if !in_time || visitor.connections >= limits.per_address {
            return None;
        }
        visitor.connections += 1;
        *total += 1;
        Some(Permit { source, open: Arc::clone(&self.0) })
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        lock(&self.0).total
    }
}

impl Limits {
    fn new(config: &config::Http, connections: usize) -> Self {
        let rate = config.handshakes_per_second_per_address;
        Self {
            per_address: or_unlimited(config.connections_per_address),
            total: or_unlimited(config.connections_total).min(connections),
            handshakes: Rate::new(rate, rate),
        }
    }
}

/// 0 in the configuration.
fn or_unlimited(limit: u32) -> usize {
    if limit == 0 { usize::MAX } else { limit as usize }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = lock(&self.open);
        open.total -= 1;
        if let Some(visitor) = open.by_source.get_mut(&self.source) {
            visitor.connections -= 1;
        }
    }
}

/// A panic elsewhere leaves nothing half done here.
fn lock(open: &Mutex<Open>) -> MutexGuard<'_, Open> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{
        net::{IpAddr, Ipv4Addr},
        time::{Duration, Instant},
    };

    use super::{Admission, REMEMBERED, lock};
    use crate::config;

    const DESCRIPTORS: usize = 100_000;

    fn admission(per_address: u32, handshakes: u32, total: u32) -> Admission {
        let config = config::Http {
            listen: vec![],
            certificate: None,
            acme: None,
            allowed_origins: vec![],
            connections_per_address: per_address,
            handshakes_per_second_per_address: handshakes,
            connections_total: total,
        };
        Admission::new(&config, DESCRIPTORS)
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
    fn t0() -> Instant {
        Instant::now()
    }

    #[test]
    fn an_address_has_so_many_connections() {
        let (admission, t0) = (admission(2, 0, 0), t0());
        let first = admission.admit(t0, ip("192.0.2.1")).unwrap();
        let _second = admission.admit(t0, ip("::ffff:192.0.2.1")).unwrap();
        assert!(admission.admit(t0, ip("192.0.2.1")).is_none());
        let _other = admission.admit(t0, ip("192.0.2.2")).unwrap();
        drop(first);
        assert!(admission.admit(t0, ip("192.0.2.1")).is_some());
        let _v6 = [
            admission.admit(t0, ip("2001:db8::1")).unwrap(),
            admission.admit(t0, ip("2001:db8::2")).unwrap(),
        ];
        assert!(admission.admit(t0, ip("2001:db8::3")).is_none(), "one /64 is one host");
        assert!(admission.admit(t0, ip("2001:db8:0:1::3")).is_some());
    }

    #[test]
    fn handshakes_have_a_rate() {
        let (admission, t0) = (admission(0, 2, 0), t0());
        assert!(admission.admit(t0, ip("192.0.2.1")).is_some());
        assert!(admission.admit(t0, ip("192.0.2.1")).is_some());
        assert!(admission.admit(t0, ip("192.0.2.1")).is_none());
        assert!(admission.admit(t0, ip("192.0.2.2")).is_some());
        assert!(admission.admit(t0 + Duration::from_millis(500), ip("192.0.2.1")).is_some());
    }

    #[test]
    fn all_together_are_limited() {
        let (admission, t0) = (admission(0, 0, 2), t0());
        let permits = [admission.admit(t0, ip("192.0.2.1")), admission.admit(t0, ip("192.0.2.2"))];
        assert!(admission.admit(t0, ip("192.0.2.3")).is_none());
        assert_eq!(admission.open(), 2);
        drop(permits);
        assert_eq!(admission.open(), 0);
    }

    #[test]
    fn no_more_than_the_process_can_hold() {
        assert_eq!(lock(&admission(0, 0, 0).0).limits.total, DESCRIPTORS);
        assert_eq!(lock(&admission(0, 0, u32::MAX).0).limits.total, DESCRIPTORS);
        assert_eq!(lock(&admission(0, 0, 9).0).limits.total, 9);
    }

    #[test]
    fn addresses_at_rest_are_forgotten() {
        let (admission, t0) = (admission(0, 1, 0), t0());
        for n in 0..u32::try_from(REMEMBERED).unwrap() {
            admission.admit(t0, Ipv4Addr::from(n).into());
        }
        admission.admit(t0 + Duration::from_secs(2), ip("2001:db8::1"));
        assert_eq!(lock(&admission.0).by_source.len(), 1);
    }

    #[test]
    fn addresses_with_connections_are_not_gone_through_each_time() {
        let (admission, t0) = (admission(0, 0, 0), t0());
        let permits: Vec<_> = (0..u32::try_from(REMEMBERED).unwrap())
            .map(|n| admission.admit(t0, Ipv4Addr::from(n).into()).unwrap())
            .collect();
        admission.admit(t0, ip("2001:db8::1"));
        assert_eq!(lock(&admission.0).most, 2 * REMEMBERED);
        drop(permits);
    }
}
