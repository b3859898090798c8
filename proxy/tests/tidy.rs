//! The house rules that no compiler checks: what must be documented, who may use whom, and which words
//! have no place here. Every failure says what to do. Works on the files as they lie there, without git.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const OPERATIONS: &str = "docs/operations.md";

/// Who uses whom in `proxy/src`, exactly, tests in files of their own aside. `main` uses everything and `lib` nothing.
const USES: &[(&str, &[&str])] = &[
    ("admin", &["conn", "disk", "ladder", "members", "metrics", "plan", "purge", "recent", "tier"]),
    ("buffer", &[]),
    ("chunks", &[]),
    ("conn", &["chunks", "gate", "serve", "spool"]),
    ("descriptors", &[]),
    ("disk", &["buffer", "eviction", "metrics", "pool", "tier"]),
    ("eviction", &[]),
    ("fault", &[]),
    ("flight", &["disk", "fault", "members", "memory", "metrics", "spool", "tier", "trace", "upstream", "via"]),
    ("gate", &["secret", "spool", "via"]),
    (
        "http",
        &[
            "buffer",
            "conn",
            "descriptors",
            "fault",
            "flight",
            "gate",
            "ladder",
            "members",
            "metrics",
            "plan",
            "purge",
            "record",
            "relay",
            "secret",
            "serve",
            "spool",
            "trace",
            "upload",
            "upstream",
            "via",
        ],
    ),
    ("ladder", &["disk", "fault", "flight", "members", "metrics", "spool", "tier", "upstream"]),
    ("members", &["metrics", "ring"]),
    ("memory", &["eviction", "spool", "tier"]),
    ("metrics", &["fault", "recent", "tier"]),
    ("pool", &[]),
    ("plan", &["gate", "upstream"]),
    ("purge", &["ladder", "members", "upstream"]),
    ("recent", &[]),
    ("record", &["metrics", "trace"]),
    ("relay", &["conn", "fault", "gate", "metrics", "plan", "record", "serve", "spool", "upstream", "via"]),
    ("ring", &[]),
    ("secret", &[]),
    ("serve", &["fault", "flight", "ladder", "metrics"]),
    ("spool", &["buffer", "descriptors", "fault", "metrics", "pool"]),
    ("tier", &[]),
    ("trace", &[]),
    ("upload", &["fault", "upstream"]),
    ("upstream", &["chunks", "descriptors", "fault", "members", "metrics", "secret", "trace", "via"]),
    ("via", &[]),
];

/// The only rooms in `proxy/src` that may name each of these.
const CONFINED: &[(&str, &[&str])] = &[
    ("pingora", &["conn", "http", "main", "relay", "upload", "upstream"]),
    ("pingora::proxy", &["relay"]),
    ("pingora::connectors", &["upstream"]),
    ("moka", &["disk", "eviction"]),
    ("crc_fast", &["disk"]),
    ("crossbeam_channel", &["disk"]),
    ("rustix", &["buffer", "descriptors", "disk", "main", "metrics", "pool"]),
    // The last two in their tests alone.
    ("tempfile", &["buffer", "disk", "spool", "secret", "upstream"]),
    ("axum", &["admin", "main"]),
    ("prometheus", &["metrics"]),
    ("castier_origin", &["main"]),
];

/// What the pure crate must not name: nothing there does I/O, reads a clock or waits.
const IMPURE: &[&str] = &["tokio", "futures", "hyper", "std::fs", "std::net", "std::thread", "std::time::Instant", "std::time::SystemTime"];

// ---- 1 and 2: documentation ----

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let mut wrong = Vec::new();
    let castier = compare_metrics("castier", "proxy/src", &mut wrong);
    let origin = compare_metrics("castier-origin", "origin/src", &mut wrong);
    // Anywhere else in the text, too: an alert on a series that does not exist never fires.
    let crates = ["castier_origin", "castier_config", "castier_blob", "castier_wire", "castier_load"].map(str::to_owned);
    let known: BTreeSet<_> = castier.into_iter().chain(origin).chain(crates).collect();
    for name in names(&read(OPERATIONS)) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
        if !known.contains(&name) && !known.contains(family) {
            wrong.push(format!("{OPERATIONS}: there is no metric {name}; correct the name or remove it"));
        }
    }
    verdict(&wrong);
}

