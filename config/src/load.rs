//! Reads a configuration: the file, over that the environment, then the types, then the checks. Each step notes what is wrong and goes on, so
//! that one run names every problem.

use crate::{
    Log, Problems,
    file::read_text,
    keys::{keys, leaves, list_of, split_first, to_table, unnumbered},
    problems::SetBy,
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};
use toml::{
    Table, Value,
    de::{DeTable, DeValue},
};

/// The configuration of one program. Its `Default` has the documented default of every key.
pub trait Config: Clone + Default + PartialEq + Serialize + DeserializeOwned {
    /// The default with every optional section: it has all keys, and shows the type of each.
    fn complete() -> Self {
        Self::default()
    }

    /// The lists of sections of which one may be written as a section, without a number: `[events]` for `[[events]]`.
    fn one_or_many() -> &'static [&'static str] {
        &[]
    }

    /// The section `[log]`.
    fn log(&self) -> &Log;

    /// Notes every value that has the right type and is wrong all the same.
    fn check(&self, problems: &mut Problems);
}

/// A checked configuration, and which keys the operator set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded<C> {
    /// The effective configuration.
    pub config: C,
    /// What is not wrong, and what an operator should know all the same: one line each, like a problem.
    pub notes: Vec<String>,
    /// The dotted keys that the file or the environment set.
    explicit: BTreeSet<String>,
}

impl<C> Loaded<C> {
    /// Whether the file or the environment set this dotted key (`route[1].path`, for a section that can be there several times), even to its
    /// default.
    pub fn is_set(&self, key: &str) -> bool {
        self.explicit.contains(key)
    }
}

/// The environment for [`load`]: the `CASTIER_` variables. Text that is not Unicode causes no panic.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
        .filter(|(name, _)| name.starts_with(PREFIX))
}

/// Reads a configuration: the defaults, over them the file, over that the environment. Of two pairs with one name the later one counts. An
/// empty variable counts as not set.
///
/// # Errors
/// [`Problems`]: everything that is wrong with the configuration.
pub fn load<C: Config>(file: Option<&Path>, env: impl Iterator<Item = (String, String)>) -> Result<Loaded<C>, Problems> {
    load_with(file, env, |_, _| {})
}

/// The same for a configuration of another machine: does not check that the files, directories and secrets that it names exist.
///
/// # Errors
/// As [`load`].
pub fn load_offline<C: Config>(file: Option<&Path>, env: impl Iterator<Item = (String, String)>) -> Result<Loaded<C>, Problems> {
    load_offline_with(file, env, |_, _| {})
}

/// As [`load`], with checks that this crate cannot make itself. `check` adds problems and notes, each to its dotted key: [`Problems::add`]
/// and [`Problems::note`]. It sees the configuration even if that has problems. A problem of a key that has one already does not count.
///
/// # Errors
/// As [`load`].
pub fn load_with<C: Config>(
    file: Option<&Path>,
    env: impl Iterator<Item = (String, String)>,
    check: impl FnOnce(&C, &mut Problems),
) -> Result<Loaded<C>, Problems> {
    load_noting(Problems::default(), file, env, check)
}

/// As [`load_offline`], with the checks of [`load_with`].
///
/// # Errors
/// As [`load`].
pub fn load_offline_with<C: Config>(
    file: Option<&Path>,
    env: impl Iterator<Item = (String, String)>,
    check: impl FnOnce(&C, &mut Problems),
) -> Result<Loaded<C>, Problems> {
    load_noting(Problems::offline(), file, env, check)
}

