//! Who was revoked, and when: what was given to an agent before that counts no more.
//!
//! Shared by all who check credentials. While nobody is revoked, asking costs one look at a flag.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::clock::Now;

/// Agents that are remembered to be revoked. Beyond that, those go whose tokens have all run out; if there are none, no more
/// are taken.
pub const MAX_REVOKED: usize = 100_000;

/// Expiries of TURN users that are remembered for one of them. Beyond that, a new user ends when an older one does.
const MAX_MINTED: usize = 1_024;

/// The revoked agents.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    any: AtomicBool,
    /// Grows with every change.
    version: AtomicU64,
    agents: RwLock<BTreeMap<String, Revoked>>,
}

/// Times are Unix seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Revoked {
    /// Tokens from that second and before are refused.
    at: u64,
    /// Until then only the TURN users in `minted` are accepted.
    until: u64,
    /// Expiries of the TURN users that were minted here since.
    #[serde(default)]
    minted: BTreeSet<u64>,
}

/// Nobody more can be revoked.
#[derive(Debug, PartialEq, Eq)]
pub struct TooMany;

impl Revocations {
    /// What the agent was given before `now` counts no more; TURN users live for `users_live` at most, tokens for
    /// `tokens_live`.
    ///
    /// # Errors
    /// When [`MAX_REVOKED`] agents are revoked whose tokens may still be around.
    pub fn revoke(
        &self,
        now: Now,
        agent: &str,
        users_live: Duration,
        tokens_live: Duration,
    ) -> Result<(), TooMany> {
        let at = now.unix();
        let mut agents = self.write();
        if agents.len() >= MAX_REVOKED && !agents.contains_key(agent) {
            agents.retain(|_, revoked| revoked.at.saturating_add(tokens_live.as_secs()) > at);
        }
        if agents.len() >= MAX_REVOKED && !agents.contains_key(agent) {
            return Err(TooMany);
        }
        let revoked = Revoked { at, until: at.saturating_add(users_live.as_secs()), minted: BTreeSet::new() };
        agents.insert(agent.to_owned(), revoked);
        self.0.any.store(true, Relaxed);
        self.0.version.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Whether a token of `agent` that was issued then, in Unix seconds, is from before it was revoked, or does not say.
    #[must_use]
    pub fn refuse_token(&self, agent: &str, issued: Option<u64>) -> bool {
        let is_older = |revoked: &Revoked| issued.is_none_or(|issued| issued <= revoked.at);
        self.is_any() && self.read().get(agent).is_some_and(is_older)
    }

    /// Whether the TURN user `expires:agent` is not one that was minted here since the agent was revoked.
    #[must_use]
    pub fn refuse_user(&self, now: Now, agent: &str, expires: u64) -> bool {
        self.is_any()
            && self
                .read()
                .get(agent)
                .is_some_and(|revoked| now.unix() < revoked.until && !revoked.minted.contains(&expires))
    }

    /// A TURN user is about to be minted for `agent`, to live for `ttl`. Gives how long it may live: less than that for one who
    /// was revoked and asks very often.
    #[must_use]
    pub fn note_user(&self, now: Now, agent: &str, ttl: Duration) -> Duration {
        if !self.is_any() || !self.read().contains_key(agent) {
            return ttl;
        }
        let (now, mut agents) = (now.unix(), self.write());
        let Some(revoked) = agents.get_mut(agent).filter(|revoked| now < revoked.until) else { return ttl };
        let expires = now.saturating_add(ttl.as_secs());
        revoked.minted.retain(|minted| *minted > now);
        if revoked.minted.len() >= MAX_MINTED
            && let Some(before) = revoked.minted.range(..=expires).next_back()
        {
            return Duration::from_secs(before - now);
        }
        if revoked.minted.insert(expires) {
            self.0.version.fetch_add(1, Relaxed);
        }
        ttl
    }

    /// Grows with every change.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.0.version.load(Relaxed)
    }

