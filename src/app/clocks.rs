//! Notices when the clock of the wall is set: deadlines do not go by it, but what credentials and tokens say does.

use std::time::Duration;

use crate::clock::{self, Now};

/// How often both clocks are compared.
const LOOK: Duration = Duration::from_secs(5);
/// What is mended little by little goes unnoticed.
const STEP: Duration = Duration::from_secs(10);

/// Says so when it happens, until dropped.
pub(super) async fn watch() {
    let mut before = clock::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let now = clock::now();
        let (step, is_forward) = step(before, now);
        if step > STEP {
            let seconds = Duration::from_secs(step.as_secs_f64().round() as u64);
            let way = if is_forward { "forward" } else { "back" };
            tracing::warn!(
                "the clock of the wall was set {way} by {}: nothing that lives is touched, but tokens and credentials expire by it",
                humantime::format_duration(seconds)
            );
        }
        before = now;
    }
}

/// How much further one clock has gone than the other, and whether it is the wall's.
fn step(before: Now, now: Now) -> (Duration, bool) {
    let expected = before.wall + now.mono.saturating_duration_since(before.mono);
    now.wall.duration_since(expected).map_or_else(|back| (back.duration(), false), |forward| (forward, true))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::step;
    use crate::clock;

    #[test]
    fn a_step_is_what_one_clock_went_and_the_other_did_not() {
        let (before, hour) = (clock::now(), Duration::from_secs(3_600));
        let later = before + Duration::from_secs(5);
        assert_eq!(step(before, later).0, Duration::ZERO);
        assert_eq!(step(before, clock::Now { wall: later.wall + hour, ..later }), (hour, true));
        assert_eq!(step(before, clock::Now { wall: later.wall - hour, ..later }), (hour, false));
    }
}
