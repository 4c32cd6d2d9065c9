//! Binding (RFC 8489 §12): what is your address, seen from here?

use crate::turn::{refusal::Refusal, reply::Success, server::Request};

/// Needs no credentials.
pub(in crate::turn) fn binding(request: &Request<'_>) -> Result<Success, Refusal> {
    super::understood(&request.message)?;
    Ok(Success::Bound { mapped: request.from.client })
}
