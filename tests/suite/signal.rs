//! Signaling without WebSockets on loopback: arrays of frames, long polls, event streams, and the simplest form.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::{body::Incoming, client::conn::http1::SendRequest, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::front::{Answer, Host, PATIENCE, host, host_with, post, request, token, token_with};
use halfway::credentials::token::Scopes;

/// An agent that asks by requests.
struct Asker<'a> {
    host: &'a Host,
    token: String,
    session: String,
}

impl<'a> Asker<'a> {
    async fn join(host: &'a Host, agent: &str) -> (Self, Value) {
        Self::join_with(host, agent, json!({"type": "hello"})).await
    }

    async fn join_with(host: &'a Host, agent: &str, hello: Value) -> (Self, Value) {
        let token = token(agent);
        let answers = host.send(post("/v1/signal", &token, &[], &json!([hello]))).await.json();
        let [welcome] = &answers.as_array().unwrap()[..] else { panic!("{answers}") };
        assert_eq!(welcome["type"], "welcome");
        let session = welcome["session"].as_str().unwrap().to_owned();
        (Self { host, token, session }, welcome.clone())
    }

    async fn say(&self, frames: Value) -> Value {
        self.post(frames).await.json()
    }

    async fn post(&self, frames: Value) -> Answer {
        self.host.send(post("/v1/signal", &self.token, &[("halfway-session", &self.session)], &frames)).await
    }

    async fn poll(&self, after: u64) -> Value {
        self.get(&format!("?after={after}&wait=5")).await.json()
    }

    async fn get(&self, query: &str) -> Answer {
        let path = format!("/v1/signal{query}");
        self.host.send(request("GET", &path, &self.token, &[("halfway-session", &self.session)])).await
    }

    async fn stream(&self, after: u64) -> Events {
        let stream = self.host.at(&self.token).tls().await;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let (last, path) = (after.to_string(), "/v1/signal?after=99");
        let headers =
            [("halfway-session", &*self.session), ("accept", "text/event-stream"), ("last-event-id", &*last)];
        let answer = sender.send_request(request("GET", path, &self.token, &headers)).await.unwrap();
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "text/event-stream");
        Events { body: answer.into_body(), text: String::new(), _connection: sender }
    }
}

struct Events {
    body: Incoming,
    text: String,
    _connection: SendRequest<http_body_util::Full<bytes::Bytes>>,
}

impl Events {
    /// The next event: its id, and its data as JSON.
    async fn next(&mut self) -> (Option<u64>, Value) {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let field =
                    |name: &str| event.lines().filter_map(|line| line.strip_prefix(name)).collect::<Vec<_>>();
                let (id, data) = (field("id: "), field("data: "));
                let event = (id.first().map(|id| id.parse().unwrap()), data.join("\n"));
                self.text = rest.to_owned();
                if !event.1.is_empty() {
                    return (event.0, serde_json::from_str(&event.1).unwrap());
                }
                continue;
            }
            let piece = timeout(PATIENCE, self.body.frame()).await.unwrap().unwrap().unwrap();
            self.text += std::str::from_utf8(&piece.into_data().unwrap()).unwrap();
        }
    }
}

/// `type`, `seq` and whatever is passed on, of each.
fn told(frames: &Value) -> Vec<(String, u64, Value)> {
    let frame = |frame: &Value| {
        let body = ["payload", "sdp", "candidate"].iter().find_map(|member| frame.get(member)).cloned();
        (
            frame["type"].as_str().unwrap().to_owned(),
            frame["seq"].as_u64().unwrap_or(0),
            body.unwrap_or_default(),
        )
    };
    frames.as_array().unwrap().iter().map(frame).collect()
}

fn message(seq: u64, payload: u64) -> (String, u64, Value) {
    ("message".to_owned(), seq, json!(payload))
}

