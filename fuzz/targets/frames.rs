//! Frames of agents: whatever comes, the answer is a frame or a named refusal.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let parsed = halfway::signaling::str::from_utf8(bytes).map(halfway::signaling::message::parse);
    let object = bytes.trim_ascii_start().starts_with(b"{");
    assert!(object || parsed.is_err(), "only objects are frames");
});
