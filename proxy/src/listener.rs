//! A listener: accepts connections, reads one request head after the other, and has each request answered.
//!
//! A plain GET that memory or the disk can answer takes the fast path (`fast_path`). All other requests about blobs go through pingora's session
//! (`session`), where a handler makes the [`Reply`](crate::reply::Reply). Requests that are not about blobs are relayed to the origin.

use crate::{
    connection::Conn,
    descriptors::{Descriptors, Outgoing},
    entrance::{Client, Closed, Door, Entered, Entrance, Refusal, Visitor, too_many},
    fast_path,
    handlers::{
        Handlers,
        relay::{Known, Relay},
    },
    memory_plan,
    metrics::{Listener, Metrics},
    peer_access::PeerAccess,
    reply::Reply,
    request_head::{self, Head, NoHead},
    routes::Match,
    session::{Arrived, Cut},
};
use arc_swap::ArcSwap;
use async_trait::async_trait;
use bytes::BytesMut;
use castier_access::Memo;
use castier_cache::{Budget, Fault, Limit};
use castier_cluster::{Asked, ROUTE};
use castier_config::Limits;
use castier_upstream::trace;
use castier_wire::Target;
use http::{Method, StatusCode};
use pingora::{apps::ServerApp, protocols::Stream, server::ShutdownWatch};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt, time::timeout};

/// A listener's application.
pub struct Front {
    pub(crate) handlers: Handlers,
    pub(crate) audience: Audience,
    pub(crate) limits: Arc<ArcSwap<Limits>>,
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

/// What a request that may be answered is for.
pub(crate) struct Admitted {
    /// What the answer must prove.
    pub(crate) asked: Asked,
    /// Boxed, since few requests are for a route.
    pub(crate) routed: Option<Box<Match>>,
    pub(crate) client: Client,
}

/// Who answers an admitted request.
pub(crate) enum Answerer<'a> {
    Handlers,
    Relay(&'a Relay),
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
        memory: Arc<Budget>,
        descriptors: Arc<Descriptors>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { handlers, audience, limits, memory, descriptors, metrics }
    }

    /// The descriptors for one connection to the origin that a client's request needs for itself; `None` if too few are left.
    pub(crate) fn outgoing(&self) -> Option<Outgoing> {
        self.descriptors.outgoing(self.connections())
    }

    /// Waits until so many bytes of a body may go to a client (`limits.bandwidth_per_client`). Boxed, since few clients have such a limit.
    ///
    /// # Errors
    /// The client leaves first, which `gone` tells. It would wait with what it holds, and its place in the queue would cost others of its address.
    pub(crate) async fn pace<T>(&self, arrived: &Arrived<'_>, bytes: usize, gone: impl AsyncFnOnce() -> T) -> Result<(), Cut> {
        if arrived.limits.bandwidth_per_client.get() > 0
            && let (Audience::Clients(_, entrance), Some(client)) = (&self.audience, arrived.client.counted)
        {
            let turn = async {
                tokio::select! {
                    biased;
                    () = entrance.door.clients.take(client, bytes) => Ok(()),
                    _ = gone() => Err(Cut::client("closed")),
                }
            };
            return Box::pin(turn).await;
        }
        Ok(())
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
    async fn serve(self: &Arc<Self>, stream: Stream, count: usize, shutdown: &ShutdownWatch) {
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
            Audience::Clients(_, entrance) => entrance.door.tls.is_some(),
            Audience::Peers(access) => access.is_secured(),
        };
        if !is_secured {
            let wait = if admission == Admission::RefusedWithAnswer { fast_path::REFUSAL } else { Duration::ZERO };
            Box::pin(fast_path::refuse_connection(&mut Conn::new(stream, limits.write_timeout.get()), wait)).await;
        }
    }

