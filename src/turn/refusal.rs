//! Every "no" by name, and its one STUN error code (RFC 8489 §14.8, RFC 8656 §19).

use stun_types::attribute::AttributeType;

/// Why a request is answered with an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request lacks what its method needs, or contradicts itself.
    BadRequest,
    /// No credentials, wrong ones, or expired ones.
    Unauthorized,
    /// The peer may not be reached.
    Forbidden,
    /// Attributes that must be understood and are not.
    UnknownAttributes(Vec<AttributeType>),
    /// An allocation where none may be, or none where one must be.
    AllocationMismatch,
    /// The nonce is old, foreign, or not ours.
    StaleNonce,
    /// No relayed address of that family here.
    AddressFamilyNotSupported,
    /// Another user's allocation.
    WrongCredentials,
    /// Relaying is over UDP only.
    UnsupportedTransportProtocol,
    /// The peer is of a family that the allocation has no relayed address of.
    PeerAddressFamilyMismatch,
    /// The agent, or all agents together, hold as many allocations as they may.
    AllocationQuotaReached,
    /// No port, or no room in a table.
    InsufficientCapacity,
}

/// The codes that [`Refusal::code`] gives, in ascending order.
pub const CODES: [u16; 12] = [400, 401, 403, 420, 437, 438, 440, 441, 442, 443, 486, 508];

impl Refusal {
    /// The STUN error code.
    #[must_use]
    pub fn code(&self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::UnknownAttributes(_) => 420,
            Self::AllocationMismatch => 437,
            Self::StaleNonce => 438,
            Self::AddressFamilyNotSupported => 440,
            Self::WrongCredentials => 441,
            Self::UnsupportedTransportProtocol => 442,
            Self::PeerAddressFamilyMismatch => 443,
            Self::AllocationQuotaReached => 486,
            Self::InsufficientCapacity => 508,
        }
    }

    /// The reason phrase: ASCII.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::BadRequest => "Bad Request",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::UnknownAttributes(_) => "Unknown Attribute",
            Self::AllocationMismatch => "Allocation Mismatch",
            Self::StaleNonce => "Stale Nonce",
            Self::AddressFamilyNotSupported => "Address Family not Supported",
            Self::WrongCredentials => "Wrong Credentials",
            Self::UnsupportedTransportProtocol => "Unsupported Transport Protocol",
            Self::PeerAddressFamilyMismatch => "Peer Address Family Mismatch",
            Self::AllocationQuotaReached => "Allocation Quota Reached",
            Self::InsufficientCapacity => "Insufficient Capacity",
        }
    }

    /// Whether the answer invites the client to (re)authenticate: REALM and NONCE go with it.
    #[must_use]
    pub fn challenges(&self) -> bool {
        matches!(self, Self::Unauthorized | Self::StaleNonce)
    }
}
