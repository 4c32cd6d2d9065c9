//! Builds and joins all parts; the one place that knows everybody.
//!
//! Start: keys, addresses, listeners, then `ready`. Stop: nobody new, tell the agents, wait, end.

use std::{
    mem,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::rand;
use nix::sys::resource::{Resource, getrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, watch},
    task::JoinHandle,
};

use crate::{
    acme, clock,
    cluster::Cluster,
    commands::quick_start::QuickStart,
    config::Config,
    credentials::{
        keyring::Purpose,
        signaled::Signaled,
        token::{AgentId, NewToken, Room, Scopes},
    },
    data_dir::DataDir,
    door::{self, Door, ToRelay, admission::Admission},
    host::{Host, Relays, raise_descriptor_limit},
    http::{
        self, Entrance, Front, Operator,
        ice::{IceOffer, ice_list},
        websocket::exchange::Exchange,
    },
    logging, metrics,
    relay::{
        Kernel, Relay, RelayConfig,
        xdp::{self, Attachments},
    },
    revoking::Revoking,
    signaling::nodes::NodeId,
    systemd,
    turn::{
        nonce::Nonces,
        policy::{LivePorts, Policy},
        quota::Quotas,
        strangers::Strangers,
    },
};

mod certificates; // which one is presented, and who keeps it fresh
mod clocks; // notices when the wall's is set
mod keys; // what the instance keeps secret, and whom it trusts
mod listeners; // the sockets that the outside reaches
mod reload; // what changes while it runs
mod upgrade; // another version takes over while allocations live
mod watchdog; // every part answers, or the service manager starts us anew

use certificates::Keeping;
use keys::Keys;
use listeners::{Handed, Listeners, addresses};
use reload::Live;
use upgrade::{Inheritance, Predecessor, Program, Successor};
use watchdog::Vitals;

/// How often a draining instance looks whether it may end.
const DRAIN_LOOK: Duration = Duration::from_millis(200);

/// Reads the configuration again, with the same flags and environment. What is wrong with it is a line each.
pub type Reread<'a> = &'a dyn Fn() -> Result<Config, Vec<String>>;

/// Runs the appliance until it is told to stop.
///
/// # Errors
/// One line for people.
pub fn serve(config: Config, log: &logging::Filter, reread: Reread<'_>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    let outcome = runtime.block_on(run(config, log, reread));
    // Connections that outlived the drain are cut, not waited for.
    runtime.shutdown_background();
    outcome
}

async fn run(config: Config, log: &logging::Filter, reread: Reread<'_>) -> Result<(), String> {
    let descriptors = raise_descriptor_limit();
    let mut signals = Signals::new()?;
    let program = Program::this().map_err(|error| format!("cannot find this program: {error}"))?;
    let predecessor = Predecessor::of_this();
    let inheritance = match &predecessor {
        Some(predecessor) => predecessor.bequeath()?,
        None => Inheritance::of_systemd()?,
    };
    let prepared = Prepared::new(config, inheritance)?;
    tell_descriptors(descriptors);
    if let Some(predecessor) = &predecessor {
        predecessor.relieve()?;
        // Who was revoked there until a moment ago.
        prepared.live.keys.recall(&prepared.live.config)?;
    }
    let mut appliance = prepared.serve().await?;
    let mut new_certificate = appliance.live.keeping.certificates.changes();
    let mut successor = None;
    loop {
        match signals.next(&appliance.operator.drain, &mut new_certificate).await {
            Told::Reload => appliance.live.reload(log, reread),
            Told::NewCertificate => appliance.live.follow_certificate(),
            Told::Upgrade => match appliance.upgrade(&program, predecessor.as_ref()) {
                Ok(started) => break successor = Some(started),
                Err(why) => tracing::error!("no upgrade, and this process goes on: {why}"),
            },
            Told::Stop => break,
        }
    }
    match successor {
        Some(successor) => appliance.follow(successor, signals).await,
        None => appliance.drain(signals).await,
    }
}

/// All parts, with their sockets; nobody is let in yet.
struct Prepared {
    live: Live,
    listeners: Listeners,
    exchange: Arc<Exchange>,
    ready: Arc<AtomicBool>,
}

impl Prepared {
    fn new(config: Config, inheritance: Inheritance) -> Result<Self, String> {
        let host = Host::look().map_err(|error| format!("cannot list this host's addresses: {error}"))?;
        let relays = Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips);
        let keys = Keys::of(&config)?;
        let keeping = Keeping::new(&config, &relays)?;

