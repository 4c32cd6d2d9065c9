//! The hub and its agents, with the bytes under way between them, each step checked against the model.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use halfway::{
    clock::{self, Now},
    credentials::token::{Agent, AgentId, Room, Scopes},
    signaling::{
        hub::{ConnectionId, Counters, Departure, Hub, Join, Outgoing},
        limits::Limits,
        message::{self, Hello, Resume, SessionId},
        refusal::CODES,
        registry::Query,
    },
};
use serde_json::{Value, json, value::to_raw_value};

use super::{
    AGENTS, AN_HOUR, After, EVERYTHING, ROOMS, Step, Tally, What,
    model::{Model, Name, Outcome, SessionIndex},
};

const T0: u64 = 1_800_000_000;

pub struct World {
    hub: Hub,
    start: Now,
    pub model: Model,
    /// As the hub's side sees them: an agent may have turned its back on one.
    lines: BTreeMap<ConnectionId, Line>,
    agents: BTreeMap<Name, Client>,
    /// Their ids, in the model's order.
    sessions: Vec<String>,
    /// Of each two agents the one that yields.
    polite: BTreeMap<[String; 2], String>,
    /// The one way to say that a peer is unavailable.
    unavailable: Option<String>,
    said: usize,
    pub tally: Tally,
}

/// A session, and the number after which to go on.
type Place = (SessionIndex, usize);

/// One connection, and the bytes under way.
struct Line {
    who: Name,
    session: SessionIndex,
    up: Vec<u8>,
    down: Vec<u8>,
    /// The hub said that there is something to write.
    woken: bool,
    /// The hub's side wrote its last.
    closed: bool,
    /// What the hub answers next, as far as the model knows.
    answers: VecDeque<Value>,
}

/// What an agent itself knows.
#[derive(Default)]
struct Client {
    connection: Option<ConnectionId>,
    /// Half a frame.
    partial: Vec<u8>,
    session: Option<SessionIndex>,
    last_seen: usize,
    /// The others in the room, with their cards.
    present: BTreeMap<String, Value>,
}

impl World {
    pub fn new(limits: Limits) -> Self {
        Self {
            hub: Hub::new(limits.clone()),
            start: Now { wall: UNIX_EPOCH + Duration::from_secs(T0), ..clock::now() },
            model: Model::new(limits),
            lines: BTreeMap::new(),
            agents: AGENTS.iter().map(|name| (*name, Client::default())).collect(),
            sessions: vec![],
            polite: BTreeMap::new(),
            unavailable: None,
            said: 0,
            tally: Tally::default(),
        }
    }

    fn now(&self) -> Now {
        self.start + Duration::from_secs(self.model.seconds)
    }

    fn client(&mut self, who: Name) -> &mut Client {
        self.agents.get_mut(who).unwrap()
    }

    /// The agent's own connection, which the hub's side may be about to close.
    fn connection(&self, who: Name) -> Option<ConnectionId> {
        self.agents[who].connection
    }

    fn lines_of(&self, who: Name) -> Vec<ConnectionId> {
        self.lines.iter().filter(|(_, line)| line.who == who).map(|(connection, _)| *connection).collect()
    }

    /// Tells whether anything could happen.
    pub fn act(&mut self, step: &Step) -> bool {
        match *step {
            Step::Connect { who, room, resume, ttl, card } => self.connect(who, room, resume, ttl, card),
            Step::Say { who, to, what, id, late } => {
                if self.connection(who).is_none() {
                    self.connect(who, ROOMS[0], After::LastSeen, AN_HOUR, None);
                }
                self.say(who, to, what, id);
                if !late {
                    self.hear(self.connection(who).unwrap());
                }
                true
            }
            Step::Write(who, frames) => {
                self.lines_of(who).into_iter().filter(|line| self.write(*line, frames)).count() > 0
            }
            Step::Notice(who) => self.notice(who),
            Step::HangUp(who) => self.hang_up(who),
            Step::Wait(seconds) => self.wait(seconds),
            Step::Hear(who)
            | Step::Read(who, _)
            | Step::Settle(who)
            | Step::Break { who, .. }
            | Step::Leave(who)
            | Step::Renew(who, _) => {
                let Some(connection) = self.connection(who) else { return false };
                self.act_on(connection, who, step);
                true
            }
        }
    }

