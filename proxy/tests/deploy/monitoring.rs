//! `grafana/`: rules, their cases, dashboards and the runbook, held to each other and checked by the real tools. `live` runs them.

use crate::tools::{grafana_packages, parse_yaml, read, root, run, stdout, text, tool};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};
use tempfile::TempDir;

const RULES: &str = "grafana/prometheus/castier.rules.yaml";
const CASES: &str = "grafana/prometheus/castier.tests.yaml";
const OPERATIONS: &str = "docs/operations.md";

/// The labels of streams in Loki. All other names in a query are fields of records.
const STREAM_LABELS: [&str; 4] = ["job", "instance", "level", "namespace"];

pub(crate) fn items(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn string(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// All rules; none if nothing reads YAML.
pub(crate) fn rules() -> Option<Vec<Value>> {
    let documents = parse_yaml(&read(RULES))?;
    Some(items(&documents[0]["groups"]).iter().flat_map(|group| items(&group["rules"]).to_vec()).collect())
}

fn alerts() -> Option<Vec<Value>> {
    Some(rules()?.into_iter().filter(|rule| rule["alert"].is_string()).collect())
}

/// Every dashboard with its file's name.
pub(crate) fn dashboards() -> Vec<(String, Value)> {
    let mut found: Vec<_> = fs::read_dir(root().join("grafana/dashboards"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), serde_json::from_slice(&fs::read(&path).unwrap()).unwrap()))
        .collect();
    found.sort_by(|(one, _), (other, _)| one.cmp(other));
    assert_eq!(
        found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["cluster.json", "disk.json", "logs.json", "origin.json", "overview.json", "routes.json"]
    );
    found
}

/// The panels that show something.
pub(crate) fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    items(&dashboard["panels"]).iter().filter(|panel| panel["type"] != "row")
}

/// The expressions of a kind of data source, with what names them in a failure.
pub(crate) fn expressions(kind: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, dashboard) in dashboards() {
        for panel in panels(&dashboard) {
            for target in items(&panel["targets"]).iter().filter(|target| target["datasource"]["type"] == kind) {
                found.push((format!("{file}, panel {}", panel["title"]), string(&target["expr"]).to_owned()));
            }
        }
    }
    let fence = if kind == "prometheus" { "```promql\n" } else { "```logql\n" };
    let text = read(OPERATIONS);
    let blocks = text.split(fence).skip(1).map(|rest| rest.split("\n```").next().unwrap().to_owned());
    let before = found.len();
    found.extend(blocks.map(|block| (OPERATIONS.to_owned(), block)));
    assert!(found.len() > before + 5, "{OPERATIONS} has expressions too");
    found
}

/// All parts of a text that look like series of ours.
pub(crate) fn series(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'));
    words.filter(|word| ["castier_", "castier:", "process_"].iter().any(|start| word.starts_with(start))).map(str::to_owned).collect()
}

// ---- alerts ----

/// Rules and cases in one directory, with every expression and the choice of cases changed. What promtool says.
fn promtool(promtool: &Path, change: impl Fn(&mut Value), choose: impl Fn(&str) -> bool) -> (bool, String, usize) {
    let mut rules = parse_yaml(&read(RULES)).unwrap().remove(0);
    for group in rules["groups"].as_array_mut().unwrap() {
        group["rules"].as_array_mut().unwrap().iter_mut().for_each(&change);
    }
    let mut cases = parse_yaml(&read(CASES)).unwrap().remove(0);
    let tests = cases["tests"].as_array_mut().unwrap();
    tests.retain(|test| choose(string(&test["name"])));
    let count = tests.len();
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("castier.rules.yaml"), rules.to_string()).unwrap();
    fs::write(dir.path().join("cases.yaml"), cases.to_string()).unwrap();
    let output = run(Command::new(promtool).args(["test", "rules", "cases.yaml"]).current_dir(dir.path()), b"");
    (output.status.success(), text(&output), count)
}

