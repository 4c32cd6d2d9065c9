//! Clients on TCP and TLS: what the door let in, driven by the shard that holds their allocations.
//!
//! An idle stream owns a socket, a TLS session and no buffer. What is to be sent gathers until the end of the batch, so
//! that it leaves in one write; over TLS each message in a record of its own, since there are clients that count on it.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use rustls::ServerConnection;
use slab::Slab;
use socket2::{SockRef, TcpKeepalive};

use crate::{
    door::{RelayClient, admission::Permit},
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
/// Emptied buffers kept for the next client, and how much each may hold.
const SPARE: usize = 32;
const SPARE_SIZE: usize = 64 << 10;

/// The streams of one shard.
#[derive(Default)]
pub struct Streams {
    open: Slab<Stream>,
    by_client: HashMap<FiveTuple, usize>,
    /// Those with something to send.
    dirty: Vec<usize>,
    spare: Vec<Vec<u8>>,
    over_tls: usize,
}

/// One client.
pub struct Stream {
    pub socket: TcpStream,
    tls: Option<Box<ServerConnection>>,
    client: FiveTuple,
    framing: Framing,
    pending: Vec<u8>,
    /// Of `pending`, what has been passed on.
    passed: usize,
    /// The kernel's buffer is full since then.
    full_since: Option<Instant>,
    /// When the last whole message came.
    heard: Instant,
    /// When the message began that is not yet whole.
    begun: Option<Instant>,
    _permit: Permit,
}

/// A client does not read what it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slow;

/// What a flush came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Everything is on its way.
    All,
    /// The kernel's buffer is full; `first`: since this very flush.
    Blocked {
        /// Whether the socket has to be watched for room from now on.
        first: bool,
    },
    /// All of it, after it had been blocked.
    Unblocked,
}

