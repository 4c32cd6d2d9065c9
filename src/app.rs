//! Builds and joins all parts; the one place that knows everybody.
//!
//! Start: keys, addresses, listeners, then `ready`. Stop: nobody new, tell the agents, wait, end.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

use crate::{
    clock,
    commands::quick_start::QuickStart,
    config::Config,
    credentials::{
        keyring::{InstanceSecret, Purpose},
        token::{AgentId, NewToken, Room, Scopes, TokenKeys},
        turn_rest::TurnSecrets,
    },
    data_dir::DataDir,
    door::{self, Door, ToRelay, admission::Admission},
    host::{Host, Relays, cannot_listen},
    http::{
        self, Entrance, Front,
        ice::{IceOffer, ice_list},
        websocket::exchange::Exchange,
    },
    metrics,
    relay::{Relay, RelayConfig},
    systemd,
    tls::{Certificate, self_signed},
    turn::{
        nonce::Nonces,
        policy::{LivePorts, Policy},
        quota::{Limits, Quotas},
        strangers::Strangers,
    },
};

/// How often a draining instance looks whether it may end.
const DRAIN_LOOK: Duration = Duration::from_millis(200);

/// Runs the appliance until it is told to stop.
///
/// # Errors
/// One line for people.
pub fn serve(config: Config) -> Result<(), String> {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    let outcome = runtime.block_on(run(&config));
    // Connections that outlived the drain are cut, not waited for.
    runtime.shutdown_background();
    outcome
}

async fn run(config: &Config) -> Result<(), String> {
    let mut stop = Stop::new()?;
    let host = Host::look().map_err(|error| format!("cannot list this host's addresses: {error}"))?;
    let relays = Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips);
    relays.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let keys = Keys::of(config, &relays)?;

    let public = bind(&config.http.listen, "HTTPS", "--http-listen")?;
    let admin = bind(&config.admin.listen, "the operator (/metrics)", "admin.listen")?;
    let mut streams = bind(&config.turn.tls_listen, "TURN over TLS", "turn.tls_listen")?;
    let (https_at, admin_at, tls_at) = (addresses(&public), addresses(&admin), addresses(&streams));
    let policy = policy(config, &host, &relays, [&https_at[..], &admin_at, &tls_at].concat());
    let (relay, over_tcp) = start_relay(&relay_config(config, &keys, policy), &https_at)?;
    let relay = Arc::new(relay);
    streams.extend(over_tcp);
    // What is really served, and so what ICE lists may name.
    let turns = keys.self_signed.is_none().then(|| https_at[0].port());
    let offer = IceOffer::new(config, &relays, relay.listening().iter().map(SocketAddr::port), turns);

    let ready = Arc::new(AtomicBool::new(true));
    let front = Front::new(config, keys.tokens.clone(), keys.turn.clone(), offer.clone(), Arc::clone(&ready));
    let admission = Admission::new(&config.http, connections_at_most());
    let door = Door::new(admission, Arc::clone(&keys.certificate.config), door::HANDSHAKE);
    let numbers = (Arc::clone(&relay), Arc::clone(&door), Arc::clone(&front));
    let metrics: http::Metrics =
        Arc::new(move || metrics::page(&numbers.0.counters(), &numbers.1.counters(), &numbers.2.counters()));
    let welcoming = Arc::clone(&relay);
    let to_relay: ToRelay = Arc::new(move |client| welcoming.welcome(client));
    let (shutdown, down) = watch::channel(false);
    tokio::spawn(door::serve_relay(Arc::clone(&door), streams, Arc::clone(&to_relay), down.clone()));
    let exchange = Arc::new(Exchange::start().map_err(|error| format!("cannot start signaling: {error}"))?);
    let entrance = Entrance { door, to_relay, exchange };
    let serving = tokio::spawn(http::serve(Arc::clone(&front), public, entrance, down));
    tokio::spawn(http::serve_admin(front, admin, metrics));

    let (https, turn, tls) = (list(&https_at), list(relay.listening()), list(&tls_at));
    tracing::info!(%https, %turn, %tls, admin = %list(&admin_at), "ready");
    systemd::ready();
    quick_start(config, &keys, &offer, https_at[0]);

    stop.asked().await;
    systemd::stopping();
    tracing::info!("draining for {} at most", humantime::format_duration(config.drain_timeout));
    ready.store(false, Ordering::Relaxed);
    relay.drain();
    // Whoever could hear this has ended: nothing is left to be told.
    let _ = shutdown.send(true);
    let idle = async {
        let _ = serving.await;
        while relay.counters().allocations > 0 {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    };
    tokio::select! {
        () = idle => {}
        () = tokio::time::sleep(config.drain_timeout) => tracing::info!("the drain timeout is over"),
        () = stop.asked() => tracing::info!("told to stop again: not waiting any longer"),
    }
    Ok(())
}

