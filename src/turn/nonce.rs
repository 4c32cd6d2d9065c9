//! Nonces that cost no memory: the time they were made, signed together with the client's address.
//!
//! Each day has a key of its own. Those of today and yesterday are at hand; an older one is derived anew for who still
//! holds the allocation that its nonce made.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aws_lc_rs::{constant_time, hmac};
use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};

/// How long a nonce opens new transactions. libwebrtc signs a Refresh when it schedules it, up to 59 minutes before
/// it leaves, so nothing under an hour will do.
pub const LIFETIME: Duration = Duration::from_secs(3_900);

/// Seconds that a key signs for: longer than a nonce opens new transactions, so that two keys are enough for them.
const PERIOD: u64 = 86_400;

/// Bytes of the time, bytes of the signature.
const TIME: usize = 4;
const SIGNATURE: usize = 11;

/// Makes and checks nonces.
#[derive(Clone)]
pub struct Nonces {
    root: hmac::Key,
    /// The current period and its key, the period before and its key.
    at_hand: [(u64, hmac::Key); 2],
}

impl Nonces {
    /// With a key of this instance.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        let root = hmac::Key::new(hmac::HMAC_SHA256, key);
        let first = derive(&root, 0);
        Self { root, at_hand: [(0, first.clone()), (0, first)] }
    }

    /// A nonce for `client`: 20 ASCII characters.
    #[must_use]
    pub fn mint(&mut self, unix: u64, client: SocketAddr) -> String {
        self.turn_over(unix);
        // 32 bits of seconds last until 2106.
        let time = (unix as u32).to_be_bytes();
        let mut nonce = [0; TIME + SIGNATURE];
        nonce[..TIME].copy_from_slice(&time);
        nonce[TIME..].copy_from_slice(&sign(&self.at_hand[0].1, time, client));
        BASE64_STANDARD_NO_PAD.encode(nonce)
    }

    /// Whether we made `nonce` for `client`, and it is within its lifetime or the client `holds_allocation`: who does may
    /// use an old one.
    #[must_use]
    pub fn accepts(&mut self, nonce: &str, unix: u64, client: SocketAddr, holds_allocation: bool) -> bool {
        self.turn_over(unix);
        let mut bytes = [0; TIME + SIGNATURE];
        let Ok(length) = BASE64_STANDARD_NO_PAD.decode_slice(nonce, &mut bytes) else { return false };
        let Some((time, signature)) = bytes[..length].split_first_chunk::<TIME>() else { return false };
        let made = u64::from(u32::from_be_bytes(*time));
        let is_old = unix.saturating_sub(made) > LIFETIME.as_secs();
        if is_old && !holds_allocation {
            return false;
        }
        let signed = match self.at_hand.iter().find(|(period, _)| *period == made / PERIOD) {
            Some((_, key)) => sign(key, *time, client),
            // Old, or of a tomorrow that the wall clock was set back from.
            None => sign(&derive(&self.root, made / PERIOD), *time, client),
        };
        constant_time::verify_slices_are_equal(signature, &signed).is_ok()
    }

    fn turn_over(&mut self, unix: u64) {
        let period = unix / PERIOD;
        if self.at_hand[0].0 != period {
            let key_of = |period| (period, derive(&self.root, period));
            self.at_hand = [key_of(period), key_of(period.saturating_sub(1))];
        }
    }
}

fn derive(root: &hmac::Key, period: u64) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(root, &period.to_be_bytes()).as_ref())
}

fn sign(key: &hmac::Key, time: [u8; TIME], client: SocketAddr) -> [u8; SIGNATURE] {
    let mut context = hmac::Context::with_key(key);
    context.update(&time);
    match client.ip() {
        IpAddr::V4(ip) => context.update(&ip.octets()),
        IpAddr::V6(ip) => context.update(&ip.octets()),
    }
    context.update(&client.port().to_be_bytes());
    *context.sign().as_ref().first_chunk().expect("SHA-256 is longer than what is kept of it")
}

impl std::fmt::Debug for Nonces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonces(…)")
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::{LIFETIME, Nonces, PERIOD};

    fn clients() -> (SocketAddr, SocketAddr) {
        ("192.0.2.1:1".parse().unwrap(), "192.0.2.1:2".parse().unwrap())
    }

    #[test]
    fn bound_to_the_client_and_to_time() {
        let (alice, mallory) = clients();
        let mut nonces = Nonces::new(&[1; 32]);
        let nonce = nonces.mint(1_000, alice);
        assert_eq!(nonce.len(), 20);
        assert!(nonces.accepts(&nonce, 1_000 + LIFETIME.as_secs(), alice, false));
        assert!(!nonces.accepts(&nonce, 1_001 + LIFETIME.as_secs(), alice, false));
        assert!(nonces.accepts(&nonce, 1_001 + LIFETIME.as_secs(), alice, true));
        assert!(!nonces.accepts(&nonce, 1_000, mallory, true));
        assert!(!Nonces::new(&[2; 32]).accepts(&nonce, 1_000, alice, true));
        for bad in ["", "é", "AAAA", &nonce[..19], &format!("{nonce}A"), &"A".repeat(700)] {
            assert!(!nonces.accepts(bad, 1_000, alice, true), "{bad:?}");
        }
    }

    #[test]
    fn a_nonce_outlives_the_change_of_keys() {
        let (alice, mallory) = clients();
        let mut nonces = Nonces::new(&[1; 32]);
        let midnight = 20_000 * PERIOD;
        let nonce = nonces.mint(midnight - 1, alice);
        assert!(nonces.accepts(&nonce, midnight + LIFETIME.as_secs() - 1, alice, false));
        let week = midnight + 7 * PERIOD;
        assert!(nonces.accepts(&nonce, week, alice, true), "with its allocation it lives on");
        assert!(!nonces.accepts(&nonce, week, alice, false));
        assert!(!nonces.accepts(&nonce, week, mallory, true));
        // A wall clock that is set back.
        let ahead = nonces.mint(week, alice);
        assert!(nonces.accepts(&ahead, week - 3, alice, false));
    }

    #[test]
    fn each_day_has_another_key() {
        let (alice, _) = clients();
        let mut nonces = Nonces::new(&[1; 32]);
        nonces.turn_over(5 * PERIOD);
        let [today, yesterday] = nonces.at_hand.clone().map(|(_, key)| super::sign(&key, [0; 4], alice));
        assert_ne!(today, yesterday);
    }
}