fn load_noting<C: Config>(
    mut problems: Problems,
    file: Option<&Path>,
    env: impl Iterator<Item = (String, String)>,
    check: impl FnOnce(&C, &mut Problems),
) -> Result<Loaded<C>, Problems> {
    let (mut table, mut lines) = file.map(|file| parse(file, &mut problems)).unwrap_or_default();
    let file_is_sound = problems.is_empty();
    let mut single: Vec<_> = C::one_or_many().iter().filter(|list| make_list(&mut table, &mut lines, list)).collect();
    let variables = merge::<C>(&mut table, env.filter(|(_, text)| !text.is_empty()), &mut problems);
    let by_variable = |list: &str| variables.iter().any(|(key, name)| list_of(key) == Some(list) && !name.contains("__0__"));
    single.extend(C::one_or_many().iter().filter(|list| by_variable(list)));
    let known: BTreeSet<_> = keys::<C>().into_iter().collect();
    let explicit: BTreeSet<_> = leaves(&table).into_iter().map(|(key, _)| key).filter(|key| known.contains(&unnumbered(key))).collect();
    let config = read::<C>(table, &mut problems);
    if let Some(config) = &config {
        problems.set_format(config.log().format);
    }
    // A file that could not be parsed leaves defaults in its stead, and comparing with those would report false problems.
    if let Some(config) = config.as_ref().filter(|_| file_is_sound) {
        problems.set_explicit(explicit.clone());
        config.check(&mut problems);
        let mut more = Problems::default();
        check(config, &mut more);
        problems.add_new(more);
    }
    problems.say_who_set(|key| match (variables.get(key), file, line_of(&lines, key)) {
        (Some(variable), _, _) => SetBy::Variable(variable.clone()),
        (None, Some(file), Some(line)) => SetBy::File(format!("{}:{line}", file.display())),
        _ => SetBy::Unknown,
    });
    for list in single {
        problems.name_as_single(list);
    }
    match config {
        Some(config) if problems.is_empty() => Ok(Loaded { config, notes: problems.notes(), explicit }),
        _ => Err(problems),
    }
}

/// The line of each dotted key and section of a file.
type Lines = BTreeMap<String, usize>;

/// The line of a key. For a missing key that of its section.
fn line_of(lines: &Lines, key: &str) -> Option<usize> {
    std::iter::successors(Some(key), |key| key.rsplit_once('.').map(|(section, _)| section)).find_map(|key| lines.get(key).copied())
}

fn parse(file: &Path, problems: &mut Problems) -> (Table, Lines) {
    let name = file.display();
    let text = match read_text(file) {
        Ok(text) => text,
        Err(error) => {
            problems.add(name.to_string(), format!("cannot be read ({error}); name a TOML file that this user may read"));
            return Default::default();
        }
    };
    let line_at = |at: usize| text.get(..at).unwrap_or_default().matches('\n').count() + 1;
    let mut lines = Lines::new();
    if let Ok(table) = DeTable::parse(&text) {
        note_lines(table.get_ref(), "", &line_at, &mut lines);
    }
    let table = text.parse().unwrap_or_else(|error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start);
        let column = text.get(..at).unwrap_or_default().chars().rev().take_while(|c| *c != '\n').count() + 1;
        // The message alone: the full text would quote the line, and a secret in it.
        problems.add(format!("{name}:{}:{column}", line_at(at)), error.message());
        Table::new()
    });
    (table, lines)
}

fn note_lines(table: &DeTable<'_>, section: &str, line_at: &impl Fn(usize) -> usize, lines: &mut Lines) {
    for (name, value) in table {
        let key = if section.is_empty() { name.get_ref().to_string() } else { format!("{section}.{}", name.get_ref()) };
        match value.get_ref() {
            DeValue::Table(below) => note_lines(below, &key, line_at, lines),
            DeValue::Array(items) => {
                for (number, item) in items.iter().enumerate() {
                    let DeValue::Table(below) = item.get_ref() else { continue };
                    let section = format!("{key}[{number}]");
                    note_lines(below, &section, line_at, lines);
                    lines.insert(section, line_at(item.span().start));
                }
            }
            _ => {}
        }
        lines.insert(key, line_at(name.span().start));
    }
}

/// Makes a list of one of a section that may be written without a number. Returns whether it was written so.
fn make_list(table: &mut Table, lines: &mut Lines, list: &str) -> bool {
    let Some(section) = table.get_mut(list).filter(|value| value.is_table()) else { return false };
    *section = Value::Array(vec![section.clone()]);
    let own =
        |key: &str| key.strip_prefix(list).filter(|rest| rest.is_empty() || rest.starts_with('.')).map(|rest| format!("{list}[0]{rest}"));
    let more: Vec<_> = lines.iter().filter_map(|(key, line)| Some((own(key)?, *line))).collect();
    lines.extend(more);
    true
}

