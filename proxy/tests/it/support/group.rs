//! A control group with a memory limit.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
};

/// A group of version 1 or 2. Dropping it removes it; drop its processes before.
pub(crate) struct MemoryGroup {
    path: PathBuf,
    version: u8,
}

impl MemoryGroup {
    /// Creates a group with a limit in bytes. If this machine does not allow it, prints a line and returns `None`.
    pub(crate) fn new(limit: u64) -> Option<Self> {
        static SERIAL: AtomicUsize = AtomicUsize::new(0);
        let name = format!("castier-test-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let made = |root: &str, version, file: &str| -> io::Result<Self> {
            if version == 1 && !Path::new(root).join(file).exists() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let path = Path::new(root).join(&name);
            fs::create_dir(&path)?;
            let group = Self { path, version };
            fs::write(group.path.join(file), limit.to_string())?;
            Ok(group)
        };
        let made = made("/sys/fs/cgroup/memory", 1, "memory.limit_in_bytes").or_else(|_| made("/sys/fs/cgroup", 2, "memory.max"));
        made.inspect_err(|error| eprintln!("SKIPPED: no control group for memory can be made here: {error}")).ok()
    }

    /// A command that runs `program` in the group. Its arguments go to the program.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0/cgroup.procs\" && exec \"$@\""]).arg(&self.path).arg(program);
        command
    }

    /// The peak of its memory, in bytes.
    pub(crate) fn peak(&self) -> u64 {
        let file = if self.version == 1 { "memory.max_usage_in_bytes" } else { "memory.peak" };
        fs::read_to_string(self.path.join(file)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.path);
    }
}
