//! A GET or HEAD of a route, from the request to the reply.
//!
//! 1. What is kept under the name, and fresh, is sent, if the client has proved that it may read it.
//! 2. A body that is on its way is joined, under the same condition.
//! 3. Else the upstream is asked, once for all who ask the same with the same right: for the body, with a condition if something older is kept, or only with
//!    a HEAD if it is about the client's right. What it says is noted, and the request begins again at 1.
//! 4. If the upstream cannot answer, what is kept is sent even if it is old.

use super::{
    Match, Route, Routes, Shared,
    answer::{Found, Note, end_to_end},
    client::{Asking, Head, unusable},
    headers_of, learn,
    links::Rewriter,
    load::{Done, Load, Place},
    metrics::Outcome,
    now,
    questions::{Answer, Credentials, Question, Said},
};
use crate::{handlers::Request, reply::Reply};
use castier_blob::Digest;
use castier_cache::{Asker, Fault, Key, Resource, Visibility};
use castier_cluster::{Member, Peers};
use castier_routes::{self as rules, Entry, Freshness, Kind, Terms, metadata::Expected};
use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use parking_lot::Mutex;
use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use url::Url;

/// How often a request begins again at most. Each turn but the last notes something that the next one needs.
const MOST_TURNS: usize = 8;
/// How many answers of one name are kept side by side, for the headers of its `Vary`.
const MOST_VARIANTS: usize = 16;
/// The status of an entry that says by which headers the answers of a name differ.
const VARIANTS: u16 = 0;
/// The status of an entry that says that a repository could be read without credentials.
const READABLE: u16 = 1;
/// The most bytes of headers that are kept with an answer.
const MOST_HEADERS: usize = 32 << 10;

/// What a request wants, without the request.
pub(super) struct Subject {
    pub(super) shared: Arc<Shared>,
    pub(super) found: Match,
    /// What credentials are admitted to.
    pub(super) repository: String,
    /// The canonical query, if it is part of the name.
    query: Option<String>,
    /// The request's headers that can choose between answers.
    pub(super) client_headers: HeaderMap,
    /// The headers that the upstream gets.
    headers: HeaderMap,
    /// Path and query at the upstream.
    pub(super) target: String,
    /// The URL at the upstream.
    pub(super) at: Url,
    /// The SHA-256 that the path or metadata names.
    claim: Option<Digest>,
    /// Another hash that metadata names.
    expected: Option<Expected>,
    /// All that the client shows of itself; `None` if it shows nothing, or if nobody asks.
    credentials: Option<Vec<u8>>,
    who: Credentials,
    /// When the request came, in seconds since 1970.
    arrived: u64,
    pub(super) asker: Asker,
    /// castier's URL, as the client knows it. It may have a path.
    pub(super) castier: String,
}

/// What is kept under a name.
pub(super) struct Kept {
    name: Digest,
    pub(super) entry: Arc<Entry>,
    /// The digest and the size of the body.
    pub(super) body: Option<(Digest, u64)>,
    /// A tier has the body.
    has_body: bool,
    freshness: Freshness,
    /// It is an absence that these credentials were told of.
    is_own: bool,
}

/// What has been found out in the turns before.
#[derive(Default)]
struct Known {
    /// The client may read it.
    is_admitted: bool,
    /// What is kept holds, as the upstream has said since the request came.
    is_valid: bool,
    /// Only the body helps.
    needs_body: bool,
    /// Another client's answer does not count for this one.
    is_alone: bool,
    /// The upstream was asked.
    has_asked: bool,
}

/// Which question is asked.
enum Ask {
    Body,
    /// The body, unless this entry holds still.
    BodyUnless(Arc<Entry>),
    /// Without a body; with a condition if there is an entry.
    Head(Option<Arc<Entry>>),
}

impl Routes {
    /// Answers a GET or HEAD of a route.
    ///
    /// # Errors
    /// Why neither the upstream nor the cache has an answer.
    pub async fn answer(&self, request: &Request<'_>, found: Match, asker: Asker) -> Result<Reply, Fault> {
        let route = found.route.clone();
        let subject = Subject::of(self.shared.clone(), request, found, asker)?;
        let answered = Arc::new(subject).serve(request).await;
        match &answered {
            Ok((_, outcome)) => route.metrics.request(*outcome),
            Err(_) => route.metrics.request(Outcome::Error),
        }
        answered.map(|(reply, _)| reply)
    }
}

impl Subject {
    pub(super) fn of(shared: Arc<Shared>, request: &Request<'_>, found: Match, asker: Asker) -> Result<Self, Fault> {
        let route = found.route.clone();
        let repository = match route.protocol.as_str() {
            "oci" => found.captures.get("name").unwrap_or(found.path.as_str()),
            "huggingface" => found.captures.get("repository").unwrap_or(found.path.as_str()),
            "lfs" => found.captures.get("repository").unwrap_or_default(),
            _ => found.path.as_str(),
        };
        let repository = format!("{}|{repository}", route.id);
        let target = match &found.far {
            Some(_) => found.target.clone(),
            None => route.upstream_target(&found.captures, &found.target),
        };
        let at = super::url_at(found.far.as_ref().unwrap_or(&route.base), &target);
        let at = at.map_err(|error| Fault::BadRequest(format!("the path cannot be part of a URL: {error}")))?;
        let query = found.target.split_once('?').map(|(_, query)| query.to_owned()).filter(|_| route.query_is_key);
        let expected = shared.learned.expected(&route, &at);
        let claim = match (found.rule.kind, &expected) {
            (Kind::Blob, _) => found.captures.digest(),
            (_, Some(Expected::Sha256(digest))) => Some(*digest),
            _ => None,
        };
        let expected = expected.filter(|_| claim.is_none());
        let is_checked = claim.is_some() || expected.is_some();
        let plain = found.rule.kind == Kind::Blob || found.rule.links || learn::is_telling(&route, &found.path) || is_checked;
        // A client's credentials are for the upstream alone.
        let at_home = found.far.as_ref().is_none_or(|far| route.is_upstream(far));
        let with_credentials = route.is_private && at_home;
        let credentials = if route.is_private { credentials_of(request.headers) } else { None };
        let who = credentials.as_ref().map_or(0, |credentials| shared.who(credentials));
        let castier = if shared.external_url.is_empty() {
            let host = request.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
            format!("http://{host}")
        } else {
            shared.external_url.clone()
        };
        let headers = HeaderMap::new();
        let mut subject = Self {
            repository,
            query,
            client_headers: request.headers.clone(),
            headers,
            target,
            at,
            claim,
            expected,
            credentials,
            who,
            arrived: now(),
            asker,
            castier,
            found,
            shared,
        };
        let vary = subject.known_vary();
        subject.headers = upstream_headers(&subject.client_headers, &vary, with_credentials, plain);
        Ok(subject)
    }

