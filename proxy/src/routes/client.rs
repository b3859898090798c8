//! Asks the upstream of a route: follows its redirects, gets tokens from its realm, and waits for the route's rate.

use super::Route;
use bytes::{Bytes, BytesMut};
use castier_cache::{Fault, Limit, RetryBudget};
use castier_routes::{
    Listed,
    challenge::{Challenge, challenges, token},
};
use castier_upstream::{RouteServer, Upstream, connector, insert};
use data_encoding::BASE64;
use futures::StreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use moka::sync::Cache;
use pingora::{http::RequestHeader, prelude::HttpPeer, protocols::http::v1::client::HttpSession};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::Semaphore, time::timeout};
use url::Url;

/// The most redirects that are followed.
const MOST_HOPS: usize = 5;
/// How many servers the client keeps connections to, over all routes. Redirects can name any number of hosts.
const MOST_SERVERS: u64 = 256;
/// How many tokens are kept, over all routes.
const MOST_TOKENS: u64 = 10_000;
/// The longest body that is passed on from memory: of errors, redirects that are not followed, and token answers.
pub(super) const SMALL_BODY: usize = 256 << 10;
/// How long such a body may take.
const SMALL_BODY_TIME: Duration = Duration::from_secs(10);
/// A token is not used in its last seconds, so that it does not expire on its way.
const TOKEN_MARGIN: Duration = Duration::from_secs(10);

/// The headers of a request that go along with a redirect to another server. Any other can be a secret between the client and the first one.
const HARMLESS: [HeaderName; 8] = [
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::ACCEPT_LANGUAGE,
    header::USER_AGENT,
    header::RANGE,
    header::IF_RANGE,
    header::IF_NONE_MATCH,
    header::IF_MODIFIED_SINCE,
];

/// The client of all routes.
pub(super) struct Client {
    connector: Arc<pingora::connectors::TransportConnector>,
    /// By scheme, host and port, and whether private addresses are refused.
    servers: Cache<String, Arc<Upstream>>,
    /// castier's own tokens, by route and repository, with their end.
    tokens: Cache<(usize, String), (HeaderValue, Instant)>,
    /// `origin.max_requests` questions at once, over all routes. A body that has begun counts as a fill instead.
    questions: Semaphore,
    /// Timeouts and limits, as for the origin.
    config: castier_config::Origin,
    retry_budget: Arc<RetryBudget>,
    metrics: Arc<castier_upstream::Metrics>,
}

/// What is asked.
pub(super) struct Asking<'a> {
    pub(super) route: &'a Route,
    /// For tokens.
    pub(super) repository: &'a str,
    pub(super) method: Method,
    /// Path and query, as the server gets them.
    pub(super) target: &'a str,
    /// Another server than the upstream, which the route lists.
    pub(super) far: Option<&'a Url>,
    /// The request's headers beside those that the client sets itself.
    pub(super) headers: &'a HeaderMap,
    pub(super) body: &'a [u8],
}

/// A head as it came, and after redirects the headers of the protocol from whichever answer had them.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
}

impl Head {
    /// The announced length of the body.
    pub(super) fn length(&self) -> Option<u64> {
        self.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
    }
}

/// An answer, of which the body is still to be read.
pub(super) struct Answered {
    pub(super) head: Head,
    pub(super) server: Arc<Upstream>,
    session: HttpSession,
    peer: HttpPeer,
    /// Another node gave it.
    pub(super) is_peers: bool,
    /// Another server than the one that was asked gave it.
    pub(super) is_redirected: bool,
}

impl Answered {
    /// The answer of another node.
    pub(super) fn of_peer(server: Arc<Upstream>, session: HttpSession, peer: HttpPeer) -> Result<Self, Fault> {
        let head = session.resp_header().map(|head| Head { status: head.status, headers: head.headers.clone() });
        let mut head = head.ok_or_else(|| server.unusable("no head"))?;
        head.headers.remove(castier_cluster::PROOF);
        Ok(Self { head, server, session, peer, is_peers: true, is_redirected: false })
    }

    /// The body as a stream.
    pub(super) fn body(self, from: u64) -> Result<castier_cache::Incoming, Fault> {
        self.server.incoming_as_it_is(self.session, self.peer, from)
    }

    /// The head, and the body in memory as far as it came: at most [`SMALL_BODY`] of it, and what came in [`SMALL_BODY_TIME`].
    pub(super) async fn small(mut self) -> (Head, Bytes) {
        let mut body = BytesMut::new();
        let read = async {
            while let Ok(Some(part)) = self.session.read_body_bytes().await {
                body.extend_from_slice(&part);
                if body.len() > SMALL_BODY {
                    break;
                }
            }
        };
        // An error that comes byte by byte is not worth waiting for.
        let _ = timeout(SMALL_BODY_TIME, read).await;
        body.truncate(SMALL_BODY);
        self.server.finish(self.session, &self.peer).await;
        (self.head, body.freeze())
    }

