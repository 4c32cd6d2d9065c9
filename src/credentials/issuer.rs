//! Somebody else who signs agents' tokens: its public keys (RFC 7517), and what its tokens must say.

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use jsonwebtoken::{
    Algorithm, DecodingKey, Header, Validation,
    errors::ErrorKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, PublicKeyUse},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use super::token::{TokenRefusal, signature_only};

/// Keys of one issuer: of a token that names none, each may have to be tried.
pub const MAX_KEYS: usize = 64;

/// An issuer whose tokens are accepted beside our own.
#[derive(Clone, Debug)]
pub struct Issuer {
    /// Its keys, as far as they are known.
    pub keys: PublicKeys,
    /// The claim `iss` of its tokens.
    pub issuer: String,
    /// What the claim `aud` of tokens for us holds.
    pub audience: String,
}

/// The keys that an issuer signs with now. They may change while others hold them.
#[derive(Clone, Default)]
pub struct PublicKeys(Arc<RwLock<Arc<[PublicKey]>>>);

struct PublicKey {
    /// What a token calls it.
    id: Option<String>,
    /// The key fixes the algorithm.
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Issuer {
    /// Checks the signature, who signed, and for whom; the times are the caller's to check.
    ///
    /// # Errors
    /// When it is not the issuer's, or not for us.
    pub(super) fn verify<C: DeserializeOwned>(
        &self,
        token: &str,
        header: &Header,
    ) -> Result<C, TokenRefusal> {
        let keys = self.keys.get();
        let named = |key: &&PublicKey| {
            key.algorithm == header.alg && (header.kid.is_none() || key.id.is_none() || key.id == header.kid)
        };
        let mut refusal = TokenRefusal::UnknownKey;
        for key in keys.iter().filter(named) {
            match jsonwebtoken::decode::<C>(token, &key.key, &self.validation(key.algorithm)) {
                Ok(data) => return Ok(data.claims),
                Err(error) => match error.kind() {
                    ErrorKind::InvalidSignature => refusal = TokenRefusal::BadSignature,
                    ErrorKind::InvalidIssuer | ErrorKind::InvalidAudience => {
                        return Err(TokenRefusal::NotForUs);
                    }
                    _ => return Err(TokenRefusal::Malformed),
                },
            }
        }
        Err(refusal)
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = signature_only(algorithm);
        validation.required_spec_claims = HashSet::from(["iss".to_owned(), "aud".to_owned()]);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.validate_aud = true;
        validation
    }
}

impl PublicKeys {
    /// Takes the keys of a JWK set in place of those before. Keys of other kinds than RS256, ES256
    /// and EdDSA, and those that are not for signatures, are left out.
    ///
    /// # Errors
    /// One line for people, when it is no such set, or there is no key that we can use. Nothing has changed then.
    pub fn adopt(&self, json: &[u8]) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Set<'a> {
            #[serde(borrow)]
            keys: Vec<&'a RawValue>,
        }
        let set: Set<'_> = serde_json::from_slice(json).map_err(|error| format!("not a JWK set: {error}"))?;
        let keys = set.keys.iter().filter_map(|key| PublicKey::of(key));
        let keys: Arc<[PublicKey]> = keys.take(MAX_KEYS).collect();
        if keys.is_empty() {
            return Err("no key for RS256, ES256 or EdDSA in it".to_owned());
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    fn get(&self) -> Arc<[PublicKey]> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for PublicKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKeys({})", self.get().len())
    }
}

impl PublicKey {
    fn of(json: &RawValue) -> Option<Self> {
        let jwk: Jwk = serde_json::from_str(json.get()).ok()?;
        let (algorithm, named) = match &jwk.algorithm {
            AlgorithmParameters::RSA(_) => (Algorithm::RS256, KeyAlgorithm::RS256),
            AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => {
                (Algorithm::ES256, KeyAlgorithm::ES256)
            }
            AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
                (Algorithm::EdDSA, KeyAlgorithm::EdDSA)
            }
            _ => return None,
        };
        let common = &jwk.common;
        let is_for_signatures =
            common.public_key_use.as_ref().is_none_or(|purpose| *purpose == PublicKeyUse::Signature);
        if !is_for_signatures || common.key_algorithm.is_some_and(|other| other != named) {
            return None;
        }
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        Some(Self { id: jwk.common.key_id, algorithm, key })
    }
}
