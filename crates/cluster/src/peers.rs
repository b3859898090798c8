//! Peers as sources and as stores: what is asked of a peer, what its answers mean, and when it has stalled.
//!
//! - An answer of a peer counts only if it proves that the peer knows the cluster's secret ([`Secrets`]). Where there is no secret, peers are on this
//!   machine and are believed. But no upload is handed over: no peer could prove that it has stored it.
//! - A peer is believed when it says that a blob is absent, since the origin has told it so. Its bytes are hashed like all others.
//! - A peer that sends nothing may have stopped, or may wait for a slow origin. To give up the second would cost the origin another load. So a peer that
//!   has sent nothing for half of `cluster.stall_timeout` is asked over another connection whether its own flight waits ([`FILLING`]). Only that answer
//!   starts the timeout again.
//! - A failure is reported to [`Peers::failed`]: it is counted, and the peer is probed at once.

use crate::{
    members::{Member, Members, Report, View},
    probe::peer_options,
    secret::{Asked, PROOF, Secrets},
};
use castier_blob::Digest;
use castier_cache::{Answer, Ask, Fault, Incoming, Limit, Put, Source, Stat, Upload};
use castier_config as config;
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

/// In the 504 that a peer gives to a HEAD with `only-if-cached`: whether it has a flight of the blob on its way.
pub const FLIGHT: HeaderName = HeaderName::from_static("castier-flight");
/// It has.
pub const FILLING: HeaderValue = HeaderValue::from_static("filling");

/// Where a node says how it is; the one request that needs no proof.
pub const HEALTH: &str = "/healthz";
const ONLY_IF_CACHED: &str = "only-if-cached";
/// Kept-alive connections to all peers together.
pub(crate) const POOL: usize = 1024;
/// The name of all peers in labels and faults.
const PEER: &str = "peer";
/// For how long a peer that sent wrong bytes is not asked for any. Its large blobs reach clients as cut answers, so it must not be
/// asked with every request; and since whatever was wrong with it may be mended, it is asked again.
const DISTRUST: Duration = Duration::from_secs(60);
/// What the longest wait for a peer adds to the peer's own longest wait for the origin: its pauses between retries, and the network.
const MARGIN: Duration = Duration::from_secs(5);

/// The peers, and the connections to them.
pub struct Peers {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    cache_metrics: Arc<castier_cache::Metrics>,
    upstream_metrics: Arc<castier_upstream::Metrics>,
    /// Keeps its idle connections by address, and hands each to one request at a time: a slow peer holds up nobody but those who wait
    /// for it.
    connector: Arc<TransportConnector>,
    tls: bool,
    known: Mutex<HashMap<Arc<str>, Arc<Peer>>>,
    /// `cluster.stall_timeout`.
    stall_timeout: Duration,
    /// `cluster.peek_for`.
    peek_for: Duration,
    /// How long a peer may wait for the origin: until it gives up by itself, and a little more.
    longest_wait: Duration,
    /// `fill.max_in_flight`, for each peer.
    fills: usize,
    /// `origin.max_requests`, for each peer.
    requests: usize,
    /// `fill.max_wait`.
    max_wait: Duration,
}

/// One of them.
struct Peer {
    upstream: Arc<Upstream>,
    /// Permits for fills from it. Other peers and the origin have permits of their own: a slow peer takes none of theirs, and nodes whose permits
    /// are all taken by fills from each other cannot wait in a circle.
    permits: Arc<Semaphore>,
    /// It has sent wrong bytes, and is asked for none until then.
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

/// Adds the proof to a request that does not change any more; gives what its answer is checked against.
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
    /// Whatever it takes, a load from the origin included.
    Anything,
    /// Look into its tiers (`only-if-cached`).
    Kept,
}

/// What a peer says when it is asked whether its flight waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Liveness {
    /// Its flight waits for the origin.
    Filling,
    /// It answers, and has no such flight.
    Alive,
}

/// What this node waits for at a peer, and so which answer starts the stall timeout again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitsFor {
    /// Bytes out of a flight: it may wait for the origin.
    Flight,
    /// Bytes out of a tier, which waits for nothing.
    Tier,
    /// The answer to an upload, which takes as long as its client does.
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
    /// Held to the end of the transfer.
    _permit: Option<OwnedSemaphorePermit>,
}

