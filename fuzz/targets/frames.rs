//! What agents say: whatever comes, the answer is a frame or a named refusal, and what is looked for in it is found or not.
#![no_main]

use halfway::{
    credentials::{signaled, token::AgentId},
    signaling::{
        message,
        peerjs::{self, Translated},
        registry::{Profile, Query},
    },
};
use libfuzzer_sys::fuzz_target;
use serde_json::value::RawValue;

fuzz_target!(|frame: &str| {
    let parsed = message::parse(frame);
    let object = frame.trim_start().starts_with('{');
    assert!(object || parsed.is_err(), "only objects are frames");
    if let Ok(peerjs::Said::Told(told)) = peerjs::parse(frame) {
        let routed = format!(r#"{{"type":"message","from":"a","payload":{}}}"#, told.body.get());
        let own = AgentId::parse("b").expect("an id");
        assert!(matches!(peerjs::translate(routed.as_bytes(), &own), Translated::Text(_)), "what is said is heard");
    }
    if let Ok(json) = serde_json::from_str::<&RawValue>(frame) {
        let _ = signaled::addresses(json);
        let everybody = Query::default();
        let profile = Profile::of(json);
        assert!(everybody.fits(profile.as_ref()));
        let query = Query::new(Some(frame), Some("a"), frame.get(..20));
        let _ = query.map(|query| query.fits(profile.as_ref()));
    }
});
