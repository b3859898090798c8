//! Who may come in at the public listener: the PROXY header, limits per client, TLS, and credentials.

use crate::{
    admin::Guard,
    metrics::{Listener, Metrics},
    proxy_protocol,
    reply::Reply,
    request_head::Head,
    routes::{Match, has_ticket, is_batch},
    secured::{self, Failed},
};
use castier_access::{Access, Clients, Connection, Memo, Refused, Sources, Users, What, Who};
use castier_config::{Castier, Limits, Problems, Proxies, Role};
use castier_serverkit::tls::{self, Certificate, Tls};
use castier_wire::{Target, entry::Entry, forwarded};
use http::{HeaderValue, Method, StatusCode, header};
use pingora::protocols::Stream;
use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// What the listeners need to know of clients, and what SIGHUP changes.
#[derive(Clone)]
pub struct Door {
    /// `None`: plain HTTP.
    pub tls: Option<Arc<Tls>>,
    /// `None`: everybody may do everything.
    pub access: Option<Arc<Access>>,
    /// The limits per client address.
    pub clients: Arc<Clients>,
    metrics: Arc<castier_access::Metrics>,
}

impl Door {
    /// Reads the files of certificates, users and tokens.
    ///
    /// # Errors
    /// A text that names the key, the file and the line.
    pub fn new(config: &Castier, metrics: &Metrics) -> Result<Self, String> {
        let tls = if config.listen.tls.is_on() {
            let metrics = metrics.certificates(Listener::Public);
            Some(Tls::open(config.listen.tls.files(), &[b"h2", b"http/1.1"], metrics)?)
        } else {
            None
        };
        let access = if config.decides_access() {
            let options = castier_access::Options {
                anonymous: config.access.anonymous,
                certificates: config.access.certificates,
                ..Default::default()
            };
            let users = users(config, true).map_err(|(key, why)| format!("{key}: {why}"))?;
            warn_of_unknown(&users);
            Some(Arc::new(Access::new(options, users, metrics.access.clone())))
        } else {
            None
        };
        Ok(Self { tls, access, clients: Arc::new(Clients::new(limits(&config.limits))), metrics: metrics.access.clone() })
    }

    /// The entrance of the public listener.
    pub fn entrance(&self, config: &Castier) -> Entrance {
        let (proxies, also) = (&config.listen.trusted_proxies.0, &config.log.trusted_proxies.0);
        Entrance {
            door: self.clone(),
            proxy_protocol: config.listen.proxy_protocol,
            proxies: Proxies(proxies.clone()),
            shown_proxies: (!also.is_empty()).then(|| Proxies(proxies.iter().chain(also).copied().collect())),
        }
    }

    /// What guards the admin listener.
    pub fn guard(&self, config: &Castier) -> Arc<Guard> {
        Arc::new(Guard {
            tls: self.tls.clone().filter(|_| config.listen.tls.admin),
            access: self.access.clone().filter(|_| config.access.admin),
            open_probes: config.access.open_probes,
        })
    }

    /// Reads the files again. What cannot be used is logged, and changes nothing. Blocks.
    pub fn reload(&self, config: &Castier) {
        if let Some(tls) = &self.tls
            && let Err(why) = tls.reload()
        {
            tracing::error!(why, "the certificates stay as they are");
        }
        let Some(access) = &self.access else { return };
        let read = access.users().reread(&sources(config, true));
        match read {
            Ok((users, problems)) => {
                for why in problems {
                    let key = key_of(config, &why);
                    self.metrics.reload_failed(key == TOKENS);
                    tracing::error!(key, why, "this file cannot be used; who was in it before stays");
                }
                warn_of_unknown(&users);
                let (users_now, tokens_now) = users.counts();
                tracing::info!(users = users_now, tokens = tokens_now, "users and tokens were read again");
                access.reload(users);
            }
            Err(why) => tracing::error!(key = "access.scopes", why, "users and tokens stay as they are"),
        }
    }
}

/// The limits per client address.
pub fn limits(limits: &Limits) -> castier_access::Limits {
    castier_access::Limits {
        requests_per_second: limits.requests_per_second,
        connections_per_client: limits.connections_per_client,
        bandwidth_per_client: limits.bandwidth_per_client.get(),
    }
}

const HTPASSWD: &str = "access.htpasswd_file";
const TOKENS: &str = "access.tokens_file";

