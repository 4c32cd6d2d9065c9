//! The clients of a load and their peers, on one thread: their sockets, their allocations, what they hear.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};
use socket2::{Domain, Socket, Type};

use super::client::{Client, Due, Heard, Step};
use crate::{
    bench::{now, progress},
    credentials::turn_rest::TurnUser,
    poll::{EVENTS, Poll, Watch},
    stream::{Flushed, PIECE, Spare, Stream},
    turn::{
        channel_data,
        framing::{self, Framing},
    },
    udp::{Arena, Outbox, Way, coalesce, receive_drops, size_buffers},
};

/// Clients whose requests are under way at the same time.
const WAVE: usize = 512;
/// Sockets of peers; more clients than these share them.
const PEERS: usize = 4_096;
/// Where peers begin in the numbers of sockets; below are clients.
pub(super) const FIRST_PEER: u32 = 1 << 24;
/// The first answer of all comes within this time, or nobody is there.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// How often it is asked whose request is overdue.
const LOOK: Duration = Duration::from_millis(20);
/// How long allocations may take to be released; the server would free them anyhow.
const FAREWELL: Duration = Duration::from_secs(2);
/// Slots that datagrams are read to, and how often in a row one socket is read.
const SLOTS: usize = 64;
const READS: usize = 16;
/// Bytes of buffer asked for: of a datagram socket so many that a burst is not lost here; of a stream so few that what
/// waits in it is not most of what was sent.
const DATAGRAMS: usize = 1 << 20;
const STREAM: usize = 128 << 10;
/// Bytes that may wait in a stream for the kernel to take them.
const PENDING: usize = 64 << 10;

/// Where clients go, and how.
pub(super) struct Server {
    /// As people know it.
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) lane: Lane,
}

pub(super) enum Lane {
    Udp,
    Tcp,
    Tls(Arc<ClientConfig>, ServerName<'static>),
}

/// What hears the payloads.
pub(super) trait Ear {
    fn at_client(&mut self, client: usize, payload: &[u8]);
    fn at_peer(&mut self, peer: usize, from: SocketAddr, payload: &[u8]);
}

/// One that does not listen.
pub(super) struct Deaf;

impl Ear for Deaf {
    fn at_client(&mut self, _client: usize, _payload: &[u8]) {}
    fn at_peer(&mut self, _peer: usize, _from: SocketAddr, _payload: &[u8]) {}
}

/// A client's socket.
enum Line {
    Datagrams(UdpSocket),
    Stream(Box<Connection>),
}

struct Connection {
    stream: Stream<ClientConnection>,
    framing: Framing,
}

struct Member {
    client: Client,
    line: Line,
}

/// Clients and peers.
pub(super) struct Crowd<'a> {
    server: &'a Server,
    users: Box<dyn Fn(usize) -> TurnUser + 'a>,
    members: Vec<Member>,
    peers: Vec<UdpSocket>,
    /// Where each is.
    peer_addresses: Vec<SocketAddr>,
    poll: Poll,
    inbox: Arena,
    pub(super) outbox: Outbox,
    /// What packets are made of, behind the stamp.
    padding: Arena,
    spare: Spare,
    piece: Vec<u8>,
    /// What clients were told is done, since it was asked last.
    done: Vec<(usize, Step)>,
    answered: bool,
    /// The server goes on knowing a port of which the allocation was released (coturn does, for a while): the next
    /// allocation is from another one, as those of other clients would be.
    remembers: bool,
    looked: Instant,
    /// How often each allocation and channel is refreshed.
    refresh: Duration,
    /// Next to be refreshed, and when.
    refreshing: (usize, Instant),
}

/// What a crowd is to be.
pub(super) struct Wish {
    pub(super) clients: usize,
    /// Where peers listen.
    pub(super) peer_ip: IpAddr,
    /// Bytes of a packet, at most.
    pub(super) size: usize,
    /// The kernel gets trains.
    pub(super) trains: bool,
    pub(super) refresh: Duration,
}

