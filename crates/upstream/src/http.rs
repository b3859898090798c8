//! The HTTP client: an origin or a peer as a [`Source`] and a [`Store`]. The only file that uses pingora's connectors.

use crate::{
    access::{self, ca_file},
    breaker::{Admission, Breaker, BreakerState},
    metrics::Metrics,
    origin_state::{OriginHealth, OriginState},
    put::REPLAYS,
    resolver::Addresses,
    trace, via_header,
};
use async_trait::async_trait;
use bytes::{Buf, Bytes};
use castier_blob::Digest;
use castier_cache::{
    Answer, Ask, Fault, Incoming, Limit, NoRange, Put, RangeSupport, Ranges, RetryBudget, Source, Stat, Store, Upload, ran_out_of_files,
};
use castier_config as config;
use castier_wire as wire;
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, try_join_all},
    stream::{self, BoxStream},
};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use pingora::{
    ErrorType, RetryType,
    connectors::{ConnectorOptions, L4Connect, TransportConnector},
    http::{RequestHeader, ResponseHeader},
    protocols::{
        Stream,
        http::v1::client::HttpSession,
        l4::{socket::SocketAddr as L4Address, stream::Stream as L4Stream},
    },
    upstreams::peer::{HttpPeer, Peer as _},
};
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// The most idle kept-alive connections to one source. By default there are as many permits for fills.
const POOL: usize = 256;
/// Why an answer of a peer was rejected.
pub const UNPROVED: &str = "without a proof of the cluster's secret; what answers there is no castier of this cluster, or has another secret in cluster.secret_file";
/// How long a connection is kept alive without a request.
const IDLE: Duration = Duration::from_secs(60);
/// The longest answer, other than a blob, that castier reads.
pub(crate) const MAX_ANSWER: usize = 64 << 10;

/// An HTTP server that has blobs: the origin, or a peer.
pub struct Upstream {
    /// `origin` or `peer`, as in metric labels.
    pub name: &'static str,
    connector: Arc<TransportConnector>,
    host: String,
    addresses: Addresses,
    tls: bool,
    /// Host and port, as in the header `Host`.
    authority: String,
    /// `Authorization`, from the URL's user and password.
    credentials: Option<HeaderValue>,
    connect_timeout: Duration,
    /// The longest time without a byte. It does not limit the whole transfer.
    pub(crate) read_timeout: Duration,
    metrics: Arc<Metrics>,
    /// Whether the origin is up; `None` for a peer, whose health the membership knows.
    health: Option<OriginHealth>,
    /// `None` for a peer, and if it would never open.
    breaker: Option<Arc<Breaker>>,
    /// `None` for a peer: one that fails gets no requests.
    retry_budget: Option<Arc<RetryBudget>>,
    /// `origin.max_requests` permits. Each peer has as many of its own.
    requests: Semaphore,
    /// Permits for [`REPLAYS`].
    pub(crate) replays: Semaphore,
    /// `None` for the origin.
    trust: Option<Box<dyn Trust>>,
    /// Addresses that are not connected to.
    refuses: fn(IpAddr) -> bool,
    /// Whether it gives the ranges that it announces.
    range_support: RangeSupport,
}

/// A server that a route uses.
pub struct RouteServer<'a> {
    /// The connections to all servers of routes.
    pub connector: Arc<TransportConnector>,
    /// Its URL, of which only scheme, host and port count.
    pub url: &'a url::Url,
    /// How long a connection may take to open.
    pub connect_timeout: Duration,
    /// The longest time without a byte.
    pub read_timeout: Duration,
    /// The most small requests at once.
    pub max_requests: usize,
    /// `origin.retry_budget`, shared by all servers of routes.
    pub retry_budget: Arc<RetryBudget>,
    /// `origin.breaker_failures`.
    pub breaker_failures: u32,
    /// `origin.breaker_pause`.
    pub breaker_pause: Duration,
    /// Addresses that are not connected to.
    pub refuses: fn(IpAddr) -> bool,
}

/// The connections to all servers of routes. With a `ca_file`, its CAs must have signed their certificates.
pub fn connector(ca_file: Option<String>) -> Arc<TransportConnector> {
    let mut options = ConnectorOptions::new(POOL);
    options.ca_file = ca_file;
    Arc::new(TransportConnector::new(Some(options)))
}

/// The additional steps for a peer: its requests and answers are signed, and an unreachable peer is reported.
pub trait Trust: Send + Sync {
    /// Signs a request. It must not change after this. Each attempt gets a new signature.
    ///
    /// # Errors
    /// The request cannot be signed.
    fn sign(&self, request: &mut RequestHeader) -> Result<Box<dyn Signed>, Fault>;

    /// Reports that no connection to the peer can be opened.
    fn unreachable(&self);
}

/// A signed request.
pub trait Signed: Send + Sync {
    /// Whether a node that knows the secret gave this answer to this request.
    fn is_answered(&self, status: StatusCode, headers: &HeaderMap) -> bool;
}

/// The signature of a request; `None` for the origin.
pub(crate) type Signature = Option<Box<dyn Signed>>;

