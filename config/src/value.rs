//! The types of single values, and the two sections that both programs share.

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{collections::BTreeMap, fmt, marker::PhantomData, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};
use url::Url;

/// The text of a value cannot be read. Says what would be right; never repeats the text of a URL, which may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(String);

impl Malformed {
    pub(crate) const fn new(text: String) -> Self {
        Self(text)
    }
}

/// How long something may take or last: `"5s"`, `"250ms"`, `"1m30s"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Span(Duration);

impl Span {
    /// The longest span that can be written. Longer ones are slips of the pen, and would overflow the clocks that they are
    /// added to.
    pub const MAX: Self = Self::secs(10 * 365 * 24 * 60 * 60);

    /// The span of a duration.
    pub const fn new(duration: Duration) -> Self {
        Self(duration)
    }

    /// A span of so many seconds.
    pub const fn secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// A span of so many milliseconds.
    pub const fn millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// The span as the standard library has it.
    pub const fn get(self) -> Duration {
        self.0
    }
}

impl FromStr for Span {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| Malformed(format!("{text:?} {why}; write a number with its unit, such as \"5s\", \"250ms\" or \"1m30s\""));
        // Numbers of at most nine digits cannot add up to more seconds than `Duration` holds, where humantime would panic.
        if text.len() > 64 || text.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 9) {
            return Err(bad("is too long for a duration"));
        }
        let span = Self(humantime::parse_duration(text).map_err(|_| bad("is not a duration"))?);
        if span > Self::MAX { Err(bad("is more than ten years")) } else { Ok(span) }
    }
}

impl fmt::Display for Span {
    /// One number where one will do; reads back to exactly the same span.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, millis) = (self.0.as_secs(), self.0.as_millis());
        match self.0.subsec_nanos() {
            0 => write!(f, "{seconds}s"),
            nanos if nanos % 1_000_000 == 0 && millis < 1_000_000_000 => write!(f, "{millis}ms"),
            _ => write!(f, "{}", humantime::format_duration(self.0)),
        }
    }
}

/// A number of bytes: `"64MiB"`, `"1GB"`, `"512"`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Size(u64);

impl Size {
    /// The largest size that can be written: what a TOML integer and a file offset can hold.
    pub const MAX: Self = Self(i64::MAX as u64);

    /// So many bytes.
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// So many times 1024 bytes.
    pub const fn kib(count: u64) -> Self {
        Self(count << 10)
    }

    /// So many times 1024 KiB.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// So many times 1024 MiB.
    pub const fn gib(count: u64) -> Self {
        Self(count << 30)
    }

    /// The size in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad =
            |why: &str| Malformed(format!("{text:?} {why}; write a number of bytes, or one with its unit, such as \"64MiB\" or \"1GB\""));
        let size = Self(text.trim().parse::<bytesize::ByteSize>().map_err(|_| bad("is not a size"))?.as_u64());
        if size > Self::MAX { Err(bad("is more than a file can hold")) } else { Ok(size) }
    }
}

impl fmt::Display for Size {
    /// The unit that gives the smallest whole number, so that it reads well and reads back to exactly the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 9] = [
            (1 << 40, "TiB"),
            (1_000_000_000_000, "TB"),
            (1 << 30, "GiB"),
            (1_000_000_000, "GB"),
            (1 << 20, "MiB"),
            (1_000_000, "MB"),
            (1 << 10, "KiB"),
            (1_000, "KB"),
            (1, "B"),
        ];
        let (bytes, unit) = UNITS.into_iter().find(|(bytes, _)| self.0 > 0 && self.0.is_multiple_of(*bytes)).unwrap_or((1, "B"));
        write!(f, "{}{unit}", self.0 / bytes)
    }
}

/// A part of a whole that leaves something of it: 0 to 0.9.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug, Serialize)]
pub struct Share(f64);

// Reading refuses what is not a number.
impl Eq for Share {}

impl Share {
    /// The default of `cluster.mirror_share`.
    pub(crate) const DEFAULT_MIRROR: Self = Self(0.125);

