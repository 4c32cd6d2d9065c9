//! The whole TURN server, with and without credentials, over hours of virtual time.
#![no_main]

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
    time::{Duration, UNIX_EPOCH},
};

use arbitrary::Arbitrary;
use halfway::{
    clock::{self, Now},
    credentials::{revocations::Revocations, turn_rest::TurnSecrets},
    turn::{
        Channel, FiveTuple, RelayAddress, RelayPort, Transport,
        auth::Auth,
        channel_data,
        demux::{Datagram, sort},
        forward::{Load, ToPeer},
        nonce::Nonces,
        policy::{DeniedPeers, LivePorts, Policy},
        quota::{Limits, Quotas},
        server::{Effect, Server, Setup},
        strangers::Strangers,
    },
};
use libfuzzer_sys::fuzz_target;
use stun_types::{
    AddressFamily,
    attribute::{AttributeType, Nonce, RawAttribute, Realm, Username},
    message::{
        IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message, MessageClass, MessageType,
        MessageWriteVec, Method,
    },
    prelude::{MessageWrite, MessageWriteExt},
};
use turn_types::{
    attribute::{ChannelNumber, Data, Lifetime, RequestedAddressFamily, RequestedTransport, XorPeerAddress},
    message::SEND,
};

/// What happens next.
#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes from one of the clients.
    Raw(u8, Vec<u8>),
    /// A request with attributes of the fuzzer's choice, signed by one of the agents or not at all.
    Request {
        client: u8,
        method: u8,
        transaction: u8,
        agent: Option<u8>,
        attributes: Vec<Attribute>,
    },
    /// Data from a client on a channel.
    Channel {
        client: u8,
        channel: u8,
        length: u8,
    },
    /// Data from a client in a Send indication.
    Send {
        client: u8,
        peer: u8,
        length: u8,
    },
    /// A client's stream ends.
    HangUp(u8),
    /// No new allocations from now on.
    Drain,
    /// A datagram from a peer.
    FromPeer {
        peer: u8,
        relay: bool,
        port: u8,
        length: u16,
    },
    Wait(u16),
}

/// An attribute of a request.
#[derive(Arbitrary, Debug)]
enum Attribute {
    /// A peer that may be reached, or not.
    Peer(u8),
    Channel(u8),
    Lifetime(u16),
    Udp,
    Family(bool),
    Raw(u8, Vec<u8>),
}

const REALM: &str = "halfway";
const SECRET: &str = "the secret of the fuzzer";
const EXPIRES: u64 = 2_000_000_000;
const PORTS: std::ops::RangeInclusive<u16> = 49_152..=49_167;
const METHODS: [u16; 7] = [0x001, 0x003, 0x003, 0x004, 0x008, 0x009, 0x00a];
const AGENTS: [&str; 2] = ["alice", "bob"];
/// Allocations: each agent, and all.
const QUOTA: (usize, usize) = (6, 10);
/// The attributes that a TURN request may have, and one that none has.
const ATTRIBUTES: [u16; 10] =
    [0x000c, 0x000d, 0x0012, 0x0017, 0x0018, 0x0019, 0x001a, 0x0022, 0x7fff, 0x8000];

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World::new();
    for step in steps.iter().take(64) {
        world.step(step);
        world.check();
    }
    world.wait(3_601);
    assert_eq!((world.live, world.server.quotas().held_in_total()), ([0; 2], 0), "all is given back");
    assert!(world.routes.is_empty(), "no route is left");
    assert!(world.server.poll_timeout().is_none(), "no deadline is left");
});

struct World {
    server: Server,
    now: Now,
    /// By relay address.
    live: [usize; 2],
    /// Channels that another path may relay.
    routes: HashSet<(FiveTuple, Channel)>,
}