/// A peer as the source of one flight.
struct PeerSource {
    peers: Arc<Peers>,
    member: Member,
    only: Only,
    /// How long it may send nothing.
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

impl Peers {
    /// The peers as configured. Nobody is connected to yet.
    ///
    /// # Errors
    /// A text that names the key whose file cannot be used.
    pub fn new(
        config: &config::Castier,
        members: Arc<Members>,
        secrets: Arc<Secrets>,
        cache_metrics: Arc<castier_cache::Metrics>,
        upstream_metrics: Arc<castier_upstream::Metrics>,
    ) -> Result<Arc<Self>, String> {
        let cluster = config.cluster.as_ref().ok_or("cluster: is missing")?;
        let mut options = peer_options(&cluster.tls)?;
        options.keepalive_pool_size = POOL;
        let attempts = config.origin.retries + 1;
        Ok(Arc::new(Self {
            members,
            secrets,
            cache_metrics,
            upstream_metrics,
            connector: Arc::new(TransportConnector::new(Some(options))),
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

    /// Who they are, and who of them is up.
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }

    /// Where a member is asked.
    pub fn url(&self, member: &Member) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, member.name)
    }

    /// The other member to hand the digest's requests to; none if that is up to this node.
    pub fn owner(&self, digest: &Digest) -> Option<Member> {
        self.members.view().owner(digest).filter(|owner| !owner.itself).cloned()
    }

    /// `cluster.stall_timeout`.
    pub const fn stall_timeout(&self) -> Duration {
        self.stall_timeout
    }

    /// A peer as the source of a flight. It may send nothing for `timeout`, unless its own flight waits.
    pub fn source(self: &Arc<Self>, member: &Member, only: Only, timeout: Duration) -> Arc<dyn Source> {
        Arc::new(PeerSource { peers: self.clone(), member: member.clone(), only, timeout })
    }

    /// Whether the cluster has changed so recently that a blob may be with the member that comes after its owner.
    pub fn changed_lately(&self, view: &View) -> bool {
        view.changed_at.elapsed() < self.peek_for
    }

    /// Whether the member has not sent wrong bytes lately.
    pub fn trusts(&self, member: &Member) -> bool {
        self.peer(member).distrusted.lock().is_none_or(|until| until <= Instant::now())
    }

    /// An attempt at this member came to nothing, for this reason.
    pub fn failed(&self, member: &Member, fault: &Fault) {
        let its_doing = match fault {
            Fault::Corrupt { source_name, .. } | Fault::Unreachable { source_name, .. } => *source_name == PEER,
            Fault::Silent { source_name, .. } | Fault::Unusable { source_name, .. } => *source_name == PEER,
            _ => false,
        };
        if its_doing {
            tracing::debug!(peer = &*member.name, %fault, "a peer failed");
            self.members.failed(&member.name);
            self.members.report(&member.name, Report::Broken);
        }
    }

    /// The member sent bytes that are not the blob's.
    pub fn distrust(&self, member: &Member) {
        tracing::warn!(peer = &*member.name, "the peer sent wrong bytes; it is asked for none for a while");
        *self.peer(member).distrusted.lock() = Some(Instant::now() + DISTRUST);
    }

    /// An answer of this member came to its proper end.
    pub fn answered(&self, member: &Member) {
        self.members.report(&member.name, Report::Answered);
    }

    async fn open(self: &Arc<Self>, member: &Member, ask: Ask, only: Only, timeout: Duration) -> Result<Answer, Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.get_request(&ask.digest, ask.from)?;
        let (waits_for, permit) = match only {
            Only::Anything => (WaitsFor::Flight, Some(self.permit(&peer).await?)),
            // What is kept comes at once or not at all; and a fill that asks for it has a permit already.
            Only::Kept => {
                insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED)?;
                (WaitsFor::Tier, None)
            }
        };
        let watch = Watch { peers: self.clone(), member: member.clone(), digest: ask.digest, waits_for, timeout, _permit: permit };
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

    /// A permit for a fill from this peer. Waits for half of `fill.max_wait`: the fill then goes on to the next source, where it may have to wait too.
    async fn permit(&self, peer: &Peer) -> Result<OwnedSemaphorePermit, Fault> {
        let asked = Instant::now();
        let permit = timeout(self.max_wait / 2, peer.permits.clone().acquire_owned()).await;
        self.cache_metrics.waited(asked.elapsed());
        match permit {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Fault::Busy(Limit::Fills)),
        }
    }

    /// What this member knows about a blob, or learns from the origin.
    ///
    /// # Errors
    /// The member cannot tell.
    pub async fn stat(&self, member: &Member, digest: &Digest) -> Result<Stat, Fault> {
        let peer = self.peer(member);
        let request = peer.upstream.request(Method::HEAD, &wire::blob_path(digest))?;
        let asked = async {
            let (session, connection) = peer.upstream.exchange(&request, &[]).await?;
            let head = session.resp_header().ok_or_else(|| peer.upstream.unusable("no head"))?;
            let told = match said(head, Only::Anything) {
                Said::Absent => Ok(Stat::Absent),
                Said::Unable => Err(Fault::Busy(Limit::Origin)),
                Said::NotKept | Said::Other if head.status == StatusCode::OK => Ok(Stat::Present(size_of(head, digest))),
                Said::NotKept | Said::Other => Err(peer.upstream.unusable(format!("status {}", head.status.as_u16()))),
            };
            peer.upstream.finish(session, &connection).await;
            told
        };
        self.in_time(member, self.stall_timeout, asked).await
    }

