//! How many allocations each agent, and all together, may hold, and how much an agent may relay. Shared by all shards:
//! the lock is taken on Allocate and at the end of an allocation, never on the packet path, which notes when it last saw
//! a packet and takes from the agent's allowance.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use super::{
    FiveTuple,
    bandwidth::{Account, Accounts, Allowance, Bandwidth, Direction},
    forward::Load,
    rate::SECOND,
};

/// An agent at its quota loses an allocation that has been idle for so many ticks rather than be refused a new one: many
/// clients vanish without a Refresh of 0.
const IDLE: u64 = 30 * SECOND;
/// One whose client has not been heard for so long, while the same agent asks from another port of the same address, is
/// taken to be that client's own: its NAT has moved it.
const MOVED: u64 = 7 * SECOND;
/// Agents without an allocation whose allowance is remembered until it is whole again.
const REMEMBERED: usize = 4_096;

/// What the configuration says; 0 is unlimited.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Allocations of one agent.
    pub per_agent: u32,
    /// Allocations of all agents.
    pub total: u32,
    /// Payload of one agent each way, whatever the number of its allocations.
    pub bytes_per_second: u32,
}

/// The counts, shared.
#[derive(Clone, Debug)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// What ticks are counted from.
    epoch: OnceLock<Instant>,
    accounts: Accounts,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    limits: Limits,
    by_agent: HashMap<Arc<str>, Agent>,
    total: usize,
    /// Agents that had no allocation any more, in the order in which they gave back the last; each is here once.
    left: VecDeque<Arc<str>>,
}

/// One agent. It is remembered for a while after its last allocation: a new one must not come with a new allowance.
#[derive(Debug)]
struct Agent {
    tenures: Vec<Arc<Tenure>>,
    allowance: Option<Arc<Allowance>>,
    has_left: bool,
}

/// One allocation, as all shards may see it.
#[derive(Debug)]
pub struct Tenure {
    /// Whose world it lives in.
    pub shard: usize,
    /// Its client.
    pub client: FiveTuple,
    /// The tick of the last packet, either way, or Refresh.
    active: AtomicU64,
    /// The tick of the last authentic request or packet of the client's.
    heard: AtomicU64,
    /// What its agent may still relay; `None` is unlimited.
    allowance: Option<Arc<Allowance>>,
}

impl Tenure {
    /// A packet to or from a peer, or a Refresh, was seen.
    pub fn touch(&self, tick: u64) {
        self.active.store(tick, Relaxed);
    }

    /// The client itself was heard.
    pub fn hear(&self, tick: u64) {
        self.heard.store(tick, Relaxed);
    }

    /// Another path has relayed packets of it: the client's last one then, and the last one of all.
    pub fn has_carried(&self, heard: Option<u64>, active: Option<u64>) {
        let last = |of: &AtomicU64, tick: Option<u64>| of.fetch_max(tick.unwrap_or(0), Relaxed);
        last(&self.heard, heard);
        last(&self.active, active);
    }

    /// Whether `other`, who asks for one more, could be this one's client behind a NAT that gave it another port.
    fn may_have_moved_to(&self, other: &FiveTuple) -> bool {
        let place = |at: &FiveTuple| (at.client.ip().to_canonical(), at.transport);
        place(&self.client) == place(other) && self.client.client.port() != other.client.port()
    }

    /// The tick of the client's last packet or authentic request.
    #[must_use]
    pub fn heard(&self) -> u64 {
        self.heard.load(Relaxed)
    }

    /// The tick of the last packet, either way, or Refresh.
    #[must_use]
    pub fn active(&self) -> u64 {
        self.active.load(Relaxed)
    }

    /// The account that its packets are paid from: `None` without a limit, `Some(None)` if nobody shares it.
    #[must_use]
    pub fn account(&self) -> Option<Option<(u32, &Account)>> {
        self.allowance.as_ref().map(|allowance| allowance.shared())
    }

    /// Takes packets from what its agent may relay, as many as that allows. Gives how many.
    pub fn takes(&self, direction: Direction, load: Load, tick: u64) -> usize {
        let Some(allowance) = &self.allowance else { return load.packets };
        (0..load.packets).take_while(|_| allowance.take(direction, load.length, tick)).count()
    }
}

