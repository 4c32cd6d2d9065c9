//! Builds and joins all parts; the one place that knows everybody.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    time::Duration,
};

use crate::{
    clock,
    commands::quick_start::QuickStart,
    config::Config,
    credentials::token::{AgentId, NewToken, Room, Scopes},
    data_dir::DataDir,
    host::{Host, Relays},
    systemd,
    tls::{Certificate, self_signed},
};

/// Runs the appliance until it is told to stop.
///
/// # Errors
/// One line for people.
pub fn serve(config: Config) -> Result<(), String> {
    let now = clock::now();
    let host = Host::look().map_err(|error| format!("cannot list this host's addresses: {error}"))?;
    let relays = Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips);
    relays.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let data_dir = DataDir::new(&config.data_dir);
    data_dir.secret_or_new().map_err(|error| error.to_string())?;
    let token_keys = config.auth.token_keys(|| data_dir.secret()).map_err(|error| error.to_string())?;
    let mut addresses: Vec<IpAddr> = relays.addresses.iter().map(|relay| relay.public).collect();
    addresses.extend(config.http.listen.iter().map(SocketAddr::ip));
    let names = self_signed::names(config.public_host.as_deref(), &addresses);
    let certificate = match &config.http.certificate {
        Some((cert, key)) => Certificate::from_files(cert, key)?,
        None => data_dir.certificate(now, &names).map_err(|error| error.to_string())?,
    };
    let mut listeners = Vec::new();
    for listen in &config.http.listen {
        let listener = TcpListener::bind(listen)
            .map_err(|error| format!("http.listen: cannot bind {listen}: {error}"))?;
        listeners.push(listener);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let kind = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(kind).map_err(|error| error.to_string())?;
        tracing::info!("ready");
        systemd::ready();
        let own_cert = data_dir.cert_path();
        QuickStart {
            https: &format!("{}:{}", names[0].replace("localhost", "127.0.0.1"), 8443),
            ice_urls: &[],
            token: &token_keys.mint(
                now,
                &NewToken {
                    agent: AgentId::parse("agent-1").expect("a plain name"),
                    room: Room::main(),
                    scopes: Scopes::default(),
                    ttl: Duration::from_secs(3600),
                },
            ),
            agent: "agent-1",
            self_signed: certificate.self_signed.then_some(own_cert.as_path()),
        }
        .print_on_terminal();
        terminate.recv().await;
        Ok(())
    })
}
