//! Allocate and Binding (RFC 8656 §7, RFC 8489 §12).

use std::time::{Duration, UNIX_EPOCH};

use halfway::{
    clock::{self, Now},
    turn::{
        FiveTuple, Transport,
        quota::{Limits, Quotas},
        server::Effect,
    },
};

use super::{
    client::Client,
    trace::{ALLOCATED, START, World, check},
};

#[test]
fn a_binding_tells_the_address_and_nothing_else() {
    check(
        "0s alice > Binding
         0s alice < Binding ok mapped=9.0.0.1:1000
         1s alice > Binding fp
         1s alice < Binding ok mapped=9.0.0.1:1000 fp
         2s alice > Binding unknown=0003
         2s alice < Binding 420 0x0003
         3s alice > Binding unknown=8042
         3s alice < Binding ok mapped=9.0.0.1:1000",
    );
}

#[test]
fn an_allocation_lives_as_long_as_it_was_granted() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Binding
         1s alice < Binding ok mapped=9.0.0.1:1000
         1200s - close :49152
         1200s - ended alice expired 0B out 0B in
         1200s alice > Refresh auth
         1200s alice < Refresh 437 signed",
    );
}

#[test]
fn lifetime_is_between_twenty_minutes_and_an_hour() {
    for (asked, granted) in
        [(0, 1200), (1, 1200), (600, 1200), (777, 1200), (1800, 1800), (3600, 3600), (86400, 3600)]
    {
        check(&format!(
            "0s alice > Allocate
             0s alice < Allocate 401 realm nonce
             0s alice > Allocate auth lifetime={asked}
             0s - take :49152
             0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime={granted} signed",
        ));
    }
}

#[test]
fn a_retransmission_gets_the_same_answer_for_forty_seconds() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth tx=1
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Allocate auth tx=1
         1s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         39s alice > Allocate auth tx=1
         39s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         39s alice > Allocate auth tx=2
         39s alice < Allocate 437 signed
         40s alice > Allocate auth tx=1
         40s alice < Allocate 437 signed",
    );
}

#[test]
fn a_released_allocation_still_answers_its_retransmissions() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Refresh auth lifetime=0 tx=5
         1s - close :49152
         1s - ended alice released 0B out 0B in
         1s alice < Refresh ok lifetime=0 signed
         2s alice > Refresh auth lifetime=0 tx=5
         2s alice < Refresh ok lifetime=0 signed
         3s alice > Refresh auth lifetime=0 tx=6
         3s alice < Refresh 437 signed",
    );
}

#[test]
fn what_allocate_cannot_give_has_its_code() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth no-transport
         0s alice < Allocate 400 signed
         0s alice > Allocate auth transport=6
         0s alice < Allocate 442 signed
         0s alice > Allocate auth df
         0s alice < Allocate 420 0x001a signed
         0s alice > Allocate auth unknown=7123
         0s alice < Allocate 420 0x7123 signed
         0s alice > Allocate auth family=2
         0s alice < Allocate 440 signed
         0s alice > Allocate auth family=9
         0s alice < Allocate 440 signed
         0s alice > Allocate auth token
         0s alice < Allocate 508 signed
         0s alice > Allocate auth token even=0
         0s alice < Allocate 400 signed
         0s alice > Allocate auth token family=1
         0s alice < Allocate 400 signed
         0s alice > Allocate auth even=1
         0s alice < Allocate 508 signed
         0s alice > Allocate auth broken=000d
         0s alice < Allocate 400 signed
         0s alice > Allocate auth broken=0019
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed",
    );
}

#[test]
fn strangers_are_challenged_before_anything_else_is_looked_at() {
    check(
        "0s alice > Allocate df unknown=7123 transport=6
         0s alice < Allocate 401 realm nonce
         0s alice > Refresh
         0s alice < Refresh 401 realm nonce
         0s alice > CreatePermission
         0s alice < CreatePermission 401 realm nonce
         0s alice > ChannelBind fp
         0s alice < ChannelBind 401 realm nonce fp
         0s alice > Connect
         0s drop malformed",
    );
}

#[test]
fn an_even_port_is_an_even_port() {
    let world = World { ports: 49153..=49154, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth even=0
         0s - take :49154
         0s alice < Allocate ok relayed=5.5.5.5:49154 mapped=9.0.0.1:1000 lifetime=1200 signed",
    );
}

#[test]
fn ipv6_where_it_is_asked_for_and_ipv4_otherwise() {
    let world = World { v6: true, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth family=2
         0s - take :49152
         0s alice < Allocate ok relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth
         0s - take :49152
         0s bob < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.2:1000 lifetime=1200 signed",
    );
}

