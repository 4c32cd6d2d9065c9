//! Send and Data indications, and bytes that are nothing.

use halfway::turn::Transport;

use super::trace::{ALLOCATED, DUAL, World, check};

const PERMITTED: &str = "0s alice > Allocate
    0s alice < Allocate 401 realm nonce
    0s alice > Allocate auth
    0s - take :49152
    0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
    0s alice > CreatePermission auth peer=1.1.1.1:7
    0s alice < CreatePermission ok signed\n";

#[test]
fn indications_carry_both_ways_and_may_not_ask_for_what_we_do_not_do() {
    check(&format!(
        "{PERMITTED}
         1s alice > Send peer=1.1.1.1:7 hello
         1s 1.1.1.1:7 < hello from :49152
         1s alice > Send peer=1.1.1.1:7 peer=2.2.2.2:2 first-of-two
         1s 1.1.1.1:7 < first-of-two from :49152
         1s alice > Send peer=1.1.1.1:7 unknown=8030 optional
         1s 1.1.1.1:7 < optional from :49152
         1s alice > Send peer=1.1.1.1:7 df dont-fragment
         1s drop malformed
         1s alice > Send peer=1.1.1.1:7 unknown=7030 required
         1s drop malformed
         1s alice > Send nobody
         1s drop malformed
         1s alice > Send peer=[2606::1]:7 other-family
         1s drop no_permission",
    ));
}

#[test]
fn data_indications_carry_every_length_and_both_families() {
    let mut trace = String::from(PERMITTED);
    for length in 1..=9 {
        let payload = "y".repeat(length);
        trace += &format!(
            "1s 1.1.1.1:7 > :49152 {payload}
             1s alice < Data peer=1.1.1.1:7 {payload}\n"
        );
    }
    check(&trace);
    let world = World { v6: true, ..World::default() };
    world.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth family=2
         0s - take :49152
         0s alice < Allocate ok relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s alice > CreatePermission auth peer=[2606::1]:7
         0s alice < CreatePermission ok signed
         0s alice > Send peer=[2606::1]:7 hello
         0s [2606::1]:7 < hello from :49152
         0s [2606::1]:7 > :49152 welcome
         0s alice < Data peer=[2606::1]:7 welcome",
    );
}

#[test]
fn what_is_nothing_gets_no_answer() {
    let cookie = "2112a442";
    let id = "000000000000000000000001";
    for nothing in [
        "ff",
        "00",
        "0001",
        "c0ffee",
        &format!("00010000{cookie}0000"),                 // short of a header
        &format!("00010004{cookie}{id}"),                 // promises more than there is
        &format!("00010000{cookie}{id}00000000"),         // has more than it promises
        &format!("00010003{cookie}{id}000000"),           // a length that is no multiple of four
        &format!("00010004{cookie}{id}0006ffff"),         // an attribute longer than the message
        &format!("00010000deadbeef{id}"),                 // RFC 3489
        &format!("00110000{cookie}{id}"),                 // a Binding indication
        &format!("01010000{cookie}{id}"),                 // a Binding response
        &format!("0fff0000{cookie}{id}"),                 // no method
        &format!("00160000{cookie}{id}"),                 // a Send indication of nothing
        &format!("00160008{cookie}{id}0012000800017fff"), // an address cut short
    ] {
        check(&format!("0s alice > raw {nothing}\n0s drop malformed"));
    }
}

#[test]
fn a_session_without_channels_lasts_on_a_stream() {
    // Firefox binds no channels, and renews its permission every four minutes.
    let world = World { transport: Transport::Tcp, ..World::default() };
    let payload = "z".repeat(1_200);
    let mut trace = String::from(PERMITTED);
    for time in (10..900).step_by(10) {
        if time % 240 == 0 {
            trace += &format!(
                "{time}s alice > CreatePermission auth peer=1.1.1.1:7
                 {time}s alice < CreatePermission ok signed\n"
            );
        }
        trace += &format!(
            "{time}s alice > Send peer=1.1.1.1:7 {payload}
             {time}s 1.1.1.1:7 < {payload} from :49152
             {time}s 1.1.1.1:7 > :49152 {payload}
             {time}s alice < Data peer=1.1.1.1:7 {payload}\n"
        );
    }
    world.check(&trace);
}

#[test]
fn a_data_indication_on_a_stream_is_no_longer_than_firefox_reads() {
    // 2,048 bytes with 36 of head for IPv4, 48 for IPv6; a channel may carry more, and so may UDP.
    let [most, more] = [2_012, 2_013].map(|length| "z".repeat(length));
    let [most6, more6] = [2_000, 2_001].map(|length| "z".repeat(length));
    let world = World { transport: Transport::Tcp, v6: true, ..World::default() };
    world.check(&format!(
        "{DUAL}
         0s alice > CreatePermission auth peer=1.1.1.1:7 peer=[2606::1]:7
         0s alice < CreatePermission ok signed
         1s 1.1.1.1:7 > :49152 {most}
         1s alice < Data peer=1.1.1.1:7 {most}
         1s 1.1.1.1:7 > :49152 {more}
         1s drop too_large
         1s [2606::1]:7 > :49152 {most6}
         1s alice < Data peer=[2606::1]:7 {most6}
         1s [2606::1]:7 > :49152 {more6}
         1s drop too_large
         2s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         2s alice < ChannelBind ok signed
         2s 1.1.1.1:7 > :49152 {more}
         2s alice < ChannelData 0x4000 {more}",
    ));
    check(&format!(
        "{PERMITTED}
         1s 1.1.1.1:7 > :49152 {more}
         1s alice < Data peer=1.1.1.1:7 {more}",
    ));
}

const TWO: &str = "1s bob > Allocate
    1s bob < Allocate 401 realm nonce
    1s bob > Allocate auth
    1s - take :49153
    1s bob < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.2:1000 lifetime=1200 signed\n";

#[test]
fn between_two_clients_of_one_host_both_permissions_count() {
    check(&format!(
        "{ALLOCATED}{TWO}
         2s alice > ChannelBind auth peer=5.5.5.5:49153 channel=4000
         2s alice < ChannelBind ok signed
         3s alice > ChannelData 0x4000 unasked
         3s drop no_permission
         4s bob > CreatePermission auth peer=5.5.5.5:49152
         4s bob < CreatePermission ok signed
         5s alice > ChannelData 0x4000 hello
         5s bob < Data peer=5.5.5.5:49152 hello
         6s bob > ChannelBind auth peer=5.5.5.5:49152 channel=4001
         6s bob < ChannelBind ok signed
         7s alice > ChannelData 0x4000 hello
         7s bob < ChannelData 0x4001 hello
         7s bob > ChannelData 0x4001 welcome
         7s alice < ChannelData 0x4000 welcome
         8s bob > Refresh auth lifetime=0
         8s - close :49153
         8s - ended bob released 7B out 10B in
         8s bob < Refresh ok lifetime=0 signed
         9s alice > ChannelData 0x4000 gone
         9s drop denied
         9s alice > Refresh auth lifetime=0
         9s - close :49152
         9s - ended alice released 17B out 7B in
         9s alice < Refresh ok lifetime=0 signed",
    ));
}
