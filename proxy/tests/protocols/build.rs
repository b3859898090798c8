//! Build tools with a remote cache: what castier asks the cache for, and what not. (`tests/it/build_caches.rs` has them with castier alone.)

use crate::support::{Castier, Port, Running, Upstream, castier, castier_program, command, eventually, lines, run, tool, turn};
use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};
use tempfile::TempDir;

/// The real remote cache, behind a counter.
struct Store {
    upstream: Upstream,
    _program: Running,
    _dir: TempDir,
}

impl Store {
    fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let mut program = command(castier_program().with_file_name("castier-origin"), dir.path());
        program.args(["--listen", "127.0.0.1:0", "--root", "store"]).env("CASTIER_LISTEN__ADMIN", "127.0.0.1:0");
        let mut program = Running::start(&mut program);
        let addr: SocketAddr = program.says("its address", |log| {
            log.lines().find_map(|line| line.split("listening public ").nth(1)?.split([' ', '"']).next()?.parse().ok())
        });
        Self { upstream: Upstream::before(addr), _program: program, _dir: dir }
    }

    /// How many requests of each method went to a part of the store, with these statuses.
    fn counts(&self, part: &str) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for seen in self.upstream.seen().iter().filter(|seen| seen.target.contains(part)) {
            *counts.entry(format!("{} {}", seen.method, seen.status)).or_default() += 1;
        }
        counts
    }
}

/// A build in a workspace of its own, with these options of Bazel itself and of the build besides. Returns what Bazel said.
pub(crate) fn bazel_build(bazel: &Path, root: &Path, cache: &str, startup: &[&str], more: &[&str]) -> String {
    let workspace = TempDir::new().unwrap();
    let at = workspace.path();
    fs::write(at.join("WORKSPACE"), "").unwrap();
    fs::write(at.join("input.txt"), "what is built from").unwrap();
    let rule = "genrule(name = \"NAME\", srcs = [\"input.txt\"], outs = [\"NAME.txt\"], cmd = \"cat $(SRCS) > $@; echo NAME >> $@\")\n";
    fs::write(at.join("BUILD"), ["one", "two"].map(|name| rule.replace("NAME", name)).concat()).unwrap();
    let mut build = command(bazel, at);
    build.args(["--batch", "--nohome_rc", "--noworkspace_rc"]).arg(format!("--output_user_root={}", root.display())).args(startup);
    build.args(["build", "--spawn_strategy=local", "--remote_upload_local_results", "--remote_local_fallback"]);
    let ran = run(build.arg(format!("--remote_cache={cache}")).args(more).arg("//:all"));
    assert!(ran.success(), "{ran}");
    assert_eq!(fs::read_to_string(at.join("bazel-bin/two.txt")).unwrap(), "what is built fromtwo\n");
    ran.said()
}

/// Bazel with a route: what one workspace built is a hit in the next one, and what castier has does not come again.
#[test]
fn bazel_through_a_route() {
    let _turn = turn();
    let Some(bazel) = tool("bazel") else { return };
    let store = Store::start();
    let castier = castier(&format!(
        "[[route]]\nprotocol = \"bazel\"\nprefix = \"/build\"\nupstream = \"{}\"\nproof_ttl = \"1h\"\n",
        store.upstream.url()
    ));
    let (root, cache) = (TempDir::new().unwrap(), format!("{}/build", castier.url()));
    let build = || bazel_build(&bazel, root.path(), &cache, &[], &[]);

    let first = build();
    assert!(!first.contains("remote cache hit") && !first.contains("WARNING"), "{first}");
    assert_eq!(store.counts("/ac/").get("PUT 201"), Some(&2), "{}", store.upstream.history());
    store.upstream.take();

    // What was stored through a route comes from the store once.
    let second = build();
    assert!(second.contains("2 remote cache hit"), "{second}");
    assert!(!store.upstream.seen().iter().any(|seen| seen.method == "PUT"), "{}", store.upstream.history());
    store.upstream.take();

    let third = build();
    assert!(third.contains("2 remote cache hit"), "{third}");
    let seen = store.upstream.take();
    let only = seen.iter().all(|seen| seen.target.contains("/ac/") && seen.status == 304);
    assert!(seen.len() == 2 && only, "one conditional question for each action: {}", lines(&seen));

    store.upstream.kill();
    let last = build();
    assert!(last.contains("2 remote cache hit"), "{last}");
}

/// castier in front of the store, without a route.
fn before(store: &Store) -> Castier {
    castier(&format!("origin.url = \"{}\"\n", store.upstream.url()))
}

pub(crate) fn write_source(dir: &Path) {
    fs::write(dir.join("a.c"), "int main(void) { return 42; }\n").unwrap();
}

