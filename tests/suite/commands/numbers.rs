//! `/metrics`, of a `halfway serve` to which everything happens that is counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
};

use super::{
    halfway,
    instance::{Caller, Instance},
    line,
};

const SECRET: &str = "sixteen bytes and more";
const CONFIG: &str = "[credentials]\nsecrets = ['sixteen bytes and more']\n[turn]\nallow_peers = ['127.0.0.0/8']\n\
     [signaling]\nmessages_per_second = 0\n";
/// These have nothing to do in a test of seconds: what moves them is elsewhere.
const ELSEWHERE: [(&str, &str); 12] = [
    ("halfway_xdp_interfaces", "tests/lab/xdp.py"),
    ("halfway_xdp_channels", "tests/lab/xdp.py"),
    ("halfway_xdp_relayed_packets_total", "tests/lab/xdp.py"),
    ("halfway_xdp_passed_packets_total", "tests/lab/xdp.py, and tests/xdp"),
    ("halfway_cluster_up", "tests/lab/cluster.py"),
    ("halfway_cluster_nodes", "tests/lab/cluster.py"),
    ("halfway_cluster_agents", "tests/lab/cluster.py"),
    ("halfway_cluster_frames_total", "tests/lab/cluster.py"),
    ("halfway_cluster_unanswered_total", "tests/lab/cluster.py"),
    ("halfway_cluster_sessions_total", "tests/lab/cluster.py"),
    ("halfway_clients_handed_over", "suite::commands::upgrade"),
    // Loopback takes all at once.
    ("halfway_relay_stream_waiting_bytes", "the unit test of the page"),
];

