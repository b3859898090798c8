//! Raw HTTP/1.1 for clients and servers, so that a test sees exactly the sent bytes.

use std::io;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A connection, and the bytes that were read ahead.
pub(crate) struct Wire {
    pub(crate) stream: TcpStream,
    /// The bytes read ahead are `buffer[start..end]`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// The first line and the headers of a message. Names are in lower case.
#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    pub(crate) first: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Head {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The framing of the body; `otherwise` if the headers do not define it.
    pub(crate) fn framing(&self, otherwise: Framing) -> Framing {
        if self.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
            return Framing::Chunked { left: None };
        }
        self.header("content-length").map_or(otherwise, |value| Framing::Length(value.parse().expect("Content-Length is a number")))
    }
}

/// The rest of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    /// `left` bytes of the current chunk; `None` before the first one.
    Chunked {
        left: Option<u64>,
    },
    /// Until the connection closes.
    Close,
}

impl Wire {
    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { stream, buffer: vec![0; 64 * 1024].into(), start: 0, end: 0 }
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Waits until there are bytes in the buffer. Returns false at the end of the stream.
    async fn fill(&mut self, most: usize) -> io::Result<bool> {
        if self.start < self.end {
            return Ok(true);
        }
        let most = most.min(self.buffer.len());
        (self.start, self.end) = (0, self.stream.read(&mut self.buffer[..most]).await?);
        Ok(self.end > 0)
    }

    /// A line without its line end.
    async fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        loop {
            if !self.fill(usize::MAX).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let ready = &self.buffer[self.start..self.end];
            if let Some(at) = ready.iter().position(|&byte| byte == b'\n') {
                line.extend_from_slice(&ready[..at]);
                self.start += at + 1;
                line.pop_if(|byte| *byte == b'\r');
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            line.extend_from_slice(ready);
            self.start = self.end;
        }
    }

    /// The head of the next message; `None` at a clean end of the connection.
    pub(crate) async fn head(&mut self) -> io::Result<Option<Head>> {
        if !self.fill(usize::MAX).await? {
            return Ok(None);
        }
        let mut head = Head { first: self.line().await?, headers: Vec::new() };
        loop {
            let line = self.line().await?;
            let Some((name, value)) = line.split_once(':') else { return Ok(Some(head)) };
            head.headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// The next piece of a body, at most `most` bytes; `None` when it is complete. A body that breaks off is an error.
    pub(crate) async fn piece(&mut self, framing: &mut Framing, most: usize) -> io::Result<Option<&[u8]>> {
        let left = match framing {
            Framing::Length(left) => *left,
            Framing::Close => u64::MAX,
            Framing::Chunked { left } => {
                if let Some(0) = left {
                    self.line().await?;
                }
                if left.is_none_or(|left| left == 0) {
                    let line = self.line().await?;
                    let size = line.split(';').next().unwrap_or_default().trim();
                    let size = u64::from_str_radix(size, 16).map_err(|_| io::Error::other(format!("no chunk size: {line:?}")))?;
                    if size == 0 {
                        while !self.line().await?.is_empty() {}
                        *framing = Framing::Length(0);
                        return Ok(None);
                    }
                    *left = Some(size);
                }
                left.unwrap_or_default()
            }
        };
        if left == 0 {
            return Ok(None);
        }
        if !self.fill(most).await? {
            return if *framing == Framing::Close { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
        let from = self.start;
        let length = (self.end - from).min(most).min(usize::try_from(left).unwrap_or(usize::MAX));
        self.start += length;
        match framing {
            Framing::Length(left) | Framing::Chunked { left: Some(left) } => *left -= length as u64,
            Framing::Close | Framing::Chunked { left: None } => {}
        }
        Ok(Some(&self.buffer[from..from + length]))
    }
}
