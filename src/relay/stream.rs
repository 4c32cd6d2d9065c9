//! Clients on TCP and TLS: what the door let in, driven by the shard that holds their allocations.
//!
//! Over TLS each message is in a record of its own, since there are clients that count on it.

use std::{
    collections::HashMap,
    io,
    time::{Duration, Instant},
};

use slab::Slab;

use crate::{
    door::{RelayClient, admission::Permit},
    stream::{Flushed, Spare, Stream},
    turn::{
        FiveTuple, Transport,
        framing::{self, Framing},
    },
};

/// A message that has begun is whole after that long, and what we send is taken.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who holds no allocation says something that often.
const QUIET: Duration = Duration::from_secs(60);
/// Bytes held for a client that does not read; what comes beyond them is dropped.
const PENDING: usize = 256 << 10;

/// The streams of one shard.
#[derive(Default)]
pub struct Streams {
    open: Slab<Client>,
    by_client: HashMap<FiveTuple, usize>,
    /// Those with something to send.
    dirty: Vec<usize>,
    spare: Spare,
    over_tls: usize,
}

/// One client.
pub struct Client {
    /// Its bytes.
    pub stream: Stream,
    tuple: FiveTuple,
    framing: Framing,
    /// When the last whole message came.
    heard: Instant,
    /// When the message began that is not yet whole.
    begun: Option<Instant>,
    _permit: Permit,
}

/// A client does not read what it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow;

impl Streams {
    /// Takes a client in; gives its index.
    pub fn insert(&mut self, now: Instant, arrived: RelayClient) -> usize {
        let tuple = five_tuple(&arrived);
        let RelayClient { socket, tls, permit, .. } = arrived;
        self.over_tls += usize::from(tls.is_some());
        let index = self.open.insert(Client {
            stream: Stream::new(socket, tls),
            tuple,
            framing: Framing::default(),
            heard: now,
            begun: None,
            _permit: permit,
        });
        self.by_client.insert(tuple, index);
        index
    }

    /// One of them, if it is still open.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Client> {
        self.open.get_mut(index)
    }

    /// Reads what there is of one's bytes, or, unless `more`, what needs no more from the socket; `None` if it is closed.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub fn read(&mut self, index: usize, buffer: &mut [u8], more: bool) -> Option<io::Result<usize>> {
        let stream = &mut self.open.get_mut(index)?.stream;
        Some(if more { stream.read(&mut self.spare, buffer) } else { stream.read_decrypted(buffer) })
    }

    /// The open stream of `client`.
    pub fn index_of(&self, client: &FiveTuple) -> Option<usize> {
        self.by_client.get(client).copied()
    }

    /// Closes one; gives whose it was.
    pub fn remove(&mut self, index: usize) -> Option<FiveTuple> {
        let mut client = self.open.try_remove(index)?;
        client.stream.say_goodbye();
        self.over_tls -= usize::from(client.stream.is_tls());
        self.by_client.remove(&client.tuple);
        Some(client.tuple)
    }

    /// The parts of a message for a client, to leave at the end of the batch.
    ///
    /// # Errors
    /// [`Slow`] when too much waits already.
    pub fn queue(&mut self, index: usize, parts: [&[u8]; 3]) -> Result<(), Slow> {
        let stream = &mut self.open[index].stream;
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length == 0 {
            return Ok(());
        }
        if stream.pending() + length > PENDING {
            return Err(Slow);
        }
        if stream.pending() == 0 {
            self.dirty.push(index);
        }
        let outbox = stream.outbox(&mut self.spare);
        parts.iter().for_each(|part| outbox.extend_from_slice(part));
        Ok(())
    }

    /// The next stream to be flushed at the end of a batch.
    pub fn next_dirty(&mut self) -> Option<usize> {
        self.dirty.pop()
    }

    /// Passes on what is pending, as far as the kernel takes it.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn flush(&mut self, now: Instant, index: usize) -> io::Result<Flushed> {
        let Some(client) = self.open.get_mut(index) else { return Ok(Flushed::All) };
        client.stream.flush(now, &mut self.spare, framing::first_length)
    }

    /// Those that have taken too long over something; `holds` says who holds an allocation.
    pub fn overdue(&self, now: Instant, holds: impl Fn(&FiveTuple) -> bool) -> Vec<usize> {
        let late = |client: &Client| client.is_overdue(now, holds(&client.tuple));
        self.open.iter().filter(|(_, client)| late(client)).map(|(index, _)| index).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Bytes that wait to be sent, to all of them.
    pub fn waiting(&self) -> u64 {
        self.open.iter().map(|(_, client)| client.stream.pending() as u64).sum()
    }

    /// How many there are without TLS, and with.
    pub fn count(&self) -> [u64; 2] {
        [(self.open.len() - self.over_tls) as u64, self.over_tls as u64]
    }
}