    /// Ends the exchange of an answer whose body is not wanted.
    pub(super) async fn finish(self) -> Head {
        self.server.finish(self.session, &self.peer).await;
        self.head
    }
}

impl Client {
    pub(super) fn new(config: &castier_config::Origin, ca_file: Option<String>, metrics: Arc<castier_upstream::Metrics>) -> Self {
        Self {
            connector: connector(ca_file),
            servers: Cache::new(MOST_SERVERS),
            tokens: Cache::new(MOST_TOKENS),
            questions: Semaphore::new(config.max_requests),
            config: config.clone(),
            retry_budget: RetryBudget::new(config.retry_budget, metrics.retries_refused().clone()),
            metrics,
        }
    }

    /// The server of a URL.
    pub(super) fn server(&self, url: &Url, refuses: fn(IpAddr) -> bool, is_listed: bool) -> Result<Arc<Upstream>, Fault> {
        let key =
            format!("{}://{}:{} {is_listed}", url.scheme(), url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or(0));
        let make = || {
            let server = RouteServer {
                connector: self.connector.clone(),
                url,
                connect_timeout: self.config.connect_timeout.get(),
                read_timeout: self.config.read_timeout.get(),
                max_requests: self.config.max_requests,
                retry_budget: self.retry_budget.clone(),
                breaker_failures: self.config.breaker_failures,
                breaker_pause: self.config.breaker_pause.get(),
                refuses,
            };
            Upstream::of_route(server, self.metrics.clone()).map_err(|why| unusable(format!("{url}: {why}")))
        };
        match self.servers.get(&key) {
            Some(server) => Ok(server),
            None => {
                let server = make()?;
                self.servers.insert(key, server.clone());
                Ok(server)
            }
        }
    }

    /// The server of a route's upstream.
    pub(super) fn upstream(&self, route: &Route) -> Result<Arc<Upstream>, Fault> {
        self.server(&route.base, |_| false, true)
    }

    /// Asks the upstream, and follows its redirects to hosts that the route lists. A redirect to another host is the answer.
    ///
    /// # Errors
    /// No answer came, or redirects do not end.
    pub(super) async fn ask(&self, asking: &Asking<'_>) -> Result<Answered, Fault> {
        let Ok(Ok(_permit)) = timeout(self.config.read_timeout.get(), self.questions.acquire()).await else {
            return Err(Fault::Busy(Limit::Requests));
        };
        let own = self.own_credentials(asking);
        let answered = self.follow(asking, own.as_ref()).await?;
        if answered.head.status != StatusCode::UNAUTHORIZED || asking.route.is_private {
            return Ok(answered);
        }
        let (head, body) = answered.small().await;
        match self.log_in(asking, &head).await? {
            Some(credentials) => self.follow(asking, Some(&credentials)).await,
            // Nothing better is known. The body is gone, and the status says enough.
            None => Err(unusable(format!("it refuses castier's credentials: {}", String::from_utf8_lossy(&body[..body.len().min(200)])))),
        }
    }

    fn begin_at(&self, route: &Route, far: Option<&Url>) -> Result<Arc<Upstream>, Fault> {
        match far {
            None => self.upstream(route),
            Some(url) => self.listed_server(url, route.lists(url).ok_or_else(|| unusable(format!("{url} is not in route.redirects")))?),
        }
    }

    /// A host that is listed as it is may have a private address. One that a wildcard lists may not: who can name hosts below it could reach
    /// this network.
    fn listed_server(&self, url: &Url, listed: Listed) -> Result<Arc<Upstream>, Fault> {
        match listed {
            Listed::Exactly => self.server(url, |_| false, true),
            Listed::ByWildcard => self.server(url, castier_routes::is_private, false),
        }
    }