const PREFIX: &str = "CASTIER_";

/// The variable of a key: `CASTIER_MEMORY__CAPACITY` for `memory.capacity`, `CASTIER_ROUTE__1__PATH` for `route[1].path`.
fn variable_name(key: &str) -> String {
    PREFIX.to_owned() + &key.replace(['.', '['], "__").replace(']', "").to_uppercase()
}

/// The variable with 0 in place of the number of a section, as the known names have it; and that number.
fn numbered(name: &str) -> (String, usize) {
    let mut number = 0;
    let parts = name.split("__").map(|part| match part.parse::<usize>() {
        // "007" and "+7" are other names.
        Ok(found) if found.to_string() == part => {
            number = found;
            "0"
        }
        _ => part,
    });
    let name = parts.collect::<Vec<_>>().join("__");
    (name, number)
}

/// The other way round.
fn with_number(name: &str, number: usize) -> String {
    name.replacen("__0__", &format!("__{number}__"), 1)
}

/// Puts the environment's values into the table, each with the type of its key's default. Returns the variable of each key that it set.
fn merge<C: Config>(table: &mut Table, env: impl Iterator<Item = (String, String)>, problems: &mut Problems) -> BTreeMap<String, String> {
    let defaults = to_table(&C::complete());
    let known: BTreeMap<_, _> = leaves(&defaults).into_iter().map(|(key, value)| (variable_name(&key), (key, value))).collect();
    let names = || known.keys().map(String::as_str);
    let is_of = |name: &str, list: &str| name.starts_with(&format!("{}__0__", variable_name(list)));
    let may_be_short = |name: &&str| C::one_or_many().iter().any(|list| is_of(name, list));
    let short: Vec<_> = names().filter(may_be_short).map(|name| name.replacen("__0__", "__", 1)).collect();
    let mut variables = BTreeMap::new();
    let mut env: Vec<_> = env.filter(|(name, _)| name.starts_with(PREFIX)).map(|(name, text)| (numbered(&name), name, text)).collect();
    // A new section stands behind those that are there, so the one with the lower number comes first. Of two pairs with one name the later one
    // still is the later one.
    env.sort_by_key(|((_, number), _, _)| *number);
    for ((like, number), name, text) in env {
        // `CASTIER_EVENTS__URL` is that of the first section.
        let first =
            |list: &&str| like.strip_prefix(&variable_name(list))?.strip_prefix("__").map(|rest| variable_name(list) + "__0__" + rest);
        let first = C::one_or_many().iter().find_map(first).filter(|first| known.contains_key(first));
        let like = first.unwrap_or(like);
        if let Some((key, default)) = known.get(&like) {
            let key = key.replacen("[0]", &format!("[{number}]"), 1);
            variables.insert(key.clone(), name);
            match typed(&text, default) {
                Ok(value) => {
                    if let Err(next) = insert(table, &key, value) {
                        let meant = with_number(&like, next);
                        problems.add(key, format!("is set, and the next section has the number {next}; write {meant}, without a gap"));
                    }
                }
                Err(wanted) => problems.add(key, format!("{text:?} is not {wanted}")),
            }
        } else if let Some(without) = names().find(|known| known.replacen("__0__", "__", 1) == name) {
            problems.add(name, unknown("variable", Some(without)));
        } else if name.contains("__") {
            let meant = suggestion(&like, names().chain(short.iter().map(String::as_str)), "__").map(|meant| with_number(meant, number));
            problems.add(name, unknown("variable", meant.as_deref()));
        } else if !is_of_kubernetes(&name)
            && let Some(meant) = resembling(&name, names())
        {
            // Any other variable with this prefix belongs to another program.
            problems.add(name, unknown("variable", Some(meant)));
        }
    }
    variables
}

/// Kubernetes gives every container such variables for a service named `castier` or `castier-…`: `CASTIER_PORT`,
/// `CASTIER_SERVICE_HOST`, `CASTIER_SERVICE_PORT_HTTP`, `CASTIER_PORT_8080_TCP_ADDR`.
fn is_of_kubernetes(name: &str) -> bool {
    let protocol = |rest: &str| ["_TCP", "_UDP", "_SCTP"].iter().any(|protocol| rest.starts_with(protocol));
    let numbered =
        |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit()) && protocol(rest.trim_start_matches(|c: char| c.is_ascii_digit()));
    name.ends_with("_PORT")
        || name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.split("_PORT_").skip(1).any(numbered)
}