    pub(super) fn route(&self) -> &Arc<Route> {
        &self.found.route
    }

    pub(super) fn rewriter(&self) -> Rewriter<'_> {
        Rewriter { route: self.route(), at: self.at.clone(), castier: self.castier.clone(), namespace: self.found.namespace.as_deref() }
    }

    // ---- the turns ----

    async fn serve(self: &Arc<Self>, request: &Request<'_>) -> Result<(Reply, Outcome), Fault> {
        if self.is_lfs_object() {
            return self.object(request).await;
        }
        let mut known = Known::default();
        for _ in 0..MOST_TURNS {
            let kept = self.kept().await;
            known.is_admitted |= self.is_admitted();
            if let Some(kept) = kept.as_ref().filter(|kept| kept.can_answer(request.method) && !known.needs_body)
                && (known.is_admitted || kept.is_own)
                && (known.is_valid || kept.freshness == Freshness::Fresh)
            {
                let note = if known.has_asked { Note::Validated } else { Note::Hit };
                return self.kept_reply(request, kept, note).await;
            }
            if known.is_admitted && *request.method == Method::GET && !known.is_alone {
                match self.join(request).await {
                    Ok(Some(reply)) => return Ok((reply, Outcome::Miss)),
                    Ok(None) => {}
                    Err(fault) => return self.without_upstream(request, kept.as_ref(), &known, Err(fault)).await,
                }
            }
            let ask = self.question(request, kept.as_ref(), &known).await;
            let (is_first, (who, said)) = self.ask(ask, kept.map(|kept| kept.entry), &known).await;
            let kept = self.kept().await;
            known.has_asked = true;
            match said {
                Ok(Said::Yes(head)) => {
                    known.is_admitted = true;
                    if *request.method == Method::HEAD {
                        return Ok((self.head_reply(request, &head), Outcome::Miss));
                    }
                    // It was asked about the body that the client wants: an old one that does not hold any more, or one that is not kept.
                    known.needs_body = kept.as_ref().is_none_or(|kept| kept.freshness != Freshness::Fresh || !kept.has_body);
                }
                Ok(Said::Newer) => known.is_valid = true,
                Ok(Said::NotModified) => (known.is_admitted, known.is_valid, known.needs_body) = (true, true, false),
                // It is for the client alone that asked for it: perhaps it sets a cookie.
                Ok(Said::Coming(_, resource, _)) if !is_first && !resource.at.is_kept() => known.is_alone = true,
                Ok(Said::Coming(head, resource, place)) => {
                    (known.is_admitted, known.needs_body) = (true, false);
                    let begun = if is_first { place.lock().take() } else { None };
                    let found = Found::of_head(self, &head);
                    let part = |size| found.part(request, size);
                    let hit = match begun {
                        Some(begun) => begun.open(part).await,
                        None => self.shared.cache.get_from_flight(&resource, self.asker, part).await,
                    };
                    match hit {
                        Ok(Some(hit)) => {
                            let outcome = if head.status == StatusCode::OK { Outcome::Miss } else { Outcome::Absent };
                            return Ok((self.reply(request, found, hit, Note::Miss).await?, outcome));
                        }
                        // It has ended, and is kept; or nothing of it is left.
                        Ok(None) => {
                            let now = self.kept().await;
                            let has_come = |now: &Kept| is_first || kept.as_ref().is_none_or(|before| before.entry != now.entry);
                            known.is_valid = now.as_ref().is_some_and(has_come);
                            known.is_alone = !known.is_valid;
                        }
                        Err(fault) => return self.without_upstream(request, kept.as_ref(), &known, Err(fault)).await,
                    }
                }
                // A refusal is for the credentials that it was said to.
                Ok(Said::Other(head, _)) if is_refusal(head.status) && who != self.who => known.is_alone = true,
                // The client asked with a GET, and gets the body of the error.
                Ok(Said::Other(head, body))
                    if head.status.is_client_error() && body.is_empty() && *request.method == Method::GET && !known.needs_body =>
                {
                    (known.is_alone, known.needs_body) = (is_refusal(head.status), true);
                }
                Ok(Said::Other(head, body)) => return self.without_upstream(request, kept.as_ref(), &known, Ok((head, body))).await,
                Err(fault) => return self.without_upstream(request, kept.as_ref(), &known, Err(fault)).await,
            }
        }
        Err(Fault::Internal("a request of a route found no end".into()))
    }

    /// Joins a body that is on its way.
    async fn join(self: &Arc<Self>, request: &Request<'_>) -> Result<Option<Reply>, Fault> {
        if let Some((resource, head)) = self.shared.coming.get(&self.name()) {
            let found = Found::of_head(self, &head);
            if let Some(hit) = self.shared.cache.get_from_flight(&resource, self.asker, |size| found.part(request, size)).await? {
                return self.reply(request, found, hit, Note::Miss).await.map(Some);
            }
        }
        // A blob may also come for another name, or for `/cas`.
        if let (Kind::Blob, Some(digest), false) = (self.found.rule.kind, self.claim, self.needs_headers()) {
            let resource = self.resource(Key::Blob(digest));
            let found = Found::of_blob(self, digest);
            if self.shared.cache.has_flight(&resource)
                && let Some(hit) = self.shared.cache.get_at(&resource, self.asker, |size| found.part(request, size)).await?
            {
                return self.reply(request, found, hit, Note::Miss).await.map(Some);
            }
        }
        Ok(None)
    }

    /// The upstream has said something that is passed on, or nothing.
    async fn without_upstream(
        self: &Arc<Self>,
        request: &Request<'_>,
        kept: Option<&Kept>,
        known: &Known,
        said: Result<(Arc<Head>, bytes::Bytes), Fault>,
    ) -> Result<(Reply, Outcome), Fault> {
        let cannot = match &said {
            Ok((head, _)) => head.status == StatusCode::TOO_MANY_REQUESTS || head.status.is_server_error(),
            Err(_) => true,
        };
        if cannot
            && let Some(kept) = kept.filter(|kept| kept.can_answer(request.method) && kept.freshness != Freshness::Expired)
            && (known.is_admitted || kept.is_own || (self.was_readable() && self.is_member()))
        {
            let (reply, _) = self.kept_reply(request, kept, Note::Stale).await?;
            return Ok((reply, Outcome::Stale));
        }
        match said {
            Ok((head, body)) => {
                let outcome = match head.status {
                    status if is_refusal(status) => Outcome::Refused,
                    StatusCode::NOT_FOUND | StatusCode::GONE => Outcome::Absent,
                    status if status.is_redirection() => Outcome::Relayed,
                    _ => Outcome::Error,
                };
                Ok((self.passed_on(request, &head, body), outcome))
            }
            Err(fault) if !known.is_admitted && fault.is_broken_transfer() => match self.last_challenge() {
                Some((status, headers)) => Ok((self.found.error(Self::challenge(status, headers)), Outcome::Refused)),
                None => Err(fault),
            },
            Err(fault) => Err(fault),
        }
    }

    /// From the cache. The body may have been evicted since it was looked up: then it is loaded again.
    async fn kept_reply(self: &Arc<Self>, request: &Request<'_>, kept: &Kept, note: Note) -> Result<(Reply, Outcome), Fault> {
        let found = Found::of_entry(self, kept);
        let outcome = match note {
            _ if kept.entry.status != 200 => Outcome::Absent,
            Note::Validated => Outcome::Revalidated,
            Note::Stale => Outcome::Stale,
            Note::Hit | Note::Miss => Outcome::Hit,
        };
        let Some((digest, _)) = kept.body.filter(|(_, size)| *size > 0 && *request.method == Method::GET) else {
            return Ok((self.without_body(request, found, kept.body.map(|(_, size)| size), note), outcome));
        };
        let resource = self.resource(Key::Blob(digest));
        let hit = self.shared.cache.get_at(&resource, self.asker, |size| found.part(request, size)).await;
        match hit {
            Ok(Some(hit)) => Ok((self.reply(request, found, hit, note).await?, outcome)),
            Ok(None) => Err(unusable("it no longer has the body")),
            Err(Fault::Hidden) => self.reveal(request, kept, digest, note).await.map(|reply| (reply, outcome)),
            Err(fault) => Err(fault),
        }
    }

    /// A body that is kept for other clients only: this route asks nobody's credentials, so it shows the body if its upstream has it.
    async fn reveal(self: &Arc<Self>, request: &Request<'_>, kept: &Kept, digest: Digest, note: Note) -> Result<Reply, Fault> {
        // An entry of this route is the upstream's word.
        if self.entry().is_none() {
            let (_, (_, said)) = self.ask(Ask::Head(None), None, &Known { is_alone: true, ..Known::default() }).await;
            match said? {
                Said::Yes(_) | Said::NotModified | Said::Newer => {}
                Said::Coming(..) | Said::Other(..) => return Err(unusable("it no longer has the body")),
            }
        }
        self.shared.cache.publish(&digest);
        let found = Found::of_entry(self, kept);
        let resource = self.resource(Key::Blob(digest));
        match self.shared.cache.get_at(&resource, self.asker, |size| found.part(request, size)).await? {
            Some(hit) => self.reply(request, found, hit, note).await,
            None => Err(unusable("it no longer has the body")),
        }
    }

    // ---- what is known ----

    /// The name under which the answer to this request is kept, as far as it is known which headers choose.
    fn name(&self) -> Digest {
        self.variant(&self.known_vary())
    }

    /// The headers that choose between answers of this path, as far as it is known.
    fn known_vary(&self) -> Vec<String> {
        let varies = self.shared.names.get(&self.primary()).filter(|entry| entry.status == VARIANTS);
        varies.map_or_else(|| self.found.rule.vary.clone(), |entry| vary_of(&entry))
    }

    /// The name without the headers that choose.
    fn primary(&self) -> Digest {
        self.variant(&[])
    }

    fn variant(&self, vary: &[String]) -> Digest {
        if let (Kind::Blob, Some(digest)) = (self.found.rule.kind, self.claim) {
            return self.blob_name(&digest);
        }
        let values: Vec<_> = vary.iter().map(|name| (name.as_str(), combined(&self.client_headers, name))).collect();
        let pairs: Vec<_> = values.iter().map(|(name, value)| (*name, value.as_str())).collect();
        rules::name(&self.route().id, &self.found.path, self.query.as_deref(), &pairs)
    }

    /// The name of a blob in its repository: several paths can lead to it, and no header chooses.
    fn blob_name(&self, digest: &Digest) -> Digest {
        Digest::of(format!("blob|{}|{digest}", self.repository).as_bytes())
    }

    /// The name of an absence that these credentials were told of.
    fn absence(&self) -> Digest {
        // What clients were told before a change of the path is over, for all of them.
        let who = format!("absent {} {}", self.who, self.changes());
        rules::name(&self.route().id, &self.found.path, self.query.as_deref(), &[(&who, "")])
    }

    /// The name under which it is noted that the repository could be read without credentials.
    fn readable(&self) -> Digest {
        Digest::of(format!("readable|{}", self.repository).as_bytes())
    }

    fn terms(&self) -> Terms {
        Terms { ttl: self.found.rule.ttl, ..self.route().terms }
    }

    pub(super) async fn kept(&self) -> Option<Kept> {
        let names = &self.shared.names;
        let (name, entry, is_own) = match self.entry() {
            Some((name, entry)) => (name, entry, false),
            None => {
                let absence = self.absence();
                match names.get(&absence) {
                    Some(entry) => (absence, entry, true),
                    None => return self.kept_blob().await,
                }
            }
        };
        let body = entry.body.as_ref().and_then(|(digest, size)| Some((Digest::parse(digest.as_bytes()).ok()?, *size)));
        let has_body = match body {
            Some((_, 0)) => true,
            Some((digest, _)) => self.shared.cache.kept_size_as(&digest, Visibility::Private).await.is_some(),
            None => false,
        };
        let freshness = if self.found.rule.kind != Kind::Fresh && entry.status == 200 {
            Freshness::Fresh
        } else {
            let status = StatusCode::from_u16(entry.status).unwrap_or(StatusCode::OK);
            rules::freshness(status, &headers_of(&entry), time(entry.fetched_at), SystemTime::now(), &self.terms())
        };
        Some(Kept { name, entry, body, has_body, freshness, is_own })
    }

    /// A blob that is kept, and came by another name.
    async fn kept_blob(&self) -> Option<Kept> {
        let digest = self.claim.filter(|_| self.found.rule.kind == Kind::Blob && !self.needs_headers())?;
        let (size, _) = self.shared.cache.kept_size_as(&digest, Visibility::Private).await?;
        let entry = self.new_entry(StatusCode::OK, &HeaderMap::new(), Some((digest, size)));
        Some(Kept {
            name: self.primary(),
            entry: Arc::new(entry),
            body: Some((digest, size)),
            has_body: true,
            freshness: Freshness::Fresh,
            is_own: false,
        })
    }

    fn entry(&self) -> Option<(Digest, Arc<Entry>)> {
        let names = &self.shared.names;
        let primary = self.primary();
        let first = names.get(&primary);
        let Some(varies) = first.as_ref().filter(|entry| entry.status == VARIANTS) else {
            return first.map(|entry| (primary, entry)).filter(|(_, entry)| entry.status >= 100);
        };
        let vary = vary_of(varies);
        let exact = self.variant(&vary);
        if let Some(entry) = names.get(&exact) {
            return Some((exact, entry));
        }
        // An answer also fits a list that names its type, if nothing else chooses.
        if vary != ["accept"] {
            return None;
        }
        let accepted = combined(&self.client_headers, "accept");
        let types: Vec<_> = accepted.split(',').filter_map(|one| one.split(';').next()).map(str::trim).collect();
        variants_of(varies).filter_map(|name| Some((name, names.get(&name)?))).find(|(_, entry)| {
            let own = entry.headers.iter().find(|(name, _)| name == "content-type").map_or("", |(_, value)| value);
            types.contains(&own.split(';').next().unwrap_or_default().trim())
        })
    }

    /// Whether an answer has headers that a blob does not tell.
    fn needs_headers(&self) -> bool {
        self.found.rule.digest_header.is_some() || self.found.rule.kind != Kind::Blob
    }

    /// Whether the client may read what is kept, without a question.
    fn is_admitted(&self) -> bool {
        self.is_member() && (!self.route().is_private || self.is_admitted_to_repository())
    }

    /// Whether the repository is known to have it. A blob that is kept may be another repository's.
    fn is_member(&self) -> bool {
        match (self.found.rule.kind, self.claim) {
            (Kind::Blob, Some(digest)) => self.shared.proofs.is_member(&self.repository, &digest) || self.entry().is_some(),
            // Its name is of the repository.
            _ => true,
        }
    }

    fn is_admitted_to_repository(&self) -> bool {
        let (route, shared) = (self.route(), &self.shared);
        shared.proofs.is_admitted(&self.repository, self.credentials(), route.proof_ttl, Instant::now())
            || self.readable_within(route.proof_ttl)
    }

    /// Whether the repository could be read without credentials, and these have none: good enough while the upstream is away.
    fn was_readable(&self) -> bool {
        !self.route().is_private || self.readable_within(self.route().terms.stale_if_error)
    }

    fn readable_within(&self, limit: Duration) -> bool {
        self.who == 0
            && self
                .shared
                .names
                .get(&self.readable())
                .is_some_and(|entry| SystemTime::now().duration_since(time(entry.fetched_at)).unwrap_or_default() < limit)
    }

    fn credentials(&self) -> Option<&[u8]> {
        self.credentials.as_deref()
    }

    /// The upstream has answered these credentials with a 2xx.
    fn admit(&self) {
        let route = self.route();
        if let (Kind::Blob, Some(digest)) = (self.found.rule.kind, self.claim) {
            self.shared.proofs.add_member(&self.repository, &digest);
        }
        if !route.is_private {
            return;
        }
        self.shared.proofs.admit(&self.repository, self.credentials(), Instant::now());
        if self.who == 0 && !self.readable_within(route.proof_ttl / 2) {
            let mut entry = self.new_entry(StatusCode::OK, &HeaderMap::new(), None);
            entry.status = READABLE;
            self.shared.names.set(self.readable(), entry);
        }
    }

    fn refuse(&self, head: &Head) {
        let route = self.route();
        self.shared.proofs.refuse(&self.repository, self.credentials());
        if self.who == 0 {
            self.shared.names.remove(&self.readable());
        }
        if head.status == StatusCode::UNAUTHORIZED && head.headers.contains_key(header::WWW_AUTHENTICATE) {
            let entry = self.new_entry(head.status, &head.headers, None);
            self.shared.names.set(challenge_name(route), entry);
        }
    }

    fn last_challenge(&self) -> Option<(StatusCode, HeaderMap)> {
        let entry = self.shared.names.get(&challenge_name(self.route()))?;
        Some((StatusCode::UNAUTHORIZED, headers_of(&entry)))
    }

    // ---- questions ----

    async fn question(&self, request: &Request<'_>, kept: Option<&Kept>, known: &Known) -> Ask {
        let old = kept.filter(|kept| kept.has_body && kept.entry.status == 200);
        if *request.method == Method::HEAD {
            return Ask::Head(old.map(|kept| kept.entry.clone()));
        }
        if known.needs_body {
            return Ask::Body;
        }
        if let Some(kept) = old.filter(|kept| kept.freshness != Freshness::Fresh) {
            let by_head = self.needs_digest();
            return if by_head { Ask::Head(Some(kept.entry.clone())) } else { Ask::BodyUnless(kept.entry.clone()) };
        }
        let comes = || self.shared.coming.get(&self.name()).is_some() || self.shared.questions.is_asked_by_others(&self.name(), self.who);
        let flies = || self.claim.is_some_and(|digest| self.shared.cache.has_flight(&self.resource(Key::Blob(digest))));
        if !known.is_admitted && (old.is_some() || comes() || flies()) {
            return Ask::Head(None);
        }
        // The tag may mean a manifest that is kept under its digest.
        if kept.is_none() && self.found.rule.kind == Kind::Fresh && self.needs_digest() && self.shared.learned.has_any(&self.repository) {
            return Ask::Head(None);
        }
        Ask::Body
    }

    /// Whether a HEAD tells which body it is.
    fn needs_digest(&self) -> bool {
        self.route().protocol == "oci" && self.found.rule.digest_header.is_some()
    }

    /// `seen`: the entry that the request has seen.
    async fn ask(self: &Arc<Self>, ask: Ask, seen: Option<Arc<Entry>>, known: &Known) -> (bool, Answer) {
        let method = if matches!(ask, Ask::Head(_)) { Method::HEAD } else { Method::GET };
        let about = if known.is_alone { Digest::from_bytes(rand::random()) } else { self.name() };
        let credentials = (!known.is_admitted).then_some(self.who);
        let (subject, questions, is_alone) = (self.clone(), self.shared.questions.clone(), known.is_alone);
        let question = Question { about, since: self.changes(), method, credentials, asks_peers: self.owner().is_some() };
        let answer = async move {
            // It may have been admitted by the other question too.
            let newer = if !is_alone && subject.is_admitted() { subject.newer(seen.as_ref()) } else { None };
            (subject.who, if let Some(newer) = newer { Ok(newer) } else { subject.put(ask).await })
        };
        questions.ask(question, move || answer.boxed()).await
    }

    /// What another question has brought since the request looked. Questions about the same name come one after the other, so the one that this would
    /// repeat has noted all that it learned:
    ///
    /// 1. This request looks up the name, and finds nothing, and no body on its way.
    /// 2. Another question is answered, its body comes, and ends.
    /// 3. This request would ask the same once more.
    fn newer(&self, seen: Option<&Arc<Entry>>) -> Option<Said> {
        if let Some((resource, head)) = self.shared.coming.get(&self.name()) {
            return Some(Said::Coming(head, resource, Arc::default()));
        }
        let (_, entry) = self.entry()?;
        let is_newer = seen.is_none_or(|seen| !Arc::ptr_eq(seen, &entry)) && entry.fetched_at >= self.arrived;
        is_newer.then_some(Said::Newer)
    }

    /// Puts a question to the upstream, and notes what it says.
    async fn put(self: &Arc<Self>, ask: Ask) -> Result<Said, Fault> {
        let (method, entry) = match ask {
            Ask::Body => (Method::GET, None),
            Ask::BodyUnless(entry) => (Method::GET, Some(entry)),
            Ask::Head(entry) => (Method::HEAD, entry),
        };
        let since = self.changes();
        let mut headers = self.headers.clone();
        if let Some(entry) = &entry {
            for (name, value) in rules::conditions(&headers_of(entry)) {
                headers.insert(name, value);
            }
        }
        let mut answered = self.exchange(method.clone(), &headers).await?;
        let knows_no_head = match answered.head.status.as_u16() {
            405 | 501 => true,
            // A link that is signed for GET alone.
            403 => answered.is_redirected,
            _ => false,
        };
        if method == Method::HEAD && knows_no_head {
            // The first byte tells as much.
            answered.finish().await;
            headers.insert(header::RANGE, HeaderValue::from_static("bytes=0-0"));
            answered = self.exchange(Method::GET, &headers).await?;
            as_whole(&mut answered.head);
        }
        let status = answered.head.status;
        match (status, entry) {
            (StatusCode::NOT_MODIFIED, None) | (StatusCode::PARTIAL_CONTENT, _) => {
                answered.finish().await;
                Err(unusable(format!("status {}, which was not asked for", status.as_u16())))
            }
            (StatusCode::NOT_MODIFIED, Some(entry)) => {
                let head = answered.finish().await;
                self.renew(&entry, &head.headers, since);
                self.admit();
                Ok(Said::NotModified)
            }
            (status, entry) if status.is_success() && method == Method::HEAD => {
                let head = answered.finish().await;
                self.admit();
                Ok(if self.holds(entry.as_deref(), &head, since).await { Said::NotModified } else { Said::Yes(Arc::new(head)) })
            }
            (StatusCode::OK, entry) => {
                // The answer depends on headers that it was not asked with. Once more, with them.
                let vary = self.chosen_by(status, &answered.head.headers).unwrap_or_default();
                let missing: Vec<_> =
                    vary.iter().filter(|name| self.client_headers.contains_key(*name) && !headers.contains_key(*name)).collect();
                if missing.iter().any(|name| !matches!(name.as_str(), "accept-encoding" | "authorization" | "cookie" | "origin"))
                    && entry.is_none()
                {
                    answered.finish().await;
                    for name in missing {
                        if let (Ok(name), Some(value)) = (HeaderName::try_from(name), self.client_headers.get(name)) {
                            headers.insert(name, value.clone());
                        }
                    }
                    answered = self.exchange(Method::GET, &headers).await?;
                    if answered.head.status != StatusCode::OK {
                        let (head, body) = answered.small().await;
                        return Ok(Said::Other(Arc::new(head), body));
                    }
                }
                self.admit();
                self.begin(answered, since).await
            }
            (StatusCode::NOT_FOUND | StatusCode::GONE, _) if method == Method::GET => {
                self.forget();
                self.begin(answered, since).await
            }
            _ => {
                let (head, body) = answered.small().await;
                if is_refusal(status) {
                    self.refuse(&head);
                }
                Ok(Said::Other(Arc::new(head), body))
            }
        }
    }

    /// Asks the node that owns the name, which asks the upstream once for all nodes; or the upstream itself, if this node owns it, a peer asks, or the
    /// owner has no answer.
    async fn exchange(&self, method: Method, headers: &HeaderMap) -> Result<super::client::Answered, Fault> {
        if let Some((peers, owner)) = self.owner() {
            let (host, target) = &self.found.asked;
            match peers.ask_route(&owner, (method.clone(), target, host), headers).await {
                Ok((server, session, peer)) => {
                    let answered = super::client::Answered::of_peer(server, session, peer)?;
                    if !matches!(answered.head.status.as_u16(), 502..=504) {
                        return Ok(answered);
                    }
                    // The owner works, and does not reach the upstream, or has too much to do.
                    answered.finish().await;
                }
                Err(fault) => {
                    tracing::debug!(peer = &*owner.name, %fault, "the owner of a name did not answer; this node asks the upstream")
                }
            }
        }
        self.shared.client.ask(&self.asking(method, headers)).await
    }

    /// The node that owns the name, if it is another one and may be asked.
    fn owner(&self) -> Option<(&Arc<Peers>, Member)> {
        let peers = self.shared.peers.as_ref().filter(|_| self.asker == Asker::Client && !self.route().is_implied)?;
        Some((peers, peers.owner(&self.claim.unwrap_or_else(|| self.primary()))?))
    }

    fn asking<'a>(&'a self, method: Method, headers: &'a HeaderMap) -> Asking<'a> {
        Asking {
            route: self.route(),
            repository: &self.repository,
            method,
            target: &self.target,
            far: self.found.far.as_ref(),
            headers,
            body: &[],
        }
    }

    /// Whether a body that is kept is the one that the answer to a HEAD means. If so, its entry is renewed.
    async fn holds(&self, entry: Option<&Entry>, head: &Head, since: u64) -> bool {
        let Some(digest) = self.named_by(&head.headers) else { return false };
        let kept = self.shared.cache.kept_size_as(&digest, Visibility::Private).await.map(|(size, _)| size);
        let announced = head.length();
        match (entry.filter(|entry| entry.body.as_ref().is_some_and(|(known, _)| *known == digest.to_string())), kept.or(announced)) {
            (Some(entry), _) => self.renew(entry, &head.headers, since),
            // Also of a body that is not kept: it may come under its digest.
            (None, Some(size)) if self.needs_headers() || kept.is_some() => {
                self.set_entry(StatusCode::OK, &head.headers, Some((digest, size)), since)
            }
            (None, _) => {}
        }
        kept.is_some()
    }

    /// The SHA-256 that a header of the answer names.
    fn named_by(&self, headers: &HeaderMap) -> Option<Digest> {
        if let (Kind::Blob, claim) = (self.found.rule.kind, self.claim) {
            return claim;
        }
        if headers.contains_key(header::CONTENT_ENCODING) {
            return None;
        }
        self.found.rule.named_digest(headers)
    }

    /// The body of an answer begins: as a flight that everybody can join, unless it is for one client only.
    async fn begin(self: &Arc<Self>, answered: super::client::Answered, since: u64) -> Result<Said, Fault> {
        let head = Arc::new(answered.head.clone());
        let (status, headers, size) = (head.status, &head.headers, head.length());
        let is_coded = is_coded(headers);
        if is_coded && self.found.rule.kind == Kind::Blob {
            return Err(unusable("a content coding that was not asked for"));
        }
        // What began to come before a change of the path is only for those who asked before it.
        let vary = self.chosen_by(status, headers).ok().filter(|_| self.changes() == since);
        let is_kept = vary.is_some();
        let claim =
            if status == StatusCode::OK && is_kept { self.claim.filter(|_| !is_coded).or_else(|| self.named_by(headers)) } else { None };
        let name = match &vary {
            Some(vary) if status == StatusCode::OK => self.variant(vary),
            Some(_) => self.absence(),
            None => Digest::from_bytes(rand::random()),
        };
        let done: Done = match vary {
            Some(_) => {
                let (subject, head) = (self.clone(), head.clone());
                Arc::new(move |digest: &Digest, size: u64| subject.set_entry(head.status, &head.headers, Some((*digest, size)), since))
            }
            None => Arc::new(|_: &Digest, _: u64| {}),
        };
        let load = self.load(done, is_kept.then_some(name), self.expected.filter(|_| status == StatusCode::OK && !is_coded));
        let is_peers = answered.is_peers;
        let body = answered.body(0)?;
        let place =
            if is_kept { Place::new(load, Some(head.clone()), Some(body), is_peers) } else { Place::unkept(load, head.clone(), body) };
        let begin = |key: Key, at: Arc<Place>| {
            let resource = Resource { key, at };
            if is_kept {
                self.shared.coming.insert(name, resource.clone(), head.clone());
            }
            let begun = self.shared.cache.begin(&resource, self.asker);
            let has_begun = matches!(&begun, Ok(Some(begun)) if begun.is_at(&resource));
            if !has_begun || self.changes() != since {
                self.shared.coming.remove(&name, &head);
            }
            begun.map(|begun| (resource, begun))
        };
        let (resource, begun) = match (begin(claim.map_or(Key::Name(name), Key::Blob), place.clone()), claim) {
            // It is kept, or comes, for other clients only. What comes here is this location's own, once its bytes have proved that.
            (Err(Fault::Hidden), Some(claim)) => begin(Key::Name(name), place.expecting(claim))?,
            (begun, _) => begun?,
        };
        if let (None, Some(digest)) = (&begun, claim) {
            // A tier has it: only the entry was missing.
            let size = self.shared.cache.kept_size_as(&digest, Visibility::Private).await.map(|(size, _)| size).or(size);
            if let Some(size) = size {
                self.set_entry(status, &head.headers, Some((digest, size)), since);
            }
        }
        Ok(Said::Coming(head, resource, Arc::new(Mutex::new(begun))))
    }

    /// What a flight asks for.
    fn load(&self, done: Done, name: Option<Digest>, expected: Option<Expected>) -> Load {
        Load {
            shared: self.shared.clone(),
            route: self.route().clone(),
            repository: self.repository.clone(),
            target: self.target.clone(),
            far: self.found.far.clone(),
            headers: self.headers.clone(),
            name,
            size: None,
            expected,
            done,
        }
    }

    /// A resource whose flight, if there must be one, asks the upstream anew.
    pub(super) fn resource(&self, key: Key) -> Resource {
        let load = self.load(Arc::new(|_: &Digest, _: u64| {}), None, None);
        Resource { key, at: Place::new(load, None, None, false) }
    }

    // ---- entries ----

    fn new_entry(&self, status: StatusCode, headers: &HeaderMap, body: Option<(Digest, u64)>) -> Entry {
        let (held, mut kept) = (self.held_before(headers), kept_headers(headers));
        if held > 0 {
            // Counted in `fetched_at`.
            kept.retain(|(name, _)| name != "age");
        }
        Entry {
            route: self.route().id.clone(),
            path: self.found.path.as_str().to_owned(),
            status: status.as_u16(),
            body: body.map(|(digest, size)| (digest.to_string(), size)),
            headers: kept,
            fetched_at: now() - held,
        }
    }

    /// For how long another node has had an answer; 0 of an answer of the upstream.
    fn held_before(&self, headers: &HeaderMap) -> u64 {
        let is_peers = headers.contains_key(castier_wire::CACHE_STATUS) && self.shared.peers.is_some();
        let age = headers.get(header::AGE).filter(|_| is_peers).and_then(|age| age.to_str().ok()?.parse().ok());
        age.unwrap_or(0).min(now())
    }

    /// The count of changes of this path; see [`super::Changes`].
    fn changes(&self) -> u64 {
        self.shared.changes.seen(self.route(), &self.found.path)
    }

    /// The headers of the request that choose between answers, for this one.
    ///
    /// # Errors
    /// No cache may keep the answer.
    fn chosen_by(&self, status: StatusCode, headers: &HeaderMap) -> Result<Vec<String>, rules::NotKept> {
        let mut vary = rules::may_keep(status, headers, &self.found.rule.vary)?;
        if is_coded(headers) && !vary.iter().any(|name| name == "accept-encoding") {
            vary.push("accept-encoding".into());
        }
        vary.retain(|name| name != "authorization");
        Ok(vary)
    }

    /// Notes what the upstream has said of this name. `since`: the count of changes when it was asked.
    fn set_entry(&self, status: StatusCode, headers: &HeaderMap, body: Option<(Digest, u64)>, since: u64) {
        if self.changes() != since {
            return;
        }
        self.note_entry(status, headers, body);
        if self.changes() != since {
            self.drop_entries();
        }
    }

    fn note_entry(&self, status: StatusCode, headers: &HeaderMap, body: Option<(Digest, u64)>) {
        let names = &self.shared.names;
        let entry = self.new_entry(status, headers, body);
        if let Some((digest, _)) = body.filter(|_| status == StatusCode::OK) {
            self.shared.proofs.add_member(&self.repository, &digest);
        }
        if status != StatusCode::OK {
            return names.set(self.absence(), entry);
        }
        names.remove(&self.absence());
        if self.found.rule.kind == Kind::Blob {
            return names.set(self.primary(), entry);
        }
        if let (true, Some((digest, _))) = (self.needs_digest(), body) {
            // The manifest under its digest.
            names.set(self.blob_name(&digest), entry.clone());
        }
        let Ok(vary) = self.chosen_by(status, headers) else { return };
        if vary.is_empty() {
            return names.set(self.primary(), entry);
        }
        let (name, primary) = (self.variant(&vary), self.primary());
        names.set(name, entry);
        let before = names.get(&primary).filter(|entry| entry.status == VARIANTS && vary_of(entry) == vary);
        let mut variants = vec![name];
        variants.extend(before.iter().flat_map(|entry| variants_of(entry)).filter(|known| *known != name));
        variants.truncate(MOST_VARIANTS);
        let mut varies = self.new_entry(StatusCode::OK, &HeaderMap::new(), None);
        varies.status = VARIANTS;
        varies.headers = vary.into_iter().map(|name| ("vary".to_owned(), name)).collect();
        varies.headers.extend(variants.into_iter().map(|name| ("variant".to_owned(), name.to_string())));
        names.set(primary, varies);
    }

    /// An entry holds still. `since`: as for [`Self::set_entry`].
    fn renew(&self, entry: &Entry, headers: &HeaderMap, since: u64) {
        if self.changes() != since {
            return;
        }
        let mut merged = headers_of(entry);
        rules::merge(&mut merged, headers);
        let name = self.entry().map_or_else(|| self.name(), |(name, _)| name);
        self.shared.names.set(name, Entry { headers: kept_headers(&merged), fetched_at: now(), ..entry.clone() });
        if self.changes() != since {
            self.drop_entries();
        }
    }

    /// The upstream no longer has it, or does not show it to these credentials. The latter says nothing to those who may read it.
    fn forget(&self) {
        if self.route().is_private && !self.is_admitted_to_repository() {
            return;
        }
        if let Some((name, _)) = self.entry() {
            self.shared.names.remove(&name);
        }
        if let (Kind::Blob, Some(digest)) = (self.found.rule.kind, self.claim) {
            self.shared.proofs.remove_member(&self.repository, &digest);
        }
    }

    /// The headers of the request as the upstream gets them.
    pub(super) const fn request_headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Notes what an answer to a request says about the client's right to read the repository.
    pub(super) fn note(&self, head: &Head) {
        if head.status.is_success() {
            self.admit();
        } else if is_refusal(head.status) {
            self.refuse(head);
        }
    }

    /// Whether the client may read what is kept of the repository while the upstream is away.
    pub(super) fn may_read_offline(&self) -> bool {
        self.was_readable() || self.is_admitted_to_repository()
    }

    /// What a flight asks another server for.
    pub(super) fn load_of(&self, target: String, far: Option<Url>, headers: HeaderMap, size: u64) -> Load {
        Load { target, far, headers, size: Some(size), ..self.load(Arc::new(|_: &Digest, _: u64| {}), None, None) }
    }

    /// A request that changes something went through: what is remembered of the path, or on its way, may be of before. Returns how many answers were
    /// kept.
    pub(super) fn changed(&self) -> usize {
        self.shared.changes.note(self.route(), &self.found.path);
        self.drop_entries()
    }

    fn drop_entries(&self) -> usize {
        let (names, primary) = (&self.shared.names, self.primary());
        let varies = names.get(&primary).filter(|entry| entry.status == VARIANTS);
        let mut own = vec![primary, self.name()];
        own.extend(self.entry().map(|(name, _)| name));
        own.extend(varies.iter().flat_map(|entry| variants_of(entry)));
        self.shared.coming.leave(&self.shared.cache, Some(&own));
        own.iter().filter(|name| names.remove(name)).count() - usize::from(varies.is_some())
    }

    /// What castier would do with a GET of this, for people.
    pub(super) fn explained(&self, kept: Option<&Kept>) -> (Vec<(&'static str, String)>, String) {
        let mut facts = vec![
            ("route", self.route().label.clone()),
            ("kind", format!("{:?}", self.found.rule.kind).to_lowercase()),
            ("rule", self.found.rule.path.as_str().to_owned()),
            ("upstream", self.at.to_string()),
            ("key", self.name().to_string()),
            ("repository", self.repository.rsplit('|').next().unwrap_or_default().to_owned()),
            ("access", if self.route().is_private { "upstream" } else { "local" }.to_owned()),
        ];
        let is_admitted = self.is_admitted();
        if self.route().is_private {
            facts.push(("admitted", if is_admitted { "yes".into() } else { "no: the upstream is asked first".to_owned() }));
        }
        let next = match kept {
            None => "a GET to the upstream".to_owned(),
            Some(kept) => {
                facts.push((
                    "kept",
                    format!(
                        "status {}, {} bytes{}",
                        kept.entry.status,
                        kept.body.map_or(0, |(_, size)| size),
                        if kept.has_body { "" } else { ", body evicted" }
                    ),
                ));
                if let Some((digest, _)) = kept.body {
                    facts.push(("digest", digest.to_string()));
                }
                facts.push(("since", humantime::format_rfc3339_seconds(time(kept.entry.fetched_at)).to_string()));
                facts.push(("freshness", format!("{:?}", kept.freshness).to_lowercase()));
                facts.push(("key of the entry", kept.name.to_string()));
                match (kept.has_body || kept.entry.status != 200, kept.freshness, is_admitted || kept.is_own) {
                    (false, ..) => "a GET to the upstream".into(),
                    (true, Freshness::Fresh, true) => "nothing: it is sent from the cache".into(),
                    (true, Freshness::Fresh, false) => "a HEAD to the upstream with the client's credentials".into(),
                    (true, Freshness::Stale | Freshness::Expired, _) => "a conditional request to the upstream".into(),
                }
            }
        };
        (facts, next)
    }
}