/// What users are read from. Not `with_files`: from the scopes alone.
fn sources(config: &Castier, with_files: bool) -> Sources<'_> {
    let access = &config.access;
    let named = |path: &Path| with_files && !path.as_os_str().is_empty();
    Sources {
        htpasswd: Some(access.htpasswd_file.as_path()).filter(|path| named(path)),
        tokens: Some(access.tokens_file.as_path()).filter(|path| named(path)),
        role: access.users,
        scopes: &access.scopes.0,
    }
}

/// The key that is at fault for a problem of the users.
fn key_of(config: &Castier, why: &str) -> &'static str {
    let files = [(HTPASSWD, &config.access.htpasswd_file), (TOKENS, &config.access.tokens_file)];
    let at_fault = files.iter().find(|(_, file)| !file.as_os_str().is_empty() && why.starts_with(&format!("{}: ", file.display())));
    at_fault.map_or("access.scopes", |(key, _)| key)
}

/// The users and tokens, or the key that is at fault and why. Not `with_files`: the scopes alone.
fn users(config: &Castier, with_files: bool) -> Result<Users, (&'static str, String)> {
    Users::read(&sources(config, with_files)).map_err(|why| (key_of(config, &why), why))
}

/// A misspelt name leaves the one who was meant unconfined. But it may also be that of a certificate, or of somebody who has left.
fn warn_of_unknown(users: &Users) {
    for name in users.unknown_names() {
        tracing::warn!(name, "access.scopes confines a name that no user and no token has");
    }
}

/// Checks the files of certificates, users and tokens, and the scopes. `routes`: the names of the routes and of their protocols. `with_files` is false at
/// SIGHUP: [`Door::reload`] reads the files then, and one that is broken must not keep the others from being read.
pub fn check(config: &Castier, routes: &[String], with_files: bool, problems: &mut Problems) {
    let key = "access.scopes";
    let with_files = with_files && problems.ask_machine();
    if with_files
        && config.listen.tls.is_on()
        && problems.are_sound(&["listen.tls.cert_file", "listen.tls.key_file", "listen.tls.more", "listen.tls.client_ca_file"])
    {
        match tls::check(&config.listen.tls.files()) {
            Ok(notes) => notes.into_iter().for_each(|(key, note)| problems.note(key, note)),
            Err(why) => {
                let (key, why) = why.split_once(": ").unwrap_or(("listen.tls", &why));
                problems.add(key, why);
            }
        }
    }
    let users = match users(config, with_files) {
        Ok(users) => users,
        Err((key, why)) => return problems.add(key, why),
    };
    for (name, route) in users.routes().filter(|(_, route)| !routes.iter().any(|known| known == route)) {
        let known = if routes.is_empty() { "there are none".to_owned() } else { format!("there are: {}", routes.join(", ")) };
        problems.add(key, format!("{name:?} is confined to the route {route:?}, which is not configured; {known}"));
    }
    for name in users.unknown_names().into_iter().filter(|_| with_files) {
        problems.note(
            key,
            format!(
                "{name:?} is no user and no token: it confines only a certificate with this name; \"*\" confines all who are not named"
            ),
        );
    }
    let is_plain = !config.listen.tls.is_on() && !config.listen.proxy_protocol && config.listen.trusted_proxies.0.is_empty();
    if is_plain && config.access.has_users(&config.listen.tls) && !config.is_public_on_loopback() {
        problems
            .note("listen.tls", "is not set, so passwords and tokens pass the network in the clear, unless something in front speaks TLS");
    }
}

/// What a connection and its requests must pass at the public listener.
pub struct Entrance {
    pub(crate) door: Door,
    /// Whether connections begin with a PROXY header.
    proxy_protocol: bool,
    /// `listen.trusted_proxies`: the proxies that may name a client.
    proxies: Proxies,
    /// With `log.trusted_proxies`, which are believed in records only; `None`: they are none.
    shown_proxies: Option<Proxies>,
}

/// A connection that may send requests.
pub(crate) struct Entered {
    pub(crate) stream: Stream,
    pub(crate) visitor: Visitor,
    /// It counts for its client until it closes.
    pub(crate) counted: Option<Connection>,
    /// TLS has agreed on HTTP/2.
    pub(crate) is_http2: bool,
}

