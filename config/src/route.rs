//! The sections `[[route]]`.

use crate::{
    Cluster, Listen, Peer, Problems, Size, Span,
    address::Address,
    check::{check_base_url, check_size, own_address},
    file::read_secret,
    value::path_text,
};
use serde::{Deserialize, Deserializer, Serialize};
use std::path::{Path, PathBuf};
use url::Host;
use zeroize::Zeroizing;

/// Other protocols and stores whose answers castier keeps: container images, packages, models. Write the section once for each route. The
/// first route that matches a request gets it.
///
/// A route has a `protocol`, which brings the paths of that protocol and what is true of them, or it has a `path` and a `kind` of its own.
/// Messages and variables count the routes from 0: `CASTIER_ROUTE__0__UPSTREAM` sets `upstream` of the first one, `CASTIER_ROUTE__1__UPSTREAM`
/// that of the second one. A variable can also add a route after the last one of the file, but no number may be left out. A variable for a
/// list has its items with commas between them. SIGHUP does not change routes. There are none by default: only you know the upstreams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Route {
    /// The protocol that the clients of this route speak. Empty: none, and the route has a `path` and a `kind`.
    ///
    /// It brings the rules of the protocol: which paths name what, which headers count, which links castier rewrites. The other keys of the
    /// route hold for all these rules.
    ///
    /// - Type: `oci`, `lfs`, `nix`, `debian`, `cargo`, `pypi`, `npm`, `go`, `huggingface` or `bazel`
    pub protocol: String,
    /// The paths that the route is for, such as `/files/{name*}/{sha256}`. Empty with a protocol.
    ///
    /// `{name}` is one part of the path between slashes, or a piece of it. `{name*}` is one or more of them. `{sha256}` is a SHA-256 in 64
    /// lowercase hexadecimal characters, `{nix32}` one in Nix's base 32, and `{sha1}` a git commit. It has no default: only you know the paths.
    ///
    /// - Type: path template
    pub path: String,
    /// The server that castier asks for what it does not keep: `http://HOST:PORT` or `https://HOST`.
    ///
    /// It has no default: each route needs one. With a protocol a base path may follow, such as `https://files.example/debian`. Without one
    /// a path with the variables of `route.path` may follow, such as `https://static.example/crates/{crate}/{version}/download`; if none
    /// does, castier asks for the path of the request. The URL must not lead to castier itself, and has no user and no password:
    /// `route.credentials` is for these. This address may be a private one.
    ///
    /// - Type: URL
    pub upstream: String,
    /// Only requests with this `Host` are for the route. Empty: all.
    ///
    /// Write it as clients send it: with the port, unless that is 80 or 443. The case does not matter. The default is for a castier with one
    /// name, whose routes differ in their paths.
    ///
    /// - Type: HOST or HOST:PORT
    pub host: String,
    /// What the paths of the route begin with, such as `/npm`. castier removes it before it asks the upstream. Empty: nothing.
    ///
    /// castier adds it to the links that it rewrites. The default leaves the paths as the protocol has them, which container runtimes need.
    ///
    /// - Type: path without / at its end
    pub prefix: String,
    /// For `oci`: the registry that the route is for, such as `docker.io`. Empty: all.
    ///
    /// castier compares it with `?ns=` of the request, which containerd sends. A request without that must have it as the first part of the
    /// image's name, which castier then removes. The default is for a castier with one registry behind it.
    ///
    /// - Type: name of a registry
    pub namespace: String,
    /// How long what the path names stays the same. Needed with a path; with a protocol each rule has its own.
    ///
    /// `blob`: the path names the SHA-256 of the body, as `{sha256}` or `{nix32}`. `frozen`: what a name once had, it has for ever. `fresh`:
    /// it may change. It has no default: a wrong one would serve old content, or ask the upstream for each request.
    ///
    /// - Type: `blob`, `frozen` or `fresh`
    pub kind: Option<RouteKind>,
    /// Who decides which client may read: the upstream, by the client's own credentials (`upstream`), or castier (`local`).
    ///
    /// With `upstream`, castier serves what it keeps only to clients whose credentials the upstream has accepted in the same repository
    /// within `route.proof_ttl`. In a cluster the credentials travel between nodes, so that needs `cluster.tls`, or all nodes on the loopback.
    /// With `local`, castier's own users (`[access]`) may read, and castier's credentials go to the upstream. The default never shows a client what the
    /// upstream would not show to it.
    ///
    /// - Type: `upstream` or `local`
    pub access: RouteAccess,
    /// How long castier believes that a client's credentials are good, before it asks the upstream again. 0: it asks for each request.
    ///
    /// It is also the longest time that a client can read after the upstream has revoked its credentials. With the default a client that
    /// pulls an image costs the upstream one question.
    ///
    /// - Type: duration up to 24h
    pub proof_ttl: Span,
    /// Hosts that the upstream may redirect or link to, such as `cdn.example` or `*.cdn.example:8443`. castier follows, the client does not.
    ///
    /// `*.` stands for one or more labels in front. Without a port the target has the usual port of its scheme. Links to other hosts stay as
    /// they are. A private address is refused unless it is listed here. Credentials of the upstream do not go there. The default is none:
    /// only you know which hosts belong to the upstream.
    ///
    /// - Type: list of HOST or HOST:PORT
    pub redirects: Vec<String>,
    /// For what may change: how long castier does not ask the upstream again, in place of what protocol and upstream say. Not set: as they say.
    ///
    /// After it castier asks with a condition, which is cheap. 0: castier asks for each request. The upstream knows best how often its
    /// content changes, so there is no default.
    pub ttl: Option<Span>,
    /// For what may change: how long an answer that is no longer fresh is still better than none. 0: never.
    ///
    /// castier serves it when the upstream cannot be reached, or answers 429 or 5xx. The default lasts over a night in which the upstream is down.
    pub stale_if_error: Span,
    /// How long castier remembers that the upstream has no such thing (404 or 410). 0: it does not remember that.
    ///
    /// With the default a storm of requests for something missing costs the upstream one request a second, and what somebody publishes
    /// appears soon.
    pub negative_ttl: Span,
    /// Whether the query (what is behind `?`) is part of the name (`key`) or not (`ignore`).
    ///
    /// The upstream gets it in both cases. The default is right for each upstream. `ignore` is for queries that do not change the answer,
    /// such as signatures.
    ///
    /// - Type: `key` or `ignore`
    pub query: RouteQuery,
    /// Request headers that choose between answers of one name, such as `accept`. A protocol has its own beside them.
    ///
    /// castier also follows the `Vary` of the upstream. At most 16 of them; credentials are never part of a name. The default is none: each
    /// header here means more copies.
    ///
    /// - Type: list of header names
    pub vary: Vec<String>,
    /// A response header with the SHA-256 of the body, such as `docker-content-digest`. castier checks the body against it. Empty: none.
    ///
    /// It is for `frozen` and `fresh`; the path of a `blob` has the digest. A protocol has its own. The default is none, since most servers
    /// send no such header.
    ///
    /// - Type: header name
    pub digest_header: String,
    /// The largest body that castier takes from the upstream.
    ///
    /// `limits.max_blob` bounds it too. The default is the same as there.
    ///
    /// - Type: size over 0
    pub max_body: Size,
    /// For `nix`: the `Priority` in `nix-cache-info`, in place of the upstream's. The lower number is asked first. Not set: the upstream's.
    ///
    /// With a lower number than that of the upstream itself, Nix asks castier first. There is no default, so that the file passes through
    /// unchanged.
    pub priority: Option<u32>,
    /// How many requests a second castier may send to this upstream. As many may come at once. 0: no limit.
    ///
    /// Registries that count requests answer 429 over their limit. A hit that needs no question does not count. Each node has the limit for
    /// itself. The default leaves it to the upstream.
    pub upstream_rate: u32,
    /// `[route.credentials]`.
    #[serde(deserialize_with = "credentials")]
    pub credentials: Option<RouteCredentials>,
}

