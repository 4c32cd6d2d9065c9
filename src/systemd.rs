//! Tells a service manager how it goes. Without one, nothing happens.

use sd_notify::NotifyState;

/// Every listener is bound.
pub fn ready() {
    tell(&[NotifyState::Ready]);
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