/// The variable that a name without `__` was probably meant for: it differs by underscores and at most two typing errors.
fn resembling<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |candidate: &str| strsim::damerau_levenshtein(name, &candidate.replace("__", "_"));
    let (slips, meant) = known.map(|candidate| (distance(candidate), candidate)).min_by_key(|(slips, _)| *slips)?;
    (slips <= 2 && name.len() > PREFIX.len() + 4).then_some(meant)
}

fn typed(text: &str, default: &Value) -> Result<Value, &'static str> {
    match default {
        Value::Boolean(_) => text.parse().map(Value::Boolean).map_err(|_| "true or false"),
        Value::Integer(_) => text.parse().map(Value::Integer).map_err(|_| "a whole number"),
        Value::Float(_) => text.parse().map(Value::Float).map_err(|_| "a number"),
        Value::Array(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::Array(items.map(|item| Value::String(item.to_owned())).collect()))
        }
        Value::String(_) | Value::Datetime(_) | Value::Table(_) => Ok(Value::String(text.to_owned())),
    }
}

/// Sets the value of a dotted key, and makes the sections that are missing.
///
/// # Errors
/// The number of sections there, if the key is that of a section behind the next one.
fn insert(table: &mut Table, key: &str, value: Value) -> Result<(), usize> {
    // If the file has a value where a section belongs, reading the types reports that.
    match split_first(key) {
        (name, None, None) => {
            table.insert(name.to_owned(), value);
        }
        (name, None, Some(rest)) => {
            if let Value::Table(section) = table.entry(name).or_insert_with(|| Value::Table(Table::new())) {
                return insert(section, rest, value);
            }
        }
        (name, Some(number), rest) => {
            let Value::Array(sections) = table.entry(name).or_insert_with(|| Value::Array(Vec::new())) else { return Ok(()) };
            if number > sections.len() {
                return Err(sections.len());
            }
            if number == sections.len() {
                sections.push(Value::Table(Table::new()));
            }
            if let (Some(Value::Table(section)), Some(rest)) = (sections.get_mut(number), rest) {
                return insert(section, rest, value);
            }
        }
    }
    Ok(())
}

/// Reads the table into the struct. Notes a value of the wrong type, takes it out, and tries again until the rest can be read.
fn read<C: Config>(mut table: Table, problems: &mut Problems) -> Option<C> {
    let complete = to_table(&C::complete());
    let lists: BTreeSet<_> = leaves(&complete).into_iter().filter_map(|(key, _)| list_of(&key).map(str::to_owned)).collect();
    loop {
        let mut unknown_keys = Vec::new();
        let mut track = serde_path_to_error::Track::new();
        let tracked = serde_path_to_error::Deserializer::new(table.clone(), &mut track);
        match serde_ignored::deserialize(tracked, |path| unknown_keys.push(dotted(&path))) {
            Ok(config) => {
                note_unknown::<C>(&unknown_keys, problems);
                return Some(config);
            }
            Err(error) => {
                let error: toml::de::Error = error;
                let key = without_item(&track.path().to_string()).to_owned();
                let section = if lists.contains(&key) { format!("[[{key}]]") } else { format!("[{key}]") };
                problems.add(key.clone(), plain(error.message(), &section));
                // Each round takes one key away, so the loop ends.
                if !remove(&mut table, &key) {
                    return None;
                }
            }
        }
    }
}

/// The key of a list, for an item of it: the message quotes the item.
fn without_item(path: &str) -> &str {
    path.strip_suffix(']').and_then(|path| path.rsplit_once('[')).map_or(path, |(list, _)| without_item(list))
}

/// The dotted key of a path.
fn dotted(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path::{Map, NewtypeStruct, NewtypeVariant, Root, Seq, Some};
    match path {
        Root => String::new(),
        Some { parent } | NewtypeStruct { parent } | NewtypeVariant { parent } => dotted(parent),
        Seq { parent, index } => format!("{}[{index}]", dotted(parent)),
        Map { parent, key } => match dotted(parent).as_str() {
            "" => key.clone(),
            section => format!("{section}.{key}"),
        },
    }
}

