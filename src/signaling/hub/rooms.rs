//! Who is in a room, with what card, and who hears of it.

use std::{ops::Bound, sync::Arc};

use bytes::Bytes;
use serde_json::value::RawValue;

use super::{Gathering, Hub};
use crate::{
    clock::Now,
    credentials::token::{AgentId, Room},
    signaling::{
        message::{Listed, ServerFrame},
        registry::{Entry, Page, Profile, Query},
    },
};

impl Hub {
    /// At most `limit` of the agents of `room` that fit, in order, beginning after `after`; at least one, then `bytes` at most.
    #[must_use]
    pub fn page(&self, room: &Room, query: &Query, after: &str, limit: usize, bytes: usize) -> Page {
        let Some(Gathering { everybody: all, .. }) = self.rooms.get(room) else {
            return Page { agents: Vec::new(), agent_count: 0, next: None };
        };
        if query.fits(None) {
            let rest = all.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
            return self.fill_page(all.len(), rest.map(|(agent, _)| agent), limit, bytes);
        }
        let fitting = all.iter().filter(|(_, profile)| query.fits(profile.as_ref()));
        let fitting: Vec<_> = fitting.map(|(agent, _)| agent).collect();
        let rest = fitting.iter().copied().skip_while(|agent| agent.as_str() <= after);
        self.fill_page(fitting.len(), rest, limit, bytes)
    }

    fn fill_page<'a>(
        &self,
        agent_count: usize,
        mut rest: impl Iterator<Item = &'a AgentId>,
        limit: usize,
        bytes: usize,
    ) -> Page {
        let (mut agents, mut size) = (Vec::<Entry>::new(), 0);
        let next = rest.find(|agent| {
            let card = self.card_of(agent).cloned();
            size += listed_size(agent, card.as_deref());
            let is_full = agents.len() >= limit || (size > bytes && !agents.is_empty());
            if !is_full {
                agents.push(Entry { agent: (*agent).clone(), card });
            }
            is_full
        });
        let next = next.and_then(|_| agents.last()).map(|last| last.agent.clone());
        Page { agents, agent_count, next }
    }

    /// Whether an agent of the room is here, or expected back.
    #[must_use]
    pub fn is_present(&self, room: &Room, agent: &str) -> bool {
        self.members.get(agent).is_some_and(|member| member.room == *room)
            || self.room_elsewhere(agent) == Some(room)
    }

    /// The card of an agent in the room, if there is one.
    #[must_use]
    pub fn card(&self, room: &Room, agent: &AgentId) -> Option<Arc<RawValue>> {
        self.rooms.get(room).filter(|gathering| gathering.everybody.contains_key(agent))?;
        self.card_of(agent).cloned()
    }

    /// `None` leaves the card as it is, `null` takes it away.
    pub(super) fn replace_card(&mut self, now: Now, agent: &AgentId, card: Option<&RawValue>) {
        let Some(card) = card else { return };
        let member = self.member(agent);
        if member.card.as_deref().map(RawValue::get) == Some(card.get()) {
            return;
        }
        member.card = (card.get() != "null").then(|| Arc::from(card.to_owned()));
        if member.arriving.is_some() {
            return;
        }
        let room = member.room.clone();
        let gathering = self.rooms.get_mut(&room).expect("its room is there");
        gathering.everybody.insert(agent.clone(), Profile::of(card));
        let updated = ServerFrame::AgentUpdated(self.listed(agent)).to_bytes();
        self.tell_ours(now, &room, agent, &updated);
        self.post_changed(agent);
    }

    /// Presence of an agent, to all others of the room who are ours and have arrived, unless there are too many.
    pub(super) fn tell_ours(&mut self, now: Now, room: &Room, agent: &AgentId, news: &Bytes) {
        let Some(gathering) = self.rooms.get(room).filter(|_| !self.is_crowded(room)) else { return };
        let others = gathering.everybody.keys().filter(|other| *other != agent);
        let ours: Vec<AgentId> = others.filter(|other| self.is_ours(room, other)).cloned().collect();
        ours.iter().for_each(|other| self.push_aside(now, other, news.clone()));
    }

    pub(super) fn listed<'a>(&'a self, agent: &'a AgentId) -> Listed<'a> {
        Listed { agent, card: self.card_of(agent).map(|card| &**card) }
    }

    /// Whether an agent is in the room at this node: one that is seen there may be at another, and here in another room.
    pub(super) fn is_ours(&self, room: &Room, agent: &AgentId) -> bool {
        self.members.get(agent).is_some_and(|member| member.room == *room)
    }

    pub(super) fn others(&self, agent: &AgentId) -> Vec<AgentId> {
        let everybody = &self.rooms[&self.members[agent].room].everybody;
        everybody.keys().filter(|other| *other != agent).cloned().collect()
    }

    pub(super) fn is_crowded(&self, room: &Room) -> bool {
        self.rooms.get(room).is_some_and(|room| room.everybody.len() > self.limits.presence_limit)
    }
}

/// What an agent takes in a list of agents, about.
pub(super) fn listed_size(agent: &AgentId, card: Option<&RawValue>) -> usize {
    agent.as_str().len() + card.map_or(0, |card| card.get().len()) + 32
}
