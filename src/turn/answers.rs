//! Recent answers to Allocate and Refresh of authenticated clients, so that a retransmission gets the identical one
//! (RFC 8489 §6.3.1) although the state it would meet has changed.

use std::{
    collections::{HashMap, VecDeque},
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

type Key = (FiveTuple, TransactionId);

/// The answers, by who asked in which transaction.
#[derive(Debug, Default)]
pub struct Answers {
    by_key: HashMap<Key, Box<[u8]>>,
    in_order: VecDeque<(Instant, Key)>,
}

impl Answers {
    /// The answer that this transaction has had.
    pub fn get(&mut self, now: Instant, from: &FiveTuple, transaction: TransactionId) -> Option<&[u8]> {
        self.forget(now);
        self.by_key.get(&(*from, transaction)).map(|answer| &**answer)
    }

    /// Keeps an answer.
    pub fn put(&mut self, now: Instant, from: FiveTuple, transaction: TransactionId, answer: &[u8]) {
        if answer.len() <= SIZE && self.by_key.insert((from, transaction), answer.into()).is_none() {
            self.in_order.push_back((now + KEPT, (from, transaction)));
        }
        if self.in_order.len() > COUNT {
            self.forget_oldest();
        }
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
