//! The tools, and how they are run.

use serde_json::Value;
use std::{
    env, fs,
    io::Write,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The top of the project.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The directory of the built programs.
pub(crate) fn bin() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_castier")).parent().unwrap()
}

/// Where `scripts/setup-tests` has installed what it could. Runs it once.
fn installed() -> &'static Path {
    static TOOLS: OnceLock<PathBuf> = OnceLock::new();
    TOOLS.get_or_init(|| {
        let target = bin().parent().unwrap();
        let setup = Command::new(root().join("scripts/setup-tests")).env("CARGO_TARGET_DIR", target).stdin(Stdio::null()).output().unwrap();
        // Past the test's own capture: a tool that is missing should be seen.
        std::io::stderr().write_all(&setup.stderr).unwrap();
        assert!(setup.status.success(), "scripts/setup-tests: {setup:?}");
        target.join("test-tools")
    })
}

/// The program of that name: installed for these tests, or the machine's own. None, after saying so, if there is none.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let folders = [installed().join("venv/bin"), installed().join("bin")].into_iter();
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = folders.chain(env::split_paths(&path)).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()));
    if found.is_none() {
        skipped(&format!("there is no {name} on this machine"));
    }
    found
}

/// The folder of the packages from npm. None, after saying so, if they could not be installed.
pub(crate) fn node_packages() -> Option<PathBuf> {
    let folder = installed().join("node");
    let there = installed().join("node.done").is_file();
    if !there {
        skipped("the schemas of the Gateway API and the Prometheus operator could not be installed");
    }
    there.then_some(folder)
}

/// The folder of what Grafana publishes about its dashboards, one folder for each version. None, after saying so, if it could not be installed.
pub(crate) fn grafana_packages() -> Option<PathBuf> {
    let folder = installed().join("grafana");
    let there = installed().join("grafana.done").is_file();
    if !there {
        skipped("the types of Grafana's dashboards could not be installed");
    }
    there.then_some(folder)
}

/// Python with the packages that `scripts/setup-tests` installs. None, after saying so, if there is none.
pub(crate) fn python() -> Option<PathBuf> {
    let python = installed().join("venv/bin/python");
    let there = python.is_file();
    if !there {
        skipped("the packages for Python could not be installed");
    }
    there.then_some(python)
}

/// Says, past the test's own capture, that a check was left out.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {test}: {why}");
}

/// Runs a command to its end, with these bytes as its input.
pub(crate) fn run(command: &mut Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // In a thread of its own, as the command may write before it has read everything. A command that reads nothing is no error.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

/// Both outputs of a command.
pub(crate) fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The standard output of a command that must succeed.
pub(crate) fn stdout(command: &mut Command, input: &[u8]) -> String {
    let output = run(command, input);
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The documents of a YAML file, by the parser that came with `kubernetes-validate`.
pub(crate) fn parse_yaml(yaml: &str) -> Option<Vec<Value>> {
    let python = installed().join("venv/bin/python");
    if !python.is_file() {
        skipped("there is no YAML parser");
        return None;
    }
    let program = "import json, sys, yaml; json.dump([d for d in yaml.safe_load_all(sys.stdin) if d], sys.stdout, default=str)";
    let json = stdout(Command::new(python).args(["-c", program]), yaml.as_bytes());
    Some(serde_json::from_str(&json).unwrap())
}

/// Asks until there is an answer, for at most half a minute.
pub(crate) fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "timed out: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The same command, which a SIGINT reaches: where the tests run as a shell's background job, what they start ignores it.
pub(crate) fn interruptible(command: &Command) -> Command {
    let mut with_default = Command::new("/usr/bin/env");
    with_default.arg("--default-signal=INT").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => with_default.env(name, value),
            None => with_default.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        with_default.current_dir(dir);
    }
    with_default
}

/// A program that runs until this is dropped, in a directory of its own.
pub(crate) struct Running {
    child: Child,
    dir: TempDir,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let dir = TempDir::new().unwrap();
        let log = || fs::File::options().create(true).append(true).open(dir.path().join("log")).unwrap();
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(log()).stderr(log());
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child, dir }
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The address that the program names behind this text.
    pub(crate) fn address(&mut self, prefix: &str) -> SocketAddr {
        eventually(prefix, || {
            let log = self.log();
            assert!(!self.ended(), "it ended: {log}");
            log.lines().find_map(|line| line.split_once(prefix)?.1.split([' ', ',', '"']).next()?.parse().ok())
        })
    }

    pub(crate) fn wait_for(&mut self, address: SocketAddr) {
        eventually("a listener", || {
            assert!(!self.ended(), "it ended: {}", self.log());
            TcpStream::connect(address).ok()
        });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGTERM first: nginx ends its workers then, and leaves them behind when it is killed.
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