impl Quotas {
    /// Nothing is held.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self::sharing(limits, Accounts::default())
    }

    /// The same, with what agents may relay in `accounts`.
    #[must_use]
    pub fn sharing(limits: Limits, accounts: Accounts) -> Self {
        let held = Mutex::new(Held { limits, ..Held::default() });
        Self(Arc::new(Shared { epoch: OnceLock::new(), accounts, held }))
    }

    /// Other limits from now on. No allocation ends for that, and an agent that holds one relays as fast as it did until it
    /// has none.
    pub fn adopt(&self, limits: Limits) {
        self.held().limits = limits;
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
        let tick = self.tick(now);
        let mut held = self.held();
        held.forget(tick);
        let mine = held.by_agent.get(agent).map_or(0, |agent| agent.tenures.len());
        let within = |count: usize, limit: u32| limit == 0 || count < limit as usize;
        if !within(mine, held.limits.per_agent) || !within(held.total, held.limits.total) {
            return None;
        }
        held.total += 1;
        let bandwidth = Bandwidth::new(held.limits.bytes_per_second);
        let newcomer = || Agent { tenures: Vec::new(), allowance: None, has_left: false };
        let owner = held.by_agent.entry(Arc::clone(agent)).or_insert_with(newcomer);
        if owner.tenures.is_empty() && owner.allowance.as_ref().map(|own| own.limit()) != bandwidth {
            owner.allowance = bandwidth.map(|limit| Arc::new(Allowance::new(limit, &self.0.accounts)));
        }
        let allowance = owner.allowance.clone();
        let tenure = Arc::new(Tenure {
            shard,
            client,
            active: AtomicU64::new(tick),
            heard: AtomicU64::new(tick),
            allowance,
        });
        owner.tenures.push(Arc::clone(&tenure));
        drop(held);
        Some(Seat { quotas: self.clone(), agent: Arc::clone(agent), tenure })
    }

    /// Takes back the seat of an allocation of `agent`, who asks for another from `client`: of those that this client
    /// left behind the one that has been silent longest, else of all the one that has been idle longest; if it has been
    /// so long enough. Its shard has to end it.
    #[must_use]
    pub fn reclaim(&self, agent: &str, client: &FiveTuple, now: Instant) -> Option<Arc<Tenure>> {
        let tick = self.tick(now);
        let mut held = self.held();
        let own = &held.by_agent.get(agent)?.tenures;
        let before = |then: &AtomicU64, ticks| tick.saturating_sub(then.load(Relaxed)) >= ticks;
        let left_behind = own.iter().filter(|tenure| tenure.may_have_moved_to(client));
        let silent = left_behind.min_by_key(|tenure| tenure.heard.load(Relaxed));
        let idle = own.iter().min_by_key(|tenure| tenure.active.load(Relaxed));
        let longest = silent
            .filter(|tenure| before(&tenure.heard, MOVED))
            .or_else(|| idle.filter(|tenure| before(&tenure.active, IDLE)))
            .map(Arc::clone)?;
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
        let Some((agent, _)) = self.by_agent.get_key_value(agent) else { return };
        let agent = Arc::clone(agent);
        let owner = self.by_agent.get_mut(&agent).expect("it was found a moment ago");
        let Some(index) = owner.tenures.iter().position(|other| Arc::ptr_eq(other, tenure)) else { return };
        owner.tenures.remove(index);
        self.total -= 1;
        if owner.tenures.is_empty() && owner.allowance.is_none() {
            self.by_agent.remove(&agent);
        } else if owner.tenures.is_empty() && !owner.has_left {
            owner.has_left = true;
            self.left.push_back(agent);
        }
        if self.left.len() > REMEMBERED {
            self.forget_first();
        }
    }

    /// Forgets who has left, once that gives nothing away.
    fn forget(&mut self, tick: u64) {
        let is_done = |agent: &Agent| !agent.tenures.is_empty() || agent.is_at_rest(tick);
        while self.left.front().is_some_and(|first| self.by_agent.get(first).is_none_or(is_done)) {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        let Some(first) = self.left.pop_front() else { return };
        let Some(agent) = self.by_agent.get_mut(&first) else { return };
        agent.has_left = false;
        if agent.tenures.is_empty() {
            self.by_agent.remove(&first);
        }
    }
}

