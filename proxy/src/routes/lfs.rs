//! Git LFS: batch requests are relayed, and the links for downloads lead to castier, with a ticket.

use super::{
    Match, Routes,
    answer::Note,
    client::{Answered, Asking, Head, unusable},
    load::{Load, Place},
    metrics::Outcome,
    serve::Subject,
};
use crate::{handlers::Request, reply::Reply};
use bytes::Bytes;
use castier_blob::Digest;
use castier_cache::{Asker, Body, Fault, Key, Resource, Visibility};
use castier_routes::lfs::{self as rules, Action, Batch, Object, Replacement, Tickets};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use moka::sync::Cache;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::timeout;
use url::{Position, Url};

/// The longest body of a batch request.
const MOST_BATCH: usize = 4 << 20;
/// How long the answer to one may take.
const BATCH_TIME: Duration = Duration::from_secs(60);
/// How many actions are remembered, some 600 bytes each.
const MOST_ACTIONS: u64 = 100_000;
/// How long a ticket holds, unless the upstream's action ends before.
const TICKET: Duration = Duration::from_secs(3600);
/// The last part of the path of a batch request.
const BATCH: &str = "/objects/batch";

/// The upstream's actions for downloads.
pub(super) struct Known {
    actions: Cache<(usize, String, Digest), Arc<KnownAction>>,
    tickets: Tickets,
}

struct KnownAction {
    action: Action,
    size: u64,
    until: Option<SystemTime>,
}

impl Known {
    pub(super) fn new(ticket_key: Option<[u8; 32]>) -> Self {
        let key = ticket_key.unwrap_or_else(rand::random);
        Self { actions: Cache::new(MOST_ACTIONS), tickets: Tickets::new(&key) }
    }
}

/// Whether a request is a batch request.
pub(crate) fn is_batch(method: &Method, found: &Match) -> bool {
    *method == Method::POST && found.route.protocol == "lfs" && found.path().as_str().ends_with(BATCH)
}

/// Whether a request is for an object of castier's own link.
fn is_object(found: &Match) -> bool {
    found.route.protocol == "lfs" && found.digest().is_some()
}

/// Whether the request's `Authorization` is a ticket, which is looked at when the object is. A client had it from a batch that it was let in for.
pub(crate) fn has_ticket(method: &Method, found: &Match) -> bool {
    matches!(*method, Method::GET | Method::HEAD) && is_object(found)
}

/// The links that the upstream gives for uploads are good for every client that has them, and castier's own credentials may have paid for them.
fn no_uploads(status: StatusCode) -> Reply {
    let mut reply = Reply::error(status, "uploads of Git LFS need a user or a token with the role write");
    if status == StatusCode::UNAUTHORIZED {
        reply.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"castier\""));
    }
    reply
}

impl Routes {
    /// Answers a batch request of Git LFS.
    ///
    /// # Errors
    /// The client's, or why the upstream did not answer.
    pub async fn batch(&self, request: &Request<'_>, found: Match, body: Body<'_>, asker: Asker) -> Result<Reply, Fault> {
        let route = found.route.clone();
        let body = super::client::read_all(body, MOST_BATCH).await?.ok_or(Fault::TooLarge { limit: MOST_BATCH as u64 })?;
        if let Some(status) = found.no_uploads.filter(|_| !rules::only_downloads(&body)) {
            route.metrics.request(Outcome::Refused);
            return Ok(no_uploads(status));
        }
        let subject = Subject::of(self.shared.clone(), request, found, asker)?;
        let asked = rules::parse_request(&body).filter(|asked| asked.operation == "download");
        let answered = self.ask_batch(&subject, &body).await;
        let is_away = match &answered {
            Ok((head, _)) => head.status == StatusCode::TOO_MANY_REQUESTS || head.status.is_server_error(),
            Err(_) => true,
        };
        if let (true, Some(asked)) = (is_away, &asked)
            && let Some(reply) = subject.offline(&asked.objects).await
        {
            route.metrics.request(Outcome::Stale);
            return Ok(reply);
        }
        route.metrics.request(if is_away { Outcome::Error } else { Outcome::Relayed });
        let (head, answer) = answered?;
        let mut reply = subject.passed_on(request, &head, answer.clone());
        subject.note(&head);
        if let (Some(_), StatusCode::OK) = (asked, head.status)
            && let Some(rewritten) = subject.rewritten(&answer)
        {
            reply.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(rewritten.len()));
            reply.headers.remove(header::ETAG);
            reply.body = crate::reply::Body::Whole(rewritten.into());
        }
        Ok(reply)
    }

    async fn ask_batch(&self, subject: &Subject, body: &Bytes) -> Result<(Arc<Head>, Bytes), Fault> {
        let headers = subject.request_headers();
        let asking = Asking {
            route: &subject.found.route,
            repository: &subject.repository,
            method: Method::POST,
            target: &subject.target,
            far: None,
            headers,
            body,
        };
        let answered = self.shared.client.ask(&asking).await?;
        let (head, incoming) = (answered.head.clone(), answered);
        let (head, body) = if head.status == StatusCode::OK {
            let body = timeout(BATCH_TIME, super::client::read_all(incoming.body(0)?.bytes, MOST_BATCH)).await;
            let body = body.map_err(|_| unusable("an answer to a batch that takes too long"))??;
            (head, body.ok_or_else(|| unusable("an answer to a batch that is too long"))?)
        } else {
            incoming.small().await
        };
        Ok((Arc::new(head), body))
    }
}

