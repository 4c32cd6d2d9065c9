//! `certs/make-ca.sh` and the self-signed certificate, as a TLS client judges them.

use std::{path::Path, process::Command, sync::Arc, time::Duration};

use halfway::{
    clock, tls,
    tls::{
        certificates::Certificates,
        files::{Files, LOOK, follow},
        self_signed,
    },
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

use super::{TempDir, run};

/// Whether a client that trusts `ca_pem` alone accepts the server under this name.
fn accepts(server: &Arc<ServerConfig>, ca_pem: &[u8], name: &'static str) -> bool {
    accepts_by(server, ca_pem, name, None)
}

/// The same for a client that offers a protocol.
fn accepts_by(
    server: &Arc<ServerConfig>,
    ca_pem: &[u8],
    name: &'static str,
    protocol: Option<&[u8]>,
) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem).unwrap()).unwrap();
    let mut client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
    let mut client = ClientConnection::new(Arc::new(client), ServerName::try_from(name).unwrap()).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    while client.is_handshaking() {
        let mut flight = Vec::new();
        client.write_tls(&mut flight).unwrap();
        server.read_tls(&mut flight.as_slice()).unwrap();
        if server.process_new_packets().is_err() {
            return false;
        }
        let mut flight = Vec::new();
        server.write_tls(&mut flight).unwrap();
        client.read_tls(&mut flight.as_slice()).unwrap();
        if client.process_new_packets().is_err() {
            return false;
        }
    }
    true
}

fn make_ca(dir: &Path, names: &[&str]) -> (i32, String, String) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("certs/make-ca.sh");
    run(Command::new("sh").arg(script).arg(dir).args(names))
}

#[test]
fn the_throw_away_authority_vouches_for_its_names() {
    let dir = TempDir::new();
    let made = dir.path().join("new");
    let names = ["localhost", "127.0.0.1", "::1", "turn.example.org"];
    assert_eq!(make_ca(&made, &names), (0, String::new(), String::new()));
    let read = |name: &str| std::fs::read(made.join(name)).unwrap();
    let mut left: Vec<_> =
        std::fs::read_dir(&made).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["ca.pem", "cert.pem", "key.pem"], "the authority's key is gone");
    let certificate = tls::Certificate::from_files(&made.join("cert.pem"), &made.join("key.pem")).unwrap();
    assert!(!certificate.is_self_signed());
    let config = Certificates::new(certificate).server_config();
    for name in names {
        assert!(accepts(&config, &read("ca.pem"), name), "{name}");
    }
    assert!(!accepts(&config, &read("ca.pem"), "example.org"));
    let (code, _, stderr) = make_ca(&made, &names);
    assert_eq!(code, 1);
    assert!(stderr.contains("is there already"), "{stderr}");
    assert_eq!(make_ca(&made, &[]).0, 2);
}

#[test]
fn who_trusts_the_self_signed_certificate_accepts_it() {
    let key = self_signed::new_key().unwrap();
    let names = self_signed::names(Some("turn.example.org"), &["203.0.113.5".parse().unwrap()]);
    let cert = self_signed::generate(clock::now(), &names, &key).unwrap();
    let certificate = tls::Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap();
    let config = Certificates::new(certificate).server_config();
    for name in ["localhost", "127.0.0.1", "::1", "turn.example.org", "203.0.113.5"] {
        assert!(accepts(&config, cert.as_bytes(), name), "{name}");
    }
    assert!(!accepts(&config, cert.as_bytes(), "203.0.113.6"));
}

#[tokio::test]
async fn files_that_change_are_presented_once_they_belong_together() {
    let dir = TempDir::new();
    let pair = || {
        let key = self_signed::new_key().unwrap();
        (self_signed::generate(clock::now(), &["localhost".to_owned()], &key).unwrap(), key)
    };
    let ((old_cert, old_key), (new_cert, new_key)) = (pair(), pair());
    let files = Files { cert: dir.write("cert.pem", &old_cert), key: dir.write("key.pem", old_key) };
    let certificates = Certificates::new(files.read().unwrap());
    let (config, mut changes) = (certificates.server_config(), certificates.changes());
    let following = tokio::spawn(follow(files, Arc::clone(&certificates)));
    // As certbot and others do: one after the other, each put in the place of the old one.
    let replace = |name: &str, text: &str| {
        std::fs::rename(dir.write("new", text), dir.path().join(name)).unwrap();
    };
    replace("cert.pem", &new_cert);
    let early = tokio::time::timeout(LOOK + Duration::from_secs(1), changes.changed()).await;
    assert!(early.is_err(), "the key is still the old one");
    assert!(accepts(&config, old_cert.as_bytes(), "localhost"));
    replace("key.pem", &new_key);
    tokio::time::timeout(2 * LOOK, changes.changed()).await.unwrap().unwrap();
    assert!(accepts(&config, new_cert.as_bytes(), "localhost"));
    assert!(!accepts(&config, old_cert.as_bytes(), "localhost"));
    following.abort();
}

#[test]
fn an_authority_sees_the_proof_and_nobody_else_does() {
    let key = self_signed::new_key().unwrap();
    let cert = self_signed::generate(clock::now(), &["localhost".to_owned()], &key).unwrap();
    let of = |cert: &str| tls::Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap();
    let certificates = Certificates::new(of(&cert));
    let proof = self_signed::generate(clock::now(), &["turn.example.org".to_owned()], &key).unwrap();
    certificates.prove("turn.example.org", Some(&of(&proof)));
    let config = certificates.server_config();
    let asked = |protocol: Option<&[u8]>, ca: &str, name| accepts_by(&config, ca.as_bytes(), name, protocol);
    assert!(asked(Some(tls::ALPN_ACME), &proof, "turn.example.org"));
    assert!(!asked(None, &proof, "turn.example.org"));
    assert!(!asked(Some(tls::ALPN_ACME), &cert, "localhost"), "there is no proof for this name");
    assert!(asked(None, &cert, "localhost"));
    certificates.prove("turn.example.org", None);
    assert!(!asked(Some(tls::ALPN_ACME), &proof, "turn.example.org"));
}
