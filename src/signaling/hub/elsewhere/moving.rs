//! Agents that come from another node, and go to one: their sessions move with them.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::value::RawValue;

use super::{
    super::{Farewell, Hub, Join, Member},
    Arriving, Away, Before, Claim, HANDED, Resolution,
    presence::as_listed,
};
use crate::{
    clock::Now,
    credentials::token::{Agent, AgentId, Room},
    signaling::{
        message::{Hello, Resume, ServerFrame},
        nodes::{Errand, Handed, Held, MAX_LIST, NodeId, Outcome, Wants, Word},
        refusal::Refusal,
        registry::Profile,
    },
};

/// What a session may owe that comes from another node: after that long it may say something again.
const MAX_DEBT: Duration = Duration::from_secs(60);

/// How long an agent that comes waits for what other nodes have of it and of its room.
const ARRIVAL: Duration = Duration::from_secs(1);

impl Hub {
    /// From now on nothing is heard of what others say to the agent.
    pub(in crate::signaling::hub) fn unsubscribe(&mut self, agent: &AgentId) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let room = self.members[agent].room.clone();
        elsewhere.errands.push_back(Errand::Unsubscribe(room, agent.clone()));
    }

    /// An agent that has not arrived is gone.
    pub(in crate::signaling::hub) fn give_up(&mut self, room: &Room, agent: &AgentId, arriving: Arriving) {
        if let Some(Claim { node, ticket, .. }) = arriving.next {
            self.say_held(node, ticket, room, agent, Held::Nothing { since: 0 });
        }
        let Some(elsewhere) = &mut self.elsewhere else { return };
        if let Some(claim) = arriving.claim {
            elsewhere.claims.remove(&claim);
        }
        for said in arriving.stash {
            elsewhere.answer(said.node, said.ticket, Outcome::PeerUnavailable);
        }
        if let Some(request) = arriving.request {
            let gone = Refusal::Unavailable("the agent has come in another way meanwhile: begin anew");
            let answer = ServerFrame::error(arriving.id.as_deref(), &gone).to_bytes();
            elsewhere.resolved.push((request, Resolution { answer, outcome: Err(gone) }));
        }
    }

    /// An agent began anew here. Other nodes are asked for what they have of it, unless it was here before.
    pub(in crate::signaling::hub) fn arrive(
        &mut self,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: &Join<'_>,
        before: Before,
        by_request: bool,
    ) -> Option<u64> {
        let away = self.elsewhere.as_ref().and_then(|elsewhere| elsewhere.away.get(&agent.id));
        if let Some(since) = away.map(|away| away.since) {
            self.come_after(&agent.id, since);
        }
        let elsewhere = self.elsewhere.as_mut().expect("there are other nodes");
        let (room, id) = (agent.room.clone(), agent.id.clone());
        elsewhere.errands.push_back(Errand::Subscribe(room.clone(), id.clone()));
        let request = by_request.then(|| elsewhere.flights.ticket());
        let claim = match before {
            Before::Claimed(claim) => claim,
            Before::Here => {
                self.say_took(agent);
                None
            }
            Before::Unknown => {
                let wants = match &hello.resume {
                    Some(resume) => Wants::This(resume.clone()),
                    None if join.takes_any => Wants::Any,
                    None => Wants::Fresh,
                };
                let claim = self.claim(agent, wants);
                self.say_took(agent);
                claim
            }
        };
        self.rooms.get_mut(&room).expect("it is there").arriving += 1;
        self.member(&id).arriving = Some(Box::new(Arriving {
            claim,
            until: now.mono + ARRIVAL,
            id: join.id.map(ToOwned::to_owned),
            ice: join.ice.map(ToOwned::to_owned),
            request,
            frames: Vec::new(),
            resumed: false,
            stash: Vec::new(),
            stash_bytes: 0,
            rivals: BTreeSet::new(),
            next: None,
            is_late: false,
        }));
        self.set_deadline(now, &id);
        self.settle_if_known(now, &id);
        request
    }

    /// Asks whoever has the agent in its room. Gives the number of the answer, if there is anybody to be asked.
    fn claim(&mut self, agent: &Agent, wants: Wants) -> Option<u64> {
        let since = self.members[&agent.id].since;
        let elsewhere = self.elsewhere.as_mut().filter(|elsewhere| elsewhere.is_up)?;
        let (node, ticket) = (elsewhere.node, elsewhere.flights.ticket());
        let word = Word::Claim { node, ticket, since, wants }.to_bytes();
        let (room, agent) = (agent.room.clone(), agent.id.clone());
        elsewhere.claims.insert(ticket, agent.clone());
        elsewhere.errands.push_back(Errand::ToAgent { room, agent, ticket, word });
        Some(ticket)
    }

    /// Whoever has the agent in another room has it no more.
    fn say_took(&mut self, agent: &Agent) {
        let Some(node) = self.own_node() else { return };
        let since = self.members[&agent.id].since;
        self.say_to_all(&Word::Took { node, room: agent.room.clone(), agent: agent.id.clone(), since });
    }

    /// Welcomes an agent that has waited for nothing, or for everything that there is.
    pub(super) fn settle_if_known(&mut self, now: Now, agent: &AgentId) {
        let Some(member) = self.members.get(agent) else { return };
        let Some(arriving) = &member.arriving else { return };
        let is_last = !arriving.is_late || arriving.next.is_some();
        if arriving.claim.is_none() && self.rooms[&member.room].asked.is_empty() && is_last {
            self.settle_now(now, agent);
        }
    }

    /// A session that has come from another node, and is asked for again before it was welcomed, waits for nothing more.
    pub(in crate::signaling::hub) fn settle_if_moved(
        &mut self,
        now: Now,
        agent: &Agent,
        resume: Option<&Resume>,
    ) {
        let member = self.members.get(&agent.id).filter(|member| member.room == agent.room);
        let is_asked_for = member.is_some_and(|member| {
            member.arriving.as_ref().is_some_and(|arriving| arriving.resumed)
                && resume.is_some_and(|resume| resume.session == member.session.id().as_str())
        });
        if is_asked_for {
            self.settle_now(now, &agent.id);
        }
    }

    /// Nothing will come from elsewhere.
    pub(super) fn settle(&mut self, now: Now, agent: &AgentId) {
        if let Some(arriving) = self.members.get_mut(agent).and_then(|member| member.arriving.as_mut()) {
            arriving.claim = None;
            self.settle_if_known(now, agent);
        }
    }

    /// All that waited for nothing but the room.
    pub(super) fn settle_room(&mut self, now: Now, room: &Room) {
        let arriving = |member: &Member| member.room == *room && member.arriving.is_some();
        let agents: Vec<AgentId> = match self.rooms.get(room) {
            Some(gathering) if gathering.arriving > 0 => {
                self.members.iter().filter(|(_, m)| arriving(m)).map(|(agent, _)| agent.clone()).collect()
            }
            _ => return,
        };
        agents.iter().for_each(|agent| self.settle_if_known(now, agent));
    }

    /// The agent has arrived: it is present, and welcomed.
    pub(in crate::signaling::hub) fn settle_now(&mut self, now: Now, agent: &AgentId) {
        let member = self.members.get_mut(agent).expect("it arrives");
        let Some(arriving) = member.arriving.take_if(|arriving| !arriving.is_late || arriving.next.is_some())
        else {
            return self.come_too_late(now, agent);
        };
        let room = member.room.clone();
        self.rooms.get_mut(&room).expect("it is there").arriving -= 1;
        if let (Some(claim), Some(elsewhere)) = (arriving.claim, &mut self.elsewhere) {
            elsewhere.claims.remove(&claim);
        }
        self.appear(now, agent, arriving.resumed);
        let Arriving { id, ice, request, resumed, stash, rivals, next, .. } = *arriving;
        let welcome = self.welcome(agent, resumed, id.as_deref(), ice.as_deref());
        match (request, self.members[agent].connection) {
            (Some(request), _) => self.resolve(request, Resolution { answer: welcome, outcome: Ok(()) }),
            (None, Some(connection)) => {
                self.member(agent).session.push_welcome(welcome);
                self.ready.push(connection);
            }
            (None, None) => {}
        }
        self.set_deadline(now, agent);
        stash.into_iter().for_each(|said| self.accept_routed(now, agent, said));
        rivals.iter().for_each(|node| self.say_came(*node, agent));
        if let Some(claim) = next {
            self.give_away(now, &room, agent, &claim);
        }
    }

    /// Another node has the agent later; what that said of it meanwhile is said again.
    fn come_too_late(&mut self, now: Now, agent: &AgentId) {
        let Some(member) = self.members.get_mut(agent) else { return };
        let Some(arriving) = &mut member.arriving else { return };
        let (room, rivals) = (member.room.clone(), std::mem::take(&mut arriving.rivals));
        self.end(now, agent, Some(Farewell::Replaced));
        if self.rooms.contains_key(&room) {
            rivals.iter().for_each(|node| self.say_present(*node, &room, true));
        }
    }

    /// From now on others see it. An agent that `moved` was seen before, on another node.
    pub(in crate::signaling::hub) fn appear(&mut self, now: Now, agent: &AgentId, moved: bool) {
        let (room, card) = (self.members[agent].room.clone(), self.members[agent].card.clone());
        let away = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.get_mut(agent));
        let seen = away.filter(|away| moved && away.room == room).map(|away| away.card.take());
        match &seen {
            Some(_) => _ = self.elsewhere.as_mut().and_then(|elsewhere| elsewhere.away.remove(agent)),
            None => self.lose(now, agent),
        }
        let gathering = self.rooms.get_mut(&room).expect("it has an agent of ours");
        gathering.everybody.insert(agent.clone(), card.as_deref().and_then(Profile::of));
        let text = |card: &Option<Arc<RawValue>>| card.as_deref().map(|card| card.get().to_owned());
        let news = match seen {
            None => Some(ServerFrame::AgentJoined(self.listed(agent)).to_bytes()),
            Some(seen) if text(&seen) != text(&card) => {
                Some(ServerFrame::AgentUpdated(self.listed(agent)).to_bytes())
            }
            Some(_) => None,
        };
        if let Some(news) = news {
            self.tell_ours(now, &room, agent, &news);
        }
        self.post_came(agent, moved);
    }

    pub(super) fn post_came(&mut self, agent: &AgentId, moved: bool) {
        let Some(node) = self.own_node() else { return };
        let member = &self.members[agent];
        let room = member.room.clone();
        let word = Word::Came { node, room: room.clone(), moved, agent: as_listed(agent, member) }.to_bytes();
        self.post(&room, &word);
    }

    /// Somebody says that one of our agents is with them now.
    pub(super) fn claimed(&mut self, now: Now, room: &Room, agent: &AgentId, claim: Claim) {
        let Some(elsewhere) = &self.elsewhere else { return };
        let (own, Claim { node, ticket, since, .. }) = (elsewhere.node, &claim);
        let (node, ticket, since) = (*node, *ticket, *since);
        let Some(member) = self.members.get_mut(agent).filter(|member| member.room == *room) else {
            // Whoever has it answers.
            if elsewhere.away.get(agent).is_none_or(|away| away.node == node) {
                self.say_held(node, ticket, room, agent, Held::Nothing { since: 0 });
            }
            return;
        };
        match &mut member.arriving {
            Some(_) if (member.since, own) > (since, node) => {
                self.say_held(node, ticket, room, agent, Held::Newer);
            }
            // What it asked for may be on its way here: then it goes on from here.
            Some(arriving) if arriving.claim.is_some() => arriving.next = Some(claim),
            Some(_) => {
                self.settle_now(now, agent);
                self.give_away(now, room, agent, &claim);
            }
            None => self.give_away(now, room, agent, &claim),
        }
    }

    pub(super) fn give_away(&mut self, now: Now, room: &Room, agent: &AgentId, claim: &Claim) {
        let Some(since) = self.members.get(agent).map(|member| member.since) else { return };
        let Claim { node, ticket, ref wants, .. } = *claim;
        match self.hand_over(now, agent, node, wants) {
            Some(handed) => self.send_session(node, ticket, room, agent, handed),
            None => {
                self.end(now, agent, Some(Farewell::Replaced));
                self.say_held(node, ticket, room, agent, Held::Nothing { since });
            }
        }
    }

    pub(super) fn say_held(&mut self, to: NodeId, ticket: u64, room: &Room, agent: &AgentId, held: Held) {
        let Some(node) = self.own_node() else { return };
        self.say_to(to, &Word::Held { node, ticket, room: room.clone(), agent: agent.clone(), held });
    }

    /// Gives a session away; whoever is in the room sees no change.
    pub(super) fn hand_over(
        &mut self,
        now: Now,
        agent: &AgentId,
        node: NodeId,
        wants: &Wants,
    ) -> Option<Handed> {
        let member = self.members.get(agent).filter(|member| member.arriving.is_none())?;
        let after = match wants {
            Wants::Fresh => return None,
            Wants::This(resume) if member.session.id().as_str() == resume.session => resume.after,
            Wants::This(_) => return None,
            Wants::Any => member.session.written_up_to(),
        };
        self.with_session(agent, |session, _| session.rewind(after)).ok()?;
        let member = self.remove(agent);
        let (frames, early) = member.session.carry(now.mono);
        let elsewhere = self.elsewhere.as_mut().expect("there is another node");
        elsewhere.numbers.moved_out += 1;
        if let Some(gathering) = self.rooms.get_mut(&member.room) {
            let (room, card) = (member.room.clone(), member.card.clone());
            gathering.everybody.insert(agent.clone(), card.as_deref().and_then(Profile::of));
            gathering.nodes.insert(node);
            let since = member.since;
            elsewhere.away.insert(agent.clone(), Away { node, since, room, card, list: HANDED });
        }
        if let Some(connection) = member.connection {
            self.dismiss(connection, Farewell::Replaced);
        }
        Some(Handed {
            session: member.session.id().clone(),
            since: member.since,
            after,
            last_seq: member.session.last_seq(),
            frames,
            early,
            introduced: member.introduced.into(),
            heard: member.heard.into_iter().collect(),
            correspondents: member.correspondents.map(|correspondents| correspondents.into_iter().collect()),
            card: member.card.map(|card| RawValue::to_owned(&card)),
            owes_millis: member.bucket.owes(now.mono).as_millis() as u64,
        })
    }

    /// In pieces that the engine takes.
    pub(super) fn send_session(
        &mut self,
        node: NodeId,
        ticket: u64,
        room: &Room,
        agent: &AgentId,
        mut handed: Handed,
    ) {
        let mut piece = (Vec::new(), 0);
        for frame in std::mem::take(&mut handed.frames) {
            piece.1 += frame.rest.len();
            piece.0.push(frame);
            if piece.1 >= MAX_LIST {
                let held = Held::Frames(std::mem::take(&mut piece).0);
                self.say_held(node, ticket, room, agent, held);
            }
        }
        handed.frames = piece.0;
        self.say_held(node, ticket, room, agent, Held::Session(Box::new(handed)));
    }

    /// The answer to a claim.
    pub(super) fn held(
        &mut self,
        now: Now,
        from: NodeId,
        ticket: u64,
        room: &Room,
        agent: &AgentId,
        held: Held,
    ) {
        let Some(elsewhere) = &mut self.elsewhere else { return };
        let own = elsewhere.node;
        let is_waited_for = elsewhere.claims.contains_key(&ticket);
        let arriving = self.members.get_mut(agent).and_then(|member| member.arriving.as_mut());
        match (held, arriving) {
            (Held::Frames(frames), Some(arriving)) if is_waited_for => arriving.frames.extend(frames),
            (Held::Frames(_), _) => {}
            (Held::Session(handed), Some(_)) if is_waited_for => {
                elsewhere.claims.remove(&ticket);
                elsewhere.numbers.moved_in += 1;
                self.come_after(agent, handed.since);
                self.take_over(now, agent, *handed);
                self.settle(now, agent);
            }
            // Too late: the agent is not here any more, or has begun anew.
            (Held::Session(handed), _) => {
                self.say_to(from, &Word::Went { node: own, room: room.clone(), agent: agent.clone() });
                self.yielded(agent, handed.since);
            }
            (Held::Nothing { .. } | Held::Newer, _) if !is_waited_for => {}
            (Held::Nothing { since }, _) => {
                elsewhere.claims.remove(&ticket);
                self.come_after(agent, since);
                self.settle(now, agent);
            }
            // What it asked for may still come, and then goes on to the one that is newer.
            (Held::Newer, Some(arriving)) => arriving.is_late = true,
            (Held::Newer, None) => self.end(now, agent, Some(Farewell::Replaced)),
        }
    }

    /// Whatever the clocks of the nodes say, an agent is where it came last.
    pub(super) fn come_after(&mut self, agent: &AgentId, since: u64) {
        if let Some(member) = self.members.get_mut(agent) {
            member.since = member.since.max(since.saturating_add(1));
        }
    }

    pub(super) fn take_over(&mut self, now: Now, agent: &AgentId, mut handed: Handed) {
        let Some(member) = self.members.get_mut(agent) else { return };
        let Some(arriving) = &mut member.arriving else { return };
        let mut frames = std::mem::take(&mut arriving.frames);
        frames.append(&mut handed.frames);
        arriving.resumed = true;
        member.introduced.extend(handed.introduced.iter().copied());
        member.heard = handed.heard.iter().copied().collect();
        if let Some(carried) = &handed.correspondents {
            member.correspondents.get_or_insert_default().extend(carried.iter().cloned());
        }
        // What it says of itself now counts; if it says nothing, what it said then.
        if member.card.is_none() {
            member.card = handed.card.take().map(Arc::from);
        }
        member.bucket.owe(now.mono, Duration::from_millis(handed.owes_millis).min(MAX_DEBT));
        self.with_session(agent, |session, _| session.go_on_with(now.mono, &handed, frames));
    }

    /// An agent comes to another node: whatever it has here in another room has ended. Of two that have only just come, one.
    pub(super) fn took(&mut self, now: Now, node: NodeId, room: &Room, agent: &AgentId, since: u64) {
        let Some(elsewhere) = &self.elsewhere else { return };
        let own = elsewhere.node;
        match self.members.get(agent).filter(|member| member.room != *room) {
            None => {}
            Some(member) if member.arriving.is_some() && (member.since, own) > (since, node) => {}
            Some(member) => {
                let (agent, since) = (agent.clone(), member.since);
                self.end(now, &agent, Some(Farewell::Replaced));
                self.say_to(node, &Word::Yielded { agent, since });
            }
        }
    }

    /// Others may have heard that it came to us before they heard that it came there.
    pub(super) fn yielded(&mut self, agent: &AgentId, since: u64) {
        self.come_after(agent, since);
        if self.members.get(agent).is_some_and(|member| member.arriving.is_none()) {
            self.post_came(agent, true);
        }
    }

    /// Two nodes have the same agent, as when neither heard of the other: it stays where it came last. Tells whether not here.
    pub(super) fn yield_to(&mut self, now: Now, node: NodeId, agent: &AgentId, since: u64) -> bool {
        let Some(elsewhere) = &self.elsewhere else { return false };
        let own = elsewhere.node;
        match self.members.get(agent) {
            Some(member) if (member.since, own) > (since, node) => false,
            Some(_) => {
                self.end(now, agent, Some(Farewell::Replaced));
                true
            }
            None => true,
        }
    }
}

impl Arriving {
    /// Others see it, for another node gave its session away to this one.
    pub(in crate::signaling::hub) fn is_of_another_node(&self) -> bool {
        self.resumed
    }

    /// What was asked, for whoever goes on waiting for it.
    pub(in crate::signaling::hub) fn take_claim(&mut self) -> Option<u64> {
        self.claim.take()
    }
}