        let listeners = Listeners::open(&config, Handed::new(inheritance.listeners)?)?;
        relays.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let https = addresses(&listeners.https)[0].port();
        let signaled = Signaled::default();
        let policy = policy(&config, &host, &relays, listeners.others_than_turn(), &signaled);
        let relay_config = relay_config(&config, &keys, policy);
        let strangers = relay_config.strangers.clone();
        let datagrams = listeners.datagrams().map_err(|error| format!("cannot listen: {error}"))?;
        let relay = Arc::new(Relay::start(relay_config, datagrams, inheritance.links)?);
        // What is really served, and so what ICE lists may name.
        let turns = (!keeping.is_self_signed()).then_some(https);
        let offer = IceOffer::new(&config, &relays, relay.listening().iter().map(SocketAddr::port), turns);

        let ready = Arc::new(AtomicBool::new(true));
        let terms = keys.terms(&config, &offer, &signaled);
        let freeing = Arc::clone(&relay);
        let data_dir = DataDir::new(&config.data_dir);
        let revoking = Revoking::new(keys.revocations.clone(), data_dir, move |agent| freeing.revoke(agent));
        let front = Front::new(terms, config.signaling.limits(), revoking, Arc::clone(&ready));
        let admission = Admission::new(&config.http, connections_at_most());
        let door = Door::new(admission, keeping.certificates.server_config(), door::HANDSHAKE);
        let exchange =
            Arc::new(Exchange::start().map_err(|error| format!("cannot start signaling: {error}"))?);
        let started = config.clone();
        let live =
            Live { started, config, keys, keeping, https, strangers, signaled, offer, relay, door, front };
        Ok(Self { live, listeners, exchange, ready })
    }

    /// Lets everybody in.
    async fn serve(self) -> Result<Appliance, String> {
        let Self { mut live, listeners, exchange, ready } = self;
        let nodes = Nodes::join(&live).await?;
        live.keeping.keep(&live.config);
        live.keys.follow();
        live.relay.use_kernel();
        let Live { relay, door, front, .. } = &live;
        let [public, admin, for_relay, for_acme] =
            listeners.streams().map_err(|error| format!("cannot listen: {error}"))?;
        let operator = Arc::new(operator(&live, &ready));
        let welcoming = Arc::clone(relay);
        let to_relay: ToRelay = Arc::new(move |client| welcoming.welcome(client));
        let (shutdown, down) = watch::channel(false);
        tokio::spawn(door::serve_relay(Arc::clone(door), for_relay, Arc::clone(&to_relay), down.clone()));
        for listener in for_acme {
            let (tokens, door) = (live.keeping.tokens.clone(), Arc::clone(door));
            tokio::spawn(acme::http01::serve(listener, tokens, door, live.https, down.clone()));
        }
        let vitals =
            Vitals { relay: Arc::clone(relay), front: Arc::clone(front), exchange: Arc::clone(&exchange) };
        let entrance = Entrance { door: Arc::clone(door), to_relay, exchange };
        let serving = tokio::spawn(http::serve(Arc::clone(front), public, entrance, down));
        let admin = tokio::spawn(http::serve_admin(Arc::clone(front), admin, Arc::clone(&operator)));

        let (https, turn) = (list(&addresses(&listeners.https)), list(relay.listening()));
        let (tls, admin_at) = (list(&addresses(&listeners.tls)), list(&addresses(&listeners.admin)));
        let acme = list(&addresses(&listeners.acme));
        tracing::info!(%https, %turn, %tls, %acme, admin = %admin_at, "ready");
        systemd::ready();
        tokio::spawn(watchdog::feed(vitals));
        tokio::spawn(clocks::watch());
        quick_start(&live);
        Ok(Appliance { live, listeners, operator, ready, shutdown, serving, admin, nodes })
    }
}

/// Everything that runs.
struct Appliance {
    live: Live,
    listeners: Listeners,
    operator: Arc<Operator>,
    ready: Arc<AtomicBool>,
    /// Turns true when nobody is let in any more.
    shutdown: watch::Sender<bool>,
    serving: JoinHandle<()>,
    admin: JoinHandle<()>,
    nodes: Option<Nodes>,
}

impl Appliance {
    /// Lets nobody in, tells everybody, and waits for those who are here.
    async fn drain(self, mut signals: Signals) -> Result<(), String> {
        let relay = self.live.relay;
        systemd::stopping();
        relay.drain();
        // Whoever connects now is to be refused, and not to wait.
        drop(self.listeners);
        close(&self.ready, &self.shutdown);
        wait_out(idle(self.serving, &relay), self.live.config.drain_timeout, &mut signals).await;
        if let Some(nodes) = self.nodes {
            nodes.leave().await;
        }
        Ok(())
    }

