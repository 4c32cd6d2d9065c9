//! A test is a capture: what clients and peers send, and everything that comes of it, in virtual time.
//!
//! ```text
//! 0s    alice > Allocate
//! 0s    alice < Allocate 401 realm nonce
//! 0s    alice > Allocate auth
//! 0s    - take :49152
//! 0s    alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
//! ```
//!
//! Lines with `>` are what happens; all others must come of them, no more and no less. A name is a client, an address
//! a peer (`1.1.1.1:7 > :49152 hello`), `-` an effect on the shell; `operator > drain` is the operator's part. `drop` lines tell why a packet went nowhere.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, UNIX_EPOCH},
};

use halfway::{
    clock::{self, Now},
    credentials::{revocations::Revocations, turn_rest::TurnSecrets},
    turn::{
        FiveTuple, RelayAddress, RelayPort, Transport,
        auth::Auth,
        counters::{Counters, Dropped},
        demux,
        forward::{Load, ToClient, ToPeer, Wrap},
        indication,
        nonce::Nonces,
        policy::{DeniedPeers, LivePorts, Policy},
        quota::{Limits, Quotas},
        server::{Effect, Server, Setup},
        strangers::Strangers,
    },
};

use super::client::{Client, REALM, SECRET};

/// Wall clock at 0s.
pub const START: u64 = 1_800_000_000;

/// How most traces begin: Alice has an allocation.
pub const ALLOCATED: &str = "0s alice > Allocate
    0s alice < Allocate 401 realm nonce
    0s alice > Allocate auth
    0s - take :49152
    0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed\n";

/// How those with an IPv6 address begin that want both families.
pub const DUAL: &str = "0s alice > Allocate
    0s alice < Allocate 401 realm nonce
    0s alice > Allocate auth additional=2
    0s - take :49152
    0s - take :49152
    0s alice < Allocate ok relayed=5.5.5.5:49152 relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=1200 signed\n";

/// What a test may want different.
pub struct World {
    pub per_agent: u32,
    pub total: u32,
    pub bytes_per_second: u32,
    pub unauthenticated: u32,
    pub ports: std::ops::RangeInclusive<u16>,
    pub v4: bool,
    pub v6: bool,
    pub allow: Vec<&'static str>,
    pub deny: Vec<&'static str>,
    pub denied: DeniedPeers,
    pub secrets: Vec<&'static str>,
    /// The local address that 5.5.5.5 is the public one of.
    pub bound: &'static str,
    /// What all clients speak over.
    pub transport: Transport,
    /// Whether routes are announced.
    pub routes: bool,
}

impl Default for World {
    fn default() -> Self {
        Self {
            per_agent: 16,
            total: 0,
            bytes_per_second: 0,
            unauthenticated: 100,
            ports: 49152..=49155,
            v4: true,
            v6: false,
            allow: Vec::new(),
            deny: Vec::new(),
            denied: DeniedPeers::Refuse,
            secrets: vec![SECRET],
            bound: "5.5.5.5",
            transport: Transport::Udp,
            routes: false,
        }
    }
}

/// Runs a trace in the default world.
pub fn check(trace: &str) {
    World::default().check(trace);
}

impl World {
    /// Runs a trace; panics where what came of it is not what it says.
    pub fn check(&self, trace: &str) {
        let mut stage = Stage::new(self);
        let said = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        let expected: Vec<_> = trace.lines().map(said).filter(|line| !line.is_empty()).collect();
        for line in expected.iter().filter(|line| line.contains(" > ")) {
            let (time, event) = line.split_once(' ').unwrap();
            stage.advance_to(humantime::parse_duration(time).unwrap());
            stage.happens(line, event);
        }
        let got = stage.lines;
        assert!(got == expected, "expected:\n{}\n\ngot:\n{}\n", expected.join("\n"), got.join("\n"));
    }

    /// A server with its reserve bound, lowest port first.
    pub fn server(&self) -> Server {
        let Self { per_agent, total, bytes_per_second, .. } = *self;
        self.shard(0, Quotas::new(Limits { per_agent, total, bytes_per_second }))
    }

    fn relays(&self) -> u8 {
        u8::from(self.v4) + u8::from(self.v6)
    }

