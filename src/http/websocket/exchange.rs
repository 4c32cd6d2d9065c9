//! The threads that hold the agents' WebSockets: each a poll, its lines, and a mailbox to be woken by.
//!
//! Threads and not tasks: a task with its buffers and timers costs an idle agent more memory than all that it needs, and a
//! frame more wake-ups than system calls; `docs/decisions/0010-agents-on-threads.md` has the figures.

use std::{
    collections::{BTreeSet, VecDeque},
    io, mem,
    net::TcpStream,
    ops::ControlFlow,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustls::ServerConnection;
use slab::Slab;
use tokio::sync::{oneshot, watch};

use super::{
    super::{Visit, body::Open},
    Credential,
    line::{Desk, Line},
};
use crate::{
    clock::{self, Now},
    door::admission::Permit,
    poll::{self, Poll, Waker, Watch},
    signaling::hub::ConnectionId,
    stream::{Flushed, PIECE, Spare},
};

/// After a turn with so many frames the thread rests: the next turn has more of them to read and to write for the same
/// system calls. Where less is said, and where there is more to do already, nobody waits.
const REST: Duration = Duration::from_micros(500);
const MANY: usize = 32;

/// The number of the waker in the poll; lines have their index.
const WAKER: u64 = u64::MAX;

/// All threads that hold agents' connections. Dropping it closes them.
pub struct Exchange {
    mailboxes: Vec<Arc<Mailbox>>,
    /// Whose turn it is to take the next connection.
    turn: AtomicUsize,
    /// How many connections there are.
    open: Arc<watch::Sender<usize>>,
    threads: Vec<JoinHandle<()>>,
}

/// A connection that has just become a WebSocket.
pub(super) struct Arrival {
    pub(super) visit: Visit,
    pub(super) credential: Credential,
    /// Not blocking.
    pub(super) socket: TcpStream,
    pub(super) tls: Box<ServerConnection>,
    /// Bytes that came right behind the request.
    pub(super) read: Vec<u8>,
    /// Its place.
    pub(super) permit: Permit,
}

/// What a thread is told.
enum Order {
    Welcome(Box<Arrival>, Open),
    /// The hub has something for the line, if it is still this connection.
    Ready(usize, ConnectionId),
    /// Whoever has not said hello yet is to come back later.
    Restart,
    /// Say that the thread is there.
    Answer(oneshot::Sender<()>),
    Stop,
}

/// How others reach a thread.
pub(in crate::http) struct Mailbox {
    inbox: Mutex<Inbox>,
    waker: Waker,
}

#[derive(Default)]
struct Inbox {
    orders: VecDeque<Order>,
    /// The thread waits for its poll, and has to be woken.
    asleep: bool,
}

impl Exchange {
    /// One thread for each core.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn start() -> io::Result<Self> {
        let mut exchange =
            Self { mailboxes: vec![], turn: AtomicUsize::new(0), open: Arc::default(), threads: vec![] };
        for index in 0..thread::available_parallelism().map_or(1, usize::from) {
            let mailbox = Arc::new(Mailbox { inbox: Mutex::default(), waker: Waker::new()? });
            let lines = Lines::new(&mailbox)?;
            exchange.mailboxes.push(mailbox);
            let thread = thread::Builder::new().name(format!("signaling-{index}"));
            exchange.threads.push(thread.spawn(move || supervise(lines))?);
        }
        Ok(exchange)
    }

    /// The threads take turns.
    pub(super) fn welcome(&self, arrival: Arrival) {
        let turn = self.turn.fetch_add(1, Relaxed) % self.mailboxes.len();
        self.mailboxes[turn].tell(Order::Welcome(Box::new(arrival), Open::new(&self.open)));
    }

    /// Whoever has not said hello yet, or connects from now on, is to come back later; the hub tells the others.
    pub(in crate::http) fn restart(&self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.tell(Order::Restart));
    }

    /// Returns when every thread has come so far as to say so.
    pub async fn answer(&self) {
        for mailbox in &self.mailboxes {
            let (to, answered) = oneshot::channel();
            mailbox.tell(Order::Answer(to));
            // A thread that falls meanwhile starts anew, and is asked again next time.
            let _ = answered.await;
        }
    }

    /// Returns when no connection is left.
    pub(in crate::http) async fn all_gone(&self) {
        // The sender is ours, so it is still there.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.tell(Order::Stop));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Mailbox {
    /// The hub has something for the line `index`.
    pub(in crate::http) fn ready(&self, index: usize, connection: ConnectionId) {
        let again = |last: &Order| matches!(last, Order::Ready(_, last) if *last == connection);
        let inbox = self.lock();
        if !inbox.orders.back().is_some_and(again) {
            self.put(inbox, Order::Ready(index, connection));
        }
    }

    fn tell(&self, order: Order) {
        self.put(self.lock(), order);
    }

    fn put(&self, mut inbox: MutexGuard<'_, Inbox>, order: Order) {
        inbox.orders.push_back(order);
        if mem::take(&mut inbox.asleep) {
            self.waker.wake();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread is the blast radius of its own bugs: its connections are lost, their sessions wait for them, the host goes on.
fn supervise(mut lines: Lines) {
    let mailbox = Arc::clone(&lines.mailbox);
    loop {
        match catch_unwind(AssertUnwindSafe(|| lines.run())) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => tracing::error!("a signaling thread failed and starts anew: {error}"),
            Err(_) => tracing::error!("a signaling thread panicked and starts anew; its agents reconnect"),
        }
        // What was told and not yet done is told to the next.
        let Lines { orders, restarting, .. } = lines;
        lines = match Lines::new(&mailbox) {
            Ok(lines) => Lines { orders, restarting, ..lines },
            Err(error) => return tracing::error!("a signaling thread cannot start anew: {error}"),
        };
    }
}

/// The lines of one thread.
struct Lines {
    open: Slab<Entry>,
    poll: Poll,
    /// One for each line.
    deadlines: BTreeSet<(Instant, usize)>,
    mailbox: Arc<Mailbox>,
    /// Told, and not yet done.
    orders: VecDeque<Order>,
    piece: Box<[u8]>,
    spare: Spare,
    /// Heard in this turn.
    frames: usize,
    restarting: bool,
}

struct Entry {
    line: Line,
    deadline: Instant,
    _open: Open,
}

impl Lines {
    fn new(mailbox: &Arc<Mailbox>) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(&mailbox.waker, WAKER)?;
        Ok(Self {
            open: Slab::new(),
            poll,
            deadlines: BTreeSet::new(),
            mailbox: Arc::clone(mailbox),
            orders: VecDeque::new(),
            piece: vec![0; PIECE].into(),
            spare: Spare::default(),
            frames: 0,
            restarting: false,
        })
    }

    /// Until told to stop: all that came in, then all that goes out.
    fn run(&mut self) -> io::Result<()> {
        loop {
            let ready = self.wait()?;
            let now = clock::now();
            let is_full = ready.len() == poll::EVENTS;
            self.frames = 0;
            for number in ready {
                match number {
                    WAKER => self.mailbox.waker.clear(),
                    index => self.line_is_ready(now, index as usize),
                }
            }
            while let Some((_, index)) = self.deadlines.first().copied().filter(|(at, _)| *at <= now.mono) {
                self.attend(now, index, Line::handle_timeout);
            }
            // Both keep their memory: it is needed again at once.
            self.orders.append(&mut self.mailbox.lock().orders);
            while let Some(order) = self.orders.pop_front() {
                if self.obey(now, order).is_break() {
                    return Ok(());
                }
            }
            if self.frames >= MANY && !is_full {
                thread::sleep(REST);
            }
        }
    }

    fn wait(&mut self) -> io::Result<impl ExactSizeIterator<Item = u64> + use<>> {
        let deadline = self.deadlines.first().map(|(at, _)| *at);
        let mut inbox = self.mailbox.lock();
        inbox.asleep = inbox.orders.is_empty();
        let wait = match deadline {
            _ if !inbox.asleep => Some(Duration::ZERO),
            deadline => deadline.map(|at| at.saturating_duration_since(clock::now().mono)),
        };
        drop(inbox);
        let ready = self.poll.wait(wait);
        self.mailbox.lock().asleep = false;
        ready
    }

    fn line_is_ready(&mut self, now: Now, index: usize) {
        let mut piece = mem::take(&mut self.piece);
        self.attend(now, index, |line, desk| line.read(desk, &mut piece));
        self.piece = piece;
    }

    fn obey(&mut self, now: Now, order: Order) -> ControlFlow<()> {
        match order {
            Order::Welcome(arrival, open) => self.welcome(now, *arrival, open),
            Order::Ready(index, connection) => {
                let expected = |entry: &Entry| entry.line.connection() == Some(connection);
                if self.open.get(index).is_some_and(expected) {
                    self.attend(now, index, Line::write_out);
                }
            }
            Order::Restart => {
                self.restarting = true;
                let indices: Vec<_> = self.open.iter().map(|(index, _)| index).collect();
                for index in indices {
                    self.attend(now, index, Line::restart);
                }
            }
            Order::Answer(to) => _ = to.send(()),
            Order::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn welcome(&mut self, now: Now, mut arrival: Arrival, open: Open) {
        let mut read = mem::take(&mut arrival.read);
        let line = Line::new(now, arrival);
        let deadline = line.deadline();
        let index = self.open.insert(Entry { line, deadline, _open: open });
        self.deadlines.insert((deadline, index));
        if let Err(error) = self.poll.add(&self.open[index].line.stream.socket, index as u64) {
            tracing::error!("cannot watch an agent's connection: {error}");
            return self.close(now, index);
        }
        if self.restarting {
            self.attend(now, index, Line::restart);
        }
        self.attend(now, index, Line::open);
        self.attend(now, index, |line, desk| line.hear(desk, &mut read));
        // What came with the handshake has been read already, and nobody will say so again.
        self.line_is_ready(now, index);
    }

    /// Does something with one line, if it is still there, and then what follows from it.
    fn attend(
        &mut self,
        now: Now,
        index: usize,
        act: impl FnOnce(&mut Line, &mut Desk<'_>) -> ControlFlow<()>,
    ) {
        let Some(entry) = self.open.get_mut(index) else { return };
        let mut desk =
            Desk { now, spare: &mut self.spare, mailbox: &self.mailbox, index, frames: &mut self.frames };
        if act(&mut entry.line, &mut desk).is_break() {
            return self.close(now, index);
        }
        let watch = match entry.line.flush(&mut desk) {
            Ok(Flushed::All | Flushed::Blocked { first: false }) => None,
            // It is not read from meanwhile: one that does not listen cannot go on talking.
            Ok(Flushed::Blocked { first: true }) => Some(Watch::Room),
            Ok(Flushed::Unblocked) => Some(Watch::Bytes),
            Err(_) => return self.close(now, index),
        };
        if let Some(watch) = watch
            && self.poll.watch(&entry.line.stream.socket, index as u64, watch).is_err()
        {
            return self.close(now, index);
        }
        let deadline = entry.line.deadline();
        if deadline != entry.deadline {
            self.deadlines.remove(&(entry.deadline, index));
            self.deadlines.insert((deadline, index));
            entry.deadline = deadline;
        }
    }

    fn close(&mut self, now: Now, index: usize) {
        let mut entry = self.open.remove(index);
        self.deadlines.remove(&(entry.deadline, index));
        entry.line.end(now, &mut self.spare);
    }
}
