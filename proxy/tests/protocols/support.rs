//! What all modules need: processes, a counting server in front of a real one, a small HTTP client, castier.
//!
//! Everything is blocking: the clients are programs, and the servers of these tests answer each connection in a thread of its own.

use rustix::{
    net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt::set_socket_reuseaddr},
    process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, kill_process_group, prlimit},
};
use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{self, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::{
        fd::OwnedFd,
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, Once, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// The default deadline. It is generous: it turns a hang into a failure, and does not measure speed.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// The deadline of a program that is run to its end, in seconds.
const PROGRAM_SECONDS: &str = "300";

/// The longest time to hold a turn: several times the longest test on two busy cores.
const LONGEST_TURN: Duration = Duration::from_secs(900);

// ---- one test at a time ----

static TURN: Mutex<()> = Mutex::new(());

/// The right to run a test. A test that holds it for too long ends the whole run, since other tests would wait for it for ever.
pub(crate) struct Turn {
    _turn: MutexGuard<'static, ()>,
    _alarm: mpsc::Sender<()>,
}

/// Every test takes a turn: real programs need the whole machine.
pub(crate) fn turn() -> Turn {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Report a failure at once: the harness reports it only when the test ends, which it may never do.
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            uncaptured(&format!("{:?}: {panic}\n", thread::current().name()));
            usual(panic);
        }));
    });
    // A test that failed has poisoned it. Its processes are gone all the same.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let (alarm, ended) = mpsc::channel::<()>();
    let test = thread::current().name().unwrap_or_default().to_owned();
    thread::spawn(move || {
        if ended.recv_timeout(LONGEST_TURN) == Err(mpsc::RecvTimeoutError::Timeout) {
            uncaptured(&format!("{test} has not ended within {LONGEST_TURN:?}: the run is given up\n"));
            std::process::abort();
        }
    });
    Turn { _turn: turn, _alarm: alarm }
}

/// Prints directly, since the harness holds back a test's output until the test has ended.
fn uncaptured(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Says visibly that a test, or a part of it, is left out.
pub(crate) fn skip(reason: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    uncaptured(&format!("SKIPPED: {test}: {reason}\n"));
    assert!(env::var_os("TEST_SKIP").is_none_or(|value| value != "fail"), "nothing may be skipped");
}

/// Polls until there is a value. Panics after the deadline.
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- programs ----

/// castier's program: the one that `CASTIER_BIN` names, or else the one that was built with these tests.
pub(crate) fn castier_program() -> PathBuf {
    let named = env::var_os("CASTIER_BIN").or_else(|| option_env!("CARGO_BIN_EXE_castier").map(Into::into));
    named.expect("CASTIER_BIN names castier's program").into()
}

/// Where `scripts/setup-tests` installs what is no package of the distribution. `CASTIER_TEST_TOOLS` may name another folder.
pub(crate) fn tools() -> PathBuf {
    let beside = || castier_program().parent().and_then(Path::parent).unwrap_or(Path::new(".")).join("test-tools");
    env::var_os("CASTIER_TEST_TOOLS").map_or_else(beside, Into::into)
}

/// The program of that name, from `tools()` or the machine. None, after saying so, if there is none.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let own = ["bin", "venv/bin"].map(|folder| tools().join(folder)).into_iter();
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = own.chain(env::split_paths(&path)).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()));
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

/// A program in a directory, without this machine's settings for it: only `PATH` stays, and `HOME` is the directory.
pub(crate) fn command(program: impl AsRef<OsStr>, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default()).env("HOME", dir).env("LC_ALL", "C.UTF-8");
    command.current_dir(dir);
    command
}

/// How a program ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    what: String,
}

impl Ran {
    pub(crate) fn success(&self) -> bool {
        self.status.success()
    }

    /// It must have succeeded. Returns what it wrote on its standard output.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.success(), "{self}");
        self.stdout
    }

    /// It must have failed. Returns both its outputs.
    #[track_caller]
    pub(crate) fn fails(self) -> String {
        assert!(!self.success(), "it should have failed: {self}");
        assert_ne!(self.status.code(), Some(124), "it should have failed in time: {self}");
        self.said()
    }

    /// Both its outputs.
    pub(crate) fn said(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let signal = self.status.signal().map(|signal| format!(" (signal {signal})")).unwrap_or_default();
        write!(f, "{}: {}{signal}\n{}\n{}", self.what, self.status, end_of(&self.stdout), end_of(&self.stderr))
    }
}

