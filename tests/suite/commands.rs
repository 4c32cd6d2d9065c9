//! The binary as scripts meet it: stdout, stderr, exit codes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use halfway::{
    clock,
    credentials::{
        keyring::{InstanceSecret, Purpose},
        token::{Agent, TokenKeys},
        turn_rest::TurnSecrets,
    },
};

mod bench;
mod certs;
mod config;
mod doctor;
mod first_start;
mod instance;
mod issuer;
mod numbers;
mod reload;
mod revoke;
mod signaled;
mod upgrade;

/// A directory of this test's own, gone at its end.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("halfway-suite-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// `halfway` in a directory and an environment of its own.
pub fn halfway(dir: &TempDir, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_halfway"));
    command.args(args).current_dir(dir.path()).env_clear();
    command
}

#[track_caller]
fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// The one line on stdout of a command that succeeds and says nothing else.
#[track_caller]
fn line(command: &mut Command) -> String {
    let (code, stdout, stderr) = run(command);
    assert_eq!((code, stderr.as_str()), (0, ""));
    stdout.strip_suffix('\n').filter(|line| !line.contains('\n')).unwrap().to_owned()
}

const SECRET: [u8; 32] = *b"thirty-two bytes that are random";

/// A directory with a secret, as `serve` leaves it.
fn instance() -> TempDir {
    let dir = TempDir::new();
    std::fs::create_dir(dir.path().join("halfway-data")).unwrap();
    dir.write("halfway-data/secret", SECRET);
    make_private(&dir.path().join("halfway-data/secret"));
    dir
}

fn make_private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

fn check_token(token: &str) -> Agent {
    let key = InstanceSecret::from_bytes(&SECRET).unwrap().derive(Purpose::Token);
    let keys = TokenKeys::new(&[&key], Duration::from_secs(366 * 86_400)).unwrap();
    keys.check(clock::now(), token).unwrap()
}

#[test]
fn a_token_is_all_that_token_prints() {
    let dir = instance();
    let agent = check_token(&line(&mut halfway(&dir, &["token", "agent-1"])));
    assert_eq!((agent.id.as_str(), agent.room.as_str()), ("agent-1", "main"));
    assert_eq!(agent.scopes.to_string(), "signal ice");
    assert_eq!(agent.expires - agent.issued.unwrap(), 3600);

    let flags = ["token", "a:b@c/d", "--ttl", "2d", "--room", "r", "--scope", "ice admin"];
    let agent = check_token(&line(&mut halfway(&dir, &flags)));
    assert_eq!((agent.id.as_str(), agent.room.as_str()), ("a:b@c/d", "r"));
    assert_eq!(agent.scopes.to_string(), "ice admin");
    assert_eq!(agent.expires - agent.issued.unwrap(), 2 * 86_400);
}

#[test]
fn configured_secrets_sign_without_a_data_dir() {
    let dir = TempDir::new();
    dir.write(
        "h.toml",
        "auth.secrets = ['0123456789abcdef0123456789abcdef', 'another one of thirty-two bytes!']",
    );
    let token = line(&mut halfway(&dir, &["token", "a", "--config", "h.toml"]));
    let keys = TokenKeys::new(&[b"0123456789abcdef0123456789abcdef"], Duration::from_secs(7200)).unwrap();
    assert!(keys.check(clock::now(), &token).is_ok());
}

#[test]
fn a_secret_is_never_made_by_asking() {
    for args in [&["token", "a"][..], &["ice"], &["ice", "a", "--ttl", "60s"]] {
        let dir = TempDir::new();
        let (code, stdout, stderr) = run(&mut halfway(&dir, args));
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        assert!(stderr.contains("./halfway-data") && stderr.lines().count() == 1, "{stderr}");
        assert_eq!(dir.names(), [""; 0]);
        let (code, _, stderr) = run(halfway(&dir, args).env("HALFWAY_DATA_DIR", "/nowhere/at/all"));
        assert_eq!(code, 1);
        assert!(stderr.contains("/nowhere/at/all"), "{stderr}");
    }
}