#[test]
fn every_alert_has_cases_that_hold_and_that_would_notice_a_broken_alert() {
    let Some(tool) = tool("promtool") else { return };
    let Some(alerts) = alerts() else { return };
    let cases = parse_yaml(&read(CASES)).unwrap().remove(0);
    let names: Vec<_> = items(&cases["tests"]).iter().map(|test| string(&test["name"]).to_owned()).collect();
    for alert in &alerts {
        for kind in ["fires", "quiet"] {
            let start = format!("{kind} {}: ", string(&alert["alert"]));
            assert!(names.iter().any(|name| name.starts_with(&start)), "{CASES}: add a case named {start:?}");
        }
    }
    for test in items(&cases["tests"]) {
        let (kind, rest) = string(&test["name"]).split_once(' ').unwrap();
        let asked = items(&test["alert_rule_test"]);
        assert_eq!(asked.len(), 1, "{rest}");
        assert_eq!(rest.split(':').next().unwrap(), string(&asked[0]["alertname"]), "{rest}");
        assert_eq!(items(&asked[0]["exp_alerts"]).is_empty(), kind == "quiet", "{rest}");
    }
    let groups = parse_yaml(&read(RULES)).unwrap().remove(0);
    let groups: Vec<_> = items(&groups["groups"]).iter().map(|group| &group["name"]).collect();
    let ordered: Vec<_> = items(&cases["group_eval_order"]).iter().collect();
    assert_eq!(ordered, groups, "{CASES}: group_eval_order names every group of {RULES} in its order");
    let (held, said, _) = promtool(&tool, |_| {}, |_| true);
    assert!(held, "{said}");

    // Each case asks for one alert alone, so all alerts can be broken at once.
    let broken = |kind: &str, expression: &str| {
        let replace = |rule: &mut Value| {
            if rule["alert"].is_string() {
                rule["expr"] = json!(expression);
            }
        };
        let (held, said, count) = promtool(&tool, replace, |name| name.starts_with(kind));
        assert!(!held);
        for name in names.iter().filter(|name| name.starts_with(kind)) {
            assert!(
                said.contains(&format!("name: {name},")),
                "with {expression} in place of its expression this case still holds: {name}\n{said}"
            );
        }
        assert_eq!(names.iter().filter(|name| name.starts_with(kind)).count(), count);
    };
    // With labels that any alert may want.
    let always = r#"label_replace(label_replace(vector(1), "job", "castier", "", ""), "instance", "castier-0", "", "")"#;
    broken("quiet", always);
    broken("fires", "vector(1) > 2");
}

#[test]
fn every_alert_says_what_it_should_and_its_recordings_are_used() {
    let Some(rules) = rules() else { return };
    let alerts: Vec<_> = rules.iter().filter(|rule| rule["alert"].is_string()).collect();
    assert!(alerts.len() >= 12);
    let names: BTreeSet<_> = alerts.iter().map(|alert| string(&alert["alert"])).collect();
    assert_eq!(names.len(), alerts.len(), "each name once");
    for alert in &alerts {
        let name = string(&alert["alert"]);
        let severity = string(&alert["labels"]["severity"]);
        assert!(["critical", "warning", "info"].contains(&severity), "{name}");
        assert!(!string(&alert["annotations"]["summary"]).is_empty(), "{name}");
        let description = string(&alert["annotations"]["description"]);
        assert!(description.contains("$value"), "{name}: the description has the value");
        assert_eq!(string(&alert["annotations"]["runbook_url"]), format!("{OPERATIONS}#{}", name.to_lowercase()), "{name}");
        let expression = string(&alert["expr"]);
        assert!(expression.contains("castier:") || expression.contains("job=\"castier"), "{name}: only our own jobs");
    }
    // A recording that nobody reads costs memory for nothing.
    let mut read_by = rules.iter().map(|rule| string(&rule["expr"]).to_owned()).collect::<Vec<_>>().join("\n");
    read_by += &expressions("prometheus").into_iter().map(|(_, expression)| expression).collect::<Vec<_>>().join("\n");
    for rule in rules.iter().filter(|rule| rule["record"].is_string()) {
        let name = string(&rule["record"]);
        assert!(series(&read_by).contains(name), "{RULES}: nothing reads {name}");
    }
}

// ---- the runbook ----

/// The sections of the operations manual, by their headings.
fn sections() -> BTreeMap<String, String> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    let mut heading = String::new();
    for line in read(OPERATIONS).lines() {
        if line.starts_with('#') {
            line.trim_start_matches('#').trim().clone_into(&mut heading);
        }
        let section = found.entry(heading.clone()).or_default();
        section.push_str(line);
        section.push('\n');
    }
    found
}

/// As Markdown makes it from a heading.
fn anchor(heading: &str) -> String {
    heading.to_lowercase().replace(' ', "-").chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
}