    async fn follow(&self, asking: &Asking<'_>, own: Option<&HeaderValue>) -> Result<Answered, Fault> {
        let route = asking.route;
        let (mut server, mut target) = (self.begin_at(route, asking.far)?, asking.target.to_owned());
        let url = super::url_at(asking.far.unwrap_or(&route.base), &target);
        let mut url = url.map_err(|error| Fault::BadRequest(format!("the path cannot be a URL: {error}")))?;
        // The request's own headers are for the server that is asked first.
        let (mut is_first, mut first): (bool, Option<HeaderMap>) = (true, None);
        for hop in 0..=MOST_HOPS {
            self.wait_for_rate(route).await?;
            let at_home = route.is_upstream(&url);
            let request = self.request(asking, &server, &target, own.filter(|_| at_home), is_first || at_home)?;
            let started = Instant::now();
            let (session, peer) =
                server.repeat(&request, asking.body, usize::from(asking.method != Method::POST)).await.inspect_err(|fault| {
                    // Other servers say nothing about the upstream.
                    if at_home {
                        route.answered(None, started);
                    }
                    tracing::debug!(%url, %fault, "an upstream did not answer");
                })?;
            let head = session.resp_header().ok_or_else(|| unusable("no head"))?;
            if at_home {
                route.answered(Some(head.status), started);
            }
            let mut head = Head { status: head.status, headers: head.headers.clone() };
            let next = redirect(&head, &url);
            let listed = next.as_ref().and_then(|next| route.lists(next));
            if let Some(first) = &first {
                add_protocol_headers(&mut head.headers, first);
            }
            let answered = Answered { head, server: server.clone(), session, peer, is_peers: false, is_redirected: hop > 0 };
            let (Some(next), Some(listed)) = (next, listed) else { return Ok(answered) };
            if hop == MOST_HOPS {
                answered.finish().await;
                return Err(unusable(format!("more than {MOST_HOPS} redirects")));
            }
            if url.scheme() == "https" && next.scheme() == "http" {
                answered.finish().await;
                return Err(unusable("a redirect from https to http"));
            }
            first = Some(answered.finish().await.headers);
            is_first = false;
            server = self.listed_server(&next, listed)?;
            target = next[url::Position::BeforePath..url::Position::AfterQuery].to_owned();
            url = next;
        }
        Err(unusable("redirects without an end"))
    }

