//! Datagrams in and out through the kernel, many at once: read by recvmmsg and coalesced by GRO, sent by sendmmsg in GSO
//! trains.

mod arena; // what was read, where it lies until it is sent
mod control; // addresses and control messages, as the kernel lays them out
mod outbox; // what is to be sent, grouped by where it goes
mod socket; // options of UDP sockets

pub use self::{
    arena::{Arena, Arrived, ROOM},
    outbox::{Outbox, Way},
    socket::{Offload, coalesce, mapped, receive_buffer, receive_drops, size_buffers, tell_local_address},
};
