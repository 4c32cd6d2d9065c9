//! On which interfaces the program is: found from addresses, looked after while they come and go.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::Duration,
};

use aya::{
    Ebpf,
    programs::{ProgramError, Xdp, links::FdLink, xdp::XdpMode},
};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::{InterfaceFlags, if_nametoindex},
};

use super::{Interface, Interfaces, Maps, cause, paths::Paths, program};
use crate::host::{self, Host};

/// Interfaces are looked at that often: one may come, and another's program may leave it.
const EACH: Duration = Duration::from_secs(5);

/// How the program runs (`turn.xdp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// In the driver where that can, else in the stack.
    Auto,
    /// In the driver, before the kernel has made anything of a packet.
    Driver,
    /// In the stack, on every interface.
    Generic,
}

/// The interfaces that have the program.
#[derive(Clone)]
pub struct Attachments(Arc<Mutex<State>>);

struct State {
    maps: Arc<Maps>,
    object: Ebpf,
    mode: Mode,
    addresses: Vec<IpAddr>,
    is_wanted: bool,
    attached: BTreeMap<String, Attached>,
    /// Why others are not.
    told: BTreeMap<String, String>,
}

struct Attached {
    index: u32,
    is_driver: bool,
    /// Ends with this process, however it ends.
    _link: FdLink,
}

impl Attachments {
    /// None yet: of the interfaces that have these addresses, or by which they are reached.
    #[must_use]
    pub fn new(maps: &Arc<Maps>, object: Ebpf, mode: Mode, addresses: Vec<IpAddr>) -> Self {
        let (maps, attached, told) = (Arc::clone(maps), BTreeMap::new(), BTreeMap::new());
        Self(Arc::new(Mutex::new(State { maps, object, mode, addresses, is_wanted: false, attached, told })))
    }

    /// Attaches the program now, and where it cannot be now, later. Says once how it is with each interface.
    pub fn keep(&self) {
        self.come_back();
        let state = Arc::downgrade(&self.0);
        let keep = move || {
            thread::sleep(EACH);
            while look_again(&state) {
                thread::sleep(EACH);
            }
        };
        if let Err(error) = thread::Builder::new().name("xdp".to_owned()).spawn(keep) {
            tracing::warn!("turn.xdp: interfaces that come later get no program: {error}");
        }
    }

    /// Takes the program from all interfaces, and leaves them to somebody else.
    pub fn leave(&self) {
        self.state(|state| {
            state.is_wanted = false;
            state.attached.clear();
        });
    }

    /// Attaches it again.
    pub fn come_back(&self) {
        self.state(|state| {
            state.is_wanted = true;
            state.look();
        });
    }

    /// How many interfaces have it in their drivers, and how many in the stack.
    #[must_use]
    pub fn count(&self) -> [u64; 2] {
        self.state(|state| {
            let drivers = state.attached.values().filter(|attached| attached.is_driver).count();
            [drivers as u64, (state.attached.len() - drivers) as u64]
        })
    }

    fn state<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Whether there will be a next time.
fn look_again(state: &Weak<Mutex<State>>) -> bool {
    let Some(state) = state.upgrade() else { return false };
    state.lock().unwrap_or_else(PoisonError::into_inner).look();
    true
}

impl State {
    fn look(&mut self) {
        if !self.is_wanted {
            return;
        }
        let wanted = interfaces(&self.addresses);
        let names: BTreeSet<_> = wanted.iter().map(|wanted| wanted.below.clone()).collect();
        // One that has gone took the program with it, and another may have its name.
        self.attached.retain(|name, attached| {
            let stays = names.contains(name) && if_nametoindex(name.as_str()) == Ok(attached.index);
            if !stays {
                tracing::info!("turn.xdp: {name} is gone, or has another address");
            }
            stays
        });
        self.told.retain(|name, _| names.contains(name));
        for name in names {
            if !self.attached.contains_key(&name) {
                self.try_attach(name);
            }
        }
        self.maps.set_interfaces(self.as_routes_name_them(&wanted));
    }

