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
use castier_serverkit::tls::Tls;
use castier_wire::{Target, entry::Entry};
use http::{HeaderValue, Method, StatusCode, header};
use pingora::protocols::Stream;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
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
            Some(Arc::new(Access::new(options, users(config).map_err(|(key, why)| format!("{key}: {why}"))?, metrics.access.clone())))
        } else {
            None
        };
        Ok(Self { tls, access, clients: Arc::new(Clients::new(limits(&config.limits))), metrics: metrics.access.clone() })
    }

    /// The entrance of the public listener.
    pub fn entrance(&self, config: &Castier) -> Entrance {
        let Self { tls, access, clients, metrics } = self.clone();
        Entrance { tls, proxy_protocol: config.listen.proxy_protocol, proxies: proxies(config), access, clients, metrics }
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
        if let Some(access) = &self.access {
            match users(config) {
                Ok(users) => access.reload(users),
                Err((key, why)) => tracing::error!(key, why, "users and tokens stay as they are"),
            }
        }
    }
}

/// The proxies that may name a client.
pub fn proxies(config: &Castier) -> Proxies {
    Proxies(config.listen.trusted_proxies.0.iter().chain(&config.log.trusted_proxies.0).copied().collect())
}

/// The limits per client address.
pub fn limits(limits: &Limits) -> castier_access::Limits {
    castier_access::Limits {
        requests_per_second: limits.requests_per_second,
        connections_per_client: limits.connections_per_client,
        bandwidth_per_client: limits.bandwidth_per_client.get(),
    }
}

/// The users and tokens, or the key that is at fault and why.
fn users(config: &Castier) -> Result<Users, (&'static str, String)> {
    let access = &config.access;
    let files = [("access.htpasswd_file", &access.htpasswd_file), ("access.tokens_file", &access.tokens_file)];
    let [htpasswd, tokens] = files.map(|(_, file)| Some(file.as_path()).filter(|file| !file.as_os_str().is_empty()));
    Users::read(&Sources { htpasswd, tokens, role: access.users, scopes: &access.scopes.0 }).map_err(|why| {
        let at_fault = files.iter().find(|(_, file)| !file.as_os_str().is_empty() && why.starts_with(&format!("{}: ", file.display())));
        (at_fault.map_or("access.scopes", |(key, _)| key), why)
    })
}

/// Checks the files of users and tokens, and the scopes.
pub fn check(config: &Castier, problems: &mut Problems) {
    if problems.ask_machine()
        && let Err((key, why)) = users(config)
    {
        problems.add(key, why);
    }
}

/// What stands at the door of the public listener.
pub struct Entrance {
    /// `None`: plain HTTP.
    pub tls: Option<Arc<Tls>>,
    /// Whether connections begin with a PROXY header.
    pub proxy_protocol: bool,
    /// The proxies that may name a client.
    pub proxies: Proxies,
    /// `None`: everybody may do everything.
    pub access: Option<Arc<Access>>,
    /// The limits per client address.
    pub clients: Arc<Clients>,
    pub(crate) metrics: Arc<castier_access::Metrics>,
}

/// A connection that may send requests.
pub(crate) struct Entered {
    pub(crate) stream: Stream,
    /// The client's address, or that of a proxy which names the client in each request.
    pub(crate) address: Option<SocketAddr>,
    /// Who the client is by its certificate.
    pub(crate) certificate: Option<Arc<Who>>,
    /// It counts for its client until it closes.
    pub(crate) counted: Option<Connection>,
    /// TLS has agreed on HTTP/2.
    pub(crate) is_http2: bool,
}

impl Entered {
    /// A peer's connection, which the peer listener has secured.
    pub(crate) fn peer(stream: Stream) -> Self {
        let address = address_of(&stream);
        Self { stream, address, certificate: None, counted: None, is_http2: false }
    }
}

fn address_of(stream: &Stream) -> Option<SocketAddr> {
    stream.get_socket_digest()?.peer_addr()?.as_inet().copied()
}

/// Why there is none.
pub(crate) enum Closed {
    /// The client speaks plain HTTP where TLS is spoken.
    Plain(Stream),
    /// Its address has too many connections. The stream is `None` if an answer would need a handshake.
    TooMany(Option<Stream>),
    /// There is nobody to answer. The text is for the log.
    Silently(String),
}

impl Entrance {
    /// Whether every request may pass unseen.
    pub(crate) fn is_open(&self, limits: &Limits) -> bool {
        self.access.is_none() && limits.requests_per_second == 0
    }

