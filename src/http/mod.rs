//! Drives `signaling`: accept, routes, WebSocket, ICE lists.

pub mod ice; // ICE server lists: pure, so that `halfway ice` prints the same
