//! Clients on TCP and TLS: their connections, from the door's welcome to the end.

use std::{io, ops::Range};

use super::{LOOK, PIECES, STRANGERS_LONGEST, STREAM, Shard, packets::Payloads};
use crate::{
    door::RelayClient,
    poll::Watch,
    relay::stream::{Slow, five_tuple},
    stream::Flushed,
    turn::framing::{self, Broken},
};

/// Clients on streams.
impl Shard {
    pub(super) fn welcome(&mut self, client: RelayClient) {
        // The kernel gives a client's address to a new connection once the old one is dead, which we may not know yet.
        if let Some(dead) = self.streams.index_of(&five_tuple(&client)) {
            self.close_stream(dead);
        }
        let index = self.streams.insert(self.now.mono, client);
        let client = self.streams.get_mut(index).expect("it has just been put there");
        match self.poll.add(&client.stream.socket, STREAM + index as u64) {
            // What came with the handshake has been read already, and nobody will say so again.
            Ok(()) => self.stream_is_ready(index),
            Err(error) => {
                tracing::error!("cannot watch a relay client's connection: {error}");
                self.close_stream(index);
            }
        }
    }

    /// There is something to read, or room to write.
    pub(super) fn stream_is_ready(&mut self, index: usize) {
        let read = self.read_stream(index);
        self.flush_stream(index);
        if read.is_err() {
            self.close_stream(index);
        }
    }

    /// Reads for a while.
    ///
    /// # Errors
    /// When the client has ended its stream, or broken it.
    fn read_stream(&mut self, index: usize) -> Result<(), Broken> {
        for turn in 0.. {
            // One slot for what is read, and one for the message that it makes whole.
            self.make_room(2);
            // What TLS has decrypted already is read to its end: the poll would not tell of it again.
            let read = self.streams.read(index, self.arena.lend(), turn < PIECES);
            // Closed by an earlier event of the same batch.
            let Some(read) = read else { return Ok(()) };
            match read {
                Ok(length @ 1..) => {
                    let piece = self.arena.keep(length);
                    self.serve_stream(index, piece)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Ok(0) | Err(_) => return Err(Broken),
            }
        }
        Ok(())
    }

    fn serve_stream(&mut self, index: usize, mut piece: Range<usize>) -> Result<(), Broken> {
        let client = self.streams.get_mut(index).expect("it was just read from");
        let (tuple, mut framing) = (client.tuple(), client.take_framing());
        let mut heard = false;
        loop {
            let known = self.server.holds_allocation(&tuple);
            let longest = if known { framing::LONGEST } else { STRANGERS_LONGEST };
            let mut rest = self.arena.bytes(piece.clone());
            let Some(message) = framing.next(&mut rest, longest)? else { break };
            heard = true;
            let end = piece.end - rest.len();
            let start = end.checked_sub(message.len());
            let message = match start.filter(|start| self.arena.holds_at(*start, message)) {
                Some(start) => start..end,
                None => {
                    self.whole.clear();
                    self.whole.extend_from_slice(message);
                    self.arena.lend()[..self.whole.len()].copy_from_slice(&self.whole);
                    self.arena.keep(self.whole.len())
                }
            };
            piece.start = end;
            self.reply.clear();
            self.serve_client(&tuple, Payloads::one(message));
            // Who sends requests and does not read the answers is not served any longer.
            self.streams.queue(index, [&self.reply, &[], &[]]).map_err(|Slow| Broken)?;
        }
        let client = self.streams.get_mut(index).expect("serving it does not close it");
        client.put_framing(framing, self.now.mono, heard);
        Ok(())
    }

    pub(super) fn flush_streams(&mut self) {
        while let Some(index) = self.streams.next_dirty() {
            self.flush_stream(index);
        }
    }

    fn flush_stream(&mut self, index: usize) {
        if self.pass_on(index).is_err() {
            self.close_stream(index);
        }
    }

    /// What waits for a client leaves, as far as the kernel takes it.
    ///
    /// # Errors
    /// When the stream is to be closed.
    pub(super) fn pass_on(&mut self, index: usize) -> Result<(), Broken> {
        let watch = match self.streams.flush(self.now.mono, index) {
            Ok(Flushed::All | Flushed::Blocked { first: false }) => return Ok(()),
            Ok(Flushed::Blocked { first: true }) => Watch::BytesAndRoom,
            Ok(Flushed::Unblocked) => Watch::Bytes,
            Err(_) => return Err(Broken),
        };
        let client = self.streams.get_mut(index).expect("it has just been flushed");
        self.poll.watch(&client.stream.socket, STREAM + index as u64, watch).map_err(|_| Broken)
    }

    /// Whatever the client held is free at once: many never say goodbye.
    fn close_stream(&mut self, index: usize) {
        if let Some(client) = self.streams.remove(index) {
            self.server.hang_up(&client, self.now.mono);
            self.apply_effects();
        }
    }

    pub(super) fn close_overdue_streams(&mut self) {
        if self.now.mono < self.look {
            return;
        }
        self.look = self.now.mono + LOOK;
        let server = &self.server;
        for index in self.streams.overdue(self.now.mono, |client| server.holds_allocation(client)) {
            self.close_stream(index);
        }
    }
}
