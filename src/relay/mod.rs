//! Drives `turn`: one shard per core, each a thread with its own listeners and relay sockets; a fallen one starts anew.

mod crossing; // from one shard to another
mod handover; // from one process to the next
mod shard; // the loop: read, decide, send, effects, deadline
mod sockets; // listeners, and the sockets of relayed addresses
mod stream; // clients on TCP and TLS
pub mod xdp; // channels in the kernel

pub use handover::Link;
pub use sockets::LISTENER_BUFFER;

use std::{
    io, iter,
    net::{SocketAddr, UdpSocket},
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use self::{
    shard::{Command, Listener, Mailbox, Place, Shard, Standing},
    xdp::{Attachments, Maps, Mirror},
};
use crate::{
    clock,
    credentials::{revocations::Revocations, turn_rest::TurnSecrets},
    door::RelayClient,
    poll,
    turn::{
        RelayPort,
        auth::Auth,
        counters::Counters,
        nonce::Nonces,
        policy::Policy,
        quota::{Limits, Quotas},
        server::{Rules, Server, Setup},
        strangers::Strangers,
    },
    udp::{self, Offload},
};

/// What a relay is built from.
#[derive(Clone)]
pub struct RelayConfig {
    /// Ports of relayed addresses.
    pub ports: RangeInclusive<u16>,
    /// Which peers may be reached; the addresses of the relay's listeners are added to its own.
    pub policy: Policy,
    /// How many allocations may be held.
    pub quotas: Quotas,
    /// How many answers strangers get.
    pub strangers: Strangers,
    /// Sent in challenges.
    pub realm: String,
    /// Who minted the users.
    pub secrets: TurnSecrets,
    /// Makes and checks nonces.
    pub nonces: Nonces,
    /// Whose older users are accepted no more.
    pub revocations: Revocations,
    /// The kernel's path, where there is one.
    pub kernel: Option<Kernel>,
}

/// The kernel's path, as all shards share it.
#[derive(Clone)]
pub struct Kernel {
    /// Where routes are written.
    pub maps: Arc<Maps>,
    /// Where the program is.
    pub attachments: Attachments,
}

/// A running relay; dropping it ends all allocations.
pub struct Relay {
    listening: Vec<SocketAddr>,
    mailboxes: Arc<[Mailbox]>,
    standing: Arc<Standing>,
    quotas: Quotas,
    kernel: Option<Kernel>,
    /// Whose turn it is to take the next stream.
    turn: AtomicUsize,
    threads: Vec<JoinHandle<()>>,
}

/// For a shard to answer; it does so between two batches.
const PATIENCE: Duration = Duration::from_secs(1);
/// Before a shard that could not start anew tries again.
const REST: Duration = Duration::from_secs(1);
/// A shard has so many ports at least.
pub const PORTS_PER_SHARD: usize = 1_024;

impl Relay {
    /// Starts the shards: as many as an address has `listeners`, each of which goes to one shard. Where another process has
    /// read them so far, `links` go there, one for each shard, and nothing is read before it says so.
    ///
    /// # Errors
    /// One line for people.
    pub fn start(
        mut config: RelayConfig,
        listeners: Vec<Vec<UdpSocket>>,
        links: Vec<Link>,
    ) -> Result<Self, String> {
        start_shards(&mut config, listeners, links)
            .map_err(|error| format!("cannot start the relay: {error}"))
    }

    /// Lets the kernel relay what it can, from now on. The process before must have left the interfaces.
    pub fn use_kernel(&self) {
        if let Some(kernel) = &self.kernel {
            kernel.attachments.keep();
        }
    }

    /// Where clients send to.
    #[must_use]
    pub fn listening(&self) -> &[SocketAddr] {
        &self.listening
    }

    /// A client on TCP or TLS: the shards take turns.
    pub fn welcome(&self, client: RelayClient) {
        let shard = self.turn.fetch_add(1, Relaxed) % self.mailboxes.len();
        self.mailboxes[shard].tell(Command::Welcome(Box::new(client)));
    }

    /// Goes by other rules and quotas from now on; nothing that lives is touched.
    pub fn adopt(&self, rules: &Rules, quotas: Limits) {
        self.quotas.adopt(quotas);
        *self.standing.rules.lock().unwrap_or_else(PoisonError::into_inner) = Some(rules.clone());
        self.mailboxes.iter().for_each(|shard| shard.tell(Command::Adopt(Box::new(rules.clone()))));
    }

    /// Lets the relay at the other ends of `links`, one for each shard, have the listeners, and tells it who is here. Takes
    /// nobody new from now on.
    ///
    /// # Errors
    /// When a shard cannot, in one line for people. End the other process then, and let this one [go on](Self::go_on).
    pub fn hand_over(&self, links: Vec<Link>) -> Result<(), String> {
        if let Some(kernel) = &self.kernel {
            kernel.attachments.leave();
        }
        for (index, (shard, link)) in self.mailboxes.iter().zip(links).enumerate() {
            let (to, done) = mpsc::sync_channel(1);
            shard.tell(Command::HandOver(link, to));
            let handed_over = done.recv_timeout(PATIENCE).map_err(|_| "it does not answer".to_owned());
            handed_over
                .and_then(|handed_over| handed_over.map_err(|error| error.to_string()))
                .map_err(|why| format!("relay shard {index} cannot be handed over: {why}"))?;
        }
        self.standing.drains.store(true, Relaxed);
        self.standing.is_handed_over.store(true, Relaxed);
        Ok(())
    }

    /// Reads the listeners again, for those who are here: the process that had them has come to nothing.
    pub fn take_back(&self) {
        self.standing.is_handed_over.store(false, Relaxed);
        self.return_with(|| Command::TakeBack);
    }

    /// Goes on as before a [`hand_over`](Self::hand_over) that failed.
    pub fn go_on(&self) {
        self.return_with(|| Command::GoOn);
    }

    fn return_with(&self, command: impl Fn() -> Command) {
        self.mailboxes.iter().for_each(|shard| shard.tell(command()));
        if let Some(kernel) = &self.kernel {
            kernel.attachments.come_back();
        }
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> usize {
        self.mailboxes.len()
    }

    /// Ends all allocations of an agent, those in the process before among them.
    pub fn revoke(&self, agent: &str) {
        self.mailboxes.iter().for_each(|shard| shard.tell(Command::Revoke(agent.into())));
    }

    /// No new allocations from now on.
    pub fn drain(&self) {
        self.standing.drains.store(true, Relaxed);
        self.mailboxes.iter().for_each(|shard| shard.tell(Command::Drain));
    }

    /// The counts of all shards, now. Waits for each shard to finish its batch.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.count().flatten().for_each(|counters| sum += &counters);
        if let Some(kernel) = &self.kernel {
            sum.elsewhere.passed = kernel.maps.passes();
            sum.elsewhere.interfaces = kernel.attachments.count();
        }
        sum
    }

    /// The first shard that does not answer, if there is one.
    #[must_use]
    pub fn stuck(&self) -> Option<usize> {
        self.count().position(|answer| answer.is_none())
    }

    fn count(&self) -> impl Iterator<Item = Option<Counters>> + '_ {
        self.mailboxes.iter().map(|shard| {
            let (to, counted) = mpsc::sync_channel(1);
            shard.tell(Command::Count(to));
            counted.recv_timeout(PATIENCE).ok()
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.mailboxes.iter().for_each(|shard| shard.tell(Command::Stop));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Sockets for so many shards at one address. Port 0 lets the kernel choose.
///
/// # Errors
/// What the kernel says.
pub fn bind(at: SocketAddr, shards: usize) -> io::Result<Vec<UdpSocket>> {
    // Sockets that share an address would silently share it with another instance, too: ask once without sharing.
    let at = sockets::listener(at, false)?.local_addr()?;
    (0..shards).map(|_| sockets::listener(at, shards > 1)).collect()
}

/// Sockets that somebody else has bound, as [`bind`] gives them.
///
/// # Errors
/// What the kernel says.
pub fn adopt(sockets: Vec<UdpSocket>) -> io::Result<Vec<UdpSocket>> {
    sockets.iter().try_for_each(sockets::adopt).map(|()| sockets)
}

fn start_shards(
    config: &mut RelayConfig,
    sockets: Vec<Vec<UdpSocket>>,
    links: Vec<Link>,
) -> io::Result<Relay> {
    let listening = sockets.iter().map(|sockets| sockets[0].local_addr()).collect::<io::Result<Vec<_>>>()?;
    config.policy.listeners.extend(&listening);
    tell_buffers(sockets.iter().flatten());
    let listeners = by_shard(sockets, &listening);
    let both: Vec<_> = listeners.iter().map(|_| Mailbox::new()).collect::<io::Result<_>>()?;
    let (mailboxes, inboxes): (Vec<_>, Vec<_>) = both.into_iter().unzip();
    let mailboxes: Arc<[Mailbox]> = mailboxes.into();
    let segmentation = probe();
    let standing = Arc::<Standing>::default();
    let links = links.into_iter().map(Some).chain(iter::repeat_with(|| None));
    let places = listeners.into_iter().zip(inboxes).zip(links).enumerate();
    let start = |(index, ((listeners, inbox), link)): (usize, ((Vec<Listener>, _), _))| {
        let (config, mailboxes) = (config.clone(), Arc::clone(&mailboxes));
        let standing = Arc::clone(&standing);
        let (listeners, link) = (listeners.into(), Mutex::new(link));
        let place = Place { index, listeners, segmentation, inbox, mailboxes, link, standing };
        let first = shard(&config, &place)?;
        std::thread::Builder::new()
            .name(format!("relay-{index}"))
            .spawn(move || supervise(first, &config, &place))
    };
    let threads = places.map(start).collect::<io::Result<_>>()?;
    let (quotas, kernel) = (config.quotas.clone(), config.kernel.clone());
    Ok(Relay { listening, mailboxes, standing, quotas, kernel, turn: AtomicUsize::new(0), threads })
}

/// The n-th socket of each address is the n-th shard's.
fn by_shard(sockets: Vec<Vec<UdpSocket>>, listening: &[SocketAddr]) -> Vec<Vec<Listener>> {
    let shards = sockets.iter().map(Vec::len).max().unwrap_or(1);
    let mut listeners: Vec<Vec<Listener>> = (0..shards).map(|_| Vec::new()).collect();
    for (sockets, &at) in sockets.into_iter().zip(listening) {
        for (shard, socket) in sockets.into_iter().enumerate() {
            listeners[shard].push(Listener { socket, at });
        }
    }
    listeners
}

/// A burst that a listener's buffer cannot hold is lost.
fn tell_buffers<'a>(listeners: impl Iterator<Item = &'a UdpSocket>) {
    let least = listeners.map(udp::receive_buffer).min().unwrap_or(0);
    if least < sockets::LISTENER_BUFFER {
        tracing::info!(
            "the kernel gives TURN listeners {} KiB of receive buffer, not {}: raise net.core.rmem_max and wmem_max to {} \
             for bursts that are longer",
            least >> 10,
            sockets::LISTENER_BUFFER >> 10,
            sockets::LISTENER_BUFFER,
        );
    }
}

/// What the kernel lacks is said once. Gives whether it takes trains of datagrams.
fn probe() -> bool {
    let Offload { receive, send } = Offload::probe();
    if !(receive && send) {
        let lacking = match (receive, send) {
            (false, false) => "UDP_GRO and UDP_SEGMENT",
            (false, true) => "UDP_GRO",
            _ => "UDP_SEGMENT",
        };
        tracing::info!("this kernel has no {lacking}: relayed packets cost more; Linux 5.0 has both");
    }
    send
}

/// A shard is the blast radius of its own bugs: its allocations are lost, the host goes on.
fn supervise(mut running: Shard, config: &RelayConfig, place: &Place) {
    let index = place.index;
    if let Err(error) = poll::prefer_short_turns() {
        tracing::debug!("relay shard {index} gets no short turns on the processor: {error}");
    }
    loop {
        match catch_unwind(AssertUnwindSafe(|| running.run(&place.inbox))) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!("relay shard {index} failed and starts anew: {error}"),
            Err(_) => {
                tracing::error!("relay shard {index} panicked and starts anew; its allocations are lost")
            }
        }
        drop(running);
        forget_ports(config, index, place.mailboxes.len());
        let Some(anew) = start_anew(config, place) else { return };
        running = anew;
    }
}

/// What the kernel refuses now it may give in a moment. `None` when told to stop.
fn start_anew(config: &RelayConfig, place: &Place) -> Option<Shard> {
    loop {
        match shard(config, place) {
            Ok(shard) => return Some(shard),
            Err(error) => {
                tracing::error!("relay shard {} cannot start anew, and tries again: {error}", place.index)
            }
        }
        if !place.inbox.rest(clock::now().mono + REST) {
            return None;
        }
    }
}

fn shard(config: &RelayConfig, place: &Place) -> io::Result<Shard> {
    let (index, count) = (place.index, place.mailboxes.len());
    let relays = config.policy.relays.clone();
    let setup = Setup {
        shard: index,
        auth: Auth {
            realm: config.realm.clone(),
            secrets: config.secrets.clone(),
            nonces: config.nonces.clone(),
            revocations: config.revocations.clone(),
        },
        policy: config.policy.clone(),
        quotas: config.quotas.clone(),
        strangers: config.strangers.clone(),
        ports: relays.iter().map(|_| share(&config.ports, index, count).collect()).collect(),
        announces_routes: config.kernel.is_some(),
    };
    let mut server = Server::new(setup);
    if let Some(rules) = place.standing.rules.lock().unwrap_or_else(PoisonError::into_inner).clone() {
        server.adopt(rules);
    }
    if place.standing.drains.load(Relaxed) {
        server.drain();
    }
    let of_kernel =
        |kernel: &Kernel| Mirror::new(&kernel.maps, index, count, relays.clone(), clock::now().mono);
    let mirror = config.kernel.as_ref().map(of_kernel);
    Shard::new(server, relays, mirror, place)
}

/// Every `count`-th pair of ports, from `index` on: pairs, so that each shard has even ports to give.
fn share(ports: &RangeInclusive<u16>, index: usize, count: usize) -> impl Iterator<Item = u16> + use<> {
    ports.clone().filter(move |port| owner(*port, count) == index)
}

/// Which of `count` shards has the port, on every relay address.
fn owner(port: u16, count: usize) -> usize {
    usize::from(port / 2) % count
}

fn forget_ports(config: &RelayConfig, index: usize, count: usize) {
    for relay in 0..config.policy.relays.len() {
        for port in share(&config.ports, index, count) {
            config.policy.live.remove(RelayPort { relay: relay as u8, port });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, atomic::AtomicUsize},
        time::Duration,
    };

    use super::{Command, Link, Mailbox, Relay, Standing, share};
    use crate::{
        clock,
        turn::quota::{Limits, Quotas},
    };

    #[test]
    fn a_shard_that_does_not_answer_is_named() {
        let (mailbox, nobody_reads) = Mailbox::new().unwrap();
        let mut relay = Relay {
            listening: Vec::new(),
            mailboxes: Arc::new([mailbox]),
            standing: Arc::<Standing>::default(),
            quotas: Quotas::new(Limits::default()),
            kernel: None,
            turn: AtomicUsize::new(0),
            threads: Vec::new(),
        };
        assert_eq!(relay.stuck(), Some(0));
        let (link, _other) = Link::pair().unwrap();
        let why = relay.hand_over(vec![link]).unwrap_err();
        assert_eq!(why, "relay shard 0 cannot be handed over: it does not answer");
        assert!(nobody_reads.rest(clock::now().mono), "neither is told of what it cannot do");
        relay.mailboxes[0].tell(Command::Stop);
        assert!(!nobody_reads.rest(clock::now().mono + Duration::from_secs(10)), "but that it is over");
        relay.mailboxes = Arc::new([]);
        assert_eq!(relay.stuck(), None);
    }

    #[test]
    fn shards_share_all_ports_and_each_has_even_ones() {
        let ports = 49_153..=65_535;
        let mut all: Vec<_> = (0..3).flat_map(|index| share(&ports, index, 3)).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(ports.clone()));
        for index in 0..3 {
            assert!(share(&ports, index, 3).filter(|port| port % 2 == 0).count() > 2_000);
        }
    }
}
