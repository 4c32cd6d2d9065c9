//! Every "no" that an agent can hear, by name, with its one code.

use std::{borrow::Cow, fmt, time::Duration};

use crate::credentials::token::TokenRefusal;

/// Why a frame is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    Token(TokenRefusal),
    Forbidden(&'static str),
    BadFrame(Cow<'static, str>),
    TooLarge(&'static str),
    /// Holds how long to wait.
    RateLimited(Duration),
    /// Unknown, in another room, or gone: alike for whoever asks.
    PeerUnavailable,
    QueueFull,
    Unavailable(&'static str),
}

/// What agents see of a refusal, in the contract's order.
pub const CODES: [&str; 10] = [
    "unauthorized",
    "expired",
    "forbidden",
    "badFrame",
    "tooLarge",
    "rateLimited",
    "peerUnavailable",
    "queueFull",
    "unavailable",
    "internal",
];

impl Refusal {
    /// The code that agents see: one of [`CODES`].
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Token(refusal) => refusal.code(),
            Self::Forbidden(_) => "forbidden",
            Self::BadFrame(_) => "badFrame",
            Self::TooLarge(_) => "tooLarge",
            Self::RateLimited(_) => "rateLimited",
            Self::PeerUnavailable => "peerUnavailable",
            Self::QueueFull => "queueFull",
            Self::Unavailable(_) => "unavailable",
        }
    }

    /// Whole seconds after which trying again makes sense.
    #[must_use]
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::RateLimited(wait) => Some(wait.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)),
            Self::QueueFull => Some(1),
            Self::Unavailable(_) => Some(5),
            Self::Token(_)
            | Self::Forbidden(_)
            | Self::BadFrame(_)
            | Self::TooLarge(_)
            | Self::PeerUnavailable => None,
        }
    }
}

/// For people.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Token(refusal) => refusal.fmt(f),
            Self::Forbidden(why) | Self::TooLarge(why) | Self::Unavailable(why) => f.write_str(why),
            Self::BadFrame(why) => f.write_str(why),
            Self::RateLimited(_) => f.write_str("too many frames: slow down"),
            Self::PeerUnavailable => f.write_str("no such agent in this room"),
            Self::QueueFull => f.write_str("too much is waiting for that agent already"),
        }
    }
}

impl From<TokenRefusal> for Refusal {
    fn from(refusal: TokenRefusal) -> Self {
        Self::Token(refusal)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Refusal;

    #[test]
    fn waits_are_whole_seconds_rounded_up() {
        let wait = |ms| Refusal::RateLimited(Duration::from_millis(ms)).retry_after();
        assert_eq!((wait(1), wait(1000), wait(1001)), (Some(1), Some(1), Some(2)));
    }
}
