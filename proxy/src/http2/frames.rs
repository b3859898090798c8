//! Counts the frames that a client sends, below the `h2` library: a client that sends many frames without content makes work for the server and none for
//! itself. The library bounds the memory of these attacks, not their work:
//!
//! - RST_STREAM: requests that are opened and cancelled at once ("rapid reset", CVE-2023-44487).
//! - PING and SETTINGS, which are answered, and PRIORITY ("ping flood", "settings flood", "resource loop": CVE-2019-9512 to 9515).
//! - CONTINUATION (CVE-2024-27316) and empty DATA (CVE-2019-9518) without end.
//! - WINDOW_UPDATE, if more come than the answers explain.

use castier_config::Limits;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use std::{
    num::NonZeroU32,
    sync::{Arc, OnceLock},
};
use tokio::sync::Notify;

/// What begins each connection, before the first frame (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The length of a frame's head: 24 bits of length, the type, the flags, and 32 bits of stream (RFC 9113, section 4.1).
const HEAD: usize = 9;
/// So many bytes of answers explain one WINDOW_UPDATE.
const UPDATE: u64 = 256;
/// The most WINDOW_UPDATE frames that earlier answers explain.
const MOST_UPDATES: u64 = 1 << 20;

/// What a client sent too much of: the label of `castier_http2_floods_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Empty DATA frames.
    Data,
    /// PRIORITY frames.
    Priorities,
    /// RST_STREAM frames.
    Resets,
    /// SETTINGS frames.
    Settings,
    /// PING frames.
    Pings,
    /// WINDOW_UPDATE frames.
    WindowUpdates,
    /// CONTINUATION frames.
    Continuations,
    /// Frames that HTTP/2 does not know, or does not let a client send.
    Unknown,
    /// Malformed requests.
    Malformed,
    /// What the library found too much.
    Library,
}

impl Flood {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Data,
        Self::Priorities,
        Self::Resets,
        Self::Settings,
        Self::Pings,
        Self::WindowUpdates,
        Self::Continuations,
        Self::Unknown,
        Self::Malformed,
        Self::Library,
    ];

    /// The value of the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Priorities => "priorities",
            Self::Resets => "resets",
            Self::Settings => "settings",
            Self::Pings => "pings",
            Self::WindowUpdates => "window-updates",
            Self::Continuations => "continuations",
            Self::Unknown => "unknown",
            Self::Malformed => "malformed",
            Self::Library => "library",
        }
    }
}

/// Tells that a client has sent too much.
#[derive(Debug, Default)]
pub struct Alarm {
    found: OnceLock<Flood>,
    raised: Notify,
}

impl Alarm {
    fn raise(&self, flood: Flood) {
        if self.found.set(flood).is_ok() {
            self.raised.notify_one();
        }
    }

    /// What the client has sent too much of.
    pub fn found(&self) -> Option<Flood> {
        self.found.get().copied()
    }

    /// Waits until the client has sent too much of something. Safe to cancel.
    pub async fn raised(&self) -> Flood {
        loop {
            match self.found() {
                Some(flood) => return flood,
                None => self.raised.notified().await,
            }
        }
    }
}

/// The frames of one connection, from its preface on.
#[derive(Debug)]
pub struct Frames {
    /// Bytes of the preface that have not come yet.
    preface: usize,
    head: [u8; HEAD],
    /// How much of the head has come.
    have: usize,
    /// How much of the payload has not come.
    payload: u64,
    resets: DefaultDirectRateLimiter,
    idle: DefaultDirectRateLimiter,
    /// Bytes of answers that have explained no WINDOW_UPDATE yet.
    answered: u64,
    alarm: Arc<Alarm>,
}

impl Frames {
    /// With the limits that hold now.
    pub fn new(limits: &Limits) -> Self {
        let limiter = |count| RateLimiter::direct(Quota::per_second(NonZeroU32::new(count).unwrap_or(NonZeroU32::MIN)));
        Self {
            preface: PREFACE.len(),
            head: [0; HEAD],
            have: 0,
            payload: 0,
            resets: limiter(limits.http2_resets),
            idle: limiter(limits.http2_idle_frames),
            answered: 0,
            alarm: Arc::default(),
        }
    }

    /// What tells when there are too many.
    pub fn alarm(&self) -> &Arc<Alarm> {
        &self.alarm
    }

    /// What the client has sent too much of: nothing more is read from it.
    pub fn found(&self) -> Option<Flood> {
        self.alarm.found()
    }

