//! Time-limited TURN users (draft-uberti-behave-turn-rest-00), the ones coturn calls `use-auth-secret`.
//!
//! user name = expiry in Unix seconds `:` agent id; password = base64(HMAC-SHA1(secret, user name)).

use aws_lc_rs::hmac;
use base64::{Engine, prelude::BASE64_STANDARD};

/// The secrets shared between who mints TURN users and who checks them: the first mints, all verify.
#[derive(Clone)]
pub struct TurnSecrets {
    current: Vec<hmac::Key>,
    /// Those that were current before, the latest first.
    retired: Vec<hmac::Key>,
}

/// Of secrets that were replaced so many are remembered: every request of who holds an allocation may have to try them all.
const RETIRED: usize = 16;

/// A TURN user as a client needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TurnUser {
    /// `expiry:agent`.
    pub username: String,
    /// The password, base64 with padding. Secret.
    pub credential: String,
}

impl TurnSecrets {
    /// `None` when there is no secret at all.
    #[must_use]
    pub fn new<S: AsRef<[u8]>>(secrets: &[S]) -> Option<Self> {
        let key = |secret: &S| hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, secret.as_ref());
        (!secrets.is_empty())
            .then(|| Self { current: secrets.iter().map(key).collect(), retired: Vec::new() })
    }

    /// These, in place of `before`, which nobody gets a new allocation by any more.
    #[must_use]
    pub fn in_place_of(mut self, before: &Self) -> Self {
        self.retired = before.current.iter().chain(&before.retired).take(RETIRED).cloned().collect();
        self
    }

    /// Mints the user of `agent`, valid until `expires` (Unix seconds).
    #[must_use]
    pub fn mint(&self, agent: &str, expires: u64) -> TurnUser {
        let username = format!("{expires}:{agent}");
        let credential = password(&self.current[0], &username);
        TurnUser { username, credential }
    }

    /// The passwords that `username` may have, one for each secret. The caller compares by MESSAGE-INTEGRITY.
    pub fn passwords<'a>(&'a self, username: &'a str) -> impl Iterator<Item = String> + 'a {
        self.current.iter().map(move |key| password(key, username))
    }

    /// The same by secrets that have been replaced: good for who holds an allocation that was made with one.
    pub fn retired_passwords<'a>(&'a self, username: &'a str) -> impl Iterator<Item = String> + 'a {
        self.retired.iter().map(move |key| password(key, username))
    }
}

impl std::fmt::Debug for TurnSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TurnSecrets({}, {} retired)", self.current.len(), self.retired.len())
    }
}

fn password(key: &hmac::Key, username: &str) -> String {
    BASE64_STANDARD.encode(hmac::sign(key, username.as_bytes()))
}

/// A user name taken apart. That it parses says nothing about who sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TurnUsername<'a> {
    /// Unix seconds.
    pub expires: u64,
    /// Whose it is: what follows the first `:`.
    pub agent: &'a str,
}

impl<'a> TurnUsername<'a> {
    /// `None` unless it is digits, `:` and an agent id that is not empty.
    #[must_use]
    pub fn parse(username: &'a str) -> Option<Self> {
        let (expires, agent) = username.split_once(':')?;
        let digits = !expires.is_empty() && expires.bytes().all(|byte| byte.is_ascii_digit());
        (digits && !agent.is_empty()).then_some(Self { expires: expires.parse().ok()?, agent })
    }
}

#[cfg(test)]
mod tests {
    use super::{TurnSecrets, TurnUsername};

    #[test]
    fn the_vector_of_the_contract() {
        let secrets = TurnSecrets::new(&["north"]).unwrap();
        let user = secrets.mint("mbzrxpgjys", 12_334_939);
        assert_eq!(user.username, "12334939:mbzrxpgjys");
        assert_eq!(user.credential, "Iq7YXkRon8YXJfdN1Ke9EZOw1UE=");
    }

    #[test]
    fn the_first_secret_mints_and_all_verify() {
        let before = TurnSecrets::new(&["old secret"]).unwrap();
        let after = TurnSecrets::new(&["new secret", "old secret"]).unwrap();
        let user = before.mint("a", 7);
        assert!(after.passwords(&user.username).any(|password| password == user.credential));
        assert_ne!(after.mint("a", 7).credential, user.credential);
    }

    #[test]
    fn user_names_are_an_expiry_and_an_agent() {
        assert_eq!(TurnUsername::parse("12:a:b"), Some(TurnUsername { expires: 12, agent: "a:b" }));
        for bad in ["", ":", "12:", ":a", "12", "+1:a", "1 :a", "99999999999999999999:a", "a:12"] {
            assert_eq!(TurnUsername::parse(bad), None, "{bad:?}");
        }
    }
}
