//! Agents' tokens: JWT (RFC 7519), HS256 by our own keys, or what an outside issuer signs.
//!
//! The key fixes the algorithm: whatever a token's header asks for, a secret computes HS256 and nothing else, and a public
//! key what it is for. Times are compared with the caller's clock, never the library's own.

use std::{borrow::Cow, fmt, sync::Arc, time::Duration};

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, errors::ErrorKind};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{issuer::Issuer, revocations::Revocations};
use crate::clock::Now;

/// The longest token looked at: no honest one comes near, and a stranger's costs no more than this.
pub const MAX_TOKEN: usize = 8192;

/// How far the clock of whoever minted a token may be ahead of ours.
const SKEW: u64 = 60;

/// The keys of this instance's tokens: the first signs, all verify. Who else may sign, and whose tokens count no more.
#[derive(Clone)]
pub struct TokenKeys {
    signs: EncodingKey,
    verify: Vec<DecodingKey>,
    validation: Validation,
    max_ttl: Duration,
    issuer: Option<Issuer>,
    revocations: Revocations,
}

impl TokenKeys {
    /// `None` when there is no secret at all. A token that lives longer than `max_ttl` is refused.
    #[must_use]
    pub fn new(secrets: &[&[u8]], max_ttl: Duration) -> Option<Self> {
        let signs = EncodingKey::from_secret(secrets.first()?);
        let verify = secrets.iter().map(|secret| DecodingKey::from_secret(secret)).collect();
        let validation = signature_only(Algorithm::HS256);
        Some(Self { signs, verify, validation, max_ttl, issuer: None, revocations: Revocations::default() })
    }

    /// Accepts tokens of this issuer, too.
    #[must_use]
    pub fn with_issuer(self, issuer: Option<Issuer>) -> Self {
        Self { issuer, ..self }
    }

    /// Refuses tokens of agents that were revoked after they were issued.
    #[must_use]
    pub fn with_revocations(self, revocations: Revocations) -> Self {
        Self { revocations, ..self }
    }

    /// Signs a token with the first secret.
    #[must_use]
    pub fn mint(&self, now: Now, token: &NewToken) -> String {
        let claims = NewClaims {
            sub: &token.agent,
            room: &token.room,
            scope: token.scopes.to_string(),
            iat: now.unix(),
            exp: now.unix().saturating_add(token.ttl.as_secs()),
        };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.signs)
            .expect("plain strings and numbers become JSON, and the key is HMAC's")
    }

    /// Says whose token this is.
    ///
    /// # Errors
    /// When it is not a token, not ours, expired, revoked, or lives too long.
    pub fn check(&self, now: Now, token: &str) -> Result<Agent, TokenRefusal> {
        let claims = self.verified_claims(token)?;
        claims.check_times(now.unix(), self.max_ttl.as_secs())?;
        let agent = Agent {
            id: AgentId::parse(&claims.sub).ok_or(TokenRefusal::Malformed)?,
            room: claims
                .room
                .as_deref()
                .map_or(Some(Room::main()), Room::parse)
                .ok_or(TokenRefusal::Malformed)?,
            scopes: claims.scope,
            expires: claims.exp.0,
            issued: claims.iat.map(|iat| iat.0),
        };
        if self.revocations.refuse_token(agent.id.as_str(), agent.issued) {
            Err(TokenRefusal::Revoked)
        } else {
            Ok(agent)
        }
    }

    fn verified_claims(&self, token: &str) -> Result<Claims, TokenRefusal> {
        if token.len() > MAX_TOKEN {
            return Err(TokenRefusal::Malformed);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| TokenRefusal::Malformed)?;
        // RFC 7515 §4.1.11: a header that must be understood, and no extension is.
        if header.crit.is_some() {
            return Err(TokenRefusal::Malformed);
        }
        match (header.alg, &self.issuer) {
            (Algorithm::HS256, _) => self.verified_by_secret(token),
            (Algorithm::RS256 | Algorithm::ES256 | Algorithm::EdDSA, Some(issuer)) => {
                issuer.verify(token, &header)
            }
            _ => Err(TokenRefusal::Malformed),
        }
    }

    fn verified_by_secret(&self, token: &str) -> Result<Claims, TokenRefusal> {
        for key in &self.verify {
            match jsonwebtoken::decode::<Claims>(token, key, &self.validation) {
                Ok(data) => return Ok(data.claims),
                Err(error) if matches!(error.kind(), ErrorKind::InvalidSignature) => {}
                Err(_) => return Err(TokenRefusal::Malformed),
            }
        }
        Err(TokenRefusal::BadSignature)
    }
}

