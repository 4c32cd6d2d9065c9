//! Port 80: what an authority asks for there (RFC 8555 §8.3), and for everybody else the way to HTTPS.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode, Uri,
    body::{Bytes, Incoming},
    header::{self, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

use crate::door::{self, Door};

/// For one request and its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const MAX_HEAD: usize = 8 * 1024;
const PATH: &str = "/.well-known/acme-challenge/";

/// What the authority will ask for, and the answers. Only our own orders put something here.
#[derive(Clone, Debug, Default)]
pub struct Tokens(Arc<Mutex<HashMap<String, String>>>);

impl Tokens {
    pub(super) fn put(&self, token: &str, answer: &str) {
        self.lock().insert(token.to_owned(), answer.to_owned());
    }

    pub(super) fn remove(&self, token: &str) {
        self.lock().remove(token);
    }

    fn answer(&self, path: &str) -> Option<String> {
        self.lock().get(path.strip_prefix(PATH)?).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers until `shutdown` turns true. `https` is the port that everybody else is sent to.
pub async fn serve(
    listener: TcpListener,
    tokens: Tokens,
    door: Arc<Door>,
    https: u16,
    shutdown: watch::Receiver<bool>,
) {
    let welcome = |stream: TcpStream, client: IpAddr| {
        let (permit, tokens) = (door.admit(client)?, tokens.clone());
        Some(async move {
            // Who takes longer gets nothing.
            let _ = timeout(PATIENCE, answer_one(stream, &tokens, https)).await;
            drop(permit);
        })
    };
    door::listen(&listener, shutdown, welcome).await;
}

async fn answer_one(stream: TcpStream, tokens: &Tokens, https: u16) -> Result<(), hyper::Error> {
    let answer = |request: Request<Incoming>| {
        let answer = tokens.answer(request.uri().path()).map_or_else(|| redirect(&request, https), show);
        async { Ok::<_, Infallible>(answer) }
    };
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await
}

fn show(answer: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(answer));
    let octets = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, octets);
    response
}

/// To the same host, path and query.
fn redirect(request: &Request<Incoming>, https: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Uri>().ok());
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let location = host.as_ref().and_then(Uri::host).and_then(|host| {
        let port = if https == 443 { String::new() } else { format!(":{https}") };
        HeaderValue::try_from(format!("https://{host}{port}{path}")).ok()
    });
    if let Some(location) = location {
        *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}