/// Whose connection a request came on.
pub(crate) struct Visitor {
    /// The address of the client, or of a proxy that names the client in each request.
    pub(crate) address: Option<SocketAddr>,
    /// Not, if a proxy in front does not know the client: the fields of its requests may be the client's own.
    pub(crate) names_clients: bool,
    /// Who the client is by its certificate. Boxed, since few connections have one.
    pub(crate) certificate: Option<Box<Certified>>,
}

/// A client with a certificate.
pub(crate) struct Certified {
    who: Arc<Who>,
    shown: Certificate,
}

/// The client that sent a request.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    /// The address that limits count by.
    pub(crate) counted: Option<IpAddr>,
    /// The address in records. Another one only if `log.trusted_proxies` are more than `listen.trusted_proxies`.
    pub(crate) shown: Option<IpAddr>,
}

/// Why a request may not be answered.
pub(crate) struct Refusal {
    pub(crate) reply: Reply,
    /// For the access record.
    pub(crate) why: &'static str,
    pub(crate) client: Client,
    /// Whether its connection cannot serve another one.
    pub(crate) closes: bool,
    /// When castier began to look at its credentials.
    pub(crate) since: Instant,
}

impl Entered {
    /// A peer's connection, which the peer listener has secured.
    pub(crate) fn peer(stream: Stream) -> Self {
        let visitor = Visitor { address: address_of(&stream), names_clients: false, certificate: None };
        Self { stream, visitor, counted: None, is_http2: false }
    }
}

impl Visitor {
    /// The address, as logs have it.
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        self.address.map(|address| address.ip().to_canonical())
    }

    /// As a client whose requests name nobody else.
    pub(crate) fn client(&self) -> Client {
        Client { counted: self.ip(), shown: self.ip() }
    }
}

fn address_of(stream: &Stream) -> Option<SocketAddr> {
    stream.get_socket_digest()?.peer_addr()?.as_inet().copied()
}

/// Why there is none.
pub(crate) enum Closed {
    /// The client speaks plain HTTP where TLS is spoken.
    Plain(Stream),
    /// This address has too many connections. The stream is `None` if an answer would need a handshake.
    TooMany(Option<Stream>, IpAddr),
    /// There is nobody to answer. The text is for the log.
    Silently(String),
}

impl Entrance {
    /// Lets a connection in. Its PROXY header and its handshake may each take `limits.header_timeout`.
    pub(crate) async fn enter(&self, stream: Stream, limits: &Limits) -> Result<Entered, Closed> {
        let limit = limits.header_timeout.get();
        let mut address = address_of(&stream);
        let mut stream = stream;
        let mut names_clients = true;
        if self.proxy_protocol {
            let is_trusted = address.is_some_and(|address| self.proxies.contains(&address.ip()));
            if !is_trusted {
                self.door.metrics.no_proxy_header();
                return Err(Closed::Silently("listen.proxy_protocol is on, and this is none of listen.trusted_proxies".into()));
            }
            let (behind, client) = proxy_protocol::read(stream, limit).await.map_err(|why| {
                self.door.metrics.no_proxy_header();
                Closed::Silently(why)
            })?;
            stream = behind;
            names_clients = client.is_some();
            address = client.or(address);
        }
        let counted = match address.map(|address| address.ip().to_canonical()) {
            // A proxy's own connections carry many clients.
            Some(ip) if !self.proxies.contains(&ip) => {
                let Some(counted) = self.door.clients.connect(ip) else {
                    self.door.metrics.connections();
                    return Err(Closed::TooMany(Some(stream).filter(|_| self.door.tls.is_none()), ip));
                };
                Some(counted)
            }
            _ => None,
        };
        let (mut certificate, mut is_http2) = (None, false);
        if let Some(tls) = &self.door.tls {
            match secured::accept(tls.acceptor(), stream, limit).await {
                Ok((secured, handshake)) => {
                    (stream, is_http2) = (secured, handshake.is_http2);
                    certificate =
                        handshake.certificate.zip(self.door.access.as_ref()).map(|(shown, access)| Box::new(Certified::new(shown, access)));
                }
                Err(failed) => {
                    self.door.metrics.handshake_failed();
                    return Err(match failed {
                        Failed::Plain(stream) => Closed::Plain(stream),
                        Failed::Handshake(why) => Closed::Silently(format!("the TLS handshake failed: {why}")),
                    });
                }
            }
        }
        Ok(Entered { stream, visitor: Visitor { address, names_clients, certificate }, counted, is_http2 })
    }

