//! CreatePermission (RFC 8656 §10), and which peers may be reached.

use std::net::Ipv4Addr;

use halfway::turn::{Transport, policy::DeniedPeers};

use super::trace::{ALLOCATED, DUAL, World, check};

#[test]
fn a_permission_is_for_an_address_and_for_five_minutes() {
    check(&format!(
        "{ALLOCATED}
         0s 1.1.1.1:7 > :49152 early
         0s drop no_permission
         1s alice > CreatePermission auth peer=1.1.1.1:0
         1s alice < CreatePermission ok signed
         2s alice > Send peer=1.1.1.1:7 hello
         2s 1.1.1.1:7 < hello from :49152
         3s 1.1.1.1:8 > :49152 welcome
         3s alice < Data peer=1.1.1.1:8 welcome
         200s alice > CreatePermission auth peer=1.1.1.1:9
         200s alice < CreatePermission ok signed
         499s 1.1.1.1:7 > :49152 still
         499s alice < Data peer=1.1.1.1:7 still
         500s 1.1.1.1:7 > :49152 late
         500s drop no_permission
         500s alice > Send peer=1.1.1.1:7 late
         500s drop no_permission",
    ));
}

#[test]
fn all_peers_or_none() {
    check(&format!(
        "{ALLOCATED}
         1s alice > CreatePermission auth peer=1.1.1.1:0 peer=2.2.2.2:5 peer=3.3.3.3:5 peer=4.4.4.4:1 peer=8.8.8.8:1
         1s alice < CreatePermission ok signed
         2s alice > Send peer=8.8.8.8:9 hello
         2s 8.8.8.8:9 < hello from :49152
         3s alice > CreatePermission auth peer=1.0.0.1:1 peer=192.168.1.1:1
         3s alice < CreatePermission 403 signed
         3s alice > Send peer=1.0.0.1:1 hello
         3s drop no_permission
         4s alice > CreatePermission auth peer=1.0.0.1:1 peer=[2606::1]:1
         4s alice < CreatePermission 443 signed
         4s alice > Send peer=1.0.0.1:1 hello
         4s drop no_permission
         5s alice > CreatePermission auth
         5s alice < CreatePermission 400 signed
         5s alice > CreatePermission auth peer=1.0.0.1:1 broken=0012
         5s alice < CreatePermission 400 signed
         6s alice > CreatePermission auth peer=1.0.0.1:1
         6s alice < CreatePermission ok signed",
    ));
}

#[test]
fn no_allocation_no_permission() {
    check(
        "0s alice > Allocate
         0s alice < Allocate 401 realm nonce
         0s alice > CreatePermission auth peer=1.1.1.1:0
         0s alice < CreatePermission 437 signed
         0s alice > Send peer=1.1.1.1:7 hello
         0s drop no_allocation",
    );
}

#[test]
fn our_own_address_is_reached_only_where_a_relayed_address_is_live() {
    check(&format!(
        "{ALLOCATED}
         0s alice > CreatePermission auth peer=5.5.5.5:443
         0s alice < CreatePermission ok signed
         0s alice > Send peer=5.5.5.5:443 GET
         0s drop denied
         0s alice > Send peer=5.5.5.5:49153 nobody
         0s drop denied
         1s bob > Allocate
         1s bob < Allocate 401 realm nonce
         1s bob > Allocate auth
         1s - take :49153
         1s bob < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.2:1000 lifetime=1200 signed
         2s bob > CreatePermission auth peer=5.5.5.5:49152
         2s bob < CreatePermission ok signed
         3s alice > Send peer=5.5.5.5:49153 hello
         3s bob < Data peer=5.5.5.5:49152 hello
         4s bob > Refresh auth lifetime=0
         4s - close :49153
         4s - ended bob released 0B out 5B in
         4s bob < Refresh ok lifetime=0 signed
         5s alice > Send peer=5.5.5.5:49153 gone
         5s drop denied",
    ));
}

#[test]
fn behind_one_to_one_nat_our_public_address_is_reached_from_inside() {
    let world = World { bound: "10.0.0.5", ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         1s bob > Allocate
         1s bob < Allocate 401 realm nonce
         1s bob > Allocate auth
         1s - take :49153
         1s bob < Allocate ok relayed=5.5.5.5:49153 mapped=9.0.0.2:1000 lifetime=1200 signed
         2s alice > CreatePermission auth peer=5.5.5.5:49153
         2s alice < CreatePermission ok signed
         2s bob > ChannelBind auth peer=5.5.5.5:49152 channel=4000
         2s bob < ChannelBind ok signed
         3s alice > Send peer=5.5.5.5:49153 hello
         3s bob < ChannelData 0x4000 hello
         4s alice > CreatePermission auth peer=10.0.0.5:49153
         4s alice < CreatePermission 403 signed",
    ));
}

