//! A listener: accepts connections, reads one request head after the other, and has each request answered.
//!
//! A plain GET that memory or the disk can answer takes the fast path (`fast_path`). All other requests about blobs go through pingora's session
//! (`session`), where a handler makes the [`Reply`](crate::reply::Reply). Requests that are not about blobs are relayed to the origin.

use crate::{
    connection::Conn,
    descriptors::{Descriptors, Outgoing},
    entrance::{Closed, Entered, Entrance},
    fast_path,
    handlers::{
        Handlers,
        relay::{Known, Relay},
    },
    memory_plan,
    metrics::{Listener, Metrics},
    peer_access::PeerAccess,
    request_head::{self, Head, NoHead},
    routes::Match,
    session::{Arrived, Cut},
};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::BytesMut;
use castier_access::Memo;
use castier_cache::{Budget, Limit};
use castier_cluster::{Asked, ROUTE};
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
    /// `listen.trusted_proxies` and `log.trusted_proxies`.
    proxies: Proxies,
    /// `limits.client_memory`.
    pub(crate) memory: Arc<Budget>,
    /// How many files and connections each part of the program may open.
    pub(crate) descriptors: Arc<Descriptors>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Who may connect to a listener.
pub enum Audience {
    /// Clients. Requests that are not about blobs are relayed to the origin.
    Clients(Relay, Entrance),
    /// Other nodes of the cluster. Nothing is relayed.
    Peers(PeerAccess),
}

/// Whether a new connection is served.
#[derive(PartialEq, Eq)]
enum Admission {
    Admitted,
    /// Over a limit. The client may keep the connection until it has read a 503.
    RefusedWithAnswer,
    /// Over a limit, and too many refused connections are open already. castier closes it at once.
    Refused,
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
        // Each listener counts its own connections. So clients that use up their limit do not cut off the peers.
        let connections = self.metrics.connections_at(self.name());
        connections.inc();
        let (open, shutdown) = (Open(self.clone()), shutdown.clone());
        let count = usize::try_from(connections.get()).unwrap_or(0);
        // In a new task. pingora's task holds the state of a TLS handshake, and would hold it until the connection closes.
        tokio::spawn(async move { open.0.serve(stream, count, &shutdown).await });
        None
    }
}

impl Front {
    /// The label of this listener.
    pub(crate) const fn name(&self) -> Listener {
        match self.audience {
            Audience::Clients(..) => Listener::Public,
            Audience::Peers(_) => Listener::Peer,
        }
    }

    /// A listener's application, within the budget `memory` and the `descriptors`.
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

    /// The address of the client that sent a request. If `socket_address` is a trusted proxy's, the client that the proxy names. At the peer
    /// listener always `socket_address`: a peer's flight may be for many clients.
    fn client(&self, socket_address: Option<SocketAddr>, head: &Head, bytes: &[u8]) -> Option<IpAddr> {
        let address = socket_address?.ip();
        let trusted = |address: &IpAddr| self.proxies.contains(address);
        if matches!(self.audience, Audience::Peers(_)) || !trusted(&address) {
            return Some(address.to_canonical());
        }
        Some(head.introduction(bytes, |fields| castier_wire::forwarded::client(address, fields, trusted)))
    }

    /// The descriptors for one connection to the origin that a client's request needs for itself; `None` if too few are left.
    pub(crate) fn outgoing(&self) -> Option<Outgoing> {
        self.descriptors.outgoing(self.connections())
    }

    /// Waits until so many bytes of a body may go to a client (`limits.bandwidth_per_client`). Boxed, since few clients have such a limit.
    pub(crate) async fn pace(&self, limits: &Limits, client: Option<IpAddr>, bytes: usize) {
        if limits.bandwidth_per_client.get() > 0
            && let (Audience::Clients(_, entrance), Some(client)) = (&self.audience, client)
        {
            Box::pin(entrance.clients.take(client, bytes)).await;
        }
    }

    /// How many clients are connected.
    pub(crate) fn connections(&self) -> u64 {
        u64::try_from(self.metrics.connections.get()).unwrap_or(0)
    }

    /// Decides about a new connection. `count` is the number of open connections, the new one included.
    fn admit_connection(&self, count: usize, limits: &Limits) -> Admission {
        let max = match &self.audience {
            Audience::Clients(..) => limits.max_connections,
            Audience::Peers(_) => limits.max_peer_connections,
        };
        let fits = matches!(self.audience, Audience::Peers(_)) || self.descriptors.has_room(count);
        if count <= max && fits {
            Admission::Admitted
        } else if count <= max.saturating_add(self.descriptors.refusals()) && self.descriptors.may_refuse(count) {
            Admission::RefusedWithAnswer
        } else {
            Admission::Refused
        }
    }

