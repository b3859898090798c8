//! The sections `[[events]]`: who is told of blobs that are stored, deleted or corrupt.

use crate::{
    Disk, Malformed, Problems, Span,
    check::check_span,
    file::{first_byte, read_secret, read_text},
    value::{from_text, masked, path_text},
};
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize, Serializer};
use std::{
    collections::BTreeSet,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    str::FromStr,
};
use url::{Host, Url};
use zeroize::Zeroizing;

/// Who is told of blobs: a webhook, NATS or RabbitMQ. castier sends a CloudEvent for every blob that is stored through it, deleted, or found
/// corrupt, at least once and in order. It keeps the events in `disk.path` until they are acknowledged, so this needs `[disk]`. For one receiver
/// `[events]` will do; for several write `[[events]]` once for each. docs/events.md says what must exist at the broker. There are none by
/// default: only you know the receivers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventSink {
    /// The receiver: `https://HOST/PATH` (a webhook), `nats://HOST:4222` or `tls://HOST:4222` (JetStream), `amqp://HOST:5672/VHOST` or `amqps://…`.
    ///
    /// It has no default: each section needs one. It may have a user and a password (`nats://TOKEN@HOST` for a token of NATS), which logs do
    /// not show. `http://` is for a webhook on this machine, unless `events.insecure` is true.
    ///
    /// - Type: URL
    pub url: Option<SinkUrl>,
    /// The name of this receiver in logs and metrics, and of the position up to which it has got the events. Empty: the host of `events.url`.
    ///
    /// Under a new name castier begins with the events that come then. So a receiver that moves to another host needs its old name here. No two
    /// sections may have one name. The default is right for hosts that stay.
    ///
    /// - Type: name of a receiver
    pub name: String,
    /// Which events the receiver gets.
    ///
    /// `stored`: a blob is newly stored through castier. `deleted`: a client has deleted it through castier. `corrupt`: bytes that a client, the
    /// origin, a peer or the disk gave for it were wrong. The default is all, since a consumer can skip what it does not need.
    ///
    /// - Type: list of `stored`, `deleted` and `corrupt`
    pub types: Vec<EventKind>,
    /// A file with the secret that signs the requests to a webhook: `whsec_` and 24 to 64 bytes in base64. Only for webhooks, which need it.
    ///
    /// The signature is that of Standard Webhooks. It is a file, so that anybody may read this configuration.
    #[serde(serialize_with = "path_text")]
    pub secret_file: PathBuf,
    /// A file with the credentials for NATS (a `.creds` file, `USER:PASSWORD` or a token) or for RabbitMQ (`USER:PASSWORD`). Empty: those in the URL.
    ///
    /// The default needs no file. RabbitMQ's own default, `guest`, is admitted on its own machine only.
    #[serde(serialize_with = "path_text")]
    pub credentials_file: PathBuf,
    /// PEM certificates of the authorities that the receiver's certificate may be from. Empty: those of the system.
    ///
    /// For `https`, `tls` and `amqps`. With `amqps` those of the system count too.
    #[serde(serialize_with = "path_text")]
    pub ca_file: PathBuf,
    /// Whether a webhook on another machine may have an `http://` URL.
    ///
    /// The events, and who stored what, could then be read on the way. The default protects them.
    pub insecure: bool,
    /// The subject of NATS, or the routing key of RabbitMQ.
    ///
    /// With `events.exchange` empty, the routing key is the name of the queue. The default tells whose events these are.
    ///
    /// - Type: subject
    pub subject: String,
    /// The exchange of RabbitMQ. Empty: the default exchange, which leads to the queue that `events.subject` names.
    ///
    /// The default needs nothing but a queue.
    pub exchange: String,
    /// How many events a request to a webhook has. 1: one CloudEvent; more: up to so many, as a batch of CloudEvents.
    ///
    /// NATS and RabbitMQ get one event in each message. The default is what every receiver of CloudEvents takes.
    ///
    /// - Type: 1 to 1000
    pub batch: usize,
    /// How long the receiver may take to acknowledge. After that castier connects anew, and sends the events again.
    ///
    /// A broker that works needs milliseconds. The default is enough for a webhook that stores the event first.
    ///
    /// - Type: duration over 0
    pub timeout: Span,
}