    /// This part of a number of bytes.
    pub fn of(self, whole: Size) -> Size {
        Size((whole.0 as f64 * self.0) as u64)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let share = f64::deserialize(deserializer)?;
        let sound = (0.0..=0.9).contains(&share);
        sound.then_some(Self(share)).ok_or_else(|| de::Error::custom(format!("{share} is out of range; write 0 to 0.9")))
    }
}

/// Where the source of truth is.
#[derive(Clone, PartialEq, Eq)]
pub enum OriginUrl {
    /// `embedded:DIR`: the real origin server in the same process, with its data in this directory.
    Embedded(PathBuf),
    /// `http://HOST[:PORT]` or `https://…`: no path, query or fragment, since castier relays its clients' paths unchanged.
    Remote(Url),
}

impl OriginUrl {
    /// The text that reads back to the same value, password included: not for logs.
    fn in_full(&self) -> String {
        match self {
            Self::Embedded(directory) => format!("embedded:{}", directory.display()),
            Self::Remote(url) => url.as_str().trim_end_matches('/').to_owned(),
        }
    }
}

impl FromStr for OriginUrl {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| {
            Malformed(format!(
                "{why}; write \"embedded:DIRECTORY\", \"http://HOST:PORT\" or \"https://HOST\", with nothing behind the port"
            ))
        };
        if let Some(directory) = text.strip_prefix("embedded:") {
            return if directory.is_empty() { Err(bad("names no directory")) } else { Ok(Self::Embedded(directory.into())) };
        }
        let url = Url::parse(text).map_err(|error| bad(&format!("is not a URL ({error})")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(bad(&format!("has the scheme {:?}", url.scheme())));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(bad("has a path, query or fragment"));
        }
        Ok(Self::Remote(url))
    }
}

impl fmt::Display for OriginUrl {
    /// For people and logs: userinfo is masked.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(&self.in_full()))
    }
}

impl fmt::Debug for OriginUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text with the userinfo of a URL replaced by `***`; any other text unchanged. Works on the text rather than on a parsed
/// URL, so that a malformed one keeps its secrets too.
pub(crate) fn masked(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let authority = rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len());
    match rest[..authority].rfind('@') {
        Some(at) => format!("{scheme}://***{}", &rest[at..]),
        None => text.to_owned(),
    }
}

/// Reads anything that has a text form. Bare integers count as their digits, so that `capacity = 1024` works, and
/// `timeout = 5` is told that it lacks a unit.
pub(crate) struct Text<T>(pub(crate) PhantomData<T>);

impl<T: FromStr<Err = Malformed>> de::Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text in quotes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text(PhantomData))
    }
}

impl<'de> Deserialize<'de> for OriginUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Text(PhantomData))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for OriginUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.in_full())
    }
}

/// Which blobs stay when memory is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// What is asked for often enters and stays; a scan of blobs that are asked for once does not push it out.
    #[serde(rename = "tiny-lfu")]
    TinyLfu,
    /// What was asked for last stays. Better only where every blob is hot for a short while after it appeared.
    Lru,
}

/// How log records look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object a line, for collectors.
    Json,
}

/// `[log]`: what is written, and where.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// What is worth a record: `off`, `error`, `warn`, `info`, `debug` or `trace`, or a comma list of `part=level` with at
    /// most one bare level, such as `info,access=off` or `info,flight=debug`. A part is the last word of a record's `target`
    /// (`access`, `stats`, `disk`), or a whole target (`castier::flight`). Default `info`: starts, stops, what an operator must
    /// act on, and one record per request; `info,access=off` leaves those out.
    pub level: String,
    /// How a record looks: `text` (logfmt) or `json`, with the same names. Default `text`, as the first reader is a person at a terminal.
    pub format: LogFormat,
    /// The Loki that is sent the same records, `http://HOST:PORT` or `https://…`; empty: none. Default empty, since nobody
    /// wants surprise connections.
    pub loki_url: String,
    /// How often the figures of `/stats` go to the log, a duration over 0. Default `60s`: a day is 1440 lines, and a minute
    /// is the resolution at which people look back.
    pub stats_interval: Span,
    /// The proxies in front, as networks such as `10.0.0.0/8` or single addresses: only these are believed when `X-Forwarded-For` or
    /// `Forwarded` names a client. Default none: anybody can write such a header.
    pub trusted_proxies: Proxies,
    /// How records get to Loki. Means nothing without `log.loki_url`.
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