    /// Serves a new connection, or refuses it. `count` is the number of open connections, the new one included.
    async fn serve(&self, stream: Stream, count: usize, shutdown: &ShutdownWatch) {
        let limits = self.limits.load_full();
        let admission = self.admit_connection(count, &limits);
        if admission == Admission::Admitted {
            let entered = match &self.audience {
                Audience::Clients(_, entrance) => match Box::pin(entrance.enter(stream, &limits)).await {
                    Ok(entered) => entered,
                    Err(closed) => return Box::pin(self.turn_away(closed, &limits)).await,
                },
                Audience::Peers(access) => match Box::pin(access.secure(stream, limits.header_timeout.get())).await {
                    Some(stream) => Entered::peer(stream),
                    None => return,
                },
            };
            return self.serve_connection(entered, limits.write_timeout.get(), shutdown).await;
        }
        self.metrics.shed(Limit::Connections);
        // With TLS there is no answer: it would cost a handshake.
        let is_secured = match &self.audience {
            Audience::Clients(_, entrance) => entrance.tls.is_some(),
            Audience::Peers(access) => access.is_secured(),
        };
        if !is_secured {
            let wait = if admission == Admission::RefusedWithAnswer { fast_path::REFUSAL } else { Duration::ZERO };
            Box::pin(fast_path::refuse_connection(&mut Conn::new(stream, limits.write_timeout.get()), wait)).await;
        }
    }

