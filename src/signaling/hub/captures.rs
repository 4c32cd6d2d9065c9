//! Captures: what agents say at what second, and what the hub says then.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    time::{Duration, Instant, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::{ConnectionId, Departure, Hub, Join, Line, Outgoing};
use crate::{
    clock::Now,
    credentials::token::{Agent, AgentId, Room, Scopes},
    signaling::{
        farewell::Farewell,
        limits::{Limits, Rate},
        message::{self, Hello, Resume, SessionId},
        refusal::CODES,
        registry::Query,
    },
};

const T0: u64 = 1_800_000_000;

fn limits() -> Limits {
    Limits {
        max_frame: 65536,
        window_messages: 256,
        window_bytes: 262_144,
        resume_window: Duration::from_secs(60),
        rate: None,
        presence_limit: 256,
        heartbeat: Duration::from_secs(25),
        agents: 100,
        held_bytes: 1 << 20,
    }
}

/// Plays every line `TIME NAME > frame` and `TIME NAME ! event`, and checks that the hub writes exactly the lines
/// `TIME NAME < frame` after it. A name is a connection; `alice2` is a second connection of `alice`.
#[track_caller]
fn check(limits: Limits, capture: &str) {
    let expected: Vec<_> = capture.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut play = Play::new(limits);
    for line in &expected {
        let [time, name, way, what] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        if way != "<" {
            play.advance(time.strip_suffix('s').unwrap().parse().unwrap());
            writeln!(play.transcript, "{line}").unwrap();
            play.act(name, way, what);
            play.write_out();
        }
    }
    assert_eq!(play.transcript.lines().collect::<Vec<_>>(), expected, "\n{}", play.transcript);
}

struct Play {
    hub: Hub,
    t0: Instant,
    seconds: u64,
    connections: BTreeMap<String, ConnectionId>,
    sessions: BTreeMap<String, String>,
    deaf: Vec<String>,
    woken: BTreeSet<ConnectionId>,
    /// The number that each agent must see next: every frame once, in order.
    next_seq: BTreeMap<String, u64>,
    transcript: String,
}

impl Play {
    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
    fn new(limits: Limits) -> Self {
        Self {
            hub: Hub::new(limits),
            t0: Instant::now(),
            seconds: 0,
            connections: BTreeMap::new(),
            sessions: BTreeMap::new(),
            deaf: vec![],
            woken: BTreeSet::new(),
            next_seq: BTreeMap::new(),
            transcript: String::new(),
        }
    }

    fn now(&self) -> Now {
        let later = Duration::from_secs(self.seconds);
        Now { mono: self.t0 + later, wall: UNIX_EPOCH + Duration::from_secs(T0) + later }
    }

    fn advance(&mut self, to: u64) {
        while let Some(at) = self.hub.poll_timeout().filter(|at| *at <= self.t0 + Duration::from_secs(to)) {
            self.seconds = self.seconds.max((at - self.t0).as_secs());
            self.hub.handle_timeout(self.now());
            self.write_out();
        }
        self.seconds = to;
    }

    fn act(&mut self, name: &str, way: &str, what: &str) {
        let now = self.now();
        match (way, what) {
            (">", what) if what.starts_with("hello") => self.hello(name, what),
            (">", what) => {
                let frame = frame(what);
                self.hub.handle(now, self.connections[name], message::parse(&frame));
            }
            ("!", "drops") => self.hub.leave(now, self.connections.remove(name).unwrap(), Departure::Dropped),
            ("!", "leaves") => self.hub.leave(now, self.connections.remove(name).unwrap(), Departure::Left),
            ("!", "stalls") => self.deaf.push(name.to_owned()),
            ("!", "reads") => self.deaf.retain(|deaf| deaf != name),
            ("!", "too-slow") => self.hub.hang_up(now, self.connections[name]),
            ("!", "renews") => {
                let token = Ok(agent("alice", "main", T0 + 3600));
                self.hub.renew(now, self.connections[name], None, token);
            }
            ("!", "restarts") => self.hub.restart(),
            ("!", "waits") => {}
            other => panic!("{other:?}"),
        }
    }

