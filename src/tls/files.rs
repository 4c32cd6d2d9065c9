//! A certificate that somebody else renews: its files are looked at, and taken when they have changed.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{Certificate, certificates::Certificates};
use crate::clock;

/// How often the files are looked at.
pub const LOOK: Duration = Duration::from_secs(5);
/// Looks at files that do not go together, before that is said: one may be written after the other.
const PATIENCE: u32 = 2;
/// Days before its end that a certificate is warned of; whoever renews it should have.
const WARN_BEFORE: i64 = 14;
const DAY: i64 = 86_400;

/// The chain and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The leaf first.
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// What tells one version of a file from another.
pub type Stamp = (u64, i64, i64, u64);

/// That of a file, if it is there; links are followed.
#[must_use]
pub fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|it| (it.ino(), it.mtime(), it.mtime_nsec(), it.size()))
}

impl Files {
    fn stamp(&self) -> Option<[Stamp; 2]> {
        Some([stamp(&self.cert)?, stamp(&self.key)?])
    }

    /// Reads both.
    ///
    /// # Errors
    /// One line for people, with the file.
    pub fn read(&self) -> Result<Certificate, String> {
        Certificate::from_files(&self.cert, &self.key)
    }
}

/// Presents what is in the files, as often as that changes, until dropped.
pub async fn follow(files: Files, certificates: Arc<Certificates>) {
    let (mut known, mut failures, mut warned) = (files.stamp(), 0, None);
    loop {
        warn_of_end(&files, &certificates, &mut warned);
        tokio::time::sleep(LOOK).await;
        let now = files.stamp();
        if now == known {
            continue;
        }
        match files.read() {
            Ok(certificate) => {
                certificates.announce(certificate);
                (known, failures) = (now, 0);
            }
            Err(why) => {
                failures += 1;
                if failures == PATIENCE {
                    tracing::warn!(
                        "the certificate's files have changed, and the old one is presented still: {why}"
                    );
                }
            }
        }
    }
}

/// Once a day.
fn warn_of_end(files: &Files, certificates: &Certificates, warned: &mut Option<i64>) {
    let facts = certificates.facts();
    let days = facts.left(clock::now()).div_euclid(DAY);
    if days < WARN_BEFORE && *warned != Some(days) {
        *warned = Some(days);
        let cert = files.cert.display();
        tracing::warn!("{cert} ends at {}, in {days} days: renew it", facts.end());
    }
}
