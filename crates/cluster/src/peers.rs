//! Peers as sources and as stores: the requests to a peer, the meaning of its answers, and the stall watchdog.
//!
//! - An answer of a peer counts only if it proves that the peer knows the cluster's secret ([`Secrets`]). Without a secret, all peers are on this
//!   machine, and their answers count. But then peers get no uploads, since no peer could prove that it has stored one.
//! - A peer's answer that a blob is absent counts, since it comes from the origin. Bytes of a peer are hashed like all others.
//! - A peer that sends nothing may have stopped, or may wait for a slow origin. In the second case, a retry elsewhere would cost the origin another
//!   load. So the stall watchdog asks the peer after half of `cluster.stall_timeout`, over another connection, whether its own flight waits
//!   ([`FILLING`]). Only that answer starts the timeout again.
//! - [`Peers::failed`] counts a failure of a peer, and probes the peer at once.

use crate::{
    members::{Member, Members, Report, View},
    probe::connect_with,
    secret::{Asked, PROOF, Secrets},
};
use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, Limit, Put, Source, Stat, Upload};
use castier_config::{self as config, ClusterTls};
use castier_upstream::{PeerServer, Signed, Trust, Upstream, insert, size_of};
use castier_wire::{self as wire, CACHE_STATUS, Problem};
use futures::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, try_join_all},
    stream,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use pingora::{
    connectors::TransportConnector,
    http::{RequestHeader, ResponseHeader},
    prelude::HttpPeer,
    protocols::http::v1::client::HttpSession,
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep_until, timeout},
};

/// A header in a peer's 504 to a HEAD with `only-if-cached`: whether a flight is loading the blob.
pub const FLIGHT: HeaderName = HeaderName::from_static("castier-flight");
/// The value of [`FLIGHT`] if a flight is loading the blob.
pub const FILLING: HeaderValue = HeaderValue::from_static("filling");

/// A header of a request to a peer: it is for a route, and its client means this host. The peer answers from its cache or asks the upstream; it asks no
/// other peer, and rewrites nothing.
pub const ROUTE: HeaderName = HeaderName::from_static("castier-route");

/// The path of the health check. Anybody may ask for it without a proof; the nodes give one, and want one with the answer.
pub const HEALTH: &str = "/healthz";
const ONLY_IF_CACHED: &str = "only-if-cached";
/// Kept-alive connections to all peers together.
pub(crate) const POOL: usize = 1024;
/// The name of all peers in labels and faults.
const PEER: &str = "peer";
/// How long no blob is requested from a peer after it sent wrong bytes. Each large blob with wrong bytes reaches a client as a cut answer, so the peer
/// must not get every request. After this time the peer may work again.
const DISTRUST: Duration = Duration::from_secs(60);
/// The longest wait for a peer is the peer's own longest wait for the origin plus this, for its pauses between retries and for the network.
const MARGIN: Duration = Duration::from_secs(5);

/// The peers, and the connections to them.
pub struct Peers {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    cache_metrics: Arc<castier_cache::Metrics>,
    upstream_metrics: Arc<castier_upstream::Metrics>,
    /// Has a pool of idle connections per address, and each connection serves one request at a time. So a slow peer delays only requests to it.
    connector: ArcSwap<TransportConnector>,
    files: ClusterTls,
    tls: bool,
    known: Mutex<HashMap<Arc<str>, Arc<Peer>>>,
    /// `cluster.stall_timeout`.
    stall_timeout: Duration,
    /// `cluster.peek_for`.
    peek_for: Duration,
    /// How long a peer may wait for the origin: its own timeouts and retries, plus [`MARGIN`].
    longest_wait: Duration,
    /// `fill.max_in_flight`, for each peer.
    fills: usize,
    /// `origin.max_requests`, for each peer.
    requests: usize,
    /// `fill.max_wait`.
    max_wait: Duration,
}

