//! The only file that reads a clock.
//!
//! Everything below the shell takes a [`Now`] as an argument, so that a test can be an hour later by saying so.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// One reading of both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// For deadlines: never goes back.
    pub mono: Instant,
    /// For what others read: token and credential expiry.
    pub wall: SystemTime,
}

impl Now {
    /// Whole seconds since the Unix epoch; 0 for a wall clock set before it.
    #[must_use]
    pub fn unix(self) -> u64 {
        self.wall.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    }
}

/// Both clocks move together: virtual time for tests, look-ahead for deadlines.
impl std::ops::Add<Duration> for Now {
    type Output = Self;

    fn add(self, later: Duration) -> Self {
        Self { mono: self.mono + later, wall: self.wall + later }
    }
}

/// Reads both clocks.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "the one place that reads a clock")]
pub fn now() -> Now {
    Now { mono: Instant::now(), wall: SystemTime::now() }
}
