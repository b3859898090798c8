//! A key is described once: by the doc comment of its field in `config/src`, and by the `Default` of its struct. `config/castier.toml`,
//! `config/castier-origin.toml` and the tables in `docs/operations.md` are generated from these. `scripts/keys` writes them, and a test here
//! says when they are stale.
//!
//! How to write the doc comment of a key:
//!
//! - The first paragraph says what the key does. It goes into the example file and into the table.
//! - Further paragraphs have details and the reason for the default. They go into the table.
//! - `- Type: …`, if the field's Rust type does not say enough. A test checks that what this text excludes is refused ([`limits`]).
//! - `- Live: yes`, if SIGHUP changes the key. On a struct: all its keys.
//! - Or only ``As [`Struct::field`].``: described there.
//!
//! The doc comment of a section's struct is its comment in the example file. A section that can be there several times (`[[route]]`) is shown by
//! a few examples ([`examples`]), and has a line of its own in the table.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

use castier_config::{Castier, Config, EventSink, OriginServer, Route, Size, keys, load_offline};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;
use toml::{Table, Value};

/// The columns that a comment in an example file may take.
const WIDTH: usize = 140;
/// Where the comment behind a value begins, if the value is short enough.
const BEHIND: usize = 44;

/// Structs by their names.
type Structs = BTreeMap<String, syn::ItemStruct>;

/// What a doc comment says.
#[derive(Default)]
struct Doc {
    paragraphs: Vec<String>,
    kind: Option<String>,
    live: Option<String>,
}

/// A key as the generated files show it.
struct Key {
    /// Dotted.
    name: String,
    /// The field, or the field that its doc comment refers to: equal for keys that are described once for both programs.
    described_at: String,
    paragraphs: Vec<String>,
    kind: String,
    live: String,
    /// The value that it has if its section is there. `None`: it is not set.
    default: Option<Value>,
}

struct Section {
    /// The dotted name, empty for the keys of no section.
    name: String,
    comment: String,
    /// Absent unless the operator writes it.
    optional: bool,
    /// It can be there several times, in double brackets.
    repeated: bool,
    keys: Vec<Key>,
}

/// The routes in the example file. Together they have every key, and each of them could be one of a real configuration. The first one shows the
/// defaults.
const ROUTES: [(&str, &str); 3] = [
    ("", "protocol = \"oci\"\nupstream = \"https://registry.example\""),
    (
        "A route by hand, with castier's own credentials.",
        "path = \"/files/{name*}\"\nupstream = \"https://files.example\"\nkind = \"fresh\"\naccess = \"local\"\nttl = \"60s\"\n\
         credentials = { username = \"castier\", password_file = \"/run/secrets/files-password\" }",
    ),
    ("A route for Nix.", "protocol = \"nix\"\nupstream = \"https://cache.nixos.org\"\nprefix = \"/nix\"\npriority = 30"),
];

/// The receivers of events in the example file, likewise.
const EVENTS: [(&str, &str); 3] = [
    ("", "url = \"https://events.example/castier\"\nsecret_file = \"/run/secrets/castier-webhook\""),
    (
        "RabbitMQ, with an exchange.",
        "url = \"amqps://rabbitmq.example/castier\"\nexchange = \"amq.topic\"\ncredentials_file = \"/run/secrets/castier-rabbitmq\"",
    ),
    ("NATS, for what is stored.", "url = \"nats://nats.example:4222\"\ntypes = [\"stored\"]"),
];

