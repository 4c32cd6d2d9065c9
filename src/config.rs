//! File, environment and flags resolved once into a [`Config`] with no "maybe" left.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;

use crate::{
    credentials::{
        issuer::PublicKeys,
        keyring::{InstanceSecret, Purpose},
        signaled::Signaled,
        token::TokenKeys,
        turn_rest::TurnSecrets,
    },
    jwks,
    relay::xdp::Mode,
    signaling::limits::{HEARTBEAT, Limits, Rate},
    tls::{self, files::Files},
    turn::{
        policy::{DeniedPeers, PeerPolicy},
        quota,
    },
};

pub(crate) mod parse; // what one setting's text means
mod source; // where a setting comes from, and what is wrong with it

use source::Reader;
pub use source::{File, Overrides, Place, Problem};

/// All of it. Each part of the program gets the few values it needs from `app`.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the secret and the self-signed certificate live.
    pub data_dir: PathBuf,
    /// The name in ICE URLs; `None`: our public address in the asking request's family.
    pub public_host: Option<String>,
    /// What peers see, as configured; empty: the addresses of the default routes.
    pub public_ips: Vec<IpAddr>,
    /// How long agents and allocations have to leave after SIGTERM.
    pub drain_timeout: Duration,
    /// How long allocations may live on after SIGUSR2, beside the process that took over.
    pub upgrade_timeout: Duration,
    /// HTTPS and WSS.
    pub http: Http,
    /// STUN and TURN.
    pub turn: Turn,
    /// Time-limited TURN users.
    pub credentials: Credentials,
    /// Agents' tokens.
    pub auth: Auth,
    /// Sessions and their limits.
    pub signaling: Signaling,
    /// The other nodes; `None`: this is the only one.
    pub cluster: Option<Cluster>,
    /// The operator's port.
    pub admin: Admin,
    /// What is logged, and how.
    pub log: Log,
}

/// `[http]`.
#[derive(Clone, Debug)]
pub struct Http {
    /// Where HTTPS and WSS are served.
    pub listen: Vec<SocketAddr>,
    /// Certificate and key; `None`: from an authority, or self-signed, in the data dir.
    pub certificate: Option<Files>,
    /// The authority that gives certificates.
    pub acme: Option<Acme>,
    /// Origins of pages that may use us beside our own; `*` is all.
    pub allowed_origins: Vec<String>,
    /// 0 is unlimited, here and in every limit below.
    pub connections_per_address: u32,
    /// TLS handshakes a second for an IPv4 address or an IPv6 /64.
    pub handshakes_per_second_per_address: u32,
    /// Open connections in all.
    pub connections_total: u32,
}

/// `[http.acme]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acme {
    /// Host names and addresses; at least one.
    pub domains: Vec<String>,
    /// Whom the authority may write to.
    pub email: Option<String>,
    /// Where it is.
    pub directory: String,
    /// Where it asks over plain HTTP.
    pub http_listen: SocketAddr,
}

/// `[turn]`.
#[derive(Clone, Debug)]
pub struct Turn {
    /// Where clients send to.
    pub listen: Vec<SocketAddr>,
    /// More ports for clients on TLS, beside those of HTTPS.
    pub tls_listen: Vec<SocketAddr>,
    /// Sent in challenges, part of every TURN key.
    pub realm: String,
    /// Local addresses that relay sockets bind to; empty: where the default routes leave.
    pub relay_ips: Vec<IpAddr>,
    /// Ports of relayed addresses.
    pub relay_ports: RangeInclusive<u16>,
    /// How the kernel relays channels, if it does.
    pub xdp: Option<Mode>,
    /// Never 0: resolved to the number of cores.
    pub shards: usize,
    /// Peers that may be reached although the default list denies them.
    pub allow_peers: Vec<IpNet>,
    /// Peers denied on top of the default list.
    pub deny_peers: Vec<IpNet>,
    /// How a denied peer is answered.
    pub denied_peers: DeniedPeers,
    /// Whether a peer must have been signaled.
    pub peer_policy: PeerPolicy,
    /// Allocations that one agent may hold.
    pub allocations_per_agent: u32,
    /// Allocations that all agents together may hold.
    pub allocations_total: u32,
    /// Payload of one agent each way.
    pub bytes_per_second_per_agent: u32,
    /// Answers to strangers, for each IPv4 /24 or IPv6 /56.
    pub unauthenticated_per_second: u32,
}

impl Turn {
    /// What agents are told, where that matters.
    #[must_use]
    pub fn signaled(&self, signaled: &Signaled) -> Option<Signaled> {
        (self.peer_policy == PeerPolicy::Signaled).then(|| signaled.clone())
    }

    /// What may be held and relayed.
    #[must_use]
    pub fn quotas(&self) -> quota::Limits {
        quota::Limits {
            per_agent: self.allocations_per_agent,
            total: self.allocations_total,
            bytes_per_second: self.bytes_per_second_per_agent,
        }
    }
}