impl fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenKeys({})", self.verify.len())
    }
}

/// Leaves the times to [`Claims::check_times`], which has the caller's clock.
pub(super) fn signature_only(algorithm: Algorithm) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.required_spec_claims.clear();
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation
}

/// What a new token says.
#[derive(Clone, Debug)]
pub struct NewToken {
    pub agent: AgentId,
    pub room: Room,
    pub scopes: Scopes,
    pub ttl: Duration,
}

/// Who a valid token speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    pub id: AgentId,
    pub room: Room,
    pub scopes: Scopes,
    /// Unix seconds.
    pub expires: u64,
    /// Unix seconds; absent when the token does not say.
    pub issued: Option<u64>,
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenRefusal {
    /// Not a token of this kind, or claims that make no sense.
    Malformed,
    /// Signed by none of our keys.
    BadSignature,
    /// Its `nbf` is still to come.
    NotYetValid,
    Expired,
    /// Lives longer than `auth.max_ttl`.
    TooLong,
    /// Its agent was revoked after it was issued.
    Revoked,
    /// Signed with a key that the issuer has not shown us, so far.
    UnknownKey,
    /// Of another issuer than `auth.issuer`, or for somebody else than `auth.audience`.
    NotForUs,
}

impl TokenRefusal {
    /// The code that agents see. Only the owner of an expired token learns more than "no".
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            _ => "unauthorized",
        }
    }
}

impl fmt::Display for TokenRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "the token is malformed",
            Self::BadSignature => "the token is not signed with a key of this instance",
            Self::NotYetValid => "the token is not valid yet",
            Self::Expired => "the token has expired",
            Self::TooLong => "the token lives longer than auth.max_ttl allows",
            Self::Revoked => "the token's agent has been revoked since",
            Self::UnknownKey => "the token is signed with a key that its issuer does not show",
            Self::NotForUs => "the token is of another issuer, or for another audience",
        })
    }
}

/// What a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scopes {
    pub signal: bool,
    pub ice: bool,
    pub admin: bool,
}

impl Scopes {
    pub const NONE: Self = Self { signal: false, ice: false, admin: false };

    /// Reads names separated by spaces or commas; `Err` holds the first unknown one.
    ///
    /// # Errors
    /// When a name is none of `signal`, `ice` and `admin`.
    pub fn parse(text: &str) -> Result<Self, &str> {
        let mut scopes = Self::NONE;
        for name in names(text) {
            scopes.grant(name).then_some(()).ok_or(name)?;
        }
        Ok(scopes)
    }

    /// Whether `name` is a scope.
    fn grant(&mut self, name: &str) -> bool {
        match name {
            "signal" => self.signal = true,
            "ice" => self.ice = true,
            "admin" => self.admin = true,
            _ => return false,
        }
        true
    }
}

/// What a token without the claim allows.
impl Default for Scopes {
    fn default() -> Self {
        Self { signal: true, ice: true, admin: false }
    }
}

/// The `scope` claim.
impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [(self.signal, "signal"), (self.ice, "ice"), (self.admin, "admin")];
        let granted: Vec<_> = all.iter().filter(|(granted, _)| *granted).map(|(_, name)| *name).collect();
        f.write_str(&granted.join(" "))
    }
}

fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split([' ', ',']).filter(|name| !name.is_empty())
}

