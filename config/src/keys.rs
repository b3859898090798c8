//! A configuration as a table of dotted keys: to print it, to list its keys, to compare two of them.
//!
//! A section that can be there several times has its number in the key of a value: `route[1].path`. The key itself is `route.path`.

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
    leaves(&to_table(&C::complete())).into_iter().map(|(key, _)| unnumbered(&key)).collect()
}

/// The dotted keys whose values differ, in the order of the documentation: what a re-read configuration changes. If a section came or went,
/// all its keys differ. The sections of one name that can be there several times count as one key: `route`.
pub fn changed<C: Config>(old: &C, new: &C) -> Vec<String> {
    let (old, new) = (to_table(old), to_table(new));
    let mut keys: Vec<_> = leaves(&to_table(&C::complete())).into_iter().map(|(key, _)| list_of(&key).unwrap_or(&key).to_owned()).collect();
    keys.dedup();
    keys.retain(|key| get(&old, key) != get(&new, key));
    keys
}

/// The key without the number of its section: `route.path` for `route[1].path`.
pub(crate) fn unnumbered(key: &str) -> String {
    key.split('[').enumerate().map(|(i, part)| if i == 0 { part } else { part.split_once(']').map_or("", |(_, rest)| rest) }).collect()
}

/// The name of the sections of which this is a key, if they can be there several times: `route` for `route[1].path`.
pub(crate) fn list_of(key: &str) -> Option<&str> {
    key.split_once('[').map(|(list, _)| list)
}

/// The first part of a dotted key: `disk`, or `route` and 1 for `route[1].path`. And the rest of the key.
pub(crate) fn split_first(key: &str) -> (&str, Option<usize>, Option<&str>) {
    let (first, rest) = key.split_once('.').map_or((key, None), |(first, rest)| (first, Some(rest)));
    let numbered = first.strip_suffix(']').and_then(|first| first.split_once('['));
    match numbered.and_then(|(name, number)| Some((name, number.parse().ok()?))) {
        Some((name, number)) => (name, Some(number), rest),
        None => (first, None, rest),
    }
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
            Value::Table(section) => found.extend(below(key, section)),
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_table) => {
                let sections = items.iter().filter_map(Value::as_table).enumerate();
                found.extend(sections.flat_map(|(number, section)| below(&format!("{key}[{number}]"), section)));
            }
            value => found.push((key.clone(), value)),
        }
    }
    found
}

fn below<'t>(section: &str, table: &'t Table) -> Vec<(String, &'t Value)> {
    leaves(table).into_iter().map(|(key, value)| (format!("{section}.{key}"), value)).collect()
}

/// The value of a dotted key, if it is there.
fn get<'t>(table: &'t Table, key: &str) -> Option<&'t Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => get(table.get(section)?.as_table()?, rest),
    }
}

fn mask(table: &mut Table) {
    table.iter_mut().for_each(|(_, value)| mask_value(value));
}

fn mask_value(value: &mut Value) {
    match value {
        Value::String(text) => *text = masked(text),
        Value::Table(section) => mask(section),
        Value::Array(items) => items.iter_mut().for_each(mask_value),
        _ => {}
    }
}
