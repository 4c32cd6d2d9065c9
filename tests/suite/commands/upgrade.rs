//! SIGUSR2: another process takes over while allocations live.

use std::{net::UdpSocket, process::Command};

use super::{
    super::front::PATIENCE,
    instance::{Caller, Instance},
    revoke::next_second,
};

const SECRET: &str = "sixteen bytes and more";
const CONFIG: &str = "[credentials]\nsecrets = ['sixteen bytes and more']\n[turn]\nallow_peers = ['127.0.0.0/8']\nshards = 2\n";

/// The process that took over, ended with the test.
struct Successor(String);

impl Successor {
    /// Tells it to take over, and waits until it has.
    fn of(instance: &Instance) -> Self {
        instance.signal("-USR2");
        let line = instance.served.expect("takes over");
        let pid = line.split("process ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        instance.served.expect("ready");
        Self(pid)
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.0]).status().unwrap().success());
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        Command::new("kill").args(["-KILL", &self.0]).status().ok();
    }
}

#[test]
fn allocations_live_on_and_new_ones_are_made_beside_them() {
    let instance = Instance::start(CONFIG);
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut alice = Caller::new(&instance, "alice", SECRET);
    let alice_at = alice.allocate();
    let peer_at = peer.local_addr().unwrap();
    assert_eq!(alice.ask(&format!("ChannelBind auth channel=4000 peer={peer_at}")), "ChannelBind ok signed");

    let successor = Successor::of(&instance);
    // Many at once, which the kernel hands over as one.
    for number in 0..100 {
        alice.say(&format!("ChannelData 4000 packet-{number:03}"));
    }
    let mut packet = [0; 64];
    for number in 0..100 {
        let (length, from) = peer.recv_from(&mut packet).unwrap();
        assert_eq!((&packet[..length], from), (format!("packet-{number:03}").as_bytes(), alice_at));
    }
    peer.send_to(b"back", alice_at).unwrap();
    assert_eq!(alice.hear(), "ChannelData 0x4000 back");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    // Whoever comes now is served by the new one, and they meet.
    let mut bob = Caller::new(&instance, "bob", SECRET);
    let bob_at = bob.allocate();
    assert!(instance.admin("GET /metrics").contains("\nhalfway_clients_handed_over 1\n"));
    assert_eq!(alice.ask(&format!("ChannelBind auth channel=4001 peer={bob_at}")), "ChannelBind ok signed");
    assert_eq!(bob.ask(&format!("ChannelBind auth channel=4001 peer={alice_at}")), "ChannelBind ok signed");
    alice.say("ChannelData 4001 from-old-to-new");
    assert_eq!(bob.hear(), "ChannelData 0x4001 from-old-to-new");
    bob.say("ChannelData 4001 from-new-to-old");
    assert_eq!(alice.hear(), "ChannelData 0x4001 from-new-to-old");
    // One upgrade at a time.
    successor.signal("-USR2");
    assert!(instance.served.expect("no upgrade").contains("has not ended its last allocation yet"));

    assert_eq!(alice.ask("Refresh auth lifetime=0"), "Refresh ok lifetime=0 signed");
    assert_eq!(instance.served.ends(), 0);
    // The same five-tuple comes again, to the new one.
    alice.allocate();
    assert_eq!(bob.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
}

#[test]
fn who_is_revoked_loses_what_the_process_before_still_holds() {
    let instance = Instance::start(CONFIG);
    let mut callers: Vec<_> = (0..6).map(|_| Caller::new(&instance, "alice", SECRET)).collect();
    callers.iter_mut().for_each(|caller| _ = caller.allocate());
    let admin = instance.token(&["ops", "--scope", "admin"]);
    assert_eq!(instance.ask("DELETE /v1/agents/bob", &admin, "").0, 204);
    next_second();
    let (_, list) = instance.ask("GET /v1/ice", &instance.token(&["bob"]), "");
    let expires = list["username"].as_str().unwrap().split(':').next().unwrap().parse().unwrap();
    // The new one knows whom the old one has revoked, and what it has given out since, a moment ago.
    let _successor = Successor::of(&instance);
    let mut bob = Caller::new(&instance, "bob", SECRET);
    assert_eq!(bob.ask("Allocate auth"), "Allocate 401 realm nonce");
    let mut bob = Caller::until(&instance, "bob", SECRET, expires);
    assert_eq!(bob.ask("Allocate auth"), "Allocate ok");
    assert_eq!(instance.ask("DELETE /v1/agents/alice", &admin, "").0, 204);
    // Its last allocations were alice's.
    assert_eq!(instance.served.ends(), 0);
    for caller in &mut callers {
        assert_eq!(caller.ask("Refresh auth"), "Refresh 401 realm nonce");
    }
}

#[test]
fn the_process_before_takes_no_port_that_the_new_one_gives_back() {
    // With one shard there is one link, on which things are told in order.
    let instance = Instance::start(&CONFIG.replace("shards = 2", "shards = 1"));
    let mut alice = Caller::new(&instance, "alice", SECRET);
    alice.allocate();
    let _successor = Successor::of(&instance);
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", instance.served.pid())).unwrap().count();
    let before = descriptors();
    let mut bob = Caller::new(&instance, "bob", SECRET);
    bob.allocate();
    assert_eq!(bob.ask("Refresh auth lifetime=0"), "Refresh ok lifetime=0 signed");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert!(descriptors() <= before, "{before} descriptors before, now {}", descriptors());
}

#[test]
fn a_version_that_does_not_get_ready_changes_nothing() {
    let instance = Instance::start(CONFIG);
    let mut alice = Caller::new(&instance, "alice", SECRET);
    alice.allocate();
    instance.dir.write("h.toml", "no_such_key = 1");
    instance.signal("-USR2");
    let line = instance.served.expect("no upgrade");
    assert!(line.contains("this process goes on") && line.contains("did not get ready"), "{line}");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    Caller::new(&instance, "bob", SECRET).allocate();
}

#[test]
fn when_the_new_one_dies_the_old_one_serves_those_who_are_left() {
    let instance = Instance::start(CONFIG);
    let mut alice = Caller::new(&instance, "alice", SECRET);
    alice.allocate();
    let successor = Successor::of(&instance);
    successor.signal("-KILL");
    instance.served.expect("nobody new is let in");
    assert_eq!(alice.ask("Refresh auth"), "Refresh ok lifetime=1200 signed");
    assert_eq!(alice.ask("Refresh auth lifetime=0"), "Refresh ok lifetime=0 signed");
    assert_eq!(instance.served.ends(), 0);
}