    /// One of several servers that share their quotas.
    pub fn shard(&self, shard: usize, quotas: Quotas) -> Server {
        let ip = |text: &str| text.parse().unwrap();
        let mut relays = Vec::new();
        if self.v4 {
            relays.push(RelayAddress { bound: ip(self.bound), public: ip("5.5.5.5") });
        }
        if self.v6 {
            relays.push(RelayAddress { bound: ip("2a00::5"), public: ip("2a00::5") });
        }
        let nets = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        let policy = Policy {
            live: LivePorts::new(relays.len()),
            signaled: None,
            own_addresses: relays.iter().map(|relay| relay.bound).collect(),
            listeners: vec!["[::]:3478".parse().unwrap(), "[::]:443".parse().unwrap()],
            allow: nets(&self.allow),
            deny: nets(&self.deny),
            denied: self.denied,
            relays,
        };
        let auth = Auth {
            realm: REALM.to_owned(),
            secrets: TurnSecrets::new(&self.secrets).unwrap(),
            nonces: Nonces::new(&[7; 32]),
            revocations: Revocations::default(),
        };
        let ports = policy.relays.iter().map(|_| self.ports.clone().collect()).collect();
        let mut server = Server::new(Setup {
            shard,
            auth,
            policy,
            quotas,
            strangers: Strangers::new(self.unauthenticated),
            ports,
            announces_routes: self.routes,
        });
        top_up(&mut server, self.relays());
        server
    }
}

/// Plays the shell's part; picks the lowest port there is.
pub fn top_up(server: &mut Server, relays: u8) {
    for relay in 0..relays {
        let mut ports: Vec<_> = std::iter::from_fn(|| server.ports(relay).next_to_bind(0)).collect();
        ports.sort_unstable();
        ports.into_iter().for_each(|port| server.ports(relay).bound(port));
    }
}

struct Stage {
    server: Server,
    relays: u8,
    start: Now,
    now: Duration,
    clients: HashMap<String, Client>,
    lines: Vec<String>,
    counted: Counters,
    secrets: Vec<&'static str>,
    transport: Transport,
}

impl Stage {
    fn new(world: &World) -> Self {
        let start = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
        Self {
            server: world.server(),
            relays: world.relays(),
            start,
            now: Duration::ZERO,
            clients: HashMap::new(),
            lines: Vec::new(),
            counted: Counters::default(),
            secrets: world.secrets.clone(),
            transport: world.transport,
        }
    }

    fn now(&self) -> Now {
        self.start + self.now
    }

    fn line(&mut self, text: &str) {
        self.lines.push(format!("{}s {text}", self.now.as_secs()));
    }

    /// Every deadline on the way is kept.
    fn advance_to(&mut self, to: Duration) {
        while let Some(next) =
            self.server.poll_timeout().map(|at| at - self.start.mono).filter(|next| *next <= to)
        {
            self.now = next;
            self.server.handle_timeout(self.now());
            self.effects();
        }
        self.now = to;
        self.server.begin_batch(self.now());
    }

    fn happens(&mut self, line: &str, event: &str) {
        self.lines.push(line.to_owned());
        let (who, what) = event.split_once(" > ").unwrap();
        match who.parse::<SocketAddr>() {
            Ok(peer) => self.peer_sends(peer, what),
            Err(_) if (who, what) == ("operator", "drain") => self.server.drain(),
            Err(_) => self.client_sends(who, what),
        }
        self.drops();
    }

    fn client_sends(&mut self, who: &str, what: &str) {
        let user = who.split('/').next().unwrap();
        let bytes = self.clients.entry(who.to_owned()).or_default().say(what, user);
        let from = five_tuple(who, self.transport);
        match demux::sort(&bytes) {
            demux::Datagram::ChannelData(channel, payload) => {
                let passed = self.server.to_peer(&from, channel, Load::one(payload.len()));
                self.sent_to_peer(passed.map(|passed| passed.to), payload);
            }
            demux::Datagram::Send(message) => {
                if let Some((to, payload)) = self.server.send(&from, message) {
                    self.sent_to_peer(Some(to), payload);
                }
            }
            demux::Datagram::Stun(message) => {
                let mut reply = Vec::new();
                self.server.handle_request(self.now(), from, message, &mut reply);
                self.effects();
                if !reply.is_empty() {
                    self.client_hears(who, &reply);
                }
            }
            demux::Datagram::Unknown => self.server.count_dropped(Dropped::Malformed, 1),
        }
    }

    fn sent_to_peer(&mut self, to: Option<ToPeer>, payload: &[u8]) {
        match to {
            None => {}
            Some(ToPeer::Out { relay, to }) => {
                self.line(&format!("{to} < {} from :{}", String::from_utf8_lossy(payload), relay.port));
            }
            Some(ToPeer::Here { from, to }) => {
                if let Some(passed) = self.server.to_client_from_here(from, to, Load::one(payload.len())) {
                    self.wrapped(passed.to, payload);
                }
            }
        }
    }