/// Runs a program to its end, with a deadline.
pub(crate) fn run(command: &mut Command) -> Ran {
    let mut bounded = bounded(command);
    let output = bounded.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ran { status: output.status, stdout, stderr, what: format!("{command:?}") }
}

/// The command under `timeout`, as a program that does not end must fail the test, and not hang it.
fn bounded(command: &Command) -> Command {
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after=5", PROGRAM_SECONDS]).arg(command.get_program()).args(command.get_args());
    // All commands come from `command()`, so the environment is as listed.
    bounded.env_clear();
    bounded.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(dir) = command.get_current_dir() {
        bounded.current_dir(dir);
    }
    bounded
}

fn end_of(text: &str) -> &str {
    let from = text.len().saturating_sub(8000);
    &text[(from..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(0)..]
}

/// A program that runs until this is dropped, with all that it has started. If the test fails, its output is shown.
pub(crate) struct Running {
    child: Child,
    name: String,
    log: TempDir,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let log = TempDir::new().unwrap();
        let file = || File::options().create(true).append(true).open(log.path().join("log")).unwrap();
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(file()).stderr(file()).process_group(0);
        let child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { child, name, log }
    }

    /// What it wrote so far, on both outputs.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log.path().join("log")).unwrap()).into_owned()
    }

    fn assert_runs(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} ended with {status}: {}", self.name, end_of(&self.log()));
        }
    }

    /// Waits until it accepts connections.
    pub(crate) fn listens(&mut self, addr: SocketAddr) {
        eventually(&format!("{} listens", self.name), || {
            self.assert_runs();
            TcpStream::connect(addr).ok()
        });
    }

    /// Waits for a value that `probe` finds in what it wrote.
    pub(crate) fn says<T>(&mut self, what: &str, probe: impl Fn(&str) -> Option<T>) -> T {
        eventually(&format!("{} says {what}", self.name), || {
            self.assert_runs();
            probe(&self.log())
        })
    }

    fn signal(&self, signal: Signal) {
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Ends it, with all that it has started.
    pub(crate) fn stop(&mut self) {
        self.signal(Signal::TERM);
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            println!("---- {} said, at the end:\n{}", self.name, end_of(&self.log()));
        }
    }
}

// ---- castier ----

/// A running castier, on free ports, with its data in a directory of its own.
pub(crate) struct Castier {
    process: Running,
    pub(crate) dir: TempDir,
    /// The address for clients.
    pub(crate) public: SocketAddr,
    pub(crate) admin: SocketAddr,
}

/// Starts castier with these lines of configuration. Top-level keys come first, then tables. The addresses, and an embedded origin unless `origin.url`
/// is there, are added.
pub(crate) fn castier(config: &str) -> Castier {
    castier_with(config, &[])
}

/// The same with these variables in its environment.
pub(crate) fn castier_with(config: &str, variables: &[(&str, String)]) -> Castier {
    Castier::start(TempDir::new().unwrap(), "127.0.0.1:0", config, variables)
}

/// Starts castier with a whole configuration, as somebody would write it. Only its addresses and its origin are others, and its log tells of requests.
pub(crate) fn castier_as_written(config: &str) -> Castier {
    let variables = [
        ("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"),
        ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0"),
        ("CASTIER_ORIGIN__URL", "embedded:./origin"),
        ("CASTIER_LOG__LEVEL", "info"),
    ];
    Castier::start_as_written(TempDir::new().unwrap(), config, &variables.map(|(name, value)| (name, value.to_owned())))
}

impl Castier {
    fn start(dir: TempDir, public: &str, config: &str, variables: &[(&str, String)]) -> Self {
        let mut text = format!("listen.public = \"{public}\"\nlisten.admin = \"127.0.0.1:0\"\n");
        if !config.contains("origin.url") {
            text.push_str("origin.url = \"embedded:./origin\"\n");
        }
        text.push_str(config);
        Self::start_as_written(dir, &text, variables)
    }

