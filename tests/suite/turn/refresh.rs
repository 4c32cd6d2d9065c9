//! Refresh (RFC 8656 §8).

use super::trace::{ALLOCATED, check};

#[test]
fn each_refresh_starts_the_lifetime_anew() {
    check(&format!(
        "{ALLOCATED}
         1140s alice > Refresh auth
         1140s alice < Refresh ok lifetime=1200 signed
         2280s alice > Refresh auth lifetime=3600
         2280s alice < Refresh ok lifetime=3600 signed
         5880s - close :49152
         5880s - ended alice expired 0B out 0B in
         5880s alice > Refresh auth
         5880s alice < Refresh 438 realm nonce",
    ));
}

#[test]
fn one_lost_refresh_of_two_costs_nothing() {
    // libjuice asks for 600 s and refreshes every 540 s, once, without retransmission.
    check(&format!(
        "{ALLOCATED}
         540s alice > Refresh auth lifetime=600
         540s alice < Refresh ok lifetime=1200 signed
         1620s alice > Refresh auth lifetime=600
         1620s alice < Refresh ok lifetime=1200 signed",
    ));
}

#[test]
fn the_family_must_be_that_of_the_allocation() {
    check(&format!(
        "{ALLOCATED}
         1s alice > Refresh auth family=2
         1s alice < Refresh 443 signed
         1s alice > Refresh auth family=1
         1s alice < Refresh ok lifetime=1200 signed",
    ));
}

#[test]
fn zero_frees_at_once() {
    check(&format!(
        "{ALLOCATED}
         1s alice > Refresh auth lifetime=0
         1s - close :49152
         1s - ended alice released 0B out 0B in
         1s alice < Refresh ok lifetime=0 signed
         1s 1.1.1.1:7 > :49152 hello
         1s drop no_allocation
         1s alice > Allocate auth
         1s - take :49153
         1s alice < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1000 lifetime=1200 signed",
    ));
}