#[test]
fn every_alert_has_its_section_in_the_runbook_and_every_section_its_alert() {
    let Some(alerts) = alerts() else { return };
    let sections = sections();
    let names: BTreeSet<_> = alerts.iter().map(|alert| string(&alert["alert"]).to_owned()).collect();
    let told: BTreeSet<_> = sections.keys().filter(|heading| heading.starts_with("Castier")).cloned().collect();
    assert_eq!(names, told, "{OPERATIONS}, \"Runbook\": one section for each alert of {RULES}");
    for name in &names {
        let section = &sections[name];
        let mut at = 0;
        for part in ["What it means", "What clients notice", "How to look", "What to do"] {
            let label = format!("**{part}**:");
            let found = section[at..].find(&label).unwrap_or_else(|| panic!("{OPERATIONS}, {name}: say in its turn {label}"));
            at += found + label.len();
            let said = section[at..].split("\n**").next().unwrap().trim();
            assert!(said.len() >= 8, "{OPERATIONS}, {name}, {part}: {said:?}");
        }
    }
    // The table has each of them, with its severity.
    for alert in &alerts {
        let name = string(&alert["alert"]);
        let row = format!("| [{name}](#{}) | {} |", name.to_lowercase(), string(&alert["labels"]["severity"]));
        assert!(sections["Alerts"].contains(&row), "{OPERATIONS}, \"Alerts\": {row}");
    }
    let anchors: BTreeSet<_> = sections.keys().map(|heading| anchor(heading)).collect();
    for link in read(OPERATIONS).split("](#").skip(1).map(|rest| rest.split(')').next().unwrap().to_owned()) {
        assert!(anchors.contains(&link), "{OPERATIONS}: the link to #{link} leads nowhere");
    }
    // Panels lead there, too.
    for (file, dashboard) in dashboards() {
        for panel in panels(&dashboard) {
            for link in items(&panel["links"]) {
                if let Some(target) = string(&link["url"]).strip_prefix("${docs}#") {
                    assert!(anchors.contains(target), "{file}, {}: #{target} is not in {OPERATIONS}", panel["title"]);
                }
            }
        }
    }
}

// ---- dashboards ----

#[test]
fn the_dashboards_are_made_by_their_script_and_copied_for_kubernetes() {
    if let Some(python) = tool("python3") {
        let checked = run(Command::new(python).arg(root().join("scripts/dashboards")).arg("--check"), b"");
        assert!(checked.status.success(), "{}", text(&checked));
    }
    let copies = root().join("k8s/components/monitoring/dashboards");
    for (file, dashboard) in dashboards() {
        let copy = fs::read(copies.join(&file)).unwrap_or_else(|error| panic!("{file}: {error}; run scripts/monitoring.sh --write-rule"));
        assert_eq!(
            copy,
            fs::read(root().join("grafana/dashboards").join(&file)).unwrap(),
            "{file}: run scripts/monitoring.sh --write-rule"
        );
        assert!(
            read("k8s/components/monitoring/kustomization.yaml").contains(&format!("dashboards/{file}]")),
            "{file}: add it to kustomization.yaml"
        );
        assert_eq!(string(&dashboard["uid"]), format!("castier-{}", file.trim_end_matches(".json")));
    }
    assert_eq!(fs::read_dir(copies).unwrap().count(), dashboards().len(), "run scripts/monitoring.sh --write-rule");
    // The provider looks where compose.yaml mounts them.
    let Some(provider) = parse_yaml(&read("grafana/provisioning/dashboards/castier.yaml")) else { return };
    let path = string(&provider[0]["providers"][0]["options"]["path"]).to_owned();
    let compose = parse_yaml(&read("compose.yaml")).unwrap();
    let volumes = items(&compose[0]["services"]["grafana"]["volumes"]).to_vec();
    assert!(volumes.contains(&json!(format!("./grafana/dashboards:{path}:ro"))), "{volumes:?}");
    let sources = parse_yaml(&read("grafana/provisioning/datasources/castier.yaml")).unwrap();
    let kinds: BTreeSet<_> = items(&sources[0]["datasources"]).iter().map(|source| string(&source["type"])).collect();
    assert_eq!(kinds, ["loki", "prometheus"].into());
}