impl Default for Route {
    fn default() -> Self {
        Self {
            protocol: String::new(),
            path: String::new(),
            upstream: String::new(),
            host: String::new(),
            prefix: String::new(),
            namespace: String::new(),
            kind: None,
            access: RouteAccess::Upstream,
            proof_ttl: Span::secs(60),
            redirects: Vec::new(),
            ttl: None,
            stale_if_error: Span::secs(24 * 60 * 60),
            negative_ttl: Span::secs(1),
            query: RouteQuery::Key,
            vary: Vec::new(),
            digest_header: String::new(),
            max_body: Size::gib(16),
            priority: None,
            upstream_rate: 0,
            credentials: None,
        }
    }
}

impl Route {
    /// A route with every key. It shows the type of each; together they make no sense.
    pub(crate) fn complete() -> Self {
        Self {
            kind: Some(RouteKind::Blob),
            credentials: Some(RouteCredentials::default()),
            ttl: Some(Span::secs(0)),
            priority: Some(0),
            ..Self::default()
        }
    }
}

/// How long what a path names stays the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// The path names the SHA-256 of the body.
    Blob,
    /// Immutable by name.
    Frozen,
    /// Mutable.
    Fresh,
}

/// Whose credentials decide which client may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteAccess {
    /// The client's own, at the upstream.
    Upstream,
    /// castier decides who comes in, and has credentials of its own at the upstream, or none.
    Local,
}