/// One peer.
struct Peer {
    upstream: Arc<Upstream>,
    /// Permits for fills from this peer. Other peers and the origin have their own, for two reasons. A slow peer takes no permit from them. And if two
    /// nodes use up all permits for fills from each other, permits for the origin are left, so there is no deadlock.
    permits: Arc<Semaphore>,
    /// It has sent wrong bytes. Until then, no blob is requested from it.
    distrusted: Mutex<Option<Instant>>,
}

/// How this node and a peer trust each other.
struct PeerTrust {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    /// The peer.
    name: Arc<str>,
}

impl Trust for PeerTrust {
    fn sign(&self, request: &mut RequestHeader) -> Result<Box<dyn Signed>, Fault> {
        let asked = prove(&self.secrets, request).map_err(|error| Fault::Internal(error.to_string()))?;
        Ok(Box::new(asked))
    }

    fn unreachable(&self) {
        self.members.report(&self.name, Report::Unreachable);
    }
}

impl Signed for Asked {
    fn is_answered(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        Self::is_answered(self, status, headers)
    }
}

/// Adds the proof to a request, which must not change after this. Returns the value that checks its answer.
pub(crate) fn prove(secrets: &Secrets, request: &mut RequestHeader) -> pingora::Result<Asked> {
    let (proof, asked) = secrets.ask(request.method.as_str(), request.uri.path(), &request.headers);
    if let Some(proof) = proof {
        request.insert_header(PROOF, proof)?;
    }
    Ok(asked)
}

/// What a peer may do for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// Everything, including a load from the origin.
    Anything,
    /// Only look into its tiers (`only-if-cached`).
    Kept,
}

/// The answer of a peer to the stall watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Liveness {
    /// Its flight waits for the origin.
    Filling,
    /// It answers, and has no such flight.
    Alive,
}

/// What this node waits for. Decides which answer of the peer starts the stall timeout again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitsFor {
    /// Bytes out of a flight, which may wait for the origin.
    Flight,
    /// Bytes out of a tier, which never waits for the origin.
    Tier,
    /// The answer to an upload, which may take as long as the client sends.
    Upload,
}

/// Stall watchdog of a transfer from or to a peer.
pub(crate) struct Watch {
    peers: Arc<Peers>,
    member: Member,
    digest: Digest,
    waits_for: WaitsFor,
    /// How long the peer may send nothing.
    timeout: Duration,
    /// Released at the end of the transfer.
    _permit: Option<OwnedSemaphorePermit>,
}

/// A peer as the source of one flight.
struct PeerSource {
    peers: Arc<Peers>,
    member: Member,
    only: Only,
    /// How long the peer may send nothing.
    timeout: Duration,
}

impl Source for PeerSource {
    fn open(&self, ask: Ask) -> BoxFuture<'_, Result<Answer, Fault>> {
        self.peers.open(&self.member, ask, self.only, self.timeout).boxed()
    }

    fn stat<'a>(&'a self, digests: &'a [Digest]) -> BoxFuture<'a, Result<Vec<Stat>, Fault>> {
        try_join_all(digests.iter().map(|digest| self.peers.stat(&self.member, digest))).boxed()
    }

    fn url(&self) -> Option<String> {
        Some(self.peers.url(&self.member))
    }
}

fn connector(tls: &ClusterTls) -> Result<TransportConnector, String> {
    connect_with(tls, |mut options| {
        options.keepalive_pool_size = POOL;
        TransportConnector::new(Some(options))
    })
}

