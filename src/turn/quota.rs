//! How many allocations each agent, and all together, may hold. Shared by all shards: the lock is taken on Allocate and
//! at the end of an allocation, never on the packet path, which only notes when it last saw a packet.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::FiveTuple;

/// Ticks in a second.
pub const SECOND: u64 = 1_000_000;
/// An agent at its quota loses an allocation that has been idle for so many ticks rather than be refused a new one: many
/// clients vanish without a Refresh of 0.
const IDLE: u64 = 30 * SECOND;

/// The counts, shared.
#[derive(Clone, Debug)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_agent: u32,
    total: u32,
    /// What ticks are counted from.
    epoch: OnceLock<Instant>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_agent: HashMap<Arc<str>, Vec<Arc<Tenure>>>,
    total: usize,
}

/// One allocation, as all shards may see it.
#[derive(Debug)]
pub struct Tenure {
    /// Whose world it lives in.
    pub shard: usize,
    /// Its client.
    pub client: FiveTuple,
    /// The tick of the last packet or Refresh.
    active: AtomicU64,
}

impl Tenure {
    /// A packet or a Refresh was seen.
    pub fn touch(&self, tick: u64) {
        self.active.store(tick, Relaxed);
    }
}

impl Quotas {
    /// Limits on allocations; 0 is unlimited.
    #[must_use]
    pub fn new(per_agent: u32, total: u32) -> Self {
        Self(Arc::new(Shared { per_agent, total, epoch: OnceLock::new(), held: Mutex::default() }))
    }

    /// `now` in microseconds since the quotas were first asked: one clock for all shards.
    #[must_use]
    pub fn tick(&self, now: Instant) -> u64 {
        let epoch = *self.0.epoch.get_or_init(|| now);
        u64::try_from(now.saturating_duration_since(epoch).as_micros()).unwrap_or(u64::MAX)
    }

    /// Takes a seat for one allocation of `agent`; `None` at a limit.
    #[must_use]
    pub fn take(&self, agent: &Arc<str>, shard: usize, client: FiveTuple, now: Instant) -> Option<Seat> {
        let tenure = Arc::new(Tenure { shard, client, active: AtomicU64::new(self.tick(now)) });
        let mut held = self.held();
        let mine = held.by_agent.get(agent).map_or(0, Vec::len);
        let within = |count: usize, limit: u32| limit == 0 || count < limit as usize;
        if !within(mine, self.0.per_agent) || !within(held.total, self.0.total) {
            return None;
        }
        held.total += 1;
        held.by_agent.entry(Arc::clone(agent)).or_default().push(Arc::clone(&tenure));
        drop(held);
        Some(Seat { quotas: self.clone(), agent: Arc::clone(agent), tenure })
    }

    /// Takes back the seat of the allocation of `agent` that has been idle longest, if one has been idle long enough.
    /// Its shard has to end it.
    #[must_use]
    pub fn reclaim_idle(&self, agent: &str, now: Instant) -> Option<Arc<Tenure>> {
        let tick = self.tick(now);
        let mut held = self.held();
        let own = held.by_agent.get(agent)?;
        let longest = own.iter().min_by_key(|tenure| tenure.active.load(Relaxed))?;
        let idle = tick.saturating_sub(longest.active.load(Relaxed)) >= IDLE;
        let longest = idle.then(|| Arc::clone(longest))?;
        held.give_back(agent, &longest);
        Some(longest)
    }

    /// Allocations held by all agents.
    #[must_use]
    pub fn held_in_total(&self) -> usize {
        self.held().total
    }

    /// A shard that panicked between two lines of this file is no reason to refuse all agents for ever.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// Once: a seat that was reclaimed has been given back already.
    fn give_back(&mut self, agent: &str, tenure: &Arc<Tenure>) {
        let Some(own) = self.by_agent.get_mut(agent) else { return };
        let Some(index) = own.iter().position(|other| Arc::ptr_eq(other, tenure)) else { return };
        own.remove(index);
        self.total -= 1;
        if own.is_empty() {
            self.by_agent.remove(agent);
        }
    }
}

/// One allocation's place; dropping it gives it back.
#[derive(Debug)]
pub struct Seat {
    quotas: Quotas,
    agent: Arc<str>,
    tenure: Arc<Tenure>,
}

impl Seat {
    /// Whose it is.
    #[must_use]
    pub fn agent(&self) -> &Arc<str> {
        &self.agent
    }

    /// What all shards may see of it.
    #[must_use]
    pub fn tenure(&self) -> &Arc<Tenure> {
        &self.tenure
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.quotas.held().give_back(&self.agent, &self.tenure);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::Arc,
        time::{Duration, Instant},
    };

    use super::{FiveTuple, Quotas};
    use crate::{clock, turn::Transport};

    fn client(port: u16) -> FiveTuple {
        let client = ([9, 0, 0, 1], port).into();
        FiveTuple { client, server: ([5, 5, 5, 5], 3478).into(), transport: Transport::Udp }
    }

    fn now() -> Instant {
        clock::now().mono
    }

    #[test]
    fn seats_are_counted_and_given_back() {
        let (alice, bob) = (Arc::from("alice"), Arc::from("bob"));
        let quotas = Quotas::new(2, 3);
        let take = |agent, port| quotas.take(agent, 0, client(port), now());
        let first = take(&alice, 1).unwrap();
        let second = take(&alice, 2).unwrap();
        assert!(take(&alice, 3).is_none(), "two an agent");
        let third = take(&bob, 4).unwrap();
        assert!(take(&bob, 5).is_none(), "three in all");
        drop(first);
        assert!(take(&alice, 6).is_some());
        drop((second, third));
        assert_eq!(quotas.held_in_total(), 0);
        assert!(quotas.held().by_agent.is_empty());
    }

    #[test]
    fn zero_is_unlimited() {
        let quotas = Quotas::new(0, 0);
        let seats: Vec<_> =
            (0..100).map(|port| quotas.take(&"a".into(), 0, client(port), now()).unwrap()).collect();
        assert_eq!(seats.len(), 100);
    }

    #[test]
    fn the_longest_idle_of_all_shards_is_reclaimed_once() {
        let alice = Arc::from("alice");
        let quotas = Quotas::new(2, 0);
        let start = now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let old = quotas.take(&alice, 0, client(1), at(0)).unwrap();
        let new = quotas.take(&alice, 1, client(2), at(10)).unwrap();
        assert!(quotas.reclaim_idle("alice", at(29)).is_none());
        old.tenure().touch(quotas.tick(at(20)));
        let idle = quotas.reclaim_idle("alice", at(45)).unwrap();
        assert_eq!((idle.shard, idle.client), (1, client(2)));
        assert_eq!(quotas.held_in_total(), 1);
        drop(new);
        assert_eq!(quotas.held_in_total(), 1, "given back already");
        drop(old);
        assert_eq!(quotas.held_in_total(), 0);
    }
}
