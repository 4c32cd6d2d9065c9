//! How many answers go to who has proved nothing. A source address may be forged, so each answer may hit somebody else:
//! the budget is that of whoever is hit.

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use super::rate::{Rate, SECOND};

/// Places for source prefixes, and how many of them one prefix may be found in.
const SLOTS: usize = 1 << 16;
const WAYS: usize = 4;
/// Of a slot: the time, in microseconds, which last for eight years; above it a part of the prefix's hash.
const TIME: u64 = (1 << 48) - 1;

/// The budget of each source prefix, an IPv4 /24 or an IPv6 /56, in a table of fixed size that all shards share. Nobody
/// waits for anybody in it.
#[derive(Clone, Debug)]
pub struct Strangers(Option<Arc<Table>>);

#[derive(Debug)]
struct Table {
    rate: Rate,
    /// Its keys are random: nobody can choose with whom to collide.
    hasher: RandomState,
    slots: Box<[AtomicU64]>,
}

impl Strangers {
    /// So many answers a second to each prefix, a million at most, and ten times as many at once; 0 is unlimited.
    #[must_use]
    pub fn new(per_second: u32) -> Self {
        Self(Rate::new(per_second, 10 * u64::from(per_second), SECOND).map(|rate| {
            let slots = (0..SLOTS).map(|_| AtomicU64::new(0)).collect();
            Arc::new(Table { rate, hasher: RandomState::new(), slots })
        }))
    }

    /// Whether one more answer may go to `ip`, at a tick of [`super::quota::Quotas::tick`].
    #[must_use]
    pub fn admit(&self, ip: IpAddr, tick: u64) -> bool {
        self.0.as_ref().is_none_or(|table| table.admit(ip, tick))
    }
}

impl Table {
    /// A prefix that is not found takes the place that is paid off first, and its debt: who is pushed out gains nothing
    /// by coming back.
    fn admit(&self, ip: IpAddr, tick: u64) -> bool {
        let hash = self.hasher.hash_one(prefix(ip));
        let first = hash as usize % (SLOTS / WAYS) * WAYS;
        let (tag, slots) = (hash & !TIME, &self.slots[first..first + WAYS]);
        loop {
            let held = slots.iter().map(|slot| (slot, slot.load(Relaxed)));
            let mine_or_first_paid = |(_, held): &(_, u64)| (held & !TIME != tag, held & TIME);
            let (slot, held) = held.min_by_key(mine_or_first_paid).expect("a set has several slots");
            let Some(paid) = self.rate.take(held & TIME, tick, 1) else { return false };
            // Another shard may have been faster.
            if slot.compare_exchange_weak(held, tag | (paid & TIME), Relaxed, Relaxed).is_ok() {
                return true;
            }
        }
    }
}

/// What one network has, as far as one can tell.
#[derive(Hash)]
enum Prefix {
    V4([u8; 3]),
    V6([u8; 7]),
}

fn prefix(ip: IpAddr) -> Prefix {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            Prefix::V4(*ip.octets().first_chunk().expect("an address is longer than its prefix"))
        }
        IpAddr::V6(ip) => {
            Prefix::V6(*ip.octets().first_chunk().expect("an address is longer than its prefix"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv6Addr};

    use super::{SECOND, SLOTS, Strangers};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_prefix_has_its_own_budget() {
        let strangers = Strangers::new(2);
        let count = |text: &str, tick| (0..50).filter(|_| strangers.admit(ip(text), tick)).count();
        assert_eq!(count("9.0.0.1", 7), 20);
        for same in ["9.0.0.2", "9.0.0.255", "::ffff:9.0.0.7"] {
            assert_eq!(count(same, 8), 0, "{same}");
        }
        assert_eq!(count("9.0.1.1", 9), 20);
        assert_eq!(count("2606:1:2:300::1", 9), 20);
        assert_eq!(count("2606:1:2:3ff:ffff::1", 9), 0, "the same /56");
        assert_eq!(count("2606:1:2:400::1", 9), 20);
        assert_eq!(count("9.0.0.3", 7 + SECOND), 2, "a second later");
        assert_eq!(count("9.0.0.3", 7 + 60 * SECOND), 20);
    }

    #[test]
    fn zero_is_unlimited() {
        let strangers = Strangers::new(0);
        assert!((0..10_000).all(|_| strangers.admit(ip("9.0.0.1"), 0)));
    }

    #[test]
    fn a_million_prefixes_get_no_more_than_the_table_has_places_for() {
        let strangers = Strangers::new(1);
        let prefix = |number: u64| Ipv6Addr::from(u128::from(0x2600_0000_0000_0000 | number << 8) << 64);
        let answered = (0..1_000_000).filter(|number| strangers.admit(prefix(*number).into(), 0)).count();
        assert!((500_000..=10 * SLOTS).contains(&answered), "{answered}");
        // A stranger among them, later, is served as if nothing had been.
        assert!(strangers.admit(ip("9.0.0.1"), 10 * SECOND));
    }

    #[test]
    fn shards_share_one_budget() {
        let strangers = Strangers::new(1_000);
        let answered: usize = std::thread::scope(|scope| {
            let count = || (0..10_000).filter(|_| strangers.admit(ip("9.0.0.1"), 0)).count();
            let shards = [0; 4].map(|_| scope.spawn(count));
            shards.into_iter().map(|shard| shard.join().unwrap()).sum()
        });
        assert_eq!(answered, 10_000);
    }
}
