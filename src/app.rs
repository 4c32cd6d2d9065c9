//! Builds and joins all parts; the one place that knows everybody.
