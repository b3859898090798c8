//! A binary cache of Nix: signed, copied to by nix itself, and served as files.

use crate::support::{
    Port, Ran, Request, Response, Running, Seen, Upstream, castier, command, file_answer, lines, noise, run, sha256, tool, turn,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// A store with two packages, one of which needs the other, and a binary cache of them in a folder.
pub(crate) struct Built {
    dir: TempDir,
    /// The store paths: what is needed, and what needs it.
    paths: [String; 2],
    pub(crate) public_key: String,
}

impl Built {
    /// None, after saying so, if nix is not there.
    pub(crate) fn new() -> Option<Self> {
        tool("nix")?;
        let mut built = Self { dir: TempDir::new().unwrap(), paths: Default::default(), public_key: String::new() };
        fs::create_dir(built.at("conf")).unwrap();
        fs::write(built.at("conf/nix.conf"), "build-users-group =\nsandbox = false\nsubstituters =\nexperimental-features = nix-command\n")
            .unwrap();
        let system = run(built.nix("nix-instantiate").args(["--eval", "-E", "builtins.currentSystem"])).ok();
        fs::write(built.at("large"), noise(1, 4 * MIB)).unwrap();
        let expression = format!(
            "let make = name: command: derivation {{ inherit name; system = {}; builder = \"/bin/sh\"; args = [ \"-c\" command ]; }};\n\
             base = make \"base\" \"/bin/cp {} $out\";\nin make \"top\" \"echo needs ${{base}} > $out\"\n",
            system.trim(),
            built.at("large").display()
        );
        fs::write(built.at("default.nix"), expression).unwrap();
        let top = run(built.nix("nix-build").args(["--no-out-link", "default.nix"])).ok().trim().to_owned();
        let all = run(built.nix("nix-store").args(["--query", "--requisites", &top])).ok();
        let base = all.lines().find(|path| path.ends_with("-base")).unwrap().to_owned();
        built.paths = [base, top];
        run(built.nix("nix-store").args(["--generate-binary-cache-key", "test-1", "secret", "public"])).ok();
        built.public_key = fs::read_to_string(built.at("public")).unwrap();
        let cache = built.cache();
        run(built.nix("nix").args(["copy", "--to", &format!("file://{}?{}", cache.display(), built.options("xz")), &built.paths[1]])).ok();
        Some(built)
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// How it is signed and compressed.
    fn options(&self, compression: &str) -> String {
        format!("secret-key={}&compression={compression}", self.at("secret").display())
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// A program of nix with the store in `dir`, which needs no root.
    fn nix(&self, program: &str) -> Command {
        let mut command = command(tool(program).unwrap(), self.dir.path());
        command.env("NIX_CONF_DIR", self.at("conf")).env("NIX_STORE_DIR", self.at("store"));
        command.env("NIX_STATE_DIR", self.at("state")).env("NIX_LOG_DIR", self.at("log")).env("NIX_REMOTE", "local");
        command
    }

    /// A client without anything copies from a cache, and trusts this key. Returns its store too.
    pub(crate) fn copy(&self, url: &str, key: &str) -> (Ran, TempDir) {
        let client = TempDir::new().unwrap();
        let mut nix = self.nix("nix");
        nix.args(["copy", "--option", "trusted-public-keys", key, "--option", "require-sigs", "true", "--from", url]);
        nix.args(["--to", &format!("local?root={}", client.path().display()), &self.paths[1]]);
        // What it remembers of caches is in its home.
        (run(nix.env("HOME", client.path())), client)
    }

    #[track_caller]
    pub(crate) fn copies(&self, url: &str) {
        let (ran, client) = self.copy(url, &self.public_key);
        ran.ok();
        let base = self.paths[0].rsplit('/').next().unwrap();
        let found = ["nix/store", &self.at("store").display().to_string()[1..]].map(|store| client.path().join(store).join(base));
        let got = found.iter().find_map(|path| fs::read(path).ok()).unwrap_or_else(|| panic!("none of {found:?} is there"));
        assert!(got == noise(1, 4 * MIB));
    }

    /// The target of a package's description.
    fn narinfo(&self, package: usize) -> String {
        format!("/{}.narinfo", self.paths[package].rsplit('/').next().unwrap().split('-').next().unwrap())
    }

    /// The target of its archive.
    fn nar(&self, package: usize) -> String {
        let text = fs::read_to_string(self.cache().join(&self.narinfo(package)[1..])).unwrap();
        format!("/{}", text.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap())
    }
}

pub(crate) fn route(upstream: &Upstream, keys: &str) -> String {
    format!("[[route]]\nprotocol = \"nix\"\nupstream = \"{}\"\naccess = \"local\"\n{keys}\n", upstream.url())
}

fn is_nar(seen: &Seen) -> bool {
    seen.method == "GET" && seen.target.contains("/nar/")
}

/// A web server of Python, which has no entity tags and speaks HTTP/1.0.
fn plain_server(folder: &Path) -> Option<(Running, Port)> {
    let port = Port::free();
    let mut server = command(tool("python3")?, folder);
    server.args(["-m", "http.server", "--bind", "127.0.0.1", "--directory", &folder.display().to_string(), &port.number().to_string()]);
    let mut server = Running::start(&mut server);
    server.listens(port.addr());
    Some((server, port))
}

#[test]
fn copies_are_loaded_once() {
    let _turn = turn();
    let Some(built) = Built::new() else { return };
    let Some((_server, port)) = plain_server(&built.cache()) else { return };
    let front = Upstream::before(port.addr());
    let castier = castier(&route(&front, ""));
    built.copies(&castier.url());
    let seen = front.take();
    for package in [0, 1] {
        assert_eq!(seen.iter().filter(|seen| is_nar(seen) && seen.target == built.nar(package)).count(), 1, "{}", lines(&seen));
    }
    built.copies(&castier.url());
    let seen = front.take();
    assert_eq!(seen.iter().filter(|seen| is_nar(seen)).count(), 0, "{}", lines(&seen));

    // Everything arrives as it is.
    let targets = [built.narinfo(0), built.narinfo(1), built.nar(0), built.nar(1), "/nix-cache-info".to_owned()];
    let as_stored = || {
        for target in &targets {
            let got = Request::get(target).send(castier.public);
            assert!(
                got.status == 200 && got.body == fs::read(built.cache().join(&target[1..])).unwrap(),
                "{target}: {} {}",
                got.status,
                got.text()
            );
            assert_eq!(Request::head(target).send(castier.public).status, 200, "{target}");
        }
    };
    as_stored();
    // The archive's name is the SHA-256 of its bytes, which a narinfo has said.
    let nar = fs::read(built.cache().join(&built.nar(0)[1..])).unwrap();
    assert!(Request::get(&format!("/cas/{}", sha256(&nar))).send(castier.public).body == nar);

    // Whoever trusts another key gets the same, and refuses it.
    let other = "test-1:AAAAexb9KSniS0urpQoe6/CcRwWmoH70S29EvamUoGw=";
    assert!(built.copy(&castier.url(), other).0.fails().contains("signature"));
    let absent = format!("/{}.narinfo", "0".repeat(32));
    assert_eq!(Request::get(&absent).send(castier.public).status, 404);

    front.kill();
    built.copies(&castier.url());
    as_stored();
    // An absence that is known stays one; what is not known is an error.
    let unknown = Request::get(&format!("/{}.narinfo", "1".repeat(32))).send(castier.public);
    assert!([502, 504].contains(&unknown.status), "{unknown:?}");
}

#[test]
fn the_priority_of_a_route() {
    let _turn = turn();
    let Some(built) = Built::new() else { return };
    fs::write(built.cache().join("nix-cache-info"), "StoreDir: /somewhere\nWantMassQuery: 1\nPriority: 40\n").unwrap();
    let front = Upstream::folder(&built.cache());
    let castier = castier(&route(&front, "priority = 30"));
    let got = Request::get("/nix-cache-info").send(castier.public);
    assert_eq!((got.status, got.text().as_str()), (200, "StoreDir: /somewhere\nWantMassQuery: 1\nPriority: 30\n"));
    assert_eq!(got.header("content-length"), Some(got.body.len().to_string()));
    // Without one, it is added.
    fs::write(built.cache().join("nix-cache-info"), "StoreDir: /somewhere\n").unwrap();
    let castier = castier.restart(&route(&front, "priority = 30\nttl = \"0s\""));
    let got = Request::get("/nix-cache-info").send(castier.public).text();
    assert!(got.starts_with("StoreDir: /somewhere\n") && got.contains("Priority: 30"), "{got}");
}

#[test]
fn an_archive_that_does_not_match() {
    let _turn = turn();
    let Some(built) = Built::new() else { return };
    let front = Upstream::folder(&built.cache());
    let mut wrong = fs::read(built.cache().join(&built.nar(0)[1..])).unwrap();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    let (root, nar) = (built.cache(), built.nar(0));
    let lie = nar.clone();
    front.intercept(move |request| {
        if request.method == "GET" && request.path() == lie {
            return Some(Response::ok("application/x-nix-nar", wrong.clone()));
        }
        Some(file_answer(&root, request))
    });
    let castier = castier(&route(&front, ""));
    built.copy(&castier.url(), &built.public_key).0.fails();
    assert!(Request::get(&nar).try_send(castier.public).map_or(true, |got| got.status >= 500));
    let root = built.cache();
    front.intercept(move |request| Some(file_answer(&root, request)));
    built.copies(&castier.url());
}

/// A cache that takes uploads, as `nix copy --to` makes them.
#[test]
fn uploads() {
    let _turn = turn();
    let Some(built) = Built::new() else { return };
    let folder = TempDir::new().unwrap();
    let root = folder.path().to_owned();
    fs::write(root.join("nix-cache-info"), format!("StoreDir: {}\n", built.at("store").display())).unwrap();
    fs::create_dir(root.join("nar")).unwrap();
    let front = Upstream::answering(move |request| {
        if request.method == "PUT" {
            fs::write(root.join(&request.path()[1..]), &request.body).unwrap();
            return Response::new(201);
        }
        file_answer(&root, request)
    });
    let castier = castier(&route(&front, "negative_ttl = \"1h\""));
    // That it is not there is known, and must be forgotten.
    assert_eq!(Request::get(&built.narinfo(1)).send(castier.public).status, 404);
    assert_eq!(Request::get(&built.narinfo(0)).send(castier.public).status, 404);
    let to = format!("{}?{}", castier.url(), built.options("none"));
    run(built.nix("nix").args(["copy", "--to", &to, &built.paths[1]])).ok();
    assert!(front.count(|seen| seen.method == "PUT") >= 4, "{}", front.history());
    built.copies(&castier.url());
    front.kill();
    built.copies(&castier.url());
}
