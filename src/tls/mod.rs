//! Certificates: read from PEM, judged, and made into what a TLS listener needs.

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::clock::Now;

mod outward; // requests of our own, over HTTPS

pub mod certificates; // what handshakes present, now
pub mod files; // a certificate that somebody else renews
pub mod self_signed; // the certificate of a first start

pub use outward::{connector, root_of};

/// What a relay client may say that it speaks (RFC 7443).
pub const ALPN_RELAY: [&[u8]; 2] = [b"stun.turn", b"stun.nat-discovery"];
/// HTTP/2 (RFC 9113).
pub const ALPN_H2: &[u8] = b"h2";

/// The protocol of an authority that checks whether a name is ours (RFC 8737).
pub const ALPN_ACME: &[u8] = b"acme-tls/1";

/// A certificate chain and its key, ready to be presented.
#[derive(Clone, Debug)]
pub struct Certificate {
    key: Arc<CertifiedKey>,
    /// What the leaf says about itself.
    pub facts: Facts,
}

impl Certificate {
    /// Reads a chain (leaf first) and its key.
    ///
    /// # Errors
    /// When one of them is missing or malformed, or they do not belong together.
    pub fn from_pem(cert_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertificateError> {
        let (chain, key) = read(cert_pem, key_pem)?;
        let key = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
            .map_err(CertificateError::Unusable)?;
        Ok(Self { key: Arc::new(key), facts: Facts::of_leaf(cert_pem)? })
    }

    /// The same for one that was just made here, and proves a name to an authority: it has a critical extension (RFC 8737),
    /// so that nobody else takes it for a certificate, nor the check whether its key is the right one.
    ///
    /// # Errors
    /// When one of them is missing or malformed.
    pub fn of_proof(cert_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertificateError> {
        let (chain, key) = read(cert_pem, key_pem)?;
        let key = aws_lc_rs::default_provider().key_provider.load_private_key(key);
        let key = CertifiedKey::new(chain, key.map_err(CertificateError::Unusable)?);
        Ok(Self { key: Arc::new(key), facts: Facts::of_leaf(cert_pem)? })
    }

    /// Reads both from files.
    ///
    /// # Errors
    /// One line for people, with the file.
    pub fn from_files(cert: &Path, key: &Path) -> Result<Self, String> {
        let read = |path: &Path| {
            std::fs::read(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))
        };
        Self::from_pem(&read(cert)?, &read(key)?).map_err(|error| {
            let at = if error.is_of_key() { key } else { cert };
            format!("{}: {error}", at.display())
        })
    }

    /// No client trusts it by itself: `turns:` is not offered then.
    #[must_use]
    pub fn is_self_signed(&self) -> bool {
        self.facts.self_signed
    }

    /// The leaf, in DER.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.key.cert[0]
    }
}

fn read(
    cert_pem: &[u8],
    key_pem: &[u8],
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), CertificateError> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(cert_pem).collect::<Result<_, _>>().map_err(in_cert)?;
    if chain.is_empty() {
        return Err(CertificateError::NoCertificate);
    }
    Ok((chain, PrivateKeyDer::from_pem_slice(key_pem).map_err(in_key)?))
}

/// Why a certificate cannot be served.
#[derive(Debug)]
pub enum CertificateError {
    NoCertificate,
    MalformedCertificate,
    NoKey,
    MalformedKey,
    /// The TLS library refuses it: most often, key and certificate do not belong together.
    Unusable(rustls::Error),
}

impl CertificateError {
    /// Whether the key's file is to blame, and not the certificate's.
    #[must_use]
    pub fn is_of_key(&self) -> bool {
        matches!(self, Self::NoKey | Self::MalformedKey | Self::Unusable(rustls::Error::InconsistentKeys(_)))
    }
}

