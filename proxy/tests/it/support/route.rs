//! The upstream of a route.

use super::RawOrigin;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// The ETag of everything that it has.
const ETAG: &str = "\"1\"";

/// Answers any path with a body that names it, which is no JSON, and with an `ETag`. Paths that end with `/absent`, `/secret`, `/fault` and `/limited`
/// get 404, 403, 500 and 429. While it is away, all get 503.
pub(crate) struct RouteUpstream {
    server: RawOrigin,
    is_away: Arc<AtomicBool>,
}

impl RouteUpstream {
    pub(crate) async fn start() -> Self {
        let is_away = Arc::<AtomicBool>::default();
        let away = is_away.clone();
        let server = RawOrigin::start(move |head| if away.load(Ordering::SeqCst) { answer("GET", 503, "away") } else { told(head) }).await;
        Self { server, is_away }
    }

    pub(crate) fn url(&self) -> String {
        self.server.url()
    }

    pub(crate) fn goes(&self) {
        self.is_away.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_back(&self) {
        self.is_away.store(false, Ordering::SeqCst);
    }

    /// How many requests for a path have come.
    pub(crate) fn asked(&self, path: &str) -> usize {
        self.server.heads().iter().filter(|head| head.split(' ').nth(1) == Some(path)).count()
    }
}

fn told(head: &str) -> Vec<u8> {
    let mut words = head.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let status = match path.rsplit('/').next().unwrap_or_default() {
        "absent" => 404,
        "secret" => 403,
        "fault" => 500,
        "limited" => 429,
        _ if head.to_ascii_lowercase().contains(&format!("if-none-match: {ETAG}")) => 304,
        _ => 200,
    };
    answer(method, status, path)
}

fn answer(method: &str, status: u16, body: &str) -> Vec<u8> {
    let length = if status == 304 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let body = if status == 304 || method == "HEAD" { "" } else { body };
    format!("HTTP/1.1 {status} As Told\r\nETag: {ETAG}\r\nContent-Type: application/json\r\n{length}\r\n{body}").into_bytes()
}
