//! `halfway bench`: load, and what it costs the server.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use hyper::Uri;

use super::{Failure, print};
use crate::{
    bench::{
        Report,
        signal::{self, Load, Protocol, Run},
        turn,
    },
    config::{Config, parse},
    credentials::turn_rest::{TurnSecrets, TurnUser},
    data_dir::DataDir,
};

#[derive(Args)]
pub(super) struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Agents over WSS: idle, offers and answers in pairs, messages to a room, reconnection of all
    Signal(SignalOptions),
    /// Clients of a TURN server, this one or another: packets each way, round trips, allocations that come and go
    Turn(TurnOptions),
}

#[derive(Args)]
struct SignalOptions {
    /// The server, or the nodes of a cluster: the two of a pair are then at different ones
    #[arg(value_name = "URL", default_value = "https://127.0.0.1:8443")]
    urls: Vec<Uri>,
    /// What to measure (repeatable) [default: all that the server's protocol has]
    #[arg(long, value_name = "RUN", value_delimiter = ',')]
    run: Vec<Run>,
    /// Whose server it is
    #[arg(long, value_name = "WHOSE", default_value = "halfway")]
    protocol: Protocol,
    /// How many agents; in pairs, two of them are one; a room holds `signaling.presence_limit` of them at most
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    agents: usize,
    /// Bytes passed on in each frame
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    size: usize,
    /// Frames under way between each pair
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    in_flight: usize,
    /// Frames a second of all pairs together; 0 is as many as there can be
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    rate: u64,
    #[command(flatten)]
    measuring: Measuring,
}

/// What all of them have.
#[derive(Args)]
struct Measuring {
    /// How long each run lasts
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::lifetime)]
    time: Duration,
    /// The server's process, if it runs here: its CPU and memory
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// The certificate to trust [default: cert.pem in the data directory]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Prints JSON instead of a table
    #[arg(long)]
    json: bool,
}

impl Measuring {
    fn ca(&self, config: &Config) -> PathBuf {
        self.ca.clone().unwrap_or_else(|| DataDir::new(&config.data_dir).cert_path())
    }

    fn show(&self, report: &Report) -> Result<(), Failure> {
        print(&if self.json { report.json().to_string() } else { report.table() })
    }
}

#[derive(Args)]
struct TurnOptions {
    /// The server: turn:HOST[:PORT][?transport=udp|tcp] or turns:HOST[:PORT]
    #[arg(default_value = "turn:127.0.0.1:3478")]
    uri: turn::Uri,
    /// What to measure (repeatable)
    #[arg(
        long,
        value_name = "RUN",
        value_delimiter = ',',
        default_value = "to-peer,to-client,pair,ping,churn"
    )]
    run: Vec<turn::Run>,
    /// The user of all clients
    #[arg(long, value_name = "NAME", requires = "password")]
    user: Option<String>,
    /// Its password
    #[arg(long, value_name = "PASSWORD")]
    password: Option<String>,
    /// The server's shared secret: each client has a user of its own [default: that of this host's configuration or data
    /// directory]
    #[arg(long, value_name = "SECRET")]
    secret: Option<String>,
    /// How many clients
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    clients: u32,
    /// Bytes of each packet's payload
    #[arg(long, value_name = "BYTES", default_value_t = 160, value_parser = clap::value_parser!(u16).range(20..=65_000))]
    size: u16,
    /// Packets a second of all clients together; 0 is as many as there can be
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    rate: u64,
    /// Senders give the kernel trains of packets (UDP_SEGMENT)
    #[arg(long)]
    gso: bool,
    /// Packets that a client sends in a row before it is the next one's turn; with 1 they alternate one by one
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=512))]
    burst: u16,
    /// Where the peers listen [default: this host's address towards the server]
    #[arg(long, value_name = "IP")]
    peer_ip: Option<IpAddr>,
    #[command(flatten)]
    measuring: Measuring,
}

pub(super) fn run(options: &Options, config: &Config) -> Result<(), Failure> {
    match &options.what {
        What::Signal(options) => signal(options, config),
        What::Turn(options) => turn(options, config),
    }
}

fn turn(options: &TurnOptions, config: &Config) -> Result<(), Failure> {
    let load = turn::Load {
        uri: options.uri.clone(),
        runs: options.run.clone(),
        credentials: credentials(options, config)?,
        clients: options.clients as usize,
        size: usize::from(options.size),
        rate: options.rate,
        trains: options.gso,
        burst: usize::from(options.burst),
        time: options.measuring.time,
        peer_ip: options.peer_ip,
        pid: options.measuring.pid,
        ca: options.measuring.ca(config),
        refresh: turn::REFRESH,
    };
    options.measuring.show(&turn::run(&load).map_err(Failure::Failed)?)
}

/// A user who is named wins; a variable that is empty says nothing.
fn credentials(options: &TurnOptions, config: &Config) -> Result<turn::Credentials, Failure> {
    if let (Some(user), Some(password)) = (&options.user, &options.password) {
        let user = TurnUser { username: user.clone(), credential: password.clone() };
        return Ok(turn::Credentials::User(user));
    }
    let given = options.secret.as_ref().filter(|secret| !secret.is_empty());
    let secrets = match given.and_then(|secret| TurnSecrets::new(&[secret])) {
        Some(secrets) => secrets,
        None => config.credentials.turn_secrets(|| DataDir::new(&config.data_dir).secret())?,
    };
    Ok(turn::Credentials::Secret(secrets))
}

fn signal(options: &SignalOptions, config: &Config) -> Result<(), Failure> {
    let data_dir = DataDir::new(&config.data_dir);
    let is_ours = options.protocol == Protocol::Halfway;
    let keys = is_ours.then(|| config.auth.token_keys(|| data_dir.secret())).transpose()?;
    let all = if is_ours {
        &[Run::Idle, Run::Pairs, Run::Room, Run::Find, Run::Storm][..]
    } else {
        &[Run::Idle, Run::Pairs]
    };
    // Only for who stops and starts the server meanwhile.
    let may = |run: &Run| all.contains(run) || (is_ours && *run == Run::Restart);
    if let Some(run) = options.run.iter().find(|run| !may(run)) {
        return Err(Failure::Usage(format!("--run {run:?}: the server's protocol has no such thing")));
    }
    let load = Load {
        urls: options.urls.clone(),
        runs: if options.run.is_empty() { all.to_vec() } else { options.run.clone() },
        protocol: options.protocol,
        agents: options.agents,
        time: options.measuring.time,
        size: options.size,
        in_flight: options.in_flight,
        rate: options.rate,
        pid: options.measuring.pid,
        ca: options.measuring.ca(config),
        keys,
    };
    options.measuring.show(&signal::run(&load).map_err(Failure::Failed)?)
}