impl Agent {
    fn is_at_rest(&self, tick: u64) -> bool {
        self.allowance.as_ref().is_none_or(|allowance| allowance.is_at_rest(tick))
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

    use super::{Direction, FiveTuple, Limits, Load, Quotas, REMEMBERED, Seat};
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
        let quotas = Quotas::new(Limits { per_agent: 2, total: 3, ..Limits::default() });
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
        let quotas = Quotas::new(Limits::default());
        let seats: Vec<_> =
            (0..100).map(|port| quotas.take(&"a".into(), 0, client(port), now()).unwrap()).collect();
        assert_eq!(seats.len(), 100);
    }

    #[test]
    fn the_longest_idle_of_all_shards_is_reclaimed_once() {
        let alice = Arc::from("alice");
        let quotas = Quotas::new(Limits { per_agent: 2, ..Limits::default() });
        let start = now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let old = quotas.take(&alice, 0, client(1), at(0)).unwrap();
        let new = quotas.take(&alice, 1, client(2), at(10)).unwrap();
        let elsewhere = FiveTuple { client: ([9, 9, 9, 9], 1).into(), ..client(1) };
        assert!(quotas.reclaim("alice", &elsewhere, at(29)).is_none());
        old.tenure().touch(quotas.tick(at(20)));
        let idle = quotas.reclaim("alice", &elsewhere, at(45)).unwrap();
        assert_eq!((idle.shard, idle.client), (1, client(2)));
        assert_eq!(quotas.held_in_total(), 1);
        drop(new);
        assert_eq!(quotas.held_in_total(), 1, "given back already");
        drop(old);
        assert_eq!(quotas.held_in_total(), 0);
    }

    fn passed(seat: &Seat, tick: u64) -> usize {
        (0..1_000).filter(|_| seat.tenure().takes(Direction::ToPeer, Load::one(1_000), tick) == 1).count()
    }

    #[test]
    fn a_new_allocation_is_no_new_allowance() {
        let (alice, bob) = (Arc::from("alice"), Arc::from("bob"));
        let quotas = Quotas::new(Limits { bytes_per_second: 100_000, ..Limits::default() });
        let start = now();
        let take = |agent, port| quotas.take(agent, 0, client(port), start).unwrap();
        let (first, other) = (take(&alice, 1), take(&bob, 2));
        assert_eq!((passed(&first, 0), passed(&other, 0)), (100, 100));
        drop(first);
        let second = take(&alice, 3);
        assert_eq!(passed(&second, 0), 0);
        assert_eq!(passed(&second, 500_000), 50);
        assert_eq!(passed(&take(&alice, 4), 500_000), 0, "two share it");
        drop((second, other));
        let later = start + Duration::from_secs(60);
        assert_eq!(passed(&quotas.take(&alice, 0, client(5), later).unwrap(), 60_000_000), 100);
    }

    #[test]
    fn agents_that_left_are_forgotten_once_they_are_at_rest_or_too_many() {
        let quotas = Quotas::new(Limits { bytes_per_second: 1, ..Limits::default() });
        let start = now();
        for agent in 0..2 * REMEMBERED {
            // Twice, so that it leaves twice.
            for _ in 0..2 {
                let seat = quotas.take(&agent.to_string().into(), 0, client(1), start).unwrap();
                seat.tenure().takes(Direction::ToPeer, Load::one(65_000), 0);
            }
        }
        assert_eq!(quotas.held().by_agent.len(), REMEMBERED);
        let week = start + Duration::from_secs(7 * 86_400);
        let seat = quotas.take(&"last".into(), 0, client(1), week).unwrap();
        assert_eq!(quotas.held().by_agent.len(), 1);
        assert!(quotas.held().left.is_empty());
        drop(seat);
    }
}