#[tokio::test]
async fn one_frame_in_is_one_answer_out() {
    let host = host("").await;
    let (alice, welcome) = Asker::join_with(&host, "alice", json!({"type": "hello", "id": 1})).await;
    assert_eq!((&welcome["id"], &welcome["resumed"]), (&json!(1), &json!(false)));
    assert!(welcome["ice"]["iceServers"].is_array());
    let (bob, welcome) = Asker::join(&host, "bob").await;
    assert_eq!(welcome["agents"], json!([{"agent": "alice"}]));
    let answers = alice
        .say(json!([
            {"type": "offer", "to": "bob", "sdp": "v=0", "id": "x"},
            {"type": "message", "to": "bob", "payload": 1},
            {"type": "message", "to": "nobody", "payload": 1, "id": 2},
            {"type": "ping"},
            {"type": "hello"},
            7,
            {"type": "message", "to": "bob", "payload": "x".repeat(70_000), "id": "large"},
            {"type": "renew", "token": token_with("alice", "main", Default::default(), 7_200)},
            {"type": "renew", "token": "none", "id": 3},
        ]))
        .await;
    let seen: Vec<_> =
        answers.as_array().unwrap().iter().map(|a| (&a["type"], &a["id"], &a["code"])).collect();
    let null = Value::Null;
    assert_eq!(
        seen,
        [
            (&json!("delivered"), &json!("x"), &null),
            (&json!("delivered"), &null, &null),
            (&json!("error"), &json!(2), &json!("peerUnavailable")),
            (&json!("pong"), &null, &null),
            (&json!("error"), &null, &json!("badFrame")),
            (&json!("error"), &null, &json!("badFrame")),
            (&json!("error"), &json!("large"), &json!("tooLarge")),
            (&json!("renewed"), &null, &null),
            (&json!("error"), &json!(3), &json!("unauthorized")),
        ]
    );
    let heard = bob.poll(0).await;
    assert_eq!(told(&heard), [("offer".to_owned(), 1, json!("v=0")), message(2, 1)]);
    assert_eq!((&heard[0]["from"], &heard[0]["polite"]), (&json!("alice"), &json!(true)));
    // What came before is replayed until it is acknowledged, and then no longer held.
    assert_eq!(told(&bob.poll(1).await), [message(2, 1)]);
    assert_eq!(bob.get("?after=2&wait=0").await.body, "[]");
    assert_eq!(bob.get("?after=1&wait=0").await.problem(), (410, "gone".into()), "a gap");
    assert_eq!(bob.get("?after=3&wait=0").await.problem(), (410, "gone".into()), "never sent");
}

#[tokio::test]
async fn a_poll_waits_for_what_comes() {
    let host = host("").await;
    let (alice, _) = Asker::join(&host, "alice").await;
    let (mut bob, _) = host.join(&token("bob"), json!({})).await;
    assert_eq!(alice.poll(0).await[0]["type"], "agentJoined", "presence waits between requests");
    let connections = || host.signaling().connections;
    let waiting = async {
        tokio::join!(alice.poll(0), async {
            host.until(|_| connections() == 2).await;
            bob.say(json!({"type": "message", "to": "alice", "payload": 7})).await;
        })
        .0
    };
    assert_eq!(told(&waiting.await), [message(1, 7)]);
    // The newest poll is the one that hears.
    let (older, newer) = tokio::join!(
        async {
            let older = alice.get("?after=1&wait=30").await;
            bob.say(json!({"type": "message", "to": "alice", "payload": 8})).await;
            older
        },
        async {
            host.until(|_| connections() == 2).await;
            alice.poll(1).await
        }
    );
    assert_eq!(older.json(), json!([{"type": "replaced"}]));
    assert_eq!(told(&newer), [message(2, 8)]);
    let (last, ()) = tokio::join!(alice.poll(2), async {
        host.until(|_| connections() == 2).await;
        host.stop.send_replace(true);
    });
    assert_eq!(last[0]["type"], "restarting");
}

