//! `/peerjs`: what clients of the PeerJS server expect, on loopback.

use hyper::header;
use serde_json::{Value, json};
use tokio_websockets::Message;

use crate::front::{Client, Heard, Host, host, refused_with, request, token, token_with};
use halfway::credentials::token::Scopes;

const PEERJS: &str = "signaling.peerjs = true";

async fn knock(host: &Host, path: &str) -> Client {
    host.knock_at(host.tls().await, path, &[]).await.unwrap()
}

async fn connect(host: &Host, id: &str, token: &str) -> Client {
    knock(host, &format!("/peerjs/peerjs?key=peerjs&id={id}&token={token}&version=1.5.5")).await
}

/// A peer that is let in.
async fn open(host: &Host, id: &str) -> Client {
    let mut peer = connect(host, id, &token(id)).await;
    assert_eq!(peer.hear().await, json!({"type": "OPEN"}));
    peer
}

fn offer(to: &str, number: u64) -> Value {
    json!({"type": "OFFER", "dst": to, "payload": {"connectionId": number, "sdp": {"type": "offer", "sdp": "v=0"}}})
}

/// The same as `to` hears it.
fn heard_offer(from: &str, to: &str, number: u64) -> Value {
    let mut heard = offer(to, number);
    heard["src"] = from.into();
    heard
}

fn expire(absent: &str, to: &str) -> Value {
    json!({"type": "EXPIRE", "src": absent, "dst": to})
}

#[tokio::test]
async fn peers_tell_each_other_what_they_say_and_nobody_says_it_for_another() {
    let host = host(PEERJS).await;
    let (mut alice, mut bob) = (open(&host, "alice").await, open(&host, "bob").await);
    alice.say(json!({"type": "HEARTBEAT"})).await;
    for kind in ["OFFER", "CANDIDATE", "LEAVE"] {
        alice.say(json!({"type": kind, "src": "mallory", "dst": "bob", "payload": {"a": [1, null]}})).await;
        let heard = json!({"type": kind, "src": "alice", "dst": "bob", "payload": {"a": [1, null]}});
        assert_eq!(bob.hear().await, heard);
    }
    bob.say(json!({"type": "ANSWER", "dst": "alice", "payload": 7})).await;
    assert_eq!(alice.hear().await, json!({"type": "ANSWER", "src": "bob", "dst": "alice", "payload": 7}));
    // Nonsense is answered, and ends nothing.
    for bad in [json!({"type": "EXPIRE", "dst": "bob"}), json!({"type": "SHOUT", "dst": "bob"}), json!([])] {
        alice.say(bad).await;
        assert_eq!(alice.hear().await["type"], "ERROR");
    }
    alice.say_raw(Message::text("{")).await;
    assert_eq!(alice.hear().await["type"], "ERROR");
    alice.say(offer("bob", 1)).await;
    assert_eq!(bob.hear().await, heard_offer("alice", "bob", 1));
}

#[tokio::test]
async fn who_is_not_let_in_is_told_why_before_it_is_closed() {
    let host = host(PEERJS).await;
    let alice = token("alice");
    let missing =
        json!({"type": "ERROR", "payload": {"msg": "No id, token, or key supplied to websocket server"}});
    let key = json!({"type": "ERROR", "payload": {"msg": "Invalid key provided"}});
    let taken = json!({"type": "ID-TAKEN", "payload": {"msg": "ID is taken"}});
    for (query, told) in [
        (String::new(), &missing),
        ("?key=peerjs".to_owned(), &missing),
        ("?key=peerjs&id=alice".to_owned(), &missing),
        (format!("?key=another&id=alice&token={alice}"), &key),
        // It is another agent's, whether or not that one is here.
        (format!("?key=peerjs&id=bob&token={alice}"), &taken),
    ] {
        let mut peer = knock(&host, &format!("/peerjs{query}")).await;
        assert_eq!(peer.hear().await, *told, "{query}");
        assert_eq!(peer.hear_close().await, 1008);
    }
    for bad in [
        "nonsense".to_owned(),
        token_with("alice", "main", Scopes { signal: false, ..Scopes::default() }, 60),
    ] {
        let mut peer = connect(&host, "alice", &bad).await;
        let told = peer.hear().await;
        let why = told["payload"]["msg"].as_str().unwrap();
        assert!(told["type"] == "ERROR" && why.starts_with("Invalid token provided: "), "{told}");
    }
}

