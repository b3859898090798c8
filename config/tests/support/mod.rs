//! What the tests of configurations share.

use castier_config::{Config, Loaded, Problems, load};
use std::io::Write;
use tempfile::NamedTempFile;

/// A file with this text.
pub(crate) fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

pub(crate) fn variables(env: &[(&str, &str)]) -> impl Iterator<Item = (String, String)> {
    env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
}

pub(crate) fn read<C: Config>(text: &str, env: &[(&str, &str)]) -> Result<Loaded<C>, Problems> {
    load(Some(file(text).path()), variables(env))
}
