//! Reusable buffers for reading files. Fresh memory costs a page fault for every 4 KiB, which is about six times the cost of reading from
//! the page cache.

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::{Errno, ReadWriteFlags};
use std::{
    fs::File,
    io::IoSliceMut,
    ops::{Deref, DerefMut, Range},
};

/// The size of a pooled buffer, in bytes: one block of the disk tier, and the longest piece that a reader gets at once.
pub(crate) const SIZE: usize = 64 << 10;
static POOL: Mutex<BufferPool> = Mutex::new(BufferPool { idle: Vec::new(), in_use: 0 });
/// The most idle buffers: 8 MiB in total, enough for all reads that run at once.
const MAX_IDLE: usize = 128;
/// Buffers up to this size come from the allocator, which reuses memory of this size itself. So a small blob does not hold 64 KiB.
const SMALL: usize = 8 << 10;

struct BufferPool {
    /// Buffers to reuse. A stack, since the buffer used last is still in the processor's caches.
    idle: Vec<Box<[u8]>>,
    /// Buffers of [`SIZE`] in use.
    in_use: usize,
}

/// Whether one reader may hold several buffers now. If many are in use, it may not: many slow readers would hold too much memory.
pub fn plenty() -> bool {
    POOL.lock().in_use < MAX_IDLE
}

/// Memory for up to [`SIZE`] bytes. A new buffer has old content.
pub(crate) struct Buffer {
    memory: Box<[u8]>,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` bytes, at most [`SIZE`].
    pub(crate) fn new(len: usize) -> Self {
        if len <= SMALL {
            return Self { memory: vec![0; len].into(), len };
        }
        let idle = {
            let mut pool = POOL.lock();
            pool.in_use += 1;
            pool.idle.pop()
        };
        Self { memory: idle.unwrap_or_else(|| vec![0; SIZE].into()), len: len.min(SIZE) }
    }

    /// Reads from offset `at` of the file without waiting for the disk: only the bytes that the page cache has. Returns how many bytes were
    /// read into the front of the buffer.
    ///
    /// Some file systems, such as overlayfs, do not support such reads; there the result is 0. A tmpfs does not support them either, but
    /// never waits: `in_memory` says that the file is on one.
    pub(crate) fn read_cached(&mut self, file: &File, in_memory: bool, at: u64) -> usize {
        let mut filled = 0;
        while filled < self.len {
            let (at, rest) = (at + filled as u64, &mut self[filled..]);
            let read = match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT) {
                // A tmpfs.
                Err(Errno::OPNOTSUPP) if in_memory => rustix::io::pread(file, rest, at),
                read => read,
            };
            match read {
                Ok(n @ 1..) => filled += n,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
        filled
    }

    /// A part of the bytes, shared. The memory returns to the pool when the last clone is dropped.
    pub(crate) fn share(self, part: Range<usize>) -> Bytes {
        Bytes::from_owner(self).slice(part)
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.memory.len() == SIZE {
            let mut pool = POOL.lock();
            pool.in_use -= 1;
            if pool.idle.len() < MAX_IDLE {
                pool.idle.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn buffers_are_as_long_as_asked_for() {
        for len in [0, 1, SMALL, SMALL + 1, SIZE - 1, SIZE] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.len(), len);
            buffer.fill(7);
            let shared = buffer.share(len / 2..len);
            let copy = shared.clone();
            drop(shared);
            assert!(copy.len() == len - len / 2 && copy.iter().all(|byte| *byte == 7));
        }
        assert!(POOL.lock().idle.len() <= MAX_IDLE);
        assert!(plenty());
    }

    #[test]
    fn what_was_just_written_is_read_without_waiting() {
        for dir in [std::env::temp_dir(), "/dev/shm".into()].into_iter().filter(|dir: &std::path::PathBuf| dir.is_dir()) {
            let file = tempfile::tempfile_in(&dir).unwrap();
            let bytes: Vec<u8> = (0..SIZE).map(|at| (at / 7) as u8).collect();
            file.write_all_at(&bytes, 0).unwrap();
            let mut buffer = Buffer::new(SIZE);
            let in_memory = dir.starts_with("/dev/shm");
            let read = buffer.read_cached(&file, in_memory, 10_000);
            // Only on a tmpfs are the bytes certain to be in memory.
            assert!(read == SIZE - 10_000 || !in_memory, "{read}");
            assert_eq!(buffer[..read], bytes[10_000..10_000 + read]);
            assert_eq!(buffer.read_cached(&file, in_memory, SIZE as u64), 0, "nothing after the end");
        }
    }
}
