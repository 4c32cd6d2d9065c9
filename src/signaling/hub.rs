//! Who is here and how one reaches another: the only state of signaling.
//!
//! Frames and `now` go in; what there is to write waits in the sessions, and [`Hub::take_ready`] says for whom.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{
    farewell::Farewell,
    limits::{Bucket, Limits, MAX_ASIDE_BYTES, MAX_ASIDE_BYTES_BETWEEN_REQUESTS},
    message::{Frame, FrameId, Hello, Incoming, Kind, Rejected, Resume, ServerFrame, SessionId},
    nodes::NodeId,
    refusal::{CODES, Refusal},
    registry::{Page, Profile},
    session::{Full, Gone, Session},
};
use crate::{
    clock::Now,
    credentials::{
        signaled::Signaled,
        token::{Agent, AgentId, Room},
    },
};

#[cfg(test)]
mod captures; // what agents say, and what the hub says then
mod elsewhere; // the other nodes of a cluster
mod membership; // a session begins, goes on, waits and ends
mod rooms; // who is in a room, and who hears of it
mod routing; // what a frame asks for is done

pub use elsewhere::{Answered, Numbers, Resolution};
use elsewhere::{Arriving, Before, Elsewhere, Waits, kept};

/// Seconds over which the first tries to come back after a restart are spread.
const RECONNECT: std::ops::RangeInclusive<u64> = 1..=10;

/// All agents, their rooms, sessions and connections.
#[derive(Debug)]
pub struct Hub {
    limits: Limits,
    /// Told what agents say of their addresses, if that matters; else nobody reads it.
    signaled: Option<Signaled>,
    members: HashMap<AgentId, Member>,
    rooms: HashMap<Room, Gathering>,
    connections: HashMap<ConnectionId, Line>,
    /// One for each member.
    deadlines: BTreeSet<(Instant, AgentId)>,
    /// Connections that have something to write since the shell last asked.
    ready: Vec<ConnectionId>,
    /// Sessions that may keep written frames for replay; who began first is first.
    keepers: BTreeMap<u64, AgentId>,
    held_bytes: usize,
    last_connection: u64,
    last_session: u64,
    /// Nobody joins any more.
    closed: bool,
    /// The other nodes, in a cluster.
    elsewhere: Option<Box<Elsewhere>>,
    counters: Counters,
}

/// Who is in a room with an agent of ours.
#[derive(Debug, Default)]
struct Gathering {
    /// With what each agent is found by: a search goes through a whole room, and looks nowhere else.
    everybody: BTreeMap<AgentId, Option<Profile>>,
    /// Agents of ours, seen by others or not yet.
    own: usize,
    /// Of those, who are not seen yet.
    arriving: usize,
    /// Nodes that have agents here, too.
    nodes: BTreeSet<NodeId>,
    /// Nodes that have not said yet whom they have here.
    asked: BTreeSet<NodeId>,
}

/// An agent with a session, connected or expected back.
#[derive(Debug)]
struct Member {
    room: Room,
    card: Option<Arc<RawValue>>,
    /// Unix seconds.
    expires: u64,
    session: Session,
    /// No other session has it.
    serial: u64,
    /// When it began here, in Unix milliseconds: of two nodes that have the same agent, one has it later.
    since: u64,
    /// It is not welcomed yet.
    arriving: Option<Box<Arriving>>,
    /// The last frame that each other node has sent to it.
    heard: BTreeMap<NodeId, u64>,
    /// Whose offer or answer this session has had: the senders' sessions by their serials, the latest last.
    introduced: VecDeque<u64>,
    connection: Option<ConnectionId>,
    /// It comes and goes: what nobody numbered waits for it too.
    by_request: bool,
    /// Set while there is no connection: the end of the resume window.
    gone_at: Option<Instant>,
    deadline: Instant,
    ice_term: Option<IceTerm>,
    /// To whom and from whom there were messages, if they are to be told `bye` at its end.
    correspondents: Option<BTreeSet<AgentId>>,
    /// Its place among the keepers.
    keeper: Option<u64>,
    bucket: Bucket,
}

/// What a connection has to do with us.
#[derive(Debug)]
enum Line {
    Live(AgentId),
    /// Told to go; nothing that it says counts any more.
    Leaving(Option<Farewell>),
}

/// One connection of one agent. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId {
    serial: u64,
    /// What the shell wants to know when the connection is ready: it means nothing here.
    pub tag: u64,
}