/// Every sample of the page.
fn samples(instance: &Instance) -> BTreeMap<String, f64> {
    let page = instance.admin("GET /metrics");
    assert!(page.contains("content-type: text/plain; version=0.0.4"), "{page}");
    let body = page.split("\r\n\r\n").nth(1).unwrap();
    let lines = body.lines().filter(|line| !line.starts_with('#') && line.starts_with("halfway_"));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The metric that a sample belongs to.
fn family(sample: &str) -> String {
    let name = sample.split('{').next().unwrap();
    let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
    histogram.filter(|name| name.ends_with("_seconds")).unwrap_or(name).to_owned()
}

#[test]
fn every_number_moves_and_is_in_the_documentation() {
    let instance = Instance::start(CONFIG);
    let first = samples(&instance);
    let mut moved = BTreeSet::new();
    let look = |moved: &mut BTreeSet<String>| {
        let now = samples(&instance);
        let changed = now.iter().filter(|(name, value)| **value != 0.0 && first.get(*name) != Some(*value));
        moved.extend(changed.map(|(name, _)| name.clone()));
    };

    // The relay, over UDP and TCP: what is done, refused and dropped.
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut alice = Caller::new(&instance, "alice", SECRET);
    let relayed = alice.allocate();
    assert_eq!(alice.ask("Allocate auth"), "Allocate 437 signed");
    assert_eq!(alice.ask("CreatePermission auth peer=10.0.0.1:0"), "CreatePermission 403 signed");
    let bind = format!("ChannelBind auth channel=4000 peer={}", peer.local_addr().unwrap());
    assert_eq!(alice.ask(&bind), "ChannelBind ok signed");
    alice.say("ChannelData 4000 there");
    peer.recv_from(&mut [0; 64]).unwrap();
    peer.send_to(b"and back", relayed).unwrap();
    assert_eq!(alice.hear(), "ChannelData 0x4000 and back");
    alice.say("ChannelData 4001 nowhere");
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"@\0\0\0", instance.turn).unwrap();
    UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"nonsense", instance.turn).unwrap();
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    stranger.send_to(b"not permitted", relayed).unwrap();
    assert!(alice.ask("Binding").starts_with("Binding ok"));
    let uri = |transport: &str| format!("turn:{}?transport={transport}", instance.turn);
    let bench = |run: &str, transport: &str| {
        let uri = uri(transport);
        let args =
            ["bench", "turn", &uri, "--secret", SECRET, "--run", run, "--clients", "2", "--time", "1s"];
        let mut command = halfway(&instance.dir, &args);
        command.args(["--rate", "200"]);
        command
    };
    let mut over_tcp = bench("pair", "tcp").spawn().unwrap();
    while !moved.contains("halfway_allocations{transport=\"tcp\"}") {
        look(&mut moved);
        assert!(over_tcp.try_wait().unwrap().is_none(), "no allocation over TCP was seen");
    }
    assert!(over_tcp.wait().unwrap().success());

    // Signaling: agents in pairs, and what they may not say. The door: who speaks nothing that we know.
    let url = format!("https://{}", instance.https);
    let signal =
        ["bench", "signal", &url, "--agents", "4", "--run", "pairs", "--run", "room", "--time", "1s"];
    let mut agents = halfway(&instance.dir, &signal).spawn().unwrap();
    while !moved.contains("halfway_rooms") {
        look(&mut moved);
        assert!(agents.try_wait().unwrap().is_none(), "no agent was seen");
    }
    assert!(agents.wait().unwrap().success());
    TcpStream::connect(&instance.https).unwrap().write_all(b"\xff\xff").unwrap();
    instance.admin("GET /nothing");
    assert_eq!(alice.ask("Refresh auth lifetime=0"), "Refresh ok lifetime=0 signed");
    look(&mut moved);
    let frames = r#"[{"type":"hello"},{"type":"bye","to":"nobody"}]"#;
    let token = line(&mut halfway(&instance.dir, &["token", "carol"]));
    assert_eq!(instance.ask("POST /v1/signal", &token, frames).0, 200);
    look(&mut moved);
    let _only = TcpStream::connect(&instance.https).unwrap();
    instance.reload(&format!("{CONFIG}[http]\nconnections_total = 1\n"));
    assert_eq!(TcpStream::connect(&instance.https).unwrap().read(&mut [0]).unwrap_or(0), 0);
    look(&mut moved);
    let mut bob = Caller::new(&instance, "bob", SECRET);
    bob.allocate();
    instance.admin("POST /drain");
    while !moved.contains("halfway_draining") {
        look(&mut moved);
    }

    let families: BTreeSet<String> = first.keys().map(|sample| family(sample)).collect();
    let moving: BTreeSet<String> = moved.iter().map(|sample| family(sample)).collect();
    let constant =
        ["halfway_build_info", "halfway_start_time_seconds", "halfway_certificate_expiry_timestamp_seconds"];
    assert!(
        constant
            .iter()
            .all(|name| first.iter().any(|(sample, value)| family(sample) == *name && *value > 0.0))
    );
    let elsewhere = ELSEWHERE.map(|(name, _)| name);
    let still: Vec<_> = families
        .difference(&moving)
        .filter(|name| !constant.contains(&name.as_str()) && !elsewhere.contains(&name.as_str()))
        .collect();
    assert!(still.is_empty(), "nothing moved {still:?}");
    check_documentation(&families);
}

/// The table of numbers in `docs/operating.md` has a line for each, and for nothing else.
fn check_documentation(families: &BTreeSet<String>) {
    let page = std::fs::read_to_string("docs/operating.md").unwrap();
    let section = page.split("\n## Numbers\n").nth(1).unwrap().split("\n## ").next().unwrap();
    let named = |line: &str| Some(line.strip_prefix("| `")?.split(['`', '{']).next()?.to_owned());
    let documented: BTreeSet<String> = section.lines().filter_map(named).collect();
    assert_eq!(&documented, families);
}

#[test]
fn prometheus_is_given_the_format_it_asks_for() {
    let instance = Instance::start("");
    let asked =
        "GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5";
    let mut stream = TcpStream::connect(&instance.admin).unwrap();
    write!(stream, "{asked}\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.contains("content-type: application/openmetrics-text; version=1.0.0"), "{page}");
    assert!(page.ends_with("# EOF\n") && page.contains("# TYPE halfway_bindings counter\n"));
}
