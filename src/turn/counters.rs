//! What one shard has counted since it started. Plain numbers: the shell publishes copies.

/// One shard's counters; add them up over shards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Allocations alive now.
    pub allocations: u64,
    /// Allocations ever made.
    pub allocations_made: u64,
    pub bytes_to_peers: u64,
    pub packets_to_peers: u64,
    pub bytes_to_clients: u64,
    pub packets_to_clients: u64,
    /// STUN Binding requests answered.
    pub bindings: u64,
    /// Error responses by their STUN code, in the order of [`crate::turn::refusal::CODES`].
    pub refusals: [u64; 14],
    /// Packets dropped, by reason, in the order of [`DROPS`].
    pub drops: [u64; 6],
}
