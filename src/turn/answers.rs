//! Recent answers to Allocate and Refresh of authenticated clients, so that a retransmission gets the identical one
//! (RFC 8489 §6.3.1) although the state it would meet has changed.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
    time::{Duration, Instant},
};

use stun_types::message::TransactionId;

use super::FiveTuple;

/// Retransmissions are expected for that long: libwebrtc's last leaves after about 32 s.
const KEPT: Duration = Duration::from_secs(40);
/// Answers kept at most; beyond it the oldest goes.
const COUNT: usize = 16_384;
/// Longer answers are not kept; none that we write is.
const SIZE: usize = 512;

/// Stands for a client's transaction, in a tenth of its size. With random keys nobody can make two of them meet, and if
/// they did, the answer would be to a transaction that the client knows nothing of.
type Key = u64;

/// The answers, by who asked in which transaction.
#[derive(Debug)]
pub struct Answers {
    by_key: HashMap<Key, Box<[u8]>>,
    in_order: VecDeque<(Instant, Key)>,
    hasher: RandomState,
}

impl Default for Answers {
    fn default() -> Self {
        // Room enough for it never to grow: where as many come as go, a table fills with the traces of those gone.
        let by_key = HashMap::with_capacity(2 * COUNT);
        Self { by_key, in_order: VecDeque::new(), hasher: RandomState::new() }
    }
}

impl Answers {
    /// The answer that this transaction has had.
    pub fn get(&mut self, now: Instant, from: &FiveTuple, transaction: TransactionId) -> Option<&[u8]> {
        self.forget(now);
        self.by_key.get(&self.key(from, transaction)).map(|answer| &**answer)
    }

    /// Keeps an answer.
    pub fn put(&mut self, now: Instant, from: FiveTuple, transaction: TransactionId, answer: &[u8]) {
        let key = self.key(&from, transaction);
        if answer.len() <= SIZE && self.by_key.insert(key, answer.into()).is_none() {
            self.in_order.push_back((now + KEPT, key));
        }
        if self.in_order.len() > COUNT {
            self.forget_oldest();
        }
    }

    fn key(&self, from: &FiveTuple, transaction: TransactionId) -> Key {
        self.hasher.hash_one((from, transaction))
    }

    fn forget(&mut self, now: Instant) {
        while self.in_order.front().is_some_and(|(until, _)| *until <= now) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key)) = self.in_order.pop_front() {
            self.by_key.remove(&key);
        }
    }
}
