//! Sizes, rates, counts.

use std::time::{Duration, Instant};

/// Below the 30 seconds after which the most impatient proxies cut an idle connection.
pub const HEARTBEAT: Duration = Duration::from_secs(25);

/// Bytes of an agent's card.
pub const MAX_CARD: usize = 8192;

/// Frames and bytes that nobody numbered (answers, presence) waiting for one connection.
pub const MAX_ASIDES: usize = 1024;
/// The same in bytes.
pub const MAX_ASIDE_BYTES: usize = 1 << 20;

/// How long a candidate waits for its sender's first offer or answer to the same agent.
pub const EARLY: Duration = Duration::from_secs(5);

/// An agent that asks by requests may be away this long between two of them, if the resume window is not longer.
pub const BETWEEN_REQUESTS: Duration = Duration::from_secs(30);

/// Bytes of answers and presence that wait for such an agent between two requests.
pub const MAX_ASIDE_BYTES_BETWEEN_REQUESTS: usize = 65_536;

/// Senders that one session remembers to have had a description from; of more, the latest.
pub const INTRODUCED: usize = 1024;

/// What one agent, one room, and all of them together may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of one frame, before it is parsed.
    pub max_frame: usize,
    /// Frames held for one session.
    pub window_messages: usize,
    /// Bytes held for one session.
    pub window_bytes: usize,
    /// How long a session outlives its connection.
    pub resume_window: Duration,
    /// One agent's frames; `None` is unlimited.
    pub rate: Option<Rate>,
    /// A room with more agents gets no presence frames.
    pub presence_limit: usize,
    /// How often agents are pinged; one that is silent for two of these is given up.
    pub heartbeat: Duration,
    /// Agents with a session, connected or waiting to resume.
    pub agents: usize,
    /// Bytes in the windows of all sessions together.
    pub held_bytes: usize,
}

/// So many a second, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Frames a second, in the long run.
    pub per_second: u32,
    /// Frames at once.
    pub burst: u32,
}

impl Rate {
    /// `None` (unlimited) when either is 0.
    #[must_use]
    pub fn new(per_second: u32, burst: u32) -> Option<Self> {
        (per_second > 0 && burst > 0).then_some(Self { per_second, burst })
    }
}

/// A bucket of a [`Rate`]'s tokens, kept as the one instant at which it is full again.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes one token.
    ///
    /// # Errors
    /// How long until there is one.
    pub fn take(&mut self, now: Instant, rate: Rate) -> Result<(), Duration> {
        let interval = Duration::from_secs(1) / rate.per_second;
        let full_at = self.full_at.max(now) + interval;
        let beyond = (full_at - now).saturating_sub(interval * rate.burst);
        if beyond.is_zero() {
            self.full_at = full_at;
            Ok(())
        } else {
            Err(beyond)
        }
    }

    /// How long until it is full.
    #[must_use]
    pub fn owes(&self, now: Instant) -> Duration {
        self.full_at.saturating_duration_since(now)
    }

    /// It is full that much later.
    pub fn owe(&mut self, now: Instant, owed: Duration) {
        self.full_at = self.full_at.max(now) + owed;
    }

    /// Whether forgetting this bucket changes nothing.
    #[must_use]
    pub fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Bucket, Rate};

    #[test]
    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
    fn a_burst_then_the_rate() {
        let t0 = Instant::now();
        let rate = Rate::new(2, 3).unwrap();
        let mut bucket = Bucket::new(t0);
        for _ in 0..3 {
            assert_eq!(bucket.take(t0, rate), Ok(()));
        }
        assert_eq!(bucket.take(t0, rate), Err(Duration::from_millis(500)));
        assert_eq!(bucket.take(t0 + Duration::from_millis(500), rate), Ok(()));
        assert!(!bucket.is_full(t0 + Duration::from_millis(1999)));
        assert!(bucket.is_full(t0 + Duration::from_secs(2)));
        assert_eq!(Rate::new(0, 9), None);
    }
}