    fn start_as_written(dir: TempDir, text: &str, variables: &[(&str, String)]) -> Self {
        fs::write(dir.path().join("castier.toml"), text).unwrap();
        let mut program = command(castier_program(), dir.path());
        program.args(["--config", "castier.toml"]).envs(variables.iter().map(|(name, value)| (name, value)));
        let mut process = Running::start(&mut program);
        let [public, admin] = ["listening public ", "listening admin "].map(|prefix| {
            process.says(prefix, |log| log.lines().find_map(|line| line.split(prefix).nth(1)?.split([' ', '"']).next()?.parse().ok()))
        });
        // With TLS it says so, and that is enough.
        let is_ready = |answer: &Response| answer.status == 200 || (answer.status == 400 && answer.text().contains("https"));
        eventually("castier is ready", || Request::get("/readyz").try_send(admin).ok().filter(is_ready));
        Self { process, dir, public, admin }
    }

    /// The same castier again, with another configuration, the same port and the same data.
    pub(crate) fn restart(mut self, config: &str) -> Self {
        self.process.stop();
        let public = self.public.to_string();
        Self::start(self.dir, &public, config, &[])
    }

    /// Makes it read its configuration and its files again.
    pub(crate) fn hang_up(&self) {
        kill_process(Pid::from_child(&self.process.child), Signal::HUP).unwrap();
    }

    /// Waits until its log has this text.
    pub(crate) fn says(&self, text: &str) {
        eventually(text, || self.process.log().contains(text).then_some(()));
    }

    pub(crate) fn log(&self) -> String {
        self.process.log()
    }

    /// Kills it at once (SIGKILL).
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// The most bytes of each file that it writes from now on.
    pub(crate) fn limit_file_sizes(&self, bytes: Option<u64>) {
        let limit = Rlimit { current: bytes, maximum: getrlimit(Resource::Fsize).maximum };
        prlimit(Some(Pid::from_child(&self.process.child)), Resource::Fsize, limit).unwrap();
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.public)
    }

    /// The URL with a user and a password in it.
    pub(crate) fn url_as(&self, (user, password): (&str, &str)) -> String {
        let mut url = url::Url::parse(&self.url()).unwrap();
        url.set_username(user).unwrap();
        url.set_password(Some(password)).unwrap();
        url.as_str().trim_end_matches('/').to_owned()
    }

    /// The sum of a metric's series whose labels contain all of these texts.
    pub(crate) fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = Request::get("/metrics").send(self.admin).text();
        let series = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])));
        series
            .filter(|line| labels.iter().all(|label| line.contains(label)))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }
}

// ---- castier's users ----

/// A name and a password.
pub(crate) type User = (&'static str, &'static str);
/// May read. The space in the password must arrive as it is.
pub(crate) const READER: User = ("reader", "read me");
/// May write. A reader that splits at the wrong colon has another password.
pub(crate) const WRITER: User = ("writer", "s:e:c");

/// The files of users and tokens in a directory, and the configuration that names them.
pub(crate) struct People {
    pub(crate) dir: TempDir,
}

impl People {
    pub(crate) fn new() -> Self {
        let this = Self { dir: TempDir::new().unwrap() };
        this.write_users("reader:read me\nwriter:s:e:c\nci:pull");
        let tokens = [("robot", "write", "t0ken"), ("boss", "admin", "b0ss"), ("pull", "read", "pull-t0ken"), ("ci", "write", "ci-t0ken")];
        let tokens = tokens.map(|(name, role, token)| format!("{name} {role} {}", sha256(token.as_bytes())));
        fs::write(this.dir.path().join("tokens"), format!("# name role hash\n{}\n", tokens.join("\n"))).unwrap();
        this
    }

    /// Lines of `NAME:PASSWORD`, hashed.
    pub(crate) fn write_users(&self, users: &str) {
        let hashed = users.lines().map(|line| {
            let (name, password) = line.split_once(':').unwrap();
            format!("{name}:{}\n", bcrypt::hash(password, 4).unwrap())
        });
        fs::write(self.dir.path().join("users"), hashed.collect::<String>()).unwrap();
    }

    pub(crate) fn config(&self, anonymous: &str, more: &str) -> String {
        let path = self.dir.path();
        format!(
            "allow_delete = true\naccess.anonymous = \"{anonymous}\"\naccess.htpasswd_file = {:?}\naccess.tokens_file = {:?}\n\
             access.scopes = {{ reader = [\"read:*\"], ci = [\"read:*\", \"write:ac/ci\"] }}\n{more}\n",
            path.join("users"),
            path.join("tokens")
        )
    }