    /// `hello`, with `room=`, `ttl=`, `card=` or `resume=` after it.
    fn hello(&mut self, name: &str, what: &str) {
        let options: BTreeMap<_, _> = what.split(' ').filter_map(|word| word.split_once('=')).collect();
        let ttl: u64 = options.get("ttl").map_or(3600, |ttl| ttl.parse().unwrap());
        let who = name.trim_end_matches(char::is_numeric);
        let agent = agent(who, options.get("room").unwrap_or(&"main"), T0 + self.seconds + ttl);
        let card =
            options.get("card").map(|name| serde_json::value::to_raw_value(&json!({"name": name})).unwrap());
        let resume = options.get("resume").map(|after| Resume {
            session: self.sessions.get(who).cloned().unwrap_or_default(),
            after: after.parse().unwrap(),
        });
        let after = resume.as_ref().map_or(0, |resume| resume.after);
        let hello = Hello { token: None, card: card.as_deref(), resume };
        let fresh = SessionId::from_random(u128::from(self.hub.last_connection).to_be_bytes());
        match self.hub.join(
            self.now(),
            &agent,
            &hello,
            Join { id: None, ice: None, ice_term: None, fresh, ends_with_bye: false, takes_any: false },
            0,
        ) {
            Ok(connection) => {
                self.connections.insert(name.to_owned(), connection);
                let resumed = Some(self.hub.members[&agent.id].session.id().as_str())
                    == self.sessions.get(who).map(String::as_str);
                self.next_seq.insert(who.to_owned(), if resumed { after + 1 } else { 1 });
            }
            Err(refusal) => {
                writeln!(self.transcript, "{}s {name} < {}", self.seconds, refusal.code()).unwrap()
            }
        }
    }

    fn write_out(&mut self) {
        self.woken.extend(self.hub.take_ready());
        for (name, connection) in self.connections.clone() {
            if self.deaf.contains(&name) {
                continue;
            }
            while let Some(outgoing) = self.hub.next_outgoing(connection).map(|next| next.to_bytes()) {
                assert!(self.woken.contains(&connection), "{name} was not woken");
                let line = match outgoing {
                    Outgoing::Close(farewell) => self.close(&name, farewell),
                    Outgoing::Frame(frame) => self.summary(&name, &serde_json::from_slice(&frame).unwrap()),
                };
                writeln!(self.transcript, "{}s {name} < {line}", self.seconds).unwrap();
            }
            self.woken.remove(&connection);
        }
    }

    fn close(&mut self, name: &str, farewell: Farewell) -> String {
        let connection = self.connections.remove(name).unwrap();
        self.hub.leave(self.now(), connection, Departure::Dropped);
        let frame = farewell.frame().map(|frame| String::from_utf8(frame.to_vec()).unwrap() + " ");
        format!("{}close {}", frame.unwrap_or_default(), farewell.close_code())
    }

    fn summary(&mut self, name: &str, frame: &Value) -> String {
        if let Some(session) = frame["session"].as_str() {
            let who = name.trim_end_matches(char::is_numeric);
            self.sessions.insert(who.to_owned(), session.to_owned());
        }
        if let Some(seq) = frame["seq"].as_u64() {
            let next = self.next_seq.get_mut(name.trim_end_matches(char::is_numeric)).unwrap();
            assert_eq!(seq, *next, "{name} missed or repeated a frame");
            *next += 1;
        }
        let mut line = frame["type"].as_str().unwrap().to_owned();
        for member in [
            "id",
            "seq",
            "from",
            "to",
            "polite",
            "payload",
            "candidate",
            "agent",
            "room",
            "resumed",
            "agentCount",
            "count",
            "code",
            "retryAfter",
            "expiresAt",
        ] {
            if let Some(value) = frame.get(member) {
                write!(line, " {member}={}", value.to_string().trim_matches('"')).unwrap();
            }
        }
        if let Some(card) = frame.get("card") {
            write!(line, " card={}", card["name"].as_str().unwrap()).unwrap();
        }
        for listed in frame["agents"].as_array().into_iter().flatten() {
            write!(line, " +{}", listed["agent"].as_str().unwrap()).unwrap();
        }
        line
    }
}

