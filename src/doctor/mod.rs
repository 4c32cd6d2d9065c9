//! Examination: how a server looks from where an agent stands (`halfway doctor`), and what this host lacks (`--local`).

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use hyper::Uri;
use tokio::time::timeout;

use crate::{
    bench::{percentile, progress, turn::Transport},
    clock,
};
use https::Server;
use ice::Servers;
use nat::{Behaviour, Reach};
use relayed::Relayed;
pub use report::{Check, Diagnosis, Outcome};

mod hops; // the routers on the way, by the errors they send
mod https; // the server by HTTPS, and its certificate
mod ice; // the list of STUN and TURN servers that the server gives
mod ipv6; // a relayed address of IPv6
pub mod local; // this host: rights, kernel, limits
pub mod nat; // what was seen of a NAT, its kind, and what that means
mod probing; // what a NAT does with packets
mod relayed; // an allocation, by the published client
mod report; // what was found, for people and for programs
mod signaling; // a WebSocket, or what stands in for it

/// How long all of it may take, one check, and the probes of a NAT.
const ALL_OF_IT: Duration = Duration::from_millis(9_500);
const PATIENCE: Duration = Duration::from_millis(2_500);
const PROBING: Duration = Duration::from_secs(4);
/// Packets whose round trips are measured, how far they are apart, and how long the last may take.
const PACKETS: u32 = 100;
const APART: Duration = Duration::from_millis(5);
const LAST: Duration = Duration::from_millis(600);

/// What is examined, and how.
pub struct Visit {
    /// The server's base: `https://HOST[:PORT]`.
    pub url: Uri,
    pub token: String,
    /// Certificates to trust beside the system's.
    pub ca: Option<PathBuf>,
    /// Goes on with a server that nobody vouches for.
    pub insecure: bool,
    /// `http://HOST:PORT` of a proxy that speaks CONNECT.
    pub proxy: Option<Uri>,
    /// `HOST[:PORT]` of another STUN server, at another address than the one examined.
    pub stun: Option<String>,
}

/// Examines a server from here. Takes less than ten seconds, whatever the network swallows.
///
/// # Errors
/// One line for people, when not even a check could be begun.
pub fn examine(visit: &Visit) -> Result<Diagnosis, String> {
    let started = now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start: {error}"))?;
    let mut diagnosis = Diagnosis { subject: visit.url.to_string(), ..Diagnosis::default() };
    runtime.block_on(async {
        if timeout(ALL_OF_IT, examined(visit, &mut diagnosis)).await.is_err() {
            let advice = "the network swallows packets rather than refuse them: try the parts that are missing one by one";
            diagnosis.checks.push(Check::fail("time", "not everything was examined in time", advice));
        }
    });
    // A look-up of a name that hangs is not waited for.
    runtime.shutdown_background();
    progress("");
    diagnosis.took = now() - started;
    Ok(diagnosis)
}

async fn examined(visit: &Visit, diagnosis: &mut Diagnosis) {
    progress("HTTPS …");
    let Some(server) = Server::reached(visit, &mut diagnosis.checks).await else { return };
    let Some(servers) = ice::asked(&server, visit, &mut diagnosis.checks).await else { return };
    progress("signaling, STUN, TURN over UDP, TCP and TLS …");
    let (signaling, stun, udp, tcp, tls) = tokio::join!(
        signaling::checked(&server, visit),
        stun(&servers),
        over_udp(&servers, visit),
        over_stream(&servers, Transport::Tcp, &server),
        over_stream(&servers, Transport::Tls, &server),
    );
    let reach = Reach { udp: udp.works, tcp: tcp.outcome == Outcome::Ok, tls: tls.outcome == Outcome::Ok };
    diagnosis.checks.push(signaling);
    diagnosis.checks.extend(stun);
    diagnosis.checks.extend(udp.checks);
    diagnosis.checks.extend([tcp, tls]);
    weigh(&mut diagnosis.checks, reach);
    (diagnosis.ipv4, diagnosis.ipv6) = (udp.ipv4, udp.ipv6);
    for (family, behaviour) in [("nat-ipv4", &diagnosis.ipv4), ("nat-ipv6", &diagnosis.ipv6)] {
        if let Some(behaviour) = behaviour {
            diagnosis.checks.push(Check::ok(family, behaviour.to_string()));
        }
    }
    diagnosis.paths = nat::paths(diagnosis.ipv4.as_ref(), diagnosis.ipv6.as_ref(), reach);
}

/// One way to the relay is enough; a network that closes the others is not the server's fault.
fn weigh(checks: &mut [Check], reach: Reach) {
    if !reach.any() {
        return;
    }
    for check in checks.iter_mut().filter(|check| check.outcome == Outcome::Fail) {
        if check.name.starts_with("turn-") || check.name.starts_with("stun-") {
            check.outcome = Outcome::Warn;
            check.advice = if reach.udp {
                "nothing for agents here, who use UDP; others may depend on it".to_owned()
            } else {
                format!(
                    "agents here reach the relay over {}, which is slower than UDP",
                    reach.ways().join(" or ")
                )
            };
        }
    }
}

/// STUN, to each address of the server.
async fn stun(servers: &Servers) -> Vec<Check> {
    let mut checks = Vec::new();
    for server in servers.stun() {
        let name = if server.is_ipv4() { "stun-ipv4" } else { "stun-ipv6" };
        let started = now();
        checks.push(match probing::mapped(server).await {
            Ok(mapped) => Check::ok(name, format!("{server} sees us as {mapped}")).after(now() - started),
            Err(problem) => {
                Check::fail(name, format!("{server}: {problem}"), "UDP does not get through: open UDP 3478")
            }
        });
    }
    checks
}