/// `[credentials]`.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// Empty: derived from the data dir's secret.
    pub secrets: Vec<Secret>,
    /// How long credentials live when nobody asks otherwise.
    pub ttl: Duration,
    /// Credentials never live longer.
    pub max_ttl: Duration,
}

/// `[auth]`.
#[derive(Clone, Debug)]
pub struct Auth {
    /// Empty: derived from the data dir's secret.
    pub secrets: Vec<Secret>,
    /// A token that lives longer is refused.
    pub max_ttl: Duration,
    /// Who else may sign tokens.
    pub outside: Option<Outside>,
}

/// An issuer whose tokens are accepted beside our own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// Where it shows its keys.
    pub jwks: jwks::Source,
    /// What its tokens say of who made them.
    pub issuer: String,
    /// And of whom they are for.
    pub audience: String,
}

/// `[signaling]`.
#[derive(Clone, Debug)]
pub struct Signaling {
    /// How long a session outlives its connection.
    pub resume_window: Duration,
    /// `usize::MAX` where the file says 0, here and in the next ones.
    pub window_messages: usize,
    /// Bytes held for one session.
    pub window_bytes: usize,
    /// Bytes of one frame.
    pub max_frame: usize,
    /// 0 is unlimited.
    pub messages_per_second: u32,
    /// Frames at once.
    pub burst: u32,
    /// `usize::MAX` where the file says 0.
    pub presence_limit: usize,
    /// Whether clients of PeerJS are served.
    pub peerjs: bool,
}

/// `[cluster]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Servers of NATS; at least one.
    pub nats: Vec<NatsServer>,
    /// What people call this node; `None`: this host's name.
    pub node: Option<String>,
    /// Who vouches for the servers, in PEM; `None`: whom this system trusts.
    pub ca: Option<PathBuf>,
    /// What a file of NATS credentials holds.
    pub credentials: Option<Credential>,
}

impl Cluster {
    /// What people call this node.
    #[must_use]
    pub fn name(&self) -> String {
        let of_host = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
        self.node.clone().or_else(|| of_host().ok()).unwrap_or_else(|| "halfway".to_owned())
    }
}

/// A server of NATS, printed without the password that its URL may have.
#[derive(Clone, PartialEq, Eq)]
pub struct NatsServer {
    /// Where it is, without what its URL says of a user.
    pub address: async_nats::ServerAddr,
    /// A user and a password, or a token.
    pub login: Option<(String, Option<String>)>,
}

impl fmt::Display for NatsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.address.host(), self.address.port())
    }
}

impl fmt::Debug for NatsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A NATS user's credentials, as `nsc` writes them; never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential(String);

impl Credential {
    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(…)")
    }
}

/// `[admin]`.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Plain HTTP: `/metrics`, `/healthz`, `/readyz`.
    pub listen: Vec<SocketAddr>,
}

/// `[log]`.
#[derive(Clone, Debug)]
pub struct Log {
    /// As of `tracing_subscriber::EnvFilter`.
    pub filter: String,
    /// One JSON object a line; otherwise text.
    pub json: bool,
}

impl Config {
    /// The settings in which `other` differs and which are taken at a start alone, by their keys.
    #[must_use]
    pub fn differs_for_good(&self, other: &Self) -> Vec<&'static str> {
        let same = [
            ("data_dir", self.data_dir == other.data_dir),
            ("public_ips", self.public_ips == other.public_ips),
            ("http.listen", self.http.listen == other.http.listen),
            ("http.acme.http_listen", acme_listens(self) == acme_listens(other)),
            ("turn.listen", self.turn.listen == other.turn.listen),
            ("turn.tls_listen", self.turn.tls_listen == other.turn.tls_listen),
            ("turn.realm", self.turn.realm == other.turn.realm),
            ("turn.relay_ips", self.turn.relay_ips == other.turn.relay_ips),
            ("turn.relay_ports", self.turn.relay_ports == other.turn.relay_ports),
            ("turn.xdp", self.turn.xdp == other.turn.xdp),
            ("turn.shards", self.turn.shards == other.turn.shards),
            ("cluster", self.cluster == other.cluster),
            ("admin.listen", self.admin.listen == other.admin.listen),
            ("log.format", self.log.json == other.log.json),
        ];
        same.into_iter().filter(|(_, same)| !same).map(|(key, _)| key).collect()
    }
}

fn acme_listens(config: &Config) -> Option<SocketAddr> {
    config.http.acme.as_ref().map(|acme| acme.http_listen)
}

impl Credentials {
    /// The secrets of TURN users: the configured ones, else the one derived from the instance's secret.
    ///
    /// # Errors
    /// When the instance's secret is needed and cannot be had.
    pub fn turn_secrets<E>(
        &self,
        secret: impl FnOnce() -> Result<InstanceSecret, E>,
    ) -> Result<TurnSecrets, E> {
        let configured = TurnSecrets::new(&self.secrets);
        let derived = || Ok([secret()?.derive(Purpose::TurnRest)]);
        configured.map_or_else(|| Ok(TurnSecrets::new(&derived()?).expect("one secret is enough")), Ok)
    }
}

