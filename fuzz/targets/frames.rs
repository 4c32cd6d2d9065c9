//! Frames of agents: whatever comes, the answer is a frame or a named refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|frame: &str| {
    let parsed = halfway::signaling::message::parse(frame);
    let object = frame.trim_start().starts_with('{');
    assert!(object || parsed.is_err(), "only objects are frames");
});
