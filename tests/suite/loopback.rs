//! A relay on loopback, for tests that speak to it through real sockets.

use std::ops::RangeInclusive;

use halfway::{
    credentials::{revocations::Revocations, turn_rest::TurnSecrets},
    relay::{self, Relay, RelayConfig},
    turn::{
        RelayAddress,
        nonce::Nonces,
        policy::{DeniedPeers, LivePorts, Policy},
        quota::{Limits, Quotas},
        strangers::Strangers,
    },
};

pub const SECRET: &str = "sixteen bytes or more";

/// Relays on 127.0.0.1 and ::1, to peers there.
pub fn relay(listen: &str, shards: usize, ports: RangeInclusive<u16>) -> Relay {
    let address = |ip: &str| RelayAddress { bound: ip.parse().unwrap(), public: ip.parse().unwrap() };
    let relays = vec![address("127.0.0.1"), address("::1")];
    let policy = Policy {
        live: LivePorts::new(relays.len()),
        signaled: None,
        own_addresses: Vec::new(),
        listeners: Vec::new(),
        allow: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
        deny: Vec::new(),
        denied: DeniedPeers::Refuse,
        relays,
    };
    let config = RelayConfig {
        ports,
        policy,
        quotas: Quotas::new(Limits { per_agent: 16, ..Limits::default() }),
        // All clients of all tests come from one address.
        strangers: Strangers::new(0),
        realm: "halfway".to_owned(),
        secrets: TurnSecrets::new(&[SECRET]).unwrap(),
        nonces: Nonces::new(&[1; 32]),
        revocations: Revocations::default(),
        kernel: None,
    };
    let listeners = relay::bind(listen.parse().unwrap(), shards).unwrap();
    Relay::start(config, vec![listeners], Vec::new()).unwrap()
}
