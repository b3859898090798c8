//! Routes: the cache for other protocols (docs/routes.md).
//!
//! A body is a blob under its own SHA-256. The name table ([`castier_routes::Names`]) says which name has which body, and what came with it. Proofs
//! ([`castier_routes::Proofs`]) say who may have it. What no proof covers is asked of the upstream first.
//!
//! - `serve.rs`: **start here**: a GET or HEAD from the request to the reply.
//! - `questions.rs`: coalesces questions. `client.rs`: asks upstreams. `load.rs`: a body as a flight of the cache.
//! - `answer.rs`: the reply from what is kept or comes. `learn.rs`: what metadata says of other resources. `links.rs`: links that lead back to castier.
//! - `lfs.rs`: the batch requests of Git LFS. `why.rs`: what castier knows about a URL.

mod answer;
mod client;
mod learn;
mod lfs;
mod links;
mod load;
mod metrics;
mod questions;
mod relay;
mod serve;
mod why;

use crate::node::Node;
use castier_blob::Digest;
use castier_cache::{Budget, Cache};
use castier_cluster::Peers;
use castier_config::{self as config, Castier, RouteAccess, RouteKind};
use castier_routes::{
    self as rules, BadPath, Captures, Entry, Expansion, Hosts, Kind, Listed, Names, Path, Proofs, Rule, Table, Template, Terms,
};
use castier_wire::Target;
use client::{Client, Own};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use learn::Learned;
#[doc(hidden)]
pub use learn::crate_path;
pub(crate) use lfs::{has_ticket, is_batch};
#[doc(hidden)]
pub use links::parse_far;
use metrics::RouteMetrics;
pub use metrics::{RouteFigures, Series};
use parking_lot::Mutex;
use questions::Questions;
pub use relay::RelayTo;
use std::{
    collections::HashMap,
    hash::RandomState,
    io,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use url::{Position, Url};
pub use why::PurgedNames;

/// The name table's file, below `disk.path`.
const NAMES: &str = "names.redb";
/// The bound of the name table without routes, in bytes.
const ENTRIES: u64 = 2 << 20;
/// How many proofs of each kind are remembered, some 200 bytes each.
const MOST_PROOFS: u64 = 100_000;

/// All routes of this node.
pub struct Routes {
    table: Table,
    routes: Vec<Arc<Route>>,
    /// A path below `/cas/` or `/<instance>/cas/` can be for a route.
    takes_blobs: bool,
    shared: Arc<Shared>,
}

/// What flights and questions share with the routes.
pub(crate) struct Shared {
    cache: Arc<Cache>,
    client: Client,
    names: Names,
    proofs: Proofs,
    questions: Arc<Questions>,
    coming: Coming,
    changes: Changes,
    learned: Learned,
    lfs: lfs::Known,
    /// The other nodes; `None` without a cluster.
    peers: Option<Arc<Peers>>,
    /// Makes keyed hashes of credentials.
    credentials_hasher: RandomState,
    /// `listen.external_url`.
    external_url: String,
    /// `limits.client_memory`. Documents that are read whole lease from it.
    memory: Arc<Budget>,
}

/// One route of the configuration.
pub(crate) struct Route {
    index: usize,
    /// Stays the same over restarts, as long as the route means the same.
    id: String,
    /// For people, and for the label of metrics.
    label: String,
    protocol: String,
    prefix: String,
    namespace: Option<String>,
    host: Option<String>,
    /// The upstream's URL; its path is what stands before the paths of the protocol.
    base: Url,
    /// The upstream's path, of a route by hand.
    expansion: Option<Expansion>,
    hosts: Hosts,
    terms: Terms,
    proof_ttl: Duration,
    /// `access = "upstream"`.
    is_private: bool,
    /// Whether every client must be one of castier's users.
    asks_for_users: bool,
    own: Option<Own>,
    query_is_key: bool,
    max_body: u64,
    /// For the origin's entries: no key of the configuration made it.
    is_implied: bool,
    priority: Option<u32>,
    rate: Option<DefaultDirectRateLimiter>,
    health: Mutex<Health>,
    metrics: RouteMetrics,
}

/// Whether the upstream answers.
#[derive(Default)]
struct Health {
    is_down: bool,
    /// When that changed last.
    since: Option<SystemTime>,
    /// When a question began that was answered last.
    answered: Option<Instant>,
}

/// A request that is for a route.
#[derive(Clone)]
pub struct Match {
    pub(crate) route: Arc<Route>,
    pub(crate) rule: Rule,
    captures: Captures,
    /// What the upstream is asked for: path and query.
    pub(crate) target: String,
    /// The canonical path, for keys.
    path: Path,
    /// The server that a rewritten link names; none: the upstream.
    pub(crate) far: Option<Url>,
    /// The namespace, if the client has it in the path.
    namespace: Option<String>,
    /// Host, path and query as the client sent them, for other nodes.
    asked: (String, String),
    /// The status of the answer to a batch for uploads, if the client may not store here.
    pub(crate) no_uploads: Option<StatusCode>,
}

/// Bodies that are on their way: under which key of the cache a name comes, and with which head.
#[derive(Default)]
struct Coming(Mutex<HashMap<Digest, (castier_cache::Resource, Arc<client::Head>)>>);

/// Counts changes of paths: writes through castier, and purges. What an upstream said before a change must not be noted after it:
///
/// 1. A question is put, and the upstream begins to answer with the old body.
/// 2. A client replaces it, and what is kept of the path is forgotten.
/// 3. The old body is complete, and would be noted as what the path has now.
///
/// Some paths share a count. A change of one of them only costs the others an entry.
struct Changes(Box<[AtomicU64]>);

impl Default for Changes {
    fn default() -> Self {
        Self((0..1024).map(|_| AtomicU64::new(0)).collect())
    }
}

impl Changes {
    fn count(&self, route: &Route, path: &Path) -> &AtomicU64 {
        let hash = route.location(path.as_str());
        &self.0[usize::try_from(hash % self.0.len() as u64).unwrap_or(0)]
    }

    fn seen(&self, route: &Route, path: &Path) -> u64 {
        self.count(route, path).load(Ordering::Acquire)
    }

    /// Call it before anything is forgotten: who notes something looks at the count afterwards, and takes it back if that has changed.
    fn note(&self, route: &Route, path: &Path) {
        self.count(route, path).fetch_add(1, Ordering::AcqRel);
    }

    /// As [`Self::note`], for all paths.
    fn note_all(&self) {
        for count in &self.0 {
            count.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Coming {
    fn get(&self, name: &Digest) -> Option<(castier_cache::Resource, Arc<client::Head>)> {
        self.0.lock().get(name).cloned()
    }

    fn insert(&self, name: Digest, resource: castier_cache::Resource, head: Arc<client::Head>) {
        self.0.lock().insert(name, (resource, head));
    }

    /// The body with this head no longer comes. Another one that comes under the name by now stays.
    fn remove(&self, name: &Digest, head: &Arc<client::Head>) {
        let mut map = self.0.lock();
        if map.get(name).is_some_and(|(_, known)| Arc::ptr_eq(known, head)) {
            map.remove(name);
        }
    }

    /// What comes under these names, or under all of them, is not to be joined any more.
    fn leave(&self, cache: &Cache, names: Option<&[Digest]>) {
        let mut map = self.0.lock();
        let names = names.map_or_else(|| map.keys().copied().collect(), <[Digest]>::to_vec);
        for name in names {
            map.remove(&name);
            cache.forget_name(&name);
        }
    }
}

impl Match {
    pub(crate) const fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is for an entry of the origin.
    pub(crate) fn is_entry(&self) -> bool {
        self.route.is_implied
    }

    /// Whether the upstream decides which client may read, by the client's own credentials.
    pub(crate) fn is_private(&self) -> bool {
        self.route.is_private
    }

    /// Whether a handler answers such a request. If not, it is relayed to the upstream.
    pub(crate) fn is_answered(&self, method: &Method) -> bool {
        (matches!(*method, Method::GET | Method::HEAD) && self.rule.kind != Kind::Relay) || is_batch(method, self)
    }

    /// The SHA-256 that the path names.
    fn digest(&self) -> Option<Digest> {
        self.captures.digest()
    }
}

impl Route {
    pub(crate) fn label(&self) -> &str {
        &self.label
    }

    pub(crate) fn protocol(&self) -> &str {
        &self.protocol
    }

    fn new(index: usize, config: &config::Route, series: &Series, most: u64) -> Result<(Self, Vec<Rule>), String> {
        let key = |key: &str, why: &dyn std::fmt::Display| format!("route[{index}].{key}: {why}");
        let mut base = Url::parse(&authority_part(&config.upstream)).map_err(|error| key("upstream", &error))?;
        let upstream_path = config.upstream[authority_part(&config.upstream).len()..].to_owned();
        let by_hand = config.protocol.is_empty();
        let mut list = if by_hand {
            let path = Template::parse(&config.path).map_err(|error| key("path", &error))?;
            vec![rule_by_hand(path, config)]
        } else {
            rules::preset(&config.protocol).ok_or_else(|| key("protocol", &"is unknown"))?.to_vec()
        };
        let mut expansion = None;
        if by_hand {
            if let (false, Some(rule)) = (upstream_path.trim_end_matches('/').is_empty(), list.first()) {
                expansion = Some(Expansion::parse(&upstream_path, &rule.path).map_err(|error| key("upstream", &error))?);
            }
        } else {
            base.set_path(upstream_path.trim_end_matches('/'));
        }
        for rule in &mut list {
            if rule.kind == Kind::Fresh
                && let Some(ttl) = config.ttl
            {
                rule.ttl = Some(ttl.get());
            }
            rule.vary.extend(config.vary.iter().map(|name| name.to_ascii_lowercase()));
            rule.vary.sort_unstable();
            rule.vary.dedup();
            if !config.digest_header.is_empty() {
                rule.digest_header = Some(config.digest_header.to_ascii_lowercase());
            }
        }
        let name = if by_hand { config.path.clone() } else { config.protocol.clone() };
        let place = [&config.host, &config.prefix, &config.namespace].map(String::as_str).concat();
        let label = if place.is_empty() { name.clone() } else { format!("{name} {place}") };
        let is_private = config.access == RouteAccess::Upstream;
        let access = if is_private { "upstream" } else { "local" };
        let route = Self {
            index,
            // What is kept of an upstream with log-ins counts for nobody if castier logs in itself from now on, and the other way round.
            id: format!("{name}|{access}|{}|{}|{}|{}", config.upstream, config.host, config.prefix, config.namespace),
            metrics: series.route(&label),
            label,
            protocol: config.protocol.clone(),
            prefix: config.prefix.trim_end_matches('/').to_owned(),
            namespace: (!config.namespace.is_empty()).then(|| config.namespace.clone()),
            host: (!config.host.is_empty()).then(|| config.host.to_ascii_lowercase()),
            hosts: Hosts::parse(&config.redirects).map_err(|error| key("redirects", &error))?,
            terms: Terms { ttl: None, stale_if_error: config.stale_if_error.get(), negative_ttl: config.negative_ttl.get() },
            proof_ttl: config.proof_ttl.get(),
            is_private,
            own: own(config, &base).map_err(|error| key("credentials", &error))?,
            query_is_key: config.query == config::RouteQuery::Key,
            max_body: config.max_body.get().min(most),
            is_implied: false,
            asks_for_users: false,
            priority: config.priority,
            rate: NonZeroU32::new(config.upstream_rate).map(|rate| RateLimiter::direct(Quota::per_second(rate))),
            health: Mutex::default(),
            base,
            expansion,
        };
        Ok((route, list))
    }

    /// The route for the origin's entries (`/ac`, `/kv`): mutable, so each request asks, with a condition if something is kept. The origin decides who may
    /// read them, unless castier does (`is_private` is false then).
    fn for_entries(index: usize, origin: &Url, most: u64, is_private: bool, series: &Series) -> (Self, rules::Route) {
        const PATHS: [&str; 3] = ["/ac/{sha256}", "/{instance}/ac/{sha256}", "/kv/{path*}"];
        let list = PATHS.iter().filter_map(|path| Template::parse(path).ok());
        let list = list.map(|path| Rule {
            path,
            kind: Kind::Fresh,
            ttl: Some(Duration::ZERO),
            vary: Vec::new(),
            digest_header: None,
            links: false,
            examples: Vec::new(),
        });
        let label = "entries".to_owned();
        let route = Self {
            index,
            id: format!("{label}|{origin}"),
            metrics: series.route(&label),
            label,
            protocol: String::new(),
            prefix: String::new(),
            namespace: None,
            host: None,
            base: origin.clone(),
            expansion: None,
            hosts: Hosts::default(),
            terms: Terms { ttl: None, stale_if_error: Duration::ZERO, negative_ttl: Duration::ZERO },
            proof_ttl: Duration::ZERO,
            is_private,
            own: None,
            query_is_key: true,
            max_body: most,
            is_implied: true,
            asks_for_users: false,
            priority: None,
            rate: None,
            health: Mutex::default(),
        };
        (route, rules::Route { rules: list.collect(), ..rules::Route::default() })
    }

    /// The namespace, if a target has it as the first component of the name.
    fn namespace_in(&self, target: &str) -> Option<String> {
        let namespace = self.namespace.as_ref()?;
        let rest = target.strip_prefix(self.prefix.as_str()).unwrap_or(target).strip_prefix("/v2/")?;
        rest.strip_prefix(namespace.as_str()).is_some_and(|rest| rest.starts_with('/')).then(|| namespace.clone())
    }

    /// Identifies a repository among the locations of the cache. Never that of the origin.
    fn location(&self, repository: &str) -> u64 {
        let hash = Digest::of(format!("{}|{repository}", self.id).as_bytes());
        let (first, _) = hash.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        u64::from_le_bytes(*first).max(1)
    }

    /// Whether a URL is on the upstream's server.
    fn is_upstream(&self, url: &Url) -> bool {
        url.scheme() == self.base.scheme()
            && url.host() == self.base.host()
            && url.port_or_known_default() == self.base.port_or_known_default()
    }

    /// Whether castier may go to a URL.
    fn lists(&self, url: &Url) -> Option<Listed> {
        if self.is_upstream(url) { Some(Listed::Exactly) } else { self.allows(url) }
    }

    fn allows(&self, url: &Url) -> Option<Listed> {
        self.hosts.allows(url.scheme(), url.host_str()?, url.port_or_known_default()?)
    }

    /// The target at the upstream of a path and query of the protocol.
    fn upstream_target(&self, captures: &Captures, target: &str) -> String {
        match &self.expansion {
            None => format!("{}{target}", self.base.path().trim_end_matches('/')),
            Some(expansion) => {
                let path = expansion.expand(captures);
                target.split_once('?').map_or_else(|| path.clone(), |(_, query)| format!("{path}?{query}"))
            }
        }
    }

    /// Notes the outcome of a question that began at `asked`: the status of the answer, or none. Logs each change once.
    fn answered(&self, status: Option<StatusCode>, asked: Instant) {
        self.metrics.question(status);
        let is_down = status.is_none_or(|status| matches!(status.as_u16(), 502..=504));
        let mut health = self.health.lock();
        if !is_down {
            health.answered = health.answered.max(Some(asked));
        }
        // An answer to a later question counts more.
        if is_down == health.is_down || (is_down && health.answered.is_some_and(|answered| answered > asked)) {
            return;
        }
        (health.is_down, health.since) = (is_down, Some(SystemTime::now()));
        drop(health);
        self.metrics.up(!is_down);
        if self.is_implied {
            return;
        }
        let (route, upstream) = (&self.label, &self.base);
        if is_down {
            tracing::warn!(route, %upstream, status = status.map(|status| status.as_u16()), "the upstream of a route is down; what is kept is served");
        } else {
            tracing::info!(route, %upstream, "the upstream of a route is up again");
        }
    }
}

/// The URL of a target at a server. A reference that begins with two slashes would name another host, so this is no join.
///
/// # Errors
/// The target cannot be part of a URL.
#[doc(hidden)]
pub fn url_at(server: &Url, target: &str) -> Result<Url, url::ParseError> {
    Url::parse(&format!("{}{target}", &server[..Position::BeforePath]))
}

/// Scheme, host and port of a URL.
fn authority_part(url: &str) -> String {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find('/').map_or(url.len(), |at| start + at);
    url[..end].to_owned()
}

fn rule_by_hand(path: Template, config: &config::Route) -> Rule {
    let kind = match config.kind {
        Some(RouteKind::Blob) => Kind::Blob,
        Some(RouteKind::Frozen) => Kind::Frozen,
        Some(RouteKind::Fresh) | None => Kind::Fresh,
    };
    Rule { path, kind, ttl: None, vary: Vec::new(), digest_header: None, links: false, examples: Vec::new() }
}

/// castier's own credentials, out of their file.
fn own(config: &config::Route, base: &Url) -> Result<Option<Own>, String> {
    let Some(credentials) = &config.credentials else { return Ok(None) };
    let secret = credentials.secret()?;
    let own = if !credentials.password_file.as_os_str().is_empty() {
        Own::basic(&credentials.username, &secret)
    } else if !credentials.token_file.as_os_str().is_empty() {
        Own::bearer(&secret)
    } else {
        let host = base.host_str().unwrap_or_default();
        let (user, password) = client::netrc(&secret, host).ok_or_else(|| format!("the netrc file has no entry for {host}"))?;
        Own::basic(&user, &password)
    };
    own.map(Some).ok_or_else(|| "have characters that no header can hold".to_owned())
}

/// Adds the problems that the routes of a configuration have, and notes about requests that two of them can match. Asks this machine for nothing. Returns
/// the names of the routes and of their protocols.
pub fn check(config: &Castier, problems: &mut config::Problems) -> Vec<String> {
    let Ok(series) = Series::new(&prometheus::Registry::new()) else { return Vec::new() };
    let (mut table, mut labels) = (Vec::new(), Vec::new());
    for (index, route) in config.route.iter().enumerate() {
        if route.path.is_empty() == route.protocol.is_empty() || route.upstream.is_empty() {
            continue;
        }
        // Files are checked with the other keys.
        let bare = config::Route { credentials: None, ..route.clone() };
        match Route::new(index, &bare, &series, config.limits.max_blob.get()) {
            Ok((built, list)) => {
                labels.extend([built.label.clone(), built.protocol.clone()]);
                for rule in &list {
                    let has_digest = rule.path.has("sha256") || rule.path.has("nix32");
                    if rule.kind == Kind::Blob && !has_digest {
                        problems.add(format!("route[{index}].path"), "names no {sha256} or {nix32}, which kind = \"blob\" needs");
                    }
                }
                table.push((index, table_route(&built, route, list)));
            }
            Err(problem) => {
                let (key, why) = problem.split_once(": ").unwrap_or(("route", &problem));
                problems.add(key, why);
            }
        }
    }
    labels.retain(|label| !label.is_empty());
    labels.dedup();
    let indexes: Vec<_> = table.iter().map(|(index, _)| *index).collect();
    for overlap in Table::new(table.into_iter().map(|(_, route)| route).collect()).overlaps() {
        let (first, second) = (indexes[overlap.first], indexes[overlap.second]);
        let note = format!("can match what route[{first}] matches and gets, such as {}; give one of them a host or a prefix", overlap.path);
        problems.note(format!("route[{second}]"), note);
    }
    labels
}

fn table_route(built: &Route, config: &config::Route, list: Vec<Rule>) -> rules::Route {
    rules::Route {
        protocol: built.protocol.clone(),
        host: built.host.clone(),
        prefix: built.prefix.clone(),
        namespace: (!config.namespace.is_empty()).then(|| config.namespace.clone()),
        rules: list,
    }
}

impl Routes {
    /// The routes of a configuration, and the one for the origin's entries. `ticket_key`: for the tickets of Git LFS; all nodes of a cluster have the same.
    ///
    /// # Errors
    /// A text that names the key.
    pub fn new(
        config: &Castier,
        node: &Node,
        memory: Arc<Budget>,
        ticket_key: Option<[u8; 32]>,
        ca_file: Option<String>,
        origin: &Url,
    ) -> Result<Arc<Self>, String> {
        let series = &node.metrics.routes;
        let (mut routes, mut table) = (Vec::new(), Vec::new());
        for (index, route) in config.route.iter().enumerate() {
            let (mut built, list) = Route::new(index, route, series, config.limits.max_blob.get())?;
            built.asks_for_users = !built.is_private && config.access.anonymous == config::Role::None;
            table.push(table_route(&built, route, list));
            routes.push(Arc::new(built));
        }
        let (built, entries) = {
            // Its requests count as the origin's, so its own series are registered nowhere.
            let unlisted = Series::new(&prometheus::Registry::new()).map_err(|error| format!("metrics: {error}"))?;
            Route::for_entries(routes.len(), origin, config.limits.max_blob.get(), !config.decides_access(), &unlisted)
        };
        table.push(entries);
        routes.push(Arc::new(built));
        let table = Table::new(table);
        let names = open_names(config).map_err(|error| format!("disk.path: the name table: {error}"))?;
        if !config.route.is_empty() {
            series.names_are(&names);
        }
        let shared = Arc::new(Shared {
            cache: node.cache.clone(),
            client: Client::new(&config.origin, ca_file, node.metrics.upstream.clone()),
            names,
            proofs: Proofs::new(MOST_PROOFS),
            questions: Arc::default(),
            coming: Coming::default(),
            changes: Changes::default(),
            learned: Learned::default(),
            lfs: lfs::Known::new(ticket_key),
            peers: node.peers.clone(),
            credentials_hasher: RandomState::new(),
            external_url: config.listen.external_url.trim_end_matches('/').to_owned(),
            memory,
        });
        let sample = Digest::EMPTY;
        let takes_blobs = routes.iter().any(|route| route.prefix.is_empty() || !route.prefix[1..].contains('/'))
            && [format!("/cas/{sample}"), format!("/i/cas/{sample}")].iter().any(|path| {
                routes.iter().enumerate().any(|(index, route)| {
                    let path = if route.prefix.is_empty() { path.clone() } else { format!("{}/cas/{sample}", route.prefix) };
                    let found = table.find(route.host.as_deref(), &path);
                    matches!(found, Ok(Some(found)) if found.route == index && names_own(found.rule.path.as_str()))
                })
            });
        Ok(Arc::new(Self { table, routes, takes_blobs, shared }))
    }

    /// The name table, for its end.
    pub fn close(&self, limit: Duration) {
        if !self.shared.names.flush(limit) {
            tracing::warn!("the disk is too slow: the last changes of the name table are lost");
        }
    }

    /// Whether requests for blobs must be looked at too: a route can match a path that else names a blob.
    pub const fn takes_blobs(&self) -> bool {
        self.takes_blobs
    }

    /// The route of a request. `host`: its `Host`, or the authority of a target in absolute form, and whether it was that.
    ///
    /// # Errors
    /// No route may match such a path.
    pub fn find(&self, host: Option<&str>, is_absolute: bool, target: &str) -> Result<Option<Match>, BadPath> {
        let (raw, _) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let path = Path::of(raw)?;
        if let Some(found) = self.far(host, raw, &path, target) {
            return Ok(Some(found));
        }
        let may = |route: usize| {
            let route = &self.routes[route];
            !is_absolute || route.is_implied || route.is_for_absolute(host, &self.shared.external_url)
        };
        let Some(found) = self.table.find_among(host, target, may)? else { return Ok(None) };
        let route = &self.routes[found.route];
        if is_own(raw) && !names_own(found.rule.path.as_str()) {
            return Ok(None);
        }
        Ok(Some(Match {
            route: route.clone(),
            rule: found.rule.clone(),
            captures: found.captures,
            target: found.target,
            path: found.path,
            far: None,
            namespace: route.namespace_in(target),
            asked: (host.unwrap_or_default().to_owned(), target.to_owned()),
            no_uploads: None,
        }))
    }

    /// The route of a link that castier has written, to a server that the route lists: `<prefix>/~/https/files.example/packages/x`.
    fn far(&self, host: Option<&str>, raw: &str, path: &Path, target: &str) -> Option<Match> {
        for route in &self.routes {
            if route.host.as_deref().is_some_and(|own| !host.is_some_and(|host| host.eq_ignore_ascii_case(own))) {
                continue;
            }
            let Some(rest) = path.below(&route.prefix).filter(|rest| rest.as_str().starts_with(links::FAR)) else { continue };
            let far = links::parse_far(rest.as_str()).filter(|(url, _)| route.lists(url).is_some());
            let Some((url, far_path)) = far.and_then(|(url, path)| Some((url, Path::of(&path).ok()?))) else { continue };
            let known =
                self.table.rules_of(route.index).iter().find_map(|rule| Some((rule, rule.path.matches(&far_path)?))).or_else(|| {
                    // Packages may stand anywhere on another server.
                    let any = self.table.rules_of(route.index).iter().find(|rule| rule.kind == Kind::Frozen)?;
                    Some((any, Captures::default()))
                });
            let Some((rule, captures)) = known else { continue };
            // In the client's spelling: what follows the host.
            let depth = route.prefix.matches('/').count() + 3;
            let start = raw.match_indices('/').nth(depth).map_or(raw.len(), |(at, _)| at);
            let query = target[raw.len()..].to_owned();
            let asked = (host.unwrap_or_default().to_owned(), target.to_owned());
            let target = format!("{}{query}", &raw[start..]);
            return Some(Match {
                route: route.clone(),
                rule: rule.clone(),
                captures,
                target,
                path: rest.clone(),
                far: Some(url),
                namespace: None,
                asked,
                no_uploads: None,
            });
        }
        None
    }

    /// Sets the gauges of the name table.
    pub fn update_metrics(&self, series: &Series) {
        if !self.is_empty() {
            series.names_are(&self.shared.names);
        }
    }

    /// The routes' figures, for `/stats` and the status page.
    pub fn figures(&self) -> Vec<RouteFigures> {
        let figures = |route: &Arc<Route>| {
            let breaker = self.shared.client.upstream(route).map(|server| server.breaker_state()).unwrap_or_default();
            let health = route.health.lock();
            route.metrics.figures(&route.label, route.base.as_str(), (!health.is_down, health.since), breaker.as_str())
        };
        self.configured().map(figures).collect()
    }

    /// Forgets names: those of a route whose path matches. `route`: a label or protocol. Returns how many.
    pub fn purge(&self, route: &str, path: &rules::Glob) -> Option<usize> {
        let chosen: Vec<_> = self.configured().filter(|known| known.label == route || known.protocol == route).collect();
        if chosen.is_empty() {
            return None;
        }
        let ids: Vec<_> = chosen.iter().map(|route| route.id.as_str()).collect();
        self.shared.changes.note_all();
        self.shared.coming.leave(&self.shared.cache, None);
        let count = self.shared.names.remove_where(|entry| ids.contains(&entry.route.as_str()) && path.matches(&entry.path));
        Some(count)
    }

    /// Whether the configuration has any.
    pub fn is_empty(&self) -> bool {
        self.configured().next().is_none()
    }

    /// The routes of the configuration.
    fn configured(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.routes.iter().filter(|route| !route.is_implied)
    }

    /// The names of the routes.
    pub fn labels(&self) -> Vec<&str> {
        self.configured().map(|route| route.label.as_str()).collect()
    }
}

impl Route {
    /// Whether a target in absolute form with this authority may be for the route: castier is no open proxy, so a route without a host takes only its
    /// upstream's, and castier's own.
    fn is_for_absolute(&self, authority: Option<&str>, external_url: &str) -> bool {
        let Some(authority) = authority else { return false };
        let own = self.base.port().map_or_else(
            || self.base.host_str().unwrap_or_default().to_owned(),
            |port| format!("{}:{port}", self.base.host_str().unwrap_or_default()),
        );
        self.host.is_some()
            || own.eq_ignore_ascii_case(authority)
            || authority_part(external_url).split_once("://").is_some_and(|(_, own)| own.eq_ignore_ascii_case(authority))
    }
}

/// Whether a path is castier's own, or the origin's: `/cas`, `/ac`, `/kv`.
fn is_own(path: &str) -> bool {
    !matches!(Target::of(path), Target::Other) || ["/ac/", "/kv/"].iter().any(|own| path.starts_with(own))
}

/// Whether a template is meant for such paths: one that takes everything is not.
fn names_own(template: &str) -> bool {
    ["/cas/", "/ac/", "/kv/"].iter().any(|own| template.contains(own))
}

/// The bound of the name table, in bytes.
pub fn most_names(config: &Castier) -> u64 {
    let capacity = config.limits.names.get();
    // For the origin's entries alone little is enough: a name that is forgotten costs one body more.
    if config.route.is_empty() { capacity.min(ENTRIES) } else { capacity }
}

/// The name table: in a file with a disk tier and routes, else in memory only.
fn open_names(config: &Castier) -> io::Result<Names> {
    match &config.disk {
        Some(disk) if !config.route.is_empty() => Names::open(&disk.path.join(NAMES), most_names(config)),
        _ => Ok(Names::in_memory(most_names(config))),
    }
}

/// The time now, in seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The headers of an entry.
fn headers_of(entry: &Entry) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(entry.headers.len());
    for (name, value) in &entry.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            headers.append(name, value);
        }
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_target_leads_to_another_server() {
        let base = Url::parse("https://user:password@up.example:8443/base/").unwrap();
        for target in ["/", "/base/a?b=//c", "//other.example/a", "//other.example:1/@v/list?x", "///a"] {
            let url = url_at(&base, target).unwrap();
            assert_eq!((url.host_str(), url.port()), (Some("up.example"), Some(8443)), "{target}");
            assert_eq!(&url[Position::BeforePath..], target);
        }
    }
}
