//! Sources: where blobs come from and uploads go to. The only place that sees pingora's connectors.

mod access;
mod peers;
mod probe;
mod put;

pub use access::ca_file;
pub use peers::{Answer, FILLING, FLIGHT, Peers};
pub use probe::{HttpProbe, peer_options};
pub use put::{Parcel, Put, Upload};

use crate::{
    descriptors,
    fault::{Fault, Limit},
    members::Report,
};
use bytes::Bytes;
use castier_blob::{Digest, wire};
use castier_config as config;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use pingora::{
    ErrorType, RetryType,
    connectors::{ConnectorOptions, http::v1::Connector},
    http::RequestHeader,
    protocols::http::v1::client::HttpSession,
    upstreams::peer::{HttpPeer, Peer as _},
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// How long a resolved name is believed. Short, since it is how an origin moves; a failed look-up keeps the last good answer.
const RESOLVED_FOR: Duration = Duration::from_secs(5);
/// The same, once none of the addresses takes a connection. A source that is down is not looked up for every request.
const DOUBTED_FOR: Duration = Duration::from_millis(100);
/// Kept-alive connections to one source: as many as fills have places, unless somebody changed that.
const POOL: usize = 256;
/// The longest answer beside a blob that is worth reading.
const MAX_ANSWER: usize = 64 << 10;

/// Where this node gets blobs from.
#[derive(Clone)]
pub struct Sources {
    /// The source of truth.
    pub origin: Arc<Upstream>,
    /// The other nodes; none without a cluster.
    pub peers: Option<Arc<Peers>>,
}

/// One HTTP server that blobs can be had from: the origin, or a peer.
pub struct Upstream {
    /// `origin` or `peer`, as in metric labels.
    pub name: &'static str,
    connector: Arc<Connector>,
    host: String,
    port: u16,
    tls: bool,
    /// Host and port as they stand in `Host`.
    authority: String,
    /// `Authorization`, from the URL's user and password.
    credentials: Option<HeaderValue>,
    resolved: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
    connect_timeout: Duration,
    /// Longest silence, not the whole transfer.
    read_timeout: Duration,
    /// `origin.max_requests`, here and at each peer.
    requests: Semaphore,
    /// What this node and a peer have in common; none with the origin.
    ties: Option<peers::Ties>,
}

impl Upstream {
    /// The origin as configured, at `url`.
    ///
    /// # Errors
    /// A text that names what in the URL cannot be used.
    pub fn origin(url: &url::Url, config: &config::Origin) -> Result<Arc<Self>, String> {
        let host = url.host_str().ok_or("origin.url: names no host")?.trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().ok_or("origin.url: names no port")?;
        let default_port = url.port().is_none();
        let shown = url.host_str().unwrap_or_default();
        let mut options = ConnectorOptions::new(POOL);
        options.ca_file = ca_file(config)?;
        Ok(Arc::new(Self {
            name: "origin",
            connector: Arc::new(Connector::new(Some(options))),
            authority: if default_port { shown.to_owned() } else { format!("{shown}:{port}") },
            host,
            port,
            tls: url.scheme() == "https",
            credentials: access::basic(url),
            resolved: Mutex::new(None),
            connect_timeout: config.connect_timeout.get(),
            read_timeout: config.read_timeout.get(),
            requests: Semaphore::new(config.max_requests),
            ties: None,
        }))
    }

    /// Host and port as they stand in `Host`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// What the source wants to see of a user, if its URL names one.
    pub const fn credentials(&self) -> Option<&HeaderValue> {
        self.credentials.as_ref()
    }

    /// Opens the blob for reading from offset `from`. `None`: the source says that it does not exist.
    ///
    /// # Errors
    /// Whatever kept the source from answering, or made its answer useless.
    pub async fn open(self: &Arc<Self>, digest: &Digest, from: u64) -> Result<Option<Incoming>, Fault> {
        let request = self.get_request(digest, from)?;
        let (session, peer) = self.exchange(&request, &[]).await?;
        match session.get_status() {
            Some(StatusCode::NOT_FOUND | StatusCode::GONE) => {
                self.finish(session, &peer).await;
                Ok(None)
            }
            Some(StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) => Err(Fault::Busy(Limit::Origin)),
            _ => self.incoming(session, peer, from).map(Some),
        }
    }

    fn get_request(&self, digest: &Digest, from: u64) -> Result<RequestHeader, Fault> {
        let mut request = self.request(Method::GET, &wire::blob_path(digest))?;
        if from > 0 {
            insert(&mut request, header::RANGE, &format!("bytes={from}-"))?;
        }
        Ok(request)
    }

    /// An answer that gives bytes: those from offset `from`.
    fn incoming(self: &Arc<Self>, session: HttpSession, peer: HttpPeer, from: u64) -> Result<Incoming, Fault> {
        let head = session.resp_header().ok_or_else(|| self.unusable("no head"))?;
        self.must_be_uncoded(&head.headers)?;
        let (size, skip) = match head.status {
            // A source that does not know ranges sends all of it again; what is known already is skipped.
            StatusCode::OK => (number(head.headers.get(header::CONTENT_LENGTH)), from),
            StatusCode::PARTIAL_CONTENT if from > 0 => {
                let (first, size) = head
                    .headers
                    .get(header::CONTENT_RANGE)
                    .and_then(content_range)
                    .ok_or_else(|| self.unusable("a 206 without a Content-Range"))?;
                if first != from {
                    return Err(self.unusable("another range than was asked for"));
                }
                (size, 0)
            }
            status => return Err(self.unusable(format!("status {}", status.as_u16()))),
        };
        Ok(Incoming { upstream: self.clone(), session: Some(session), peer, size, skip, watch: None })
    }

    /// Of coded bytes, neither the length nor the digest is the blob's.
    fn must_be_uncoded(&self, headers: &HeaderMap) -> Result<(), Fault> {
        match headers.get(header::CONTENT_ENCODING) {
            Some(coding) if !coding.as_bytes().eq_ignore_ascii_case(b"identity") => {
                Err(self.unusable("a content coding that was not asked for"))
            }
            _ => Ok(()),
        }
    }

    /// The size of the blob, without its bytes. `None`: the source says that it does not exist.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn stat(&self, digest: &Digest) -> Result<Option<u64>, Fault> {
        let request = self.request(Method::HEAD, &wire::blob_path(digest))?;
        let (session, peer, _place) = self.ask(&request, &[]).await?;
        let head = session.resp_header().ok_or_else(|| self.unusable("no head"))?;
        let (status, length) = (head.status, number(head.headers.get(header::CONTENT_LENGTH)));
        let uncoded = self.must_be_uncoded(&head.headers);
        self.finish(session, &peer).await;
        match status {
            StatusCode::OK => uncoded.and_then(|()| length.map(Some).ok_or_else(|| self.unusable("a HEAD answer without a length"))),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(None),
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Err(Fault::Busy(Limit::Origin)),
            status => Err(self.unusable(format!("status {}", status.as_u16()))),
        }
    }

    /// Deletes the blob; false if it was not there.
    ///
    /// # Errors
    /// [`Fault::NotAllowed`] if the source does not delete; else as [`Self::open`].
    pub async fn delete(&self, digest: &Digest) -> Result<bool, Fault> {
        let request = self.request(Method::DELETE, &wire::blob_path(digest))?;
        let (session, peer, _place) = self.ask(&request, &[]).await?;
        let status = session.get_status().ok_or_else(|| self.unusable("no status"))?;
        self.finish(session, &peer).await;
        match status {
            StatusCode::OK | StatusCode::ACCEPTED | StatusCode::NO_CONTENT => Ok(true),
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(false),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED | StatusCode::FORBIDDEN => Err(Fault::NotAllowed),
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => Err(Fault::Busy(Limit::Origin)),
            status => Err(self.unusable(format!("status {} to a DELETE", status.as_u16()))),
        }
    }

    /// Where to connect, one entry per address that the name resolves to.
    ///
    /// # Errors
    /// [`Fault::Unreachable`] if the name has never resolved.
    pub async fn peers(&self) -> Result<Vec<HttpPeer>, Fault> {
        self.peers_within(RESOLVED_FOR).await
    }

    /// Where to connect after none of these took a connection: the addresses that the name has by now beside them. A pod that was
    /// restarted has its old name and a new address, and its peers must not take it for dead because they remember the old one.
    async fn moved(&self, tried: &[SocketAddr]) -> Vec<HttpPeer> {
        let mut peers = self.peers_within(DOUBTED_FOR).await.unwrap_or_default();
        peers.retain(|peer| !peer.address().as_inet().is_some_and(|address| tried.contains(address)));
        peers
    }

    async fn peers_within(&self, fresh: Duration) -> Result<Vec<HttpPeer>, Fault> {
        let addresses = self.resolve(fresh).await?;
        let peer = |address: SocketAddr| {
            let mut peer = HttpPeer::new(address, self.tls, if self.tls { self.host.clone() } else { String::new() });
            peer.options.connection_timeout = Some(self.connect_timeout);
            peer.options.total_connection_timeout = Some(self.connect_timeout);
            peer.options.read_timeout = Some(self.read_timeout);
            peer.options.write_timeout = Some(self.read_timeout);
            peer.options.idle_timeout = Some(Duration::from_secs(60));
            peer
        };
        Ok(addresses.into_iter().map(peer).collect())
    }

    /// What the name resolves to, remembered for as long as this.
    async fn resolve(&self, fresh: Duration) -> Result<Vec<SocketAddr>, Fault> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let known = self.resolved.lock().clone();
        if let Some((at, addresses)) = &known
            && at.elapsed() < fresh
        {
            return Ok(addresses.clone());
        }
        let looked_up = timeout(self.connect_timeout, tokio::net::lookup_host((self.host.as_str(), self.port))).await;
        let addresses: Vec<_> = looked_up.ok().and_then(Result::ok).into_iter().flatten().collect();
        match known {
            _ if !addresses.is_empty() => {
                *self.resolved.lock() = Some((Instant::now(), addresses.clone()));
                Ok(addresses)
            }
            Some((_, last_good)) => Ok(last_good),
            None => Err(Fault::Unreachable { source_name: self.name, why: format!("{} does not resolve", self.host) }),
        }
    }

    /// [`Self::exchange`] in one of `origin.max_requests` places, which comes with the answer. It is waited for as long as an answer
    /// would be: to a client it is the same. Unlike a fill, nobody takes this up again, so it has one repeat of its own.
    async fn ask(&self, request: &RequestHeader, body: &[u8]) -> Result<(HttpSession, HttpPeer, SemaphorePermit<'_>), Fault> {
        let Ok(Ok(place)) = timeout(self.read_timeout, self.requests.acquire()).await else { return Err(Fault::Busy(Limit::Requests)) };
        let (session, peer) = self.repeat(request, body, 1).await?;
        Ok((session, peer, place))
    }

    /// Sends a request that may be repeated, with a body small enough to be at hand, and reads the head of the answer.
    async fn exchange(&self, request: &RequestHeader, body: &[u8]) -> Result<(HttpSession, HttpPeer), Fault> {
        self.repeat(request, body, 0).await
    }

    /// [`Self::exchange`], and as often again as `repeats` says if a connection breaks before the answer.
    async fn repeat(&self, request: &RequestHeader, body: &[u8], mut repeats: usize) -> Result<(HttpSession, HttpPeer), Fault> {
        use ErrorType::{ConnectionClosed, ReadError, WriteError};
        let (mut last, mut tried) = (None, Vec::new());
        for again in [false, true] {
            let peers = if again { self.moved(&tried).await } else { self.peers().await? };
            for peer in peers {
                loop {
                    let (mut session, reused) = match self.connector.get_http_session(&peer).await {
                        Ok(connected) => connected,
                        Err(error) => {
                            tried.extend(peer.address().as_inet().copied());
                            last = Some(error);
                            break;
                        }
                    };
                    session.read_timeout = Some(self.read_timeout);
                    session.write_timeout = Some(self.read_timeout);
                    let answered = async {
                        session.write_request_header(Box::new(request.clone())).await?;
                        if !body.is_empty() {
                            session.write_body(body).await?;
                            session.finish_body().await?;
                        }
                        read_final(&mut session).await
                    };
                    match answered.await {
                        Ok(()) => return Ok((session, peer)),
                        // A kept-alive connection that the source had closed meanwhile tells nothing; the pool runs dry before this loops for long.
                        Err(error) if reused && (error.retry == RetryType::ReusedOnly || error.etype == WriteError) => {}
                        // A source that restarts, or whose queue of new connections ran over.
                        Err(error) if repeats > 0 && matches!(error.etype, ConnectionClosed | ReadError | WriteError) => repeats -= 1,
                        Err(error) => return Err(self.fault(&error)),
                    }
                }
            }
        }
        Err(self.not_connected(last.as_deref()))
    }

    /// Gives a session back to the pool if it can be used again.
    async fn finish(&self, mut session: HttpSession, peer: &HttpPeer) {
        if peer.group_key != 0 {
            return;
        }
        // A short error body is worth reading to the end for the connection's sake.
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
        if timeout(Duration::from_millis(200), rest).await == Ok(true) {
            self.connector.release_http_session(session, peer, peer.options.idle_timeout).await;
        }
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestHeader, Fault> {
        let mut request = RequestHeader::build(method, path.as_bytes(), Some(6)).map_err(|error| Fault::Internal(error.to_string()))?;
        insert(&mut request, header::HOST, &self.authority)?;
        insert(&mut request, header::USER_AGENT, concat!("castier/", env!("CARGO_PKG_VERSION")))?;
        insert(&mut request, header::ACCEPT_ENCODING, "identity")?;
        if let Some(credentials) = &self.credentials {
            request.insert_header(header::AUTHORIZATION, credentials.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
        }
        if let Some(ties) = &self.ties {
            ties.sign(&mut request)?;
        }
        Ok(request)
    }

    /// None of the source's addresses could be connected to, the last for this reason. With a peer, that is news.
    fn not_connected(&self, error: Option<&pingora::Error>) -> Fault {
        use ErrorType::{
            ConnectError, ConnectNoRoute, ConnectRefused, ConnectTimedout, InvalidCert, TLSHandshakeFailure, TLSHandshakeTimedout,
        };
        let Some(error) = error else { return Fault::Unreachable { source_name: self.name, why: "no address".into() } };
        // Not when this node has run out of ports or files: that says nothing of the peer.
        let its_doing = matches!(
            error.etype,
            ConnectError | ConnectNoRoute | ConnectRefused | ConnectTimedout | InvalidCert | TLSHandshakeFailure | TLSHandshakeTimedout
        );
        if let Some(ties) = self.ties.as_ref().filter(|_| its_doing) {
            ties.members.report(&self.authority, Report::Unreachable);
        }
        self.fault(error)
    }

    fn unusable(&self, why: impl Into<String>) -> Fault {
        Fault::Unusable { source_name: self.name, why: why.into() }
    }

    /// What a pingora error means here.
    pub fn fault(&self, error: &pingora::Error) -> Fault {
        if descriptors::ran_out(error.root_cause()) {
            return Fault::Busy(Limit::Files);
        }
        let (source_name, why) = (self.name, error.to_string());
        match error.etype {
            ErrorType::ReadTimedout | ErrorType::WriteTimedout => Fault::Silent { source_name, why },
            ErrorType::InvalidHTTPHeader => Fault::Unusable { source_name, why },
            _ => Fault::Unreachable { source_name, why },
        }
    }
}

/// A blob on its way from a source.
pub struct Incoming {
    upstream: Arc<Upstream>,
    session: Option<HttpSession>,
    peer: HttpPeer,
    /// The whole blob's size, where the source told it.
    pub size: Option<u64>,
    /// Bytes to pass over first: the source began at 0 although it was asked for less.
    skip: u64,
    /// Whose silence means what; none: only `read_timeout` counts.
    watch: Option<Arc<peers::Watch>>,
}

impl Incoming {
    /// From where it comes: `origin` or `peer`.
    pub fn source_name(&self) -> &'static str {
        self.upstream.name
    }

    /// Gives the connection back early: the reader has all it wants. Keeps it only if the answer is at its end.
    pub async fn release(&mut self) {
        if let Some(mut session) = self.session.take()
            && session.is_body_done()
        {
            self.upstream.finish(session, &self.peer).await;
        }
    }

    /// The next bytes, never none at all; `None` at the end of the source's answer.
    ///
    /// # Errors
    /// The transfer broke off, or fell silent.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        match self.watch.clone() {
            None => self.read().await,
            Some(watch) => watch.over(self.read()).await,
        }
    }

    async fn read(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            let Some(session) = &mut self.session else { return Ok(None) };
            let Some(mut bytes) = session.read_body_bytes().await.map_err(|error| self.upstream.fault(&error))? else {
                if let Some(session) = self.session.take() {
                    self.upstream.finish(session, &self.peer).await;
                }
                return Ok(None);
            };
            if self.skip > 0 {
                let skip = self.skip.min(bytes.len() as u64);
                self.skip -= skip;
                bytes = bytes.slice(skip as usize..);
            }
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
        }
    }
}

