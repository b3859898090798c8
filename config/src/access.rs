//! Who may come in: TLS at the listeners, users, tokens and roles.

use crate::{
    Castier, Listen, Malformed, Problems,
    address::Address,
    file::{first_byte, open},
    value::path_text,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// TLS 1.2 and 1.3 for clients. Without this section, or with no file, castier speaks plain HTTP.
///
/// castier reads the files again at SIGHUP and when they change. If a new pair cannot be used, the one before stays, and
/// `castier_tls_reload_failures_total` counts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListenTls {
    /// A PEM file with the certificate for clients and those between it and its root. Empty: no TLS.
    ///
    /// The default leaves TLS to a proxy in front, or does without it on one machine.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub cert_file: PathBuf,
    /// A PEM file with the private key of that certificate.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub key_file: PathBuf,
    /// More certificates, for other names: each `CERT_FILE KEY_FILE`, with a blank between.
    ///
    /// castier takes the one that has the name which the client asks for, and `cert_file` if none has it. The default is none: one certificate may
    /// have several names.
    ///
    /// - Type: list of CERT_FILE KEY_FILE
    /// - Live: content
    pub more: Vec<String>,
    /// A PEM file with the authorities that sign the certificates of clients. Empty: clients are not asked for one.
    ///
    /// Who shows one has the role of `access.certificates`. The authorities of the system do not count: anybody can get a certificate from them.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub client_ca_file: PathBuf,
    /// Whether a client without a certificate is refused in the handshake. It needs `listen.tls.client_ca_file`.
    ///
    /// Off by default: then one without may do what `access.anonymous` and its other credentials allow.
    pub client_required: bool,
    /// Whether the admin listener speaks TLS with the same certificates, too.
    ///
    /// Off by default: it is on the loopback, for the machine's own scraper.
    pub admin: bool,
}

impl ListenTls {
    /// Whether clients speak TLS.
    pub fn is_on(&self) -> bool {
        !self.cert_file.as_os_str().is_empty() || !self.key_file.as_os_str().is_empty()
    }

    /// The files, for the one who reads them.
    pub fn files(&self) -> TlsFiles {
        let first = TlsPair {
            cert_key: "listen.tls.cert_file".into(),
            cert_file: self.cert_file.clone(),
            key_key: "listen.tls.key_file".into(),
            key_file: self.key_file.clone(),
        };
        let more = self.more.iter().map(|pair| {
            let (cert, key) = pair.split_once(' ').unwrap_or((pair, ""));
            TlsPair {
                cert_key: "listen.tls.more".into(),
                cert_file: cert.trim().into(),
                key_key: "listen.tls.more".into(),
                key_file: key.trim().into(),
            }
        });
        let has_ca = !self.client_ca_file.as_os_str().is_empty();
        let clients = has_ca.then(|| TlsClients {
            key: "listen.tls.client_ca_file".into(),
            ca_file: self.client_ca_file.clone(),
            required: self.client_required,
        });
        TlsFiles { section: "listen.tls", pairs: std::iter::once(first).chain(more).collect(), clients }
    }
}

/// The files of TLS at one listener.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The section that names them.
    pub section: &'static str,
    /// The certificates of the server; the first is for clients that ask for an unknown name.
    pub pairs: Vec<TlsPair>,
    /// The authorities for the certificates of clients; `None`: clients are not asked for one.
    pub clients: Option<TlsClients>,
}

/// A certificate and its private key, and the keys that name their files.
#[derive(Clone, Debug)]
pub struct TlsPair {
    /// The key that names the certificate.
    pub cert_key: String,
    /// The certificate.
    pub cert_file: PathBuf,
    /// The key that names the private key.
    pub key_key: String,
    /// The private key.
    pub key_file: PathBuf,
}

/// How clients show certificates.
#[derive(Clone, Debug)]
pub struct TlsClients {
    /// The key that names the file.
    pub key: String,
    /// The authorities.
    pub ca_file: PathBuf,
    /// Whether a client without a certificate is refused.
    pub required: bool,
}

impl TlsFiles {
    /// All of them.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let pairs = self.pairs.iter().flat_map(|pair| [pair.cert_file.as_path(), pair.key_file.as_path()]);
        pairs.chain(self.clients.iter().map(|clients| clients.ca_file.as_path()))
    }
}

/// What somebody may do. Each role may do what those before it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Nothing.
    None,
    /// GET and HEAD.
    Read,
    /// PUT and POST.
    #[default]
    Write,
    /// DELETE, and the admin listener's purge.
    Admin,
}

