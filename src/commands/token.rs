//! `halfway token`: prints an agent's token.

use std::time::Duration;

use clap::Args;

use super::{Failure, print};
use crate::{
    clock::Now,
    config::{Config, parse},
    credentials::token::{AgentId, NewToken, Room, Scopes},
    data_dir::DataDir,
};

#[derive(Args)]
pub(super) struct Options {
    /// Who it is for: 1 to 128 of A-Za-z0-9._:@/-
    #[arg(value_parser = agent)]
    agent: AgentId,
    /// How long it is good for
    #[arg(long, default_value = "1h", value_parser = parse::lifetime)]
    ttl: Duration,
    /// The room where the agent meets others
    #[arg(long, default_value = "main", value_parser = room)]
    room: Room,
    /// What it allows: signal, ice, admin
    #[arg(long, default_value = "signal,ice", value_parser = scopes)]
    scope: Scopes,
}

pub(super) fn run(options: &Options, config: &Config, now: Now) -> Result<(), Failure> {
    let (ttl, max_ttl) = (options.ttl, config.auth.max_ttl);
    if ttl > max_ttl {
        let (ttl, max_ttl) = (in_one_unit(ttl), in_one_unit(max_ttl));
        let what =
            format!("--ttl {ttl} is longer than auth.max_ttl, {max_ttl}: such a token would be refused");
        return Err(Failure::Usage(what));
    }
    let keys = config.auth.token_keys(|| DataDir::new(&config.data_dir).secret())?;
    let token =
        NewToken { agent: options.agent.clone(), room: options.room.clone(), scopes: options.scope, ttl };
    print(&keys.mint(now, &token))
}

/// As people write it: in the largest unit that loses nothing.
fn in_one_unit(time: Duration) -> String {
    let seconds = time.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "m")];
    let unit = units.iter().find(|(length, _)| seconds.is_multiple_of(*length));
    unit.map_or_else(|| format!("{seconds}s"), |(length, name)| format!("{}{name}", seconds / length))
}

pub(super) fn agent(text: &str) -> Result<AgentId, &'static str> {
    AgentId::parse(text).ok_or(NAME)
}

fn room(text: &str) -> Result<Room, &'static str> {
    Room::parse(text).ok_or(NAME)
}

const NAME: &str = "must be 1 to 128 of A-Za-z0-9._:@/-";

fn scopes(text: &str) -> Result<Scopes, String> {
    match Scopes::parse(text) {
        Ok(Scopes::NONE) => Err("names no scope".to_owned()),
        parsed => parsed.map_err(|unknown| format!("`{unknown}` is none of signal, ice, admin")),
    }
}
