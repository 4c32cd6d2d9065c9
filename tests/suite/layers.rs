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
const FORBIDDEN_BETWEEN: [(&str, &[&str]); 10] = [
    ("udp", &["crate::turn", "crate::relay", "crate::door", "crate::http", "crate::signaling", "tokio"]),
    ("turn", &["crate::signaling"]),
    ("signaling", &["crate::turn"]),
    ("credentials", &["crate::signaling", "crate::turn"]),
    ("relay", &["crate::http", "crate::signaling", "crate::app", "crate::config", "hyper"]),
    ("http", &["crate::relay", "crate::turn", "crate::cluster", "crate::app", "async_nats"]),
    ("cluster", &["crate::relay", "crate::turn", "crate::door", "crate::app", "hyper"]),
    ("acme", &["crate::relay", "crate::turn", "crate::http", "crate::signaling", "crate::app"]),
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

/// Without comments, and without the tests, which stand at the end or, if they are many, in a file of captures.
fn code(file: &Path) -> String {
    if file.ends_with("captures.rs") {
        return String::new();
    }
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

#[test]
fn every_warning_is_in_the_documentation() {
    let page = fs::read_to_string("docs/operating.md").unwrap();
    let section = page.split("### What this WARN means").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut found = 0;
    for file in sources(Path::new("src")) {
        for text in warnings(&code(&file)) {
            found += 1;
            // What is told with it differs from time to time; one of the parts that do not is what people look for.
            let parts = text.split(['{', '}']).step_by(2).flat_map(|part| part.split([':', ';']));
            let constant: Vec<_> =
                parts.map(|part| part.trim_matches([' ', ',', '`'])).filter(|part| part.len() > 8).collect();
            // A line that has none is in somebody else's words, which are written elsewhere.
            let is_known = constant.is_empty() || constant.iter().any(|part| section.contains(part));
            assert!(is_known, "{}: {text:?} is not documented", file.display());
        }
    }
    assert!(found > 20, "{found}");
}

/// The texts of all lines at WARN and ERROR.
fn warnings(code: &str) -> Vec<String> {
    let calls = code.match_indices("warn!(").chain(code.match_indices("error!("));
    let text = |(at, _): (usize, &str)| {
        let start = at + code[at..].find('"')? + 1;
        Some(code[start..start + code[start..].find('"')?].to_owned())
    };
    calls.filter_map(text).collect()
}