/// A peer as an HTTP server.
pub struct PeerServer {
    /// The connections to all peers.
    pub connector: Arc<TransportConnector>,
    /// A host name or an address, without brackets.
    pub host: String,
    /// The port of its peer listener.
    pub port: u16,
    /// `HOST:PORT`, for `Host` and logs.
    pub authority: String,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// How long a connection may take to open.
    pub connect_timeout: Duration,
    /// The longest time without a byte.
    pub read_timeout: Duration,
    /// The most small requests and small uploads at once.
    pub max_requests: usize,
    /// Signs requests and checks answers.
    pub trust: Box<dyn Trust>,
}

impl Upstream {
    /// Whether this is another node, and not the origin.
    pub(crate) const fn is_peer(&self) -> bool {
        self.trust.is_some()
    }

    /// The origin at `url`.
    ///
    /// # Errors
    /// A text that names the unusable part of the URL.
    pub fn origin(url: &url::Url, config: &config::Origin, metrics: Arc<Metrics>) -> Result<Arc<Self>, String> {
        let host = url.host_str().ok_or("origin.url: names no host")?.trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().ok_or("origin.url: names no port")?;
        let default_port = url.port().is_none();
        let shown = url.host_str().unwrap_or_default();
        let mut options = ConnectorOptions::new(POOL);
        options.ca_file = ca_file(config)?;
        Ok(Arc::new(Self {
            name: "origin",
            connector: Arc::new(TransportConnector::new(Some(options))),
            authority: if default_port { shown.to_owned() } else { format!("{shown}:{port}") },
            addresses: Addresses::of(&host, port),
            host,
            tls: url.scheme() == "https",
            credentials: access::basic(url),
            connect_timeout: config.connect_timeout.get(),
            read_timeout: config.read_timeout.get(),
            health: Some(OriginHealth::default()),
            retry_budget: Some(RetryBudget::new(config.retry_budget, metrics.retries_refused().clone())),
            breaker: Breaker::new("origin", config.breaker_failures, config.breaker_pause.get(), metrics.breaker("origin")),
            metrics,
            requests: Semaphore::new(config.max_requests),
            replays: Semaphore::new(REPLAYS),
            trust: None,
            refuses: |_| false,
            range_support: RangeSupport::default(),
        }))
    }

