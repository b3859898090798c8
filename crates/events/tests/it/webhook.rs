//! Webhooks that fail in every way, and what they get.

use crate::support::{Memory, assert_complete, begin, eventually, skip, tool};
use castier_config::{EventSink, Span};
use std::{
    collections::VecDeque,
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, atomic::Ordering},
    thread,
    time::Duration,
};
use tempfile::TempDir;

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[derive(Clone, Copy)]
enum Answer {
    Status(u16),
    /// Takes the request, and closes the connection.
    Close,
    /// Takes the request, and says nothing.
    Hang,
    /// A body without an end.
    Endless,
}

/// A request as it came.
#[derive(Clone)]
struct Got {
    head: Vec<(String, String)>,
    body: Vec<u8>,
    taken: bool,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        &self.head.iter().find(|(known, _)| known == name).unwrap().1
    }

    fn ids(&self) -> Vec<String> {
        let json: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        let events = json.as_array().cloned().unwrap_or_else(|| vec![json]);
        events.iter().map(|event| event["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[derive(Default)]
struct Server {
    answers: Mutex<VecDeque<Answer>>,
    got: Mutex<Vec<Got>>,
    hanging: Mutex<Vec<TcpStream>>,
}

impl Server {
    /// Gives these answers, and 204 after that.
    fn start(answers: &[Answer]) -> (Arc<Self>, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = Arc::new(Self { answers: Mutex::new(answers.iter().copied().collect()), ..Self::default() });
        let accepting = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let server = accepting.clone();
                thread::spawn(move || server.serve(stream.unwrap()));
            }
        });
        (server, port)
    }

    fn serve(&self, mut stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        loop {
            let mut head = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    return;
                }
                match line.trim_end().split_once(": ") {
                    Some((name, value)) => head.push((name.to_lowercase(), value.to_owned())),
                    None if line.trim_end().is_empty() => break,
                    None => {}
                }
            }
            let length = head.iter().find(|(name, _)| name == "content-length").unwrap().1.parse().unwrap();
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            let answer = self.answers.lock().unwrap().pop_front().unwrap_or(Answer::Status(204));
            let taken = matches!(answer, Answer::Status(200..=299) | Answer::Endless);
            self.got.lock().unwrap().push(Got { head, body, taken });
            match answer {
                Answer::Status(status) => {
                    let head = format!("HTTP/1.1 {status} X\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n");
                    stream.write_all(head.as_bytes()).unwrap();
                }
                Answer::Close => return,
                Answer::Hang => self.hanging.lock().unwrap().push(stream.try_clone().unwrap()),
                Answer::Endless => {
                    write!(stream, "HTTP/1.1 200 OK\r\n\r\n").unwrap();
                    while stream.write_all(&[0; 4096]).is_ok() {}
                    return;
                }
            }
        }
    }
}

fn sink(dir: &TempDir, url: String) -> EventSink {
    let secret_file = dir.path().join("secret");
    fs::write(&secret_file, SECRET).unwrap();
    EventSink { url: url.parse().ok(), name: "hook".into(), secret_file, timeout: Span::secs(5), ..EventSink::default() }
}

/// Every failure is followed by another attempt with the same event, and no event is left out.
#[tokio::test(flavor = "multi_thread")]
async fn webhooks_may_fail_in_every_way() {
    let failures = [
        [Answer::Status(500), Answer::Close, Answer::Hang],
        [Answer::Status(410), Answer::Status(404), Answer::Status(401)],
        [Answer::Status(302), Answer::Status(429), Answer::Close],
    ];
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Memory::default());
    let servers = failures.map(|failures| Server::start(&[&failures[..], &[Answer::Status(200), Answer::Endless]].concat()));
    let hook = |(number, (_, port)): (usize, &(Arc<Server>, u16))| EventSink {
        name: format!("hook-{number}"),
        ..sink(&dir, format!("http://127.0.0.1:{port}/hook"))
    };
    let started = begin(&journal, &servers.iter().enumerate().map(hook).collect::<Vec<_>>());
    journal.append(50);
    for number in 0..servers.len() {
        let hook = format!("hook-{number}");
        started.delivered(&hook).await;
        assert_eq!(started.failures(&hook), 3.0);
        assert_eq!(started.series("castier_events_delivered_total", &hook), 50.0);
    }
    started.stop().await;
    for (server, _) in servers {
        let got = server.got.lock().unwrap().clone();
        assert!(got[..4].iter().all(|got| got.ids() == ["node-1"]), "the same event, until it is taken");
        assert_complete(&got.iter().flat_map(Got::ids).collect::<Vec<_>>(), 50);
        assert!(got.iter().all(|got| got.header("content-type").starts_with("application/cloudevents+json")));
        assert!(got[..4].iter().all(|got| got.header("webhook-id") == "node-1"), "the id of a request is that of its event");
        are_signed(&dir, &got);
    }
}

/// A batch is one request with a list, and one signature.
#[tokio::test(flavor = "multi_thread")]
async fn batches_are_signed_as_a_whole() {
    let (server, port) = Server::start(&[Answer::Status(503)]);
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Memory::default());
    let hook = EventSink { batch: 20, ..sink(&dir, format!("http://127.0.0.1:{port}/")) };
    let started = begin(&journal, &[hook]);
    journal.append(50);
    started.delivered("hook").await;
    started.stop().await;
    let got = server.got.lock().unwrap().clone();
    assert_eq!(got.iter().map(|got| got.ids().len()).collect::<Vec<_>>(), [20, 20, 20, 10]);
    assert!(got.iter().all(|got| got.header("content-type").starts_with("application/cloudevents-batch+json")));
    assert_eq!((got[0].header("webhook-id"), got[1].header("webhook-id")), ("node-1+20", "node-1+20"));
    let taken: Vec<_> = got.iter().filter(|got| got.taken).flat_map(Got::ids).collect();
    assert_eq!(taken.len(), 50);
    assert_complete(&taken, 50);
    are_signed(&dir, &got);
}

