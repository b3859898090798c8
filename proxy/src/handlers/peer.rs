//! Requests between nodes that are not for blobs: health checks, purges, and notices that a blob was stored.
//!
//! Invariant: one hop. A request at the peer listener is answered from a tier, a flight or the origin. It is never sent to another peer, even if
//! the two nodes have different rings. Nothing is relayed.

use super::{Handlers, Request};
use crate::{node::Node, outboxes, reply::Reply};
use castier_blob::Digest;
use castier_cache::{Fault, SourceKind, Via};
use castier_cluster::{FILLING, FLIGHT, HEALTH, Members, NODE};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use std::sync::atomic::{AtomicBool, Ordering};

/// The path of a purge of names, before what is purged.
pub(crate) const PURGE_NAMES: &str = "/names/";

impl Handlers {
    pub(super) async fn control(&self, request: &Request<'_>, members: &Members, leaving: &AtomicBool) -> Result<Reply, Fault> {
        let (method, path) = (request.method, request.path);
        let names = |prefix: &str| path.strip_prefix(prefix)?.parse::<Digest>().ok().filter(|_| *method == Method::POST);
        // The proof covers `Host`. So a machine between two nodes cannot send the request to a third node and return its answer.
        let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let elsewhere = members.view().members().iter().any(|member| !member.itself && *member.name == *host);
        if elsewhere && *method == Method::POST {
            return Ok(Reply::error(StatusCode::MISDIRECTED_REQUEST, "this is another node than the one that the request names"));
        }
        if let Some(digest) = names("/purge/") {
            self.node.origin.forget(&digest);
            self.node.cache.forget(&digest).await;
            tracing::info!(%digest, "purged at a peer's request");
            return Ok(Reply::done());
        }
        if let Some(what) = path.strip_prefix(PURGE_NAMES).filter(|_| *method == Method::POST) {
            return Ok(match self.routes.purge_at_peers_request(what) {
                Some(_) => Reply::done(),
                None => Reply::error(StatusCode::NOT_FOUND, "this node has no such route"),
            });
        }
        if let Some(digest) = names("/stored/") {
            self.node.cache.stored(&digest);
            return Ok(Reply::done());
        }
        if let Some(outbox) = &self.node.outbox {
            if let Some(digest) = names(outboxes::DELETED) {
                return outboxes::take_out(outbox, &digest).await;
            }
            if path == outboxes::STATE && *method == Method::GET {
                return Ok(outboxes::answer_state(outbox));
            }
            if let Some(name) = path.strip_prefix(outboxes::ENTRY).filter(|_| *method == Method::GET) {
                return outboxes::answer_entry(outbox, name).await;
            }
        }
        Ok(match *method {
            Method::GET if path == HEALTH => health(members, leaving),
            _ => Reply::error(StatusCode::NOT_FOUND, "here are blobs, /purge/<digest>, /stored/<digest>, /outbox and /healthz"),
        })
    }
}

fn health(members: &Members, leaving: &AtomicBool) -> Reply {
    let mut reply = if leaving.load(Ordering::Relaxed) {
        Reply::error(StatusCode::SERVICE_UNAVAILABLE, "this node is about to leave the cluster")
    } else {
        Reply::text("ok\n")
    };
    if let Ok(node) = HeaderValue::from_str(members.node()) {
        reply.headers.insert(NODE, node);
    }
    reply
}

/// Whether the request has `only-if-cached`: only a tier may answer (RFC 9111, section 5.2.1.7).
pub(super) fn only_if_cached(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|directive| directive.trim().eq_ignore_ascii_case("only-if-cached"))
}

/// The answer to `HEAD` with `only-if-cached`: whether a tier or the outbox has the blob, and if not, whether a flight is loading it.
pub(super) async fn known(node: &Node, digest: &Digest) -> Reply {
    let cache = &node.cache;
    if let Some(pending) = node.pending(digest) {
        return Reply::size(digest, pending.size, Via::asked(SourceKind::Origin));
    }
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
