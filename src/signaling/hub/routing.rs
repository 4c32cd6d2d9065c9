//! What a frame asks for is done: it goes to who it is for, and its sender is answered.

use std::time::Duration;

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{ConnectionId, Done, Hub, Waits, elsewhere::kept};
use crate::{
    clock::Now,
    credentials::token::{Agent, AgentId},
    signaling::{
        limits::{EARLY, INTRODUCED, MAX_ASIDE_BYTES},
        message::{ClientFrame, Find, Found, FrameId, Incoming, Kind, Rejected, ServerFrame, Unnumbered},
        refusal::Refusal,
        session::Full,
    },
};

/// Bytes of a `found` that are not the agents.
const FOUND_FRAME: usize = 512;

impl Hub {
    pub(super) fn perform<'a>(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: Result<Incoming<'a>, Rejected<'a>>,
    ) -> (Option<FrameId<'a>>, Result<Done, Refusal>) {
        self.counters.frames_in += 1;
        match incoming {
            Ok(incoming) => (incoming.id, self.obey(now, agent, &incoming)),
            Err(rejected) => (rejected.id, self.spend(now, agent).and(Err(rejected.refusal))),
        }
    }

    fn obey(&mut self, now: Now, agent: &AgentId, incoming: &Incoming<'_>) -> Result<Done, Refusal> {
        self.spend(now, agent)?;
        self.carry_out(now, agent, incoming)
    }

    pub(super) fn carry_out(
        &mut self,
        now: Now,
        agent: &AgentId,
        incoming: &Incoming<'_>,
    ) -> Result<Done, Refusal> {
        if incoming.from.as_ref().is_some_and(|from| *from != agent.as_str()) {
            return Err(Refusal::BadFrame("from is not you".into()));
        }
        match &incoming.frame {
            ClientFrame::Routed { kind, to: Some(to), body } => self.route(now, agent, *kind, to, *body),
            ClientFrame::Routed { kind, to: None, body } => self.broadcast(now, agent, *kind, *body),
            ClientFrame::Update { card } => {
                self.replace_card(now, agent, Some(card.unwrap_or(RawValue::NULL)));
                Ok(Done::Delivered)
            }
            ClientFrame::Received { up_to } => {
                self.with_session(agent, |session, _| session.acknowledge(*up_to));
                Ok(Done::Delivered)
            }
            ClientFrame::Ping => Ok(Done::Pong),
            ClientFrame::Hello(_) => Err(Refusal::BadFrame("hello comes once".into())),
            ClientFrame::Find(Find { query, after, limit }) => {
                let (room, after) = (&self.members[agent].room, after.as_deref().unwrap_or_default());
                let bytes = self.limits.max_frame.min(MAX_ASIDE_BYTES / 2).saturating_sub(FOUND_FRAME);
                Ok(Done::Found(self.page(room, query, after, limit.unwrap_or(usize::MAX), bytes)))
            }
            ClientFrame::Renew { .. } => Err(Refusal::Unavailable("renew is not served here")),
        }
    }

    pub(super) fn spend(&mut self, now: Now, agent: &AgentId) -> Result<(), Refusal> {
        let Some(rate) = self.limits.rate else { return Ok(()) };
        self.member(agent).bucket.take(now.mono, rate).map_err(Refusal::RateLimited)
    }

    fn route(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        to: &str,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        if to == from.as_str() {
            return Err(Refusal::BadFrame("to is yourself".into()));
        }
        let (room, serial) = (&self.members[from].room, self.members[from].serial);
        let here = self.members.get_key_value(to).filter(|(_, receiver)| receiver.room == *room);
        let Some((to, _)) = here else { return self.route_elsewhere(now, from, kind, to, body) };
        let to = to.clone();
        let frame = Unnumbered::new(kind, from, Some(&to), body);
        self.accept(now, from, serial, &to, frame)?;
        self.note_correspondents(from, &to);
        Ok(Done::Delivered)
    }

    /// Takes a frame for an agent of ours, of a sender whose session has that number, wherever it is.
    pub(super) fn accept(
        &mut self,
        now: Now,
        from: &AgentId,
        serial: u64,
        to: &AgentId,
        frame: Unnumbered,
    ) -> Result<(), Refusal> {
        let kind = frame.kind();
        // Before it is on its way: who hears of it may come to the relay at once.
        self.tell_signaled(now, to, &frame);
        if kind == Kind::IceCandidate && !self.is_introduced(serial, to) {
            return self.deliver_early(now, from, to, frame);
        }
        let describes = matches!(kind, Kind::Offer | Kind::Answer);
        if !describes {
            // What was said before goes before.
            self.release(from, to);
        }
        self.deliver(to, frame)?;
        if describes {
            self.introduce(from, serial, to);
        } else if kind == Kind::Bye {
            // What comes next belongs to another negotiation.
            self.member(to).introduced.retain(|introduced| *introduced != serial);
        }
        Ok(())
    }

    /// For those who are told of its end.
    pub(super) fn note_correspondents(&mut self, from: &AgentId, to: &AgentId) {
        for (own, other) in [(from, to), (to, from)] {
            let correspondents = self.members.get_mut(own).and_then(|member| member.correspondents.as_mut());
            if let Some(correspondents) = correspondents
                && correspondents.len() < INTRODUCED
            {
                correspondents.insert(other.clone());
            }
        }
    }

    /// Tells the correspondents of an agent whose session ends, if they are still here and have room.
    pub(super) fn say_bye(&mut self, agent: &AgentId) {
        let room = self.members[agent].room.clone();
        for other in self.member(agent).correspondents.take().into_iter().flatten() {
            if self.members.get(&other).is_some_and(|member| member.room == room) {
                let _ = self.deliver(&other, Unnumbered::new(Kind::Bye, agent, Some(&other), None));
            } else {
                self.send_bye(agent, &other);
            }
        }
    }

    fn broadcast(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        if self.is_crowded(&self.members[from].room) {
            return Err(Refusal::TooLarge("the room is too large for a message to everybody"));
        }
        let frame = Unnumbered::new(kind, from, None, body);
        let room = &self.members[from].room;
        let (here, away): (Vec<_>, Vec<_>) =
            self.others(from).into_iter().partition(|other| self.is_ours(room, other));
        here.iter().for_each(|to| self.release(from, to));
        let reached = here.iter().filter(|to| self.deliver(to, frame.clone()).is_ok()).count();
        Ok(match self.fly_to_room(now, from, &away, &frame, reached) {
            Some(number) => Done::Later(number),
            None => Done::Broadcast(reached),
        })
    }

    /// Puts a frame into the receiver's window.
    ///
    /// # Errors
    /// When that, or all of them together, are full.
    fn deliver(&mut self, to: &AgentId, frame: Unnumbered) -> Result<(), Refusal> {
        self.make_room(to, &frame)?;
        self.with_session(to, |session, limits| session.push(frame, limits))
            .map_err(|Full| Refusal::QueueFull)?;
        self.counters.delivered += 1;
        self.wake(to);
        Ok(())
    }

    /// The same for a candidate that came before its sender's first description, without which it is of no use.
    fn deliver_early(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &AgentId,
        frame: Unnumbered,
    ) -> Result<(), Refusal> {
        self.make_room(to, &frame)?;
        let until = now.mono + EARLY;
        self.with_session(to, |session, limits| session.push_early(from, frame, until, limits))
            .map_err(|Full| Refusal::QueueFull)?;
        self.counters.delivered += 1;
        self.set_deadline(now, to);
        Ok(())
    }

    /// Lets go of what is written, the receiver's first, then everybody's, until all together have room.
    ///
    /// # Errors
    /// When they are full of frames that are not written yet.
    fn make_room(&mut self, to: &AgentId, frame: &Unnumbered) -> Result<(), Refusal> {
        if !self.has_room(frame) {
            self.with_session(to, |session, _| session.forget_written());
        }
        while !self.has_room(frame) {
            let (_, keeper) = self.keepers.pop_first().ok_or(Refusal::QueueFull)?;
            self.member(&keeper).keeper = None;
            self.with_session(&keeper, |session, _| session.forget_written());
        }
        Ok(())
    }

    fn has_room(&self, frame: &Unnumbered) -> bool {
        self.held_bytes + frame.size() <= self.limits.held_bytes
    }

    fn is_introduced(&self, serial: u64, to: &AgentId) -> bool {
        self.members[to].introduced.contains(&serial)
    }

    /// A description of `from` has gone to `to`: candidates that were early follow it, later ones do not wait.
    fn introduce(&mut self, from: &AgentId, serial: u64, to: &AgentId) {
        if self.is_introduced(serial, to) {
            return;
        }
        let introduced = &mut self.member(to).introduced;
        if introduced.len() >= INTRODUCED {
            introduced.pop_front();
        }
        introduced.push_back(serial);
        self.release(from, to);
    }

    fn release(&mut self, from: &AgentId, to: &AgentId) {
        if self.with_session(to, |session, _| session.release(from)) {
            self.wake(to);
        }
    }

    /// On the connection that asked, as long as it is there. Success without an `id` is silent.
    pub(super) fn answer(
        &mut self,
        now: Now,
        asked: ConnectionId,
        id: Option<FrameId<'_>>,
        outcome: Result<Done, Refusal>,
    ) {
        if let Ok(Done::Later(number)) = outcome {
            return self.wait_for(number, Waits::Connection { asked, id: kept(id) });
        }
        let is_silent = id.is_none() && matches!(outcome, Ok(Done::Delivered | Done::Broadcast(_)));
        if is_silent {
            return;
        }
        if let Some(agent) = self.agent_on(asked) {
            let frame = self.respond(id, outcome);
            self.push_aside(now, &agent, frame);
        }
    }

    pub(super) fn respond(&mut self, id: Option<FrameId<'_>>, outcome: Result<Done, Refusal>) -> Bytes {
        let frame = match &outcome {
            Err(refusal) => {
                self.count_refusal(refusal);
                ServerFrame::error(id, refusal)
            }
            Ok(Done::Found(page)) => ServerFrame::Found(Found { id, page }),
            Ok(Done::Pong) => ServerFrame::Pong { id },
            Ok(Done::Renewed(expires)) => {
                ServerFrame::Renewed { id, expires_at: std::time::UNIX_EPOCH + Duration::from_secs(*expires) }
            }
            Ok(Done::Delivered | Done::Later(_)) => ServerFrame::Delivered { id, count: None },
            Ok(Done::Broadcast(count)) => ServerFrame::Delivered { id, count: Some(*count) },
        };
        frame.to_bytes()
    }

    pub(super) fn extend(&mut self, now: Now, agent: &AgentId, token: &Agent) -> Result<Done, Refusal> {
        let member = self.member(agent);
        if token.id != *agent || token.room != member.room {
            return Err(Refusal::Forbidden("the token is for another agent or another room"));
        }
        if !token.scopes.signal {
            return Err(Refusal::Forbidden("the token lacks the scope signal"));
        }
        member.expires = token.expires;
        self.set_deadline(now, agent);
        Ok(Done::Renewed(token.expires))
    }
}
