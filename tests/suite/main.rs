//! The hermetic tests, one binary: no root, no network beyond loopback.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]

mod commands;
mod layers;
mod relay;
mod turn;
