//! What is announced to a path that relays beside this one: channels in force of clients on UDP, and nothing else.

use halfway::turn::{Transport, policy::DeniedPeers};

use super::trace::World;

const ALLOCATED: &str = "0s alice > Allocate
    0s alice < Allocate 401 realm nonce
    0s alice > Allocate auth lifetime=3600
    0s - take :49152
    0s alice < Allocate ok relayed=5.5.5.5:49152 mapped=9.0.0.1:1000 lifetime=3600 signed\n";

fn check(trace: &str) {
    World { routes: true, ..World::default() }.check(trace);
}

#[test]
fn a_channel_from_its_binding_to_its_end() {
    check(&format!(
        "{ALLOCATED}
         0s alice > CreatePermission auth peer=2.2.2.2:7
         0s alice < CreatePermission ok signed
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         1s - route 4000 of 9.0.0.1:1000 by :49152 to 1.1.1.1:7 for 600s
         1s alice < ChannelBind ok signed
         100s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         100s - route 4000 of 9.0.0.1:1000 by :49152 to 1.1.1.1:7 for 600s
         100s alice < ChannelBind ok signed
         100s alice > ChannelBind auth peer=1.1.1.1:8 channel=4001
         100s - route 4001 of 9.0.0.1:1000 by :49152 to 1.1.1.1:8 for 600s
         100s alice < ChannelBind ok signed
         300s alice > ChannelBind auth peer=1.1.1.1:8 channel=4001
         300s - route 4001 of 9.0.0.1:1000 by :49152 to 1.1.1.1:8 for 600s
         300s alice < ChannelBind ok signed
         700s - no route 4000 of 9.0.0.1:1000
         900s - no route 4001 of 9.0.0.1:1000
         900s alice > ChannelData 0x4001 late
         900s drop no_channel"
    ));
}

#[test]
fn all_channels_end_before_their_allocation_does() {
    check(&format!(
        "{ALLOCATED}
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         1s - route 4000 of 9.0.0.1:1000 by :49152 to 1.1.1.1:7 for 600s
         1s alice < ChannelBind ok signed
         1s alice > ChannelBind auth peer=1.1.1.1:8 channel=4001
         1s - route 4001 of 9.0.0.1:1000 by :49152 to 1.1.1.1:8 for 600s
         1s alice < ChannelBind ok signed
         2s alice > Refresh auth lifetime=0
         2s - no route 4000 of 9.0.0.1:1000
         2s - no route 4001 of 9.0.0.1:1000
         2s - close :49152
         2s - ended alice released 0B out 0B in
         2s alice < Refresh ok lifetime=0 signed"
    ));
}

#[test]
fn clients_on_streams_and_peers_that_are_discarded_are_not_announced() {
    let on_stream = World { routes: true, transport: Transport::Tcp, ..World::default() };
    on_stream.check(&format!(
        "{ALLOCATED}
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         1s alice < ChannelBind ok signed"
    ));
    let discarding = World { routes: true, denied: DeniedPeers::Discard, ..World::default() };
    discarding.check(&format!(
        "{ALLOCATED}
         1s alice > ChannelBind auth peer=192.168.1.1:7 channel=4000
         1s alice < ChannelBind ok signed"
    ));
}

#[test]
fn a_family_that_is_given_back_takes_its_channels_along() {
    World { routes: true, v6: true, ..World::default() }.check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > Allocate auth additional=2 lifetime=3600
         0s - take :49152
         0s - take :49152
         0s alice < Allocate ok relayed=5.5.5.5:49152 relayed=[2a00::5]:49152 mapped=9.0.0.1:1000 lifetime=3600 signed
         1s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         1s - route 4000 of 9.0.0.1:1000 by :49152 to 1.1.1.1:7 for 600s
         1s alice < ChannelBind ok signed
         1s alice > ChannelBind auth peer=[2606::1]:7 channel=4001
         1s - route 4001 of 9.0.0.1:1000 by :49152 to [2606::1]:7 for 600s
         1s alice < ChannelBind ok signed
         2s alice > Refresh auth lifetime=0 family=2
         2s - no route 4001 of 9.0.0.1:1000
         2s - close :49152
         2s alice < Refresh ok lifetime=0 signed",
    );
}
