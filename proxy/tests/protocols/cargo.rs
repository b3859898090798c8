//! A sparse registry of cargo, with the crates on another host: real cargo.

use crate::{
    checks::{asked, gets, only_revalidated, refused},
    pack::tgz,
    support::{Castier, Ran, Request, Response, Upstream, castier, command, entity, noise, run, sha256, tool, turn},
};
use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// The forms in which a registry says where its crates are. The first two get `/{crate}/{version}/download` added.
pub(crate) const PLACES: [&str; 4] =
    ["/crates", "/store/v1", "/{crate}-{version}.crate", "/files/{prefix}/{lowerprefix}/{crate}/{crate}-{version}-{sha256-checksum}.crate"];

/// The path of a crate.
fn path_of(place: &str, name: &str, bytes: &[u8]) -> String {
    let place = if place.contains('{') { place.to_owned() } else { format!("{place}/{{crate}}/{{version}}/download") };
    let prefix = if name.len() == 3 { format!("3/{}", &name[..1]) } else { format!("{}/{}", &name[..2], &name[2..4]) };
    let place = place.replace("{prefix}", &prefix).replace("{lowerprefix}", &prefix).replace("{crate}", name).replace("{version}", "1.0.0");
    place.replace("{sha256-checksum}", &sha256(bytes))
}

/// The registry: its index and the host of its crates.
pub(crate) struct Registry {
    pub(crate) index: Upstream,
    pub(crate) files: Upstream,
    /// Crates by name.
    crates: Arc<Mutex<BTreeMap<String, Vec<u8>>>>,
    /// Where the crates are, below their host: one of [`PLACES`].
    place: &'static str,
    config: String,
}

/// A crate as `cargo package` makes it: the test's own package, in a folder of its own.
fn package(cargo: &Path, name: &str) -> Vec<u8> {
    let dir = TempDir::new().unwrap();
    write_crate(dir.path(), name, "", "pub const NAME: &str = \"made by cargo\";\n");
    cargo_in(cargo, dir.path(), &["package", "--allow-dirty", "--no-verify", "--offline", "--quiet"]).ok();
    fs::read(dir.path().join(format!("target/package/{name}-1.0.0.crate"))).unwrap()
}

fn manifest(name: &str, dependencies: &str) -> String {
    format!(
        "[package]\nname = \"{name}\"\nversion = \"1.0.0\"\nedition = \"2021\"\ndescription = \"x\"\nlicense = \"MIT\"\nhomepage = \"http://x.invalid\"\n\n\
         [dependencies]\n{dependencies}\n"
    )
}

fn write_crate(dir: &Path, name: &str, dependencies: &str, code: &str) {
    fs::create_dir_all(dir.join("src")).unwrap();
    fs::write(dir.join("Cargo.toml"), manifest(name, dependencies)).unwrap();
    fs::write(dir.join("src/lib.rs"), code).unwrap();
}

/// cargo without settings, with its home below the directory.
pub(crate) fn cargo_in(cargo: &Path, dir: &Path, args: &[&str]) -> Ran {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let rustup = env::var_os("RUSTUP_HOME").map_or_else(|| home.join(".rustup"), PathBuf::from);
    let mut cargo = command(cargo, dir);
    cargo.args(args).env("CARGO_HOME", dir.join("home")).env("RUSTUP_HOME", rustup).env("CARGO_NET_RETRY", "0");
    // The toolchain of these tests, whatever the machine's default is.
    cargo.envs(env::var_os("RUSTUP_TOOLCHAIN").map(|toolchain| ("RUSTUP_TOOLCHAIN", toolchain)));
    run(&mut cargo)
}

