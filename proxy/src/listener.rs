//! A listener: accepts connections, reads one request head after the other, and has each request answered.
//!
//! A plain GET that memory or the disk can answer takes the fast path (`fast_path`). All other requests about blobs go through pingora's session
//! (`session`), where a handler makes the [`Reply`](crate::reply::Reply). What is no blob is relayed.

use crate::{
    connection::Conn,
    descriptors::{Descriptors, Outgoing},
    fast_path,
    handlers::{
        Handlers,
        relay::{Known, Relay},
    },
    memory_plan,
    metrics::{Listener, Metrics},
    peer_access::PeerAccess,
    request_head::{self, Head, NoHead},
    session::{Arrived, Cut},
};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::BytesMut;
use castier_cache::{Budget, Limit};
use castier_cluster::Asked;
use castier_config::{Limits, Proxies};
use castier_upstream::trace;
use castier_wire::Target;
use http::{Method, StatusCode};
use pingora::{apps::ServerApp, protocols::Stream, server::ShutdownWatch};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{io::AsyncWriteExt, time::timeout};

/// A listener's application.
pub struct Front {
    pub(crate) handlers: Handlers,
    pub(crate) audience: Audience,
    limits: Arc<ArcSwap<Limits>>,
    /// `log.trusted_proxies`.
    proxies: Proxies,
    /// `limits.client_memory`.
    pub(crate) memory: Arc<Budget>,
    /// How many files and connections each part of the program may open.
    pub(crate) descriptors: Arc<Descriptors>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Whom a listener is for.
pub enum Audience {
    /// Clients. What is no blob is relayed to the origin.
    Clients(Relay),
    /// Other nodes of the cluster. Nothing is relayed.
    Peers(PeerAccess),
}

/// Counts one connection for as long as it lives.
struct Open(Arc<Front>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.metrics.connections_at(self.0.name()).dec();
    }
}

#[async_trait]
impl ServerApp for Front {
    async fn process_new(self: &Arc<Self>, stream: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        // Each listener has the limit to itself: clients that take all there is must not part the nodes.
        let connections = self.metrics.connections_at(self.name());
        connections.inc();
        let (open, shutdown) = (Open(self.clone()), shutdown.clone());
        let place = usize::try_from(connections.get()).unwrap_or(0);
        // In a task of its own: pingora's has room for a TLS handshake, and would keep it as long as the connection lives.
        tokio::spawn(async move { open.0.serve(stream, place, &shutdown).await });
        None
    }
}

impl Front {
    /// The label of this listener.
    pub(crate) const fn name(&self) -> Listener {
        match self.audience {
            Audience::Clients(_) => Listener::Public,
            Audience::Peers(_) => Listener::Peer,
        }
    }

    /// The application over these parts, within `limits.client_memory` and the descriptors there are.
    pub fn new(
        handlers: Handlers,
        audience: Audience,
        limits: Arc<ArcSwap<Limits>>,
        proxies: Proxies,
        memory: Arc<Budget>,
        descriptors: Arc<Descriptors>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { handlers, audience, limits, proxies, memory, descriptors, metrics }
    }

    /// The client that a request comes from: the one that trusted proxies name, else the one that is connected. At the peer listener it is
    /// the other node: its flight may be for many clients.
    fn client(&self, peer: Option<SocketAddr>, head: &Head, bytes: &[u8]) -> Option<IpAddr> {
        let peer = peer?.ip();
        let trusted = |address: &IpAddr| self.proxies.contains(address);
        if matches!(self.audience, Audience::Peers(_)) || !trusted(&peer) {
            return Some(peer.to_canonical());
        }
        Some(head.introduction(bytes, |fields| castier_wire::forwarded::client(peer, fields, trusted)))
    }

    /// What a connection to the origin takes that only this request needs.
    pub(crate) fn outgoing(&self) -> Option<Outgoing> {
        self.descriptors.outgoing(self.connections())
    }

    /// How many clients are connected.
    pub(crate) fn connections(&self) -> u64 {
        u64::try_from(self.metrics.connections.get()).unwrap_or(0)
    }

    /// Whether the connection that made it `place` of them may stay, and, if not, whether it is told so.
    fn admits(&self, place: usize, limits: &Limits) -> (bool, bool) {
        let max = match &self.audience {
            Audience::Clients(_) => limits.max_connections,
            Audience::Peers(_) => limits.max_peer_connections,
        };
        let room = matches!(self.audience, Audience::Peers(_)) || self.descriptors.has_room(place);
        let told = place <= max.saturating_add(self.descriptors.refusals()) && self.descriptors.may_refuse(place);
        (place <= max && room, told)
    }

