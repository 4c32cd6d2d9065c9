//! One shard: a thread, its listeners, its relay sockets, its TURN server. Batch in, decide, batch out, effects,
//! deadline.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    ops::Range,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender, TryRecvError},
    },
    time::{Duration, Instant},
};

use super::{
    sockets::RelaySockets,
    stream::{Slow, Streams, five_tuple},
    udp::{self, Batch, Datagram},
};
use crate::{
    clock::{self, Now},
    door::RelayClient,
    poll::{Poll, Waker, Watch},
    stream::{Flushed, PIECE},
    turn::{
        Family, FiveTuple, RelayAddress, RelayPort, Transport, channel_data,
        counters::{Counters, Dropped},
        demux,
        forward::{ToClient, ToPeer, Wrap},
        framing::{self, Broken},
        indication::{self, HEADROOM},
        quota::Tenure,
        server::{Effect, Server},
    },
};

/// What others may ask of a shard.
pub enum Command {
    /// The counts, now.
    Count(SyncSender<Counters>),
    /// End an allocation that made room for another shard's.
    Reclaim(Arc<Tenure>),
    /// Serve a client on TCP or TLS.
    Welcome(Box<RelayClient>),
    /// No new allocations.
    Drain,
    /// Come to an end.
    Stop,
}

/// How others reach a shard.
pub struct Mailbox {
    commands: Sender<Command>,
    waker: Arc<Waker>,
}

/// The shard's side of its [`Mailbox`].
pub struct Inbox {
    commands: Receiver<Command>,
    waker: Arc<Waker>,
}

impl Mailbox {
    /// Both sides.
    pub fn new() -> io::Result<(Self, Inbox)> {
        let (sender, receiver) = mpsc::channel();
        let waker = Arc::new(Waker::new()?);
        Ok((Self { commands: sender, waker: Arc::clone(&waker) }, Inbox { commands: receiver, waker }))
    }

    /// The shard obeys after the batch it is at.
    pub fn tell(&self, command: Command) {
        // A shard that has come to an end needs no telling.
        let _ = self.commands.send(command);
        self.waker.wake();
    }
}

/// Where clients send to.
pub struct Listener {
    /// Shared with the same listener of the other shards.
    pub socket: UdpSocket,
    /// Its address; the port is known.
    pub at: SocketAddr,
}

/// Where a shard lives: what outlasts its falls.
pub struct Place {
    /// Which of the shards it is.
    pub index: usize,
    /// Where its clients send to.
    pub listeners: Vec<Listener>,
    /// What it is told.
    pub inbox: Inbox,
    /// How it tells the shards, itself among them.
    pub mailboxes: Arc<[Mailbox]>,
}

/// All that a shard owns.
pub struct Shard {
    server: Server,
    relays: Vec<RelayAddress>,
    sockets: RelaySockets,
    poll: Poll,
    mailboxes: Arc<[Mailbox]>,
    streams: Streams,
    /// When the streams are next looked at for those that take too long.
    look: Instant,
    /// What is read of a stream at once.
    piece: Box<[u8]>,
    reply: Vec<u8>,
    indications: u64,
}

/// The streams are looked at that often, while there are any.
const LOOK: Duration = Duration::from_secs(5);
/// How often in a row a stream is read: then it is the others' turn.
const PIECES: usize = 4;
/// The longest message of a stream without an allocation; a request with the longest user name is shorter.
const STRANGERS_LONGEST: usize = 2_048;

/// Numbers in the poll: listeners by index from 0, relay sockets by address and port above, then streams by index, the
/// waker.
const RELAY: u64 = 1 << 32;
const STREAM: u64 = 1 << 48;
const WAKER: u64 = u64::MAX;

