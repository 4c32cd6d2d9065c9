//! Drives `turn`: one shard per core.