    /// castier for these people alone.
    pub(crate) fn castier(&self, more: &str) -> Castier {
        castier(&self.config("none", more))
    }
}

// ---- HTTP: one request and one answer, for the client and the servers of these tests ----

/// Field lines, in order.
pub(crate) type Headers = Vec<(String, String)>;

/// All values of a header, joined as HTTP joins them.
fn header_of(headers: &Headers, name: &str) -> Option<String> {
    let values: Vec<_> = headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect();
    (!values.is_empty()).then(|| values.join(", "))
}

/// A request, to send or received.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query, or a whole URL where castier is used as a proxy.
    pub(crate) target: String,
    pub(crate) headers: Headers,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn new(method: &str, target: &str) -> Self {
        Self { method: method.to_owned(), target: target.to_owned(), ..Self::default() }
    }

    pub(crate) fn get(target: &str) -> Self {
        Self::new("GET", target)
    }

    pub(crate) fn head(target: &str) -> Self {
        Self::new("HEAD", target)
    }

    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With credentials for Basic.
    pub(crate) fn basic(self, user: &str, password: &str) -> Self {
        self.with("Authorization", &basic(user, password))
    }

    pub(crate) fn bearer(self, token: &str) -> Self {
        self.with("Authorization", &format!("Bearer {token}"))
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        header_of(&self.headers, name)
    }

    /// The path, without the query.
    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap()
    }

    /// A parameter of the query, unescaped.
    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        let query = self.target.split_once('?')?.1;
        query.split('&').find_map(|pair| pair.split_once('=').filter(|(known, _)| *known == name)).map(|(_, value)| unescape(value))
    }

    /// Sends it on a connection of its own. Panics if there is no whole answer.
    #[track_caller]
    pub(crate) fn send(&self, addr: SocketAddr) -> Response {
        self.try_send(addr).unwrap_or_else(|error| panic!("{} {} to {addr}: {error}", self.method, self.target))
    }

    /// Sends it on a connection of its own. An answer that is cut is an error.
    pub(crate) fn try_send(&self, addr: SocketAddr) -> io::Result<Response> {
        let stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_nodelay(true)?;
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        if self.header("host").is_none() {
            head.push_str(&format!("Host: {addr}\r\n"));
        }
        if !self.body.is_empty() || ["PUT", "POST", "PATCH"].contains(&self.method.as_str()) {
            head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("Connection: close\r\n\r\n");
        let mut writer = &stream;
        writer.write_all(head.as_bytes())?;
        // A server may answer before it has read everything, and close. Its answer counts.
        let sent = writer.write_all(&self.body);
        let mut reader = BufReader::new(&stream);
        let (line, headers) = loop {
            let (line, headers) =
                read_head(&mut reader)?.ok_or_else(|| sent.as_ref().err().map_or_else(cut, |error| error.kind().into()))?;
            if !line.contains(" 100 ") {
                break (line, headers);
            }
        };
        let status = status_of(&line)?;
        let mut body = Vec::new();
        copy_body(&mut reader, &mut body, body_of_answer(&self.method, status, &headers), false)?;
        Ok(Response { status, headers, body })
    }
}

/// An answer, received or to send.
#[derive(Clone, Debug, Default)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub(crate) fn ok(content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self::new(200).with("Content-Type", content_type).body(body)
    }

    /// With a header. A `Content-Length` or `Transfer-Encoding: chunked` here replaces the body's own length.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        header_of(&self.headers, name)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {} {}", self.status, self.text()))
    }

    /// How castier answered: `hit`, `fwd=uri-miss` and so on.
    pub(crate) fn cache_status(&self) -> String {
        self.header("cache-status").unwrap_or_default()
    }
}

/// The value of `Authorization` for Basic.
pub(crate) fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", data_encoding::BASE64.encode(format!("{user}:{password}").as_bytes()))
}

/// The SHA-256 in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    data_encoding::HEXLOWER.encode(&sha2::Sha256::digest(bytes))
}

