//! `halfway bench`, against a `halfway serve`.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use halfway::{
    bench::turn::{self, Credentials, Load, Run},
    credentials::turn_rest::TurnSecrets,
};
use serde_json::Value;

use super::{TempDir, first_start::Served, halfway, run};
use crate::loopback::{self, SECRET};

const SETTINGS: &str =
    "admin.listen = []\nhttp.handshakes_per_second_per_address = 0\nsignaling.messages_per_second = 0";

#[test]
fn signaling_under_load_loses_nothing_and_is_measured() {
    let dir = TempDir::new();
    dir.write("h.toml", SETTINGS);
    let listen = ["--http-listen", "127.0.0.1:0", "--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"];
    let served = Served::start(halfway(&dir, &["serve", "--config", "h.toml"]).args(listen));
    let ready = served.expect("ready");
    let https = ready.split("https=").nth(1).unwrap().split(' ').next().unwrap();
    let pid = served.pid().to_string();
    let load =
        ["bench", "signal", &format!("https://{https}"), "--agents", "40", "--time", "1s", "--pid", &pid];
    let (code, stdout, stderr) = run(halfway(&dir, &load).arg("--json"));
    assert_eq!((code, stderr.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&stdout).unwrap();
    let figure = |run: &str, name: &str| {
        report[run][name].as_f64().unwrap_or_else(|| panic!("no {run} {name}: {stdout}"))
    };
    assert_eq!((figure("idle", "agents"), figure("room", "listeners")), (40.0, 39.0));
    assert!(figure("idle", "residentKibEach") > 0.0);
    assert!(figure("pairs", "framesPerSecond") > 100.0 && figure("pairs", "serverUsPerFrame") > 0.0);
    assert_eq!(figure("room", "missing"), 0.0);
    assert_eq!(
        (figure("storm", "agents"), figure("storm", "back"), figure("storm", "lost")),
        (38.0, 38.0, 0.0)
    );
    let (code, table, _) = run(halfway(&dir, &load).args(["--run", "pairs", "--rate", "400"]));
    assert!(code == 0 && table.contains("frames a second"), "{table}");
    let (code, _, stderr) = run(halfway(&dir, &load).args(["--protocol", "peerjs", "--run", "storm"]));
    assert_eq!((code, stderr.lines().count()), (2, 1), "{stderr}");
    served.stop();
    let (code, _, stderr) = run(&mut halfway(&dir, &load));
    assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
}

#[test]
fn a_relay_under_load_is_measured_over_every_transport() {
    let dir = TempDir::new();
    let settings =
        "admin.listen = []\nturn.allow_peers = [\"127.0.0.0/8\"]\nhttp.handshakes_per_second_per_address = 0";
    dir.write(
        "h.toml",
        format!("{settings}\nhttp.connections_per_address = 0\nturn.unauthenticated_per_second = 0"),
    );
    let listen = ["--http-listen", "127.0.0.1:0", "--turn-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"];
    let served = Served::start(halfway(&dir, &["serve", "--config", "h.toml"]).args(listen));
    let ready = served.expect("ready");
    let port = |what: &str| {
        let at = ready.split(what).nth(1).unwrap().split(' ').next().unwrap();
        at.rsplit(':').next().unwrap().to_owned()
    };
    let pid = served.pid().to_string();
    let load = |uri: String, more: &[&str]| {
        let fixed = ["--clients", "4", "--rate", "2000", "--time", "1s", "--pid", &pid, "--json"];
        let (code, stdout, stderr) = run(halfway(&dir, &["bench", "turn", &uri]).args(fixed).args(more));
        // A machine with much else to do may keep the load from its rate, which it then says, and nothing more.
        let is_warning = |line: &str| line.contains("this load was the limit");
        assert!(code == 0 && stderr.lines().all(is_warning), "{uri}: {stderr}{stdout}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let udp = format!("turn:127.0.0.1:{}", port("turn="));
    let tls = format!("turns:127.0.0.1:{}", port("https="));
    let tcp = format!("turn:127.0.0.1:{}?transport=tcp", port("https="));
    for (uri, runs, more) in [
        (udp.clone(), &["to-peer", "to-client", "pair"][..], &["--gso", "--burst", "16"][..]),
        (udp.clone(), &["to-peer"], &["--burst", "1"]),
        (tcp, &["to-client"], &[]),
        (tls, &["pair"], &[]),
    ] {
        let report = load(uri, &[&["--run", &runs.join(",")], more].concat());
        for of_run in runs.iter().map(|run| &report[run]) {
            let figure = |name: &str| of_run[name].as_f64().unwrap_or_else(|| panic!("no {name}: {report}"));
            assert!(figure("deliveredPerSecond") > 500.0 && figure("offeredPerSecond") > 500.0, "{report}");
            assert!(figure("lossPercent") < 1.0, "{report}");
            assert!(figure("serverUsPerPacket") > 0.0 && figure("p50Us") > 0.0, "{report}");
        }
    }
    let report = load(udp.clone(), &["--run", "ping"]);
    assert!(report["ping"]["p99Us"].as_f64() >= report["ping"]["p50Us"].as_f64(), "{report}");
    assert!(report["ping"]["roundTripsPerSecond"].as_f64() > Some(100.0), "{report}");
    let report = load(udp.clone(), &["--run", "churn,idle"]);
    assert!(report["churn"]["cyclesPerSecond"].as_f64() > Some(50.0), "{report}");
    assert_eq!(report["idle"]["allocations"].as_f64(), Some(4.0), "{report}");
    assert!(report["idle"]["serverUsPerSetUp"].as_f64() > Some(0.0), "{report}");

    // Nobody can send so many: that is no figure of the server's.
    let too_much =
        ["bench", "turn", &udp, "--run", "to-peer", "--rate", "100000000", "--time", "1s", "--json"];
    let (code, stdout, stderr) = run(&mut halfway(&dir, &too_much));
    let report: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, report["to-peer"]["generatorLimited"].as_f64()), (0, Some(1.0)), "{report}");
    assert!(stderr.contains("this load was the limit") && stderr.lines().count() == 1, "{stderr}");

    let refused = |arguments: &[&str], word: &str| {
        let (code, _, stderr) = run(&mut halfway(&dir, &[&["bench", "turn"], arguments].concat()));
        assert_eq!((code, stderr.lines().count()), (1, 1), "{stderr}");
        assert!(stderr.contains(word), "{stderr}");
    };
    refused(&[&udp, "--user", "nobody", "--password", "secret"], "401");
    refused(&[&udp, "--peer-ip", "10.1.1.1"], "peer");
    served.stop();
    refused(&[&udp], "nobody answers");
    refused(&["turn:no-such-host.invalid"], "no-such-host.invalid");
}

/// Between one client at a time and a server: counts the client's Refresh and ChannelBind requests.
struct Wiretap {
    at: SocketAddr,
    refreshes: Arc<AtomicU32>,
    binds: Arc<AtomicU32>,
}

impl Wiretap {
    fn new(server: SocketAddr) -> Self {
        let [inside, outside] = [0; 2].map(|port| Arc::new(UdpSocket::bind(("127.0.0.1", port)).unwrap()));
        outside.connect(server).unwrap();
        let tap = Self { at: inside.local_addr().unwrap(), refreshes: Arc::default(), binds: Arc::default() };
        let client = Arc::new(std::sync::Mutex::new(None));
        let (refreshes, binds) = (Arc::clone(&tap.refreshes), Arc::clone(&tap.binds));
        let (from, to, known) = (Arc::clone(&inside), Arc::clone(&outside), Arc::clone(&client));
        thread::spawn(move || {
            let mut buffer = [0; 2_048];
            while let Ok((length, who)) = from.recv_from(&mut buffer) {
                *known.lock().unwrap() = Some(who);
                refreshes.fetch_add(u32::from(buffer.starts_with(&[0, 4])), SeqCst);
                binds.fetch_add(u32::from(buffer.starts_with(&[0, 9])), SeqCst);
                to.send(&buffer[..length]).ok();
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 2_048];
            while let Ok(length) = outside.recv(&mut buffer) {
                let client = *client.lock().unwrap();
                inside.send_to(&buffer[..length], client.unwrap()).unwrap();
            }
        });
        tap
    }
}

#[test]
fn allocations_and_channels_are_refreshed_while_a_load_lasts() {
    let relay = loopback::relay("127.0.0.1:0", 1, 20_000..=20_999);
    for run in [Run::ToPeer, Run::Ping, Run::Idle] {
        let tap = Wiretap::new(relay.listening()[0]);
        let load = Load {
            uri: format!("turn:{}", tap.at).parse().unwrap(),
            runs: vec![run],
            credentials: Credentials::Secret(TurnSecrets::new(&[SECRET]).unwrap()),
            clients: 1,
            size: 100,
            rate: 1_000,
            trains: false,
            burst: 1,
            time: Duration::from_secs(1),
            peer_ip: None,
            pid: None,
            ca: "".into(),
            refresh: Duration::from_millis(200),
        };
        let report = turn::run(&load).unwrap().json();
        assert_ne!(report["to-peer"]["deliveredPerSecond"], 0.0, "{report}");
        // One binds, and one releases, anyhow.
        let (refreshes, binds) = (tap.refreshes.load(SeqCst), tap.binds.load(SeqCst));
        assert!((5..20).contains(&refreshes) && (5..20).contains(&binds), "{run:?}: {refreshes} {binds}");
    }
}