/// SIGTERM, or Ctrl-C.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self, String> {
        let take = |kind| signal(kind).map_err(|error| format!("cannot take signals: {error}"));
        Ok(Self { terminate: take(SignalKind::terminate())?, interrupt: take(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What the instance keeps secret, and shows.
struct Keys {
    instance: InstanceSecret,
    turn: TurnSecrets,
    tokens: TokenKeys,
    certificate: Certificate,
    /// What an agent on this host has to trust, if nobody else vouches for it.
    self_signed: Option<PathBuf>,
}

impl Keys {
    fn of(config: &Config, relays: &Relays) -> Result<Self, String> {
        let data_dir = DataDir::new(&config.data_dir);
        let instance = data_dir.secret_or_new().map_err(|error| error.to_string())?;
        let same = || Ok::<_, String>(instance.clone());
        let (turn, tokens) = (config.credentials.turn_secrets(same)?, config.auth.token_keys(same)?);
        let certificate = match &config.http.certificate {
            Some((cert, key)) => Certificate::from_files(cert, key)?,
            None => {
                let public: Vec<IpAddr> = relays.addresses.iter().map(|relay| relay.public).collect();
                let names = self_signed::names(config.public_host.as_deref(), &public);
                data_dir.certificate(clock::now(), &names).map_err(|error| error.to_string())?
            }
        };
        let self_signed = certificate.self_signed.then(|| match &config.http.certificate {
            Some((cert, _)) => cert.clone(),
            None => config.data_dir.join("cert.pem"),
        });
        Ok(Self { instance, turn, tokens, certificate, self_signed })
    }
}

fn policy(config: &Config, host: &Host, relays: &Relays, listeners: Vec<SocketAddr>) -> Policy {
    Policy {
        relays: relays.addresses.clone(),
        own_addresses: host.addresses.clone(),
        listeners,
        allow: config.turn.allow_peers.clone(),
        deny: config.turn.deny_peers.clone(),
        denied: config.turn.denied_peers,
        live: LivePorts::new(relays.addresses.len()),
    }
}

fn relay_config(config: &Config, keys: &Keys, policy: Policy) -> RelayConfig {
    RelayConfig {
        listen: config.turn.listen.clone(),
        shards: config.turn.shards,
        ports: config.turn.relay_ports.clone(),
        policy,
        quotas: Quotas::new(Limits {
            per_agent: config.turn.allocations_per_agent,
            total: config.turn.allocations_total,
            bytes_per_second: config.turn.bytes_per_second_per_agent,
        }),
        strangers: Strangers::new(config.turn.unauthenticated_per_second),
        realm: config.turn.realm.clone(),
        secrets: keys.turn.clone(),
        nonces: Nonces::new(&keys.instance.derive(Purpose::Nonce)),
    }
}

fn quick_start(config: &Config, keys: &Keys, offer: &IceOffer, https: SocketAddr) {
    let Some(first) = offer.public_ips.first().copied() else { return };
    let host = offer.host_for(first, first);
    let agent = AgentId::parse("agent-1").expect("within the alphabet of agent ids");
    let hour = Duration::from_secs(3_600);
    let now = clock::now();
    let new =
        NewToken { agent, room: Room::main(), scopes: Scopes::default(), ttl: hour.min(config.auth.max_ttl) };
    let token = keys.tokens.mint(now, &new);
    let list = ice_list(offer, &keys.turn, now, new.agent.as_str(), hour, &host);
    let ice_urls: Vec<String> = list.ice_servers.into_iter().flat_map(|server| server.urls).collect();
    let start = QuickStart {
        https: &format!("{host}:{}", https.port()),
        ice_urls: &ice_urls,
        token: &token,
        agent: new.agent.as_str(),
        self_signed: keys.self_signed.as_deref(),
    };
    start.print_on_terminal();
}

/// Where the kernel chooses the port, the one that is free for UDP may be taken for TCP: then another is asked for.
const TRIES: usize = 8;

/// The relay, and its listeners on TCP at the same addresses; an HTTPS port serves relay clients as well.
fn start_relay(config: &RelayConfig, https_at: &[SocketAddr]) -> Result<(Relay, Vec<TcpListener>), String> {
    let is_chosen = config.listen.iter().any(|at| at.port() == 0);
    let mut tries = if is_chosen { TRIES } else { 1 };
    loop {
        let relay = Relay::start(config.clone())?;
        let others: Vec<_> = relay.listening().iter().copied().filter(|at| !https_at.contains(at)).collect();
        tries -= 1;
        match bind(&others, "TURN over TCP", "--turn-listen") {
            Ok(listeners) => return Ok((relay, listeners)),
            Err(error) if tries == 0 => return Err(error),
            Err(_) => {}
        }
    }
}

fn bind(listen: &[SocketAddr], what: &str, setting: &str) -> Result<Vec<TcpListener>, String> {
    let bind = |at: &SocketAddr| bind_tcp(*at).map_err(|error| cannot_listen(what, *at, setting, &error));
    listen.iter().map(bind).collect()
}

fn bind_tcp(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    if at.is_ipv6() {
        // `[::]` is for both families, as everywhere in the configuration.
        socket.set_only_v6(!at.ip().is_unspecified())?;
    }
    // A restart must not wait for the last connections' TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    socket.listen(1_024)?;
    TcpListener::from_std(socket.into())
}

fn addresses(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Of all descriptors, what connections may take: the rest is for relay sockets, listeners and files.
fn connections_at_most() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1_024, |(soft, _)| soft);
    usize::try_from(limit / 4 * 3).unwrap_or(usize::MAX)
}

/// Each allocation and each connection is a descriptor; the soft limit is for programs that use `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
}
