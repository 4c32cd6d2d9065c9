//! Another version takes over while allocations live: SIGUSR2 starts it, and it inherits the listeners.
//!
//! Old and new speak over a socket that is the new one's standard input. The old one sends the listeners and a link for each
//! shard; the new one makes itself ready and says so; then the old one tells it, over the links, whose datagrams to pass on,
//! and says go. Whatever fails before that leaves the old one as it was.

use std::{
    env,
    ffi::OsString,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use socket2::{Domain, Socket, Type};

use super::listeners::Listeners;
use crate::{relay::Link, systemd};

/// Tells the new one that its standard input is the old one, by the process number of that.
const PREDECESSOR: &str = "HALFWAY_PREDECESSOR";
/// For the new one to read its configuration, and whatever else it does before it listens.
const PATIENCE: Duration = Duration::from_secs(60);
/// The kernel takes 253 at once.
const AT_ONCE: usize = 64;

/// What the two say. A byte each, with sockets beside it.
const LISTENERS: u8 = b'l';
const LINKS: u8 = b's';
const ALL: u8 = b'.';
const READY: u8 = b'r';
const GO: u8 = b'g';

/// What this process was started as, looked up before it may have been replaced on disk.
pub(super) struct Program {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Program {
    /// # Errors
    /// When the system does not say.
    pub(super) fn this() -> io::Result<Self> {
        let mut arguments = env::args_os();
        // As it was called, and not what that led to: a symbolic link may lead to the next version by now.
        let called = arguments.next().map(PathBuf::from).filter(|called| called.components().count() > 1);
        let path = called.map_or_else(env::current_exe, std::path::absolute)?;
        Ok(Self { path, arguments: arguments.collect() })
    }
}

/// The new one, not yet in charge.
pub(super) struct Successor {
    control: Socket,
    child: Child,
    pub(super) links: Vec<Link>,
}

impl Successor {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// One line for people; then it has ended.
    pub(super) fn start(program: &Program, listeners: &Listeners, shards: usize) -> Result<Self, String> {
        let (control, theirs) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).map_err(failed)?;
        control.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let child = Command::new(&program.path)
            .args(&program.arguments)
            .env(PREDECESSOR, std::process::id().to_string())
            // These are meant for this process.
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS")
            .env_remove("WATCHDOG_PID")
            .stdin(OwnedFd::from(theirs))
            .spawn()
            .map_err(|error| format!("cannot run {}: {error}", program.path.display()))?;
        let mut successor = Self { control, child, links: Vec::new() };
        match successor.get_ready(listeners, shards) {
            Ok(()) => Ok(successor),
            Err(error) => {
                let ended = successor.end().map_or_else(String::new, |status| format!(" ({status})"));
                Err(format!("{} did not get ready: {error}{ended}", program.path.display()))
            }
        }
    }

    /// It will not take over after all. Gives how it ended.
    pub(super) fn end(mut self) -> Option<ExitStatus> {
        let _ = self.child.kill();
        self.child.wait().ok()
    }

    fn get_ready(&mut self, listeners: &Listeners, shards: usize) -> io::Result<()> {
        let (ours, theirs) = (0..shards).map(|_| Link::pair()).collect::<io::Result<(Vec<_>, Vec<_>)>>()?;
        let theirs: Vec<OwnedFd> = theirs.into_iter().map(OwnedFd::from).collect();
        send_all(&self.control, LISTENERS, listeners.all())?;
        send_all(&self.control, LINKS, theirs.iter().map(AsFd::as_fd))?;
        send(&self.control, ALL, &[])?;
        self.links = ours;
        match receive(&self.control)? {
            Some((READY, _)) => Ok(()),
            None => Err(io::Error::other("it has ended; its log says why")),
            Some(_) => Err(io::Error::other("it says something else")),
        }
    }

    /// Its process number.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// It is in charge from now on. Gives what waits for its end, which has come already if it cannot be told.
    pub(super) fn go(self) -> impl FnOnce() + Send {
        let Self { control, mut child, .. } = self;
        let _ = send(&control, GO, &[]);
        move || {
            let _ = child.wait();
            drop(control);
        }
    }
}

/// The old one.
pub(super) struct Predecessor {
    control: Socket,
    /// Its process number.
    pub(super) pid: String,
}

/// What it gives.
#[derive(Default)]
pub(super) struct Inheritance {
    pub(super) listeners: Vec<OwnedFd>,
    pub(super) links: Vec<Link>,
}

impl Inheritance {
    /// What systemd gives, where nobody has run before.
    ///
    /// # Errors
    /// One line for people.
    pub(super) fn of_systemd() -> Result<Self, String> {
        let listeners =
            systemd::passed().map_err(|error| format!("cannot take systemd's sockets: {error}"))?;
        Ok(Self { listeners, links: Vec::new() })
    }
}

impl Predecessor {
    /// `None` where nobody has started this process to take over.
    pub(super) fn of_this() -> Option<Self> {
        let pid = env::var(PREDECESSOR).ok()?;
        // Whoever inherited the variable from one that took over is somebody else's child.
        let is_parent = pid == std::os::unix::process::parent_id().to_string();
        let control = io::stdin().as_fd().try_clone_to_owned().ok().filter(|_| is_parent)?;
        Some(Self { control: control.into(), pid })
    }

    /// What it gives.
    ///
    /// # Errors
    /// When it has ended meanwhile.
    pub(super) fn bequeath(&self) -> Result<Inheritance, String> {
        let mut inheritance = Inheritance::default();
        loop {
            match receive(&self.control).map_err(failed)? {
                Some((LISTENERS, sockets)) => inheritance.listeners.extend(sockets),
                Some((LINKS, sockets)) => inheritance.links.extend(sockets.into_iter().map(Link::from)),
                Some((ALL, _)) => return Ok(inheritance),
                _ => return Err(format!("process {}, which is to be followed, has ended", self.pid)),
            }
        }
    }

    /// Says that this one is ready, and waits until it is to go.
    ///
    /// # Errors
    /// When the old one has changed its mind, or ended.
    pub(super) fn relieve(&self) -> Result<(), String> {
        send(&self.control, READY, &[]).map_err(failed)?;
        match receive(&self.control).map_err(failed)? {
            Some((GO, _)) => Ok(()),
            _ => Err(format!("process {} goes on itself", self.pid)),
        }
    }

    /// Whether it still has somebody to serve.
    pub(super) fn lives(&self) -> bool {
        self.control.set_nonblocking(true).is_ok()
            && matches!(receive(&self.control), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

fn failed(error: impl std::fmt::Display) -> String {
    format!("the old process and the new one cannot speak: {error}")
}

fn send_all<'a>(control: &Socket, tag: u8, sockets: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<()> {
    let sockets: Vec<_> = sockets.collect();
    sockets.chunks(AT_ONCE).try_for_each(|chunk| send(control, tag, chunk))
}

fn send(control: &Socket, tag: u8, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let beside = if numbers.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(control.as_raw_fd(), &[IoSlice::new(&[tag])], beside, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// `None`: the other end is closed.
#[expect(unsafe_code, reason = "numbers become sockets that are ours")]
fn receive(control: &Socket) -> io::Result<Option<(u8, Vec<OwnedFd>)>> {
    let (mut tag, mut space) = ([0], nix::cmsg_space!([i32; AT_ONCE]));
    let mut pieces = [IoSliceMut::new(&mut tag)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(control.as_raw_fd(), &mut pieces, Some(&mut space), flags)?;
    let (length, mut sockets) = (message.bytes, Vec::new());
    for beside in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = beside {
            // SAFETY: the kernel has just opened these for this process, and nobody else knows them.
            sockets.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((length == 1).then_some((tag[0], sockets)))
}
