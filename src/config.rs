//! File, environment and flags resolved once into a [`Config`] with no "maybe" left.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

/// All of it. Each part of the program gets the few values it needs from `app`.
#[derive(Clone, Debug)]
pub struct Config {
    pub data_dir: PathBuf,
    /// The name in ICE URLs; `None`: our public address in the asking request's family.
    pub public_host: Option<String>,
    /// What peers see, as configured; empty: the addresses of the default routes.
    pub public_ips: Vec<IpAddr>,
    pub drain_timeout: Duration,
    pub http: Http,
    pub turn: Turn,
    pub credentials: Credentials,
    pub auth: Auth,
    pub signaling: Signaling,
    pub admin: Admin,
    pub log: Log,
}

#[derive(Clone, Debug)]
pub struct Http {
    pub listen: Vec<SocketAddr>,
    /// Certificate and key; `None`: self-signed, in the data dir.
    pub certificate: Option<(PathBuf, PathBuf)>,
    pub allowed_origins: Vec<String>,
    /// 0 is unlimited, here and in every limit below.
    pub connections_per_address: u32,
    pub handshakes_per_second_per_address: u32,
    pub connections_total: u32,
}

#[derive(Clone, Debug)]
pub struct Turn {
    pub listen: Vec<SocketAddr>,
    pub realm: String,
    pub relay_ips: Vec<IpAddr>,
    pub relay_ports: std::ops::RangeInclusive<u16>,
    /// Never 0: resolved to the number of cores.
    pub shards: usize,
    pub allow_peers: Vec<IpNet>,
    pub deny_peers: Vec<IpNet>,
    pub denied_peers: crate::turn::policy::DeniedPeers,
    pub allocations_per_agent: u32,
    pub allocations_total: u32,
}

#[derive(Clone, Debug)]
pub struct Credentials {
    /// Empty: derived from the data dir's secret.
    pub secrets: Vec<String>,
    pub ttl: Duration,
    pub max_ttl: Duration,
}

#[derive(Clone, Debug)]
pub struct Auth {
    /// Empty: derived from the data dir's secret.
    pub secrets: Vec<String>,
    pub max_ttl: Duration,
}

#[derive(Clone, Debug)]
pub struct Signaling {
    pub resume_window: Duration,
    pub window_messages: usize,
    pub window_bytes: usize,
    pub max_frame: usize,
    pub messages_per_second: u32,
    pub burst: u32,
    pub presence_limit: usize,
}

#[derive(Clone, Debug)]
pub struct Admin {
    pub listen: Vec<SocketAddr>,
}

#[derive(Clone, Debug)]
pub struct Log {
    pub filter: String,
    pub json: bool,
}
