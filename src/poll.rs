//! Waiting for sockets to become ready (epoll), being woken, and getting a processor soon after.
#![expect(
    unsafe_code,
    reason = "epoll, poll, eventfd and sched_setattr have no safe wrapper among our packages"
)]

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

/// Readiness read at once.
pub const EVENTS: usize = 64;

/// A set of sockets, each with a number of its owner's.
pub struct Poll {
    epoll: OwnedFd,
    events: [libc::epoll_event; EVENTS],
}

/// What a socket is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Something to read.
    Bytes,
    /// Room to write.
    Room,
    /// Either.
    BytesAndRoom,
}

impl Poll {
    /// An empty set.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes flags, gives a descriptor that is ours, or -1.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        Ok(Self { epoll: own(epoll)?, events: [libc::epoll_event { events: 0, u64: 0 }; EVENTS] })
    }

    /// Watches `socket` under `number` for something to read, until it is closed.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add(&self, socket: &impl AsRawFd, number: u64) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket, number, libc::EPOLLIN)
    }

    /// Watches `socket`, which is watched under `number`, for something else.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn watch(&self, socket: &impl AsRawFd, number: u64, watch: Watch) -> io::Result<()> {
        let events = match watch {
            Watch::Bytes => libc::EPOLLIN,
            Watch::Room => libc::EPOLLOUT,
            Watch::BytesAndRoom => libc::EPOLLIN | libc::EPOLLOUT,
        };
        self.control(libc::EPOLL_CTL_MOD, socket, number, events)
    }

    /// Watches `socket` no more, though it stays open.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, socket: &impl AsRawFd) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_DEL, socket, 0, 0)
    }

    fn control(&self, operation: i32, socket: &impl AsRawFd, number: u64, events: i32) -> io::Result<()> {
        let mut event = libc::epoll_event { events: events as u32, u64: number };
        // SAFETY: both descriptors are open, the event is read during the call only.
        let done =
            unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), operation, socket.as_raw_fd(), &raw mut event) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until something is ready or `timeout` is over (`None`: for ever). Gives the numbers of what is.
    ///
    /// # Errors
    /// What the kernel says; never `Interrupted`, that is an empty answer.
    pub fn wait(
        &mut self,
        timeout: Option<Duration>,
    ) -> io::Result<impl ExactSizeIterator<Item = u64> + use<>> {
        // Rounded up: a deadline is over when the wait is. No time at all is a look, and no wait.
        let millis = |wait: Duration| i32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        let millis = timeout.map_or(-1, millis);
        // SAFETY: the events are ours and EVENTS long.
        let count = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), self.events.as_mut_ptr(), EVENTS as i32, millis)
        };
        let count = match usize::try_from(count) {
            Ok(count) => count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => 0,
                error => return Err(error),
            },
        };
        let events = self.events;
        Ok((0..count).map(move |index| events[index].u64))
    }
}

/// Wakes a [`Poll`] from another thread.
pub struct Waker(File);

impl Waker {
    /// Not yet signalled.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes numbers, gives a descriptor that is ours, or -1.
        let eventfd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        own(eventfd).map(|eventfd| Self(eventfd.into()))
    }

    /// Makes it readable.
    pub fn wake(&self) {
        // Full is as good as signalled.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Makes it wait again.
    pub fn clear(&self) {
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

/// Whether the other side has ended its half of a connection, which is known before all its bytes are read.
pub fn has_hung_up(socket: &impl AsRawFd) -> bool {
    let mut asked = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one entry, ours, written during the call only, which does not wait.
    let ready = unsafe { libc::poll(&raw mut asked, 1, 0) };
    ready > 0
}

/// Waits until the socket takes something to send, but no longer than `patience`.
///
/// # Errors
/// `TimedOut` when that was too short.
pub fn wait_for_room(socket: &impl AsRawFd, patience: Duration) -> io::Result<()> {
    let mut asked = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let millis = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one entry, ours, written during the call only.
    let ready = unsafe { libc::poll(&raw mut asked, 1, millis) };
    if ready > 0 { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
}

/// Asks for short turns on the processor, which come soon after a wake-up in return: a thread that forwards packets must
/// not wait for one that is within a TLS handshake. Needs no privilege; kernels before 6.12 take no notice.
///
/// # Errors
/// What the kernel says.
pub fn prefer_short_turns() -> io::Result<()> {
    // The first version of the kernel's sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
    #[repr(C)]
    struct Attributes(u32, u32, u64, i32, u32, u64, u64, u64);
    let turn = Duration::from_micros(100).as_nanos() as u64;
    let size = std::mem::size_of::<Attributes>() as u32;
    // SAFETY: takes and gives numbers; what the operator chose stays as it is.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = Attributes(size, libc::SCHED_OTHER as u32, 0, nice, 0, turn, 0, 0);
    // SAFETY: the attributes are as long as they say, and read during the call only.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn own(descriptor: i32) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