fn remove(table: &mut Table, key: &str) -> bool {
    match split_first(key) {
        (name, None, None) => table.remove(name).is_some(),
        (name, None, Some(rest)) => table.get_mut(name).and_then(Value::as_table_mut).is_some_and(|section| remove(section, rest)),
        (name, Some(number), rest) => {
            let section = table.get_mut(name).and_then(|sections| sections.get_mut(number)).and_then(Value::as_table_mut);
            section.zip(rest).is_some_and(|(section, rest)| remove(section, rest))
        }
    }
}

/// Puts serde's message into words for a reader who does not know the program's types.
fn plain(message: &str, section: &str) -> String {
    let is_list = section.starts_with("[[");
    match message.split_once("expected struct ") {
        Some((found, _)) => format!("{found}expected a section; write its keys below {section}"),
        None if is_list && message.starts_with("invalid type: map, expected a sequence") => {
            format!("is one section, and there can be several; write {section}, in two brackets")
        }
        None if is_list && message.contains("expected a sequence") => {
            message.replace("expected a sequence", &format!("expected sections; write the keys of each below {section}"))
        }
        None => ["usize", "u32", "u64"]
            .iter()
            .fold(message.to_owned(), |text, ty| {
                text.replace(&format!("expected {ty}"), "expected a whole number, 0 or more, that is not too large")
            })
            .replace("expected f64", "expected a number")
            .replace("expected a sequence", "expected a list in brackets"),
    }
}

fn note_unknown<C: Config>(unknown_keys: &[String], problems: &mut Problems) {
    let keys = keys::<C>();
    let sections: BTreeSet<_> = keys.iter().filter_map(|key| key.split_once('.')).map(|(section, _)| section).collect();
    for key in unknown_keys {
        let names = keys.iter().map(String::as_str).chain(sections.iter().copied());
        let meant = suggestion(&unnumbered(key), names, ".").map(|meant| like_numbered(meant, key));
        problems.add(key, unknown("key", meant.as_deref()));
    }
}

/// A known key with the number of the section that `key` is in: `route[1].path` for `route.path`, beside `route[1].pth`.
fn like_numbered(known: &str, key: &str) -> String {
    let section = key.split_once(']').map(|(section, _)| format!("{section}]"));
    let list = list_of(key).zip(section);
    let numbered =
        list.and_then(|(list, section)| Some(format!("{section}{}", known.strip_prefix(list).filter(|rest| rest.starts_with('.'))?)));
    numbered.unwrap_or_else(|| known.to_owned())
}

fn unknown(kind: &str, suggestion: Option<&str>) -> String {
    match suggestion {
        Some(name) => format!("unknown {kind}; did you mean {name}?"),
        None => format!("unknown {kind}; --print-config shows every key there is"),
    }
}