impl Subject {
    fn known(&self) -> &Known {
        &self.shared.lfs
    }

    fn action_key(&self, oid: &Digest) -> (usize, String, Digest) {
        (self.found.route.index, self.repository.clone(), *oid)
    }

    /// castier's own link to an object, and its ticket.
    fn replacement(&self, oid: &Digest, size: u64, lasts: Duration) -> Replacement {
        let until = super::now().saturating_add(lasts.as_secs());
        let ticket = self.known().tickets.issue(&self.repository, oid, size, until);
        let path = self.found.path().as_str();
        let repository = path.strip_suffix(BATCH).unwrap_or_default();
        let href = format!("{}{}{repository}/objects/{oid}", self.castier, self.found.route.prefix);
        Replacement { href, header: vec![("Authorization".into(), ticket)], expires_in: Some(lasts.as_secs()) }
    }

    /// The answer to a batch with castier's own links.
    fn rewritten(&self, answer: &[u8]) -> Option<String> {
        let route = &self.found.route;
        let text = str::from_utf8(answer).ok()?;
        if Batch::parse(answer).is_none_or(|batch| batch.transfer != "basic") {
            return None;
        }
        let now = SystemTime::now();
        let replace = |object: &Object| {
            let action = object.download.as_ref()?;
            let url = Url::parse(&action.href).ok()?;
            route.lists(&url)?;
            let until = action.holds_until(now);
            let lasts = until.map_or(TICKET, |until| until.duration_since(now).unwrap_or_default().min(TICKET));
            let known = KnownAction { action: action.clone(), size: object.size, until };
            self.known().actions.insert(self.action_key(&object.oid), Arc::new(known));
            self.shared.proofs.add_member(&self.repository, &object.oid);
            Some(self.replacement(&object.oid, object.size, lasts))
        };
        match rules::rewrite(text, replace) {
            Ok(rewritten) => rewritten,
            Err(_) => {
                route.metrics.unparsed();
                None
            }
        }
    }

    /// An answer of castier's own, while the upstream is away: if all objects are kept, and the client may have them.
    async fn offline(&self, objects: &[(Digest, u64)]) -> Option<Reply> {
        if !self.may_read_offline() {
            return None;
        }
        let mut found = Vec::new();
        for (oid, size) in objects {
            let (kept, _) = self.shared.cache.kept_size_as(oid, Visibility::Private).await?;
            let is_member = !self.found.route.is_private || self.shared.proofs.is_member(&self.repository, oid);
            if kept != *size || !is_member {
                return None;
            }
            found.push((*oid, *size, self.replacement(oid, *size, TICKET)));
        }
        let body = rules::answer(&found, &[]);
        let mut reply = Reply::done();
        reply.status = StatusCode::OK;
        reply.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/vnd.git-lfs+json"));
        reply.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        reply.headers.insert(castier_wire::CACHE_STATUS, HeaderValue::from_static("castier; hit; detail=stale"));
        reply.body = crate::reply::Body::Whole(body.into());
        Some(reply)
    }

