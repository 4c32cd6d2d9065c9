//! What was found, for people and for programs.

use std::{fmt::Write as _, time::Duration};

use serde_json::{Value, json};

use super::nat::{self, Behaviour};

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    /// It works, but something about it should be known.
    Warn,
    Fail,
}

impl Outcome {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One check.
#[derive(Clone, Debug)]
pub struct Check {
    pub name: String,
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
    /// What to do; empty if nothing.
    pub advice: String,
    pub took: Option<Duration>,
}

impl Check {
    pub(super) fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self::new(name, Outcome::Ok, detail, "")
    }

    pub(super) fn warn(name: &str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(name, Outcome::Warn, detail, advice)
    }

    pub(super) fn fail(name: &str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(name, Outcome::Fail, detail, advice)
    }

    fn new(name: &str, outcome: Outcome, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        // Some of it was said by the other side, and goes to a terminal.
        let printable = |text: String| text.chars().filter(|char| !char.is_control()).collect();
        let (detail, advice) = (printable(detail.into()), printable(advice.into()));
        Self { name: name.to_owned(), outcome, detail, advice, took: None }
    }

    pub(super) fn after(mut self, took: Duration) -> Self {
        self.took = Some(took);
        self
    }
}

/// All that was found.
#[derive(Debug, Default)]
pub struct Diagnosis {
    /// What was examined.
    pub subject: String,
    pub checks: Vec<Check>,
    pub ipv4: Option<Behaviour>,
    pub ipv6: Option<Behaviour>,
    /// Whom an agent here meets, and how: for each kind of peer.
    pub paths: Vec<nat::Path>,
    pub took: Duration,
}

impl Diagnosis {
    /// Whether nothing failed.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.checks.iter().all(|check| check.outcome != Outcome::Fail)
    }

    /// For people: a line a check, and a table of whom an agent here can meet.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for Check { name, outcome, detail, advice, took } in &self.checks {
            let took = took.map_or(String::new(), |took| format!(" ({} ms)", took.as_millis()));
            let advice = if advice.is_empty() { String::new() } else { format!(" → {advice}") };
            let _ = writeln!(text, "{:<4} {name:<14} {detail}{took}{advice}", outcome.name());
        }
        if !self.paths.is_empty() {
            let _ = writeln!(text, "\nAn agent here meets agents behind");
        }
        for nat::Path { peer, way, why } in &self.paths {
            let _ = writeln!(text, "  {:<28} {:<18} {why}", peer.what(), way.name());
        }
        text.trim_end().to_owned()
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let check = |check: &Check| {
            let mut told =
                json!({"name": check.name, "outcome": check.outcome.name(), "detail": check.detail});
            if !check.advice.is_empty() {
                told["advice"] = json!(check.advice);
            }
            if let Some(took) = check.took {
                told["milliseconds"] = json!(took.as_millis() as u64);
            }
            told
        };
        let path =
            |path: &nat::Path| json!({"peer": path.peer.name(), "path": path.way.name(), "why": path.why});
        json!({
            "url": self.subject,
            "ok": self.is_sound(),
            "seconds": (self.took.as_secs_f64() * 1_000.0).round() / 1_000.0,
            "checks": self.checks.iter().map(check).collect::<Vec<_>>(),
            "nat": {"ipv4": self.ipv4.as_ref().map(Behaviour::json), "ipv6": self.ipv6.as_ref().map(Behaviour::json)},
            "paths": self.paths.iter().map(path).collect::<Vec<_>>(),
        })
    }
}
