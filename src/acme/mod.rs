//! Certificates from an authority (ACME, RFC 8555): obtained, kept in the data dir, presented, and renewed in time.
//!
//! Nothing waits for it: until the first certificate comes, the self-signed one is presented.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use instant_acme::{Account, AccountCredentials, CertificateIdentifier, NewAccount};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::{
    clock::{self, Now},
    config::Acme,
    data_dir::DataDir,
    tls::{Certificate, Facts, certificates::Certificates},
};

mod http; // requests to the authority
pub mod http01; // its questions on port 80
mod order; // one certificate: prove, sign, fetch

use http::Requests;
use http01::Tokens;
use order::Failure;

/// In the data dir: the chain and its key in one file, so that they are always of one piece.
const CERTIFICATE: &str = "acme.pem";
/// In the data dir: who we are to the authority.
const ACCOUNT: &str = "acme-account.json";
/// After the first failure, and at most. An authority bears five failures of a name in an hour.
const FIRST_WAIT: Duration = Duration::from_secs(8 * 60);
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3_600);
/// The clock of the wall may be set, and a machine may sleep: it is looked at that often.
const LOOK: Duration = Duration::from_secs(3_600);
/// How often an authority is asked when it wants a certificate renewed, whatever it says itself (RFC 9773 §4.3).
const ASK_AGAIN: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(86_400)];

/// Keeps one certificate, for all names of the configuration.
pub struct Keeper {
    acme: Acme,
    data_dir: DataDir,
    certificates: Arc<Certificates>,
    tokens: Tokens,
    requests: Requests,
    account: Option<Account>,
    wanted: Wanted,
}

/// What the authority says of when it wants the certificate renewed (ARI, RFC 9773).
#[derive(Default)]
struct Wanted {
    /// Unix seconds; `None` where it has no say.
    at: Option<i64>,
    ask: Option<Instant>,
}

/// Who we are to which authority.
#[derive(Serialize, Deserialize)]
struct Stored {
    directory: String,
    credentials: AccountCredentials,
}

impl Keeper {
    /// # Errors
    /// One line for people, when this system trusts no authority at all.
    pub fn new(
        acme: Acme,
        data_dir: DataDir,
        certificates: Arc<Certificates>,
        tokens: Tokens,
    ) -> Result<Self, String> {
        let (account, wanted) = (None, Wanted::default());
        Ok(Self { acme, data_dir, certificates, tokens, requests: Requests::new()?, account, wanted })
    }

    /// Until dropped. Who says `again` has mended something: then there is no waiting for the next try.
    pub async fn keep(mut self, again: Arc<Notify>) {
        let mut failures = 0;
        loop {
            let held = stored(&self.data_dir, &self.acme);
            if let Some(wait) = self.not_before(held.as_ref()).await {
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = again.notified() => self.wanted.ask = None,
                }
                continue;
            }
            let Err(failure) = self.obtain(held.as_ref(), failures == 0).await else {
                failures = 0;
                continue;
            };
            failures += 1;
            let wait = wait_after(failures).max(self.requests.retry_after(clock::now()));
            tracing::warn!(
                "no certificate for {} from {}: {failure}; the next try is in {}, or at a reload",
                self.acme.domains.join(", "),
                self.acme.directory,
                humantime::format_duration(Duration::from_secs(wait.as_secs()))
            );
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = again.notified() => {}
            }
        }
    }

    /// How long there is nothing to do.
    async fn not_before(&mut self, held: Option<&Certificate>) -> Option<Duration> {
        let held = held?;
        self.ask_when(held).await;
        let at = self.wanted.at.unwrap_or_else(|| two_thirds(&held.facts));
        let left = u64::try_from(at - unix(clock::now())).ok().filter(|left| *left > 0)?;
        let ask = self.wanted.ask.map(|ask| ask.saturating_duration_since(clock::now().mono));
        Some(Duration::from_secs(left).min(LOOK).min(ask.unwrap_or(LOOK)).max(Duration::from_secs(1)))
    }

    /// Asks the authority when it wants the certificate renewed, if it is time to and it has a say.
    async fn ask_when(&mut self, held: &Certificate) {
        if self.wanted.ask.is_some_and(|ask| clock::now().mono < ask) {
            return;
        }
        let [soon, late] = ASK_AGAIN;
        let answer = async {
            let id = CertificateIdentifier::try_from(held.leaf()).ok()?;
            self.account().await.ok()?.renewal_info(&id).await.ok()
        };
        let (at, again) = match answer.await {
            Some((info, again)) => {
                let [start, end] = [info.suggested_window.start, info.suggested_window.end];
                let [start, end] = [start, end].map(time::OffsetDateTime::unix_timestamp);
                // Anywhere in the window, so that not all come at once; what was drawn before holds while it is in there.
                let drawn = self.wanted.at.filter(|at| (start..=end).contains(at));
                (Some(drawn.unwrap_or_else(|| start + random_below(end - start))), again.clamp(soon, late))
            }
            None => (None, late),
        };
        self.wanted = Wanted { at, ask: Some(clock::now().mono + again) };
    }

    /// A new one: proven, signed, stored and presented.
    async fn obtain(&mut self, held: Option<&Certificate>, is_first: bool) -> Result<(), Failure> {
        // An authority that has been told once that this is the successor may refuse to hear it twice.
        let replaces = held.filter(|_| is_first && self.wanted.at.is_some());
        let replaces = replaces.and_then(|held| CertificateIdentifier::try_from(held.leaf()).ok());
        let replaces = replaces.map(CertificateIdentifier::into_owned);
        let (acme, certificates, tokens) =
            (self.acme.clone(), Arc::clone(&self.certificates), self.tokens.clone());
        let account = self.account().await?;
        let pem = order::certificate(account, &acme, replaces, &tokens, &certificates).await?;
        let certificate = parse(&pem).map_err(Failure::new)?;
        self.data_dir.keep(CERTIFICATE, pem.as_bytes()).map_err(Failure::new)?;
        self.certificates.announce(certificate);
        self.wanted = Wanted::default();
        Ok(())
    }

    /// The one in the data dir, else a new one.
    async fn account(&mut self) -> Result<&Account, Failure> {
        if self.account.is_none() {
            self.account = Some(self.open_account().await?);
        }
        Ok(self.account.as_ref().expect("it is there by now"))
    }

    async fn open_account(&self) -> Result<Account, Failure> {
        let directory = &self.acme.directory;
        let builder = || Account::builder_with_http(Box::new(self.requests.clone()));
        let stored = self.data_dir.kept(ACCOUNT).map_err(Failure::new)?;
        let stored = stored.and_then(|bytes| serde_json::from_slice::<Stored>(&bytes).ok());
        if let Some(stored) = stored.filter(|stored| stored.directory == *directory) {
            return Ok(builder().from_credentials(stored.credentials).await?);
        }
        let contact = self.acme.email.as_ref().map(|email| format!("mailto:{email}"));
        let new = NewAccount {
            contact: &contact.iter().map(String::as_str).collect::<Vec<_>>(),
            terms_of_service_agreed: true,
            only_return_existing: false,
        };
        let (account, credentials) = builder().create(&new, directory.clone(), None).await?;
        let stored = Stored { directory: directory.clone(), credentials };
        let bytes = serde_json::to_vec(&stored).expect("credentials are plain JSON");
        self.data_dir.keep(ACCOUNT, &bytes).map_err(Failure::new)?;
        Ok(account)
    }
}

