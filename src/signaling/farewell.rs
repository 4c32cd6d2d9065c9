//! How we end a connection: the last frame, the close code, and why.

use bytes::Bytes;

use super::message::ServerFrame;

/// Seconds for which agents should keep trying to come back after a restart.
const TRY_FOR: u64 = 60;

/// Why we end a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// A newer connection of the same agent took over.
    Replaced,
    /// The token's time is over.
    Expired,
    /// An operator has revoked the agent.
    Revoked,
    /// It does not read what it is sent.
    Slow,
    /// We are going down; come back in so many seconds.
    Restarting(u64),
}

impl Farewell {
    /// The last frame; a connection that does not read gets none.
    #[must_use]
    pub fn frame(self) -> Option<Bytes> {
        let frame = match self {
            Self::Replaced => ServerFrame::Replaced,
            Self::Expired => ServerFrame::Ended { code: "expired" },
            Self::Revoked => ServerFrame::Ended { code: "revoked" },
            Self::Restarting(reconnect_in) => ServerFrame::Restarting { reconnect_in, try_for: TRY_FOR },
            Self::Slow => return None,
        };
        Some(frame.to_bytes())
    }

    /// The WebSocket close code.
    #[must_use]
    pub fn close_code(self) -> u16 {
        match self {
            Self::Expired => 4001,
            Self::Revoked => 4002,
            Self::Slow => 4003,
            Self::Replaced => 4005,
            Self::Restarting(_) => 1012,
        }
    }

    /// The WebSocket close reason.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Slow => "slow",
            Self::Replaced => "replaced",
            Self::Restarting(_) => "restarting",
        }
    }
}