impl Streams {
    /// Takes a client in; gives its index.
    ///
    /// # Errors
    /// When its connection is gone already.
    pub fn insert(&mut self, now: Instant, arrived: RelayClient) -> io::Result<usize> {
        let client = five_tuple(&arrived);
        let RelayClient { socket, mut tls, permit, .. } = arrived;
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(None);
        }
        // A client that vanished without a word is found out, whether or not it is being sent anything.
        let options = SockRef::from(&socket);
        options.set_tcp_user_timeout(Some(PATIENCE))?;
        options.set_tcp_keepalive(&TcpKeepalive::new().with_time(QUIET).with_interval(PATIENCE / 3))?;
        self.over_tls += usize::from(tls.is_some());
        let index = self.open.insert(Stream {
            socket,
            tls,
            client,
            framing: Framing::default(),
            pending: Vec::new(),
            passed: 0,
            full_since: None,
            heard: now,
            begun: None,
            _permit: permit,
        });
        self.by_client.insert(client, index);
        Ok(index)
    }

    /// One of them, if it is still open.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut Stream> {
        self.open.get_mut(index)
    }

    /// The open stream of `client`.
    pub fn index_of(&self, client: &FiveTuple) -> Option<usize> {
        self.by_client.get(client).copied()
    }

    /// Closes one; gives whose it was.
    pub fn remove(&mut self, index: usize) -> Option<FiveTuple> {
        let mut stream = self.open.try_remove(index)?;
        stream.say_goodbye();
        self.over_tls -= usize::from(stream.tls.is_some());
        self.by_client.remove(&stream.client);
        Some(stream.client)
    }

    /// Bytes for a client, to leave at the end of the batch.
    ///
    /// # Errors
    /// [`Slow`] when too much waits already.
    pub fn queue(&mut self, index: usize, bytes: &[u8]) -> Result<(), Slow> {
        let stream = &mut self.open[index];
        if bytes.is_empty() {
            return Ok(());
        }
        if stream.pending.len() + bytes.len() > PENDING {
            return Err(Slow);
        }
        if stream.pending.capacity() == 0 {
            stream.pending = self.spare.pop().unwrap_or_default();
        }
        if stream.pending.is_empty() {
            self.dirty.push(index);
        }
        stream.pending.extend_from_slice(bytes);
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
        let Some(stream) = self.open.get_mut(index) else { return Ok(Flushed::All) };
        match stream.flush() {
            Ok(()) => {
                let mut empty = std::mem::take(&mut stream.pending);
                stream.passed = 0;
                let was_blocked = stream.full_since.take().is_some();
                if self.spare.len() < SPARE && (1..=SPARE_SIZE).contains(&empty.capacity()) {
                    empty.clear();
                    self.spare.push(empty);
                }
                Ok(if was_blocked { Flushed::Unblocked } else { Flushed::All })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let first = stream.full_since.is_none();
                if first || stream.passed > 0 {
                    stream.full_since = Some(now);
                }
                stream.pending.drain(..stream.passed);
                stream.passed = 0;
                Ok(Flushed::Blocked { first })
            }
            Err(error) => Err(error),
        }
    }

    /// Those that have taken too long over something; `holds` says who holds an allocation.
    pub fn overdue(&self, now: Instant, holds: impl Fn(&FiveTuple) -> bool) -> Vec<usize> {
        let late = |stream: &Stream| stream.is_overdue(now, holds(&stream.client));
        self.open.iter().filter(|(_, stream)| late(stream)).map(|(index, _)| index).collect()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
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

impl Stream {
    /// Whose it is.
    pub fn client(&self) -> FiveTuple {
        self.client
    }

    /// Reads what there is of the client's bytes; 0 at their end.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing yet; anything else when the connection is gone, or its TLS is broken.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_decrypted(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let Some(tls) = &mut self.tls else { return self.socket.read(buffer) };
            if tls.read_tls(&mut self.socket)? == 0 {
                return Ok(0);
            }
            if let Err(error) = tls.process_new_packets() {
                // The alert that says what was wrong.
                let _ = tls.write_tls(&mut self.socket);
                return Err(io::Error::other(error));
            }
            // An answer of TLS's own, to a key update for instance.
            if tls.wants_write() {
                let _ = tls.write_tls(&mut self.socket);
            }
        }
    }

    /// The same of what needs no more from the socket.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_decrypted(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.tls.as_mut().map_or(Err(io::ErrorKind::WouldBlock.into()), |tls| tls.reader().read(buffer))
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

    fn flush(&mut self) -> io::Result<()> {
        let Some(tls) = &mut self.tls else {
            while self.passed < self.pending.len() {
                self.passed += taken(self.socket.write(&self.pending[self.passed..]))?;
            }
            return Ok(());
        };
        loop {
            while tls.wants_write() {
                taken(tls.write_tls(&mut self.socket))?;
            }
            if self.passed == self.pending.len() {
                return Ok(());
            }
            // All of it is taken: there is no limit here but that on `pending`.
            for message in framing::messages(&self.pending[self.passed..]) {
                tls.writer().write_all(message)?;
            }
            self.passed = self.pending.len();
        }
    }

    fn is_overdue(&self, now: Instant, holds_allocation: bool) -> bool {
        let over = |since: Instant, limit: Duration| now.saturating_duration_since(since) > limit;
        let half_said = self.begun.is_some_and(|since| over(since, PATIENCE));
        let not_read = self.full_since.is_some_and(|since| over(since, PATIENCE));
        half_said || not_read || (!holds_allocation && over(self.heard, QUIET))
    }

    /// Without it, the other side of a TLS connection would have to take the end for an attack (RFC 8446 §6.1).
    fn say_goodbye(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut self.socket);
        }
    }
}

/// A stream that takes nothing more is over.
fn taken(written: io::Result<usize>) -> io::Result<usize> {
    match written {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, time::Duration};

    use super::{FiveTuple, Framing, PATIENCE, QUIET, RelayClient, Streams, TcpStream};
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
        (streams.insert(now, arrived).unwrap(), client)
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
            while streams.queue(index, &[7; 16_384]).is_ok() {
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
        assert_ne!(blocked, super::Flushed::Blocked { first: true });
        assert_eq!(streams.overdue(later + SECOND, |_| true), NOBODY);
    }

    #[test]
    fn emptied_buffers_are_passed_on() {
        let mut streams = Streams::default();
        let (first, alice) = connected(&mut streams);
        let (second, _bob) = connected(&mut streams);
        let now = clock::now().mono;
        streams.queue(first, b"hello").unwrap();
        let buffer = streams.open[first].pending.as_ptr();
        streams.flush(now, first).unwrap();
        assert_eq!(streams.open[first].pending.capacity(), 0, "an idle stream owns no buffer");
        streams.queue(second, b"hello").unwrap();
        assert_eq!(streams.open[second].pending.as_ptr(), buffer);
        assert_eq!(streams.count(), [2, 0]);
        let FiveTuple { client, .. } = streams.remove(first).unwrap();
        assert_eq!(client, alice.local_addr().unwrap());
        assert!(streams.remove(first).is_none());
    }
}