/// What the query of a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteQuery {
    /// It is part of the name.
    Key,
    /// It is not.
    Ignore,
}

/// castier's own credentials at the upstream of the route above, for `access = "local"` only. Set one of the three files. Without this section
/// castier has no credentials there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RouteCredentials {
    /// The user to whom the password in `password_file` belongs. Only with that.
    ///
    /// Credentials are for `access = "local"`. castier sends them to the upstream, and to the server that the upstream names for getting tokens
    /// if that is at the upstream's own host and port, or in `redirects`. They are in files, so that anybody may read this configuration. The
    /// default is none: castier asks the upstream anonymously.
    pub username: String,
    /// A file with the password of that user, in one line.
    #[serde(serialize_with = "path_text")]
    pub password_file: PathBuf,
    /// A file with a token, in one line, which castier sends as `Authorization: Bearer`.
    #[serde(serialize_with = "path_text")]
    pub token_file: PathBuf,
    /// A file with names and passwords for several hosts, as curl and Nix use it.
    #[serde(serialize_with = "path_text")]
    pub netrc_file: PathBuf,
}

/// Credentials in which nothing is set are none.
fn credentials<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RouteCredentials>, D::Error> {
    Ok(Option::<RouteCredentials>::deserialize(deserializer)?.filter(|credentials| *credentials != RouteCredentials::default()))
}

impl RouteCredentials {
    /// The secret in the file that is set: the password, the token, or the whole text of the netrc file.
    ///
    /// # Errors
    /// A text that says what is wrong with the file, and never what is in it.
    pub fn secret(&self) -> Result<Zeroizing<String>, String> {
        match self.set_files().next() {
            Some((name, file)) => secret(name, file),
            None => Err("there is no file with credentials".into()),
        }
    }

    fn set_files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let files = [("password_file", &self.password_file), ("token_file", &self.token_file), ("netrc_file", &self.netrc_file)];
        files.map(|(name, file)| (name, file.as_path())).into_iter().filter(|(_, file)| !file.as_os_str().is_empty())
    }
}

fn secret(name: &str, file: &Path) -> Result<Zeroizing<String>, String> {
    let shown = file.display();
    let right = match name {
        "password_file" => "the password alone",
        "token_file" => "the token alone",
        _ => "lines such as \"machine HOST login NAME password PASSWORD\"",
    };
    let text =
        read_secret(file).map_err(|error| format!("{shown} cannot be read as text ({error}); name a file that this user may read"))?;
    if text.trim().is_empty() {
        return Err(format!("{shown} is empty; write {right} into it"));
    }
    if name == "netrc_file" {
        return Ok(text);
    }
    // A space at the end may be part of a password. The end of the line is not.
    let line = text.trim_end_matches(['\r', '\n']);
    if line.contains(['\r', '\n']) {
        return Err(format!("{shown} has more than one line; write {right} into it"));
    }
    if name == "token_file" && !line.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("{shown} has characters that no header can hold; write {right} into it, in visible ASCII without spaces"));
    }
    Ok(Zeroizing::new(line.to_owned()))
}

