//! The other nodes' side: who is let in at the peer listener, and what is answered there beside blobs.
//!
//! Invariant: a hop is a hop. What comes in here is answered from the tiers, a flight or the origin ([`Asker::Peer`]), and never handed
//! on to another node, whatever the two nodes believe about the ring; and nothing at all is relayed.
//!
//! [`Asker::Peer`]: castier_cache::Asker::Peer

use super::{Front, tls};
use crate::{
    members::{Members, NODE},
    reply::Reply,
    request_body,
    request_head::Head,
    secret::{Asked, PROOF, Secrets},
    upstream::{FILLING, FLIGHT},
};
use castier_blob::Digest;
use castier_cache::{Cache, Fault, Via};
use castier_config::ClusterTls;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use pingora::{
    listeners::tls::Acceptor,
    protocols::{Stream, http::ServerSession},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Says how a node is; the one request that needs no proof.
const HEALTH: &str = "/healthz";

/// Lets in the nodes of the cluster, and nobody else; proves to them that this is one.
pub struct PeerDoor {
    secrets: Arc<Secrets>,
    members: Arc<Members>,
    /// None: plain TCP.
    tls: Option<Acceptor>,
    /// When the certificate that is shown expires, in seconds since 1970; none without TLS.
    certificate_expiry: Option<i64>,
    /// This node is about to go, and should not be asked any more.
    leaving: Arc<AtomicBool>,
}

impl PeerDoor {
    /// For those that prove that they know the secret and, with TLS, have a certificate of the cluster's. While `leaving` holds, this node says that it is not well.
    ///
    /// # Errors
    /// A text that names the key of `cluster.tls` whose file cannot be used.
    pub fn new(tls: &ClusterTls, secrets: Arc<Secrets>, members: Arc<Members>, leaving: Arc<AtomicBool>) -> Result<Self, String> {
        let (acceptor, certificate_expiry) = tls::acceptor(tls)?.unzip();
        Ok(Self { secrets, members, tls: acceptor, certificate_expiry: certificate_expiry.flatten(), leaving })
    }

    /// When the certificate that is shown to peers expires, or one of those that vouch for it, in seconds since 1970.
    pub const fn certificate_expiry(&self) -> Option<i64> {
        self.certificate_expiry
    }

    /// Whether connections here speak TLS.
    pub(super) const fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// The connection with its TLS handshake done, if there is one to do; none if it failed.
    pub(super) async fn secure(&self, stream: Stream, patience: Duration) -> Option<Stream> {
        match &self.tls {
            None => Some(stream),
            Some(acceptor) => tls::accept(acceptor, stream, patience).await,
        }
    }

    /// What the answer is to be proved with, if the request whose head stands at the front of `bytes` is a peer's, or may be anybody's.
    pub(super) fn admits(&self, head: &Head, bytes: &[u8]) -> Option<Asked> {
        let (method, path) = (head.method.as_str(), head.path(bytes));
        let admitted = head.asked(bytes).and_then(|fields| self.secrets.admit(head.proof(bytes), method, path, fields));
        // A proof that does not fit is refused here too, so that a node with another secret shows in the figures of both.
        let anybody = head.method == Method::GET && path == HEALTH && head.proof(bytes).is_none();
        admitted.or_else(|| anybody.then_some(Asked::OPEN))
    }

    fn health(&self) -> Reply {
        let mut reply = if self.leaving.load(Ordering::Relaxed) {
            Reply::error(StatusCode::SERVICE_UNAVAILABLE, "this node is about to leave the cluster")
        } else {
            Reply::text("ok\n")
        };
        if let Ok(node) = HeaderValue::from_str(self.members.node()) {
            reply.headers.insert(NODE, node);
        }
        reply
    }
}

impl Front {
    /// What nodes tell each other beside blobs.
    pub(super) async fn control(&self, door: &PeerDoor, session: &mut ServerSession, method: &Method) -> Result<Reply, Fault> {
        request_body::no_body(session).await?;
        let path = session.req_header().uri.path();
        let names = |prefix: &str| path.strip_prefix(prefix)?.parse::<Digest>().ok().filter(|_| *method == Method::POST);
        // The proof covers `Host`. So a machine between two nodes cannot have a third one confirm what the second was asked to do.
        let host = session.req_header().headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let elsewhere = door.members.view().members().iter().any(|member| !member.itself && *member.name == *host);
        if elsewhere && *method == Method::POST {
            return Ok(Reply::error(StatusCode::MISDIRECTED_REQUEST, "this is another node than the one that the request names"));
        }
        if let Some(digest) = names("/purge/") {
            self.node.cache.forget(&digest).await;
            tracing::info!(%digest, "purged, since a peer said so");
            return Ok(Reply::done());
        }
        if let Some(digest) = names("/stored/") {
            self.node.cache.stored(&digest);
            return Ok(Reply::done());
        }
        Ok(match *method {
            Method::GET if path == HEALTH => door.health(),
            _ => Reply::error(StatusCode::NOT_FOUND, "here are blobs, /purge/<digest>, /stored/<digest> and /healthz"),
        })
    }
}

/// Adds the proof to an answer to a peer, which must not change any more.
pub(super) fn prove(reply: &mut Reply, asked: &Asked) {
    if let Some(proof) = asked.prove(reply.status, &reply.headers) {
        reply.headers.insert(PROOF, proof);
    }
}

/// Whether the blob is wanted only if a tier keeps it (RFC 9111, section 5.2.1.7).
pub(super) fn only_if_cached(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|directive| directive.trim().eq_ignore_ascii_case("only-if-cached"))
}

/// The answer to `HEAD` with `only-if-cached`: whether a tier keeps the blob, and if not, whether it is on its way.
pub(super) async fn known(cache: &Cache, digest: &Digest) -> Reply {
    match cache.kept_size(digest).await {
        Some((size, tier)) => Reply::size(digest, size, Via::Tier(tier)),
        None => {
            let mut reply = Reply::not_kept();
            if cache.is_filling(digest) {
                reply.headers.insert(FLIGHT, FILLING);
            }
            reply
        }
    }
}