impl Peers {
    /// The peers of the configured cluster. Opens no connection yet.
    ///
    /// # Errors
    /// A text that names the configuration key whose file is unusable.
    pub fn new(
        config: &config::Castier,
        members: Arc<Members>,
        secrets: Arc<Secrets>,
        cache_metrics: Arc<castier_cache::Metrics>,
        upstream_metrics: Arc<castier_upstream::Metrics>,
    ) -> Result<Arc<Self>, String> {
        let cluster = config.cluster.as_ref().ok_or("cluster: is missing")?;
        let connector = connector(&cluster.tls)?;
        let attempts = config.origin.retries + 1;
        Ok(Arc::new(Self {
            members,
            secrets,
            cache_metrics,
            upstream_metrics,
            connector: ArcSwap::from_pointee(connector),
            files: cluster.tls.clone(),
            tls: cluster.tls.is_on(),
            known: Mutex::default(),
            stall_timeout: cluster.stall_timeout.get(),
            peek_for: cluster.peek_for.get(),
            longest_wait: (config.origin.connect_timeout.get() + config.origin.read_timeout.get()) * attempts
                + config.fill.max_wait.get()
                + MARGIN,
            fills: config.fill.max_in_flight,
            requests: config.origin.max_requests,
            max_wait: config.fill.max_wait.get(),
        }))
    }

    /// Uses the certificates that are in the files now, for the connections from here on. Blocks.
    ///
    /// # Errors
    /// As [`Self::new`]; nothing changes then.
    pub fn renew_certificates(&self) -> Result<(), String> {
        self.connector.store(Arc::new(connector(&self.files)?));
        // The servers of the members hold the one before.
        self.known.lock().clear();
        Ok(())
    }