    /// Castier has sent so many bytes.
    pub fn wrote(&mut self, bytes: usize) {
        self.answered = self.answered.saturating_add(bytes as u64).min(MOST_UPDATES * UPDATE);
    }

    /// The client has sent these bytes, which follow those before. Whether the bytes form valid frames is for the library to say.
    pub fn read(&mut self, mut bytes: &[u8]) {
        let preface = self.preface.min(bytes.len());
        self.preface -= preface;
        bytes = &bytes[preface..];
        while !bytes.is_empty() && self.found().is_none() {
            let skipped = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len());
            self.payload -= skipped as u64;
            bytes = &bytes[skipped..];
            let taken = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEAD {
                self.have = 0;
                self.begin();
            }
        }
    }

    /// A frame begins.
    fn begin(&mut self) {
        const END_STREAM: u8 = 1;
        let [first, second, third, kind, flags, ..] = self.head;
        self.payload = u32::from_be_bytes([0, first, second, third]).into();
        let (limiter, flood) = match kind {
            0 if self.payload > 0 || flags & END_STREAM != 0 => return,
            0 => (&self.idle, Flood::Data),
            // HEADERS: a request, or its trailers. The number of open ones is limited elsewhere.
            1 => return,
            2 => (&self.idle, Flood::Priorities),
            3 => (&self.resets, Flood::Resets),
            4 => (&self.idle, Flood::Settings),
            6 => (&self.idle, Flood::Pings),
            8 if self.answered >= UPDATE => {
                self.answered -= UPDATE;
                return;
            }
            8 => (&self.idle, Flood::WindowUpdates),
            9 => (&self.idle, Flood::Continuations),
            _ => (&self.idle, Flood::Unknown),
        };
        if limiter.check().is_err() {
            self.alarm.raise(flood);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn limits() -> Limits {
        Limits { http2_resets: 3, http2_idle_frames: 5, ..Limits::default() }
    }

    #[test]
    fn each_flood_is_told_by_its_name() {
        for (kind, flags, payload, most, flood) in [
            (0, 0, &b""[..], 5, Flood::Data),
            (2, 0, b"12345", 5, Flood::Priorities),
            (3, 0, b"1234", 3, Flood::Resets),
            (4, 0, b"", 5, Flood::Settings),
            (6, 0, b"12345678", 5, Flood::Pings),
            (8, 0, b"1234", 5, Flood::WindowUpdates),
            (9, 0, b"x", 5, Flood::Continuations),
            (77, 0, b"x", 5, Flood::Unknown),
        ] {
            let mut frames = Frames::new(&limits());
            frames.read(PREFACE);
            for _ in 0..most {
                frames.read(&frame(kind, flags, payload));
            }
            assert_eq!(frames.found(), None, "{flood:?}");
            frames.read(&frame(kind, flags, payload));
            assert_eq!(frames.found(), Some(flood));
        }
    }

    #[test]
    fn requests_bodies_and_the_windows_of_answers_are_no_flood() {
        let mut frames = Frames::new(&limits());
        frames.read(PREFACE);
        for _ in 0..1000 {
            frames.read(&frame(1, 5, b"a request"));
            frames.read(&frame(0, 0, b"a body"));
            frames.read(&frame(0, 1, b""));
            frames.wrote(256);
            frames.read(&frame(8, 0, b"1234"));
        }
        assert_eq!(frames.found(), None);
        for _ in 0..6 {
            frames.read(&frame(8, 0, b"1234"));
        }
        assert_eq!(frames.found(), Some(Flood::WindowUpdates));
    }

    #[test]
    fn frames_may_come_in_any_pieces() {
        let all: Vec<u8> = [PREFACE.to_vec(), frame(0, 0, &[6; 70]), frame(6, 0, b"12345678"), frame(1, 4, &[9; 20])].concat();
        let many = [PREFACE.to_vec(), (0..6).flat_map(|_| [frame(0, 0, &[6; 70]), frame(6, 0, b"12345678")].concat()).collect()].concat();
        for piece in 1..all.len() {
            let (mut few, mut flood) = (Frames::new(&limits()), Frames::new(&limits()));
            all.chunks(piece).for_each(|part| few.read(part));
            many.chunks(piece).for_each(|part| flood.read(part));
            assert_eq!((few.found(), flood.found()), (None, Some(Flood::Pings)), "{piece}");
        }
    }
}
