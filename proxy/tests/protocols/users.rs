//! castier's own users: each real client logs in at castier, comes to a route with `access = "local"`, and says so if it may not.

use crate::{
    build::{Sccache, bazel_build, write_source},
    cargo::{self, PLACES, cargo_in, write_project},
    checks::asked,
    entrance::{Authority, tls_config},
    lfs::{self, Giftless, Git, clone, clones},
    nix::{self, Built},
    npm::{self, npm},
    oci::{self, Image, Skopeo, docker, pull, pull_to},
    pypi::{self, Index, pip},
    support::{
        Castier, People, Port, READER, Ran, Request, Seen, Upstream, User, WRITER, basic, castier, command, eventually, file_answer, noise,
        run, sha256, tool, turn,
    },
};
use std::{
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

const WRONG: User = ("reader", "guessed");

/// A client without the right credentials fails, in its own words, and nothing of it reaches the upstream.
#[track_caller]
fn is_refused(ran: Ran, says: &[&str], upstream: &Upstream) {
    let said = ran.fails();
    assert!(says.iter().any(|words| said.contains(words)), "{says:?}: {said}");
    assert!(!said.contains(READER.1) && !said.contains(WRITER.1), "{said}");
    assert_eq!(asked(upstream), [""; 0]);
}

/// castier's users are nothing to the upstream.
#[track_caller]
fn no_credentials_left(upstream: &Upstream) {
    assert!(upstream.seen().iter().all(|seen| seen.authorization().is_none()), "{}", upstream.history());
    assert!(!upstream.seen().is_empty());
}

fn creds(option: &str, (user, password): User) -> String {
    format!("--{option}={user}:{password}")
}

#[test]
fn skopeo() {
    let _turn = turn();
    let Some(registry) = oci::Registry::start("") else { return };
    let (image, new) = (Image::new(80, &[300_000, 2000]), Image::new(81, &[2000]));
    registry.push(&image, "team/app:1", &[]);
    let people = People::new();
    let castier = people.castier(&oci::route(&registry.front.url(), "access = \"local\""));

    // In the form of a registry: also what castier itself refuses.
    let manifest = Request::get("/v2/team/app/manifests/1");
    let (nobody, reader) = (
        manifest.send(castier.public),
        Request::new("PUT", "/v2/team/app/manifests/1").basic(READER.0, READER.1).body("x").send(castier.public),
    );
    for (refused, status, code) in [(nobody, 401, "UNAUTHORIZED"), (reader, 403, "DENIED")] {
        assert_eq!((refused.status, refused.header("content-type").as_deref()), (status, Some("application/json")));
        assert_eq!(refused.json()["errors"][0]["code"], code);
        assert_eq!(refused.header("www-authenticate").is_some(), status == 401);
    }
    is_refused(pull_to(castier.public, "team/app:1", &[]).0, &["unauthorized"], &registry.front);
    let wrong = pull_to(castier.public, "team/app:1", &[&creds("src-creds", WRONG)]).0;
    is_refused(wrong, &["unauthorized"], &registry.front);
    pull(castier.public, "team/app:1", &image, &[&creds("src-creds", READER)]);
    no_credentials_left(&registry.front);

    let skopeo = Skopeo::new();
    let log_in = |(user, password): User| {
        skopeo.run(&["login", "--tls-verify=false", "--username", user, "--password", password, &castier.public.to_string()])
    };
    let said = log_in(WRONG).fails();
    assert!(said.contains("invalid username/password"), "{said}");
    assert!(log_in(READER).ok().contains("Login Succeeded!"));
    // Logged in, it needs no password more.
    let inspected = skopeo.run(&["inspect", "--tls-verify=false", &docker(castier.public, "team/app:1")]).ok();
    assert!(inspected.contains(&image.digest()), "{inspected}");
    let dir = TempDir::new().unwrap();
    skopeo.copy(&docker(castier.public, "team/app:1"), &format!("dir:{}", dir.path().display()), &[]).ok();
    image.assert_in(dir.path());

    // A reader may not push, and a writer may.
    let to = docker(castier.public, "team/new:1");
    registry.front.take();
    let said = skopeo.copy(&new.source(), &to, &[]).fails();
    assert!(said.contains("403") || said.contains("denied"), "{said}");
    assert!(!registry.front.seen().iter().any(|seen| seen.method == "POST"), "{}", registry.front.history());
    Skopeo::new().copy(&new.source(), &to, &[&creds("dest-creds", WRITER)]).ok();
    pull(registry.real, "team/new:1", &new, &[]);
    no_credentials_left(&registry.front);
}

#[test]
fn pip_installs() {
    let _turn = turn();
    let Some(python) = tool("python") else { return };
    let index = Index::start(true);
    let people = People::new();
    let castier = people.castier(&format!(
        "[[route]]\nprotocol = \"pypi\"\nprefix = \"/python\"\nupstream = \"{}\"\nredirects = [\"{}\"]\naccess = \"local\"\n",
        index.index.url(),
        index.files.addr()
    ));
    let install = |at: String| {
        let dir = TempDir::new().unwrap();
        (pip(&python, dir.path(), &["install", "--no-input", "--target", "target", "app"], &format!("{at}/python/simple/")), dir)
    };
    for at in [castier.url(), castier.url_as(WRONG)] {
        is_refused(install(at).0, &["No matching distribution found"], &index.index);
    }
    for user in [READER, WRITER] {
        let (ran, dir) = install(castier.url_as(user));
        ran.ok();
        pypi::assert_installed(&dir.path().join("target"));
    }
    no_credentials_left(&index.index);
    no_credentials_left(&index.files);
}

#[test]
fn npm_installs() {
    let _turn = turn();
    let Some(program) = tool("npm") else { return };
    let registry = npm::Registry::start();
    let people = People::new();
    let castier = people.castier(&format!(
        "[[route]]\nprotocol = \"npm\"\nprefix = \"/js\"\nupstream = \"{}\"\naccess = \"local\"\n",
        registry.upstream.url()
    ));
    let install = |settings: &[String]| {
        let dir = TempDir::new().unwrap();
        let lines = settings.iter().map(|line| format!("//{}/js/:{line}\n", castier.public)).collect::<String>();
        fs::write(dir.path().join(".npmrc"), lines).unwrap();
        fs::write(dir.path().join("package.json"), r#"{"name":"x","version":"1.0.0","dependencies":{"app":"^1.0.0"}}"#).unwrap();
        (npm(&program, dir.path(), &["install"], &format!("{}/js/", castier.url())), dir)
    };
    let encode = |text: &str| data_encoding::BASE64.encode(text.as_bytes());
    let auth = |(user, password): User| format!("_auth={}", encode(&format!("{user}:{password}")));
    is_refused(install(&[]).0, &["E401"], &registry.upstream);
    is_refused(install(&[auth(WRONG)]).0, &["E401"], &registry.upstream);
    is_refused(install(&["_authToken=guessed".to_owned()]).0, &["E401"], &registry.upstream);
    let named = [format!("username={}", WRITER.0), format!("_password={}", encode(WRITER.1))];
    for settings in [&[auth(READER)][..], &named, &["_authToken=pull-t0ken".to_owned()]] {
        let (ran, dir) = install(settings);
        ran.ok();
        npm::assert_installed(dir.path());
    }
    no_credentials_left(&registry.upstream);
}

/// cargo sends its token as it is, so the token names the scheme.
#[test]
fn cargo_fetches() {
    let _turn = turn();
    let Some(cargo) = tool("cargo") else { return };
    for place in [PLACES[0], PLACES[2]] {
        let registry = cargo::Registry::start(&cargo, place);
        let people = People::new();
        let castier = people.castier(&format!(
            "[[route]]\nprotocol = \"cargo\"\nprefix = \"/crates\"\nupstream = \"{}\"\nredirects = [\"{}\"]\naccess = \"local\"\n",
            registry.index.url(),
            registry.files.addr()
        ));
        let fetch = |token: Option<&str>| {
            let dir = TempDir::new().unwrap();
            write_project(dir.path(), &castier);
            let config = dir.path().join(".cargo/config.toml");
            let token = token.map(|token| format!("token = \"{token}\"\n")).unwrap_or_default();
            let registry =
                format!("[registries.users]\nindex = \"sparse+{}/crates/\"\ncredential-provider = \"cargo:token\"\n{token}", castier.url());
            fs::write(&config, format!("{}{registry}", fs::read_to_string(&config).unwrap())).unwrap();
            (cargo_in(&cargo, dir.path(), &["fetch"]), dir)
        };
        is_refused(fetch(None).0, &["no token found"], &registry.index);
        is_refused(fetch(Some(&basic(WRONG.0, WRONG.1))).0, &["token rejected"], &registry.index);
        for token in [basic(READER.0, READER.1), "Bearer pull-t0ken".to_owned()] {
            let (ran, dir) = fetch(Some(&token));
            ran.ok();
            cargo_in(&cargo, dir.path(), &["check", "--frozen"]).ok();
        }
        no_credentials_left(&registry.index);
        no_credentials_left(&registry.files);
    }
}

#[test]
fn nix_copies() {
    let _turn = turn();
    let Some(built) = Built::new() else { return };
    let root = built.cache();
    let upstream = Upstream::answering(move |request| file_answer(&root, request));
    let people = People::new();
    let castier = people.castier(&nix::route(&upstream, ""));
    // Nix looks for it beside its configuration.
    let netrc = |(user, password): User| {
        fs::write(built.at("conf/netrc"), format!("machine 127.0.0.1\nlogin {user}\npassword {password}\n")).unwrap();
    };
    is_refused(built.copy(&castier.url(), &built.public_key).0, &["does not appear to be a binary cache"], &upstream);
    netrc(WRONG);
    is_refused(built.copy(&castier.url(), &built.public_key).0, &["does not appear to be a binary cache"], &upstream);
    netrc(WRITER);
    built.copies(&castier.url());
    no_credentials_left(&upstream);
}

#[test]
fn git_lfs_clones_and_pushes() {
    let _turn = turn();
    let Some(server) = Giftless::open() else { return };
    let people = People::new();
    let castier = people.castier(&lfs::route(&server.front, "access = \"local\"\nprefix = \"/lfs\""));
    let at = |url: &str| format!("{url}/lfs/org/repo");
    let dir = TempDir::new().unwrap();
    let hub = dir.path().join("hub.git");
    Git::new().publish(&hub, &at(&castier.url_as(WRITER)));
    server.front.take();
    let refused = ["Authentication required", "Authorization error", "could not read Username"];
    for url in [castier.url(), castier.url_as(WRONG)] {
        is_refused(clone(&hub, &at(&url)).0, &refused, &server.front);
    }
    clones(&hub, &at(&castier.url_as(READER)));
    no_credentials_left(&server.front);
    // By a helper: the address has no password in it.
    let git = Git::new();
    fs::write(git.home.path().join(".git-credentials"), format!("{}\n", castier.url_as(READER))).unwrap();
    git.ok(&["config", "--global", "credential.helper", "store"]);
    git.ok(&["-c", &format!("lfs.url={}", at(&castier.url())), "clone", &format!("file://{}", hub.display()), "copy"]);
    assert!(fs::metadata(git.home.path().join("copy/large.bin")).unwrap().len() > 1 << 20, "a pointer");
}

/// The links of a batch for uploads lead past castier, so a client that may not write gets none.
#[test]
fn git_lfs_pushes_nothing_for_readers() {
    let _turn = turn();
    let Some(server) = Giftless::open() else { return };
    let people = People::new();
    let castier = castier(&people.config("read", &lfs::route(&server.front, "access = \"local\"\nprefix = \"/lfs\"")));
    let at = |url: &str| format!("{url}/lfs/org/repo");
    let dir = TempDir::new().unwrap();
    let hub = |name: &str| dir.path().join(name);
    let nobody = Git::new().push(&hub("nobody.git"), &at(&castier.url()));
    is_refused(nobody, &["could not read Username"], &server.front);
    let reader = Git::new().push(&hub("reader.git"), &at(&castier.url_as(READER)));
    is_refused(reader, &["Authorization error"], &server.front);
    // Asked for credentials, git-lfs gets them from its helper.
    let writer = Git::new();
    fs::write(writer.home.path().join(".git-credentials"), format!("{}\n", castier.url_as(WRITER))).unwrap();
    writer.ok(&["config", "--global", "credential.helper", "store"]);
    writer.publish(&hub("writer.git"), &at(&castier.url()));
    clones(&hub("writer.git"), &at(&castier.url()));
    // The uploads themselves have the server's own.
    let basic = |seen: &Seen| seen.authorization().is_some_and(|value| value.starts_with("Basic"));
    assert_eq!(server.front.count(basic), 0, "{}", server.front.history());
    server.front.take();
    // For a server that takes names in any case, this is an upload.
    let body = r#"{"operation":"download","Operation":"upload","transfers":["basic"],"objects":[]}"#;
    let sly = Request::new("POST", "/lfs/org/repo/objects/batch").body(body);
    assert_eq!(sly.clone().basic(READER.0, READER.1).send(castier.public).status, 403);
    let answer = sly.send(castier.public);
    assert_eq!((answer.status, answer.header("www-authenticate").as_deref()), (401, Some("Basic realm=\"castier\"")));
    assert_eq!(asked(&server.front), [""; 0]);
}

/// Bazel over TLS with a token. Its options for certificates are for HTTP only since 5.0, and Debian has an earlier one: that trusts what its JVM trusts.
#[test]
fn bazel_builds_with_a_token() {
    let _turn = turn();
    let (Some(bazel), Some(keytool)) = (tool("bazel"), tool("keytool")) else { return };
    let (people, authority, dir) = (People::new(), Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["localhost"], dir.path());
    let scopes = people.config("none", &tls_config(&own, "")).replace("\"write:ac/ci\"", "\"write:cas\", \"write:ac/ci\"");
    let castier = castier(&scopes);
    let (store, ca) = (dir.path().join("trusted"), authority.ca());
    let import = ["-importcert", "-noprompt", "-alias", "ca", "-storepass", "changeit", "-file"];
    run(command(&keytool, dir.path()).args(import).arg(&ca).arg("-keystore").arg(&store)).ok();
    let trusts = [format!("Store={}", store.display()), "StorePassword=changeit".into()]
        .map(|set| format!("--host_jvm_args=-Djavax.net.ssl.trust{set}"));
    let trusts = trusts.each_ref().map(String::as_str);
    let root = TempDir::new().unwrap();
    let build = |instance: &str, token: &str| {
        let cache = format!("https://localhost:{}{instance}", castier.public.port());
        let header = format!("--remote_header=Authorization=Bearer {token}");
        let headers: Vec<&str> = [header.as_str()].into_iter().filter(|_| !token.is_empty()).collect();
        bazel_build(&bazel, root.path(), &cache, &trusts, &headers)
    };
    // Bazel goes on without its cache, and says why.
    for token in ["", "guessed"] {
        let refused = build("", token);
        assert!(refused.contains("401") && !refused.contains("remote cache hit"), "{refused}");
    }
    let first = build("", "t0ken");
    assert!(!first.contains("remote cache hit") && !first.contains("WARNING"), "{first}");
    for token in ["t0ken", "pull-t0ken"] {
        let second = build("", token);
        assert!(second.contains("2 remote cache hit"), "{token}: {second}");
    }
    // A build of a pull request stores its results in its own instance, and nowhere else.
    for (number, hits) in [(0, false), (1, true)] {
        let own = build("/ci", "ci-t0ken");
        assert!(own.contains("2 remote cache hit") == hits && !own.contains("WARNING"), "{number}: {own}");
    }
}

/// `--remote_header=Authorization=Bearer …` of Bazel is this header.
struct Curl {
    program: PathBuf,
    dir: TempDir,
}

impl Curl {
    fn status(&self, castier: &Castier, arguments: &[&str], target: &str) -> String {
        let mut curl = command(&self.program, self.dir.path());
        run(curl.args(["-s", "-m", "60", "-o", "body", "-w", "%{http_code}"]).args(arguments).arg(format!("{}{target}", castier.url())))
            .ok()
    }
}

#[test]
fn curl_with_the_header_of_bazel() {
    let _turn = turn();
    let Some(program) = tool("curl") else { return };
    let curl = Curl { program, dir: TempDir::new().unwrap() };
    let people = People::new();
    let castier = people.castier("");
    let bytes = noise(82, 200_000);
    fs::write(curl.dir.path().join("file"), &bytes).unwrap();
    let blob = format!("/cas/{}", sha256(&bytes));
    let bearer = |token: &str| format!("Authorization: Bearer {token}");
    assert_eq!(curl.status(&castier, &["-T", "file"], &blob), "401");
    assert_eq!(curl.status(&castier, &["-H", &bearer("guessed"), "-T", "file"], &blob), "401");
    assert_eq!(curl.status(&castier, &["-H", &bearer("pull-t0ken"), "-T", "file"], &blob), "403");
    assert_eq!(curl.status(&castier, &["-H", &bearer("t0ken"), "-T", "file"], &blob), "201");
    assert_eq!(curl.status(&castier, &["-u", "reader:read me"], &blob), "200");
    assert!(fs::read(curl.dir.path().join("body")).unwrap() == bytes);
    // A token for pull requests: it writes below its own action cache, and nowhere else.
    let pr = bearer("ci-t0ken");
    let key = "0".repeat(64);
    for (part, status) in [("ci/ac", "201"), ("ac", "403"), ("other/ac", "403"), ("kv/ci/ac", "403"), ("ci2/ac", "403")] {
        assert_eq!(curl.status(&castier, &["-H", &pr, "-T", "file"], &format!("/{part}/{key}")), status, "{part}");
    }
    assert_eq!(curl.status(&castier, &["-H", &pr, "-T", "file"], &blob), "403");
    assert_eq!(curl.status(&castier, &["-H", &pr, "-X", "DELETE"], &format!("/ci/ac/{key}")), "403");
    assert_eq!(curl.status(&castier, &["-H", &pr], &blob), "200");
    let other = Request::new("PUT", &format!("/ac/{key}")).body("x").bearer("t0ken").send(castier.public);
    assert_eq!((other.status, curl.status(&castier, &["-H", &pr], &format!("/ac/{key}")).as_str()), (201, "200"));
}

/// Compiles without a local cache. Returns what ccache counted, and what it wrote in its log.
fn compile(ccache: &Path, dir: &Path, url: &str) -> (String, String) {
    let cache = TempDir::new().unwrap();
    let ran = |args: &[&str]| {
        let mut ccache = command(ccache, dir);
        ccache.args(args).env("CCACHE_DIR", cache.path()).env("CCACHE_CONFIGPATH", "/dev/null");
        run(ccache.env("CCACHE_REMOTE_STORAGE", url).env("CCACHE_LOGFILE", cache.path().join("log"))).ok()
    };
    ran(&["cc", "-c", "a.c", "-o", "a.o"]);
    let stats = ran(&["--print-stats"]);
    (stats, fs::read_to_string(cache.path().join("log")).unwrap())
}

fn count(stats: &str, name: &str) -> u64 {
    stats.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

#[test]
fn ccache_stores_and_finds() {
    let _turn = turn();
    let Some(ccache) = tool("ccache") else { return };
    let people = People::new();
    let castier = people.castier("");
    let dir = TempDir::new().unwrap();
    write_source(dir.path());
    let at = |user: User, part: &str| format!("{}{part}", castier.url_as(user));
    // Refused, it compiles, and says why its cache did not help.
    for (url, status) in [(format!("{}/kv/team", castier.url()), "401"), (at(WRONG, "/kv/team"), "401"), (at(READER, "/kv/team"), "403")] {
        let (stats, log) = compile(&ccache, dir.path(), &url);
        assert!(count(&stats, "remote_storage_error") > 0 && count(&stats, "remote_storage_hit") == 0, "{url}: {stats}");
        assert!(log.contains(status), "{status}: {log}");
        assert!(!log.contains("guessed") && !log.contains(READER.1) && !log.contains("read%20me"), "{log}");
    }
    // Confined to one action cache, it stores there, finds what it has stored, and stores nowhere else.
    let with_token = |part: &str| {
        let (path, layout) = part.split_once('|').unwrap_or((part, "layout=subdirs"));
        format!("{}{path}|{layout}|bearer-token=ci-t0ken", castier.url())
    };
    let own = "/ci|layout=bazel";
    for (round, part) in [own, own, "|layout=bazel", "/other|layout=bazel", "/kv/team"].into_iter().enumerate() {
        for url in [with_token(part), at(("ci", "pull"), part)] {
            let (stats, log) = compile(&ccache, dir.path(), &url);
            let (hits, errors) = (count(&stats, "direct_cache_hit"), count(&stats, "remote_storage_error"));
            assert_eq!(errors > 0, part != own, "{url}: {stats}{log}");
            assert!(hits == 0 || part == own, "{url}: {stats}");
            assert!(hits == 1 || round != 1, "{url}: {stats}");
        }
    }
    for hits in 0..2 {
        let (stats, _) = compile(&ccache, dir.path(), &at(WRITER, "/kv/team"));
        assert_eq!((count(&stats, "direct_cache_hit"), count(&stats, "remote_storage_error")), (hits, 0), "{stats}");
    }
    // A reader finds it.
    assert_eq!(count(&compile(&ccache, dir.path(), &at(READER, "/kv/team")).0, "direct_cache_hit"), 1);
}

#[test]
fn sccache_stores_and_finds() {
    let _turn = turn();
    let Some(program) = tool("sccache") else { return };
    let people = People::new();
    let castier = people.castier("");
    let dir = TempDir::new().unwrap();
    write_source(dir.path());
    // A server of its own each time. Returns how it ended to start, or the number of hits.
    let compile = |credentials: &[(&'static str, &str)]| {
        let port = Port::free();
        let mut env = vec![
            ("SCCACHE_WEBDAV_ENDPOINT", format!("{}/kv", castier.url())),
            ("SCCACHE_WEBDAV_KEY_PREFIX", "team".to_owned()),
            ("SCCACHE_SERVER_PORT", port.number().to_string()),
            ("SCCACHE_CONF", "none".to_owned()),
        ];
        env.extend(credentials.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let started = run(command(&program, dir.path()).arg("--start-server").envs(env.iter().cloned()));
        if !started.success() {
            return Err(started.fails());
        }
        let sccache = Sccache { program: &program, dir: dir.path(), env };
        sccache.run(&["cc", "-c", "a.c", "-o", "a.o"]);
        let hits = sccache.figure("/stats/cache_hits/counts/C~1C++");
        // It writes in the background.
        eventually("sccache has written", || {
            (hits + sccache.figure("/stats/cache_writes") + sccache.figure("/stats/cache_write_errors") > 0).then_some(())
        });
        assert_eq!(sccache.figure("/stats/cache_write_errors"), 0);
        Ok(hits)
    };
    let user = |(name, password): User| [("SCCACHE_WEBDAV_USERNAME", name), ("SCCACHE_WEBDAV_PASSWORD", password)];
    for said in [compile(&[]), compile(&user(WRONG)), compile(&[("SCCACHE_WEBDAV_TOKEN", "guessed")])] {
        let said = said.unwrap_err();
        assert!(said.contains("401") || said.contains("PermissionDenied"), "{said}");
    }
    assert_eq!(compile(&user(WRITER)), Ok(0));
    assert_eq!(compile(&[("SCCACHE_WEBDAV_TOKEN", "t0ken")]), Ok(1));
    assert_eq!(compile(&user(READER)), Ok(1));
}