fn agent(id: &str, room: &str, expires: u64) -> Agent {
    Agent {
        id: AgentId::parse(id).unwrap(),
        room: Room::parse(room).unwrap(),
        scopes: Scopes::default(),
        expires,
        issued: None,
    }
}

/// `offer to bob id=7`, or JSON as it is.
fn frame(what: &str) -> String {
    if what.starts_with('{') {
        return what.to_owned();
    }
    let mut words = what.split(' ');
    let kind = words.next().unwrap();
    let mut frame = json!({"type": kind});
    match kind {
        "offer" | "answer" => frame["sdp"] = json!("v=0"),
        "message" => frame["payload"] = json!(1),
        "iceCandidate" => frame["candidate"] = Value::Null,
        _ => {}
    }
    while let Some(word) = words.next() {
        match word.split_once('=') {
            Some((member, value)) => frame[member] = serde_json::from_str(value).unwrap_or(json!(value)),
            None if word == "to" => frame["to"] = json!(words.next().unwrap()),
            None => panic!("{what}"),
        }
    }
    frame.to_string()
}

#[test]
fn two_agents_meet() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        1s bob > hello card=Bob
        1s alice < agentJoined agent=bob card=Bob
        1s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        2s alice > offer to bob id=7
        2s alice < delivered id=7
        2s bob < offer seq=1 from=alice to=bob polite=true
        2s bob > answer to alice
        2s alice < answer seq=1 from=bob to=alice
        2s bob > iceCandidate to alice
        2s alice < iceCandidate seq=2 from=bob to=alice candidate=null
        2s bob > offer to alice
        2s alice < offer seq=3 from=bob to=alice polite=false
        3s alice > message to bob payload=hi
        3s bob < message seq=2 from=alice to=bob payload=hi
        4s alice > bye to bob
        4s bob < bye seq=3 from=alice to=bob
        5s alice > ping id=x
        5s alice < pong id=x
        5s alice > ping
        5s alice < pong
        6s bob ! leaves
        6s alice < agentLeft agent=bob
        7s alice > bye to bob id=8
        7s alice < error id=8 code=peerUnavailable
        ",
    );
}

const ALICE_AND_BOB: &str = "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        ";