fn compare_metrics(program: &str, source: &str, wrong: &mut Vec<String>) -> BTreeSet<String> {
    let is_metrics = |path: &String| path.starts_with(source) && path.rsplit('/').next().is_some_and(|file| file.starts_with("metrics"));
    let code: BTreeSet<String> = files().into_iter().filter(is_metrics).flat_map(|path| registered(&read(&path))).collect();
    assert!(!code.is_empty(), "no metric was found in {source}/metrics*.rs; teach this test where they are registered now");
    let section = format!("Metrics of {program}");
    let documented: BTreeSet<_> =
        rows(&section).into_iter().map(|cells| plain(&cells[0])).filter(|name| name.starts_with("castier_")).collect();
    for name in code.difference(&documented) {
        wrong.push(format!("{OPERATIONS}: add a row for the metric `{name}` to the section \"{section}\""));
    }
    for name in documented.difference(&code) {
        wrong.push(format!("{OPERATIONS}: {program} has no metric `{name}`; remove its row from the section \"{section}\""));
    }
    code
}

/// The names of metrics that stand as whole literals in source text.
fn registered(source: &str) -> BTreeSet<String> {
    source.split('"').filter(|literal| literal.starts_with("castier_") && names(literal).contains(*literal)).map(str::to_owned).collect()
}

/// Everything in a text that looks like the name of a metric.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
    words.filter(|word| word.starts_with("castier_")).map(|word| word.trim_end_matches('_').to_owned()).collect()
}

/// The rows of the tables below a heading of the operations manual, those that begin with code, cell by cell.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let text = read(OPERATIONS);
    let is_heading = |line: &&str| line.trim_start_matches('#').trim() == heading && line.starts_with('#');
    let mut lines = text.lines().skip_while(|line| !is_heading(line));
    assert!(lines.next().is_some(), "{OPERATIONS} has no section \"{heading}\"; add it, with a table whose rows begin with the name");
    let section = lines.take_while(|line| !line.starts_with('#'));
    section
        .filter(|line| line.starts_with("| `"))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .inspect(|cells: &Vec<String>| assert!(cells.len() >= 4, "{OPERATIONS}: the row {cells:?} needs at least four cells"))
        .collect()
}

/// A cell or a value without the marks around it.
fn plain(cell: &str) -> String {
    cell.trim_matches('`').trim_matches('"').to_owned()
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for path in files().into_iter().filter(|path| path.ends_with(".md")) {
        let folder = Path::new(&path).parent().map(Path::to_owned).unwrap_or_default();
        for link in read(&path).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains(':') && !root().join(&folder).join(target).exists() {
                wrong.push(format!("{path}: the link to {target} leads nowhere; correct or remove it"));
            }
        }
    }
    verdict(&wrong);
}

// ---- 3: direction ----

#[test]
fn modules_use_only_what_they_may() {
    let table: BTreeMap<_, BTreeSet<_>> =
        USES.iter().map(|(module, uses)| (*module, uses.iter().map(ToString::to_string).collect())).collect();
    let mut wrong = Vec::new();
    for (module, paths) in rooms().into_iter().filter(|(module, _)| !["main", "lib"].contains(&module.as_str())) {
        let used: BTreeSet<_> =
            paths.iter().filter_map(|path| path.strip_prefix("crate::")?.split("::").next().map(str::to_owned)).collect();
        let Some(allowed) = table.get(module.as_str()) else {
            wrong.push(format!("proxy/src/{module}.rs: a new room; say in USES (proxy/tests/tidy.rs) what it may use, now {used:?}"));
            continue;
        };
        for other in used.difference(allowed) {
            wrong.push(format!(
                "proxy/src/{module}.rs uses crate::{other}, against the direction of the house (ARCHITECTURE.md); \
                 let the caller hand it what it needs, or change USES with a reason"
            ));
        }
        for other in allowed.difference(&used) {
            wrong.push(format!("proxy/src/{module}.rs no longer uses crate::{other}; take it out of USES in proxy/tests/tidy.rs"));
        }
    }
    verdict(&wrong);
}