/// What a connection has to write.
#[derive(Debug, PartialEq, Eq)]
pub enum Outgoing<F> {
    Frame(F),
    Close(Farewell),
}

impl Outgoing<Frame<'_>> {
    /// For who cannot write it at once.
    #[must_use]
    pub fn to_bytes(&self) -> Outgoing<Bytes> {
        match self {
            Self::Frame(frame) => Outgoing::Frame(frame.to_bytes()),
            Self::Close(farewell) => Outgoing::Close(*farewell),
        }
    }
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// The agent said goodbye: its session ends.
    Left,
    /// The same, but what it has with others goes on without us.
    LeftQuietly,
    /// The connection broke: its session waits.
    Dropped,
}

/// What is counted here. `frames_*` and `errors` only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub connections: usize,
    pub agents: usize,
    pub rooms: usize,
    pub held_bytes: usize,
    pub frames_in: u64,
    pub frames_out: u64,
    /// Routed frames put into a receiver's window.
    pub delivered: u64,
    /// In the order of [`CODES`].
    pub errors: [u64; CODES.len()],
}

impl Hub {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            signaled: None,
            members: HashMap::new(),
            rooms: HashMap::new(),
            connections: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: Vec::new(),
            keepers: BTreeMap::new(),
            held_bytes: 0,
            last_connection: 0,
            last_session: 0,
            closed: false,
            elsewhere: None,
            counters: Counters::default(),
        }
    }

    /// Other limits from now on, and who wants to know what agents tell each other of their addresses; what is held stays.
    pub fn adopt(&mut self, limits: Limits, signaled: Option<Signaled>) {
        (self.limits, self.signaled) = (limits, signaled);
    }

    /// A connection said `hello` with a valid token: continues its session or starts the new one `fresh`, and takes
    /// over from an older connection of the same agent. The welcome waits to be written.
    ///
    /// # Errors
    /// When there are too many agents already.
    pub fn join(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
        tag: u64,
    ) -> Result<ConnectionId, Refusal> {
        self.admit(&agent.id)?;
        let connection = self.new_connection(tag);
        self.connections.insert(connection, Line::Live(agent.id.clone()));
        let welcome = self.enter(now, agent, hello, join, Some(connection));
        // It may be over already: another node has the agent later.
        if let Some(member) = self.members.get_mut(&agent.id) {
            member.by_request = false;
            if let Answered::Now(Some(welcome)) = welcome {
                member.session.push_welcome(welcome);
                self.ready.push(connection);
            }
        }
        Ok(connection)
    }

    /// The same for an agent without a connection, which asks by requests. The welcome is the answer, perhaps
    /// [later](Self::take_resolved).
    ///
    /// # Errors
    /// When there are too many agents already, or this one begins too often.
    pub fn join_by_request(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
    ) -> Result<Answered<Bytes>, Refusal> {
        self.admit(&agent.id)?;
        if self.members.contains_key(&agent.id) {
            self.spend(now, &agent.id)?;
        }
        let welcome = self.enter(now, agent, hello, join, None);
        self.member(&agent.id).by_request = true;
        self.set_gone_at(now, &agent.id);
        Ok(match welcome {
            Answered::Now(welcome) => Answered::Now(welcome.expect("a request is answered now or later")),
            Answered::Later(request) => Answered::Later(request),
        })
    }

    /// A request of an agent that has a session, which lives on: the one called `session`, or any in the room.
    ///
    /// # Errors
    /// When the agent has no such session.
    pub fn visit(&mut self, now: Now, agent: &Agent, session: Option<&str>) -> Result<(), Gone> {
        let known = |member: &&mut Member| {
            member.room == agent.room && session.is_none_or(|session| member.session.id().as_str() == session)
        };
        let member = self.members.get_mut(&agent.id).filter(known).ok_or(Gone)?;
        member.expires = member.expires.max(agent.expires);
        if member.connection.is_none() {
            member.by_request = true;
            self.set_gone_at(now, &agent.id);
        }
        Ok(())
    }

    /// Does what a frame of an agent with a session asks for. There is always an answer, perhaps
    /// [later](Self::take_resolved).
    pub fn ask(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'_>, Rejected<'_>>,
    ) -> Answered<Bytes> {
        match self.perform(now, agent, incoming) {
            (id, Ok(Done::Later(number))) => {
                self.wait_for(number, Waits::Request { id: kept(id) });
                Answered::Later(number)
            }
            (id, outcome) => Answered::Now(self.respond(id, outcome)),
        }
    }

    /// The same for somebody who hears no more than whether it was done.
    ///
    /// # Errors
    /// When it was not.
    pub fn pass(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'_>, Rejected<'_>>,
    ) -> Result<Answered<()>, Refusal> {
        let (_, outcome) = self.perform(now, agent, incoming);
        match outcome.inspect_err(|refusal| self.count_refusal(refusal))? {
            Done::Later(number) => Ok(Answered::Later(number)),
            _ => Ok(Answered::Now(())),
        }
    }

    /// Does what a frame of a client of PeerJS asks for, for one that is `to` be told if it does not get there, and was
    /// [charged](Self::charge) before.
    ///
    /// # Errors
    /// When it was not done.
    pub fn forward(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: &Incoming<'_>,
        to: Option<&str>,
    ) -> Result<(), Refusal> {
        let done = self.carry_out(now, agent, incoming).inspect_err(|refusal| self.count_refusal(refusal))?;
        if let (Done::Later(number), Some(to)) = (done, to) {
            let (agent, serial) = (agent.clone(), self.members[agent].serial);
            self.wait_for(number, Waits::Peer { agent, serial, to: to.to_owned() });
        }
        Ok(())
    }

    /// What [`Self::ask`] does, for a `renew`, which was [charged](Self::charge) before its token was looked at.
    pub fn ask_renewal(
        &mut self,
        now: Now,
        agent: &AgentId,
        id: Option<FrameId<'_>>,
        token: Result<Agent, Refusal>,
    ) -> Bytes {
        let outcome = token.and_then(|token| self.extend(now, agent, &token));
        self.respond(id, outcome)
    }

    /// Counts a request of an agent with a session like a frame.
    ///
    /// # Errors
    /// When there were too many.
    pub fn charge(&mut self, now: Now, agent: &AgentId) -> Result<(), Refusal> {
        self.counters.frames_in += 1;
        self.spend(now, agent)
    }

    /// An agent that asks by requests waits for frames after number `after`: until it leaves, that is its connection.
    ///
    /// # Errors
    /// When it has no such session, or what it asks for is no longer held.
    pub fn listen(
        &mut self,
        now: Now,
        agent: &Agent,
        session: &str,
        after: u64,
        tag: u64,
    ) -> Result<ConnectionId, Gone> {
        self.visit(now, agent, Some(session))?;
        self.with_session(&agent.id, |session, _| session.rewind(after))?;
        let connection = self.new_connection(tag);
        self.connections.insert(connection, Line::Live(agent.id.clone()));
        let member = self.member(&agent.id);
        member.by_request = true;
        member.gone_at = None;
        if let Some(older) = member.connection.replace(connection) {
            self.dismiss(older, Farewell::Replaced);
        }
        self.set_deadline(now, &agent.id);
        self.ready.push(connection);
        Ok(connection)
    }

    /// Takes the frames of one kind that wait for an agent with a session: with that they have arrived.
    pub fn take(&mut self, agent: &AgentId, kind: Kind) -> Vec<Bytes> {
        let taken = self.with_session(agent, |session, _| session.take(kind));
        self.counters.frames_out += taken.len() as u64;
        taken
    }

    /// Does what a frame asks for, or answers why not.
    pub fn handle(&mut self, now: Now, from: ConnectionId, incoming: Result<Incoming<'_>, Rejected<'_>>) {
        let Some(agent) = self.agent_on(from) else { return };
        let (id, outcome) = self.perform(now, &agent, incoming);
        self.answer(now, from, id, outcome);
    }

    /// Counts a frame of a connection whose token takes time to be looked at.
    ///
    /// # Errors
    /// When there were too many.
    pub fn charge_line(&mut self, now: Now, from: ConnectionId) -> Result<(), Refusal> {
        let Some(agent) = self.agent_on(from) else { return Ok(()) };
        self.charge(now, &agent)
    }

    /// The agent showed a fresh token, or something that is none; it was [charged](Self::charge_line) before.
    pub fn renew(
        &mut self,
        now: Now,
        from: ConnectionId,
        id: Option<FrameId<'_>>,
        token: Result<Agent, Refusal>,
    ) {
        let Some(agent) = self.agent_on(from) else { return };
        let outcome = token.and_then(|token| self.extend(now, &agent, &token));
        self.answer(now, from, id, outcome);
    }

    /// What `connection` has to write next. After a `Close` there is nothing more.
    pub fn next_outgoing(&mut self, connection: ConnectionId) -> Option<Outgoing<Frame<'_>>> {
        match self.connections.get_mut(&connection)? {
            Line::Leaving(farewell) => farewell.take().map(Outgoing::Close),
            Line::Live(agent) => {
                let member = self.members.get_mut(agent).expect("a live line has a member");
                if member.arriving.is_some() {
                    return None;
                }
                let is_keeper = member.keeper.is_some();
                let frame = member.session.pop()?;
                self.counters.frames_out += 1;
                if !is_keeper && frame.is_kept() {
                    member.keeper = Some(self.counters.frames_out);
                    self.keepers.insert(self.counters.frames_out, agent.clone());
                }
                Some(Outgoing::Frame(frame))
            }
        }
    }

    /// Whether the connection is told to go.
    #[must_use]
    pub fn is_leaving(&self, connection: ConnectionId) -> bool {
        matches!(self.connections.get(&connection), Some(Line::Leaving(Some(_))))
    }

    /// How long the agent's ICE servers are good, if it has any, and when its token expires, in Unix seconds.
    #[must_use]
    pub fn ice_term(&self, connection: ConnectionId) -> Option<(IceTerm, u64)> {
        let Some(Line::Live(agent)) = self.connections.get(&connection) else { return None };
        let member = &self.members[agent];
        member.ice_term.map(|term| (term, member.expires))
    }

    /// It has others now, told by `frame`; or `None`, and is only to be thought of again.
    pub fn give_ice(&mut self, now: Now, connection: ConnectionId, frame: Option<Bytes>, term: IceTerm) {
        let Some(agent) = self.agent_on(connection) else { return };
        self.member(&agent).ice_term = Some(term);
        if let Some(frame) = frame {
            self.push_aside(now, &agent, frame);
        }
    }

    /// Counts a "no" that the shell says itself.
    pub fn count_refusal(&mut self, refusal: &Refusal) {
        let place = CODES.iter().position(|code| *code == refusal.code());
        self.counters.errors[place.expect("every refusal has one of the codes")] += 1;
    }

    /// How to continue an agent's session without anything that was written before: `None` if it has none in the room.
    #[must_use]
    pub fn continuation(&self, agent: &Agent) -> Option<Resume> {
        let member = self.members.get(&agent.id).filter(|member| member.room == agent.room)?;
        Some(Resume {
            session: member.session.id().as_str().to_owned(),
            after: member.session.written_up_to(),
        })
    }

    /// An operator ends the agent's session, if it has one.
    pub fn revoke(&mut self, now: Now, agent: &AgentId) {
        self.end(now, agent, Some(Farewell::Revoked));
    }

    /// The connection is over.
    pub fn leave(&mut self, now: Now, connection: ConnectionId, departure: Departure) {
        let Some(Line::Live(agent)) = self.connections.remove(&connection) else { return };
        let stays = self.members[&agent].by_request || !self.limits.resume_window.is_zero();
        if departure == Departure::LeftQuietly {
            self.member(&agent).correspondents = None;
        }
        if departure != Departure::Dropped || !stays {
            self.end(now, &agent, None);
        } else {
            self.detach(now, &agent);
        }
    }

    /// The connection does not take what it is sent: it is told to go, and its session waits.
    pub fn hang_up(&mut self, now: Now, connection: ConnectionId) {
        let Some(agent) = self.agent_on(connection) else { return };
        self.detach(now, &agent);
        self.dismiss(connection, Farewell::Slow);
    }

    /// Tells every connection to come back later, spread, forgets all sessions, and lets nobody join.
    pub fn restart(&mut self) {
        self.say_goodbye();
        let agents: Vec<AgentId> = self.members.keys().cloned().collect();
        agents.iter().for_each(|agent| self.unsubscribe(agent));
        let connected =
            std::mem::take(&mut self.members).into_values().filter_map(|member| member.connection);
        for (connection, reconnect_in) in connected.zip(RECONNECT.cycle()) {
            self.dismiss(connection, Farewell::Restarting(reconnect_in));
        }
        self.closed = true;
        self.rooms.clear();
        self.deadlines.clear();
        self.keepers.clear();
        self.held_bytes = 0;
    }

    /// The moment to call [`Hub::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let own = self.deadlines.first().map(|(at, _)| *at);
        [own, self.next_beat()].into_iter().flatten().min()
    }

    /// Ends sessions whose token or resume window is over, and keeps in touch with the other nodes.
    pub fn handle_timeout(&mut self, now: Now) {
        self.keep_in_touch(now);
        while let Some((_, agent)) = self.deadlines.first().filter(|(at, _)| *at <= now.mono).cloned() {
            let member = &self.members[&agent];
            if member.expires <= now.unix() {
                self.end(now, &agent, Some(Farewell::Expired));
            } else if member.arriving.as_ref().is_some_and(|arriving| arriving.until <= now.mono) {
                self.settle_now(now, &agent);
            } else if member.gone_at.is_some_and(|at| at <= now.mono) {
                self.end(now, &agent, None);
            } else {
                if self.with_session(&agent, |session, _| session.release_due(now.mono)) {
                    self.wake(&agent);
                }
                self.set_deadline(now, &agent);
            }
        }
    }

    /// Connections with something to write since this was last asked.
    pub fn take_ready(&mut self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.ready.drain(..)
    }

    /// How often to ping.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.limits.heartbeat
    }

    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            connections: self.connections.len(),
            agents: self.members.len(),
            rooms: self.rooms.len(),
            held_bytes: self.held_bytes,
            ..self.counters.clone()
        }
    }
}

