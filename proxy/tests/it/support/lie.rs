//! Faults of an origin's answer to one GET.
//!
//! All offsets are offsets in the blob, for any requested range.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio::sync::watch;

/// Blocks tasks until it is opened.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    open: Arc<watch::Sender<bool>>,
    /// How many tasks have reached it.
    arrived: Arc<AtomicUsize>,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self { open: Arc::new(watch::Sender::new(false)), arrived: Arc::default() }
    }

    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    pub(crate) fn arrived(&self) -> usize {
        self.arrived.load(Ordering::SeqCst)
    }

    pub(crate) async fn pass(&self) {
        self.arrived.fetch_add(1, Ordering::SeqCst);
        // An error would mean that the sender is dropped, but `self` owns it.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// How the origin handles a `Range` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeManner {
    Honour,
    /// 200 with the whole blob, as RFC 9110 allows.
    Ignore,
    /// 200 with only the range, as if it were the whole blob.
    PartAs200,
    /// 206 with correct headers, but it starts this much later than requested.
    Shift(u64),
}

/// How a transfer breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    Close,
    Reset,
}

/// The speed of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Full,
    Dribble,
    BytesPerSecond(u64),
}

/// One answer. It is correct by default; each method adds one fault, and faults combine.
#[derive(Clone, Debug)]
pub(crate) struct Lie {
    /// Wait at this gate before the first byte.
    pub(crate) hold: Option<Gate>,
    /// Answer with this status and without the blob.
    pub(crate) status: Option<u16>,
    /// Further header lines.
    pub(crate) lines: &'static str,
    /// Answer with something that is not HTTP.
    pub(crate) garbage: bool,
    /// Flip the lowest bit of the byte at this offset.
    pub(crate) flip: Option<u64>,
    /// Break off at this offset.
    pub(crate) broken: Option<(u64, Break)>,
    /// Stop at this offset until the gate opens.
    pub(crate) stall: Option<(u64, Gate)>,
    /// Further bytes after the blob.
    pub(crate) extra: u64,
    /// The `Content-Length` to send.
    pub(crate) claimed: Option<u64>,
    pub(crate) range: RangeManner,
    pub(crate) pace: Pace,
    /// Send no `Content-Length`.
    pub(crate) chunked: bool,
    /// Close the connection after the answer, announced or not.
    pub(crate) close: Option<bool>,
    /// A correct head, and no byte of the body.
    pub(crate) nothing: bool,
    /// Store an upload at once, and wait at this gate before the answer.
    pub(crate) hold_answer: Option<Gate>,
    /// As a peer: send this instead of the proof; nothing if it is empty.
    pub(crate) proof: Option<String>,
    /// Announce ranges, and send this `ETag`. Another `If-Match` is answered with 412.
    pub(crate) etag: Option<&'static str>,
    /// Send the bytes, and do not look at `If-Match`.
    pub(crate) overlooks_if_match: bool,
}

impl Lie {
    pub(crate) fn honest() -> Self {
        Self {
            hold: None,
            status: None,
            lines: "",
            garbage: false,
            flip: None,
            broken: None,
            stall: None,
            extra: 0,
            claimed: None,
            range: RangeManner::Honour,
            pace: Pace::Full,
            chunked: false,
            close: None,
            nothing: false,
            hold_answer: None,
            proof: None,
            etag: None,
            overlooks_if_match: false,
        }
    }

    pub(crate) fn hold(self, gate: &Gate) -> Self {
        Self { hold: Some(gate.clone()), ..self }
    }

    pub(crate) fn status(self, status: u16) -> Self {
        Self { status: Some(status), ..self }
    }

    /// A status in the form of castier's own errors.
    pub(crate) fn castiers(self, status: u16) -> Self {
        let lines = if status == 404 {
            "Cache-Status: castier; fwd=uri-miss; detail=origin\r\n"
        } else {
            "Content-Type: application/problem+json\r\n"
        };
        Self { status: Some(status), lines, ..self }
    }

    pub(crate) fn garbage(self) -> Self {
        Self { garbage: true, ..self }
    }

    pub(crate) fn flip_bit(self, at: u64) -> Self {
        Self { flip: Some(at), ..self }
    }

    pub(crate) fn truncate(self, at: u64) -> Self {
        Self { broken: Some((at, Break::Close)), ..self }
    }

    pub(crate) fn reset_after(self, at: u64) -> Self {
        Self { broken: Some((at, Break::Reset)), ..self }
    }

    pub(crate) fn stall(self, at: u64, gate: &Gate) -> Self {
        Self { stall: Some((at, gate.clone())), ..self }
    }

    pub(crate) fn too_much(self, extra: u64) -> Self {
        Self { extra, ..self }
    }

    pub(crate) fn wrong_length(self, claimed: u64) -> Self {
        Self { claimed: Some(claimed), ..self }
    }

    pub(crate) fn ranges(self, range: RangeManner) -> Self {
        Self { range, ..self }
    }

    pub(crate) fn dribble(self) -> Self {
        Self { pace: Pace::Dribble, ..self }
    }

    pub(crate) fn throttle(self, bytes_per_second: u64) -> Self {
        Self { pace: Pace::BytesPerSecond(bytes_per_second), ..self }
    }

    pub(crate) fn chunked(self) -> Self {
        Self { chunked: true, ..self }
    }

    pub(crate) fn close_each_time(self) -> Self {
        Self { close: Some(true), ..self }
    }

    /// Closes the connection without announcing it.
    pub(crate) fn close_unannounced(self) -> Self {
        Self { close: Some(false), ..self }
    }

    /// Sends a correct head, and no byte of the blob.
    pub(crate) fn nothing(self) -> Self {
        Self { nothing: true, ..self }
    }

    /// Stores an upload at once, and answers when the gate opens.
    pub(crate) fn hold_answer(self, gate: &Gate) -> Self {
        Self { hold_answer: Some(gate.clone()), ..self }
    }

    /// Announces ranges, and sends this `ETag`, quotes included.
    pub(crate) fn etag(self, etag: &'static str) -> Self {
        Self { etag: Some(etag), ..self }
    }

    /// Sends the bytes, and does not look at `If-Match`.
    pub(crate) fn overlook_if_match(self) -> Self {
        Self { overlooks_if_match: true, ..self }
    }

    /// As a peer: sends this instead of the proof; nothing if it is empty.
    pub(crate) fn proof(self, proof: impl Into<String>) -> Self {
        Self { proof: Some(proof.into()), ..self }
    }
}