/// The certificate in the data dir, if it is for the names of the configuration and has not ended.
#[must_use]
pub fn stored(data_dir: &DataDir, acme: &Acme) -> Option<Certificate> {
    let pem = data_dir.kept(CERTIFICATE).ok()??;
    let certificate = parse(std::str::from_utf8(&pem).ok()?).ok()?;
    let facts = &certificate.facts;
    let is_good = acme.domains.iter().all(|name| facts.names.contains(name)) && facts.left(clock::now()) > 0;
    is_good.then_some(certificate)
}

fn parse(pem: &str) -> Result<Certificate, crate::tls::CertificateError> {
    Certificate::from_pem(pem.as_bytes(), pem.as_bytes())
}

/// When it is renewed, if the authority has no say: a third of its life is left then.
fn two_thirds(facts: &Facts) -> i64 {
    facts.not_before + (facts.not_after - facts.not_before) / 3 * 2
}

/// Twice as long after each failure, and not at the same second as everybody else.
fn wait_after(failures: u32) -> Duration {
    let wait = FIRST_WAIT.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_WAIT);
    wait + Duration::from_secs(random_below(wait.as_secs() as i64 / 8) as u64)
}

fn unix(now: Now) -> i64 {
    i64::try_from(now.unix()).unwrap_or(i64::MAX)
}

/// At least 0, and below `end`, if that is more.
fn random_below(end: i64) -> i64 {
    let mut bytes = [0; 8];
    aws_lc_rs::rand::fill(&mut bytes).expect("the operating system has randomness");
    (u64::from_ne_bytes(bytes) % u64::try_from(end).unwrap_or(0).max(1)) as i64
}

#[cfg(test)]
mod tests {
    use super::{FIRST_WAIT, LONGEST_WAIT, random_below, two_thirds, wait_after};
    use crate::tls::Facts;

    #[test]
    fn a_third_of_its_life_is_left_at_the_renewal() {
        let facts = Facts { not_before: 1_000, not_after: 4_000, names: vec![], self_signed: false };
        assert_eq!(two_thirds(&facts), 3_000);
    }

    #[test]
    fn tries_become_rare_and_never_stop() {
        for failures in 1..100 {
            let least = FIRST_WAIT.saturating_mul(1 << (failures - 1_u32).min(16)).min(LONGEST_WAIT);
            assert!((least..=least + least / 8).contains(&wait_after(failures)), "{failures}");
        }
        assert!((0..100).all(|_| (0..3).contains(&random_below(3)) && random_below(0) == 0));
    }
}
