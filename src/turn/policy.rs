//! Which peers may be reached; quotas; rates.

/// How a denied peer is answered (`turn.denied_peers`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeniedPeers {
    /// 403, signed, at once.
    Refuse,
    /// Granted, and every packet dropped.
    Discard,
}
