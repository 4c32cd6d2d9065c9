//! SIGHUP and `POST /drain`, with allocations that live.

use std::{io::Write, net::TcpStream};

use super::instance::{Caller, Instance};

const OLD: &str = "sixteen bytes: the old secret";
const NEW: &str = "sixteen bytes: the new secret";

fn secrets(secret: &str) -> String {
    format!("[credentials]\nsecrets = ['{secret}']\n")
}

#[test]
fn a_reload_changes_who_comes_and_touches_nobody_who_is_there() {
    let instance = Instance::start(&secrets(OLD));
    let mut alice = Caller::new(&instance, "alice", OLD);
    assert_eq!(alice.ask("Allocate auth"), "Allocate ok");
    assert_eq!(alice.ask("CreatePermission auth peer=8.8.8.8:0"), "CreatePermission ok signed");
    let line = instance
        .reload(&format!("{}[turn]\ndeny_peers = ['8.8.0.0/16']\nallocations_per_agent = 1\n", secrets(NEW)));
    assert!(line.contains("the configuration is reloaded"), "{line}");
    // Whose secret is gone gets nothing new, and loses nothing.
    let mut bob = Caller::new(&instance, "bob", OLD);
    assert_eq!(bob.ask("Allocate auth"), "Allocate 401 realm nonce");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(alice.ask("CreatePermission auth peer=9.9.9.9:0"), "CreatePermission ok signed");
    // The new rules are for everybody.
    assert_eq!(alice.ask("CreatePermission auth peer=8.8.8.8:0"), "CreatePermission 403 signed");
    let mut bob = Caller::new(&instance, "bob", NEW);
    assert_eq!(bob.ask("Allocate auth"), "Allocate ok");
    let mut again = Caller::new(&instance, "bob", NEW);
    assert_eq!(again.ask("Allocate auth"), "Allocate 486 signed");
    // Twice replaced is not forgotten.
    instance.reload(&secrets("sixteen bytes: the third secret"));
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(bob.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(again.ask("Allocate auth"), "Allocate 401 realm nonce");
}

#[test]
fn a_bad_file_changes_nothing_and_says_every_problem() {
    let instance = Instance::start(&secrets(OLD));
    let bad = format!("{}[turn]\ndeny_peers = ['8.8.0.0/99']\nno_such_key = 1\n", secrets(NEW));
    let line = instance.reload(&bad);
    assert!(line.contains("nothing has changed") && line.contains("h.toml:5: turn.deny_peers"), "{line}");
    let line = instance.served.expect("no_such_key");
    assert!(line.contains("nothing has changed") && line.contains("h.toml:6"), "{line}");
    assert_eq!(Caller::new(&instance, "alice", OLD).ask("Allocate auth"), "Allocate ok");
}

#[test]
fn what_is_taken_at_a_start_alone_is_named_and_the_log_follows_its_filter() {
    let instance = Instance::start("");
    instance
        .dir
        .write("h.toml", "admin.listen = ['127.0.0.1:0']\nturn.realm = 'other'\nlog.filter = 'debug'");
    instance.signal("-HUP");
    assert!(instance.served.expect("taken at a start alone").contains("turn.realm"));
    instance.served.expect("the configuration is reloaded");
    // Nobody speaks this: a line for developers.
    let speak = |admin: &str| TcpStream::connect(admin).unwrap().write_all(b"nonsense\r\n\r\n").unwrap();
    speak(&instance.admin);
    instance.served.expect("HTTP connection ended");
}

#[test]
fn a_drain_by_request_ends_it_when_nobody_is_left() {
    let instance = Instance::start(&secrets(OLD));
    let mut alice = Caller::new(&instance, "alice", OLD);
    assert_eq!(alice.ask("Allocate auth"), "Allocate ok");
    assert!(instance.admin("GET /drain").starts_with("HTTP/1.1 405"));
    assert!(instance.admin("POST /drain").starts_with("HTTP/1.1 202"));
    instance.served.expect("draining");
    assert!(instance.admin("GET /readyz").starts_with("HTTP/1.1 503"));
    assert!(instance.admin("GET /healthz").starts_with("HTTP/1.1 200"));
    let mut bob = Caller::new(&instance, "bob", OLD);
    assert_eq!(bob.ask("Allocate auth"), "Allocate 508 signed");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(alice.ask("Refresh auth lifetime=0"), "Refresh ok lifetime=0 signed");
    assert_eq!(instance.served.ends(), 0);
}