#[tokio::test]
async fn a_session_moves_between_all_three_and_loses_nothing() {
    let host = host("").await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let (mut bob, welcome) = host.join(&token("bob"), json!({})).await;
    alice.hear().await;
    let session = welcome["session"].as_str().unwrap().to_owned();
    for payload in 1..=3 {
        let said = alice.ask(json!({"type": "message", "to": "bob", "payload": payload})).await;
        assert_eq!(said["type"], "delivered");
    }
    assert_eq!(bob.hear().await["payload"], 1);
    // From a socket that breaks, to polls.
    drop(bob);
    let resume = json!({"type": "hello", "resume": {"session": session, "after": 1}});
    let (bob, welcome) = Asker::join_with(&host, "bob", resume).await;
    assert_eq!((&welcome["resumed"], bob.session == session), (&json!(true), true));
    assert_eq!(told(&bob.poll(1).await), [message(2, 2), message(3, 3)]);
    // To an event stream, from the number the last event had.
    alice.ask(json!({"type": "message", "to": "bob", "payload": 4})).await;
    let mut events = bob.stream(2).await;
    let (id, frame) = events.next().await;
    assert_eq!((id, &frame["payload"]), (Some(3), &json!(3)));
    let (id, frame) = events.next().await;
    assert_eq!((id, &frame["payload"]), (Some(4), &json!(4)));
    alice.ask(json!({"type": "message", "to": "bob", "payload": 5})).await;
    let (id, frame) = events.next().await;
    assert_eq!((id, &frame["payload"]), (Some(5), &json!(5)));
    // It can speak beside the stream.
    assert_eq!(
        bob.say(json!([{"type": "message", "to": "alice", "payload": 6}])).await[0]["type"],
        "delivered"
    );
    assert_eq!(alice.hear().await["payload"], 6);
    // And back to a socket, which takes over.
    let (mut back, welcome) =
        host.join(&token("bob"), json!({"resume": {"session": session, "after": 4}})).await;
    assert_eq!(welcome["resumed"], true);
    assert_eq!(back.hear().await["payload"], 5);
    assert_eq!(events.next().await, (None, json!({"type": "replaced"})));
}

#[tokio::test]
async fn lines_within_a_frame_are_lines_of_an_event() {
    let host = host("").await;
    let (bob, _) = Asker::join(&host, "bob").await;
    let (mut alice, _) = host.join(&token("alice"), json!({})).await;
    let frame = "{\"type\":\"message\",\"to\":\"bob\",\"payload\":{\n\"data\": \r\n\n1}}";
    alice.say_raw(tokio_websockets::Message::text(frame.to_owned())).await;
    let mut events = bob.stream(0).await;
    assert_eq!(events.next().await.1["type"], "agentJoined");
    assert_eq!(events.next().await.1["payload"], json!({"data": 1}));
}

