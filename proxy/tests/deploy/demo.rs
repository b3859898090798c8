//! `scripts/demo`, with the real nginx and the real Prometheus.

use crate::tools::{bin, eventually, interruptible, read, root, run, stdout, text, tool};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::{fs::symlink, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// `scripts/demo` with its files in `dir`. None, after saying so, without the programs that it needs.
fn demo(dir: &Path, args: &[&str]) -> Option<Command> {
    let (python, _, _) = (tool("python3")?, tool("nginx")?, tool("prometheus")?);
    let mut command = Command::new(python);
    command.arg(root().join("scripts/demo")).args(args).env("TMPDIR", dir).env("DEMO_NO_BUILD", "1");
    command.env("CARGO_TARGET_DIR", bin().parent().unwrap()).stdin(Stdio::null());
    Some(command)
}

/// What is left of a demo: files in its directory, and processes that were started there.
fn left(dir: &Path) -> Vec<String> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path().display().to_string());
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let process = entry.unwrap().path();
        let works_in = fs::read_link(process.join("cwd")).ok()?;
        let name = fs::read_to_string(process.join("comm")).ok()?;
        works_in.starts_with(dir).then(|| format!("process {} {}", process.display(), name.trim()))
    });
    files.chain(processes).collect()
}

#[test]
fn each_fault_of_the_demo_raises_its_alert_and_no_client_notices() {
    faults(&[]);
    // The same with a bucket takes as long again.
    if std::env::var_os("TEST_FULL").is_some() && tool("weed").is_some() {
        faults(&["--store"]);
    }
}

fn faults(more: &[&str]) {
    let dir = TempDir::new().unwrap();
    let Some(mut demo) = demo(dir.path(), &[&["--for", "60s", "--check"], more].concat()) else { return };
    let start = Instant::now();
    let output = run(&mut demo, b"");
    let told = text(&output);
    assert!(output.status.success(), "{told}");
    // A minute, the start and the end, and what a busy machine adds.
    assert!(start.elapsed() < Duration::from_secs(150), "{:?}: {told}", start.elapsed());
    for fault in ["the origin is stopped", "a node is killed", "the origin lies"] {
        assert!(told.contains(&format!("demo: {fault}: Prometheus raised Castier")), "{fault}: {told}");
    }
    assert!(told.contains(", 0 problems"), "{told}");
    assert_eq!(left(dir.path()), Vec::<String>::new(), "{told}");
}

/// A demo in a process group of its own, as a terminal has it.
struct Shown {
    child: Child,
    dir: TempDir,
}

impl Shown {
    fn start() -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let mut command = interruptible(&demo(dir.path(), &[])?);
        let log = || fs::File::options().create(true).append(true).open(dir.path().with_extension("log")).unwrap();
        let child = command.process_group(0).stdout(log()).stderr(log()).spawn().unwrap();
        Some(Self { child, dir })
    }

    fn log(&self) -> PathBuf {
        self.dir.path().with_extension("log")
    }

    fn ends_cleanly(mut self, when: &str) {
        let status = eventually("the demo's end", || self.child.try_wait().unwrap());
        let told = fs::read_to_string(self.log()).unwrap();
        assert_eq!(status.code(), Some(0), "{when}: {told}");
        assert!(told.ends_with("demo: told to end\n"), "{when}: {told}");
        assert_eq!(left(self.dir.path()), Vec::<String>::new(), "{when}: {told}");
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
        let _ = fs::remove_file(self.log());
    }
}

#[test]
fn ctrl_c_and_sigterm_leave_nothing_whenever_they_come() {
    // What it says at the moment, and whether all processes of the terminal get the signal, as with Ctrl-C.
    for (when, ctrl_c) in [
        ("starting origin", true),
        ("starting node-2", false),
        ("starting prometheus", true),
        ("storing ", false),
        ("FAULT: the origin is stopped", true),
        ("Prometheus raised ", false),
    ] {
        let Some(shown) = Shown::start() else { return };
        eventually(when, || fs::read_to_string(shown.log()).unwrap().contains(when).then_some(()));
        let pid = Pid::from_child(&shown.child);
        if ctrl_c {
            kill_process_group(pid, Signal::INT).unwrap();
            // A second one, of somebody who does not wait.
            let _ = kill_process_group(pid, Signal::INT);
        } else {
            kill_process(pid, Signal::TERM).unwrap();
        }
        shown.ends_cleanly(when);
    }
}