    fn peer_sends(&mut self, peer: SocketAddr, what: &str) {
        let (port, payload) = what.split_once(' ').unwrap();
        let relay = RelayPort {
            relay: u8::from(self.relays == 2 && peer.is_ipv6()),
            port: port[1..].parse().unwrap(),
        };
        if let Some(passed) = self.server.to_client(relay, peer, Load::one(payload.len())) {
            self.wrapped(passed.to, payload.as_bytes());
        }
    }

    fn wrapped(&mut self, ToClient { client, wrap }: ToClient, payload: &[u8]) {
        let length = payload.len();
        let bytes = match wrap {
            Wrap::Channel(channel) => {
                let length = u16::try_from(length).unwrap();
                [&halfway::turn::channel_data::header(channel, length)[..], payload].concat()
            }
            Wrap::Indication(peer) => {
                let head = indication::data_head(length, peer, [1; 12]);
                [&head[..], payload, &[0; 3][..indication::padding(length)]].concat()
            }
        };
        self.client_hears(&name_of(&client), &bytes);
    }

    fn client_hears(&mut self, who: &str, bytes: &[u8]) {
        let keys = self.keys();
        let heard = self.clients.entry(who.to_owned()).or_default().hear(bytes, &keys);
        self.line(&format!("{who} < {heard}"));
    }

    /// Of everybody, with every expiry that a trace may have asked for.
    fn keys(&self) -> Vec<(String, String)> {
        let mut keys = Vec::new();
        for secret in &self.secrets {
            let secrets = TurnSecrets::new(&[secret]).unwrap();
            for offset in [36_000, 72_000, -10] {
                let expires = START.checked_add_signed(offset).unwrap();
                keys.extend(
                    NAMES.map(|agent| secrets.mint(agent, expires)).map(|u| (u.username, u.credential)),
                );
            }
        }
        keys
    }

    fn effects(&mut self) {
        while let Some(effect) = self.server.poll_effect() {
            match effect {
                Effect::TakeRelay(at) => self.line(&format!("- take :{}", at.port)),
                Effect::Reclaim(idle) => self.line(&format!("- reclaim in shard {}", idle.shard)),
                Effect::CloseRelay(at) => self.line(&format!("- close :{}", at.port)),
                Effect::RouteAdded(route) => self.line(&format!(
                    "- route {:04x} of {} by :{} to {} for {}s",
                    route.channel.number(),
                    route.client.client,
                    route.relay.port,
                    route.peer.0,
                    route.until.duration_since(self.now().mono).as_secs()
                )),
                Effect::RouteRemoved(client, channel) => {
                    self.line(&format!("- no route {:04x} of {}", channel.number(), client.client));
                }
                Effect::Ended(ended) => self.line(&format!(
                    "- ended {} {} {}B out {}B in",
                    ended.agent,
                    ended.why.name(),
                    ended.to_peers.bytes,
                    ended.to_clients.bytes
                )),
            }
        }
        top_up(&mut self.server, self.relays);
    }

    fn drops(&mut self) {
        let counters = self.server.counters();
        for (why, (now, before)) in Dropped::ALL.iter().zip(counters.drops.iter().zip(self.counted.drops)) {
            if *now > before {
                self.line(&format!("drop {}", why.name()));
            }
        }
        self.counted = counters;
    }
}

/// Alice is at 9.0.0.1:1000 and so on by name; `alice/2` is another of her ports.
fn five_tuple(who: &str, transport: Transport) -> FiveTuple {
    let (name, port) = who.split_once('/').unwrap_or((who, "0"));
    let host =
        NAMES.iter().position(|known| *known == name).unwrap_or_else(|| panic!("nobody is called {name}"));
    FiveTuple {
        client: format!("9.0.0.{}:{}", host + 1, 1_000 + port.parse::<u16>().unwrap()).parse().unwrap(),
        server: "5.5.5.5:3478".parse().unwrap(),
        transport,
    }
}

fn name_of(client: &FiveTuple) -> String {
    let name =
        |host| NAMES.iter().find(|name| five_tuple(name, client.transport).client.ip() == host).unwrap();
    match client.client.port() - 1_000 {
        0 => (*name(client.client.ip())).to_owned(),
        port => format!("{}/{port}", name(client.client.ip())),
    }
}

const NAMES: [&str; 3] = ["alice", "bob", "carol"];
