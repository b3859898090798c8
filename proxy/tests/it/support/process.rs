//! Real processes, on free ports.

use super::{DEADLINE, Request, eventually};
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};
use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::Once,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// Raises the limit of file descriptors for a thousand clients, in this process and the castier that inherits it.
fn raise_limits() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit).unwrap();
    });
}

/// A process in its own directory, with its output in files there. Killed on drop.
struct Process {
    child: Child,
    dir: TempDir,
}

impl Process {
    fn spawn(mut command: Command, dir: TempDir) -> Self {
        raise_limits();
        let file = |name: &str| File::options().create(true).append(true).open(dir.path().join(name)).unwrap();
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        let child = command.spawn().unwrap_or_else(|e| panic!("{:?}: {e}. Build the whole workspace first.", command.get_program()));
        Self { child, dir }
    }

    fn output(&self) -> String {
        ["stdout", "stderr"].map(|name| fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()).join("\n")
    }

    /// The address of a listener, from the process's standard output after `prefix`.
    async fn listener(&mut self, prefix: &str) -> SocketAddr {
        eventually(&format!("a line {prefix:?}"), async || {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended with {status} instead of listening");
            }
            // The last one, since a process that was restarted in the same directory prints it again.
            let output = fs::read_to_string(self.dir.path().join("stdout")).unwrap();
            let behind = output.lines().rev().find_map(|line| line.split(prefix).nth(1))?;
            output.ends_with('\n').then(|| behind.split([' ', '"']).next()?.parse().ok())?
        })
        .await
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    async fn exit(&mut self) -> ExitStatus {
        eventually("the process' end", async || self.child.try_wait().unwrap()).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if std::thread::panicking() {
            let output = self.output();
            let from = output.len().saturating_sub(8000);
            let from = (from..output.len()).find(|&at| output.is_char_boundary(at)).unwrap_or(0);
            println!("---- {:?} said, at the end:\n{}", self.dir.path(), &output[from..]);
        }
    }
}

/// A running castier.
pub(crate) struct Castier {
    process: Process,
    pub(crate) public: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Castier {
    /// Starts castier in front of `origin`, with further lines of TOML (with dotted keys, in any order). Waits until it is ready.
    pub(crate) async fn start(origin: &str, config: &str) -> Self {
        Self::start_with(origin, config, &[]).await
    }

    pub(crate) async fn start_with(origin: &str, config: &str, env: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("castier.toml");
        fs::write(&path, config_text(origin, config)).unwrap();
        let mut command = Command::new(Self::program());
        command.arg("--config").arg(&path).envs(env.iter().copied());
        Self::run(command, dir).await
    }

    /// Starts castier with any command line.
    pub(crate) async fn run(command: Command, dir: TempDir) -> Self {
        let mut process = Process::spawn(command, dir);
        let public = process.listener("listening public ").await;
        let admin = process.listener("listening admin ").await;
        eventually("castier is ready", async || (Request::get("/readyz").send(admin).await.status == 200).then_some(())).await;
        Self { process, public, admin }
    }

    /// Sets how far its files may be written, in bytes. Returns what it was before; `None`: no limit.
    pub(crate) fn limit_file_sizes(&self, bytes: Option<u64>) -> Option<u64> {
        let limit = Rlimit { current: bytes, maximum: getrlimit(Resource::Fsize).maximum };
        prlimit(Some(Pid::from_child(&self.process.child)), Resource::Fsize, limit).unwrap().current
    }

    pub(crate) fn program() -> &'static str {
        env!("CARGO_BIN_EXE_castier")
    }

