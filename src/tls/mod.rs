//! Certificates: read from PEM, judged, and made into what a TLS listener needs.

use std::{fmt, net::IpAddr, path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

pub mod self_signed; // the certificate of a first start

/// What a relay client may say that it speaks (RFC 7443).
pub const ALPN_RELAY: [&[u8]; 2] = [b"stun.turn", b"stun.nat-discovery"];
/// HTTP/2 (RFC 9113).
pub const ALPN_H2: &[u8] = b"h2";

/// A certificate chain and its key, ready to be served.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub config: Arc<ServerConfig>,
    /// No client trusts it by itself: `turns:` is not offered then.
    pub self_signed: bool,
}

impl Certificate {
    /// Reads a chain (leaf first) and its key.
    ///
    /// # Errors
    /// When one of them is missing or malformed, or they do not belong together.
    pub fn from_pem(cert_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertificateError> {
        let config = server_config(cert_pem, key_pem)?;
        let self_signed = Facts::of_leaf(cert_pem)?.self_signed;
        Ok(Self { config, self_signed })
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
}

/// What a TLS listener needs to serve HTTP and the relay with this certificate.
///
/// # Errors
/// When one of them is missing or malformed, or they do not belong together.
pub fn server_config(cert_pem: &[u8], key_pem: &[u8]) -> Result<Arc<ServerConfig>, CertificateError> {
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(cert_pem).collect::<Result<_, _>>().map_err(in_cert)?;
    if chain.is_empty() {
        return Err(CertificateError::NoCertificate);
    }
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(in_key)?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
        .map_err(CertificateError::Unusable)?;
    config.alpn_protocols =
        [&ALPN_RELAY[..], &[ALPN_H2, b"http/1.1"]].concat().iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
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
    /// Unix seconds.
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
        let not_after = leaf.validity().not_after.timestamp();
        Ok(Self { not_after, names: names(&leaf), self_signed: leaf.issuer() == leaf.subject() })
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
        assert!(Certificate::from_pem(cert.as_bytes(), key.as_bytes()).unwrap().self_signed);
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
