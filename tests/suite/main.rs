//! The hermetic tests, one binary: no root, no network beyond loopback.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

mod commands;
mod front;
mod http;
mod layers;
mod relay;
mod signaling;
mod turn;
