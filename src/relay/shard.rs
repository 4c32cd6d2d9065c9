//! One shard: a thread, its listeners, its relay sockets, its TURN server. Batch in, decide, batch out, effects,
//! deadline.

use std::{
    io, mem,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

mod handover; // to the next process, or from the one before
mod packets; // between clients and peers, and between clients
mod streams; // clients on TCP and TLS

use self::handover::Other;
use super::{
    crossing::{Arrivals, Crossing, Parcel},
    handover::Link,
    owner,
    sockets::{Overflow, RelaySockets},
    stream::Streams,
    xdp::Mirror,
};
use crate::{
    clock::{self, Now},
    door::RelayClient,
    poll::{Poll, Waker},
    turn::{
        Family, RelayAddress, RelayPort,
        counters::{Counters, Dropped, Turns},
        forward::Carried,
        quota::Tenure,
        server::{Effect, Rules, Server},
    },
    udp::{Arena, Outbox},
};

/// What others may ask of a shard.
pub enum Command {
    /// The counts, now.
    Count(SyncSender<Counters>),
    /// End an allocation that made room for another shard's.
    Reclaim(Arc<Tenure>),
    /// Serve a client on TCP or TLS.
    Welcome(Box<RelayClient>),
    /// Go by other rules.
    Adopt(Box<Rules>),
    /// Let the shard at the other end have the clients to come, and say when it is so.
    HandOver(Link, SyncSender<io::Result<()>>),
    /// That one came to nothing.
    TakeBack,
    /// It did so before it was in charge.
    GoOn,
    /// End the allocations of an agent.
    Revoke(Box<str>),
    /// No new allocations.
    Drain,
    /// Come to an end.
    Stop,
}

/// How others reach a shard.
pub struct Mailbox {
    commands: Sender<Command>,
    crossing: Crossing,
    waker: Arc<Waker>,
}

/// The shard's side of its [`Mailbox`].
pub struct Inbox {
    commands: Receiver<Command>,
    arrivals: Arrivals,
    waker: Arc<Waker>,
}

impl Mailbox {
    /// Both sides.
    pub fn new() -> io::Result<(Self, Inbox)> {
        let (sender, commands) = mpsc::channel();
        let (crossing, arrivals) = Crossing::new();
        let waker = Arc::new(Waker::new()?);
        let mailbox = Self { commands: sender, crossing, waker: Arc::clone(&waker) };
        Ok((mailbox, Inbox { commands, arrivals, waker }))
    }

    /// The shard obeys after the batch it is at.
    pub fn tell(&self, command: Command) {
        // A shard that has come to an end needs no telling.
        let _ = self.commands.send(command);
        self.waker.wake();
    }
}

impl Inbox {
    /// Rests for so long; whoever asks for something meanwhile is not heard. Gives whether to go on then.
    pub fn rest(&self, until: Instant) -> bool {
        loop {
            match self.commands.recv_timeout(until.saturating_duration_since(clock::now().mono)) {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return true,
            }
        }
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
    pub listeners: Arc<[Listener]>,
    /// Whether the kernel takes trains of datagrams.
    pub segmentation: bool,
    /// What it is told.
    pub inbox: Inbox,
    /// How it tells the shards, itself among them.
    pub mailboxes: Arc<[Mailbox]>,
    /// To the shard that had the listeners before, once.
    pub link: Mutex<Option<Link>>,
    /// What it goes by, if not by what it was built from.
    pub standing: Arc<Standing>,
}

/// What all shards were told since they were started: those that start anew go by it, too.
#[derive(Default)]
pub struct Standing {
    /// The last rules.
    pub rules: Mutex<Option<Rules>>,
    /// Nobody new is taken.
    pub drains: AtomicBool,
    /// Another process reads the listeners.
    pub is_handed_over: AtomicBool,
}

/// All that a shard owns.
pub struct Shard {
    index: usize,
    server: Server,
    relays: Vec<RelayAddress>,
    listeners: Arc<[Listener]>,
    /// Of the listeners.
    overflows: Vec<Overflow>,
    sockets: RelaySockets,
    poll: Poll,
    mailboxes: Arc<[Mailbox]>,
    /// What was read in this turn and not yet sent, and how many slots of it the turn has filled so far.
    arena: Arena,
    slots_read: usize,
    /// What is to be sent of it.
    outbox: Outbox,
    /// What is for other shards, by shard.
    parcels: Vec<Parcel>,
    /// Empty ones.
    spare: Vec<Parcel>,
    streams: Streams,
    other: Other,
    /// Its channels in the kernel.
    mirror: Option<Mirror>,
    turns: Turns,
    /// When the streams are next looked at for those that take too long.
    look: Instant,
    /// When this turn began.
    now: Now,
    reply: Vec<u8>,
    /// A message of a stream that came in pieces.
    whole: Vec<u8>,
    indications: u64,
}

/// Datagrams that are read before the first of them is sent on.
const SLOTS: usize = 128;
/// Of one relay socket so many at once: then it is the others' turn.
const RELAY_READ: usize = 32;
/// After a turn that filled so many slots the shard rests: the next turn finds more datagrams of each flow, which leave as
/// one train. With fewer, nobody waits; with many, they are trains already.
const BUSY: usize = 4;
const REST: Duration = Duration::from_micros(200);
/// What another shard, or the other process, was too busy to take is offered again after that.
const AGAIN: Duration = Duration::from_millis(1);
/// The streams are looked at that often, while there are any.
const LOOK: Duration = Duration::from_secs(5);
/// How often in a row a stream is read: then it is the others' turn.
const PIECES: usize = 4;
/// The longest message of a stream without an allocation; a request with the longest user name is shorter.
const STRANGERS_LONGEST: usize = 2_048;

/// Numbers in the poll: listeners by index from 0, relay sockets by address and port above, then streams by index, the
/// link, the waker.
const RELAY: u64 = 1 << 32;
const STREAM: u64 = 1 << 48;
const LINK: u64 = WAKER - 1;
const WAKER: u64 = u64::MAX;

impl Shard {
    /// Binds the reserve and watches everything.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(
        server: Server,
        relays: Vec<RelayAddress>,
        mirror: Option<Mirror>,
        place: &Place,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(&*place.inbox.waker, WAKER)?;
        let link = place.link.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(link) = &link {
            // Who reads the listeners says when it does so no more.
            poll.add(link, LINK)?;
        } else if !place.standing.is_handed_over.load(Relaxed) {
            for (index, listener) in place.listeners.iter().enumerate() {
                poll.add(&listener.socket, index as u64)?;
            }
        }
        let now = clock::now();
        let mut shard = Self {
            index: place.index,
            server,
            relays,
            listeners: Arc::clone(&place.listeners),
            overflows: place.listeners.iter().map(|listener| Overflow::so_far(&listener.socket)).collect(),
            sockets: RelaySockets::default(),
            poll,
            mailboxes: Arc::clone(&place.mailboxes),
            arena: Arena::new(SLOTS),
            slots_read: 0,
            outbox: Outbox::new(place.segmentation),
            parcels: place.mailboxes.iter().map(|_| Parcel::new(place.index)).collect(),
            spare: Vec::new(),
            streams: Streams::default(),
            other: Other::new(link),
            mirror,
            turns: Turns::default(),
            look: now.mono,
            now,
            reply: Vec::new(),
            whole: Vec::new(),
            indications: 0,
        };
        shard.top_up();
        Ok(shard)
    }

    /// Until told to stop.
    ///
    /// # Errors
    /// When the kernel will not even let us wait.
    pub fn run(&mut self, inbox: &Inbox) -> io::Result<()> {
        loop {
            let wait = self.next_deadline().map(|at| at.saturating_duration_since(clock::now().mono));
            let ready = self.poll.wait(wait)?;
            self.now = clock::now();
            self.server.begin_batch(self.now);
            for number in ready {
                match number {
                    WAKER => inbox.waker.clear(),
                    LINK => self.hear_other(),
                    STREAM.. => self.stream_is_ready((number - STREAM) as usize),
                    RELAY.. => self.read_relay(relay_port(number)),
                    index => self.read_listener(index as usize, SLOTS),
                }
            }
            self.take_in(&inbox.arrivals);
            self.server.handle_timeout(self.now);
            let obeyed = self.obey(inbox);
            self.close_overdue_streams();
            self.look_at_kernel();
            self.apply_effects();
            self.catch_up();
            self.send_all();
            self.flush_streams();
            if obeyed == Obeyed::Stop {
                return Ok(());
            }
            self.turns.add(clock::now().mono.saturating_duration_since(self.now.mono).as_micros() as u64);
            if (BUSY..SLOTS / 2).contains(&mem::take(&mut self.slots_read)) {
                thread::sleep(REST);
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let look = (!self.streams.is_empty()).then_some(self.look);
        let again = (self.holds_parcels() || self.other.is_behind()).then(|| clock::now().mono + AGAIN);
        let kernel = self.mirror.as_ref().and_then(Mirror::next_look);
        self.server.poll_timeout().into_iter().chain(look).chain(again).chain(kernel).min()
    }

    fn obey(&mut self, inbox: &Inbox) -> Obeyed {
        loop {
            match inbox.commands.try_recv() {
                Ok(Command::Count(to)) => _ = to.send(self.counters()),
                Ok(Command::Welcome(client)) => self.welcome(*client),
                Ok(Command::Reclaim(idle)) => self.server.reclaim(&idle, self.now.mono),
                Ok(Command::Adopt(rules)) => self.server.adopt(*rules),
                Ok(Command::HandOver(link, done)) => _ = done.send(self.hand_over(link)),
                Ok(Command::TakeBack) => self.take_back(),
                Ok(Command::GoOn) => self.go_on(),
                Ok(Command::Revoke(agent)) => self.revoke(&agent),
                Ok(Command::Drain) => self.server.drain(),
                Err(TryRecvError::Empty) => return Obeyed::GoOn,
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Obeyed::Stop,
            }
        }
    }
}

/// What others ask for.
impl Shard {
    fn counters(&mut self) -> Counters {
        (0..self.listeners.len()).for_each(|index| self.count_overflow(index));
        self.count_in_kernel();
        let handed_over = self.other.clients() as u64;
        let (streams, waiting, turns) = (self.streams.count(), self.streams.waiting(), self.turns);
        let mut counters = Counters { streams, waiting, turns, handed_over, ..self.server.counters() };
        counters.elsewhere.channels = self.mirror.as_ref().map_or(0, Mirror::channels) as u64;
        counters
    }

    fn look_at_kernel(&mut self) {
        if self.mirror.as_ref().and_then(Mirror::next_look).is_some_and(|at| at <= self.now.mono) {
            self.count_in_kernel();
        }
    }

    /// What the kernel has relayed since it was last asked.
    fn count_in_kernel(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        let quotas = self.server.quotas().clone();
        mirror.look(&quotas, self.now.mono, |client, carried| _ = self.server.carried(client, carried));
    }

    /// What did not fit into a listener's buffer since it was last asked.
    fn count_overflow(&mut self, listener: usize) {
        let overflowed = self.overflows[listener].since_last(&self.listeners[listener].socket);
        self.server.count_dropped(Dropped::Overflow, overflowed);
    }
}

#[derive(PartialEq, Eq)]
enum Obeyed {
    GoOn,
    Stop,
}

/// What the server asks for.
impl Shard {
    fn apply_effects(&mut self) {
        let mut ports_moved = false;
        // What the kernel has relayed of an allocation that ends now.
        let mut last = Carried::default();
        while let Some(effect) = self.server.poll_effect() {
            match effect {
                Effect::TakeRelay(at) => {
                    ports_moved = true;
                    self.tell_relayed(at, true);
                    let socket = self.sockets.get(at).expect("only bound ports are in the reserve");
                    if let Err(error) = self.poll.add(socket, relay_number(at)) {
                        tracing::error!("cannot watch relay port {}: {error}", at.port);
                    }
                }
                Effect::CloseRelay(at) => {
                    ports_moved = true;
                    // What was sent before still leaves.
                    self.send();
                    self.server.count_dropped(Dropped::Overflow, self.sockets.overflow(at));
                    self.sockets.close(at);
                    self.tell_relayed(at, false);
                }
                Effect::RouteAdded(route) => {
                    if let Some(mirror) = &mut self.mirror {
                        mirror.add(&route, self.server.quotas(), self.now.mono);
                    }
                }
                Effect::RouteRemoved(client, channel) => {
                    let Some(mirror) = &mut self.mirror else { continue };
                    let carried = mirror.remove(&client, channel, self.server.quotas(), self.now.mono);
                    if !self.server.carried(&client, &carried) {
                        last += carried;
                    }
                }
                Effect::Ended(mut ended) => {
                    self.tell_left(ended.client);
                    // Its routes are removed right before it ends.
                    ended.add(&std::mem::take(&mut last));
                    log_ended(&ended);
                }
                Effect::Reclaim(idle) => self.mailboxes[idle.shard].tell(Command::Reclaim(idle)),
            }
        }
        if ports_moved {
            self.top_up();
        }
    }

    /// Binds ports ahead of demand, if there will be any.
    fn top_up(&mut self) {
        if self.server.is_draining() {
            return;
        }
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

/// In the poll.
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
