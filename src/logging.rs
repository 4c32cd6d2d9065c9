//! The log: lines to stderr, text or JSON.

use std::io::{self, IsTerminal};

use tracing_subscriber::{
    EnvFilter, Layer, filter::filter_fn, fmt, layer::SubscriberExt, util::SubscriberInitExt,
};

use crate::config::Log;

/// Starts the log of this process. A second call changes nothing.
pub fn start(log: &Log) {
    let filter = EnvFilter::builder().parse_lossy(&log.filter);
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let lines = if log.json { lines.json().flatten_event(true).boxed() } else { lines.boxed() };
    let silence = filter_fn(|metadata| !is_silenced(metadata.target()));
    tracing_subscriber::registry().with(silence).with(lines.with_filter(filter)).try_init().ok();
}

/// The STUN codec warns of every malformed message: strangers would write our log, whatever the filter says.
fn is_silenced(target: &str) -> bool {
    let root = target.split("::").next().unwrap_or(target);
    ["stun_types", "stun_proto", "turn_types"].contains(&root)
}

#[cfg(test)]
mod tests {
    use super::is_silenced;

    #[test]
    fn the_codec_is_silent() {
        for target in ["stun_types", "stun_types::message", "turn_types::channel", "stun_proto::agent"] {
            assert!(is_silenced(target), "{target}");
        }
        for target in ["halfway::turn", "stun_types_too", "hyper"] {
            assert!(!is_silenced(target), "{target}");
        }
    }
}