    /// A server of a route. Its health is not that of the origin.
    ///
    /// # Errors
    /// A text that names the unusable part of the URL.
    pub fn of_route(server: RouteServer<'_>, metrics: Arc<Metrics>) -> Result<Arc<Self>, String> {
        let (host, port) = (server.url.host_str().ok_or("names no host")?, server.url.port_or_known_default().ok_or("names no port")?);
        let bare = host.trim_matches(['[', ']']).to_owned();
        Ok(Arc::new(Self {
            name: "upstream",
            connector: server.connector,
            authority: server.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}")),
            addresses: Addresses::of(&bare, port),
            host: bare,
            tls: server.url.scheme() == "https",
            credentials: access::basic(server.url),
            connect_timeout: server.connect_timeout,
            read_timeout: server.read_timeout,
            health: None,
            retry_budget: Some(server.retry_budget),
            breaker: Breaker::new("upstream", server.breaker_failures, server.breaker_pause, metrics.breaker("upstream")),
            metrics,
            requests: Semaphore::new(server.max_requests),
            replays: Semaphore::new(REPLAYS),
            trust: None,
            refuses: server.refuses,
            range_support: RangeSupport::default(),
        }))
    }

    /// Those of these addresses that may be connected to.
    fn allowed(&self, mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
        addresses.retain(|address| !(self.refuses)(address.ip()));
        addresses
    }

    /// A peer.
    pub fn peer(server: PeerServer, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            name: "peer",
            connector: server.connector,
            addresses: Addresses::of(&server.host, server.port),
            host: server.host,
            tls: server.tls,
            authority: server.authority,
            credentials: None,
            connect_timeout: server.connect_timeout,
            read_timeout: server.read_timeout,
            metrics,
            health: None,
            breaker: None,
            retry_budget: None,
            requests: Semaphore::new(server.max_requests),
            replays: Semaphore::new(REPLAYS),
            trust: Some(server.trust),
            refuses: |_| false,
            range_support: RangeSupport::default(),
        })
    }

    /// This server as a source and a store.
    pub fn store(self: &Arc<Self>) -> HttpStore {
        HttpStore(self.clone())
    }

    /// Host and port, as in the header `Host`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Its URL, without a password.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }

    /// The value of `Authorization`, if the source's URL names a user or a password.
    pub const fn credentials(&self) -> Option<&HeaderValue> {
        self.credentials.as_ref()
    }

    /// A GET of a blob, starting at an offset.
    ///
    /// # Errors
    /// [`Fault::Internal`] if a header value is invalid.
    pub fn get_request(&self, digest: &Digest, from: u64) -> Result<RequestHeader, Fault> {
        let mut request = self.request(Method::GET, &wire::blob_path(digest))?;
        if from > 0 {
            insert(&mut request, header::RANGE, &format!("bytes={from}-"))?;
        }
        Ok(request)
    }

    /// The body of an answer to a GET, starting at offset `from`.
    ///
    /// # Errors
    /// The answer does not contain the blob.
    pub fn incoming(self: &Arc<Self>, session: HttpSession, peer: HttpPeer, from: u64) -> Result<Incoming, Fault> {
        let head = session.resp_header().ok_or_else(|| self.unusable("no head"))?;
        self.must_be_uncoded(&head.headers)?;
        if !head.status.is_success() {
            return Err(self.unusable(format!("status {}", head.status.as_u16())));
        }
        self.incoming_as_it_is(session, peer, from)
    }

    /// As [`Self::incoming`], for a body in any content coding, and for that of an absence.
    ///
    /// # Errors
    /// As [`Self::incoming`].
    pub fn incoming_as_it_is(self: &Arc<Self>, session: HttpSession, peer: HttpPeer, from: u64) -> Result<Incoming, Fault> {
        let head = session.resp_header().ok_or_else(|| self.unusable("no head"))?;
        let (size, skip) = match head.status {
            // A source without ranges sends the whole blob. The first `from` bytes are skipped.
            StatusCode::OK => (number(head.headers.get(header::CONTENT_LENGTH)), from),
            StatusCode::PARTIAL_CONTENT if from > 0 => {
                let (first, _, size) = head
                    .headers
                    .get(header::CONTENT_RANGE)
                    .and_then(content_range)
                    .ok_or_else(|| self.unusable("a 206 without a Content-Range"))?;
                if first != from {
                    return Err(self.unusable("another range than was asked for"));
                }
                (size, 0)
            }
            StatusCode::NOT_FOUND | StatusCode::GONE if from == 0 => (number(head.headers.get(header::CONTENT_LENGTH)), 0),
            status => return Err(self.unusable(format!("status {}", status.as_u16()))),
        };
        Ok(Incoming::new(size, self.body(session, peer, skip)))
    }

    /// The body of an answer, without its first `skip` bytes.
    fn body(self: &Arc<Self>, session: HttpSession, peer: HttpPeer, skip: u64) -> BoxStream<'static, Result<Bytes, Fault>> {
        let transfer = Transfer { upstream: self.clone(), session, peer, skip };
        stream::try_unfold(Some(transfer), Transfer::next).boxed()
    }

    /// Further parts of the version that this answer is of, if its server gives such: it says so, and has a strong name for the version.
    fn ranges(self: &Arc<Self>, session: &HttpSession, ask: &Ask) -> Option<Arc<dyn Ranges>> {
        let (head, digest) = (session.resp_header()?, ask.digest().ok()?);
        let size = match head.status {
            StatusCode::OK if ask.from == 0 && accepts_ranges(&head.headers) => number(head.headers.get(header::CONTENT_LENGTH)),
            StatusCode::PARTIAL_CONTENT => head.headers.get(header::CONTENT_RANGE).and_then(content_range).and_then(|(_, _, size)| size),
            _ => None,
        }?;
        let etag = head.headers.get(header::ETAG).filter(|etag| etag.as_bytes().starts_with(b"\""))?.clone();
        let version = Version { upstream: self.clone(), digest, etag, size };
        self.range_support.is_assumed().then(|| Arc::new(version) as Arc<dyn Ranges>)
    }

    /// Rejects coded bytes: neither their length nor their digest is the blob's.
    fn must_be_uncoded(&self, headers: &HeaderMap) -> Result<(), Fault> {
        match headers.get(header::CONTENT_ENCODING) {
            Some(coding) if !coding.as_bytes().eq_ignore_ascii_case(b"identity") => {
                Err(self.unusable("a content coding that was not asked for"))
            }
            _ => Ok(()),
        }
    }

    pub(crate) async fn stat_one(&self, digest: &Digest) -> Result<Stat, Fault> {
        let request = self.request(Method::HEAD, &wire::blob_path(digest))?;
        let (session, peer, _permit) = self.ask(&request, &[]).await?;
        let head = session.resp_header().ok_or_else(|| self.unusable("no head"))?;
        let (status, size) = (head.status, size_of(head, digest));
        self.finish(session, &peer).await;
        match status {
            StatusCode::OK => Ok(Stat::Present(size)),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(Stat::Absent),
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Err(Fault::Busy(Limit::Origin)),
            status => Err(self.unusable(format!("status {}", status.as_u16()))),
        }
    }

    /// The source at one of its addresses, as pingora's type.
    fn at(&self, address: SocketAddr) -> HttpPeer {
        let mut peer = HttpPeer::new(address, self.tls, if self.tls { self.host.clone() } else { String::new() });
        peer.options.connection_timeout = Some(self.connect_timeout);
        peer.options.total_connection_timeout = Some(self.connect_timeout);
        peer.options.read_timeout = Some(self.read_timeout);
        peer.options.write_timeout = Some(self.read_timeout);
        peer.options.idle_timeout = Some(IDLE);
        peer
    }

    /// A kept-alive connection to any of the source's addresses, or else a new one.
    pub(crate) async fn connection(&self) -> Result<Connection, Fault> {
        match self.kept_alive().await {
            Some(connection) => Ok(connection),
            None => Box::pin(self.connect()).await,
        }
    }

    /// A kept-alive connection. The source may close it at any time.
    pub(crate) async fn kept_alive(&self) -> Option<Connection> {
        for address in self.allowed(self.addresses.known()) {
            let peer = self.at(address);
            if let Some(stream) = self.connector.reused_stream(&peer).await {
                return Some(Connection { stream, address, peer, reused: true });
            }
        }
        None
    }

    /// A new connection, to the first address that accepts one within `origin.connect_timeout`.
    ///
    /// # Errors
    /// No address does, or the name has never resolved.
    pub(crate) async fn connect(&self) -> Result<Connection, Fault> {
        let begun = Instant::now();
        self.connect_anew().await.inspect_err(|fault| {
            // Not if this node has run out of files: that says nothing about the origin.
            if matches!(fault, Fault::Unreachable { .. } | Fault::Silent { .. }) {
                self.report_unreachable(begun, fault);
            }
        })
    }

    async fn connect_anew(&self) -> Result<Connection, Fault> {
        let deadline = Instant::now() + self.connect_timeout;
        let unresolved = |why| Fault::Unreachable { source_name: self.name, why };
        let mut addresses = self.allowed(self.addresses.all(deadline).await.map_err(unresolved)?);
        if addresses.is_empty() {
            return Err(unresolved(format!("{} has only addresses that may not be connected to", self.host)));
        }
        // The time of the look-up does not count for the connection.
        let deadline = Instant::now() + self.connect_timeout;
        loop {
            let (stream, address) = match self.addresses.connect(&addresses, deadline).await {
                Ok(connected) => connected,
                Err(error) => {
                    addresses = self.allowed(self.addresses.moved(&addresses, deadline).await);
                    if addresses.is_empty() {
                        return Err(self.not_connected(&connect_error(error)));
                    }
                    self.addresses.connect(&addresses, deadline).await.map_err(|error| self.not_connected(&connect_error(error)))?
                }
            };
            let mut peer = self.at(address);
            peer.options.custom_l4 = Some(Handed::over(stream.into()));
            // Boxed: the state of a TLS handshake is large, and many futures contain this one.
            match Box::pin(self.connector.new_stream(&peer)).await {
                Ok(stream) => {
                    peer.options.custom_l4 = None;
                    return Ok(Connection { stream, address, peer, reused: false });
                }
                // The TLS handshake failed. Another address may be another server.
                Err(error) => {
                    addresses.retain(|other| *other != address);
                    if addresses.is_empty() || Instant::now() >= deadline {
                        return Err(self.not_connected(&error));
                    }
                }
            }
        }
    }

    /// [`Self::exchange`] with one of `origin.max_requests` permits, which the caller gets with the answer. The wait for the permit may take as
    /// long as the wait for the answer: a client sees no difference. A fill resumes a broken transfer by itself; other requests do not, so they are
    /// repeated once.
    pub(crate) async fn ask(&self, request: &RequestHeader, body: &[u8]) -> Result<(HttpSession, HttpPeer, SemaphorePermit<'_>), Fault> {
        let Ok(Ok(permit)) = timeout(self.read_timeout, self.requests.acquire()).await else { return Err(Fault::Busy(Limit::Requests)) };
        let (session, peer) = self.repeat(request, body, 1).await?;
        Ok((session, peer, permit))
    }

    /// Sends an idempotent request, with a body in memory, and reads the head of the answer.
    pub async fn exchange(&self, request: &RequestHeader, body: &[u8]) -> Result<(HttpSession, HttpPeer), Fault> {
        self.repeat(request, body, 0).await
    }

    /// [`Self::exchange`], with up to `repeats` retries if a connection breaks before the answer.
    pub async fn repeat(&self, request: &RequestHeader, body: &[u8], repeats: usize) -> Result<(HttpSession, HttpPeer), Fault> {
        let _admission = self.admit().await?;
        if let Some(budget) = self.retry_budget.as_ref().filter(|_| repeats > 0) {
            budget.request();
        }
        let asked = Instant::now();
        let answered = self.try_repeat(request, body, repeats).await;
        self.report_outcome(asked, answered.as_ref().map(|(session, _)| session.get_status().unwrap_or_default()));
        answered
    }

    fn may_retry(&self) -> bool {
        self.retry_budget.as_ref().is_none_or(|budget| budget.retry())
    }

    /// The retries that requests to it may make, those for loads included; `None` for a peer.
    pub const fn retry_budget(&self) -> Option<&Arc<RetryBudget>> {
        self.retry_budget.as_ref()
    }

    async fn try_repeat(&self, request: &RequestHeader, body: &[u8], mut repeats: usize) -> Result<(HttpSession, HttpPeer), Fault> {
        use ErrorType::{ConnectionClosed, ReadError, WriteError};
        loop {
            let connection = self.connection().await?;
            let reused = connection.reused;
            let (mut session, peer) = connection.session(self.read_timeout);
            let mut request = request.clone();
            let signature = self.sign(&mut request)?;
            let answered = async {
                session.write_request_header(Box::new(request)).await?;
                if !body.is_empty() {
                    session.write_body(body).await?;
                    session.finish_body().await?;
                }
                self.final_head(&mut session).await
            };
            match answered.await {
                Ok(()) => return self.must_be_proved(&signature, &session).map(|()| (session, peer)),
                // The source may have closed a kept-alive connection at any time, so this does not count as a retry. The loop ends at the latest
                // when the pool is empty.
                Err(error) if reused && (error.retry == RetryType::ReusedOnly || error.etype == WriteError) => {}
                // The source restarts, or its queue of new connections was full.
                Err(error) if repeats > 0 && matches!(error.etype, ConnectionClosed | ReadError | WriteError) && self.may_retry() => {
                    repeats -= 1
                }
                Err(error) => return Err(self.fault(&error)),
            }
        }
    }

    /// Lets a request pass. Call it before each, and keep what it returns until [`Self::report_outcome`] tells how it ended.
    ///
    /// # Errors
    /// [`Fault::NotAsked`] while the circuit breaker is open.
    pub async fn admit(&self) -> Result<Admission, Fault> {
        match &self.breaker {
            Some(breaker) => breaker.admit().await,
            None => Ok(Admission::FREE),
        }
    }

    /// Reports the outcome of a request that was sent at `asked`: the status of the answer, or the fault.
    pub fn report_outcome(&self, asked: Instant, answer: Result<StatusCode, &Fault>) {
        if let Some(breaker) = &self.breaker {
            breaker.record(&self.authority, asked, answer);
        }
        if let Some(health) = &self.health {
            health.record(&self.authority, asked, answer, &self.metrics);
        }
    }

    /// Reports that no connection could be opened. The attempt began at `begun`.
    fn report_unreachable(&self, begun: Instant, fault: &Fault) {
        if let Some(health) = &self.health {
            health.record_unreachable(&self.authority, begun, fault, &self.metrics);
        }
    }

    /// So many bytes of a blob came.
    pub(crate) fn received(&self, bytes: u64) {
        self.metrics.received(self.name, bytes);
    }

    /// Reports that the body of an answer broke off. That counts as an error. It does not show that the origin is down.
    pub(crate) fn report_broken_body(&self) {
        if let Some(health) = &self.health {
            health.record_broken_body();
        }
    }

    /// Whether the origin is up, as its last requests showed; `None` for a peer.
    pub fn origin_state(&self) -> Option<OriginState> {
        self.health.as_ref().map(|health| OriginState { breaker: self.breaker_state(), ..health.state() })
    }

    /// Its circuit breaker; closed if it has none.
    pub fn breaker_state(&self) -> BreakerState {
        self.breaker.as_ref().map(|breaker| breaker.state()).unwrap_or_default()
    }

    /// Reads response heads up to the first that is not informational, all within one `origin.read_timeout`: interim answers and parts of a head
    /// do not extend it. Not safe to cancel and call again.
    pub(crate) async fn final_head(&self, session: &mut HttpSession) -> pingora::Result<()> {
        let why = || pingora::Error::explain(ErrorType::ReadTimedout, "no final answer in time");
        timeout(self.read_timeout, read_final(session)).await.unwrap_or_else(|_| Err(why()))
    }

    /// Puts the connection of a session into the pool if it can be used again.
    pub async fn finish(&self, mut session: HttpSession, peer: &HttpPeer) {
        const LIMIT: Duration = Duration::from_millis(200);
        // A connection can be used again only after the whole body was read. For a short error body that is cheaper than a new connection.
        let rest = async {
            let mut read = 0;
            while let Ok(Some(part)) = session.read_body_bytes().await {
                read += part.len();
                if read > MAX_ANSWER {
                    return false;
                }
            }
            true
        };
        if timeout(LIMIT, rest).await == Ok(true) {
            session.respect_keepalive();
            // If the connection cannot be kept alive, `reuse` shuts it down. TLS then writes a last record, and the source may not read it. Hence
            // the timeout.
            if let Ok(Some(stream)) = timeout(LIMIT, session.reuse()).await {
                self.release(stream, peer);
            }
        }
    }

    /// Puts a connection into the pool.
    pub(crate) fn release(&self, stream: Stream, peer: &HttpPeer) {
        self.connector.release_stream(stream, peer.reuse_hash(), Some(IDLE));
    }

    /// A request with the headers that every request to this server has.
    ///
    /// # Errors
    /// [`Fault::Internal`] if a header value is invalid.
    pub fn request(&self, method: Method, path: &str) -> Result<RequestHeader, Fault> {
        let mut request = RequestHeader::build(method, path.as_bytes(), Some(6)).map_err(|error| Fault::Internal(error.to_string()))?;
        insert(&mut request, header::HOST, &self.authority)?;
        insert(&mut request, header::USER_AGENT, concat!("castier/", env!("CARGO_PKG_VERSION")))?;
        insert(&mut request, header::ACCEPT_ENCODING, "identity")?;
        request.insert_header(header::VIA, via_header::whole()).map_err(|error| Fault::Internal(error.to_string()))?;
        for (name, value) in trace::headers() {
            request.insert_header(name, value).map_err(|error| Fault::Internal(error.to_string()))?;
        }
        if let Some(credentials) = &self.credentials {
            request.insert_header(header::AUTHORIZATION, credentials.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
        }
        Ok(request)
    }

    /// Signs a request to a peer. The request must not change after this.
    pub(crate) fn sign(&self, request: &mut RequestHeader) -> Result<Signature, Fault> {
        self.trust.as_ref().map(|trust| trust.sign(request)).transpose()
    }

    /// Rejects an answer of a peer unless it proves that a node that knows the secret gave it to this request.
    pub(crate) fn must_be_proved(&self, signature: &Signature, session: &HttpSession) -> Result<(), Fault> {
        match session.resp_header() {
            Some(head) if signature.as_ref().is_none_or(|signed| signed.is_answered(head.status, &head.headers)) => Ok(()),
            Some(head) => Err(self.unusable(format!("status {}, {UNPROVED}", head.status.as_u16()))),
            None => Err(self.unusable("no head")),
        }
    }

    /// The fault if no address of the source accepted a connection. `error` is that of the last address. Reports a peer as unreachable.
    fn not_connected(&self, error: &pingora::Error) -> Fault {
        use ErrorType::{
            ConnectError, ConnectNoRoute, ConnectRefused, ConnectTimedout, InvalidCert, TLSHandshakeFailure, TLSHandshakeTimedout,
        };
        // Not if this node has run out of ports or files: that says nothing about the peer.
        let remote = matches!(
            error.etype,
            ConnectError | ConnectNoRoute | ConnectRefused | ConnectTimedout | InvalidCert | TLSHandshakeFailure | TLSHandshakeTimedout
        );
        if let Some(trust) = self.trust.as_ref().filter(|_| remote) {
            trust.unreachable();
        }
        self.fault(error)
    }

    /// The server answered, but the answer cannot be used.
    pub fn unusable(&self, why: impl Into<String>) -> Fault {
        Fault::Unusable { source_name: self.name, why: why.into() }
    }

    /// The fault for a pingora error.
    pub fn fault(&self, error: &pingora::Error) -> Fault {
        if ran_out_of_files(error.root_cause()) {
            return Fault::Busy(Limit::Files);
        }
        let (source_name, why) = (self.name, error.to_string());
        // Errors without a number of the operating system come from a lent connection (`lent.rs`).
        if let Some(error) = error.root_cause().downcast_ref::<io::Error>().filter(|error| error.raw_os_error().is_none()) {
            match error.kind() {
                io::ErrorKind::TimedOut => return Fault::Silent { source_name, why },
                io::ErrorKind::InvalidData => return Fault::Unusable { source_name, why },
                _ => {}
            }
        }
        match error.etype {
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => Fault::Silent { source_name, why },
            ErrorType::InvalidHTTPHeader => Fault::Unusable { source_name, why },
            _ => Fault::Unreachable { source_name, why },
        }
    }
}