#[test]
fn confined_crates_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (module, paths) in rooms() {
        for (name, allowed) in CONFINED {
            if paths.iter().any(|path| is_below(path, name)) && !allowed.contains(&module.as_str()) {
                wrong.push(format!("proxy/src/{module}.rs names {name}, which only {allowed:?} may; ask one of them to do it"));
            }
        }
        if module == "fault" && paths.iter().any(|path| path.contains("StatusCode") || is_below(path, "http")) {
            wrong.push("proxy/src/fault.rs knows of HTTP; map faults to statuses in serve.rs".to_owned());
        }
    }
    for path in files().into_iter().filter(|path| path.starts_with("crates/blob/src/") || path.starts_with("crates/wire/src/")) {
        for name in paths_in(&code_of(&path)) {
            if let Some(impure) = IMPURE.iter().find(|impure| is_below(&name, impure)) {
                wrong.push(format!(
                    "{path} names {impure}; castier-blob and castier-wire are pure, so let its caller do the waiting, the I/O or the clock"
                ));
            }
        }
    }
    verdict(&wrong);
}

fn is_below(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Every module of the tier, with the paths it names. The files in a folder belong to the module that it is named after. Files of tests
/// may use whatever they test: the contract of the tiers runs on all of them.
fn rooms() -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for path in files().into_iter().filter(|path| !path.ends_with("/tests.rs") && !path.contains("/tests/")) {
        let module = path.strip_prefix("proxy/src/").and_then(|below| below.strip_suffix(".rs")?.split('/').next());
        if let Some(module) = module {
            found.entry(module.to_owned()).or_default().extend(paths_in(&code_of(&path)));
        }
    }
    assert!(found.len() > 10, "proxy/src was not found; teach this test where the tier is now");
    found
}

/// Every path named in code, `use` trees expanded: `a::{b, c::d}` → `a::b`, `a::c::d`.
fn paths_in(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code;
    while let Some(start) = rest.find(is_word) {
        rest = path_tree(&rest[start..], "", &mut found);
    }
    found
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Reads one path, or a tree of them, off the front of `rest`, which begins with a word; gives what comes after it.
fn path_tree<'a>(rest: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    let path = if prefix.is_empty() { rest[..end].to_owned() } else { format!("{prefix}::{}", &rest[..end]) };
    let rest = &rest[end..];
    let Some(below) = rest.strip_prefix("::") else {
        found.push(path);
        return rest;
    };
    if below.starts_with(is_word) {
        return path_tree(below, &path, found);
    }
    let Some(mut group) = below.strip_prefix('{') else {
        found.push(path);
        return below;
    };
    while let Some(next) = group.find(|c| is_word(c) || c == '}') {
        if let Some(after) = group[next..].strip_prefix('}') {
            return after;
        }
        group = path_tree(&group[next..], &path, found);
        // `a as b`: the new name names nothing.
        if let Some(renamed) = group.trim_start().strip_prefix("as ") {
            group = &renamed[renamed.find([',', '}']).unwrap_or(renamed.len())..];
        }
    }
    group
}

/// A source file with its comments, texts and characters blanked, so that what is left of braces and names is code.
fn code_of(path: &str) -> String {
    blank(&read(path))
}

fn blank(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let inert = inert(rest, code.ends_with(is_word));
        let len = inert.unwrap_or(c.len_utf8());
        match inert {
            Some(len) => code.extend(rest[..len].chars().map(|c| if c == '\n' { c } else { ' ' })),
            None => code.push(c),
        }
        rest = &rest[len..];
    }
    code
}

