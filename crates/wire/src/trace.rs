//! The ids of a request, in all programs that work for it: `traceparent` and `tracestate` (W3C Trace Context), and `X-Request-ID`.
//!
//! A valid id from the client is kept. An invalid or missing one is replaced. The caller provides the random numbers.

use crate::fields::Fields;
use http::{HeaderName, HeaderValue};
use std::{fmt, time::Duration};

/// `traceparent`, W3C Trace Context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `tracestate`, W3C Trace Context: data of tracing systems.
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// `X-Request-ID`: the id that proxies give to a request.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest `tracestate` that is passed on. W3C Trace Context requires at least this length.
const MOST_STATE: usize = 512;
/// The longest `X-Request-ID` that is kept. (A UUID has 36 characters.)
const MOST_ID: usize = 128;

/// The flag "sampled".
const SAMPLED: u8 = 1;
/// The flag "random trace id".
const RANDOM: u8 = 2;

/// The trace of a request, and the request's span in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    /// The span of this program.
    span: u64,
    /// The sender's span, if it sent one.
    parent: Option<u64>,
    /// The span that is sent to a source as its parent: `span`, or a part of it.
    sent_parent: u64,
    flags: u8,
    /// Passed on unchanged.
    state: Option<HeaderValue>,
    request_id: RequestId,
}

/// The id of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
enum RequestId {
    /// From the sender.
    Kept(HeaderValue),
    /// Created here.
    Made(u128),
}

/// The random numbers that [`Trace::of`] needs. A zero is not a valid id, so it counts as 1.
#[derive(Clone, Copy, Debug)]
pub struct Chance {
    /// For the id of the trace.
    pub trace: u128,
    /// For the id of the request.
    pub request: u128,
    /// For the id of the span.
    pub span: u64,
    /// Whether a trace that starts here is sampled.
    pub sampled: bool,
}

impl Trace {
    /// The trace of a request with these fields. If they have no valid trace, a new one.
    pub fn of(fields: &impl Fields, chance: Chance) -> Self {
        let kept = fields.the_one("x-request-id").map(<[u8]>::trim_ascii).filter(|id| is_sane(id));
        let request_id = match kept.and_then(|id| HeaderValue::from_bytes(id).ok()) {
            Some(id) => RequestId::Kept(id),
            None => RequestId::Made(chance.request),
        };
        let span = chance.span.max(1);
        match fields.the_one("traceparent").and_then(|value| parent(value.trim_ascii())) {
            Some((id, parent, flags)) => {
                Self { id, span, parent: Some(parent), sent_parent: span, flags, state: state(fields), request_id }
            }
            None => Self::begin(request_id, chance),
        }
    }

    /// A new trace.
    pub fn new(chance: Chance) -> Self {
        Self::begin(RequestId::Made(chance.request), chance)
    }

    fn begin(request_id: RequestId, chance: Chance) -> Self {
        let (span, flags) = (chance.span.max(1), RANDOM | if chance.sampled { SAMPLED } else { 0 });
        Self { id: chance.trace.max(1), span, parent: None, sent_parent: span, flags, state: None, request_id }
    }

    /// The same trace, with a part of this program's span as the parent for sources.
    pub fn part(&self, span: u64) -> Self {
        Self { sent_parent: span.max(1), ..self.clone() }
    }

    /// Whether the trace is sampled.
    pub const fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }

    /// The id of the trace, as 32 hexadecimal characters.
    pub fn trace_id(&self) -> impl fmt::Display + use<> {
        Hex(self.id)
    }

    /// The id of the request.
    pub fn request_id(&self) -> impl fmt::Display + '_ {
        &self.request_id
    }

    /// The fields for the next program. `None` means that the field must be removed.
    pub fn headers(&self) -> [(HeaderName, Option<HeaderValue>); 3] {
        let parent = format!("00-{:032x}-{:016x}-{:02x}", self.id, self.sent_parent, self.flags);
        [(TRACEPARENT, HeaderValue::try_from(parent).ok()), (TRACESTATE, self.state.clone()), (X_REQUEST_ID, self.id_header())]
    }

    /// The id of the request as a header value.
    pub fn id_header(&self) -> Option<HeaderValue> {
        match &self.request_id {
            RequestId::Kept(id) => Some(id.clone()),
            RequestId::Made(id) => HeaderValue::try_from(format!("{id:032x}")).ok(),
        }
    }

    /// The span of this program's work for the request.
    pub fn server_span(&self, name: String, took: Duration, error: Option<String>, attributes: Attributes) -> Span {
        Span { trace: self.id, id: self.span, parent: self.parent, of: Kind::Server, name, took, error, attributes }
    }

    /// The span of a request to a source. `self` is the [part](Self::part) for it.
    pub fn client_span(&self, name: String, took: Duration, error: Option<String>, attributes: Attributes) -> Span {
        Span { trace: self.id, id: self.sent_parent, parent: Some(self.span), of: Kind::Client, name, took, error, attributes }
    }
}