impl Auth {
    /// The keys of agents' tokens: the configured ones, else the one derived from the instance's secret.
    ///
    /// # Errors
    /// When the instance's secret is needed and cannot be had.
    pub fn token_keys<E>(&self, secret: impl FnOnce() -> Result<InstanceSecret, E>) -> Result<TokenKeys, E> {
        let configured: Vec<&[u8]> = self.secrets.iter().map(AsRef::as_ref).collect();
        let keys = |secrets: &[&[u8]]| TokenKeys::new(secrets, self.max_ttl);
        let derived = || Ok(secret()?.derive(Purpose::Token));
        keys(&configured).map_or_else(|| Ok(keys(&[&derived()?]).expect("one secret is enough")), Ok)
    }
}

impl Signaling {
    /// The configured limits, and for the two that no one configures what a host of modest memory bears.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            max_frame: self.max_frame,
            window_messages: self.window_messages,
            window_bytes: self.window_bytes,
            resume_window: self.resume_window,
            rate: Rate::new(self.messages_per_second, self.burst),
            presence_limit: self.presence_limit,
            heartbeat: HEARTBEAT,
            agents: 250_000,
            held_bytes: 256 << 20,
        }
    }
}

/// A configured secret: used as its UTF-8 bytes, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl AsRef<[u8]> for Secret {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What a configuration depends on beside what it says.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Where it is off, `[::]` means `0.0.0.0`.
    pub ipv6: bool,
    /// Processors that we may use.
    pub cores: usize,
    /// `$STATE_DIRECTORY`.
    pub state_directory: Option<PathBuf>,
}

/// Resolves everything, or says everything that is wrong.
///
/// # Errors
/// Every problem, in the order of the file's lines.
pub fn resolve(
    file: Option<File>,
    overrides: Overrides,
    around: &Surroundings,
) -> Result<Config, Vec<Problem>> {
    let mut reader = Reader::new(file, overrides);
    let config = Config {
        data_dir: data_dir(&mut reader, around),
        public_host: reader.text("public_host", parse::host).flatten(),
        public_ips: reader.list("public_ips", parse::address).unwrap_or_default(),
        drain_timeout: reader.flag_only("drain_timeout", parse::duration).unwrap_or(Duration::from_secs(30)),
        upgrade_timeout: reader.flag_only("upgrade_timeout", parse::duration).unwrap_or(HOUR),
        http: http(&mut reader, around),
        turn: turn(&mut reader, around),
        credentials: credentials(&mut reader),
        auth: auth(&mut reader),
        signaling: signaling(&mut reader),
        cluster: cluster(&mut reader),
        admin: admin(&mut reader, around),
        log: log(&mut reader),
    };
    check_together(&mut reader, &config);
    let problems = reader.finish();
    if problems.is_empty() { Ok(config) } else { Err(problems) }
}

fn data_dir(reader: &mut Reader, around: &Surroundings) -> PathBuf {
    reader
        .text("data_dir", path)
        .or_else(|| around.state_directory.clone())
        .unwrap_or_else(|| PathBuf::from("./halfway-data"))
}

fn http(reader: &mut Reader, around: &Surroundings) -> Http {
    Http {
        listen: listen(reader, "http.listen", (Ipv6Addr::UNSPECIFIED, 8443).into(), around),
        certificate: certificate(reader),
        acme: acme(reader, around),
        allowed_origins: reader.list("http.allowed_origins", parse::origin).unwrap_or_default(),
        connections_per_address: limit(reader, "http.connections_per_address", 1000),
        handshakes_per_second_per_address: limit(reader, "http.handshakes_per_second_per_address", 50),
        connections_total: limit(reader, "http.connections_total", 0),
    }
}

fn turn(reader: &mut Reader, around: &Surroundings) -> Turn {
    let shards = reader.number("turn.shards", 0..=1024).and_then(|shards| usize::try_from(shards).ok());
    Turn {
        listen: listen(reader, "turn.listen", (Ipv6Addr::UNSPECIFIED, 3478).into(), around),
        tls_listen: reader.list("turn.tls_listen", listen_on(around)).unwrap_or_default(),
        realm: reader.text("turn.realm", parse::realm).unwrap_or_else(|| "halfway".to_owned()),
        relay_ips: reader.list("turn.relay_ips", parse::address).unwrap_or_default(),
        relay_ports: reader.text("turn.relay_ports", parse::ports).unwrap_or(49152..=65535),
        xdp: reader.text("turn.xdp", parse::xdp).flatten(),
        shards: shards.filter(|&shards| shards != 0).unwrap_or(around.cores),
        allow_peers: reader.list("turn.allow_peers", parse::network).unwrap_or_default(),
        deny_peers: reader.list("turn.deny_peers", parse::network).unwrap_or_default(),
        denied_peers: reader.text("turn.denied_peers", parse::denied_peers).unwrap_or(DeniedPeers::Refuse),
        peer_policy: reader.text("turn.peer_policy", parse::peer_policy).unwrap_or(PeerPolicy::Open),
        allocations_per_agent: limit(reader, "turn.allocations_per_agent", 16),
        allocations_total: limit(reader, "turn.allocations_total", 0),
        bytes_per_second_per_agent: limit(reader, "turn.bytes_per_second_per_agent", 0),
        unauthenticated_per_second: limit(reader, "turn.unauthenticated_per_second", 100),
    }
}

