//! The program in the kernel, run there on packets of every shape (BPF_PROG_TEST_RUN), beside the table of user space, by
//! whose decisions it has to go. Wants root; makes a network namespace of its own.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly")]
#![allow(clippy::print_stdout, reason = "figures are to be seen")]

mod frames;
mod world;

use std::time::Duration;

use frames::{Checksum, Frame};
use halfway::clock;
use world::{CLIENTS, PEERS, Verdict, World};

const CHANNEL: u16 = 0x4abc;

/// A world in which `client` has a channel to `peer`, and both are heard of.
fn bound(client: usize, peer: std::net::SocketAddr) -> World {
    let mut world = World::new();
    world.allocate(client);
    world.bind(client, CHANNEL, peer);
    let (hello, back) =
        (world.client_says(client, CHANNEL, b"hello"), world.peer_says(client, peer, b"back"));
    assert_eq!(world.check(&hello, 1), Verdict::Pass, "nobody knows the way to the peer yet");
    assert!(matches!(world.check(&back, 1), Verdict::Sent { .. }), "the way to the client is known");
    world
}

fn sent(verdict: Verdict) -> (u32, Frame) {
    match verdict {
        Verdict::Sent { interface, frame } => (interface, frame),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "wants root"]
fn every_shape_both_ways_in_every_family_and_across() {
    for (client, peer) in (0..CLIENTS.len()).flat_map(|client| PEERS.map(|peer| (client, peer))) {
        let mut world = bound(client, peer.parse().unwrap());
        for length in [0, 1, 2, 3, 4, 5, 160, 1_199, 1_200] {
            let payload: Vec<u8> = (0..length).map(|at| (at * 7 + length) as u8).collect();
            let out = sent(world.check(&world.client_says(client, CHANNEL, &payload), 1)).1;
            assert_eq!((out.payload.len(), out.checksum), (length, Checksum::Right), "{client} to {peer}");
            let back = sent(world.check(&world.peer_says(client, peer.parse().unwrap(), &payload), 1)).1;
            assert_eq!((back.payload.len(), back.checksum), (length + 4, Checksum::Right));
        }
        for padding in 1..=4 {
            let mut padded = world.client_says(client, CHANNEL, b"hello");
            padded.payload.extend((0..padding).map(|byte| 0xa0 + byte));
            match world.check(&padded, 1) {
                Verdict::Sent { frame, .. } => {
                    assert_eq!((&*frame.payload, padding < 4), (&b"hello"[..], true))
                }
                other => assert_eq!((other, padding), (Verdict::Pass, 4)),
            }
        }
    }
}

#[test]
#[ignore = "wants root"]
fn two_clients_of_this_host_in_every_family() {
    for (one, other) in (0..CLIENTS.len()).flat_map(|one| (0..CLIENTS.len()).map(move |other| (one, other))) {
        if one == other {
            continue;
        }
        for v6 in [false, true] {
            let mut world = World::new();
            let relayed = [one, other].map(|client| world.allocate(client)[usize::from(v6)]);
            world.bind(one, 0x4001, relayed[1]);
            let hello = world.client_says(one, 0x4001, b"hello");
            assert_eq!(world.check(&hello, 1), Verdict::Pass, "the other one has no channel");
            world.bind(other, 0x7ffe, relayed[0]);
            let back = world.client_says(other, 0x7ffe, b"back");
            let (_, got) = sent(world.check(&back, 1));
            assert_eq!(got.payload, [&[0x40, 1, 0, 4], &b"back"[..]].concat());
            let (_, got) = sent(world.check(&hello, 1));
            assert_eq!(got.payload, [&[0x7f, 0xfe, 0, 5], &b"hello"[..]].concat());
            let mut forged = world.peer_says(other, relayed[0], b"forged");
            assert_eq!(world.check(&forged, 1), Verdict::Pass, "our own address comes from nowhere outside");
            forged.payload = [&[0x7f, 0xfe, 0, 1], &b"x"[..]].concat();
            assert_eq!(world.check(&forged, 1), Verdict::Pass);
        }
    }
}

#[test]
#[ignore = "wants root"]
fn tags_are_those_of_the_one_it_is_for() {
    let tag = |number: u8| [0x81, 0, 0, number];
    let service = [0x88, 0xa8, 0, 7];
    let kinds = [vec![], vec![tag(1)], vec![tag(2)], vec![service, tag(3)]];
    for (of_client, of_peer) in kinds.iter().flat_map(|one| kinds.iter().map(move |other| (one, other))) {
        let (client, peer) = (0, PEERS[0].parse().unwrap());
        let mut world = bound(client, peer);
        let (mut hello, mut back) =
            (world.client_says(client, CHANNEL, b"hello"), world.peer_says(client, peer, b"back"));
        hello.link.tags.clone_from(of_client);
        back.link.tags.clone_from(of_peer);
        world.check(&back, 1);
        assert_eq!(sent(world.check(&hello, 1)).1.link, back.link.reversed());
        assert_eq!(sent(world.check(&back, 1)).1.link, hello.link.reversed());
    }
    let mut world = bound(0, PEERS[0].parse().unwrap());
    let mut deep = world.client_says(0, CHANNEL, b"hello");
    deep.link.tags = vec![service, tag(1), tag(2)];
    assert_eq!(world.check(&deep, 1), Verdict::Pass, "three tags");
}

/// Of clients by the first interface, of peers by the second, as the routes have it.
#[test]
#[ignore = "wants root"]
fn each_is_heard_by_the_interface_that_routes_name() {
    let peer = PEERS[0].parse().unwrap();
    for crosses in [true, false] {
        let mut world = World::between(crosses);
        let relayed = [0, 1].map(|client| world.allocate(client)[0]);
        world.bind(0, CHANNEL, peer);
        let (hello, back) = (world.client_says(0, CHANNEL, b"hello"), world.peer_says(0, peer, b"back"));
        // The first packet: neighbours are known, and nobody else need be.
        let verdict = world.run(&hello, 1);
        assert_eq!(matches!(verdict, Verdict::Sent { interface: 2, .. }), crosses, "{verdict:?}");
        assert_eq!(world.run(&back, 1), Verdict::Pass, "somebody says that he is the peer");
        assert_eq!(world.run(&hello, 2), Verdict::Pass, "somebody says that he is the client");
        world.run(&back, 2);
        let verdict = world.run(&hello, 1);
        assert_eq!(matches!(verdict, Verdict::Sent { interface: 2, .. }), crosses, "nobody is led astray");
        if crosses {
            assert_eq!(sent(verdict).1.link, back.link.reversed());
            assert_eq!(sent(world.run(&back, 2)).0, 1);
        }
        // Both by one interface.
        world.bind(0, 0x4001, relayed[1]);
        world.bind(1, 0x4001, relayed[0]);
        let (one, other) = (world.client_says(0, 0x4001, b"one"), world.client_says(1, 0x4001, b"other"));
        world.run(&one, 1);
        assert_eq!(sent(world.run(&other, 1)).0, 1);
        let passes = world.passes();
        assert_eq!((passes[8], passes[9] > 0), (2, !crosses));
        // The route to the peer now leads where clients are.
        world.reroute(peer);
        world.settle();
        let verdict = world.run(&back, 2);
        assert_eq!(verdict, Verdict::Pass, "the routes have changed");
        world.run(&back, 1);
        assert_eq!(sent(world.run(&hello, 1)).0, 1);
    }
}

#[test]
#[ignore = "wants root"]
fn what_is_unusual_goes_up_as_it_came() {
    let peer = PEERS[0].parse().unwrap();
    let mut world = bound(0, peer);
    let usual = world.client_says(0, CHANNEL, b"hello");
    let plain = usual.write();
    let changes: [(&str, usize, u8); 12] = [
        ("multicast", 0, 1),
        ("ARP", 13, 6),
        ("options", 14, 0x46),
        ("another version", 14, 0x65),
        ("a total that is too long", 16, 1),
        ("more fragments", 20, 0x20),
        ("a later fragment", 21, 1),
        ("the reserved flag", 20, 0x80),
        ("TCP", 23, 6),
        ("the last hop", 22, 1),
        ("no hop", 22, 0),
        ("a length of UDP that lies", 39, 99),
    ];
    for (what, at, byte) in changes {
        let mut bytes = plain.clone();
        bytes[at] = byte;
        frames::mend_header(&mut bytes);
        assert_eq!(world.check_bytes(&bytes, 1), Verdict::Pass, "{what}");
    }
    let mut broken = plain.clone();
    broken[24] ^= 1;
    assert_eq!(world.check_bytes(&broken, 1), Verdict::Pass, "a header that is broken");
    for length in 0..plain.len() {
        assert_eq!(world.check_bytes(&plain[..length], 1), Verdict::Pass, "cut to {length}");
    }
    for checksum in [Checksum::Unfinished, Checksum::None, Checksum::Wrong] {
        let verdict = world.check(&Frame { checksum, ..usual.clone() }, 1);
        match checksum {
            Checksum::Unfinished => assert_eq!(verdict, Verdict::Pass),
            // None stays none, and wrong stays wrong: the peer is to see it.
            _ => assert_eq!(sent(verdict).1.checksum, checksum),
        }
    }
    // Behind it, as a short frame has it on Ethernet, lies nothing that counts.
    let long = [&plain[..], &[0; 20]].concat();
    assert!(matches!(world.check_bytes(&long, 1), Verdict::Sent { .. }));
    let passed = world.passes();
    assert_eq!((passed[2], passed[3]), (2, 1), "last hops and an unfinished checksum");
}

#[test]
#[ignore = "wants root"]
fn what_does_not_fit_goes_up() {
    for (client, peer) in (0..CLIENTS.len()).flat_map(|client| PEERS.map(|peer| (client, peer))) {
        let peer: std::net::SocketAddr = peer.parse().unwrap();
        let mut world = bound(client, peer);
        let ip = |v6: bool| if v6 { 40 } else { 20 };
        let (near, far) = (ip(CLIENTS[client].0.contains('[')), ip(peer.is_ipv6()));
        let fits_out = 1_500 - 8 - far.max(near + 4);
        let fits_in = 1_500 - 8 - (near + 4).max(far);
        for (fits, length) in [(true, 0), (false, 1)] {
            let mut out = world.client_says(client, CHANNEL, &vec![1; fits_out + length]);
            let mut back = world.peer_says(client, peer, &vec![2; fits_in + length]);
            (out.ip.dont_fragment, back.ip.dont_fragment) = (true, true);
            // Where the packet shrinks it could not have come, had it been longer.
            if fits || far > near + 4 {
                assert_eq!(matches!(world.check(&out, 1), Verdict::Sent { .. }), fits, "{client} to {peer}");
            }
            if fits || near + 4 > far {
                assert_eq!(matches!(world.check(&back, 1), Verdict::Sent { .. }), fits, "{peer} to {client}");
            }
        }
        // RFC 7915: what routers of IPv4 may cut, those of IPv6 cannot.
        let mut cut = world.client_says(client, CHANNEL, &[3; 1_240]);
        cut.ip.dont_fragment = false;
        let is_translated = near == 20 && far == 40;
        assert_eq!(world.check(&cut, 1) == Verdict::Pass, is_translated, "{client} to {peer}");
    }
}

#[test]
#[ignore = "wants root"]
fn what_has_ended_is_not_relayed() {
    let peer = PEERS[0].parse().unwrap();
    let mut world = bound(0, peer);
    let (hello, back) = (world.client_says(0, CHANNEL, b"hello"), world.peer_says(0, peer, b"back"));
    world.let_expire(Duration::from_secs(599));
    assert!(matches!(world.check(&hello, 1), Verdict::Sent { .. }));
    world.let_expire(Duration::from_secs(600));
    for frame in [&hello, &back] {
        assert_eq!(world.check(frame, 1), Verdict::Pass, "the channel has ended");
    }
    world.let_expire(Duration::from_secs(901));
    world.bind(0, CHANNEL, peer);
    world.check(&hello, 1);
    assert!(matches!(world.check(&back, 1), Verdict::Sent { .. }), "bound again");
    world.release(0);
    for frame in [&hello, &back] {
        assert_eq!(world.check(frame, 1), Verdict::Pass, "the allocation has ended");
    }
}

/// Nobody ends it: not the shard, which hangs.
#[test]
#[ignore = "wants root"]
fn a_channel_ends_by_itself() {
    let peer = PEERS[0].parse().unwrap();
    let mut world = World::new();
    world.allocate(0);
    world.bind_for(0, CHANNEL, peer, Duration::from_millis(400));
    let back = world.peer_says(0, peer, b"back");
    let hello = world.client_says(0, CHANNEL, b"hello");
    world.run(&hello, 1);
    let end = clock::now().mono + Duration::from_millis(400);
    let mut passed = 0;
    while clock::now().mono < end + Duration::from_millis(50) {
        let began = clock::now().mono;
        match world.run(&back, 1) {
            Verdict::Sent { .. } => passed += 1,
            verdict => assert_eq!(verdict, Verdict::Pass),
        }
        if began >= end {
            assert_eq!(world.run(&back, 1), Verdict::Pass, "after its end");
        }
    }
    assert!(passed > 10, "{passed}");
}

#[test]
#[ignore = "wants root"]
fn the_limit_of_an_agent_is_one_for_both_paths() {
    let peer = PEERS[0].parse().unwrap();
    let mut world = World::with_limit(100_000);
    world.allocate(0);
    world.bind(0, CHANNEL, peer);
    let frame = world.client_says(0, CHANNEL, &[7; 1_000]);
    let back = world.peer_says(0, peer, &[7; 1_000]);
    world.run(&frame, 1);
    world.run(&back, 1);
    let count = |world: &mut World, frame| {
        (0..80).filter(|_| matches!(world.run(frame, 1), Verdict::Sent { .. })).count()
    };
    // A second's worth at once: part of it in user space, the rest in the kernel.
    assert_eq!(world.in_user_space(0, CHANNEL, 1_000, 60), 60);
    let began = clock::now().mono;
    let in_kernel = count(&mut world, &frame);
    let earned = (clock::now().mono - began).as_millis() as usize / 10 + 2;
    assert!((39..=40 + earned).contains(&in_kernel), "{in_kernel}");
    assert_eq!(world.run(&frame, 1), Verdict::Drop);
    assert!(world.in_user_space(0, CHANNEL, 1_000, 60) <= earned, "user space sees what the kernel took");
    assert!(count(&mut world, &back) >= 79, "each direction for itself");
    let carried = world.settle();
    assert_eq!(carried.to_peers.packets, in_kernel as u64);
    assert!(carried.over_bandwidth >= 80 - in_kernel as u64);
}

#[test]
#[ignore = "wants root"]
fn what_was_relayed_is_told_where_user_space_counts() {
    let peer = PEERS[0].parse().unwrap();
    let mut world = bound(0, peer);
    for _ in 0..5 {
        world.check(&world.client_says(0, CHANNEL, b"hello"), 1);
    }
    let carried = world.settle();
    let (out, back) = (carried.to_peers, carried.to_clients);
    assert_eq!([(out.packets, out.bytes), (back.packets, back.bytes)], [(5, 25), (1, 4)]);
    assert_eq!(world.settle(), Default::default(), "once");
    let (heard, active) = world.idle_for(0);
    assert!(
        heard < Duration::from_millis(100) && active < Duration::from_millis(100),
        "{heard:?} {active:?}"
    );
    std::thread::sleep(Duration::from_millis(300));
    world.check(&world.peer_says(0, peer, b"back"), 1);
    world.settle();
    let (heard, active) = world.idle_for(0);
    assert!(
        heard > Duration::from_millis(280) && active < Duration::from_millis(100),
        "{heard:?} {active:?}"
    );
    world.check(&world.client_says(0, CHANNEL, b"last"), 1);
    assert_eq!(world.release(0).to_peers.packets, 1, "told at the end");
}

#[test]
#[ignore = "wants root"]
fn many_random_packets_go_as_the_table_of_user_space_says() {
    let seed =
        std::env::var("XDP_SEED").map_or_else(|_| std::process::id().into(), |seed| seed.parse().unwrap());
    println!("XDP_SEED={seed}");
    let mut world = World::new();
    let mut random = world::Random(seed);
    let mut verdicts = [0; 3];
    for _ in 0..200_000 {
        world.step(&mut random);
        let (bytes, interface) = world.any_packet(&mut random);
        verdicts[match world.check_bytes(&bytes, interface) {
            Verdict::Pass => 0,
            Verdict::Drop => 1,
            Verdict::Sent { .. } => 2,
        }] += 1;
    }
    println!("{verdicts:?} left, dropped, relayed");
    assert!(verdicts[0] > 50_000 && verdicts[1] == 0 && verdicts[2] > 20_000, "{verdicts:?}");
}

/// Not a test of time: the figures are printed, and `docs/performance.md` has them.
#[test]
#[ignore = "wants root"]
fn time_of_each_shape() {
    for (client, peer) in (0..CLIENTS.len()).flat_map(|client| PEERS.map(|peer| (client, peer))) {
        let peer: std::net::SocketAddr = peer.parse().unwrap();
        let mut world = bound(client, peer);
        let out = world.client_says(client, CHANNEL, &[1; 160]);
        let back = world.peer_says(client, peer, &[2; 160]);
        println!(
            "{} -> {peer}: {} ns; back: {} ns",
            CLIENTS[client].0,
            world.median(&out),
            world.median(&back)
        );
    }
    let mut world = World::new();
    println!("nothing: {} ns", world.overhead());
    let relayed = [0, 1].map(|client| world.allocate(client)[0]);
    world.bind(0, 0x4001, relayed[1]);
    world.bind(1, 0x4001, relayed[0]);
    let frames = [0, 1].map(|client| world.client_says(client, 0x4001, &[1; 160]));
    frames.iter().for_each(|frame| _ = world.run(frame, 1));
    println!("between two clients: {} ns", world.median(&frames[0]));
    for allocations in [1, 10_000] {
        let (locked, one, any) = world::crowd(allocations);
        println!(
            "{allocations} allocations with four channels: {one} ns for packets of one, {any} of any, {locked} KiB"
        );
    }
}