#[test]
fn a_candidate_waits_for_its_senders_first_description() {
    check(
        limits(),
        &(ALICE_AND_BOB.to_owned()
            + "
        1s alice > iceCandidate to bob candidate={\"n\":1} id=1
        1s alice < delivered id=1
        2s alice > iceCandidate to bob candidate={\"n\":2}
        3s alice > offer to bob
        3s bob < offer seq=1 from=alice to=bob polite=true
        3s bob < iceCandidate seq=2 from=alice to=bob candidate={\"n\":1}
        3s bob < iceCandidate seq=3 from=alice to=bob candidate={\"n\":2}
        4s alice > iceCandidate to bob
        4s bob < iceCandidate seq=4 from=alice to=bob candidate=null
        5s bob > iceCandidate to alice
        6s bob > answer to alice
        6s alice < answer seq=1 from=bob to=alice
        6s alice < iceCandidate seq=2 from=bob to=alice candidate=null
        7s alice > bye to bob
        7s bob < bye seq=5 from=alice to=bob
        8s alice > iceCandidate to bob
        9s alice > offer to bob
        9s bob < offer seq=6 from=alice to=bob polite=true
        9s bob < iceCandidate seq=7 from=alice to=bob candidate=null
        "),
    );
}

#[test]
fn a_candidate_waits_five_seconds_at_most_and_keeps_its_place() {
    check(
        limits(),
        &(ALICE_AND_BOB.to_owned()
            + "
        1s alice > iceCandidate to bob candidate={\"n\":1}
        2s alice > iceCandidate to bob candidate={\"n\":2}
        6s bob < iceCandidate seq=1 from=alice to=bob candidate={\"n\":1}
        7s bob < iceCandidate seq=2 from=alice to=bob candidate={\"n\":2}
        8s alice > iceCandidate to bob candidate={\"n\":3}
        9s alice > message to bob payload=3
        9s bob < iceCandidate seq=3 from=alice to=bob candidate={\"n\":3}
        9s bob < message seq=4 from=alice to=bob payload=3
        10s alice > iceCandidate to bob candidate={\"n\":4}
        10s alice > message payload=5
        10s bob < iceCandidate seq=5 from=alice to=bob candidate={\"n\":4}
        10s bob < message seq=6 from=alice payload=5
        "),
    );
}

#[test]
fn early_candidates_take_room_and_survive_a_dropped_socket() {
    check(
        Limits { window_messages: 2, ..limits() },
        &(ALICE_AND_BOB.to_owned()
            + "
        1s bob ! drops
        1s alice > iceCandidate to bob candidate={\"n\":1}
        1s alice > iceCandidate to bob candidate={\"n\":2}
        1s alice > iceCandidate to bob candidate={\"n\":3} id=3
        1s alice < error id=3 code=queueFull retryAfter=1
        7s bob2 > hello resume=0
        7s bob2 < welcome agent=bob room=main resumed=true agentCount=1 +alice
        7s bob2 < iceCandidate seq=1 from=alice to=bob candidate={\"n\":1}
        7s bob2 < iceCandidate seq=2 from=alice to=bob candidate={\"n\":2}
        8s alice > iceCandidate to bob candidate={\"n\":4}
        9s alice ! leaves
        9s bob2 < agentLeft agent=alice
        13s bob2 < iceCandidate seq=3 from=alice to=bob candidate={\"n\":4}
        14s bob2 ! waits
        "),
    );
}

#[test]
fn a_new_session_of_the_sender_is_introduced_anew() {
    check(
        limits(),
        &(ALICE_AND_BOB.to_owned()
            + "
        1s alice > offer to bob
        1s bob < offer seq=1 from=alice to=bob polite=true
        2s alice ! leaves
        2s bob < agentLeft agent=alice
        3s alice > hello
        3s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
        3s bob < agentJoined agent=alice
        4s alice > iceCandidate to bob
        9s bob < iceCandidate seq=2 from=alice to=bob candidate=null
        10s bob ! waits
        "),
    );
}

#[test]
fn rooms_know_nothing_of_each_other() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s eve > hello room=other
        0s eve < welcome agent=eve room=other resumed=false agentCount=0
        1s eve > offer to alice id=1
        1s eve < error id=1 code=peerUnavailable
        1s eve > offer to nobody id=1
        1s eve < error id=1 code=peerUnavailable
        1s eve > {\"type\":\"bye\",\"id\":1,\"to\":\"\\u0000 no id\"}
        1s eve < error id=1 code=peerUnavailable
        1s eve > message id=2
        1s eve < delivered id=2 count=0
        1s eve ! leaves
        ",
    );
}

#[test]
fn a_message_without_to_goes_to_the_room() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        0s carol > hello
        0s alice < agentJoined agent=carol
        0s bob < agentJoined agent=carol
        0s carol < welcome agent=carol room=main resumed=false agentCount=2 +alice +bob
        1s alice > message to bob
        1s bob < message seq=1 from=alice to=bob payload=1
        1s alice > message id=1
        1s alice < delivered id=1 count=2
        1s bob < message seq=2 from=alice payload=1
        1s carol < message seq=1 from=alice payload=1
        ",
    );
}

#[test]
fn cards_change() {
    check(
        limits(),
        "
        0s alice > hello card=A
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s alice > {\"type\":\"update\",\"card\":{\"name\":\"B\"},\"id\":1}
        1s alice < delivered id=1
        1s bob < agentUpdated agent=alice card=B
        1s alice > {\"type\":\"update\",\"card\":{\"name\":\"B\"}}
        1s alice > {\"type\":\"update\",\"card\":null}
        1s bob < agentUpdated agent=alice
        ",
    );
}

#[test]
fn nobody_speaks_for_another() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s bob > bye to alice from=carol id=1
        1s bob < error id=1 code=badFrame
        1s bob > bye to alice from=bob
        1s alice < bye seq=1 from=bob to=alice
        1s bob > bye to bob id=2
        1s bob < error id=2 code=badFrame
        1s bob > {\"type\":\"hello\",\"id\":3}
        1s bob < error id=3 code=badFrame
        1s bob > nonsense id=4
        1s bob < error id=4 code=badFrame
        1s bob > {\"type\":
        1s bob < error code=badFrame
        ",
    );
}

#[test]
fn the_newest_connection_takes_over() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s alice2 > hello
        1s alice < {\"type\":\"replaced\"} close 4005
        1s alice2 < welcome agent=alice room=main resumed=false agentCount=1 +bob
        1s bob < agentLeft agent=alice
        1s bob < agentJoined agent=alice
        2s bob > bye to alice
        2s alice2 < bye seq=1 from=bob to=alice
        3s alice3 > hello room=other
        3s alice2 < {\"type\":\"replaced\"} close 4005
        3s alice3 < welcome agent=alice room=other resumed=false agentCount=0
        3s bob < agentLeft agent=alice
        ",
    );
}

#[test]
fn a_replaced_connection_is_not_listened_to() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s alice ! stalls
        1s alice2 > hello
        1s alice2 < welcome agent=alice room=main resumed=false agentCount=0
        1s alice > ping
        1s alice ! reads
        1s alice < {\"type\":\"replaced\"} close 4005
        ",
    );
}

#[test]
fn a_dropped_connection_is_resumed() {
    check(
        limits(),
        "
        0s alice > hello card=A
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s bob > message to alice payload=1
        1s alice < message seq=1 from=bob to=alice payload=1
        1s bob > message to alice payload=2
        1s alice < message seq=2 from=bob to=alice payload=2
        2s alice ! drops
        3s bob > message to alice payload=3 id=3
        3s bob < delivered id=3
        9s alice > hello resume=1
        9s alice < welcome agent=alice room=main resumed=true agentCount=1 +bob
        9s alice < message seq=2 from=bob to=alice payload=2
        9s alice < message seq=3 from=bob to=alice payload=3
        10s alice > received upTo=3 id=1
        10s alice < delivered id=1
        11s alice2 > hello resume=2
        11s alice < {\"type\":\"replaced\"} close 4005
        11s alice2 < welcome agent=alice room=main resumed=false agentCount=1 +bob
        11s bob < agentLeft agent=alice
        11s bob < agentJoined agent=alice
        ",
    );
}

#[test]
fn a_resumed_session_takes_over_from_a_connection_that_still_seems_alive() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        1s alice2 > hello resume=0
        1s alice < {\"type\":\"replaced\"} close 4005
        1s alice2 < welcome agent=alice room=main resumed=true agentCount=0
        2s alice3 > hello resume=0 room=other
        2s alice2 < {\"type\":\"replaced\"} close 4005
        2s alice3 < welcome agent=alice room=other resumed=false agentCount=0
        ",
    );
}

#[test]
fn after_the_resume_window_the_agent_has_left() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        5s alice ! drops
        64s bob > bye to alice id=1
        64s bob < delivered id=1
        65s bob < agentLeft agent=alice
        66s bob ! waits
        67s bob > bye to alice id=2
        67s bob < error id=2 code=peerUnavailable
        68s alice > hello resume=0
        68s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
        68s bob < agentJoined agent=alice
        ",
    );
}

#[test]
fn a_session_ends_with_its_token() {
    check(
        limits(),
        "
        0s alice > hello ttl=90
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        90s alice < {\"type\":\"ended\",\"code\":\"expired\"} close 4001
        90s bob < agentLeft agent=alice
        91s bob ! waits
        ",
    );
}

#[test]
fn a_renewed_token_keeps_the_session() {
    check(
        limits(),
        "
        0s alice > hello ttl=90
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        1s alice ! renews
        1s alice < renewed expiresAt=2027-01-15T09:00:00Z
        90s alice > ping
        90s alice < pong
        91s bob > hello
        91s alice < agentJoined agent=bob
        91s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        91s bob ! renews
        91s bob < error code=forbidden
        3600s alice < {\"type\":\"ended\",\"code\":\"expired\"} close 4001
        3600s bob < agentLeft agent=alice
        3601s bob ! waits
        ",
    );
}

#[test]
fn too_many_frames_are_refused_and_say_for_how_long() {
    check(
        Limits { rate: Rate::new(1, 3), ..limits() },
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s alice > ping
        0s alice < pong
        0s alice > ping
        0s alice < pong
        0s alice > nonsense id=1
        0s alice < error id=1 code=badFrame
        0s alice > ping id=2
        0s alice < error id=2 code=rateLimited retryAfter=1
        0s alice > nonsense id=3
        0s alice < error id=3 code=rateLimited retryAfter=1
        1s alice > ping id=4
        1s alice < pong id=4
        ",
    );
}

#[test]
fn a_full_window_is_the_senders_business() {
    check(
        Limits { window_messages: 2, ..limits() },
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s alice ! stalls
        1s bob > bye to alice id=1
        1s bob < delivered id=1
        1s bob > bye to alice id=2
        1s bob < delivered id=2
        1s bob > bye to alice id=3
        1s bob < error id=3 code=queueFull retryAfter=1
        1s bob > message id=4
        1s bob < delivered id=4 count=0
        2s alice ! reads
        2s alice < bye seq=1 from=bob to=alice
        2s alice < bye seq=2 from=bob to=alice
        2s bob > bye to alice id=5
        2s alice < bye seq=3 from=bob to=alice
        2s bob < delivered id=5
        ",
    );
}

#[test]
fn a_connection_that_does_not_read_is_closed_and_its_session_waits() {
    check(
        limits(),
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        1s alice ! too-slow
        1s alice < close 4003
        2s bob > bye to alice id=1
        2s bob < delivered id=1
        3s alice > hello resume=0
        3s alice < welcome agent=alice room=main resumed=true agentCount=1 +bob
        3s alice < bye seq=1 from=bob to=alice
        ",
    );
}

#[test]
fn answers_that_nobody_reads_close_the_connection() {
    let mut play = Play::new(limits());
    play.act("alice", ">", "hello");
    play.act("alice", "!", "stalls");
    for _ in 0..2000 {
        play.act("alice", ">", "ping");
    }
    play.act("alice", "!", "reads");
    play.write_out();
    assert_eq!(play.transcript, "0s alice < close 4003\n");
}

#[test]
fn large_rooms_have_no_presence() {
    check(
        Limits { presence_limit: 2, ..limits() },
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s alice < agentJoined agent=bob
        0s bob < welcome agent=bob room=main resumed=false agentCount=1 +alice
        0s carol > hello
        0s carol < welcome agent=carol room=main resumed=false agentCount=2 +alice +bob
        0s dave > hello
        0s dave < welcome agent=dave room=main resumed=false agentCount=3 +alice +bob
        1s alice > message id=1
        1s alice < error id=1 code=tooLarge
        1s carol ! leaves
        2s bob > bye to dave
        2s dave < bye seq=1 from=bob to=dave
        ",
    );
}

#[test]
fn the_instance_holds_so_many_agents() {
    check(
        Limits { agents: 1, ..limits() },
        "
        0s alice > hello
        0s alice < welcome agent=alice room=main resumed=false agentCount=0
        0s bob > hello
        0s bob < unavailable
        0s alice2 > hello
        0s alice < {\"type\":\"replaced\"} close 4005
        0s alice2 < welcome agent=alice room=main resumed=false agentCount=0
        ",
    );
}

#[test]
fn the_windows_of_all_are_bounded_together() {
    let mut play = Play::new(Limits { held_bytes: 100, ..limits() });
    for name in ["alice", "bob", "carol"] {
        play.act(name, ">", "hello");
    }
    play.write_out();
    for to in ["alice", "alice", "bob", "alice", "bob"] {
        play.act("carol", ">", &format!("bye to {to}"));
        play.write_out();
    }
    let delivered = play.transcript.lines().filter(|line| line.contains("bye")).count();
    assert_eq!(delivered, 5, "what is written makes room: {}", play.transcript);
    play.act("alice", "!", "stalls");
    for _ in 0..6 {
        play.act("carol", ">", "bye to alice id=1");
    }
    assert!(play.hub.counters().held_bytes <= 100);
    play.write_out();
    assert!(play.transcript.contains("code=queueFull"));
    for name in ["alice", "bob", "carol"] {
        play.act(name, "!", "leaves");
    }
    assert_eq!(play.hub.counters().held_bytes, 0);
}

#[test]
fn what_others_have_read_fills_nobodys_window() {
    check(
        Limits { held_bytes: 60, ..limits() },
        &(ALICE_AND_BOB.to_owned()
            + "
        1s bob > message to alice payload=12345
        1s alice < message seq=1 from=bob to=alice payload=12345
        2s alice > message to bob payload=12345 id=1
        2s alice < delivered id=1
        2s bob < message seq=1 from=alice to=bob payload=12345
        3s alice ! drops
        3s alice > hello resume=0
        3s alice < welcome agent=alice room=main resumed=false agentCount=1 +bob
        3s bob < agentLeft agent=alice
        3s bob < agentJoined agent=alice
        "),
    );
}

#[test]
fn a_restart_spreads_the_agents_return() {
    let mut play = Play::new(limits());
    for name in ["alice", "bob", "carol"] {
        play.act(name, ">", "hello");
    }
    play.act("bob", "!", "drops");
    play.write_out();
    play.transcript.clear();
    play.act("all", "!", "restarts");
    play.write_out();
    for wait in ["1", "2"] {
        let frame = format!("{{\"type\":\"restarting\",\"reconnectIn\":{wait},\"tryFor\":60}} close 1012");
        assert!(play.transcript.contains(&frame), "{}", play.transcript);
    }
    let counters = play.hub.counters();
    assert_eq!((counters.agents, counters.rooms, play.hub.poll_timeout()), (0, 0, None));
}

#[test]
fn a_room_is_listed_in_pages() {
    let mut play = Play::new(limits());
    for name in ["a", "b", "c", "d"] {
        play.act(name, ">", "hello card=x");
    }
    play.act("e", ">", "hello room=other");
    let ids = |after: &str, limit, bytes| {
        let page = play.hub.page(&Room::main(), &Query::default(), after, limit, bytes);
        let ids: Vec<_> = page.agents.iter().map(|entry| entry.agent.as_str().to_owned()).collect();
        (ids.join(""), page.next.map(|next| next.as_str().to_owned()), page.agent_count)
    };
    assert_eq!(ids("", 9, 9999), ("abcd".to_owned(), None, 4));
    assert_eq!(ids("", 2, 9999), ("ab".to_owned(), Some("b".to_owned()), 4));
    assert_eq!(ids("b", 2, 9999), ("cd".to_owned(), None, 4));
    assert_eq!(ids("", 9, 1), ("a".to_owned(), Some("a".to_owned()), 4));
    assert_eq!(play.hub.page(&Room::parse("none").unwrap(), &Query::default(), "", 9, 9).agent_count, 0);
}

#[test]
fn everything_is_counted_and_nothing_stays() {
    let mut play = Play::new(limits());
    play.act("alice", ">", "hello");
    play.act("bob", ">", "hello");
    play.act("alice", ">", "message");
    play.act("alice", ">", "nonsense");
    play.write_out();
    let counters = play.hub.counters();
    assert_eq!((counters.connections, counters.agents, counters.rooms), (2, 2, 1));
    assert_eq!((counters.frames_in, counters.frames_out, counters.delivered), (4, 5, 1));
    let bad_frames = CODES.iter().position(|code| *code == "badFrame").unwrap();
    assert_eq!((counters.errors[bad_frames], counters.errors.iter().sum::<u64>()), (1, 1));
    play.act("alice", "!", "leaves");
    play.act("bob", "!", "drops");
    play.advance(60);
    let counters = play.hub.counters();
    assert_eq!((counters.connections, counters.agents, counters.rooms, counters.held_bytes), (0, 0, 0, 0));
}

/// What must be true of the hub at any time.
fn assert_consistent(hub: &Hub) {
    assert_eq!(hub.deadlines.len(), hub.members.len());
    let mut in_rooms = 0;
    for (room, gathering) in &hub.rooms {
        assert!(gathering.own > 0);
        assert!(gathering.everybody.keys().all(|agent| hub.members[agent].room == *room));
        assert_eq!(gathering.own, gathering.everybody.len());
        in_rooms += gathering.own;
    }
    assert_eq!(in_rooms, hub.members.len());
    for (agent, member) in &hub.members {
        assert!(hub.deadlines.contains(&(member.deadline, agent.clone())));
        assert_ne!(member.connection.is_some(), member.gone_at.is_some());
        assert!(!member.session.keeps_written() || member.keeper.is_some());
        if let Some(connection) = member.connection {
            assert!(matches!(&hub.connections[&connection], Line::Live(live) if live == agent));
        }
    }
    let keepers = hub.members.iter().filter_map(|(agent, member)| Some((member.keeper?, agent.clone())));
    assert_eq!(keepers.collect::<BTreeMap<_, _>>(), hub.keepers);
    let live = hub.connections.values().filter(|line| matches!(line, Line::Live(_))).count();
    assert_eq!(live, hub.members.values().filter(|member| member.connection.is_some()).count());
    let held: usize = hub.members.values().map(|member| member.session.held_bytes()).sum();
    assert_eq!(held, hub.held_bytes);
    assert!(held <= hub.limits.held_bytes);
}

const WHO: [&str; 4] = ["alice", "bob", "carol", "dave"];
const WHAT: [&str; 14] = [
    "> hello",
    "> hello room=other",
    "> hello ttl=40 card=X",
    "> hello resume=0",
    "> hello resume=2",
    "! drops",
    "! leaves",
    "! too-slow",
    "! stalls",
    "! reads",
    "> message",
    "> message to alice",
    "> offer to bob id=1",
    "> received upTo=1",
];

proptest::proptest! {
    #[test]
    fn whatever_agents_do_the_hub_is_consistent(
        steps in proptest::collection::vec((0..WHO.len(), 0..WHAT.len(), 0..30_u64), 1..120)
    ) {
        let small = Limits { window_messages: 3, held_bytes: 400, presence_limit: 3, ..limits() };
        let mut play = Play::new(small);
        for (who, what, pause) in steps {
            let (name, (way, what)) = (WHO[who], WHAT[what].split_once(' ').unwrap());
            play.advance(play.seconds + pause / 10);
            if way == "!" || !what.starts_with("hello") {
                if !play.connections.contains_key(name) {
                    continue;
                }
            } else if let Some(older) = play.connections.remove(name) {
                // The older socket breaks just then.
                play.hub.leave(play.now(), older, Departure::Dropped);
            }
            play.act(name, way, what);
            play.write_out();
            assert_consistent(&play.hub);
        }
        play.deaf.clear();
        play.write_out();
        for (_, connection) in std::mem::take(&mut play.connections) {
            play.hub.leave(play.now(), connection, Departure::Dropped);
        }
        play.advance(play.seconds + 60);
        assert_consistent(&play.hub);
        proptest::prop_assert!(play.hub.members.is_empty() && play.hub.connections.is_empty());
    }

    #[test]
    fn no_text_is_too_odd_to_parse(any: String, text in r#"[{}\[\]",:a-z0-9\\]{0,60}"#) {
        drop(message::parse(&any).map(|frame| format!("{frame:?}")));
        drop(message::parse(&text).map(|frame| format!("{frame:?}")));
    }
}