fn credentials(reader: &mut Reader) -> Credentials {
    let secrets = reader.list("credentials.secrets", |text| parse::secret(text, 16)).unwrap_or_default();
    let ttl = reader.text("credentials.ttl", parse::lifetime);
    let max_ttl = reader.text("credentials.max_ttl", parse::lifetime).unwrap_or(24 * HOUR);
    if ttl.is_some_and(|ttl| ttl > max_ttl) {
        reader.problem("credentials.ttl", "is longer than credentials.max_ttl");
    }
    // A lower maximum alone is no contradiction: nobody asked for the default.
    Credentials { secrets, ttl: ttl.unwrap_or(HOUR.min(max_ttl)), max_ttl }
}

const HOUR: Duration = Duration::from_secs(3600);

fn auth(reader: &mut Reader) -> Auth {
    Auth {
        secrets: reader.list("auth.secrets", |text| parse::secret(text, 32)).unwrap_or_default(),
        max_ttl: reader.text("auth.max_ttl", parse::lifetime).unwrap_or(366 * 24 * HOUR),
        outside: outside(reader),
    }
}

/// Without an issuer and an audience, tokens that it gives for other services would be good here.
fn outside(reader: &mut Reader) -> Option<Outside> {
    let text = |text: &str| Ok(text.to_owned());
    let is_given = reader.text("auth.jwks", text).is_some_and(|jwks| !jwks.is_empty());
    let jwks = reader.text("auth.jwks", parse::jwks).flatten();
    let issuer = reader.text("auth.issuer", text).unwrap_or_default();
    let audience = reader.text("auth.audience", text).unwrap_or_default();
    for (key, claim) in [("auth.issuer", &issuer), ("auth.audience", &audience)] {
        match (is_given, claim.is_empty()) {
            (true, true) => reader.problem("auth.jwks", format!("is given without {key}")),
            (false, false) => reader.problem(key, "is given without auth.jwks"),
            _ => {}
        }
    }
    let jwks = jwks?;
    if let jwks::Source::File(path) = &jwks
        && let Some(keys) = read(reader, "auth.jwks", path)
        && let Err(why) = PublicKeys::default().adopt(&keys)
    {
        reader.problem("auth.jwks", format!("{}: {why}", path.display()));
    }
    Some(Outside { jwks, issuer, audience })
}

fn signaling(reader: &mut Reader) -> Signaling {
    Signaling {
        resume_window: reader
            .text("signaling.resume_window", parse::duration)
            .unwrap_or(Duration::from_secs(60)),
        window_messages: size(reader, "signaling.window_messages", 256),
        window_bytes: size(reader, "signaling.window_bytes", 262_144),
        max_frame: size(reader, "signaling.max_frame", 65_536),
        messages_per_second: limit(reader, "signaling.messages_per_second", 50),
        burst: limit(reader, "signaling.burst", 200),
        presence_limit: size(reader, "signaling.presence_limit", 256),
        peerjs: reader.switch("signaling.peerjs").unwrap_or(false),
    }
}

/// `None` where there is no engine.
fn cluster(reader: &mut Reader) -> Option<Cluster> {
    let given = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
    let nats = reader.list("cluster.nats", parse::nats).unwrap_or_default();
    let node = reader.text("cluster.node", parse::node).flatten();
    let ca = given(reader.text("cluster.ca", path));
    if let Some(ca) = &ca
        && let Some(pem) = read(reader, "cluster.ca", ca)
        && !tls::has_certificates(&pem)
    {
        reader.problem("cluster.ca", format!("{} holds no certificate in PEM", ca.display()));
    }
    let file = given(reader.text("cluster.credentials", path));
    let credentials = file.and_then(|file| {
        let text = read(reader, "cluster.credentials", &file).map(String::from_utf8);
        let text = text?.ok().filter(|text| parse::is_nats_credentials(text));
        if text.is_none() {
            let what = format!("{} is no file of NATS credentials, as nsc writes them", file.display());
            reader.problem("cluster.credentials", what);
        }
        text.map(Credential)
    });
    (!nats.is_empty()).then_some(Cluster { nats, node, ca, credentials })
}