impl<'a> Crowd<'a> {
    /// Peers listen; no client has said anything yet.
    pub(super) fn new(
        server: &'a Server,
        users: Box<dyn Fn(usize) -> TurnUser + 'a>,
        wish: &Wish,
    ) -> Result<Self, String> {
        let poll = Poll::new().map_err(|error| format!("cannot wait for sockets: {error}"))?;
        let mut padding = Arena::new(1);
        padding.keep(wish.size);
        let mut crowd = Self {
            server,
            users,
            members: Vec::with_capacity(wish.clients),
            peers: Vec::new(),
            peer_addresses: Vec::new(),
            poll,
            inbox: Arena::new(SLOTS),
            outbox: Outbox::new(wish.trains),
            padding,
            spare: Spare::default(),
            piece: vec![0; PIECE],
            done: Vec::with_capacity(WAVE),
            answered: false,
            remembers: false,
            looked: now(),
            refresh: wish.refresh,
            refreshing: (0, now() + wish.refresh / 2),
        };
        crowd.open_peers(wish.clients.min(PEERS), wish.peer_ip)?;
        Ok(crowd)
    }

    fn open_peers(&mut self, count: usize, ip: IpAddr) -> Result<(), String> {
        let failed = |error: io::Error| format!("no socket for a peer on {ip}: {error}");
        for number in 0..count {
            let socket = datagrams(ip).map_err(failed)?;
            self.poll.add(&socket, u64::from(FIRST_PEER) + number as u64).map_err(failed)?;
            self.peer_addresses.push(socket.local_addr().map_err(failed)?);
            self.peers.push(socket);
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// The number of the peer of a client.
    pub(super) fn peer_of(&self, client: usize) -> usize {
        client % self.peers.len()
    }

    /// Where the peer of a client is.
    pub(super) fn peer_address(&self, client: usize) -> SocketAddr {
        self.peer_addresses[self.peer_of(client)]
    }

    /// Where a client is at the server.
    pub(super) fn relayed(&self, client: usize) -> Result<SocketAddr, String> {
        self.members[client].client.relayed().ok_or_else(|| format!("client {client} has no relayed address"))
    }

    /// How a client's peer sends to it. One that has no other client is connected to it: that is the cheaper way.
    pub(super) fn way_from_peer(&self, client: usize) -> Result<Way, String> {
        let (peer, to) = (self.peer_of(client), self.relayed(client)?);
        let socket = FIRST_PEER + peer as u32;
        let is_its_own = self.len() <= self.peers.len();
        if is_its_own && self.peers[peer].connect(to).is_ok() {
            return Ok(Way::connected(socket));
        }
        Ok(Way { socket, from: None, to })
    }

    /// How many sockets of peers there are.
    pub(super) fn peers(&self) -> usize {
        self.peers.len()
    }

    /// From one peer to the other of its pair.
    pub(super) fn way_between_peers(&self, peer: usize) -> Result<Way, String> {
        let other = self.peer_addresses[peer ^ 1];
        let connected = self.peers[peer].connect(other);
        connected.map_err(|error| format!("no way to the peer at {other}: {error}"))?;
        Ok(Way::connected(FIRST_PEER + peer as u32))
    }

    /// Opens the clients' sockets and gives each an allocation.
    pub(super) fn allocate(&mut self, clients: usize) -> Result<(), String> {
        self.all(clients, "allocations", |_, _| Ok(Step::Allocate))
    }

    /// Binds each client's channel.
    pub(super) fn bind(
        &mut self,
        to: impl Fn(&Self, usize) -> Result<SocketAddr, String>,
    ) -> Result<(), String> {
        self.all(self.len(), "channels", |crowd, client| to(crowd, client).map(Step::Bind))
    }

    /// One step of all clients, many at the same time.
    fn all(
        &mut self,
        clients: usize,
        what: &str,
        step: impl Fn(&Self, usize) -> Result<Step, String>,
    ) -> Result<(), String> {
        let (mut begun, mut done, started) = (0, 0, now());
        while done < clients {
            while begun < clients && begun - done < WAVE {
                if begun == self.members.len() {
                    self.open(begun)?;
                }
                let step = step(self, begun)?;
                self.ask(begun, step)?;
                begun += 1;
            }
            self.hear(LOOK, &mut Deaf)?;
            self.look_after(true)?;
            if !self.answered && now() - started > FIRST_ANSWER {
                return Err(format!(
                    "no answer from {} at {} within {} s: is it there, and does a firewall let it through?",
                    self.server.name,
                    self.server.address,
                    FIRST_ANSWER.as_secs()
                ));
            }
            done += self.done.len();
            self.done.clear();
            progress(&format!("{what}: {done} of {clients}"));
        }
        Ok(())
    }

    /// Frees all allocations, as far as the server answers.
    pub(super) fn release(mut self) {
        let until = now() + FAREWELL;
        self.done.clear();
        let (mut begun, mut done) = (0, 0);
        while done < self.len() && now() < until {
            while begun < self.len() && begun - done < WAVE {
                if self.ask(begun, Step::Release).is_err() {
                    return;
                }
                begun += 1;
            }
            if self.hear(LOOK, &mut Deaf).is_err() || self.look_after(false).is_err() {
                return;
            }
            // What was still under way before does not count.
            done += self.done.drain(..).filter(|(_, step)| *step == Step::Release).count();
        }
    }

    fn open(&mut self, number: usize) -> Result<(), String> {
        let line = self.new_line(number)?;
        let reliable = matches!(line, Line::Stream(_));
        let client = Client::new((self.users)(number), reliable, self.peer_addresses[0].is_ipv6());
        self.members.push(Member { client, line });
        Ok(())
    }

    /// A socket of a client's, on a port that the system chooses.
    fn new_line(&self, number: usize) -> Result<Line, String> {
        let failed = |error: io::Error| format!("no socket for client {number}: {error}");
        Ok(match &self.server.lane {
            Lane::Udp => {
                let any =
                    if self.server.address.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
                let socket = datagrams(any).map_err(failed)?;
                // It hears only the server then, and that nobody is there.
                socket.connect(self.server.address).map_err(failed)?;
                self.poll.add(&socket, number as u64).map_err(failed)?;
                Line::Datagrams(socket)
            }
            lane => {
                let socket = connect(self.server.address).map_err(failed)?;
                self.poll.add(&socket, number as u64).map_err(failed)?;
                let tls = match lane {
                    Lane::Tls(config, name) => {
                        let tls = ClientConnection::new(Arc::clone(config), name.clone());
                        Some(Box::new(tls.map_err(|error| failed(io::Error::other(error)))?))
                    }
                    _ => None,
                };
                Line::Stream(Box::new(Connection {
                    stream: Stream::new(socket, tls),
                    framing: Framing::default(),
                }))
            }
        })
    }

    /// A client begins something.
    pub(super) fn ask(&mut self, number: usize, step: Step) -> Result<(), String> {
        if step == Step::Allocate && self.remembers && self.members[number].client.has_released() {
            self.members[number].line = self.new_line(number)?;
        }
        self.members[number].client.ask(step, now())?;
        self.send_request(number)
    }

    /// What has to be done now and then so that allocations and channels go on.
    pub(super) fn keep_up(&mut self, now: Instant) -> Result<(), String> {
        let (client, at) = self.refreshing;
        if now >= at {
            if !self.members[client].client.is_busy() {
                self.ask(client, Step::Refresh)?;
            }
            // Spread over half of the time, in which each was refreshed once: none waits for longer than all of it.
            self.refreshing = ((client + 1) % self.len(), at + self.refresh / 2 / self.len() as u32);
        }
        for done in 0..self.done.len() {
            let (client, step) = self.done[done];
            // The channel follows once the allocation is refreshed.
            if let (Step::Refresh, Some(peer)) = (step, self.members[client].client.bound()) {
                self.ask(client, Step::Bind(peer))?;
            }
        }
        self.done.clear();
        self.look_after(false)
    }

    fn send_request(&mut self, number: usize) -> Result<(), String> {
        let member = &mut self.members[number];
        match &mut member.line {
            Line::Datagrams(socket) => match socket.send(member.client.request()) {
                // What the kernel has no room for is sent again like what was lost.
                Err(error) if !is_full(&error) => Err(self.gone(number, &error)),
                _ => Ok(()),
            },
            Line::Stream(line) => {
                line.stream.outbox(&mut self.spare).extend_from_slice(member.client.request());
                self.flush_stream(number)
            }
        }
    }

    /// Sends again what was not answered. With `strict` it is an error if there is no answer at all.
    pub(super) fn look_after(&mut self, strict: bool) -> Result<(), String> {
        let now = now();
        if now - self.looked < LOOK {
            return Ok(());
        }
        self.looked = now;
        for number in 0..self.len() {
            match self.members[number].client.due(now) {
                Due::Nothing => {}
                Due::Again => self.send_request(number)?,
                Due::Silence(step) if strict => {
                    return Err(format!(
                        "the server does not answer {} of client {number}; it may limit its answers to strangers from one \
                         address (here turn.unauthenticated_per_second: 0 lifts it)",
                        step.name()
                    ));
                }
                Due::Silence(_) => {}
            }
        }
        Ok(())
    }

    /// What was done since it was asked last.
    pub(super) fn take_done(&mut self, into: &mut Vec<(usize, Step)>) {
        into.clear();
        std::mem::swap(into, &mut self.done);
    }

    /// Waits for what arrives, and hears it.
    pub(super) fn hear(&mut self, wait: Duration, ear: &mut impl Ear) -> Result<(), String> {
        let mut wait = wait;
        // Each socket once or so: those that are always ready must not keep us from sending.
        for _ in 0..=(self.members.len() + self.peers.len()) / EVENTS {
            let ready =
                self.poll.wait(Some(wait)).map_err(|error| format!("cannot wait for sockets: {error}"))?;
            let more = ready.len() == EVENTS;
            for number in ready {
                match number.checked_sub(u64::from(FIRST_PEER)) {
                    Some(peer) => self.hear_at_peer(peer as usize, ear),
                    None => self.hear_at_client(number as usize, ear)?,
                }
            }
            if !more {
                break;
            }
            wait = Duration::ZERO;
        }
        Ok(())
    }

    fn hear_at_peer(&mut self, peer: usize, ear: &mut impl Ear) {
        for _ in 0..READS {
            // An error is one of a packet that was sent, and not of the socket.
            let Ok(slots) = self.inbox.receive(&self.peers[peer], SLOTS) else { break };
            let last = slots.len() < SLOTS;
            for arrived in slots.filter_map(|slot| self.inbox.arrived(slot)) {
                arrived
                    .datagrams()
                    .for_each(|datagram| ear.at_peer(peer, arrived.from, self.inbox.bytes(datagram)));
            }
            self.inbox.clear();
            if last {
                break;
            }
        }
    }

    fn hear_at_client(&mut self, number: usize, ear: &mut impl Ear) -> Result<(), String> {
        if matches!(self.members[number].line, Line::Stream(_)) {
            return self.hear_stream(number, ear);
        }
        for _ in 0..READS {
            let Line::Datagrams(socket) = &self.members[number].line else { break };
            let slots = match self.inbox.receive(socket, SLOTS) {
                Ok(slots) => slots,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(self.gone(number, &error)),
            };
            let last = slots.len() < SLOTS;
            let mut next = None;
            for arrived in slots.filter_map(|slot| self.inbox.arrived(slot)) {
                for datagram in arrived.datagrams() {
                    let client = &mut self.members[number].client;
                    let message = self.inbox.bytes(datagram);
                    self.answered = true;
                    next = hear_message(client, number, message, &mut self.done, ear)?.or(next);
                }
            }
            self.inbox.clear();
            if let Some(next) = next {
                self.go_on(number, next)?;
            }
            if last {
                break;
            }
        }
        Ok(())
    }

    fn go_on(&mut self, number: usize, next: Next) -> Result<(), String> {
        if next == Next::Move {
            self.members[number].line = self.new_line(number)?;
            self.remembers |= self.members[number].client.has_released();
        }
        self.send_request(number)
    }

    fn hear_stream(&mut self, number: usize, ear: &mut impl Ear) -> Result<(), String> {
        let mut next = None;
        for _ in 0..READS {
            let Member { client, line: Line::Stream(line) } = &mut self.members[number] else { break };
            let Connection { stream, framing } = &mut **line;
            let length = match stream.read(&mut self.spare, &mut self.piece) {
                Ok(0) => return Err(self.gone(number, &io::ErrorKind::ConnectionReset.into())),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(self.gone(number, &error)),
            };
            self.answered = true;
            let mut bytes = &self.piece[..length];
            loop {
                match framing.next(&mut bytes, framing::LONGEST) {
                    Ok(Some(message)) => {
                        next = hear_message(client, number, message, &mut self.done, ear)?.or(next);
                    }
                    Ok(None) => break,
                    Err(framing::Broken) => {
                        return Err("the server's stream is neither STUN nor ChannelData".to_owned());
                    }
                }
            }
        }
        if let Some(next) = next {
            return self.go_on(number, next);
        }
        // It may be that there is room now, or that TLS has something to say.
        self.flush_stream(number)
    }

    /// Sends what is on the stream of a client.
    pub(super) fn flush_stream(&mut self, number: usize) -> Result<(), String> {
        let Line::Stream(line) = &mut self.members[number].line else { return Ok(()) };
        // A client of TLS sends each packet by itself.
        let watch = match line.stream.flush(now(), &mut self.spare, framing::first_length) {
            Ok(Flushed::Blocked { first: true }) => Watch::BytesAndRoom,
            Ok(Flushed::Unblocked) => Watch::Bytes,
            Ok(_) => return Ok(()),
            Err(error) => return Err(self.gone(number, &error)),
        };
        let watched = self.poll.watch(&line.stream.socket, number as u64, watch);
        watched.map_err(|error| self.gone(number, &error))
    }

    fn gone(&self, number: usize, error: &io::Error) -> String {
        let Server { name, address, .. } = self.server;
        if error.kind() == io::ErrorKind::ConnectionRefused {
            return format!("nobody answers at {name} ({address}): connection refused");
        }
        let hint = match error.kind() {
            io::ErrorKind::ConnectionReset if !self.answered || self.len() > 1 => {
                ": a server may limit the connections of one address (here http.connections_per_address and \
                 http.handshakes_per_second_per_address: 0 lifts them)"
            }
            _ => "",
        };
        format!("client {number} lost {name} ({address}): {error}{hint}")
    }

    /// Whether clients speak over streams.
    pub(super) fn is_streams(&self) -> bool {
        !matches!(self.server.lane, Lane::Udp)
    }

    /// So many bytes of what packets are made of.
    pub(super) fn padding(length: usize) -> std::ops::Range<usize> {
        crate::udp::ROOM..crate::udp::ROOM + length
    }

    /// Sends what is in the outbox. Gives how many datagrams the kernel would not take.
    pub(super) fn flush(&mut self) -> u64 {
        let (members, peers) = (&self.members, &self.peers);
        self.outbox.flush(&self.padding, |number| match number.checked_sub(FIRST_PEER) {
            Some(peer) => peers.get(peer as usize),
            None => match &members.get(number as usize)?.line {
                Line::Datagrams(socket) => Some(socket),
                Line::Stream(_) => None,
            },
        })
    }

    /// Puts a packet of a client's on its stream, unless too much waits there already.
    pub(super) fn write(&mut self, client: usize, head: &[u8], padding: usize) -> bool {
        let Line::Stream(line) = &mut self.members[client].line else { return false };
        if line.stream.pending() > PENDING {
            return false;
        }
        // Over a stream each is padded to a multiple of four (RFC 8656 §12.5).
        let padding = (head.len() + padding).next_multiple_of(4) - head.len();
        let outbox = line.stream.outbox(&mut self.spare);
        outbox.extend_from_slice(head);
        outbox.resize(outbox.len() + padding, 0);
        true
    }

    /// Datagrams that did not fit into the buffers of our own sockets.
    pub(super) fn drops(&self) -> u64 {
        let clients = self.members.iter().filter_map(|member| match &member.line {
            Line::Datagrams(socket) => Some(socket),
            Line::Stream(_) => None,
        });
        clients.chain(&self.peers).map(|socket| u64::from(receive_drops(socket))).sum()
    }
}

/// What a client has to do after a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Send its request, which has changed.
    Send,
    /// The same, from another port.
    Move,
}

fn hear_message(
    client: &mut Client,
    number: usize,
    message: &[u8],
    done: &mut Vec<(usize, Step)>,
    ear: &mut impl Ear,
) -> Result<Option<Next>, String> {
    if let Some((_, payload)) = channel_data::parse(message) {
        ear.at_client(number, payload);
        return Ok(None);
    }
    Ok(match client.hear(message, now())? {
        Heard::Nothing => None,
        Heard::Challenge => Some(Next::Send),
        Heard::Taken => Some(Next::Move),
        Heard::Done(step) => {
            done.push((number, step));
            None
        }
    })
}

/// A socket on any port.
fn datagrams(ip: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((ip, 0))?;
    socket.set_nonblocking(true)?;
    size_buffers(&socket, DATAGRAMS)?;
    // A kernel without it gives each datagram by itself.
    let _ = coalesce(&socket);
    Ok(socket)
}

/// A connection that is being made.
fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    socket.set_send_buffer_size(STREAM)?;
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

fn is_full(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}