    fn act_on(&mut self, connection: ConnectionId, who: Name, step: &Step) {
        match *step {
            Step::Hear(_) => self.hear(connection),
            Step::Read(_, bytes) => self.read(who, bytes),
            Step::Settle(_) => self.settle(who),
            Step::Break { down, up, .. } => self.break_off(connection, who, down, up),
            Step::Leave(_) => self.leave(connection, who),
            Step::Renew(_, ttl) => self.renew(connection, who, ttl),
            _ => unreachable!("not about the agent's own connection"),
        }
    }

    fn connect(&mut self, who: Name, room: Name, resume: After, ttl: u64, card: Option<u8>) -> bool {
        let expires = self.model.seconds + ttl;
        let card = card.map(|number| json!({"number": number}));
        let asked = self.agents[who].session.zip(self.after(who, resume));
        let (connection, welcome) = self.join(&token(who, room, expires), asked, card.as_ref());
        let frame: Value = serde_json::from_slice(&welcome).unwrap();
        if self.model.members.get(who).is_some_and(|member| member.connection.is_some()) {
            self.tally.count("taken over");
        }
        let card = card.unwrap_or_default();
        if self.is_rightly_resumed(who, room, asked, frame["resumed"] == true) {
            self.model.resumed(who, &card, expires, connection, asked.unwrap().1);
        } else {
            self.sessions.push(frame["session"].as_str().unwrap().to_owned());
            self.model.started(who, room, card, expires, connection);
        }
        let session = self.model.members[who].session;
        assert_eq!(frame["session"], self.sessions[session]);
        let (up, down) = (vec![], [&*welcome, b"\n"].concat());
        let line = Line { who, session, up, down, woken: false, closed: false, answers: VecDeque::new() };
        self.lines.insert(connection, line);
        let client = self.client(who);
        client.connection = Some(connection);
        client.partial.clear();
        true
    }

    /// The hub's side writes the welcome at once.
    fn join(&mut self, agent: &Agent, asked: Option<Place>, card: Option<&Value>) -> (ConnectionId, Bytes) {
        let card = card.map(|card| to_raw_value(card).unwrap());
        let resume = asked
            .map(|(session, after)| Resume { session: self.sessions[session].clone(), after: after as u64 });
        let hello = Hello { token: None, card: card.as_deref(), resume };
        let fresh = SessionId::from_random((self.sessions.len() as u128).to_be_bytes());
        let join =
            Join { id: None, ice: None, ice_term: None, fresh, ends_with_bye: false, takes_any: false };
        let connection = self.hub.join(self.now(), agent, &hello, join, 0).expect("there is room for all");
        match self.hub.next_outgoing(connection) {
            Some(Outgoing::Frame(welcome)) => (connection, welcome.to_bytes()),
            other => panic!("{other:?} before the welcome"),
        }
    }

    /// Gives back `resumed`, when that is right.
    fn is_rightly_resumed(&mut self, who: Name, room: Name, asked: Option<Place>, resumed: bool) -> bool {
        let may = asked.is_some_and(|(session, after)| self.model.may_resume(who, room, session, after));
        let must = may && asked.is_some_and(|(session, after)| self.model.must_resume(session, after));
        assert!(may >= resumed && resumed >= must, "resumed: {resumed}, may: {may}, must: {must}");
        self.tally.count(if resumed { "resumed" } else { "not resumed" });
        if may && !resumed {
            self.tally.count("no longer held");
        }
        resumed
    }

    fn after(&self, who: Name, resume: After) -> Option<usize> {
        match resume {
            After::Nothing => None,
            After::LastSeen => Some(self.agents[who].last_seen),
            After::Future => Some(self.agents[who].last_seen + 1000),
        }
    }

