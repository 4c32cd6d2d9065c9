//! Frames on their way to other nodes, and those that come from there.

use std::time::Duration;

use serde_json::value::RawValue;

use super::{
    super::{Done, Hub},
    Flights, Group, Resolution, Stashed, Waits,
};
use crate::{
    clock::Now,
    credentials::{
        signaled,
        token::{AgentId, Room},
    },
    signaling::{
        message::{Kind, ServerFrame, Unnumbered},
        nodes::{Errand, Outcome, Word},
        refusal::Refusal,
    },
};

/// How long the answer to a frame is waited for.
const ANSWER: Duration = Duration::from_secs(2);
/// Frames on their way to other nodes, and their bytes.
const MAX_FLYING: usize = 65_536;
const MAX_FLYING_BYTES: usize = 64 << 20;
/// Frames that wait for one agent to have arrived, and their bytes.
const MAX_STASH: usize = 256;
const MAX_STASH_BYTES: usize = 1 << 20;
/// What is said to a sender whose frame may have arrived, or not.
const NO_ANSWER: Refusal = Refusal::Unavailable("another node does not answer: it may have been delivered");
const NO_ENGINE: Refusal = Refusal::Unavailable("the other nodes cannot be reached: try again soon");
const TOO_LARGE: Refusal = Refusal::TooLarge("the frame is more than goes to another node");

impl Flights {
    /// The next number: a node's only grow.
    pub(super) fn ticket(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

impl Hub {
    /// To an agent that is not here: whoever hears what is said to it answers.
    pub(in crate::signaling::hub) fn route_elsewhere(
        &mut self,
        now: Now,
        from: &AgentId,
        kind: Kind,
        to: &str,
        body: Option<&RawValue>,
    ) -> Result<Done, Refusal> {
        let to = self.elsewhere.as_ref().and(AgentId::parse(to)).ok_or(Refusal::PeerUnavailable)?;
        let frame = Unnumbered::new(kind, from, Some(&to), body);
        self.check_flight(frame.size())?;
        self.note_correspondents(from, &to);
        Ok(Done::Later(self.fly(now, from, &[to], &frame, None)))
    }

    /// To all of a room who are elsewhere, after `reached` who are here. `None` when there are none.
    pub(in crate::signaling::hub) fn fly_to_room(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &[AgentId],
        frame: &Unnumbered,
        reached: usize,
    ) -> Option<u64> {
        let is_possible = !to.is_empty() && self.check_flight(frame.size() * to.len()).is_ok();
        is_possible.then(|| self.fly(now, from, to, frame, Some(reached)))
    }

    pub(super) fn check_flight(&self, bytes: usize) -> Result<(), Refusal> {
        let elsewhere = self.elsewhere.as_ref().ok_or(Refusal::PeerUnavailable)?;
        let flights = &elsewhere.flights;
        if !elsewhere.is_up {
            Err(NO_ENGINE)
        } else if flights.tickets.len() >= MAX_FLYING || flights.bytes + bytes > MAX_FLYING_BYTES {
            Err(Refusal::QueueFull)
        } else {
            Ok(())
        }
    }

    /// Gives the number of the group, which has nobody yet who waits for it.
    pub(super) fn fly(
        &mut self,
        now: Now,
        from: &AgentId,
        to: &[AgentId],
        frame: &Unnumbered,
        to_room: Option<usize>,
    ) -> u64 {
        let tickets: Vec<u64> = to.iter().map(|to| self.send(from, to, frame)).collect();
        let elsewhere = self.elsewhere.as_mut().expect("it was sent there");
        let flights = &mut elsewhere.flights;
        let group = tickets[0];
        flights.tickets.extend(tickets.iter().map(|ticket| (*ticket, group)));
        flights.due.push_back((now.mono + ANSWER, group));
        let bytes = frame.size() * to.len();
        flights.bytes += bytes;
        let flight = Group {
            left: tickets.len(),
            tickets,
            reached: to_room.unwrap_or(0),
            to_room: to_room.is_some(),
            refusal: NO_ANSWER,
            bytes,
            waits: Waits::Request { id: None },
        };
        flights.groups.insert(group, flight);
        group
    }

    /// Says a frame to an agent elsewhere; nobody waits for the answer to its ticket yet.
    pub(super) fn send(&mut self, from: &AgentId, to: &AgentId, frame: &Unnumbered) -> u64 {
        let (room, serial) = (self.members[from].room.clone(), self.members[from].serial);
        let elsewhere = self.elsewhere.as_mut().expect("it is sent there");
        elsewhere.numbers.frames_out += 1;
        let (node, ticket) = (elsewhere.node, elsewhere.flights.ticket());
        let word = Word::Routed { node, ticket, kind: frame.kind(), from: from.clone(), serial };
        let word = word.before(frame.rest());
        elsewhere.errands.push_back(Errand::ToAgent { room, agent: to.clone(), ticket, word });
        ticket
    }

    /// Says `bye` to somebody who may be elsewhere; what becomes of it is nobody's business.
    pub(in crate::signaling::hub) fn send_bye(&mut self, from: &AgentId, to: &AgentId) {
        if self.check_flight(0).is_ok() {
            self.send(from, to, &Unnumbered::new(Kind::Bye, from, Some(to), None));
        }
    }

    /// Whoever waits for what becomes of a frame.
    pub(in crate::signaling::hub) fn wait_for(&mut self, group: u64, waits: Waits) {
        let groups = self.elsewhere.as_mut().map(|elsewhere| &mut elsewhere.flights.groups);
        if let Some(group) = groups.and_then(|groups| groups.get_mut(&group)) {
            group.waits = waits;
        }
    }

    /// A frame has come, or not.
    pub(super) fn answered(&mut self, now: Now, ticket: u64, outcome: Outcome) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let flights = &mut elsewhere.flights;
        let Some(number) = flights.tickets.remove(&ticket) else { return };
        let Some(group) = flights.groups.get_mut(&number) else { return };
        match outcome {
            Outcome::Delivered => group.reached += 1,
            Outcome::PeerUnavailable => group.refusal = Refusal::PeerUnavailable,
            Outcome::QueueFull => group.refusal = Refusal::QueueFull,
            Outcome::TooLarge => group.refusal = TOO_LARGE,
        }
        group.left -= 1;
        if group.left == 0 {
            self.conclude(now, number);
        }
    }

    /// All that is known of a frame by now is told to whoever waits for it.
    pub(super) fn conclude(&mut self, now: Now, number: u64) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let flights = &mut elsewhere.flights;
        let Some(group) = flights.groups.remove(&number) else { return };
        flights.bytes -= group.bytes;
        group.tickets.iter().for_each(|ticket| _ = flights.tickets.remove(ticket));
        let outcome = match group.reached {
            reached if group.to_room => Ok(Done::Broadcast(reached)),
            0 => Err(group.refusal),
            _ => Ok(Done::Delivered),
        };
        match group.waits {
            Waits::Connection { asked, id } => self.answer(now, asked, id.as_deref(), outcome),
            Waits::Peer { agent, serial, to } => {
                if let Err(refusal) = outcome {
                    self.count_refusal(&refusal);
                    if self.has_session(&agent, serial) {
                        let expired = ServerFrame::Expired { agent: &to }.to_bytes();
                        self.push_aside(now, &agent, expired);
                    }
                }
            }
            Waits::Request { id } => {
                let told = outcome.as_ref().map(|_| ()).map_err(Clone::clone);
                let answer = self.respond(id.as_deref(), outcome);
                self.resolve(number, Resolution { answer, outcome: told });
            }
        }
    }

