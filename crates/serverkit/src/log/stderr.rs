//! Lines on their way to stderr: a queue that is bounded in bytes, and a thread that writes it out.

use super::{Sink, dropped};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

/// Bytes that may wait: some 30,000 access records.
const MOST_BYTES: usize = 8 << 20;
/// Lines that may wait. Their slots are made at the start.
const MOST_LINES: usize = 32_768;
/// What leaves in one write.
const BATCH: usize = 64 << 10;
/// How long the end of the program waits for a reader of stderr.
const LAST: Duration = Duration::from_secs(1);

enum Message {
    Line(Box<str>),
    /// Everything before this has been written when it is answered.
    Flush(SyncSender<()>),
}

/// Takes lines. Never waits.
#[derive(Clone)]
pub(super) struct Stderr {
    sender: SyncSender<Message>,
    waiting: Arc<AtomicUsize>,
}

impl Stderr {
    /// Starts the thread that writes.
    pub(super) fn start() -> io::Result<Self> {
        Self::start_to(io::stderr())
    }

    fn start_to(mut writer: impl io::Write + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(MOST_LINES);
        let waiting = Arc::new(AtomicUsize::new(0));
        let written = Arc::clone(&waiting);
        thread::Builder::new().name("log".to_owned()).spawn(move || write_out(&mut writer, &receiver, &written))?;
        Ok(Self { sender, waiting })
    }

    /// Takes one, or counts it as dropped.
    pub(super) fn send(&self, line: &str) {
        let size = line.len();
        let taken = self.waiting.fetch_add(size, Relaxed) + size <= MOST_BYTES && self.sender.try_send(Message::Line(line.into())).is_ok();
        if !taken {
            self.waiting.fetch_sub(size, Relaxed);
            dropped(Sink::Stderr, 1);
        }
    }

    /// Waits until all that was sent has been written, for a moment at most.
    pub(super) fn flush(&self) {
        let (answer, answered) = sync_channel(1);
        let end = Instant::now() + LAST;
        let mut message = Message::Flush(answer);
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if Instant::now() > end {
                return;
            }
            message = back;
            thread::sleep(Duration::from_millis(5));
        }
        answered.recv_timeout(end.saturating_duration_since(Instant::now())).ok();
    }
}

fn write_out(writer: &mut impl io::Write, receiver: &Receiver<Message>, waiting: &AtomicUsize) {
    let mut batch = String::with_capacity(BATCH);
    while let Ok(first) = receiver.recv() {
        let (mut next, mut flushed) = (Some(first), None);
        while let Some(message) = next.take() {
            match message {
                Message::Line(line) => batch.push_str(&line),
                Message::Flush(answer) => flushed = Some(answer),
            }
            if batch.len() < BATCH && flushed.is_none() {
                next = receiver.try_recv().ok();
            }
        }
        // A stderr that is closed has no reader to tell.
        writer.write_all(batch.as_bytes()).ok();
        waiting.fetch_sub(batch.len(), Relaxed);
        batch.clear();
        if let Some(answer) = flushed {
            answer.try_send(()).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::{Mutex, MutexGuard};

    /// Takes nothing while somebody holds the lock.
    #[derive(Clone, Default)]
    struct Stalled(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_stalled_reader_does_not_take_is_dropped_and_counted() {
        let (stalled, line) = (Stalled::default(), format!("{}\n", "x".repeat(99_999)));
        let stderr = Stderr::start_to(stalled.clone()).unwrap();
        let held = stalled.0.lock();
        let before = super::super::drops()[0].1;
        for _ in 0..100 {
            stderr.send(&line);
        }
        let dropped = usize::try_from(super::super::drops()[0].1 - before).unwrap();
        assert_eq!(100 - dropped, MOST_BYTES / line.len(), "8 MiB wait, and no more");
        stderr.flush();
        assert!(stderr.waiting.load(Relaxed) > 0, "whoever flushes waits for a moment only");
        MutexGuard::unlock_fair(held);
        stderr.flush();
        assert_eq!(stalled.0.lock().len(), (100 - dropped) * line.len());
        // There is room again.
        stderr.send(&line);
        stderr.flush();
        assert_eq!(stalled.0.lock().len(), (101 - dropped) * line.len());
    }
}
