//! One allocation: what is known of it beyond what its packets need ([`super::forward`]).

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Family, FiveTuple, counters::Traffic, forward::Carried, quota::Seat};

/// LIFETIME is never granted shorter: one lost Refresh must not cost a client its allocation.
pub const LIFETIME_MIN: Duration = Duration::from_secs(1_200);
/// LIFETIME is never granted longer (RFC 8656 §7.2 names an hour).
pub const LIFETIME_MAX: Duration = Duration::from_secs(3_600);

/// An allocation (RFC 8656 §3.2).
#[derive(Debug)]
pub struct Allocation {
    /// Its owner's place in the quota.
    pub seat: Seat,
    /// What peers see, and the client was told: of a dual allocation both, even when one has been given back.
    pub relayed: Vec<SocketAddr>,
    /// When it was made.
    pub since: Instant,
    /// The families it has a relayed address of, and when each ends unless refreshed.
    pub until: Vec<(Family, Instant)>,
    /// The deadline that [`super::timers`] holds for it.
    pub armed: Option<Instant>,
}

impl Allocation {
    /// Whose it is.
    #[must_use]
    pub fn agent(&self) -> &Arc<str> {
        self.seat.agent()
    }

    /// It lives until then; of a dual allocation, only the `family` that the client named (RFC 8656 §8.2).
    pub fn prolong(&mut self, family: Option<Family>, until: Instant) {
        let named = |of: Family| family.is_none_or(|family| family == of);
        self.until.iter_mut().filter(|(of, _)| named(*of)).for_each(|(_, at)| *at = until);
    }

    /// A family that has run out by `now`.
    #[must_use]
    pub fn run_out(&self, now: Instant) -> Option<Family> {
        self.until.iter().find(|(_, until)| *until <= now).map(|(family, _)| *family)
    }
}

/// The lifetime granted to who asks for `seconds`, or for nothing in particular.
#[must_use]
pub fn granted(seconds: Option<u32>) -> Duration {
    let asked = seconds.map_or(LIFETIME_MIN, |seconds| Duration::from_secs(u64::from(seconds)));
    asked.clamp(LIFETIME_MIN, LIFETIME_MAX)
}

/// What is told of an allocation that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Whose it was.
    pub agent: Arc<str>,
    /// The client and our address it used.
    pub client: FiveTuple,
    /// What peers saw.
    pub relayed: Vec<SocketAddr>,
    /// How long it lived.
    pub lived: Duration,
    /// What the client sent.
    pub to_peers: Traffic,
    /// What the client was sent.
    pub to_clients: Traffic,
    /// Why it ended.
    pub why: Why,
}

impl Ended {
    /// What another path had relayed at the end.
    pub fn add(&mut self, carried: &Carried) {
        self.to_peers += carried.to_peers;
        self.to_clients += carried.to_clients;
    }
}

/// Why an allocation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A Refresh with LIFETIME 0.
    Released,
    /// No Refresh in time.
    Expired,
    /// Idle while its owner, at the quota, asked for another.
    Reclaimed,
    /// Its client's stream has closed.
    Disconnected,
    /// Its agent was revoked.
    Revoked,
}

impl Why {
    /// All of them, in the order of [`Counters::ended`](super::counters::Counters::ended).
    pub const ALL: [Self; 5] =
        [Self::Released, Self::Expired, Self::Reclaimed, Self::Disconnected, Self::Revoked];

    /// The word in the log and in metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Released => "released",
            Self::Expired => "expired",
            Self::Reclaimed => "reclaimed",
            Self::Disconnected => "disconnected",
            Self::Revoked => "revoked",
        }
    }
}
