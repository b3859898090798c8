//! The other nodes of the cluster, as sources and as takers of uploads: what is asked of a peer, what its answers mean, and when its
//! silence is one.
//!
//! - Nothing that a peer says counts unless the answer proves that the peer knows the cluster's secret ([`Secrets`]). Where there is no
//!   secret, peers are on this machine and are taken at their word, but no upload is handed over: nobody could prove that it is stored.
//! - A peer is believed when it says that a blob is absent, for it has that from the origin. Its bytes are hashed like anybody's.
//! - Silence alone does not tell a peer that has stopped from one that waits for a slow origin, and giving up the second would make
//!   the origin see another load. So a peer that has been silent for half of `cluster.stall_timeout` is asked, over another
//!   connection, whether its own flight is waiting ([`FILLING`]). That sets its clock back; anything else does not.
//! - Whoever meets with a failure says so to [`Peers::failed`]: it is counted, and makes the peer doubtful.

use super::{Addresses, Incoming, POOL, Parcel, Put, Upstream, insert, peer_options, put::REPEATERS};
use crate::{
    fault::{Fault, Limit},
    members::{Member, Members, Report, View},
    metrics::Metrics,
    secret::{Asked, PROOF, Secrets},
};
use castier_blob::{Digest, Verified};
use castier_config as config;
use castier_wire::{self as wire, CACHE_STATUS, Problem};
use http::{HeaderName, HeaderValue, Method, StatusCode, header};
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

/// How a peer is.
pub(super) const HEALTH: &str = "/healthz";
const ONLY_IF_CACHED: &str = "only-if-cached";
/// The name of all peers in labels and faults.
const PEER: &str = "peer";
/// For how long a peer that sent wrong bytes is not asked for any. Its large blobs reach clients as cut answers, so it must not be
/// asked with every request; and since whatever was wrong with it may be mended, it is asked again.
const DISTRUST: Duration = Duration::from_secs(60);
/// What patience with a peer adds to what the peer itself has with the origin: its pauses between two attempts, and the way here.
const MARGIN: Duration = Duration::from_secs(5);

/// The peers, and the connections to them.
pub struct Peers {
    members: Arc<Members>,
    secrets: Arc<Secrets>,
    metrics: Arc<Metrics>,
    /// Keeps its idle connections by address, and hands each to one request at a time: a slow peer holds up nobody but those who wait
    /// for it.
    connector: Arc<TransportConnector>,
    tls: bool,
    known: Mutex<HashMap<Arc<str>, Arc<Peer>>>,
    /// `cluster.stall_timeout`.
    stall_timeout: Duration,
    /// `cluster.peek_for`.
    peek_for: Duration,
    /// The longest that a peer may wait for the origin: when it gives up by itself, and a little more.
    patience: Duration,
    /// `fill.max_in_flight`, for each peer.
    places: usize,
    /// `origin.max_requests`, for each peer.
    requests: usize,
    /// `fill.max_wait`.
    max_wait: Duration,
}

/// One of them.
struct Peer {
    upstream: Arc<Upstream>,
    /// Fills from it. Apart from those of others and from those at the origin: a peer's slowness takes no place from them, and nodes
    /// whose places are all taken by fills from each other cannot come to wait in a circle.
    places: Arc<Semaphore>,
    /// It sent wrong bytes; until then it is asked for none.
    distrusted: Mutex<Option<Instant>>,
}

/// What an [`Upstream`] that is a peer has from its cluster.
pub(super) struct Ties {
    pub(super) members: Arc<Members>,
    secrets: Arc<Secrets>,
}

impl Ties {
    /// Proves that a request comes from a node of the cluster.
    pub(super) fn prove(&self, request: &mut RequestHeader) -> Result<Asked, Fault> {
        prove(&self.secrets, request).map_err(|error| Fault::Internal(error.to_string()))
    }
}