/// Bytes that do not compress, always the same for a seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Text with its `%` escapes and `+` decoded.
pub(crate) fn unescape(text: &str) -> String {
    let (mut out, bytes, mut at) = (Vec::new(), text.as_bytes(), 0);
    while let Some(&byte) = bytes.get(at) {
        let escaped = || u8::from_str_radix(std::str::from_utf8(bytes.get(at + 1..at + 3)?).ok()?, 16).ok();
        match (byte, (byte == b'%').then(escaped).flatten()) {
            (_, Some(decoded)) => {
                out.push(decoded);
                at += 2;
            }
            (b'+', None) => out.push(b' '),
            (byte, None) => out.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn cut() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// The first line and the field lines. None at the end of the connection.
fn read_head(reader: &mut impl io::BufRead) -> io::Result<Option<(String, Headers)>> {
    let mut next = || {
        let mut line = Vec::new();
        reader.read_until(b'\n', &mut line)?;
        Ok::<_, io::Error>(String::from_utf8_lossy(&line).into_owned())
    };
    let first = next()?;
    if first.is_empty() {
        return Ok(None);
    }
    let mut headers = Headers::new();
    loop {
        let line = next()?;
        if line.is_empty() {
            return Err(cut());
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(Some((first.trim_end().to_owned(), headers)));
        }
        let (name, value) = line.split_once(':').ok_or_else(|| invalid(line))?;
        headers.push((name.to_owned(), value.trim().to_owned()));
    }
}

fn status_of(line: &str) -> io::Result<u16> {
    line.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(|| invalid(line))
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Body {
    Length(u64),
    Chunked,
    /// At the end of the connection.
    Rest,
}

fn body_by_headers(headers: &Headers, otherwise: Body) -> Body {
    if header_of(headers, "transfer-encoding").is_some_and(|value| value.to_ascii_lowercase().contains("chunked")) {
        return Body::Chunked;
    }
    header_of(headers, "content-length").and_then(|value| value.parse().ok()).map_or(otherwise, Body::Length)
}

fn body_of_answer(method: &str, status: u16, headers: &Headers) -> Body {
    let none = method == "HEAD" || status == 204 || status == 304 || status < 200;
    if none { Body::Length(0) } else { body_by_headers(headers, Body::Rest) }
}

/// Copies a body. With `framed`, chunks stay chunks. Returns the number of its bytes.
fn copy_body(reader: &mut impl io::BufRead, writer: &mut impl Write, body: Body, framed: bool) -> io::Result<u64> {
    match body {
        Body::Length(length) => {
            let copied = io::copy(&mut reader.take(length), writer)?;
            if copied < length { Err(cut()) } else { Ok(copied) }
        }
        Body::Rest => io::copy(reader, writer),
        Body::Chunked => {
            let mut total = 0;
            loop {
                let mut line = String::new();
                reader.read_line(&mut line)?;
                let size = u64::from_str_radix(line.trim().split(';').next().unwrap_or_default(), 16).map_err(|_| cut())?;
                if framed {
                    writer.write_all(line.as_bytes())?;
                }
                if io::copy(&mut reader.take(size), writer)? < size {
                    return Err(cut());
                }
                total += size;
                // The end of the chunk; after the last one, trailers too.
                loop {
                    let mut line = String::new();
                    if reader.read_line(&mut line)? == 0 {
                        return Err(cut());
                    }
                    if framed {
                        writer.write_all(line.as_bytes())?;
                    }
                    if size > 0 || line.trim().is_empty() {
                        break;
                    }
                }
                writer.flush()?;
                if size == 0 {
                    return Ok(total);
                }
            }
        }
    }
}

// ---- ports ----

/// A port of this machine that nobody else gets while this lives. A server that allows its address to be reused, as most do, can listen on it. Connections
/// are refused while none does.
pub(crate) struct Port {
    addr: SocketAddrV4,
    /// Bound, but not listening.
    _held: OwnedFd,
}

impl Port {
    pub(crate) fn free() -> Self {
        let held = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        set_socket_reuseaddr(&held, true).unwrap();
        bind(&held, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = SocketAddrV4::try_from(getsockname(&held).unwrap()).unwrap();
        Self { addr, _held: held }
    }

    pub(crate) fn number(&self) -> u16 {
        self.addr.port()
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr.into()
    }
}

// ---- upstreams ----

/// A request that reached an upstream.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Headers,
    /// The answer's status, once it is known. 0 where there was none.
    pub(crate) status: u16,
    /// The bytes of the answer's body that were sent.
    pub(crate) sent: u64,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<String> {
        header_of(&self.headers, name)
    }

    pub(crate) fn authorization(&self) -> Option<String> {
        self.header("authorization")
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = self.authorization().map(|value| format!(" [{}]", value.split(' ').next().unwrap())).unwrap_or_default();
        write!(f, "{} {}{scheme} -> {} ({} bytes)", self.method, self.target, self.status, self.sent)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Up,
    /// Connections are refused.
    Dead,
    /// Requests are read, and get no answer.
    Hangs,
    /// Every answer is 429, with this `Retry-After`.
    Busy(u64),
}

/// Answers a request, or leaves it to what is behind.
type Answer = dyn Fn(&Request) -> Option<Response> + Send + Sync;

struct Shared {
    port: Port,
    /// The real server, if there is one.
    behind: Option<SocketAddr>,
    answer: Mutex<Arc<Answer>>,
    mode: Mutex<Mode>,
    changed: Condvar,
    seen: Mutex<Vec<Seen>>,
    /// The open connections, to cut them.
    open: Mutex<BTreeMap<u64, TcpStream>>,
    next: AtomicU64,
    gone: AtomicBool,
}

/// An upstream: a server of the test, or a real one behind a proxy that counts. It can be switched off and on again, on the same port.
pub(crate) struct Upstream {
    shared: Arc<Shared>,
}

impl Upstream {
    /// In front of a real server.
    pub(crate) fn before(server: SocketAddr) -> Self {
        Self::start(Some(server), Arc::new(|_| None))
    }

    /// A server of the test.
    pub(crate) fn answering(answer: impl Fn(&Request) -> Response + Send + Sync + 'static) -> Self {
        Self::start(None, Arc::new(move |request| Some(answer(request))))
    }

    /// A server of the files of a folder.
    pub(crate) fn folder(root: &Path) -> Self {
        let root = root.to_owned();
        Self::answering(move |request| file_answer(&root, request))
    }

    fn start(behind: Option<SocketAddr>, answer: Arc<Answer>) -> Self {
        let shared = Arc::new(Shared {
            port: Port::free(),
            behind,
            answer: Mutex::new(answer),
            mode: Mutex::new(Mode::Dead),
            changed: Condvar::new(),
            seen: Mutex::default(),
            open: Mutex::default(),
            next: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        });
        let upstream = Self { shared };
        upstream.up();
        upstream
    }

    /// Answers some requests itself from now on. The others go to the real server.
    pub(crate) fn intercept(&self, answer: impl Fn(&Request) -> Option<Response> + Send + Sync + 'static) {
        *lock(&self.shared.answer) = Arc::new(answer);
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.shared.port.addr()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr())
    }

    /// Every request since the start or the last `take`.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.seen).clone()
    }

    /// Every request since the start or the last `take`, which are forgotten.
    pub(crate) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut lock(&self.shared.seen))
    }

    /// The number of these requests for which this is true.
    pub(crate) fn count(&self, which: impl Fn(&Seen) -> bool) -> usize {
        lock(&self.shared.seen).iter().filter(|seen| which(seen)).count()
    }

    /// These requests, one a line, for messages.
    pub(crate) fn history(&self) -> String {
        lines(&self.seen())
    }

    /// Connections are refused from now on, and the open ones are cut.
    pub(crate) fn kill(&self) {
        self.set(Mode::Dead);
    }

    /// Reads requests and does not answer. Ends with `up`.
    pub(crate) fn hang(&self) {
        self.set(Mode::Hangs);
    }

    /// Answers every request with 429.
    pub(crate) fn busy(&self, retry_after: u64) {
        self.set(Mode::Busy(retry_after));
    }

    /// Answers as it should.
    pub(crate) fn up(&self) {
        self.set(Mode::Up);
    }

    fn set(&self, mode: Mode) {
        let shared = &self.shared;
        let before = std::mem::replace(&mut *lock(&shared.mode), mode);
        shared.changed.notify_all();
        if mode == Mode::Dead || before == Mode::Hangs {
            for (_, stream) in std::mem::take(&mut *lock(&shared.open)) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        if mode == Mode::Dead {
            // Wakes the thread that accepts, which then closes the listener.
            eventually("connections are refused", || TcpStream::connect(self.addr()).err());
        } else if before == Mode::Dead {
            let listener = TcpListener::bind(self.addr()).unwrap();
            let shared = shared.clone();
            thread::spawn(move || accept(&shared, listener));
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.shared.gone.store(true, Ordering::Relaxed);
        self.kill();
        if thread::panicking() {
            println!("---- the upstream {} has seen:\n{}", self.addr(), self.history());
        }
    }
}

/// Requests, one a line, for messages.
pub(crate) fn lines(seen: &[Seen]) -> String {
    seen.iter().map(|seen| format!("{seen}\n")).collect()
}

fn accept(shared: &Arc<Shared>, listener: TcpListener) {
    for stream in listener.incoming() {
        if *lock(&shared.mode) == Mode::Dead {
            return;
        }
        let Ok(stream) = stream else { return };
        let _ = stream.set_nodelay(true);
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if let Ok(clone) = stream.try_clone() {
            lock(&shared.open).insert(number, clone);
        }
        let shared = shared.clone();
        thread::spawn(move || {
            // What goes wrong with a connection is the peer's business.
            let _ = serve(&shared, &stream);
            let _ = stream.shutdown(Shutdown::Both);
            lock(&shared.open).remove(&number);
        });
    }
}

/// Serves the requests of one connection.
fn serve(shared: &Shared, stream: &TcpStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut behind: Option<BufReader<TcpStream>> = None;
    while let Some((line, headers)) = read_head(&mut reader)? {
        let mut words = line.split(' ');
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return Err(invalid(&line)) };
        let mut request = Request { method: method.to_owned(), target: target.to_owned(), headers, body: Vec::new() };
        let seen = Seen { method: method.to_owned(), target: target.to_owned(), headers: request.headers.clone(), status: 0, sent: 0 };
        let number = {
            let mut all = lock(&shared.seen);
            all.push(seen);
            all.len() - 1
        };
        let note = |status: u16, sent: u64| {
            // It may have been taken away meanwhile.
            if let Some(seen) = lock(&shared.seen).get_mut(number).filter(|seen| seen.target == target) {
                (seen.status, seen.sent) = (status, sent);
            }
        };
        if header_of(&request.headers, "expect").is_some() {
            (&mut &*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("expect"));
        }
        let body = body_by_headers(&request.headers, Body::Length(0));
        let mut mode = lock(&shared.mode);
        while *mode == Mode::Hangs && !shared.gone.load(Ordering::Relaxed) {
            mode = shared.changed.wait(mode).unwrap_or_else(PoisonError::into_inner);
            if *mode != Mode::Hangs {
                return Ok(());
            }
        }
        let now = *mode;
        drop(mode);
        let closes = header_of(&request.headers, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let answer = if let Mode::Busy(seconds) = now {
            copy_body(&mut reader, &mut io::sink(), body, false)?;
            Some(Response::new(429).with("Retry-After", &seconds.to_string()).with("Content-Type", "text/plain").body("busy\n"))
        } else {
            // A server of the test reads the whole body. A real one gets it as it comes.
            if shared.behind.is_none() {
                copy_body(&mut reader, &mut request.body, body, false)?;
            }
            let answer = lock(&shared.answer).clone();
            answer(&request)
        };
        if let Some(answer) = answer {
            if shared.behind.is_some() && !matches!(now, Mode::Busy(_)) {
                copy_body(&mut reader, &mut io::sink(), body, false)?;
            }
            // Noted before it leaves: a client that has the answer finds the request counted.
            note(answer.status, if method == "HEAD" { 0 } else { answer.body.len() as u64 });
            write_answer(stream, method, &answer)?;
            if answer.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close")) {
                return Ok(());
            }
        } else {
            forward(shared, stream, &mut reader, &mut behind, &request, body, note)?;
        }
        if closes {
            return Ok(());
        }
    }
    Ok(())
}

fn write_answer(mut stream: &TcpStream, method: &str, answer: &Response) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} As-The-Test-Says\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let is_chunked = answer.header("transfer-encoding").is_some();
    if answer.header("content-length").is_none() && !is_chunked && answer.status != 304 && answer.status != 204 {
        head.push_str(&format!("Content-Length: {}\r\n", answer.body.len()));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    if method != "HEAD" && answer.status != 304 {
        if is_chunked {
            bytes.extend_from_slice(format!("{:x}\r\n", answer.body.len()).as_bytes());
        }
        bytes.extend_from_slice(&answer.body);
        if is_chunked {
            bytes.extend_from_slice(b"\r\n0\r\n\r\n");
        }
    }
    stream.write_all(&bytes)
}

/// Gives a request to the real server, and its answer to the client, both as they come.
fn forward(
    shared: &Shared,
    stream: &TcpStream,
    reader: &mut BufReader<&TcpStream>,
    behind: &mut Option<BufReader<TcpStream>>,
    request: &Request,
    body: Body,
    note: impl Fn(u16, u64),
) -> io::Result<()> {
    let real = match behind {
        Some(real) => real,
        None => behind.insert(BufReader::new(TcpStream::connect(shared.behind.unwrap())?)),
    };
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method, request.target);
    for (name, value) in &request.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    real.get_mut().write_all(head.as_bytes())?;
    // A server may answer before it has read everything. Its answer counts.
    let _ = copy_body(reader, real.get_mut(), body, true);
    let mut client = stream;
    loop {
        let (line, headers) = read_head(real)?.ok_or_else(cut)?;
        let status = status_of(&line)?;
        let mut head = format!("{line}\r\n");
        for (name, value) in &headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let length = body_of_answer(&request.method, status, &headers);
        note(status, if let Body::Length(length) = length { length } else { 0 });
        client.write_all(head.as_bytes())?;
        if status < 200 {
            continue;
        }
        let sent = copy_body(real, &mut client, length, true)?;
        if let Body::Chunked | Body::Rest = length {
            note(status, sent);
        }
        let says = header_of(&headers, "connection").unwrap_or_default();
        let ends = says.eq_ignore_ascii_case("close") || (line.starts_with("HTTP/1.0") && !says.eq_ignore_ascii_case("keep-alive"));
        if ends || length == Body::Rest {
            return Err(cut());
        }
        return Ok(());
    }
}

