//! What those get who have proved nothing: little, and not for ever.

use std::time::{Duration, UNIX_EPOCH};

use halfway::{
    clock::{self, Now},
    turn::{
        FiveTuple, Transport,
        demux::{Datagram, sort},
        forward::Load,
    },
};

use super::{
    client::Client,
    trace::{ALLOCATED, START, World},
};

/// Two answers a second, 20 at once. All the names live in one /24.
fn strict() -> World {
    World { unauthenticated: 2, ..World::default() }
}

/// `who` asks, and is answered, so many times.
fn answered(time: u64, who: &str, count: usize, request: &str, answer: &str) -> String {
    format!("{time}s {who} > {request}\n{time}s {who} < {answer}\n").repeat(count)
}

#[test]
fn over_the_budget_there_is_silence_whatever_is_asked() {
    let mut trace = answered(0, "alice", 10, "Binding", "Binding ok mapped=9.0.0.1:1000");
    trace += &answered(0, "bob", 8, "Allocate auth without=realm", "Allocate 400");
    trace += &answered(0, "bob", 1, "Allocate", "Allocate 401 realm nonce");
    trace += &answered(0, "bob", 1, "Binding unknown=0003", "Binding 420 0x0003");
    for request in [
        "Binding",
        "Binding unknown=0003",
        "Allocate",
        "Allocate auth garbled",
        "Allocate auth without=realm",
        "Allocate auth nonce=stale",
        "Refresh auth secret=guess",
        "CreatePermission",
        "ChannelBind",
    ] {
        trace += &format!("0s carol > {request}\n0s drop budget\n");
    }
    trace += &answered(1, "carol", 2, "Binding", "Binding ok mapped=9.0.0.3:1000");
    trace += "1s carol > Binding\n 1s drop budget\n";
    trace += &answered(30, "carol", 20, "Binding", "Binding ok mapped=9.0.0.3:1000");
    trace += "30s carol > Binding\n 30s drop budget\n";
    strict().check(&trace);
}

#[test]
fn who_holds_an_allocation_is_no_stranger_and_who_proves_a_key_needs_no_budget() {
    let mut trace = String::from(ALLOCATED);
    trace += &answered(0, "carol", 1, "Allocate", "Allocate 401 realm nonce");
    trace += &answered(0, "bob", 18, "Binding", "Binding ok mapped=9.0.0.2:1000");
    trace += "0s bob > Binding\n 0s drop budget\n";
    trace += &answered(0, "alice", 30, "Binding", "Binding ok mapped=9.0.0.1:1000");
    trace += &answered(0, "alice", 30, "Refresh auth nonce=stale", "Refresh 438 realm nonce");
    trace += &answered(0, "carol", 30, "Allocate auth no-transport", "Allocate 400 signed");
    trace += "0s carol > Allocate auth
        0s - take :49153
        0s carol < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.3:1000 lifetime=1200 signed
        0s carol > Refresh auth lifetime=0
        0s - close :49153
        0s - ended carol released 0B out 0B in
        0s carol < Refresh ok lifetime=0 signed
        0s carol > Binding
        0s drop budget";
    strict().check(&trace);
}

#[test]
fn zero_is_unlimited() {
    let world = World { unauthenticated: 0, ..World::default() };
    world.check(&answered(0, "alice", 2_000, "Binding", "Binding ok mapped=9.0.0.1:1000"));
}

/// What is sent, in words for [`Client::say`], and what `docs/operating.md` calls it.
const PACKETS: [(&str, &str); 17] = [
    ("Binding", "Binding"),
    ("Binding fp", "Binding with FINGERPRINT"),
    ("Binding ipv6", "Binding over IPv6"),
    ("Binding unknown=0003", "Binding with an attribute that we do not know (420)"),
    ("Allocate no-transport", "Allocate, bare (401)"),
    ("Allocate", "Allocate, as clients begin (401)"),
    ("Allocate fp", "the same with FINGERPRINT (401)"),
    ("Allocate auth garbled", "Allocate with a garbled MESSAGE-INTEGRITY (401)"),
    ("Allocate auth nonce=forged", "Allocate with a forged NONCE (438)"),
    ("Allocate auth without=nonce", "Allocate without NONCE (400)"),
    ("Refresh", "Refresh (401)"),
    ("CreatePermission peer=1.1.1.1:7", "CreatePermission (401)"),
    ("ChannelBind peer=1.1.1.1:7 channel=4000", "ChannelBind (401)"),
    ("Connect", "a method that we do not know"),
    ("Send peer=1.1.1.1:7 hello", "Send"),
    ("ChannelData 0x4000 hello", "ChannelData"),
    ("raw c0ffee", "anything else"),
];

#[test]
fn the_operators_table_of_what_strangers_get_is_true() {
    let rows = PACKETS.map(|(words, name)| {
        let (sent, answer) = stranger_says(words);
        format!("| {name} | {sent} | {answer} | {:.1} |", answer as f64 / sent as f64)
    });
    let path = format!("{}/docs/operating.md", env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(path).unwrap();
    let table = docs.split("| packet | bytes in | bytes out | factor |\n|---|---|---|---|\n").nth(1).unwrap();
    let said: Vec<_> = table.lines().take_while(|line| line.starts_with('|')).collect();
    assert!(said == rows, "docs/operating.md should say:\n{}", rows.join("\n"));
}

/// Bytes of what a stranger says, and of what it gets.
fn stranger_says(words: &str) -> (usize, usize) {
    let now = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
    let mut server = World::default().server();
    let mut client = Client::default();
    let from = FiveTuple {
        client: if words.contains("ipv6") { "[2606::1]:1000" } else { "9.0.0.1:1000" }.parse().unwrap(),
        server: "5.5.5.5:3478".parse().unwrap(),
        transport: Transport::Udp,
    };
    let mut reply = Vec::new();
    server.handle_request(now, from, &client.say("Allocate", "alice"), &mut reply);
    client.hear(&reply, &[]);
    reply.clear();
    let bytes = client.say(words, "alice");
    match sort(&bytes) {
        Datagram::Stun(message) => server.handle_request(now, from, message, &mut reply),
        Datagram::Send(message) => assert_eq!(server.send(&from, message), None),
        Datagram::ChannelData(channel, payload) => {
            assert_eq!(server.to_peer(&from, channel, Load::one(payload.len())), None);
        }
        Datagram::Unknown => {}
    }
    (bytes.len(), reply.len())
}