fn admin(reader: &mut Reader, around: &Surroundings) -> Admin {
    let listen = reader.list("admin.listen", listen_on(around));
    Admin { listen: listen.unwrap_or_else(|| vec![(Ipv4Addr::LOCALHOST, 9478).into()]) }
}

fn log(reader: &mut Reader) -> Log {
    Log {
        filter: reader.text("log.filter", parse::log_filter).unwrap_or_else(|| "info".to_owned()),
        json: reader.text("log.format", parse::log_format).unwrap_or(false),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the shape of every reading of a text")]
fn path(text: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(text))
}

fn listen(
    reader: &mut Reader,
    key: &'static str,
    default: SocketAddr,
    around: &Surroundings,
) -> Vec<SocketAddr> {
    let given = reader.filled_list(key, parse::listen).unwrap_or_else(|| vec![default]);
    given.into_iter().map(|listen| without_ipv6(listen, around)).collect()
}

fn listen_on(around: &Surroundings) -> impl Fn(&str) -> Result<SocketAddr, String> {
    |text| parse::listen(text).map(|listen| without_ipv6(listen, around))
}

fn without_ipv6(listen: SocketAddr, around: &Surroundings) -> SocketAddr {
    if listen.ip() == Ipv6Addr::UNSPECIFIED && !around.ipv6 {
        (Ipv4Addr::UNSPECIFIED, listen.port()).into()
    } else {
        listen
    }
}

/// One without the other is a problem; both are read here, so that what is wrong with them is known before the start.
fn certificate(reader: &mut Reader) -> Option<Files> {
    let given = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
    let cert = given(reader.text("http.cert", path));
    let key = given(reader.text("http.key", path));
    let Some((cert, key)) = cert.clone().zip(key.clone()) else {
        match (cert, key) {
            (Some(_), None) => reader.problem("http.cert", "is given without http.key"),
            (None, Some(_)) => reader.problem("http.key", "is given without http.cert"),
            _ => {}
        }
        return None;
    };
    let cert_pem = read(reader, "http.cert", &cert);
    let key_pem = read(reader, "http.key", &key);
    if let (Some(cert_pem), Some(key_pem)) = (cert_pem, key_pem)
        && let Err(error) = tls::Certificate::from_pem(&cert_pem, &key_pem)
    {
        let at = if error.is_of_key() { "http.key" } else { "http.cert" };
        reader.problem(at, error.to_string());
    }
    Some(Files { cert, key })
}

/// `None` where it is for no domain.
fn acme(reader: &mut Reader, around: &Surroundings) -> Option<Acme> {
    let acme = Acme {
        domains: reader.list("http.acme.domains", parse::domain).unwrap_or_default(),
        email: reader.text("http.acme.email", parse::email).flatten(),
        directory: reader
            .text("http.acme.directory", parse::directory)
            .unwrap_or_else(|| "https://acme-v02.api.letsencrypt.org/directory".to_owned()),
        http_listen: reader
            .text("http.acme.http_listen", listen_on(around))
            .unwrap_or_else(|| without_ipv6((Ipv6Addr::UNSPECIFIED, 80).into(), around)),
    };
    (!acme.domains.is_empty()).then_some(acme)
}

fn read(reader: &mut Reader, key: &'static str, path: &std::path::Path) -> Option<Vec<u8>> {
    let read = std::fs::read(path);
    read.map_err(|error| reader.problem(key, format!("{} cannot be read: {error}", path.display()))).ok()
}

/// A count of which 0 is "unlimited".
fn limit(reader: &mut Reader, key: &'static str, default: u32) -> u32 {
    reader.number(key, 0..=u32::MAX.into()).and_then(|limit| u32::try_from(limit).ok()).unwrap_or(default)
}

/// A size whose 0 is resolved: nothing is larger than `usize::MAX`.
fn size(reader: &mut Reader, key: &'static str, default: u32) -> usize {
    match limit(reader, key, default) {
        0 => usize::MAX,
        limit => limit as usize,
    }
}

/// What can only be seen by looking at several settings.
fn check_together(reader: &mut Reader, config: &Config) {
    refuse_twice(reader, "public_ips", &config.public_ips);
    refuse_twice(reader, "turn.relay_ips", &config.turn.relay_ips);
    refuse_twice(reader, "turn.listen", &fixed(&config.turn.listen));
    refuse_twice(reader, "http.listen", &fixed(&config.http.listen));
    refuse_twice(reader, "admin.listen", &fixed(&config.admin.listen));
    refuse_twice(reader, "turn.tls_listen", &fixed(&config.turn.tls_listen));
    // Not among them: turn.listen and http.listen, which is one port for all (UDP here, TCP there).
    for (key, list, other, taken) in [
        ("admin.listen", &config.admin.listen, "http.listen", &config.http.listen),
        ("admin.listen", &config.admin.listen, "turn.listen", &config.turn.listen),
        ("turn.tls_listen", &config.turn.tls_listen, "http.listen", &config.http.listen),
        ("turn.tls_listen", &config.turn.tls_listen, "turn.listen", &config.turn.listen),
        ("turn.tls_listen", &config.turn.tls_listen, "admin.listen", &config.admin.listen),
    ] {
        if let Some(twice) = fixed(list).iter().find(|listen| taken.contains(listen)) {
            reader.problem(key, format!("{twice} is taken by {other}"));
        }
    }
    check_acme(reader, config);
    check_cluster(reader, config);
    check_pairs(reader, config, "IPv4", IpAddr::is_ipv4);
    check_pairs(reader, config, "IPv6", IpAddr::is_ipv6);
}

fn check_acme(reader: &mut Reader, config: &Config) {
    let Some(acme) = &config.http.acme else { return };
    refuse_twice(reader, "http.acme.domains", &acme.domains);
    if config.http.certificate.is_some() {
        reader
            .problem("http.acme.domains", "and http.cert are both given: a certificate comes from one place");
    }
    let taken = [&config.http.listen, &config.turn.listen, &config.turn.tls_listen, &config.admin.listen];
    if taken.into_iter().any(|taken| fixed(taken).contains(&acme.http_listen)) {
        reader.problem("http.acme.http_listen", format!("{} is taken by another listener", acme.http_listen));
    }
}

/// What one node hands out is good at all of them.
fn check_cluster(reader: &mut Reader, config: &Config) {
    if config.cluster.is_none() {
        return;
    }
    if config.credentials.secrets.is_empty() {
        reader.problem("cluster.nats", "needs credentials.secrets, the same on every node");
    }
    if config.auth.secrets.is_empty() && config.auth.outside.is_none() {
        reader.problem("cluster.nats", "needs auth.secrets, the same on every node, or auth.jwks");
    }
}

/// The n-th relay address of a family is the n-th public one to its peers.
fn check_pairs(reader: &mut Reader, config: &Config, family: &str, is_family: fn(&IpAddr) -> bool) {
    let count = |addresses: &[IpAddr]| addresses.iter().filter(|address| is_family(address)).count();
    let (relays, publics) = (count(&config.turn.relay_ips), count(&config.public_ips));
    if relays != 0 && publics != 0 && relays != publics {
        let what = format!("{relays} of {family}, but public_ips has {publics}: each needs one of its own");
        reader.problem("turn.relay_ips", what);
    }
}

/// Port 0 is another port each time.
fn fixed(listen: &[SocketAddr]) -> Vec<SocketAddr> {
    listen.iter().copied().filter(|listen| listen.port() != 0).collect()
}

fn refuse_twice<T: PartialEq + fmt::Display>(reader: &mut Reader, key: &'static str, list: &[T]) {
    let twice = list.iter().enumerate().find(|(index, entry)| list[..*index].contains(entry));
    if let Some((_, entry)) = twice {
        reader.problem(key, format!("{entry} is there twice"));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::{Path, PathBuf},
        time::Duration,
    };

    use super::{Config, File, Overrides, Place, Surroundings, resolve};

    const AROUND: Surroundings = Surroundings { ipv6: true, cores: 3, state_directory: None };

    fn read(text: &str) -> Result<Config, String> {
        let lines =
            |problems: Vec<super::Problem>| problems.iter().map(|problem| format!("{problem}\n")).collect();
        let file = File::parse(Path::new("h.toml"), text).map_err(lines)?;
        resolve(Some(file), Overrides::default(), &AROUND).map_err(lines)
    }

    #[track_caller]
    fn refused(text: &str, expected: &str) {
        assert_eq!(read(text).unwrap_err(), format!("{expected}\n"), "{text}");
    }

    #[test]
    fn nothing_at_all_is_a_configuration() {
        let config = resolve(None, Overrides::default(), &AROUND).unwrap();
        assert_eq!(config.data_dir, PathBuf::from("./halfway-data"));
        assert_eq!(config.http.listen, ["[::]:8443".parse().unwrap()]);
        assert_eq!(config.turn.listen, ["[::]:3478".parse().unwrap()]);
        assert_eq!(config.admin.listen, ["127.0.0.1:9478".parse().unwrap()]);
        assert_eq!((config.turn.realm.as_str(), config.turn.relay_ports), ("halfway", 49152..=65535));
        assert_eq!((config.turn.shards, config.turn.allocations_per_agent), (3, 16));
        assert_eq!(config.credentials.ttl, Duration::from_secs(3600));
        assert_eq!((config.log.filter.as_str(), config.log.json), ("info", false));
    }

    #[test]
    fn without_ipv6_any_address_is_any_ipv4_address() {
        let around = Surroundings { ipv6: false, ..AROUND };
        let config = resolve(None, Overrides::default(), &around).unwrap();
        assert_eq!(config.turn.listen, ["0.0.0.0:3478".parse().unwrap()]);
        assert_eq!(config.http.listen, ["0.0.0.0:8443".parse().unwrap()]);
    }

    #[test]
    fn a_flag_replaces_what_the_file_says() {
        let file = File::parse(Path::new("h.toml"), "public_ips = ['192.0.2.1', '192.0.2.2']").unwrap();
        let mut flags = Overrides::default();
        flags.set("public_ips", Place::Flag("--public-ip".into()), vec!["192.0.2.9".into()]);
        flags.set("turn.relay_ports", Place::Environment("HALFWAY_RELAY_PORTS".into()), vec!["1-2".into()]);
        flags.set("log.filter", Place::Environment("HALFWAY_LOG".into()), vec![String::new()]);
        let config = resolve(Some(file), flags, &AROUND).unwrap();
        assert_eq!(config.public_ips, ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()]);
        assert_eq!((config.turn.relay_ports, config.log.filter.as_str()), (1..=2, "info"));
    }

    #[test]
    fn a_problem_of_a_flag_names_the_flag() {
        let mut flags = Overrides::default();
        flags.set("turn.relay_ports", Place::Flag("--relay-ports".into()), vec!["9-1".into()]);
        let problems = resolve(None, flags, &AROUND).unwrap_err();
        let expected = r#"--relay-ports: "9-1" is the wrong way round: the lower port comes first"#;
        assert_eq!(problems.iter().map(ToString::to_string).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn every_problem_has_its_line() {
        refused("\n[turn]\nrealm = 7", "h.toml:3: turn.realm: must be a string, in quotes");
        refused(
            "public_ips = [\n  '192.0.2.1',\n  'x',\n]",
            r#"h.toml:3: public_ips: "x" is not an IP address"#,
        );
        refused("http.lisen = []", "h.toml:1: http.lisen: unknown key");
        refused(
            "relay_ports = '1-2'",
            "h.toml:1: relay_ports: unknown key; did you mean `turn.relay_ports`?",
        );
        refused("'turn.realm' = 'x'", r#"h.toml:1: "turn.realm": unknown key"#);
        refused("[new]\na = 1\nb = 2", "h.toml:1: new: unknown key");
        refused("http = 1", "h.toml:1: http: must be a table: [http]");
        refused("[[http]]\nlisten = []", "h.toml:1: http: must be a table: [http]");
        refused("turn.listen = []", "h.toml:1: turn.listen: needs one entry at least");
        refused("turn.shards = -1", "h.toml:1: turn.shards: must be a whole number from 0 to 1024");
        refused("turn.shards = 'all'", "h.toml:1: turn.shards: must be a whole number from 0 to 1024");
        refused("drain_timeout = '1s'", "h.toml:1: drain_timeout: unknown key");
    }

    #[test]
    fn secrets_are_strong_and_not_repeated() {
        refused(
            "credentials.secrets = ['hunter2']",
            "h.toml:1: credentials.secrets: a secret of 7 bytes is too weak: 16 bytes at least",
        );
        refused(
            "[auth]\nsecrets = [\n'0123456789abcdef0123456789abcdef',\n'0123456789abcdef']",
            "h.toml:4: auth.secrets: a secret of 16 bytes is too weak: 32 bytes at least",
        );
        let config = read("credentials.secrets = ['0123456789abcdef']").unwrap();
        assert!(!format!("{config:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn settings_fit_together() {
        refused(
            "credentials = { ttl = '2h', max_ttl = '1h' }",
            "h.toml:1: credentials.ttl: is longer than credentials.max_ttl",
        );
        assert_eq!(read("credentials.max_ttl = '60s'").unwrap().credentials.ttl, Duration::from_secs(60));
        refused("http.cert = 'a.pem'", "h.toml:1: http.cert: is given without http.key");
        refused("\nhttp.key = 'a.pem'", "h.toml:2: http.key: is given without http.cert");
        refused(
            "public_ips = ['192.0.2.1']\nturn.relay_ips = ['10.0.0.1', '10.0.0.2']",
            "h.toml:2: turn.relay_ips: 2 of IPv4, but public_ips has 1: each needs one of its own",
        );
        assert!(read("public_ips = ['192.0.2.1']\nturn.relay_ips = ['10.0.0.1', 'fd00::2']").is_ok());
        refused("public_ips = ['::1', '0::1']", "h.toml:1: public_ips: ::1 is there twice");
        refused("admin.listen = ['[::]:8443']", "h.toml:1: admin.listen: [::]:8443 is taken by http.listen");
        assert!(read("http.listen = ['127.0.0.1:0', '127.0.0.1:0']\nadmin.listen = ['127.0.0.1:0']").is_ok());
    }

    #[test]
    fn an_outside_issuer_is_named_with_its_audience() {
        let url = "[auth]\njwks = 'https://id.example/keys'\nissuer = 'https://id.example'\n";
        let given = read(&format!("{url}audience = 'halfway'"));
        let outside = given.unwrap().auth.outside.unwrap();
        assert_eq!((outside.issuer.as_str(), outside.audience.as_str()), ("https://id.example", "halfway"));
        refused(url, "h.toml:2: auth.jwks: is given without auth.audience");
        // Read here, so that what is wrong with it is known before the start.
        refused(
            "[auth]\njwks = '/nonexistent/keys.json'\nissuer = 'a'\naudience = 'b'",
            "h.toml:2: auth.jwks: /nonexistent/keys.json cannot be read: No such file or directory (os error 2)",
        );
        refused(
            "[auth]\njwks = 'Cargo.toml'\nissuer = 'a'\naudience = 'b'",
            "h.toml:2: auth.jwks: Cargo.toml: not a JWK set: expected value at line 1 column 2",
        );
        refused("[auth]\naudience = 'halfway'", "h.toml:2: auth.audience: is given without auth.jwks");
        refused(
            "[auth]\njwks = 'http://id.example/keys'\nissuer = 'a'\naudience = 'b'",
            r#"h.toml:2: auth.jwks: "http://id.example/keys" is not an https URL"#,
        );
        refused("signaling.peerjs = 1", "h.toml:1: signaling.peerjs: must be true or false");
        refused(
            "turn.peer_policy = 'closed'",
            r#"h.toml:1: turn.peer_policy: "closed" is neither "open" nor "signaled""#,
        );
        refused(
            "turn.xdp = 'on'",
            r#"h.toml:1: turn.xdp: "on" is none of "auto", "driver", "generic" and "off""#,
        );
    }

    #[test]
    fn nodes_share_what_they_hand_out() {
        let defaults = "turn.xdp = 'off'\n\
            signaling.peerjs = false\ncluster.nats = []\nauth.jwks = ''\nturn.peer_policy = 'open'";
        assert!(read(defaults).unwrap().cluster.is_none());
        let nats = "cluster.nats = ['nats://u:secret@a:4222', 'tls://[2001:db8::1]']\n";
        assert_eq!(
            read(nats).unwrap_err(),
            "h.toml:1: cluster.nats: needs credentials.secrets, the same on every node\n\
             h.toml:1: cluster.nats: needs auth.secrets, the same on every node, or auth.jwks\n"
        );
        let secrets = "credentials.secrets = ['0123456789abcdef']\n\
            auth.secrets = ['0123456789abcdef0123456789abcdef']\ncluster.node = 'frankfurt-1'";
        let cluster = read(&format!("{nats}{secrets}")).unwrap().cluster.unwrap();
        assert_eq!(cluster.name(), "frankfurt-1");
        let shown = format!("{cluster:?}");
        assert!(shown.contains("a:4222") && !shown.contains("secret"), "{shown}");
        for (nats, what) in [
            (
                "http://a",
                "is not the URL of a NATS server, such as \"nats://10.0.0.7:4222\" or \"tls://nats.example.org\"",
            ),
            (
                "nats://",
                "is not the URL of a NATS server, such as \"nats://10.0.0.7:4222\" or \"tls://nats.example.org\"",
            ),
        ] {
            refused(
                &format!("cluster.nats = ['{nats}']"),
                &format!("h.toml:1: cluster.nats: {nats:?} {what}"),
            );
        }
        refused(
            "cluster.node = 'a b'",
            r#"h.toml:1: cluster.node: "a b" is not a name of 1 to 64 of A-Z a-z 0-9 . _ -"#,
        );
        refused("cluster.ca = 'Cargo.toml'", "h.toml:1: cluster.ca: Cargo.toml holds no certificate in PEM");
        refused(
            "cluster.credentials = 'Cargo.toml'",
            "h.toml:1: cluster.credentials: Cargo.toml is no file of NATS credentials, as nsc writes them",
        );
    }

    #[test]
    fn all_problems_are_said_at_once() {
        let problems =
            read("[log]\nformat = 'xml'\n[turn]\nallow_peers = ['a', '::/0', 'b']\nx = 1").unwrap_err();
        let lines: Vec<_> =
            problems.lines().map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "h.toml:2 log.format",
                "h.toml:4 turn.allow_peers",
                "h.toml:4 turn.allow_peers",
                "h.toml:5 turn.x"
            ]
        );
    }

    #[test]
    fn what_is_no_toml_is_refused_with_its_line() {
        let problems = read("a = 1\na = 2\n[b\n").unwrap_err();
        let places: Vec<_> = problems.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(places, ["h.toml:2:", "h.toml:3:"], "{problems}");
    }

    #[test]
    fn zero_is_unlimited() {
        let config = read("signaling = { max_frame = 0, presence_limit = 0, burst = 0 }").unwrap();
        assert_eq!((config.signaling.max_frame, config.signaling.presence_limit), (usize::MAX, usize::MAX));
        assert_eq!(config.signaling.limits().rate, None, "a burst without a limit is no limit");
        assert_eq!(config.signaling.burst, 0);
    }
}