#[tokio::test]
async fn a_session_is_useless_to_others_and_ends_in_time() {
    let host = host_with("", |_, limits| limits.resume_window = Duration::ZERO).await;
    let (alice, _) = Asker::join(&host, "alice").await;
    let gone = (410, "gone".to_owned());
    let (session, ping) = (alice.session.clone(), json!([{"type": "ping"}]));
    for token in [token("bob"), token_with("alice", "other", Default::default(), 60)] {
        let stolen = Asker { host: &host, token, session: session.clone() };
        assert_eq!(stolen.post(ping.clone()).await.problem(), gone);
        assert_eq!(stolen.get("?wait=0").await.problem(), gone);
    }
    let unknown = Asker { host: &host, token: token("alice"), session: "none".to_owned() };
    assert_eq!(unknown.post(ping.clone()).await.problem(), gone);
    assert_eq!(
        alice.say(ping.clone()).await,
        json!([{"type": "pong"}]),
        "it outlives the request all the same"
    );
    let (again, _) = Asker::join(&host, "alice").await;
    assert_eq!(alice.post(ping).await.problem(), gone, "the newer one took over");
    assert_eq!(again.get("?wait=0").await.body, "[]");
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused_by_name() {
    let host = host("[signaling]\nmessages_per_second = 1\nburst = 5").await;
    let (alice, _) = Asker::join(&host, "alice").await;
    let ask = async |body: Value, headers: &[(&str, &str)]| {
        host.send(post("/v1/signal", &token("bob"), headers, &body)).await.problem()
    };
    assert_eq!(ask(json!([{"type": "ping"}]), &[]).await, (400, "badRequest".into()), "no hello");
    assert_eq!(ask(json!([{"type": "hello", "card": 1}]), &[]).await, (400, "badFrame".into()));
    assert_eq!(ask(json!({"type": "hello"}), &[]).await, (400, "badRequest".into()));
    assert_eq!(ask(json!([]), &[]).await, (400, "badRequest".into()));
    assert_eq!(ask(json!(vec![0; 257]), &[]).await, (400, "badRequest".into()));
    assert_eq!(ask(json!(["x".repeat(1 << 20)]), &[]).await, (413, "tooLarge".into()));
    let anonymous = post("/v1/signal", "", &[], &json!([{"type": "hello"}]));
    assert_eq!(host.send(anonymous).await.problem(), (401, "unauthorized".into()));
    for query in ["?after=x", "?wait=-1", "?after=99999999999999999999999"] {
        assert_eq!(alice.get(query).await.problem(), (400, "badRequest".into()));
    }
    assert_eq!(
        host.get("/v1/signal", &token("alice")).await.problem(),
        (400, "badRequest".into()),
        "no session"
    );
    let refused = host.send(request("DELETE", "/v1/signal", &token("alice"), &[])).await;
    assert_eq!((refused.status.as_u16(), refused.header(header::ALLOW)), (405, "GET, POST, OPTIONS"));
    // Requests count like frames, and beginning anew is no way around it.
    let codes: Vec<_> = alice
        .say(json!(vec![json!({"type": "ping"}); 7]))
        .await
        .as_array()
        .unwrap()
        .iter()
        .map(|answer| answer["type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(codes, [vec!["pong"; 5], vec!["error"; 2]].concat());
    assert_eq!(alice.get("?wait=0").await.problem(), (429, "rateLimited".into()));
    let again = host.send(post("/v1/signal", &token("alice"), &[], &json!([{"type": "hello"}]))).await;
    assert_eq!(again.problem(), (429, "rateLimited".into()));
    assert_eq!(again.header(header::RETRY_AFTER), "1");
}

#[tokio::test]
async fn the_simplest_form_of_all() {
    let host = host("").await;
    let (alice, bob) = (token("alice"), token("team/bob"));
    let send = async |path: &str, token: &str, body: Value| host.send(post(path, token, &[], &body)).await;
    let missing = send("/signal/team%2Fbob/offer", &alice, json!({"sdp": "v=0"})).await;
    assert_eq!(missing.problem(), (404, "peerUnavailable".into()));
    assert_eq!(host.get("/signal/team%2Fbob/offers", &bob).await.body, "[]");
    let sent = send("/signal/team%2Fbob/offer", &alice, json!({"sdp": "v=0"})).await;
    assert_eq!((sent.status.as_u16(), sent.body.as_str()), (202, ""));
    for candidate in [json!({"candidate": "candidate:1"}), Value::Null] {
        let sent = send("/signal/team%2Fbob/candidate", &alice, json!({"candidate": candidate})).await;
        assert_eq!(sent.status, 202);
    }
    assert_eq!(
        host.get("/signal/team%2Fbob/candidates", &bob).await.json(),
        json!([
            {"type": "iceCandidate", "seq": 2, "from": "alice", "to": "team/bob", "candidate": {"candidate": "candidate:1"}},
            {"type": "iceCandidate", "seq": 3, "from": "alice", "to": "team/bob", "candidate": null},
        ])
    );
    assert_eq!(
        host.get("/signal/team%2Fbob/offers", &bob).await.json(),
        json!([{"type": "offer", "seq": 1, "from": "alice", "to": "team/bob", "polite": true, "sdp": "v=0"}])
    );
    assert_eq!(host.get("/signal/team%2Fbob/offers", &bob).await.body, "[]", "they are taken");
    // Who asks for candidates alone need not wait for the offer that is to come before them.
    assert_eq!(host.get("/signal/alice/offers", &alice).await.body, "[]");
    assert_eq!(send("/signal/alice/candidate", &bob, json!({"candidate": null})).await.status, 202);
    let candidates = host.get("/signal/alice/candidates", &alice).await.json();
    assert_eq!((candidates.as_array().unwrap().len(), &candidates[0]["seq"]), (1, &json!(1)));
    assert_eq!(send("/signal/alice/answer", &bob, json!({"sdp": "v=1"})).await.status, 202);
    assert_eq!(host.get("/signal/alice/answers", &alice).await.json()[0]["sdp"], "v=1");
    assert_eq!(host.get("/signal/alice/offers", &bob).await.problem(), (403, "forbidden".into()));
    assert_eq!(
        send("/signal/alice/answer", &bob, json!({"sdp": 7})).await.problem(),
        (400, "badFrame".into())
    );
    assert_eq!(send("/signal/alice/answer", &bob, json!({})).await.problem(), (400, "badFrame".into()));
    assert_eq!(send("/signal/alice/answer", &bob, json!([])).await.problem(), (400, "badRequest".into()));
    assert_eq!(host.get("/signal/alice/offer", &alice).await.status, 405);
    assert_eq!(host.get("/signal/alice/songs", &alice).await.problem(), (404, "notFound".into()));
    // It is a session like any other: a socket hears what is sent in the simplest form.
    let (mut carol, _) = host.join(&token("carol"), json!({})).await;
    assert_eq!(send("/signal/carol/offer", &alice, json!({"sdp": "v=2"})).await.status, 202);
    assert_eq!(carol.hear().await["sdp"], "v=2");
}

#[tokio::test]
async fn fresh_credentials_come_to_who_polls_and_to_who_streams() {
    let host = host("credentials.ttl = '4s'").await;
    let (asker, welcome) = Asker::join(&host, "alice").await;
    let expiry =
        |ice: &Value| ice["username"].as_str().unwrap().split(':').next().unwrap().parse::<u64>().unwrap();
    let first = expiry(&welcome["ice"]);
    let polled = asker.poll(0).await;
    assert_eq!(told(&polled), [("ice".to_owned(), 0, Value::Null)]);
    let second = expiry(&polled[0]);
    assert!(second > first && polled[0]["iceServers"].is_array(), "{polled}");
    // The same clock goes on, however the agent listens.
    let mut events = asker.stream(0).await;
    let (id, third) = events.next().await;
    assert_eq!((id, &third["type"]), (None, &json!("ice")));
    let (_, fourth) = events.next().await;
    assert!(expiry(&third) > second && expiry(&fourth) > expiry(&third), "{third} {fourth}");
}

#[tokio::test]
async fn credentials_outlive_a_token_only_once_it_is_renewed() {
    let host = host("credentials.ttl = '1h'").await;
    let short = token_with("alice", "main", Scopes::default(), 4);
    let (mut alice, welcome) = host.join(&short, json!({})).await;
    let until = |ice: &Value| ice["ttl"].as_u64().unwrap();
    assert!(until(&welcome["ice"]) <= 4, "{welcome}");
    let renewed = alice.ask(json!({"type": "renew", "token": token("alice")})).await;
    assert_eq!(renewed["type"], "renewed");
    let fresh = alice.hear().await;
    assert_eq!((&fresh["type"], until(&fresh) > 60), (&json!("ice"), true), "{fresh}");
}
