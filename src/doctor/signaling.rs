//! Signaling: a WebSocket that is not made a session.
//!
//! A hello would take over the session of the agent whose token this is, and throw a working agent out. So nothing is said but
//! a WebSocket ping: that the upgrade was granted shows that the token is good, and the pong that frames get through.

use std::{fmt, time::Duration};

use futures_util::{SinkExt, StreamExt};
use hyper::header::{AUTHORIZATION, HeaderValue};
use tokio::time::timeout;
use tokio_websockets::{ClientBuilder, Error, Message, upgrade};

use super::{Check, PATIENCE, Visit, https::Server, now};

const INSTEAD: &str =
    "something on the way breaks WebSockets; agents can signal by GET and POST /v1/signal instead";

pub(super) async fn checked(server: &Server, visit: &Visit) -> Check {
    let started = now();
    match timeout(PATIENCE, ponged(server, visit)).await {
        Ok(Ok(trip)) => {
            let trip = trip.as_secs_f64() * 1_000.0;
            let detail = format!("frames get through, {trip:.1} ms there and back; no session was taken");
            Check::ok("wss", detail).after(now() - started)
        }
        Ok(Err(Failed::Refused(401 | 403))) => Check::fail(
            "wss",
            "the token is not for signaling",
            "make one with the scope: halfway token AGENT --scope signal,ice",
        ),
        // Plain HTTPS got through before, and is what stands in for it.
        Ok(Err(problem)) => Check::warn("wss", problem.to_string(), INSTEAD),
        Err(_) => Check::warn("wss", "no answer", INSTEAD),
    }
}

/// Why there is no WebSocket.
enum Failed {
    Refused(u16),
    Other(String),
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status) => write!(f, "the upgrade is answered {status}"),
            Self::Other(problem) => f.write_str(problem),
        }
    }
}

impl From<&str> for Failed {
    fn from(problem: &str) -> Self {
        Self::Other(problem.to_owned())
    }
}

impl From<String> for Failed {
    fn from(problem: String) -> Self {
        Self::Other(problem)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        match error {
            Error::Upgrade(upgrade::Error::DidNotSwitchProtocols(status)) => Self::Refused(status),
            other => Self::Other(other.to_string()),
        }
    }
}

async fn ponged(server: &Server, visit: &Visit) -> Result<Duration, Failed> {
    let uri = format!("ws://{}/v1/ws", server.authority());
    let token =
        HeaderValue::try_from(format!("Bearer {}", visit.token)).map_err(|_| "the token is no token")?;
    let upgrade = ClientBuilder::new().uri(&uri).map_err(|error| error.to_string())?;
    let upgrade = upgrade.add_header(AUTHORIZATION, token).map_err(|error| error.to_string())?;
    let (mut socket, _) = upgrade.connect_on(server.connection().await?).await?;
    let sent = now();
    socket.send(Message::ping("halfway")).await?;
    while !heard(socket.next().await)?.is_pong() {}
    let trip = now() - sent;
    let _ = socket.close().await;
    Ok(trip)
}

/// The next message of those that may come before the pong.
fn heard(next: Option<Result<Message, Error>>) -> Result<Message, Failed> {
    let message = next.ok_or("the connection ended")??;
    if message.is_close() { Err("closed at once".into()) } else { Ok(message) }
}
