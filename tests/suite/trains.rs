//! Packets that the kernel gets and gives in trains (GSO, GRO), and packets between two clients of this host.

use std::{
    net::{SocketAddr, UdpSocket},
    ops::Range,
    time::Duration,
};

use halfway::{
    clock,
    relay::Relay,
    turn::counters::Dropped,
    udp::{Arena, Outbox, Way},
};

use super::{
    loopback::{self, SECRET},
    turn::client::Client,
};

/// A client with an allocation.
struct Party {
    socket: UdpSocket,
    client: Client,
    relayed: SocketAddr,
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket
}

impl Party {
    fn new(relay: &Relay) -> Self {
        let socket = socket();
        socket.connect(relay.listening()[0]).unwrap();
        let client = Client::with_secret(SECRET, clock::now().unix() + 600);
        let mut party = Self { socket, client, relayed: "127.0.0.1:0".parse().unwrap() };
        party.ask("Allocate");
        let answer = party.ask("Allocate auth");
        let relayed = answer.split("relayed=").nth(1).unwrap().split(' ').next().unwrap();
        party.relayed = relayed.parse().unwrap();
        party
    }

    fn ask(&mut self, text: &str) -> String {
        self.socket.send(&self.client.say(text, "alice")).unwrap();
        let mut buffer = [0; 1_024];
        let length = self.socket.recv(&mut buffer).unwrap();
        self.client.hear(&buffer[..length], &[])
    }

    fn bind(&mut self, channel: u16, peer: SocketAddr) {
        self.ask(&format!("ChannelBind auth peer={peer} channel={channel:x}"));
    }
}

/// A payload of so many bytes that says which one it is.
fn payload(number: usize, length: usize) -> Vec<u8> {
    let mut payload = vec![number as u8; length];
    payload[..2].copy_from_slice(&(number as u16).to_be_bytes());
    payload
}

fn channel_data(channel: u16, payload: &[u8]) -> Vec<u8> {
    let header = [channel.to_be_bytes(), (payload.len() as u16).to_be_bytes()].concat();
    [&header, payload].concat()
}

/// Sends them as trains, as far as their lengths allow.
fn send_in_trains(socket: &UdpSocket, to: SocketAddr, packets: &[Vec<u8>]) {
    let (mut outbox, mut arena) = (Outbox::new(true), Arena::new(packets.len()));
    for packet in packets {
        arena.lend()[..packet.len()].copy_from_slice(packet);
        let body = arena.keep(packet.len());
        outbox.push(&Way { socket: 0, from: None, to }, &[], body);
    }
    assert_eq!(outbox.flush(&arena, |_| Some(socket)), 0);
}

#[track_caller]
fn assert_hears(socket: &UdpSocket, packets: &[Vec<u8>]) {
    let mut buffer = [0; 2_048];
    for (number, packet) in packets.iter().enumerate() {
        let length = socket.recv(&mut buffer).unwrap_or_else(|error| panic!("packet {number}: {error}"));
        assert_eq!(&buffer[..length], packet, "packet {number}");
    }
}

fn some(numbers: Range<usize>, length: usize) -> Vec<Vec<u8>> {
    numbers.map(|number| payload(number, length)).collect()
}

#[test]
fn a_train_comes_apart_and_each_flow_stays_in_order() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=38_999);
    let mut alice = Party::new(&relay);
    let peers = [socket(), socket()];
    for (channel, peer) in [0x4000, 0x4001].into_iter().zip(&peers) {
        alice.bind(channel, peer.local_addr().unwrap());
    }
    // One train: two channels in turns, and at its end a shorter packet. Then one of other lengths.
    let lengths = [vec![200; 60], vec![77], vec![1_000; 20], vec![3]].concat();
    let channel = |number: usize| usize::from(number % 7 > 3);
    let payloads: Vec<_> =
        lengths.iter().enumerate().map(|(number, length)| payload(number, *length)).collect();
    let mut packets: Vec<_> = payloads
        .iter()
        .enumerate()
        .map(|(number, payload)| channel_data(0x4000 + channel(number) as u16, payload))
        .collect();
    // Neither a channel that is not bound nor a length that lies disturbs the others of the train.
    packets.insert(10, channel_data(0x4002, &[0; 200]));
    packets.insert(20, [&[0x40, 0, 0xff, 0xff][..], &[0; 200]].concat());
    send_in_trains(&alice.socket, relay.listening()[0], &packets);
    for (index, peer) in peers.iter().enumerate() {
        let own = payloads.iter().enumerate().filter(|(number, _)| channel(*number) == index);
        assert_hears(peer, &own.map(|(_, payload)| payload.clone()).collect::<Vec<_>>());
    }
    let counters = relay.counters();
    assert_eq!(counters.to_peers.packets, payloads.len() as u64);
    assert_eq!(counters.to_peers.bytes, lengths.iter().sum::<usize>() as u64);
    assert_eq!(counters.drops[Dropped::NoChannel as usize], 1);
    assert_eq!(counters.drops[Dropped::Malformed as usize], 1);
}

