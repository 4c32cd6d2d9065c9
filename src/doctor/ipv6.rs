//! A relayed address of IPv6. The published client cannot ask for one (RFC 8656 §18.9); the one of `halfway bench` can.

use std::net::SocketAddr;

use tokio::{
    net::UdpSocket,
    time::{Instant, timeout_at},
};

use super::{PATIENCE, any, ice::Servers, now};
use crate::{
    bench::turn::client::{Client, Due, Heard, Step, header},
    credentials::turn_rest::TurnUser,
};

/// An allocation with a channel to one peer, which is all it ever speaks to.
pub(super) struct Relayed6 {
    socket: UdpSocket,
    client: Client,
}

impl Relayed6 {
    /// # Errors
    /// Why the server gives none, or does not relay to this peer.
    pub(super) async fn to(peer: SocketAddr, server: SocketAddr, servers: &Servers) -> Result<Self, String> {
        let socket = UdpSocket::bind(any(server)).await.map_err(|error| error.to_string())?;
        socket.connect(server).await.map_err(|error| error.to_string())?;
        let user = TurnUser { username: servers.username.clone(), credential: servers.credential.clone() };
        let mut relayed = Self { socket, client: Client::new(user, false, true) };
        relayed.done(Step::Allocate).await?;
        match relayed.done(Step::Bind(peer)).await {
            Ok(()) => Ok(relayed),
            Err(problem) => {
                relayed.release().await;
                Err(problem)
            }
        }
    }

    pub(super) async fn send(&self, packet: &[u8]) -> Result<(), String> {
        let length = u16::try_from(packet.len()).map_err(|_| "a packet is too large")?;
        let framed = [&header(length)[..], packet].concat();
        self.socket.send(&framed).await.map(drop).map_err(|error| error.to_string())
    }

    /// Gives it back to the server.
    pub(super) async fn release(mut self) {
        // A server that does not answer frees it by itself.
        let _ = self.done(Step::Release).await;
    }

    async fn done(&mut self, step: Step) -> Result<(), String> {
        let silent = || format!("no answer to {}", step.name());
        let (until, mut buffer) = (Instant::from_std(now() + PATIENCE), [0; 2_048]);
        self.client.ask(step, now())?;
        self.send_request().await?;
        while self.client.is_busy() {
            let next = until.min(Instant::from_std(now() + super::LAST));
            match timeout_at(next, self.socket.recv(&mut buffer)).await {
                Ok(Ok(length)) => {
                    if self.client.hear(&buffer[..length], now())? == Heard::Challenge {
                        self.send_request().await?;
                    }
                }
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) if next == until => return Err(silent()),
                Err(_) => match self.client.due(now()) {
                    Due::Nothing => {}
                    Due::Again => self.send_request().await?,
                    Due::Silence(_) => return Err(silent()),
                },
            }
        }
        Ok(())
    }

    async fn send_request(&self) -> Result<(), String> {
        self.socket.send(self.client.request()).await.map(drop).map_err(|error| error.to_string())
    }
}
