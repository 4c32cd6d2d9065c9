//! What our own requests over HTTPS go by: this system's authorities, and no others.

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::crypto::aws_lc_rs;

/// Connects over HTTPS and nothing else.
///
/// # Errors
/// One line for people, when this system trusts nobody.
pub fn connector() -> Result<HttpsConnector<HttpConnector>, String> {
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_native_roots(aws_lc_rs::default_provider())
        .map_err(|error| format!("this system has no authorities to trust: {error} (see ca-certificates)"))?;
    Ok(connector.https_only().enable_http1().build())
}

/// A client's own words are that something went wrong; what did is beneath.
#[must_use]
pub fn root_of(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