    fn request(
        &self,
        asking: &Asking<'_>,
        server: &Arc<Upstream>,
        target: &str,
        own: Option<&HeaderValue>,
        with_credentials: bool,
    ) -> Result<RequestHeader, Fault> {
        let mut request = server.request(asking.method.clone(), target)?;
        for name in asking.headers.keys() {
            if !with_credentials && !HARMLESS.contains(name) {
                continue;
            }
            request.remove_header(name);
            for value in asking.headers.get_all(name) {
                request.append_header(name.clone(), value.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
            }
        }
        if let Some(own) = own {
            request.insert_header(header::AUTHORIZATION, own.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
        }
        if !asking.body.is_empty() || asking.method == Method::POST {
            insert(&mut request, header::CONTENT_LENGTH, &asking.body.len().to_string())?;
        }
        Ok(request)
    }

    async fn wait_for_rate(&self, route: &Route) -> Result<(), Fault> {
        let Some(rate) = &route.rate else { return Ok(()) };
        timeout(self.config.read_timeout.get(), rate.until_ready()).await.map_err(|_| Fault::Busy(Limit::Requests))
    }

    // ---- castier's own credentials ----

    /// What castier sends with the first question: a token that it has, or a password or token of the configuration.
    fn own_credentials(&self, asking: &Asking<'_>) -> Option<HeaderValue> {
        let route = asking.route;
        if route.is_private {
            return None;
        }
        let kept = self.tokens.get(&(route.index, asking.repository.to_owned()));
        let kept = kept.filter(|(_, end)| *end > Instant::now()).map(|(token, _)| token);
        // A registry's password goes to the realm, and to the upstream only when it asks for it.
        kept.or_else(|| route.own.as_ref().filter(|_| route.protocol != "oci").map(|own| own.authorization.clone()))
    }

    /// Answers a challenge: with the password, or with a token from the realm. `None`: castier has nothing to answer it with.
    async fn log_in(&self, asking: &Asking<'_>, head: &Head) -> Result<Option<HeaderValue>, Fault> {
        let route = asking.route;
        let known = challenges(&head.headers);
        for challenge in &known {
            if let Challenge::Bearer { realm, service, scope } = challenge {
                let token = self.token(route, realm, service.as_deref(), scope.as_deref()).await?;
                let end = Instant::now() + token.1.saturating_sub(TOKEN_MARGIN);
                self.tokens.insert((route.index, asking.repository.to_owned()), (token.0.clone(), end));
                return Ok(Some(token.0));
            }
        }
        let is_basic = known.iter().any(|challenge| matches!(challenge, Challenge::Basic { .. }));
        Ok(route.own.as_ref().filter(|own| is_basic && own.is_basic).map(|own| own.authorization.clone()))
    }

    async fn token(
        &self,
        route: &Route,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<(HeaderValue, Duration), Fault> {
        let mut url = Url::parse(realm).map_err(|error| unusable(format!("its realm {realm:?} is no URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") || (route.base.scheme() == "https" && url.scheme() == "http") {
            return Err(unusable(format!("its realm {realm} is not reached by {}", route.base.scheme())));
        }
        let listed = route.lists(&url);
        let server = self.listed_server(&url, listed.unwrap_or(Listed::ByWildcard))?;
        if listed.is_none() && route.own.is_some() {
            return Err(unusable(format!(
                "its realm is at {}, which gets no credentials: list it in route.redirects if it belongs to the upstream",
                server.authority()
            )));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            for scope in scope.into_iter().flat_map(str::split_whitespace) {
                query.append_pair("scope", scope);
            }
        }
        let mut request = server.request(Method::GET, &url[url::Position::BeforePath..url::Position::AfterQuery])?;
        if let Some(own) = &route.own {
            request.insert_header(header::AUTHORIZATION, own.authorization.clone()).map_err(|error| Fault::Internal(error.to_string()))?;
        }
        let (session, peer) = server.repeat(&request, &[], 1).await?;
        let head = session.resp_header().map(|head| Head { status: head.status, headers: head.headers.clone() });
        let head = head.ok_or_else(|| unusable("no head"))?;
        let (head, body) = Answered { head, server, session, peer, is_peers: false, is_redirected: false }.small().await;
        if head.status != StatusCode::OK {
            return Err(unusable(format!("its realm {realm} answers {} to castier's credentials", head.status.as_u16())));
        }
        let (token, lasts) = token(&body).ok_or_else(|| unusable(format!("its realm {realm} gives no token")))?;
        let mut value =
            HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| unusable("its realm gives a token that no header can hold"))?;
        value.set_sensitive(true);
        Ok((value, lasts))
    }
}

/// castier's own credentials of a route.
pub(super) struct Own {
    pub(super) authorization: HeaderValue,
    pub(super) is_basic: bool,
}

impl Own {
    pub(super) fn basic(user: &str, password: &str) -> Option<Self> {
        let mut authorization = HeaderValue::try_from(format!("Basic {}", BASE64.encode(format!("{user}:{password}").as_bytes()))).ok()?;
        authorization.set_sensitive(true);
        Some(Self { authorization, is_basic: true })
    }

    pub(super) fn bearer(token: &str) -> Option<Self> {
        let mut authorization = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
        authorization.set_sensitive(true);
        Some(Self { authorization, is_basic: false })
    }
}

/// Where an answer redirects to.
fn redirect(head: &Head, at: &Url) -> Option<Url> {
    if !matches!(head.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = head.headers.get(header::LOCATION)?.to_str().ok()?;
    at.join(location).ok().filter(|next| matches!(next.scheme(), "http" | "https"))
}

/// Adds the protocol's headers of an earlier answer: those of the first one count.
fn add_protocol_headers(headers: &mut HeaderMap, first: &HeaderMap) {
    let is_protocols = |name: &HeaderName| name.as_str().starts_with("x-") || name.as_str().starts_with("docker-") || *name == header::LINK;
    for name in first.keys().filter(|name| is_protocols(name)) {
        headers.remove(name);
        for value in first.get_all(name) {
            headers.append(name.clone(), value.clone());
        }
    }
}

/// The user and the password of a host in a netrc file (`machine`, `login`, `password`, `default`).
pub(super) fn netrc(text: &str, host: &str) -> Option<(String, String)> {
    let mut words = text.lines().filter(|line| !line.trim_start().starts_with('#')).flat_map(str::split_whitespace);
    let (mut is_own, mut user, mut password) = (false, None, None);
    while let Some(word) = words.next() {
        match word {
            "machine" | "default" if is_own && password.is_some() => break,
            "machine" => (is_own, user, password) = (words.next() == Some(host), None, None),
            "default" => (is_own, user, password) = (true, None, None),
            "login" => user = words.next().filter(|_| is_own),
            "password" => password = words.next().filter(|_| is_own),
            _ => {}
        }
    }
    Some((user.unwrap_or_default().to_owned(), password.filter(|_| is_own)?.to_owned()))
}

pub(super) fn unusable(why: impl Into<String>) -> Fault {
    Fault::Unusable { source_name: "upstream", why: why.into() }
}

/// Reads a stream into memory.
///
/// # Errors
/// The stream's, or `None` if it is longer than `most`.
pub(super) async fn read_all(
    mut body: impl futures::Stream<Item = Result<Bytes, Fault>> + Unpin,
    most: usize,
) -> Result<Option<Bytes>, Fault> {
    let mut bytes = BytesMut::new();
    while let Some(part) = body.next().await.transpose()? {
        if bytes.len() + part.len() > most {
            return Ok(None);
        }
        bytes.extend_from_slice(&part);
    }
    Ok(Some(bytes.freeze()))
}
