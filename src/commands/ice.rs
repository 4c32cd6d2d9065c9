//! `halfway ice`: prints the ICE list of an agent, from the secret alone.

use std::{net::SocketAddr, time::Duration};

use clap::Args;

use super::{Failure, Settings, host, print, token};
use crate::{
    acme,
    clock::Now,
    config::{Config, parse},
    credentials::{revocations::Revocations, token::AgentId},
    data_dir::DataDir,
    host::Relays,
    http::ice::{IceOffer, ice_list},
    revoking,
};

#[derive(Args)]
pub(super) struct Options {
    /// Whose user name it will be
    #[arg(value_parser = token::agent, default_value = "agent")]
    agent: AgentId,
    /// How long the credentials are good for [default: credentials.ttl]
    #[arg(long, value_parser = parse::lifetime)]
    ttl: Option<Duration>,
    #[command(flatten)]
    _settings: Settings,
}

pub(super) fn run(options: &Options, config: &Config, now: Now) -> Result<(), Failure> {
    let data_dir = DataDir::new(&config.data_dir);
    let secrets = config.credentials.turn_secrets(|| data_dir.secret())?;
    let relays = Relays::resolve(&host()?, &config.turn.relay_ips, &config.public_ips);
    let offer = offer(config, &relays)?;
    let ttl = offer.lifetime(options.ttl, Duration::MAX);
    let agent = options.agent.as_str();
    refuse_revoked(&data_dir, now, agent, ttl)?;
    // Nobody asks over a connection whose family would decide: the first public address does.
    let first = offer.public_ips[0];
    let list = ice_list(&offer, &secrets, now, agent, ttl, &offer.host_for(first, first), &[]);
    let body = serde_json::to_string_pretty(&list).expect("plain strings and numbers become JSON");
    print(&body)
}

/// The running instance takes none of a revoked agent's that it has not handed out itself.
fn refuse_revoked(data_dir: &DataDir, now: Now, agent: &str, ttl: Duration) -> Result<(), Failure> {
    let revocations = Revocations::default();
    revoking::recall(&revocations, data_dir).map_err(Failure::Failed)?;
    if revocations.refuse_user(now, agent, now.unix().saturating_add(ttl.as_secs())) {
        return Err(Failure::Failed(format!(
            "{agent} was revoked: give it a new token, and let it ask the running instance's /v1/ice"
        )));
    }
    Ok(())
}

/// What an instance of this configuration serves, as far as that can be known without it.
fn offer(config: &Config, relays: &Relays) -> Result<IceOffer, Failure> {
    let turns = certificate_is_trusted(config).then(|| config.http.listen[0].port());
    let offer = IceOffer::new(config, relays, config.turn.listen.iter().map(SocketAddr::port), turns);
    if offer.public_ips.is_empty() {
        return Err(Failure::Failed(relays.warnings.join("; ")));
    }
    if offer.turn_ports.contains(&0) || offer.turns_port == Some(0) {
        return Err(Failure::Failed(
            "port 0 in turn.listen or http.listen is known only to the running instance: ask its /v1/ice"
                .to_owned(),
        ));
    }
    Ok(offer)
}

/// The one that is made where none is configured is not.
fn certificate_is_trusted(config: &Config) -> bool {
    let files = config.http.certificate.as_ref().and_then(|files| files.read().ok());
    let obtained = || acme::stored(&DataDir::new(&config.data_dir), config.http.acme.as_ref()?);
    files.or_else(obtained).is_some_and(|certificate| !certificate.is_self_signed())
}