#[test]
fn attributes_after_the_integrity_do_not_count_and_the_first_of_two_does() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth after=lifetime:3600 after=family:2 after=df
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Refresh auth lifetime=1800 lifetime=0
         1s alice < Refresh ok lifetime=1800 signed
         2s alice > Refresh auth after=lifetime:0
         2s alice < Refresh ok lifetime=1200 signed
         3s alice > CreatePermission auth peer=1.1.1.1:1 after=peer:2.2.2.2:2
         3s alice < CreatePermission ok signed
         3s alice > Send peer=2.2.2.2:2 hello
         3s drop no_permission",
    );
}

#[test]
fn ports_run_out_and_come_back() {
    let world = World { ports: 49152..=49152, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth
         0s bob < Allocate 508 signed
         1s alice > Refresh auth lifetime=0
         1s - close :49152
         1s - ended alice released 0B out 0B in
         1s alice < Refresh ok lifetime=0 signed
         1s bob > Allocate auth
         1s - take :49152
         1s bob < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.2:1000 lifetime=1200 signed",
    );
}

#[test]
fn at_the_quota_the_longest_idle_allocation_makes_room() {
    let world = World { per_agent: 2, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s alice/1 > Allocate
         0s alice/1 < Allocate 401 realm nonce
         0s alice/1 > Allocate auth
         0s - take :49153
         0s alice/1 < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1001 lifetime=1200 signed
         1s bob > Allocate
         1s bob < Allocate 401 realm nonce
         1s bob > Allocate user=alice
         1s bob < Allocate 486 signed
         20s alice > Refresh auth
         20s alice < Refresh ok lifetime=1200 signed
         29s bob > Allocate user=alice
         29s bob < Allocate 486 signed
         30s bob > Allocate user=alice
         30s - close :49153
         30s - ended alice reclaimed 0B out 0B in
         30s - take :49154
         30s bob < Allocate ok relayed=5.5.5.5:49154 mapped=9.0.0.2:1000 lifetime=1200 signed",
    );
}

#[test]
fn the_longest_idle_allocation_makes_room_in_another_shard_too() {
    let world = World::default();
    let quotas = Quotas::new(Limits { per_agent: 1, ..Limits::default() });
    let mut shards = [0, 1].map(|shard| world.shard(shard, quotas.clone()));
    let start = Now { wall: UNIX_EPOCH + Duration::from_secs(START), ..clock::now() };
    for (shard, at) in [(0, 0), (1, 31)] {
        let mut alice = Client::default();
        let from = FiveTuple {
            client: ([9, 0, 0, 1], 1_000 + shard as u16).into(),
            server: ([5, 5, 5, 5], 3478).into(),
            transport: Transport::Udp,
        };
        for text in ["Allocate", "Allocate auth"] {
            let mut reply = Vec::new();
            let request = alice.say(text, "alice");
            shards[shard].handle_request(start + Duration::from_secs(at), from, &request, &mut reply);
            alice.hear(&reply, &[]);
        }
        assert_eq!(shards[shard].counters().allocations, 1);
    }
    let effects: Vec<_> = std::iter::from_fn(|| shards[1].poll_effect()).collect();
    let Some(Effect::Reclaim(idle)) = effects.first() else { panic!("{effects:?}") };
    assert_eq!(idle.shard, 0);
    shards[0].reclaim(idle, start.mono + Duration::from_secs(31));
    assert_eq!(shards[0].counters().allocations, 0);
    assert_eq!(quotas.held_in_total(), 1);
}

#[test]
fn a_client_whose_nat_moved_its_port_does_not_meet_its_own_quota() {
    let world = World { per_agent: 1, ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed
         6s alice > ChannelData 0x4000 last-words
         6s 1.1.1.1:7 < last-words from :49152
         7s alice/1 > Allocate
         7s alice/1 < Allocate 401 realm nonce
         10s 1.1.1.1:7 > :49152 still-there?
         10s alice < ChannelData 0x4000 still-there?
         12s alice/1 > Allocate auth
         12s alice/1 < Allocate 486 signed
         13s alice/1 > Allocate auth
         13s - close :49152
         13s - ended alice reclaimed 10B out 12B in
         13s - take :49153
         13s alice/1 < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1001 lifetime=1200 signed
         14s alice/1 > CreatePermission auth peer=1.1.1.1:7
         14s alice/1 < CreatePermission ok signed
         18s alice/2 > Allocate
         18s alice/2 < Allocate 401 realm nonce
         18s alice/2 > Allocate auth
         18s alice/2 < Allocate 486 signed",
    ));
}

#[test]
fn who_asks_from_another_address_has_not_moved() {
    let world = World { per_agent: 1, ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         29s bob > Allocate user=alice
         29s bob < Allocate 438 realm nonce
         29s bob > Allocate user=alice
         29s bob < Allocate 486 signed
         30s bob > Allocate user=alice
         30s - close :49152
         30s - ended alice reclaimed 0B out 0B in
         30s - take :49153
         30s bob < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.2:1000 lifetime=1200 signed",
    ));
}

