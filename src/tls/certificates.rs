//! What handshakes present. It may be another certificate from one handshake to the next.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::sync::watch;

use super::{ALPN_ACME, ALPN_H2, ALPN_RELAY, Certificate, Facts};

/// The certificate of now, and what proves to an authority that a name is ours (RFC 8737).
pub struct Certificates {
    current: RwLock<Certificate>,
    /// By the name that the authority asks for.
    challenges: Mutex<HashMap<String, Arc<CertifiedKey>>>,
    changed: watch::Sender<()>,
}

impl Certificates {
    /// Until there is another.
    #[must_use]
    pub fn new(first: Certificate) -> Arc<Self> {
        let (changed, _) = watch::channel(());
        Arc::new(Self { current: RwLock::new(first), challenges: Mutex::default(), changed })
    }

    /// Handshakes to come present this one; connections that are open do not notice.
    pub fn present(&self, certificate: Certificate) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = certificate;
        self.changed.send_replace(());
    }

    /// The same, and the log says so.
    pub fn announce(&self, certificate: Certificate) {
        let facts = &certificate.facts;
        tracing::info!(names = ?facts.names, until = %facts.end(), "a new certificate is presented");
        self.present(certificate);
    }

    /// What the certificate of now says about itself.
    #[must_use]
    pub fn facts(&self) -> Facts {
        self.current.read().unwrap_or_else(PoisonError::into_inner).facts.clone()
    }

    /// Hears of every certificate that comes after the one of now.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Answers an authority that asks for `name`, a host name or an address, by ALPN `acme-tls/1`, until told otherwise.
    pub fn prove(&self, name: &str, proof: Option<&Certificate>) {
        let mut challenges = self.challenges.lock().unwrap_or_else(PoisonError::into_inner);
        match proof {
            Some(proof) => _ = challenges.insert(asked_as(name), Arc::clone(&proof.key)),
            None => _ = challenges.remove(&asked_as(name)),
        }
    }

    /// What a TLS listener needs to serve HTTP and the relay.
    #[must_use]
    pub fn server_config(self: &Arc<Self>) -> Arc<ServerConfig> {
        let resolver: Arc<dyn ResolvesServerCert> = Arc::clone(self) as _;
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("the provider has the ciphers of the default versions")
            .with_no_client_auth()
            .with_cert_resolver(resolver);
        let protocols = [&ALPN_RELAY[..], &[ALPN_H2, b"http/1.1", ALPN_ACME]].concat();
        config.alpn_protocols = protocols.into_iter().map(<[u8]>::to_vec).collect();
        Arc::new(config)
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // RFC 8737 §3: an authority offers this protocol, and no other.
        if hello.alpn().is_some_and(|mut offered| offered.any(|protocol| protocol == ALPN_ACME)) {
            let challenges = self.challenges.lock().unwrap_or_else(PoisonError::into_inner);
            return challenges.get(hello.server_name()?).cloned();
        }
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner).key))
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("current", &self.facts()).finish_non_exhaustive()
    }
}

/// A host name as it is; an address, which cannot be asked for, by its name in reverse (RFC 8738 §6).
fn asked_as(name: &str) -> String {
    match name.parse() {
        Ok(IpAddr::V4(v4)) => {
            let [a, b, c, d] = v4.octets();
            format!("{d}.{c}.{b}.{a}.in-addr.arpa")
        }
        Ok(IpAddr::V6(v6)) => {
            let nibbles = v6.octets().into_iter().rev().flat_map(|byte| [byte & 15, byte >> 4]);
            nibbles.map(|nibble| format!("{nibble:x}.")).collect::<String>() + "ip6.arpa"
        }
        Err(_) => name.to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::asked_as;

    #[test]
    fn addresses_are_asked_for_in_reverse() {
        assert_eq!(asked_as("Turn.example.org"), "turn.example.org");
        assert_eq!(asked_as("203.0.113.5"), "5.113.0.203.in-addr.arpa");
        let v6 = "b.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
        assert_eq!(asked_as("2001:db8::567:89ab"), v6);
    }
}
