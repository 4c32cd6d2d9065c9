//! This host: what it lets a server do, and what it has for one.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};

use super::{Check, Diagnosis, now};
use crate::{
    clock,
    config::Config,
    data_dir::DataDir,
    host::{Host, Relays},
    relay::{
        LISTENER_BUFFER,
        xdp::{self, Prospect},
    },
    udp::Offload,
};

/// Descriptors beside those of relayed addresses: listeners, files, agents of a small host.
const OTHER_DESCRIPTORS: u64 = 4_096;
/// How long a server on this host may take to say that it is well.
const PATIENCE: Duration = Duration::from_secs(1);
/// A clock that is before this second of the Unix epoch was never set (2025-01-01).
const SET_SINCE: u64 = 1_735_689_600;

/// Examines this host for the server that the configuration describes. Nothing that it opens lasts.
#[must_use]
pub fn examine(config: &Config) -> Diagnosis {
    let started = now();
    let mut checks = vec![data_dir(&config.data_dir), clock_is_set()];
    checks.extend(ports(config));
    checks.push(descriptors(config));
    checks.push(buffers());
    checks.push(offload());
    checks.extend(kernel_path(config));
    checks.push(relay_ports(config));
    checks.extend(conntrack(config));
    checks.extend(addresses(config));
    checks.push(Check::ok(
        "shards",
        format!("{}, one for each core unless turn.shards says otherwise", config.turn.shards),
    ));
    Diagnosis { subject: "this host".to_owned(), checks, took: now() - started, ..Diagnosis::default() }
}

fn data_dir(path: &Path) -> Check {
    let name = "data-dir";
    let secret = path.join("secret");
    match fs::metadata(&secret) {
        Ok(found) if found.permissions().mode() & 0o077 != 0 => {
            let advice = format!("chmod 600 {}: who reads it mints tokens and credentials", secret.display());
            Check::fail(name, format!("others may read {}", secret.display()), advice)
        }
        Ok(_) => match DataDir::new(path).secret() {
            Ok(_) => Check::ok(name, format!("{} has its secret", path.display())),
            Err(error) => {
                Check::fail(name, error.to_string(), "run this as the user that the server runs as")
            }
        },
        Err(error) if error.kind() == ErrorKind::NotFound => Check::warn(
            name,
            format!("{} has no secret yet", path.display()),
            "the first start of halfway serve makes it",
        ),
        Err(error) => Check::fail(
            name,
            format!("{}: {error}", secret.display()),
            "run this as the user that the server runs as",
        ),
    }
}

/// Tokens and credentials end at times that others' clocks agree on.
fn clock_is_set() -> Check {
    if clock::now().unix() >= SET_SINCE {
        return Check::ok("clock", "set");
    }
    Check::fail("clock", "it was never set", "tokens and certificates depend on it: run a time service")
}

/// Whether each port can be had.
fn ports(config: &Config) -> Vec<Check> {
    let running = config.admin.listen.iter().any(|admin| is_well(*admin));
    let tcp = |at: &SocketAddr| TcpListener::bind(at).map(drop);
    let udp = |at: &SocketAddr| UdpSocket::bind(at).map(drop);
    let https = config.http.listen.iter().map(|at| ("HTTPS", at, tcp(at)));
    let relay = config
        .turn
        .listen
        .iter()
        .flat_map(|at| [("TURN over UDP", at, udp(at)), ("TURN over TCP", at, tcp(at))]);
    let more = config.turn.tls_listen.iter().map(|at| ("TURN over TLS", at, tcp(at)));
    https.chain(relay).chain(more).map(|(what, at, bound)| port(what, *at, bound, running)).collect()
}