    /// The members of the cluster, and whether each is up.
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }

    /// The URL of a member's peer listener.
    pub fn url(&self, member: &Member) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, member.name)
    }

    /// The member that owns the digest; `None` if this node owns it.
    pub fn owner(&self, digest: &Digest) -> Option<Member> {
        self.members.view().owner(digest).filter(|owner| !owner.itself).cloned()
    }

    /// `cluster.stall_timeout`.
    pub const fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// A peer as the source of a flight. `timeout` is how long it may send nothing, unless its own flight waits.
    pub fn source(self: &Arc<Self>, member: &Member, only: Only, timeout: Duration) -> Arc<dyn Source> {
        Arc::new(PeerSource { peers: self.clone(), member: member.clone(), only, timeout })
    }

    /// Whether the cluster has changed so recently that the member after the owner may still keep the blob.
    pub fn changed_lately(&self, view: &View) -> bool {
        view.changed_at.elapsed() < self.peek_for
    }

    /// Whether blobs may be requested from the member. False for [`DISTRUST`] after it sent wrong bytes.
    pub fn trusts(&self, member: &Member) -> bool {
        self.peer(member).distrusted.lock().is_none_or(|until| until <= Instant::now())
    }

    /// Reports that a request to this member failed.
    pub fn failed(&self, member: &Member, fault: &Fault) {
        let remote = match fault {
            Fault::Corrupt { source_name, .. } | Fault::Unreachable { source_name, .. } => *source_name == PEER,
            Fault::Silent { source_name, .. } | Fault::Unusable { source_name, .. } => *source_name == PEER,
            _ => false,
        };
        if remote {
            tracing::debug!(peer = &*member.name, %fault, "a peer failed");
            self.members.failed(&member.name);
            self.members.report(&member.name, Report::Broken);
        }
    }

    /// Reports that the member sent bytes that do not match the digest.
    pub fn distrust(&self, member: &Member) {
        tracing::warn!(peer = &*member.name, "the peer sent wrong bytes; castier requests no blobs from it for a minute");
        *self.peer(member).distrusted.lock() = Some(Instant::now() + DISTRUST);
        self.members.failed(&member.name);
        self.members.report(&member.name, Report::Broken);
    }

    /// Reports a complete answer of this member.
    pub fn answered(&self, member: &Member) {
        self.members.report(&member.name, Report::Answered);
    }

    async fn open(self: &Arc<Self>, member: &Member, ask: Ask, only: Only, timeout: Duration) -> Result<Answer, Fault> {
        let (peer, digest) = (self.peer(member), ask.digest()?);
        let mut request = peer.upstream.get_request(&digest, ask.from)?;
        let (waits_for, permit) = match only {
            Only::Anything => (WaitsFor::Flight, Some(self.permit(&peer).await?)),
            // No permit: a tier answers at once, and the fill that asks has a permit already.
            Only::Kept => {
                insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED)?;
                (WaitsFor::Tier, None)
            }
        };
        let watch = Watch { peers: self.clone(), member: member.clone(), digest, waits_for, timeout, _permit: permit };
        let (session, connection) = watch.over(peer.upstream.exchange(&request, &[])).await?;
        let answer = match session.resp_header().map_or(Said::Other, |head| said(head, only)) {
            Said::Absent => Answer::Absent,
            Said::NotKept => Answer::NotKept,
            Said::Unable => {
                self.members.failed(&member.name);
                Answer::Unable
            }
            Said::Other => {
                let incoming = peer.upstream.incoming(session, connection, ask.from)?;
                let bytes = stream::try_unfold((incoming.bytes, watch), async |(mut bytes, watch)| {
                    let next = watch.over(async { bytes.next().await.transpose() }).await?;
                    Ok(next.map(|next| (next, (bytes, watch))))
                });
                return Ok(Answer::Bytes(Incoming::new(incoming.size, bytes)));
            }
        };
        peer.upstream.finish(session, &connection).await;
        self.answered(member);
        Ok(answer)
    }

    /// A permit for a fill from this peer. Waits for half of `fill.max_wait`: after that the fill asks the next source, which may need a wait too.
    async fn permit(&self, peer: &Peer) -> Result<OwnedSemaphorePermit, Fault> {
        let asked = Instant::now();
        let permit = timeout(self.max_wait / 2, peer.permits.clone().acquire_owned()).await;
        self.cache_metrics.waited(asked.elapsed());
        match permit {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Fault::Busy(Limit::Fills)),
        }
    }

    /// Asks this member for a blob's size. The member may ask the origin.
    ///
    /// # Errors
    /// The member does not know.
    pub async fn stat(&self, member: &Member, digest: &Digest) -> Result<Stat, Fault> {
        let peer = self.peer(member);
        let request = peer.upstream.request(Method::HEAD, &wire::blob_path(digest))?;
        let asked = async {
            let (session, connection) = peer.upstream.exchange(&request, &[]).await?;
            let head = session.resp_header().ok_or_else(|| peer.upstream.unusable("no head"))?;
            let answered = match said(head, Only::Anything) {
                Said::Absent => Ok(Stat::Absent),
                Said::Unable => Err(Fault::Busy(Limit::Origin)),
                Said::NotKept | Said::Other if head.status == StatusCode::OK => Ok(Stat::Present(size_of(head, digest))),
                Said::NotKept | Said::Other => Err(peer.upstream.unusable(format!("status {}", head.status.as_u16()))),
            };
            peer.upstream.finish(session, &connection).await;
            answered
        };
        self.in_time(member, self.stall_timeout, asked).await
    }

    /// The size of a blob that this member keeps or has in its outbox; `None` if it has not. It asks nobody.
    ///
    /// # Errors
    /// The member did not answer.
    pub async fn kept_size(&self, member: &Member, digest: &Digest) -> Result<Option<u64>, Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.request(Method::HEAD, &wire::blob_path(digest))?;
        insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED)?;
        let asked = async {
            let (session, connection) = peer.upstream.exchange(&request, &[]).await?;
            let head = session.resp_header().ok_or_else(|| peer.upstream.unusable("no head"))?;
            let size = match head.status {
                StatusCode::OK => Ok(size_of(head, digest)),
                StatusCode::GATEWAY_TIMEOUT => Ok(None),
                status => Err(peer.upstream.unusable(format!("status {}", status.as_u16()))),
            };
            peer.upstream.finish(session, &connection).await;
            size
        };
        self.in_time(member, self.stall_timeout, asked).await
    }

    /// A short answer of this member to a request without a body, of at most `most` bytes: its status, headers and body.
    ///
    /// # Errors
    /// The member did not answer, or with more bytes.
    pub async fn ask(&self, member: &Member, method: Method, path: &str, most: usize) -> Result<(StatusCode, HeaderMap, Bytes), Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.request(method, path)?;
        insert(&mut request, header::CONTENT_LENGTH, "0")?;
        let asked = async {
            let (mut session, connection) = peer.upstream.exchange(&request, &[]).await?;
            let head = session.resp_header().ok_or_else(|| peer.upstream.unusable("no head"))?;
            let (status, headers) = (head.status, head.headers.clone());
            let mut body = BytesMut::new();
            while let Some(part) = session.read_body_bytes().await.map_err(|error| peer.upstream.fault(&error))? {
                body.extend_from_slice(&part);
                if body.len() > most {
                    return Err(peer.upstream.unusable(format!("an answer of more than {most} bytes")));
                }
            }
            peer.upstream.finish(session, &connection).await;
            Ok((status, headers, body.freeze()))
        };
        self.in_time(member, self.stall_timeout, asked).await
    }

    /// Whether peers have a secret and so can prove an acknowledgement.
    pub fn can_vouch(&self) -> bool {
        self.secrets.is_there()
    }

    /// Sends an upload to this member, which stores it at the origin. There is no timeout as long as the member answers the stall watchdog.
    ///
    /// castier cannot send a large upload twice. So the member must prove its identity before it gets the first byte.
    ///
    /// # Errors
    /// As [`Store::put`](castier_cache::Store::put).
    pub async fn put(self: &Arc<Self>, member: &Member, digest: &Digest, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let upstream = self.peer(member).upstream.clone();
        let (waits_for, timeout) = (WaitsFor::Upload, self.stall_timeout);
        let watch = Watch { peers: self.clone(), member: member.clone(), digest: *digest, waits_for, timeout, _permit: None };
        let sent = async {
            if upload.whole().is_none() {
                self.check_health(&upstream).await?;
            }
            upstream.put(upload).await
        };
        watch.over(sent).await.inspect_err(|fault| self.failed(member, fault))
    }

    /// Checks that the peer knows the secret, and that it is healthy.
    async fn check_health(&self, upstream: &Upstream) -> Result<(), Fault> {
        let request = upstream.request(Method::GET, HEALTH)?;
        let (session, connection) = upstream.exchange(&request, &[]).await?;
        let status = session.get_status();
        upstream.finish(session, &connection).await;
        match status {
            Some(StatusCode::OK) => Ok(()),
            _ => Err(upstream.unusable("it is unhealthy, or about to leave the cluster")),
        }
    }

    /// Makes this member delete the blob from its tiers.
    ///
    /// # Errors
    /// The member does not acknowledge it.
    pub async fn purge(&self, member: &Member, digest: &Digest) -> Result<(), Fault> {
        self.post(member, &format!("/purge/{digest}"), self.stall_timeout).await
    }

    /// Purges names at this member. `path`: below `/names/`.
    ///
    /// # Errors
    /// The member does not acknowledge it.
    pub async fn purge_names(&self, member: &Member, path: &str) -> Result<(), Fault> {
        self.post(member, path, self.stall_timeout).await
    }

    /// Asks the member for a resource of a route. `target`: path and query as a client sends them; `host`: the host that the client means. The answer is the
    /// upstream's, unrewritten.
    ///
    /// # Errors
    /// The member did not answer, or proved nothing.
    pub async fn ask_route(
        self: &Arc<Self>,
        member: &Member,
        (method, target, host): (Method, &str, &str),
        headers: &HeaderMap,
    ) -> Result<(Arc<Upstream>, HttpSession, HttpPeer), Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.request(method, target)?;
        for name in headers.keys() {
            request.remove_header(name);
            for value in headers.get_all(name) {
                request.append_header(name.clone(), value.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
            }
        }
        insert(&mut request, ROUTE, host)?;
        let (session, connection) = self.in_time(member, self.longest_wait, peer.upstream.exchange(&request, &[])).await?;
        Ok((peer.upstream.clone(), session, connection))
    }

    /// Notifies this member that the origin has the blob now, so that it drops a remembered absence. It must answer within `timeout_after`.
    ///
    /// # Errors
    /// The member does not acknowledge it.
    pub async fn stored(&self, member: &Member, digest: &Digest, timeout_after: Duration) -> Result<(), Fault> {
        self.post(member, &format!("/stored/{digest}"), timeout_after).await
    }

    async fn post(&self, member: &Member, path: &str, timeout_after: Duration) -> Result<(), Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.request(Method::POST, path)?;
        insert(&mut request, header::CONTENT_LENGTH, "0")?;
        let answered = async {
            // With one retry if the connection breaks: this may be the only message that ends a remembered absence.
            let (session, connection) = peer.upstream.repeat(&request, &[], 1).await?;
            let status = session.get_status().ok_or_else(|| peer.upstream.unusable("no status"))?;
            peer.upstream.finish(session, &connection).await;
            if status.is_success() { Ok(()) } else { Err(peer.upstream.unusable(format!("status {} to POST {path}", status.as_u16()))) }
        };
        self.in_time(member, timeout_after, answered).await
    }

    /// Runs a request with a timeout and without the stall watchdog, and reports its outcome.
    async fn in_time<T>(
        &self,
        member: &Member,
        timeout_after: Duration,
        asked: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let answer = timeout(timeout_after, asked).await.unwrap_or_else(|_| Err(stalled(timeout_after)));
        match &answer {
            Ok(_) => self.answered(member),
            Err(fault) => self.failed(member, fault),
        }
        answer
    }

    /// Asks whether the peer's own flight waits. `None`: no answer. Uses another connection, since the peer sends nothing over the first.
    async fn ask_liveness(&self, member: &Member, digest: &Digest) -> Option<Liveness> {
        let upstream = self.peer(member).upstream.clone();
        let mut request = upstream.request(Method::HEAD, &wire::blob_path(digest)).ok()?;
        insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED).ok()?;
        let (session, connection) = upstream.exchange(&request, &[]).await.ok()?;
        let head = session.resp_header()?;
        let liveness = match head.status {
            StatusCode::GATEWAY_TIMEOUT if head.headers.get(FLIGHT) == Some(&FILLING) => Some(Liveness::Filling),
            StatusCode::GATEWAY_TIMEOUT | StatusCode::OK => Some(Liveness::Alive),
            _ => None,
        };
        upstream.finish(session, &connection).await;
        liveness
    }

    fn peer(&self, member: &Member) -> Arc<Peer> {
        let mut known = self.known.lock();
        if let Some(peer) = known.get(&member.name) {
            return peer.clone();
        }
        // A new member often replaces one that has left. Drop those.
        let view = self.members.view();
        known.retain(|name, _| view.members().iter().any(|member| member.name == *name));
        let peer = Arc::new(Peer {
            upstream: Upstream::peer(
                PeerServer {
                    connector: self.connector.load_full(),
                    host: member.host.clone(),
                    port: member.port,
                    authority: member.name.to_string(),
                    tls: self.tls,
                    // Shorter than the stall timeout, so that the error says that no connection could be opened. Long enough for TCP to resend a lost
                    // packet.
                    connect_timeout: self.stall_timeout * 3 / 4,
                    // Long, since the stall watchdog ends slow transfers.
                    read_timeout: self.longest_wait,
                    max_requests: self.requests,
                    trust: Box::new(PeerTrust { members: self.members.clone(), secrets: self.secrets.clone(), name: member.name.clone() }),
                },
                self.upstream_metrics.clone(),
            ),
            permits: Arc::new(Semaphore::new(self.fills)),
            distrusted: Mutex::new(None),
        });
        known.insert(member.name.clone(), peer.clone());
        peer
    }
}

