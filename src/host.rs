//! What this machine's own addresses are.