impl World {
    fn new() -> Self {
        let now = Now { wall: UNIX_EPOCH + Duration::from_secs(1_900_000_000), ..clock::now() };
        let mut world = Self { server: server(), now, live: [0; 2], routes: HashSet::new() };
        world.bind_ports();
        world
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Raw(client, bytes) => self.feed(five_tuple(*client), bytes),
            Step::Request { client, method, transaction, agent, attributes } => {
                let from = five_tuple(*client);
                let request = self.request(from, *method, *transaction, *agent, attributes);
                self.feed(from, &request);
            }
            Step::Channel { client, channel: number, length } => {
                let mut data = channel_data::header(channel(*number), (*length).into()).to_vec();
                data.resize(4 + usize::from(*length), 7);
                self.feed(five_tuple(*client), &data);
            }
            Step::Send { client, peer: to, length } => {
                let mut message = Message::builder_indication(SEND, MessageWriteVec::new());
                let to = XorPeerAddress::new(peer(*to), message.transaction_id());
                message.add_attribute(&to).unwrap();
                message.add_attribute(&Data::new(&vec![7; usize::from(*length)])).unwrap();
                self.feed(five_tuple(*client), &message.finish());
            }
            Step::FromPeer { peer: from, relay, port, length } => {
                let port = PORTS.start() + u16::from(*port) % PORTS.len() as u16;
                let relay = RelayPort { relay: (*relay).into(), port };
                _ = self.server.to_client(relay, peer(*from), Load::one((*length).into()));
            }
            Step::HangUp(client) => {
                self.server.hang_up(&five_tuple(*client), self.now.mono);
                assert!(!self.server.holds_allocation(&five_tuple(*client)));
            }
            Step::Drain => self.server.drain(),
            Step::Wait(seconds) => self.wait(u64::from(*seconds)),
        }
    }

    fn feed(&mut self, from: FiveTuple, bytes: &[u8]) {
        match sort(bytes) {
            Datagram::ChannelData(channel, payload) => {
                let passed = self.server.to_peer(&from, channel, Load::one(payload.len()));
                self.deliver(passed.map(|passed| passed.to), payload.len());
            }
            Datagram::Send(message) => {
                let sent = self.server.send(&from, message).map(|(to, payload)| (to, payload.len()));
                self.deliver(sent.map(|(to, _)| to), sent.map_or(0, |(_, length)| length));
            }
            Datagram::Stun(message) => {
                let mut reply = Vec::new();
                self.server.handle_request(self.now, from, message, &mut reply);
                assert!(reply.len() <= 512, "{} bytes are too many for a stranger", reply.len());
                assert!(reply.is_empty() || Message::from_bytes(&reply).unwrap().is_response());
            }
            Datagram::Unknown => {}
        }
    }

    fn deliver(&mut self, to: Option<ToPeer>, length: usize) {
        if let Some(ToPeer::Here { from, to }) = to {
            _ = self.server.to_client_from_here(from, to, Load::one(length));
        }
    }

    fn wait(&mut self, seconds: u64) {
        self.now = self.now + Duration::from_secs(seconds);
        self.server.begin_batch(self.now);
        self.server.handle_timeout(self.now);
        self.check();
    }

    fn check(&mut self) {
        while let Some(effect) = self.server.poll_effect() {
            match effect {
                Effect::TakeRelay(at) => self.live[usize::from(at.relay)] += 1,
                Effect::CloseRelay(at) => self.live[usize::from(at.relay)] -= 1,
                Effect::Ended(_) | Effect::Reclaim(_) => {}
                Effect::RouteAdded(route) => _ = self.routes.insert((route.client, route.channel)),
                Effect::RouteRemoved(client, channel) => _ = self.routes.remove(&(client, channel)),
            }
        }
        assert!(
            self.routes.iter().all(|(client, _)| self.server.holds_allocation(client)),
            "no route outlives its allocation"
        );
        self.bind_ports();
        for (relay, live) in (0..).zip(self.live) {
            let ports = self.server.ports(relay).count();
            assert_eq!((ports.live, ports.free + ports.bound), (live as u64, (PORTS.len() - live) as u64));
        }
        // A dual allocation has two of the ports.
        let held = self.server.quotas().held_in_total();
        assert_eq!(self.server.counters().allocations, held as u64);
        assert!((*self.live.iter().max().unwrap()..=self.live.iter().sum()).contains(&held));
        assert!(held <= QUOTA.1);
    }

    fn bind_ports(&mut self) {
        for relay in 0..2 {
            while let Some(port) = self.server.ports(relay).next_to_bind(0) {
                self.server.ports(relay).bound(port);
            }
        }
    }

    fn request(
        &self,
        from: FiveTuple,
        method: u8,
        transaction: u8,
        agent: Option<u8>,
        attributes: &[Attribute],
    ) -> Vec<u8> {
        let method = Method::new(METHODS[usize::from(method) % METHODS.len()]);
        let kind = MessageType::from_class_method(MessageClass::Request, method);
        let mut message = Message::builder(kind, u128::from(transaction).into(), MessageWriteVec::new());
        attributes.iter().take(16).for_each(|attribute| attribute.add_to(&mut message));
        if let Some(agent) = agent {
            let (username, key) = &KEYS[usize::from(agent) % AGENTS.len()];
            let nonce = Nonces::new(&[7; 32]).mint(self.now.unix(), from.client);
            message.add_attribute(&Username::new(username).unwrap()).unwrap();
            message.add_attribute(&Realm::new(REALM).unwrap()).unwrap();
            message.add_attribute(&Nonce::new(&nonce).unwrap()).unwrap();
            message.add_message_integrity_with_key(key, IntegrityAlgorithm::Sha1).unwrap();
        }
        message.finish()
    }
}

