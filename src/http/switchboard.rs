//! The one owner of the hub.
//!
//! A lock and not a task with a queue: routing a frame takes microseconds, whoever hears the sender does it, so a
//! sender's frames stay in order, a busy sender slows down itself, and there is no queue that could fill up.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::rand;
use bytes::Bytes;
use tokio::sync::{Notify, oneshot};

use super::websocket::exchange::Mailbox;
use crate::{
    clock::{self, Now},
    credentials::{
        revocations::Revocations,
        token::{Agent, TokenRefusal},
    },
    signaling::{
        hub::{Answered, ConnectionId, Counters, Departure, Hub, Join, Outgoing, Resolution},
        limits::Limits,
        message::{Hello, ServerFrame, SessionId},
        nodes::Errand,
        refusal::Refusal,
        session::Gone,
    },
};

/// The hub, and how to wake whoever holds its connections.
pub(super) struct Switchboard {
    state: Mutex<State>,
    /// The next deadline came closer.
    alarm: Notify,
    /// There is something to be done among the nodes.
    errand: Notify,
    revocations: Revocations,
}

struct State {
    hub: Hub,
    /// The tasks that hold a connection.
    tasks: HashMap<ConnectionId, Arc<Notify>>,
    /// The threads that hold lines; a connection's tag says which one, and which line.
    threads: Vec<Arc<Mailbox>>,
    /// What `keep_time` sleeps for.
    armed: Option<Instant>,
    /// Those that wait for another node.
    requests: HashMap<u64, oneshot::Sender<Resolution>>,
}

/// One thing that is done in the hub for a request.
pub(super) struct Asking<'a> {
    pub(super) hub: &'a mut Hub,
    requests: &'a mut HashMap<u64, oneshot::Sender<Resolution>>,
}

impl Asking<'_> {
    pub(super) fn ready<T>(&mut self, answered: Answered<T>) -> Ready<T> {
        match answered {
            Answered::Now(answer) => Ready::Now(answer),
            Answered::Later(number) => {
                let (request, later) = oneshot::channel();
                self.requests.insert(number, request);
                Ready::Later(later)
            }
        }
    }
}

/// An answer that is there, or will be.
pub(super) enum Ready<T> {
    Now(T),
    Later(oneshot::Receiver<Resolution>),
}

/// The process ends, and nobody will answer.
const ENDING: Refusal = Refusal::Unavailable("going down: try again soon");

impl Ready<Bytes> {
    /// The frame that is the answer.
    pub(super) async fn frame(self) -> Bytes {
        match self {
            Self::Now(frame) => frame,
            Self::Later(later) => {
                let ending = |_| ServerFrame::error(None, &ENDING).to_bytes();
                later.await.map_or_else(ending, |resolution| resolution.answer)
            }
        }
    }

    /// The welcome, or why there is none.
    pub(super) async fn welcome(self) -> Result<Bytes, Refusal> {
        match self {
            Self::Now(welcome) => Ok(welcome),
            Self::Later(later) => {
                let Resolution { answer, outcome } = later.await.map_err(|_| ENDING)?;
                outcome.map(|()| answer)
            }
        }
    }
}

impl Ready<()> {
    /// Whether it was done.
    pub(super) async fn outcome(self) -> Result<(), Refusal> {
        match self {
            Self::Now(()) => Ok(()),
            Self::Later(later) => later.await.map_err(|_| ENDING)?.outcome,
        }
    }
}

/// The tag of every connection that a task holds.
const TASK: u64 = u64::MAX;

impl Switchboard {
    pub(super) fn new(limits: Limits, revocations: Revocations) -> Self {
        let state = State {
            hub: Hub::new(limits),
            tasks: HashMap::new(),
            threads: Vec::new(),
            armed: None,
            requests: HashMap::new(),
        };
        Self { state: Mutex::new(state), alarm: Notify::new(), errand: Notify::new(), revocations }
    }

    /// Takes a seat for the agent that said `hello` on the line `index`.
    pub(super) fn join(
        self: &Arc<Self>,
        now: Now,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
        mailbox: &Arc<Mailbox>,
        index: usize,
    ) -> Result<Seat, Refusal> {
        let connection = self.with(|state| {
            self.refuse_revoked(agent)?;
            let tag = state.thread(mailbox) << 32 | index as u64;
            state.hub.join(now, agent, hello, join, tag)
        })?;
        Ok(self.seat(connection))
    }

    /// Begins or continues the session of an agent that asks by requests. The welcome is the answer.
    pub(super) fn join_by_request(
        &self,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
    ) -> Result<Ready<Bytes>, Refusal> {
        self.ask(|asking, now| {
            let refused = self.refuse_revoked(agent);
            let joined = refused.and_then(|()| asking.hub.join_by_request(now, agent, hello, join));
            let joined = joined.inspect_err(|refusal| asking.hub.count_refusal(refusal))?;
            Ok(asking.ready(joined))
        })
    }

