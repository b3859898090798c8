//! Memory to read files into. Used again and again: fresh memory costs a page fault for every 4 KiB, which is some six times what
//! reading from the page cache costs.

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::io::{Errno, ReadWriteFlags};
use std::{
    fs::File,
    io::IoSliceMut,
    ops::{Deref, DerefMut, Range},
};

/// The most that a buffer holds: a block of the disk tier, and the longest piece that a reader gets at once.
pub(crate) const SIZE: usize = 64 << 10;
static POOL: Mutex<Pool> = Mutex::new(Pool { idle: Vec::new(), lent: 0 });
/// How many may wait: 8 MiB at most, enough for as many reads as run at once.
const MAX_IDLE: usize = 128;
/// Up to here the allocator has warm memory of its own, and blobs do not hold on to more than they need.
const SMALL: usize = 8 << 10;

struct Pool {
    /// Memory that waits to be used again; the one used last comes first, as it is still in the processor's caches.
    idle: Vec<Box<[u8]>>,
    /// Buffers of [`SIZE`] that are in use.
    lent: usize,
}

/// Whether so few buffers are in use that one reader may have several. Else slow readers could together hold many times what they need.
pub fn plenty() -> bool {
    POOL.lock().lent < MAX_IDLE
}

/// Memory for up to [`SIZE`] bytes. Its content is whatever was read last.
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
            pool.lent += 1;
            pool.idle.pop()
        };
        Self { memory: idle.unwrap_or_else(|| vec![0; SIZE].into()), len: len.min(SIZE) }
    }

    /// Reads from offset `at` of the file, as far as that takes no waiting: what the page cache has. How many bytes came, from the front.
    /// Many file systems cannot tell what they have in memory, overlayfs among them: there nothing comes. One `in_memory` has all of it.
    pub(crate) fn read_cached(&mut self, file: &File, in_memory: bool, at: u64) -> usize {
        let mut filled = 0;
        while filled < self.len {
            let (at, rest) = (at + filled as u64, &mut self[filled..]);
            let read = match rustix::io::preadv2(file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT) {
                // A file system in memory has nothing to wait for, and does not know the question.
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

    /// The bytes, shared; the memory comes back when the last of them is dropped.
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
            pool.lent -= 1;
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
            // A disk may have other plans, a file system in memory has no choice.
            assert!(read == SIZE - 10_000 || !in_memory, "{read}");
            assert_eq!(buffer[..read], bytes[10_000..10_000 + read]);
            assert_eq!(buffer.read_cached(&file, in_memory, SIZE as u64), 0, "nothing behind the end");
        }
    }
}