    fn as_routes_name_them(&self, wanted: &[Wanted]) -> Interfaces {
        let interface = |wanted: &Wanted| {
            let attached = self.attached.get(&wanted.below)?;
            let (index, address) = (attached.index, link_address(&wanted.below)?);
            let way = if is_bond(&wanted.below) { Interface::ANY } else { index };
            let named = if_nametoindex(wanted.name.as_str()).ok()?;
            Some((named, Interface { index, address, vlan: wanted.vlan, way }))
        };
        let all = wanted.iter().filter_map(interface).collect();
        let mut modes = self.attached.iter().map(|(name, attached)| (attached.is_driver, name));
        // In the stack any interface can send; a driver gives packets to those that take them.
        let crosses = modes.clone().all(|(is_driver, _)| !is_driver)
            || modes.all(|(is_driver, name)| is_driver && takes_from_others(name));
        Interfaces::new(all, crosses)
    }

    fn try_attach(&mut self, name: String) {
        match self.attach(&name) {
            Ok(attached) => {
                let mode = if attached.is_driver { "driver" } else { "generic" };
                tracing::info!("turn.xdp: the kernel relays channels on {name} ({mode} mode)");
                self.told.remove(&name);
                self.attached.insert(name, attached);
            }
            Err(problem) => {
                if self.told.get(&name) != Some(&problem) {
                    tracing::warn!("turn.xdp: {name} has no program, and user space relays: {problem}");
                }
                self.told.insert(name, problem);
            }
        }
    }

    fn attach(&mut self, name: &str) -> Result<Attached, String> {
        let index = if_nametoindex(name).map_err(|error| error.to_string())?;
        let program: &mut Xdp = program(&mut self.object)?;
        let modes = match self.mode {
            Mode::Auto => &[XdpMode::Driver, XdpMode::Skb][..],
            Mode::Driver => &[XdpMode::Driver],
            Mode::Generic => &[XdpMode::Skb],
        };
        let mut problem = String::new();
        for mode in modes {
            match attach_in(program, index, *mode) {
                Ok(link) => {
                    return Ok(Attached { index, is_driver: *mode == XdpMode::Driver, _link: link });
                }
                Err(why) => problem = why,
            }
        }
        Err(problem)
    }
}

fn attach_in(program: &mut Xdp, index: u32, mode: XdpMode) -> Result<FdLink, String> {
    let attached = program.attach_to_if_index(index, mode).and_then(|link| program.take_link(link));
    let link = attached.map_err(|error| why_not(&error))?;
    // Other kinds of link outlive the process. Dropping one takes it away.
    link.try_into().map_err(|_| "this kernel has no links for XDP: Linux 5.9 has them".to_owned())
}

fn why_not(error: &ProgramError) -> String {
    let (number, said) = cause(error);
    let hint = match number {
        Some(libc::EBUSY | libc::EEXIST) => "another program is there (see `bpftool net`); it is tried again",
        Some(libc::EOPNOTSUPP) => r#"its driver cannot; xdp = "generic" would"#,
        Some(libc::EPERM) => "it needs the capability CAP_NET_ADMIN",
        _ => "the kernel's log may say more (`dmesg`): some drivers want a smaller MTU, or fewer queues",
    };
    format!("{said}: {hint}")
}

/// An interface whose packets the program is to see.
struct Wanted {
    name: String,
    /// Where they arrive: of a VLAN, the interface below.
    below: String,
    /// The number in the tag that they have there.
    vlan: Option<u16>,
}

/// Those whose packets have these addresses. Those on the loopback interface, and those that stand for all, are reached where
/// the default routes leave.
fn interfaces(addresses: &[IpAddr]) -> Vec<Wanted> {
    let Ok(all) = getifaddrs() else { return Vec::new() };
    let all: Vec<_> = all
        .filter_map(|of| {
            let address = host::address_of(&of)?;
            Some((of.interface_name, of.flags, address))
        })
        .collect();
    let is_outside = |flags: &InterfaceFlags| !flags.contains(InterfaceFlags::IFF_LOOPBACK);
    let has = |ip: &IpAddr| all.iter().any(|(_, flags, address)| address == ip && is_outside(flags));
    let mut wanted: Vec<IpAddr> = addresses.to_vec();
    if !addresses.iter().all(has) {
        wanted.extend(Host::look().map(|host| host.default_routes).unwrap_or_default());
    }
    let named = all.iter().filter(|(_, flags, address)| wanted.contains(address) && is_outside(flags));
    let names: BTreeSet<_> = named.map(|(name, ..)| name.clone()).collect();
    names.into_iter().map(Wanted::new).collect()
}

impl Wanted {
    fn new(name: String) -> Self {
        let text = fs::read_to_string(format!("/proc/net/vlan/{name}")).unwrap_or_default();
        match vlan(&text) {
            Some((vlan, below)) => Self { name, below: below.to_owned(), vlan: Some(vlan) },
            None => Self { below: name.clone(), name, vlan: None },
        }
    }
}

/// The number of a VLAN and the interface below it, as the kernel tells of it.
fn vlan(text: &str) -> Option<(u16, &str)> {
    let after = |key: &str| text.split_whitespace().skip_while(|word| *word != key).nth(1);
    Some((after("VID:")?.parse().ok()?, after("Device:")?))
}

/// Packets of a bond arrive at the interfaces that it is made of.
fn is_bond(interface: &str) -> bool {
    fs::exists(format!("/sys/class/net/{interface}/bonding")).unwrap_or(false)
}

/// Whether a driver sends what another one's program gives it: all that run programs, but for these.
fn takes_from_others(interface: &str) -> bool {
    !driver(interface).is_some_and(|driver| ["ixgbevf", "nfp", "fsl_dpa", "qede"].contains(&driver.as_str()))
}

/// How an interface would take the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prospect {
    /// Of the interface.
    pub name: String,
    /// Of its driver, if it has one.
    pub driver: Option<String>,
    /// The program that is on it now.
    pub program: Option<u32>,
}

