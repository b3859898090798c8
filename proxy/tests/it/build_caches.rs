//! Real Bazel, ccache and sccache with castier: the second build uses the results of the first one.
//!
//! `scripts/test` installs these programs if it can. If one is missing, its test prints that on standard error, and passes.

use crate::support::{Castier, heavy, metrics};
use std::{
    ffi::OsStr,
    fs,
    io::Write as _,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;

/// The deadline of a build, which normally takes seconds.
const BUILD_SECONDS: &str = "300";

/// The program, if it works here. If not, prints on standard error that the test is skipped, without `eprintln`, which the test harness hides.
fn tool(name: &str, version: &[&str]) -> Option<PathBuf> {
    let works = Command::new(name).args(version).output().is_ok_and(|output| output.status.success());
    if !works {
        std::io::stderr().write_all(format!("SKIPPED: {name} is not installed\n").as_bytes()).unwrap();
    }
    works.then(|| name.into())
}

/// A program in a directory, without this machine's settings for it.
struct Run(Command);

impl Run {
    fn new(program: &Path, dir: &Path) -> Self {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", BUILD_SECONDS]).arg(program).current_dir(dir);
        for (name, _) in std::env::vars_os() {
            let own = ["CCACHE_", "SCCACHE_", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"];
            if own.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        Self(command)
    }

    fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.0.args(args);
        self
    }

    fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    /// Runs it to its end, off the async threads. Returns both its outputs.
    async fn ok(self) -> String {
        let Self(mut command) = self;
        let Output { status, stdout, stderr } = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let said = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(status.success(), "{status}: {said}");
        said
    }
}

/// castier with its embedded origin and default configuration, on free ports.
async fn castier_alone() -> Castier {
    Castier::start("embedded:./origin", "").await
}

async fn bazel_builds_from(prefix: &str) {
    let _turn = heavy().await;
    let Some(bazel) = tool("bazel", &["--version"]) else { return };
    let castier = castier_alone().await;
    let dir = TempDir::new().unwrap();
    let workspace = dir.path().join("workspace");
    fs::create_dir(&workspace).unwrap();
    fs::write(workspace.join("WORKSPACE"), "").unwrap();
    fs::write(workspace.join("input.txt"), "what is built from").unwrap();
    let rule = "genrule(name = \"NAME\", srcs = [\"input.txt\"], outs = [\"NAME.txt\"], cmd = \"cat $(SRCS) > $@; echo NAME >> $@\")\n";
    fs::write(workspace.join("BUILD"), ["one", "two"].map(|name| rule.replace("NAME", name)).concat()).unwrap();
    let root = dir.path().join("root");
    let startup = ["--batch".to_owned(), "--nohome_rc".into(), "--noworkspace_rc".into(), format!("--output_user_root={}", root.display())];
    let bazel = |arguments: &[&str]| {
        let all = startup.iter().cloned().chain(arguments.iter().map(|argument| (*argument).to_owned()));
        Run::new(&bazel, &workspace).args(all).env("HOME", dir.path())
    };
    let cache = format!("--remote_cache=http://{}{prefix}", castier.public);
    let build = ["build", &cache, "--spawn_strategy=local", "--remote_upload_local_results", "//:all"];

    let first = bazel(&build).ok().await;
    assert!(!first.contains("remote cache hit") && !first.contains("WARNING: Writing to Remote Cache"), "{first}");
    bazel(&["clean"]).ok().await;
    let second = bazel(&build).ok().await;
    assert!(second.contains("2 remote cache hit"), "{second}");
    assert_eq!(fs::read_to_string(workspace.join("bazel-bin/two.txt")).unwrap(), "what is built fromtwo\n");

    // What was built is blobs, which castier keeps. What was built from what is entries, which are asked for: absent first, there then.
    let books = metrics(&castier).await;
    assert!(books.sum("castier_hits_total", &[("tier", "memory")]) >= 2, "{}", books.text);
    assert_eq!(books.total("castier_flights_total"), 4, "what was stored through castier is a hit, but for two entries: {}", books.text);
    assert!(books.sum("castier_http_requests_total", &[("route", "relay"), ("method", "PUT"), ("code", "201")]) >= 2, "{}", books.text);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bazel() {
    bazel_builds_from("").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bazel_with_an_instance() {
    bazel_builds_from("/team-1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ccache_in_every_layout() {
    let _turn = heavy().await;
    let Some(ccache) = tool("ccache", &["--version"]) else { return };
    let castier = castier_alone().await;
    for storage in ["|layout=bazel", "/team|layout=bazel", "/kv", "/kv/team|layout=flat"] {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("a.c"), "int main(void) { return 42; }\n").unwrap();
        let url = format!("http://{}{storage}", castier.public);
        let ccache = |arguments: &[&str]| {
            let cache = dir.path().join("cache");
            let run = Run::new(&ccache, dir.path()).args(arguments).env("CCACHE_DIR", cache);
            run.env("CCACHE_CONFIGPATH", "/dev/null").env("CCACHE_REMOTE_STORAGE", &url)
        };
        let compile = ["cc", "-c", "a.c", "-o", "a.o"];
        ccache(&compile).ok().await;
        let object = fs::read(dir.path().join("a.o")).unwrap();
        // Without its local cache, it has the remote one alone.
        fs::remove_dir_all(dir.path().join("cache")).unwrap();
        fs::remove_file(dir.path().join("a.o")).unwrap();
        ccache(&compile).ok().await;
        assert_eq!(fs::read(dir.path().join("a.o")).unwrap(), object);
        let stats = ccache(&["--print-stats"]).ok().await;
        let count = |name: &str| stats.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap_or(0);
        let remote = ["remote_storage_hit", "remote_storage_read_hit", "secondary_storage_hit"].map(count).into_iter().max().unwrap();
        assert!(remote >= 1 && count("cache_miss") == 0, "{storage}: {stats}");
        assert_eq!(["remote_storage_error", "remote_storage_timeout"].map(count), [0, 0], "{storage}: {stats}");
    }
}

/// sccache's server. Stopped on drop.
struct StopServer(PathBuf, String);

impl Drop for StopServer {
    fn drop(&mut self) {
        let _ = Command::new(&self.0).arg("--stop-server").env("SCCACHE_SERVER_PORT", &self.1).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sccache_over_webdav() {
    let _turn = heavy().await;
    let Some(sccache) = tool("sccache", &["--version"]) else { return };
    let castier = castier_alone().await;
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("a.c"), "int main(void) { return 43; }\n").unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let endpoint = format!("http://{}/kv", castier.public);
    let run = |arguments: &[&str]| {
        let run = Run::new(&sccache, dir.path()).args(arguments).env("SCCACHE_WEBDAV_ENDPOINT", &endpoint);
        let run = run.env("SCCACHE_WEBDAV_KEY_PREFIX", "team").env("SCCACHE_SERVER_PORT", &port);
        run.env("SCCACHE_DIR", dir.path().join("sccache")).env("SCCACHE_CONF", dir.path().join("none")).env("HOME", dir.path())
    };
    run(&["--start-server"]).ok().await;
    let _stop = StopServer(sccache.clone(), port.clone());
    let compile = ["cc", "-c", "a.c", "-o", "a.o"];
    run(&compile).ok().await;
    let object = fs::read(dir.path().join("a.o")).unwrap();
    // It writes to the cache in the background. Its statistics show when that is done.
    crate::support::eventually("sccache has written", async || {
        let stats: serde_json::Value = serde_json::from_str(&run(&["--show-stats", "--stats-format=json"]).ok().await).unwrap();
        (stats["stats"]["cache_writes"].as_u64()? + stats["stats"]["cache_write_errors"].as_u64()? > 0).then_some(())
    })
    .await;
    fs::remove_file(dir.path().join("a.o")).unwrap();
    run(&compile).ok().await;
    assert_eq!(fs::read(dir.path().join("a.o")).unwrap(), object);
    let stats = run(&["--show-stats"]).ok().await;
    let line =
        |name: &str| stats.lines().find(|line| line.starts_with(name)).map(|line| line.split_whitespace().last().unwrap().to_owned());
    assert_eq!(line("Cache hits  ").as_deref(), Some("1"), "{stats}");
    for errors in ["Cache write errors", "Cache read errors", "Cache errors", "Cache timeouts"] {
        assert_eq!(line(errors).as_deref(), Some("0"), "{stats}");
    }
    assert!(stats.contains("webdav"), "{stats}");
    let books = metrics(&castier).await;
    assert!(books.sum("castier_http_requests_total", &[("route", "relay"), ("method", "OTHER"), ("code", "2xx")]) >= 1, "{}", books.text);
}