/// What UDP showed.
#[derive(Default)]
struct OverUdp {
    works: bool,
    checks: Vec<Check>,
    ipv4: Option<Behaviour>,
    ipv6: Option<Behaviour>,
}

/// TURN over UDP, and with it the NAT, in each family.
async fn over_udp(servers: &Servers, visit: &Visit) -> OverUdp {
    let mut addresses: Vec<_> = servers.over_udp().collect();
    if addresses.is_empty() {
        // Then STUN may tell something of the NAT yet.
        addresses = servers.stun().collect();
    }
    let of = |ipv4: bool| addresses.iter().copied().find(|address| address.is_ipv4() == ipv4);
    let family = async |server| match server {
        Some(server) => Some(family_over_udp(server, servers, visit).await),
        None => None,
    };
    let mut found = OverUdp::default();
    let (ipv4, ipv6) = tokio::join!(family(of(true)), family(of(false)));
    for (behaviour, into) in [(ipv4, &mut found.ipv4), (ipv6, &mut found.ipv6)] {
        if let Some((works, checks, behaviour)) = behaviour {
            found.works |= works;
            found.checks.extend(checks);
            *into = Some(behaviour);
        }
    }
    if found.checks.is_empty() {
        let advice = "has the server's name an address that this host has a way to?";
        found.checks.push(Check::fail("turn-udp", "the list names no TURN server over UDP", advice));
    }
    found
}

async fn family_over_udp(
    server: SocketAddr,
    servers: &Servers,
    visit: &Visit,
) -> (bool, Vec<Check>, Behaviour) {
    let (name, started) = (if server.is_ipv4() { "turn-udp" } else { "turn-udp-ipv6" }, now());
    let mut seen = nat::Seen::default();
    let relayed = match timeout(PATIENCE, Relayed::over_udp(server, servers)).await {
        Ok(Ok(relayed)) => relayed,
        failed => {
            let _ = timeout(PROBING, probing::mapping(server, &mut seen)).await;
            let check = failed_turn(name, &server.to_string(), failed.map(Result::err));
            return (false, vec![check], Behaviour::of(&seen));
        }
    };
    let allocated =
        Check::ok(name, format!("{server} relays at {}", relayed.address())).after(now() - started);
    let relays = round_trips(&relayed).await;
    let works = relays.outcome != Outcome::Fail;
    // What was seen until then is worth something, too.
    let _ =
        timeout(PROBING, probing::observe(server, servers, &relayed, visit.stun.as_deref(), &mut seen)).await;
    relayed.release().await;
    (works, vec![allocated, relays], Behaviour::of(&seen))
}

async fn over_stream(servers: &Servers, transport: Transport, server: &Server) -> Check {
    let name = if transport == Transport::Tcp { "turn-tcp" } else { "turn-tls" };
    let Some((host, port)) = servers.first(transport) else {
        let advice = "give the server a certificate that agents trust: some networks let nothing out but TLS";
        return Check::warn(name, format!("the list names no TURN server over {}", transport.name()), advice);
    };
    let (started, at) = (now(), format!("{host}:{port}"));
    let asked = async {
        let relayed = Relayed::over_stream(&host, port, transport, server, servers).await?;
        let (echoed, address) = (relayed.echo(1, APART, LAST).await, relayed.address());
        relayed.release().await;
        if echoed?.is_empty() {
            Err("what was sent through it did not come back".to_owned())
        } else {
            Ok(address)
        }
    };
    match timeout(PATIENCE, asked).await {
        Ok(Ok(address)) => Check::ok(name, format!("{at} relays at {address}")).after(now() - started),
        failed => failed_turn(name, &at, failed.map(Result::err)),
    }
}

fn failed_turn(
    name: &str,
    server: &str,
    failed: Result<Option<String>, tokio::time::error::Elapsed>,
) -> Check {
    let problem =
        failed.ok().flatten().unwrap_or_else(|| format!("no answer for {} ms", PATIENCE.as_millis()));
    let advice =
        "is the port open in the firewalls here and there? Does another agent use up this one's allocations?";
    Check::fail(name, format!("{server}: {problem}"), advice)
}

/// From here to our own relayed address and back: once to the relay, and once back.
async fn round_trips(relayed: &Relayed) -> Check {
    let mut trips = match relayed.echo(PACKETS, APART, LAST).await {
        Ok(trips) => trips,
        Err(problem) => return Check::fail("relay", problem, "the server refuses its own relayed addresses"),
    };
    let lost = PACKETS - trips.len() as u32;
    let mut at = |percent| percentile(&mut trips, percent) / 1_000.0;
    let detail = format!(
        "to the relay and back: p50 {:.1} ms, p95 {:.1} ms, {lost} of {PACKETS} lost",
        at(50),
        at(95)
    );
    match lost {
        0 => Check::ok("relay", detail),
        PACKETS => Check::fail(
            "relay",
            "nothing that was sent through the relay came back",
            "look at the server's dropped packets",
        ),
        _ => Check::warn(
            "relay",
            detail,
            "the way to the relay loses packets: another link or another host may be better",
        ),
    }
}

fn now() -> Instant {
    clock::now().mono
}

/// Any port of our own, in the family of the server.
fn any(server: SocketAddr) -> SocketAddr {
    if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0; 16], 0).into() }
}