/// An HTTP server as a source and a store.
#[derive(Clone)]
pub struct HttpStore(Arc<Upstream>);

impl Source for HttpStore {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        async move {
            let request = self.0.get_request(&ask.digest()?, ask.from)?;
            let (session, peer) = self.0.exchange(&request, &[]).await?;
            match session.get_status() {
                Some(StatusCode::NOT_FOUND | StatusCode::GONE) => {
                    self.0.finish(session, &peer).await;
                    Ok(Answer::Absent)
                }
                Some(StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) => Err(Fault::Busy(Limit::Origin)),
                _ => {
                    let ranges = self.0.ranges(&session, &ask);
                    self.0.incoming(session, peer, ask.from).map(|incoming| Answer::Bytes(incoming.with_ranges(ranges)))
                }
            }
        }
        .boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        // Each request takes one of `origin.max_requests` permits, so a batch cannot flood the origin.
        try_join_all(digests.iter().map(|digest| self.0.stat_one(digest))).boxed()
    }

    fn url(&self) -> Option<String> {
        Some(self.0.url())
    }
}

impl Store for HttpStore {
    fn put<'a>(&'a self, upload: &'a mut Upload<'_>) -> BoxFuture<'a, Result<Put, Fault>> {
        self.0.put(upload).boxed()
    }

    fn delete<'a>(&'a self, digest: &'a Digest) -> BoxFuture<'a, Result<bool, Fault>> {
        async move {
            let request = self.0.request(Method::DELETE, &wire::blob_path(digest))?;
            let (session, peer, _permit) = self.0.ask(&request, &[]).await?;
            let status = session.get_status().ok_or_else(|| self.0.unusable("no status"))?;
            self.0.finish(session, &peer).await;
            match status {
                StatusCode::OK | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => Ok(true),
                StatusCode::NOT_FOUND | StatusCode::GONE => Ok(false),
                StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED | StatusCode::FORBIDDEN => Err(Fault::NotAllowed),
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Err(Fault::Busy(Limit::Origin)),
                status => Err(self.0.unusable(format!("status {} to a DELETE", status.as_u16()))),
            }
        }
        .boxed()
    }

    fn holds<'a>(&'a self, digest: &'a Digest, size: Option<u64>) -> BoxFuture<'a, Result<Option<u64>, Fault>> {
        self.0.holds_durably(digest, size).boxed()
    }
}