    fn say(&mut self, who: Name, to: Name, what: What, id: bool) {
        self.said += 1;
        let mut text = match frame(to, what, self.said, self.agents[who].last_seen) {
            Some(mut frame) => {
                if id {
                    frame["id"] = json!(self.said);
                }
                frame.to_string()
            }
            None => "{\"type\":".to_owned(),
        };
        text.push('\n');
        let connection = self.connection(who).unwrap();
        self.lines.get_mut(&connection).unwrap().up.extend(text.bytes());
    }

    /// All that is under way from the agent reaches the hub, but for half a frame.
    fn hear(&mut self, connection: ConnectionId) {
        let line = self.lines.get_mut(&connection).unwrap();
        let (who, closed) = (line.who, line.closed);
        for frame in whole_frames(&mut line.up) {
            if !closed {
                self.heard(connection, who, &frame);
            }
        }
    }

    fn heard(&mut self, connection: ConnectionId, who: Name, frame: &[u8]) {
        let before = self.hub.counters();
        self.hub.handle(self.now(), connection, message::parse(str::from_utf8(frame).expect("JSON")));
        let after = self.hub.counters();
        if !self.model.is_live(who, connection) {
            assert_eq!(before, after, "what a connection says that was told to go does not count");
            return;
        }
        let refused = refused(&before, &after);
        let outcome = if refused == Some("rateLimited") {
            assert!(self.model.limits.rate.is_some());
            Outcome { answer: Some(json!({"type": "error", "code": "rateLimited"})), windows: 0 }
        } else {
            self.model.say(who, frame)
        };
        let expected = outcome.answer.as_ref().and_then(|answer| answer.get("code")).and_then(Value::as_str);
        assert_eq!(refused, expected, "{}", String::from_utf8_lossy(frame));
        assert_eq!(after.delivered - before.delivered, outcome.windows as u64);
        self.tally.count(refused.unwrap_or("accepted"));
        if let Some(mut answer) = outcome.answer {
            let frame: Value = serde_json::from_slice(frame).unwrap_or_default();
            if let Some(id) = frame.get("id") {
                answer["id"] = id.clone();
            }
            self.lines.get_mut(&connection).unwrap().answers.push_back(answer);
        }
    }

    fn wake(&mut self) {
        for woken in self.hub.take_ready() {
            if let Some(line) = self.lines.get_mut(&woken) {
                line.woken = true;
            }
        }
    }

    /// Writes at most so many frames. Tells whether there was any.
    fn write(&mut self, connection: ConnectionId, frames: usize) -> bool {
        self.wake();
        let written = (0..frames).take_while(|_| self.write_one(connection)).count();
        let who = self.lines[&connection].who;
        if self.lines[&connection].closed && self.connection(who) != Some(connection) {
            self.lines.remove(&connection);
        }
        written > 0
    }

    fn write_one(&mut self, connection: ConnectionId) -> bool {
        let line = self.lines.get_mut(&connection).unwrap();
        if !line.woken {
            return false;
        }
        let Some(outgoing) = self.hub.next_outgoing(connection).map(|next| next.to_bytes()) else {
            line.woken = false;
            return false;
        };
        let is_live = self.model.is_live(line.who, connection);
        let frame = match outgoing {
            Outgoing::Frame(frame) => {
                assert!(is_live, "a connection that was told to go hears nothing more");
                if numbered(&frame).is_some_and(|(seq, size)| !self.model.write(line.session, seq, size)) {
                    self.tally.count("replayed");
                }
                Some(frame)
            }
            Outgoing::Close(farewell) => {
                assert!(!is_live, "{farewell:?} for no reason");
                self.tally.count(farewell.reason());
                (line.woken, line.closed) = (false, true);
                self.hub.leave(self.now(), connection, Departure::Dropped);
                farewell.frame()
            }
        };
        let line = self.lines.get_mut(&connection).unwrap();
        line.down.extend(frame.iter().flat_map(|frame| [&**frame, b"\n"].concat()));
        true
    }

