//! Which certificate is presented, and who keeps it fresh: its files, an authority, or nobody but ourselves.

use std::{net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::Notify, task::JoinHandle};

use crate::{
    acme::{self, http01::Tokens},
    clock,
    config::Config,
    data_dir::DataDir,
    host::Relays,
    tls::{Certificate, certificates::Certificates, files, self_signed},
};

/// A self-signed one is looked at that often, whether it nears its end.
const LOOK: Duration = Duration::from_secs(86_400);

/// All about certificates.
pub(super) struct Keeping {
    pub(super) certificates: Arc<Certificates>,
    /// Answers for an authority on port 80.
    pub(super) tokens: Tokens,
    /// Names of a self-signed one.
    names: Vec<String>,
    keeper: JoinHandle<()>,
    /// Whoever waits to try again tries at once.
    again: Arc<Notify>,
}

impl Keeping {
    /// The first one, whatever there is. Nobody keeps it yet.
    ///
    /// # Errors
    /// One line for people.
    pub(super) fn new(config: &Config, relays: &Relays) -> Result<Self, String> {
        let public: Vec<IpAddr> = relays.addresses.iter().map(|relay| relay.public).collect();
        let names = self_signed::names(config.public_host.as_deref(), &public);
        let certificates = Certificates::new(first(config, &names)?);
        let nobody = tokio::spawn(async {});
        Ok(Self { certificates, tokens: Tokens::default(), names, keeper: nobody, again: Arc::default() })
    }

    /// Keeps it fresh, as the configuration says.
    pub(super) fn keep(&mut self, config: &Config) {
        self.keeper.abort();
        let certificates = Arc::clone(&self.certificates);
        let data_dir = DataDir::new(&config.data_dir);
        self.keeper = if let Some(files) = config.http.certificate.clone() {
            tokio::spawn(files::follow(files, certificates))
        } else if let Some(acme) = config.http.acme.clone() {
            match acme::Keeper::new(acme, data_dir, certificates, self.tokens.clone()) {
                Ok(keeper) => tokio::spawn(keeper.keep(Arc::clone(&self.again))),
                Err(why) => {
                    tracing::error!("no certificate is obtained: {why}");
                    return;
                }
            }
        } else {
            tokio::spawn(renew_self_signed(data_dir, self.names.clone(), certificates))
        };
    }

    /// The files may be others, or have changed; and an authority is asked at once, if it was to be asked again.
    pub(super) fn reload(&mut self, old: &Config, new: &Config) {
        if let Some(files) = &new.http.certificate {
            match files.read() {
                Ok(certificate) => self.certificates.present(certificate),
                Err(why) => tracing::warn!("the certificate is not reloaded: {why}"),
            }
        }
        if old.http.certificate == new.http.certificate && old.http.acme == new.http.acme {
            return self.again.notify_one();
        }
        if new.http.certificate.is_none() {
            match first(new, &self.names) {
                Ok(certificate) => self.certificates.present(certificate),
                Err(why) => tracing::warn!("the old certificate is presented still: {why}"),
            }
        }
        self.keep(new);
    }

    /// Another process does from now on.
    pub(super) fn stop(&self) {
        self.keeper.abort();
    }

    pub(super) fn is_self_signed(&self) -> bool {
        self.certificates.facts().self_signed
    }

    /// What an agent on this host has to trust, if nobody else vouches for it.
    pub(super) fn to_trust(&self, config: &Config) -> Option<PathBuf> {
        let file = config.http.certificate.as_ref().map(|files| files.cert.clone());
        self.is_self_signed().then(|| file.unwrap_or_else(|| DataDir::new(&config.data_dir).cert_path()))
    }
}

fn first(config: &Config, names: &[String]) -> Result<Certificate, String> {
    let data_dir = DataDir::new(&config.data_dir);
    if let Some(files) = &config.http.certificate {
        return files.read();
    }
    let obtained = config.http.acme.as_ref().and_then(|acme| acme::stored(&data_dir, acme));
    let own = || data_dir.certificate(clock::now(), names).map_err(|error| error.to_string());
    obtained.map_or_else(own, Ok)
}

async fn renew_self_signed(data_dir: DataDir, names: Vec<String>, certificates: Arc<Certificates>) {
    loop {
        tokio::time::sleep(LOOK).await;
        match data_dir.certificate(clock::now(), &names) {
            Ok(certificate) if certificate.facts != certificates.facts() => certificates.present(certificate),
            Ok(_) => {}
            Err(why) => tracing::warn!("the self-signed certificate cannot be renewed: {why}"),
        }
    }
}
