//! The log: lines to stderr, text or JSON.

use std::io::{self, IsTerminal};

use tracing::Metadata;
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::FilterFn,
    fmt,
    layer::{Layered, SubscriberExt},
    reload,
    util::SubscriberInitExt,
};

use crate::config::Log;

/// What is logged of what there is to log.
pub struct Filter(reload::Handle<EnvFilter, Filtered>);

/// What the filter is for: everything but what is silenced.
type Filtered = Layered<Silence, Registry>;
type Silence = FilterFn<fn(&Metadata<'_>) -> bool>;

impl Filter {
    /// Another one from now on.
    pub fn adopt(&self, log: &Log) {
        // It fails only when the log is gone, and then nobody could be told.
        let _ = self.0.reload(filter(log));
    }
}

/// Starts the log of this process. A second call changes nothing.
pub fn start(log: &Log) -> Filter {
    let (filter, handle) = reload::Layer::new(filter(log));
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let lines = if log.json { lines.json().flatten_event(true).boxed() } else { lines.boxed() };
    let silence: Silence = FilterFn::new(is_heard);
    tracing_subscriber::registry().with(silence).with(lines.with_filter(filter)).try_init().ok();
    Filter(handle)
}

fn filter(log: &Log) -> EnvFilter {
    EnvFilter::builder().parse_lossy(&log.filter)
}

fn is_heard(metadata: &Metadata<'_>) -> bool {
    !is_silenced(metadata.target())
}

/// The STUN codec warns of every malformed message: strangers would write our log, whatever the filter says. What NATS tells its
/// client we say ourselves; the client would say it with the password, too.
fn is_silenced(target: &str) -> bool {
    let root = target.split("::").next().unwrap_or(target);
    ["stun_types", "stun_proto", "turn_types", "async_nats"].contains(&root)
}

#[cfg(test)]
mod tests {
    use super::is_silenced;

    #[test]
    fn who_says_too_much_is_silent() {
        for target in ["stun_types", "turn_types::channel", "stun_proto::agent", "async_nats::connector"] {
            assert!(is_silenced(target), "{target}");
        }
        for target in ["halfway::turn", "stun_types_too", "hyper"] {
            assert!(!is_silenced(target), "{target}");
        }
    }
}