/// A version of a blob at a server that gives ranges.
struct Version {
    upstream: Arc<Upstream>,
    digest: Digest,
    /// A strong validator.
    etag: HeaderValue,
    /// The size of the whole blob.
    size: u64,
}

impl Ranges for Version {
    fn read(&self, range: Range<u64>) -> BoxFuture<'static, Result<BoxStream<'static, Result<Bytes, Fault>>, NoRange>> {
        let (upstream, digest, etag, size) = (self.upstream.clone(), self.digest, self.etag.clone(), self.size);
        async move {
            let (session, peer) = async {
                let mut request = upstream.get_request(&digest, 0)?;
                insert(&mut request, header::RANGE, &format!("bytes={}-{}", range.start, range.end - 1))?;
                request.insert_header(header::IF_MATCH, etag.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
                upstream.exchange(&request, &[]).await
            }
            .await
            .map_err(NoRange::Fault)?;
            let fault = |why: &str| Err(NoRange::Fault(upstream.unusable(why)));
            let Some(head) = session.resp_header() else { return fault("no head") };
            match head.status {
                StatusCode::PARTIAL_CONTENT => {}
                // The whole body would follow, so the connection is of no more use.
                StatusCode::OK => return Err(NoRange::Ignored),
                StatusCode::NOT_FOUND | StatusCode::GONE | StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => {
                    upstream.finish(session, &peer).await;
                    return Err(NoRange::Replaced);
                }
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => return Err(NoRange::Fault(Fault::Busy(Limit::Origin))),
                status => return fault(&format!("status {} to a range", status.as_u16())),
            }
            upstream.must_be_uncoded(&head.headers).map_err(NoRange::Fault)?;
            // A server may overlook `If-Match`, but not say that its bytes are of the version that they are not of.
            match head.headers.get(header::ETAG) {
                Some(now) if *now == etag => {}
                Some(_) => return Err(NoRange::Replaced),
                None => return Err(NoRange::Ignored),
            }
            match head.headers.get(header::CONTENT_RANGE).and_then(content_range) {
                Some((_, _, Some(now))) if now != size => Err(NoRange::Replaced),
                Some((first, last, _)) if first == range.start && last == range.end - 1 => Ok(upstream.body(session, peer, 0)),
                _ => fault("another range than was asked for"),
            }
        }
        .boxed()
    }

    fn give_up(&self) {
        tracing::debug!(origin = %self.upstream.url(), "it announces ranges, and gives none: large blobs are read over one connection for a while");
        self.upstream.range_support.give_up();
    }
}

/// The body of an answer while it is read.
struct Transfer {
    upstream: Arc<Upstream>,
    session: HttpSession,
    peer: HttpPeer,
    /// Bytes to skip first, because the source ignored the range and began at 0.
    skip: u64,
}

impl Transfer {
    /// The next bytes, and the rest of the transfer. At the end of the answer, puts the connection into the pool: before it returns the last bytes, since a
    /// fill that has all bytes asks for no more.
    async fn next(transfer: Option<Self>) -> Result<Option<(Bytes, Option<Self>)>, Fault> {
        let Some(mut transfer) = transfer else { return Ok(None) };
        let bytes = transfer.read().await?;
        let rest = if bytes.is_none() || transfer.session.is_body_done() {
            transfer.upstream.finish(transfer.session, &transfer.peer).await;
            None
        } else {
            Some(transfer)
        };
        Ok(bytes.map(|bytes| (bytes, rest)))
    }

