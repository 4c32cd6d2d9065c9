//! `auth.jwks`: tokens of an outside issuer, whose keys change, and which is not always there.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use halfway::{clock, tls};
use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

use super::{TempDir, instance::Instance};

const ISSUER: &str = "https://id.example";

/// One of an issuer's keys.
struct Key {
    id: &'static str,
    algorithm: Algorithm,
    secret: EncodingKey,
    public: Value,
}

impl Key {
    fn new(id: &'static str, algorithm: Algorithm) -> Self {
        let pair = match algorithm {
            Algorithm::RS256 => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048),
            Algorithm::ES256 => KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256),
            _ => KeyPair::generate_for(&PKCS_ED25519),
        };
        let pair = pair.unwrap();
        let pem = pair.serialize_pem();
        let secret = match algorithm {
            Algorithm::RS256 => EncodingKey::from_rsa_pem(pem.as_bytes()),
            Algorithm::ES256 => EncodingKey::from_ec_pem(pem.as_bytes()),
            _ => EncodingKey::from_ed_pem(pem.as_bytes()),
        };
        let secret = secret.unwrap();
        let mut public = match algorithm {
            Algorithm::EdDSA => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": BASE64_URL_SAFE_NO_PAD.encode(pair.public_key_raw())})
            }
            _ => serde_json::to_value(Jwk::from_encoding_key(&secret, algorithm).unwrap()).unwrap(),
        };
        public["kid"] = id.into();
        Self { id, algorithm, secret, public }
    }

    /// A token for `agent-7`, with other claims than usual.
    fn token(&self, other: Value) -> String {
        self.token_of(Header { kid: Some(self.id.to_owned()), ..Header::new(self.algorithm) }, other)
    }

    fn token_of(&self, header: Header, other: Value) -> String {
        jsonwebtoken::encode(&header, &claims(other), &self.secret).unwrap()
    }
}

fn claims(other: Value) -> Value {
    let mut claims = json!({"sub": "agent-7", "iss": ISSUER, "aud": ["halfway", "another"], "exp": clock::now().unix() + 600});
    claims.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
    claims.as_object_mut().unwrap().retain(|_, claim| !claim.is_null());
    claims
}

fn set(keys: &[&Key]) -> String {
    json!({"keys": keys.iter().map(|key| &key.public).collect::<Vec<_>>()}).to_string()
}

fn config(jwks: &str) -> String {
    format!("[auth]\njwks = '{jwks}'\nissuer = '{ISSUER}'\naudience = 'halfway'\n")
}

/// What is answered to who asks for credentials with the token: the status, and in whose name.
fn ask(instance: &Instance, token: &str) -> (u16, String) {
    let (status, body) = instance.ask("GET /v1/ice", token, "");
    let name = body["username"].as_str().and_then(|name| name.split(':').nth(1));
    (status, name.or(body["detail"].as_str()).unwrap_or_default().to_owned())
}

#[test]
fn tokens_of_the_issuer_are_good_and_whatever_is_wrong_with_one_is_refused() {
    let keys = [("rsa", Algorithm::RS256), ("ec", Algorithm::ES256), ("ed", Algorithm::EdDSA)];
    let keys = keys.map(|(id, algorithm)| Key::new(id, algorithm));
    let dir = TempDir::new();
    dir.write("keys.json", set(&keys.iter().collect::<Vec<_>>()));
    let instance = Instance::start_in(dir, &config("keys.json"));
    let good = |token: &str| assert_eq!(ask(&instance, token), (200, "agent-7".to_owned()));
    let bad = |what: &str, token: &str| assert_eq!(ask(&instance, token).0, 401, "{what}");
    for key in &keys {
        good(&key.token(json!({})));
        good(&key.token_of(Header::new(key.algorithm), json!({"aud": "halfway"})));
        bad("aud", &key.token(json!({"aud": "another"})));
        bad("no aud", &key.token(json!({"aud": null})));
        bad("iss", &key.token(json!({"iss": "https://id.example.evil"})));
        bad("no iss", &key.token(json!({"iss": null})));
        bad("exp", &key.token(json!({"exp": clock::now().unix() - 1})));
        bad("no exp", &key.token(json!({"exp": null})));
        bad("nbf", &key.token(json!({"nbf": clock::now().unix() + 600})));
        bad("max_ttl", &key.token(json!({"exp": clock::now().unix() + 400 * 86_400})));
        let named = |kid: &str| Header { kid: Some(kid.to_owned()), ..Header::new(key.algorithm) };
        bad("kid", &key.token_of(named("nobody"), json!({})));
        let stranger = Key::new(key.id, key.algorithm);
        bad("another's signature", &stranger.token(json!({})));
    }
    for (index, key) in keys.iter().enumerate() {
        let other = &keys[(index + 1) % keys.len()];
        let named = Header { kid: Some(other.id.to_owned()), ..Header::new(key.algorithm) };
        bad("kid of a key for another algorithm", &key.token_of(named, json!({})));
    }
    // The public key is no secret, whatever the header says.
    let public = &keys[0].public;
    for secret in [public["n"].as_str().unwrap().as_bytes(), public.to_string().as_bytes(), b""] {
        let header = Header { kid: Some("rsa".to_owned()), ..Header::new(Algorithm::HS256) };
        let token = jsonwebtoken::encode(&header, &claims(json!({})), &EncodingKey::from_secret(secret));
        bad("HS256 by the public key", &token.unwrap());
    }
    let mut parts: Vec<_> = keys[0].token(json!({})).split('.').map(str::to_owned).collect();
    parts[0] = "eyJhbGciOiJub25lIn0".to_owned();
    bad("none", &parts.join("."));
    parts[2].clear();
    bad("none, unsigned", &parts.join("."));
    good(&instance.token(&["agent-7"]));
}

