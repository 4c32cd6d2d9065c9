//! Builds and joins all parts; the one place that knows everybody.
//!
//! Start: keys, addresses, relay, listeners, then `ready`. Stop: nobody new, tell the agents, wait, end.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    clock,
    config::Config,
    credentials::keyring::Purpose,
    data_dir::DataDir,
    host::{Host, Relays},
    relay::{Relay, RelayConfig},
    systemd,
    turn::{
        RelayAddress,
        nonce::Nonces,
        policy::{LivePorts, Policy},
        quota::Quotas,
    },
};

/// How often a draining instance looks whether it may end.
const DRAIN_LOOK: Duration = Duration::from_millis(200);

/// Runs the appliance until it is told to stop.
///
/// # Errors
/// One line for people.
pub fn serve(config: Config) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> Result<(), String> {
    let mut terminate =
        signal(SignalKind::terminate()).map_err(|error| format!("cannot take SIGTERM: {error}"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(|error| format!("cannot take SIGINT: {error}"))?;
    let host = Host::look().map_err(|error| format!("cannot list this host's addresses: {error}"))?;
    let relays = Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips);
    relays.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let secret = DataDir::new(&config.data_dir).secret_or_new().map_err(|error| error.to_string())?;
    let secrets = config.credentials.turn_secrets(|| Ok::<_, String>(secret.clone()))?;
    let relay = Relay::start(RelayConfig {
        listen: config.turn.listen.clone(),
        shards: config.turn.shards,
        ports: config.turn.relay_ports.clone(),
        policy: policy(&config, &host, &relays),
        quotas: Quotas::new(config.turn.allocations_per_agent, config.turn.allocations_total),
        realm: config.turn.realm.clone(),
        secrets,
        nonces: Nonces::new(&secret.derive(Purpose::Nonce)),
    })?;
    tracing::info!(turn = ?relay.listening(), "ready");
    systemd::ready();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    systemd::stopping();
    drain(&relay, config.drain_timeout).await;
    Ok(())
}

fn policy(config: &Config, host: &Host, relays: &Relays) -> Policy {
    let addresses = relays.addresses.iter();
    Policy {
        relays: addresses.map(|relay| RelayAddress { bound: relay.bound, public: relay.public }).collect(),
        own_addresses: host.addresses.clone(),
        listeners: [&config.http.listen[..], &config.admin.listen].concat(),
        allow: config.turn.allow_peers.clone(),
        deny: config.turn.deny_peers.clone(),
        denied: config.turn.denied_peers,
        live: LivePorts::new(relays.addresses.len()),
    }
}

async fn drain(relay: &Relay, timeout: Duration) {
    relay.drain();
    let until = clock::now().mono + timeout;
    while clock::now().mono < until && relay.counters().await.allocations > 0 {
        tokio::time::sleep(DRAIN_LOOK).await;
    }
}
