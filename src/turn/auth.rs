//! Request → [`Caller`], the proof that it is authentic; nothing else can make one (RFC 8489 §9.2.4).

use std::sync::Arc;

use stun_types::{
    attribute::{MessageIntegrity, Nonce, Realm, Username},
    message::{IntegrityAlgorithm, IntegrityKey, LongTermKeyCredentials, Message},
    prelude::{AttributeFromRaw, AttributeStaticType},
};

use super::{FiveTuple, nonce::Nonces, refusal::Refusal};
use crate::{
    clock::Now,
    credentials::{
        revocations::Revocations,
        turn_rest::{TurnSecrets, TurnUsername},
    },
};

/// What it takes to check a request.
#[derive(Debug)]
pub struct Auth {
    /// Sent in challenges, part of every key.
    pub realm: String,
    /// Who minted the users.
    pub secrets: TurnSecrets,
    /// Makes and checks nonces.
    pub nonces: Nonces,
    /// Whose older users are accepted no more.
    pub revocations: Revocations,
}

/// Who sent an authentic request, and the key to sign the answer with.
pub struct Caller {
    agent: Arc<str>,
    expires: u64,
    key: IntegrityKey,
}

impl Caller {
    /// The agent id in the user name.
    pub fn agent(&self) -> &Arc<str> {
        &self.agent
    }

    /// Signs the answer.
    pub fn key(&self) -> &IntegrityKey {
        &self.key
    }

    /// Whether the user has run out. Asked on Allocate; a live allocation goes on.
    pub fn has_expired(&self, now: Now) -> bool {
        self.expires <= now.unix()
    }
}

impl Auth {
    /// Checks a request. Who holds an allocation may use an old nonce of its own, for not every client survives a 438, and
    /// goes on with a password whose secret has been replaced since.
    ///
    /// # Errors
    /// [`Refusal::Unauthorized`], [`Refusal::BadRequest`] or [`Refusal::StaleNonce`], each to be answered unsigned.
    pub fn authenticate(
        &mut self,
        now: Now,
        from: &FiveTuple,
        message: &Message<'_>,
        holds_allocation: bool,
    ) -> Result<Caller, Refusal> {
        if !message.has_attribute(MessageIntegrity::TYPE) {
            return Err(Refusal::Unauthorized);
        }
        let username: Username = attribute(message)?;
        let realm: Realm = attribute(message)?;
        let nonce: Nonce = attribute(message)?;
        if !self.nonces.accepts(nonce.nonce(), now.unix(), from.client, holds_allocation) {
            return Err(Refusal::StaleNonce);
        }
        if realm.realm() != self.realm {
            return Err(Refusal::Unauthorized);
        }
        let caller = self.verify(username.username(), message, holds_allocation);
        let stands = |caller: &Caller| !self.revocations.refuse_user(now, &caller.agent, caller.expires);
        caller.filter(stands).ok_or(Refusal::Unauthorized)
    }

    /// A REALM and a NONCE for who has to try (again).
    pub fn challenge(&mut self, now: Now, from: &FiveTuple) -> (&str, String) {
        let nonce = self.nonces.mint(now.unix(), from.client);
        (&self.realm, nonce)
    }

    fn verify(&self, username: &str, message: &Message<'_>, holds_allocation: bool) -> Option<Caller> {
        let TurnUsername { expires, agent } = TurnUsername::parse(username)?;
        let retired =
            holds_allocation.then(|| self.secrets.retired_passwords(username)).into_iter().flatten();
        let key = self.secrets.passwords(username).chain(retired).find_map(|password| {
            let key = LongTermKeyCredentials::new(username.to_owned(), password, self.realm.clone())
                .make_key(IntegrityAlgorithm::Sha1);
            // Compares in constant time.
            message.validate_integrity_with_key(&key).is_ok().then_some(key)
        })?;
        Some(Caller { agent: agent.into(), expires, key })
    }
}

/// The first such attribute before MESSAGE-INTEGRITY.
fn attribute<'a, A: AttributeFromRaw<'a> + AttributeStaticType>(
    message: &'a Message<'_>,
) -> Result<A, Refusal> {
    message.attribute().map_err(|_| Refusal::BadRequest)
}