#[tokio::test]
async fn where_it_is_not_configured_nothing_is_there() {
    let host = host("").await;
    for path in ["/peerjs", "/peerjs/", "/peerjs/id", "/peerjs/peerjs/id", "/peerjs/peerjs/peers"] {
        assert_eq!(host.get(path, "").await.problem(), (404, "notFound".into()), "{path}");
    }
    let path = format!("/peerjs?key=peerjs&id=a&token={}", token("a"));
    assert_eq!(refused_with(host.knock_at(host.tls().await, &path, &[]).await), 404);
}

#[tokio::test]
async fn the_paths_of_the_server_are_there_with_and_without_a_path_of_its_own() {
    let host = host(PEERJS).await;
    for path in ["/peerjs", "/peerjs/"] {
        let about = host.get(path, "").await.json();
        assert!(["name", "description", "website"].iter().all(|member| about[member].is_string()), "{about}");
    }
    let mut ids = Vec::new();
    for path in ["/peerjs/id?ts=17&version=1.5.5", "/peerjs/peerjs/id"] {
        let answer = host.get(path, "").await;
        let id = answer.body.clone();
        assert_eq!((answer.status.as_u16(), id.len(), &id[14..15]), (200, 36, "4"), "{id}");
        ids.push(id);
    }
    assert_ne!(ids[0], ids[1]);
    // The key is looked at in paths, too.
    for path in ["/peerjs/other/id", "/peerjs/other/peers", "/peerjs/peers", "/peerjs/peerjs/peers"] {
        assert_eq!(host.get(path, "").await.status.as_u16(), 401, "{path}");
    }
    let _alice = open(&host, "alice").await;
    let mut bob = knock(&host, &format!("/peerjs?key=peerjs&id=bob&token={}", token("bob"))).await;
    assert_eq!(bob.hear().await["type"], "OPEN");
    let elsewhere = token_with("carl", "elsewhere", Scopes::default(), 60);
    let _carl = connect(&host, "carl", &elsewhere).await;
    assert_eq!(host.get("/peerjs/peers", &token("alice")).await.json(), json!(["alice", "bob"]));
    let path = format!("/peerjs/peerjs/peers?token={}", token("alice"));
    assert_eq!(host.send(request("GET", &path, "nonsense", &[])).await.json(), json!(["alice", "bob"]));
    // Pages of others do not come in.
    let stranger = [(header::ORIGIN, "https://evil.example")];
    let path = format!("/peerjs?key=peerjs&id=a&token={}", token("a"));
    assert_eq!(refused_with(host.knock_at(host.tls().await, &path, &stranger).await), 403);
}

#[tokio::test]
async fn who_is_not_here_is_waited_for_and_then_expires_once() {
    let host = host(PEERJS).await;
    let mut alice = open(&host, "alice").await;
    for number in 1..=3 {
        alice.say(offer("bob", number)).await;
    }
    alice.say(json!({"type": "LEAVE", "dst": "nobody"})).await;
    let mut bob = open(&host, "bob").await;
    for number in 1..=3 {
        assert_eq!(bob.hear().await, heard_offer("alice", "bob", number), "in order");
    }
    alice.say(offer("carl", 1)).await;
    alice.say(offer("dora", 1)).await;
    alice.say(offer("carl", 2)).await;
    let mut told = [alice.hear().await, alice.hear().await];
    told.sort_by_key(ToString::to_string);
    assert_eq!(told, [expire("carl", "alice"), expire("dora", "alice")]);
    alice.say(offer("bob", 4)).await;
    assert_eq!(bob.hear().await, heard_offer("alice", "bob", 4));
    // So much waits and no more.
    for number in 0..65 {
        alice.say(offer("emil", number)).await;
    }
    assert_eq!(alice.hear().await, expire("emil", "alice"), "the one that found no room");
    assert_eq!(alice.hear().await, expire("emil", "alice"), "all others");
    // One of another room is nobody.
    let _zoe = connect(&host, "zoe", &token_with("zoe", "elsewhere", Scopes::default(), 60)).await;
    alice.say(offer("zoe", 1)).await;
    assert_eq!(alice.hear().await, expire("zoe", "alice"));
}