impl Role {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let all = [Self::None, Self::Read, Self::Write, Self::Admin];
        let found = all.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| Malformed::new(format!("{text:?} is no role; write \"read\", \"write\" or \"admin\"")))
    }
}

/// Who may do what. `read` is GET and HEAD, `write` is PUT and POST as well, `admin` is DELETE as well.
///
/// Without users, tokens and client certificates everybody is anonymous. Then `write` allows DELETE too, where `allow_delete` does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Access {
    /// What a client without credentials may do: nothing (`none`), read (`read`), or read and store (`write`).
    ///
    /// Off the loopback castier refuses to start unless you set this key or `access.insecure`: a cache that anybody can write to lets them fill the
    /// disk and replace entries of `/ac`. The default is right for one machine.
    ///
    /// - Type: `none`, `read` or `write`
    pub anonymous: Role,
    /// A file of users for Basic authentication, as `htpasswd -B` writes it: bcrypt only. Empty: none.
    ///
    /// castier reads it again at SIGHUP. If it has a mistake then, the users before stay. There is no default: only you know your users.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub htpasswd_file: PathBuf,
    /// The role of the users in `access.htpasswd_file`, unless `access.scopes` gives another.
    ///
    /// The default is what a build machine needs.
    ///
    /// - Type: `read`, `write` or `admin`
    pub users: Role,
    /// A file of tokens for Bearer authentication: lines of `NAME ROLE SHA256-OF-THE-TOKEN`. Empty: none.
    ///
    /// `sha256sum` gives the last part (of the token without a newline). Lines that begin with `#` are comments. castier reads it again at SIGHUP, as the users.
    ///
    /// - Live: content
    #[serde(serialize_with = "path_text")]
    pub tokens_file: PathBuf,
    /// The role of a client that shows a certificate signed by `listen.tls.client_ca_file`. The name for `access.scopes` is its common name.
    ///
    /// The default lets machines read that have a certificate for other reasons.
    ///
    /// - Type: `read`, `write` or `admin`
    pub certificates: Role,
    /// What users, tokens and certificates are confined to, by their name: `{ pr-builds = ["read:*", "write:cas", "write:ac/pr"] }`. A name that is not here has the
    /// scopes of `*`, and without those it is not confined.
    ///
    /// Each item is `WHAT` or `ROLE:WHAT`. `WHAT` is `*` (everything), `cas`, `ac`, `ac/INSTANCE` (entries below `/INSTANCE/ac/`), `kv`, `kv/PATH`, or
    /// `route/NAME`, the name or the protocol of a route. Without `ROLE` it is that of the user or token. In a variable: `NAME=ITEM ITEM,NAME=ITEM`.
    pub scopes: Scopes,
    /// Whether the admin listener asks for the same users: everything there needs `read`, a purge and a drain need `admin`.
    ///
    /// Off by default, since it is on the loopback.
    pub admin: bool,
    /// With `access.admin`, whether `/metrics`, `/healthz` and `/readyz` are for everybody. On the loopback they are in any case.
    ///
    /// Off by default: metrics tell much about what is stored.
    pub open_probes: bool,
    /// Whether castier starts although listeners off the loopback are open to everybody: the public one without `access.anonymous`, the admin one
    /// without TLS or users.
    ///
    /// Off by default, so that nobody opens a cache to the world by one wrong address.
    pub insecure: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            anonymous: Role::Write,
            htpasswd_file: PathBuf::new(),
            users: Role::Write,
            tokens_file: PathBuf::new(),
            certificates: Role::Read,
            scopes: Scopes::default(),
            admin: false,
            open_probes: false,
            insecure: false,
        }
    }
}

impl Access {
    /// Whether somebody has credentials.
    pub fn has_users(&self, tls: &ListenTls) -> bool {
        [&self.htpasswd_file, &self.tokens_file, &tls.client_ca_file].iter().any(|file| !file.as_os_str().is_empty())
    }
}

/// What names are confined to. Read from a table of lists, or from a list of `NAME=ITEM ITEM`, and written as a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scopes(pub BTreeMap<String, Vec<String>>);

impl Serialize for Scopes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|(name, items)| format!("{name}={}", items.join(" "))))
    }
}

