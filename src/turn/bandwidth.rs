//! How much one agent may relay: all its allocations in all shards together, each direction by itself.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

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

/// What is known of an agent's traffic. A relay in the kernel takes from the same memory, by the same rule: the order of
/// the numbers is fixed.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Account {
    /// Nanoseconds on the clock of ticks, at which all that was taken is paid off, by [`Direction`].
    paid: [AtomicU64; 2],
    /// The limit, for who only sees this: bytes a second, and the longest debt in nanoseconds.
    per_second: AtomicU64,
    burst: AtomicU64,
    /// What ticks are counted from, in nanoseconds of CLOCK_MONOTONIC: whoever takes without us sets it first.
    pub epoch: AtomicU64,
}

/// Accounts in memory that is shared with somebody.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    all: &'static [Account],
    free: Arc<Mutex<Vec<u32>>>,
}

impl Accounts {
    /// All of them are free.
    #[must_use]
    pub fn new(all: &'static [Account]) -> Self {
        Self { all, free: Arc::new(Mutex::new((0..all.len() as u32).rev().collect())) }
    }

    fn take(&self) -> Option<u32> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, number: u32) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(number);
    }
}

/// What one agent may still relay. Shards take from it without waiting for each other.
#[derive(Debug)]
pub struct Allowance {
    limit: Bandwidth,
    /// Our own; not in use where there is a shared one.
    own: Account,
    shared: Option<(Accounts, u32)>,
}

impl Allowance {
    /// Untouched. It has an account of its own where all of `accounts` are taken.
    #[must_use]
    pub fn new(limit: Bandwidth, accounts: &Accounts) -> Self {
        let shared = accounts.take().map(|number| (accounts.clone(), number));
        let allowance = Self { limit, own: Account::default(), shared };
        let account = allowance.account();
        account.paid.iter().for_each(|paid| paid.store(0, Relaxed));
        account.per_second.store(limit.0.per_second(), Relaxed);
        account.burst.store(limit.0.burst(), Relaxed);
        allowance
    }

    /// The account, and its number among the shared ones.
    #[must_use]
    pub fn shared(&self) -> Option<(u32, &Account)> {
        self.shared.as_ref().map(|(accounts, number)| (*number, &accounts.all[*number as usize]))
    }

    fn account(&self) -> &Account {
        self.shared().map_or(&self.own, |(_, account)| account)
    }

    /// What it is made from.
    #[must_use]
    pub fn limit(&self) -> Bandwidth {
        self.limit
    }

    /// Takes `bytes` at `tick`, or says that they are too many.
    pub fn take(&self, direction: Direction, bytes: usize, tick: u64) -> bool {
        let take = |paid| self.limit.0.take(paid, tick * FINER, bytes as u64);
        self.account().paid[direction as usize].fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// Whether forgetting it would give nothing away.
    #[must_use]
    pub fn is_at_rest(&self, tick: u64) -> bool {
        self.account().paid.iter().all(|paid| paid.load(Relaxed) <= tick * FINER)
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        if let Some((accounts, number)) = &self.shared {
            accounts.give_back(*number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Account, Accounts, Allowance, Bandwidth,
        Direction::{ToClient, ToPeer},
        SECOND,
    };

    #[test]
    fn a_second_at_once_each_way_and_then_the_rate() {
        let allowance = Allowance::new(Bandwidth::new(1_000_000).unwrap(), &Accounts::default());
        let count = |way, tick| (0..10_000).filter(|_| allowance.take(way, 1_000, tick)).count();
        assert!(allowance.is_at_rest(5));
        assert_eq!((count(ToPeer, 5), count(ToClient, 5)), (1_000, 1_000));
        assert_eq!(count(ToPeer, 5 + SECOND / 10), 100);
        assert!(!allowance.is_at_rest(SECOND));
        assert!(allowance.is_at_rest(2 * SECOND));
    }

    #[test]
    fn the_longest_datagram_passes_at_the_lowest_rate_and_the_highest_rate_is_exact() {
        let allowance = |rate| Allowance::new(Bandwidth::new(rate).unwrap(), &Accounts::default());
        assert!(allowance(1).take(ToPeer, 65_507, 0));
        let fast = allowance(4_000_000_000);
        let passed = (0..10_000_000).filter(|packet| fast.take(ToPeer, 1_200, packet / 5)).count();
        // Two seconds, of which the first may pass at once.
        assert!((9_900_000..=10_000_000).contains(&passed), "{passed}");
    }

    #[test]
    fn shared_accounts_are_taken_in_turn_and_begin_anew() {
        let accounts = Accounts::new(Box::leak(Box::new([Account::default(), Account::default()])));
        let allowance = || Allowance::new(Bandwidth::new(1_000_000).unwrap(), &accounts);
        let (first, second, third) = (allowance(), allowance(), allowance());
        let number = |allowance: &Allowance| allowance.shared().map(|(number, _)| number);
        assert_eq!([number(&first), number(&second), number(&third)], [Some(0), Some(1), None]);
        for of in [&first, &second, &third] {
            assert_eq!((0..2_000).filter(|_| of.take(ToPeer, 1_000, 5)).count(), 1_000);
        }
        drop(first);
        let next = allowance();
        assert_eq!(number(&next), Some(0));
        assert!(next.is_at_rest(0), "nothing is left of what another agent took");
    }

    #[test]
    fn zero_is_unlimited() {
        assert!(Bandwidth::new(0).is_none());
    }
}