/// The examples of a section that can be there several times.
fn examples(section: &str) -> &'static [(&'static str, &'static str)] {
    match section {
        "route" => &ROUTES,
        "events" => &EVENTS,
        _ => panic!("teach this test examples of [[{section}]]"),
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn structs() -> Structs {
    let files = fs::read_dir(root().join("config/src")).unwrap().map(|entry| entry.unwrap().path());
    let items = files.flat_map(|path| syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap().items);
    let structs = items.filter_map(|item| match item {
        syn::Item::Struct(item) => Some((item.ident.to_string(), item)),
        _ => None,
    });
    structs.collect()
}

impl Doc {
    fn of(attributes: &[syn::Attribute]) -> Self {
        let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
            syn::Meta::NameValue(syn::MetaNameValue {
                path, value: syn::Expr::Lit(syn::ExprLit { lit: syn::Lit::Str(line), .. }), ..
            }) if path.is_ident("doc") => Some(line.value().trim().to_owned()),
            _ => None,
        });
        let mut doc = Self::default();
        let mut paragraph = Vec::new();
        for line in lines.chain([String::new()]) {
            if let Some(kind) = line.strip_prefix("- Type: ") {
                doc.kind = Some(kind.to_owned());
            } else if let Some(live) = line.strip_prefix("- Live: ") {
                doc.live = Some(live.to_owned());
            } else if !line.is_empty() {
                paragraph.push(line);
            } else if !paragraph.is_empty() {
                doc.paragraphs.push(std::mem::take(&mut paragraph).join(" "));
            }
        }
        doc
    }
}

/// The name of a type, and for an `Option` or a `Vec` that of the type in it.
fn names(ty: &syn::Type) -> (String, Option<String>) {
    let syn::Type::Path(path) = ty else { panic!("a key has a type with a name") };
    let last = path.path.segments.last().unwrap();
    let inner = match &last.arguments {
        syn::PathArguments::AngleBracketed(arguments) if last.ident == "Option" || last.ident == "Vec" => match arguments.args.first() {
            Some(syn::GenericArgument::Type(inner)) => Some(names(inner).0),
            _ => None,
        },
        _ => None,
    };
    (last.ident.to_string(), inner)
}

/// The text of the column *type*, if a Rust type says enough.
fn kind_of(ty: &str) -> Option<&'static str> {
    Some(match ty {
        "bool" => "true or false",
        "String" => "text",
        "PathBuf" => "path",
        "Size" => "size",
        "Span" => "duration",
        "usize" | "u32" | "u64" => "0 or more",
        "Share" => "0 to 0.9",
        "OriginUrl" => "URL",
        "KeyTemplate" => "key template",
        "Policy" => "`tiny-lfu` or `lru`",
        "Role" => "`none`, `read`, `write` or `admin`",
        "Scopes" => "list or table",
        "Write" => "`through` or `behind`",
        "LogFormat" => "`text` or `json`",
        "Labels" => "list or table",
        "Proxies" => "list",
        _ => return None,
    })
}

fn sections<C: Config>(program: &str) -> Vec<Section> {
    let mut found = Vec::new();
    let defaults = Table::try_from(C::complete()).unwrap();
    add_section(&structs(), program, &Place { name: String::new(), optional: false, repeated: false }, &defaults, &defaults, &mut found);
    let described: Vec<_> = found.iter().flat_map(|section| &section.keys).map(|key| key.name.clone()).collect();
    assert_eq!(described, keys::<C>());
    found
}

/// Where a struct is.
struct Place {
    name: String,
    optional: bool,
    repeated: bool,
}

/// Adds a struct and the sections in it, each behind the keys of the one above. `complete` has all keys, and `defaults` their values.
fn add_section(structs: &Structs, name: &str, place: &Place, complete: &Table, defaults: &Table, found: &mut Vec<Section>) {
    let item = &structs[name];
    let doc = Doc::of(&item.attrs);
    let at = found.len();
    let Place { name: section, optional, repeated } = place;
    let comment = doc.paragraphs.join(" ");
    found.push(Section { name: section.clone(), comment, optional: *optional, repeated: *repeated, keys: Vec::new() });
    for field in &item.fields {
        let ident = field.ident.as_ref().unwrap().to_string();
        let key = if section.is_empty() { ident.clone() } else { format!("{section}.{ident}") };
        let (ty, inner) = names(&field.ty);
        match &complete[&ident] {
            Value::Table(below) => {
                let place = Place { name: key, optional: *optional || inner.is_some(), repeated: false };
                let defaults = defaults.get(&ident).map_or(below, |section| section.as_table().unwrap());
                add_section(structs, &inner.unwrap_or(ty), &place, below, defaults, found);
            }
            Value::Array(items) if items.first().is_some_and(Value::is_table) => {
                let defaults = match key.as_str() {
                    "route" => Table::try_from(Route::default()),
                    "events" => Table::try_from(EventSink::default()),
                    _ => panic!("teach this test the defaults of [[{key}]]"),
                };
                let defaults = defaults.unwrap();
                let place = Place { name: key, optional: true, repeated: true };
                add_section(structs, &inner.unwrap(), &place, items[0].as_table().unwrap(), &defaults, found);
            }
            _ => {
                let (described_at, own) = described(structs, name, &ident);
                let ty = if ty == "Option" { inner.unwrap() } else { ty };
                found[at].keys.push(Key {
                    kind: own.kind.unwrap_or_else(|| kind_of(&ty).unwrap_or_else(|| panic!("{key}: add \"- Type: …\"")).to_owned()),
                    live: own.live.or_else(|| doc.live.clone()).unwrap_or_else(|| "no".to_owned()),
                    name: key,
                    described_at,
                    paragraphs: own.paragraphs,
                    default: defaults.get(&ident).cloned(),
                });
            }
        }
    }
}

