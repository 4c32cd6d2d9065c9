//! What the hub promises, and nothing of how it keeps that: who is where, and what is owed to whom.

use std::collections::{BTreeMap, VecDeque};

use halfway::{
    credentials::token::AgentId,
    signaling::{
        hub::ConnectionId,
        limits::Limits,
        message::{ClientFrame, Unnumbered, parse},
    },
};
use serde_json::{Value, json};

/// An agent, or a room.
pub type Name = &'static str;

/// A session's place in [`Model::sessions`].
pub type SessionIndex = usize;

/// Seconds for which a candidate waits for its sender's first description.
const EARLY: u64 = 5;

pub struct Model {
    pub limits: Limits,
    pub seconds: u64,
    pub members: BTreeMap<Name, Member>,
    /// All that ever were.
    sessions: Vec<Session>,
    /// Candidates that came before a description.
    pub early: usize,
}

/// An agent whose session lives.
pub struct Member {
    pub room: Name,
    pub card: Value,
    pub session: SessionIndex,
    pub connection: Option<ConnectionId>,
    /// Since the welcome the room was too large for presence, if only for a while: who came and went then is not told
    /// afterwards, so that what the agent knows may be old until the next welcome.
    pub was_crowded: bool,
    expires: u64,
    /// The end of the resume window, while there is no connection.
    gone_at: u64,
}

#[derive(Default)]
struct Session {
    lanes: BTreeMap<Name, Lane>,
    accepted: usize,
    accepted_bytes: usize,
    /// The sizes of all frames ever written, by number.
    written: Vec<usize>,
    /// The number of the last frame written to the present connection.
    position: usize,
}

/// What one sender said to one session.
#[derive(Default)]
struct Lane {
    /// To arrive next, in this order.
    due: VecDeque<Value>,
    /// Candidates that wait for a description, and until when.
    early: VecDeque<(u64, Value)>,
    /// The session of the sender that offered or answered.
    described_by: Option<SessionIndex>,
}

/// What a frame leads to.
pub struct Outcome {
    /// What the sender is told, but for the frame's id.
    pub answer: Option<Value>,
    /// Into how many windows it goes.
    pub windows: usize,
}

type Refused = &'static str;

impl Model {
    pub fn new(limits: Limits) -> Self {
        Self { limits, seconds: 0, members: BTreeMap::new(), sessions: vec![], early: 0 }
    }

    /// Whether a session that is asked for is there to be continued, if nothing of it was let go.
    pub fn may_resume(&self, who: Name, room: Name, session: SessionIndex, after: usize) -> bool {
        let member = self.members.get(who);
        member.is_some_and(|member| member.room == room && member.session == session)
            && after <= self.sessions[session].position
    }

    /// Whether everything after `after` must still be held, too: what is not written is never let go, and what is
    /// written only to make room.
    pub fn must_resume(&self, session: SessionIndex, after: usize) -> bool {
        let Session { accepted, accepted_bytes, written, position, .. } = &self.sessions[session];
        let bytes = accepted_bytes - written[..after].iter().sum::<usize>();
        let fits = accepted - after <= self.limits.window_messages && bytes <= self.limits.window_bytes;
        after == *position || (fits && self.limits.held_bytes == usize::MAX)
    }

    /// A connection continues its session after a number.
    pub fn resumed(&mut self, who: Name, card: &Value, expires: u64, connection: ConnectionId, after: usize) {
        let member = self.members.get_mut(who).expect("its session lives");
        member.connection = Some(connection);
        member.expires = expires;
        if !card.is_null() {
            member.card = card.clone();
        }
        self.sessions[member.session].position = after;
        member.was_crowded = false;
        self.note_crowds();
    }

    /// A connection starts a session, in place of one that the agent may have had.
    pub fn started(&mut self, who: Name, room: Name, card: Value, expires: u64, connection: ConnectionId) {
        self.sessions.push(Session::default());
        let session = self.sessions.len() - 1;
        let connection = Some(connection);
        let member = Member { room, card, session, connection, was_crowded: false, expires, gone_at: 0 };
        self.members.insert(who, member);
        self.note_crowds();
    }