    /// Lets a connection in. Its PROXY header and its handshake may each take `limits.header_timeout`.
    pub(crate) async fn enter(&self, stream: Stream, limits: &Limits) -> Result<Entered, Closed> {
        let limit = limits.header_timeout.get();
        let mut address = address_of(&stream);
        let mut stream = stream;
        if self.proxy_protocol {
            let is_trusted = address.is_some_and(|address| self.proxies.contains(&address.ip()));
            if !is_trusted {
                return Err(Closed::Silently("listen.proxy_protocol is on, and this is none of listen.trusted_proxies".into()));
            }
            let (behind, client) = proxy_protocol::read(stream, limit).await.map_err(Closed::Silently)?;
            stream = behind;
            address = client.or(address);
        }
        let counted = match address.map(|address| address.ip().to_canonical()) {
            // A proxy's own connections carry many clients.
            Some(ip) if !self.proxies.contains(&ip) => {
                let Some(counted) = self.clients.connect(ip) else {
                    self.metrics.connections();
                    return Err(Closed::TooMany(Some(stream).filter(|_| self.tls.is_none())));
                };
                Some(counted)
            }
            _ => None,
        };
        let (mut certificate, mut is_http2) = (None, false);
        if let Some(tls) = &self.tls {
            match secured::accept(tls.acceptor(), stream, limit).await {
                Ok((secured, handshake)) => {
                    (stream, is_http2) = (secured, handshake.is_http2);
                    certificate = handshake.certificate.zip(self.access.as_ref()).map(|(name, access)| access.certificate(&name));
                }
                Err(Failed::Plain(stream)) => return Err(Closed::Plain(stream)),
                Err(Failed::Handshake(why)) => return Err(Closed::Silently(format!("the TLS handshake failed: {why}"))),
            }
        }
        Ok(Entered { stream, address, certificate, counted, is_http2 })
    }

    /// Decides about a request, whose head is at the front of `bytes`. Returns the name of who sent it; `None` for an anonymous client.
    ///
    /// # Errors
    /// The answer for the client, and the reason for the access record.
    pub(crate) async fn check(
        &self,
        memo: &mut Memo,
        head: &Head,
        bytes: &[u8],
        mut routed: Option<&mut Match>,
        client: Option<IpAddr>,
        certificate: Option<&Arc<Who>>,
    ) -> Result<Option<Arc<Who>>, Box<(Reply, &'static str)>> {
        if let Some(client) = client
            && let Err(wait) = self.clients.admit(client)
        {
            self.metrics.requests();
            return Err(Box::new((
                too_many(wait, "more requests than one client may send; try again later"),
                "over limits.requests_per_second",
            )));
        }
        let Some(access) = &self.access else { return Ok(None) };
        // The upstream of the route decides by the client's own credentials, which are not castier's.
        if routed.as_ref().is_some_and(|found| found.is_private() || has_ticket(&head.method, found)) {
            return Ok(None);
        }
        let path;
        let route;
        let (needed, what) = match &routed {
            Some(found) if !found.is_entry() => {
                route = found.route.clone();
                (needed(&head.method, is_batch(&head.method, found)), What::Route(route.label()))
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
                None => match Box::pin(access.identify(authorization, client)).await {
                    Ok(who) => {
                        memo.keep(authorization, &who);
                        who
                    }
                    Err(refused) => return Err(Box::new(self.refuse(&refused, head, bytes))),
                },
            },
            None => certificate.unwrap_or_else(|| access.anonymous()).clone(),
        };
        if who.may(needed, what) {
            if let Some(found) = &mut routed
                && !who.may(Role::Write, what)
            {
                let status = if who.name().is_empty() { StatusCode::UNAUTHORIZED } else { StatusCode::FORBIDDEN };
                found.no_uploads = Some(status);
            }
            return Ok(Some(who).filter(|who| !who.name().is_empty()));
        }
        Err(Box::new(if who.name().is_empty() {
            access.metrics().missing();
            (challenge(head, bytes, "this needs credentials: send a user and a password (Basic), or a token (Bearer)"), "no credentials")
        } else {
            access.metrics().role();
            let detail = format!("these credentials do not suffice: {} needs the role {needed} for this", head.method);
            (Reply::error(StatusCode::FORBIDDEN, &detail), "the role does not suffice")
        }))
    }

    fn refuse(&self, refused: &Refused, head: &Head, bytes: &[u8]) -> (Reply, &'static str) {
        match refused {
            Refused::Wrong => (challenge(head, bytes, "these credentials are not accepted"), "wrong credentials"),
            Refused::TooMany { retry_after } => {
                (too_many(*retry_after, "too many wrong credentials came from this address; try again later"), "too many wrong credentials")
            }
            Refused::Busy => {
                let detail = "too many passwords are being checked; try again in a second";
                (Reply::error(StatusCode::SERVICE_UNAVAILABLE, detail), "too many passwords at once")
            }
        }
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

fn too_many(wait: Duration, detail: &str) -> Reply {
    let mut reply = Reply::error(StatusCode::TOO_MANY_REQUESTS, detail);
    // In whole seconds, rounded up, and at least one.
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    reply.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
    reply
}
