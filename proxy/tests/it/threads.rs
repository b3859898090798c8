//! If the system gives too few threads, castier ends with a message.

use crate::support::Castier;
use std::process::Command;

#[test]
fn too_few_threads_are_one_line() {
    // Such a limit does not hold for root, so this needs another user, whom only root can become. The program is copied to where anybody
    // may read it.
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can start a program as another user");
        return;
    }
    let dir = tempfile::TempDir::new().unwrap();
    let program = dir.path().join("castier");
    std::fs::copy(Castier::program(), &program).unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    for threads in [1, 2, 3, 5, 8] {
        let mut command = Command::new("timeout");
        // A user whom nobody else is.
        let user = format!("--reuid={}", 60_000 + threads);
        command.args(["20", "setpriv", &user, "--clear-groups", "prlimit", &format!("--nproc={threads}:{threads}")]).arg(&program);
        command.envs([("CASTIER_LISTEN__PUBLIC", "127.0.0.1:0"), ("CASTIER_LISTEN__ADMIN", "127.0.0.1:0")]).current_dir(dir.path());
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked"), "{threads}: {said}");
        assert_eq!(output.status.code(), Some(1), "{threads}: {said}");
        assert!(said.lines().filter(|line| line.contains("threads")).count() == 1 && said.lines().count() == 1, "{threads}: {said}");
    }
}
