//! The rules that no compiler checks: which metrics must be documented, where links lead, and which words have no place here. Every failure says what
//! to do. Works on the files as they are, without git.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

const OPERATIONS: &str = "docs/operations.md";

// ---- documentation ----

#[test]
fn every_metric_is_documented_and_every_documented_metric_exists() {
    let mut wrong = Vec::new();
    let castier = compare_metrics("castier", &["proxy/src", "crates/"], &mut wrong);
    let origin = compare_metrics("castier-origin", &["origin/src"], &mut wrong);
    // Anywhere else in the text, too: an alert on a series that does not exist never fires.
    let crates = [
        "castier_origin",
        "castier_config",
        "castier_blob",
        "castier_wire",
        "castier_cache",
        "castier_cluster",
        "castier_upstream",
        "castier_serverkit",
        "castier_load",
    ]
    .map(str::to_owned);
    let known: BTreeSet<_> = castier.into_iter().chain(origin).chain(crates).collect();
    for name in names(&read(OPERATIONS)) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name);
        if !known.contains(&name) && !known.contains(family) {
            wrong.push(format!("{OPERATIONS}: there is no metric {name}; correct the name or remove it"));
        }
    }
    verdict(&wrong);
}

fn compare_metrics(program: &str, sources: &[&str], wrong: &mut Vec<String>) -> BTreeSet<String> {
    let is_metrics = |path: &String| {
        sources.iter().any(|source| path.starts_with(source)) && path.rsplit('/').next().is_some_and(|file| file.starts_with("metrics"))
    };
    let code: BTreeSet<String> = files().into_iter().filter(is_metrics).flat_map(|path| registered(&read(&path))).collect();
    assert!(!code.is_empty(), "no metric was found in the metrics*.rs below {sources:?}; teach this test where they are registered now");
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

#[test]
fn every_function_that_the_architecture_names_exists() {
    let sources: String = files().into_iter().filter(|file| file.ends_with(".rs")).map(|file| read(&file)).collect();
    let text = read("ARCHITECTURE.md");
    let names: BTreeSet<_> = text.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::")).collect();
    assert!(names.len() > 50, "ARCHITECTURE.md names functions as `Type::function`");
    let exists = |(kind, name): (&str, &str)| {
        let is_kind = ["struct", "enum", "trait"].iter().any(|word| sources.contains(&format!("{word} {kind}")));
        is_kind
            && [format!("fn {name}("), format!("fn {name}<"), format!("    {name},"), format!("    {name}("), format!("    {name} {{")]
                .iter()
                .any(|form| sources.contains(form))
    };
    let wrong: Vec<_> = names
        .into_iter()
        .filter(|name| !exists(*name))
        .map(|(kind, name)| format!("ARCHITECTURE.md: there is no {kind}::{name}; correct the name"))
        .collect();
    verdict(&wrong);
}

#[test]
fn every_test_that_the_table_of_attacks_names_exists() {
    let text = read("SECURITY.md");
    let names: BTreeSet<_> = text.split('`').skip(1).step_by(2).filter_map(|name| name.split_once("::")).collect();
    let names: Vec<_> = names.into_iter().filter(|(file, _)| *file != "FILE").collect();
    assert!(names.len() > 30, "SECURITY.md names tests as `file::test`");
    let all = files();
    let exists = |(file, test): &(&str, &str)| {
        let sources = all.iter().filter(|path| path.ends_with(&format!("/{file}.rs")));
        sources.map(|path| read(path)).any(|source| source.contains(&format!("fn {test}(")))
    };
    let wrong = names.iter().filter(|name| !exists(name));
    verdict(&wrong.map(|(file, test)| format!("SECURITY.md: there is no test {file}::{test}; correct the name")).collect::<Vec<_>>());
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

// ---- words ----

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
            if path.ends_with("Cargo.lock") {
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
            if let Some(word) =
                line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').find(|word| unfinished.iter().any(|banned| banned == word))
            {
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
    assert_eq!(names("`castier_a_total` castier_origin::x"), ["castier_a_total", "castier_origin"].map(str::to_owned).into());
    assert_eq!(registered("x(\"castier_a_total\", \"see castier_b\", \"castier_c: d\")"), ["castier_a_total".to_owned()].into());
}