    /// The next bytes; `None` at the end of the answer.
    async fn read(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            let read = self.session.read_body_bytes().await.map_err(|error| self.upstream.fault(&error));
            let Some(mut bytes) = read.inspect_err(|_| self.upstream.report_broken_body())? else { return Ok(None) };
            self.upstream.received(bytes.len() as u64);
            let skip = self.skip.min(bytes.len() as u64);
            self.skip -= skip;
            bytes.advance(usize::try_from(skip).unwrap_or(bytes.len()));
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }
}

/// A connection to a source.
pub(crate) struct Connection {
    pub(crate) stream: Stream,
    pub(crate) address: SocketAddr,
    pub(crate) peer: HttpPeer,
    /// It was kept alive, so the source may have closed it.
    pub(crate) reused: bool,
}

impl Connection {
    /// A session for one request. `timeout` is the longest time without a byte.
    pub(crate) fn session(self, timeout: Duration) -> (HttpSession, HttpPeer) {
        let mut session = HttpSession::new(self.stream);
        session.read_timeout = Some(timeout);
        session.write_timeout = Some(timeout);
        (session, self.peer)
    }
}

/// An open connection that pingora takes instead of making one. pingora connects to one address only, and castier tries several.
pub(crate) struct Handed(Mutex<Option<L4Stream>>);

impl Handed {
    pub(crate) fn over(stream: L4Stream) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(stream))))
    }
}