    /// Whether peers can prove what they are, so that an acknowledgement of theirs counts.
    pub fn can_vouch(&self) -> bool {
        self.secrets.is_there()
    }

    /// Hands an upload over to this member, which stores it at the origin. Gives up only if the member does not answer a question meanwhile.
    ///
    /// A large upload may not be there to be sent again, so the member has to prove what it is before the first byte leaves.
    ///
    /// # Errors
    /// As [`Store::put`](castier_cache::Store::put).
    pub async fn put(self: &Arc<Self>, member: &Member, digest: &Digest, upload: &mut Upload<'_>) -> Result<Put, Fault> {
        let upstream = self.peer(member).upstream.clone();
        let (waits_for, timeout) = (WaitsFor::Upload, self.stall_timeout);
        let watch = Watch { peers: self.clone(), member: member.clone(), digest: *digest, waits_for, timeout, _permit: None };
        let handed_over = async {
            if upload.whole().is_none() {
                self.meet(&upstream).await?;
            }
            upstream.put(upload).await
        };
        watch.over(handed_over).await.inspect_err(|fault| self.failed(member, fault))
    }

    /// Has the peer prove what it is, and that it is well.
    async fn meet(&self, upstream: &Upstream) -> Result<(), Fault> {
        let request = upstream.request(Method::GET, HEALTH)?;
        let (session, connection) = upstream.exchange(&request, &[]).await?;
        let status = session.get_status();
        upstream.finish(session, &connection).await;
        match status {
            Some(StatusCode::OK) => Ok(()),
            _ => Err(upstream.unusable("it is not well, or about to leave")),
        }
    }

    /// Makes this member forget the blob.
    ///
    /// # Errors
    /// It does not say that it has.
    pub async fn purge(&self, member: &Member, digest: &Digest) -> Result<(), Fault> {
        self.tell(member, &format!("/purge/{digest}"), self.stall_timeout).await
    }

    /// Tells this member that the blob is at the origin now, whatever it has heard before. It must answer within `timeout_after`.
    ///
    /// # Errors
    /// It does not say that it has understood.
    pub async fn stored(&self, member: &Member, digest: &Digest, timeout_after: Duration) -> Result<(), Fault> {
        self.tell(member, &format!("/stored/{digest}"), timeout_after).await
    }

    async fn tell(&self, member: &Member, path: &str, timeout_after: Duration) -> Result<(), Fault> {
        let peer = self.peer(member);
        let mut request = peer.upstream.request(Method::POST, path)?;
        insert(&mut request, header::CONTENT_LENGTH, "0")?;
        let told = async {
            // Once more if the connection breaks: it may be the only message that ends a remembered absence.
            let (session, connection) = peer.upstream.repeat(&request, &[], 1).await?;
            let status = session.get_status().ok_or_else(|| peer.upstream.unusable("no status"))?;
            peer.upstream.finish(session, &connection).await;
            if status.is_success() { Ok(()) } else { Err(peer.upstream.unusable(format!("status {} to POST {path}", status.as_u16()))) }
        };
        self.in_time(member, timeout_after, told).await
    }

    /// What is answered at once or not at all.
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

    /// Asks whether the peer's own flight waits. `None`: no answer. Over another connection, since the one in question is silent.
    async fn ask_after(&self, member: &Member, digest: &Digest) -> Option<Liveness> {
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
        // Someone has come, so someone may have left.
        let view = self.members.view();
        known.retain(|name, _| view.members().iter().any(|member| member.name == *name));
        let peer = Arc::new(Peer {
            upstream: Upstream::peer(
                PeerServer {
                    connector: self.connector.clone(),
                    host: member.host.clone(),
                    port: member.port,
                    authority: member.name.to_string(),
                    tls: self.tls,
                    // Before the stall timeout, so that it is known to be no connection, and late enough for a lost packet to be sent again.
                    connect_timeout: self.stall_timeout * 3 / 4,
                    // The stall watchdog ends what takes long.
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
    /// The result of `wait`, unless the peer sends nothing for too long and its own flight does not wait either.
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
                let liveness = if self.waits_for == WaitsFor::Tier { None } else { peers.ask_after(&self.member, &self.digest).await };
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
    Fault::Silent { source_name: PEER, why: format!("no sign of life for {timeout:?}") }
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

/// What a peer's answer means, before it is asked for its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Absent,
    NotKept,
    Unable,
    /// Bytes, or nothing that can be used.
    Other,
}

fn said(head: &ResponseHeader, only: Only) -> Said {
    let begins = |name: &HeaderName, with: &str| {
        head.headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.trim_start().starts_with(with))
    };
    match head.status {
        // Some other server that happens to listen there knows nothing of the origin.
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