/// Reads response heads up to the first that is not informational. Safe to cancel and call again.
async fn read_final(session: &mut HttpSession) -> pingora::Result<()> {
    loop {
        session.read_response().await?;
        if !session.get_status().is_some_and(|status| status.is_informational()) {
            return Ok(());
        }
    }
}

fn insert(request: &mut RequestHeader, name: header::HeaderName, value: &str) -> Result<(), Fault> {
    request.insert_header(name, value).map_err(|error| Fault::Internal(error.to_string()))
}

fn number(value: Option<&http::HeaderValue>) -> Option<u64> {
    value?.to_str().ok()?.trim().parse().ok()
}

/// `bytes 5-9/10` → (5, Some(10)); `bytes 5-9/*` → (5, None).
fn content_range(value: &http::HeaderValue) -> Option<(u64, Option<u64>)> {
    let (range, size) = value.to_str().ok()?.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let size = if size == "*" { None } else { Some(size.parse().ok()?) };
    (first <= last && size.is_none_or(|size: u64| last < size)).then_some((first, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        let parse = |text: &'static str| content_range(&http::HeaderValue::from_static(text));
        assert_eq!(parse("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse("bytes 5-9/*"), Some((5, None)));
        for bad in ["bytes 5-9/9", "bytes 9-5/10", "bytes */10", "lines 5-9/10", "bytes 5-9", "bytes -/10", ""] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