#[tokio::test]
async fn a_newer_connection_takes_over_and_hears_what_the_older_one_did_not() {
    let host = host(PEERJS).await;
    let (mut alice, mut bob) = (open(&host, "alice").await, open(&host, "bob").await);
    let mut again = open(&host, "bob").await;
    assert_eq!(bob.hear().await, json!({"type": "ID-TAKEN", "payload": {"msg": "ID is taken"}}));
    assert_eq!(bob.hear_close().await, 4005);
    alice.say(offer("bob", 1)).await;
    assert_eq!(again.hear().await, heard_offer("alice", "bob", 1));
    // Its connection breaks, and what is said meanwhile waits for the next one; what it has had does not come again.
    drop(again);
    host.until(|host| host.signaling().connections == 1).await;
    alice.say(offer("bob", 2)).await;
    let mut back = open(&host, "bob").await;
    assert_eq!(back.hear().await, heard_offer("alice", "bob", 2));
}

#[tokio::test]
async fn who_leaves_is_missed_by_its_correspondents_unless_its_connections_stay() {
    let host = host("signaling = { peerjs = true, resume_window = '1s' }").await;
    let (mut alice, mut carl) = (open(&host, "alice").await, open(&host, "carl").await);
    let leave = json!({"type": "LEAVE", "src": "bob", "dst": "alice"});
    for ending in ["close", "say", "drop"] {
        let mut bob = open(&host, "bob").await;
        bob.say(offer("alice", 1)).await;
        assert_eq!(alice.hear().await, heard_offer("bob", "alice", 1));
        match ending {
            "close" => bob.leave().await,
            "say" => bob.say(json!({"type": "LEAVE"})).await,
            _ => drop(bob),
        }
        assert_eq!(alice.hear().await, leave, "{ending}");
    }
    // `peer.disconnect()` closes without a code, and keeps its connections.
    let mut bob = open(&host, "bob").await;
    bob.say(offer("alice", 2)).await;
    assert_eq!(alice.hear().await, heard_offer("bob", "alice", 2));
    bob.say_raw(Message::close(None, "")).await;
    while !matches!(bob.hear_anything().await, Heard::Close(..) | Heard::End) {}
    host.until(|host| host.signaling().agents == 2).await;
    carl.say(offer("alice", 3)).await;
    assert_eq!(alice.hear().await, heard_offer("carl", "alice", 3), "and nothing of bob before");
}

#[tokio::test]
async fn agents_of_our_own_protocol_can_speak_to_peers() {
    let host = host(PEERJS).await;
    let mut peer = open(&host, "peer").await;
    let (mut agent, _) = host.join(&token("agent"), json!({})).await;
    let body = json!({"type": "OFFER", "payload": {"connectionId": "dc_1"}});
    agent.say(json!({"type": "message", "to": "peer", "payload": body})).await;
    let heard = json!({"type": "OFFER", "src": "agent", "dst": "peer", "payload": {"connectionId": "dc_1"}});
    assert_eq!(peer.hear().await, heard);
    peer.say(json!({"type": "ANSWER", "dst": "agent", "payload": 1})).await;
    let frame = agent.hear().await;
    assert_eq!(
        (&frame["type"], &frame["payload"]),
        (&json!("message"), &json!({"type": "ANSWER", "payload": 1}))
    );
    // What has no word there is kept from it.
    agent.say(json!({"type": "offer", "to": "peer", "sdp": "v=0"})).await;
    agent.say(json!({"type": "bye", "to": "peer"})).await;
    assert_eq!(peer.hear().await, json!({"type": "LEAVE", "src": "agent", "dst": "peer"}));
    drop(agent);
}

#[tokio::test]
async fn limits_are_those_of_all_agents() {
    let limits = "messages_per_second = 1\nburst = 3\nmax_frame = 1000\nresume_window = '1s'";
    let host = host(&format!("[signaling]\npeerjs = true\n{limits}")).await;
    let (mut alice, mut bob) = (open(&host, "alice").await, open(&host, "bob").await);
    for number in 1..=4 {
        alice.say(offer("bob", number)).await;
    }
    for number in 1..=3 {
        assert_eq!(bob.hear().await, heard_offer("alice", "bob", number));
    }
    assert_eq!(alice.hear().await, expire("bob", "alice"));
    bob.say(json!({"type": "OFFER", "dst": "alice", "payload": "x".repeat(1_000)})).await;
    assert_eq!(bob.hear().await["payload"]["msg"], "the message is over the limit");
    let mut brief = connect(&host, "carl", &token_with("carl", "main", Scopes::default(), 1)).await;
    assert_eq!(brief.hear().await["type"], "OPEN");
    assert_eq!(brief.hear().await, json!({"type": "ERROR", "payload": {"msg": "The token has expired"}}));
    assert_eq!(brief.hear_close().await, 4001);
}
