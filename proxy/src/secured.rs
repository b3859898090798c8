//! TLS at a listener. The handshake begins after the connection is counted, and must end within `limits.header_timeout`. So connections without a
//! handshake cannot occupy the listener without limit.

use async_trait::async_trait;
use castier_serverkit::tls::{Acceptor, Certificate};
use pingora::{
    protocols::{
        GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream, TimingDigest, UniqueID, UniqueIDType,
        raw_connect::ProxyDigest,
    },
    tls::ServerTlsStream,
};
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::timeout,
};

/// The first byte of a TLS handshake (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;

/// What the handshake has shown.
pub(crate) struct Handshake {
    /// The client's certificate, if it has shown one.
    pub(crate) certificate: Option<Certificate>,
    /// Both have agreed on HTTP/2.
    pub(crate) is_http2: bool,
}

/// There is no connection after all.
pub(crate) enum Failed {
    /// The client speaks plain HTTP. It can get an answer.
    Plain(Stream),
    /// The handshake failed, or took too long.
    Handshake(String),
}

/// The connection after its handshake, which may take `limit`.
pub(crate) async fn accept(acceptor: Acceptor, stream: Stream, limit: Duration) -> Result<(Stream, Handshake), Failed> {
    timeout(limit, shake(acceptor, stream))
        .await
        .unwrap_or_else(|_| Err(Failed::Handshake("it took longer than limits.header_timeout".into())))
}

async fn shake(acceptor: Acceptor, mut stream: Stream) -> Result<(Stream, Handshake), Failed> {
    let mut first = [0];
    match stream.try_peek(&mut first).await {
        // Letters begin the method of a request.
        Ok(true) if first[0] != HANDSHAKE && first[0].is_ascii_alphabetic() => return Err(Failed::Plain(stream)),
        Ok(_) => {}
        Err(error) => return Err(Failed::Handshake(error.to_string())),
    }
    let (secured, certificate) = acceptor.accept(stream).await.map_err(|error| Failed::Handshake(error.to_string()))?;
    let is_http2 = secured.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok((Box::new(Secured(Box::new(secured))), Handshake { certificate, is_http2 }))
}

/// A connection under TLS.
#[derive(Debug)]
struct Secured(Box<ServerTlsStream<Stream>>);

impl Secured {
    fn inner(&self) -> &Stream {
        self.0.get_ref().0
    }
}

impl AsyncRead for Secured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[async_trait]
impl Shutdown for Secured {
    async fn shutdown(&mut self) {
        // The connection ends in any case, so an error changes nothing.
        let _ = self.0.shutdown().await;
    }
}

impl UniqueID for Secured {
    fn id(&self) -> UniqueIDType {
        self.inner().id()
    }
}

impl Ssl for Secured {}

impl GetTimingDigest for Secured {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner().get_timing_digest()
    }
}

impl GetProxyDigest for Secured {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner().get_proxy_digest()
    }
}

impl GetSocketDigest for Secured {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner().get_socket_digest()
    }
}

impl Peek for Secured {}