#[test]
fn a_train_from_a_peer_gets_a_header_for_each_packet() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=38_999);
    let mut alice = Party::new(&relay);
    let peer = socket();
    let payloads = [some(0..50, 300), some(50..51, 20)].concat();
    alice.ask(&format!("CreatePermission auth peer={}", peer.local_addr().unwrap()));
    send_in_trains(&peer, alice.relayed, &payloads);
    for payload in &payloads {
        let mut buffer = [0; 1_024];
        let length = alice.socket.recv(&mut buffer).unwrap();
        assert_eq!(length, 36 + payload.len().next_multiple_of(4), "a Data indication");
        assert_eq!(&buffer[36..36 + payload.len()], payload);
    }
    alice.bind(0x4000, peer.local_addr().unwrap());
    send_in_trains(&peer, alice.relayed, &payloads);
    let wrapped: Vec<_> = payloads.iter().map(|payload| channel_data(0x4000, payload)).collect();
    assert_hears(&alice.socket, &wrapped);
    assert_eq!(relay.counters().to_clients.packets, 102);
}

#[test]
fn two_clients_of_one_host_hear_each_other_in_the_same_shard_and_across() {
    let relay = loopback::relay("127.0.0.1:0", 2, 30_000..=38_999);
    let shard = |party: &Party| party.relayed.port() / 2 % 2;
    let mut alice = Party::new(&relay);
    // The kernel deals clients out by their ports.
    let mut met = [false; 2];
    while met != [true; 2] {
        let mut bob = Party::new(&relay);
        let across = shard(&bob) != shard(&alice);
        if met[usize::from(across)] {
            continue;
        }
        met[usize::from(across)] = true;
        let number = 0x4000 + u16::from(across);
        alice.bind(number, bob.relayed);
        bob.bind(0x5000, alice.relayed);
        for round in 0..20 {
            let payloads =
                [some(round * 40..round * 40 + 39, 500), some(round * 40 + 39..round * 40 + 40, 9)].concat();
            let as_heard = |channel| -> Vec<_> {
                payloads.iter().map(|payload| channel_data(channel, payload)).collect()
            };
            send_in_trains(&alice.socket, relay.listening()[0], &as_heard(number));
            assert_hears(&bob.socket, &as_heard(0x5000));
            as_heard(0x5000).iter().for_each(|packet| _ = bob.socket.send(packet).unwrap());
            assert_hears(&alice.socket, &as_heard(number));
        }
    }
    let counters = relay.counters();
    assert_eq!((counters.to_peers.packets, counters.to_clients.packets), (3_200, 3_200));
}

#[test]
fn what_a_flood_pushes_out_of_the_buffer_is_counted() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=38_999);
    let flood = socket();
    flood.connect(relay.listening()[0]).unwrap();
    let sent = 200_000_u64;
    (0..sent).for_each(|_| _ = flood.send(&[0x80; 1_400]).unwrap());
    let mut read = 0;
    // Until all is read: the counts come from between two batches.
    for _ in 0..1_000 {
        let counters = relay.counters();
        read = counters.drops[Dropped::Malformed as usize] + counters.drops[Dropped::Overflow as usize];
        if read == sent {
            break;
        }
    }
    assert_eq!(read, sent, "read, or lost for want of room");
}

/// A sequence that looks random and is the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

#[test]
fn any_mixture_comes_apart_as_if_each_packet_had_come_alone() {
    let relay = loopback::relay("127.0.0.1:0", 1, 30_000..=38_999);
    let mut alice = Party::new(&relay);
    let peers = [socket(), socket()];
    let channels = [0x4000, 0x4001];
    for (channel, peer) in channels.into_iter().zip(&peers) {
        alice.bind(channel, peer.local_addr().unwrap());
    }
    let mut dice = Dice(7);
    let (mut relayed, mut dropped) = (0, 0);
    for _ in 0..300 {
        // Few lengths, so that there are neighbours alike.
        let lengths = [2, 2 + dice.below(900), 200];
        let mut messages = Vec::new();
        let mut expected = [Vec::new(), Vec::new()];
        for number in 0..1 + dice.below(90) {
            let payload = payload(number, lengths[dice.below(3)]);
            messages.push(match dice.below(20) {
                0 => channel_data(0x4002, &payload),
                1 => [&[0x40, 0, 0xff, 0xff][..], &payload].concat(),
                2 => [&[0x80][..], &payload].concat(),
                3 => [&channel_data(0x4000, &payload)[..], &[0; 3]].concat(),
                _ => channel_data(channels[dice.below(2)], &payload),
            });
            let message = messages.last().unwrap();
            match message[..2] {
                [0x40, channel @ (0 | 1)] if message[2..4] != [0xff, 0xff] => {
                    expected[usize::from(channel)].push(payload);
                }
                _ => dropped += 1,
            }
        }
        send_in_trains(&alice.socket, relay.listening()[0], &messages);
        for (peer, expected) in peers.iter().zip(&expected) {
            assert_hears(peer, expected);
            relayed += expected.len() as u64;
            // And back.
            send_in_trains(peer, alice.relayed, expected);
        }
        let mut heard = [Vec::new(), Vec::new()];
        let mut buffer = [0; 2_048];
        for _ in 0..expected.concat().len() {
            let length = alice.socket.recv(&mut buffer).unwrap();
            assert_eq!(usize::from(u16::from_be_bytes([buffer[2], buffer[3]])), length - 4);
            heard[usize::from(buffer[1])].push(buffer[4..length].to_vec());
        }
        assert_eq!(heard, expected);
    }
    let counters = relay.counters();
    assert_eq!((counters.to_peers.packets, counters.to_clients.packets), (relayed, relayed));
    assert_eq!(counters.drops.iter().sum::<u64>(), dropped);
}