impl Default for EventSink {
    fn default() -> Self {
        Self {
            url: None,
            name: String::new(),
            types: vec![EventKind::Stored, EventKind::Deleted, EventKind::Corrupt],
            secret_file: PathBuf::new(),
            credentials_file: PathBuf::new(),
            ca_file: PathBuf::new(),
            insecure: false,
            subject: "castier.events".into(),
            exchange: String::new(),
            batch: 1,
            timeout: Span::secs(10),
        }
    }
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// A blob was newly stored.
    Stored,
    /// A blob was deleted.
    Deleted,
    /// Bytes for a blob were wrong.
    Corrupt,
}

/// What a receiver of events speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP, with a signature.
    Webhook,
    /// NATS JetStream.
    Nats,
    /// AMQP 0-9-1.
    RabbitMq,
}

/// The URL of a receiver of events.
#[derive(Clone, PartialEq, Eq)]
pub struct SinkUrl(Url);

impl SinkUrl {
    /// The URL, with the password in it: not for logs.
    pub const fn in_full(&self) -> &Url {
        &self.0
    }

    /// What the receiver speaks.
    pub fn protocol(&self) -> Protocol {
        match self.0.scheme() {
            "nats" | "tls" => Protocol::Nats,
            "amqp" | "amqps" => Protocol::RabbitMq,
            _ => Protocol::Webhook,
        }
    }

    /// Whether the connection is encrypted.
    pub fn is_secure(&self) -> bool {
        matches!(self.0.scheme(), "https" | "tls" | "amqps")
    }

    /// The host, as it is in a certificate: an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        self.0.host_str().unwrap_or_default().trim_matches(['[', ']'])
    }

    /// The port, or the usual one of the scheme.
    pub fn port(&self) -> u16 {
        let usual = || match self.0.scheme() {
            "amqp" => 5672,
            "amqps" => 5671,
            _ => 4222,
        };
        self.0.port_or_known_default().unwrap_or_else(usual)
    }

    /// The virtual host of RabbitMQ.
    pub fn vhost(&self) -> String {
        match self.0.path().trim_start_matches('/') {
            "" => "/".into(),
            name => decoded(name),
        }
    }

    fn is_loopback(&self) -> bool {
        // In a URL of a scheme that the library does not know, an address is text.
        let host = self.host();
        host == "localhost"
            || host.parse::<Ipv4Addr>().is_ok_and(|address| address.is_loopback())
            || host.parse::<Ipv6Addr>().is_ok_and(|address| address.is_loopback())
    }

    fn user(&self) -> Option<(String, Option<String>)> {
        let user = self.0.username();
        (!user.is_empty() || self.0.password().is_some()).then(|| (decoded(user), self.0.password().map(decoded)))
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

impl FromStr for SinkUrl {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| {
            Malformed::new(format!("{why}; write \"https://HOST/PATH\", \"nats://HOST:4222\" or \"amqp://USER:PASSWORD@HOST:5672/VHOST\""))
        };
        let url = Url::parse(text).map_err(|error| bad(&format!("is not a URL ({error})")))?;
        if !matches!(url.scheme(), "http" | "https" | "nats" | "tls" | "amqp" | "amqps") {
            return Err(bad(&format!("has the scheme {:?}", url.scheme())));
        }
        if url.host().is_none_or(|host| matches!(host, Host::Domain(""))) {
            return Err(bad("names no host"));
        }
        if url.port() == Some(0) {
            return Err(bad("has the port 0, to which nobody can connect"));
        }
        if url.fragment().is_some() {
            return Err(bad("has a fragment"));
        }
        let url = Self(url);
        let path = url.0.path().trim_start_matches('/');
        if url.protocol() != Protocol::Webhook && url.0.query().is_some() {
            return Err(bad("has a query"));
        }
        if url.protocol() == Protocol::Nats && !path.is_empty() {
            return Err(bad("has a path (the subject is a key of its own, events.subject)"));
        }
        if url.protocol() == Protocol::RabbitMq && path.contains('/') {
            return Err(bad("has a path of several parts (a / in the name of a virtual host is written %2F)"));
        }
        Ok(url)
    }
}

