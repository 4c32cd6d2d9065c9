//! ChannelBind and ChannelData (RFC 8656 §12).

use super::trace::check;

const ALLOCATED: &str = "0s alice > Allocate
    0s alice < Allocate 401 realm nonce
    0s alice > Allocate auth lifetime=3600
    0s - take :49152
    0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=3600 signed\n";

#[test]
fn a_channel_carries_both_ways_and_keeps_its_permission_for_ten_minutes() {
    // aioice never renews the permission, and binds anew after 500 s at the earliest.
    check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed
         0s alice > ChannelData 0x4000 hello
         0s 1.1.1.1:7 < hello from :49152
         0s 1.1.1.1:7 > :49152 welcome
         0s alice < ChannelData 0x4000 welcome
         0s 1.1.1.1:8 > :49152 other-port
         0s alice < Data peer=1.1.1.1:8 other-port
         299s 1.1.1.1:7 > :49152 a
         299s alice < ChannelData 0x4000 a
         301s 1.1.1.1:7 > :49152 b
         301s alice < ChannelData 0x4000 b
         499s 1.1.1.1:7 > :49152 c
         499s alice < ChannelData 0x4000 c
         599s 1.1.1.1:7 > :49152 d
         599s alice < ChannelData 0x4000 d
         599s alice > ChannelData 0x4000 e
         599s 1.1.1.1:7 < e from :49152
         600s 1.1.1.1:7 > :49152 f
         600s drop no_permission
         600s alice > ChannelData 0x4000 g
         600s drop no_channel",
    ));
}

#[test]
fn binding_again_renews() {
    check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=5000
         0s alice < ChannelBind ok signed
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=5000
         1s alice < ChannelBind ok signed
         300s alice > ChannelBind auth peer=1.1.1.1:7 channel=5000
         300s alice < ChannelBind ok signed
         899s 1.1.1.1:7 > :49152 still
         899s alice < ChannelData 0x5000 still
         901s alice > ChannelBind auth peer=1.1.1.1:7 channel=5000
         901s alice < ChannelBind ok signed
         902s 1.1.1.1:7 > :49152 again
         902s alice < ChannelData 0x5000 again",
    ));
}

#[test]
fn numbers_and_peers_do_not_change_partners_for_five_minutes_after_the_end() {
    check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed
         1s alice > ChannelBind auth peer=1.1.1.1:8 channel=4000
         1s alice < ChannelBind 400 signed
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=4001
         1s alice < ChannelBind 400 signed
         1s alice > ChannelBind auth peer=1.1.1.1:8 channel=4001
         1s alice < ChannelBind ok signed
         899s alice > ChannelBind auth peer=2.2.2.2:7 channel=4000
         899s alice < ChannelBind 400 signed
         899s alice > ChannelBind auth peer=1.1.1.1:7 channel=4002
         899s alice < ChannelBind 400 signed
         900s alice > ChannelBind auth peer=2.2.2.2:7 channel=4000
         900s alice < ChannelBind ok signed",
    ));
}

#[test]
fn the_range_of_numbers_is_that_of_rfc_5766() {
    check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=3fff
         0s alice < ChannelBind 400 signed
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=8000
         0s alice < ChannelBind 400 signed
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=7fff
         0s alice < ChannelBind ok signed
         0s alice > ChannelBind auth peer=1.1.1.1:8 channel=7ffe
         0s alice < ChannelBind ok signed
         0s alice > ChannelBind auth peer=1.1.1.1:9 channel=5000
         0s alice < ChannelBind ok signed
         0s alice > ChannelBind auth peer=1.1.1.1:10
         0s alice < ChannelBind 400 signed
         0s alice > ChannelBind auth channel=4000
         0s alice < ChannelBind 400 signed
         0s alice > ChannelBind auth channel=4000 peer=[2606::1]:7
         0s alice < ChannelBind 443 signed
         0s alice > ChannelBind auth channel=4000 peer=1.1.1.1:0
         0s alice < ChannelBind 403 signed
         0s alice > ChannelData 0x7fff hello
         0s 1.1.1.1:7 < hello from :49152",
    ));
}

#[test]
fn padding_is_accepted_and_a_length_that_lies_is_not() {
    let mut trace = format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed\n"
    );
    for length in 1..=8 {
        let payload = "x".repeat(length);
        trace += &format!(
            "1s alice > ChannelData 0x4000 {payload} padded
             1s 1.1.1.1:7 < {payload} from :49152
             1s alice > ChannelData 0x4000 {payload}
             1s 1.1.1.1:7 < {payload} from :49152\n"
        );
    }
    trace += "2s alice > ChannelData 0x4000 hello length=6
              2s drop malformed
              2s alice > ChannelData 0x4001 hello
              2s drop no_channel
              2s bob > ChannelData 0x4000 hello
              2s drop no_allocation";
    check(&trace);
}

#[test]
fn a_request_and_the_data_behind_it_need_no_pause() {
    // libjuice sends both back to back, and the request again with every packet until it is answered.
    check(&format!(
        "{ALLOCATED}
         0s alice > CreatePermission auth tx=1 peer=1.1.1.1:7
         0s alice < CreatePermission ok signed
         0s alice > Send peer=1.1.1.1:7 a
         0s 1.1.1.1:7 < a from :49152
         0s alice > CreatePermission auth tx=1 peer=1.1.1.1:7
         0s alice < CreatePermission ok signed
         0s alice > ChannelBind auth tx=2 peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed
         0s alice > ChannelData 0x4000 b
         0s 1.1.1.1:7 < b from :49152
         0s alice > ChannelBind auth tx=2 peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed",
    ));
}