impl Attribute {
    fn add_to(&self, message: &mut MessageWriteVec) {
        let transaction = message.transaction_id();
        let added = match self {
            Self::Peer(number) => message.add_attribute(&XorPeerAddress::new(peer(*number), transaction)),
            Self::Channel(number) => message.add_attribute(&ChannelNumber::new(channel(*number).number())),
            Self::Lifetime(seconds) => message.add_attribute(&Lifetime::new((*seconds).into())),
            Self::Udp => message.add_attribute(&RequestedTransport::new(RequestedTransport::UDP)),
            Self::Family(v6) => {
                let family = if *v6 { AddressFamily::IPV6 } else { AddressFamily::IPV4 };
                message.add_attribute(&RequestedAddressFamily::new(family))
            }
            Self::Raw(kind, value) => {
                let kind = AttributeType::new(ATTRIBUTES[usize::from(*kind) % ATTRIBUTES.len()]);
                message.add_attribute(&RawAttribute::new(kind, &value[..value.len().min(64)]))
            }
        };
        added.expect("nothing stands in the way of one more attribute");
    }
}

/// User names and keys, by agent.
static KEYS: LazyLock<[(String, IntegrityKey); 2]> = LazyLock::new(|| {
    AGENTS.map(|agent| {
        let user = TurnSecrets::new(&[SECRET]).unwrap().mint(agent, EXPIRES);
        let credentials =
            LongTermKeyCredentials::new(user.username.clone(), user.credential, REALM.to_owned());
        (user.username, credentials.make_key(IntegrityAlgorithm::Sha1))
    })
});

/// Public ones, a private one, this host's own, and one of the other family.
fn peer(number: u8) -> SocketAddr {
    let ip: IpAddr = match number % 8 {
        5 => [192, 168, 0, 1].into(),
        6 => [5, 5, 5, 5].into(),
        7 => [0x2606, 0, 0, 0, 0, 0, 0, 1].into(),
        last => [1, 1, 1, last].into(),
    };
    SocketAddr::new(ip, if number % 8 == 6 { PORTS.start() + u16::from(number / 8) } else { 7 })
}

fn channel(number: u8) -> Channel {
    Channel::new(0x4000 + u16::from(number % 8)).expect("within the range")
}

/// Every fourth client is on a stream.
fn five_tuple(client: u8) -> FiveTuple {
    let transport = if client % 4 == 3 { Transport::Tcp } else { Transport::Udp };
    let client = SocketAddr::from(([9, 0, 0, 1], 1_000 + u16::from(client % 8)));
    FiveTuple { client, server: ([5, 5, 5, 5], 3_478).into(), transport }
}

fn server() -> Server {
    let own = [IpAddr::from([5, 5, 5, 5]), IpAddr::from([0x2a00, 0, 0, 0, 0, 0, 0, 5])];
    let policy = Policy {
        relays: own.map(|own| RelayAddress { bound: own, public: own }).to_vec(),
        own_addresses: own.to_vec(),
        listeners: vec![([5, 5, 5, 5], 3_478).into()],
        allow: Vec::new(),
        deny: Vec::new(),
        denied: DeniedPeers::Discard,
        live: LivePorts::new(own.len()),
        signaled: None,
    };
    let auth = Auth {
        realm: REALM.to_owned(),
        secrets: TurnSecrets::new(&[SECRET]).unwrap(),
        nonces: Nonces::new(&[7; 32]),
        revocations: Revocations::default(),
    };
    Server::new(Setup {
        shard: 0,
        auth,
        policy,
        quotas: Quotas::new(Limits {
            per_agent: QUOTA.0 as u32,
            total: QUOTA.1 as u32,
            bytes_per_second: 1_000,
        }),
        // Or little would be answered.
        strangers: Strangers::new(0),
        ports: vec![PORTS.collect(), PORTS.collect()],
        announces_routes: true,
    })
}