impl fmt::Display for SinkUrl {
    /// For people and logs: without user, password, path and query. The path of a webhook can be a secret too.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.0.host_str().unwrap_or_default())?;
        self.0.port().map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl fmt::Debug for SinkUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(self.0.as_str()))
    }
}

// Not written by its `Display`, which masks.
from_text!(SinkUrl);

impl Serialize for SinkUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

/// How castier logs in at a broker.
#[derive(Clone, PartialEq, Eq)]
pub enum BrokerLogin {
    /// User and password.
    Password(String, String),
    /// A token of NATS.
    Token(String),
    /// The text of a `.creds` file of NATS: a JWT, and the seed of its key.
    Creds(String),
}

impl EventSink {
    /// A section with every key.
    pub(crate) fn complete() -> Self {
        Self { url: "https://events.example/castier".parse().ok(), ..Self::default() }
    }

    /// The name of the receiver: `name`, or the host of `url`.
    pub fn name(&self) -> &str {
        if self.name.is_empty() { self.url.as_ref().map_or("", SinkUrl::host) } else { &self.name }
    }

    /// The key that signs the requests to a webhook.
    ///
    /// # Errors
    /// A text that says what is wrong with the file, and never what is in it.
    pub fn secret(&self) -> Result<Zeroizing<Vec<u8>>, String> {
        let shown = self.secret_file.display();
        let text = read_secret(&self.secret_file)
            .map_err(|error| format!("{shown} cannot be read as text ({error}); name a file that this user may read"))?;
        let text = text.trim();
        let key = data_encoding::BASE64.decode(text.strip_prefix("whsec_").unwrap_or(text).as_bytes()).unwrap_or_default();
        if (24..=64).contains(&key.len()) {
            return Ok(Zeroizing::new(key));
        }
        Err(format!("{shown} does not have 24 to 64 bytes in base64; write it with: echo \"whsec_$(openssl rand -base64 32)\""))
    }

    /// How castier logs in at the broker. `None`: not at all, or as the client library does by default.
    ///
    /// # Errors
    /// A text that says what is wrong with the file, and never what is in it.
    pub fn login(&self) -> Result<Option<BrokerLogin>, String> {
        let is_nats = self.url.as_ref().is_some_and(|url| url.protocol() == Protocol::Nats);
        if self.credentials_file.as_os_str().is_empty() {
            let user = self.url.as_ref().and_then(SinkUrl::user);
            return Ok(user.map(|(user, password)| match password {
                None if is_nats => BrokerLogin::Token(user),
                password => BrokerLogin::Password(user, password.unwrap_or_default()),
            }));
        }
        let shown = self.credentials_file.display();
        let text = read_text(&self.credentials_file)
            .map_err(|error| format!("{shown} cannot be read as text ({error}); name a file that this user may read"))?;
        if is_nats && text.contains("-----BEGIN NATS USER JWT-----") {
            return Ok(Some(BrokerLogin::Creds(text)));
        }
        let line = text.trim_end_matches(['\r', '\n']);
        let right = if is_nats { "USER:PASSWORD, a token, or what nsc wrote for a user" } else { "USER:PASSWORD" };
        match line.split_once(':') {
            _ if line.trim().is_empty() || line.contains(['\r', '\n']) => {
                Err(format!("{shown} does not have one line; write {right} into it"))
            }
            Some((user, password)) => Ok(Some(BrokerLogin::Password(user.to_owned(), password.to_owned()))),
            None if is_nats => Ok(Some(BrokerLogin::Token(line.to_owned()))),
            None => Err(format!("{shown} has no : in it; write {right} into it")),
        }
    }
}

/// The most receivers. Each has a task, and reads the journal for itself.
const MOST_SINKS: usize = 32;

