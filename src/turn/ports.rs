//! The ports of one relay address that one shard may use: free, bound in reserve, or live.
//!
//! Allocate takes a port that is bound already, so its answer is never a lie. The shell binds ahead of demand.

use std::collections::VecDeque;

use super::counters::PortCounts;

/// How many ports are kept bound ahead of demand, so that a burst of requests does not wait for the kernel.
pub const RESERVE: usize = 96;

/// Ports of one relay address.
#[derive(Debug)]
pub struct Ports {
    free: Vec<u16>,
    reserve: VecDeque<u16>,
    /// Ports that the shell is about to bind, or that were found taken and wait for their next turn.
    binding: usize,
    live: usize,
}

impl Ports {
    /// All of `ports` are free.
    #[must_use]
    pub fn new(ports: Vec<u16>) -> Self {
        Self { free: ports, reserve: VecDeque::with_capacity(RESERVE), binding: 0, live: 0 }
    }

    /// A port for the shell to bind, while the reserve is short; `random` picks which. To be followed by
    /// [`Self::bound`] or [`Self::taken`].
    pub fn next_to_bind(&mut self, random: u32) -> Option<u16> {
        if self.free.is_empty() || self.reserve.len() + self.binding >= RESERVE {
            return None;
        }
        self.binding += 1;
        Some(self.free.swap_remove(random as usize % self.free.len()))
    }

    /// The shell has bound `port`.
    pub fn bound(&mut self, port: u16) {
        self.binding -= 1;
        self.reserve.push_back(port);
    }

    /// Some other program holds `port`; it may be free another time.
    pub fn taken(&mut self, port: u16) {
        self.binding -= 1;
        self.free.push(port);
    }

    /// Empties the reserve; its ports are free, and the shell closes them.
    pub fn release(&mut self) -> impl Iterator<Item = u16> + '_ {
        self.free.extend(&self.reserve);
        self.reserve.drain(..)
    }

    /// Whether a port could be [taken](Self::take).
    #[must_use]
    pub fn has(&self, even: bool) -> bool {
        self.position(even).is_some()
    }

    /// A bound port becomes live; `even` for EVEN-PORT (RFC 8656 §18.7).
    pub fn take(&mut self, even: bool) -> Option<u16> {
        let index = self.position(even)?;
        self.live += 1;
        self.reserve.remove(index)
    }

    fn position(&self, even: bool) -> Option<usize> {
        self.reserve.iter().position(|port| !even || port % 2 == 0)
    }

    /// A live port is free again; its socket is closed.
    pub fn give_back(&mut self, port: u16) {
        self.live -= 1;
        self.free.push(port);
    }

    /// How many are in which state.
    #[must_use]
    pub fn count(&self) -> PortCounts {
        let free = self.free.len() + self.binding;
        PortCounts { free: free as u64, bound: self.reserve.len() as u64, live: self.live as u64 }
    }
}