/// What the shell brings to a `join`.
#[derive(Debug)]
pub struct Join<'a> {
    /// The id of the `hello`.
    pub id: Option<FrameId<'a>>,
    /// For the welcome; `None` when the token lacks the scope.
    pub ice: Option<&'a RawValue>,
    /// How long those are good.
    pub ice_term: Option<IceTerm>,
    /// The session's name if it is a new one.
    pub fresh: SessionId,
    /// Its correspondents are told `bye` when its session ends, for it cannot say so itself.
    pub ends_with_bye: bool,
    /// Where another node has a session of it, that goes on, whether or not it knows the session's name.
    pub takes_any: bool,
}

/// How long an agent's ICE servers are good.
#[derive(Clone, Copy, Debug)]
pub struct IceTerm {
    /// Unix seconds.
    pub expires: u64,
    /// It should have others then.
    pub renew_at: Instant,
}

/// What a frame led to.
enum Done {
    Delivered,
    /// To so many of the room.
    Broadcast(usize),
    Pong,
    Found(Page),
    Renewed(u64),
    /// It is on its way to another node: by this number it is known what became of it.
    Later(u64),
}

// What all of it uses.
impl Hub {
    fn member(&mut self, agent: &AgentId) -> &mut Member {
        self.members.get_mut(agent).expect("only called for members")
    }

