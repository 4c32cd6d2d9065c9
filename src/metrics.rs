//! Every number exposed, with its meaning.
