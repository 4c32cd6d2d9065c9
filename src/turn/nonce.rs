//! Nonces that cost no memory: the time they were made, signed together with the client's address.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aws_lc_rs::{constant_time, hmac};
use base64::{Engine, prelude::BASE64_STANDARD_NO_PAD};

/// How long a nonce opens new transactions. libwebrtc signs a Refresh when it schedules it, up to 59 minutes before
/// it leaves, so nothing under an hour will do.
pub const LIFETIME: Duration = Duration::from_secs(3_900);

/// Bytes of the time, bytes of the signature.
const TIME: usize = 4;
const SIGNATURE: usize = 11;

/// Makes and checks nonces.
#[derive(Clone)]
pub struct Nonces(hmac::Key);

/// What a nonce that we made for this client tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Within its lifetime.
    Fresh,
    /// Past it: good only for who already holds an allocation.
    Old,
}

impl Nonces {
    /// With a key of this instance.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// A nonce for `client`: 20 ASCII characters.
    #[must_use]
    pub fn mint(&self, unix: u64, client: SocketAddr) -> String {
        // 32 bits of seconds last until 2106.
        let time = (unix as u32).to_be_bytes();
        let mut nonce = [0; TIME + SIGNATURE];
        nonce[..TIME].copy_from_slice(&time);
        nonce[TIME..].copy_from_slice(&self.sign(time, client));
        BASE64_STANDARD_NO_PAD.encode(nonce)
    }

    /// `None` for a nonce that we did not make for `client`.
    #[must_use]
    pub fn check(&self, nonce: &str, unix: u64, client: SocketAddr) -> Option<Freshness> {
        let mut bytes = [0; TIME + SIGNATURE];
        let length = BASE64_STANDARD_NO_PAD.decode_slice(nonce, &mut bytes).ok()?;
        let (time, signature) = bytes[..length].split_first_chunk::<TIME>()?;
        constant_time::verify_slices_are_equal(signature, &self.sign(*time, client)).ok()?;
        let age = unix.saturating_sub(u64::from(u32::from_be_bytes(*time)));
        Some(if age <= LIFETIME.as_secs() { Freshness::Fresh } else { Freshness::Old })
    }

    fn sign(&self, time: [u8; TIME], client: SocketAddr) -> [u8; SIGNATURE] {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(&time);
        match client.ip() {
            IpAddr::V4(ip) => context.update(&ip.octets()),
            IpAddr::V6(ip) => context.update(&ip.octets()),
        }
        context.update(&client.port().to_be_bytes());
        *context.sign().as_ref().first_chunk().expect("SHA-256 is longer than what is kept of it")
    }
}

impl std::fmt::Debug for Nonces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonces(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::{Freshness, LIFETIME, Nonces};

    #[test]
    fn bound_to_the_client_and_to_time() {
        let (alice, mallory) = ("192.0.2.1:1".parse().unwrap(), "192.0.2.1:2".parse().unwrap());
        let nonces = Nonces::new(&[1; 32]);
        let nonce = nonces.mint(1_000, alice);
        assert_eq!(nonce.len(), 20);
        assert_eq!(nonces.check(&nonce, 1_000 + LIFETIME.as_secs(), alice), Some(Freshness::Fresh));
        assert_eq!(nonces.check(&nonce, 1_001 + LIFETIME.as_secs(), alice), Some(Freshness::Old));
        assert_eq!(nonces.check(&nonce, 1_000, mallory), None);
        assert_eq!(Nonces::new(&[2; 32]).check(&nonce, 1_000, alice), None);
        for bad in ["", "é", "AAAA", &nonce[..19], &format!("{nonce}A"), &"A".repeat(700)] {
            assert_eq!(nonces.check(bad, 1_000, alice), None, "{bad:?}");
        }
    }
}