#[test]
fn denied_peers_may_be_granted_and_discarded() {
    let world = World { denied: DeniedPeers::Discard, ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         1s alice > CreatePermission auth peer=192.168.1.1:1 peer=1.1.1.1:1
         1s alice < CreatePermission ok signed
         1s alice > Send peer=192.168.1.1:1 hello
         1s drop denied
         1s 192.168.1.1:1 > :49152 hello
         1s drop denied
         1s alice > Send peer=1.1.1.1:1 hello
         1s 1.1.1.1:1 < hello from :49152
         2s alice > ChannelBind auth peer=10.1.1.1:1 channel=4000
         2s alice < ChannelBind ok signed
         2s alice > ChannelData 0x4000 hello
         2s drop denied
         2s 10.1.1.1:1 > :49152 hello
         2s drop denied
         3s alice > CreatePermission auth peer=127.0.0.1:1
         3s alice < CreatePermission 403 signed
         3s alice > CreatePermission auth peer=169.254.169.254:80
         3s alice < CreatePermission 403 signed
         3s alice > ChannelBind auth peer=5.5.5.5:3478 channel=4001
         3s alice < ChannelBind 403 signed",
    ));
}

/// Ranges that no honest peer is in, metadata services, and what stands for "this host".
const SPECIAL: &str = "0.0.0.0 0.1.2.3 127.0.0.1 127.255.255.254 10.0.0.1 172.16.0.1 172.31.255.254 192.168.0.1 100.64.0.1 \
    100.100.100.200 169.254.169.254 168.63.129.16 192.0.0.1 192.0.0.192 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 \
    192.88.99.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255";
const SPECIAL_V6: &str = ":: ::1 64:ff9b:1::1 2001::1 100::1 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fec0::1 ff02::1 \
    2a00::5efe:10.0.0.1";

#[test]
fn no_special_address_is_reached_by_any_method_over_any_transport() {
    let v6: Vec<_> = SPECIAL_V6.split_whitespace().map(str::to_owned).chain(embedded()).collect();
    let v4: Vec<_> = SPECIAL.split_whitespace().map(str::to_owned).collect();
    for transport in [Transport::Udp, Transport::Tcp] {
        let world = World { v6: true, transport, ..World::default() };
        let peers = v4.iter().map(|ip| format!("{ip}:7")).chain(v6.iter().map(|ip| format!("[{ip}]:7")));
        let mut trace = String::from(DUAL);
        for peer in
            peers.chain(["1.1.1.1:0".to_owned(), "5.5.5.5:3478".to_owned(), "[2a00::5]:443".to_owned()])
        {
            trace += &refused(&peer);
        }
        world.check(&trace);
    }
}

/// In every spelling of IPv6 that a gateway could take for IPv4.
fn embedded() -> impl Iterator<Item = String> {
    SPECIAL.split_whitespace().flat_map(|ip| {
        let [a, b, c, d] = ip.parse::<Ipv4Addr>().unwrap().octets();
        let sixto4 = format!("2002:{a:02x}{b:02x}:{c:02x}{d:02x}::");
        ["::", "::ffff:", "64:ff9b::"].map(|form| format!("{form}{ip}")).into_iter().chain([sixto4])
    })
}

/// One bad peer among good ones spoils them all. Where only the port is bad, a permission may be had.
fn refused(peer: &str) -> String {
    let bind = format!(
        "1s alice > ChannelBind auth peer={peer} channel=4000
         1s alice < ChannelBind 403 signed
         1s alice > ChannelData 0x4000 hello
         1s drop no_channel
         1s alice > Send peer={peer} hello
         1s drop no_permission\n"
    );
    if ["1.1.1.1", "5.5.5.5", "[2a00::5]"].iter().any(|ip| peer.starts_with(ip)) {
        return bind;
    }
    format!(
        "1s alice > CreatePermission auth peer={peer}
         1s alice < CreatePermission 403 signed
         1s alice > CreatePermission auth peer=1.1.1.1:7 peer={peer} peer=[2606::1]:7
         1s alice < CreatePermission 403 signed
         1s alice > Send peer=1.1.1.1:7 hello
         1s drop no_permission
         {bind}"
    )
}

#[test]
fn one_refusal_does_not_spoil_the_next_request() {
    for transport in [Transport::Udp, Transport::Tcp] {
        World { transport, ..World::default() }.check(&format!(
            "{ALLOCATED}
             0s alice > CreatePermission auth peer=10.0.0.1:7
             0s alice < CreatePermission 403 signed
             0s alice > CreatePermission auth peer=1.1.1.1:7
             0s alice < CreatePermission ok signed
             0s alice > Send peer=1.1.1.1:7 hello
             0s 1.1.1.1:7 < hello from :49152",
        ));
    }
}

#[test]
fn allow_and_deny_lists() {
    let world =
        World { allow: vec!["10.0.0.0/8"], deny: vec!["10.9.0.0/16", "1.1.1.1/32"], ..World::default() };
    world.check(&format!(
        "{ALLOCATED}
         1s alice > CreatePermission auth peer=10.1.1.1:1
         1s alice < CreatePermission ok signed
         1s alice > CreatePermission auth peer=10.9.1.1:1
         1s alice < CreatePermission 403 signed
         1s alice > CreatePermission auth peer=1.1.1.1:1
         1s alice < CreatePermission 403 signed
         1s alice > CreatePermission auth peer=192.168.1.1:1
         1s alice < CreatePermission 403 signed",
    ));
}
