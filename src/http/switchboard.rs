//! The one owner of the hub.
//!
//! A lock and not a task with a queue: routing a frame takes microseconds, the sender's own task does it, so a
//! sender's frames stay in order, a busy sender slows down itself, and there is no queue that could fill up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    clock::{self, Now},
    credentials::token::Agent,
    signaling::{
        hub::{ConnectionId, Counters, Departure, Hub, Join, Outgoing},
        limits::Limits,
        message::Hello,
        refusal::Refusal,
        session::Gone,
    },
};

/// The hub, and how to wake the tasks of its connections.
#[derive(Debug)]
pub(super) struct Switchboard {
    state: Mutex<State>,
    /// The next deadline came closer.
    alarm: Notify,
}

#[derive(Debug)]
struct State {
    hub: Hub,
    sockets: HashMap<ConnectionId, Arc<Notify>>,
    /// What `keep_time` sleeps for.
    armed: Option<Instant>,
}

impl Switchboard {
    pub(super) fn new(limits: Limits) -> Self {
        let state = State { hub: Hub::new(limits), sockets: HashMap::new(), armed: None };
        Self { state: Mutex::new(state), alarm: Notify::new() }
    }

    /// Takes a seat for the agent that said `hello`.
    pub(super) fn join(
        self: &Arc<Self>,
        agent: &Agent,
        hello: &Hello<'_>,
        join: Join<'_>,
    ) -> Result<Seat, Refusal> {
        self.seat(|hub, now| hub.join(now, agent, hello, join))
    }

    /// Takes a seat for an agent with a session, to hear what comes after number `after`.
    pub(super) fn listen(self: &Arc<Self>, agent: &Agent, session: &str, after: u64) -> Result<Seat, Gone> {
        self.seat(|hub, now| hub.listen(now, agent, session, after))
    }

    fn seat<E>(
        self: &Arc<Self>,
        take: impl FnOnce(&mut Hub, Now) -> Result<ConnectionId, E>,
    ) -> Result<Seat, E> {
        let wake = Arc::new(Notify::new());
        let connection = self.with(|state, now| {
            let connection = take(&mut state.hub, now)?;
            state.sockets.insert(connection, Arc::clone(&wake));
            Ok(connection)
        })?;
        Ok(Seat { switchboard: Arc::clone(self), connection, wake, departure: Departure::Dropped })
    }

    /// Does one thing in the hub, and wakes whom it concerns.
    pub(super) fn tell<T>(&self, act: impl FnOnce(&mut Hub, Now) -> T) -> T {
        self.with(|state, now| act(&mut state.hub, now))
    }

    pub(super) fn counters(&self) -> Counters {
        self.lock().hub.counters()
    }

    /// Ends sessions when their time is over. Never returns.
    pub(super) async fn keep_time(&self) {
        loop {
            let next = self.with(|state, now| {
                state.hub.handle_timeout(now);
                state.armed = state.hub.poll_timeout();
                state.armed
            });
            let sleep = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = sleep => {}
                () = self.alarm.notified() => {}
            }
        }
    }

    fn with<T>(&self, act: impl FnOnce(&mut State, Now) -> T) -> T {
        let mut state = self.lock();
        let outcome = act(&mut state, clock::now());
        let State { hub, sockets, armed } = &mut *state;
        for connection in hub.take_ready() {
            if let Some(socket) = sockets.get(&connection) {
                socket.notify_one();
            }
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

/// A connection's place in the hub; dropping it leaves.
#[derive(Debug)]
pub(super) struct Seat {
    switchboard: Arc<Switchboard>,
    connection: ConnectionId,
    wake: Arc<Notify>,
    /// What the hub is told in the end.
    pub(super) departure: Departure,
}

impl Seat {
    /// Something waits to be written.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    /// There is more to write than was written.
    pub(super) fn wake_again(&self) {
        self.wake.notify_one();
    }

    pub(super) fn heartbeat(&self) -> Duration {
        self.switchboard.tell(|hub, _| hub.heartbeat())
    }

    pub(super) fn next_outgoing(&self) -> Option<Outgoing> {
        self.switchboard.tell(|hub, _| hub.next_outgoing(self.connection))
    }

    /// Does one thing in the hub for this connection.
    pub(super) fn tell(&self, act: impl FnOnce(&mut Hub, Now, ConnectionId)) {
        self.switchboard.tell(|hub, now| act(hub, now, self.connection));
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.switchboard.with(|state, now| {
            state.hub.leave(now, self.connection, self.departure);
            state.sockets.remove(&self.connection);
        });
    }
}
