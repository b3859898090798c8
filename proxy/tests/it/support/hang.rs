//! A file system that can stop answering: a FUSE mirror of a directory, whose server can be stopped.

use super::eventually;
use rustix::process::{Pid, Signal, kill_process};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// The mirror. Dropping it unmounts, even if it does not answer.
pub(crate) struct HangingFs {
    server: Child,
    dir: TempDir,
}

impl HangingFs {
    /// Mounts the mirror. Without root, `/dev/fuse` or bindfs it prints a line and returns `None`.
    pub(crate) async fn mount() -> Option<Self> {
        let dir = TempDir::new().unwrap();
        for name in ["behind", "mount"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        // No caches, so that each call goes to the server.
        let options = "entry_timeout=0,attr_timeout=0,negative_timeout=0";
        let mut command = Command::new("bindfs");
        command.args(["-f", "-o", options]).arg(dir.path().join("behind")).arg(dir.path().join("mount"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let Ok(server) = command.spawn() else {
            println!("SKIPPED: bindfs is not installed (apt-get install bindfs), so nothing here can hang");
            return None;
        };
        let mut mounted = Self { server, dir };
        let there = eventually("the mount, or its failure", async || {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
            if mounts.contains(mounted.path().to_str().unwrap()) {
                return Some(true);
            }
            mounted.server.try_wait().unwrap().map(|_| false)
        })
        .await;
        if !there {
            println!("SKIPPED: nothing can be mounted through FUSE here");
            return None;
        }
        Some(mounted)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    /// The mirrored directory, which always answers.
    pub(crate) fn behind(&self) -> &Path {
        Box::leak(self.dir.path().join("behind").into_boxed_path())
    }

    /// Stops all answers until the result is dropped. Call it after `Castier::start`, so that the result is dropped before castier: a process in
    /// a call to a hanging file system cannot be killed, so a failed test would never end.
    ///
    /// The server is stopped when it has been idle for a while. The kernel lets a process end whose request the server has not read yet. It does
    /// not let it end once the server has read the request, and castier's last close or sync may still be with the server.
    pub(crate) async fn hang(&self) -> Hang {
        let mut idle = 0;
        eventually("an idle server", async || {
            idle = if self.all_threads_are('S') { idle + 1 } else { 0 };
            (idle == 5).then_some(())
        })
        .await;
        let server = Pid::from_child(&self.server);
        kill_process(server, Signal::STOP).unwrap();
        let hang = Hang(server);
        // It takes a moment until the signal has stopped every thread of the server.
        eventually("each thread's stop", async || self.all_threads_are('T').then_some(())).await;
        hang
    }

    /// Whether each thread of the server is in this state: S, it waits; T, it is stopped.
    fn all_threads_are(&self, state: char) -> bool {
        let threads = fs::read_dir(format!("/proc/{}/task", self.server.id())).unwrap();
        let is = |stat: String| stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(state));
        // A thread that has ended since has no state.
        threads.filter_map(|thread| fs::read_to_string(thread.unwrap().path().join("stat")).ok()).all(is)
    }
}

/// While this exists, the file system does not answer.
pub(crate) struct Hang(Pid);

impl Hang {
    pub(crate) fn end(self) {}
}

impl Drop for Hang {
    fn drop(&mut self) {
        kill_process(self.0, Signal::CONT).ok();
    }
}

impl Drop for HangingFs {
    fn drop(&mut self) {
        // When the server is gone, the kernel answers with errors.
        self.server.kill().ok();
        self.server.wait().ok();
        Command::new("umount").arg("-l").arg(self.path()).output().ok();
    }
}
