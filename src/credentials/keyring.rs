//! The instance's secret, and the keys derived from it under separate labels (HKDF-SHA256, RFC 5869).

use aws_lc_rs::{hkdf, rand};

/// The 32 random bytes in the data dir's `secret`. Never printed, never logged.
#[derive(Clone)]
pub struct InstanceSecret([u8; 32]);

impl InstanceSecret {
    /// Draws a new one from the operating system.
    ///
    /// # Errors
    /// When the operating system has no randomness to give.
    pub fn generate() -> Result<Self, aws_lc_rs::error::Unspecified> {
        let mut bytes = [0; 32];
        rand::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Takes the bytes of a `secret` file; `None` unless there are exactly 32.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// What goes into the `secret` file.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key for one purpose. Knowing one says nothing about another.
    #[must_use]
    pub fn derive(&self, purpose: Purpose) -> [u8; 32] {
        let mut key = [0; 32];
        hkdf::Salt::new(hkdf::HKDF_SHA256, b"halfway v1")
            .extract(&self.0)
            .expand(&[purpose.label()], hkdf::HKDF_SHA256)
            .and_then(|okm| okm.fill(&mut key))
            .expect("32 bytes are within what HKDF-SHA256 can expand");
        key
    }
}

impl std::fmt::Debug for InstanceSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InstanceSecret(…)")
    }
}

/// What a derived key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// TURN passwords, when `credentials.secrets` is empty.
    TurnRest,
    /// Agents' tokens, when `auth.secrets` is empty.
    Token,
    /// The TURN server's nonces.
    Nonce,
}

impl Purpose {
    fn label(self) -> &'static [u8] {
        match self {
            Self::TurnRest => b"turn-rest",
            Self::Token => b"token",
            Self::Nonce => b"nonce",
        }
    }
}
