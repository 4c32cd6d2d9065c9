//! Tells a service manager how it goes, and takes what it hands over. Without one, nothing happens.

use std::{
    io,
    os::fd::{FromRawFd, OwnedFd},
    sync::Once,
    time::Duration,
};

use sd_notify::NotifyState;

/// The sockets that it has bound for us (`halfway.socket`); only the first call gets them.
///
/// # Errors
/// When what the environment says of them makes no sense.
#[expect(unsafe_code, reason = "a number becomes a socket that is ours")]
pub fn passed() -> io::Result<Vec<OwnedFd>> {
    static ONCE: Once = Once::new();
    let mut passed = Ok(Vec::new());
    ONCE.call_once(|| {
        // SAFETY: whoever started us opened these for us, and nobody else here has them.
        let owned = |number| unsafe { OwnedFd::from_raw_fd(number) };
        passed = sd_notify::listen_fds().map(|numbers| numbers.map(owned).collect());
    });
    passed
}

/// Every listener is bound.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The configuration is being read again; to be followed by [`ready`].
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!("no monotonic time for the service manager: {error}"),
    }
}

/// How long it waits for [`alive`] before it gives us up (`WatchdogSec=`), if it does at all.
#[must_use]
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero())
}

/// Everything answers.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

/// From now on another process is the service.
pub fn main_process(pid: u32) {
    tell(&[NotifyState::MainPid(pid)]);
}

/// No new work is taken.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot tell the service manager: {error}");
    }
}
