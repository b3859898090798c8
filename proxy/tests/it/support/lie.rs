//! How an origin may answer one GET other than it should.
//!
//! All offsets are the blob's own, whatever range was asked for.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};
use tokio::sync::watch;

/// Holds back whoever comes to it until it is opened.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    open: Arc<watch::Sender<bool>>,
    /// How many have come to it so far.
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
        // An error means that nobody is left who could open it, and `self` is.
        let _ = self.open.subscribe().wait_for(|open| *open).await;
    }
}

/// What the origin does to a `Range` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeManner {
    Honour,
    /// 200 with the whole blob, as RFC 9110 allows.
    Ignore,
    /// 200 with the part alone, as if it were the whole.
    PartAs200,
    /// 206 that says so truthfully, but starts this much later than asked.
    Shift(u64),
}

/// How a transfer breaks off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    Close,
    Reset,
}

/// How fast the body goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pace {
    Full,
    Dribble,
    BytesPerSecond(u64),
}

/// One answer. Starts honest; each method adds one lie, and lies combine.
#[derive(Clone, Debug)]
pub(crate) struct Lie {
    /// Wait here before a byte is sent.
    pub(crate) hold: Option<Gate>,
    /// This status, and no blob.
    pub(crate) status: Option<u16>,
    /// With these lines in its head.
    pub(crate) lines: &'static str,
    /// Something that is not HTTP.
    pub(crate) garbage: bool,
    /// The lowest bit of the byte here is wrong.
    pub(crate) flip: Option<u64>,
    /// Break off when this offset is reached.
    pub(crate) broken: Option<(u64, Break)>,
    /// Stop at this offset until the gate opens.
    pub(crate) stall: Option<(u64, Gate)>,
    /// Bytes that follow the blob.
    pub(crate) extra: u64,
    /// `Content-Length` says this.
    pub(crate) claimed: Option<u64>,
    pub(crate) range: RangeManner,
    pub(crate) pace: Pace,
    /// No `Content-Length`.
    pub(crate) chunked: bool,
    /// Close after the answer: said beforehand, or not.
    pub(crate) close: Option<bool>,
    /// A sound answer without a single byte.
    pub(crate) nothing: bool,
    /// An upload is stored, and its answer waits here.
    pub(crate) hold_answer: Option<Gate>,
    /// As a peer: the answer carries no proof, or this one.
    pub(crate) proof: Option<String>,
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
        }
    }

    pub(crate) fn hold(self, gate: &Gate) -> Self {
        Self { hold: Some(gate.clone()), ..self }
    }

    pub(crate) fn status(self, status: u16) -> Self {
        Self { status: Some(status), ..self }
    }

    /// A status as a castier gives it, and not some other server.
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

    /// Closes a connection that it promised to keep.
    pub(crate) fn close_unannounced(self) -> Self {
        Self { close: Some(false), ..self }
    }

    /// No byte of the blob, in an answer that is otherwise sound.
    pub(crate) fn nothing(self) -> Self {
        Self { nothing: true, ..self }
    }

    /// Stores an upload at once, and says so when the gate opens.
    pub(crate) fn hold_answer(self, gate: &Gate) -> Self {
        Self { hold_answer: Some(gate.clone()), ..self }
    }

    /// As a peer: with this instead of the proof; nothing if it is empty.
    pub(crate) fn proof(self, proof: impl Into<String>) -> Self {
        Self { proof: Some(proof.into()), ..self }
    }
}
