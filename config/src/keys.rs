//! A configuration as a table of dotted keys: to print it, to list its keys, to compare two of them.

use crate::{Config, value::masked};
use toml::{Table, Value};

/// The effective configuration as TOML, as `--print-config` shows it: every key of every section in force, with secrets masked. Reads back
/// to the same configuration unless something was masked.
pub fn print<C: Config>(config: &C) -> String {
    let mut table = to_table(config);
    mask(&mut table);
    table.to_string()
}

/// The dotted keys of a program, in the order of its documentation.
pub fn keys<C: Config>() -> Vec<String> {
    leaves(&to_table(&C::complete())).into_iter().map(|(key, _)| key).collect()
}

/// The dotted keys whose values differ, in the order of the documentation: what a re-read configuration changes. If a section came or went,
/// all its keys differ.
pub fn changed<C: Config>(old: &C, new: &C) -> Vec<String> {
    let (old, new) = (to_table(old), to_table(new));
    keys::<C>().into_iter().filter(|key| get(&old, key) != get(&new, key)).collect()
}

/// The configuration as a table.
///
/// Invariant: every field of a [`Config`] has a TOML form, so this cannot fail. A test serialises each program's default.
pub(crate) fn to_table<C: Config>(config: &C) -> Table {
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

/// The value of a dotted key, if it is there.
fn get<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => get(table.get(section)?.as_table()?, rest),
    }
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