/// What the doc comment of a field says, or of the field that it refers to; and which field that is.
fn described(structs: &Structs, name: &str, field: &str) -> (String, Doc) {
    let item = &structs[name];
    let found = item.fields.iter().find(|candidate| candidate.ident.as_ref().is_some_and(|ident| ident == field));
    let doc = Doc::of(&found.unwrap_or_else(|| panic!("there is no {name}::{field}")).attrs);
    let link = doc.paragraphs.first().and_then(|text| text.strip_prefix("As [`")?.strip_suffix("`]."));
    match link.and_then(|link| link.split_once("::")) {
        Some((name, field)) => described(structs, name, field),
        None => {
            assert!(!doc.paragraphs.is_empty(), "{name}::{field}: say what the key does");
            (format!("{name}::{field}"), doc)
        }
    }
}

// ---- what is generated ----

/// An example file: every key at its default.
fn example(header: &str, sections: &[Section]) -> String {
    let mut text = comment(header);
    let mut sections = sections.iter().peekable();
    while let Some(section) = sections.next() {
        let Section { name, comment: what, optional, repeated, keys } = section;
        // Without a space behind it, so that it can be told from a comment.
        let off = if *optional { "#" } else { "" };
        if *repeated {
            let mut all = vec![section];
            while let Some(below) = sections.next_if(|below| below.name.starts_with(&format!("{name}."))) {
                all.push(below);
            }
            add_examples(&all, &mut text);
            continue;
        }
        if !name.is_empty() {
            write!(text, "\n{}{off}[{name}]\n", comment(what)).unwrap();
        }
        for (i, key) in keys.iter().enumerate() {
            let gap = if i == 0 && !name.is_empty() { "" } else { "\n" };
            let line = line(key, off, key.default.as_ref().unwrap());
            write!(text, "{gap}{}{line}", comment(&key.paragraphs[0])).unwrap();
        }
    }
    text
}

/// A key with a value.
fn line(key: &Key, off: &str, value: &Value) -> String {
    let live = match key.live.as_str() {
        "no" => String::new(),
        "yes" => "; SIGHUP changes it".to_owned(),
        part => format!("; SIGHUP changes its {part}"),
    };
    let line = format!("{off}{} = {value}", key.name.rsplit('.').next().unwrap());
    format!("{line:BEHIND$} # {}{live}\n", key.kind.replace('`', ""))
}

/// A section that can be there several times, with the sections in it: what each example sets, and in the first one the defaults as well. Each
/// key is described where it comes first.
fn add_examples(sections: &[&Section], text: &mut String) {
    let name = &sections[0].name;
    let mut described = BTreeSet::new();
    for (i, (title, example)) in examples(name).iter().enumerate() {
        let example: Table = example.parse().unwrap();
        let title = if i == 0 { &sections[0].comment } else { *title };
        write!(text, "\n{}#[[{name}]]\n", comment(title)).unwrap();
        for section in sections {
            let below = section.name.strip_prefix(&format!("{name}."));
            let values = below.map_or(Some(&example), |below| example.get(below).and_then(Value::as_table));
            if let Some(below) = below.filter(|_| values.is_some()) {
                write!(text, "\n{}#[{name}.{below}]\n", comment(&section.comment)).unwrap();
            }
            let mut gap = "";
            for key in values.iter().flat_map(|_| &section.keys) {
                let own = values.unwrap().get(key.name.rsplit('.').next().unwrap());
                let default = key.default.as_ref().filter(|_| i == 0 || below.is_some());
                let Some(value) = own.or(default) else { continue };
                if described.insert(&key.name) {
                    write!(text, "{gap}{}", comment(&key.paragraphs[0])).unwrap();
                }
                *text += &line(key, "#", value);
                gap = "\n";
            }
        }
    }
}