    /// Starts the next version. When this returns it is ready and reads the relay's listeners, and is not yet in charge.
    fn upgrade(&self, program: &Program, predecessor: Option<&Predecessor>) -> Result<Successor, String> {
        if let Some(before) = predecessor.filter(|before| before.lives()) {
            return Err(format!(
                "process {} has not ended its last allocation yet: wait for it, or end it",
                before.pid
            ));
        }
        let relay = &self.live.relay;
        tokio::task::block_in_place(|| {
            let mut successor = Successor::start(program, &self.listeners, relay.shards())?;
            let links = mem::take(&mut successor.links);
            match relay.hand_over(links) {
                Ok(()) => Ok(successor),
                Err(why) => {
                    // First: two would read the same listeners.
                    successor.end();
                    relay.go_on();
                    Err(why)
                }
            }
        })
    }

    /// The other process is in charge; this one goes on for those who hold an allocation.
    async fn follow(self, successor: Successor, mut signals: Signals) -> Result<(), String> {
        let Self { live, listeners, ready, shutdown, serving, admin, .. } = self;
        let (relay, pid) = (live.relay, successor.pid());
        admin.abort();
        live.keeping.stop();
        systemd::main_process(pid);
        drop(listeners);
        close(&ready, &shutdown);
        live.front.settle().await;
        let timeout = live.config.upgrade_timeout;
        tracing::info!(
            "process {pid} takes over; this one ends with its last allocation, in {} at most",
            humantime::format_duration(timeout)
        );
        let gone = tokio::task::spawn_blocking(successor.go());
        let mut left = pin!(idle(serving, &relay));
        tokio::select! {
            () = &mut left => return Ok(()),
            () = tokio::time::sleep(timeout) => {
                tracing::info!("the upgrade timeout is over");
                return Ok(());
            }
            () = signals.stop() => {}
            _ = gone => {
                relay.take_back();
                tracing::error!("process {pid} has ended, and nobody new is let in: start it again");
            }
        }
        wait_out(left, live.config.drain_timeout, &mut signals).await;
        Ok(())
    }
}

/// Waits until all have left, but no longer than `timeout`, and not for who is told again to stop.
async fn wait_out(left: impl Future<Output = ()>, timeout: Duration, signals: &mut Signals) {
    tracing::info!("draining for {} at most", humantime::format_duration(timeout));
    tokio::select! {
        () = left => {}
        () = tokio::time::sleep(timeout) => tracing::info!("the drain timeout is over"),
        () = signals.stop() => tracing::info!("told to stop again: not waiting any longer"),
    }
}

fn close(ready: &AtomicBool, shutdown: &watch::Sender<bool>) {
    ready.store(false, Ordering::Relaxed);
    // Whoever could hear this has ended: nothing is left to be told.
    let _ = shutdown.send(true);
}

/// Returns when nobody is here any more.
async fn idle(serving: JoinHandle<()>, relay: &Arc<Relay>) {
    let _ = serving.await;
    loop {
        // Counting waits for each shard's turn.
        let counting = Arc::clone(relay);
        let counters = tokio::task::spawn_blocking(move || counting.counters()).await;
        if counters.is_ok_and(|counters| counters.allocations == 0) {
            return;
        }
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}

/// The other nodes of a cluster.
struct Nodes {
    passing_on: JoinHandle<()>,
    leave: Arc<Notify>,
}

impl Nodes {
    /// This is one of many from now on, if there are others.
    async fn join(live: &Live) -> Result<Option<Self>, String> {
        let Some(config) = &live.config.cluster else { return Ok(None) };
        let mut random = [0; 8];
        rand::fill(&mut random).map_err(|_| "the operating system has no randomness")?;
        let node = NodeId(u64::from_ne_bytes(random));
        live.front.join_cluster(node, &config.name());
        let cluster = Cluster::start(config, Arc::clone(&live.front), node).await?;
        let leave = cluster.leave();
        Ok(Some(Self { passing_on: tokio::spawn(cluster.run()), leave }))
    }

    /// Returns when they have been told that this one has gone.
    async fn leave(self) {
        self.leave.notify_one();
        let _ = self.passing_on.await;
    }
}

fn operator(live: &Live, ready: &Arc<AtomicBool>) -> Operator {
    let Live { relay, door, front, keeping, .. } = live;
    let (relay, door, front) = (Arc::clone(relay), Arc::clone(door), Arc::clone(front));
    let (certificates, ready, started) =
        (Arc::clone(&keeping.certificates), Arc::clone(ready), clock::now().unix());
    let metrics = move || {
        let certificate_ends = certificates.facts().not_after;
        let instance =
            metrics::Instance { started, certificate_ends, draining: !ready.load(Ordering::Relaxed) };
        metrics::page(&instance, &relay.counters(), &door.counters(), &front.counters())
    };
    Operator { metrics: Box::new(metrics), drain: Notify::new() }
}

/// SIGTERM, or Ctrl-C; SIGHUP; SIGUSR2.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    user_2: Signal,
}