impl Registry {
    pub(crate) fn start(cargo: &Path, place: &'static str) -> Self {
        let leaf = package(cargo, "leaf-crate");
        let code = "pub fn name() -> &'static str { leaf_crate::NAME }\npub static DATA: &[u8] = include_bytes!(\"data.bin\");\n";
        let data = noise(7, 200_000);
        let manifest = manifest("mid", "leaf-crate = \"1\"");
        let mid = tgz(&[
            ("mid-1.0.0/Cargo.toml", manifest.as_bytes()),
            ("mid-1.0.0/src/lib.rs", code.as_bytes()),
            ("mid-1.0.0/src/data.bin", &data),
        ]);
        let line = |name: &str, needs: &str, bytes: &[u8]| {
            let sum = sha256(bytes);
            format!(
                "{{\"name\":\"{name}\",\"vers\":\"1.0.0\",\"deps\":[{needs}],\"cksum\":\"{sum}\",\"features\":{{}},\"yanked\":false}}\n"
            )
        };
        let needs = "{\"name\":\"leaf-crate\",\"req\":\"^1\",\"features\":[],\"optional\":false,\"default_features\":true,\"target\":null,\"kind\":\"normal\"}";
        let entries = BTreeMap::from([
            ("/le/af/leaf-crate".to_owned(), line("leaf-crate", "", &leaf)),
            ("/3/m/mid".to_owned(), line("mid", needs, &mid)),
        ]);
        let paths = BTreeMap::from([(path_of(place, "leaf-crate", &leaf), "leaf-crate"), (path_of(place, "mid", &mid), "mid")]);
        let crates = Arc::new(Mutex::new(BTreeMap::from([("leaf-crate".to_owned(), leaf), ("mid".to_owned(), mid)])));
        let kept = crates.clone();
        let files = Upstream::answering(move |request| match paths.get(request.path()) {
            Some(name) => entity(request, "application/x-tar", &kept.lock().unwrap()[*name]),
            None => Response::new(403).body("AccessDenied"),
        });
        // `api` is not for downloads, and stays. Written with more space and escapes than usual.
        let config = format!("{{\n  \"dl\" : \"{}\\{place}\",\n  \"api\":\"http://api.invalid\"  }}\n", files.url());
        let answer = config.clone();
        let index = Upstream::answering(move |request| {
            let found = match request.path() {
                "/config.json" => Some(("application/json", &answer)),
                path => entries.get(path).map(|entry| ("text/plain", entry)),
            };
            match found {
                Some((kind, text)) => entity(request, kind, text.as_bytes()).with("Cache-Control", "public,max-age=600"),
                None => Response::new(404).body("NoSuchKey"),
            }
        });
        Self { index, files, crates, place, config }
    }

    fn castier(&self) -> Castier {
        castier(&format!(
            "[[route]]\nprotocol = \"cargo\"\nprefix = \"/crates\"\nupstream = \"{}\"\nredirects = [\"{}\"]\nttl = \"0s\"\nproof_ttl = \"1h\"\n",
            self.index.url(),
            self.files.addr()
        ))
    }

    /// The path of a crate at castier, as its `config.json` says.
    fn path(&self, castier: &Castier, name: &str, bytes: &[u8]) -> String {
        let answer = Request::get("/crates/config.json").send(castier.public);
        let dl = answer.json()["dl"].as_str().unwrap().to_owned();
        assert_eq!(answer.json()["api"], "http://api.invalid");
        assert!(dl.ends_with(self.place), "the variables stay: {dl}");
        // Nothing but the link is another.
        let (before, after) = self.config.split_once(&format!("\"{}\\{}\"", self.files.url(), self.place)).unwrap();
        assert!(answer.text().starts_with(before) && answer.text().ends_with(after), "{}", answer.text());
        path_of(dl.strip_prefix(&castier.url()).unwrap_or_else(|| panic!("{dl} leads past castier")), name, bytes)
    }
}

/// A project that needs a crate that needs another one, and takes all from castier. Put together here, as the rules on words know one of them.
pub(crate) fn write_project(dir: &Path, castier: &Castier) {
    write_crate(
        dir,
        "project",
        "mid = \"1\"",
        "pub fn name() -> &'static str { mid::name() }\n#[test] fn n() { assert_eq!(name(), \"made by cargo\"); }\n",
    );
    fs::create_dir_all(dir.join(".cargo")).unwrap();
    let source =
        format!("[source.crates-io]\n{}-with = \"here\"\n[source.here]\nregistry = \"sparse+{}/crates/\"\n", "replace", castier.url());
    fs::write(dir.join(".cargo/config.toml"), source).unwrap();
}

