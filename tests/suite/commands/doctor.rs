//! `halfway doctor`, against a `halfway serve` on this host. The kinds of NAT are in `tests/lab/doctor.py`.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::PermissionsExt,
};

use serde_json::Value;

use super::{TempDir, first_start::Served, halfway, line, run};

/// A server, and how it is reached.
struct Patient {
    dir: TempDir,
    served: Served,
    url: String,
    admin: String,
}

impl Patient {
    fn new(flags: &[&str]) -> Self {
        let dir = TempDir::new();
        dir.write("h.toml", "admin.listen = [\"127.0.0.1:0\"]");
        let serve =
            ["serve", "--config", "h.toml", "--http-listen", "127.0.0.1:0", "--public-ip", "127.0.0.1"];
        let served = Served::start(halfway(&dir, &serve).args(flags));
        let ready = served.expect("ready");
        let at = |what: &str| ready.split(what).nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        Self { dir, served, url: format!("https://{}", at("https=")), admin: at("admin=") }
    }

    fn token(&self) -> String {
        line(&mut halfway(&self.dir, &["token", "agent-7"]))
    }

    /// The exit code, and what was found.
    fn examined(&self, token: &str) -> (i32, Value) {
        let (code, stdout, stderr) =
            run(&mut halfway(&self.dir, &["doctor", &self.url, "--token", token, "--json"]));
        assert!(!stdout.contains(token) && !stderr.contains(token), "the token was told");
        assert_eq!(stderr.lines().count(), usize::from(code != 0), "{stderr}");
        (code, serde_json::from_str(&stdout).unwrap())
    }

    fn metric(&self, name: &str) -> u64 {
        let mut stream = TcpStream::connect(&self.admin).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }
}

#[track_caller]
fn check<'a>(found: &'a Value, name: &str) -> &'a Value {
    let checks = found["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}: {found:#}"))
}

#[test]
fn a_sound_server_passes_and_nothing_is_left_on_it() {
    let patient = Patient::new(&["--turn-listen", "127.0.0.1:0"]);
    let (code, found) = patient.examined(&patient.token());
    assert_eq!((code, &found["ok"]), (0, &Value::Bool(true)), "{found:#}");
    for name in ["https", "ice", "wss", "stun-ipv4", "turn-udp", "relay", "turn-tcp", "nat-ipv4"] {
        assert_eq!(check(&found, name)["outcome"], "ok", "{name}: {found:#}");
    }
    // Self-signed, on this very host; so there is no `turns:` either.
    for name in ["certificate", "turn-tls"] {
        let check = check(&found, name);
        assert!(
            check["outcome"] == "warn" && check["advice"].as_str().is_some_and(|advice| !advice.is_empty())
        );
    }
    let nat = &found["nat"]["ipv4"];
    assert_eq!((&nat["kind"], &nat["mapped"]), (&"none".into(), &nat["local"]));
    assert_eq!(
        (&found["paths"][4]["peer"], &found["paths"][4]["path"]),
        (&"symmetric".into(), &"relayed over UDP".into())
    );
    // It relays to no address of its own host, which is ours as well.
    assert!(check(&found, "nat-ipv4")["detail"].as_str().unwrap().contains("cannot ask"));
    assert!(found["seconds"].as_f64().unwrap() < 10.0);
    assert!(patient.metric("halfway_allocations_made_total") >= 2);
    assert_eq!((patient.metric("halfway_allocations{"), patient.metric("halfway_agents ")), (0, 0));
    let args = ["doctor", &patient.url, "--token", &patient.token()];
    let (code, text, _) = run(&mut halfway(&patient.dir, &args));
    assert!(code == 0 && text.contains("ok   turn-udp") && text.contains("a symmetric NAT"), "{text}");
    patient.served.stop();
}

#[test]
fn a_wrong_token_is_refused_with_advice() {
    let patient = Patient::new(&["--turn-listen", "127.0.0.1:0"]);
    let (code, found) = patient.examined("no.such.token");
    assert_eq!((code, &check(&found, "ice")["outcome"]), (1, &"fail".into()));
    assert!(check(&found, "ice")["advice"].as_str().unwrap().contains("halfway token"));
    let (code, found) =
        patient.examined(&line(&mut halfway(&patient.dir, &["token", "a", "--scope", "ice"])));
    assert_eq!((code, &check(&found, "wss")["outcome"]), (1, &"fail".into()));
    assert_eq!(patient.metric("halfway_allocations{"), 0);
    patient.served.stop();
}

#[test]
fn nobody_at_the_port_is_one_clear_failure() {
    let dir = TempDir::new();
    let (code, stdout, stderr) =
        run(&mut halfway(&dir, &["doctor", "https://127.0.0.1:1", "--token", "t", "--json"]));
    let found: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((code, stderr.lines().count(), found["checks"].as_array().unwrap().len()), (1, 1, 1));
    assert!(check(&found, "https")["detail"].as_str().unwrap().contains("refused"));
    let (code, stdout, _) = run(&mut halfway(&dir, &["doctor", "http://127.0.0.1", "--token", "t"]));
    assert!(code == 1 && stdout.contains("no https URL"), "{stdout}");
    let (code, _, stderr) = run(&mut halfway(&dir, &["doctor", "https://127.0.0.1:1"]));
    assert!(code == 2 && stderr.contains("--token"), "{stderr}");
}

#[test]
fn this_host_is_examined_for_what_the_configuration_wants() {
    let dir = TempDir::new();
    dir.write(
        "h.toml",
        "http.listen = [\"127.0.0.1:0\"]\nturn.listen = [\"127.0.0.1:0\"]\npublic_ips = [\"203.0.113.5\"]",
    );
    let local = || {
        let (code, stdout, _) =
            run(&mut halfway(&dir, &["doctor", "--local", "--json", "--config", "h.toml"]));
        (code, serde_json::from_str::<Value>(&stdout).unwrap())
    };
    let (code, found) = local();
    assert_eq!((code, &check(&found, "data-dir")["outcome"]), (0, &"warn".into()), "{found:#}");
    for name in ["clock", "port", "descriptors", "buffers", "offload", "relay-ports", "addresses", "shards"] {
        assert_ne!(check(&found, name)["outcome"], "fail", "{found:#}");
    }
    fs::create_dir(dir.path().join("halfway-data")).unwrap();
    let secret = dir.write("halfway-data/secret", [7; 32]);
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    let (code, found) = local();
    assert_eq!((code, &check(&found, "data-dir")["outcome"]), (1, &"fail".into()));
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    dir.write("h.toml", format!("http.listen = [\"{at}\"]\nadmin.listen = []"));
    let (code, found) = local();
    assert_eq!((code, &check(&found, "data-dir")["outcome"]), (1, &"ok".into()));
    assert!(check(&found, "port")["detail"].as_str().unwrap().contains("another program"), "{found:#}");
}
