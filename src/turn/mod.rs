//! The TURN server as a state machine (RFC 8656 on RFC 8489): bytes and `now` in, replies and effects out.

pub mod counters;
pub mod policy;
