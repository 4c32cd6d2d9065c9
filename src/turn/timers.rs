//! When something is next due: one deadline an allocation, in order.

use std::{collections::BTreeSet, time::Instant};

use super::AllocationId;

/// Deadlines in order. The owner remembers each allocation's deadline and moves it.
#[derive(Debug, Default)]
pub struct Timers {
    order: BTreeSet<(Instant, AllocationId)>,
}

impl Timers {
    /// The earliest deadline.
    pub fn next(&self) -> Option<Instant> {
        self.order.first().map(|(at, _)| *at)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Takes the earliest deadline if it is due.
    pub fn due(&mut self, now: Instant) -> Option<AllocationId> {
        self.next().filter(|at| *at <= now)?;
        self.order.pop_first().map(|(_, id)| id)
    }

    /// Moves the deadline of `id` from `old` (`None`: it had none) to `new`.
    pub fn set(&mut self, id: AllocationId, old: Option<Instant>, new: Option<Instant>) {
        if let Some(old) = old {
            self.order.remove(&(old, id));
        }
        if let Some(new) = new {
            self.order.insert((new, id));
        }
    }
}