    /// The client that sent a request, whose head is at the front of `bytes`: the connection's, or who a trusted proxy names.
    pub(crate) fn client(&self, visitor: &Visitor, head: &Head, bytes: &[u8]) -> Client {
        let Some(ip) = visitor.ip() else { return visitor.client() };
        let named_by = |proxies: &Proxies| {
            let trusted = |address: &IpAddr| proxies.contains(address);
            if visitor.names_clients && trusted(&ip) {
                head.introduction(bytes, |fields| forwarded::client(ip, fields, trusted))
            } else {
                ip
            }
        };
        let counted = Some(named_by(&self.proxies));
        Client { counted, shown: self.shown_proxies.as_ref().map_or(counted, |proxies| Some(named_by(proxies))) }
    }

    /// Counts a request, which may be for a route.
    ///
    /// # Errors
    /// Its client sends too many.
    pub(crate) fn count(&self, limits: &Limits, client: Client, routed: Option<&Match>) -> Result<(), Box<Refusal>> {
        let counted = client.counted.filter(|_| limits.requests_per_second > 0);
        let Some(Err(wait)) = counted.map(|counted| self.door.clients.admit(counted)) else { return Ok(()) };
        self.door.metrics.requests();
        let reply = too_many(wait, "more requests than one client may send; try again later");
        Err(refusal(reply, "over limits.requests_per_second", client, routed))
    }

    /// Decides whether a request is allowed, whose head is at the front of `bytes`.
    ///
    /// # Errors
    /// It is not.
    pub(crate) async fn check(
        &self,
        memo: &mut Memo,
        head: &Head,
        bytes: &[u8],
        mut routed: Option<&mut Match>,
        client: Client,
        visitor: &Visitor,
    ) -> Result<(), Box<Refusal>> {
        let Some(access) = &self.door.access else { return Ok(()) };
        // The upstream of the route decides by the client's own credentials, which are not castier's.
        if routed.as_ref().is_some_and(|found| found.is_private() || has_ticket(&head.method, found)) {
            return Ok(());
        }
        let path;
        let route;
        let (needed, what) = match &routed {
            Some(found) if !found.is_entry() => {
                route = found.route.clone();
                (needed(&head.method, is_batch(&head.method, found)), What::Route { name: route.label(), protocol: route.protocol() })
            }
            _ => match head.target(bytes) {
                Target::Blob(_) | Target::Malformed(_) | Target::Collection => (needed(&head.method, false), What::Blobs),
                Target::Other => {
                    path = entry_path(head.path(bytes));
                    (needed(&head.method, false), path.as_deref().map_or(What::Other, What::Entry))
                }
            },
        };
        let who = match head.authorization(bytes) {
            Some(authorization) => match memo.recall(access, authorization) {
                Some(who) => who,
                None => {
                    let since = Instant::now();
                    match Box::pin(access.identify(authorization, client.counted)).await {
                        Ok(who) => {
                            memo.keep(authorization, &who);
                            who
                        }
                        Err(refused) => {
                            let Explained { status, detail, why, retry_after } = explain(&refused);
                            let reply = match retry_after {
                                _ if status == StatusCode::UNAUTHORIZED => challenge(head, bytes, detail),
                                Some(wait) => too_many(wait, detail),
                                None => Reply::error(status, detail),
                            };
                            return Err(Box::new(Refusal { since, ..*refusal(reply, why, client, routed.as_deref()) }));
                        }
                    }
                }
            },
            None => match &visitor.certificate {
                Some(certified) if self.door.tls.as_ref().is_some_and(|tls| certified.is_trusted(tls)) => certified.who().clone(),
                Some(_) => {
                    access.metrics().wrong_credentials();
                    let reply = challenge(head, bytes, "the certificate of this connection is not accepted any more; connect again");
                    return Err(Box::new(Refusal {
                        closes: true,
                        ..*refusal(reply, "the certificate has ended", client, routed.as_deref())
                    }));
                }
                None => access.anonymous().clone(),
            },
        };
        if who.may(needed, what) {
            if let Some(found) = &mut routed
                && !who.may(Role::Write, what)
            {
                let status = if who.name().is_empty() { StatusCode::UNAUTHORIZED } else { StatusCode::FORBIDDEN };
                found.no_uploads = Some(status);
            }
            return Ok(());
        }
        let (reply, why) = if who.name().is_empty() {
            access.metrics().missing();
            (challenge(head, bytes, MISSING), "no credentials")
        } else {
            access.metrics().role();
            let detail = format!("these credentials do not suffice: {} needs the role {needed} for this", head.method);
            (Reply::error(StatusCode::FORBIDDEN, &detail), "the role does not suffice")
        };
        Err(refusal(reply, why, client, routed.as_deref()))
    }
}

