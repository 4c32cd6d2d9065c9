//! One certificate: the authority is asked for it, checks that the names are ours, signs.

use std::{fmt, net::IpAddr, time::Duration};

use instant_acme::{
    Account, AuthorizationStatus, CertificateIdentifier, ChallengeType, Identifier, NewOrder, Order,
    OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, CustomExtension, KeyPair};

use super::http01::Tokens;
use crate::{
    config::Acme,
    tls::{Certificate, certificates::Certificates},
};

/// For the authority to look at our answers, and again to sign.
const PATIENCE: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(120));
/// What authorities call their certificates of a few days, the only ones for addresses.
const SHORT_LIVED: &str = "shortlived";

/// Why there is no certificate, in one line for people.
#[derive(Debug)]
pub(super) struct Failure(String);

impl Failure {
    pub(super) fn new(why: impl fmt::Display) -> Self {
        // What an authority says may have several lines, and be long.
        let line = why.to_string().replace(|c: char| c.is_control(), " ");
        Self(line.chars().take(400).collect())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<instant_acme::Error> for Failure {
    fn from(error: instant_acme::Error) -> Self {
        Self::new(error)
    }
}

/// The chain and its key, in PEM. Port 80 is tried first; where the authority does not get an answer there, TLS.
pub(super) async fn certificate(
    account: &Account,
    acme: &Acme,
    replaces: Option<CertificateIdentifier<'static>>,
    tokens: &Tokens,
    certificates: &Certificates,
) -> Result<String, Failure> {
    let proofs = Proofs { tokens, certificates, names: Vec::new() };
    let on_80 = match order(account, acme, replaces, ChallengeType::Http01, proofs).await {
        Ok(pem) => return Ok(pem),
        Err(failure) => failure,
    };
    let proofs = Proofs { tokens, certificates, names: Vec::new() };
    order(account, acme, None, ChallengeType::TlsAlpn01, proofs).await.map_err(|on_443| {
        if on_80.0 == on_443.0 { on_80 } else { Failure(format!("over HTTP: {on_80}; over TLS: {on_443}")) }
    })
}

async fn order(
    account: &Account,
    acme: &Acme,
    replaces: Option<CertificateIdentifier<'static>>,
    kind: ChallengeType,
    mut proofs: Proofs<'_>,
) -> Result<String, Failure> {
    let identifier =
        |name: &String| name.parse::<IpAddr>().map_or_else(|_| Identifier::Dns(name.clone()), Identifier::Ip);
    let identifiers: Vec<_> = acme.domains.iter().map(identifier).collect();
    let has_address = identifiers.iter().any(|identifier| matches!(identifier, Identifier::Ip(_)));
    let mut new = NewOrder::new(&identifiers);
    if let Some(replaces) = replaces {
        new = new.replaces(replaces);
    }
    if has_address && account.profiles().any(|profile| profile.name == SHORT_LIVED) {
        new = new.profile(SHORT_LIVED);
    }
    let mut order = account.new_order(&new).await?;
    prove_all(&mut order, kind, &mut proofs).await?;
    if order.poll_ready(&PATIENCE).await? != OrderStatus::Ready {
        return Err(why_refused(&mut order).await);
    }
    let key = order.finalize().await?;
    let chain = order.poll_certificate(&PATIENCE).await?;
    Ok(format!("{key}{chain}"))
}

async fn prove_all(order: &mut Order, kind: ChallengeType, proofs: &mut Proofs<'_>) -> Result<(), Failure> {
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Valid {
            continue;
        }
        let name = authorization.identifier().to_string();
        let mut challenge = authorization
            .challenge(kind.clone())
            .ok_or_else(|| Failure(format!("{name}: the authority does not check in this way")))?;
        let proof = challenge.key_authorization();
        if kind == ChallengeType::Http01 {
            proofs.tokens.put(&challenge.token, proof.as_str());
            proofs.names.push(challenge.token.clone());
        } else {
            let certificate = proof_by_tls(&name, proof.digest().as_ref()).map_err(Failure::new)?;
            proofs.certificates.prove(&name, Some(&certificate));
            proofs.names.push(name);
        }
        challenge.set_ready().await?;
    }
    Ok(())
}

/// RFC 8737 §3: self-signed, for that name alone, with the proof in an extension.
fn proof_by_tls(name: &str, digest: &[u8]) -> Result<Certificate, Failure> {
    let make = || {
        let mut params = CertificateParams::new([name.to_owned()])?;
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
        let key = KeyPair::generate()?;
        Ok::<_, rcgen::Error>((params.self_signed(&key)?.pem(), key.serialize_pem()))
    };
    let (cert, key) = make().map_err(Failure::new)?;
    Certificate::of_proof(cert.as_bytes(), key.as_bytes()).map_err(Failure::new)
}

/// What the authority found when it looked.
async fn why_refused(order: &mut Order) -> Failure {
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        if authorization.refresh().await.is_err() {
            break;
        }
        let name = authorization.identifier().to_string();
        if let Some(problem) = authorization.challenges.iter().find_map(|challenge| challenge.error.as_ref())
        {
            let detail = problem.detail.as_deref().unwrap_or("no reason given");
            return Failure::new(format!("{name} was not found to be ours: {detail}"));
        }
    }
    Failure::new("the authority refuses the order, and does not say why")
}

/// What is shown to the authority, until it has looked.
struct Proofs<'a> {
    tokens: &'a Tokens,
    certificates: &'a Certificates,
    /// Tokens, or names.
    names: Vec<String>,
}

impl Drop for Proofs<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            self.tokens.remove(name);
            self.certificates.prove(name, None);
        }
    }
}