/// The protocols that a route may name.
const PROTOCOLS: [&str; 10] = ["oci", "lfs", "nix", "debian", "cargo", "pypi", "npm", "go", "huggingface", "bazel"];
/// The most routes. The program compares each with each.
const MOST_ROUTES: usize = 1000;
/// The most headers that may choose between answers.
const MOST_VARY: usize = 16;
/// For this long a client may go on reading after the upstream has revoked its credentials.
const LONGEST_PROOF: Span = Span::secs(24 * 60 * 60);

/// Checks the sections `[[route]]`. The program checks templates, and whether two routes can match one request: it knows templates.
pub(crate) fn check_routes(routes: &[Route], listen: &Listen, cluster: Option<&Cluster>, problems: &mut Problems) {
    if routes.len() > MOST_ROUTES {
        problems.add("route", format!("is there {} times; write at most {MOST_ROUTES} routes", routes.len()));
        return;
    }
    for (number, route) in routes.iter().enumerate() {
        let section = format!("route[{number}]");
        let key = |name: &str| format!("{section}.{name}");
        check_paths(route, &section, problems);
        check_upstream(route, &key("upstream"), listen, cluster, problems);
        check_access(route, &key, problems);
        check_names(route, &key, problems);
        check_size(&key("max_body"), route.max_body, problems);
    }
    if let Some(cluster) = cluster {
        check_credentials_between_nodes(routes, listen, cluster, problems);
    }
}

/// A route has a protocol, or a path and a kind.
fn check_paths(route: &Route, section: &str, problems: &mut Problems) {
    let Route { protocol, path, kind, priority, namespace, .. } = route;
    let key = |name: &str| format!("{section}.{name}");
    // A value that could not be read has its default by now. That is a problem of its own, and the value counts as set.
    let is_absent = |name: &str, problems: &Problems| problems.are_sound(&[&key(name)]);
    if !protocol.is_empty() {
        if !PROTOCOLS.contains(&protocol.as_str()) {
            problems.add(key("protocol"), format!("{protocol:?} is not a protocol; write one of {}", PROTOCOLS.join(", ")));
        }
        if !path.is_empty() {
            problems.add(key("path"), "is set beside protocol, which brings its own paths; leave one of them out");
        }
        if kind.is_some() {
            problems.add(key("kind"), "is set beside protocol, whose paths have kinds of their own; leave one of them out");
        }
    } else if !path.is_empty() {
        check_path(path, *kind, &key("path"), problems);
        if kind.is_none() && is_absent("kind", problems) {
            problems.add(key("kind"), "is missing; a path without a protocol needs it: write \"blob\", \"frozen\" or \"fresh\"");
        }
    } else if is_absent("protocol", problems) && is_absent("path", problems) {
        problems.add(
            section,
            "has neither a protocol nor a path; write protocol = \"oci\", for example, or path = \"/files/{name*}\" and a kind",
        );
    }
    if !namespace.is_empty() && protocol != "oci" && is_absent("protocol", problems) {
        problems.add(key("namespace"), "is only for protocol = \"oci\"; leave it out");
    } else if !namespace.is_empty() && !is_host(namespace) {
        problems.add(key("namespace"), format!("{namespace:?} is not the name of a registry; write one such as \"docker.io\""));
    }
    if priority.is_some() && protocol != "nix" && is_absent("protocol", problems) {
        problems.add(key("priority"), "is only for protocol = \"nix\"; leave it out");
    }
}

fn check_path(path: &str, kind: Option<RouteKind>, key: &str, problems: &mut Problems) {
    if !path.starts_with('/') || path.contains(['?', '#']) {
        problems.add(
            key,
            format!("{path:?} is not a path; write one that begins with /, such as \"/files/{{name*}}\", without a query or a fragment"),
        );
    } else if kind == Some(RouteKind::Blob) && !["{sha256}", "{nix32}"].iter().any(|digest| path.contains(digest)) {
        problems.add(key, "names no SHA-256, which kind = \"blob\" needs; write {sha256} or {nix32} into it, or another kind");
    }
}