    pub fn is_live(&self, who: Name, connection: ConnectionId) -> bool {
        self.members.get(who).is_some_and(|member| member.connection == Some(connection))
    }

    /// The connection is over; the session waits for another.
    pub fn dropped(&mut self, who: Name, connection: ConnectionId) {
        if self.is_live(who, connection) {
            let member = self.members.get_mut(who).expect("just seen");
            member.connection = None;
            member.gone_at = self.seconds + self.limits.resume_window.as_secs();
        }
    }

    pub fn left(&mut self, who: Name, connection: ConnectionId) {
        if self.is_live(who, connection) {
            self.members.remove(who);
        }
    }

    pub fn renewed(&mut self, who: Name, expires: u64) {
        self.members.get_mut(who).expect("its session lives").expires = expires;
    }

    pub fn advance(&mut self, to: u64) {
        self.seconds = to;
        for lane in self.sessions.iter_mut().flat_map(|session| session.lanes.values_mut()) {
            while lane.early.front().is_some_and(|(until, _)| *until <= to) {
                lane.due.extend(lane.early.pop_front().map(|(_, frame)| frame));
            }
        }
        self.members
            .retain(|_, member| member.expires > to && (member.connection.is_some() || member.gone_at > to));
    }

    pub fn room(&self, room: Name) -> impl Iterator<Item = (&Name, &Member)> {
        self.members.iter().filter(move |(_, member)| member.room == room)
    }

    fn is_crowded(&self, room: Name) -> bool {
        self.room(room).count() > self.limits.presence_limit
    }

    fn note_crowds(&mut self) {
        let crowded: Vec<_> =
            self.members.values().map(|m| m.room).filter(|room| self.is_crowded(room)).collect();
        let members = self.members.values_mut();
        members.filter(|m| crowded.contains(&m.room)).for_each(|member| member.was_crowded = true);
    }

    /// An agent's frame reached the hub over its live connection.
    pub fn say(&mut self, from: Name, text: &[u8]) -> Outcome {
        match self.obey(from, text) {
            Ok(outcome) => outcome,
            Err(code) => Outcome { answer: Some(json!({"type": "error", "code": code})), windows: 0 },
        }
    }

    fn obey(&mut self, from: Name, text: &[u8]) -> Result<Outcome, Refused> {
        let frame: Value = serde_json::from_slice(text).map_err(|_| "badFrame")?;
        let incoming = parse(str::from_utf8(text).expect("JSON")).map_err(|_| "badFrame")?;
        if frame.get("from").is_some_and(|claimed| claimed != from) {
            return Err("badFrame");
        }
        let has_id = frame.get("id").is_some();
        let delivered = |count: Value, windows| {
            let mut answer = json!({"type": "delivered"});
            if !count.is_null() {
                answer["count"] = count;
            }
            Ok(Outcome { answer: has_id.then_some(answer), windows })
        };
        match incoming.frame {
            ClientFrame::Ping => Ok(Outcome { answer: Some(json!({"type": "pong"})), windows: 0 }),
            ClientFrame::Update { .. } => {
                self.members.get_mut(from).expect("it speaks").card = frame["card"].clone();
                delivered(Value::Null, 0)
            }
            ClientFrame::Routed { kind, to, body } => {
                let id = |name: &str| AgentId::parse(name).expect("a name");
                let receiver = to.as_deref().map(id);
                let size = Unnumbered::new(kind, &id(from), receiver.as_ref(), body).size();
                let sent = as_it_arrives(frame, from);
                match to {
                    Some(to) => self.route(from, &to, &sent, size).and_then(|()| delivered(Value::Null, 1)),
                    None => {
                        self.broadcast(from, &sent, size).and_then(|count| delivered(json!(count), count))
                    }
                }
            }
            _ => delivered(Value::Null, 0),
        }
    }