impl Watch {
    /// The result of `wait`. Fails if the peer sends nothing for `timeout`, unless the peer answers meanwhile that this is normal.
    pub(crate) async fn over<T>(&self, wait: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let peers = &self.peers;
        let (started, half) = (Instant::now(), self.timeout / 2);
        let mut until = started + self.timeout;
        tokio::pin!(wait);
        loop {
            tokio::select! {
                biased;
                done = &mut wait => return done,
                () = sleep_until((until - half).into()) => {}
            }
            let more_time = async {
                let liveness = if self.waits_for == WaitsFor::Tier { None } else { peers.ask_liveness(&self.member, &self.digest).await };
                if !liveness.is_some_and(|liveness| self.waits_for.goes_on_after(liveness)) {
                    std::future::pending().await
                }
            };
            tokio::select! {
                biased;
                done = &mut wait => return done,
                () = more_time => until = Instant::now() + self.timeout,
                () = sleep_until(until.into()) => return Err(stalled(self.timeout)),
            }
            if self.waits_for != WaitsFor::Upload && started.elapsed() > peers.longest_wait {
                return Err(stalled(self.timeout));
            }
        }
    }
}

fn stalled(timeout: Duration) -> Fault {
    Fault::Silent { source_name: PEER, why: format!("no byte and no answer for {timeout:?}") }
}

