//! Debian's packages: apt, with repositories that the test makes, as a mirror and as apt's HTTP proxy. This machine's own apt is not touched.

use crate::support::{Ran, Request, Response, Seen, Upstream, castier, command, file_answer, lines, noise, run, sha256, tool, turn};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

// ---- repositories ----

/// A folder with a signed repository below `debian`, and a flat one without a signature below `flat`.
struct Repository {
    dir: TempDir,
}

impl Repository {
    /// None, after saying so, if the programs are not there.
    fn new() -> Option<Self> {
        for name in ["apt-get", "apt-ftparchive", "dpkg-deb", "gpg", "gpgconf", "xz"] {
            tool(name)?;
        }
        // The path of gpg's socket must be short.
        let repository = Self { dir: tempfile::Builder::new().prefix("apt").tempdir().unwrap() };
        fs::create_dir(repository.at("gpg")).unwrap();
        run(Command::new("chmod").args(["700"]).arg(repository.at("gpg")).env("PATH", std::env::var_os("PATH").unwrap())).ok();
        run(repository.gpg().args(["--quick-generate-key", "The Test <test@example.org>", "default", "default", "never"])).ok();
        run(repository.gpg().args(["--output", "key.gpg", "--export"])).ok();
        repository.publish("1.0");
        Some(repository)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the upstream serves.
    fn root(&self) -> PathBuf {
        self.at("www")
    }

    fn gpg(&self) -> Command {
        let mut gpg = command(tool("gpg").unwrap(), self.dir.path());
        gpg.args(["--batch", "--yes", "--pinentry-mode", "loopback", "--passphrase", ""]).env("GNUPGHOME", self.at("gpg"));
        gpg
    }

    /// The package of this version, below the served folder.
    fn package(version: &str) -> String {
        format!("debian/pool/main/t/thing/thing_{version}_all.deb")
    }

    /// Adds a version of the package to both repositories.
    fn publish(&self, version: &str) {
        let tree = self.at(&format!("tree-{version}"));
        fs::create_dir_all(tree.join("DEBIAN")).unwrap();
        fs::create_dir_all(tree.join("usr/share/thing")).unwrap();
        let control = format!(
            "Package: thing\nVersion: {version}\nArchitecture: all\nMaintainer: The Test <test@example.org>\nDescription: a thing\n"
        );
        fs::write(tree.join("DEBIAN/control"), control).unwrap();
        fs::write(tree.join("usr/share/thing/data"), noise(version.bytes().map(u64::from).sum(), 1 << 20)).unwrap();
        let package = self.root().join(Self::package(version));
        fs::create_dir_all(package.parent().unwrap()).unwrap();
        run(command("dpkg-deb", self.dir.path()).args(["--root-owner-group", "--build"]).arg(&tree).arg(&package)).ok();

        // The signed one, with its indices also by their hash, where old ones stay.
        let base = self.root().join("debian");
        let index = base.join("dists/stable/main/binary-all");
        fs::create_dir_all(index.join("by-hash/SHA256")).unwrap();
        let packages = run(command("apt-ftparchive", &base).args(["packages", "pool"])).ok();
        write_index(&index, &packages);
        for name in ["Packages", "Packages.xz"] {
            let bytes = fs::read(index.join(name)).unwrap();
            fs::write(index.join("by-hash/SHA256").join(sha256(&bytes)), bytes).unwrap();
        }
        let dist = base.join("dists/stable");
        for old in ["Release", "InRelease"] {
            let _ = fs::remove_file(dist.join(old));
        }
        let head = [("Suite", "stable"), ("Codename", "stable"), ("Architectures", "all"), ("Components", "main")];
        // As Debian's own: a client asks by the strongest hash, and this is then SHA-256.
        let mut release = command("apt-ftparchive", &dist);
        release.args(["-o", "APT::FTPArchive::SHA512=false"]);
        for (name, value) in head {
            release.args(["-o", &format!("APT::FTPArchive::Release::{name}={value}")]);
        }
        let release = format!("Acquire-By-Hash: yes\n{}", run(release.args(["release", "."])).ok());
        fs::write(dist.join("Release"), release).unwrap();
        let [from, to] = ["Release", "InRelease"].map(|name| dist.join(name).display().to_string());
        run(self.gpg().args(["--output", &to, "--clearsign", &from])).ok();

        let flat = self.root().join("flat");
        fs::create_dir_all(&flat).unwrap();
        fs::copy(&package, flat.join(package.file_name().unwrap())).unwrap();
        let packages = run(command("apt-ftparchive", &flat).args(["packages", "."])).ok();
        write_index(&flat, &packages);
    }
}

fn write_index(folder: &Path, packages: &str) {
    fs::write(folder.join("Packages"), packages).unwrap();
    run(command("xz", folder).args(["--force", "--keep", "Packages"])).ok();
}

impl Drop for Repository {
    fn drop(&mut self) {
        // The agent that gpg has started.
        let _ = run(command("gpgconf", self.dir.path()).args(["--kill", "all"]).env("GNUPGHOME", self.at("gpg")));
    }
}

// ---- apt ----

/// apt, with a root of its own.
struct Apt {
    dir: TempDir,
}

impl Apt {
    fn new(sources: &str, more: &str) -> Self {
        let dir = TempDir::new().unwrap();
        for folder in ["etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "etc/apt/trusted.gpg.d", "var/lib/dpkg"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        for folder in ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "got"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        fs::write(dir.path().join("var/lib/dpkg/status"), "").unwrap();
        fs::write(dir.path().join("etc/apt/sources.list"), sources).unwrap();
        let root = dir.path().display();
        let config = format!(
            "Dir \"{root}\";\nDir::State::status \"{root}/var/lib/dpkg/status\";\nAPT::Sandbox::User \"\";\nAPT::Architecture \"amd64\";\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"0\";\nAPT::Update::Error-Mode \"any\";\n{more}\n"
        );
        fs::write(dir.path().join("apt.conf"), config).unwrap();
        Self { dir }
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        let mut apt = command(tool("apt-get").unwrap(), &self.dir.path().join("got"));
        run(apt.env("APT_CONFIG", self.dir.path().join("apt.conf")).arg("--quiet").args(arguments))
    }

    /// Updates, and downloads a version.
    #[track_caller]
    fn gets(&self, repository: &Repository, version: &str) {
        self.run(&["update"]).ok();
        self.run(&["download", &format!("thing={version}")]).ok();
        let got = fs::read(self.dir.path().join(format!("got/thing_{version}_all.deb"))).unwrap();
        assert!(got == fs::read(repository.root().join(Repository::package(version))).unwrap());
    }
}

/// A fresh apt updates, and downloads a version.
#[track_caller]
fn gets(sources: &str, more: &str, repository: &Repository, version: &str) {
    Apt::new(sources, more).gets(repository, version);
}

fn signed(url: &str, repository: &Repository) -> String {
    format!("deb [signed-by={}] {url}/debian stable main\n", repository.at("key.gpg").display())
}

fn flat(url: &str) -> String {
    format!("deb [trusted=yes] {url}/flat ./\n")
}

fn route(upstream: &Upstream, keys: &str) -> String {
    format!("[[route]]\nprotocol = \"debian\"\nupstream = \"{}\"\naccess = \"local\"\n{keys}\n", upstream.url())
}

/// The bodies of packages and of what is named by its hash.
fn bodies(seen: &[Seen]) -> usize {
    let immutable = |seen: &&Seen| seen.status == 200 && (seen.target.ends_with(".deb") || seen.target.contains("/by-hash/"));
    seen.iter().filter(immutable).count()
}

#[test]
fn a_signed_repository() {
    let _turn = turn();
    let Some(repository) = Repository::new() else { return };
    let front = Upstream::folder(&repository.root());
    let castier = castier(&route(&front, "stale_if_error = \"1h\""));
    let sources = signed(&castier.url(), &repository);
    gets(&sources, "", &repository, "1.0");
    let seen = front.take();
    assert_eq!(bodies(&seen), 2, "{}", lines(&seen));
    assert!(seen.iter().any(|seen| seen.target.contains("/by-hash/SHA256/")), "{}", lines(&seen));

    // A second machine costs a question, and not a body.
    gets(&sources, "", &repository, "1.0");
    let seen = front.take();
    assert_eq!(bodies(&seen), 0, "{}", lines(&seen));
    assert!(seen.iter().filter(|seen| seen.target.ends_with("/InRelease")).all(|seen| seen.status == 304), "{}", lines(&seen));

    // A new version is there at once, for a machine that was up to date as well.
    let apt = Apt::new(&sources, "");
    apt.gets(&repository, "1.0");
    repository.publish("2.0");
    apt.gets(&repository, "2.0");
    // The bytes are the repository's, and so are the signed ones.
    for target in ["/debian/dists/stable/InRelease", "/debian/dists/stable/Release", "/debian/dists/stable/main/binary-all/Packages.xz"] {
        let got = Request::get(target).send(castier.public);
        assert!(got.status == 200 && got.body == fs::read(repository.root().join(&target[1..])).unwrap(), "{target}: {}", got.status);
    }

    front.kill();
    for version in ["1.0", "2.0"] {
        gets(&sources, "", &repository, version);
    }
}

#[test]
fn a_flat_repository() {
    let _turn = turn();
    let Some(repository) = Repository::new() else { return };
    let front = Upstream::folder(&repository.root());
    let castier = castier(&route(&front, "prefix = \"/mirror\"\nstale_if_error = \"1h\""));
    let sources = flat(&format!("{}/mirror", castier.url()));
    gets(&sources, "", &repository, "1.0");
    assert_eq!(front.count(|seen| seen.target.contains("mirror")), 0, "{}", front.history());
    front.take();
    gets(&sources, "", &repository, "1.0");
    assert_eq!(bodies(&front.take()), 0);
    repository.publish("2.0");
    gets(&sources, "", &repository, "2.0");
    front.kill();
    gets(&sources, "", &repository, "1.0");
    gets(&sources, "", &repository, "2.0");
}

#[test]
fn as_the_http_proxy_of_apt() {
    let _turn = turn();
    let Some(repository) = Repository::new() else { return };
    let front = Upstream::folder(&repository.root());
    let castier = castier(&route(&front, "host = \"deb.example\"\nstale_if_error = \"1h\""));
    let proxy = format!("Acquire::http::Proxy \"{}\";", castier.url());
    let sources = signed("http://deb.example", &repository);
    gets(&sources, &proxy, &repository, "1.0");
    front.take();
    gets(&sources, &proxy, &repository, "1.0");
    let seen = front.take();
    assert_eq!(bodies(&seen), 0, "{}", lines(&seen));
    assert!(seen.iter().all(|seen| seen.target.starts_with('/')), "the upstream is a server, and no proxy: {}", lines(&seen));

    // It is a proxy for that host alone.
    let other = Upstream::answering(|_| Response::ok("text/plain", "never seen"));
    for target in ["http://other.example/debian/dists/stable/InRelease".to_owned(), format!("{}/x", other.url())] {
        let got = Request::get(&target).with("Host", target.split('/').nth(2).unwrap()).send(castier.public);
        assert_eq!(got.status, 403, "{target}: {got:?}");
    }
    let tunnel = Request::new("CONNECT", &other.addr().to_string()).with("Host", &other.addr().to_string()).try_send(castier.public);
    assert!(tunnel.as_ref().map_or(true, |got| got.status >= 400), "{tunnel:?}");
    assert_eq!(other.take().len(), 0);
    let said = Apt::new(&signed("http://other.example", &repository), &proxy).run(&["update"]).fails();
    assert!(said.contains("403"), "{said}");

    front.kill();
    gets(&sources, &proxy, &repository, "1.0");
}

/// A route without a prefix does not get what has a place of its own at castier.
#[test]
fn castier_s_own_paths_stay() {
    let _turn = turn();
    let Some(repository) = Repository::new() else { return };
    let front = Upstream::folder(&repository.root());
    let castier = castier(&route(&front, ""));
    Apt::new(&signed(&castier.url(), &repository), "").gets(&repository, "1.0");
    front.take();
    let index = fs::read(repository.root().join("debian/dists/stable/main/binary-all/Packages.xz")).unwrap();
    // It came by its hash.
    assert!(Request::get(&format!("/cas/{}", sha256(&index))).send(castier.public).body == index);
    let bytes = noise(9, 1000);
    assert_eq!(Request::new("PUT", &format!("/cas/{}", sha256(&bytes))).body(bytes.clone()).send(castier.public).status, 201);
    assert!(Request::get(&format!("/cas/{}", sha256(&bytes))).send(castier.public).body == bytes);
    let entry = format!("/ac/{}", "1".repeat(64));
    assert!([200, 201].contains(&Request::new("PUT", &entry).body("an entry").send(castier.public).status));
    assert_eq!(Request::get(&entry).send(castier.public).text(), "an entry");
    assert_eq!(front.take().len(), 0);
}

/// The index names the hash of each package: one that does not match is not kept.
#[test]
fn a_package_that_does_not_match() {
    let _turn = turn();
    let Some(repository) = Repository::new() else { return };
    let front = Upstream::folder(&repository.root());
    let target = format!("/{}", Repository::package("1.0"));
    let mut wrong = fs::read(repository.root().join(&target[1..])).unwrap();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    let (root, path) = (repository.root(), target.clone());
    front.intercept(move |request| {
        let lie = request.method == "GET" && request.path() == path;
        Some(if lie { Response::ok("application/vnd.debian.binary-package", wrong.clone()) } else { file_answer(&root, request) })
    });
    let castier = castier(&route(&front, ""));
    let apt = Apt::new(&signed(&castier.url(), &repository), "");
    apt.run(&["update"]).ok();
    apt.run(&["download", "thing"]).fails();
    assert!(front.count(|seen| seen.target == target) >= 1, "{}", front.history());
    let root = repository.root();
    front.intercept(move |request| Some(file_answer(&root, request)));
    apt.gets(&repository, "1.0");
}
