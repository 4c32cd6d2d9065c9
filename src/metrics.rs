//! Every number exposed at `/metrics`, with its meaning (OpenMetrics text). No label ever holds a name that a client
//! chose.

use std::fmt;

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet, text},
    metrics::{MetricType, counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::{
    door, http,
    signaling::{hub, refusal},
    turn::{
        Transport,
        allocation::Why,
        counters::{Counters, Dropped, Elsewhere, PASSED, Traffic, Turns},
        refusal::CODES,
    },
};

/// One label with a value of ours.
type Label = [(&'static str, String); 1];

/// What the process as a whole is.
#[derive(Clone, Copy, Debug)]
pub struct Instance {
    /// Unix seconds.
    pub started: u64,
    /// Of the certificate that is presented, in Unix seconds.
    pub certificate_ends: i64,
    /// Nobody new is let in.
    pub draining: bool,
}

/// The whole page, in OpenMetrics.
#[must_use]
pub fn page(instance: &Instance, relay: &Counters, door: &door::Counters, http: &http::Counters) -> String {
    let mut numbers = Numbers(Registry::with_prefix("halfway"));
    numbers.instance(instance);
    numbers.relay(relay);
    numbers.door(door);
    numbers.http(http);
    numbers.signaling(&http.signaling);
    numbers.nodes(&http.nodes);
    let mut page = String::new();
    text::encode(&mut page, &numbers.0).expect("a String takes all that is written to it");
    page
}

/// The same in the older format of Prometheus, which has the names of counters whole, and no end.
#[must_use]
pub fn in_prometheus_text(page: &str) -> String {
    let counters: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let line = |line: &str| {
        let described =
            ["# HELP ", "# TYPE "].into_iter().find_map(|kind| Some((kind, line.strip_prefix(kind)?)));
        match described.and_then(|(kind, rest)| Some((kind, rest.split_once(' ')?))) {
            Some((kind, (name, rest))) if counters.contains(&name) => format!("{kind}{name}_total {rest}\n"),
            _ => format!("{line}\n"),
        }
    };
    page.lines().filter(|text| *text != "# EOF").map(line).collect()
}

struct Numbers(Registry);

impl Numbers {
    fn instance(&mut self, instance: &Instance) {
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        self.0.register("build", "this version", Info::new(version));
        self.now("start_time_seconds", "when this process has started, in Unix seconds", instance.started);
        let ends = u64::try_from(instance.certificate_ends).unwrap_or(0);
        let meaning = "the end of the certificate that is presented, in Unix seconds";
        self.now("certificate_expiry_timestamp_seconds", meaning, ends);
        self.now("draining", "1 when nobody new is let in", instance.draining.into());
    }

    fn relay(&mut self, relay: &Counters) {
        let streams = relay.allocations_on_streams;
        let allocations =
            [(Transport::Udp.name(), relay.allocations - streams), (Transport::Tcp.name(), streams)];
        self.nows(
            "allocations",
            "TURN allocations alive, by the client's transport",
            "transport",
            allocations,
        );
        let elsewhere = "clients whose allocations the process before this one has, during an upgrade";
        self.now("clients_handed_over", elsewhere, relay.handed_over);
        let ports = [("free", relay.ports.free), ("bound", relay.ports.bound), ("live", relay.ports.live)];
        self.nows("relay_ports", "ports of relayed addresses; bound: ahead of demand", "state", ports);
        self.now("deadlines", "allocations' deadlines that wait for their time", relay.deadlines);
        self.count("allocations_made", "TURN allocations ever made", relay.allocations_made);
        let ended = Why::ALL.iter().map(|why| why.name()).zip(relay.ended);
        self.counts("allocations_ended", "TURN allocations that have ended, by reason", "reason", ended);
        let waiting = "bytes for relay clients on TCP and TLS that the kernel has not taken yet";
        self.now("relay_stream_waiting_bytes", waiting, relay.waiting);
        let turns = "time from a shard's wake-up to the last packet it sent";
        self.0.register("shard_turn_seconds", turns, Durations(relay.turns));
        self.count("bindings", "STUN Binding requests answered", relay.bindings);
        let streams = ["tcp", "tls"].into_iter().zip(relay.streams);
        self.nows("relay_streams", "relay clients' connections, by transport", "transport", streams);
        let directions = |number: fn(&Traffic) -> u64| {
            [("to_peer", number(&relay.to_peers)), ("to_client", number(&relay.to_clients))]
        };
        self.counts("relayed_bytes", "payload relayed", "direction", directions(|traffic| traffic.bytes));
        self.counts(
            "relayed_packets",
            "datagrams relayed",
            "direction",
            directions(|traffic| traffic.packets),
        );
        self.kernel(&relay.elsewhere);
        let refusals = CODES.iter().map(ToString::to_string).zip(relay.refusals);
        self.counts("refusals", "STUN error responses, by code", "code", refusals);
        let drops = Dropped::ALL.iter().map(|why| why.name()).zip(relay.drops);
        self.counts("dropped_packets", "datagrams that went nowhere, by reason", "reason", drops);
    }

    /// `turn.xdp`; zeroes where it is off.
    fn kernel(&mut self, kernel: &Elsewhere) {
        let interfaces = ["driver", "generic"].into_iter().zip(kernel.interfaces);
        self.nows(
            "xdp_interfaces",
            "interfaces where the kernel relays channels, by mode",
            "mode",
            interfaces,
        );
        self.now("xdp_channels", "channels that the kernel knows", kernel.channels);
        let packets = [("to_peer", kernel.to_peers.packets), ("to_client", kernel.to_clients.packets)];
        let meaning = "datagrams relayed by the kernel, which relayed_packets has, too";
        self.counts("xdp_relayed_packets", meaning, "direction", packets);
        let meaning = "packets of channels that the kernel left to user space, by reason";
        self.counts("xdp_passed_packets", meaning, "reason", PASSED.into_iter().zip(kernel.passed));
    }

    fn http(&mut self, http: &http::Counters) {
        self.count("http_requests", "HTTP requests", http.requests);
        self.count("http_problems", "HTTP requests answered with an error", http.problems);
    }

    fn door(&mut self, door: &door::Counters) {
        self.now("connections", "open TCP connections, whatever they are for", door.connections as u64);
        self.count(
            "connections_refused",
            "TCP connections closed at once: too many, or too fast",
            door.refused,
        );
        self.count("handshakes", "TLS handshakes that succeeded", door.handshakes);
        let failed = "TCP connections that spoke nothing we know, or took too long to";
        self.count("handshakes_failed", failed, door.handshakes_failed);
    }

    fn signaling(&mut self, hub: &hub::Counters) {
        self.now("agents", "agents with a session, connected or expected back", hub.agents as u64);
        self.now("agent_connections", "agents' connections", hub.connections as u64);
        self.now("rooms", "rooms with an agent in them", hub.rooms as u64);
        self.now("held_bytes", "bytes of frames waiting or kept for replay", hub.held_bytes as u64);
        let frames = [("in", hub.frames_in), ("out", hub.frames_out)];
        self.counts("frames", "signaling frames, from agents and to them", "direction", frames);
        self.count("frames_delivered", "routed frames put into a receiver's window", hub.delivered);
        let errors = refusal::CODES.iter().zip(hub.errors);
        self.counts("frame_errors", "error frames, by code", "code", errors);
    }

    /// `[cluster]`; zeroes where there is none.
    fn nodes(&mut self, nodes: &hub::Numbers) {
        self.now("cluster_up", "1 when other nodes can be reached through cluster.nats", nodes.is_up.into());
        self.now("cluster_nodes", "other nodes that live", nodes.nodes as u64);
        self.now(
            "cluster_agents",
            "agents of other nodes in rooms with agents of this one",
            nodes.away as u64,
        );
        let frames = [("in", nodes.frames_in), ("out", nodes.frames_out)];
        self.counts("cluster_frames", "routed frames, from other nodes and to them", "direction", frames);
        let meaning = "routed frames of which another node did not say in time whether they were delivered";
        self.count("cluster_unanswered", meaning, nodes.unanswered);
        let sessions = [("in", nodes.moved_in), ("out", nodes.moved_out)];
        self.counts("cluster_sessions", "sessions that went on at another node", "direction", sessions);
    }

    fn now(&mut self, name: &str, meaning: &str, value: u64) {
        let gauge: Gauge = Gauge::default();
        gauge.set(value as i64);
        self.0.register(name, meaning, gauge);
    }

    fn nows(
        &mut self,
        name: &str,
        meaning: &str,
        label: &'static str,
        values: impl IntoIterator<Item = (&'static str, u64)>,
    ) {
        let family = Family::<Label, Gauge>::default();
        for (value, number) in values {
            family.get_or_create(&[(label, value.to_string())]).set(number as i64);
        }
        self.0.register(name, meaning, family);
    }

    fn count(&mut self, name: &str, meaning: &str, value: u64) {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        self.0.register(name, meaning, counter);
    }

    fn counts(
        &mut self,
        name: &str,
        meaning: &str,
        label: &'static str,
        values: impl IntoIterator<Item = (impl ToString, u64)>,
    ) {
        let family = Family::<Label, Counter>::default();
        for (value, count) in values {
            family.get_or_create(&[(label, value.to_string())]).inc_by(count);
        }
        self.0.register(name, meaning, family);
    }
}

/// A histogram of which the counts are known.
#[derive(Debug)]
struct Durations(Turns);

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let bounds = Turns::BOUNDS.map(|micros| micros as f64 / 1e6).into_iter().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(self.0.counts).collect();
        let count = self.0.counts.iter().sum();
        encoder.encode_histogram::<NoLabelSet>(self.0.micros as f64 / 1e6, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[cfg(test)]
mod tests {
    use super::{Instance, in_prometheus_text, page};
    use crate::turn::{
        counters::{Counters, Dropped, PortCounts, Traffic},
        refusal::Refusal,
    };
    use crate::{door, http, signaling::hub};

    #[test]
    fn every_number_is_on_the_page() {
        let mut relay = Counters {
            allocations: 11,
            allocations_on_streams: 4,
            handed_over: 38,
            ports: PortCounts { free: 34, bound: 35, live: 36 },
            deadlines: 37,
            ended: [0, 41, 0, 0, 0],
            waiting: 42,
            allocations_made: 12,
            streams: [32, 33],
            bindings: 13,
            to_peers: Traffic { packets: 14, bytes: 15 },
            to_clients: Traffic { packets: 16, bytes: 17 },
            ..Counters::default()
        };
        relay.turns.add(60);
        relay.turns.add(1_000_000);
        relay.refused(&Refusal::AllocationMismatch);
        relay.dropped(Dropped::NoChannel, 1);
        let door = door::Counters { connections: 18, refused: 21, handshakes: 31, handshakes_failed: 22 };
        let mut http = http::Counters { requests: 19, problems: 20, ..Default::default() };
        http.signaling = hub::Counters {
            connections: 23,
            agents: 24,
            rooms: 25,
            held_bytes: 26,
            frames_in: 27,
            frames_out: 28,
            delivered: 29,
            errors: Default::default(),
        };
        http.signaling.errors[0] = 30;
        let instance = Instance { started: 39, certificate_ends: 40, draining: true };
        let page = page(&instance, &relay, &door, &http);
        for line in [
            concat!("halfway_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "halfway_start_time_seconds 39",
            "halfway_certificate_expiry_timestamp_seconds 40",
            "halfway_draining 1",
            "halfway_allocations_ended_total{reason=\"expired\"} 41",
            "halfway_relay_stream_waiting_bytes 42",
            "halfway_shard_turn_seconds_bucket{le=\"0.0001\"} 1",
            "halfway_shard_turn_seconds_bucket{le=\"+Inf\"} 2",
            "halfway_shard_turn_seconds_count 2",
            "halfway_shard_turn_seconds_sum 1.00006",
            "halfway_allocations{transport=\"udp\"} 7",
            "halfway_allocations{transport=\"tcp\"} 4",
            "halfway_clients_handed_over 38",
            "halfway_relay_ports{state=\"free\"} 34",
            "halfway_relay_ports{state=\"bound\"} 35",
            "halfway_relay_ports{state=\"live\"} 36",
            "halfway_deadlines 37",
            "halfway_allocations_made_total 12",
            "halfway_bindings_total 13",
            "halfway_relayed_packets_total{direction=\"to_peer\"} 14",
            "halfway_relayed_bytes_total{direction=\"to_peer\"} 15",
            "halfway_relayed_packets_total{direction=\"to_client\"} 16",
            "halfway_relayed_bytes_total{direction=\"to_client\"} 17",
            "halfway_refusals_total{code=\"437\"} 1",
            "halfway_refusals_total{code=\"401\"} 0",
            "halfway_dropped_packets_total{reason=\"no_channel\"} 1",
            "halfway_relay_streams{transport=\"tcp\"} 32",
            "halfway_relay_streams{transport=\"tls\"} 33",
            "halfway_connections 18",
            "halfway_http_requests_total 19",
            "halfway_http_problems_total 20",
            "halfway_connections_refused_total 21",
            "halfway_handshakes_total 31",
            "halfway_handshakes_failed_total 22",
            "halfway_agent_connections 23",
            "halfway_agents 24",
            "halfway_rooms 25",
            "halfway_held_bytes 26",
            "halfway_frames_total{direction=\"in\"} 27",
            "halfway_frames_total{direction=\"out\"} 28",
            "halfway_frames_delivered_total 29",
            "halfway_frame_errors_total{code=\"unauthorized\"} 30",
        ] {
            assert!(page.lines().any(|got| got == line), "no line {line} in\n{page}");
        }
        let plain = in_prometheus_text(&page);
        for line in
            ["# TYPE halfway_bindings_total counter", "# TYPE halfway_draining gauge", "halfway_draining 1"]
        {
            assert!(plain.lines().any(|got| got == line), "no line {line} in\n{plain}");
        }
        assert!(!plain.contains("# EOF") && !plain.contains("# TYPE halfway_bindings counter"));
    }
}