impl WaitsFor {
    /// Whether this answer starts the stall timeout again.
    fn goes_on_after(self, liveness: Liveness) -> bool {
        match self {
            Self::Flight => liveness == Liveness::Filling,
            Self::Tier => false,
            Self::Upload => true,
        }
    }
}

/// The meaning of the head of a peer's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Absent,
    NotKept,
    Unable,
    /// Bytes, or an unusable answer.
    Other,
}

fn said(head: &ResponseHeader, only: Only) -> Said {
    let begins = |name: &HeaderName, with: &str| {
        head.headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.trim_start().starts_with(with))
    };
    match head.status {
        // `Cache-Status` shows that a castier answered. A 404 of another server says nothing about the origin.
        StatusCode::NOT_FOUND if begins(&CACHE_STATUS, "castier") => Said::Absent,
        StatusCode::GATEWAY_TIMEOUT if only == Only::Kept => Said::NotKept,
        status if status.is_server_error() && head.headers.get(header::CONTENT_TYPE) == Some(&Problem::MEDIA_TYPE) => Said::Unable,
        _ => Said::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_answers_mean() {
        let castier = ("cache-status", "castier; fwd=uri-miss; detail=origin");
        let problem = ("content-type", "application/problem+json");
        for (status, headers, plain, only_kept) in [
            (200, vec![castier], Said::Other, Said::Other),
            (206, vec![castier], Said::Other, Said::Other),
            (404, vec![castier, problem], Said::Absent, Said::Absent),
            (404, vec![problem], Said::Other, Said::Other),
            (404, vec![("cache-status", "nginx; fwd=uri-miss")], Said::Other, Said::Other),
            (504, vec![problem], Said::Unable, Said::NotKept),
            (504, vec![], Said::Other, Said::NotKept),
            (502, vec![problem], Said::Unable, Said::Unable),
            (503, vec![problem], Said::Unable, Said::Unable),
            (500, vec![("content-type", "text/html")], Said::Other, Said::Other),
            (403, vec![problem], Said::Other, Said::Other),
            (416, vec![problem], Said::Other, Said::Other),
        ] {
            let mut head = ResponseHeader::build(status, None).unwrap();
            headers.iter().for_each(|(name, value)| head.insert_header((*name).to_owned(), *value).unwrap());
            assert_eq!((said(&head, Only::Anything), said(&head, Only::Kept)), (plain, only_kept), "{status} {headers:?}");
        }
    }

    #[test]
    fn only_the_right_answer_gives_more_time() {
        let more = |waits: WaitsFor| [Liveness::Filling, Liveness::Alive].map(|liveness| waits.goes_on_after(liveness));
        assert_eq!([WaitsFor::Flight, WaitsFor::Tier, WaitsFor::Upload].map(more), [[true, false], [false, false], [true, true]]);
    }
}