/// `[log.loki]`: how records get to Loki. They have the labels `job`, `instance` and `level`; the rest is in the line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Loki {
    /// The tenant that the records belong to (`X-Scope-OrgID`); empty: none is named. Default empty, as a Loki with one tenant wants it.
    pub tenant: String,
    /// More labels, each `NAME=VALUE`, or a table `{ NAME = "VALUE" }`. `job` (else `castier` or `castier-origin`) and `instance` (else
    /// `cluster.advertise`, or the host and its public port) may be among them, `level` may not. Default none: each label multiplies
    /// the streams that Loki keeps.
    pub labels: Labels,
    /// A batch leaves when its records are so large together; a size from `1KiB` to `4MiB`. Default `1MiB`: a quarter of what Loki takes
    /// in one piece.
    pub batch: Size,
    /// A batch leaves at the latest so long after its first record; a duration over 0. Default `1s`: soon enough to watch, and few requests.
    pub wait: Span,
    /// Bytes of records that may wait while Loki is away, the batch under way included; a size, at least `log.loki.batch`. Further records
    /// are counted and go to stderr alone. Default `16MiB`: some 40,000 requests.
    pub buffer: Size,
    /// How long Loki may take for a batch before it is sent again; a duration over 0. Default `5s`: longer than a healthy Loki ever needs.
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

/// Labels of Loki's, in the order of their names. Read from a table, or from a list of `NAME=VALUE`, as which they are printed.
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

            fn visit_map<A: de::MapAccess<'de>>(self, mut items: A) -> Result<Labels, A::Error> {
                let mut labels = BTreeMap::new();
                while let Some((name, value)) = items.next_entry()? {
                    labels.insert(name, value);
                }
                Ok(Labels(labels))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log")
            .field("level", &self.level)
            .field("format", &self.format)
            .field("loki_url", &masked(&self.loki_url))
            .field("stats_interval", &self.stats_interval)
            .field("trusted_proxies", &self.trusted_proxies)
            .field("loki", &self.loki)
            .finish()
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
                "{text:?} is no network; write one such as \"10.0.0.0/8\" or \"fd00::/8\", or an address such as \"10.0.0.7\""
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

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Text(PhantomData))
    }
}

impl Serialize for Network {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Who is believed about the client that a request comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proxies(pub Vec<Network>);

impl Proxies {
    /// Whether the address is one of theirs. An IPv4 address within IPv6 counts as the IPv4 address.
    pub fn contains(&self, address: &IpAddr) -> bool {
        !self.0.is_empty() && self.0.iter().any(|network| network.0.contains(&address.to_canonical()))
    }
}

/// `[otlp]`: spans of sampled requests, for a collector that speaks OTLP over HTTP.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Otlp {
    /// The collector, `http://HOST:4318` or `https://…`; `/v1/traces` is added. Empty: no spans. Default empty, since nobody wants
    /// surprise connections.
    pub endpoint: String,
    /// Which part of the requests without a `traceparent` is sampled, 0 to 1; a `traceparent` says itself whether its request is. Default
    /// `0.01`: enough to see what is slow, and cheap.
    pub sample: f64,
    /// Bytes of spans that may wait for the collector; a size over 0. Further spans are counted and dropped. Default `4MiB`: some
    /// thousand spans.
    pub buffer: Size,
    /// How long the collector may take for a batch, before it is counted as dropped; a duration over 0. Default `5s`: longer than a healthy
    /// collector ever needs.
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
        let endpoint = masked(endpoint);
        f.debug_struct("Otlp")
            .field("endpoint", &endpoint)
            .field("sample", sample)
            .field("buffer", buffer)
            .field("timeout", timeout)
            .finish()
    }
}