#[test]
fn grafana_takes_the_dashboards() {
    let (Some(node), Some(packages)) = (tool("node"), grafana_packages()) else { return };
    let script = root().join("proxy/tests/deploy/dashboards.mjs");
    let folder = root().join("grafana/dashboards");
    let files: Vec<_> = dashboards().into_iter().map(|(name, _)| folder.join(name)).collect();
    let told = run(Command::new(&node).arg(&script).arg(&packages).args(&files), b"");
    assert!(told.status.success(), "{}", text(&told));
    assert_eq!(text(&told).matches(" is sound").count(), files.len());
    // The LogQL of the manual, by the same grammar; and the check sees what it should.
    let mut wrong = dashboards().swap_remove(2).1;
    assert_eq!(wrong["uid"], "castier-logs");
    let panel = wrong["panels"].as_array_mut().unwrap().iter_mut().find(|panel| panel["type"] == "stat").unwrap();
    panel["options"]["colorMode"] = json!("loud");
    panel["fieldConfig"]["defaults"]["unti"] = json!("s");
    let mut target = panel["targets"][0].clone();
    let mut manual: Vec<_> =
        expressions("loki").into_iter().filter(|(file, _)| file == OPERATIONS).map(|(_, expression)| expression).collect();
    manual.push("{job=\"castier\"} | jsn | status >".to_owned());
    panel["targets"] = manual
        .iter()
        .map(|expression| {
            target["expr"] = json!(expression);
            target.clone()
        })
        .collect();
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("wrong.json");
    fs::write(&file, wrong.to_string()).unwrap();
    let told = run(Command::new(&node).arg(&script).arg(&packages).arg(&file), b"");
    assert!(!told.status.success());
    let said = text(&told);
    for fault in ["loud", "unti", "@grafana/schema 11", "@grafana/schema 13"] {
        assert!(said.contains(fault), "{fault}: {said}");
    }
    assert_eq!(said.matches("no LogQL").count(), 1, "{said}");
    assert!(said.contains("jsn"), "{said}");
}

#[test]
fn every_panel_says_what_it_shows_and_names_no_data_source() {
    for (file, dashboard) in dashboards() {
        assert_eq!(dashboard["schemaVersion"], 39, "{file}");
        assert!(dashboard["id"].is_null(), "{file}: Grafana gives it a number");
        let variables = items(&dashboard["templating"]["list"]);
        let variable = |name: &str| variables.iter().find(|variable| variable["name"] == name);
        for name in ["namespace", "node"] {
            let variable = variable(name).unwrap_or_else(|| panic!("{file}: no variable {name}"));
            // `.*` matches a label that is not there, too.
            assert_eq!(
                (&variable["type"], &variable["allValue"], &variable["includeAll"]),
                (&json!("query"), &json!(".*"), &json!(true)),
                "{file}, {name}"
            );
        }
        let mut ids = BTreeSet::new();
        for panel in items(&dashboard["panels"]) {
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{file}: the id {} twice", panel["id"]);
        }
        let mut taken = BTreeMap::new();
        for panel in items(&dashboard["panels"]) {
            let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
            assert!(at("x") + at("w") <= 24, "{file}: {}", panel["title"]);
            for (x, y) in (at("x")..at("x") + at("w")).flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y))) {
                let other = taken.insert((x, y), panel["title"].clone());
                assert!(other.is_none(), "{file}: {} lies over {other:?}", panel["title"]);
            }
        }
        for panel in panels(&dashboard) {
            let what = format!("{file}, {}", panel["title"]);
            assert!(string(&panel["description"]).len() > 10, "{what}: say what it shows");
            assert!(!string(&panel["fieldConfig"]["defaults"]["unit"]).is_empty(), "{what}");
            assert!(!items(&panel["fieldConfig"]["defaults"]["thresholds"]["steps"]).is_empty(), "{what}");
            assert!(!items(&panel["targets"]).is_empty(), "{what}");
            for source in items(&panel["targets"]).iter().map(|target| &target["datasource"]).chain([&panel["datasource"]]) {
                let (uid, kind) = (string(&source["uid"]), string(&source["type"]));
                assert!([("${datasource}", "prometheus"), ("${loki}", "loki")].contains(&(uid, kind)), "{what}: {source}");
                let name = uid.trim_start_matches("${").trim_end_matches('}');
                assert_eq!(variable(name).unwrap_or_else(|| panic!("{what}: no variable {name}"))["query"], kind, "{what}");
            }
            let links: Vec<_> = items(&panel["links"]).iter().map(|link| string(&link["url"])).collect();
            let metrics = panel["datasource"]["type"] == "prometheus";
            assert_eq!(links.iter().any(|url| url.starts_with("/d/castier-logs?")), metrics, "{what}: metrics lead to the records");
            if metrics {
                assert!(links.iter().any(|url| url.starts_with("${docs}#")), "{what}: leads to the runbook");
            }
            for target in items(&panel["targets"]) {
                let expression = string(&target["expr"]);
                for name in
                    expression.split('$').skip(1).map(|rest| rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap())
                {
                    assert!(name.starts_with("__") || variable(name).is_some(), "{what}: nobody knows ${name}");
                }
                if metrics && expression.contains("rate(") {
                    assert!(
                        expression.contains("$__rate_interval]") || expression.contains("$__range]"),
                        "{what}: a window of its own: {expression}"
                    );
                }
            }
        }
    }
    // The first row of the first dashboard is the eight questions, in numbers.
    let (_, overview) = dashboards().into_iter().find(|(file, _)| file == "overview.json").unwrap();
    let first: Vec<_> = items(&overview["panels"])[1..]
        .iter()
        .take_while(|panel| panel["type"] != "row")
        .map(|panel| (string(&panel["type"]), string(&panel["title"])))
        .collect();
    assert_eq!(first.len(), 8);
    assert!(first.iter().all(|(kind, title)| *kind == "stat" && title.ends_with('?')), "{first:?}");
    let manual = &sections()["The eight questions"];
    for (_, title) in first {
        let question = format!("**{}", title.trim_end_matches('?'));
        assert!(manual.contains(&question), "{OPERATIONS}, \"The eight questions\": {title}");
    }
}