/// 1 to 128 of `A-Za-z0-9._:@/-`.
fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:@/-".contains(&byte);
    (1..=128).contains(&text.len()) && text.bytes().all(allowed)
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// `None` unless it is 1 to 128 of `A-Za-z0-9._:@/-`.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                is_name(text).then(|| Self(text.into()))
            }

            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<'_, str>::deserialize(deserializer)?;
                Self::parse(&text).ok_or_else(|| de::Error::custom("not a name"))
            }
        }
    };
}

name! {
    /// One agent, on the whole instance.
    AgentId
}
name! {
    /// Where agents see each other.
    Room
}

impl Room {
    /// The room of a token that names none.
    #[must_use]
    pub fn main() -> Self {
        Self("main".into())
    }
}

#[derive(Serialize)]
struct NewClaims<'a> {
    sub: &'a AgentId,
    room: &'a Room,
    scope: String,
    iat: u64,
    exp: u64,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    room: Option<String>,
    #[serde(default, deserialize_with = "scope_claim")]
    scope: Scopes,
    exp: NumericDate,
    iat: Option<NumericDate>,
    nbf: Option<NumericDate>,
}

impl Claims {
    fn check_times(&self, now: u64, max_ttl: u64) -> Result<(), TokenRefusal> {
        let expires = self.exp.0;
        if expires <= now {
            return Err(TokenRefusal::Expired);
        }
        if self.nbf.is_some_and(|nbf| nbf.0 > now.saturating_add(SKEW)) {
            return Err(TokenRefusal::NotYetValid);
        }
        let life = self.iat.map_or(0, |iat| expires.saturating_sub(iat.0));
        let left = (expires - now).saturating_sub(SKEW);
        if life.max(left) > max_ttl { Err(TokenRefusal::TooLong) } else { Ok(()) }
    }
}

/// RFC 7519 §2: seconds, possibly with a fraction, which is cut off.
#[derive(Clone, Copy)]
struct NumericDate(u64);

impl<'de> Deserialize<'de> for NumericDate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        // Every whole second up to here is exact in an `f64`; later ones are no dates of this world.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range is checked")]
        if (0.0..9_007_199_254_740_992.0).contains(&seconds) {
            Ok(Self(seconds as u64))
        } else {
            Err(de::Error::custom("not a date"))
        }
    }
}

