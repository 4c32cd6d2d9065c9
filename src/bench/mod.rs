//! Load, and what it costs: `halfway bench`.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use nix::unistd::{SysconfVar, sysconf};
use serde_json::{Map, Value, json};

mod agent; // one agent of the load: connects, speaks, hears
pub mod signal; // agents over WSS: idle, in pairs, in rooms, back after a restart

/// What was measured, in the order in which it was.
#[derive(Debug, Default)]
pub struct Report {
    figures: Vec<(&'static str, Figure)>,
}

#[derive(Debug)]
struct Figure {
    /// Its name in JSON.
    name: &'static str,
    what: &'static str,
    value: f64,
    unit: &'static str,
}

impl Report {
    fn add(
        &mut self,
        run: &'static str,
        name: &'static str,
        what: &'static str,
        value: f64,
        unit: &'static str,
    ) {
        self.figures.push((run, Figure { name, what, value, unit }));
    }

    /// For people, a line a figure.
    #[must_use]
    pub fn table(&self) -> String {
        let line = |(run, figure): &(&str, Figure)| {
            format!("{run:<6} {:<44} {:>12.2} {}", figure.what, figure.value, figure.unit)
        };
        self.figures.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// For scripts: an object for each run.
    #[must_use]
    pub fn json(&self) -> Value {
        let mut runs = Map::new();
        for (run, figure) in &self.figures {
            let run = runs.entry(*run).or_insert_with(|| json!({}));
            run[figure.name] = json!(figure.value);
        }
        runs.into()
    }
}

/// The process under load, as the kernel accounts for it.
#[derive(Clone, Copy, Debug)]
struct Server {
    pid: u32,
}

impl Server {
    /// Processor time used so far, of all its threads.
    fn cpu(self) -> Option<Duration> {
        cpu(&format!("/proc/{}/stat", self.pid))
    }

    /// Resident memory in bytes.
    fn resident(self) -> Option<f64> {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid)).ok()?;
        let pages: f64 = statm.split(' ').nth(1)?.parse().ok()?;
        let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
        Some(pages * page as f64)
    }
}

/// Processor time from a `stat` file of the kernel (proc(5)).
fn cpu(stat: &str) -> Option<Duration> {
    let stat = fs::read_to_string(stat).ok()?;
    // The second field is a name in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    let a_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    Some(Duration::from_millis(ticks * 1_000 / a_second))
}

/// The middle, and the value that so many percent do not exceed, of samples that it sorts.
fn percentile(samples: &mut [u32], percent: usize) -> f64 {
    if samples.is_empty() {
        return f64::NAN;
    }
    samples.sort_unstable();
    f64::from(samples[(samples.len() - 1) * percent / 100])
}

/// One line that changes, and only on a terminal.
fn progress(line: &str) {
    let mut terminal = io::stderr();
    if terminal.is_terminal() {
        // Nothing is lost when it cannot be shown.
        let _ = write!(terminal, "\r\x1b[2K{line}");
        let _ = terminal.flush();
    }
}