#[test]
fn every_series_is_on_a_dashboard_or_in_an_alert() {
    let Some(rules) = rules() else { return };
    let mut shown = rules.iter().map(|rule| string(&rule["expr"]).to_owned()).collect::<Vec<_>>().join("\n");
    for (file, expression) in expressions("prometheus") {
        if file != OPERATIONS {
            shown += "\n";
            shown += &expression;
        }
    }
    let used: BTreeSet<String> = series(&shown)
        .into_iter()
        .map(|name| ["_bucket", "_count", "_sum"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(&name).to_owned())
        .collect();
    let sections = sections();
    let mut documented = BTreeSet::new();
    for section in ["Metrics of castier", "Metrics of castier-origin"] {
        for row in sections[section].lines().filter(|line| line.starts_with("| `")) {
            documented.extend(series(row.split('|').nth(1).unwrap()));
        }
    }
    assert!(documented.len() > 40, "{documented:?}");
    let dark: Vec<_> = documented.difference(&used).collect();
    assert!(dark.is_empty(), "on no dashboard and in no alert: {dark:?}");
    let unknown: Vec<_> = used.difference(&documented).filter(|name| !name.contains(':')).collect();
    assert!(unknown.is_empty(), "not in {OPERATIONS}: {unknown:?}");
}

/// What LogQL names beside the labels of streams: the fields of records.
pub(crate) fn fields(logql: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    // Without the texts in quotes, so that only names are left.
    let mut bare = String::new();
    let mut quote = None;
    for c in logql.chars() {
        match quote {
            Some(end) if c == end => quote = None,
            Some(_) => {}
            None if c == '"' || c == '`' => {
                quote = Some(c);
                bare.push('0');
            }
            None => bare.push(c),
        }
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    for (at, _) in bare.match_indices(['=', '<', '>', '!']) {
        let before = bare[..at].trim_end_matches(['=', '!', '<', '>', '~', ' ']);
        let name = &before[before.rfind(|c| !is_name(c)).map_or(0, |last| last + 1)..];
        found.insert(name.to_owned());
    }
    for list in bare.split(" by (").skip(1) {
        found.extend(list.split(')').next().unwrap().split(',').map(|name| name.trim().to_owned()));
    }
    found.extend(bare.split("unwrap ").skip(1).map(|rest| rest.split(|c| !is_name(c)).next().unwrap().to_owned()));
    found.retain(|name| name.starts_with(|c: char| c.is_ascii_lowercase()) && !STREAM_LABELS.contains(&name.as_str()));
    found
}

#[test]
fn the_fields_of_a_query_are_found() {
    let found = fields(
        r#"topk(20, sum by (path, level) (max_over_time({job=~"a=b"} |= `c=d` | json | status >= 500 or error!="" | unwrap bytes | __error__="" [5m])))"#,
    );
    assert_eq!(found, ["bytes", "error", "path", "status"].map(str::to_owned).into());
}

#[test]
fn kustomize_makes_a_config_map_of_each_dashboard() {
    let Some(kubectl) = tool("kubectl") else { return };
    let yaml = stdout(Command::new(kubectl).arg("kustomize").arg(root().join("k8s/components/monitoring")), b"");
    let Some(objects) = parse_yaml(&yaml) else { return };
    let maps: Vec<_> = objects.iter().filter(|object| object["kind"] == "ConfigMap").collect();
    assert_eq!(maps.len(), dashboards().len());
    for (file, dashboard) in dashboards() {
        let name = format!("castier-dashboard-{}", file.trim_end_matches(".json"));
        let map = maps.iter().find(|map| map["metadata"]["name"] == name.as_str()).unwrap_or_else(|| panic!("no ConfigMap {name}"));
        assert_eq!(map["metadata"]["labels"]["grafana_dashboard"], "1", "{name}: the sidecar loads what has this label");
        let held: Value = serde_json::from_str(string(&map["data"][&file])).unwrap();
        assert_eq!(held, dashboard, "{name}");
    }
}