/// Adds the proof to a request that does not change any more; gives what its answer is checked against.
pub(super) fn prove(secrets: &Secrets, request: &mut RequestHeader) -> pingora::Result<Asked> {
    let (proof, asked) = secrets.ask(request.method.as_str(), request.uri.path(), &request.headers);
    if let Some(proof) = proof {
        request.insert_header(PROOF, proof)?;
    }
    Ok(asked)
}

/// What a peer says to a GET.
pub enum Answer {
    /// The bytes are coming.
    Blob(Box<Incoming>),
    /// The origin has no such blob.
    Absent,
    /// It was asked for what it keeps, and keeps it not.
    NotKept,
    /// It is well, but cannot help: it does not get through to the origin, or has too much to do.
    Unable,
}

/// What a peer says of itself when it is asked whether its flight waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// It waits for the origin too.
    Filling,
    /// It answers, and that is all.
    Alive,
}

/// What may be hoped for from a silent peer, and so which sign gives it more time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hope {
    /// Bytes out of a flight: that it waits.
    Flight,
    /// Bytes out of a tier, which waits for nobody: none.
    Tier,
    /// The answer to an upload: that it lives.
    Upload,
}

/// Sees to it that a silent peer is given up in time.
pub(super) struct Watch {
    peers: Arc<Peers>,
    member: Member,
    digest: Digest,
    hope: Hope,
    /// How long it may be silent.
    patience: Duration,
    /// Held to the end of the transfer.
    _place: Option<OwnedSemaphorePermit>,
}