/// The known name that was probably meant: one with a similar spelling, or one in another section with a similar last part.
fn suggestion<'a>(name: &str, known: impl Iterator<Item = &'a str>, separator: &str) -> Option<&'a str> {
    fn split<'n>(name: &'n str, separator: &str) -> (&'n str, &'n str) {
        name.rsplit_once(separator).unwrap_or(("", name))
    }
    let (section, wanted) = split(name, separator);
    let distance = |candidate: &str| {
        let (candidates_section, last) = split(candidate, separator);
        let elsewhere = strsim::damerau_levenshtein(section, candidates_section);
        // A wrong section counts as at most two typing errors. Among equals the most similar section counts.
        let slips = strsim::damerau_levenshtein(wanted, last) + elsewhere.min(2);
        (slips, if section.is_empty() { 0 } else { elsewhere })
    };
    let ((slips, _), candidate) = known.map(|candidate| (distance(candidate), candidate)).min_by_key(|(distance, _)| *distance)?;
    (slips <= 1 + wanted.len() / 4).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    /// Has types of keys at its top that the two programs have only in their sections.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Sample {
        share: f64,
        count: u32,
        ring: Ring,
        log: Log,
    }

    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Ring {
        peers: Vec<String>,
    }

    impl Config for Sample {
        fn log(&self) -> &Log {
            &self.log
        }

        fn check(&self, _: &mut Problems) {}
    }

    fn from_env(pairs: &[(&str, &str)]) -> Result<Sample, String> {
        let env = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        load::<Sample>(None, env).map(|loaded| loaded.config).map_err(|problems| problems.to_string())
    }

    #[test]
    fn variables_take_the_type_of_their_default() {
        let sample = from_env(&[("CASTIER_SHARE", "0.125"), ("CASTIER_COUNT", "7"), ("CASTIER_RING__PEERS", "a:1, b:2,")]);
        assert_eq!(
            sample,
            Ok(Sample { share: 0.125, count: 7, ring: Ring { peers: vec!["a:1".into(), "b:2".into()] }, ..Sample::default() })
        );
        assert_eq!(from_env(&[("CASTIER_RING__PEERS", "")]), Ok(Sample::default()));
        assert_eq!(from_env(&[("CASTIER_SHARE", "half")]).unwrap_err(), "share (set by CASTIER_SHARE): \"half\" is not a number");
        assert_eq!(
            from_env(&[("CASTIER_COUNT", "-1")]).unwrap_err(),
            "count (set by CASTIER_COUNT): invalid value: integer `-1`, expected a whole number, 0 or more, that is not too large"
        );
    }

    #[test]
    fn numbers_of_sections_in_variables_and_keys() {
        for (name, like, number) in [
            ("CASTIER_ROUTE__12__PATH", "CASTIER_ROUTE__0__PATH", 12),
            ("CASTIER_ROUTE__0__PATH", "CASTIER_ROUTE__0__PATH", 0),
            ("CASTIER_ROUTE__012__PATH", "CASTIER_ROUTE__012__PATH", 0),
            ("CASTIER_ROUTE__+1__PATH", "CASTIER_ROUTE__+1__PATH", 0),
            ("CASTIER_ROUTE__99999999999999999999__PATH", "CASTIER_ROUTE__99999999999999999999__PATH", 0),
            ("CASTIER_MEMORY__CAPACITY", "CASTIER_MEMORY__CAPACITY", 0),
        ] {
            assert_eq!(numbered(name), (like.to_owned(), number));
        }
        assert_eq!(variable_name("route[12].path"), "CASTIER_ROUTE__12__PATH");
        assert_eq!(["a.b", "route[1].path[2][3]", "route[1]"].map(without_item), ["a.b", "route[1].path", "route"]);
        assert_eq!(["a.b", "route[1].path", "route[1]"].map(unnumbered), ["a.b", "route.path", "route"]);
        let table = |text: &str| text.parse::<Table>().unwrap();
        let mut routes = table("route = [{ a = 1 }]");
        assert_eq!(insert(&mut routes, "route[1].b.c", Value::Integer(2)), Ok(()));
        assert_eq!(insert(&mut routes, "route[3].b", Value::Integer(2)), Err(2));
        assert_eq!(routes, table("route = [{ a = 1 }, { b = { c = 2 } }]"));
        assert!(remove(&mut routes, "route[1].b.c") && !remove(&mut routes, "route[1].x") && !remove(&mut routes, "route[7].a"));
        assert_eq!(routes, table("route = [{ a = 1 }, { b = {} }]"));
    }

    #[test]
    fn suggestions_are_near_or_absent() {
        let known = ["disk.capacity", "memory.capacity", "limits.max_blob", "listen.public", "memory"];
        let suggest = |name| suggestion(name, known.into_iter(), ".");
        assert_eq!(suggest("memory.capasity"), Some("memory.capacity"));
        assert_eq!(suggest("capacity"), Some("disk.capacity"));
        assert_eq!(suggest("memry"), Some("memory"));
        assert_eq!(suggest("memroy.capacity"), Some("memory.capacity"));
        assert_eq!(suggest("limts.max_blub"), Some("limits.max_blob"));
        assert_eq!(suggest("origin.public"), Some("listen.public"));
        assert_eq!(suggest("frobnicate"), None);
        assert_eq!(suggest("x"), None);
    }
}
