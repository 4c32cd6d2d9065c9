//! The certificate of a first start: self-signed, good enough to try everything on one's own machines.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, SerialNumber,
};
use time::{Duration, OffsetDateTime};

use super::Facts;
use crate::clock::Now;

/// As long as browsers accept of anybody.
const VALID: Duration = Duration::days(397);
/// Renewed at a start this long before its end.
const RENEW_BEFORE: Duration = Duration::days(30);
/// Agents' clocks may be behind.
const VALID_SINCE: Duration = Duration::days(1);

/// A new private key, in PEM.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn new_key() -> Result<String, rcgen::Error> {
    Ok(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?.serialize_pem())
}

/// Makes a certificate for `names` (DNS names and addresses) and this key, both in PEM.
///
/// # Errors
/// When a name cannot stand in a certificate, or the key is none.
pub fn generate(now: Now, names: &[String], key_pem: &str) -> Result<String, rcgen::Error> {
    let today = OffsetDateTime::from(now.wall);
    let mut params = CertificateParams::new(names)?;
    params.not_before = today - VALID_SINCE;
    params.not_after = today - VALID_SINCE + VALID;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "halfway, self-signed");
    // Not a CA: who trusts this one certificate trusts nothing else that its key could sign.
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.serial_number = Some(serial_number()?);
    Ok(params.self_signed(&KeyPair::from_pem(key_pem)?)?.pem())
}

/// A renewed certificate has another: some clients refuse two of one issuer and number.
fn serial_number() -> Result<SerialNumber, rcgen::Error> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| rcgen::Error::RingUnspecified)?;
    bytes[0] = bytes[0] & 0x7f | 0x40; // positive, and of one length
    Ok(SerialNumber::from_slice(&bytes))
}

/// Every name under which agents may come: the public host, our addresses, and this host to itself.
#[must_use]
pub fn names(public_host: Option<&str>, addresses: &[IpAddr]) -> Vec<String> {
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let addresses = addresses.iter().filter(|address| !address.is_unspecified());
    let addresses = addresses.chain(&loopback).map(ToString::to_string);
    let hosts = public_host.into_iter().chain(["localhost"]).map(str::to_owned);
    let mut names = Vec::new();
    for name in hosts.chain(addresses) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Whether an existing one still serves: it is for all of `names`, and not near its end.
#[must_use]
pub fn still_serves(cert_pem: &[u8], now: Now, names: &[String]) -> bool {
    let Ok(facts) = Facts::of_leaf(cert_pem) else { return false };
    facts.left(now) > RENEW_BEFORE.whole_seconds() && names.iter().all(|name| facts.names.contains(name))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{generate, new_key, still_serves};
    use crate::{clock::Now, tls::Facts};

    const DAY: Duration = Duration::from_secs(86_400);

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    fn certificate(now: Now, wanted: &[String]) -> String {
        generate(now, wanted, &new_key().unwrap()).unwrap()
    }

    #[test]
    fn it_names_hosts_and_addresses() {
        let wanted = names(&["turn.example.org", "localhost", "203.0.113.5", "2001:db8::5"]);
        let cert = certificate(crate::clock::now(), &wanted);
        let facts = Facts::of_leaf(cert.as_bytes()).unwrap();
        assert_eq!(facts.names, wanted);
        assert!(facts.self_signed);
    }

    #[test]
    fn the_names_are_those_that_agents_use() {
        let addresses = ["203.0.113.5", "::", "127.0.0.1"].map(|address| address.parse().unwrap());
        let expected = names(&["turn.example.org", "localhost", "203.0.113.5", "127.0.0.1", "::1"]);
        assert_eq!(super::names(Some("turn.example.org"), &addresses), expected);
        assert_eq!(super::names(Some("localhost"), &[]), names(&["localhost", "127.0.0.1", "::1"]));
    }

    #[test]
    fn it_is_renewed_before_it_ends() {
        let now = crate::clock::now();
        let cert = certificate(now, &names(&["localhost"]));
        assert!(still_serves(cert.as_bytes(), now + 365 * DAY, &names(&["localhost"])));
        assert!(!still_serves(cert.as_bytes(), now + 367 * DAY, &names(&["localhost"])));
    }

    #[test]
    fn it_is_renewed_when_a_name_is_missing() {
        let now = crate::clock::now();
        let cert = certificate(now, &names(&["localhost", "10.0.0.1"]));
        assert!(still_serves(cert.as_bytes(), now, &names(&["10.0.0.1"])));
        assert!(!still_serves(cert.as_bytes(), now, &names(&["localhost", "10.0.0.2"])));
        assert!(!still_serves(b"", now, &[]));
    }

    #[test]
    fn what_cannot_stand_in_a_certificate_is_refused() {
        assert!(generate(crate::clock::now(), &names(&["hôte"]), &new_key().unwrap()).is_err());
        assert!(generate(crate::clock::now(), &names(&["host"]), "no key").is_err());
    }
}
