//! The types of single values.

use crate::Bucket;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{
    fmt,
    marker::PhantomData,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};
use url::Url;

/// The text of a value cannot be read. The message says what to write. It never repeats the text of a URL, which may hold a password.
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
    /// The longest span that can be written. A longer one is a typing error, and would overflow the clock that it is added to.
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

    /// The span as a duration.
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
    /// One number and unit where that is exact. Reads back to exactly the same span.
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

/// A part of a whole, 0 to 0.9.
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

/// Where the origin is.
#[derive(Clone, PartialEq, Eq)]
pub enum OriginUrl {
    /// `embedded:DIRECTORY`: the real origin server in this process, with its blobs in that directory.
    Embedded(PathBuf),
    /// `http://HOST[:PORT]` or `https://…`. No path, query or fragment: castier relays its clients' paths unchanged.
    Remote(Url),
    /// `s3://BUCKET[/PREFIX]`, `gs://…` or `az://…`: a bucket of an object store.
    Bucket(Bucket),
}

impl OriginUrl {
    /// The text that reads back to the same value. It has the password: not for logs.
    fn in_full(&self) -> String {
        match self {
            Self::Embedded(directory) => {
                let directory = directory.display().to_string();
                // Two slashes at its front are one, and would look like those of a URL.
                let (root, rest) = if directory.starts_with('/') { ("/", directory.trim_start_matches('/')) } else { ("", &*directory) };
                format!("embedded:{root}{rest}")
            }
            Self::Remote(url) => url.as_str().trim_end_matches('/').to_owned(),
            Self::Bucket(bucket) => bucket.to_string(),
        }
    }
}

impl FromStr for OriginUrl {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| {
            Malformed(format!(
                "{why}; write \"embedded:DIRECTORY\", \"http://HOST:PORT\" or \"https://HOST\", with nothing behind the port, or \"s3://BUCKET\", \"gs://BUCKET\" or \"az://CONTAINER\""
            ))
        };
        if let Some(directory) = text.strip_prefix("embedded:") {
            return if directory.is_empty() { Err(bad("names no directory")) } else { Ok(Self::Embedded(directory.into())) };
        }
        let url = Url::parse(text).map_err(|error| bad(&format!("is not a URL ({error})")))?;
        if let Some(bucket) = Bucket::of(&url) {
            return bucket.map(Self::Bucket).map_err(bad);
        }
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
    /// For people and logs: it masks user and password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(&self.in_full()))
    }
}

impl fmt::Debug for OriginUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text with `***` for user and password and for the query, if it is a URL that has them. It works on the text and not on a parsed URL, so
/// that it masks the secrets of a malformed URL too.
pub(crate) fn masked(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text.to_owned() };
    let (rest, query) = rest.split_once('?').map_or((rest, ""), |(rest, _)| (rest, "?***"));
    let authority = rest.find(['/', '#', '\\']).unwrap_or(rest.len());
    match rest[..authority].rfind('@') {
        Some(at) => format!("{scheme}://***{}{query}", &rest[at..]),
        None => format!("{scheme}://{rest}{query}"),
    }
}

/// Reads a value from its text. A bare integer counts as its digits: `capacity = 1024` works, and for `timeout = 5` the message says that
/// the unit is missing.
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

/// Reads a type by its `FromStr`; `as_text!` also writes it by its `Display`.
macro_rules! from_text {
    ($($type:ty),+) => {$(
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any($crate::value::Text(std::marker::PhantomData))
            }
        }
    )+};
}

macro_rules! as_text {
    ($($type:ty),+) => {$(
        $crate::value::from_text!($type);

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
    )+};
}

pub(crate) use {as_text, from_text};

as_text!(Span, Size);
// Not written by its `Display`, which masks.
from_text!(OriginUrl);

impl Serialize for OriginUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.in_full())
    }
}

/// Writes a path as text. Lossy, so that printing a configuration cannot fail; a path from a file or the environment is text anyway.
pub(crate) fn path_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// When an upload to a bucket is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Write {
    /// Once the bucket has it.
    Through,
    /// Once this node has it, durably, in its outbox.
    Behind,
}

/// Which blobs stay when a tier is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Blobs that are read often stay. A scan of blobs that are read once does not push them out.
    #[serde(rename = "tiny-lfu")]
    TinyLfu,
    /// Blobs that were read last stay. Better only where every blob is hot for a short while after it appeared.
    Lru,
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
        assert_eq!(OriginUrl::Embedded("//?a/b".into()).to_string(), "embedded:/?a/b");
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
            ("https://token@h?x=@", "https://***@h?***"),
            ("https://h/hook?token=hunter2", "https://h/hook?***"),
            ("http://h/a@b", "http://h/a@b"),
            ("embedded:./a@b", "embedded:./a@b"),
            ("a@b", "a@b"),
        ] {
            assert_eq!(masked(text), shown);
        }
        let url: OriginUrl = "http://user:hunter2@h".parse().unwrap();
        let log = crate::Log { loki_url: "http://user:hunter2@h".into(), ..crate::Log::default() };
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
