//! From one process to the next on an upgrade: a link between two shards of the same listeners.
//!
//! The kernel does not know which of the two a datagram is for. The new one reads all of them, and passes on what belongs to
//! an allocation of the old one: it was told which there are, and is told when one ends. Each also tells the other which
//! relayed addresses are live, for their agents meet.

use std::{
    io::{self, IoSlice, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    time::Duration,
};

use socket2::{Domain, Socket, Type};

use crate::{
    turn::{FiveTuple, Transport},
    udp,
};

/// One end of a link. Messages arrive whole and in order; an end that is closed is seen by the other.
#[derive(Debug)]
pub struct Link(Socket);

/// What shards tell each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word<'a> {
    /// Datagrams of a client of the old one's, of `segment` bytes each but for the last.
    Datagrams { client: FiveTuple, segment: usize, bytes: &'a [u8] },
    /// The old one has an allocation of this client.
    Owns(FiveTuple),
    /// And now it has none.
    Left(FiveTuple),
    /// A relayed address, as it is bound, is live.
    Live(SocketAddr),
    /// And now it is not.
    Dead(SocketAddr),
    /// This agent has been revoked.
    Revoked(&'a str),
    /// The old one has told all that it owns and reads the listeners no more.
    Done,
}

/// Bytes of buffer that the kernel is asked for.
const BUFFER: usize = 4 << 20;
/// The longest message: the longest datagrams, and what says whose they are.
pub const LONGEST: usize = 65_536 + HEAD;
/// Bytes of a word without its payload, at most.
const HEAD: usize = 2 * ADDRESS + 16;
/// Words that say no payload share a message of so many bytes at most.
const GATHERED: usize = 16 << 10;
/// Bytes of an address: IPv6, port, scope.
const ADDRESS: usize = 16 + 2 + 4;

impl Link {
    /// Both ends.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None)?;
        Ok((Self::new(one)?, Self::new(other)?))
    }

    fn new(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        udp::size_buffers(&socket, BUFFER)?;
        Ok(Self(socket))
    }

    /// Tells one thing, and waits so long for the other end to make room, which may be in the middle of a turn.
    ///
    /// # Errors
    /// When the other end is gone, or has no room: `WouldBlock` or `TimedOut`.
    pub fn tell(&self, word: Word<'_>, patience: Duration) -> io::Result<()> {
        let mut head = [0; HEAD];
        let mut left = &mut head[..];
        let bytes = write(word, &mut left);
        let length = HEAD - left.len();
        self.send(&head[..length], bytes, patience)
    }

    /// Tells many things that have no payload, and waits so long for each message of them.
    ///
    /// # Errors
    /// As [`Self::tell`].
    pub fn tell_all<'a>(&self, words: impl Iterator<Item = Word<'a>>, patience: Duration) -> io::Result<()> {
        let mut gathered = Vec::with_capacity(GATHERED);
        for word in words {
            write(word, &mut gathered);
            if gathered.len() + HEAD > GATHERED {
                self.send(&gathered, &[], patience)?;
                gathered.clear();
            }
        }
        if gathered.is_empty() { Ok(()) } else { self.send(&gathered, &[], patience) }
    }

    /// Tells what [`message`] made, at once or not.
    ///
    /// # Errors
    /// As [`Self::tell`].
    pub fn say(&self, message: &[u8]) -> io::Result<()> {
        self.send(message, &[], Duration::ZERO)
    }

    fn send(&self, head: &[u8], bytes: &[u8], mut patience: Duration) -> io::Result<()> {
        let pieces = [IoSlice::new(head), IoSlice::new(bytes)];
        loop {
            match self.0.send_vectored(&pieces) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !patience.is_zero() => {
                    crate::poll::wait_for_room(self, std::mem::take(&mut patience))?
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The next message, if one has come: what [`words`] reads. An empty one is the last: the other end is closed.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        loop {
            match (&self.0).read(buffer) {
                Ok(length) => return Some(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                // Whatever else it is, nothing more will come.
                Err(_) => return Some(&[]),
            }
        }
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<OwnedFd> for Link {
    /// An end that another process made.
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl From<Link> for OwnedFd {
    fn from(link: Link) -> Self {
        link.0.into()
    }
}

/// A word as one message, for [`Link::say`].
#[must_use]
pub fn message(word: Word<'_>) -> Vec<u8> {
    let mut message = Vec::new();
    let payload = write(word, &mut message);
    message.extend_from_slice(payload);
    message
}

/// Gives the payload, which is not copied.
fn write<'a>(word: Word<'a>, to: &mut impl Write) -> &'a [u8] {
    let (kind, addresses, payload): (u8, [Option<SocketAddr>; 2], &[u8]) = match word {
        Word::Datagrams { client, bytes, .. } => (0, [Some(client.client), Some(client.server)], bytes),
        Word::Owns(client) => (1, [Some(client.client), Some(client.server)], &[]),
        Word::Left(client) => (2, [Some(client.client), Some(client.server)], &[]),
        Word::Live(at) => (3, [Some(at), None], &[]),
        Word::Dead(at) => (4, [Some(at), None], &[]),
        Word::Done => (5, [None, None], &[]),
        Word::Revoked(agent) => (6, [None, None], agent.as_bytes()),
    };
    let mut put = |bytes: &[u8]| to.write_all(bytes).expect("HEAD holds every word");
    put(&[kind]);
    for address in addresses.into_iter().flatten() {
        let (ip, scope) = match address {
            SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
            SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
        };
        put(&ip.octets());
        put(&address.port().to_ne_bytes());
        put(&scope.to_ne_bytes());
    }
    if let Word::Datagrams { segment, .. } = word {
        put(&(segment as u32).to_ne_bytes());
    }
    payload
}

/// What a message says. It ends at what cannot be understood: another version may say more.
pub fn words(mut message: &[u8]) -> impl Iterator<Item = Word<'_>> {
    std::iter::from_fn(move || read(&mut message))
}

fn read<'a>(message: &mut &'a [u8]) -> Option<Word<'a>> {
    let [kind] = take(message)?;
    Some(match kind {
        0 => {
            let client = read_client(message)?;
            let segment = u32::from_ne_bytes(take(message)?) as usize;
            Word::Datagrams { client, segment, bytes: std::mem::take(message) }
        }
        1 => Word::Owns(read_client(message)?),
        2 => Word::Left(read_client(message)?),
        3 => Word::Live(read_address(message)?),
        4 => Word::Dead(read_address(message)?),
        5 => Word::Done,
        6 => Word::Revoked(str::from_utf8(std::mem::take(message)).ok()?),
        _ => return None,
    })
}

/// Clients on streams have their own connection: only datagrams go astray.
fn read_client(message: &mut &[u8]) -> Option<FiveTuple> {
    let (client, server) = (read_address(message)?, read_address(message)?);
    Some(FiveTuple { client, server, transport: Transport::Udp })
}

fn read_address(message: &mut &[u8]) -> Option<SocketAddr> {
    let ip = Ipv6Addr::from(take::<16>(message)?);
    let port = u16::from_ne_bytes(take(message)?);
    let scope = u32::from_ne_bytes(take(message)?);
    Some(match ip.to_canonical() {
        IpAddr::V4(ip) => (ip, port).into(),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, scope).into(),
    })
}

