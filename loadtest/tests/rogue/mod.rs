//! A small content-addressed store over HTTP with one fault, on every tenth GET unless noted.

use castier_blob::Digest;
use castier_wire as wire;
use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

/// How long [`Fault::StallOnce`] stalls.
pub(crate) const STALL: Duration = Duration::from_millis(400);

/// The fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    None,
    /// Flips a bit of the body.
    Corrupt,
    /// Answers 503.
    Unavailable,
    /// Announces the body and sends half of it.
    Truncate,
    /// No fault: sends the body in chunks, with a trailer.
    Chunked,
    /// Closes the connection after the answer without announcing it.
    CloseAfter,
    /// Stalls once, at the tenth GET.
    StallOnce,
    /// Never answers.
    Hang,
    /// From the tenth GET on, closes the connection without an answer.
    Gone,
    /// Sends more than it announced.
    TooMuch,
    /// No fault: the answer to a HEAD has no length.
    NoLength,
    /// Refuses PUTs without reading them, and keeps the connection.
    RefuseUnread,
    /// Not a store: answers 404 to everything.
    WebServer,
    /// Not a store: answers 400 to everything.
    AlwaysBad,
    /// Is full.
    RefusePuts,
}

struct Shared {
    fault: Fault,
    blobs: Mutex<HashMap<String, Vec<u8>>>,
    connections: AtomicU64,
    /// GETs of well-formed digests.
    gets: AtomicU64,
    puts: AtomicU64,
    faults: AtomicU64,
}

/// The store; its threads end with the process.
pub(crate) struct Rogue {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Rogue {
    pub(crate) fn new(fault: Fault) -> Self {
        let counter = AtomicU64::default;
        let shared = Arc::new(Shared {
            fault,
            blobs: Mutex::default(),
            connections: counter(),
            gets: counter(),
            puts: counter(),
            faults: counter(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let shared = Arc::clone(&acceptor);
                shared.connections.fetch_add(1, SeqCst);
                // A client that disconnects ends only its own thread.
                std::thread::spawn(move || drop(shared.serve(stream.unwrap())));
            }
        });
        Self { shared, address }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn gets(&self) -> u64 {
        self.shared.gets.load(SeqCst)
    }

    pub(crate) fn puts(&self) -> u64 {
        self.shared.puts.load(SeqCst)
    }

    pub(crate) fn faults(&self) -> u64 {
        self.shared.faults.load(SeqCst)
    }

    pub(crate) fn connections(&self) -> u64 {
        self.shared.connections.load(SeqCst)
    }
}

impl Shared {
    fn serve(&self, mut stream: TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let (mut line, mut length, mut expects) = (String::new(), 0_u64, false);
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let mut words = line.split_whitespace().map(str::to_owned);
            let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            loop {
                let mut header = String::new();
                reader.read_line(&mut header)?;
                let Some((name, value)) = header.split_once(':') else { break };
                match name.to_ascii_lowercase().as_str() {
                    "content-length" => length = value.trim().parse().unwrap_or(0),
                    "expect" => expects = true,
                    _ => {}
                }
            }
            if self.fault == Fault::RefuseUnread && method == "PUT" {
                plain(&mut stream, "507 Insufficient Storage", b"no room")?;
                std::thread::park();
            }
            if expects {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            }
            let mut body = vec![0; usize::try_from(length).unwrap_or(0)];
            reader.read_exact(&mut body)?;
            if !self.answer(&mut stream, &method, &path, body)? {
                return Ok(());
            }
        }
    }

    /// Answers one request. Returns whether the connection stays open.
    fn answer(&self, stream: &mut TcpStream, method: &str, path: &str, body: Vec<u8>) -> std::io::Result<bool> {
        match self.fault {
            Fault::WebServer => return plain(stream, "404 Not Found", b""),
            Fault::AlwaysBad => return plain(stream, "400 Bad Request", b"speak TLS"),
            _ => {}
        }
        if path == "/stats" {
            return plain(stream, "200 OK", format!("{{\"LocalLoads\":{}}}", self.gets.load(SeqCst)).as_bytes());
        }
        match (method, wire::Target::of(path)) {
            (_, wire::Target::Malformed(_)) => plain(stream, "400 Bad Request", b""),
            ("GET", wire::Target::Blob(digest)) => self.get(stream, &digest.to_string()),
            ("HEAD", wire::Target::Blob(digest))
                if self.fault == Fault::NoLength && self.blobs.lock().unwrap().contains_key(&digest.to_string()) =>
            {
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
                Ok(true)
            }
            ("HEAD", wire::Target::Blob(_)) => plain(stream, "404 Not Found", b""),
            ("PUT", wire::Target::Blob(_)) if self.fault == Fault::RefusePuts => plain(stream, "507 Insufficient Storage", b"no room"),
            ("PUT", wire::Target::Blob(digest)) => {
                assert_eq!(digest, Digest::of(&body), "the tester's own upload");
                self.puts.fetch_add(1, SeqCst);
                self.blobs.lock().unwrap().insert(digest.to_string(), body);
                plain(stream, "201 Created", b"")
            }
            _ => plain(stream, "405 Method Not Allowed", b""),
        }
    }

    fn get(&self, stream: &mut TcpStream, name: &str) -> std::io::Result<bool> {
        let number = self.gets.fetch_add(1, SeqCst) + 1;
        let tenth = number.is_multiple_of(10) || (self.fault == Fault::Gone && number > 10);
        let Some(mut blob) = self.blobs.lock().unwrap().get(name).cloned() else { return plain(stream, "404 Not Found", b"") };
        if !tenth || self.fault == Fault::None {
            return plain(stream, "200 OK", &blob);
        }
        let earlier = self.faults.fetch_add(1, SeqCst);
        match self.fault {
            Fault::Corrupt => {
                *blob.last_mut().unwrap() ^= 1;
                plain(stream, "200 OK", &blob)
            }
            Fault::Unavailable => plain(stream, "503 Service Unavailable", b"later"),
            Fault::Truncate => {
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", blob.len())?;
                stream.write_all(&blob[..blob.len() / 2])?;
                Ok(false)
            }
            Fault::Chunked => {
                stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                for chunk in blob.chunks(10_007) {
                    write!(stream, "{:x};of=blob\r\n", chunk.len())?;
                    stream.write_all(chunk)?;
                    stream.write_all(b"\r\n")?;
                }
                stream.write_all(b"0\r\nX-Trailer: yes\r\n\r\n")?;
                Ok(true)
            }
            Fault::CloseAfter => plain(stream, "200 OK", &blob).map(|_| false),
            Fault::Hang => loop {
                std::thread::park();
            },
            Fault::Gone => Ok(false),
            Fault::TooMuch => {
                plain(stream, "200 OK", &blob)?;
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")?;
                Ok(true)
            }
            Fault::StallOnce if earlier == 0 => {
                std::thread::sleep(STALL);
                plain(stream, "200 OK", &blob)
            }
            _ => plain(stream, "200 OK", &blob),
        }
    }
}

fn plain(stream: &mut TcpStream, status: &str, body: &[u8]) -> std::io::Result<bool> {
    let mut answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes();
    answer.extend_from_slice(body);
    stream.write_all(&answer)?;
    Ok(true)
}
