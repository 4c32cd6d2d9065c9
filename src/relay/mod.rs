//! Drives `turn`: one shard per core, each a thread with its own listeners and relay sockets; a fallen one starts anew.

mod crossing; // from one shard to another
mod shard; // the loop: read, decide, send, effects, deadline
mod sockets; // listeners, and the sockets of relayed addresses
mod stream; // clients on TCP and TLS

pub use sockets::LISTENER_BUFFER;

use std::{
    io,
    net::SocketAddr,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use self::shard::{Command, Listener, Mailbox, Place, Shard};
use crate::{
    credentials::turn_rest::TurnSecrets,
    door::RelayClient,
    host::cannot_listen,
    poll,
    turn::{
        RelayPort,
        auth::Auth,
        counters::Counters,
        nonce::Nonces,
        policy::Policy,
        quota::Quotas,
        server::{Server, Setup},
        strangers::Strangers,
    },
    udp::{self, Offload},
};

/// What a relay is built from.
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Where clients send to; port 0 lets the kernel choose.
    pub listen: Vec<SocketAddr>,
    /// How many shards; fewer are started when [`Self::ports`] is small.
    pub shards: usize,
    /// Ports of relayed addresses.
    pub ports: RangeInclusive<u16>,
    /// Which peers may be reached; the addresses of [`Self::listen`] are added to its listeners.
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
}

/// A running relay; dropping it ends all allocations.
pub struct Relay {
    listening: Vec<SocketAddr>,
    mailboxes: Arc<[Mailbox]>,
    /// Whose turn it is to take the next stream.
    turn: AtomicUsize,
    threads: Vec<JoinHandle<()>>,
}

/// For a shard to answer; it does so between two batches.
const PATIENCE: Duration = Duration::from_secs(1);
/// A shard has so many ports at least.
const PORTS_PER_SHARD: usize = 1_024;

impl Relay {
    /// Binds everything, then starts the shards.
    ///
    /// # Errors
    /// One line that names the address and what is wrong with it.
    pub fn start(mut config: RelayConfig) -> Result<Self, String> {
        let shards = config.shards.clamp(1, config.ports.len().div_ceil(PORTS_PER_SHARD));
        let mut listeners: Vec<Vec<Listener>> = (0..shards).map(|_| Vec::new()).collect();
        let mut listening = Vec::new();
        for at in config.listen.clone() {
            let bound = listen(at, &mut listeners)
                .map_err(|error| cannot_listen("TURN over UDP", at, "--turn-listen", &error))?;
            listening.push(bound);
        }
        config.policy.listeners.extend(&listening);
        tell_buffers(&listeners[0]);
        start_shards(&config, listening, listeners)
            .map_err(|error| format!("cannot start the relay: {error}"))
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

    /// No new allocations from now on.
    pub fn drain(&self) {
        self.mailboxes.iter().for_each(|shard| shard.tell(Command::Drain));
    }

    /// The counts of all shards, now. Waits for each shard to finish its batch.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for shard in &*self.mailboxes {
            let (to, counted) = mpsc::sync_channel(1);
            shard.tell(Command::Count(to));
            if let Ok(counters) = counted.recv_timeout(PATIENCE) {
                sum += &counters;
            }
        }
        sum
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

/// One socket for each shard at the same address, which is given back with its port.
fn listen(at: SocketAddr, shards: &mut [Vec<Listener>]) -> io::Result<SocketAddr> {
    // Sockets that share an address would silently share it with another instance, too: ask once without sharing.
    let at = sockets::listener(at, false)?.local_addr()?;
    let shared = shards.len() > 1;
    for listeners in shards {
        listeners.push(Listener { socket: sockets::listener(at, shared)?, at });
    }
    Ok(at)
}

fn start_shards(
    config: &RelayConfig,
    listening: Vec<SocketAddr>,
    listeners: Vec<Vec<Listener>>,
) -> io::Result<Relay> {
    let both: Vec<_> = listeners.iter().map(|_| Mailbox::new()).collect::<io::Result<_>>()?;
    let (mailboxes, inboxes): (Vec<_>, Vec<_>) = both.into_iter().unzip();
    let mailboxes: Arc<[Mailbox]> = mailboxes.into();
    let segmentation = probe();
    let places = listeners.into_iter().zip(inboxes).enumerate();
    let start = |(index, (listeners, inbox)): (usize, (Vec<Listener>, _))| {
        let (config, mailboxes) = (config.clone(), Arc::clone(&mailboxes));
        let place = Place { index, listeners: listeners.into(), segmentation, inbox, mailboxes };
        let first = shard(&config, &place)?;
        std::thread::Builder::new()
            .name(format!("relay-{index}"))
            .spawn(move || supervise(first, &config, &place))
    };
    let threads = places.map(start).collect::<io::Result<_>>()?;
    Ok(Relay { listening, mailboxes, turn: AtomicUsize::new(0), threads })
}

/// A burst that a listener's buffer cannot hold is lost.
fn tell_buffers(listeners: &[Listener]) {
    let least = listeners.iter().map(|listener| udp::receive_buffer(&listener.socket)).min().unwrap_or(0);
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
        running = match shard(config, place) {
            Ok(shard) => shard,
            Err(error) => return tracing::error!("relay shard {index} cannot start anew: {error}"),
        };
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
        },
        policy: config.policy.clone(),
        quotas: config.quotas.clone(),
        strangers: config.strangers.clone(),
        ports: relays.iter().map(|_| share(&config.ports, index, count).collect()).collect(),
    };
    Shard::new(Server::new(setup), relays, place)
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
    use super::share;

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
