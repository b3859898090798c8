//! The handlers: they turn a [`Request`] into a [`Reply`], and see neither pingora nor sockets.

mod blob;
pub mod peer;
pub mod relay;
mod upload;

use crate::{
    node::Node,
    reply::Reply,
    routes::{Match, Routes},
};
use castier_cache::{Asker, Body, Cache, Fault};
use castier_cluster::{Members, Purge};
use castier_wire::Target;
use http::{HeaderMap, Method, Version};
use std::sync::{Arc, atomic::AtomicBool};

/// The head of a request.
pub struct Request<'a> {
    /// The method.
    pub method: &'a Method,
    /// The version of HTTP that the client speaks.
    pub version: Version,
    /// The resource that the path names.
    pub target: Target<'a>,
    /// The path.
    pub path: &'a str,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// The handlers of one listener.
pub struct Handlers {
    node: Arc<Node>,
    asks: Asks,
    routes: Arc<Routes>,
}

/// Who sends requests to a listener, and the parts that only their requests need.
pub enum Asks {
    /// Clients. A DELETE purges the blob from every node.
    Clients(Arc<Purge>),
    /// Peers. Their requests are never sent to another peer.
    Peers {
        /// The cluster.
        members: Arc<Members>,
        /// This node is about to leave, and should get no more requests.
        leaving: Arc<AtomicBool>,
    },
}

impl Handlers {
    /// The handlers of one listener of this node.
    pub const fn new(node: Arc<Node>, asks: Asks, routes: Arc<Routes>) -> Self {
        Self { node, asks, routes }
    }

    /// The routes.
    pub(crate) const fn routes(&self) -> &Arc<Routes> {
        &self.routes
    }

    /// The reply to a request of a route. `body` is read by a batch request only.
    ///
    /// # Errors
    /// The request failed.
    pub async fn answer_route(&self, request: &Request<'_>, found: Match, body: Option<Body<'_>>) -> Result<Reply, Fault> {
        let routes = &self.routes;
        match body {
            Some(body) => Box::pin(routes.batch(request, found, body, self.asker())).await,
            None => Box::pin(routes.answer(request, found, self.asker())).await,
        }
    }

    /// The cache of this node, for the fast path.
    pub(crate) fn cache(&self) -> &Arc<Cache> {
        &self.node.cache
    }

    /// Who sends requests to this listener.
    pub(crate) const fn asker(&self) -> Asker {
        match self.asks {
            Asks::Clients(_) => Asker::Client,
            Asks::Peers { .. } => Asker::Peer,
        }
    }

    /// Whether the body of the request is a blob to be stored. Peers upload only by PUT.
    pub fn is_upload(&self, request: &Request<'_>) -> bool {
        match (request.target, &self.asks) {
            (Target::Blob(_), _) => *request.method == Method::PUT,
            (Target::Collection, Asks::Clients(_)) => *request.method == Method::POST,
            _ => false,
        }
    }

    /// The reply, if it needs neither a look-up nor the body of the request.
    pub fn at_once(&self, request: &Request<'_>) -> Option<Reply> {
        match request.target {
            Target::Malformed(_) => Some(Reply::malformed_digest()),
            Target::Blob(digest) if matches!(*request.method, Method::GET | Method::HEAD) => {
                castier_wire::names_this_blob(request.headers, &digest).then(|| Reply::not_modified(&digest))
            }
            _ => None,
        }
    }

    /// The reply to a request that is no upload. Its body has no meaning.
    ///
    /// # Errors
    /// The request failed.
    pub async fn answer(&self, request: &Request<'_>) -> Result<Reply, Fault> {
        match (request.target, &self.asks) {
            (Target::Blob(digest), _) if *request.method == Method::GET => self.get(request, &digest).await,
            (Target::Blob(digest), _) if *request.method == Method::HEAD => Box::pin(self.head(request, &digest)).await,
            (Target::Blob(digest), _) if *request.method == Method::DELETE => Box::pin(self.delete(&digest)).await,
            (_, Asks::Peers { members, leaving }) => Box::pin(self.control(request, members, leaving)).await,
            (_, Asks::Clients(_)) => Err(Fault::Internal("a request for the relay".into())),
        }
    }
}
