//! What one agent may relay (`turn.bytes_per_second_per_agent`).

use super::trace::{ALLOCATED, World};

#[test]
fn an_agents_allocations_share_one_allowance_each_way() {
    let world = World { bytes_per_second: 1_000, ..World::default() };
    // A burst of 64 KiB is the least there is.
    let half = "x".repeat(32_700);
    world.check(&format!(
        "{ALLOCATED}
         0s alice > ChannelBind auth peer=1.1.1.1:7 channel=4000
         0s alice < ChannelBind ok signed
         0s alice/1 > Allocate
         0s alice/1 < Allocate 401 realm nonce
         0s alice/1 > Allocate auth
         0s - take :49153
         0s alice/1 < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1001 lifetime=1200 signed
         0s alice/1 > CreatePermission auth peer=1.1.1.1:7
         0s alice/1 < CreatePermission ok signed
         1s alice > ChannelData 0x4000 {half}
         1s 1.1.1.1:7 < {half} from :49152
         1s alice/1 > Send peer=1.1.1.1:7 {half}
         1s 1.1.1.1:7 < {half} from :49153
         1s alice > ChannelData 0x4000 much
         1s 1.1.1.1:7 < much from :49152
         1s alice > ChannelData 0x4000 {half}
         1s drop bandwidth
         1s alice/1 > Send peer=1.1.1.1:7 {half}
         1s drop bandwidth
         1s 1.1.1.1:7 > :49152 {half}
         1s alice < ChannelData 0x4000 {half}
         1s 1.1.1.1:7 > :49153 {half}
         1s alice/1 < Data peer=1.1.1.1:7 {half}
         1s 1.1.1.1:7 > :49152 {half}
         1s drop bandwidth
         34s alice > ChannelData 0x4000 {half}
         34s 1.1.1.1:7 < {half} from :49152
         34s alice > ChannelData 0x4000 {half}
         34s drop bandwidth
         34s alice > Refresh auth lifetime=0
         34s - close :49152
         34s - ended alice released 65404B out 32700B in
         34s alice < Refresh ok lifetime=0 signed"
    ));
}

#[test]
fn allocating_anew_brings_nothing() {
    let world = World { bytes_per_second: 1_000, ..World::default() };
    let whole = "x".repeat(65_000);
    world.check(&format!(
        "{ALLOCATED}
         0s alice > CreatePermission auth peer=1.1.1.1:7
         0s alice < CreatePermission ok signed
         1s alice > Send peer=1.1.1.1:7 {whole}
         1s 1.1.1.1:7 < {whole} from :49152
         2s alice > Refresh auth lifetime=0
         2s - close :49152
         2s - ended alice released 65000B out 0B in
         2s alice < Refresh ok lifetime=0 signed
         2s alice > Allocate auth
         2s - take :49153
         2s alice < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.1:1000 lifetime=1200 signed
         2s alice > CreatePermission auth peer=1.1.1.1:7
         2s alice < CreatePermission ok signed
         2s alice > Send peer=1.1.1.1:7 {whole}
         2s drop bandwidth
         67s alice > Send peer=1.1.1.1:7 {whole}
         67s 1.1.1.1:7 < {whole} from :49153"
    ));
}