/// ccache in the layout of Bazel's store: on a hit, its entry is asked about, and nothing else.
#[test]
fn ccache_through_castier() {
    let _turn = turn();
    let Some(ccache) = tool("ccache") else { return };
    let store = Store::start();
    let castier = before(&store);
    for (address, part) in [("|layout=bazel", "/ac/"), ("/kv/team|layout=flat", "/kv/")] {
        let url = format!("{}{address}", castier.url());
        let dir = TempDir::new().unwrap();
        write_source(dir.path());
        // Each time without a local cache. Returns the object, and whether it was a hit.
        let compile = || {
            let cache = TempDir::new().unwrap();
            let ccache = |args: &[&str]| {
                let mut ccache = command(&ccache, dir.path());
                ccache.args(args).env("CCACHE_DIR", cache.path()).env("CCACHE_CONFIGPATH", "/dev/null");
                run(ccache.env("CCACHE_REMOTE_STORAGE", &url)).ok()
            };
            ccache(&["cc", "-c", "a.c", "-o", "a.o"]);
            let stats = ccache(&["--print-stats"]);
            let count = |name: &str| stats.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap_or(0);
            (fs::read(dir.path().join("a.o")).unwrap(), count("cache_miss") == 0)
        };
        let (object, hit) = compile();
        assert!(!hit && store.counts(part).contains_key("PUT 201"), "{}", store.upstream.history());
        // Once for what has just been stored.
        assert_eq!(compile(), (object.clone(), true));
        store.upstream.take();
        assert_eq!(compile(), (object.clone(), true));
        let seen = store.upstream.take();
        assert!(!seen.is_empty() && seen.iter().all(|seen| seen.target.contains(part) && seen.status == 304), "{}", lines(&seen));
        // An entry that cannot be asked about is no hit, and no failure either.
        store.upstream.kill();
        assert_eq!(compile(), (object, false));
        store.upstream.up();
    }
}

/// sccache's server. Stopped on drop.
pub(crate) struct Sccache<'a> {
    pub(crate) program: &'a Path,
    pub(crate) dir: &'a Path,
    pub(crate) env: Vec<(&'static str, String)>,
}

impl Sccache<'_> {
    pub(crate) fn run(&self, args: &[&str]) -> String {
        run(command(self.program, self.dir).args(args).envs(self.env.iter().cloned())).ok()
    }

    /// A figure of its statistics.
    pub(crate) fn figure(&self, path: &str) -> u64 {
        let stats: serde_json::Value = serde_json::from_str(&self.run(&["--show-stats", "--stats-format=json"])).unwrap();
        stats.pointer(path).and_then(serde_json::Value::as_u64).unwrap_or(0)
    }
}

impl Drop for Sccache<'_> {
    fn drop(&mut self) {
        let _ = run(command(self.program, self.dir).arg("--stop-server").envs(self.env.iter().cloned()));
    }
}

/// sccache in the store's key-value part: the same.
#[test]
fn sccache_through_castier() {
    let _turn = turn();
    let Some(program) = tool("sccache") else { return };
    let store = Store::start();
    let castier = before(&store);
    let dir = TempDir::new().unwrap();
    write_source(dir.path());
    // A server of its own each time. Returns the object, and the number of hits.
    let compile = || {
        let port = Port::free();
        let env = vec![
            ("SCCACHE_WEBDAV_ENDPOINT", format!("{}/kv", castier.url())),
            ("SCCACHE_WEBDAV_KEY_PREFIX", "team".to_owned()),
            ("SCCACHE_SERVER_PORT", port.number().to_string()),
            ("SCCACHE_CONF", "none".to_owned()),
        ];
        let sccache = Sccache { program: &program, dir: dir.path(), env };
        sccache.run(&["--start-server"]);
        sccache.run(&["cc", "-c", "a.c", "-o", "a.o"]);
        let hits = sccache.figure("/stats/cache_hits/counts/C~1C++");
        // It writes in the background.
        eventually("sccache has written", || {
            (hits + sccache.figure("/stats/cache_writes") + sccache.figure("/stats/cache_write_errors") > 0).then_some(())
        });
        assert_eq!(sccache.figure("/stats/cache_write_errors"), 0);
        (fs::read(dir.path().join("a.o")).unwrap(), hits)
    };
    let (object, hits) = compile();
    assert!(hits == 0 && store.counts("/kv/team/").contains_key("PUT 201"), "{}", store.upstream.history());
    assert_eq!(compile(), (object.clone(), 1));
    store.upstream.take();
    assert_eq!(compile(), (object, 1));
    // Apart from what it asks to see that the store works, one conditional question.
    let seen = store.upstream.take();
    let entries: Vec<_> = seen.iter().filter(|seen| seen.method == "GET" && !seen.target.ends_with("check")).collect();
    assert!(entries.len() == 1 && entries[0].status == 304, "{}", lines(&seen));
}