fn check_upstream(route: &Route, key: &str, listen: &Listen, cluster: Option<&Cluster>, problems: &mut Problems) {
    const RIGHT: &str = "write \"https://HOST\" or \"http://HOST:PORT\"";
    let Route { upstream, protocol, .. } = route;
    if upstream.is_empty() {
        if problems.are_sound(&[key]) {
            problems.add(key, format!("is missing; {RIGHT}"));
        }
        return;
    }
    match check_base_url(upstream) {
        Err(why) => problems.add(key, format!("{why}; {RIGHT}, with a path behind it if it needs one; for log-ins there is credentials")),
        Ok(_) if !protocol.is_empty() && upstream.contains(['{', '}']) => {
            problems.add(
                key,
                format!("has a variable, and the protocol has its own paths; {RIGHT}, with a base path behind it if it needs one"),
            );
        }
        Ok(url) => {
            if let Some((own, address)) = own_address(&url, listen, cluster) {
                problems.add(key, format!("leads to castier itself, which takes {address} as {own}; write the upstream's address"));
            }
        }
    }
}

fn check_access(route: &Route, key: &impl Fn(&str) -> String, problems: &mut Problems) {
    let is_sound = problems.are_sound(&[&key("access")]);
    if route.access == RouteAccess::Upstream && is_sound {
        if route.credentials.is_some() {
            problems.add(
                key("credentials"),
                "is set, but with access = \"upstream\" the clients' own credentials count; write access = \"local\", or leave it out",
            );
        }
        problems.note(key("access"), "with \"upstream\" the upstream decides who may read here, by the credentials that each client sends");
    }
    if let Some(credentials) = &route.credentials {
        check_credentials(credentials, key, problems);
    }
    let proof_ttl = route.proof_ttl;
    if proof_ttl > LONGEST_PROOF {
        problems.add(
            key("proof_ttl"),
            format!("{proof_ttl} is more than 24h; a client could read for as long after its credentials were revoked; write 24h or less"),
        );
    }
}

fn check_credentials(credentials: &RouteCredentials, key: &impl Fn(&str) -> String, problems: &mut Problems) {
    let files: Vec<_> = credentials.set_files().collect();
    if files.len() > 1 {
        let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
        problems.add(key("credentials"), format!("has {}; write one of them, and leave the rest out", names.join(" and ")));
    }
    let (name, user) = (&credentials.username, key("credentials.username"));
    let has_password = !credentials.password_file.as_os_str().is_empty();
    if has_password && name.is_empty() && problems.are_sound(&[&user]) {
        problems.add(user, "is missing; write whose password is in password_file");
    } else if !has_password && !name.is_empty() && problems.are_sound(&[&key("credentials.password_file")]) {
        problems.add(user, "is set without password_file; add that, or leave it out");
    } else if name.contains(|c: char| c == ':' || c.is_control()) {
        problems.add(user, "has a colon or a control character, which Basic authentication cannot send; write another name");
    }
    for (name, file) in files.into_iter().filter(|_| problems.ask_machine()).collect::<Vec<_>>() {
        if let Err(why) = secret(name, file) {
            problems.add(key(&format!("credentials.{name}")), why);
        }
    }
}

