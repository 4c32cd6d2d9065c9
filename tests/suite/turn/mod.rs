//! The TURN server's core in virtual time, spoken to through the foreign `stun` codec.

mod allocate;
mod auth;
mod bandwidth;
mod channel_bind;
pub mod client;
mod create_permission;
mod data;
mod dual_stack;
mod model;
mod refresh;
mod routes;
mod strangers;
mod trace;
mod wire;