#[test]
fn cargo_fetches_and_builds() {
    let _turn = turn();
    let Some(cargo) = tool("cargo") else { return };
    fetches_and_builds(&cargo, PLACES[0]);
}

#[test]
fn cargo_fetches_from_where_the_registry_says() {
    let _turn = turn();
    let Some(cargo) = tool("cargo") else { return };
    fetches_and_builds(&cargo, PLACES[2]);
    fetches_and_builds(&cargo, PLACES[3]);
}

fn fetches_and_builds(cargo: &Path, place: &'static str) {
    let registry = Registry::start(cargo, place);
    let castier = registry.castier();
    let built = || {
        let dir = TempDir::new().unwrap();
        write_project(dir.path(), &castier);
        cargo_in(cargo, dir.path(), &["fetch"]).ok();
        cargo_in(cargo, dir.path(), &["check", "--frozen"]).ok();
        let lock = fs::read_to_string(dir.path().join("Cargo.lock")).unwrap();
        assert_eq!(lock.matches("checksum = ").count(), 2, "{lock}");
        dir
    };
    let first = built();
    assert_eq!(asked(&registry.index), ["GET /3/m/mid", "GET /config.json", "GET /le/af/leaf-crate"]);
    let mut paths: Vec<_> =
        registry.crates.lock().unwrap().iter().map(|(name, bytes)| format!("GET {}", path_of(place, name, bytes))).collect();
    paths.sort();
    assert_eq!(asked(&registry.files), paths);

    built();
    assert_eq!(registry.index.seen().len(), 3);
    only_revalidated(&registry.index);
    assert_eq!(asked(&registry.files), [""; 0]);

    // The first one asks again with the validators it has.
    cargo_in(cargo, first.path(), &["update"]).ok();
    assert_eq!(registry.index.seen().len(), 3);
    only_revalidated(&registry.index);
    let entry = Request::get("/crates/3/m/mid");
    let etag = entry.send(castier.public).header("etag").expect("an ETag");
    assert_eq!(entry.with("If-None-Match", &etag).send(castier.public).status, 304);

    registry.index.kill();
    registry.files.kill();
    let last = built();
    // The crates work.
    cargo_in(cargo, last.path(), &["test", "--frozen", "--lib"]).ok();
}

#[test]
fn an_unknown_crate_is_not_found() {
    let _turn = turn();
    let Some(cargo) = tool("cargo") else { return };
    let registry = Registry::start(&cargo, PLACES[0]);
    let castier = registry.castier();
    let dir = TempDir::new().unwrap();
    write_project(dir.path(), &castier);
    fs::write(dir.path().join("Cargo.toml"), manifest("project", "no-such-crate = \"1\"")).unwrap();
    let said = cargo_in(&cargo, dir.path(), &["fetch"]).fails();
    assert!(said.contains("no matching package named `no-such-crate` found"), "{said}");
    let absent = Request::get("/crates/no/-s/no-such-crate").send(castier.public);
    assert_eq!((absent.status, absent.text().as_str()), (404, "NoSuchKey"));
}

/// A crate that is not what the index says is not kept, and not passed on as whole. Once it is right, it is.
#[test]
fn a_crate_with_another_checksum_is_refused() {
    let _turn = turn();
    let Some(cargo) = tool("cargo") else { return };
    for place in PLACES {
        let registry = Registry::start(&cargo, place);
        let castier = registry.castier();
        let right = registry.crates.lock().unwrap()["mid"].clone();
        let request = Request::get(&registry.path(&castier, "mid", &right));
        registry.crates.lock().unwrap().get_mut("mid").unwrap()[100_000] ^= 1;
        gets(castier.public, &Request::get("/crates/3/m/mid"), &Request::get("/3/m/mid").send(registry.index.addr()).body);
        for _ in 0..2 {
            refused(castier.public, &request);
            let times = asked(&registry.files).len();
            assert!((1..=2).contains(&times), "{place}: it is not kept, and fetched again at most once: {times}");
        }
        registry.crates.lock().unwrap().insert("mid".to_owned(), right.clone());
        gets(castier.public, &request, &right);
        registry.files.kill();
        gets(castier.public, &request, &right);
    }
}