    fn route(&mut self, from: Name, to: &str, frame: &Value, size: usize) -> Result<(), Refused> {
        let room = self.members[from].room;
        if to == from {
            return Err("badFrame");
        }
        let receiver = self.members.get(to).filter(|receiver| receiver.room == room);
        let receiver = receiver.ok_or("peerUnavailable")?.session;
        self.deliver(from, receiver, frame, size)
    }

    /// Tells how many it reaches.
    fn broadcast(&mut self, from: Name, frame: &Value, size: usize) -> Result<usize, Refused> {
        let room = self.members[from].room;
        if self.is_crowded(room) {
            return Err("tooLarge");
        }
        let others = self.room(room).filter(|(name, _)| **name != from);
        let others: Vec<_> = others.map(|(_, other)| other.session).collect();
        Ok(others.iter().filter(|other| self.deliver(from, **other, frame, size).is_ok()).count())
    }

    fn deliver(&mut self, from: Name, to: SessionIndex, frame: &Value, size: usize) -> Result<(), Refused> {
        let fits = self.fits(to, size);
        let speaker = self.members[from].session;
        let Session { lanes, accepted, accepted_bytes, .. } = &mut self.sessions[to];
        let lane = lanes.entry(from).or_default();
        let kind = frame["type"].as_str().expect("it has one");
        let describes = matches!(kind, "offer" | "answer");
        let is_early = kind == "iceCandidate" && lane.described_by != Some(speaker);
        let release = |lane: &mut Lane| lane.due.extend(lane.early.drain(..).map(|(_, frame)| frame));
        if !describes && !is_early {
            release(lane);
        }
        if !fits {
            return Err("queueFull");
        }
        *accepted += 1;
        *accepted_bytes += size;
        if is_early {
            self.early += 1;
            lane.early.push_back((self.seconds + EARLY, frame.clone()));
            return Ok(());
        }
        lane.due.push_back(frame.clone());
        match kind {
            "offer" | "answer" => {
                lane.described_by = Some(speaker);
                release(lane);
            }
            "bye" => lane.described_by = None,
            _ => {}
        }
        Ok(())
    }

    /// Only what is not written fills a window, and all of them together.
    fn fits(&self, to: SessionIndex, size: usize) -> bool {
        let session = &self.sessions[to];
        session.accepted - session.position < self.limits.window_messages
            && session.unwritten_bytes() + size <= self.limits.window_bytes
            && self.unwritten_bytes() + size <= self.limits.held_bytes
    }

    /// Of all sessions.
    pub fn unwritten_bytes(&self) -> usize {
        self.members.values().map(|member| self.sessions[member.session].unwritten_bytes()).sum()
    }

    /// The hub wrote a frame to the session's connection. Tells whether for the first time.
    pub fn write(&mut self, session: SessionIndex, seq: usize, size: usize) -> bool {
        let Session { written, position, .. } = &mut self.sessions[session];
        assert_eq!(seq, *position + 1, "frames are written in order, each once");
        *position = seq;
        if seq <= written.len() {
            assert_eq!(written[seq - 1], size, "a replayed frame is the same one");
            return false;
        }
        written.push(size);
        true
    }

    /// A frame reached its agent.
    pub fn arrive(&mut self, session: SessionIndex, frame: &Value) {
        let from = frame["from"].as_str().expect("routed frames say from whom");
        let lane = self.sessions[session].lanes.get_mut(from).expect("it said something to this session");
        let owed = lane.due.pop_front();
        assert_eq!(owed.as_ref(), Some(frame), "what {from} said arrives once and in order");
    }

    /// What should have arrived when everything was read.
    pub fn owed(&self, session: SessionIndex) -> Vec<&Value> {
        self.sessions[session].lanes.values().flat_map(|lane| &lane.due).collect()
    }
}

impl Session {
    fn unwritten_bytes(&self) -> usize {
        self.accepted_bytes - self.written[..self.position].iter().sum::<usize>()
    }
}

/// A frame as its receiver must see it, but for `seq` and `polite`.
fn as_it_arrives(mut frame: Value, from: Name) -> Value {
    frame.as_object_mut().expect("frames are objects").remove("id");
    frame["from"] = json!(from);
    frame
}
