//! Who may use this host, and for how long: mint and check in the same file.

pub mod issuer; // somebody else who signs agents' tokens
pub mod keyring; // the instance's secret and the keys derived from it
pub mod revocations; // whom what they were given serves no more
pub mod signaled; // what agents told each other of their addresses
pub mod token; // agents' tokens
pub mod turn_rest; // time-limited TURN users