    /// Whose connection it is, unless it is told to go.
    fn agent_on(&self, connection: ConnectionId) -> Option<AgentId> {
        match self.connections.get(&connection)? {
            Line::Live(agent) => Some(agent.clone()),
            Line::Leaving(_) => None,
        }
    }

    /// Changes a session and keeps the sum of all.
    fn with_session<T>(&mut self, agent: &AgentId, change: impl FnOnce(&mut Session, &Limits) -> T) -> T {
        let session = &mut self.members.get_mut(agent).expect("only called for members").session;
        let before = session.held_bytes();
        let outcome = change(session, &self.limits);
        self.held_bytes = self.held_bytes - before + session.held_bytes();
        outcome
    }

    /// Lost on an agent whose connection broke: it learns the present state when it resumes.
    fn push_aside(&mut self, now: Now, agent: &AgentId, frame: Bytes) {
        let member = self.member(agent);
        let most = match member.connection {
            Some(_) => MAX_ASIDE_BYTES,
            None if member.by_request => MAX_ASIDE_BYTES_BETWEEN_REQUESTS,
            None => return,
        };
        match (member.session.push_aside(frame, most), member.connection) {
            (Ok(()), connection) => self.ready.extend(connection),
            (Err(Full), Some(connection)) => self.hang_up(now, connection),
            (Err(Full), None) => {
                member.session.drop_asides();
                let lost = Refusal::Unavailable("presence was lost: ask GET /v1/agents");
                // There is room for one now.
                let _ = member.session.push_aside(ServerFrame::error(None, &lost).to_bytes(), most);
            }
        }
    }

    fn wake(&mut self, agent: &AgentId) {
        if let Some(connection) = self.members[agent].connection {
            self.ready.push(connection);
        }
    }
}
