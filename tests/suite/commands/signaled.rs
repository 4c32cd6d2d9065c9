//! `turn.peer_policy = "signaled"`: an agent reaches whom others of its room told it of.

use serde_json::{Value, json};

use super::instance::{Caller, Instance};

const SECRET: &str = "sixteen bytes and more";
const GRANTED: &str = "CreatePermission ok signed";
const REFUSED: &str = "CreatePermission 403 signed";

fn config(policy: &str) -> String {
    format!(
        "[credentials]\nsecrets = ['{SECRET}']\n[turn]\nallow_peers = ['127.0.0.0/8']\ndeny_peers = ['127.0.0.66/32']\n\
         peer_policy = '{policy}'\n"
    )
}

fn candidate(ip: &str) -> String {
    format!("candidate:1 1 udp 2122260223 {ip} 50000 typ host")
}

/// An agent that says something to another: the answers.
fn say(instance: &Instance, agent: &str, frame: Value) -> Value {
    let (status, answers) = instance.ask(
        "POST /v1/signal",
        &instance.token(&[agent]),
        &json!([{"type": "hello"}, frame]).to_string(),
    );
    assert_eq!(status, 200, "{answers}");
    answers[1].clone()
}

#[test]
fn only_addresses_that_were_told_are_reached() {
    let instance = Instance::start(&config("signaled"));
    let mut alice = Caller::new(&instance, "alice", SECRET);
    let mut bob = Caller::new(&instance, "bob", SECRET);
    let bob_at = bob.allocate();
    assert_eq!(alice.ask("Allocate auth"), "Allocate ok");
    say(&instance, "alice", json!({"type": "ping"}));
    let permit = |caller: &mut Caller, ip: &str| caller.ask(&format!("CreatePermission auth peer={ip}:0"));
    for ip in ["127.0.0.2", "8.8.8.8"] {
        assert_eq!(permit(&mut alice, ip), REFUSED, "{ip}");
    }
    let told = [
        json!({"type": "iceCandidate", "to": "alice", "candidate": {"candidate": candidate("127.0.0.2"), "sdpMid": "0"}}),
        json!({"type": "offer", "to": "alice", "sdp": format!("v=0\r\na={}\r\na={}\r\n", candidate("127.0.0.3"), candidate("8.8.8.8"))}),
        json!({"type": "message", "to": "alice", "payload": {"type": "CANDIDATE", "payload": {"candidate": {"candidate": candidate("127.0.0.4")}}}}),
        json!({"type": "iceCandidate", "to": "alice", "candidate": {"candidate": candidate("127.0.0.66")}}),
    ];
    for frame in told {
        assert_eq!(say(&instance, "bob", frame)["type"], "delivered");
    }
    for ip in ["127.0.0.2", "127.0.0.3", "127.0.0.4", "8.8.8.8"] {
        assert_eq!(permit(&mut alice, ip), GRANTED, "{ip}");
        assert_eq!(permit(&mut bob, ip), REFUSED, "{ip}: nobody told bob");
    }
    assert_eq!(permit(&mut alice, "127.0.0.66"), REFUSED, "denied is denied");
    assert_eq!(permit(&mut alice, "127.0.0.5"), REFUSED);
    // Relayed addresses of this host need no telling, and nothing else at that address is reached.
    assert_eq!(alice.ask(&format!("ChannelBind auth channel=4000 peer={bob_at}")), "ChannelBind ok signed");
    assert_eq!(permit(&mut bob, "127.0.0.1"), GRANTED);
    alice.say("ChannelData 4000 hello");
    let heard = bob.hear();
    assert!(heard.starts_with("Data") && heard.contains("hello"), "{heard}");
    let stranger = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let port = stranger.local_addr().unwrap().port();
    assert_eq!(
        alice.ask(&format!("ChannelBind auth channel=4001 peer=127.0.0.1:{port}")),
        "ChannelBind ok signed"
    );
    alice.say("ChannelData 4001 hello");
    assert!(stranger.recv(&mut [0; 16]).is_err());
    // What is told in another room is nothing here.
    let elsewhere = instance.token(&["carl", "--room", "elsewhere"]);
    let frame = json!([{"type": "hello"}, {"type": "iceCandidate", "to": "alice", "candidate": {"candidate": candidate("127.0.0.7")}}]);
    assert_eq!(
        instance.ask("POST /v1/signal", &elsewhere, &frame.to_string()).1[1]["code"],
        "peerUnavailable"
    );
    assert_eq!(permit(&mut alice, "127.0.0.7"), REFUSED);
    // By a reload all may be reached that may be reached at all, and back.
    instance.reload(&config("open"));
    assert_eq!(permit(&mut alice, "127.0.0.7"), GRANTED);
    instance.reload(&config("signaled"));
    assert_eq!(permit(&mut alice, "127.0.0.9"), REFUSED);
    assert_eq!(permit(&mut alice, "127.0.0.2"), GRANTED, "what was told before is known still");
}
