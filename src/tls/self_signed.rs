//! The certificate of a first start: self-signed, good enough to try everything on one's own machines.

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256,
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

/// A certificate and its key, in PEM.
pub struct Pair {
    pub cert: String,
    /// Secret.
    pub key: String,
}

/// Makes a new one for `names` (DNS names and addresses).
///
/// # Errors
/// When a name cannot stand in a certificate.
pub fn generate(now: Now, names: &[String]) -> Result<Pair, rcgen::Error> {
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
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    Ok(Pair { cert: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
}

/// Whether an existing one still serves: it is for all of `names`, and not near its end.
#[must_use]
pub fn still_serves(cert_pem: &[u8], now: Now, names: &[String]) -> bool {
    let Ok(facts) = Facts::of_leaf(cert_pem) else { return false };
    let lasts =
        i64::try_from(now.unix()).is_ok_and(|now| now + RENEW_BEFORE.whole_seconds() < facts.not_after);
    lasts && names.iter().all(|name| facts.names.contains(name))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{generate, still_serves};
    use crate::tls::Facts;

    const DAY: Duration = Duration::from_secs(86_400);

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn it_names_hosts_and_addresses() {
        let wanted = names(&["turn.example.org", "localhost", "203.0.113.5", "2001:db8::5"]);
        let pair = generate(crate::clock::now(), &wanted).unwrap();
        let facts = Facts::of_leaf(pair.cert.as_bytes()).unwrap();
        assert_eq!(facts.names, wanted);
        assert!(facts.self_signed);
        assert!(pair.key.starts_with("-----BEGIN PRIVATE KEY-----"));
    }

    #[test]
    fn it_is_renewed_before_it_ends() {
        let now = crate::clock::now();
        let pair = generate(now, &names(&["localhost"])).unwrap();
        assert!(still_serves(pair.cert.as_bytes(), now + 365 * DAY, &names(&["localhost"])));
        assert!(!still_serves(pair.cert.as_bytes(), now + 367 * DAY, &names(&["localhost"])));
    }

    #[test]
    fn it_is_renewed_when_a_name_is_missing() {
        let now = crate::clock::now();
        let pair = generate(now, &names(&["localhost", "10.0.0.1"])).unwrap();
        assert!(still_serves(pair.cert.as_bytes(), now, &names(&["10.0.0.1"])));
        assert!(!still_serves(pair.cert.as_bytes(), now, &names(&["localhost", "10.0.0.2"])));
        assert!(!still_serves(b"", now, &[]));
    }

    #[test]
    fn names_that_cannot_stand_in_a_certificate_are_refused() {
        assert!(generate(crate::clock::now(), &names(&["hôte"])).is_err());
    }
}