/// What the operator wants.
enum Told {
    Reload,
    /// Nobody told us that but ourselves.
    NewCertificate,
    Upgrade,
    Stop,
}

impl Signals {
    fn new() -> Result<Self, String> {
        let take = |kind| signal(kind).map_err(|error| format!("cannot take signals: {error}"));
        Ok(Self {
            terminate: take(SignalKind::terminate())?,
            interrupt: take(SignalKind::interrupt())?,
            hang_up: take(SignalKind::hangup())?,
            user_2: take(SignalKind::user_defined2())?,
        })
    }

    /// A signal, or `drain` on the operator's port.
    async fn next(&mut self, drain: &Notify, certificate: &mut watch::Receiver<()>) -> Told {
        tokio::select! {
            Ok(()) = certificate.changed() => Told::NewCertificate,
            _ = self.hang_up.recv() => Told::Reload,
            _ = self.user_2.recv() => Told::Upgrade,
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            () = drain.notified() => Told::Stop,
        }
    }

    async fn stop(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn policy(
    config: &Config,
    host: &Host,
    relays: &Relays,
    listeners: Vec<SocketAddr>,
    signaled: &Signaled,
) -> Policy {
    Policy {
        relays: relays.addresses.clone(),
        own_addresses: host.addresses.clone(),
        listeners,
        allow: config.turn.allow_peers.clone(),
        deny: config.turn.deny_peers.clone(),
        denied: config.turn.denied_peers,
        live: LivePorts::new(relays.addresses.len()),
        signaled: config.turn.signaled(signaled),
    }
}

/// The kernel's path, if it is wanted and can be had.
fn kernel(config: &Config, policy: &Policy) -> Option<Kernel> {
    let mode = config.turn.xdp?;
    let addresses = xdp::addresses(&policy.relays, &config.turn.listen);
    match xdp::load() {
        Ok((maps, object)) => {
            let maps = Arc::new(maps);
            let attachments = Attachments::new(&maps, object, mode, addresses);
            Some(Kernel { maps, attachments })
        }
        Err(why) => {
            tracing::warn!("turn.xdp: the kernel does not take the program, and user space relays: {why}");
            None
        }
    }
}

fn relay_config(config: &Config, keys: &Keys, policy: Policy) -> RelayConfig {
    let kernel = kernel(config, &policy);
    let accounts = kernel.as_ref().map(|kernel| kernel.maps.accounts()).unwrap_or_default();
    RelayConfig {
        ports: config.turn.relay_ports.clone(),
        policy,
        quotas: Quotas::sharing(config.turn.quotas(), accounts),
        strangers: Strangers::new(config.turn.unauthenticated_per_second),
        realm: config.turn.realm.clone(),
        secrets: keys.turn.clone(),
        nonces: Nonces::new(&keys.instance.derive(Purpose::Nonce)),
        revocations: keys.revocations.clone(),
        kernel,
    }
}

fn quick_start(live: &Live) {
    let Live { config, keys, offer, keeping, .. } = live;
    let Some(first) = offer.public_ips.first().copied() else { return };
    let host = offer.host_for(first, first);
    let agent = AgentId::parse("agent-1").expect("within the alphabet of agent ids");
    let hour = Duration::from_secs(3_600);
    let now = clock::now();
    let new =
        NewToken { agent, room: Room::main(), scopes: Scopes::default(), ttl: hour.min(config.auth.max_ttl) };
    let token = keys.tokens.mint(now, &new);
    let list = ice_list(offer, &keys.turn, now, new.agent.as_str(), hour, &host, &[]);
    let ice_urls: Vec<String> = list.ice_servers.into_iter().flat_map(|server| server.urls).collect();
    let to_trust = keeping.to_trust(config);
    let start = QuickStart {
        https: &format!("{host}:{}", live.https),
        ice_urls: &ice_urls,
        token: &token,
        agent: new.agent.as_str(),
        self_signed: to_trust.as_deref(),
    };
    start.print_on_terminal();
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Of all descriptors, what connections may take: the rest is for relay sockets, listeners and files.
fn connections_at_most() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1_024, |(soft, _)| soft);
    usize::try_from(limit / 4 * 3).unwrap_or(usize::MAX)
}

/// Not before all listeners are open: when one cannot be, that is all there is to say.
fn tell_descriptors(raised: nix::Result<u64>) {
    match raised {
        Ok(limit) => tracing::info!(
            "{limit} descriptors: {} for connections, the others for relayed addresses and files",
            connections_at_most()
        ),
        Err(error) => tracing::warn!("cannot raise the limit of open files: {error}"),
    }
}