impl Prospect {
    /// Whether its driver is known to run programs itself.
    #[must_use]
    pub fn is_native(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| NATIVE.contains(&driver.as_str()))
    }
}

/// Drivers of Linux that run programs themselves, some of them only in newer versions.
const NATIVE: [&str; 27] = [
    "atlantic",
    "bnxt_en",
    "dpaa2-eth",
    "ena",
    "enetc",
    "fec",
    "fsl_dpa",
    "gve",
    "hv_netvsc",
    "i40e",
    "ice",
    "igb",
    "igc",
    "ixgbe",
    "ixgbevf",
    "mana",
    "mlx4_en",
    "mlx5_core",
    "mvneta",
    "mvpp2",
    "nfp",
    "qede",
    "sfc",
    "stmmac",
    "veth",
    "virtio_net",
    "vmxnet3",
];

/// The interfaces that have these addresses, as they are now. Nothing is changed.
#[must_use]
pub fn prospects(addresses: &[IpAddr]) -> Vec<Prospect> {
    let mut paths = Paths::new();
    let mut look = |name: String| {
        let index = if_nametoindex(name.as_str()).unwrap_or(0);
        Prospect { driver: driver(&name), program: paths.program_on(index), name }
    };
    interfaces(addresses).into_iter().map(|wanted| look(wanted.below)).collect()
}

fn driver(interface: &str) -> Option<String> {
    let link = fs::read_link(format!("/sys/class/net/{interface}/device/driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn link_address(interface: &str) -> Option<[u8; 6]> {
    let text = fs::read_to_string(format!("/sys/class/net/{interface}/address")).ok()?;
    let bytes: Vec<_> = text.trim().split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::{Prospect, vlan};

    #[test]
    fn a_vlan_is_known_by_what_the_kernel_tells() {
        let told = "uplink  VID: 100\t REORDER_HDR: 1  dev->priv_flags: 81021\n\
                             total frames received            0\n\
                    Device: eth0\nINGRESS priority mappings: 0:0  1:0\n";
        assert_eq!(vlan(told), Some((100, "eth0")));
        assert_eq!(vlan(""), None);
    }

    #[test]
    fn a_driver_runs_the_program_or_is_not_known_to() {
        let with = |driver: Option<&str>| Prospect {
            name: "eth0".to_owned(),
            driver: driver.map(str::to_owned),
            program: None,
        };
        assert!(with(Some("virtio_net")).is_native());
        assert!(!with(Some("e1000e")).is_native() && !with(None).is_native());
    }
}
