//! Connections: accepting them within a limit, serving HTTP/1 on them, and ending them well.

use crate::connection_timeouts::{Activity, TimedStream};
use bytes::Bytes;
use castier_config::OriginLimits;
use castier_serverkit::admin_connections::AdminConnections;
use castier_wire::Problem;
use http::{Request, Response, StatusCode};
use http_body::Body;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::{GracefulShutdown, Watcher},
};
use std::{
    convert::Infallible,
    error::Error,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_util::sync::CancellationToken;

/// hyper's write buffer. Large enough to send a head and a small body in one write.
const WRITE_BUFFER: usize = 64 << 10;
/// The most connections over the limit that get a 503 at the same time. Others are closed without an answer.
const REFUSALS: usize = 128;
/// How long a refused client may take to read its 503.
const REFUSAL_TIME: Duration = Duration::from_secs(1);
/// The pause after a failed `accept`. Most often it fails because no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Answers requests.
pub(crate) trait Handler: Clone + Send + Sync + 'static {
    /// The body of its answers.
    type Body: Body<Data = Bytes, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static;

    /// What to do with a connection over the limit.
    const FULL: Full;

    /// The most connections at once.
    fn max_connections(limits: &OriginLimits) -> usize;

    /// The current limits.
    fn limits(&self) -> Arc<OriginLimits>;

    /// Answers one request. The handler calls `activity.begin()` first, and `activity.end()` when the answer has been sent or has failed.
    fn answer(
        &self,
        request: Request<Incoming>,
        address: SocketAddr,
        activity: Arc<Activity>,
    ) -> impl Future<Output = Response<Self::Body>> + Send;
}

/// What to do with a connection over the limit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// It gets a 503.
    NewcomersAreRefused,
    /// The oldest connection without a request is closed for it. So a health check is answered even if idle connections use up the limit.
    OldestIdleMakesWay,
}

/// Counts one connection or transfer until it is dropped.
pub(crate) struct Slot(Arc<AtomicUsize>);

impl Slot {
    /// Takes a slot. Also returns how many are taken now.
    pub(crate) fn take(taken: &Arc<AtomicUsize>) -> (Self, usize) {
        let now = taken.fetch_add(1, Relaxed) + 1;
        (Self(Arc::clone(taken)), now)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Serves `listener` until `shutdown` is done. Then lets running requests finish for up to `grace`, and cuts the others.
pub(crate) async fn serve<H: Handler>(listener: TcpListener, handler: H, shutdown: impl Future<Output = ()>, grace: Duration) {
    let (graceful, cut) = (GracefulShutdown::new(), CancellationToken::new());
    let (open, refusals) = (Arc::default(), Arc::default());
    let mut shutdown = pin!(shutdown);
    let mut admin = AdminConnections::default();
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, address)) => {
                let most = H::max_connections(&handler.limits());
                let (slot, taken) = Slot::take(&open);
                let is_admitted = match H::FULL {
                    Full::NewcomersAreRefused => taken <= most,
                    Full::OldestIdleMakesWay => admin.admit(most),
                };
                if is_admitted {
                    let activity = Arc::new(Activity::default());
                    let task = connection(stream, address, handler.clone(), graceful.watcher(), cut.clone(), slot, Arc::clone(&activity));
                    let task = tokio::spawn(task);
                    if H::FULL == Full::OldestIdleMakesWay {
                        admin.add(move || activity.is_busy(), task.abort_handle());
                    }
                } else {
                    let (slot, taken) = Slot::take(&refusals);
                    if taken <= REFUSALS {
                        tokio::spawn(refuse(stream, slot));
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted; is the limit of open files below limits.max_connections?");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("shutdown.grace is over; connections still in use are cut");
    }
    cut.cancel();
}

async fn connection(
    stream: TcpStream,
    address: SocketAddr,
    handler: impl Handler,
    watcher: Watcher,
    cut: CancellationToken,
    _slot: Slot,
    activity: Arc<Activity>,
) {
    // If this fails, the connection still works, only with more latency.
    stream.set_nodelay(true).ok();
    let limits = handler.limits();
    let stream = TimedStream::new(stream, Arc::clone(&activity), &limits);
    let service = service_fn(move |request| {
        let (handler, activity) = (handler.clone(), Arc::clone(&activity));
        async move { Ok::<_, Infallible>(handler.answer(request, address, activity).await) }
    });
    let header_bytes = usize::try_from(limits.max_header_bytes.get()).unwrap_or(usize::MAX);
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .half_close(true)
        .max_buf_size(WRITE_BUFFER.max(header_bytes.saturating_add(1)))
        .max_header_size(header_bytes)
        .max_headers(limits.max_headers)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = watcher.watch(serving) => if let Err(error) = served {
            tracing::debug!(peer = %address, error = &error as &dyn Error, "a connection ended badly");
        },
        () = cut.cancelled() => {}
    }
}

/// Sends a 503 and closes. Reads the client's bytes until then: if the connection closed with unread bytes, the kernel would reset it, and the client
/// might lose the answer.
async fn refuse(mut stream: TcpStream, _slot: Slot) {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let body = Problem::new(status, "there are too many connections; try again in a second").to_json();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/problem+json\r\nContent-Length: {}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let sent = async {
        stream.write_all((head + &body).as_bytes()).await?;
        stream.shutdown().await?;
        while stream.read(&mut [0; 4096]).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    // If the client does not read it, the connection closes anyway.
    tokio::time::timeout(REFUSAL_TIME, sent).await.ok();
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full as Whole;

    /// An admin listener of eight connections.
    #[derive(Clone)]
    struct Small(Arc<OriginLimits>);

    impl Handler for Small {
        type Body = Whole<Bytes>;
        const FULL: Full = Full::OldestIdleMakesWay;

        fn max_connections(_: &OriginLimits) -> usize {
            8
        }

        fn limits(&self) -> Arc<OriginLimits> {
            Arc::clone(&self.0)
        }

        async fn answer(&self, _: Request<Incoming>, _: SocketAddr, activity: Arc<Activity>) -> Response<Self::Body> {
            activity.begin();
            activity.end();
            Response::new(Whole::default())
        }
    }

    /// One thread accepts all that wait before any task that was aborted runs again and gives its slot back.
    #[tokio::test]
    async fn a_health_check_behind_many_half_heads_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = listener.local_addr().unwrap();
        let mut half_heads = Vec::new();
        for _ in 0..60 {
            let mut stream = TcpStream::connect(to).await.unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\nX: ").await.unwrap();
            half_heads.push(stream);
        }
        let mut check = TcpStream::connect(to).await.unwrap();
        check.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        let serving = serve(listener, Small(Arc::default()), std::future::pending(), Duration::ZERO);
        let mut answer = Vec::new();
        tokio::select! {
            () = serving => {}
            read = tokio::time::timeout(Duration::from_secs(30), check.read_to_end(&mut answer)) => { read.unwrap().unwrap(); }
        }
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
        drop(half_heads);
    }
}
