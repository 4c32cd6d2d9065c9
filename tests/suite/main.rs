//! The hermetic tests, one binary: no root, no network beyond loopback.
