//! `DELETE /v1/agents/{agent}`: whatever an agent has ends, and what it was given counts no more.

use std::{thread, time::Duration};

use halfway::clock;

use super::{
    super::front::PATIENCE,
    halfway,
    instance::{Caller, Instance, serve},
    run,
};

const SECRET: &str = "sixteen bytes and more";
const CONFIG: &str = "[credentials]\nsecrets = ['sixteen bytes and more']\n[turn]\nshards = 2\n";

/// Tokens say in which second they were made.
pub fn next_second() {
    let now = clock::now().unix();
    while clock::now().unix() == now {
        thread::sleep(Duration::from_millis(10));
    }
}

fn wait_until(done: impl Fn() -> bool) {
    let until = clock::now().mono + PATIENCE;
    while !done() {
        assert!(clock::now().mono < until, "it takes too long");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The status and the code of what is answered to who asks for credentials.
fn ice(instance: &Instance, token: &str) -> (u16, String) {
    let (status, body) = instance.ask("GET /v1/ice", token, "");
    (status, body["code"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_revoked_agent_loses_session_allocations_tokens_and_credentials() {
    let instance = Instance::start(CONFIG);
    let (token, admin) = (instance.token(&["agent/7"]), instance.token(&["ops", "--scope", "admin"]));
    let bystander = instance.token(&["agent-8"]);
    let (status, welcome) = instance.ask("POST /v1/signal", &token, r#"[{"type":"hello"}]"#);
    assert_eq!(status, 200);
    let session = welcome[0]["session"].as_str().unwrap().to_owned();
    // On both shards, and from a minter of the operator's own.
    let mut callers: Vec<_> = (0..6).map(|_| Caller::new(&instance, "agent/7", SECRET)).collect();
    let mut other = Caller::new(&instance, "agent-8", SECRET);
    for caller in callers.iter_mut().chain([&mut other]) {
        assert_eq!(caller.ask("Allocate auth"), "Allocate ok");
    }
    thread::scope(|scope| {
        let poll = format!("GET /v1/signal?wait=20\nHalfway-Session: {session}\r\n");
        let polled = scope.spawn({
            let (web, token) = (instance.web(), &token);
            move || web.ask(&poll, token, "")
        });
        wait_until(|| instance.admin("GET /metrics").contains("\nhalfway_agent_connections 1\n"));
        let began = clock::now().mono;
        // A lack of the scope, and a path that is no agent's.
        assert_eq!(instance.ask("DELETE /v1/agents/agent%2F7", &token, "").0, 403);
        assert_eq!(instance.ask("DELETE /v1/agents/a%20b", &admin, "").0, 400);
        assert_eq!(instance.ask("DELETE /v1/agents/agent%2F7", &admin, "").0, 204);
        let (status, frames) = polled.join().unwrap();
        assert_eq!(
            (status, &frames[0]["type"], &frames[0]["code"]),
            (200, &"ended".into(), &"revoked".into())
        );
        for caller in &mut callers {
            assert_eq!(caller.ask("Refresh auth"), "Refresh 401 realm nonce");
        }
        assert!(clock::now().mono - began < Duration::from_secs(1), "it took longer than a second");
    });
    assert_eq!(other.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(ice(&instance, &bystander), (200, String::new()));
    assert_eq!(ice(&instance, &token), (401, "unauthorized".to_owned()));
    let mut again = Caller::new(&instance, "agent/7", SECRET);
    assert_eq!(again.ask("Allocate auth"), "Allocate 401 realm nonce");
    assert!(instance.admin("GET /metrics").contains("reason=\"revoked\"} 6"));

    let offline = [
        "--config",
        "h.toml",
        "ice",
        "agent/7",
        "--public-ip",
        "127.0.0.1",
        "--turn-listen",
        "127.0.0.1:3478",
    ];
    let (code, _, stderr) = run(&mut halfway(&instance.dir, &offline));
    assert!(code == 1 && stderr.contains("agent/7 was revoked"), "{stderr}");

    // Let in again, by a token from later, it has credentials from later.
    next_second();
    let fresh = instance.token(&["agent/7"]);
    let (status, list) = instance.ask("GET /v1/ice", &fresh, "");
    assert_eq!(status, 200);
    let expires = list["username"].as_str().unwrap().split(':').next().unwrap().to_owned();
    let mut fresh_caller = Caller::until(&instance, "agent/7", SECRET, expires.parse().unwrap());
    assert_eq!(fresh_caller.ask("Allocate auth"), "Allocate ok");

    // And so it is after a restart, even one that nothing was told of.
    let kept = instance.dir.path().join("halfway-data/revoked.json");
    wait_until(|| std::fs::read_to_string(&kept).unwrap().contains(&expires));
    let instance = Instance::start_in(instance.killed(), CONFIG);
    assert_eq!(ice(&instance, &token), (401, "unauthorized".to_owned()));
    assert_eq!(ice(&instance, &fresh).0, 200);
    let mut again = Caller::new(&instance, "agent/7", SECRET);
    assert_eq!(again.ask("Allocate auth"), "Allocate 401 realm nonce");
    let mut fresh_caller = Caller::until(&instance, "agent/7", SECRET, expires.parse().unwrap());
    assert_eq!(fresh_caller.ask("Allocate auth"), "Allocate ok");
}

#[test]
fn one_who_is_not_here_can_be_revoked_and_a_file_that_is_no_list_stops_the_start() {
    let instance = Instance::start("");
    let (token, admin) = (instance.token(&["agent-7"]), instance.token(&["ops", "--scope", "admin"]));
    assert_eq!(instance.ask("DELETE /v1/agents/agent-7", &admin, "").0, 204);
    assert_eq!(instance.ask("DELETE /v1/agents/agent-7", &admin, "").0, 204, "as often as one likes");
    assert_eq!(ice(&instance, &token).0, 401);
    let (status, problem) = instance.ask("POST /v1/signal", &token, r#"[{"type":"hello"}]"#);
    assert_eq!((status, &problem["code"]), (401, &"unauthorized".into()));
    instance.signal("-KILL");
    instance.dir.write("halfway-data/revoked.json", "{");
    let (code, _, stderr) = run(&mut serve(&instance.dir));
    assert_eq!(code, 1);
    assert!(stderr.lines().last().unwrap().contains("revoked.json does not say who was revoked"), "{stderr}");
}

#[test]
fn what_cannot_be_written_holds_until_the_next_start_and_says_so() {
    let instance = Instance::start("");
    let (token, admin) = (instance.token(&["agent-7"]), instance.token(&["ops", "--scope", "admin"]));
    // Nothing can be put in the place of a directory.
    std::fs::create_dir(instance.dir.path().join("halfway-data/revoked.json")).unwrap();
    let (status, problem) = instance.ask("DELETE /v1/agents/agent-7", &admin, "");
    assert_eq!((status, &problem["code"]), (503, &"unavailable".into()));
    assert!(problem["detail"].as_str().unwrap().contains("until the next start"), "{problem}");
    instance.served.expect("agent-7 is revoked until the next start, and not beyond it");
    assert_eq!(ice(&instance, &token).0, 401);
}