struct Hex(u128);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(id) => f.write_str(id.to_str().unwrap_or_default()),
            Self::Made(id) => Hex(*id).fmt(f),
        }
    }
}

/// A span that ends now.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The trace that it belongs to.
    pub trace: u128,
    /// Its id.
    pub id: u64,
    /// The id of its parent.
    pub parent: Option<u64>,
    /// The side of the request.
    pub of: Kind,
    /// A short description.
    pub name: String,
    /// How long it took.
    pub took: Duration,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// More data.
    pub attributes: Attributes,
}

/// The attributes of a span, with the names of OpenTelemetry's conventions.
pub type Attributes = Vec<(&'static str, Value)>;

/// The side of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This program answered the request.
    Server,
    /// This program sent the request.
    Client,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Any text.
    Text(String),
    /// A constant of castier.
    Word(&'static str),
    /// A whole number.
    Number(i64),
}

/// The trace id, the parent id and the flags of a `traceparent`. Of an unknown later version, reads the fields of this version.
fn parent(value: &[u8]) -> Option<(u128, u64, u8)> {
    let value = str::from_utf8(value).ok()?;
    let version = hex(value.get(..2)?)?;
    let whole = match version {
        0 => value.len() == 55,
        0xff => false,
        _ => value.len() == 55 || value.as_bytes().get(55) == Some(&b'-'),
    };
    let dashes = [2, 35, 52].iter().all(|at| value.as_bytes().get(*at) == Some(&b'-'));
    let (id, parent, flags) = (hex(value.get(3..35)?)?, hex(value.get(36..52)?)?, hex(value.get(53..55)?)?);
    let sound = whole && dashes && id != 0 && parent != 0;
    sound.then_some((id, parent as u64, flags as u8 & (SAMPLED | RANDOM)))
}

/// Parses hexadecimal digits in lower case.
fn hex(text: &str) -> Option<u128> {
    let lower = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if lower { u128::from_str_radix(text, 16).ok() } else { None }
}

/// The `tracestate` as one list, if it is short and visible ASCII.
fn state(fields: &impl Fields) -> Option<HeaderValue> {
    let mut list = Vec::new();
    for value in fields.values("tracestate").map(<[u8]>::trim_ascii).filter(|value| !value.is_empty()) {
        if list.len() + value.len() > MOST_STATE {
            return None;
        }
        if !list.is_empty() {
            list.push(b',');
        }
        list.extend_from_slice(value);
    }
    let plain = !list.is_empty() && list.len() <= MOST_STATE && list.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
    if plain { HeaderValue::from_bytes(&list).ok() } else { None }
}

/// Whether a request id can be used in log records and headers unchanged.
fn is_sane(id: &[u8]) -> bool {
    (1..=MOST_ID).contains(&id.len()) && id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:+=/@~,;".contains(byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderMap;

    const CHANCE: Chance = Chance { trace: 0xaa, request: 0xbb, span: 0xcc, sampled: false };
    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const OWN: &str = "000000000000000000000000000000aa";

    fn headers(fields: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    fn told(fields: &[(&'static str, &str)]) -> HeaderMap {
        map(&Trace::of(&headers(fields), CHANCE))
    }

    fn map(trace: &Trace) -> HeaderMap {
        trace.headers().into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    #[test]
    fn a_sound_traceparent_is_taken() {
        for (flags, passed) in [("00", "00"), ("01", "01"), ("03", "03"), ("ff", "03"), ("fe", "02")] {
            let parent = format!("00-{ID}-00f067aa0ba902b7-{flags}");
            let trace = Trace::of(&headers(&[("traceparent", &parent)]), CHANCE);
            assert_eq!((trace.trace_id().to_string(), trace.parent), (ID.to_owned(), Some(0x00f0_67aa_0ba9_02b7)));
            assert_eq!(trace.is_sampled(), flags.ends_with(['1', '3', 'f']));
            assert_eq!(told(&[("traceparent", &parent)])["traceparent"], format!("00-{ID}-00000000000000cc-{passed}"));
        }
        // A later version.
        for more in ["", "-", "-what-the-future-brings"] {
            let parent = format!("cc-{ID}-00f067aa0ba902b7-01{more}");
            assert_eq!(told(&[("traceparent", &parent)])["traceparent"], format!("00-{ID}-00000000000000cc-01"));
        }
        let trace = Trace::of(&headers(&[("traceparent", &format!("00-{ID}-00f067aa0ba902b7-01"))]), CHANCE).part(0xdd);
        assert_eq!(map(&trace)["traceparent"], format!("00-{ID}-00000000000000dd-01"), "the part is the parent");
        let span = trace.client_span("GET".to_owned(), Duration::ZERO, None, Vec::new());
        assert_eq!((span.id, span.parent), (0xdd, Some(0xcc)));
        let span = trace.server_span("GET".to_owned(), Duration::ZERO, None, Vec::new());
        assert_eq!((span.id, span.parent), (0xcc, Some(0x00f0_67aa_0ba9_02b7)));
    }

    #[test]
    fn an_unsound_one_is_replaced() {
        let good = format!("00-{ID}-00f067aa0ba902b7-01");
        let mut bad = vec![
            String::new(),
            good.to_uppercase(),
            format!("{good}-"),
            format!("{good}0"),
            good[..54].to_owned(),
            good.replacen("00-", "ff-", 1),
            good.replacen("00-", "0x-", 1),
            good.replacen("00-", "cc-", 1) + ".",
            good.replace(ID, &"0".repeat(32)),
            good.replace("00f067aa0ba902b7", &"0".repeat(16)),
            good.replace('-', "_"),
            good.replace("-01", "-0x"),
            good.replace("4bf9", "é b"),
        ];
        bad.extend((0..good.len()).map(|end| good[..end].to_owned()));
        for parent in &bad {
            let told = told(&[("traceparent", parent), ("tracestate", "a=b")]);
            assert_eq!(told["traceparent"], format!("00-{OWN}-00000000000000cc-02"), "{parent:?}");
            assert!(!told.contains_key("tracestate"), "it belongs to the trace that was not taken");
        }
        assert!(told(&[("traceparent", &good), ("traceparent", &good)])["traceparent"].to_str().unwrap().contains(OWN));
        assert_eq!(told(&[])["traceparent"], format!("00-{OWN}-00000000000000cc-02"));
        let sampled = Trace::new(Chance { sampled: true, trace: 0, span: 0, ..CHANCE });
        assert!(sampled.is_sampled() && sampled.trace_id().to_string().ends_with("01"), "zeros are no identities");
    }

    #[test]
    fn a_small_tracestate_goes_along() {
        let parent = format!("00-{ID}-00f067aa0ba902b7-01");
        let state = |fields: &[&str]| {
            let mut all = vec![("traceparent", &*parent)];
            all.extend(fields.iter().map(|value| ("tracestate", *value)));
            told(&all).get("tracestate").map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(state(&["a=1, b@c=2"]).unwrap(), "a=1, b@c=2");
        assert_eq!(state(&["a=1", "", "b=2"]).unwrap(), "a=1,b=2");
        assert_eq!(state(&[&"x".repeat(512)]).unwrap().len(), 512);
        for long in [&["x"; 300][..], &[&*"x".repeat(513)], &[&*"x".repeat(400), &*"x".repeat(112)], &["é"], &[]] {
            assert_eq!(state(long), None);
        }
    }

    #[test]
    fn a_sane_request_id_is_kept() {
        let long = "x".repeat(128);
        for id in ["a", "0f3c2b1a-7777-4c7e-9d1f-0123456789ab", "Root=1-67891233-abcdef012345678912345678", "a.b:c/d+e==", &long] {
            assert_eq!(told(&[("x-request-id", id)])["x-request-id"], id);
            assert_eq!(Trace::of(&headers(&[("x-request-id", id)]), CHANCE).request_id().to_string(), id);
        }
        let made = "000000000000000000000000000000bb";
        for id in ["", " ", "a b", "a\"b", "a\\b", "<a>", "é", "a\tb", &"x".repeat(129)] {
            assert_eq!(told(&[("x-request-id", id)])["x-request-id"], made, "{id:?}");
        }
        assert_eq!(told(&[("x-request-id", "a"), ("x-request-id", "b")])["x-request-id"], made);
        assert_eq!(told(&[])["x-request-id"], made);
    }
}
