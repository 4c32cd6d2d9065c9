//! A session begins, goes on, waits for its agent and ends.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Answered, Before, ConnectionId, Hub, Join, Line, Member, rooms::listed_size};
use crate::{
    clock::Now,
    credentials::token::{Agent, AgentId},
    signaling::{
        farewell::Farewell,
        limits::{BETWEEN_REQUESTS, Bucket, MAX_CARD},
        message::{Announced, FrameId, Hello, Resume, ServerFrame, SessionId, Welcome},
        refusal::Refusal,
        session::Session,
    },
};

/// An expiry is looked at again at least this often, so that a wall clock that was set is noticed.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Bytes of a welcome that are not the agents and the ICE list.
const WELCOME_FRAME: usize = 1024;

impl Hub {
    pub(super) fn new_connection(&mut self, tag: u64) -> ConnectionId {
        self.last_connection += 1;
        ConnectionId { serial: self.last_connection, tag }
    }

    pub(super) fn admit(&self, agent: &AgentId) -> Result<(), Refusal> {
        if self.closed {
            return Err(Refusal::Unavailable("going down: try again soon"));
        }
        if !self.members.contains_key(agent) && self.members.len() >= self.limits.agents {
            return Err(Refusal::Unavailable("too many agents: try again later"));
        }
        Ok(())
    }

    /// Continues the agent's session or starts a new one. Gives the welcome, if it need not wait for other nodes.
    pub(super) fn enter(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
        connection: Option<ConnectionId>,
    ) -> Answered<Option<Bytes>> {
        self.counters.frames_in += 1;
        self.settle_if_moved(now, agent, hello.resume.as_ref());
        let resumed = self.resume(now, agent, hello.resume.as_ref(), connection);
        if resumed {
            self.replace_card(now, &agent.id, hello.card);
        } else {
            let before = self.whereabouts(agent);
            // Beginning anew is no way around the limits.
            let bucket = self.members.get(&agent.id).map_or(Bucket::new(now.mono), |member| member.bucket);
            self.end(now, &agent.id, Some(Farewell::Replaced));
            self.start(now, agent, hello.card, join.fresh.clone(), connection);
            self.member(&agent.id).bucket = bucket;
            if self.elsewhere.is_some() {
                self.equip(&agent.id, &join);
                return match self.arrive(now, agent, hello, &join, before, connection.is_none()) {
                    Some(request) => Answered::Later(request),
                    None => Answered::Now(None),
                };
            }
            self.appear(now, &agent.id, false);
        }
        self.equip(&agent.id, &join);
        Answered::Now(Some(self.welcome(&agent.id, resumed, join.id, join.ice)))
    }

    fn equip(&mut self, agent: &AgentId, join: &Join<'_>) {
        let member = self.member(agent);
        member.ice_term = join.ice_term;
        if join.ends_with_bye {
            member.correspondents.get_or_insert_default();
        }
    }

    /// Where an agent that begins anew was before. What was asked for it in vain is not asked again.
    fn whereabouts(&mut self, agent: &Agent) -> Before {
        let Some(member) = self.members.get_mut(&agent.id) else { return Before::Unknown };
        match &mut member.arriving {
            None => Before::Here,
            Some(arriving) if member.room == agent.room => Before::Claimed(arriving.take_claim()),
            Some(_) => Before::Unknown,
        }
    }

    fn resume(
        &mut self,
        now: Now,
        agent: &Agent,
        resume: Option<&Resume>,
        connection: Option<ConnectionId>,
    ) -> bool {
        let Some(resume) = resume else { return false };
        let Some(member) = self.members.get(&agent.id) else { return false };
        let is_another = member.room != agent.room || member.session.id().as_str() != resume.session;
        if is_another || member.arriving.is_some() {
            return false;
        }
        if self.with_session(&agent.id, |session, _| session.rewind(resume.after)).is_err() {
            return false;
        }
        let member = self.member(&agent.id);
        member.session.drop_asides();
        member.expires = agent.expires;
        member.gone_at = None;
        if let Some(older) = std::mem::replace(&mut member.connection, connection) {
            self.dismiss(older, Farewell::Replaced);
        }
        self.set_deadline(now, &agent.id);
        true
    }

    fn start(
        &mut self,
        now: Now,
        agent: &Agent,
        card: Option<&RawValue>,
        fresh: SessionId,
        connection: Option<ConnectionId>,
    ) {
        self.last_session += 1;
        let member = Member {
            room: agent.room.clone(),
            card: card.map(|card| Arc::from(card.to_owned())),
            expires: agent.expires,
            session: Session::new(fresh),
            serial: self.last_session,
            since: now.wall.duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
            arriving: None,
            heard: BTreeMap::new(),
            introduced: VecDeque::new(),
            connection,
            by_request: connection.is_none(),
            gone_at: None,
            deadline: now.mono,
            ice_term: None,
            correspondents: None,
            keeper: None,
            bucket: Bucket::new(now.mono),
        };
        self.members.insert(agent.id.clone(), member);
        let gathering = self.rooms.entry(agent.room.clone()).or_default();
        gathering.own += 1;
        let is_first = gathering.own == 1;
        self.set_deadline(now, &agent.id);
        if is_first {
            self.ask_about(&agent.room);
        }
    }

