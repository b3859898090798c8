//! A configuration seen as a table of dotted keys.

use crate::{Config, value::masked};
use std::collections::BTreeMap;
use toml::{Table, Value};

/// The effective configuration as TOML, as `--print-config` shows it: every key of every section in force, secrets masked. Reads back to the same
/// configuration unless something was masked.
pub fn print<C: Config>(config: &C) -> String {
    let mut table = table(config);
    mask(&mut table);
    table.to_string()
}

/// The dotted keys of a program, in the order of its documentation.
pub fn keys<C: Config>() -> Vec<String> {
    leaves(&table(&C::complete())).into_iter().map(|(key, _)| key).collect()
}

/// The dotted keys whose values differ, in the order of the documentation: what a re-read configuration changes. A section that
/// came or went differs in all its keys.
pub fn changed<C: Config>(old: &C, new: &C) -> Vec<String> {
    let (old, new) = (table(old), table(new));
    let (before, after): (BTreeMap<_, _>, BTreeMap<_, _>) = (leaves(&old).into_iter().collect(), leaves(&new).into_iter().collect());
    keys::<C>().into_iter().filter(|key| before.get(key) != after.get(key)).collect()
}

/// The configuration as a table.
///
/// Invariant: every field of a [`Config`] has a TOML form, so this cannot fail; a test serialises each program's default.
pub(crate) fn table<C: Config>(config: &C) -> Table {
    Table::try_from(config).unwrap_or_default()
}

/// Dotted keys and values of everything that is not a section.
pub(crate) fn leaves(table: &Table) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(section) => found.extend(leaves(section).into_iter().map(|(below, value)| (format!("{key}.{below}"), value))),
            value => found.push((key.clone(), value)),
        }
    }
    found
}

fn mask(table: &mut Table) {
    for (_, value) in table.iter_mut() {
        match value {
            Value::String(text) => *text = masked(text),
            Value::Table(section) => mask(section),
            _ => {}
        }
    }
}