/// The identity of the allocation that a client on a stream may have.
pub fn five_tuple(of: &RelayClient) -> FiveTuple {
    FiveTuple { client: of.client, server: of.server, transport: Transport::Tcp }
}

impl Client {
    /// Who it is.
    pub fn tuple(&self) -> FiveTuple {
        self.tuple
    }

    /// What has come in part; to be [put back](Self::put_framing).
    pub fn take_framing(&mut self) -> Framing {
        std::mem::take(&mut self.framing)
    }

    /// After bytes were cut at `now`; `heard` says that a message was whole.
    pub fn put_framing(&mut self, framing: Framing, now: Instant, heard: bool) {
        if heard {
            self.heard = now;
        }
        self.begun = framing.is_within_message().then(|| self.begun.filter(|_| !heard).unwrap_or(now));
        self.framing = framing;
    }

    fn is_overdue(&self, now: Instant, holds_allocation: bool) -> bool {
        let over = |since: Instant, limit: Duration| now.saturating_duration_since(since) > limit;
        let half_said = self.begun.is_some_and(|since| over(since, PATIENCE));
        let not_read = self.stream.full_since().is_some_and(|since| over(since, PATIENCE));
        half_said || not_read || (!holds_allocation && over(self.heard, QUIET))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    use super::{FiveTuple, Flushed, Framing, PATIENCE, QUIET, RelayClient, Streams};
    use crate::{clock, door::admission::Admission};

    /// One client's stream, and the client.
    fn connected(streams: &mut Streams) -> (usize, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, from) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        let now = clock::now().mono;
        let permit = Admission::unlimited().admit(now, from.ip()).unwrap();
        let server = socket.local_addr().unwrap();
        let arrived = RelayClient { socket, tls: None, client: from, server, permit };
        (streams.insert(now, arrived), client)
    }

    const SECOND: Duration = Duration::from_secs(1);
    const NOBODY: [usize; 0] = [];

    #[test]
    fn who_holds_nothing_and_says_nothing_is_overdue() {
        let mut streams = Streams::default();
        let (index, _client) = connected(&mut streams);
        let now = clock::now().mono;
        assert_eq!(streams.overdue(now + QUIET - SECOND, |_| false), NOBODY);
        assert_eq!(streams.overdue(now + QUIET + SECOND, |_| false), [index]);
        assert_eq!(
            streams.overdue(now + 100 * QUIET, |_| true),
            NOBODY,
            "an allocation has its own lifetime"
        );
        streams.open[index].put_framing(Framing::default(), now + QUIET, true);
        assert_eq!(streams.overdue(now + QUIET + SECOND, |_| false), NOBODY);
    }

    #[test]
    fn half_a_message_is_overdue_even_if_more_of_it_comes() {
        let mut streams = Streams::default();
        let (index, _client) = connected(&mut streams);
        let now = clock::now().mono;
        for (after, byte) in [0x40, 0, 0, 200, 1, 2].into_iter().enumerate() {
            let mut framing = streams.open[index].take_framing();
            assert_eq!(framing.next(&mut &[byte][..], 1_000).unwrap(), None);
            streams.open[index].put_framing(framing, now + SECOND * after as u32, false);
        }
        assert_eq!(streams.overdue(now + PATIENCE, |_| true), NOBODY);
        assert_eq!(streams.overdue(now + PATIENCE + SECOND, |_| true), [index]);
    }

    #[test]
    fn who_takes_nothing_is_overdue_and_who_takes_a_little_is_not() {
        use std::io::Read;
        let mut streams = Streams::default();
        let (index, mut client) = connected(&mut streams);
        let now = clock::now().mono;
        let fill = |streams: &mut Streams, at| {
            while streams.queue(index, [&[7; 16_384], &[], &[]]).is_ok() {
                streams.flush(at, index).unwrap();
            }
        };
        fill(&mut streams, now);
        assert_eq!(streams.overdue(now + PATIENCE, |_| true), NOBODY);
        assert_eq!(streams.overdue(now + PATIENCE + SECOND, |_| true), [index]);
        client.set_nonblocking(true).unwrap();
        while client.read(&mut [0; 65_536]).is_ok() {}
        let later = now + PATIENCE;
        let blocked = streams.flush(later, index).unwrap();
        assert_ne!(blocked, Flushed::Blocked { first: true });
        assert_eq!(streams.overdue(later + SECOND, |_| true), NOBODY);
    }

    #[test]
    fn streams_are_counted_and_removed_once() {
        let mut streams = Streams::default();
        let (first, alice) = connected(&mut streams);
        let (_second, _bob) = connected(&mut streams);
        assert_eq!(streams.count(), [2, 0]);
        let FiveTuple { client, .. } = streams.remove(first).unwrap();
        assert_eq!(client, alice.local_addr().unwrap());
        assert!(streams.remove(first).is_none());
    }
}