/// The refusal of a request, in the form that the clients of its route read.
fn refusal(reply: Reply, why: &'static str, client: Client, routed: Option<&Match>) -> Box<Refusal> {
    let reply = if let Some(found) = routed { found.error(reply) } else { reply };
    Box::new(Refusal { reply, why, client, closes: false, since: Instant::now() })
}

impl Certified {
    pub(crate) fn new(shown: Certificate, access: &Access) -> Self {
        Self { who: access.certificate(&shown.name), shown }
    }

    pub(crate) const fn who(&self) -> &Arc<Who> {
        &self.who
    }

    /// Whether the certificate of this open connection still counts.
    pub(crate) fn is_trusted(&self, tls: &Tls) -> bool {
        tls.trusts(&self.shown)
    }
}

/// What is wanted of a client without credentials.
pub(crate) const MISSING: &str = "this needs credentials: a user and a password (Basic), a token (Bearer), or a certificate";

/// How a refusal is answered.
pub(crate) struct Explained {
    pub(crate) status: StatusCode,
    /// For the client.
    pub(crate) detail: &'static str,
    /// For the access record.
    pub(crate) why: &'static str,
    pub(crate) retry_after: Option<Duration>,
}

pub(crate) fn explain(refused: &Refused) -> Explained {
    match *refused {
        Refused::Wrong => Explained {
            status: StatusCode::UNAUTHORIZED,
            detail: "these credentials are not accepted",
            why: "wrong credentials",
            retry_after: None,
        },
        Refused::TooMany { retry_after } => Explained {
            status: StatusCode::TOO_MANY_REQUESTS,
            detail: "too many wrong credentials came from this address; try again later",
            why: "too many wrong credentials",
            retry_after: Some(retry_after),
        },
        Refused::Busy => Explained {
            status: StatusCode::SERVICE_UNAVAILABLE,
            detail: "too many passwords are being checked; try again in a second",
            why: "too many passwords at once",
            retry_after: None,
        },
    }
}

/// The role that a method needs. `reads`: a POST that asks for many things at once.
fn needed(method: &Method, reads: bool) -> Role {
    match *method {
        _ if reads => Role::Read,
        Method::GET | Method::HEAD | Method::OPTIONS => Role::Read,
        Method::DELETE => Role::Admin,
        _ if method.as_str() == "PROPFIND" => Role::Read,
        _ => Role::Write,
    }
}

/// The decoded path of an entry; `None` if it is no entry's.
fn entry_path(path: &str) -> Option<String> {
    match Entry::of(path)?.ok()? {
        Entry::Action(name) | Entry::Value(name) | Entry::Collection(name) => Some(name.as_str().to_owned()),
    }
}

fn challenge(head: &Head, bytes: &[u8], detail: &str) -> Reply {
    let mut reply = Reply::error(StatusCode::UNAUTHORIZED, detail);
    // Container clients look for the second header, and follow the first challenge that they know.
    let is_registry = head.path(bytes).starts_with("/v2/");
    if is_registry {
        reply.headers.insert("docker-distribution-api-version", HeaderValue::from_static("registry/2.0"));
    }
    reply.headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"castier\""));
    if !is_registry {
        reply.headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"castier\""));
    }
    reply
}

/// A 429.
pub(crate) fn too_many(wait: Duration, detail: &str) -> Reply {
    let mut reply = Reply::error(StatusCode::TOO_MANY_REQUESTS, detail);
    reply.headers.insert(header::RETRY_AFTER, seconds(wait));
    reply
}

/// The value of `Retry-After`: whole seconds, rounded up, and at least one.
pub(crate) fn seconds(wait: Duration) -> HeaderValue {
    HeaderValue::from((wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).max(1))
}
