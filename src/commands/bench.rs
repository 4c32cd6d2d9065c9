//! `halfway bench`: load, and what it costs the server.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use hyper::Uri;

use super::{Failure, print};
use crate::{
    bench::signal::{self, Load, Protocol, Run},
    config::{Config, parse},
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
}

#[derive(Args)]
struct SignalOptions {
    /// The server
    #[arg(default_value = "https://127.0.0.1:8443")]
    url: Uri,
    /// What to measure (repeatable) [default: all that the server's protocol has]
    #[arg(long, value_name = "RUN", value_delimiter = ',')]
    run: Vec<Run>,
    /// Whose server it is
    #[arg(long, value_name = "WHOSE", default_value = "halfway")]
    protocol: Protocol,
    /// How many agents; in pairs, two of them are one; a room holds `signaling.presence_limit` of them at most
    #[arg(long, value_name = "COUNT", default_value_t = 200)]
    agents: usize,
    /// How long each run lasts
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse::lifetime)]
    time: Duration,
    /// Bytes passed on in each frame
    #[arg(long, value_name = "BYTES", default_value_t = 512)]
    size: usize,
    /// Frames under way between each pair
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    in_flight: usize,
    /// Frames a second of all pairs together; 0 is as many as there can be
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    rate: u64,
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

pub(super) fn run(options: &Options, config: &Config) -> Result<(), Failure> {
    let What::Signal(options) = &options.what;
    let data_dir = DataDir::new(&config.data_dir);
    let is_ours = options.protocol == Protocol::Halfway;
    let keys = is_ours.then(|| config.auth.token_keys(|| data_dir.secret())).transpose()?;
    let all =
        if is_ours { &[Run::Idle, Run::Pairs, Run::Room, Run::Storm][..] } else { &[Run::Idle, Run::Pairs] };
    if let Some(run) = options.run.iter().find(|run| !all.contains(run)) {
        return Err(Failure::Usage(format!("--run {run:?}: the server's protocol has no such thing")));
    }
    let load = Load {
        url: options.url.clone(),
        runs: if options.run.is_empty() { all.to_vec() } else { options.run.clone() },
        protocol: options.protocol,
        agents: options.agents,
        time: options.time,
        size: options.size,
        in_flight: options.in_flight,
        rate: options.rate,
        pid: options.pid,
        ca: options.ca.clone().unwrap_or_else(|| data_dir.cert_path()),
        keys,
    };
    let report = signal::run(&load).map_err(Failure::Failed)?;
    print(&if options.json { report.json().to_string() } else { report.table() })
}
