//! How much one agent may relay: all its allocations in all shards together, each direction by itself.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::rate::{Rate, SECOND};

/// Bytes that may pass at once however low the rate is: a datagram is never too long for its burst.
const BURST: u32 = 64 << 10;
/// Nanoseconds of a tick: a byte costs less than a tick.
const FINER: u64 = 1_000;

/// The limit of every agent. Who pays off what it took at which time is in its [`Allowance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bandwidth(Rate);

impl Bandwidth {
    /// So many bytes of payload a second; `None` for 0, which is unlimited.
    #[must_use]
    pub fn new(bytes_per_second: u32) -> Option<Self> {
        let burst = bytes_per_second.max(BURST);
        Rate::new(bytes_per_second, burst.into(), SECOND * FINER).map(Self)
    }
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client.
    ToPeer,
    /// To the client.
    ToClient,
}

/// What one agent may still relay. Shards take from it without waiting for each other.
#[derive(Debug)]
pub struct Allowance {
    limit: Bandwidth,
    /// Nanoseconds on the clock of ticks, at which all that was taken is paid off, by [`Direction`].
    paid: [AtomicU64; 2],
}

impl Allowance {
    /// Untouched.
    #[must_use]
    pub fn new(limit: Bandwidth) -> Self {
        Self { limit, paid: Default::default() }
    }

    /// What it is made from.
    #[must_use]
    pub fn limit(&self) -> Bandwidth {
        self.limit
    }

    /// Takes `bytes` at `tick`, or says that they are too many.
    pub fn take(&self, direction: Direction, bytes: usize, tick: u64) -> bool {
        let take = |paid| self.limit.0.take(paid, tick * FINER, bytes as u64);
        self.paid[direction as usize].fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// Whether forgetting it would give nothing away.
    #[must_use]
    pub fn is_at_rest(&self, tick: u64) -> bool {
        self.paid.iter().all(|paid| paid.load(Relaxed) <= tick * FINER)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Allowance, Bandwidth,
        Direction::{ToClient, ToPeer},
        SECOND,
    };

    #[test]
    fn a_second_at_once_each_way_and_then_the_rate() {
        let allowance = Allowance::new(Bandwidth::new(1_000_000).unwrap());
        let count = |way, tick| (0..10_000).filter(|_| allowance.take(way, 1_000, tick)).count();
        assert!(allowance.is_at_rest(5));
        assert_eq!((count(ToPeer, 5), count(ToClient, 5)), (1_000, 1_000));
        assert_eq!(count(ToPeer, 5 + SECOND / 10), 100);
        assert!(!allowance.is_at_rest(SECOND));
        assert!(allowance.is_at_rest(2 * SECOND));
    }

    #[test]
    fn the_longest_datagram_passes_at_the_lowest_rate_and_the_highest_rate_is_exact() {
        assert!(Allowance::new(Bandwidth::new(1).unwrap()).take(ToPeer, 65_507, 0));
        let fast = Allowance::new(Bandwidth::new(4_000_000_000).unwrap());
        let passed = (0..10_000_000).filter(|packet| fast.take(ToPeer, 1_200, packet / 5)).count();
        // Two seconds, of which the first may pass at once.
        assert!((9_900_000..=10_000_000).contains(&passed), "{passed}");
    }

    #[test]
    fn zero_is_unlimited() {
        assert!(Bandwidth::new(0).is_none());
    }
}
