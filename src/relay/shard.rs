//! One shard: a thread, its listeners, its relay sockets, its TURN server. Batch in, decide, batch out, effects,
//! deadline.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, SyncSender, TryRecvError},
    },
};

use super::{
    poll::{Poll, Waker},
    sockets::RelaySockets,
    udp::{self, Batch, Datagram},
};
use crate::{
    clock::{self, Now},
    turn::{
        FiveTuple, RelayAddress, RelayPort, Transport, channel_data,
        counters::{Counters, Dropped},
        demux,
        forward::{ToClient, ToPeer, Wrap},
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
    reply: Vec<u8>,
    indications: u64,
}

/// Numbers in the poll: listeners by index from 0, relay sockets by address and port above, the waker.
const RELAY: u64 = 1 << 32;
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
        let mut shard = Self { server, relays, sockets, poll, mailboxes, reply: Vec::new(), indications: 0 };
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
            let wait = self.server.poll_timeout().map(|at| at.saturating_duration_since(clock::now().mono));
            let ready = self.poll.wait(wait)?;
            let now = clock::now();
            self.server.begin_batch(now);
            for number in ready {
                match number {
                    WAKER => place.inbox.waker.clear(),
                    RELAY.. => self.read_relay(relay_port(number), listeners, batch),
                    index => self.read_listener(now, index as usize, listeners, batch),
                }
            }
            self.server.handle_timeout(now);
            let obeyed = self.obey(now, &place.inbox);
            self.apply_effects();
            if obeyed == Obeyed::Stop {
                return Ok(());
            }
        }
    }

    fn obey(&mut self, now: Now, inbox: &Inbox) -> Obeyed {
        loop {
            match inbox.commands.try_recv() {
                Ok(Command::Count(to)) => _ = to.send(self.server.counters()),
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
            self.serve_client(now, &client, &datagram, listener);
        }
    }

    fn serve_client(&mut self, now: Now, client: &FiveTuple, datagram: &Datagram<'_>, listener: &Listener) {
        match demux::sort(datagram.bytes()) {
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
            demux::Datagram::Stun(message) => self.request(now, client, message, listener),
            demux::Datagram::Unknown => self.server.count_dropped(Dropped::Malformed),
        }
    }

    fn request(&mut self, now: Now, client: &FiveTuple, message: &[u8], listener: &Listener) {
        self.reply.clear();
        self.server.handle_request(now, *client, message, &mut self.reply);
        // Before the next datagram: it may belong to the allocation that was just made or freed.
        self.apply_effects();
        if !self.reply.is_empty() && send_to_client(listener, client, &self.reply).is_err() {
            self.server.count_dropped(Dropped::Unsendable);
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
        let listener = listeners.iter().find(|listener| listener.serves(&client));
        let sent =
            listener.is_some_and(|listener| send_to_client(listener, &client, &buffer[message]).is_ok());
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
        relayed = %ended.relayed,
        seconds = ended.lived.as_secs(),
        bytes_to_peers = ended.to_peers.bytes,
        bytes_to_client = ended.to_clients.bytes,
        why = ended.why.name(),
        "allocation ended"
    );
}
