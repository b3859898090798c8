//! A client that speaks HTTP/2 by prior knowledge, with the `h2` library; and frames made by hand.

use crate::support::{DEADLINE, Request};
use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use http::{HeaderMap, StatusCode};
use std::{future::poll_fn, net::SocketAddr};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
    time::timeout,
};

/// A connection.
pub(crate) struct Http2 {
    send: SendRequest<Bytes>,
    /// Ends with the connection.
    pub(crate) end: JoinHandle<Result<(), h2::Error>>,
    to: SocketAddr,
}

/// A reply, whose body may have ended with an error.
pub(crate) struct Reply2 {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) error: Option<h2::Error>,
}

impl Http2 {
    pub(crate) async fn open(to: SocketAddr) -> Self {
        Self::with(to, &Builder::new()).await
    }

    pub(crate) async fn with(to: SocketAddr, builder: &Builder) -> Self {
        let stream = TcpStream::connect(to).await.unwrap();
        // As clients do it. Else the end of each window waits for an acknowledgement.
        stream.set_nodelay(true).unwrap();
        let (send, connection) = builder.handshake(stream).await.unwrap();
        Self { send, end: tokio::spawn(connection), to }
    }

    /// A request whose body is sent in pieces, as the windows allow. Without `has_body` there is none.
    pub(crate) async fn begin(&self, request: &Request, has_body: bool) -> Result<(ResponseFuture, h2::SendStream<Bytes>), h2::Error> {
        let (method, target, headers, _) = request.parts();
        let mut builder = http::Request::builder().method(method).uri(format!("http://{}{target}", self.to));
        for (name, value) in headers {
            builder = builder.header(name, value);
        }
        let mut send = self.send.clone().ready().await?;
        send.send_request(builder.body(()).unwrap(), !has_body)
    }

    /// Asks, and reads the whole reply.
    pub(crate) async fn ask(&self, request: &Request) -> Result<Reply2, h2::Error> {
        let (.., payload) = request.parts();
        let (reply, mut body) = self.begin(request, !payload.is_empty()).await?;
        if payload.is_empty() {
            return read(reply).await;
        }
        let payload = Bytes::copy_from_slice(payload);
        // The server may answer, and take no more, before the end of the body.
        let (_, reply) = tokio::join!(send_all(&mut body, payload), read(reply));
        reply
    }

    pub(crate) async fn get(&self, target: &str) -> Result<Reply2, h2::Error> {
        self.ask(&Request::get(target)).await
    }
}

/// Sends the last bytes of a body.
pub(crate) async fn send_all(body: &mut h2::SendStream<Bytes>, mut bytes: Bytes) -> Result<(), h2::Error> {
    while !bytes.is_empty() {
        body.reserve_capacity(bytes.len());
        let Some(capacity) = poll_fn(|cx| body.poll_capacity(cx)).await else { return Ok(()) };
        let part = bytes.split_to(capacity?.min(bytes.len()));
        body.send_data(part, bytes.is_empty())?;
    }
    Ok(())
}

/// Reads a reply to its end.
pub(crate) async fn read(reply: ResponseFuture) -> Result<Reply2, h2::Error> {
    let reply = timeout(DEADLINE, reply).await.expect("a reply")?;
    let (head, mut incoming) = reply.into_parts();
    let (mut body, mut error) = (Vec::new(), None);
    while let Some(piece) = timeout(DEADLINE, incoming.data()).await.expect("more of the body") {
        match piece {
            Ok(piece) => {
                incoming.flow_control().release_capacity(piece.len()).unwrap();
                body.extend_from_slice(&piece);
            }
            Err(why) => {
                error = Some(why);
                break;
            }
        }
    }
    Ok(Reply2 { status: head.status, headers: head.headers, body, error })
}

pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame: its type, flags, stream and payload (RFC 9113, section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block without compression: literals without indexing, with new names (RFC 7541, section 6.2.2).
pub(crate) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            assert!(text.len() < 127);
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// A GET that opens this stream.
pub(crate) fn get_frame(stream: u32, path: &str) -> Vec<u8> {
    frame(1, 5, stream, &block(&[(":method", "GET"), (":scheme", "http"), (":authority", "a"), (":path", path)]))
}

/// Reads a frame: its type, its stream and its payload. `None` at the end of the connection.
pub(crate) async fn read_frame(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<(u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    timeout(DEADLINE, stream.read_exact(&mut head)).await.expect("a frame, or the end").ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    timeout(DEADLINE, stream.read_exact(&mut payload)).await.expect("a payload").ok()?;
    Some((head[3], u32::from_be_bytes(head[5..].try_into().unwrap()), payload))
}

/// Reads frames up to a GOAWAY, and returns its error code; `None` if the connection ends without one.
pub(crate) async fn goaway(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<u32> {
    loop {
        let (kind, _, payload) = read_frame(stream).await?;
        if kind == 7 {
            return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap()));
        }
    }
}

/// Sends these bytes behind the preface and a SETTINGS frame, and reads meanwhile. Returns the error code of the GOAWAY.
pub(crate) async fn shout(to: SocketAddr, bytes: Vec<u8>) -> Option<u32> {
    let (mut read, mut write) = TcpStream::connect(to).await.unwrap().into_split();
    let shouting = tokio::spawn(async move {
        // The server closes before it has read all of it.
        let _ = write.write_all(&[PREFACE, &frame(4, 0, 0, &[]), &bytes].concat()).await;
        write
    });
    let code = goaway(&mut read).await;
    drop(shouting.await);
    code
}
