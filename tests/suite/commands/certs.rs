//! `certs/make-ca.sh` and the self-signed certificate, as a TLS client judges them.

use std::{path::Path, process::Command, sync::Arc};

use halfway::{clock, tls, tls::self_signed};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};

use super::{TempDir, run};

/// Whether a client that trusts `ca_pem` alone accepts the server under this name.
fn accepts(server: &Arc<ServerConfig>, ca_pem: &[u8], name: &'static str) -> bool {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca_pem).unwrap()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(client), ServerName::try_from(name).unwrap()).unwrap();
    let mut server = ServerConnection::new(server.clone()).unwrap();
    while client.is_handshaking() {
        let mut flight = Vec::new();
        client.write_tls(&mut flight).unwrap();
        server.read_tls(&mut flight.as_slice()).unwrap();
        server.process_new_packets().unwrap();
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
    assert!(!certificate.self_signed);
    for name in names {
        assert!(accepts(&certificate.config, &read("ca.pem"), name), "{name}");
    }
    assert!(!accepts(&certificate.config, &read("ca.pem"), "example.org"));
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
    let config = tls::server_config(cert.as_bytes(), key.as_bytes()).unwrap();
    for name in ["localhost", "127.0.0.1", "::1", "turn.example.org", "203.0.113.5"] {
        assert!(accepts(&config, cert.as_bytes(), name), "{name}");
    }
    assert!(!accepts(&config, cert.as_bytes(), "203.0.113.6"));
}