impl Kept {
    fn can_answer(&self, method: &Method) -> bool {
        self.has_body
            || (*method == Method::HEAD && self.body.is_some() && self.entry.status == 200)
            || (self.entry.status != 200 && self.body.is_none())
    }
}

impl Shared {
    /// A keyed hash of credentials, never 0.
    fn who(&self, credentials: &[u8]) -> Credentials {
        use std::hash::BuildHasher as _;
        self.credentials_hasher.hash_one(credentials).max(1)
    }
}

/// The head of a part, as that of the whole.
fn as_whole(head: &mut Head) {
    if head.status != StatusCode::PARTIAL_CONTENT {
        return;
    }
    head.status = StatusCode::OK;
    let range = head.headers.remove(header::CONTENT_RANGE);
    let size = range.as_ref().and_then(|range| range.to_str().ok()?.rsplit_once('/')?.1.parse::<u64>().ok());
    match size {
        Some(size) => head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(size)),
        None => head.headers.remove(header::CONTENT_LENGTH),
    };
}

fn challenge_name(route: &Route) -> Digest {
    Digest::of(format!("challenge|{}", route.id).as_bytes())
}

fn vary_of(entry: &Entry) -> Vec<String> {
    entry.headers.iter().filter(|(name, _)| name == "vary").map(|(_, value)| value.clone()).collect()
}

