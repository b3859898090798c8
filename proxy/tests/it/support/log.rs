//! Parses the programs' logs: every line is a record, in one of two formats.

use std::collections::BTreeMap;

/// The fields of a record, with their values as text.
pub(crate) type Record = BTreeMap<String, String>;

/// The records of a text log. Panics on a line that is not logfmt.
pub(crate) fn text(output: &str) -> Vec<Record> {
    let read = |line| {
        let pairs = logfmt(line).unwrap_or_else(|| panic!("no logfmt: {line:?}"));
        let many = pairs.len();
        let record: Record = pairs.into_iter().collect();
        assert_eq!(record.len(), many, "a name stands twice: {line:?}");
        record
    };
    lines(output).map(read).inspect(has_the_usual).collect()
}

/// The records of a JSON log. Panics on a line that is not an object of plain values.
pub(crate) fn json(output: &str) -> Vec<Record> {
    let read = |line| {
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("no JSON ({error}): {line:?}"));
        let text = |value: serde_json::Value| match value {
            serde_json::Value::String(text) => text,
            serde_json::Value::Number(_) | serde_json::Value::Bool(_) => value.to_string(),
            nested => panic!("{nested} is no plain value: {line:?}"),
        };
        object.into_iter().map(|(name, value)| (name, text(value))).collect()
    };
    lines(output).map(read).inspect(has_the_usual).collect()
}

/// In either format.
pub(crate) fn read(format: &str, output: &str) -> Vec<Record> {
    if format == "json" { json(output) } else { text(output) }
}

/// Lines as a log collector sees them: only a line feed ends a line. The last line may be incomplete.
fn lines(output: &str) -> impl Iterator<Item = &str> {
    let whole = output.rfind('\n').map_or(0, |end| end + 1);
    output[..whole].split('\n').filter(|line| !line.is_empty())
}

fn has_the_usual(record: &Record) {
    for name in ["ts", "level", "target"] {
        assert!(record.contains_key(name), "{name} in {record:?}");
    }
}

/// The fields of a line of logfmt; `None` if it is malformed.
pub(crate) fn logfmt(line: &str) -> Option<Vec<(String, String)>> {
    let (mut pairs, mut rest) = (Vec::new(), line);
    while !rest.is_empty() {
        let (name, value) = rest.split_once('=')?;
        if name.is_empty() || name.contains([' ', '"']) {
            return None;
        }
        let end = if let Some(inside) = value.strip_prefix('"') {
            let quoted = inside.char_indices().scan(false, |escaped, (at, c)| {
                let was = std::mem::replace(escaped, c == '\\' && !*escaped);
                Some((at, c == '"' && !was))
            });
            1 + quoted.into_iter().find(|(_, end)| *end)?.0 + 1
        } else {
            let end = value.find(' ').unwrap_or(value.len());
            if value[..end].contains(['"', '=']) {
                return None;
            }
            end
        };
        let text = if value.starts_with('"') { serde_json::from_str(&value[..end]).ok()? } else { value[..end].to_owned() };
        pairs.push((name.to_owned(), text));
        rest = match &value[end..] {
            "" => "",
            rest => rest.strip_prefix(' ')?,
        };
    }
    Some(pairs)
}