/// A file of a folder, as a plain web server gives it: with a validator, conditional requests and single ranges.
pub(crate) fn file_answer(root: &Path, request: &Request) -> Response {
    if request.method != "GET" && request.method != "HEAD" {
        return Response::new(405).with("Allow", "GET, HEAD");
    }
    let path = unescape(&request.path().replace('+', "%2B"));
    let safe = path.split('/').filter(|part| !part.is_empty() && *part != "." && *part != "..");
    let Ok(bytes) = fs::read(root.join(safe.collect::<PathBuf>())) else {
        return Response::new(404).with("Content-Type", "text/plain").body("there is no such file\n");
    };
    entity(request, "application/octet-stream", &bytes)
}

/// Bytes, as a plain web server gives a file: with a validator, conditional requests and single ranges.
pub(crate) fn entity(request: &Request, content_type: &str, bytes: &[u8]) -> Response {
    let etag = format!("\"{}\"", &sha256(bytes)[..16]);
    if request.header("if-none-match").is_some_and(|value| value.split(", ").any(|known| known == etag || known == "*")) {
        return Response::new(304).with("ETag", &etag);
    }
    let answer = Response::new(200).with("ETag", &etag).with("Accept-Ranges", "bytes").with("Content-Type", content_type);
    let whole = bytes.len();
    let range = request.header("range").filter(|_| request.header("if-range").is_none_or(|value| value == etag));
    let Some((from, to)) = range.as_deref().and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return answer.body(bytes).with("Content-Length", &whole.to_string());
    };
    let (from, to) = match (from.parse::<usize>().ok(), to.parse::<usize>().ok()) {
        (Some(from), Some(to)) => (from, whole.min(to + 1)),
        (Some(from), None) => (from, whole),
        (None, last) => (whole - last.unwrap_or_default().min(whole), whole),
    };
    if from >= to {
        return Response::new(416).with("Content-Range", &format!("bytes */{whole}"));
    }
    let range = format!("bytes {from}-{}/{whole}", to - 1);
    Response { status: 206, ..answer }.with("Content-Range", &range).with("Content-Length", &(to - from).to_string()).body(&bytes[from..to])
}