/// Names of hosts, of headers, and the prefix.
fn check_names(route: &Route, key: &impl Fn(&str) -> String, problems: &mut Problems) {
    let Route { host, prefix, redirects, vary, digest_header, .. } = route;
    if !host.is_empty() && !is_host(host) {
        problems.add(
            key("host"),
            format!("{host:?} is not what clients send as Host; write HOST or HOST:PORT, such as \"cache.example\", or \"\" for all"),
        );
    }
    if !prefix.is_empty() && !is_prefix(prefix) {
        problems.add(
            key("prefix"),
            format!("{prefix:?} is not the beginning of a path; write one such as \"/npm\", without / at its end, or \"\" for none"),
        );
    }
    for host in redirects.iter().filter(|host| !is_target(host)) {
        problems.add(
            key("redirects"),
            format!("{host:?} is not a host; write HOST or HOST:PORT, such as \"cdn.example\" or \"*.cdn.example:8443\""),
        );
    }
    if vary.len() > MOST_VARY {
        problems.add(key("vary"), format!("has {} headers; write at most {MOST_VARY}", vary.len()));
    }
    for name in vary {
        // `*` is a token too. As a `Vary` it means that no answer is for a second request.
        if !is_header_name(name) || name == "*" {
            problems.add(key("vary"), format!("{name:?} is not the name of a header; write one such as \"accept\""));
        } else if ["authorization", "proxy-authorization", "cookie"].iter().any(|secret| name.eq_ignore_ascii_case(secret)) {
            problems.add(
                key("vary"),
                format!("{name:?} has credentials, which are never part of a name; leave it out: access says whose credentials count"),
            );
        }
    }
    if !digest_header.is_empty() && !is_header_name(digest_header) {
        problems.add(
            key("digest_header"),
            format!("{digest_header:?} is not the name of a header; write one such as \"docker-content-digest\", or \"\" for none"),
        );
    }
}

/// Clients' credentials travel between nodes, and must not do so in the clear.
fn check_credentials_between_nodes(routes: &[Route], listen: &Listen, cluster: &Cluster, problems: &mut Problems) {
    let Some(number) = routes.iter().position(|route| route.access == RouteAccess::Upstream) else { return };
    let access = format!("route[{number}].access");
    let is_sound = problems.are_sound(&[&access, "cluster.peers", "cluster.dns", "cluster.advertise", "listen.peer"]);
    if is_sound && !cluster.tls.is_on() && !is_on_loopback(listen, cluster) {
        problems.add(
            "cluster.tls",
            format!(
                "is missing, and with {access} = \"upstream\" clients' credentials travel between the nodes; write cert_file, key_file and \
                 ca_file below [cluster.tls], or access = \"local\", or let all nodes be on the loopback"
            ),
        );
    }
}

/// Whether all nodes are on the loopback, as far as the configuration tells.
fn is_on_loopback(listen: &Listen, cluster: &Cluster) -> bool {
    let is_here = |peer: &Peer| peer.host == "localhost" || peer.ip().is_some_and(|ip| ip.is_loopback());
    let leads_here = |text: &str| text.parse().is_ok_and(|peer| is_here(&peer));
    Address::parse(&listen.peer).is_some_and(|address| address.is_on_loopback())
        && leads_here(&cluster.advertise)
        && cluster.peers.iter().all(is_here)
        && (cluster.dns.is_empty() || leads_here(&cluster.dns))
}

/// A token of RFC 9110, section 5.6.2.
fn is_header_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

/// `HOST` or `HOST:PORT` as headers and URLs have it: a name in ASCII, an IPv4 address, or an IPv6 address in brackets.
fn is_host(text: &str) -> bool {
    parse_host(text).is_some()
}

fn parse_host(text: &str) -> Option<Host> {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    let has_names_only = host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._[]:".contains(&byte));
    // Parsing turns some texts into addresses that no client writes that way, such as 127.1.
    let is_as_sent = |parsed: &Host| parsed.to_string().eq_ignore_ascii_case(host);
    Host::parse(host).ok().filter(is_as_sent).filter(|_| has_names_only && port.is_none_or(is_port))
}

/// `HOST`, `HOST:PORT`, and both with `*.` in front of a name.
fn is_target(text: &str) -> bool {
    match text.strip_prefix("*.") {
        Some(name) => parse_host(name).is_some_and(|host| matches!(host, Host::Domain(_))),
        None => is_host(text),
    }
}

/// Whole segments, as a request has them.
fn is_prefix(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_graphic() && !b"?#\\{}".contains(&byte);
    let is_segment = |segment: &str| !matches!(segment, "" | "." | "..") && segment.bytes().all(is_plain);
    text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_segment))
}