impl fmt::Debug for Handed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handed")
    }
}

#[async_trait]
impl L4Connect for Handed {
    async fn connect(&self, _address: &L4Address) -> pingora::Result<L4Stream> {
        self.0.lock().take().ok_or_else(|| pingora::Error::explain(ErrorType::ConnectError, "the connection has been used"))
    }
}

/// An error of connecting as pingora's type.
fn connect_error(error: io::Error) -> Box<pingora::Error> {
    let kind = match error.kind() {
        io::ErrorKind::ConnectionRefused => ErrorType::ConnectRefused,
        io::ErrorKind::TimedOut => ErrorType::ConnectTimedout,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => ErrorType::ConnectNoRoute,
        // This machine has no free port.
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse => ErrorType::InternalError,
        _ => ErrorType::ConnectError,
    };
    pingora::Error::because(kind, "connecting", error)
}

/// Reads response heads up to the first that is not informational. Safe to cancel and call again.
pub(crate) async fn read_final(session: &mut HttpSession) -> pingora::Result<()> {
    loop {
        session.read_response().await?;
        if !session.get_status().is_some_and(|status| status.is_informational()) {
            return Ok(());
        }
    }
}

/// The size of a blob, out of the head of a whole answer, if it is there. 0 counts only for the empty blob, since some servers send 0 for an
/// unknown size. The length of coded bytes does not count.
pub fn size_of(head: &ResponseHeader, digest: &Digest) -> Option<u64> {
    let coded = head.headers.get(header::CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"));
    let size = head.headers.get(header::CONTENT_LENGTH).map(HeaderValue::as_bytes)?;
    // pingora has checked that repeated lengths are equal.
    let size = digits(size.split(|byte| *byte == b',').next()?.trim_ascii())?;
    (!coded && (size > 0 || *digest == Digest::of(b""))).then_some(size)
}

/// Sets a header of a request.
///
/// # Errors
/// [`Fault::Internal`] if the value is invalid.
pub fn insert(request: &mut RequestHeader, name: header::HeaderName, value: &str) -> Result<(), Fault> {
    request.insert_header(name, value).map_err(|error| Fault::Internal(error.to_string()))
}

fn number(value: Option<&http::HeaderValue>) -> Option<u64> {
    digits(value?.as_bytes().trim_ascii())
}

/// A number of digits only. Rust takes a `+` before them, and others do not.
fn digits(text: &[u8]) -> Option<u64> {
    str::from_utf8(text).ok().filter(|_| text.iter().all(u8::is_ascii_digit))?.parse().ok()
}

/// Whether a server says that it gives parts of this body.
fn accepts_ranges(headers: &HeaderMap) -> bool {
    let units = headers.get_all(header::ACCEPT_RANGES).iter().filter_map(|value| value.to_str().ok());
    units.flat_map(|units| units.split(',')).any(|unit| unit.trim().eq_ignore_ascii_case("bytes"))
}

/// `bytes 5-9/10` → (5, 9, Some(10)); `bytes 5-9/*` → (5, 9, None).
pub fn content_range(value: &http::HeaderValue) -> Option<(u64, u64, Option<u64>)> {
    let (range, size) = value.to_str().ok()?.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (digits(first.as_bytes())?, digits(last.as_bytes())?);
    let size = if size == "*" { None } else { Some(digits(size.as_bytes())?) };
    (first <= last && size.is_none_or(|size| last < size)).then_some((first, last, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let parse = |text: &'static str| content_range(&http::HeaderValue::from_static(text));
        assert_eq!(parse("bytes 5-9/10"), Some((5, 9, Some(10))));
        assert_eq!(parse("bytes 5-9/*"), Some((5, 9, None)));
        for bad in [
            "bytes +5-9/10",
            "bytes 5-+9/10",
            "bytes 5-9/+10",
            "bytes 5-9/9",
            "bytes 9-5/10",
            "bytes */10",
            "lines 5-9/10",
            "bytes 5-9",
            "bytes -/10",
            "",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes_have_digits_only() {
        for (length, size) in [
            (&b"5"[..], Some(5)),
            (b"05 ", Some(5)),
            (b"5, 5", Some(5)),
            (b"+5", None),
            (b"5\xc2\xa0", None),
            (b"", None),
            (b"-1", None),
            (b"0", None),
        ] {
            let mut head = ResponseHeader::build(200, None).unwrap();
            head.insert_header(header::CONTENT_LENGTH, length).unwrap();
            assert_eq!(size_of(&head, &Digest::of(b"x")), size, "{}", length.escape_ascii());
        }
    }
}
