//! Random requests against a small model: ports free and live make the range, quotas return to zero, nothing panics.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, UNIX_EPOCH},
};

use halfway::{
    clock::{self, Now},
    turn::{
        Channel, FiveTuple, Transport,
        counters::{Counters, Dropped},
        demux::{Datagram, sort},
        forward::Load,
        server::Effect,
    },
};
use proptest::prelude::*;

use super::{
    client::Client,
    trace::{START, World, top_up},
};

/// What somebody does.
#[derive(Clone, Debug)]
enum Step {
    Say(usize, String),
    Wait(u64),
    Bytes(usize, Vec<u8>),
}

const PORTS: std::ops::RangeInclusive<u16> = 49152..=49163;
const AGENTS: [&str; 3] = ["alice", "bob", "carol"];
/// Each agent speaks from so many ports.
const EACH: usize = 4;

fn step() -> impl Strategy<Value = Step> {
    let who = 0..AGENTS.len() * EACH;
    let requests = prop::sample::select(vec![
        "Binding",
        "Allocate",
        "Allocate auth",
        "Allocate auth",
        "Allocate auth lifetime=3600",
        "Allocate auth tx=1",
        "Allocate auth even=0",
        "Allocate auth additional=2",
        "Allocate auth additional=2",
        "Allocate auth additional=2 even=0",
        "Allocate auth family=2",
        "Refresh auth lifetime=0 family=1",
        "Refresh auth lifetime=0 family=2",
        "Refresh auth lifetime=3600 family=2",
        "CreatePermission auth peer=[2606::1]:7",
        "ChannelBind auth peer=[2606::1]:7 channel=4002",
        "Send peer=[2606::1]:7 hello",
        "ChannelData 0x4002 hello",
        "Allocate auth expires=-5",
        "Allocate auth garbled",
        "Refresh auth",
        "Refresh auth lifetime=0",
        "Refresh auth lifetime=0 tx=2",
        "Refresh user=bob",
        "CreatePermission auth peer=1.1.1.1:7 peer=2.2.2.2:7",
        "CreatePermission auth peer=10.0.0.1:7",
        "ChannelBind auth peer=1.1.1.1:7 channel=4000",
        "ChannelBind auth peer=1.1.1.1:8 channel=4000",
        "ChannelBind auth peer=5.5.5.5:49152 channel=4001",
        "ChannelData 0x4000 hello",
        "ChannelData 0x4001 hello",
        "Send peer=1.1.1.1:7 hello",
        "Send peer=5.5.5.5:49153 hello",
    ]);
    prop_oneof![
        8 => (who.clone(), requests).prop_map(|(who, text)| Step::Say(who, text.to_owned())),
        1 => prop_oneof![Just(1), Just(31), Just(299), Just(601), Just(1_201), Just(4_000)].prop_map(Step::Wait),
        1 => (who, prop::collection::vec(any::<u8>(), 0..80)).prop_map(|(who, bytes)| Step::Bytes(who, bytes)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn ports_and_quotas_add_up(steps in prop::collection::vec(step(), 1..200)) {
        run(&steps);
    }
}

fn run(steps: &[Step]) {
    let mut now = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
    let world = World { ports: PORTS, per_agent: 3, total: 8, v6: true, routes: true, ..World::default() };
    let mut server = world.server();
    let mut clients: HashMap<usize, Client> = HashMap::new();
    let mut routes = HashSet::new();
    // By family.
    let mut live = [0_usize; 2];
    let mut ended = 0;
    for step in steps {
        match step {
            Step::Wait(seconds) => {
                now = now + Duration::from_secs(*seconds);
                server.handle_timeout(now);
                server.begin_batch(now);
            }
            Step::Say(who, text) => {
                let bytes = clients.entry(*who).or_default().say(text, AGENTS[who / EACH]);
                let before = server.counters();
                let reply = feed(&mut server, now, *who, &bytes);
                assert_announced(*who, &bytes, [before, server.counters()], &routes);
                if !reply.is_empty() {
                    clients.entry(*who).or_default().hear(&reply, &[]);
                }
            }
            Step::Bytes(who, bytes) => {
                feed(&mut server, now, *who, bytes);
            }
        }
        while let Some(effect) = server.poll_effect() {
            match effect {
                Effect::TakeRelay(at) => live[usize::from(at.relay)] += 1,
                Effect::CloseRelay(at) => live[usize::from(at.relay)] -= 1,
                Effect::Ended(_) => ended += 1,
                Effect::Reclaim(_) => {}
                Effect::RouteAdded(route) => _ = routes.insert((route.client, route.channel)),
                Effect::RouteRemoved(client, channel) => {
                    let was_there = routes.remove(&(client, channel));
                    assert!(was_there || client.transport == Transport::Tcp, "{client:?} {channel:?}");
                }
            }
        }
        top_up(&mut server, 2);
        for (relay, live) in (0..).zip(live) {
            let ports = server.ports(relay).count();
            assert_eq!((ports.live, ports.free + ports.bound), (live as u64, (PORTS.len() - live) as u64));
        }
        let counters = server.counters();
        let allocations = counters.allocations;
        assert_eq!((counters.allocations_made - ended, counters.deadlines), (allocations, allocations));
        assert_eq!(counters.ports.live as usize, live[0] + live[1]);
        assert!(counters.allocations_on_streams <= allocations);
        assert_eq!(server.quotas().held_in_total() as u64, allocations, "one seat, however many families");
        assert!(allocations <= 8, "the total");
    }
    now = now + Duration::from_secs(3_601);
    server.handle_timeout(now);
    assert_eq!(server.quotas().held_in_total(), 0, "all seats are given back");
    let counters = server.counters();
    assert_eq!((counters.allocations_on_streams, counters.ports.live, counters.deadlines), (0, 0, 0));
    for relay in 0..2 {
        let ports = server.ports(relay).count();
        assert_eq!((ports.live, ports.free + ports.bound), (0, PORTS.len() as u64));
    }
    assert!(server.poll_timeout().is_none(), "no deadline is left");
    let gone = std::iter::from_fn(|| server.poll_effect());
    let removed = gone.filter_map(|effect| match effect {
        Effect::RouteRemoved(client, channel) if client.transport == Transport::Udp => {
            Some((client, channel))
        }
        _ => None,
    });
    assert_eq!(removed.collect::<HashSet<_>>(), routes, "no route outlives its allocation");
}

/// Whoever follows the routes knows the channels of the table, and no others.
fn assert_announced(
    who: usize,
    bytes: &[u8],
    [before, after]: [Counters; 2],
    routes: &HashSet<(FiveTuple, Channel)>,
) {
    let from = five_tuple(who);
    let Datagram::ChannelData(channel, _) = sort(bytes) else { return };
    if from.transport == Transport::Tcp {
        return;
    }
    let is_announced = routes.contains(&(from, channel));
    if after.to_peers.packets > before.to_peers.packets {
        assert!(is_announced, "{from:?} {channel:?} passed");
    }
    let refused = |counters: Counters| {
        [Dropped::NoChannel, Dropped::NoAllocation].map(|why| counters.drops[why as usize])
    };
    if refused(after) > refused(before) {
        assert!(!is_announced, "{from:?} {channel:?} did not pass");
    }
}

fn feed(server: &mut halfway::turn::server::Server, now: Now, who: usize, bytes: &[u8]) -> Vec<u8> {
    let from = five_tuple(who);
    let mut reply = Vec::new();
    match sort(bytes) {
        Datagram::ChannelData(channel, payload) => {
            _ = server.to_peer(&from, channel, Load::one(payload.len()))
        }
        Datagram::Send(message) => _ = server.send(&from, message),
        Datagram::Stun(message) => server.handle_request(now, from, message, &mut reply),
        Datagram::Unknown => {}
    }
    reply
}

fn five_tuple(who: usize) -> FiveTuple {
    FiveTuple {
        client: format!("9.0.0.{}:{}", who / EACH + 1, 1_000 + who % EACH).parse().unwrap(),
        server: "5.5.5.5:3478".parse().unwrap(),
        transport: if who.is_multiple_of(2) { Transport::Udp } else { Transport::Tcp },
    }
}