/// The length of the comment or literal that `rest` begins with.
fn inert(rest: &str, after_word: bool) -> Option<usize> {
    let to = |end: &str, from: usize| rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len());
    if rest.starts_with("//") {
        return Some(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Some(to("*/", 2));
    }
    if let Some(raw) = rest.strip_prefix("br").or(rest.strip_prefix('r')).filter(|_| !after_word) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            return Some(to(&format!("\"{}", "#".repeat(hashes)), rest.len() - raw.len() + hashes + 1));
        }
    }
    if let Some(text) = rest.strip_prefix('"') {
        let mut escaped = false;
        let end = text.find(|c| {
            let is_end = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        return Some(end.map_or(rest.len(), |end| end + 2));
    }
    let mut inside = rest.strip_prefix('\'')?.chars();
    match (inside.next()?, inside.next()?) {
        ('\\', _) => Some(to("'", 3)),
        (c, '\'') => Some(c.len_utf8() + 2),
        // A lifetime.
        _ => None,
    }
}

// ---- 4: words ----

#[test]
fn nothing_tells_of_a_machine_or_of_unfinished_work() {
    // Put together here, so that this file does not name them.
    let machine = [["/wo", "rk/"], ["/ro", "ot/"], ["/ho", "me/"], ["cra", "tes.io"], ["replace", "-with"], ["npm", "js."], ["py", "pi."]]
        .map(|two| two.concat());
    let unfinished = [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["HA", "CK"]].map(|two| two.concat());
    let public_index = format!("registry+https://github.com/rust-lang/{}-index", machine[3]);
    let mut wrong = Vec::new();
    for path in files() {
        // Binary files say nothing.
        let Ok(text) = fs::read_to_string(root().join(&path)) else { continue };
        for (number, line) in (1..).zip(text.lines()) {
            if path == "Cargo.lock" {
                if line.strip_prefix("source = ").is_some_and(|source| plain(source) != public_index) {
                    wrong.push(format!("{path}:{number}: not from the public registry; take the dependency from there"));
                }
                continue;
            }
            if let Some(needle) = machine.iter().find(|needle| line.contains(*needle)) {
                wrong.push(format!(
                    "{path}:{number}: {needle:?} belongs to one machine or registry; write a relative path or a placeholder"
                ));
            }
            if let Some(word) = line.split(|c| !is_word(c)).find(|word| unfinished.iter().any(|banned| banned == word)) {
                wrong.push(format!("{path}:{number}: {word}: finish it, or open an issue and remove the word"));
            }
        }
    }
    verdict(&wrong);
}

// ---- what all of them need ----

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path} cannot be read ({error}); restore it, or change this test"))
}

/// Every file of the project, by its path from the top, in order; without what is built, ignored or git's.
fn files() -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(root().join(&folder)).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries.flatten() {
            let path = folder.join(entry.file_name());
            let name = entry.file_name().to_string_lossy().into_owned();
            if ["target", ".git", "castier-data"].contains(&name.as_str()) || name.ends_with(".log") {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else {
                found.push(path.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

fn verdict(wrong: &[String]) {
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

// ---- the tools above, on samples: a check that sees nothing would pass for ever ----

#[test]
fn the_tools_see_what_they_should() {
    let code = "use a::{b, c::{d, e as f}, g};\nfn x(y: &'static str) -> u8 {\n    /* { */ let _ = (\"{\\\"\", '{', r#\"{\"#); // }\n    h::i(y)\n}\n";
    let blanked = blank(code);
    assert_eq!(blanked.matches('{').count(), 3, "{blanked}");
    let paths = paths_in(&blanked);
    for path in ["a::b", "a::c::d", "a::c::e", "a::g", "h::i"] {
        assert!(paths.iter().any(|found| found == path), "{path} is not in {paths:?}");
    }
    assert!(!paths.iter().any(|path| path.ends_with("::f")), "{paths:?}");
    assert_eq!(names("`castier_a_total` castier_origin::x"), ["castier_a_total", "castier_origin"].map(str::to_owned).into());
    assert_eq!(registered("x(\"castier_a_total\", \"see castier_b\", \"castier_c: d\")"), ["castier_a_total".to_owned()].into());
}