    fn has_session(&self, agent: &AgentId, serial: u64) -> bool {
        self.members.get(agent).is_some_and(|member| member.serial == serial)
    }

    pub(super) fn resolve(&mut self, number: u64, resolution: Resolution) {
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.resolved.push((number, resolution));
        }
    }

    /// A frame of another node's agent to one that may be ours.
    pub(super) fn take_routed(&mut self, now: Now, room: &Room, to: &AgentId, said: Stashed) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        elsewhere.numbers.frames_in += 1;
        let Some(member) = self.members.get_mut(to).filter(|member| member.room == *room) else {
            // Whoever has it by now hears this, too.
            if !elsewhere.away.contains_key(to) {
                elsewhere.answer(said.node, said.ticket, Outcome::PeerUnavailable);
            }
            return;
        };
        let Some(arriving) = &mut member.arriving else { return self.accept_routed(now, to, said) };
        let size = said.frame.size();
        if arriving.stash.len() < MAX_STASH && arriving.stash_bytes + size <= MAX_STASH_BYTES {
            arriving.stash_bytes += size;
            arriving.stash.push(said);
        } else {
            elsewhere.answer(said.node, said.ticket, Outcome::QueueFull);
        }
    }

    pub(super) fn accept_routed(&mut self, now: Now, to: &AgentId, said: Stashed) {
        let Stashed { node, ticket, from, serial, frame } = said;
        let nodes = self.elsewhere.as_ref().map(|elsewhere| &elsewhere.nodes);
        let heard = &mut self.members.get_mut(to).expect("it is here").heard;
        let last = heard.entry(node).or_default();
        // It moved here while the frame was on its way to both, and had it there.
        if *last >= ticket {
            return;
        }
        *last = ticket;
        if heard.len() > 64 {
            heard.retain(|heard, _| *heard == node || nodes.is_some_and(|nodes| nodes.contains_key(heard)));
        }
        let done = self.accept(now, &from, serial, to, frame);
        if done.is_ok() {
            self.note_correspondents(&from, to);
        }
        if let Some(elsewhere) = &mut self.elsewhere {
            elsewhere.answer(node, ticket, Outcome::of(done));
        }
    }

    /// Who is told of an address may go through the relay of any node.
    pub(in crate::signaling::hub) fn tell_signaled(&mut self, now: Now, to: &AgentId, frame: &Unnumbered) {
        let Some(signaled) = &self.signaled else { return };
        let frame = frame.numbered(0).to_bytes();
        let addresses = serde_json::from_slice(&frame).map(signaled::addresses).unwrap_or_default();
        signaled.tell(now, to.as_str(), addresses.iter().copied());
        if !addresses.is_empty() {
            self.say_to_all(&Word::Signaled { agent: to.clone(), addresses });
        }
    }
}
