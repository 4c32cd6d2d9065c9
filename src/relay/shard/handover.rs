//! A shard's part in an upgrade: giving its clients' datagrams away, and passing on those of the other's clients.

use std::{
    collections::{HashSet, VecDeque},
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{LINK, Shard};
use crate::{
    relay::handover::{LONGEST, Link, Word, message, words},
    turn::{FiveTuple, RelayPort, Transport, counters::Dropped},
    udp::Arrived,
};

/// For the other end to take datagrams: once a turn, for there are others to serve.
const PATIENCE: Duration = Duration::from_millis(20);
/// For the other end to take what it must know before it begins, message by message.
const HANDING_OVER: Duration = Duration::from_millis(250);
/// Messages that the other end may be behind; then it is as good as gone.
const MAX_UNSAID: usize = 65_536;

/// The shard of the same listeners in the other process, while there is one.
#[derive(Default)]
pub(super) struct Other {
    link: Option<Link>,
    /// Clients whose allocations it has.
    clients: HashSet<FiveTuple>,
    /// What it says is copied from here. Empty where there is no other.
    buffer: Vec<u8>,
    /// What it had no room for yet.
    unsaid: VecDeque<Vec<u8>>,
    /// The turn in which it was last waited for.
    waited: Option<Instant>,
}

impl Other {
    pub(super) fn new(link: Option<Link>) -> Self {
        let buffer = vec![0; if link.is_some() { LONGEST } else { 0 }];
        Self { link, buffer, ..Self::default() }
    }

    /// At once, or as soon as there is room.
    fn tell(&mut self, word: Word<'_>) {
        if self.link.is_some() && self.unsaid.len() < MAX_UNSAID {
            self.unsaid.push_back(message(word));
            self.catch_up();
        }
    }

    /// Says what there was no room for.
    fn catch_up(&mut self) {
        let Some(link) = &self.link else { return };
        while let Some(message) = self.unsaid.front() {
            match link.say(message) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Who cannot be told is gone.
                Ok(()) | Err(_) => _ = self.unsaid.pop_front(),
            }
        }
    }

    /// Whether the other took the datagrams; it is waited for once in the turn that began `now`.
    fn pass(&mut self, datagrams: Word<'_>, now: Instant) -> bool {
        let Some(link) = &self.link else { return false };
        match link.tell(datagrams, Duration::ZERO) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.waited != Some(now) => {
                self.waited = Some(now);
                link.tell(datagrams, PATIENCE).is_ok()
            }
            passed => passed.is_ok(),
        }
    }

    /// Whether it has yet to be told something.
    pub(super) fn is_behind(&self) -> bool {
        !self.unsaid.is_empty()
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
    ///
    /// # Errors
    /// When the other could not be told all: then nobody reads them until [`Self::go_on`].
    pub(super) fn hand_over(&mut self, link: Link) -> io::Result<()> {
        self.server.drain();
        self.listen(false);
        for port in self.server.release_reserve() {
            self.sockets.close(port);
        }
        self.other = Other::new(Some(link));
        let Some(link) = self.other.link() else { return Ok(()) };
        let clients =
            self.server.clients().filter(|client| client.transport == Transport::Udp).map(Word::Owns);
        let live = self.server.relayed().map(|at| Word::Live(self.bound(at)));
        link.tell_all(clients.chain(live), HANDING_OVER)?;
        link.tell(Word::Done, HANDING_OVER)?;
        self.poll.add(link, LINK)
    }

    /// The other process has come to nothing: this one reads its listeners again.
    pub(super) fn take_back(&mut self) {
        self.forget_other();
        self.listen(true);
    }

    /// The other process was never in charge: all is as it was before.
    pub(super) fn go_on(&mut self) {
        self.take_back();
        self.server.admit();
        self.top_up();
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
        if !self.other.pass(datagrams, self.now.mono) {
            self.server.count_dropped(Dropped::Unsendable, arrived.datagrams().count() as u64);
        }
        true
    }

    /// Ends the allocations of an agent, wherever they are.
    pub(super) fn revoke(&mut self, agent: &str) {
        self.server.revoke(agent, self.now.mono);
        self.other.tell(Word::Revoked(agent));
    }

    /// What the other process has yet to know.
    pub(super) fn catch_up(&mut self) {
        self.other.catch_up();
    }

    pub(super) fn tell_relayed(&mut self, at: RelayPort, is_live: bool) {
        let at = self.bound(at);
        self.other.tell(if is_live { Word::Live(at) } else { Word::Dead(at) });
    }

    /// Where the socket of a relayed address is bound, by which both processes know it.
    fn bound(&self, at: RelayPort) -> SocketAddr {
        (self.relays[usize::from(at.relay)].bound, at.port).into()
    }

    pub(super) fn tell_left(&mut self, client: FiveTuple) {
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