    /// Serves one request after the other until either side closes. Boxes every future that only a request needs: there are many idle
    /// connections, and each holds this function's state.
    async fn serve_connection(self: &Arc<Self>, entered: Entered, write_timeout: Duration, shutdown: &ShutdownWatch) {
        let Entered { stream, visitor, counted: _counted, is_http2 } = entered;
        let mut conn = Conn::new(stream, write_timeout);
        let mut ahead = BytesMut::new();
        if is_http2 {
            return Box::pin(self.serve_http2(conn, ahead, visitor, shutdown)).await;
        }
        let mut memo = Memo::default();
        let address = visitor.ip();
        let mut draining = shutdown.clone();
        let mut is_first = true;
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
                Err(NoHead::Http2) if is_first && matches!(self.audience, Audience::Clients(..)) => {
                    return Box::pin(self.serve_http2(conn, ahead, visitor, shutdown)).await;
                }
                Err(NoHead::Http2) => {
                    drop(ahead);
                    let (status, why) = (StatusCode::HTTP_VERSION_NOT_SUPPORTED, "HTTP/2 is not spoken here");
                    return Box::pin(self.refuse_request(conn, status, why, address)).await;
                }
            };
            is_first = false;
            let _answering = self.metrics.answering();
            let admitted = match self.admit(&mut memo, &head, &ahead, &visitor, &limits).await {
                Ok(admitted) => admitted,
                Err(refusal) => match Box::pin(self.deny(conn, ahead, &head, *refusal)).await {
                    Some(next) => {
                        (conn, ahead) = next;
                        continue;
                    }
                    None => return,
                },
            };
            let Admitted { asked, routed, client } = &admitted;
            let arrived = Arrived {
                head: &head,
                limits: &limits,
                draining: &draining,
                asked,
                client: *client,
                address: visitor.ip(),
                routed: routed.as_deref(),
            };
            let target = head.target(&ahead);
            let answerer = self.answerer(&arrived, &target);
            let blob = if let Target::Blob(digest) = target { Some(digest) } else { None };
            let next = match (answerer, blob) {
                (Answerer::Relay(relay), _) => Box::pin(self.relay_request(relay, conn, ahead, &arrived, shutdown)).await,
                (Answerer::Handlers, Some(digest)) if routed.is_none() && head.plain && !*draining.borrow() => {
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
                (Answerer::Handlers, _) => Box::pin(self.serve_session(conn, ahead, &arrived)).await,
            };
            match next {
                Some(next) => (conn, ahead) = next,
                None => return,
            }
        }
    }

    /// Decides whether a request is answered, whose head is at the front of `bytes`.
    ///
    /// # Errors
    /// It is not.
    pub(crate) async fn admit(
        &self,
        memo: &mut Memo,
        head: &Head,
        bytes: &[u8],
        visitor: &Visitor,
        limits: &Limits,
    ) -> Result<Admitted, Box<Refusal>> {
        let routed = self.route(head, bytes);
        let client = match &self.audience {
            Audience::Clients(_, entrance) => {
                let client = entrance.client(visitor, head, bytes);
                entrance.count(limits, client, routed.as_ref().ok().and_then(|routed| routed.as_deref()))?;
                client
            }
            // A peer's flight may be for many clients.
            Audience::Peers(_) => visitor.client(),
        };
        let refuse = |(status, why)| {
            let reply = Reply::error(status, why);
            Box::new(Refusal { reply, why, client, closes: true, since: Instant::now() })
        };
        let asked = self.admit_request(head, bytes).map_err(refuse)?;
        let mut routed = routed.map_err(refuse)?;
        if let Audience::Clients(_, entrance) = &self.audience
            && entrance.door.access.is_some()
        {
            Box::pin(entrance.check(memo, head, bytes, routed.as_deref_mut(), client, visitor)).await?;
        }
        Ok(Admitted { asked, routed, client })
    }

    /// Who answers a request for this target.
    pub(crate) fn answerer(&self, arrived: &Arrived<'_>, target: &Target<'_>) -> Answerer<'_> {
        let method = &arrived.head.method;
        match &self.audience {
            Audience::Clients(relay, _)
                if !arrived.routed.map_or_else(|| is_for_handlers(target, method), |found| found.is_answered(method)) =>
            {
                Answerer::Relay(relay)
            }
            _ => Answerer::Handlers,
        }
    }

    /// Closes a connection that may not send requests, with an answer if it can have one.
    async fn turn_away(&self, closed: Closed, limits: &Limits) {
        match closed {
            Closed::Plain(stream) => {
                let why = "this port speaks TLS: ask it with https";
                self.refuse_request(Conn::new(stream, limits.write_timeout.get()), StatusCode::BAD_REQUEST, why, None).await;
            }
            Closed::TooMany(stream, client) => {
                let why = "more connections than one client may open (limits.connections_per_client)";
                if let Some(stream) = stream {
                    let reply = too_many(Duration::ZERO, why);
                    self.refuse(Conn::new(stream, limits.write_timeout.get()), &reply, why, Some(client)).await;
                } else {
                    tracing::debug!(why, %client, "a connection was closed before its first request");
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
        match self.before_relay(arrived, &ahead) {
            Ok((known, _descriptors)) => relay.pass(conn, ahead, arrived.head, arrived.limits, shutdown, known).await,
            Err(fault) => {
                drop(ahead);
                match fault {
                    Fault::Busy(limit) => self.shed_request(conn, limit, Some(arrived.asked), arrived.client.shown).await,
                    fault => self.refuse_request(conn, StatusCode::BAD_GATEWAY, &fault.to_string(), arrived.client.shown).await,
                }
                None
            }
        }
    }

    /// What a request needs before it can be relayed: memory, descriptors, and where it goes.
    ///
    /// # Errors
    /// [`Fault::Busy`] over a limit, else the fault of its route.
    pub(crate) fn before_relay(&self, arrived: &Arrived<'_>, bytes: &[u8]) -> Result<(Known, Outgoing), Fault> {
        let Arrived { head, client, routed, .. } = *arrived;
        let memory = self
            .memory
            .lease(memory_plan::relay(head) + memory_plan::http2_window(head, arrived.limits))
            .ok_or(Fault::Busy(Limit::ClientMemory))?;
        let descriptors = self.outgoing().ok_or(Fault::Busy(Limit::Files))?;
        // An entry of the origin is relayed to it as what is for no route.
        let to = routed.filter(|found| !found.is_entry()).map(|found| self.handlers.routes().relay(found)).transpose()?;
        let (credentials_are_ours, is_secured, pace) = match &self.audience {
            Audience::Clients(_, entrance) => {
                let Door { tls, access, clients, .. } = &entrance.door;
                let pace = client.counted.filter(|_| arrived.limits.bandwidth_per_client.get() > 0);
                (access.is_some(), tls.is_some(), pace.map(|client| (clients.clone(), client)))
            }
            Audience::Peers(_) => (false, false, None),
        };
        let trace = head.introduction(bytes, |fields| trace::of(fields));
        Ok((
            Known { memory, client: client.shown, address: arrived.address, trace, to, credentials_are_ours, is_secured, pace },
            descriptors,
        ))
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
