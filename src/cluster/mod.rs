//! Many nodes as one: what the hub wants said to other nodes goes through NATS, and what they say comes from there.
//!
//! An agent's node subscribes to what is said to the agent, for as long as its session lives: publishing is the directory, and
//! "no responders" is the answer "nobody".

use std::{collections::HashMap, future::Future, pin::pin, sync::Arc, time::Duration};

use async_nats::{Client, ConnectOptions, Event, Message, ServerAddr, StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use tokio::{
    sync::{Notify, mpsc},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};

use crate::{
    config,
    credentials::token::{AgentId, Room},
    http::Front,
    signaling::nodes::{Ear, Errand, NodeId},
};

mod subjects; // where what is said

use subjects::Subjects;

/// A server that does not answer two pings is given up.
const PING: Duration = Duration::from_secs(2);
/// Between two tries to reach one, at most.
const LONGEST_WAIT: Duration = Duration::from_secs(2);
/// For one try.
const PATIENCE: Duration = Duration::from_secs(5);
/// Words that are heard in one go.
const AT_ONCE: usize = 64;
/// What waits for the engine, in messages: beyond that, who says more waits.
const WAITING: usize = 16_384;

/// A node's end of the engine.
pub struct Cluster {
    client: Client,
    subjects: Subjects,
    front: Arc<Front>,
    events: mpsc::Receiver<Event>,
    servers: String,
    /// What was said last of why there is none, so that it is not said each time that it is tried.
    said: String,
    leave: Arc<Notify>,
}

impl Cluster {
    /// Begins to connect, to whichever of the servers is there first; if none is, again and again.
    ///
    /// # Errors
    /// One line for people, when the credentials cannot be used.
    pub async fn start(config: &config::Cluster, front: Arc<Front>, node: NodeId) -> Result<Self, String> {
        // What connects to the engine asks for the one that the process has chosen.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (told, events) = mpsc::channel(128);
        let mut options = ConnectOptions::new()
            .name(format!("halfway {}", config.name()))
            .no_echo()
            // Ours are made of digits, base64 and dots.
            .skip_subject_validation(true)
            .retry_on_initial_connect()
            .ping_interval(PING)
            .connection_timeout(PATIENCE)
            .client_capacity(WAITING)
            .reconnect_delay_callback(|tries| LONGEST_WAIT.min(Duration::from_millis(50) * tries as u32))
            .event_callback(move |event| {
                let told = told.clone();
                async move { _ = told.send(event).await }
            });
        if let Some(ca) = &config.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some(credentials) = &config.credentials {
            let refused = |error| format!("cluster.credentials: the file cannot be used: {error}");
            options = options.credentials(credentials.text()).map_err(refused)?;
        }
        options = match config.nats.iter().find_map(|server| server.login.clone()) {
            Some((user, Some(password))) => options.user_and_password(user, password),
            Some((token, None)) => options.token(token),
            None => options,
        };
        let servers: Vec<ServerAddr> = config.nats.iter().map(|server| server.address.clone()).collect();
        let named = config.nats.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let client = options
            .connect(servers)
            .await
            .map_err(|error| format!("cluster.nats: cannot connect to {named}: {error}"))?;
        Ok(Self {
            client,
            subjects: Subjects::of(node),
            front,
            events,
            servers: named,
            said: String::new(),
            leave: Arc::default(),
        })
    }

    /// Who says so has everything said that the hub still wants said, and then [`Self::run`] returns.
    #[must_use]
    pub fn leave(&self) -> Arc<Notify> {
        Arc::clone(&self.leave)
    }

    /// Passes on what is said, until dropped or told to leave.
    pub async fn run(mut self) {
        let mut listening = JoinSet::new();
        for subject in [self.subjects.node(), Subjects::all()] {
            let (front, heard) = (Arc::clone(&self.front), self.subscribe(subject).await);
            listening.spawn(hear(heard, move |words| front.hear(Ear::Node, words)));
        }
        let (front, heard) = (Arc::clone(&self.front), self.subscribe(self.subjects.nobody()).await);
        listening.spawn(hear_nobody(heard, front));
        let mut agents = HashMap::new();
        let mut first_try = pin!(sleep(PATIENCE));
        let mut is_first = true;
        loop {
            tokio::select! {
                Some(event) = self.events.recv() => {
                    is_first &= !matches!(event, Event::Connected | Event::Disconnected);
                    self.follow(event);
                }
                () = first_try.as_mut(), if is_first => {
                    is_first = false;
                    self.follow(Event::Disconnected);
                }
                () = self.leave.notified() => break,
                errands = self.front.errands() => {
                    for errand in errands {
                        self.do_errand(errand, &mut agents, &mut listening).await;
                    }
                    // Those that have ended.
                    while listening.try_join_next().is_some() {}
                }
            }
        }
        for errand in self.front.errands().now_or_never().unwrap_or_default() {
            self.do_errand(errand, &mut agents, &mut listening).await;
        }
        // Without the engine there is nobody to be told.
        let _ = timeout(PING, self.client.flush()).await;
    }

    fn follow(&mut self, event: Event) {
        let servers = &self.servers;
        match event {
            Event::Connected => {
                tracing::info!("the other nodes can be reached, through {servers}");
                self.said.clear();
                self.front.engine_is_up();
            }
            Event::Disconnected => {
                tracing::warn!(
                    "the other nodes cannot be reached: no server of cluster.nats ({servers}) answers"
                );
                self.front.engine_is_down();
            }
            // Something was lost: all is said again.
            Event::SlowConsumer(_) => self.front.engine_is_up(),
            Event::ServerError(error) => {
                tracing::warn!("a server of cluster.nats refuses something: {error}")
            }
            Event::ClientError(error) => {
                let why = error.to_string();
                if why != self.said {
                    tracing::warn!("cluster.nats is tried again: {why}");
                    self.said = why;
                }
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => {}
        }
    }

    async fn do_errand(
        &self,
        errand: Errand,
        agents: &mut HashMap<(Room, AgentId), AbortHandle>,
        listening: &mut JoinSet<()>,
    ) {
        match errand {
            Errand::Subscribe(room, agent) => {
                let heard = self.subscribe(self.subjects.agent(&room, &agent)).await;
                let (front, who) = (Arc::clone(&self.front), (room.clone(), agent.clone()));
                let hearing = hear(heard, move |words| front.hear(Ear::Agent(&who.0, &who.1), words));
                if let Some(before) = agents.insert((room, agent), listening.spawn(hearing)) {
                    before.abort();
                }
            }
            Errand::Unsubscribe(room, agent) => {
                if let Some(hearing) = agents.remove(&(room, agent)) {
                    hearing.abort();
                }
            }
            Errand::ToAgent { room, agent, ticket, word } => {
                let (subject, reply) = (self.subjects.agent(&room, &agent), self.subjects.nobody_for(ticket));
                if word.len() > self.client.max_payload() {
                    self.front.too_large_for_nodes(ticket);
                } else {
                    self.said(self.client.publish_with_reply(subject, reply, word).await);
                }
            }
            Errand::ToNode(node, word) => {
                self.said(self.client.publish(Subjects::of(node).node(), word).await);
            }
            Errand::ToAll(word) => self.said(self.client.publish(Subjects::all(), word).await),
            // The front has done it.
            Errand::Free(_) => {}
        }
    }

    /// What cannot be said now has no answer, and whoever waits for that is told.
    fn said(&self, outcome: Result<(), async_nats::PublishError>) {
        if let Err(error) = outcome {
            tracing::debug!("not said to the other nodes: {error}");
        }
    }

    async fn subscribe(&self, subject: String) -> Subscriber {
        let subscribed = self.client.subscribe(subject).await;
        subscribed.expect("our subjects have nothing in them that is refused, and the client is there")
    }
}

/// Until the subscription ends. Dropping it ends the subscription.
fn hear(heard: Subscriber, mut take: impl FnMut(&[Bytes])) -> impl Future<Output = ()> {
    let mut heard = heard.ready_chunks(AT_ONCE);
    async move {
        while let Some(messages) = heard.next().await {
            let words: Vec<Bytes> = messages.into_iter().map(|message| message.payload).collect();
            take(&words);
        }
    }
}

async fn hear_nobody(heard: Subscriber, front: Arc<Front>) {
    let mut heard = heard.ready_chunks(AT_ONCE);
    while let Some(messages) = heard.next().await {
        let is_nobody = |message: &&Message| message.status == Some(StatusCode::NO_RESPONDERS);
        let tickets =
            messages.iter().filter(is_nobody).filter_map(|message| Subjects::ticket(&message.subject));
        front.nobody(&tickets.collect::<Vec<_>>());
    }
}