    /// The connection that made it `place` of them.
    async fn serve(&self, stream: Stream, place: usize, shutdown: &ShutdownWatch) {
        let limits = self.limits.load_full();
        let patience = limits.write_timeout.get();
        let (admitted, told) = self.admits(place, &limits);
        if admitted {
            let stream = match &self.audience {
                Audience::Clients(_) => stream,
                Audience::Peers(access) => match Box::pin(access.secure(stream, limits.header_timeout.get())).await {
                    Some(stream) => stream,
                    None => return,
                },
            };
            return self.serve_connection(Conn::new(stream, patience), shutdown).await;
        }
        self.metrics.shed(Limit::Connections);
        // One that would first have to be secured is closed without a word.
        if !matches!(&self.audience, Audience::Peers(access) if access.is_secured()) {
            // Most are waited for until they have read the answer; beyond a number of these, none is.
            let patience = if told { fast_path::REFUSAL } else { Duration::ZERO };
            Box::pin(fast_path::refuse_connection(&mut Conn::new(stream, limits.write_timeout.get()), patience)).await;
        }
    }

    /// One request after the other, until either side has had enough. Idle connections are many, so whatever only a request needs is
    /// boxed and lives no longer than it.
    async fn serve_connection(&self, mut conn: Conn, shutdown: &ShutdownWatch) {
        let peer = conn.peer();
        let address = peer.map(|peer| peer.ip().to_canonical());
        let mut draining = shutdown.clone();
        let mut ahead = BytesMut::new();
        let mut wait = self.limits.load().header_timeout.get();
        loop {
            let limits = self.limits.load_full();
            let idle = ahead.is_empty();
            let head = tokio::select! {
                biased;
                head = request_head::read_head(&mut conn, &mut ahead, &limits, wait, &self.memory) => head,
                _ = draining.wait_for(|down| *down), if idle => return,
            };
            wait = limits.idle_timeout.get();
            conn.set_patience(limits.write_timeout.get());
            let _answering = self.metrics.answering();
            // The lease lives as long as the request does, as the head's bytes do.
            let (head, _lease) = match head {
                Ok(head) => head,
                Err(NoHead::Closed) => return,
                Err(NoHead::Refused(status, why)) => {
                    drop(ahead);
                    return Box::pin(self.refuse_request(conn, status, &why, address)).await;
                }
                Err(NoHead::NoMemory) => {
                    drop(ahead);
                    return Box::pin(self.shed_request(conn, Limit::ClientMemory, address)).await;
                }
            };
            let asked = match &self.audience {
                Audience::Clients(_) => Asked::OPEN,
                Audience::Peers(access) => match access.admits(&head, &ahead) {
                    Some(asked) => asked,
                    None => {
                        let why = "this listener is for the nodes of the cluster";
                        return Box::pin(self.refuse_request(conn, StatusCode::FORBIDDEN, why, address)).await;
                    }
                },
            };
            // Between nodes a question may come back: the owner peeks at the node that asked it. It goes no further than one hop.
            if head.looped && matches!(self.audience, Audience::Clients(_)) {
                let why = "the request has come back to the node that sent it: this node and its origin lead to each other; see origin.url";
                return Box::pin(self.refuse_request(conn, StatusCode::LOOP_DETECTED, why, address)).await;
            }
            let client = self.client(peer, &head, &ahead);
            let arrived = Arrived { head: &head, limits: &limits, draining: &draining, asked: &asked, client };
            let next = match head.target(&ahead) {
                Target::Blob(digest) if head.plain && !*draining.borrow() => {
                    match self.fast_hit(&mut conn, &mut ahead, &digest, &arrived).await {
                        Ok(true) if head.close => {
                            let _ = timeout(limits.write_timeout.get(), conn.shutdown()).await;
                            None
                        }
                        Ok(true) => Some((conn, ahead)),
                        Ok(false) => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
                        Err(Cut { .. }) => return,
                    }
                }
                Target::Blob(_) | Target::Malformed(_)
                    if matches!(head.method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE) =>
                {
                    Box::pin(self.serve_session(conn, ahead, &arrived)).await
                }
                Target::Collection if head.method == Method::POST => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
                _ => match &self.audience {
                    Audience::Clients(relay) => {
                        let Some(memory) = self.memory.lease(memory_plan::relay(&head)) else {
                            drop(ahead);
                            return Box::pin(self.shed_request(conn, Limit::ClientMemory, client)).await;
                        };
                        let Some(connection) = self.outgoing() else {
                            drop(ahead);
                            return Box::pin(self.shed_request(conn, Limit::Files, client)).await;
                        };
                        let known = Known { memory, client, trace: head.introduction(&ahead, |fields| trace::of(fields)) };
                        let next = Box::pin(relay.pass(conn, ahead, &head, &limits, shutdown, known)).await;
                        drop(connection);
                        next
                    }
                    Audience::Peers(_) => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
                },
            };
            match next {
                Some(next) => (conn, ahead) = next,
                None => return,
            }
        }
    }
}
