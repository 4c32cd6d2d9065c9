//! `halfway doctor`: how a server looks from here, or what this host lacks for one.

use std::path::PathBuf;

use clap::Args;
use hyper::Uri;

use super::{Failure, print};
use crate::{
    config::Config,
    doctor::{self, Diagnosis, Visit, local},
};

#[derive(Args)]
pub(super) struct Options {
    /// The server: https://HOST[:PORT]
    #[arg(required_unless_present = "local")]
    url: Option<Uri>,
    /// An agent's token: `halfway token AGENT` on the server makes one
    #[arg(long, value_name = "TOKEN", required_unless_present = "local")]
    token: Option<String>,
    /// Examine this host instead: its rights, kernel and limits
    #[arg(long, conflicts_with = "url")]
    local: bool,
    /// Certificates to trust beside the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Go on, and send the token, although nobody vouches for the server
    #[arg(long)]
    insecure: bool,
    /// An HTTPS proxy (CONNECT) to go through [default: HTTPS_PROXY, where there is no other way]
    #[arg(long, value_name = "http://HOST:PORT")]
    proxy: Option<Uri>,
    /// Another STUN server, at another address: tells full-cone NATs from address-restricted ones for certain
    #[arg(long, value_name = "HOST[:PORT]")]
    stun: Option<String>,
    /// Prints JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options, config: &Config) -> Result<(), Failure> {
    let diagnosis = match (&options.url, &options.token) {
        (Some(url), Some(token)) => doctor::examine(&visit(options, url, token)).map_err(Failure::Failed)?,
        _ => local::examine(config),
    };
    print(&if options.json { diagnosis.json().to_string() } else { diagnosis.text() })?;
    failed(&diagnosis)
}

fn visit(options: &Options, url: &Uri, token: &str) -> Visit {
    Visit {
        url: url.clone(),
        token: token.to_owned(),
        ca: options.ca.clone(),
        insecure: options.insecure,
        proxy: options.proxy.clone(),
        stun: options.stun.clone(),
    }
}

fn failed(diagnosis: &Diagnosis) -> Result<(), Failure> {
    if diagnosis.is_sound() {
        Ok(())
    } else {
        Err(Failure::Failed("something failed, as the lines above say".to_owned()))
    }
}