impl Shard {
    /// Binds the reserve and watches everything.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(server: Server, relays: Vec<RelayAddress>, place: &Place) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(&*place.inbox.waker, WAKER)?;
        for (index, listener) in place.listeners.iter().enumerate() {
            poll.add(&listener.socket, index as u64)?;
        }
        let sockets = RelaySockets::default();
        let mailboxes = Arc::clone(&place.mailboxes);
        let mut shard = Self {
            server,
            relays,
            sockets,
            poll,
            mailboxes,
            streams: Streams::default(),
            look: clock::now().mono,
            piece: vec![0; PIECE].into(),
            reply: Vec::new(),
            indications: 0,
        };
        shard.top_up();
        Ok(shard)
    }

    /// Until told to stop.
    ///
    /// # Errors
    /// When the kernel will not even let us wait.
    pub fn run(&mut self, place: &Place, batch: &mut Batch) -> io::Result<()> {
        let listeners = &place.listeners;
        loop {
            let wait = self.next_deadline().map(|at| at.saturating_duration_since(clock::now().mono));
            let ready = self.poll.wait(wait)?;
            let now = clock::now();
            self.server.begin_batch(now);
            for number in ready {
                match number {
                    WAKER => place.inbox.waker.clear(),
                    STREAM.. => self.stream_is_ready(now, (number - STREAM) as usize),
                    RELAY.. => self.read_relay(relay_port(number), listeners, batch),
                    index => self.read_listener(now, index as usize, listeners, batch),
                }
            }
            self.server.handle_timeout(now);
            let obeyed = self.obey(now, &place.inbox);
            self.close_overdue_streams(now);
            self.apply_effects();
            self.flush_streams(now);
            if obeyed == Obeyed::Stop {
                return Ok(());
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let look = (!self.streams.is_empty()).then_some(self.look);
        self.server.poll_timeout().into_iter().chain(look).min()
    }

    fn obey(&mut self, now: Now, inbox: &Inbox) -> Obeyed {
        loop {
            match inbox.commands.try_recv() {
                Ok(Command::Count(to)) => {
                    _ = to.send(Counters { streams: self.streams.count(), ..self.server.counters() });
                }
                Ok(Command::Welcome(client)) => self.welcome(now, *client),
                Ok(Command::Reclaim(idle)) => self.server.reclaim(&idle, now.mono),
                Ok(Command::Drain) => self.server.drain(),
                Err(TryRecvError::Empty) => return Obeyed::GoOn,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Obeyed::Stop,
            }
        }
    }
}

#[derive(PartialEq, Eq)]
enum Obeyed {
    GoOn,
    Stop,
}

/// From clients.
impl Shard {
    fn read_listener(&mut self, now: Now, index: usize, listeners: &[Listener], batch: &mut Batch) {
        let listener = &listeners[index];
        let Ok(count) = batch.receive(&listener.socket) else { return };
        for index in 0..count {
            let Some(datagram) = batch.get(index) else { continue };
            let local = datagram.local.unwrap_or(listener.at.ip());
            let client = FiveTuple {
                client: datagram.from,
                server: SocketAddr::new(local, listener.at.port()),
                transport: Transport::Udp,
            };
            self.serve_client(now, &client, datagram.bytes());
            if !self.reply.is_empty() && send_to_client(listener, &client, &self.reply).is_err() {
                self.server.count_dropped(Dropped::Unsendable);
            }
        }
    }

    /// One message of a client's; the answer, if there is one, is in `self.reply`.
    fn serve_client(&mut self, now: Now, client: &FiveTuple, message: &[u8]) {
        self.reply.clear();
        match demux::sort(message) {
            demux::Datagram::ChannelData(channel, payload) => {
                if let Some(to) = self.server.to_peer(client, channel, payload.len()) {
                    self.send_to_peer(to, payload);
                }
            }
            demux::Datagram::Send(message) => {
                if let Some((to, payload)) = self.server.send(client, message) {
                    self.send_to_peer(to, payload);
                }
            }
            demux::Datagram::Stun(message) => {
                self.server.handle_request(now, *client, message, &mut self.reply);
                // Before the next message: it may belong to the allocation that was just made or freed.
                self.apply_effects();
            }
            demux::Datagram::Unknown => self.server.count_dropped(Dropped::Malformed),
        }
    }

    fn send_to_peer(&mut self, ToPeer { relay, to }: ToPeer, payload: &[u8]) {
        let socket = self.sockets.get(relay);
        let sent = socket.is_some_and(|socket| udp::send(socket, to.is_ipv6(), None, to, payload).is_ok());
        if !sent {
            self.server.count_dropped(Dropped::Unsendable);
        }
    }
}

/// From peers.
impl Shard {
    fn read_relay(&mut self, relay: RelayPort, listeners: &[Listener], batch: &mut Batch) {
        // Closed by an earlier event of the same batch.
        let Some(socket) = self.sockets.get(relay) else { return };
        let Ok(count) = batch.receive(socket) else { return };
        for index in 0..count {
            let Some(datagram) = batch.get(index) else { continue };
            if let Some(to) = self.server.to_client(relay, datagram.from, datagram.length) {
                self.wrap_and_send(to, datagram, listeners);
            }
        }
    }

    fn wrap_and_send(
        &mut self,
        ToClient { client, wrap }: ToClient,
        datagram: Datagram<'_>,
        listeners: &[Listener],
    ) {
        let Datagram { buffer, length, .. } = datagram;
        let message = match wrap {
            Wrap::Channel(channel) => {
                let start = HEADROOM - channel_data::HEADER;
                buffer[start..HEADROOM].copy_from_slice(&channel_data::header(channel, length as u16));
                start..HEADROOM + length
            }
            Wrap::Indication(peer) => {
                let transaction = self.next_transaction();
                indication::write_data(buffer, HEADROOM, length, peer, transaction)
            }
        };
        let sent = match client.transport {
            Transport::Udp => {
                let listener = listeners.iter().find(|listener| listener.serves(&client));
                listener.is_some_and(|listener| send_to_client(listener, &client, &buffer[message]).is_ok())
            }
            Transport::Tcp => self.send_on_stream(&client, buffer, message),
        };
        if !sent {
            self.server.count_dropped(Dropped::Unsendable);
        }
    }

    /// Indications have no answer: their transaction ids only have to differ.
    fn next_transaction(&mut self) -> [u8; 12] {
        self.indications += 1;
        let mut transaction = *b"data\0\0\0\0\0\0\0\0";
        transaction[4..].copy_from_slice(&self.indications.to_be_bytes());
        transaction
    }
}

impl Listener {
    fn serves(&self, client: &FiveTuple) -> bool {
        self.at.port() == client.server.port()
            && (self.at.ip() == client.server.ip() || self.at.ip().is_unspecified())
    }
}

fn send_to_client(listener: &Listener, client: &FiveTuple, bytes: &[u8]) -> io::Result<()> {
    let from = Some(client.server.ip()).filter(|ip: &IpAddr| !ip.is_unspecified());
    udp::send(&listener.socket, listener.at.is_ipv6(), from, client.client, bytes)
}

/// Clients on streams.
impl Shard {
    fn welcome(&mut self, now: Now, client: RelayClient) {
        // The kernel gives a client's address to a new connection once the old one is dead, which we may not know yet.
        if let Some(dead) = self.streams.index_of(&five_tuple(&client)) {
            self.close_stream(now, dead);
        }
        let index = self.streams.insert(now.mono, client);
        let client = self.streams.get_mut(index).expect("it has just been put there");
        match self.poll.add(&client.stream.socket, STREAM + index as u64) {
            // What came with the handshake has been read already, and nobody will say so again.
            Ok(()) => self.stream_is_ready(now, index),
            Err(error) => {
                tracing::error!("cannot watch a relay client's connection: {error}");
                self.close_stream(now, index);
            }
        }
    }

    /// There is something to read, or room to write.
    fn stream_is_ready(&mut self, now: Now, index: usize) {
        let mut piece = std::mem::take(&mut self.piece);
        let read = self.read_stream(now, index, &mut piece);
        self.piece = piece;
        self.flush_stream(now, index);
        if read.is_err() {
            self.close_stream(now, index);
        }
    }

    /// Reads for a while.
    ///
    /// # Errors
    /// When the client has ended its stream, or broken it.
    fn read_stream(&mut self, now: Now, index: usize, piece: &mut [u8]) -> Result<(), Broken> {
        for turn in 0.. {
            // What TLS has decrypted already is read to its end: the poll would not tell of it again.
            let read = self.streams.read(index, piece, turn < PIECES);
            // Closed by an earlier event of the same batch.
            let Some(read) = read else { return Ok(()) };
            match read {
                Ok(length @ 1..) => self.serve_stream(now, index, &piece[..length])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Ok(0) | Err(_) => return Err(Broken),
            }
        }
        Ok(())
    }

    fn serve_stream(&mut self, now: Now, index: usize, mut bytes: &[u8]) -> Result<(), Broken> {
        let client = self.streams.get_mut(index).expect("it was just read from");
        let (tuple, mut framing) = (client.tuple(), client.take_framing());
        let mut heard = false;
        loop {
            let known = self.server.holds_allocation(&tuple);
            let longest = if known { framing::LONGEST } else { STRANGERS_LONGEST };
            let Some(message) = framing.next(&mut bytes, longest)? else { break };
            heard = true;
            self.serve_client(now, &tuple, message);
            // Who sends requests and does not read the answers is not served any longer.
            self.streams.queue(index, &self.reply).map_err(|Slow| Broken)?;
        }
        let client = self.streams.get_mut(index).expect("serving it does not close it");
        client.put_framing(framing, now.mono, heard);
        Ok(())
    }

    /// Messages on a stream are padded (RFC 8656 §12.5); there is room for it behind every datagram.
    fn send_on_stream(&mut self, client: &FiveTuple, buffer: &mut [u8], message: Range<usize>) -> bool {
        let Some(index) = self.streams.index_of(client) else { return false };
        let end = message.start + message.len().next_multiple_of(4);
        buffer[message.end..end].fill(0);
        self.streams.queue(index, &buffer[message.start..end]).is_ok()
    }

    fn flush_streams(&mut self, now: Now) {
        while let Some(index) = self.streams.next_dirty() {
            self.flush_stream(now, index);
        }
    }

    fn flush_stream(&mut self, now: Now, index: usize) {
        let watch = match self.streams.flush(now.mono, index) {
            Ok(Flushed::All | Flushed::Blocked { first: false }) => return,
            Ok(Flushed::Blocked { first: true }) => Watch::BytesAndRoom,
            Ok(Flushed::Unblocked) => Watch::Bytes,
            Err(_) => return self.close_stream(now, index),
        };
        let client = self.streams.get_mut(index).expect("it has just been flushed");
        if self.poll.watch(&client.stream.socket, STREAM + index as u64, watch).is_err() {
            self.close_stream(now, index);
        }
    }

    /// Whatever the client held is free at once: many never say goodbye.
    fn close_stream(&mut self, now: Now, index: usize) {
        if let Some(client) = self.streams.remove(index) {
            self.server.hang_up(&client, now.mono);
            self.apply_effects();
        }
    }

    fn close_overdue_streams(&mut self, now: Now) {
        if now.mono < self.look {
            return;
        }
        self.look = now.mono + LOOK;
        let server = &self.server;
        for index in self.streams.overdue(now.mono, |client| server.holds_allocation(client)) {
            self.close_stream(now, index);
        }
    }
}

/// What the server asks for.
impl Shard {
    fn apply_effects(&mut self) {
        let mut ports_moved = false;
        while let Some(effect) = self.server.poll_effect() {
            match effect {
                Effect::TakeRelay(at) => {
                    ports_moved = true;
                    let socket = self.sockets.get(at).expect("only bound ports are in the reserve");
                    if let Err(error) = self.poll.add(socket, relay_number(at)) {
                        tracing::error!("cannot watch relay port {}: {error}", at.port);
                    }
                }
                Effect::CloseRelay(at) => {
                    ports_moved = true;
                    self.sockets.close(at);
                }
                Effect::Ended(ended) => log_ended(&ended),
                Effect::Reclaim(idle) => self.mailboxes[idle.shard].tell(Command::Reclaim(idle)),
            }
        }
        if ports_moved {
            self.top_up();
        }
    }

    /// Binds ports ahead of demand.
    fn top_up(&mut self) {
        for index in 0..self.relays.len() {
            let relay = index as u8;
            // A program that holds many of our ports must not hold us.
            for _ in 0..2 * crate::turn::ports::RESERVE {
                let Some(port) = self.server.ports(relay).next_to_bind(random()) else { break };
                match self.sockets.bind(self.relays[index].bound, RelayPort { relay, port }) {
                    Ok(()) => self.server.ports(relay).bound(port),
                    Err(error) => {
                        tracing::debug!("relay port {port} is not to be had: {error}");
                        self.server.ports(relay).taken(port);
                    }
                }
            }
        }
    }
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes).expect("the operating system has randomness");
    u32::from_ne_bytes(bytes)
}

fn relay_number(at: RelayPort) -> u64 {
    RELAY | u64::from(at.relay) << 16 | u64::from(at.port)
}

fn relay_port(number: u64) -> RelayPort {
    RelayPort { relay: (number >> 16) as u8, port: number as u16 }
}

fn log_ended(ended: &crate::turn::allocation::Ended) {
    tracing::info!(
        agent = ?ended.agent,
        transport = ended.client.transport.name(),
        family = Family::of(ended.client.client.ip().to_canonical()).name(),
        relayed = ?ended.relayed,
        seconds = ended.lived.as_secs(),
        packets_to_peers = ended.to_peers.packets,
        bytes_to_peers = ended.to_peers.bytes,
        packets_to_client = ended.to_clients.packets,
        bytes_to_client = ended.to_clients.bytes,
        why = ended.why.name(),
        "allocation ended"
    );
}
