//! The sections that both programs have: `[log]`, `[log.loki]`, `[otlp]` and `[shutdown]`.

use crate::{
    Malformed, Size, Span,
    value::{as_text, masked},
};
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

/// What the program logs, and where to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// Which records are logged: `off`, `error`, `warn`, `info`, `debug` or `trace`, or a list such as `info,access=off`.
    ///
    /// A list has at most one bare level, and items `PART=LEVEL`, without spaces. A part is the last word of a record's `target` (`access`,
    /// `stats`, `disk`) or a whole target (`castier_cache::fill`; the access records of castier-origin have `castier_origin::access`). The
    /// default has starts, stops, what an operator must act on, and one record for each request; `info,access=off` leaves those out. See
    /// [Logs](#logs).
    ///
    /// - Live: yes
    pub level: String,
    /// How a record looks: a line of logfmt (`text`), or a line with a JSON object (`json`). The names are the same.
    ///
    /// The default is for a person at a terminal.
    pub format: LogFormat,
    /// The Loki that gets the same records, such as `http://HOST:3100`. Empty: none.
    ///
    /// The default opens no connection that you did not ask for.
    ///
    /// - Type: URL
    pub loki_url: String,
    /// How often castier logs the figures of `/stats`, and castier-origin the number of its blobs and their bytes.
    ///
    /// The default is 1440 lines a day, and people look back by the minute.
    ///
    /// - Type: duration over 0
    pub stats_interval: Span,
    /// The proxies in front, as networks (`10.0.0.0/8`) or addresses. Others are not believed when they name a client.
    ///
    /// They name it in `X-Forwarded-For` or `Forwarded`. See [Who the client is](#who-the-client-is). The default is none: anybody can write
    /// such a header.
    pub trusted_proxies: Proxies,
    /// `[log.loki]`.
    pub loki: Loki,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".into(),
            format: LogFormat::Text,
            loki_url: String::new(),
            stats_interval: Span::secs(60),
            trusted_proxies: Proxies::default(),
            loki: Loki::default(),
        }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { level, format, loki_url, stats_interval, trusted_proxies, loki } = self;
        f.debug_struct("Log")
            .field("level", level)
            .field("format", format)
            .field("loki_url", &masked(loki_url))
            .field("stats_interval", stats_interval)
            .field("trusted_proxies", trusted_proxies)
            .field("loki", loki)
            .finish()
    }
}

/// How log records look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line of logfmt, for people.
    Text,
    /// A line with a JSON object, for collectors.
    Json,
}

/// How records get to Loki. They have the labels `job`, `instance` and `level`; the rest is in the line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loki {
    /// The tenant that the records belong to, sent as `X-Scope-OrgID`. Empty: none, as for a Loki with one tenant.
    pub tenant: String,
    /// More labels than `job`, `instance` and `level`, such as `["env=prod"]` or `{ env = "prod" }`.
    ///
    /// They may replace `job` (else `castier` or `castier-origin`) and `instance` (else `cluster.advertise`, or the host and its public port),
    /// but not `level`. The default is none: each label multiplies the streams that Loki keeps.
    pub labels: Labels,
    /// The program sends a batch once its records have this size.
    ///
    /// At most `log.loki.buffer`. The default is a quarter of what Loki takes in one piece.
    ///
    /// - Type: 1KiB to 4MiB
    pub batch: Size,
    /// The program sends a batch at the latest this long after its first record.
    ///
    /// The default is soon enough to watch, and makes few requests.
    ///
    /// - Type: duration over 0
    pub wait: Span,
    /// How many bytes of records may wait while Loki is away, the batch under way included.
    ///
    /// Further records go to stderr alone, and the program counts them. The default holds those of some 40,000 requests.
    pub buffer: Size,
    /// How long Loki may take for a batch before the program sends it again.
    ///
    /// A healthy Loki never needs as long as the default.
    ///
    /// - Type: duration over 0
    pub timeout: Span,
}

impl Default for Loki {
    fn default() -> Self {
        Self {
            tenant: String::new(),
            labels: Labels::default(),
            batch: Size::mib(1),
            wait: Span::secs(1),
            buffer: Size::mib(16),
            timeout: Span::secs(5),
        }
    }
}

/// Labels for Loki, in the order of their names. Read from a table or from a list of `NAME=VALUE`, and written as a list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels(pub BTreeMap<String, String>);

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|(name, value)| format!("{name}={value}")))
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list such as [\"env=prod\"], or a table such as { env = \"prod\" }")
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Labels, A::Error> {
                let mut labels = BTreeMap::new();
                while let Some(item) = items.next_element::<String>()? {
                    let Some((name, value)) = item.split_once('=') else {
                        return Err(de::Error::custom(format!("{item:?} has no =; write NAME=VALUE, such as \"env=prod\"")));
                    };
                    labels.insert(name.trim().to_owned(), value.trim().to_owned());
                }
                Ok(Labels(labels))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, items: A) -> Result<Labels, A::Error> {
                BTreeMap::deserialize(de::value::MapAccessDeserializer::new(items)).map(Labels)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A network, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network(IpNet);

impl FromStr for Network {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let network = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
        let network = network.ok_or_else(|| {
            Malformed::new(format!(
                "{text:?} is not a network; write one such as \"10.0.0.0/8\" or \"fd00::/8\", or an address such as \"10.0.0.7\""
            ))
        })?;
        Ok(Self(network.trunc()))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

as_text!(Network);

/// The proxies that are believed when they name a client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proxies(pub Vec<Network>);

impl Proxies {
    /// Whether the address is that of a trusted proxy. An IPv4 address within IPv6 counts as the IPv4 address.
    pub fn contains(&self, address: &IpAddr) -> bool {
        !self.0.is_empty() && self.0.iter().any(|network| network.0.contains(&address.to_canonical()))
    }
}

/// Spans of sampled requests, for a collector that speaks OTLP over HTTP.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Otlp {
    /// The collector that gets the spans, such as `http://HOST:4318`. Empty: none.
    ///
    /// `/v1/traces` is added. The default opens no connection that you did not ask for. See [Tracing](#tracing).
    ///
    /// - Type: URL
    pub endpoint: String,
    /// Which part of the requests without a `traceparent` is sampled. A `traceparent` says itself whether its request is.
    ///
    /// The default shows what is slow, and costs little.
    ///
    /// - Type: 0 to 1
    pub sample: f64,
    /// How many bytes of spans may wait for the collector. Further spans are counted and dropped.
    ///
    /// The default holds some thousand spans.
    ///
    /// - Type: size over 0
    pub buffer: Size,
    /// How long the collector may take for a batch, before the program counts and drops it.
    ///
    /// A healthy collector never needs as long as the default.
    ///
    /// - Type: duration over 0
    pub timeout: Span,
}

impl Default for Otlp {
    fn default() -> Self {
        Self { endpoint: String::new(), sample: 0.01, buffer: Size::mib(4), timeout: Span::secs(5) }
    }
}

impl fmt::Debug for Otlp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, sample, buffer, timeout } = self;
        f.debug_struct("Otlp")
            .field("endpoint", &masked(endpoint))
            .field("sample", sample)
            .field("buffer", buffer)
            .field("timeout", timeout)
            .finish()
    }
}

/// How the program ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shutdown {
    /// How long requests in flight may take to finish after SIGTERM. 0: the program cuts them at once.
    ///
    /// The default is how long Kubernetes waits before it kills: give the pod some seconds more.
    pub grace: Span,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { grace: Span::secs(30) }
    }
}
