//! `halfway bench`, against a `halfway serve`.

use serde_json::Value;

use super::{TempDir, first_start::Served, halfway, run};

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
