//! The whole TURN server, with and without credentials, over hours of virtual time.
#![no_main]

use std::{
    net::{IpAddr, SocketAddr},
    sync::LazyLock,
    time::{Duration, UNIX_EPOCH},
};

use arbitrary::Arbitrary;
use halfway::{
    clock::{self, Now},
    credentials::turn_rest::TurnSecrets,
    turn::{
        FiveTuple, RelayAddress, RelayPort, Transport,
        auth::Auth,
        demux::{Datagram, sort},
        nonce::Nonces,
        policy::{DeniedPeers, LivePorts, Policy},
        quota::Quotas,
        server::{Effect, Server, Setup},
    },
};
use libfuzzer_sys::fuzz_target;
use stun_types::{
    attribute::{AttributeType, Nonce, RawAttribute, Realm, Username},
    message::{
        IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message, MessageClass, MessageType,
        MessageWriteVec, Method,
    },
    prelude::{MessageWrite, MessageWriteExt},
};

/// What happens next.
#[derive(Arbitrary, Debug)]
enum Step {
    /// Bytes from one of the clients.
    Raw(u8, Vec<u8>),
    /// A request with attributes of the fuzzer's choice, signed or not.
    Request { client: u8, method: u8, transaction: u8, signed: bool, attributes: Vec<(u8, Vec<u8>)> },
    /// A datagram from a peer.
    FromPeer { peer: u8, port: u8, length: u16 },
    Wait(u16),
}

const REALM: &str = "halfway";
const SECRET: &str = "the secret of the fuzzer";
const EXPIRES: u64 = 2_000_000_000;
const PORTS: std::ops::RangeInclusive<u16> = 49_152..=49_167;
const METHODS: [u16; 7] = [0x001, 0x003, 0x003, 0x004, 0x008, 0x009, 0x00a];
/// The attributes that a TURN request may have, and one that none has.
const ATTRIBUTES: [u16; 9] = [0x000c, 0x000d, 0x0012, 0x0017, 0x0018, 0x0019, 0x001a, 0x0022, 0x7fff];

fuzz_target!(|steps: Vec<Step>| {
    let mut world = World::new();
    for step in steps.iter().take(64) {
        world.step(step);
        world.check();
    }
    world.wait(3_601);
    assert_eq!((world.live, world.server.quotas().held_in_total()), (0, 0), "all is given back");
    assert!(world.server.poll_timeout().is_none(), "no deadline is left");
});

struct World {
    server: Server,
    now: Now,
    live: usize,
}

impl World {
    fn new() -> Self {
        let now = Now { wall: UNIX_EPOCH + Duration::from_secs(1_900_000_000), ..clock::now() };
        let mut world = Self { server: server(), now, live: 0 };
        world.bind_ports();
        world
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Raw(client, bytes) => self.feed(five_tuple(*client), bytes),
            Step::Request { client, method, transaction, signed, attributes } => {
                let from = five_tuple(*client);
                let request = self.request(from, *method, *transaction, *signed, attributes);
                self.feed(from, &request);
            }
            Step::FromPeer { peer, port, length } => {
                let relay = RelayPort { relay: 0, port: PORTS.start() + u16::from(*port) % PORTS.len() as u16 };
                let peer = SocketAddr::new(IpAddr::from([1, 1, 1, peer % 4]), 7);
                _ = self.server.to_client(relay, peer, usize::from(*length));
            }
            Step::Wait(seconds) => self.wait(u64::from(*seconds)),
        }
    }

    fn feed(&mut self, from: FiveTuple, bytes: &[u8]) {
        match sort(bytes) {
            Datagram::ChannelData(channel, payload) => _ = self.server.to_peer(&from, channel, payload.len()),
            Datagram::Send(message) => _ = self.server.send(&from, message),
            Datagram::Stun(message) => {
                let mut reply = Vec::new();
                self.server.handle_request(self.now, from, message, &mut reply);
                assert!(reply.len() <= 512, "{} bytes are too many for a stranger", reply.len());
                assert!(reply.is_empty() || Message::from_bytes(&reply).unwrap().is_response());
            }
            Datagram::Unknown => {}
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
                Effect::TakeRelay(_) => self.live += 1,
                Effect::CloseRelay(_) => self.live -= 1,
                Effect::Ended(_) | Effect::Reclaim(_) => {}
            }
        }
        self.bind_ports();
        let ports = self.server.ports(0);
        assert_eq!((ports.live(), ports.free()), (self.live, PORTS.len() - self.live));
        assert_eq!(self.server.quotas().held_in_total(), self.live);
    }

    fn bind_ports(&mut self) {
        while let Some(port) = self.server.ports(0).next_to_bind(0) {
            self.server.ports(0).bound(port);
        }
    }

    fn request(&self, from: FiveTuple, method: u8, transaction: u8, signed: bool, attributes: &[(u8, Vec<u8>)]) -> Vec<u8> {
        let method = Method::new(METHODS[usize::from(method) % METHODS.len()]);
        let kind = MessageType::from_class_method(MessageClass::Request, method);
        let mut message = Message::builder(kind, u128::from(transaction).into(), MessageWriteVec::new());
        for (kind, value) in attributes.iter().take(16) {
            let kind = AttributeType::new(ATTRIBUTES[usize::from(*kind) % ATTRIBUTES.len()]);
            _ = message.add_attribute(&RawAttribute::new(kind, &value[..value.len().min(64)]));
        }
        if signed {
            let nonce = Nonces::new(&[7; 32]).mint(self.now.unix(), from.client);
            message.add_attribute(&Username::new(&format!("{EXPIRES}:fuzzer")).unwrap()).unwrap();
            message.add_attribute(&Realm::new(REALM).unwrap()).unwrap();
            message.add_attribute(&Nonce::new(&nonce).unwrap()).unwrap();
            message.add_message_integrity_with_key(&KEY, IntegrityAlgorithm::Sha1).unwrap();
        }
        message.finish()
    }
}

static KEY: LazyLock<IntegrityKey> = LazyLock::new(|| {
    let user = TurnSecrets::new(&[SECRET]).unwrap().mint("fuzzer", EXPIRES);
    LongTermKeyCredentials::new(user.username, user.credential, REALM.to_owned()).make_key(IntegrityAlgorithm::Sha1)
});

fn five_tuple(client: u8) -> FiveTuple {
    let client = SocketAddr::from(([9, 0, 0, 1], 1_000 + u16::from(client % 8)));
    FiveTuple { client, server: ([5, 5, 5, 5], 3_478).into(), transport: Transport::Udp }
}

fn server() -> Server {
    let relay = IpAddr::from([5, 5, 5, 5]);
    let policy = Policy {
        relays: vec![RelayAddress { bound: relay, public: relay }],
        own_addresses: vec![relay],
        listeners: vec![([5, 5, 5, 5], 3_478).into()],
        allow: Vec::new(),
        deny: Vec::new(),
        denied: DeniedPeers::Discard,
        live: LivePorts::new(1),
    };
    let auth = Auth {
        realm: REALM.to_owned(),
        secrets: TurnSecrets::new(&[SECRET]).unwrap(),
        nonces: Nonces::new(&[7; 32]),
    };
    Server::new(Setup { shard: 0, auth, policy, quotas: Quotas::new(6, 0), ports: vec![PORTS.collect()] })
}
