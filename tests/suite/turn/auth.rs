//! Credentials and nonces on the wire (RFC 8489 §9.2).

use super::trace::{ALLOCATED, World, check};

#[test]
fn what_is_missing_is_a_bad_request_and_what_is_wrong_is_not_authorized() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth without=username
         0s alice < Allocate 400
         0s alice > Allocate auth without=realm
         0s alice < Allocate 400
         0s alice > Allocate auth without=nonce
         0s alice < Allocate 400
         0s alice > Allocate auth realm=elsewhere
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth secret=guess
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth garbled
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth nonce=AAAAAAAAAAAAAAAAAAAA
         0s alice < Allocate 438 realm nonce
         0s alice > Allocate auth nonce=%
         0s alice < Allocate 438 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed",
    );
}

#[test]
fn expiry_counts_on_allocate_and_never_again() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth expires=-10
         0s alice < Allocate 401 realm nonce signed
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         10s alice > Refresh auth expires=-10
         10s alice < Refresh ok lifetime=1200 signed
         11s alice > CreatePermission auth expires=-10 peer=1.1.1.1:0
         11s alice < CreatePermission ok signed",
    );
}

#[test]
fn a_rotated_user_name_is_the_same_user_and_another_agent_is_not() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Refresh auth expires=72000
         1s alice < Refresh ok lifetime=1200 signed
         2s alice > Refresh user=bob
         2s alice < Refresh 441 signed
         2s alice > CreatePermission user=bob peer=1.1.1.1:0
         2s alice < CreatePermission 441 signed
         2s alice > ChannelBind user=bob peer=1.1.1.1:1 channel=4000
         2s alice < ChannelBind 441 signed
         2s alice > Allocate user=bob
         2s alice < Allocate 437 signed",
    );
}

#[test]
fn every_secret_verifies() {
    let world = World { secrets: vec!["the new one", "the old one"], ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth secret=the
         0s alice < Allocate 401 realm nonce",
    );
    let world = World { secrets: vec!["new", "old"], ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth secret=old
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Refresh auth secret=new
         1s alice < Refresh ok lifetime=1200 signed",
    );
}

#[test]
fn a_nonce_lives_an_hour_and_with_its_allocation() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth lifetime=3600
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=3600 signed
         3540s alice > Refresh auth
         3540s alice < Refresh ok lifetime=1200 signed
         4000s alice > Refresh auth lifetime=0
         4000s - close :49152
         4000s - ended alice released 0B out 0B in
         4000s alice < Refresh ok lifetime=0 signed
         4001s alice > Allocate auth
         4001s alice < Allocate 438 realm nonce
         4002s alice > Allocate auth
         4002s - take :49153
         4002s alice < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1000 lifetime=1200 signed",
    );
}

#[test]
fn an_allocation_outlives_the_keys_of_its_nonce() {
    let mut trace = String::from(ALLOCATED);
    // Two days and more, in which the client never learns another nonce.
    for time in (1..160).map(|number| number * 1_140) {
        trace += &format!("{time}s alice > Refresh auth\n {time}s alice < Refresh ok lifetime=1200 signed\n");
    }
    trace += "182000s alice > Refresh auth nonce=stale
        182000s alice < Refresh 438 realm nonce
        182000s alice > Refresh auth
        182000s alice < Refresh ok lifetime=1200 signed
        182001s alice > ChannelBind auth peer=1.1.1.1:1 channel=4000
        182001s alice < ChannelBind ok signed";
    check(&trace);
}

#[test]
fn a_stale_nonce_is_told_on_every_method_and_costs_nothing() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         1s alice > Refresh auth nonce=stale
         1s alice < Refresh 438 realm nonce
         1s alice > Refresh auth
         1s alice < Refresh ok lifetime=1200 signed
         2s alice > CreatePermission auth nonce=stale peer=1.1.1.1:0
         2s alice < CreatePermission 438 realm nonce
         2s alice > CreatePermission auth peer=1.1.1.1:0
         2s alice < CreatePermission ok signed
         3s alice > ChannelBind auth nonce=stale peer=1.1.1.1:1 channel=4000
         3s alice < ChannelBind 438 realm nonce
         3s alice > ChannelBind auth peer=1.1.1.1:1 channel=4000
         3s alice < ChannelBind ok signed",
    );
}

#[test]
fn a_refresh_may_be_signed_long_before_it_leaves() {
    // libwebrtc signs it when it schedules it, with the nonce of then, and without LIFETIME.
    for minutes in [9, 59] {
        let at = minutes * 60;
        check(&format!(
            "0s alice > Allocate
             0s alice < Allocate 401 realm nonce
             0s alice > Allocate auth lifetime=3600
             0s - take :49152
             0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=3600 signed
             {at}s alice > Refresh auth
             {at}s alice < Refresh ok lifetime=1200 signed",
        ));
    }
}

#[test]
fn every_error_to_who_proved_a_key_is_signed() {
    // Firefox and libnice take no other.
    let world = World { per_agent: 1, ports: 49152..=49153, ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         0s alice > Allocate auth
         0s alice < Allocate 437 signed
         0s alice > CreatePermission auth
         0s alice < CreatePermission 400 signed
         0s alice > CreatePermission auth peer=10.0.0.1:1
         0s alice < CreatePermission 403 signed
         0s alice > CreatePermission auth peer=1.1.1.1:1 unknown=7000
         0s alice < CreatePermission 420 0x7000 signed
         0s alice > Refresh user=bob
         0s alice < Refresh 441 signed
         0s alice > Refresh auth family=2
         0s alice < Refresh 443 signed
         0s alice/1 > Allocate
         0s alice/1 < Allocate 401 realm nonce
         0s alice/1 > Allocate auth transport=6
         0s alice/1 < Allocate 442 signed
         0s alice/1 > Allocate auth family=2
         0s alice/1 < Allocate 440 signed
         0s alice/1 > Allocate auth
         0s alice/1 < Allocate 486 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth
         0s - take :49153
         0s bob < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.2:1000 lifetime=1200 signed
         0s carol > Allocate
         0s carol < Allocate 401 realm nonce
         0s carol > Allocate auth
         0s carol < Allocate 508 signed
         0s carol > Allocate auth expires=-10
         0s carol < Allocate 401 realm nonce signed",
    ));
}

#[test]
fn the_first_of_two_credentials_counts() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate unknown=0006 auth
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate unknown=0014 auth
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate unknown=0015 auth
         0s alice < Allocate 438 realm nonce",
    );
}