    /// Runs it to its end, for command lines that do not serve.
    pub(crate) fn once(configure: impl FnOnce(&mut Command, &Path)) -> Output {
        let dir = TempDir::new().unwrap();
        let mut command = Command::new(Self::program());
        command.current_dir(dir.path()).stdin(Stdio::null());
        configure(&mut command, dir.path());
        // A process that does not end must fail the test, and not hang it.
        let mut bounded = Command::new("timeout");
        bounded.arg(DEADLINE.as_secs().to_string()).arg(command.get_program()).args(command.get_args()).current_dir(dir.path());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => bounded.env(name, value),
                None => bounded.env_remove(name),
            };
        }
        bounded.stdin(Stdio::null()).output().unwrap()
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.process.dir.path().join("castier.toml")
    }

    pub(crate) fn dir(&self) -> &Path {
        self.process.dir.path()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub(crate) async fn exit(&mut self) -> ExitStatus {
        self.process.exit().await
    }

    /// Its standard output and standard error so far.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    /// A field of `/proc/PID/status` in bytes: `VmRSS` is the current memory, `VmHWM` the peak.
    pub(crate) fn memory(&self, figure: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':')).expect("a line of /proc/*/status");
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// The number of its open file descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.process.child.id())).unwrap().count()
    }

    /// Its open files below `dir`, including those without a name.
    pub(crate) fn files(&self, dir: &Path) -> Vec<File> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.process.child.id())).unwrap().flatten().map(|fd| fd.path());
        let below = open.filter(|fd| fs::read_link(fd).is_ok_and(|path| path.starts_with(dir)));
        below.filter_map(|fd| File::open(fd).ok()).filter(|file| file.metadata().is_ok_and(|meta| meta.is_file())).collect()
    }
}

/// A configuration on free ports, in front of `origin`.
pub(crate) fn config_text(origin: &str, more: &str) -> String {
    format!("listen.public = \"127.0.0.1:0\"\nlisten.admin = \"127.0.0.1:0\"\norigin.url = \"{origin}\"\n{more}\n")
}

/// The real origin. It can be killed, and started again with the same files and port.
pub(crate) struct RealOrigin {
    process: Process,
    /// Further configuration.
    env: Vec<(String, String)>,
    /// The directory of the store. It stays when the process ends.
    root: TempDir,
    pub(crate) addr: SocketAddr,
}

/// The real origin, for tests of its process.
pub(crate) struct BareOrigin(Process);

impl BareOrigin {
    /// The number of its open file descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.0.child.id())).unwrap().count()
    }
}

impl RealOrigin {
    /// Starts it with any command line. Returns its public and admin addresses too.
    pub(crate) async fn bare(command: Command) -> (BareOrigin, SocketAddr, SocketAddr) {
        let mut process = Process::spawn(command, TempDir::new().unwrap());
        let public = process.listener("listening public ").await;
        let admin = process.listener("listening admin ").await;
        (BareOrigin(process), public, admin)
    }

    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts it with a configuration in environment variables.
    pub(crate) async fn start_with(env: &[(&str, &str)]) -> Self {
        let root = TempDir::new().unwrap();
        let env: Vec<_> = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let (process, addr) = Self::spawn(root.path(), "127.0.0.1:0", &env).await;
        Self { process, env, root, addr }
    }

    /// Its output so far.
    pub(crate) fn output(&self) -> String {
        self.process.output()
    }

    async fn spawn(root: &Path, listen: &str, env: &[(String, String)]) -> (Process, SocketAddr) {
        let mut command = Command::new(Path::new(Castier::program()).with_file_name("castier-origin"));
        command.arg("--listen").arg(listen).arg("--root").arg(root).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
        command.envs(env.iter().map(|(name, value)| (name, value)));
        let mut process = Process::spawn(command, TempDir::new().unwrap());
        let addr = process.listener("listening public ").await;
        (process, addr)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The bytes of uploads in progress.
    pub(crate) fn unfinished(&self) -> u64 {
        let files = fs::read_dir(self.root.path().join("tmp")).unwrap();
        files.filter_map(|file| file.unwrap().metadata().ok()).map(|file| file.len()).sum()
    }

    /// kill -9.
    pub(crate) async fn kill(&mut self) {
        self.process.signal(Signal::KILL);
        self.process.exit().await;
    }

    /// Sends SIGTERM, and waits until it has ended.
    pub(crate) async fn terminate(&mut self) -> ExitStatus {
        self.process.signal(Signal::TERM);
        self.process.exit().await
    }

    pub(crate) async fn restart(&mut self) {
        (self.process, self.addr) = Self::spawn(self.root.path(), &self.addr.to_string(), &self.env).await;
    }
}
