//! Load, and what it costs: `halfway bench`.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::unistd::{SysconfVar, sysconf};
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer, pki_types::pem::PemObject};
use serde_json::{Map, Value, json};

use crate::clock;

pub(crate) mod agent; // one agent of the load: connects, speaks, hears
pub mod signal; // agents over WSS: idle, in pairs, in rooms, back after a restart
pub mod turn; // clients and peers of a TURN server: packets, round trips, allocations

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
            format!("{run:<9} {:<44} {:>12.2} {}", figure.what, figure.value, figure.unit)
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
    /// Ourselves, the load.
    fn own() -> Self {
        Self { pid: std::process::id() }
    }

    /// Processor time used so far, of all its threads.
    fn cpu(self) -> Option<Duration> {
        self.exact_cpu().or_else(|| cpu(&format!("/proc/{}/stat", self.pid)))
    }

    /// The same to the nanosecond, where the kernel was built to tell.
    fn exact_cpu(self) -> Option<Duration> {
        let mut sum = Duration::ZERO;
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid)).ok()? {
            // A thread that has ended meanwhile is none that the next look would see.
            let Ok(told) = fs::read_to_string(thread.ok()?.path().join("schedstat")) else { continue };
            sum += Duration::from_nanos(told.split(' ').next()?.parse().ok()?);
        }
        (!sum.is_zero()).then_some(sum)
    }

    /// Resident memory in bytes.
    fn resident(self) -> Option<f64> {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid)).ok()?;
        let pages: f64 = statm.split(' ').nth(1)?.parse().ok()?;
        let page = sysconf(SysconfVar::PAGE_SIZE).ok()??;
        Some(pages * page as f64)
    }
}

/// Processor time that this machine has spent on anything.
fn machine_cpu() -> Option<Duration> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let fields = stat.lines().next()?.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok());
    // user, nice, system, idle, iowait, irq, softirq (proc(5)).
    let busy = fields.take(7).enumerate().filter(|(place, _)| !matches!(place, 3 | 4));
    in_ticks(busy.map(|(_, ticks)| ticks).sum())
}

fn in_ticks(ticks: u64) -> Option<Duration> {
    let a_second = u64::try_from(sysconf(SysconfVar::CLK_TCK).ok()??).ok()?;
    Some(Duration::from_millis(ticks * 1_000 / a_second))
}

/// Processor time from a `stat` file of the kernel (proc(5)).
fn cpu(stat: &str) -> Option<Duration> {
    let stat = fs::read_to_string(stat).ok()?;
    // The second field is a name in parentheses and may hold anything.
    let (_, rest) = stat.rsplit_once(") ")?;
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
    in_ticks(ticks)
}

/// What a client of TLS trusts: the certificates of a file.
fn trust(ca: &Path) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    trust_file(&mut roots, ca)?;
    client_of(roots)
}

/// Adds the certificates of a file.
pub(crate) fn trust_file(roots: &mut RootCertStore, ca: &Path) -> Result<(), String> {
    let pem = fs::read(ca).map_err(|error| {
        format!("{} cannot be read: {error}: name the server's certificate with --ca", ca.display())
    })?;
    for cert in CertificateDer::pem_slice_iter(&pem) {
        let cert = cert.map_err(|error| format!("{}: {error}", ca.display()))?;
        roots.add(cert).map_err(|error| format!("{}: {error}", ca.display()))?;
    }
    Ok(())
}

/// A client of TLS that trusts these.
pub(crate) fn client_of(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(tls.with_root_certificates(roots).with_no_client_auth()))
}

/// The middle, and the value that so many percent do not exceed, of samples that it sorts.
pub(crate) fn percentile(samples: &mut [u32], percent: usize) -> f64 {
    if samples.is_empty() {
        return f64::NAN;
    }
    samples.sort_unstable();
    f64::from(samples[(samples.len() - 1) * percent / 100])
}

/// One line that changes, and only on a terminal.
pub(crate) fn progress(line: &str) {
    let mut terminal = io::stderr();
    if terminal.is_terminal() {
        // Nothing is lost when it cannot be shown.
        let _ = write!(terminal, "\r\x1b[2K{line}");
        let _ = terminal.flush();
    }
}

/// What people should know beside the figures.
fn warn(line: &str) {
    progress("");
    // Nothing is lost when it cannot be shown.
    let _ = writeln!(io::stderr(), "halfway: {line}");
}

fn now() -> Instant {
    clock::now().mono
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}