/// Wrapped, with `# ` in front of each line. Markdown's code marks go.
fn comment(text: &str) -> String {
    assert!(!text.contains("]("), "a link has no meaning in an example file: {text}");
    let mut lines = String::new();
    for paragraph in text.lines() {
        let mut line = String::from("#");
        for word in paragraph.replace('`', "").split_whitespace() {
            if line.len() + 1 + word.len() > WIDTH {
                lines += &format!("{line}\n");
                line = String::from("#");
            }
            line += &format!(" {word}");
        }
        lines += &format!("{line}\n");
    }
    lines
}

/// A table of the manual. A key that is described in the other program's table too refers to it.
fn table(sections: &[Section], elsewhere: &BTreeSet<&str>) -> String {
    let mut text = "| key | type | default | live | what it does, and why the default |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for section in sections {
        if section.repeated {
            writeln!(text, "| `[[{}]]` | sections with the keys below | none | no | {} |", section.name, section.comment).unwrap();
        }
        for key in &section.keys {
            let default = match &key.default {
                None => "none".to_owned(),
                Some(Value::String(text)) if !text.is_empty() => format!("`{text}`"),
                Some(other) => format!("`{other}`"),
            };
            let what = if elsewhere.contains(key.described_at.as_str()) { "As for castier.".to_owned() } else { key.paragraphs.join(" ") };
            writeln!(text, "| `{}` | {} | {default} | {} | {what} |", key.name, key.kind, key.live).unwrap();
        }
    }
    for line in text.lines() {
        assert_eq!(line.matches('|').count(), 6, "a table cannot show |: {line}");
    }
    text
}

/// `text` with what is between the markers of this program replaced.
fn with_table(text: &str, program: &str, table: &str) -> String {
    let (begin, end) = (format!("<!-- keys of {program}: scripts/keys writes this table -->\n"), "<!-- end of the table -->\n");
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("docs/operations.md has no line {begin:?}"));
    let (_, after) = rest.split_once(end).unwrap_or_else(|| panic!("docs/operations.md has no line {end:?}"));
    format!("{before}{begin}{table}{end}{after}")
}

fn header(program: &str, key: &str, variable: &str) -> String {
    format!(
        "{program}: every key at its default. Copy what you change, and leave out the rest.\n\
         \n\
         Sizes are bytes, or a number with a unit (\"64MiB\", \"1GB\"). Durations are numbers with units (\"5s\", \"250ms\", \"1m30s\").\n\
         The environment can set every key, and wins over this file: {variable} sets {key}.\n\
         Unknown keys are errors. {program} --check-config names every problem, and --print-config shows the effective configuration.\n\
         After a change send SIGHUP to {program}: the keys marked with SIGHUP change at once. The others need a restart.\n\
         docs/operations.md has more about each key, and the reason for its default. scripts/keys writes this file from config/src."
    )
}