fn port(what: &str, at: SocketAddr, bound: std::io::Result<()>, running: bool) -> Check {
    let name = "port";
    let Err(error) = bound else { return Check::ok(name, format!("{at} is free for {what}")) };
    match error.kind() {
        ErrorKind::AddrInUse if running => {
            Check::ok(name, format!("{at}, {what}: held by the Halfway that runs here"))
        }
        ErrorKind::AddrInUse => Check::fail(
            name,
            format!("{at}, {what}: another program holds it"),
            "stop that program, or choose another port",
        ),
        ErrorKind::PermissionDenied => {
            let advice = "give the program CAP_NET_BIND_SERVICE, as halfway.service does, or choose a port from 1024 on";
            Check::fail(name, format!("{at}, {what}: this user may not have it"), advice)
        }
        _ => Check::fail(name, format!("{at}, {what}: {error}"), "is this address one of this host's?"),
    }
}

/// Whether a Halfway answers on its operator's port.
fn is_well(admin: SocketAddr) -> bool {
    let asked = || {
        let mut stream = TcpStream::connect_timeout(&admin, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = [0; 15];
        stream.read_exact(&mut answer)?;
        Ok::<_, std::io::Error>(answer.starts_with(b"HTTP/1.1 200"))
    };
    asked().unwrap_or(false)
}

fn descriptors(config: &Config) -> Check {
    let (name, limit) = ("descriptors", getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard));
    let all = config.turn.relay_ports.len() as u64;
    let relays = match config.turn.allocations_total {
        0 => all,
        total => all.min(u64::from(total)),
    };
    if limit >= relays + OTHER_DESCRIPTORS {
        return Check::ok(name, format!("{limit} may be open: enough for {relays} allocations"));
    }
    let detail = format!("{limit} may be open, but {relays} allocations can be asked for");
    Check::warn(
        name,
        detail,
        format!(
            "LimitNOFILE={} in the unit, or ulimit -n; the smaller number is the limit",
            relays + OTHER_DESCRIPTORS
        ),
    )
}

/// Full buffers lose packets.
fn buffers() -> Check {
    let smallest = ["rmem_max", "wmem_max"].map(|key| (key, number(&format!("net/core/{key}"))));
    match smallest.into_iter().filter_map(|(key, bytes)| Some((key, bytes?))).min_by_key(|(_, bytes)| *bytes)
    {
        Some((key, bytes)) if bytes < LISTENER_BUFFER as u64 => Check::warn(
            "buffers",
            format!("net.core.{key} is {bytes} bytes, and Halfway asks for {LISTENER_BUFFER}"),
            format!(
                "sysctl -w net.core.rmem_max={LISTENER_BUFFER} net.core.wmem_max={LISTENER_BUFFER}, or give it CAP_NET_ADMIN: else bursts are dropped"
            ),
        ),
        _ => Check::ok("buffers", format!("sockets can have {LISTENER_BUFFER} bytes each way")),
    }
}

fn offload() -> Check {
    match Offload::probe() {
        Offload { receive: true, send: true } => {
            Check::ok("offload", "UDP_GRO and UDP_SEGMENT: packets travel in trains")
        }
        _ => Check::warn(
            "offload",
            "this kernel lacks UDP_GRO or UDP_SEGMENT",
            "Linux 5.0 or newer relays with a fraction of the processor time",
        ),
    }
}

/// Whether `turn.xdp` can be had, and how. The program is loaded, and put nowhere.
fn kernel_path(config: &Config) -> Vec<Check> {
    let name = "xdp";
    let is_off = config.turn.xdp.is_none();
    if let Err(why) = xdp::load() {
        let detail = format!("the kernel does not take the program: {why}");
        if is_off {
            return vec![Check::ok(name, format!("off; {detail}"))];
        }
        let advice =
            "see \"In the kernel\" in operating.md, or turn.xdp = \"off\": user space relays meanwhile";
        return vec![Check::warn(name, detail, advice)];
    }
    let relays = Host::look()
        .map(|host| Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips).addresses)
        .unwrap_or_default();
    let prospects = xdp::prospects(&xdp::addresses(&relays, &config.turn.listen));
    if prospects.is_empty() {
        return vec![Check::ok(name, "it can run here, but no interface has the relay's addresses")];
    }
    prospects.iter().map(|prospect| on_interface(prospect, is_off)).collect()
}

