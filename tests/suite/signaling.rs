//! Signaling over WSS on loopback: agents meet, and what may go wrong goes wrong.

use std::time::Duration;

use halfway::{credentials::token::Scopes, signaling::limits::Rate};
use hyper::{StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_websockets::{CloseCode, Message};

use crate::front::{
    Client, Heard, KEY, PATIENCE, Via, expired_token, host, host_with, refused_with, token, token_with,
};

#[tokio::test]
async fn two_agents_exchange_offer_answer_and_candidates() {
    let host = host("public_host = \"turn.example.org\"").await;
    let (mut alice, welcome) = host.join_via(Via::Header, &token("alice"), json!({"id": 1})).await;
    assert_eq!(
        (
            &welcome["agent"],
            &welcome["room"],
            &welcome["resumed"],
            &welcome["agents"],
            &welcome["agentCount"]
        ),
        (&json!("alice"), &json!("main"), &json!(false), &json!([]), &json!(0))
    );
    assert_eq!((&welcome["heartbeat"], &welcome["id"]), (&json!(25), &json!(1)));
    assert_eq!(
        welcome["limits"],
        json!({"maxFrame": 65536, "maxCard": 8192, "messagesPerSecond": 50, "burst": 200, "windowMessages": 256,
            "windowBytes": 262_144, "presenceLimit": 256, "resumeWindow": 60})
    );
    assert_eq!(welcome["ice"]["iceServers"][0]["urls"], json!(["stun:turn.example.org:3478"]));
    let (mut bob, welcome) =
        host.join_via(Via::Subprotocol, &token("bob"), json!({"card": {"name": "Bob"}})).await;
    assert_eq!(bob.upgrade.headers()[header::SEC_WEBSOCKET_PROTOCOL], "halfway.v1");
    assert_eq!(welcome["agents"], json!([{"agent": "alice"}]));
    assert_eq!(alice.hear().await, json!({"type": "agentJoined", "agent": "bob", "card": {"name": "Bob"}}));

    let sdp = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\n\"quoted\" \\ ü";
    alice.say(json!({"type": "offer", "to": "bob", "sdp": sdp, "id": "x"})).await;
    assert_eq!(alice.hear().await, json!({"type": "delivered", "id": "x"}));
    assert_eq!(
        bob.hear().await,
        json!({"type": "offer", "from": "alice", "to": "bob", "seq": 1, "polite": true, "sdp": sdp})
    );
    bob.say(json!({"type": "answer", "to": "alice", "sdp": sdp})).await;
    assert_eq!(
        alice.hear().await,
        json!({"type": "answer", "from": "bob", "to": "alice", "seq": 1, "sdp": sdp})
    );
    for (seq, candidate) in [
        (
            2,
            json!({"candidate": "candidate:1 1 udp 1 192.0.2.1 1 typ host", "sdpMid": "0", "sdpMLineIndex": 0}),
        ),
        (3, Value::Null),
    ] {
        alice.say(json!({"type": "iceCandidate", "to": "bob", "candidate": candidate})).await;
        assert_eq!(
            bob.hear().await,
            json!({"type": "iceCandidate", "from": "alice", "to": "bob", "seq": seq, "candidate": candidate})
        );
    }
    bob.say(json!({"type": "offer", "to": "alice", "sdp": sdp})).await;
    assert_eq!(alice.hear().await["polite"], false, "always opposite for the two");
    alice.say(json!({"type": "bye", "to": "bob"})).await;
    assert_eq!(bob.hear().await, json!({"type": "bye", "from": "alice", "to": "bob", "seq": 4}));
    bob.leave().await;
    assert_eq!(alice.hear().await, json!({"type": "agentLeft", "agent": "bob"}));
    let answer = alice.ask(json!({"type": "bye", "to": "bob"})).await;
    assert_eq!((&answer["code"], &answer["type"]), (&json!("peerUnavailable"), &json!("error")));
}

#[tokio::test]
async fn an_attempt_that_was_given_up_takes_nothing_over() {
    let host = host("").await;
    let (mut alice, welcome) = host.join(&token("alice"), json!({})).await;
    let hello = json!({"type": "hello", "resume": {"session": welcome["session"], "after": 0}}).to_string();
    let mut late = format!(
        "GET /v1/ws HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nConnection: upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        token("alice")
    )
    .into_bytes();
    // A text frame, masked with zeros.
    late.extend([0x81, 0x80 | hello.len() as u8, 0, 0, 0, 0]);
    late.extend(hello.bytes());
    let mut stream = host.tls().await;
    stream.write_all(&late).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 101"), "the server has heard it all, and closed");
    assert_eq!(alice.ask(json!({"type": "ping"})).await["type"], "pong", "and alice is not replaced");
}

#[tokio::test]
async fn messages_go_to_one_or_to_the_room_and_no_further() {
    let host = host("").await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    let (mut eve, welcome) = host.join(&token_with("eve", "other", Scopes::default(), 60), json!({})).await;
    assert_eq!((&welcome["room"], &welcome["agents"]), (&json!("other"), &json!([])));
    assert_eq!(alice.hear().await["agent"], "bob");

    assert_eq!(bob.ask(json!({"type": "message", "payload": [1, {"a": null}]})).await["count"], 1);
    assert_eq!(
        alice.hear().await,
        json!({"type": "message", "from": "bob", "seq": 1, "payload": [1, {"a": null}]}),
        "and nothing of eve before it"
    );
    let unknown = eve.ask(json!({"type": "message", "to": "nobody", "payload": 1})).await;
    let foreign = eve.ask(json!({"type": "message", "to": "alice", "payload": 1})).await;
    assert_eq!(unknown, foreign, "nothing is to be learnt from the answer");
    assert_eq!(eve.ask(json!({"type": "message", "payload": 1})).await["count"], 0);
    bob.say(json!({"type": "message", "to": "alice", "payload": "still here"})).await;
    assert_eq!(alice.hear().await["payload"], "still here", "and nothing of eve before it");
}

#[tokio::test]
async fn cards_and_comings_and_goings_are_told() {
    let host = host("").await;
    let (mut alice, _) = host.join(&token("alice"), json!({"card": {"name": "A"}})).await;
    let (mut bob, welcome) = host.join(&token("bob"), json!({})).await;
    assert_eq!(welcome["agents"], json!([{"agent": "alice", "card": {"name": "A"}}]));
    assert_eq!(alice.hear().await, json!({"type": "agentJoined", "agent": "bob"}));
    assert_eq!(alice.ask(json!({"type": "update", "card": {"name": "B"}})).await["type"], "delivered");
    assert_eq!(bob.hear().await, json!({"type": "agentUpdated", "agent": "alice", "card": {"name": "B"}}));
    let large = json!({"type": "update", "card": {"name": "x".repeat(8192)}});
    assert_eq!(alice.ask(large).await["code"], "tooLarge");
    alice.leave().await;
    assert_eq!(bob.hear().await, json!({"type": "agentLeft", "agent": "alice"}));
}

#[tokio::test]
async fn the_newest_connection_takes_over() {
    let host = host("").await;
    let (mut older, _) = host.join(&token("alice"), json!({})).await;
    let (mut newer, welcome) = host.join(&token("alice"), json!({})).await;
    assert_eq!(welcome["resumed"], false);
    assert_eq!(older.hear().await, json!({"type": "replaced"}));
    let Heard::Close(code, reason) = older.hear_anything().await else { panic!("no close frame") };
    assert_eq!((code, reason.as_str()), (4005, "replaced"));
    assert_eq!(newer.ask(json!({"type": "ping"})).await["type"], "pong");
    drop(older);
    host.until(|host| host.door.counters().connections == 1).await;
    assert_eq!(
        newer.ask(json!({"type": "ping"})).await["type"],
        "pong",
        "the older one's end is not the newer one's"
    );
}

#[tokio::test]
async fn a_dropped_connection_is_resumed() {
    let host = host("").await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    let (mut alice, welcome) = host.join(&token("alice"), json!({})).await;
    bob.hear().await;
    for payload in [1, 2] {
        bob.say(json!({"type": "message", "to": "alice", "payload": payload})).await;
        assert_eq!(alice.hear().await["seq"], payload);
    }
    drop(alice);
    host.until(|host| host.signaling().connections == 1).await;
    assert_eq!(bob.ask(json!({"type": "message", "to": "alice", "payload": 3})).await["type"], "delivered");
    let resume = json!({"session": welcome["session"], "after": 1});
    let (mut alice, again) = host.join(&token("alice"), json!({"resume": resume})).await;
    assert_eq!((&again["resumed"], &again["session"]), (&json!(true), &welcome["session"]));
    assert_eq!((alice.hear().await["seq"].clone(), alice.hear().await["seq"].clone()), (json!(2), json!(3)));
    assert_eq!(alice.ask(json!({"type": "received", "upTo": 3})).await["type"], "delivered");
    let (_, fresh) = host.join(&token("alice"), json!({"resume": resume})).await;
    assert_eq!(fresh["resumed"], false, "2 is not held any more");
    let (_, fresh) =
        host.join(&token("mallory"), json!({"resume": {"session": fresh["session"], "after": 0}})).await;
    assert_eq!(fresh["resumed"], false, "a session is its agent's");
}

#[tokio::test]
async fn only_who_closes_as_one_does_at_the_end_has_left() {
    let host = host("").await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    for (code, resumed) in [(1000, false), (1001, false), (1011, true), (4000, true)] {
        let (mut alice, welcome) = host.join(&token("alice"), json!({})).await;
        let code = CloseCode::try_from(code).unwrap();
        alice.say_raw(Message::close(Some(code), "")).await;
        host.until(|host| host.signaling().connections == 1).await;
        let resume = json!({"session": welcome["session"], "after": 0});
        let (alice, again) = host.join(&token("alice"), json!({"resume": resume})).await;
        assert_eq!(again["resumed"], resumed, "{code:?}");
        alice.leave().await;
        host.until(|host| host.signaling().connections == 1).await;
    }
    // Two visits of one session, or two sessions of one visit.
    for kind in ["agentJoined", "agentLeft"].into_iter().cycle().take(2 * (2 + 2 + 1 + 1)) {
        assert_eq!(bob.hear().await["type"], kind);
    }
}

#[tokio::test]
async fn bad_frames_are_answered_and_the_connection_goes_on() {
    let host = host("").await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
    for bad in
        ["", "{", "null", "[]", "{\"type\":1}", "{\"type\":\"nonsense\"}", "{\"type\":\"offer\"}", &deep]
    {
        alice.say_raw(Message::text(bad.to_owned())).await;
        assert_eq!(alice.hear().await["code"], "badFrame", "{bad:.40}");
    }
    alice.say_raw(Message::binary(&b"{\"type\":\"ping\"}"[..])).await;
    assert_eq!(alice.hear().await["code"], "badFrame");
    assert_eq!(alice.ask(json!({"type": "bye", "to": "bob", "from": "carol"})).await["code"], "badFrame");
    assert_eq!(alice.ask(json!({"type": "hello"})).await["code"], "badFrame");
    let unread = json!({"type": "message", "payload": "x".repeat(70_000)});
    alice.say(unread.clone()).await;
    let answer = alice.hear().await;
    assert_eq!((&answer["code"], answer.get("id")), (&json!("tooLarge"), None));
    assert_eq!(alice.ask(unread).await["code"], "tooLarge", "whoever waits for its answer gets it");
    // As libraries write what is not there.
    let mut nulls = json!({"type": "message", "id": null, "to": null, "from": null, "payload": 1});
    alice.say(nulls.clone()).await;
    nulls["id"] = json!(7);
    alice.say(nulls).await;
    assert_eq!(alice.hear().await, json!({"type": "delivered", "id": 7, "count": 0}));
    alice.say(json!({"type": "message", "payload": "x".repeat(65_000)})).await;
    assert_eq!(alice.ask(json!({"type": "ping"})).await["type"], "pong");
}

#[tokio::test]
async fn frames_beyond_all_measure_and_broken_ones_close_the_connection() {
    let host = host("").await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    alice.say(json!({"type": "message", "payload": "x".repeat(140_000)})).await;
    assert_eq!(alice.hear_close().await, 1009);
    let mut alice = host.knock(&[]).await.unwrap();
    // An unmasked frame from a client is against RFC 6455.
    tokio::io::AsyncWriteExt::write_all(alice.socket.get_mut(), b"\x81\x02{}").await.unwrap();
    assert!(matches!(alice.hear_anything().await, Heard::Close(1002, _) | Heard::End));
    assert_eq!(bob.hear().await["type"], "agentJoined");
    assert_eq!(bob.ask(json!({"type": "ping"})).await["type"], "pong");
}

#[tokio::test]
async fn strangers_have_a_limit_where_agents_have_none() {
    let host = host("signaling.max_frame = 0").await;
    let long = json!({"type": "message", "to": "nobody", "payload": "x".repeat(300_000)});
    let mut stranger = host.knock(&[]).await.unwrap();
    stranger.say(long.clone()).await;
    assert_eq!(stranger.hear_close().await, 1009);
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    assert_eq!(alice.ask(long).await["code"], "peerUnavailable");
}

#[tokio::test]
async fn bad_tokens_get_no_further() {
    let host = host("").await;
    let ice_only = token_with("a", "main", Scopes { ice: true, ..Scopes::NONE }, 60);
    for (bad, status, code, close) in [
        ("x", 401, "unauthorized", 1008),
        (expired_token("a").as_str(), 401, "expired", 4001),
        (ice_only.as_str(), 403, "forbidden", 1008),
    ] {
        let bearer = format!("Bearer {bad}");
        assert_eq!(refused_with(host.knock(&[(header::AUTHORIZATION, &bearer)]).await), status);
        let protocols = format!("halfway.v1, bearer.{bad}");
        let in_subprotocol = host.knock(&[(header::SEC_WEBSOCKET_PROTOCOL, &protocols)]).await.unwrap();
        refused_in_band(in_subprotocol, json!({"type": "hello"}), code, close).await;
        let in_hello = host.knock(&[]).await.unwrap();
        refused_in_band(in_hello, json!({"type": "hello", "token": bad}), code, close).await;
    }
    refused_in_band(host.knock(&[]).await.unwrap(), json!({"type": "hello"}), "unauthorized", 1008).await;
    let mut stranger = host.knock(&[]).await.unwrap();
    assert_eq!(stranger.ask(json!({"type": "hello", "token": null})).await["code"], "unauthorized");
    let good = token("a");
    refused_in_band(host.knock(&[]).await.unwrap(), json!({"type": "ping", "token": good}), "badFrame", 1008)
        .await;
    let counters = host.signaling();
    assert_eq!((counters.agents, counters.connections, counters.errors.iter().sum::<u64>()), (0, 0, 9));
}

async fn refused_in_band(mut client: Client, hello: Value, code: &str, close: u16) {
    client.say(hello).await;
    let error = client.hear().await;
    assert_eq!((&error["type"], &error["code"]), (&json!("error"), &json!(code)));
    assert_eq!(client.hear_close().await, close);
}

#[tokio::test]
async fn hello_comes_in_time() {
    let host = host_with("", |patience, _| patience.hello = Duration::from_millis(50)).await;
    let mut silent = host.knock(&[]).await.unwrap();
    assert_eq!(silent.hear().await["code"], "badFrame");
    assert_eq!(silent.hear_close().await, 1008);
}

#[tokio::test]
async fn pages_of_other_origins_get_no_websocket() {
    let host = host("").await;
    let same = format!("https://localhost:{}", host.public.port());
    assert_eq!(refused_with(host.knock(&[(header::ORIGIN, "https://evil.example")]).await), 403);
    assert!(host.knock(&[(header::ORIGIN, &same)]).await.is_ok());
}

#[tokio::test]
async fn a_token_without_ice_gets_none() {
    let host = host("").await;
    let signal_only = token_with("a", "main", Scopes { signal: true, ..Scopes::NONE }, 60);
    let (_, welcome) = host.join(&signal_only, json!({})).await;
    assert_eq!(welcome.get("ice"), None);
}

#[tokio::test]
async fn fresh_ice_servers_come_before_the_old_ones_expire() {
    let host = host("[credentials]\nttl = \"2s\"").await;
    let (mut alice, welcome) = host.join(&token("alice"), json!({})).await;
    let ice = alice.hear().await;
    assert_eq!((&ice["type"], &ice["ttl"]), (&json!("ice"), &json!(2)));
    assert!(ice["iceServers"].is_array());
    assert_ne!(ice["username"], welcome["ice"]["username"]);
}

#[tokio::test]
async fn too_many_frames_are_refused() {
    let host = host_with("", |_, limits| limits.rate = Rate::new(1, 3)).await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    for _ in 0..3 {
        assert_eq!(alice.ask(json!({"type": "ping"})).await["type"], "pong");
    }
    let answer = alice.ask(json!({"type": "ping"})).await;
    assert_eq!((&answer["code"], &answer["retryAfter"]), (&json!("rateLimited"), &json!(1)));
    // A token is not even looked at.
    assert_eq!(alice.ask(json!({"type": "renew", "token": "x"})).await["code"], "rateLimited");
}

#[tokio::test]
async fn a_slow_reader_is_closed_and_delays_nobody() {
    let host = host_with("", |patience, limits| {
        patience.write = Duration::from_millis(200);
        limits.rate = None;
    })
    .await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    let mut alice = host.join_with_small_buffer(&token("alice")).await;
    assert_eq!(bob.hear().await["type"], "agentJoined");
    let message = json!({"type": "message", "to": "alice", "payload": "x".repeat(60_000)});
    let mut delivered = 0_u64;
    loop {
        let answer = bob.ask(message.clone()).await;
        if answer["code"] == "queueFull" {
            break;
        }
        assert_eq!(answer["type"], "delivered");
        delivered += 1;
    }
    host.until(|host| host.signaling().connections == 1).await;
    let mut read = 0;
    let end = loop {
        match alice.hear_anything().await {
            Heard::Frame(frame) => read = frame["seq"].as_u64().unwrap(),
            Heard::Ping => {}
            end => break end,
        }
    };
    assert!(matches!(end, Heard::Close(4003, _) | Heard::End), "{end:?}");
    assert!(read < delivered);
    assert_eq!(bob.ask(json!({"type": "ping"})).await["type"], "pong");
}

#[tokio::test]
async fn silent_connections_are_given_up() {
    let host = host_with("", |_, limits| limits.heartbeat = Duration::from_millis(50)).await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    assert!(matches!(alice.hear_anything().await, Heard::Ping));
    // Reading answered it. From now on nobody reads.
    host.until(|host| host.signaling().connections == 0).await;
    assert_eq!(alice.hear_close().await, 4003);
    assert_eq!(host.signaling().agents, 1, "its session waits");
}

#[tokio::test]
async fn tokens_are_renewed_and_sessions_end_with_them() {
    let host = host("").await;
    let short = |agent| token_with(agent, "main", Scopes::default(), 2);
    let (mut alice, _) = host.join(&short("alice"), json!({})).await;
    let (mut bob, _) = host.join(&short("bob"), json!({})).await;
    assert_eq!(alice.hear().await["type"], "agentJoined");
    assert_eq!(alice.ask(json!({"type": "renew", "token": token("bob")})).await["code"], "forbidden");
    assert_eq!(alice.ask(json!({"type": "renew", "token": "x"})).await["code"], "unauthorized");
    assert_eq!(alice.ask(json!({"type": "renew", "token": expired_token("alice")})).await["code"], "expired");
    let renewed = alice.ask(json!({"type": "renew", "token": token("alice")})).await;
    assert_eq!(renewed["type"], "renewed");
    humantime::parse_rfc3339(renewed["expiresAt"].as_str().unwrap()).unwrap();
    let mut ended = bob.hear().await;
    if ended["type"] == "ice" {
        ended = bob.hear().await;
    }
    assert_eq!(ended, json!({"type": "ended", "code": "expired"}));
    assert_eq!(bob.hear_close().await, 4001);
    let mut left = alice.hear().await;
    if left["type"] == "ice" {
        left = alice.hear().await;
    }
    assert_eq!(left, json!({"type": "agentLeft", "agent": "bob"}));
}

#[tokio::test]
async fn a_restart_tells_everybody_when_to_come_back() {
    let mut host = host("").await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let mut stranger = host.knock(&[]).await.unwrap();
    host.stop.send(true).unwrap();
    let restarting = alice.hear().await;
    assert_eq!((&restarting["type"], &restarting["tryFor"]), (&json!("restarting"), &json!(60)));
    assert!((1..=10).contains(&restarting["reconnectIn"].as_u64().unwrap()));
    assert_eq!(alice.hear_close().await, 1012);
    assert_eq!(stranger.hear_close().await, 1012);
    drop((alice, stranger));
    tokio::time::timeout(PATIENCE, &mut host.served).await.unwrap().unwrap();
    assert_eq!(host.get_admin("/readyz").await.problem(), (503, "unavailable".into()));
    assert_eq!(host.get_admin("/metrics").await.status, StatusCode::OK, "the numbers stay to the end");
}

#[tokio::test]
async fn a_busy_receiver_is_heard_too() {
    let host = host_with("", |_, limits| {
        limits.rate = None;
        limits.window_messages = 10_000;
    })
    .await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    assert_eq!(alice.hear().await["type"], "agentJoined");
    for payload in 0..1000 {
        bob.say(json!({"type": "message", "to": "alice", "payload": payload})).await;
    }
    alice.say(json!({"type": "ping", "id": "me too"})).await;
    let mut next = 0;
    let mut pongs = 0;
    while next < 1000 || pongs < 1 {
        let frame = alice.hear().await;
        if frame["type"] == "pong" {
            pongs += 1;
        } else {
            assert_eq!(frame["payload"], next, "in order");
            next += 1;
        }
    }
}

#[tokio::test]
async fn a_reload_touches_no_session_and_holds_for_whoever_comes_next() {
    let host = host("").await;
    let old = token("alice");
    let (mut alice, welcome) = host.join(&old, json!({})).await;
    assert_eq!(welcome["limits"]["maxFrame"], 65536);
    let toml =
        "public_host = 'turn.example.org'\n[signaling]\nmax_frame = 4096\n[http]\nconnections_total = 1";
    host.reload(toml, b"another key of tokens, it has 32 bytes");
    // Whoever is connected stays so, even where it would be one too many.
    assert_eq!(alice.ask(json!({"type": "ping"})).await["type"], "pong");
    alice.say(json!({"type": "message", "to": "bob", "payload": "x".repeat(5_000)})).await;
    assert_eq!(alice.hear().await["code"], "tooLarge");
    assert!(host.secure(TcpStream::connect(host.public).await.unwrap()).await.is_err(), "one connection");
    host.reload("public_host = 'turn.example.org'", b"another key of tokens, it has 32 bytes");
    assert_eq!(host.get("/v1/ice", &old).await.problem(), (401, "unauthorized".to_owned()));
    host.reload("public_host = 'turn.example.org'", KEY);
    let urls = &host.get("/v1/ice", &old).await.json()["iceServers"][0]["urls"];
    assert_eq!(*urls, json!(["stun:turn.example.org:3478"]));
}