fn generated() -> [(&'static str, String); 3] {
    const OPERATIONS: &str = "docs/operations.md";
    let (castier, origin) = (sections::<Castier>("Castier"), sections::<OriginServer>("OriginServer"));
    let described = castier.iter().flat_map(|section| &section.keys).map(|key| key.described_at.as_str()).collect();
    let manual = fs::read_to_string(root().join(OPERATIONS)).unwrap();
    let manual = with_table(&manual, "castier", &table(&castier, &BTreeSet::new()));
    let optional = "\nThe sections [disk], [cluster], [[route]] and [[events]] are absent by default. To have one, remove the # in front of its name \
                    and of the keys that you change.";
    let header_of_castier = header("castier", "memory.capacity", "CASTIER_MEMORY__CAPACITY") + optional;
    let header_of_origin = header("castier-origin", "store.root", "CASTIER_STORE__ROOT");
    [
        ("config/castier.toml", example(&header_of_castier, &castier)),
        ("config/castier-origin.toml", example(&header_of_origin, &origin)),
        (OPERATIONS, with_table(&manual, "castier-origin", &table(&origin, &described))),
    ]
}

#[test]
fn generated_files_are_up_to_date() {
    let write = std::env::var_os("WRITE_KEYS").is_some();
    let mut stale = Vec::new();
    for (file, text) in generated() {
        let path = root().join(file);
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        if write {
            fs::write(path, text).unwrap();
            println!("wrote {file}");
        } else {
            stale.push(file);
        }
    }
    assert!(stale.is_empty(), "{} differ from the doc comments and defaults in config/src: run scripts/keys", stale.join(" and "));
}

// ---- whether what is shown is true ----

/// The keys that are wrong in this file on every machine.
fn problems<C: Config>(text: &str, env: &[(String, String)]) -> Vec<String> {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let told = load_offline::<C>(Some(file.path()), env.iter().cloned()).map(drop);
    told.map_or_else(|problems| problems.subjects().map(str::to_owned).collect(), |()| Vec::new())
}

/// Values at the limits of a type: those that must be refused, and those that must be accepted.
fn limits(kind: &str, default: Option<&Value>) -> (Vec<String>, Vec<String>) {
    let texts = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
    // "1KiB" and "65536" alike.
    let whole = |text: &str| i64::try_from(text.parse::<Size>().unwrap().get()).unwrap();
    match (kind, kind.split_once(" to ")) {
        ("true or false" | "list" | "list or table" | "list of HOST:PORT", _) => (texts(&["1"]), Vec::new()),
        ("list of CERT_FILE KEY_FILE", _) => (texts(&["1"]), Vec::new()),
        ("list of HOST or HOST:PORT" | "list of header names", _) => (texts(&["1", "[\"a b\"]"]), texts(&["[]", "[\"a\", \"a-b\"]"])),
        ("list of `stored`, `deleted` and `corrupt`", _) => {
            (texts(&["1", "[\"nowhere\"]"]), texts(&["[\"stored\", \"deleted\"]", "[\"corrupt\"]"]))
        }
        ("HOST:PORT" | "URL" | "path template" | "key template" | "path without / at its end", _) => (texts(&["\"nowhere\""]), Vec::new()),
        ("HOST or HOST:PORT" | "header name" | "name of a registry" | "name of a receiver" | "subject", _) => {
            (texts(&["\"a b\""]), Vec::new())
        }
        (choice, _) if choice.starts_with('`') => {
            // `one`, `two` or `three`
            let accepted = choice.split('`').skip(1).step_by(2).map(|one| format!("{one:?}"));
            (texts(&["\"nowhere\""]), accepted.collect())
        }
        ("size", _) => (texts(&["-1"]), texts(&["0"])),
        ("size over 0", _) => (texts(&["0"]), texts(&["1"])),
        ("duration", _) => (texts(&["5"]), texts(&["\"0s\""])),
        ("duration over 0", _) => (texts(&["\"0s\""]), texts(&["\"1ms\""])),
        ("duration up to 24h", _) => (texts(&["\"86401s\""]), texts(&["\"0s\"", "\"24h\""])),
        ("text" | "path" | "name", _) => (Vec::new(), Vec::new()),
        (_, Some((least, most))) if default.is_some_and(Value::is_float) => {
            let (below, above) = (least.parse::<f64>().unwrap() - 0.01, most.parse::<f64>().unwrap() + 0.01);
            (vec![below.to_string(), above.to_string()], texts(&[least, most]))
        }
        (_, Some((least, most))) => {
            let (least, most) = (whole(least), whole(most));
            (vec![(least - 1).to_string(), (most + 1).to_string()], vec![least.to_string(), most.to_string()])
        }
        _ => {
            let least = whole(kind.strip_suffix(" or more").unwrap_or_else(|| panic!("{kind:?}: teach this test that type")));
            (vec![(least - 1).to_string()], vec![least.to_string()])
        }
    }
}

/// A file in which one key has this value. For a key of a route or of a receiver of events: with one in which the key may be.
fn file_with(key: &str, value: &str) -> (String, String) {
    if let Some(below) = key.strip_prefix("events.") {
        let base = match below {
            "exchange" | "credentials_file" => "url = \"amqp://h\"",
            _ => "url = \"https://h\"\nsecret_file = \"/x\"",
        };
        let mut sink: Table = base.parse().unwrap();
        sink.extend(format!("{below} = {value}").parse::<Table>().unwrap());
        return (format!("[disk]\n[[events]]\n{sink}"), format!("events[0].{below}"));
    }
    if key == "access.anonymous" {
        return (format!("[access]\nanonymous = {value}\nhtpasswd_file = \"/x\""), key.to_owned());
    }
    if key == "origin.write" {
        return (format!("[origin]\nurl = \"s3://b\"\nwrite = {value}\n[disk]"), key.to_owned());
    }
    let Some(below) = key.strip_prefix("route.") else { return (format!("{key} = {value}"), key.to_owned()) };
    let base = match below {
        "path" | "kind" => "path = \"/{sha256}\"\nkind = \"frozen\"",
        "namespace" => "protocol = \"oci\"",
        _ => "protocol = \"nix\"",
    };
    let mut route: Table = format!("{base}\nupstream = \"https://h\"").parse().unwrap();
    if !below.contains('.') {
        route.extend(format!("{below} = {value}").parse::<Table>().unwrap());
    }
    (format!("[[route]]\n{route}"), format!("route[0].{below}"))
}

fn check_types<C: Config>(program: &str) {
    for key in sections::<C>(program).iter().flat_map(|section| &section.keys) {
        let (refused, accepted) = limits(&key.kind, key.default.as_ref());
        let is_refused = |value: &String| {
            let (file, subject) = file_with(&key.name, value);
            problems::<C>(&file, &[]).contains(&subject)
        };
        for value in &refused {
            assert!(is_refused(value), "{} is said to be {:?}, and {value} is accepted", key.name, key.kind);
        }
        for value in &accepted {
            assert!(!is_refused(value), "{} is said to be {:?}, and {value} is refused", key.name, key.kind);
        }
    }
}

#[test]
fn types_are_what_they_are_said_to_be() {
    check_types::<Castier>("Castier");
    check_types::<OriginServer>("OriginServer");
}

/// The files that are shipped for an image, a package or a cluster, and have a few keys only.
#[test]
fn shipped_configurations_are_sound() {
    for folder in ["compose", "debian", "kubernetes"] {
        for program in ["castier", "castier-origin"] {
            let text = fs::read_to_string(root().join("config").join(folder).join(program).with_extension("toml")).unwrap();
            // Each node of a cluster sets this itself.
            let env = ("CASTIER_CLUSTER__ADVERTISE".to_owned(), "node-1:8081".to_owned());
            let env = if text.contains("[cluster]") { vec![env] } else { Vec::new() };
            let wrong = if program == "castier" { problems::<Castier>(&text, &env) } else { problems::<OriginServer>(&text, &env) };
            assert_eq!(wrong, Vec::<String>::new(), "config/{folder}/{program}.toml");
        }
    }
}

/// `CASTIER_SECTION__KEY` in the files that set variables and in the documentation.
#[test]
fn named_variables_are_those_of_keys() {
    let known: BTreeSet<_> = keys::<Castier>().into_iter().chain(keys::<OriginServer>()).collect();
    let mut paths: Vec<_> =
        ["k8s", "packaging", "docs", "scripts", "compose.yaml", "Dockerfile", "README.md"].map(|name| root().join(name)).into();
    let mut seen = 0;
    while let Some(path) = paths.pop() {
        if path.is_dir() {
            paths.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        // A picture has none.
        let text = fs::read_to_string(&path).unwrap_or_default();
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            // `CASTIER_DISK__…` names no variable.
            let Some(name) = word.strip_prefix("CASTIER_").filter(|name| name.contains("__") && !name.ends_with('_')) else { continue };
            // `CASTIER_ROUTE__0__PATH` sets `route.path` of the first route.
            let parts = name.split("__").filter(|part| part.parse::<usize>().is_err());
            let key = parts.map(str::to_lowercase).collect::<Vec<_>>().join(".");
            assert!(known.contains(&key), "{}: {word} sets no key", path.display());
            seen += 1;
        }
    }
    assert!(seen > 0, "no variable was found");
}
