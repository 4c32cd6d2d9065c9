//! Revoking an agent: what it was given counts no more, its allocations end, and a restart does not change that.

use std::time::Duration;

use tokio::sync::{Mutex, Notify};

use crate::{
    clock::{self, Now},
    credentials::{
        revocations::{Revocations, TooMany},
        token::AgentId,
    },
    data_dir::DataDir,
};

/// In the data dir.
const FILE: &str = "revoked.json";

/// What is noted at a hand-out of credentials, and not at a revocation, is written that much later, with all that came since.
const LATER: Duration = Duration::from_secs(1);

/// Who was revoked, in memory and in the data dir.
pub struct Revoking {
    revocations: Revocations,
    data_dir: DataDir,
    /// Ends an agent's allocations.
    free: Box<dyn Fn(&str) + Send + Sync>,
    /// The version that is written; whoever writes holds it.
    written: Mutex<u64>,
    /// There is something to write, and nobody waits for it.
    noted: Notify,
}

/// The longest lives of what agents are given.
#[derive(Clone, Copy, Debug)]
pub struct Lives {
    /// TURN users: `credentials.max_ttl`.
    pub users: Duration,
    /// Tokens: `auth.max_ttl`.
    pub tokens: Duration,
}

impl Revoking {
    /// `free` ends an agent's allocations.
    pub fn new(
        revocations: Revocations,
        data_dir: DataDir,
        free: impl Fn(&str) + Send + Sync + 'static,
    ) -> Self {
        let written = Mutex::new(revocations.version());
        Self { revocations, data_dir, free: Box::new(free), written, noted: Notify::new() }
    }

    /// Who was.
    #[must_use]
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// What the agent was given before counts no more, and its allocations end. It lasts once it is [written](Self::write).
    ///
    /// # Errors
    /// When there are too many.
    pub fn revoke(&self, agent: &AgentId, lives: Lives) -> Result<(), TooMany> {
        self.revocations.revoke(clock::now(), agent.as_str(), lives.users, lives.tokens)?;
        (self.free)(agent.as_str());
        Ok(())
    }

    /// A TURN user is minted for `agent`: how long it may live, and whether that is to be known wherever it may be used.
    #[must_use]
    pub fn note_user(&self, now: Now, agent: &str, ttl: Duration) -> (Duration, bool) {
        let before = self.revocations.version();
        let ttl = self.revocations.note_user(now, agent, ttl);
        let is_news = self.revocations.version() != before;
        if is_news {
            self.noted.notify_one();
        }
        (ttl, is_news)
    }

    /// Another node has revoked the agent: what is known by now is written, and its allocations end.
    pub fn follow(&self, agent: &AgentId) {
        (self.free)(agent.as_str());
        self.noted.notify_one();
    }

    /// Writes what nobody waits for. Never returns.
    pub async fn keep(&self) {
        loop {
            self.noted.notified().await;
            tokio::time::sleep(LATER).await;
            self.settle().await;
        }
    }

    /// Writes it now: another process is about to read it.
    pub async fn settle(&self) {
        if let Err(why) = self.write().await {
            tracing::warn!("what revoked agents were given since is not kept for the next start: {why}");
        }
    }

    /// Writes what is not written yet; those who come meanwhile share the next writing.
    ///
    /// # Errors
    /// One line for people, with the file.
    pub async fn write(&self) -> Result<(), String> {
        let wanted = self.revocations.version();
        let mut written = self.written.lock().await;
        if *written >= wanted {
            return Ok(());
        }
        let version = self.revocations.version();
        let (json, data_dir) = (self.revocations.to_json(), self.data_dir.clone());
        let done = tokio::task::spawn_blocking(move || data_dir.keep(FILE, &json)).await;
        done.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        *written = version;
        Ok(())
    }
}

/// What a data dir knows of revoked agents, added to `revocations`.
///
/// # Errors
/// One line for people. Nobody must get back in because a file cannot be read.
pub fn recall(revocations: &Revocations, data_dir: &DataDir) -> Result<(), String> {
    let Some(kept) = data_dir.kept(FILE).map_err(|error| error.to_string())? else { return Ok(()) };
    revocations.add_json(&kept).map(|_| ()).map_err(|error| {
        format!(
            "{} does not say who was revoked ({error}): put back a copy, or remove it and revoke anew",
            data_dir.path_of(FILE).display()
        )
    })
}
