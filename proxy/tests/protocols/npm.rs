//! A registry of npm: real npm and pnpm, packages with and without a scope, whole and abbreviated documents.

use crate::{
    checks::{asked, gets, only_revalidated, refused},
    pack::tgz,
    support::{Castier, Ran, Request, Response, Upstream, castier, command, entity, lines, noise, run, tool, turn},
};
use sha2::Digest as _;
use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};
use tempfile::TempDir;

/// The media type of an abbreviated document.
const ABBREVIATED: &str = "application/vnd.npm.install-v1+json";

/// Name, version, and what it needs.
const PACKAGES: [(&str, &str, &str); 5] = [
    ("app", "1.0.0", r#"{"@team/lib":"^1.0.0","left":"*"}"#),
    ("left", "1.2.3", "{}"),
    ("left", "1.0.0", "{}"),
    ("@team/lib", "1.1.0", r#"{"left":"^1.2.0"}"#),
    ("bad", "1.0.0", "{}"),
];

/// The tarball of a package.
fn tarball(name: &str, version: &str, needs: &str) -> Vec<u8> {
    let manifest = format!(r#"{{"name":"{name}","version":"{version}","main":"index.js","dependencies":{needs}}}"#);
    let code = format!("module.exports = '{name} {version}';\n");
    let data = noise(name.len() as u64, 100_000);
    tgz(&[("package/package.json", manifest.as_bytes()), ("package/index.js", code.as_bytes()), ("package/data.bin", &data)])
}

fn tarball_path(name: &str, version: &str) -> String {
    format!("/{name}/-/{}-{version}.tgz", name.rsplit('/').next().unwrap())
}

fn integrity(bytes: &[u8]) -> String {
    format!("sha512-{}", data_encoding::BASE64.encode(&sha2::Sha512::digest(bytes)))
}

/// The document of a package, as text that no writer of JSON would give: only its links may change.
fn document(name: &str, abbreviated: bool, registry: &str) -> String {
    let versions = PACKAGES.iter().filter(|(package, ..)| *package == name).map(|(_, version, needs)| {
        let (bytes, path) = (tarball(name, version, needs), tarball_path(name, version));
        let integrity = integrity(&bytes);
        let more = if abbreviated { String::new() } else { format!("\"description\" : \"see {registry}{path} \\u00e9\",") };
        format!(
            "\"{version}\" :{{\"name\":\"{name}\", \"version\":\"{version}\",{more} \"dependencies\":{needs},\n\t\"dist\":{{\"integrity\":\"{integrity}\",\
             \"tarball\" : \"{registry}{path}\", \"fileCount\":3}} }}"
        )
    });
    let versions: Vec<_> = versions.collect();
    let latest = PACKAGES.iter().find(|(package, ..)| *package == name).unwrap().1;
    let modified = "\"modified\":\"2024-01-02T03:04:05.678Z\"";
    let more = if abbreviated {
        modified.to_owned()
    } else {
        format!("\"_id\":\"{name}\",\"readme\":\"\\ud83d\\ude00 1.0e3\",\"time\":{{{modified}}}")
    };
    format!("{{\"name\":\"{name}\",{more},\"dist-tags\":{{\"latest\":\"{latest}\"}},\"versions\":{{{}}} }}", versions.join(","))
}

/// The bodies of POSTs, with their `Content-Encoding`.
type Posts = Arc<Mutex<Vec<(Option<String>, Vec<u8>)>>>;

/// The registry.
pub(crate) struct Registry {
    pub(crate) upstream: Upstream,
    /// Tarballs by path.
    tarballs: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    posts: Posts,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let tarballs = PACKAGES.iter().map(|(name, version, needs)| (tarball_path(name, version), tarball(name, version, needs)));
        let tarballs = Arc::new(Mutex::new(tarballs.collect::<BTreeMap<_, _>>()));
        let posts = Posts::default();
        let (files, bodies) = (tarballs.clone(), posts.clone());
        let own = Arc::new(OnceLock::<SocketAddr>::new());
        let addr = own.clone();
        let upstream = Upstream::answering(move |request| {
            if request.method == "POST" {
                bodies.lock().unwrap().push((request.header("content-encoding"), request.body.clone()));
                return Response::ok("application/json", "{}").with("X-Audited", "yes");
            }
            if let Some(bytes) = files.lock().unwrap().get(request.path()) {
                return entity(request, "application/octet-stream", bytes).with("Cache-Control", "public, immutable, max-age=31557600");
            }
            let name = request.path()[1..].replace("%2f", "/").replace("%2F", "/");
            if !PACKAGES.iter().any(|(package, ..)| *package == name) {
                return Response::new(404).with("Content-Type", "application/json").body("{\"error\":\"Not found\"}");
            }
            let abbreviated = request.header("accept").unwrap_or_default().contains(ABBREVIATED);
            let document = document(&name, abbreviated, &format!("http://{}", addr.get().unwrap()));
            let kind = if abbreviated { ABBREVIATED } else { "application/json" };
            entity(request, kind, document.as_bytes()).with("Cache-Control", "public, max-age=300").with("Vary", "accept-encoding, accept")
        });
        own.set(upstream.addr()).unwrap();
        Self { upstream, tarballs, posts }
    }

    fn castier(&self) -> Castier {
        castier(&format!(
            "[[route]]\nprotocol = \"npm\"\nprefix = \"/js\"\nupstream = \"{}\"\nttl = \"0s\"\nproof_ttl = \"1h\"\n",
            self.upstream.url()
        ))
    }
}

pub(crate) fn assert_installed(dir: &Path) {
    let modules = dir.join("node_modules");
    let code = |path: &str| fs::read_to_string(modules.join(path)).unwrap();
    assert_eq!(code("app/index.js"), "module.exports = 'app 1.0.0';\n");
    assert!(fs::read(modules.join("app/data.bin")).unwrap() == noise(3, 100_000));
}

/// Installs with an empty cache, three times: cold, kept, and with the registry dead.
fn installs(install: impl Fn(&str, &Path)) {
    let registry = Registry::start();
    let castier = registry.castier();
    let installed = || {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("package.json"), r#"{"name":"x","version":"1.0.0","dependencies":{"app":"^1.0.0"}}"#).unwrap();
        install(&format!("{}/js/", castier.url()), dir.path());
        assert_installed(dir.path());
    };
    installed();
    let mut cold = asked(&registry.upstream);
    cold.retain(|line| line.starts_with("GET "));
    let all = cold.len();
    cold.dedup();
    assert_eq!(cold.len(), all, "each once: {cold:?}");
    let cold: Vec<_> = cold.iter().map(|line| line.replace("%2f", "/").replace("%2F", "/")).collect();
    let documents = ["GET /@team/lib", "GET /app", "GET /left"];
    let tarballs = ["/@team/lib/-/lib-1.1.0.tgz", "/app/-/app-1.0.0.tgz", "/left/-/left-1.2.3.tgz"].map(|path| format!("GET {path}"));
    for wanted in documents.map(str::to_owned).iter().chain(&tarballs) {
        assert!(cold.contains(wanted), "{wanted} is not in {cold:?}");
    }

    installed();
    let warm: Vec<_> = registry.upstream.take().into_iter().filter(|seen| seen.method == "GET").collect();
    assert!(!warm.is_empty() && warm.iter().all(|seen| seen.status == 304), "only documents, and only revalidated: {}", lines(&warm));

    registry.upstream.kill();
    installed();
}

/// npm without settings and without a cache.
pub(crate) fn npm(program: &Path, dir: &Path, args: &[&str], registry: &str) -> Ran {
    let mut npm = command(program, dir);
    npm.args(args).args([
        "--registry",
        registry,
        "--cache",
        "cache",
        "--fetch-retries=0",
        "--fetch-timeout=60000",
        "--update-notifier=false",
        "--no-fund",
    ]);
    run(npm.env("npm_config_userconfig", dir.join("none")).env("npm_config_globalconfig", dir.join("none-global")))
}

#[test]
fn npm_installs() {
    let _turn = turn();
    let Some(program) = tool("npm") else { return };
    installs(|registry, dir| {
        npm(&program, dir, &["install"], registry).ok();
        // Each package comes from where castier says.
        let lock = fs::read_to_string(dir.join("package-lock.json")).unwrap();
        assert_eq!(lock.matches("\"resolved\"").count(), 3, "{lock}");
        assert_eq!(lock.matches(&format!("\"resolved\": \"{registry}")).count(), 3, "{lock}");
    });
}

#[test]
fn pnpm_installs() {
    let _turn = turn();
    let Some(program) = tool("pnpm") else { return };
    installs(|registry, dir| {
        let mut pnpm = command(&program, dir);
        pnpm.args(["install", "--registry", registry, "--store-dir", "store", "--config.cache-dir=cache", "--config.fetch-retries=0"]);
        run(pnpm.env("CI", "true").env("npm_config_userconfig", dir.join("none"))).ok();
    });
}

/// `npm audit` and everything else that is no download goes through as it is, every time.
#[test]
fn an_audit_is_relayed() {
    let _turn = turn();
    let Some(program) = tool("npm") else { return };
    let registry = Registry::start();
    let castier = registry.castier();
    let (at, dir) = (format!("{}/js/", castier.url()), TempDir::new().unwrap());
    fs::write(dir.path().join("package.json"), r#"{"name":"x","version":"1.0.0","dependencies":{"left":"^1.0.0"}}"#).unwrap();
    npm(&program, dir.path(), &["install", "--no-audit"], &at).ok();
    registry.posts.lock().unwrap().clear();
    for _ in 0..2 {
        let said = npm(&program, dir.path(), &["audit"], &at).ok();
        assert!(said.contains("found 0 vulnerabilities"), "{said}");
    }
    let posts = registry.posts.lock().unwrap().clone();
    assert_eq!(posts.len(), 2, "relayed each time");
    assert_eq!(posts[0], posts[1]);
    // A body that is coded stays so.
    let post = Request::new("POST", "/js/-/npm/v1/security/advisories/bulk").with("Content-Encoding", "gzip");
    let body = crate::pack::gzip(b"{\"left\":[\"1.2.3\"]}");
    let answer = post.body(body.clone()).send(castier.public);
    assert_eq!((answer.status, answer.header("x-audited").as_deref(), answer.text().as_str()), (200, Some("yes"), "{}"));
    assert_eq!(registry.posts.lock().unwrap()[2], (Some("gzip".to_owned()), body));
    registry.upstream.take();
    for _ in 0..2 {
        assert_eq!(Request::get("/js/-/v1/search?text=left").send(castier.public).status, 404);
    }
    assert_eq!(asked(&registry.upstream), ["GET /-/v1/search?text=left"; 2]);
}

/// The document with its links led to castier, and every other byte as it was.
fn through(document: &str, upstream: &Upstream, castier: &Castier) -> String {
    let link = format!("\"tarball\" : \"{}", upstream.url());
    assert!(document.contains(&link));
    document.replace(&link, &format!("\"tarball\" : \"{}/js", castier.url()))
}

/// Whole and abbreviated documents are kept apart, both forms of a scoped name work, and only the links of tarballs change.
#[test]
fn documents_are_kept_apart_and_only_links_change() {
    let _turn = turn();
    let registry = Registry::start();
    let castier = registry.castier();
    let accept_npm = format!("{ABBREVIATED}; q=1.0, application/json; q=0.8, */*");
    for round in 0..2 {
        for (path, name) in [("left", "left"), ("@team%2flib", "@team/lib"), ("@team/lib", "@team/lib")] {
            for (accept, abbreviated) in [("application/json", false), (accept_npm.as_str(), true), ("*/*", false)] {
                let request = Request::get(&format!("/js/{path}")).with("Accept", accept);
                let original = document(name, abbreviated, &registry.upstream.url());
                let answer = gets(castier.public, &request, through(&original, &registry.upstream, &castier).as_bytes());
                assert_eq!(answer.header("content-type").as_deref(), Some(if abbreviated { ABBREVIATED } else { "application/json" }));
                let etag = answer.header("etag").expect("an ETag");
                assert_eq!(request.with("If-None-Match", &etag).send(castier.public).status, 304);
            }
        }
        if round > 0 {
            only_revalidated(&registry.upstream);
        }
        registry.upstream.take();
    }
    // By another name of castier, the links have that name.
    let answer = Request::get("/js/left").with("Host", "cache.test:1234").with("Accept", "*/*").send(castier.public);
    assert!(answer.text().contains("\"tarball\" : \"http://cache.test:1234/js/left/-/left-1.2.3.tgz\""), "{}", answer.text());
}

/// A tarball that is not what the document says is not kept, and not passed on as whole. Once it is right, it is.
#[test]
fn a_tarball_with_another_integrity_is_refused() {
    let _turn = turn();
    for accept in [ABBREVIATED, "application/json"] {
        let registry = Registry::start();
        let castier = registry.castier();
        let path = tarball_path("bad", "1.0.0");
        let right = registry.tarballs.lock().unwrap()[&path].clone();
        registry.tarballs.lock().unwrap().get_mut(&path).unwrap()[50_000] ^= 1;
        assert_eq!(Request::get("/js/bad").with("Accept", accept).send(castier.public).status, 200);
        asked(&registry.upstream);
        let request = Request::get(&format!("/js{path}"));
        for _ in 0..2 {
            refused(castier.public, &request);
            let times = asked(&registry.upstream).len();
            assert!((1..=2).contains(&times), "it is not kept, and fetched again at most once: {times}");
        }
        registry.tarballs.lock().unwrap().insert(path, right.clone());
        gets(castier.public, &request, &right);
        registry.upstream.kill();
        gets(castier.public, &request, &right);
    }
}