    pub(super) fn welcome(
        &self,
        agent: &AgentId,
        resumed: bool,
        id: Option<FrameId<'_>>,
        ice: Option<&RawValue>,
    ) -> Bytes {
        let Member { room, session, .. } = &self.members[agent];
        let left = self.limits.max_frame.saturating_sub(WELCOME_FRAME + ice.map_or(0, |ice| ice.get().len()));
        let everybody = &self.rooms[room].everybody;
        let mut size = 0;
        let agents = everybody
            .keys()
            .filter(|other| *other != agent)
            .take(self.limits.presence_limit)
            .map(|other| self.listed(other))
            .take_while(|listed| {
                size += listed_size(listed.agent, listed.card);
                size <= left
            })
            .collect();
        ServerFrame::Welcome(Welcome {
            id,
            agent,
            room,
            session: session.id(),
            resumed,
            ice,
            agents,
            agent_count: everybody.len() - 1,
            heartbeat: self.limits.heartbeat.as_secs(),
            limits: self.announced(),
        })
        .to_bytes()
    }

    fn announced(&self) -> Announced {
        Announced {
            max_frame: limited(self.limits.max_frame),
            max_card: MAX_CARD,
            messages_per_second: self.limits.rate.map(|rate| rate.per_second),
            burst: self.limits.rate.map(|rate| rate.burst),
            window_messages: limited(self.limits.window_messages),
            window_bytes: limited(self.limits.window_bytes),
            presence_limit: limited(self.limits.presence_limit),
            resume_window: self.limits.resume_window.as_secs(),
        }
    }

    /// Leaves a session without a connection, to be resumed for a while.
    pub(super) fn detach(&mut self, now: Now, agent: &AgentId) {
        let member = self.member(agent);
        member.connection = None;
        if !member.by_request {
            member.session.drop_asides();
        }
        self.set_gone_at(now, agent);
    }

    pub(super) fn set_gone_at(&mut self, now: Now, agent: &AgentId) {
        let window = self.limits.resume_window;
        let member = self.member(agent);
        let window = if member.by_request { window.max(BETWEEN_REQUESTS) } else { window };
        member.gone_at = Some(now.mono + window);
        self.set_deadline(now, agent);
    }

    /// Ends the agent's session, if there is one.
    pub(super) fn end(&mut self, now: Now, agent: &AgentId, farewell: Option<Farewell>) {
        let Some(member) = self.members.get(agent) else { return };
        let room = member.room.clone();
        let was_seen = member.arriving.as_ref().is_none_or(|arriving| arriving.is_of_another_node());
        // When only its token is over, or it begins anew, its connections with others live on.
        if matches!(farewell, None | Some(Farewell::Revoked)) {
            self.say_bye(agent);
        }
        if was_seen {
            self.tell_ours(now, &room, agent, &ServerFrame::AgentLeft { agent }.to_bytes());
            self.post_gone(&room, agent);
        }
        let member = self.remove(agent);
        if let (Some(connection), Some(farewell)) = (member.connection, farewell) {
            self.dismiss(connection, farewell);
        }
    }

    /// Takes the agent and its session out, as if it had never been here.
    pub(super) fn remove(&mut self, agent: &AgentId) -> Member {
        self.unsubscribe(agent);
        let mut member = self.members.remove(agent).expect("only called for members");
        self.held_bytes -= member.session.held_bytes();
        self.deadlines.remove(&(member.deadline, agent.clone()));
        member.keeper.map(|place| self.keepers.remove(&place));
        let gathering = self.rooms.get_mut(&member.room).expect("it was there");
        gathering.own -= 1;
        match member.arriving.take() {
            None => _ = gathering.everybody.remove(agent),
            Some(arriving) => {
                gathering.arriving -= 1;
                self.give_up(&member.room, agent, *arriving);
            }
        }
        if self.rooms[&member.room].own == 0 {
            self.forget_room(&member.room);
        }
        member
    }

    pub(super) fn dismiss(&mut self, connection: ConnectionId, farewell: Farewell) {
        self.connections.insert(connection, Line::Leaving(Some(farewell)));
        self.ready.push(connection);
    }

    pub(super) fn set_deadline(&mut self, now: Now, agent: &AgentId) {
        let member = self.members.get_mut(agent).expect("only members have deadlines");
        let left = Duration::from_secs(member.expires.saturating_sub(now.unix())).min(LONGEST_WAIT);
        let expiry = now.mono + left;
        let arrival = member.arriving.as_ref().map(|arriving| arriving.until);
        let deadline = [Some(expiry), member.gone_at, member.session.next_release(), arrival];
        let deadline = deadline.into_iter().flatten().min();
        let deadline = deadline.expect("a token always ends");
        self.deadlines.remove(&(member.deadline, agent.clone()));
        member.deadline = deadline;
        self.deadlines.insert((deadline, agent.clone()));
    }
}

/// A limit worth telling.
fn limited(limit: usize) -> Option<usize> {
    (limit != usize::MAX).then_some(limit)
}