#[test]
fn the_demo_explains_itself_and_refuses_what_makes_no_sense() {
    let dir = TempDir::new().unwrap();
    let Some(mut help) = demo(dir.path(), &["--help"]) else { return };
    let told = stdout(&mut help, b"");
    assert!(told.contains("scripts/demo --for 60s --check") && told.contains("--port") && told.contains("--store"), "{told}");
    for (args, says) in [
        (&["--check"][..], "--for 60s"),
        (&["--check", "--for", "40s"], "--for 60s"),
        (&["--for", "5s"], "20s"),
        (&["--for", "soon"], "30s, 10m"),
        (&["--port", "70000"], "--port"),
        (&["--surprise"], "--surprise"),
    ] {
        let output = run(&mut demo(dir.path(), args).unwrap(), b"");
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output));
        assert!(text(&output).lines().last().unwrap().contains(says), "{args:?}: {}", text(&output));
    }
    // A port that is taken is named.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = run(&mut demo(dir.path(), &["--port", &port]).unwrap(), b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains(&format!("demo: port {port} is taken")), "{}", text(&output));
    assert_eq!(left(dir.path()), Vec::<String>::new());
}

#[test]
fn the_demo_names_each_missing_tool() {
    let dir = TempDir::new().unwrap();
    let Some(mut demo) = demo(dir.path(), &[]) else { return };
    // Of nginx there may be one in /usr/sbin, where it looks too.
    let tools = TempDir::new().unwrap();
    symlink(tool("true").unwrap(), tools.path().join("nginx")).unwrap();
    let output = run(demo.env("PATH", tools.path()), b"");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    let told = text(&output);
    assert!(told.starts_with("demo: prometheus is not installed; ") && told.lines().count() == 1, "{told}");
    assert_eq!(left(dir.path()), Vec::<String>::new());
}

// ---- nginx as the Ingress configures it ----

/// What the controller makes of each annotation, by its documentation: the directive, and the unit that it adds.
const DIRECTIVES: [(&str, &str, &str); 11] = [
    ("proxy-body-size", "client_max_body_size", ""),
    ("proxy-request-buffering", "proxy_request_buffering", ""),
    ("proxy-buffering", "proxy_buffering", ""),
    ("proxy-max-temp-file-size", "proxy_max_temp_file_size", ""),
    ("proxy-http-version", "proxy_http_version", ""),
    ("proxy-connect-timeout", "proxy_connect_timeout", "s"),
    ("proxy-read-timeout", "proxy_read_timeout", "s"),
    ("proxy-send-timeout", "proxy_send_timeout", "s"),
    ("proxy-next-upstream", "proxy_next_upstream", ""),
    ("proxy-next-upstream-tries", "proxy_next_upstream_tries", ""),
    ("proxy-next-upstream-timeout", "proxy_next_upstream_timeout", ""),
];

/// The directives of an nginx.conf that stand alone on a line.
fn directives(conf: &str) -> BTreeMap<String, String> {
    let lines = conf.lines().filter_map(|line| line.trim().strip_suffix(';')?.split_once(' '));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn nginx_in_the_demo_is_what_the_ingress_asks_for() {
    let Some(python) = tool("python3") else { return };
    let manifest = read("k8s/components/ingress-nginx/ingress.yaml");
    let prefix = "nginx.ingress.kubernetes.io/";
    let annotations: BTreeMap<_, _> = manifest
        .lines()
        .filter_map(|line| line.trim().strip_prefix(prefix)?.split_once(": "))
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect();
    assert_eq!(annotations.len(), manifest.matches(prefix).count(), "an annotation could not be read");
    let mut command = Command::new(python);
    command.arg(root().join("scripts/ingress.py")).args(["--listen", "127.0.0.1:1", "--dir", "/nowhere", "127.0.0.1:2", "127.0.0.1:3"]);
    let conf = stdout(&mut command, b"");
    let demo = directives(&conf);
    // compose.yaml does without Kubernetes, and promises the same. There a second is written as one.
    let compose = directives(&read("config/compose/nginx.conf"));
    for (name, value) in &annotations {
        let (_, directive, unit) =
            DIRECTIVES.iter().find(|(annotation, ..)| annotation == name).unwrap_or_else(|| panic!("what does nginx make of {name}?"));
        assert_eq!(demo.get(*directive), Some(&format!("{value}{unit}")), "{name}");
        let in_compose = compose.get(*directive).unwrap_or_else(|| panic!("config/compose/nginx.conf lacks {directive}"));
        assert_eq!(in_compose.trim_end_matches('s'), *value, "config/compose/nginx.conf: {directive}");
        let line = format!("# {prefix}{name}: {value}\n            {directive} ");
        assert!(conf.contains(&line), "the annotation stands in front of its directive: {line}");
    }
    for node in ["127.0.0.1:2", "127.0.0.1:3"] {
        assert!(conf.contains(&format!("server {node} ")), "{conf}");
    }
    assert!(!["ANNOTATIONS", "SERVERS", "LISTEN", "DIR", "USER"].iter().any(|part| conf.contains(part)), "{conf}");
    // Time-outs of idle connections are the controller's default, and castier keeps them open for longer.
    assert_eq!(demo["keepalive_timeout"], "60s");
}
