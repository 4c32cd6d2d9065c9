//! The public keys of an outside issuer: read from a file or fetched over HTTPS, again and again, for issuers change them.
//!
//! Keys that are known stay good until others are there: an issuer that cannot be reached locks nobody out. What was fetched is
//! kept in the data dir, for a start while the issuer is down.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use crate::{
    clock,
    credentials::issuer::PublicKeys,
    data_dir::DataDir,
    tls::{
        self,
        files::{LOOK, stamp},
    },
};

/// Bytes of a JWK set.
const MAX_SET: usize = 256 << 10;

/// For one request, with its answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a URL is fetched where its answer does not say (`Cache-Control: max-age`), and the bounds of what it may say.
const DEFAULT_AGE: Duration = Duration::from_secs(900);
const MIN_AGE: Duration = Duration::from_secs(60);
const MAX_AGE: Duration = Duration::from_secs(86_400);

/// After a failure.
const AGAIN: Duration = Duration::from_secs(60);

/// Strangers' tokens make us ask no more often than that.
const APART: Duration = Duration::from_secs(10);

/// The last set that was fetched, in the data dir.
const KEPT: &str = "jwks.json";

/// Where an issuer shows its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// On this host.
    File(PathBuf),
    /// `https://…`
    Url(Uri),
}

/// An issuer's keys, followed.
pub struct Jwks {
    source: Source,
    keys: PublicKeys,
    data_dir: DataDir,
    /// Somebody needs a key that is not known.
    wanted: Notify,
    /// When the source was last asked, and the answer taken in.
    asked: watch::Sender<Option<Instant>>,
}

/// What is kept of a URL.
#[derive(Serialize, Deserialize)]
struct Kept<'a> {
    url: String,
    #[serde(borrow)]
    set: &'a RawValue,
}

impl Jwks {
    /// Reads the file, or what was kept of the URL; [`Self::follow`] does the rest.
    ///
    /// # Errors
    /// One line for people: a file must be there. A URL need not answer yet.
    pub fn open(source: Source, data_dir: DataDir) -> Result<Arc<Self>, String> {
        let jwks = Self {
            source,
            keys: PublicKeys::default(),
            data_dir,
            wanted: Notify::new(),
            asked: watch::channel(None).0,
        };
        match &jwks.source {
            Source::File(path) => {
                jwks.read(path).map_err(|why| format!("auth.jwks: {}: {why}", path.display()))?;
            }
            Source::Url(url) => jwks.remember(url),
        }
        Ok(Arc::new(jwks))
    }

    /// As far as they are known.
    #[must_use]
    pub fn keys(&self) -> PublicKeys {
        self.keys.clone()
    }

    /// A token names a key that is not known. Whether the issuer is asked for it, and it makes sense to try again soon: not if it
    /// was asked a moment ago.
    #[must_use]
    pub fn ask(&self) -> bool {
        let asked = *self.asked.borrow();
        let a_moment = match self.source {
            // A look at a file costs nothing.
            Source::File(_) => Duration::ZERO,
            Source::Url(_) => APART,
        };
        let may_ask = asked.is_none_or(|asked| asked + a_moment <= clock::now().mono);
        if may_ask {
            self.wanted.notify_one();
        }
        may_ask
    }

    /// The same, and waits for the answer.
    pub async fn ask_and_wait(&self) -> bool {
        let mut asked = self.asked.subscribe();
        // What has been answered before is no answer.
        asked.mark_unchanged();
        self.ask() && matches!(timeout(PATIENCE, asked.changed()).await, Ok(Ok(())))
    }

    /// Asks as often as is due, or wanted. Never returns.
    pub async fn follow(self: Arc<Self>) {
        match &self.source {
            Source::File(path) => self.follow_file(path).await,
            Source::Url(url) => self.follow_url(url).await,
        }
    }

    async fn follow_file(&self, path: &Path) {
        let mut known = stamp(path);
        loop {
            // Whoever wants a key waits for this look.
            let _ = timeout(LOOK, self.wanted.notified()).await;
            let now = stamp(path);
            if now != known {
                known = now;
                if let Err(why) = self.read(path) {
                    self.warn(&path.display().to_string(), &why);
                }
            }
            self.asked.send_replace(Some(clock::now().mono));
        }
    }

