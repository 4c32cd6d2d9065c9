//! WebSocket frames: whatever comes, in whatever pieces, is heard alike, and nothing longer than allowed is kept.
#![no_main]

use std::ops::ControlFlow;

use halfway::http::websocket::framing::{Decoder, Violation};
use libfuzzer_sys::fuzz_target;

const LONGEST: usize = 1_000;

fuzz_target!(|input: (u8, &[u8])| {
    let (piece, bytes) = input;
    let (whole, how_it_ended) = hear(bytes, bytes.len());
    let (in_pieces, also) = hear(bytes, usize::from(piece));
    assert_eq!(whole, in_pieces);
    assert_eq!(how_it_ended, also);
    assert!(whole.iter().all(|said| said.len() < 16 * LONGEST));
});

/// What is heard, up to the first violation.
fn hear(bytes: &[u8], piece: usize) -> (Vec<String>, Option<Violation>) {
    let (mut decoder, mut heard) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(piece.max(1)) {
        let read = decoder.read(&mut piece.to_vec(), LONGEST, |said| {
            heard.push(format!("{said:?}"));
            ControlFlow::Continue(())
        });
        if let Err(violation) = read {
            return (heard, Some(violation));
        }
    }
    (heard, None)
}
