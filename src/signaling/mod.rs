//! Agents, rooms, sessions, offers: who is here, and how one reaches another.
//!
//! A state machine: frames and `now` in, frames out. The shell owns the sockets and asks what there is to write.

pub mod farewell; // how we end a connection
pub mod hub; // the only state: agents, rooms, routing, presence
pub mod limits; // sizes, rates, counts
pub mod message; // frames from agents and to agents: docs/protocol.md
pub mod nodes; // what nodes of a cluster say to each other
pub mod peerjs; // the same in the words of PeerJS
pub mod refusal; // every "no" by name, and its one code
pub mod registry; // finding agents by their cards
pub mod session; // sequence numbers, the window, resume