fn on_interface(prospect: &Prospect, is_off: bool) -> Check {
    let Prospect { name, driver, program } = prospect;
    let how = match driver {
        Some(driver) if prospect.is_native() => format!("in its driver, {driver}"),
        Some(driver) => format!("in generic mode at least ({driver} is not known to run it)"),
        None => "in generic mode, or in the driver below".to_owned(),
    };
    let can = format!("{}{name} can have it {how}", if is_off { "off; " } else { "" });
    match program {
        Some(number) => Check::ok("xdp", format!("{can}; program {number} is there now (bpftool prog show)")),
        None => Check::ok("xdp", can),
    }
}

/// The kernel gives ports to whoever asks for any; a relayed address must not be among them.
fn relay_ports(config: &Config) -> Check {
    let (first, last) = (*config.turn.relay_ports.start(), *config.turn.relay_ports.end());
    let detail = format!("{} from {first} to {last}", config.turn.relay_ports.len());
    let given = setting("net/ipv4/ip_local_port_range").unwrap_or_default().replace(char::is_whitespace, "-");
    let reserved = setting("net/ipv4/ip_local_reserved_ports").unwrap_or_default();
    let is_reserved = ranges(&reserved).any(|(from, to)| from <= first && last <= to);
    match ranges(given.trim_matches('-')).find(|(from, to)| *from <= last && first <= *to) {
        Some((from, to)) if !is_reserved => {
            let advice = format!(
                "sysctl -w net.ipv4.ip_local_reserved_ports={first}-{last}, unless something else needs them"
            );
            Check::warn(
                "relay-ports",
                format!("{detail}; other programs can be given some of them ({from}-{to})"),
                advice,
            )
        }
        _ => Check::ok("relay-ports", detail),
    }
}

/// Ports as the kernel lists them: `A-B,C`.
fn ranges(list: &str) -> impl Iterator<Item = (u16, u16)> {
    list.trim().split(',').filter_map(|range| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        Some((from.parse().ok()?, to.parse().ok()?))
    })
}

/// A table that is full drops the packets of new peers. Where there is no table, there is nothing to say.
fn conntrack(config: &Config) -> Option<Check> {
    let (most, now) =
        (number("net/netfilter/nf_conntrack_max")?, number("net/netfilter/nf_conntrack_count")?);
    let wanted = 2 * config.turn.relay_ports.len() as u64;
    let detail = format!("{now} of {most} connections are tracked");
    if most >= wanted {
        return Some(Check::ok("conntrack", detail));
    }
    let advice = format!(
        "sysctl -w net.netfilter.nf_conntrack_max={wanted}, or notrack for the relay's ports: a full table drops packets"
    );
    Some(Check::warn("conntrack", detail, advice))
}

/// What peers will be told.
fn addresses(config: &Config) -> Vec<Check> {
    let host = match Host::look() {
        Ok(host) => host,
        Err(error) => {
            return vec![Check::fail("addresses", format!("cannot list them: {error}"), "is /proc there?")];
        }
    };
    let relays = Relays::resolve(&host, &config.turn.relay_ips, &config.public_ips);
    let told: Vec<_> = relays.addresses.iter().map(|address| address.public.to_string()).collect();
    let mut checks: Vec<_> = relays
        .warnings
        .iter()
        .map(|warning| Check::warn("addresses", warning, "name what the world sees: --public-ip IP"))
        .collect();
    if told.is_empty() {
        checks.push(Check::fail("addresses", "none to relay at", "name one: --public-ip IP"));
    } else {
        checks.push(Check::ok("addresses", format!("peers see {}", told.join(" and "))));
    }
    if !host.ipv6 {
        checks.push(Check::warn("ipv6", "this host has none", "agents with IPv6 alone cannot reach it"));
    }
    checks
}

fn setting(key: &str) -> Option<String> {
    fs::read_to_string(Path::new("/proc/sys").join(key)).ok()
}

fn number(key: &str) -> Option<u64> {
    setting(key)?.trim().parse().ok()
}