    /// The size that a valid ticket of the request names.
    pub(super) fn ticket(&self) -> Option<u64> {
        let value = self.client_headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        self.known().tickets.check(value, &self.repository, &self.found.digest()?, super::now())
    }

    pub(super) fn is_lfs_object(&self) -> bool {
        is_object(&self.found)
    }

    /// An object of castier's own link.
    pub(super) async fn object(self: &Arc<Self>, request: &Request<'_>) -> Result<(Reply, Outcome), Fault> {
        let Some(oid) = self.found.digest() else { return Err(Fault::Internal("no object".into())) };
        let Some(size) = self.ticket() else {
            let reply =
                Reply::error(StatusCode::UNAUTHORIZED, "the ticket is missing, wrong or over: ask for the object with a batch request");
            return Ok((reply, Outcome::Refused));
        };
        let found = super::answer::Found::of_blob(self, oid);
        if *request.method == Method::HEAD {
            return Ok((self.without_body(request, found, Some(size), Note::Hit), Outcome::Hit));
        }
        let part = |size| found.part(request, size);
        let load = self.object_load(&oid, size);
        let is_known = load.is_some() || self.shared.cache.kept_size_as(&oid, Visibility::Private).await.is_some();
        if !is_known && self.asker == Asker::Peer {
            return Ok((Reply::error(StatusCode::NOT_FOUND, "this node does not know where the object is"), Outcome::Absent));
        }
        let first = if is_known { None } else { self.object_of_a_peer().await };
        let load = load.unwrap_or_else(|| self.load_of(self.target.clone(), None, HeaderMap::new(), size));
        let (head, body) = match first {
            Some(answered) => (Some(Arc::new(answered.head.clone())), Some(answered.body(0)?)),
            None => (None, None),
        };
        let is_peers = body.is_some();
        let resource = Resource { key: Key::Blob(oid), at: Place::new(load, head, body, is_peers) };
        let hit = self.shared.cache.get_at(&resource, self.asker, part).await?;
        let hit = hit.ok_or_else(|| unusable("it no longer has the object"))?;
        if hit.size.is_some_and(|known| known != size) {
            return Err(unusable("its batch named another size than the object has"));
        }
        let (outcome, note) = if hit.via.tier().is_some() { (Outcome::Hit, Note::Hit) } else { (Outcome::Miss, Note::Miss) };
        Ok((self.reply(request, found, hit, note).await?, outcome))
    }

    /// The answer of the node that has answered the batch, and so knows where the object is.
    async fn object_of_a_peer(&self) -> Option<Answered> {
        let peers = self.shared.peers.as_ref()?;
        let view = peers.members().view();
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, self.client_headers.get(header::AUTHORIZATION)?.clone());
        let (host, target) = &self.found.asked;
        for member in view.members().iter().filter(|member| !member.itself && member.up) {
            let answered = peers.ask_route(member, (Method::GET, target, host), &headers).await;
            let answered = answered.and_then(|(server, session, peer)| Answered::of_peer(server, session, peer));
            match answered {
                Ok(answered) if answered.head.status == StatusCode::OK => return Some(answered),
                Ok(answered) => drop(answered.finish().await),
                Err(fault) => {
                    tracing::debug!(peer = &*member.name, %fault, "a node was asked for an object of Git LFS, and did not answer")
                }
            }
        }
        None
    }

    /// How the upstream's action loads an object. `None`: this node has not answered a batch with it, or the action is over.
    fn object_load(&self, oid: &Digest, size: u64) -> Option<Load> {
        let known = self.known().actions.get(&self.action_key(oid))?;
        let holds = known.size == size && known.until.is_none_or(|until| until > SystemTime::now());
        let url = Url::parse(&known.action.href).ok().filter(|_| holds)?;
        let headers = known
            .action
            .header
            .iter()
            .filter_map(|(name, value)| Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?)));
        let target = url[Position::BeforePath..Position::AfterQuery].to_owned();
        Some(self.load_of(target, Some(url), headers.collect(), size))
    }
}