    /// Serves one request after the other until either side closes. Boxes every future that only a request needs: there are many idle
    /// connections, and each holds this function's state.
    async fn serve_connection(&self, entered: Entered, write_timeout: Duration, shutdown: &ShutdownWatch) {
        let Entered { stream, address: socket_address, certificate, counted: _counted } = entered;
        let mut conn = Conn::new(stream, write_timeout);
        let mut memo = Memo::default();
        let address = socket_address.map(|address| address.ip().to_canonical());
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
            conn.set_write_timeout(limits.write_timeout.get());
            let _answering = self.metrics.answering();
            // `_lease` pays for the bytes of the head, so it must live as long as the request.
            let (head, _lease) = match head {
                Ok(head) => head,
                Err(NoHead::Closed) => return,
                Err(NoHead::Refused(status, why)) => {
                    drop(ahead);
                    return Box::pin(self.refuse_request(conn, status, &why, address)).await;
                }
                Err(NoHead::NoMemory) => {
                    drop(ahead);
                    return Box::pin(self.shed_request(conn, Limit::ClientMemory, None, address)).await;
                }
            };
            let asked = match self.admit_request(&head, &ahead) {
                Ok(asked) => asked,
                Err((status, why)) => return Box::pin(self.refuse_request(conn, status, why, address)).await,
            };
            let mut routed = match self.route(&head, &ahead) {
                Ok(routed) => routed,
                Err((status, why)) => return Box::pin(self.refuse_request(conn, status, why, address)).await,
            };
            let client = self.client(socket_address, &head, &ahead);
            if let Audience::Clients(_, entrance) = &self.audience
                && !entrance.is_open(&limits)
                && let Err(refused) =
                    Box::pin(entrance.check(&mut memo, &head, &ahead, routed.as_deref_mut(), client, certificate.as_ref())).await
            {
                let (reply, why) = *refused;
                match Box::pin(self.deny(conn, ahead, &head, reply, why, client)).await {
                    Some(next) => {
                        (conn, ahead) = next;
                        continue;
                    }
                    None => return,
                }
            }
            let arrived = Arrived { head: &head, limits: &limits, draining: &draining, asked: &asked, client, routed: routed.as_deref() };
            let next = match head.target(&ahead) {
                _ if let Some(found) = &routed => match &self.audience {
                    Audience::Clients(relay, _) if !found.is_answered(&head.method) => {
                        Box::pin(self.relay_request(relay, conn, ahead, &arrived, shutdown)).await
                    }
                    _ => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
                },
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
                target => match &self.audience {
                    Audience::Clients(relay, _) if !is_for_handlers(&target, &head.method) => {
                        Box::pin(self.relay_request(relay, conn, ahead, &arrived, shutdown)).await
                    }
                    _ => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
                },
            };
            match next {
                Some(next) => (conn, ahead) = next,
                None => return,
            }
        }
    }

    /// Closes a connection that may not send requests, with an answer if it can have one.
    async fn turn_away(&self, closed: Closed, limits: &Limits) {
        match closed {
            Closed::Plain(stream) => {
                let why = "this port speaks TLS: ask it with https";
                self.refuse_request(Conn::new(stream, limits.write_timeout.get()), StatusCode::BAD_REQUEST, why, None).await;
            }
            Closed::TooMany(stream) => {
                let why = "more connections than one client may open (limits.connections_per_client)";
                if let Some(stream) = stream {
                    self.refuse_request(Conn::new(stream, limits.write_timeout.get()), StatusCode::TOO_MANY_REQUESTS, why, None).await;
                }
            }
            Closed::Silently(why) => tracing::debug!(why, "a connection was closed before its first request"),
        }
    }

    /// Decides whether this listener answers the request. Returns what the answer must prove, or a status and a reason to refuse it.
    fn admit_request(&self, head: &Head, bytes: &[u8]) -> Result<Asked, (StatusCode, &'static str)> {
        match &self.audience {
            // Not checked for peers: the owner of a blob may ask the very node that asked it. One hop is all, so that is no loop.
            Audience::Clients(..) if head.looped => {
                let why = "the request has come back to the node that sent it: this node and its origin lead to each other; see origin.url";
                Err((StatusCode::LOOP_DETECTED, why))
            }
            Audience::Clients(..) => Ok(Asked::OPEN),
            Audience::Peers(access) => {
                access.admits(head, bytes).ok_or((StatusCode::FORBIDDEN, "this listener is for the nodes of the cluster"))
            }
        }
    }

    /// The route that a request is for. Boxed, since few connections need it.
    fn route(&self, head: &Head, bytes: &[u8]) -> Result<Option<Box<Match>>, (StatusCode, &'static str)> {
        let routes = self.handlers.routes();
        if matches!(self.audience, Audience::Peers(_)) {
            let host = head.field(bytes, ROUTE.as_str()).filter(|_| matches!(head.method, Method::GET | Method::HEAD));
            let Some(host) = host else { return Ok(None) };
            // The node that asks has a route that this one does not have yet: it asks the upstream itself.
            let found = routes.find(Some(host), false, head.path_and_query(bytes)).ok().flatten();
            return found.map(|found| Some(Box::new(found))).ok_or((StatusCode::MISDIRECTED_REQUEST, "this node has no such route"));
        }
        let target = head.target(bytes);
        if !matches!(target, Target::Other) && !routes.takes_blobs() {
            return Ok(None);
        }
        match routes.find(head.host(bytes), head.absolute.is_some(), head.path_and_query(bytes)) {
            Ok(Some(found)) => Ok(Some(Box::new(found))),
            // castier is no open proxy: what a client wants from another host is for a route, or for nobody.
            Ok(None) if head.absolute.is_some() && matches!(target, Target::Other) && !routes.is_empty() => {
                Err((StatusCode::FORBIDDEN, "no route is for this host; castier is no open proxy"))
            }
            // A path that no route may match is the origin's to refuse.
            Ok(None) | Err(_) => Ok(None),
        }
    }

    /// Relays a request to the origin, or to the upstream of its route, if memory and descriptors suffice. Gives the connection back if it can serve another request.
    async fn relay_request(
        &self,
        relay: &Relay,
        conn: Conn,
        ahead: BytesMut,
        arrived: &Arrived<'_>,
        shutdown: &ShutdownWatch,
    ) -> Option<(Conn, BytesMut)> {
        let Arrived { head, limits, client, routed, .. } = *arrived;
        let Some(memory) = self.memory.lease(memory_plan::relay(head)) else {
            drop(ahead);
            self.shed_request(conn, Limit::ClientMemory, Some(arrived.asked), client).await;
            return None;
        };
        let Some(_descriptors) = self.outgoing() else {
            drop(ahead);
            self.shed_request(conn, Limit::Files, Some(arrived.asked), client).await;
            return None;
        };
        // An entry of the origin is relayed to it as what is for no route.
        let to = match routed.filter(|found| !found.is_entry()).map(|found| self.handlers.routes().relay(found)).transpose() {
            Ok(to) => to,
            Err(fault) => {
                drop(ahead);
                self.refuse_request(conn, StatusCode::BAD_GATEWAY, &fault.to_string(), client).await;
                return None;
            }
        };
        let credentials_are_ours = matches!(&self.audience, Audience::Clients(_, entrance) if entrance.access.is_some());
        let known = Known { memory, client, trace: head.introduction(&ahead, |fields| trace::of(fields)), to, credentials_are_ours };
        relay.pass(conn, ahead, head, limits, shutdown, known).await
    }
}

/// Whether a handler answers such a request. If not, it is relayed.
fn is_for_handlers(target: &Target<'_>, method: &Method) -> bool {
    match target {
        Target::Blob(_) | Target::Malformed(_) => matches!(*method, Method::GET | Method::HEAD | Method::PUT | Method::DELETE),
        Target::Collection => *method == Method::POST,
        Target::Other => false,
    }
}