/// The names of the answers that an entry with the status [`VARIANTS`] lists.
fn variants_of(entry: &Entry) -> impl Iterator<Item = Digest> + '_ {
    entry.headers.iter().filter(|(name, _)| name == "variant").filter_map(|(_, value)| Digest::parse(value.as_bytes()).ok())
}

fn is_coded(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

const fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED)
}

fn time(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// All lines of `Authorization`: the upstream may look at any of them, so what it says is about all of them.
fn credentials_of(headers: &HeaderMap) -> Option<Vec<u8>> {
    let lines: Vec<_> = headers.get_all(header::AUTHORIZATION).iter().map(HeaderValue::as_bytes).collect();
    (!lines.is_empty()).then(|| lines.join(&b'\n'))
}

/// All lines of a header as one value.
fn combined(headers: &HeaderMap, name: &str) -> String {
    let lines = headers.get_all(name).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(str::trim).filter(|one| !one.is_empty()).collect::<Vec<_>>().join(", ")
}

/// The headers of a request that the upstream gets. Only those of which it is known what they do, and those that are part of the name (`vary`): any other
/// could choose an answer that is then kept for everybody. `plain`: the body must not be coded.
fn upstream_headers(headers: &HeaderMap, vary: &[String], with_credentials: bool, plain: bool) -> HeaderMap {
    const PLAIN: [&str; 4] = ["accept", "accept-language", "user-agent", "content-type"];
    let mut out = HeaderMap::new();
    for (name, value) in headers {
        let is_sent = match name.as_str() {
            "authorization" => with_credentials,
            "accept-encoding" => !plain,
            // They are about the hop, or about what this client has already.
            "host" | "connection" | "content-length" | "transfer-encoding" | "te" | "trailer" | "upgrade" | "expect" | "range" | "via" => {
                false
            }
            name if name.starts_with("if-") || name.starts_with("proxy-") => false,
            name => PLAIN.contains(&name) || vary.iter().any(|chosen| chosen == name),
        };
        if is_sent {
            out.append(name.clone(), value.clone());
        }
    }
    out
}

/// The headers of an answer that are kept, and sent with it again.
fn kept_headers(headers: &HeaderMap) -> Vec<(String, String)> {
    let mut kept = end_to_end(headers);
    for name in ["accept-ranges", "set-cookie", "cache-status", "server-timing", "x-request-id"] {
        kept.remove(name);
    }
    let mut bytes = 0;
    let lines = kept.iter().filter_map(|(name, value)| {
        bytes += name.as_str().len() + value.len();
        (bytes <= MOST_HEADERS).then(|| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))).flatten()
    });
    lines.collect()
}