#[test]
fn nobody_loses_an_idle_allocation_for_one_that_has_no_port() {
    let world = World { per_agent: 1, ports: 49152..=49152, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         60s alice/1 > Allocate
         60s alice/1 < Allocate 401 realm nonce
         60s alice/1 > Allocate auth
         60s alice/1 < Allocate 508 signed
         61s alice > Refresh auth
         61s alice < Refresh ok lifetime=1200 signed",
    );
}

#[test]
fn the_total_is_a_limit_too() {
    let world = World { total: 1, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         60s bob > Allocate
         60s bob < Allocate 401 realm nonce
         60s bob > Allocate auth
         60s bob < Allocate 486 signed",
    );
}

#[test]
fn a_draining_relay_takes_nobody_new_and_keeps_whom_it_has() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s operator > drain
         2s bob > Allocate
         2s bob < Allocate 401 realm nonce
         2s bob > Allocate auth
         2s bob < Allocate 508 signed
         600s alice > Refresh auth
         600s alice < Refresh ok lifetime=1200 signed",
    );
}

#[test]
fn fifty_clients_that_vanish_leave_room_for_fifty_more() {
    let world = World { per_agent: 50, ports: 49152..=49247, ..World::default() };
    let allocate = |time: u64, client: usize| {
        let port = 49_152 + (client - 1) % 96;
        format!(
            "{time}s alice/{client} > Allocate
             {time}s alice/{client} < Allocate 401 realm nonce
             {time}s alice/{client} > Allocate auth
             {time}s - take :{port}
             {time}s alice/{client} < Allocate ok relayed=5.5.5.5:{port} mapped=9.0.0.1:{} lifetime=1200 signed\n",
            1_000 + client
        )
    };
    let mut trace: String = (1..=50).map(|client| allocate(0, client)).collect();
    for client in 51..=100 {
        let reclaimed = format!(
            "31s - close :{}\n 31s - ended alice reclaimed 0B out 0B in\n 31s - take",
            49_101 + client
        );
        trace += &allocate(31, client).replacen("31s - take", &reclaimed, 1);
    }
    world.check(&trace);
}

#[test]
fn no_attribute_after_the_integrity_has_an_effect() {
    for late in [
        "lifetime:0",
        "lifetime:3600",
        "family:2",
        "additional:2",
        "even:1",
        "token",
        "df",
        "unknown:7000",
        "unknown:0006",
        "unknown:0014",
        "unknown:0015",
        "unknown:0019",
        "channel:4001",
        "peer:2.2.2.2:2",
        "peer:10.0.0.1:1",
        "peer:[2606::1]:7",
        "broken:0012",
        "broken:000d",
    ] {
        // Both families would be there.
        World { v6: true, ..World::default() }.check(&format!(
            "0s alice > Allocate
             0s alice < Allocate 401 realm nonce
             0s alice > Allocate auth after={late}
             0s - take :49152
             0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
             1s alice > CreatePermission auth peer=1.1.1.1:1 after={late}
             1s alice < CreatePermission ok signed
             1s alice > Send peer=2.2.2.2:2 hello
             1s drop no_permission
             2s alice > ChannelBind auth peer=1.1.1.1:1 channel=4000 after={late}
             2s alice < ChannelBind ok signed
             2s alice > ChannelData 0x4001 hello
             2s drop no_channel
             2s alice > ChannelData 0x4000 hello
             2s 1.1.1.1:1 < hello from :49152
             3s alice > Refresh auth after={late}
             3s alice < Refresh ok lifetime=1200 signed",
        ));
    }
}

#[test]
fn the_first_of_two_attributes_counts() {
    World { v6: true, ..World::default() }.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth lifetime=1800 lifetime=3600 family=1 family=2
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1800 signed
         1s alice > ChannelBind auth peer=1.1.1.1:7 peer=2.2.2.2:7 channel=4000 channel=4001
         1s alice < ChannelBind ok signed
         1s alice > ChannelData 0x4000 hello
         1s 1.1.1.1:7 < hello from :49152
         1s alice > ChannelData 0x4001 hello
         1s drop no_channel
         2s alice > Refresh auth family=1 family=2 lifetime=3600 lifetime=0
         2s alice < Refresh ok lifetime=3600 signed",
    );
}

#[test]
fn bindings_keep_a_nat_open_beside_an_allocation() {
    // libwebrtc and libjuice, every 10 to 15 s, with and without FINGERPRINT.
    let mut trace = String::from(ALLOCATED);
    for time in (10..1_200).step_by(20) {
        trace += &format!(
            "{time}s alice > Binding
             {time}s alice < Binding ok mapped=9.0.0.1:1000
             {0}s alice > Binding fp
             {0}s alice < Binding ok mapped=9.0.0.1:1000 fp\n",
            time + 10
        );
    }
    let trace = trace.trim_end().rsplit_once("1200s alice > Binding fp").unwrap().0.to_owned();
    check(&trace);
}