/// A string or an array of strings. Names that mean something elsewhere are no error here: they allow nothing.
fn scope_claim<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Scopes, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Claim {
        Text(String),
        List(Vec<String>),
    }
    let Some(claim) = Option::<Claim>::deserialize(deserializer)? else { return Ok(Scopes::default()) };
    let listed = match claim {
        Claim::Text(text) => vec![text],
        Claim::List(list) => list,
    };
    let mut scopes = Scopes::NONE;
    for name in listed.iter().flat_map(|text| names(text)) {
        scopes.grant(name);
    }
    Ok(scopes)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant, UNIX_EPOCH};

    use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
    use serde_json::{Value, json};

    use super::{Agent, AgentId, NewToken, Room, Scopes, TokenKeys, TokenRefusal};
    use crate::clock::Now;

    const SECRET: &[u8] = b"an instance's secret of 32 bytes";
    const OTHER: &[u8] = b"another one, thirty-two bytes too";
    const HOUR: Duration = Duration::from_secs(3600);
    const T0: u64 = 1_800_000_000;

    #[expect(clippy::disallowed_methods, reason = "an Instant cannot be made from nothing")]
    fn t0() -> Now {
        Now { mono: Instant::now(), wall: UNIX_EPOCH + Duration::from_secs(T0) }
    }

    fn keys(secrets: &[&[u8]]) -> TokenKeys {
        TokenKeys::new(secrets, 24 * HOUR).unwrap()
    }

    fn new_token(ttl: Duration) -> NewToken {
        NewToken {
            agent: AgentId::parse("agent-1").unwrap(),
            room: Room::main(),
            scopes: Scopes::default(),
            ttl,
        }
    }

    /// A token as another JWT library would write it, in the given header and claims, signed with `SECRET`.
    fn foreign(header: &str, claims: &str) -> String {
        let encode = |part: &str| BASE64_URL_SAFE_NO_PAD.encode(part);
        let message = format!("{}.{}", encode(header), encode(claims));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, SECRET);
        let signature = BASE64_URL_SAFE_NO_PAD.encode(aws_lc_rs::hmac::sign(&key, message.as_bytes()));
        format!("{message}.{signature}")
    }

    fn check_claims(claims: &Value) -> Result<Agent, TokenRefusal> {
        keys(&[SECRET]).check(t0(), &foreign(r#"{"alg":"HS256","typ":"JWT"}"#, &claims.to_string()))
    }

    #[test]
    fn what_is_minted_is_accepted() {
        let token = keys(&[SECRET]).mint(t0(), &new_token(HOUR));
        let agent = keys(&[SECRET]).check(t0(), &token).unwrap();
        assert_eq!(agent.id.as_str(), "agent-1");
        assert_eq!(agent.room.as_str(), "main");
        assert_eq!(agent.scopes, Scopes { signal: true, ice: true, admin: false });
        assert_eq!((agent.issued, agent.expires), (Some(T0), T0 + 3600));
    }

    #[test]
    fn the_first_secret_signs_and_all_verify() {
        let old = keys(&[OTHER]).mint(t0(), &new_token(HOUR));
        let both = keys(&[SECRET, OTHER]);
        assert!(both.check(t0(), &old).is_ok());
        assert!(keys(&[SECRET]).check(t0(), &both.mint(t0(), &new_token(HOUR))).is_ok());
        assert_eq!(keys(&[SECRET]).check(t0(), &old), Err(TokenRefusal::BadSignature));
        assert!(TokenKeys::new(&[], HOUR).is_none());
    }

    #[test]
    fn a_token_ends_with_its_last_second() {
        let keys = keys(&[SECRET]);
        let token = keys.mint(t0(), &new_token(HOUR));
        assert!(keys.check(t0() + Duration::from_secs(3599), &token).is_ok());
        let refusal = keys.check(t0() + HOUR, &token).unwrap_err();
        assert_eq!((refusal, refusal.code()), (TokenRefusal::Expired, "expired"));
    }

    #[test]
    fn the_key_fixes_the_algorithm() {
        let claims = json!({"sub": "a", "exp": T0 + 60}).to_string();
        for header in [
            r#"{"alg":"none"}"#,
            r#"{"alg":"HS512"}"#,
            r#"{"alg":"RS256"}"#,
            r#"{"alg":"ES256","jwk":{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}}"#,
            r#"{"alg":"HS256","crit":["b64"],"b64":false}"#,
            r#"{"alg":"HS256","alg":"none"}"#,
            r#"{"typ":"JWT"}"#,
            "[]",
            "",
        ] {
            let checked = keys(&[SECRET]).check(t0(), &foreign(header, &claims));
            assert_eq!(checked, Err(TokenRefusal::Malformed), "{header}");
        }
    }

    #[test]
    fn an_unsigned_or_changed_token_is_refused() {
        let keys = keys(&[SECRET]);
        let token = keys.mint(t0(), &new_token(HOUR));
        let (message, signature) = token.rsplit_once('.').unwrap();
        let changed = format!("{message}.{}", signature.chars().rev().collect::<String>());
        assert!(keys.check(t0(), &changed).is_err());
        assert_eq!(keys.check(t0(), &format!("{message}.")), Err(TokenRefusal::BadSignature));
        for bad in ["", ".", "..", "...", "a.b.c", message, "ünï.cö.dé", &"a".repeat(9000)] {
            assert_eq!(keys.check(t0(), bad), Err(TokenRefusal::Malformed), "{bad}");
        }
    }

    #[test]
    fn a_token_has_an_end_and_not_too_late() {
        assert_eq!(check_claims(&json!({"sub": "a"})), Err(TokenRefusal::Malformed));
        assert!(check_claims(&json!({"sub": "a", "exp": T0 + 86_400})).is_ok());
        assert!(check_claims(&json!({"sub": "a", "exp": T0 + 86_400 + 30, "iat": T0 + 30})).is_ok());
        for long in [
            json!({"sub": "a", "exp": T0 + 86_461}),
            json!({"sub": "a", "exp": T0 + 10, "iat": T0 - 86_391}),
            json!({"sub": "a", "exp": 9_007_199_254_740_991_u64}),
        ] {
            assert_eq!(check_claims(&long), Err(TokenRefusal::TooLong), "{long}");
        }
    }

    #[test]
    fn a_token_of_the_future_waits() {
        assert!(check_claims(&json!({"sub": "a", "exp": T0 + 900, "nbf": T0 + 60})).is_ok());
        let refused = check_claims(&json!({"sub": "a", "exp": T0 + 900, "nbf": T0 + 61}));
        assert_eq!(refused, Err(TokenRefusal::NotYetValid));
    }

    #[test]
    fn scopes_are_a_string_or_an_array() {
        let all = Scopes { signal: true, ice: true, admin: true };
        let ice = Scopes { ice: true, ..Scopes::NONE };
        for (scope, expected) in [
            (json!("ice"), ice),
            (json!("signal ice admin"), all),
            (json!("admin,signal, ice"), all),
            (json!(["signal", "ice", "admin"]), all),
            (json!(["ice", "openid"]), ice),
            (json!("openid"), Scopes::NONE),
            (json!(""), Scopes::NONE),
            (json!([]), Scopes::NONE),
            (json!(null), Scopes::default()),
        ] {
            let agent = check_claims(&json!({"sub": "a", "exp": T0 + 60, "scope": scope})).unwrap();
            assert_eq!(agent.scopes, expected, "{scope}");
        }
        assert_eq!(Scopes::parse("signal,admin root"), Err("root"));
        assert_eq!(all.to_string(), "signal ice admin");
    }

    #[test]
    fn claims_of_odd_types_are_refused() {
        for claims in [
            json!({"sub": "", "exp": T0 + 60}),
            json!({"sub": "a b", "exp": T0 + 60}),
            json!({"sub": "ä", "exp": T0 + 60}),
            json!({"sub": "a".repeat(129), "exp": T0 + 60}),
            json!({"sub": 7, "exp": T0 + 60}),
            json!({"sub": null, "exp": T0 + 60}),
            json!({"sub": "a", "exp": T0 + 60, "room": ""}),
            json!({"sub": "a", "exp": T0 + 60, "room": ["main"]}),
            json!({"sub": "a", "exp": T0 + 60, "scope": 1}),
            json!({"sub": "a", "exp": T0 + 60, "scope": [["ice"]]}),
            json!({"sub": "a", "exp": T0 + 60, "iat": "now"}),
            json!({"sub": "a", "exp": T0 + 60, "iat": -1}),
            json!({"sub": "a", "exp": (T0 + 60).to_string()}),
            json!({"sub": "a", "exp": -1}),
            json!({"sub": "a", "exp": 1e300}),
            json!({"sub": "a", "exp": {}}),
            json!(["a"]),
            json!(null),
        ] {
            assert_eq!(check_claims(&claims), Err(TokenRefusal::Malformed), "{claims}");
        }
        let twice = foreign(r#"{"alg":"HS256"}"#, r#"{"sub":"a","sub":"b","exp":1900000000}"#);
        assert_eq!(keys(&[SECRET]).check(t0(), &twice), Err(TokenRefusal::Malformed));
    }

    #[test]
    fn claims_of_other_libraries_are_accepted() {
        let claims = json!({"sub": "a@b.c/d:e-1", "exp": 1_800_000_060.9, "iat": 1_800_000_000.5, "room": "r",
            "aud": "x", "iss": ["y"], "more": {}});
        let agent = check_claims(&claims).unwrap();
        assert_eq!((agent.expires, agent.issued), (T0 + 60, Some(T0)));
        assert_eq!(agent.room.as_str(), "r");
        assert!(check_claims(&json!({"sub": "a".repeat(128), "exp": T0 + 60})).is_ok());
    }

    #[test]
    fn keys_are_not_printed() {
        assert_eq!(format!("{:?}", keys(&[SECRET, OTHER])), "TokenKeys(2)");
    }
}