#[test]
fn a_damaged_secret_is_not_used() {
    let dir = instance();
    dir.write("halfway-data/secret", b"short");
    let (code, stdout, stderr) = run(&mut halfway(&dir, &["token", "a"]));
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("halfway-data/secret has 5 bytes where a secret has 32"), "{stderr}");
}

#[test]
fn bad_arguments_are_usage_errors() {
    let dir = instance();
    let long = "a".repeat(129);
    for args in [
        &["token"][..],
        &["token", ""],
        &["token", "a b"],
        &["token", &long],
        &["token", "a", "--ttl", "soon"],
        &["token", "a", "--ttl", "0s"],
        &["token", "a", "--ttl", "367d"],
        &["token", "a", "--room", "a room"],
        &["token", "a", "--scope", "root"],
        &["token", "a", "--scope", ","],
        &["ice", "--ttl", "-1s"],
        &["serve", "--what"],
        &["relay"],
        &[],
    ] {
        let (code, stdout, stderr) = run(&mut halfway(&dir, args));
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert_ne!(stderr, "", "{args:?}");
    }
}

fn ice(command: &mut Command) -> serde_json::Value {
    let (code, stdout, stderr) = run(command);
    assert_eq!((code, stderr.as_str()), (0, ""));
    serde_json::from_str(&stdout).unwrap()
}

#[test]
fn ice_prints_what_the_instance_would_answer() {
    let dir = instance();
    let body =
        ice(&mut halfway(&dir, &["ice", "agent-7", "--public-host", "turn.example.org", "--ttl", "10m"]));
    assert_eq!(body["iceServers"][0]["urls"][0], "stun:turn.example.org:3478");
    assert_eq!(body["uris"][0], "turn:turn.example.org:3478?transport=udp");
    assert_eq!((&body["ttl"], &body["refreshAfter"]), (&600.into(), &300.into()));
    let username = body["username"].as_str().unwrap();
    let (expires, agent) = username.split_once(':').unwrap();
    assert_eq!(agent, "agent-7");
    let key = InstanceSecret::from_bytes(&SECRET).unwrap().derive(Purpose::TurnRest);
    let user = TurnSecrets::new(&[key]).unwrap().mint(agent, expires.parse().unwrap());
    assert_eq!(body["password"], user.credential);
    assert_eq!(body["iceServers"][1]["credential"], user.credential);
}

#[test]
fn ice_knows_addresses_ports_and_limits_of_the_configuration() {
    let dir = instance();
    dir.write(
        "h.toml",
        "public_ips = ['2001:db8::5']\nturn.listen = ['[::]:5000', '0.0.0.0:5000', '[::]:6000']\n\
         turn.relay_ips = ['::1']\ncredentials = { ttl = '5m', max_ttl = '20m', secrets = ['sixteen bytes ok'] }",
    );
    let body = ice(&mut halfway(&dir, &["--config", "h.toml", "ice"]));
    assert_eq!(body["ttl"], 300);
    let urls = ["stun:[2001:db8::5]:5000", "stun:[2001:db8::5]:6000"];
    assert_eq!(body["iceServers"][0]["urls"], serde_json::json!(urls));
    let body = ice(&mut halfway(&dir, &["--config", "h.toml", "ice", "--ttl", "24h"]));
    assert_eq!(body["ttl"], 1200, "a ttl above the limit is lowered to it");
    let (code, _, stderr) = run(&mut halfway(&dir, &["ice", "--turn-listen", "127.0.0.1:0"]));
    assert_eq!(code, 1);
    assert!(stderr.contains("port 0"), "{stderr}");
}

#[test]
fn help_and_version_are_results() {
    let dir = TempDir::new();
    assert!(line(&mut halfway(&dir, &["--version"])).starts_with("halfway "));
    let (code, stdout, _) = run(&mut halfway(&dir, &["serve", "--help"]));
    assert_eq!(code, 0);
    for flag in [
        "--config",
        "--data-dir",
        "--public-host",
        "--public-ip",
        "--http-listen",
        "--turn-listen",
        "--relay-ports",
        "--allow-peer",
        "--log",
        "--drain-timeout",
    ] {
        assert!(stdout.contains(flag), "{flag}");
    }
}