impl Peers {
    /// The peers as configured. Nobody is connected to yet.
    ///
    /// # Errors
    /// A text that names the key whose file cannot be used.
    pub fn new(config: &config::Castier, members: Arc<Members>, secrets: Arc<Secrets>, metrics: Arc<Metrics>) -> Result<Arc<Self>, String> {
        let cluster = config.cluster.as_ref().ok_or("cluster: is missing")?;
        let mut options = peer_options(&cluster.tls)?;
        options.keepalive_pool_size = POOL * 4;
        let attempts = config.origin.retries + 1;
        Ok(Arc::new(Self {
            members,
            secrets,
            metrics,
            connector: Arc::new(TransportConnector::new(Some(options))),
            tls: cluster.tls.is_on(),
            known: Mutex::default(),
            stall_timeout: cluster.stall_timeout.get(),
            peek_for: cluster.peek_for.get(),
            patience: (config.origin.connect_timeout.get() + config.origin.read_timeout.get()) * attempts
                + config.fill.max_wait.get()
                + MARGIN,
            places: config.fill.max_in_flight,
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

    /// Whether the cluster has changed so recently that a blob may be with the member that comes after its owner.
    pub fn peeks(&self, view: &View) -> bool {
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

    /// Opens the blob for reading from offset `from`. With `only_kept` the peer starts nothing for its sake.
    /// Waits while the peer's own flight does, and else gives up after `patience` without a byte.
    ///
    /// # Errors
    /// Whatever kept the peer from answering, or made its answer useless. To be told to [`Self::failed`].
    pub async fn open(
        self: &Arc<Self>,
        member: &Member,
        digest: &Digest,
        from: u64,
        only_kept: bool,
        patience: Duration,
    ) -> Result<Answer, Fault> {
        let peer = self.peer(member);
        // What is kept comes at once or not at all, and whoever asks for it has a place already.
        let place = if only_kept { None } else { Some(self.place(&peer).await?) };
        let mut request = peer.upstream.get_request(digest, from)?;
        if only_kept {
            insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED)?;
        }
        let hope = if only_kept { Hope::Tier } else { Hope::Flight };
        let watch = Watch { peers: self.clone(), member: member.clone(), digest: *digest, hope, patience, _place: place };
        let (session, connection) = watch.over(peer.upstream.exchange(&request, &[])).await?;
        let answer = match session.resp_header().map_or(Said::Other, |head| said(head, only_kept)) {
            Said::Absent => Answer::Absent,
            Said::NotKept => Answer::NotKept,
            Said::Unable => {
                self.members.failed(&member.name);
                Answer::Unable
            }
            Said::Other => {
                let incoming = peer.upstream.incoming(session, connection, from)?;
                return Ok(Answer::Blob(Box::new(Incoming { watch: Some(Arc::new(watch)), ..incoming })));
            }
        };
        peer.upstream.finish(session, &connection).await;
        self.answered(member);
        Ok(answer)
    }

    /// Waits for half of `fill.max_wait`, since the fill goes on to the next source without it, and may have to wait there.
    async fn place(&self, peer: &Peer) -> Result<OwnedSemaphorePermit, Fault> {
        let asked = Instant::now();
        let place = timeout(self.max_wait / 2, peer.places.clone().acquire_owned()).await;
        self.metrics.waited(asked.elapsed());
        match place {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Fault::Busy(Limit::Fills)),
        }
    }

    /// The size of the blob, as this member knows it or learns it from the origin; `None`: the origin has no such blob; `Some(None)`: it
    /// has, and nobody knows the size.
    ///
    /// # Errors
    /// The member cannot tell.
    pub async fn stat(&self, member: &Member, digest: &Digest) -> Result<Option<Option<u64>>, Fault> {
        let peer = self.peer(member);
        let request = peer.upstream.request(Method::HEAD, &wire::blob_path(digest))?;
        let asked = async {
            let (session, connection) = peer.upstream.exchange(&request, &[]).await?;
            let head = session.resp_header().ok_or_else(|| peer.upstream.unusable("no head"))?;
            let told = match said(head, false) {
                Said::Absent => Ok(None),
                Said::Unable => Err(Fault::Busy(Limit::Origin)),
                Said::NotKept | Said::Other if head.status == StatusCode::OK => Ok(Some(super::size_of(head, digest))),
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

    /// Hands an upload over to this member, which stores it at the origin. Gives up only if the member does not live.
    ///
    /// One that is streamed may be too large to be had again, so the member has to prove what it is before the first byte leaves.
    ///
    /// # Errors
    /// As [`Upstream::put`].
    pub async fn put(self: &Arc<Self>, member: &Member, digest: &Digest, parcel: &mut Parcel<'_>) -> Result<(Put, Verified<()>), Fault> {
        let upstream = self.peer(member).upstream.clone();
        let patience = self.stall_timeout;
        let watch = Watch { peers: self.clone(), member: member.clone(), digest: *digest, hope: Hope::Upload, patience, _place: None };
        let handed_over = async {
            if !parcel.is_whole() {
                self.meet(&upstream).await?;
            }
            upstream.put(parcel).await
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

    /// Tells this member that the blob is at the origin now, whatever it has heard before. It has `patience` to say that it has understood.
    ///
    /// # Errors
    /// It does not say that it has understood.
    pub async fn stored(&self, member: &Member, digest: &Digest, patience: Duration) -> Result<(), Fault> {
        self.tell(member, &format!("/stored/{digest}"), patience).await
    }

    async fn tell(&self, member: &Member, path: &str, patience: Duration) -> Result<(), Fault> {
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
        self.in_time(member, patience, told).await
    }

    /// What is answered at once or not at all.
    async fn in_time<T>(&self, member: &Member, patience: Duration, asked: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let answer = timeout(patience, asked).await.unwrap_or_else(|_| Err(stalled(patience)));
        match &answer {
            Ok(_) => self.answered(member),
            Err(fault) => self.failed(member, fault),
        }
        answer
    }

    /// Asks whether the peer's own flight waits. None: no answer. Over another connection, since the one in question says nothing.
    async fn ask_after(&self, member: &Member, digest: &Digest) -> Option<Sign> {
        let upstream = self.peer(member).upstream.clone();
        let mut request = upstream.request(Method::HEAD, &wire::blob_path(digest)).ok()?;
        insert(&mut request, header::CACHE_CONTROL, ONLY_IF_CACHED).ok()?;
        let (session, connection) = upstream.exchange(&request, &[]).await.ok()?;
        let head = session.resp_header()?;
        let sign = match head.status {
            StatusCode::GATEWAY_TIMEOUT if head.headers.get(FLIGHT) == Some(&FILLING) => Some(Sign::Filling),
            StatusCode::GATEWAY_TIMEOUT | StatusCode::OK => Some(Sign::Alive),
            _ => None,
        };
        upstream.finish(session, &connection).await;
        sign
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
            upstream: Arc::new(Upstream {
                name: PEER,
                connector: self.connector.clone(),
                host: member.host.clone(),
                addresses: Addresses::of(&member.host, member.port),
                tls: self.tls,
                authority: member.name.to_string(),
                credentials: None,
                // Before the stall, so that it is known to be no connection, and late enough for a lost packet to be sent again.
                connect_timeout: self.stall_timeout * 3 / 4,
                // A watch is over all that may take long.
                read_timeout: self.patience,
                metrics: self.metrics.clone(),
                health: None,
                requests: Semaphore::new(self.requests),
                repeaters: Semaphore::new(REPEATERS),
                ties: Some(Ties { members: self.members.clone(), secrets: self.secrets.clone() }),
            }),
            places: Arc::new(Semaphore::new(self.places)),
            distrusted: Mutex::new(None),
        });
        known.insert(member.name.clone(), peer.clone());
        peer
    }
}

impl Watch {
    /// What `wait` comes to, unless the peer is silent for too long and gives no sign that there is hope.
    pub(super) async fn over<T>(&self, wait: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        let peers = &self.peers;
        let (started, half) = (Instant::now(), self.patience / 2);
        let mut until = started + self.patience;
        tokio::pin!(wait);
        loop {
            tokio::select! {
                biased;
                done = &mut wait => return done,
                () = sleep_until((until - half).into()) => {}
            }
            let hopeful = async {
                let sign = if self.hope == Hope::Tier { None } else { peers.ask_after(&self.member, &self.digest).await };
                if !sign.is_some_and(|sign| self.hope.is_fed_by(sign)) {
                    std::future::pending().await
                }
            };
            tokio::select! {
                biased;
                done = &mut wait => return done,
                () = hopeful => until = Instant::now() + self.patience,
                () = sleep_until(until.into()) => return Err(stalled(self.patience)),
            }
            // An upload takes as long as its client does.
            if self.hope != Hope::Upload && started.elapsed() > peers.patience {
                return Err(stalled(self.patience));
            }
        }
    }
}

fn stalled(patience: Duration) -> Fault {
    Fault::Silent { source_name: PEER, why: format!("no sign of life for {patience:?}") }
}

impl Hope {
    fn is_fed_by(self, sign: Sign) -> bool {
        match self {
            Self::Flight => sign == Sign::Filling,
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

fn said(head: &ResponseHeader, only_kept: bool) -> Said {
    let begins = |name: &HeaderName, with: &str| {
        head.headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| value.trim_start().starts_with(with))
    };
    match head.status {
        // Some other server that happens to listen there knows nothing of the origin.
        StatusCode::NOT_FOUND if begins(&CACHE_STATUS, "castier") => Said::Absent,
        StatusCode::GATEWAY_TIMEOUT if only_kept => Said::NotKept,
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
            assert_eq!((said(&head, false), said(&head, true)), (plain, only_kept), "{status} {headers:?}");
        }
    }

    #[test]
    fn only_the_right_sign_gives_hope() {
        let fed = |hope: Hope| [Sign::Filling, Sign::Alive].map(|sign| hope.is_fed_by(sign));
        assert_eq!([Hope::Flight, Hope::Tier, Hope::Upload].map(fed), [[true, false], [false, false], [true, true]]);
    }
}
