//! The arrows of `docs/architecture.md`: who may name whom.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A core module knows no socket, task, thread or clock, and none of the shell.
const CORE: [&str; 3] = ["turn", "signaling", "credentials"];
const FORBIDDEN_IN_CORE: [&str; 20] = [
    "tokio",
    "hyper",
    "rustls",
    "socket2",
    "libc::",
    "std::thread",
    "std::process",
    "std::fs",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "Instant::now",
    "SystemTime::now",
    "clock::now",
    "crate::relay",
    "crate::http",
    "crate::tls",
    "crate::door",
    "crate::app",
    "crate::config",
];
/// What else each may not name: signaling knows nothing of TURN, nor TURN of signaling; credentials know neither.
const FORBIDDEN_BETWEEN: [(&str, &[&str]); 8] = [
    ("udp", &["crate::turn", "crate::relay", "crate::door", "crate::http", "crate::signaling", "tokio"]),
    ("turn", &["crate::signaling"]),
    ("signaling", &["crate::turn"]),
    ("credentials", &["crate::signaling", "crate::turn"]),
    ("relay", &["crate::http", "crate::signaling", "crate::app", "crate::config", "hyper"]),
    ("http", &["crate::relay", "crate::turn", "crate::app"]),
    (
        "doctor",
        &["crate::turn", "crate::signaling", "crate::http", "crate::door", "crate::app", "crate::commands"],
    ),
    ("door", &["crate::relay", "crate::http", "crate::turn", "crate::app", "hyper"]),
];

#[test]
fn the_core_knows_no_shell() {
    for module in CORE {
        assert_silent_about(module, &FORBIDDEN_IN_CORE);
    }
}

#[test]
fn modules_know_only_those_below_them() {
    for (module, forbidden) in FORBIDDEN_BETWEEN {
        assert_silent_about(module, forbidden);
    }
}

#[test]
fn only_the_clock_reads_the_clock() {
    for file in sources(Path::new("src")).iter().filter(|file| !file.ends_with("clock.rs")) {
        for reading in ["Instant::now", "SystemTime::now", ".elapsed()"] {
            assert!(!code(file).contains(reading), "{} names {reading}", file.display());
        }
    }
}

#[test]
fn nothing_is_called_by_a_word_that_says_nothing() {
    for file in sources(Path::new("src")) {
        let name = file.file_stem().unwrap().to_string_lossy().to_lowercase();
        for word in ["manager", "handler", "util", "common", "helper", "misc"] {
            assert!(!name.contains(word), "{}", file.display());
        }
    }
}

fn assert_silent_about(module: &str, forbidden: &[&str]) {
    let files = sources(&Path::new("src").join(module));
    assert!(!files.is_empty(), "{module} has gone somewhere else");
    for file in files {
        let code = code(&file);
        for name in forbidden {
            assert!(!code.contains(name), "{} names {name}", file.display());
        }
    }
}

/// Without comments, and without the tests at the end.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    code.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}