    /// So many bytes of what is under way reach the agent.
    fn read(&mut self, who: Name, bytes: usize) {
        let connection = self.connection(who).unwrap();
        let line = self.lines.get_mut(&connection).unwrap();
        let bytes = bytes.min(line.down.len());
        self.agents.get_mut(who).unwrap().partial.extend(line.down.drain(..bytes));
        let is_over = line.closed && line.down.is_empty();
        for frame in whole_frames(&mut self.client(who).partial) {
            self.arrive(connection, who, &frame);
        }
        if is_over {
            self.client(who).connection = None;
            self.lines.remove(&connection);
        }
    }

    fn arrive(&mut self, connection: ConnectionId, who: Name, text: &[u8]) {
        let frame: Value = serde_json::from_slice(text).unwrap();
        let kind = frame["type"].as_str().unwrap();
        match kind {
            "welcome" => self.welcomed(connection, who, &frame),
            "agentJoined" | "agentUpdated" => {
                let (name, card) = listed(&frame);
                let before = self.client(who).present.insert(name, card);
                let was_crowded = self.model.members.get(who).is_none_or(|member| member.was_crowded);
                assert!(was_crowded || before.is_some() == (kind == "agentUpdated"), "{frame}");
            }
            "agentLeft" => {
                self.client(who).present.remove(frame["agent"].as_str().unwrap());
            }
            "delivered" | "error" | "pong" | "renewed" => self.answered(connection, frame, text),
            "replaced" | "ended" => {}
            _ => self.passed_on(connection, who, frame),
        }
    }

    fn welcomed(&mut self, connection: ConnectionId, who: Name, frame: &Value) {
        let session = self.lines[&connection].session;
        let client = self.client(who);
        if frame["resumed"] == false {
            client.last_seen = 0;
        }
        client.session = Some(session);
        client.present = frame["agents"].as_array().unwrap().iter().map(listed).collect();
    }

    fn answered(&mut self, connection: ConnectionId, mut frame: Value, text: &[u8]) {
        let members = frame.as_object_mut().unwrap();
        for beyond_the_model in ["message", "retryAfter", "expiresAt"] {
            members.remove(beyond_the_model);
        }
        if frame["code"] == "peerUnavailable" {
            let id = frame.get("id").map(|id| format!("\"id\":{id},"));
            let text = String::from_utf8(text.to_vec()).unwrap().replace(&id.unwrap_or_default(), "");
            assert_eq!(*self.unavailable.get_or_insert(text.clone()), text, "why is nobody's business");
        }
        let expected = self.lines.get_mut(&connection).unwrap().answers.pop_front();
        assert_eq!(expected, Some(frame), "every frame has its one answer");
    }

    fn passed_on(&mut self, connection: ConnectionId, who: Name, mut frame: Value) {
        let members = frame.as_object_mut().unwrap();
        let seq = members.remove("seq").and_then(|seq| seq.as_u64()).unwrap();
        let polite = members.remove("polite");
        let from = frame["from"].as_str().unwrap().to_owned();
        assert_eq!(polite.is_some(), frame["type"] == "offer");
        if let Some(polite) = polite {
            let yields = if polite == true { who.to_owned() } else { from.clone() };
            let mut pair = [who.to_owned(), from];
            pair.sort();
            assert_eq!(*self.polite.entry(pair).or_insert(yields.clone()), yields, "always the same one");
        }
        let session = self.lines[&connection].session;
        let client = self.client(who);
        assert_eq!(seq as usize, client.last_seen + 1, "{who} missed a frame or sees it again");
        client.last_seen += 1;
        self.model.arrive(session, &frame);
    }

    fn settle(&mut self, who: Name) {
        let connection = self.connection(who).unwrap();
        self.hear(connection);
        self.write(connection, EVERYTHING);
        self.read(who, EVERYTHING);
    }