impl fmt::Display for CertificateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCertificate => f.write_str("no CERTIFICATE block in PEM"),
            Self::MalformedCertificate => f.write_str("malformed certificate"),
            Self::NoKey => f.write_str("no PRIVATE KEY block in PEM (an encrypted key is not supported)"),
            Self::MalformedKey => f.write_str("malformed private key"),
            Self::Unusable(rustls::Error::InconsistentKeys(_)) => {
                f.write_str("the key does not belong to the certificate")
            }
            Self::Unusable(error) => write!(f, "{error}"),
        }
    }
}

/// Whether there is a certificate in it, and nothing that only looks like one.
#[must_use]
pub fn has_certificates(pem: &[u8]) -> bool {
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    read.is_ok_and(|certificates| !certificates.is_empty())
}

fn in_cert(_: pem::Error) -> CertificateError {
    CertificateError::MalformedCertificate
}

fn in_key(error: pem::Error) -> CertificateError {
    if matches!(error, pem::Error::NoItemsFound) {
        CertificateError::NoKey
    } else {
        CertificateError::MalformedKey
    }
}

/// What a leaf certificate says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Unix seconds, as the next one.
    pub not_before: i64,
    pub not_after: i64,
    /// DNS names and addresses it is for.
    pub names: Vec<String>,
    pub self_signed: bool,
}

impl Facts {
    /// Reads the first certificate of a chain.
    ///
    /// # Errors
    /// When there is none, or it is malformed.
    pub fn of_leaf(cert_pem: &[u8]) -> Result<Self, CertificateError> {
        let der = CertificateDer::from_pem_slice(cert_pem).map_err(|_| CertificateError::NoCertificate)?;
        let (_, leaf) =
            X509Certificate::from_der(&der).map_err(|_| CertificateError::MalformedCertificate)?;
        let [not_before, not_after] =
            [leaf.validity().not_before, leaf.validity().not_after].map(|at| at.timestamp());
        Ok(Self { not_before, not_after, names: names(&leaf), self_signed: leaf.issuer() == leaf.subject() })
    }

    /// Seconds until it ends; below 0 once it has.
    #[must_use]
    pub fn left(&self, now: Now) -> i64 {
        self.not_after - i64::try_from(now.unix()).unwrap_or(i64::MAX)
    }

    /// Its last second, for people (RFC 3339).
    #[must_use]
    pub fn end(&self) -> impl fmt::Display + use<> {
        let since_1970 = Duration::from_secs(self.not_after.try_into().unwrap_or(0));
        humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + since_1970)
    }
}

fn names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let extension = leaf.subject_alternative_name().ok().flatten();
    extension.iter().flat_map(|names| &names.value.general_names).filter_map(name).collect()
}

#[expect(clippy::wildcard_enum_match_arm, reason = "the other kinds of names are not for hosts")]
fn name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
        _ => None,
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::{Certificate, self_signed};

    fn refusal(cert: &str, key: &str) -> String {
        Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap_err().to_string()
    }

    fn pair() -> (String, String) {
        let key = self_signed::new_key().unwrap();
        (self_signed::generate(crate::clock::now(), &["localhost".to_owned()], &key).unwrap(), key)
    }

    #[test]
    fn certificate_and_key_belong_together() {
        let ((cert, key), (_, other_key)) = (pair(), pair());
        assert!(Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap().is_self_signed());
        assert_eq!(refusal(&cert, &other_key), "the key does not belong to the certificate");
    }

    #[test]
    fn what_is_missing_is_named() {
        let (cert, key) = pair();
        assert_eq!(refusal("", &key), "no CERTIFICATE block in PEM");
        assert_eq!(refusal(&key, &key), "no CERTIFICATE block in PEM");
        assert!(refusal(&cert, "").starts_with("no PRIVATE KEY block in PEM"));
        assert!(refusal(&cert, &cert).starts_with("no PRIVATE KEY block in PEM"));
        let rubbish = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_ne!(refusal(rubbish, &key), "");
    }
}