fn take<const N: usize>(message: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = message.split_first_chunk::<N>()?;
    *message = rest;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use std::{io, time::Duration};

    use super::{LONGEST, Link, Word, message, words};
    use crate::turn::{FiveTuple, Transport};

    const PATIENCE: Duration = Duration::from_millis(20);

    fn client(client: &str) -> FiveTuple {
        let [client, server] = [client, "[2001:db8::5]:3478"].map(|at| at.parse().unwrap());
        FiveTuple { client, server, transport: Transport::Udp }
    }

    #[test]
    fn what_is_told_is_heard_in_order_and_then_that_it_is_over() {
        let (one, other) = Link::pair().unwrap();
        let (v4, v6) = (client("9.0.0.1:1000"), client("[fe80::1%3]:2000"));
        let told =
            [Word::Owns(v4), Word::Owns(v6), Word::Left(v4), Word::Live(v4.client), Word::Dead(v6.client)];
        one.tell_all(told.into_iter(), PATIENCE).unwrap();
        let datagrams = Word::Datagrams { client: v6, segment: 1_200, bytes: &[7; 60_000] };
        one.tell(datagrams, PATIENCE).unwrap();
        one.say(&message(Word::Revoked("agent-7"))).unwrap();
        one.tell(Word::Done, PATIENCE).unwrap();
        drop(one);
        let mut buffer = vec![0; LONGEST];
        assert_eq!(words(other.receive(&mut buffer).unwrap()).collect::<Vec<_>>(), told);
        assert_eq!(words(other.receive(&mut buffer).unwrap()).collect::<Vec<_>>(), [datagrams]);
        assert_eq!(
            words(other.receive(&mut buffer).unwrap()).collect::<Vec<_>>(),
            [Word::Revoked("agent-7")]
        );
        assert_eq!(words(other.receive(&mut buffer).unwrap()).collect::<Vec<_>>(), [Word::Done]);
        assert!(other.receive(&mut buffer).unwrap().is_empty());
    }

    #[test]
    fn many_words_take_few_messages() {
        let (one, other) = Link::pair().unwrap();
        let owned = |port: u16| Word::Owns(client(&format!("9.0.0.1:{port}")));
        one.tell_all((1..2_001).map(owned), PATIENCE).unwrap();
        let (mut buffer, mut heard, mut messages) = (vec![0; LONGEST], 0, 0);
        while let Some(message) = other.receive(&mut buffer) {
            heard += words(message).count();
            messages += 1;
        }
        assert_eq!((heard, messages), (2_000, 6));
    }

    #[test]
    fn an_end_that_takes_nothing_is_waited_for_once() {
        let (one, _other) = Link::pair().unwrap();
        let datagrams =
            Word::Datagrams { client: client("9.0.0.1:1000"), segment: 1_200, bytes: &[7; 60_000] };
        let full = (0..1_000).find_map(|_| one.tell(datagrams, Duration::ZERO).err()).unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(one.tell(datagrams, PATIENCE).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn nonsense_is_nothing() {
        assert_eq!(words(&[9, 9, 9]).count(), 0);
        assert_eq!(words(&[5, 1, 2, 3]).collect::<Vec<_>>(), [Word::Done]);
    }
}