    fn break_off(&mut self, connection: ConnectionId, who: Name, down: usize, up: usize) {
        self.read(who, down);
        let client = self.client(who);
        client.connection = None;
        let has_half = !std::mem::take(&mut client.partial).is_empty();
        let Some(line) = self.lines.get_mut(&connection) else { return };
        if has_half {
            self.tally.count("cut within a frame");
        }
        if line.down.len() > 1 {
            self.tally.count("cut before a frame");
        }
        if line.up.len() > up {
            self.tally.count("cut before a frame was heard");
        }
        line.up.truncate(up);
        if line.closed {
            self.lines.remove(&connection);
        }
    }

    fn notice(&mut self, who: Name) -> bool {
        let own = self.connection(who);
        let broken: Vec<_> = self.lines_of(who).into_iter().filter(|line| Some(*line) != own).collect();
        for connection in &broken {
            self.hear(*connection);
            self.hub.leave(self.now(), *connection, Departure::Dropped);
            self.model.dropped(who, *connection);
            self.lines.remove(connection);
        }
        !broken.is_empty()
    }

    fn hang_up(&mut self, who: Name) -> bool {
        let lines = self.lines_of(who);
        for connection in &lines {
            self.hub.hang_up(self.now(), *connection);
            self.model.dropped(who, *connection);
        }
        !lines.is_empty()
    }

    /// The agent says goodbye, and reads no more.
    fn leave(&mut self, connection: ConnectionId, who: Name) {
        self.hear(connection);
        self.hub.leave(self.now(), connection, Departure::Left);
        self.model.left(who, connection);
        self.lines.remove(&connection);
        self.client(who).connection = None;
        self.client(who).partial.clear();
    }

    fn renew(&mut self, connection: ConnectionId, who: Name, ttl: u64) {
        self.hear(connection);
        let expires = self.model.seconds + ttl;
        let room = self.model.members.get(who).map_or(ROOMS[0], |member| member.room);
        let before = self.hub.counters();
        self.hub.renew(self.now(), connection, None, Ok(token(who, room, expires)));
        let answer = match refused(&before, &self.hub.counters()) {
            _ if !self.model.is_live(who, connection) => return,
            Some(code) => json!({"type": "error", "code": code}),
            None => {
                self.model.renewed(who, expires);
                json!({"type": "renewed"})
            }
        };
        self.lines.get_mut(&connection).unwrap().answers.push_back(answer);
    }

    fn wait(&mut self, seconds: u64) -> bool {
        let from = self.now();
        let until = from + Duration::from_secs(seconds);
        while let Some(at) = self.hub.poll_timeout().filter(|at| *at <= until.mono) {
            self.hub.handle_timeout(from + at.saturating_duration_since(from.mono));
        }
        self.model.advance(self.model.seconds + seconds);
        true
    }

    /// What must be true at any time.
    pub fn check(&mut self) {
        let (counters, model) = (self.hub.counters(), &self.model);
        assert!(counters.held_bytes <= model.limits.held_bytes, "{counters:?}");
        assert!(counters.held_bytes >= model.unwritten_bytes(), "what is delivered is held: {counters:?}");
        let open = self.lines.values().filter(|line| !line.closed).count();
        assert_eq!((counters.agents, counters.connections), (model.members.len(), open));
        for room in ROOMS {
            let page =
                self.hub.page(&Room::parse(room).unwrap(), &Query::default(), "", EVERYTHING, EVERYTHING);
            assert!(page.agents.iter().map(|entry| entry.agent.as_str()).eq(model.room(room).map(|m| *m.0)));
        }
        self.wake();
        for who in AGENTS {
            if self.has_read_all(who) {
                self.check_reader(who);
            }
        }
    }

    /// Whether the agent is connected and nothing is under way to it.
    fn has_read_all(&self, who: Name) -> bool {
        let client = &self.agents[who];
        client.connection.is_some_and(|connection| {
            let line = &self.lines[&connection];
            let quiet = !line.woken && line.down.is_empty() && client.partial.is_empty();
            quiet && self.model.is_live(who, connection)
        })
    }