    /// Its token was good when it was looked at. Who revokes an agent says so first and ends its session then: either we see
    /// that here, under the lock, or the session is there to be ended.
    fn refuse_revoked(&self, agent: &Agent) -> Result<(), Refusal> {
        if self.revocations.refuse_token(agent.id.as_str(), agent.issued) {
            Err(TokenRefusal::Revoked.into())
        } else {
            Ok(())
        }
    }

    /// Takes a seat for an agent with a session, to hear what comes after number `after`.
    pub(super) fn listen(
        self: &Arc<Self>,
        agent: &Agent,
        session: &str,
        after: u64,
    ) -> Result<Listener, Gone> {
        let (now, wake) = (clock::now(), Arc::new(Notify::new()));
        let connection = self.with(|state| {
            let connection = state.hub.listen(now, agent, session, after, TASK)?;
            state.tasks.insert(connection, Arc::clone(&wake));
            Ok(connection)
        })?;
        Ok(Listener { seat: self.seat(connection), wake })
    }

    fn seat(self: &Arc<Self>, connection: ConnectionId) -> Seat {
        Seat { switchboard: Arc::clone(self), connection, departure: Departure::Dropped }
    }

    /// Does one thing in the hub whose answer may come from another node, and so later.
    pub(super) fn ask<T>(&self, act: impl FnOnce(&mut Asking<'_>, Now) -> T) -> T {
        let now = clock::now();
        self.with(|state| act(&mut Asking { hub: &mut state.hub, requests: &mut state.requests }, now))
    }

    /// Takes what the hub wants done among the nodes, once there is something.
    pub(super) async fn errands(&self) -> VecDeque<Errand> {
        loop {
            let errands = self.lock().hub.take_errands();
            if !errands.is_empty() {
                return errands;
            }
            self.errand.notified().await;
        }
    }

    /// Does one thing in the hub, and wakes whom it concerns.
    pub(super) fn tell<T>(&self, act: impl FnOnce(&mut Hub, Now) -> T) -> T {
        let now = clock::now();
        self.with(|state| act(&mut state.hub, now))
    }

    pub(super) fn counters(&self) -> Counters {
        self.lock().hub.counters()
    }

    /// Ends sessions when their time is over. Never returns.
    pub(super) async fn keep_time(&self) {
        loop {
            let now = clock::now();
            let next = self.with(|state| {
                state.hub.handle_timeout(now);
                state.armed = state.hub.poll_timeout();
                state.armed
            });
            tokio::select! {
                () = until(next) => {}
                () = self.alarm.notified() => {}
            }
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let outcome = act(&mut state);
        let State { hub, tasks, threads, armed, requests } = &mut *state;
        for connection in hub.take_ready() {
            if connection.tag != TASK {
                let (thread, index) = (connection.tag >> 32, connection.tag & u64::from(u32::MAX));
                threads[thread as usize].ready(index as usize, connection);
            } else if let Some(task) = tasks.get(&connection) {
                task.notify_one();
            }
        }
        for (number, resolution) in hub.take_resolved() {
            if let Some(request) = requests.remove(&number) {
                // Who asked may have gone.
                let _ = request.send(resolution);
            }
        }
        if hub.has_errands() {
            self.errand.notify_one();
        }
        let next = hub.poll_timeout();
        if next.is_some_and(|next| armed.is_none_or(|armed| next < armed)) {
            self.alarm.notify_one();
        }
        outcome
    }

    /// A panic under the lock is a bug; everybody else's sessions go on.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The number of a thread, which stays the same.
    fn thread(&mut self, mailbox: &Arc<Mailbox>) -> u64 {
        let known = self.threads.iter().position(|thread| Arc::ptr_eq(thread, mailbox));
        let number = known.unwrap_or_else(|| {
            self.threads.push(Arc::clone(mailbox));
            self.threads.len() - 1
        });
        number as u64
    }
}

/// Waits for that moment; without one for ever.
pub(super) async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// A new session's name.
pub(super) fn session_id() -> Result<SessionId, Refusal> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| Refusal::Unavailable("no randomness"))?;
    Ok(SessionId::from_random(bytes))
}

/// A connection's place in the hub; dropping it leaves.
pub(super) struct Seat {
    switchboard: Arc<Switchboard>,
    pub(super) connection: ConnectionId,
    /// What the hub is told in the end.
    pub(super) departure: Departure,
}

impl Seat {
    /// Does one thing in the hub for this connection.
    pub(super) fn tell<T>(&self, act: impl FnOnce(&mut Hub, ConnectionId) -> T) -> T {
        self.switchboard.with(|state| act(&mut state.hub, self.connection))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let now = clock::now();
        self.switchboard.with(|state| {
            state.hub.leave(now, self.connection, self.departure);
            state.tasks.remove(&self.connection);
        });
    }
}

/// A task in a seat.
pub(super) struct Listener {
    pub(super) seat: Seat,
    wake: Arc<Notify>,
}

impl Listener {
    /// Something waits to be written.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    pub(super) fn heartbeat(&self) -> Duration {
        self.seat.tell(|hub, _| hub.heartbeat())
    }

    pub(super) fn next_outgoing(&self) -> Option<Outgoing<Bytes>> {
        self.seat.tell(|hub, connection| hub.next_outgoing(connection).map(|next| next.to_bytes()))
    }
}