    /// All of it, to be kept.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(&*self.read()).expect("strings and numbers become JSON")
    }

    /// What is known of one agent, in the same form.
    #[must_use]
    pub fn of(&self, agent: &str) -> Option<Box<RawValue>> {
        let agents = self.read();
        agents.get(agent).map(|revoked| raw(&BTreeMap::from([(agent, revoked)])))
    }

    /// All of it in pieces of about so many bytes, each in the same form.
    #[must_use]
    pub fn pages(&self, bytes: usize) -> Vec<Box<RawValue>> {
        let agents = self.read();
        let (mut pages, mut page, mut size) = (Vec::new(), BTreeMap::new(), 0);
        for (agent, revoked) in &*agents {
            size += 64 + agent.len() + 12 * revoked.minted.len();
            page.insert(agent.as_str(), revoked);
            if size >= bytes {
                pages.push(raw(&std::mem::take(&mut page)));
                size = 0;
            }
        }
        if !page.is_empty() {
            pages.push(raw(&page));
        }
        pages
    }

    /// Adds what was kept. Of two about one agent the later stays. Gives who was not known to be revoked then.
    ///
    /// # Errors
    /// When it is not what [`Self::to_json`] gives.
    pub fn add_json(&self, json: &[u8]) -> Result<Vec<String>, serde_json::Error> {
        let kept: BTreeMap<String, Revoked> = serde_json::from_slice(json)?;
        let (mut agents, mut news, mut has_changed) = (self.write(), Vec::new(), false);
        for (agent, mut revoked) in kept {
            match agents.get_mut(&agent) {
                Some(known) if known.at > revoked.at => {}
                Some(known) if known.at == revoked.at => {
                    let before = known.minted.len();
                    known.minted.append(&mut revoked.minted);
                    has_changed |= known.minted.len() != before;
                }
                _ => {
                    news.push(agent.clone());
                    agents.insert(agent, revoked);
                }
            }
        }
        self.0.any.store(!agents.is_empty(), Relaxed);
        if has_changed || !news.is_empty() {
            self.0.version.fetch_add(1, Relaxed);
        }
        Ok(news)
    }

    fn is_any(&self) -> bool {
        self.0.any.load(Relaxed)
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Revoked>> {
        self.0.agents.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Revoked>> {
        self.0.agents.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of what is kept.
fn raw(agents: &BTreeMap<&str, &Revoked>) -> Box<RawValue> {
    serde_json::value::to_raw_value(agents).expect("strings and numbers become JSON")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{MAX_MINTED, MAX_REVOKED, Revocations, TooMany};
    use crate::clock;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn tokens_up_to_the_moment_are_refused_and_later_ones_are_not() {
        let (now, revocations) = (clock::now(), Revocations::default());
        assert!(!revocations.refuse_token("agent-7", None));
        revocations.revoke(now, "agent-7", HOUR, HOUR).unwrap();
        let at = now.unix();
        for (issued, refused) in [(None, true), (Some(at - 5), true), (Some(at), true), (Some(at + 1), false)]
        {
            assert_eq!(revocations.refuse_token("agent-7", issued), refused, "{issued:?}");
        }
        assert!(!revocations.refuse_token("agent-8", None));
    }

    #[test]
    fn for_a_while_only_users_minted_since_are_accepted() {
        let (now, revocations) = (clock::now(), Revocations::default());
        let expires = now.unix() + 600;
        assert_eq!(revocations.note_user(now, "agent-7", HOUR), HOUR);
        revocations.revoke(now, "agent-7", HOUR, HOUR).unwrap();
        assert!(revocations.refuse_user(now, "agent-7", expires));
        assert_eq!(revocations.note_user(now, "agent-7", HOUR / 6), HOUR / 6);
        assert!(!revocations.refuse_user(now, "agent-7", expires));
        assert!(revocations.refuse_user(now, "agent-7", expires + 1));
        assert!(
            !revocations.refuse_user(now + HOUR, "agent-7", expires + 1),
            "then all old ones have run out"
        );
        revocations.revoke(now, "agent-7", HOUR, HOUR).unwrap();
        assert!(revocations.refuse_user(now, "agent-7", expires), "revoked again");
    }

    #[test]
    fn who_asks_very_often_shares_an_expiry() {
        let (now, revocations) = (clock::now(), Revocations::default());
        revocations.revoke(now, "agent-7", HOUR, HOUR).unwrap();
        let second = |count: usize| Duration::from_secs(count as u64);
        for count in 1..=MAX_MINTED {
            assert_eq!(revocations.note_user(now, "agent-7", second(count)), second(count));
        }
        let shared = revocations.note_user(now, "agent-7", HOUR);
        assert_eq!(shared, second(MAX_MINTED));
        assert!(!revocations.refuse_user(now, "agent-7", now.unix() + shared.as_secs()));
    }

    #[test]
    fn what_is_kept_is_known_again() {
        let (now, before, after) = (clock::now(), Revocations::default(), Revocations::default());
        before.revoke(now, "agent-7", HOUR, HOUR).unwrap();
        assert_eq!(before.note_user(now, "agent-7", HOUR), HOUR);
        after.add_json(&before.to_json()).unwrap();
        assert!(after.refuse_token("agent-7", None));
        assert!(!after.refuse_user(now, "agent-7", now.unix() + 3_600));
        assert!(after.add_json(b"{").is_err());
        // An older file takes nothing back.
        let old = before.to_json();
        after.revoke(now + HOUR, "agent-7", HOUR, HOUR).unwrap();
        after.add_json(&old).unwrap();
        assert!(after.refuse_user(now + HOUR, "agent-7", now.unix() + 3_600));
    }

    #[test]
    fn there_is_room_for_so_many() {
        let (now, revocations) = (clock::now(), Revocations::default());
        for agent in 0..MAX_REVOKED {
            revocations.revoke(now, &agent.to_string(), HOUR, HOUR).unwrap();
        }
        assert_eq!(revocations.revoke(now, "one more", HOUR, HOUR), Err(TooMany));
        assert_eq!(revocations.revoke(now, "7", HOUR, HOUR), Ok(()), "an old one is not one more");
        assert_eq!(revocations.revoke(now + 2 * HOUR, "one more", HOUR, HOUR), Ok(()));
        assert_eq!(revocations.read().len(), 1);
    }
}