    fn check_reader(&mut self, who: Name) {
        let line = &self.lines[&self.agents[who].connection.unwrap()];
        let member = &self.model.members[who];
        assert!(line.answers.is_empty(), "{who} has no answer: {:?}", line.answers);
        let owed = self.model.owed(line.session);
        assert!(owed.is_empty(), "{who} misses {owed:?}");
        if !member.was_crowded {
            let others = self.model.room(member.room).filter(|(name, _)| **name != who);
            let others = others.map(|(name, other)| ((*name).to_owned(), other.card.clone()));
            assert_eq!(self.agents[who].present, others.collect(), "{who} does not know who is here");
            self.tally.count("knew who is here");
        }
    }

    /// Everybody comes back and reads everything.
    pub fn reunite(&mut self) {
        for who in AGENTS {
            if self.connection(who).is_some() {
                self.settle(who);
            }
            let room = self.model.members.get(who).map_or(ROOMS[0], |member| member.room);
            self.connect(who, room, After::LastSeen, AN_HOUR, None);
            self.notice(who);
        }
        for pause in [0, 5] {
            self.wait(pause);
            AGENTS.iter().for_each(|who| self.settle(who));
            self.check();
        }
        assert!(AGENTS.iter().all(|who| self.has_read_all(who)));
    }

    /// Everybody leaves, and nothing is left.
    pub fn part(&mut self) {
        for who in AGENTS {
            self.leave(self.connection(who).unwrap(), who);
        }
        let Counters { connections, agents, rooms, held_bytes, .. } = self.hub.counters();
        assert_eq!((connections, agents, rooms, held_bytes), (0, 0, 0, 0));
        assert_eq!(self.hub.poll_timeout(), None);
    }
}

/// Takes what is complete.
fn whole_frames(bytes: &mut Vec<u8>) -> Vec<Vec<u8>> {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let whole: Vec<u8> = bytes.drain(..end).collect();
    whole.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
}

/// The number of a frame that has one, and what it takes in a window.
fn numbered(frame: &[u8]) -> Option<(usize, usize)> {
    let text = std::str::from_utf8(frame).unwrap();
    let frame: Value = serde_json::from_str(text).unwrap();
    Some((frame["seq"].as_u64()? as usize, text.len() - text.find("\"from\":").unwrap()))
}

/// An agent in a list or in the news.
fn listed(frame: &Value) -> (String, Value) {
    (frame["agent"].as_str().unwrap().to_owned(), frame["card"].clone())
}

/// The code of the error that the hub counted.
fn refused(before: &Counters, after: &Counters) -> Option<&'static str> {
    let more = |place: &usize| after.errors[*place] > before.errors[*place];
    (0..CODES.len()).find(more).map(|place| CODES[place])
}

fn token(who: Name, room: Name, expires: u64) -> Agent {
    Agent {
        id: AgentId::parse(who).unwrap(),
        room: Room::parse(room).unwrap(),
        scopes: Scopes::default(),
        expires: T0 + expires,
        issued: None,
    }
}

/// What an agent says; `None` is no JSON.
fn frame(to: Name, what: What, number: usize, last_seen: usize) -> Option<Value> {
    let payload = |size| json!([number, "x".repeat(size)]);
    Some(match what {
        What::Offer => json!({"type": "offer", "to": to, "sdp": number.to_string()}),
        What::Answer => json!({"type": "answer", "to": to, "sdp": number.to_string()}),
        What::Candidate => json!({"type": "iceCandidate", "to": to, "candidate": {"number": number}}),
        What::Bye => json!({"type": "bye", "to": to}),
        What::Message(size) => json!({"type": "message", "to": to, "payload": payload(size)}),
        What::Everybody(size) => json!({"type": "message", "payload": payload(size)}),
        What::Received => json!({"type": "received", "upTo": last_seen}),
        What::Update(card) => json!({"type": "update", "card": card.map(|number| json!({"number": number}))}),
        What::Ping => json!({"type": "ping"}),
        What::Forged => json!({"type": "bye", "to": to, "from": "mallory"}),
        What::Nonsense => return None,
    })
}