/// Asks the library of Standard Webhooks for Python.
fn are_signed(dir: &TempDir, got: &[Got]) {
    let Some(python) = tool("python3") else { return };
    let library = Command::new(&python).args(["-c", "import standardwebhooks"]).stderr(Stdio::null()).status().unwrap();
    if !library.success() {
        return skip("Python has no standardwebhooks (scripts/setup-tests installs it)");
    }
    let requests: Vec<_> = got.iter().map(|got| serde_json::json!([got.head, String::from_utf8_lossy(&got.body)])).collect();
    let file = dir.path().join("requests.json");
    fs::write(&file, serde_json::to_vec(&requests).unwrap()).unwrap();
    let script = "import json, sys, standardwebhooks\n\
                  hook = standardwebhooks.Webhook(sys.argv[1])\n\
                  for head, body in json.load(open(sys.argv[2])):\n\
                  \x20   hook.verify(body, dict(head))\n\
                  \x20   try: hook.verify(body + ' ', dict(head))\n\
                  \x20   except standardwebhooks.WebhookVerificationError: pass\n\
                  \x20   else: sys.exit('a changed body was accepted')\n";
    let ran = Command::new(python).args(["-c", script, SECRET]).arg(file).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

/// A certificate from nobody that is known is refused, and one from `ca_file` is not.
#[tokio::test(flavor = "multi_thread")]
async fn webhooks_prove_who_they_are() {
    let Some(python) = tool("python3") else { return };
    let dir = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    fs::write(&certificate, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let server = Https::start(&python, &certificate, &key);
    let url = format!("https://127.0.0.1:{}/", server.port);
    let good = EventSink { ca_file: certificate, name: "good".into(), timeout: Span::secs(10), ..sink(&dir, url.clone()) };
    let journal = Arc::new(Memory::default());
    let started = begin(&journal, &[good, sink(&dir, url)]);
    journal.append(3);
    started.delivered("good").await;
    eventually("the certificate is refused", async || started.failures("hook") >= 2.0).await;
    assert_eq!(journal.at("hook"), 0);
    started.stop().await;
}

struct Https {
    process: std::process::Child,
    port: u16,
}

impl Https {
    fn start(python: &Path, certificate: &PathBuf, key: &PathBuf) -> Self {
        let script = "import http.server, ssl, sys\n\
                      class Handler(http.server.BaseHTTPRequestHandler):\n\
                      \x20   def do_POST(self):\n\
                      \x20       self.rfile.read(int(self.headers['content-length']))\n\
                      \x20       self.send_response(204)\n\
                      \x20       self.end_headers()\n\
                      server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)\n\
                      context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
                      context.load_cert_chain(sys.argv[1], sys.argv[2])\n\
                      print(server.server_port, flush=True)\n\
                      server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)\n\
                      server.serve_forever()\n";
        let mut command = Command::new(python);
        command.args(["-c", script]).args([certificate, key]).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { process, port: line.trim().parse().unwrap() }
    }
}

impl Drop for Https {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A receiver that hangs holds up no other, and the end has a bound. What it has taken by then is known after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn receivers_do_not_wait_for_each_other() {
    let (slow, slow_port) = Server::start(&[Answer::Status(204), Answer::Status(204), Answer::Hang]);
    let (fast, fast_port) = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Memory::default());
    let hook = |name: &str, port: u16| EventSink {
        name: name.into(),
        timeout: Span::secs(3600),
        ..sink(&dir, format!("http://127.0.0.1:{port}/"))
    };
    let sinks = [hook("slow", slow_port), hook("fast", fast_port)];
    let started = begin(&journal, &sinks);
    journal.append(100);
    started.delivered("fast").await;
    eventually("the slow one hangs", async || slow.got.lock().unwrap().len() == 3).await;
    started.stop().await;
    assert_eq!(journal.at("slow"), 2);
    let started = begin(&journal, &sinks);
    started.delivered("slow").await;
    started.stop().await;
    assert_complete(&slow.got.lock().unwrap().iter().filter(|got| got.taken).flat_map(Got::ids).collect::<Vec<_>>(), 100);
    assert_eq!(fast.got.lock().unwrap().len(), 100);
}

/// At its end castier still delivers what waits. A journal that fails is asked again.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_delivers_what_waits_and_a_broken_journal_is_asked_again() {
    let (server, port) = Server::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Memory::default());
    let sinks = [sink(&dir, format!("http://127.0.0.1:{port}/"))];
    let started = begin(&journal, &sinks);
    journal.broken.store(true, Ordering::SeqCst);
    journal.append(5);
    eventually("the journal fails", async || started.failures("hook") >= 2.0).await;
    journal.broken.store(false, Ordering::SeqCst);
    started.delivered("hook").await;
    journal.append(20);
    started.stop().await;
    assert_eq!((journal.at("hook"), server.got.lock().unwrap().len()), (25, 25));
    // A new receiver begins with what comes from now on.
    let late = EventSink { name: "late".into(), ..sinks[0].clone() };
    let started = begin(&journal, &[late]);
    journal.append(1);
    started.delivered("late").await;
    tokio::time::timeout(Duration::from_secs(60), started.stop()).await.unwrap();
    assert_eq!(server.got.lock().unwrap().last().unwrap().ids(), ["node-26"]);
    assert_eq!(server.got.lock().unwrap().len(), 26);
}
