//! What is answered to a request. Handlers see neither pingora nor sockets: a [`Request`] comes in, a [`Reply`] goes out.

mod blob;
pub mod peer;
pub mod relay;
mod upload;

use crate::{node::Node, reply::Reply};
use castier_cache::{Asker, Cache, Fault};
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
    /// What the path names.
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
}

/// Who asks at a listener, and what only they can do.
pub enum Asks {
    /// Clients. What a client deletes is purged from every node.
    Clients(Arc<Purge>),
    /// Other nodes of the cluster. Nothing that they ask for is asked of another peer.
    Peers {
        /// The cluster.
        members: Arc<Members>,
        /// This node is about to leave, and should not be asked any more.
        leaving: Arc<AtomicBool>,
    },
}

impl Handlers {
    /// Handlers over this node.
    pub const fn new(node: Arc<Node>, asks: Asks) -> Self {
        Self { node, asks }
    }

    /// The cache of this node, for the fast path.
    pub(crate) fn cache(&self) -> &Arc<Cache> {
        &self.node.cache
    }

    /// Who asks here.
    pub(crate) const fn asker(&self) -> Asker {
        match self.asks {
            Asks::Clients(_) => Asker::Client,
            Asks::Peers { .. } => Asker::Peer,
        }
    }

    /// Whether the body of the request is a blob to be stored. A peer hands over only uploads that have a name.
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

    /// The reply to a request that is no upload. Its body means nothing.
    ///
    /// # Errors
    /// What kept the request from its answer.
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
