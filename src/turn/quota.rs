//! How many allocations each agent, and all together, may hold. Shared by all shards; asked on Allocate only, never
//! on the packet path.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The counts, shared.
#[derive(Clone, Debug)]
pub struct Quotas(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    per_agent: u32,
    total: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    by_agent: HashMap<Arc<str>, u32>,
    total: u32,
}

impl Quotas {
    /// Limits on allocations; 0 is unlimited.
    #[must_use]
    pub fn new(per_agent: u32, total: u32) -> Self {
        Self(Arc::new(Shared { per_agent, total, held: Mutex::default() }))
    }

    /// Takes a seat for one allocation of `agent`; `None` at a limit.
    #[must_use]
    pub fn take(&self, agent: &Arc<str>) -> Option<Seat> {
        let mut held = self.held();
        let mine = held.by_agent.get(agent).copied().unwrap_or(0);
        let within = |count: u32, limit: u32| limit == 0 || count < limit;
        if !within(mine, self.0.per_agent) || !within(held.total, self.0.total) {
            return None;
        }
        held.total += 1;
        held.by_agent.insert(Arc::clone(agent), mine + 1);
        drop(held);
        Some(Seat { quotas: self.clone(), agent: Arc::clone(agent) })
    }

    /// Allocations held by all agents.
    #[must_use]
    pub fn held_in_total(&self) -> u32 {
        self.held().total
    }

    /// A shard that panicked between two lines of this file is no reason to refuse all agents for ever.
    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One allocation's place; dropping it gives it back.
#[derive(Debug)]
pub struct Seat {
    quotas: Quotas,
    agent: Arc<str>,
}

impl Seat {
    /// Whose it is.
    #[must_use]
    pub fn agent(&self) -> &Arc<str> {
        &self.agent
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.quotas.held();
        held.total -= 1;
        if let Some(count) = held.by_agent.get_mut(&self.agent) {
            *count -= 1;
            if *count == 0 {
                held.by_agent.remove(&self.agent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Quotas;

    #[test]
    fn seats_are_counted_and_given_back() {
        let (alice, bob) = ("alice".into(), "bob".into());
        let quotas = Quotas::new(2, 3);
        let first = quotas.take(&alice).unwrap();
        let second = quotas.take(&alice).unwrap();
        assert!(quotas.take(&alice).is_none(), "two an agent");
        let third = quotas.take(&bob).unwrap();
        assert!(quotas.take(&bob).is_none(), "three in all");
        drop(first);
        assert!(quotas.take(&alice).is_some());
        drop((second, third));
        assert_eq!(quotas.held_in_total(), 0);
        assert!(quotas.held().by_agent.is_empty());
    }

    #[test]
    fn zero_is_unlimited() {
        let quotas = Quotas::new(0, 0);
        let seats: Vec<_> = (0..100).map(|_| quotas.take(&"a".into()).unwrap()).collect();
        assert_eq!(seats.len(), 100);
    }
}