/// `[shutdown]`: how the program ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shutdown {
    /// How long what is in flight may take to finish after SIGTERM, a duration; 0 cuts it at once. Default `30s`, which is
    /// how long Kubernetes waits before it kills.
    pub grace: Span,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { grace: Span::secs(30) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spans_read_and_print() {
        let table = [("5s", 5_000, "5s"), ("250ms", 250, "250ms"), ("1m30s", 90_000, "90s"), ("1.5s", 1_500, "1500ms"), ("0s", 0, "0s")];
        for (text, millis, printed) in table {
            let span: Span = text.parse().unwrap();
            assert_eq!((span, span.to_string().as_str()), (Span::millis(millis), printed), "{text}");
        }
        for text in ["", "5", "s", "-5s", "5 parsecs", "11years", "18446744073709551615s 1000ms", "1000000000s"] {
            let error = text.parse::<Span>().unwrap_err().to_string();
            assert!(error.contains("such as \"5s\""), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_read_and_print() {
        let table = [
            ("64MiB", 64 << 20, "64MiB"),
            ("1GB", 1_000_000_000, "1GB"),
            ("512", 512, "512B"),
            ("1.5 KiB", 1536, "1536B"),
            ("2048", 2048, "2KiB"),
            ("0", 0, "0B"),
            ("16 gib", 16 << 30, "16GiB"),
        ];
        for (text, bytes, printed) in table {
            let size: Size = text.parse().unwrap();
            assert_eq!((size, size.to_string().as_str()), (Size::new(bytes), printed), "{text}");
        }
        for text in ["", "MiB", "-1", "1 parsec", "99999999999EiB", "0x10", "1.2.3MB", "NaN"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.contains("such as \"64MiB\""), "{text}: {error}");
        }
    }

    #[test]
    fn origin_urls() {
        assert_eq!("embedded:./a b".parse(), Ok(OriginUrl::Embedded("./a b".into())));
        for text in ["http://origin.internal:9000", "https://[::1]", "http://u:p@h:1"] {
            let url: OriginUrl = text.parse().unwrap();
            assert_eq!(url.in_full(), text);
            assert_eq!(text.parse(), Ok(OriginUrl::Remote(text.parse().unwrap())));
        }
        for text in [
            "",
            "embedded:",
            "origin:9000",
            "ftp://h",
            "http://h/path",
            "http://h?q",
            "http://h/#f",
            "http://",
            "http://u:pass word@h/x",
            "5",
        ] {
            let error = text.parse::<OriginUrl>().unwrap_err().to_string();
            assert!(error.contains("embedded:DIRECTORY") && !error.contains("pass"), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_are_masked_everywhere() {
        for (text, shown) in [
            ("http://u:p@h:1", "http://***@h:1"),
            ("http://u:p@x@h/a@b", "http://***@h/a@b"),
            ("https://token@h?x=@", "https://***@h?x=@"),
            ("http://h/a@b", "http://h/a@b"),
            ("embedded:./a@b", "embedded:./a@b"),
            ("a@b", "a@b"),
        ] {
            assert_eq!(masked(text), shown);
        }
        let url: OriginUrl = "http://user:hunter2@h".parse().unwrap();
        let log = Log { loki_url: "http://user:hunter2@h".into(), ..Log::default() };
        assert!(!format!("{url} {url:?} {log:?}").contains("hunter2"));
    }

    proptest! {
        #[test]
        fn spans_round_trip(
            seconds in 0..Span::MAX.get().as_secs(),
            nanos in prop_oneof![Just(0), (0u32..1000).prop_map(|n| n * 1_000_000), 0u32..1_000_000_000],
        ) {
            let span = Span(Duration::new(seconds, nanos));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }

        #[test]
        fn sizes_round_trip(
            count in 0u64..=i64::MAX as u64,
            unit in prop::sample::select(vec![1, 1000, 1024, 1_000_000, 1 << 20, 1 << 30, 1 << 40]),
        ) {
            let size = Size(count / unit * unit);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn no_text_panics(text in "[0-9]{0,21}[ .]?[0-9]{0,3}[a-zA-Zµ]{0,3}[0-9]{0,12}(s|ms|y)?|\\PC{0,20}") {
            if let Ok(span) = text.parse::<Span>() {
                prop_assert!(span <= Span::MAX);
            }
            if let Ok(size) = text.parse::<Size>() {
                prop_assert!(size <= Size::MAX);
            }
            let _ = text.parse::<OriginUrl>();
        }
    }
}
