//! Allocations with a relayed address of each family (RFC 8656 §7.2, §8.2).

use super::trace::{DUAL, World, check};

fn both() -> World {
    World { v6: true, ..World::default() }
}

#[test]
fn one_allocation_relays_to_peers_of_both_families() {
    both().check(&format!(
        "{DUAL}
         1s alice > CreatePermission auth peer=1.1.1.1:7 peer=[2606::1]:7
         1s alice < CreatePermission ok signed
         1s alice > Send peer=1.1.1.1:7 four
         1s 1.1.1.1:7 < four from :49152
         1s alice > Send peer=[2606::1]:7 six
         1s [2606::1]:7 < six from :49152
         1s 1.1.1.1:7 > :49152 four
         1s alice < Data peer=1.1.1.1:7 four
         1s [2606::1]:7 > :49152 six
         1s alice < Data peer=[2606::1]:7 six
         2s alice > ChannelBind auth peer=[2606::1]:7 channel=4000
         2s alice < ChannelBind ok signed
         2s alice > ChannelData 0x4000 six
         2s [2606::1]:7 < six from :49152
         3s alice > Refresh auth lifetime=0
         3s - close :49152
         3s - close :49152
         3s - ended alice released 10B out 7B in
         3s alice < Refresh ok lifetime=0 signed"
    ));
}

#[test]
fn a_second_address_is_asked_for_alone_and_is_of_ipv6() {
    both().check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth additional=1
         0s alice < Allocate 400 signed
         0s alice > Allocate auth additional=2 family=1
         0s alice < Allocate 400 signed
         0s alice > Allocate auth additional=2 family=9
         0s alice < Allocate 400 signed
         0s alice > Allocate auth additional=2 token
         0s alice < Allocate 400 signed
         0s alice > Allocate auth additional=2 even=1
         0s alice < Allocate 400 signed
         0s alice > Allocate auth additional-of-the-draft=2 even=1
         0s alice < Allocate 400 signed
         0s alice > Allocate auth after=additional:2
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth additional=2 even=0
         0s - take :49154
         0s - take :49152
         0s bob < Allocate ok relayed=5.5.5.5:49154 relayed=[2a00::5]:49152 mapped=9.0.0.2:1000 lifetime=1200 signed",
    );
}

#[test]
fn half_of_it_is_a_success_that_says_what_is_missing() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth additional=2
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=1200 missing=2:440 signed",
    );
    World { v4: false, ..both() }.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth additional=2
         0s - take :49152
         0s alice < Allocate ok relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=1200 missing=1:440 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth
         0s bob < Allocate 440 signed",
    );
    World { ports: 49152..=49152, ..both() }.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth family=2
         0s - take :49152
         0s alice < Allocate ok relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=1200 signed
         0s bob > Allocate
         0s bob < Allocate 401 realm nonce
         0s bob > Allocate auth additional=2
         0s - take :49152
         0s bob < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.2:1000 lifetime=1200 missing=2:508 signed
         0s carol > Allocate
         0s carol < Allocate 401 realm nonce
         0s carol > Allocate auth additional=2
         0s carol < Allocate 508 signed",
    );
}

#[test]
fn each_family_may_be_given_back_alone() {
    both().check(&format!(
        "{DUAL}
         1s alice > CreatePermission auth peer=1.1.1.1:7 peer=[2606::1]:7
         1s alice < CreatePermission ok signed
         1s alice > ChannelBind auth peer=[2606::1]:7 channel=4000
         1s alice < ChannelBind ok signed
         2s alice > Refresh auth lifetime=0 family=2
         2s - close :49152
         2s alice < Refresh ok lifetime=0 signed
         3s [2606::1]:7 > :49152 six
         3s drop no_allocation
         3s alice > Send peer=[2606::1]:7 six
         3s drop no_permission
         3s alice > ChannelData 0x4000 six
         3s drop no_channel
         3s alice > CreatePermission auth peer=[2606::1]:7
         3s alice < CreatePermission 443 signed
         3s alice > Refresh auth family=2
         3s alice < Refresh 443 signed
         3s alice > Send peer=1.1.1.1:7 four
         3s 1.1.1.1:7 < four from :49152
         4s alice > Refresh auth lifetime=0 family=1
         4s - close :49152
         4s - ended alice released 4B out 0B in
         4s alice < Refresh ok lifetime=0 signed"
    ));
}

#[test]
fn each_family_may_be_refreshed_alone() {
    both().check(&format!(
        "{DUAL}
         600s alice > Refresh auth family=1
         600s alice < Refresh ok lifetime=1200 signed
         1200s - close :49152
         1201s alice > Refresh auth family=2
         1201s alice < Refresh 443 signed
         1202s alice > Refresh auth
         1202s alice < Refresh ok lifetime=1200 signed
         2402s - close :49152
         2402s - ended alice expired 0B out 0B in
         2402s alice > Binding
         2402s alice < Binding ok mapped=9.0.0.1:1000"
    ));
}

#[test]
fn two_families_are_one_seat() {
    World { per_agent: 1, ..both() }.check(&format!(
        "{DUAL}
         1s alice/1 > Allocate
         1s alice/1 < Allocate 401 realm nonce
         1s alice/1 > Allocate auth
         1s alice/1 < Allocate 486 signed
         2s alice > Refresh auth lifetime=0 family=1
         2s - close :49152
         2s alice < Refresh ok lifetime=0 signed
         3s alice/1 > Allocate auth
         3s alice/1 < Allocate 486 signed
         4s alice > Refresh auth lifetime=0 family=2
         4s - close :49152
         4s - ended alice released 0B out 0B in
         4s alice < Refresh ok lifetime=0 signed
         5s alice/1 > Allocate auth
         5s - take :49153
         5s alice/1 < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1001 lifetime=1200 signed"
    ));
}
