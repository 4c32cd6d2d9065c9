//! Signaling: a WebSocket that is not made a session.
//!
//! A hello would take over the session of the agent whose token this is, and throw a working agent out. So nothing is said but
//! a WebSocket ping: that the upgrade was granted shows that the token is good, and the pong that frames get through.

use futures_util::{SinkExt, StreamExt};
use hyper::{
    StatusCode,
    header::{AUTHORIZATION, HeaderValue},
};
use tokio::time::timeout;
use tokio_websockets::{ClientBuilder, Message};

use super::{Check, PATIENCE, Visit, https::Server, now};

pub(super) async fn checked(server: &Server, visit: &Visit) -> Vec<Check> {
    let started = now();
    let problem = match timeout(PATIENCE, ponged(server, visit)).await {
        Ok(Ok(trip)) => {
            let detail = format!("frames get through, {:.1} ms there and back", trip.as_secs_f64() * 1_000.0);
            return vec![Check::ok("wss", detail).after(now() - started)];
        }
        Ok(Err(problem)) => problem,
        Err(_) => "no answer".to_owned(),
    };
    // What stands in for it needs no more than HTTPS.
    match server.get("/v1/agents?limit=1", Some(&visit.token)).await {
        Ok((status, _)) if status != StatusCode::UNAUTHORIZED && status != StatusCode::FORBIDDEN => {
            let advice =
                "something on the way breaks WebSockets; agents can signal by GET and POST /v1/signal";
            vec![Check::warn("wss", problem, advice), Check::ok("signal", "plain HTTPS gets through")]
        }
        _ => vec![Check::fail("wss", problem, "is the token for signaling (scope signal)?")],
    }
}

async fn ponged(server: &Server, visit: &Visit) -> Result<std::time::Duration, String> {
    let uri = format!("ws://{}/v1/ws", server.authority());
    let token =
        HeaderValue::try_from(format!("Bearer {}", visit.token)).map_err(|_| "the token is no token")?;
    let upgrade = ClientBuilder::new().uri(&uri).map_err(|error| error.to_string())?;
    let upgrade = upgrade.add_header(AUTHORIZATION, token).map_err(|error| error.to_string())?;
    let (mut socket, _) = upgrade
        .connect_on(server.connection().await?)
        .await
        .map_err(|error| format!("no WebSocket: {error}"))?;
    let sent = now();
    socket.send(Message::ping("halfway")).await.map_err(|error| error.to_string())?;
    loop {
        match socket.next().await {
            Some(Ok(message)) if message.is_pong() => break,
            Some(Ok(message)) if message.is_close() => return Err("closed at once".to_owned()),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(error.to_string()),
            None => return Err("the connection ended".to_owned()),
        }
    }
    let trip = now() - sent;
    let _ = socket.close().await;
    Ok(trip)
}