/// Checks the sections `[[events]]`.
pub(crate) fn check_events(sinks: &[EventSink], disk: Option<&Disk>, problems: &mut Problems) {
    if sinks.len() > MOST_SINKS {
        problems.add("events", format!("is there {} times; write at most {MOST_SINKS} sections", sinks.len()));
    }
    if !sinks.is_empty() && disk.is_none() {
        problems.add(
            "events",
            "needs [disk]: castier keeps events in disk.path until they are acknowledged; add [disk], with a path on a disk that outlives a restart",
        );
    }
    let mut names = BTreeSet::new();
    for (number, sink) in sinks.iter().enumerate() {
        let key = |name: &str| format!("events[{number}].{name}");
        let EventSink { url, name, types, subject, exchange, batch, timeout, .. } = sink;
        if let Some(url) = url {
            check_transport(sink, url, &key, problems);
        } else if problems.are_sound(&[&key("url")]) {
            problems.add(key("url"), "is missing; write \"https://HOST/PATH\", \"nats://HOST:4222\" or \"amqp://HOST:5672\"");
        }
        if !is_name(sink.name()) && (url.is_some() || !name.is_empty()) {
            problems.add(key("name"), format!("{:?} is no name; write at most 64 letters, digits and . : _ -", sink.name()));
        } else if !sink.name().is_empty() && !names.insert(sink.name()) {
            problems.add(key("name"), format!("{:?} is another section's name too; write one of its own", sink.name()));
        }
        if types.is_empty() && problems.are_sound(&[&key("types")]) {
            problems.add(key("types"), "is empty, so that nothing would be sent; write some of \"stored\", \"deleted\" and \"corrupt\"");
        }
        if subject.is_empty() || subject.len() > 255 || !subject.bytes().all(|byte| byte.is_ascii_graphic() && !b"*>".contains(&byte)) {
            problems.add(key("subject"), "is no subject; write up to 255 visible characters without * and >, such as \"castier.events\"");
        }
        if exchange.len() > 255 {
            problems.add(key("exchange"), "has more than 255 bytes, which RabbitMQ does not take");
        }
        if !(1..=1000).contains(batch) {
            problems.add(key("batch"), format!("{batch} is out of range; write 1 to 1000"));
        }
        check_span(&key("timeout"), *timeout, problems);
    }
}

/// It is a label of metrics, and a key of the journal.
fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:_-".contains(&byte))
}

/// The keys that only some protocols have.
fn check_transport(sink: &EventSink, url: &SinkUrl, key: &impl Fn(&str) -> String, problems: &mut Problems) {
    let is_set = |path: &PathBuf| !path.as_os_str().is_empty();
    let webhook = url.protocol() == Protocol::Webhook;
    if webhook {
        if !url.is_secure() && !url.is_loopback() && !sink.insecure {
            problems.add(key("url"), "would send events to another machine unencrypted; write https://, or set insecure = true");
        }
        if !is_set(&sink.secret_file) {
            problems.add(
                key("secret_file"),
                "is missing: requests to a webhook are signed; name a file, and write it with: echo \"whsec_$(openssl rand -base64 32)\"",
            );
        } else if problems.ask_machine()
            && let Err(why) = sink.secret()
        {
            problems.add(key("secret_file"), why);
        }
        if is_set(&sink.credentials_file) {
            problems
                .add(key("credentials_file"), "is for NATS and RabbitMQ; leave it out, since secret_file signs the requests to a webhook");
        }
    } else {
        if is_set(&sink.secret_file) {
            problems.add(key("secret_file"), "is for webhooks; leave it out, and write credentials_file for a log-in");
        }
        if sink.batch > 1 {
            problems.add(key("batch"), "is for webhooks; leave it out: NATS and RabbitMQ get one event in each message");
        }
        if is_set(&sink.credentials_file) && url.user().is_some() {
            problems.add(key("credentials_file"), "is there beside credentials in url; write one of the two");
        } else if problems.ask_machine()
            && let Err(why) = sink.login()
        {
            problems.add(key("credentials_file"), why);
        }
    }
    if !sink.exchange.is_empty() && url.protocol() != Protocol::RabbitMq {
        problems.add(key("exchange"), "is for RabbitMQ; leave it out");
    }
    if is_set(&sink.ca_file) {
        if !url.is_secure() {
            problems.add(key("ca_file"), "is for https, tls and amqps; leave it out, or encrypt the connection");
        } else if problems.ask_machine()
            && let Err(error) = first_byte(&sink.ca_file)
        {
            let path = sink.ca_file.display();
            problems.add(
                key("ca_file"),
                format!("{path} cannot be read ({error}); name a PEM file, or write \"\" for the system's certificates"),
            );
        }
    }
}
