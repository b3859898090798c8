//! A node to test, and a client that shows everything that happens on the wire.

use castier_blob::Digest;
use castier_wire::blob_path;
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::{TempDir, TempPath};

/// Nothing that a test waits for takes this long unless it never comes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Waits for a condition.
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "waited in vain for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn binary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_castier-origin"));
    command.env_clear();
    command
}

/// A running castier-origin; killed when dropped.
pub(crate) struct Node {
    pub(crate) child: Child,
    pub(crate) clients: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) root: PathBuf,
    log: TempPath,
    _dir: Option<TempDir>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Node {
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// With a root of its own, and these variables.
    pub(crate) fn with(env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Self::at(&dir.path().join("root"), env);
        node._dir = Some(dir);
        node
    }

    pub(crate) fn at(root: &Path, env: &[(&str, &str)]) -> Self {
        let mut command = binary();
        command.args(["--listen", "127.0.0.1:0", "--root"]).arg(root).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
        command.envs(env.iter().copied());
        Self::run(command, root)
    }

    pub(crate) fn run(mut command: Command, root: &Path) -> Self {
        let log = tempfile::Builder::new().prefix("castier-origin-").suffix(".log").tempfile().unwrap().into_temp_path();
        let mut child = command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut address = |what: &str| -> SocketAddr {
            let line = lines.next().and_then(Result::ok).unwrap_or_else(|| panic!("{}", fs::read_to_string(&log).unwrap()));
            let behind = line.split(what).nth(1).unwrap_or_else(|| panic!("{line}"));
            behind.split([' ', '"']).next().unwrap().parse().unwrap()
        };
        let (clients, admin) = (address("listening public "), address("listening admin "));
        Self { child, clients, admin, root: root.to_owned(), log, _dir: None }
    }

    pub(crate) fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status().unwrap().success());
    }

    pub(crate) fn exit(&mut self) -> ExitStatus {
        wait_for("the process to end", || self.child.try_wait().unwrap())
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn ask(&self, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
        ask(self.clients, method, path, headers, body)
    }

    pub(crate) fn put(&self, bytes: &[u8]) -> u16 {
        self.ask("PUT", &blob_path(&Digest::of(bytes)), &[], bytes).status
    }

    pub(crate) fn get(&self, digest: &Digest) -> Answer {
        self.ask("GET", &blob_path(digest), &[], b"")
    }

    pub(crate) fn file(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join(&name[..2]).join(&name[2..4]).join(&name)
    }

    pub(crate) fn temp_files(&self) -> usize {
        fs::read_dir(self.root.join("tmp")).unwrap().count()
    }

    /// The value of a series, 0 if it is not there.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = String::from_utf8(ask(self.admin, "GET", "/metrics", &[], b"").body).unwrap();
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or(0.0)
    }
}

/// An answer as it came over the wire.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The body is as long as was said.
    pub(crate) complete: bool,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }

    /// Checks that this is an error as promised.
    pub(crate) fn problem(&self, status: u16) {
        assert_eq!((self.status, self.header("content-type")), (status, "application/problem+json"), "{self:?}");
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem["status"], status);
        assert!(problem["title"].as_str().is_some_and(|text| !text.is_empty()), "{problem}");
        assert!(problem["detail"].as_str().is_some_and(|text| !text.contains("os error") && !text.contains("/tmp")), "{problem}");
    }
}

pub(crate) fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

/// One request on a connection of its own. A body is sent with its length unless the headers say how else.
pub(crate) fn ask(to: SocketAddr, method: &str, path: &str, headers: &[&str], body: &[u8]) -> Answer {
    let mut stream = connect(to);
    let framed = headers.iter().any(|header| header.starts_with("Transfer-Encoding"));
    let length = if framed || (body.is_empty() && method != "PUT" && method != "POST") { None } else { Some(body.len()) };
    stream.write_all(&head(method, path, headers, length)).unwrap();
    // An early answer may end the connection while the body is on its way.
    stream.write_all(body).ok();
    read_answer(&mut BufReader::new(stream), method).expect("an answer")
}

pub(crate) fn head(method: &str, path: &str, headers: &[&str], length: Option<usize>) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    headers.iter().for_each(|header| head += &format!("{header}\r\n"));
    length.inspect(|length| head += &format!("Content-Length: {length}\r\n"));
    (head + "\r\n").into_bytes()
}

/// Reads one answer; none if the connection ends before its head does.
pub(crate) fn read_answer(from: &mut BufReader<TcpStream>, method: &str) -> Option<Answer> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|n| *n > 0)?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<_> =
        lines[1..].iter().map(|line| line.split_once(':').unwrap()).map(|(n, v)| (n.to_lowercase(), v.trim().to_owned())).collect();
    let mut answer = Answer { status, headers, body: Vec::new(), complete: true };
    if method != "HEAD" && !matches!(status, 100 | 204 | 304) {
        let length = answer.header("content-length").parse().expect("every body has its length");
        from.take(length).read_to_end(&mut answer.body).ok();
        answer.complete = answer.body.len() as u64 == length;
    }
    Some(answer)
}

/// Bytes that no other call with another seed gives.
pub(crate) fn blob(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..size.div_ceil(8)).flat_map(|_| next()).take(size).collect()
}
