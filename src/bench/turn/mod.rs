//! A TURN server under load, ours or another: packets each way, round trips, allocations that come and go or only are.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    time::{Duration, Instant},
};

use rustls::pki_types::ServerName;

use self::crowd::{Crowd, Lane, Wish};
use super::{Report, Server, machine_cpu, now, progress, trust, warn};
use crate::{
    clock,
    credentials::turn_rest::{TurnSecrets, TurnUser},
    host::raise_descriptor_limit,
};

mod allocations; // churn and idle: allocations themselves
pub(crate) mod client; // the client's state machine
mod crowd; // clients and peers, on one thread
mod packets; // to-peer, to-client and pair: what becomes of packets
mod ping; // round trips
mod stamp; // what each packet carries, and latencies
mod target; // the server, by its URI
mod traffic; // who sends, and when

pub use self::target::{Transport, Uri};

/// Allocations and channels are refreshed this often; permissions would last for 5 minutes (RFC 8656 §9).
pub const REFRESH: Duration = Duration::from_mins(4);

/// How much longer than a load users of a shared secret are good for.
const SPARE_LIFETIME: Duration = Duration::from_hours(24);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Run {
    /// Clients send through their channels, peers count
    ToPeer,
    /// Peers send to the relayed addresses, clients count
    ToClient,
    /// Clients send to each other, two and two, both ways
    Pair,
    /// Peers send to each other, without a relay: what the packets cost by themselves
    Direct,
    /// One packet of each client to its peer and back
    Ping,
    /// Allocate, bind a channel, release, over and over
    Churn,
    /// Memory and processor time of allocations that are only there
    Idle,
}

impl Run {
    /// As it is asked for.
    fn name(self) -> &'static str {
        match self {
            Self::ToPeer => "to-peer",
            Self::ToClient => "to-client",
            Self::Pair => "pair",
            Self::Direct => "direct",
            Self::Ping => "ping",
            Self::Churn => "churn",
            Self::Idle => "idle",
        }
    }
}

/// Whose credentials clients have.
#[derive(Clone, Debug)]
pub enum Credentials {
    /// All the same. The password is secret.
    User(TurnUser),
    /// Each its own, `bench-N`: quotas of one are not in the way.
    Secret(TurnSecrets),
}

/// The load.
#[derive(Clone, Debug)]
pub struct Load {
    pub uri: Uri,
    pub runs: Vec<Run>,
    pub credentials: Credentials,
    pub clients: usize,
    /// Bytes of each payload, 20 at least.
    pub size: usize,
    /// Packets a second of all clients together; 0 is as many as there can be.
    pub rate: u64,
    /// Senders give the kernel trains of packets.
    pub trains: bool,
    /// Packets that one sender sends in a row; with 1, those of different senders alternate.
    pub burst: usize,
    pub time: Duration,
    /// Where peers listen.
    pub peer_ip: Option<IpAddr>,
    pub pid: Option<u32>,
    /// The certificate to trust.
    pub ca: PathBuf,
    /// How often allocations and channels are refreshed.
    pub refresh: Duration,
}

/// Runs it.
///
/// # Errors
/// One line for people.
pub fn run(load: &Load) -> Result<Report, String> {
    // Each client is a descriptor and its peer another. If the limit cannot be raised, what is there may do.
    let _ = raise_descriptor_limit();
    let bench = Bench::new(load)?;
    let mut report = Report::default();
    for (number, run) in load.runs.iter().enumerate() {
        // Two phases each.
        let phase = bench.first_phase.wrapping_add(2 * number as u32);
        match run {
            Run::ToPeer | Run::ToClient | Run::Pair | Run::Direct => {
                packets::run(&bench, *run, phase, &mut report)
            }
            Run::Ping => ping::run(&bench, phase, &mut report),
            Run::Churn => allocations::churn(&bench, &mut report),
            Run::Idle => allocations::idle(&bench, &mut report),
        }
        .map_err(|error| {
            progress("");
            format!("{}: {error}", run.name())
        })?;
        progress("");
    }
    Ok(report)
}

/// What all runs have of a load.
struct Bench<'l> {
    load: &'l Load,
    server: crowd::Server,
    peer_ip: IpAddr,
    /// By which stray packets of another load are known.
    first_phase: u32,
    /// When users of a shared secret expire, in Unix seconds.
    expires: u64,
}