#[test]
fn keys_in_a_file_change_and_a_file_that_is_none_changes_nothing() {
    let (old, new) = (Key::new("old", Algorithm::ES256), Key::new("new", Algorithm::ES256));
    let dir = TempDir::new();
    dir.write("keys.json", set(&[&old]));
    let instance = Instance::start_in(dir, &config("keys.json"));
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 200);
    instance.dir.write("keys.json", "{\"keys\":[]}");
    instance.served.expect("those known before stay good: no key for");
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 200);
    instance.dir.write("keys.json", set(&[&new]));
    // It is looked at once somebody comes with a key that is not known.
    assert_eq!(ask(&instance, &new.token(json!({}))).0, 200);
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 401);
    let line = instance.reload(&config("nowhere.json"));
    assert!(
        line.contains("nothing has changed: h.toml:3: auth.jwks: nowhere.json cannot be read: No such file"),
        "{line}"
    );
    assert_eq!(ask(&instance, &new.token(json!({}))).0, 200);
    assert!(instance.reload("").contains("is reloaded"));
    assert_eq!(ask(&instance, &new.token(json!({}))).0, 401, "the issuer is one no more");
}

#[test]
fn an_issuer_that_is_not_there_locks_nobody_out() {
    let (old, new) = (Key::new("old", Algorithm::EdDSA), Key::new("new", Algorithm::EdDSA));
    let dir = TempDir::new();
    let issuer = Issuer::start(&dir, set(&[&old]));
    let config = config(&issuer.url());
    let instance = start(dir, &config);
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 200);
    // Strangers do not make us ask again and again.
    let asked = issuer.asked.load(SeqCst);
    for _ in 0..20 {
        assert_eq!(ask(&instance, &new.token(json!({}))).0, 401);
    }
    assert!(issuer.asked.load(SeqCst) <= asked + 1, "asked {} times", issuer.asked.load(SeqCst) - asked);
    // Down: what was known is good, after a new start too.
    let down = issuer.stop();
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 200);
    let instance = start(instance.killed(), &config);
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 200);
    // Back, with another key.
    let _issuer = Issuer::start_at(down, &instance.dir, set(&[&new]));
    let instance = start(instance.killed(), &config);
    assert_eq!(ask(&instance, &new.token(json!({}))).0, 200);
    assert_eq!(ask(&instance, &old.token(json!({}))).0, 401);
}

/// An instance that trusts `issuer.pem`.
fn start(dir: TempDir, config: &str) -> Instance {
    let trusted = dir.path().join("issuer.pem");
    Instance::start_by(dir, config, |command| _ = command.env("SSL_CERT_FILE", trusted))
}

/// An issuer over HTTPS.
struct Issuer {
    at: SocketAddr,
    asked: Arc<AtomicUsize>,
    stopping: Arc<AtomicBool>,
    serving: Option<JoinHandle<()>>,
}

impl Issuer {
    /// Its certificate is in `issuer.pem`.
    fn start(dir: &TempDir, keys: String) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), dir, keys)
    }

    fn start_at(at: SocketAddr, dir: &TempDir, keys: String) -> Self {
        let key = tls::self_signed::new_key().unwrap();
        let cert = tls::self_signed::generate(clock::now(), &["localhost".to_owned()], &key).unwrap();
        dir.write("issuer.pem", &cert);
        let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap();
        let listener = TcpListener::bind(at).unwrap();
        let at = listener.local_addr().unwrap();
        let (asked, stopping) = <(Arc<AtomicUsize>, Arc<AtomicBool>)>::default();
        let (count, over, config) = (Arc::clone(&asked), Arc::clone(&stopping), Arc::new(config));
        let keys = Mutex::new(keys);
        let serving = thread::spawn(move || {
            for stream in listener.incoming().take_while(|_| !over.load(SeqCst)) {
                let session = ServerConnection::new(Arc::clone(&config)).unwrap();
                let mut stream = StreamOwned::new(session, stream.unwrap());
                let mut request = [0; 2_048];
                // Who does not trust us is gone.
                if stream.read(&mut request).is_err() {
                    continue;
                }
                count.fetch_add(1, SeqCst);
                let body = keys.lock().unwrap();
                let head =
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
                let _ = stream.write_all((head + &body).as_bytes());
                stream.conn.send_close_notify();
                let _ = stream.flush();
            }
        });
        Self { at, asked, stopping, serving: Some(serving) }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}/keys", self.at.port())
    }

    /// Gives where it was.
    fn stop(self) -> SocketAddr {
        self.at
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.stopping.store(true, SeqCst);
        let _ = std::net::TcpStream::connect(self.at);
        let _ = self.serving.take().unwrap().join();
    }
}
