//! Halfway: one public host where two WebRTC agents meet.
//!
//! A pure core and a thin shell. Core modules are state machines: bytes and `now` in, replies and effects out; they
//! own no socket, task, thread or clock. Shell modules own those and decide nothing. `tests/suite/layers.rs` holds
//! the arrows.

// Shell: sockets, threads, tasks, clock.
pub mod acme; // certificates from an authority
pub mod app; // builds and joins all parts; start order, drain
pub mod bench; // load, and what it costs
pub mod clock; // the only file that reads a clock
pub mod cluster; // many nodes as one, through NATS
pub mod commands; // token, ice, doctor, bench, check: one file each; `serve` is `app`
pub mod config; // file + environment + flags → Config, with no "maybe" left
pub mod data_dir; // the secret and the self-signed certificate of an instance
pub mod doctor; // how a server looks from here, and what this host lacks for one
pub mod door; // TCP: who gets in, and which service a connection is for
pub mod host; // this machine: its addresses, how many files it lets us have open
pub mod http; // drives `signaling`: routes, WebSocket, ICE lists
pub mod jwks; // the public keys of an outside issuer
pub mod logging; // lines to stderr, text or JSON
pub mod metrics; // every number exposed, with its meaning
pub mod poll; // waiting for sockets, and being woken
pub mod relay; // drives `turn`: one shard per core, for UDP, TCP and TLS
pub mod revoking; // an agent's end, and that it lasts
pub mod stream; // one connection that does not block, with TLS or without
pub mod systemd; // tells a service manager how it goes
pub mod tls; // certificates
pub mod udp; // datagrams through the kernel, many at once

// Core: state machines.
pub mod signaling; // agents, rooms, sessions, offers
pub mod turn; // the TURN server (RFC 8656, RFC 8489)

// Pure functions and plain data.
pub mod credentials; // who may use us, and for how long
