//! `halfway check`: says every problem of a configuration.

use std::path::Path;

use super::{Failure, print};
use crate::config::Config;

pub(super) fn run(
    file: Option<&Path>,
    resolve: impl FnOnce() -> Result<Config, Failure>,
) -> Result<(), Failure> {
    resolve()?;
    match file {
        Some(file) => print(&format!("{}: no problems", file.display())),
        None => print("no configuration file: the defaults hold"),
    }
}
