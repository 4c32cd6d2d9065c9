//! A shard's part in an upgrade: giving its clients' datagrams away, and passing on those of the other's clients.

use std::{collections::HashSet, net::SocketAddr};

use super::{LINK, Shard};
use crate::{
    relay::handover::{LONGEST, Link, Word, words},
    turn::{FiveTuple, RelayPort, Transport, counters::Dropped},
    udp::Arrived,
};

/// The shard of the same listeners in the other process, while there is one.
#[derive(Default)]
pub(super) struct Other {
    link: Option<Link>,
    /// Clients whose allocations it has.
    clients: HashSet<FiveTuple>,
    /// What it says is copied from here. Empty where there is no other.
    buffer: Vec<u8>,
}

impl Other {
    pub(super) fn new(link: Option<Link>) -> Self {
        let buffer = vec![0; if link.is_some() { LONGEST } else { 0 }];
        Self { link, clients: HashSet::new(), buffer }
    }

    /// Nothing is lost by not being told: who cannot be told is gone.
    fn tell(&self, word: Word<'_>) {
        if let Some(link) = &self.link {
            let _ = link.tell(word);
        }
    }

    pub(super) fn link(&self) -> Option<&Link> {
        self.link.as_ref()
    }

    /// How many clients' datagrams are passed on.
    pub(super) fn clients(&self) -> usize {
        self.clients.len()
    }
}

/// In the old process.
impl Shard {
    /// From now on the other shard reads the listeners, and this one takes nobody new.
    pub(super) fn hand_over(&mut self, link: Link) {
        self.server.drain();
        self.listen(false);
        for port in self.server.release_reserve() {
            self.sockets.close(port);
        }
        self.other = Other::new(Some(link));
        let Some(link) = self.other.link() else { return };
        let clients =
            self.server.clients().filter(|client| client.transport == Transport::Udp).map(Word::Owns);
        let told = link
            .tell_all(clients.chain(self.server.relayed().map(|at| Word::Live(self.bound(at)))))
            .and_then(|()| link.tell(Word::Done))
            .and_then(|()| self.poll.add(link, LINK));
        if let Err(error) = told {
            tracing::error!("relay shard {} cannot be handed over, and goes on: {error}", self.index);
            self.take_back();
        }
    }

    /// The other process has come to nothing: this one reads its listeners again.
    pub(super) fn take_back(&mut self) {
        self.forget_other();
        self.listen(true);
    }
}

/// In both.
impl Shard {
    pub(super) fn hear_other(&mut self) {
        let mut buffer = std::mem::take(&mut self.other.buffer);
        // As many as a listener has in a turn; then it is the others' turn.
        for _ in 0..super::SLOTS {
            let message = match self.other.link().and_then(|link| link.receive(&mut buffer)) {
                None => break,
                Some([]) => return self.forget_other(),
                Some(message) => message,
            };
            words(message).for_each(|word| self.obey_other(word));
        }
        self.other.buffer = buffer;
    }

    fn obey_other(&mut self, word: Word<'_>) {
        match word {
            Word::Datagrams { client, segment, bytes } => self.take_datagrams(&client, segment, bytes),
            Word::Owns(client) => _ = self.other.clients.insert(client),
            Word::Left(client) => _ = self.other.clients.remove(&client),
            Word::Live(at) => self.server.lives_elsewhere(at, true),
            Word::Dead(at) => {
                self.server.lives_elsewhere(at, false);
                self.top_up();
            }
            Word::Revoked(agent) => self.server.revoke(agent, self.now.mono),
            Word::Done => {
                self.listen(true);
                self.top_up();
            }
        }
    }

    /// As if they had been read here.
    fn take_datagrams(&mut self, client: &FiveTuple, segment: usize, bytes: &[u8]) {
        self.make_room(1);
        let space = self.arena.lend();
        let length = bytes.len().min(space.len());
        space[..length].copy_from_slice(&bytes[..length]);
        let start = self.arena.keep(length).start;
        let arrived = Arrived { from: client.client, local: None, start, length, segment: segment.max(1) };
        self.serve_datagrams(client, arrived);
    }

    /// Whether datagrams were for the other process, which has them now.
    pub(super) fn pass_to_other(&mut self, client: &FiveTuple, arrived: Arrived) -> bool {
        if self.other.clients.is_empty() || !self.other.clients.contains(client) {
            return false;
        }
        let bytes = self.arena.bytes(arrived.start..arrived.start + arrived.length);
        let datagrams = Word::Datagrams { client: *client, segment: arrived.segment, bytes };
        if self.other.link().is_none_or(|link| link.tell(datagrams).is_err()) {
            self.server.count_dropped(Dropped::Unsendable, arrived.datagrams().count() as u64);
        }
        true
    }

    /// Ends the allocations of an agent, wherever they are.
    pub(super) fn revoke(&mut self, agent: &str) {
        self.server.revoke(agent, self.now.mono);
        self.other.tell(Word::Revoked(agent));
    }

    pub(super) fn tell_relayed(&self, at: RelayPort, is_live: bool) {
        let at = self.bound(at);
        self.other.tell(if is_live { Word::Live(at) } else { Word::Dead(at) });
    }

    /// Where the socket of a relayed address is bound, by which both processes know it.
    fn bound(&self, at: RelayPort) -> SocketAddr {
        (self.relays[usize::from(at.relay)].bound, at.port).into()
    }

    pub(super) fn tell_left(&self, client: FiveTuple) {
        if client.transport == Transport::Udp {
            self.other.tell(Word::Left(client));
        }
    }

    fn forget_other(&mut self) {
        self.other = Other::default();
        self.server.nothing_lives_elsewhere();
    }

    fn listen(&mut self, listen: bool) {
        for (index, listener) in self.listeners.iter().enumerate() {
            let done = if listen {
                self.poll.add(&listener.socket, index as u64)
            } else {
                self.poll.remove(&listener.socket)
            };
            if let Err(error) = done {
                tracing::debug!("relay shard {}, {}: {error}", self.index, listener.at);
            }
        }
    }
}