impl<'l> Bench<'l> {
    fn new(load: &'l Load) -> Result<Self, String> {
        let address = load.uri.resolve()?;
        let lane = match load.uri.transport {
            Transport::Udp => Lane::Udp,
            Transport::Tcp => Lane::Tcp,
            Transport::Tls => {
                let name = ServerName::try_from(load.uri.host.clone());
                Lane::Tls(trust(&load.ca)?, name.map_err(|error| format!("{}: {error}", load.uri.host))?)
            }
        };
        let server = crowd::Server { name: load.uri.to_string(), address, lane };
        let peer_ip = match load.peer_ip {
            Some(ip) => ip,
            None => own_address(address).map_err(|error| format!("no way to {address}: {error}"))?,
        };
        let mut random = [0; 4];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| "the system has no randomness to give".to_owned())?;
        let runs = load.time * load.runs.len() as u32;
        let expires = clock::now().unix() + (runs + SPARE_LIFETIME).as_secs();
        Ok(Self { load, server, peer_ip, first_phase: u32::from_ne_bytes(random), expires })
    }

    /// Peers that listen, and room for clients.
    fn crowd(&self, clients: usize) -> Result<Crowd<'_>, String> {
        let Load { size, trains, refresh, .. } = *self.load;
        let wish = Wish { clients, peer_ip: self.peer_ip, size, trains, refresh };
        Crowd::new(&self.server, Box::new(|number| self.user(number)), &wish)
    }

    fn user(&self, number: usize) -> TurnUser {
        match &self.load.credentials {
            Credentials::User(user) => user.clone(),
            Credentials::Secret(secrets) => secrets.mint(&format!("bench-{number}"), self.expires),
        }
    }

    fn under_load(&self) -> Option<Server> {
        self.load.pid.map(|pid| Server { pid })
    }

    /// What comes first and does not count.
    fn warm_up(&self) -> Duration {
        if self.load.time >= Duration::from_secs(3) {
            Duration::from_secs(1)
        } else {
            Duration::from_millis(300)
        }
    }
}

/// Where this host leaves for another. No packet is sent.
fn own_address(server: SocketAddr) -> std::io::Result<IpAddr> {
    let any = if server.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    Ok(socket.local_addr()?.ip())
}

/// Processor time used until then.
#[derive(Clone, Copy)]
struct Spent {
    at: Instant,
    server: Option<Duration>,
    own: Option<Duration>,
    machine: Option<Duration>,
}

impl Spent {
    fn read(bench: &Bench<'_>) -> Self {
        let server = bench.under_load().and_then(Server::cpu);
        Self { at: now(), server, own: Server::own().cpu(), machine: machine_cpu() }
    }

    /// Between two readings.
    fn since(self, before: Self) -> Share {
        let seconds = |now: Option<Duration>, then: Option<Duration>| {
            now.zip(then).map(|(now, then)| now.saturating_sub(then).as_secs_f64())
        };
        Share {
            seconds: (self.at - before.at).as_secs_f64(),
            server: seconds(self.server, before.server),
            own: seconds(self.own, before.own),
            machine: seconds(self.machine, before.machine),
        }
    }
}

/// Seconds, and processor seconds in them.
#[derive(Clone, Copy)]
struct Share {
    seconds: f64,
    server: Option<f64>,
    own: Option<f64>,
    machine: Option<f64>,
}

impl Share {
    /// Of one core.
    fn server_percent(self) -> Option<f64> {
        self.server.map(|server| 100.0 * server / self.seconds)
    }

    fn own_percent(self) -> Option<f64> {
        self.own.map(|own| 100.0 * own / self.seconds)
    }

    fn add_percents(self, run: Run, report: &mut Report) {
        if let Some(percent) = self.server_percent() {
            report.add(run.name(), "serverCpuPercent", "of a core, the server", percent, "%");
        }
        if let Some(percent) = self.own_percent() {
            report.add(run.name(), "ownCpuPercent", "of a core, this load", percent, "%");
        }
    }
}

/// Says that the figures are of the load and not of the server.
fn warn_of_limit(run: Run, why: &str) {
    warn(&format!("{}: this load was the limit, not the server: {why}", run.name()));
}