impl<'de> Deserialize<'de> for Scopes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Scopes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table such as { ci = [\"read:*\", \"write:ac/ci\"] }, or a list such as [\"ci=read:* write:ac/ci\"]")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Scopes, A::Error> {
                let mut scopes = BTreeMap::new();
                while let Some(text) = list.next_element::<String>()? {
                    let Some((name, items)) = text.split_once('=') else {
                        return Err(de::Error::custom(format!(
                            "{text:?} has no =; write NAME=ITEM ITEM, such as \"ci=read:* write:ac/ci\""
                        )));
                    };
                    scopes.insert(name.trim().to_owned(), items.split_whitespace().map(str::to_owned).collect());
                }
                Ok(Scopes(scopes))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> Result<Scopes, A::Error> {
                BTreeMap::deserialize(de::value::MapAccessDeserializer::new(table)).map(Scopes)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

pub(crate) fn check_access(config: &Castier, problems: &mut Problems) {
    let (access, tls) = (&config.access, &config.listen.tls);
    check_tls(tls, problems);
    check_proxies(&config.listen, problems);
    if access.anonymous == Role::Admin {
        problems.add("access.anonymous", "is \"admin\", which needs credentials; write \"none\", \"read\" or \"write\"");
    }
    for (key, role) in [("access.users", access.users), ("access.certificates", access.certificates)] {
        if role == Role::None {
            problems.add(key, "is \"none\", which is for those without credentials; write \"read\", \"write\" or \"admin\"");
        }
    }
    for (key, file) in [("access.htpasswd_file", &access.htpasswd_file), ("access.tokens_file", &access.tokens_file)] {
        if !file.as_os_str().is_empty()
            && problems.ask_machine()
            && let Err(error) = open(file)
        {
            problems.add(
                key,
                format!("{} cannot be read ({error}); name a file that castier may read, or write \"\" for none", file.display()),
            );
        }
    }
    if access.anonymous == Role::None && !access.has_users(tls) {
        problems.add(
            "access.anonymous",
            "is \"none\", and nobody has credentials: no request would be answered; set access.htpasswd_file, access.tokens_file or listen.tls.client_ca_file",
        );
    }
    if access.admin && !access.has_users(tls) {
        problems.add("access.admin", "is true, and nobody has credentials; set access.htpasswd_file or access.tokens_file");
    }
    if access.insecure {
        return;
    }
    let is_outside = |text: &str| Address::parse(text).is_some_and(|address| !address.is_on_loopback());
    if is_outside(&config.listen.public) && access.anonymous == Role::Write && !problems.is_set("access.anonymous") {
        problems.add(
            "access.anonymous",
            format!(
                "is not set, and listen.public = {:?} can be reached from outside, so everybody there could store what they like; write \"read\" or \
                 \"none\" (and access.htpasswd_file or access.tokens_file for those who may store), or \"write\" if that is what you want",
                config.listen.public
            ),
        );
    }
    if is_outside(&config.listen.admin) && !(access.admin && tls.admin) {
        problems.add(
            "access.insecure",
            format!(
                "is false, and listen.admin = {:?} can be reached from outside without {}; set listen.tls.admin and access.admin, listen on 127.0.0.1, \
                 or write true if only those can reach it who may purge",
                config.listen.admin,
                if access.admin { "TLS" } else { "a log-in" }
            ),
        );
    }
}

fn check_proxies(listen: &Listen, problems: &mut Problems) {
    if listen.proxy_protocol && listen.trusted_proxies.0.is_empty() {
        problems.add(
            "listen.trusted_proxies",
            "is empty, and listen.proxy_protocol needs it: every connection would be closed; list the addresses of the proxies",
        );
    }
}

fn check_tls(tls: &ListenTls, problems: &mut Problems) {
    let has_files = !tls.client_ca_file.as_os_str().is_empty() || !tls.more.is_empty() || tls.admin || tls.client_required;
    if !tls.is_on() {
        if has_files {
            problems.add("listen.tls.cert_file", "is missing, and the rest of listen.tls needs it; name a PEM file");
        }
        return;
    }
    for (key, file) in [("listen.tls.cert_file", &tls.cert_file), ("listen.tls.key_file", &tls.key_file)] {
        if file.as_os_str().is_empty() {
            problems.add(key, "is missing; a certificate and its key come together");
        }
    }
    if let Some(pair) = tls.more.iter().find(|pair| pair.split_whitespace().count() != 2) {
        problems.add("listen.tls.more", format!("{pair:?} is not two files; write \"CERT_FILE KEY_FILE\""));
    }
    if tls.client_required && tls.client_ca_file.as_os_str().is_empty() {
        problems.add("listen.tls.client_ca_file", "is missing, and listen.tls.client_required needs it; name a PEM file");
    }
    if !problems.ask_machine() {
        return;
    }
    for pair in tls.files().pairs {
        for (key, file) in [(&pair.cert_key, &pair.cert_file), (&pair.key_key, &pair.key_file)] {
            if !file.as_os_str().is_empty()
                && let Err(error) = first_byte(file)
            {
                problems.add(key, format!("{} cannot be read ({error}); name a PEM file", file.display()));
            }
        }
    }
}
