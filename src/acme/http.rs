//! Requests to the authority.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use hyper::{Request, StatusCode, header};
use hyper_rustls::HttpsConnector;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use instant_acme::{BodyWrapper, BytesResponse, Error, HttpClient};

use crate::{clock::Now, tls};

/// For one request, with its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// An HTTPS client that trusts whom this system trusts, and remembers when it was told to come again.
#[derive(Clone)]
pub(super) struct Requests {
    client: Client<HttpsConnector<HttpConnector>, BodyWrapper<Bytes>>,
    /// Unix seconds.
    not_before: Arc<AtomicU64>,
}

impl Requests {
    pub(super) fn new() -> Result<Self, String> {
        let client = Client::builder(TokioExecutor::new()).build(tls::connector()?);
        Ok(Self { client, not_before: Arc::default() })
    }

    /// How long the authority does not want to hear of us (RFC 8555 §6.6).
    pub(super) fn retry_after(&self, now: Now) -> Duration {
        Duration::from_secs(self.not_before.load(Relaxed).saturating_sub(now.unix()))
    }
}

impl HttpClient for Requests {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, Error>> + Send>> {
        let (answer, not_before) = (self.client.request(request), Arc::clone(&self.not_before));
        Box::pin(async move {
            let answer = tokio::time::timeout(PATIENCE, answer)
                .await
                .map_err(|_| Error::Other("the authority does not answer".into()))?
                .map_err(|error| {
                    Error::Other(format!("the authority cannot be reached: {}", tls::root_of(&error)).into())
                })?;
            if matches!(answer.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
                let seconds = answer.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok());
                let seconds = seconds.and_then(|after| after.parse::<u64>().ok()).unwrap_or(0);
                not_before.store(crate::clock::now().unix().saturating_add(seconds.min(86_400)), Relaxed);
            }
            Ok(BytesResponse::from(answer))
        })
    }
}
