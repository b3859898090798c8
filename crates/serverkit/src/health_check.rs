//! `--health URL`: sends one request to an admin listener. For health checks in containers without another HTTP client.

use std::{
    io::{Read as _, Write as _},
    net::{TcpStream, ToSocketAddrs as _},
    time::{Duration, Instant},
};

/// The longest answer that is read.
const MOST: usize = 1 << 20;
/// How long the answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends a GET to this `http://` URL, and expects a 2xx.
///
/// # Errors
/// A text with the other answer, or the reason why there is none.
pub(crate) fn health_check(url: &str) -> Result<(), String> {
    ask("GET", url, 12).map(drop)
}

/// Sends a GET to this `http://` URL, and returns the body of a 2xx.
///
/// # Errors
/// A text with the other answer, or the reason why there is none.
pub fn get(url: &str) -> Result<String, String> {
    body("GET", url)
}

/// Sends a POST without a body to this `http://` URL, and returns the body of a 2xx.
///
/// # Errors
/// As [`get`].
pub fn post(url: &str) -> Result<String, String> {
    body("POST", url)
}

fn body(method: &str, url: &str) -> Result<String, String> {
    let answer = ask(method, url, MOST)?;
    let end = answer.windows(4).position(|end| end == b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    Ok(String::from_utf8_lossy(&answer[end..]).into_owned())
}

/// The answer to a request without a body, of which at most `most` bytes are read.
fn ask(method: &str, url: &str, most: usize) -> Result<Vec<u8>, String> {
    let rest = url.strip_prefix("http://").ok_or_else(|| format!("{url}: write http://HOST:PORT/healthz"))?;
    let (authority, path) = rest.find('/').map_or((rest, "/healthz"), |slash| rest.split_at(slash));
    let with_port = if authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
        authority.to_owned()
    } else {
        format!("{authority}:80")
    };
    let end = Instant::now() + TIMEOUT;
    let left = || end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let ask = || -> std::io::Result<Vec<u8>> {
        let mut failed = std::io::Error::other("it has no address");
        for address in with_port.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, left()) {
                Ok(mut stream) => {
                    stream.set_write_timeout(Some(left()))?;
                    stream.write_all(
                        format!("{method} {path} HTTP/1.1\r\nHost: {authority}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                            .as_bytes(),
                    )?;
                    let mut line = Vec::new();
                    while line.len() < most {
                        stream.set_read_timeout(Some(left()))?;
                        let mut part = [0; 4096];
                        let read = stream.read(&mut part)?;
                        if read == 0 {
                            break;
                        }
                        line.extend_from_slice(&part[..read]);
                    }
                    return Ok(line);
                }
                Err(error) => failed = error,
            }
        }
        Err(failed)
    };
    let line = ask().map_err(|error| format!("{url}: {error}"))?;
    match line.get(9..12) {
        Some(status) if line.starts_with(b"HTTP/1.") && status[0] == b'2' => Ok(line),
        Some(status) if line.starts_with(b"HTTP/1.") => Err(format!("{url}: answered {}", String::from_utf8_lossy(status))),
        _ => Err(format!("{url}: answered with something that is not HTTP")),
    }
}
