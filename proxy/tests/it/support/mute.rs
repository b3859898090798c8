//! An origin with one blob. It answers everything else not at all, or slowly. Cheap enough for thousands of connections.

use super::Blob;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// The start of the digest of the empty blob, enough to recognise it.
const EMPTY: &str = "/cas/e3b0c44298fc1c149afbf4c8";

pub(crate) struct MuteOrigin {
    pub(crate) url: String,
    pub(crate) blob: Blob,
    /// Requests that are waiting.
    waiting: Arc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl Drop for MuteOrigin {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl MuteOrigin {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        rustix::net::listen(&listener, i32::MAX).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (blob, waiting) = (Blob::new(1000), Arc::new(AtomicUsize::new(0)));
        let (held, count) = (blob.clone(), Arc::clone(&waiting));
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (held, count) = (held.clone(), Arc::clone(&count));
                tokio::spawn(async move {
                    let _ = serve(stream, &held, &count).await;
                });
            }
        });
        Self { url, blob, waiting, accepting }
    }

    /// The number of waiting requests.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }
}

/// Counts a waiting request until it is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn serve(mut stream: TcpStream, blob: &Blob, count: &AtomicUsize) -> std::io::Result<()> {
    loop {
        let mut head = Vec::with_capacity(512);
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            if stream.read_buf(&mut head).await? == 0 {
                return Ok(());
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        if head.contains(&blob.path()) {
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", blob.size);
            stream.write_all(&[answer.as_bytes(), &blob.whole()].concat()).await?;
        } else if head.contains(EMPTY) {
            // castier's request at its start.
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await?;
        } else if head.contains("/drip") {
            let _waiting = Waiting::begin(count);
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
            loop {
                stream.write_all(b"1\r\nx\r\n").await?;
                if let Ok(end) = tokio::time::timeout(Duration::from_secs(1), stream.read_u8()).await {
                    return end.map(drop);
                }
            }
        } else if head.contains("/flood") {
            let _waiting = Waiting::begin(count);
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
            let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
            loop {
                stream.write_all(&chunk).await?;
            }
        } else {
            let _waiting = Waiting::begin(count);
            // No answer until castier closes the connection.
            while stream.read(&mut [0; 4096]).await? > 0 {}
            return Ok(());
        }
    }
}
