//! Every number exposed at `/metrics`, with its meaning (OpenMetrics text). No label ever holds a name that a client
//! chose.

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::turn::{
    counters::{Counters, Dropped, Traffic},
    refusal::CODES,
};

/// One label with a value of ours.
type Label = [(&'static str, String); 1];

/// The whole page.
#[must_use]
pub fn page(relay: &Counters) -> String {
    let mut numbers = Numbers(Registry::with_prefix("halfway"));
    numbers.relay(relay);
    let mut page = String::new();
    text::encode(&mut page, &numbers.0).expect("a String takes all that is written to it");
    page
}

struct Numbers(Registry);

impl Numbers {
    fn relay(&mut self, relay: &Counters) {
        self.now("allocations", "TURN allocations alive", relay.allocations);
        self.count("allocations_made", "TURN allocations ever made", relay.allocations_made);
        self.count("bindings", "STUN Binding requests answered", relay.bindings);
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
        let refusals = CODES.iter().map(ToString::to_string).zip(relay.refusals);
        self.counts("refusals", "STUN error responses, by code", "code", refusals);
        let drops = Dropped::ALL.iter().map(|why| why.name()).zip(relay.drops);
        self.counts("dropped_packets", "datagrams that went nowhere, by reason", "reason", drops);
    }

    fn now(&mut self, name: &str, meaning: &str, value: u64) {
        let gauge: Gauge = Gauge::default();
        gauge.set(value as i64);
        self.0.register(name, meaning, gauge);
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

#[cfg(test)]
mod tests {
    use super::page;
    use crate::turn::{
        counters::{Counters, Dropped, Traffic},
        refusal::Refusal,
    };

    #[test]
    fn every_number_is_on_the_page() {
        let mut relay = Counters {
            allocations: 11,
            allocations_made: 12,
            bindings: 13,
            to_peers: Traffic { packets: 14, bytes: 15 },
            to_clients: Traffic { packets: 16, bytes: 17 },
            ..Counters::default()
        };
        relay.refused(&Refusal::AllocationMismatch);
        relay.dropped(Dropped::NoChannel);
        let page = page(&relay);
        for line in [
            "halfway_allocations 11",
            "halfway_allocations_made_total 12",
            "halfway_bindings_total 13",
            "halfway_relayed_packets_total{direction=\"to_peer\"} 14",
            "halfway_relayed_bytes_total{direction=\"to_peer\"} 15",
            "halfway_relayed_packets_total{direction=\"to_client\"} 16",
            "halfway_relayed_bytes_total{direction=\"to_client\"} 17",
            "halfway_refusals_total{code=\"437\"} 1",
            "halfway_refusals_total{code=\"401\"} 0",
            "halfway_dropped_packets_total{reason=\"no_channel\"} 1",
        ] {
            assert!(page.lines().any(|got| got == line), "no line {line} in\n{page}");
        }
    }
}