    fn read(&self, path: &Path) -> Result<(), String> {
        let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
        if length > MAX_SET as u64 {
            return Err(too_large());
        }
        let set = fs::read(path).map_err(|error: io::Error| error.to_string())?;
        self.keys.adopt(&set)
    }

    async fn follow_url(&self, url: &Uri) {
        let mut failed = false;
        loop {
            let wait = match self.fetch(url).await {
                Ok(age) => {
                    if std::mem::take(&mut failed) {
                        tracing::info!("{url} shows the issuer's keys again");
                    }
                    age
                }
                Err(why) => {
                    if !std::mem::replace(&mut failed, true) {
                        self.warn(&url.to_string(), &why);
                    }
                    AGAIN
                }
            };
            self.asked.send_replace(Some(clock::now().mono));
            let _ = timeout(wait, self.wanted.notified()).await;
        }
    }

    fn warn(&self, source: &str, why: &str) {
        tracing::warn!(
            "the issuer's keys at {source} cannot be had, and those known before stay good: {why}"
        );
    }

    /// Gives how long it may be before the next time.
    async fn fetch(&self, url: &Uri) -> Result<Duration, String> {
        // Anew each time: whom this system trusts changes within the years that a process may run.
        let client = Client::builder(TokioExecutor::new()).build(tls::connector()?);
        let request = Request::get(url)
            .header(header::ACCEPT, "application/jwk-set+json, application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let answer = async {
            let answer = client.request(request).await.map_err(|error| tls::root_of(&error))?;
            if answer.status() != StatusCode::OK {
                return Err(format!("it answers {}", answer.status()));
            }
            let age = max_age(answer.headers().get(header::CACHE_CONTROL));
            let body = Limited::new(answer.into_body(), MAX_SET).collect().await;
            Ok((age, body.map_err(|_| too_large())?.to_bytes()))
        };
        let (age, set) = timeout(PATIENCE, answer).await.map_err(|_| "it does not answer".to_owned())??;
        self.keys.adopt(&set)?;
        self.keep(url, &set);
        Ok(age)
    }

    fn keep(&self, url: &Uri, set: &[u8]) {
        let Ok(set) = serde_json::from_slice(set) else { return };
        let kept = serde_json::to_vec(&Kept { url: url.to_string(), set }).expect("it was JSON before");
        if self.data_dir.kept(KEPT).is_ok_and(|before| before.is_some_and(|before| before == kept)) {
            return;
        }
        if let Err(error) = self.data_dir.keep(KEPT, &kept) {
            tracing::warn!("the issuer's keys are not kept for the next start: {error}");
        }
    }

    /// Only what came from the same URL.
    fn remember(&self, url: &Uri) {
        let Ok(Some(bytes)) = self.data_dir.kept(KEPT) else { return };
        if let Ok(kept) = serde_json::from_slice::<Kept<'_>>(&bytes)
            && kept.url == url.to_string()
        {
            // What is no good any more is fetched in a moment.
            let _ = self.keys.adopt(kept.set.get().as_bytes());
        }
    }
}

fn too_large() -> String {
    format!("it is over {} KiB", MAX_SET >> 10)
}

/// As RFC 9111 §5.2.2.1 has it, within our bounds.
fn max_age(cache_control: Option<&header::HeaderValue>) -> Duration {
    let directives = cache_control.and_then(|value| value.to_str().ok()).unwrap_or_default().split(',');
    let seconds =
        directives.filter_map(|directive| directive.trim().strip_prefix("max-age=")?.parse().ok()).next();
    seconds.map_or(DEFAULT_AGE, Duration::from_secs).clamp(MIN_AGE, MAX_AGE)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{DEFAULT_AGE, header::HeaderValue, max_age};

    #[test]
    fn the_answer_says_how_long_it_is_good_for() {
        let age = |value| max_age(Some(&HeaderValue::from_static(value)));
        assert_eq!(age("public, max-age=600, must-revalidate"), Duration::from_secs(600));
        assert_eq!(age("max-age=0"), Duration::from_secs(60));
        assert_eq!(age("max-age=99999999"), Duration::from_secs(86_400));
        assert_eq!(age("no-store"), DEFAULT_AGE);
        assert_eq!(max_age(None), DEFAULT_AGE);
    }
}
