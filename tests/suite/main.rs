//! The hermetic tests, one binary: no root, no network beyond loopback.
#![allow(
    clippy::unwrap_used,
    unsafe_code,
    reason = "a test may fail loudly; a terminal is opened through libc"
)]

mod commands;
mod front;
mod hostile;
mod http;
mod layers;
mod loopback;
mod nodes;
mod peerjs;
mod promise;
mod relay;
mod signal;
mod signaling;
mod streams;
mod trains;
mod turn;
