//! A proxy of Go modules: the real go command.

use crate::{
    checks::{asked, gets, only_revalidated},
    pack::zip,
    support::{Castier, Ran, Request, Response, Upstream, castier, command, entity, noise, run, tool, turn},
};
use std::{collections::BTreeMap, fs, path::Path};
use tempfile::TempDir;

const GO_MOD: &str =
    "module example.test/main\n\ngo 1.21\n\nrequire example.test/Lib v1.1.0\nrequire example.test/leaf v0.2.0 // indirect\n";
const MAIN: &str = "package main\n\nimport lib \"example.test/Lib\"\n\nfunc main() { println(lib.Name()) }\n";

/// The files of a module proxy. Capitals are written with a `!` before the small letter.
fn files() -> BTreeMap<String, (&'static str, Vec<u8>)> {
    let mut files = BTreeMap::new();
    let leaf = "package leaf\n\nconst Name = \"leaf\"\n";
    let lib = "package lib\n\nimport \"example.test/leaf\"\n\nfunc Name() string { return leaf.Name }\n";
    let data = noise(9, 150_000);
    for (module, escaped, version, needs, code) in [
        ("example.test/leaf", "example.test/leaf", "v0.2.0", "", leaf),
        ("example.test/Lib", "example.test/!lib", "v1.0.0", "require example.test/leaf v0.2.0\n", lib),
        ("example.test/Lib", "example.test/!lib", "v1.1.0", "require example.test/leaf v0.2.0\n", lib),
    ] {
        let go_mod = format!("module {module}\n\ngo 1.21\n\n{needs}");
        let name = |file: &str| format!("{module}@{version}/{file}");
        let archive = zip(&[(&name("go.mod"), go_mod.as_bytes()), (&name("code.go"), code.as_bytes()), (&name("data.bin"), &data)]);
        let info = format!("{{\"Version\":\"{version}\",\"Time\":\"2024-01-02T03:04:05Z\"}}");
        let at = format!("/{escaped}/@v");
        files
            .entry(format!("{at}/list"))
            .or_insert(("text/plain; charset=UTF-8", Vec::new()))
            .1
            .extend(format!("{version}\n").into_bytes());
        files.insert(format!("{at}/{version}.info"), ("application/json", info.clone().into_bytes()));
        files.insert(format!("{at}/{version}.mod"), ("text/plain; charset=UTF-8", go_mod.into_bytes()));
        files.insert(format!("{at}/{version}.zip"), ("application/zip", archive));
        files.insert(format!("/{escaped}/@latest"), ("application/json", info.into_bytes()));
    }
    // The database of checksums, as far as its paths go.
    for (path, body) in [
        ("supported", ""),
        ("latest", "go.sum database tree\n3\n"),
        ("lookup/example.test/leaf@v0.2.0", "1\n"),
        ("tile/8/0/000", "\0\u{1}"),
    ] {
        files.insert(format!("/sumdb/sums.test/{path}"), ("text/plain", body.as_bytes().to_vec()));
    }
    files
}

/// The `!` before what was a capital, which newer versions of go escape.
fn plain(path: &str) -> String {
    path.replace("%21", "!")
}

fn proxy() -> Upstream {
    let files = files();
    Upstream::answering(move |request| match files.get(&plain(request.path())) {
        Some((kind, bytes)) => entity(request, kind, bytes),
        None if request.path().contains("/gone/") => {
            Response::new(410).with("Content-Type", "text/plain; charset=UTF-8").body("gone: the author took it back\n")
        }
        None => Response::new(404).with("Content-Type", "text/plain; charset=UTF-8").body("not found: no such module\n"),
    })
}

fn castier_before(upstream: &Upstream) -> Castier {
    castier(&format!(
        "[[route]]\nprotocol = \"go\"\nprefix = \"/go\"\nupstream = \"{}\"\nttl = \"0s\"\nproof_ttl = \"1h\"\n",
        upstream.url()
    ))
}

/// The go command without settings, with all its caches below the directory.
fn go(program: &Path, dir: &Path, castier: &Castier, args: &[&str]) -> Ran {
    let mut go = command(program, dir);
    go.args(args).env("GOPATH", dir.join("path")).env("GOCACHE", dir.join("cache")).env("GOENV", "off").env("GOTELEMETRY", "off");
    // What is read-only could not be removed afterwards.
    go.env("GOFLAGS", "-mod=mod -modcacherw").env("GOTOOLCHAIN", "local").env("GOSUMDB", "off").env("GONOSUMDB", "*");
    run(go.env("GOPROXY", format!("{}/go", castier.url())))
}

fn write_project(dir: &Path) {
    fs::write(dir.join("go.mod"), GO_MOD).unwrap();
    fs::write(dir.join("main.go"), MAIN).unwrap();
}

#[test]
fn go_downloads_modules() {
    let _turn = turn();
    let Some(program) = tool("go") else { return };
    let upstream = proxy();
    let castier = castier_before(&upstream);
    let downloaded = || {
        let dir = TempDir::new().unwrap();
        write_project(dir.path());
        go(&program, dir.path(), &castier, &["mod", "download"]).ok();
        let said = go(&program, dir.path(), &castier, &["mod", "verify"]).ok();
        assert!(said.contains("all modules verified"), "{said}");
        let listed = go(&program, dir.path(), &castier, &["list", "-m", "-versions", "example.test/Lib"]).ok();
        assert_eq!(listed, "example.test/Lib v1.0.0 v1.1.0\n");
        let latest = go(&program, dir.path(), &castier, &["list", "-m", "example.test/Lib@latest"]).ok();
        assert_eq!(latest, "example.test/Lib v1.1.0\n");
        let kept = dir.path().join("path/pkg/mod/cache/download");
        for (path, (_, bytes)) in files() {
            if path.ends_with("v1.1.0.zip") || path.ends_with("v0.2.0.zip") {
                assert!(fs::read(kept.join(&path[1..])).unwrap() == bytes, "{path}");
            }
        }
        dir
    };
    downloaded();
    let cold: Vec<_> = asked(&upstream).iter().map(|line| plain(line)).collect();
    for file in ["!lib/@v/v1.1.0.mod", "!lib/@v/v1.1.0.zip", "leaf/@v/v0.2.0.mod", "leaf/@v/v0.2.0.zip"] {
        let line = format!("GET /example.test/{file}");
        assert_eq!(cold.iter().filter(|known| **known == line).count(), 1, "{line} once: {cold:?}");
    }
    assert!(cold.contains(&"GET /example.test/!lib/@v/list".to_owned()), "{cold:?}");

    downloaded();
    let warm = upstream.seen();
    assert!(!warm.is_empty() && warm.iter().all(|seen| seen.target.ends_with("/list") || seen.target.ends_with("/@latest")), "{warm:?}");
    only_revalidated(&upstream);

    upstream.kill();
    let last = downloaded();
    // The modules work.
    assert!(go(&program, last.path(), &castier, &["vet", "."]).success());
}

/// A refusal is the proxy's own, to the byte: the go command goes on to the next proxy after these two statuses alone, and prints the text.
#[test]
fn absences_are_verbatim() {
    let _turn = turn();
    let upstream = proxy();
    let castier = castier_before(&upstream);
    let cases = [("none/@v/list", 404, "not found: no such module\n"), ("gone/@v/v1.0.0.info", 410, "gone: the author took it back\n")];
    for (path, status, text) in cases {
        let answer = Request::get(&format!("/go/example.test/{path}")).send(castier.public);
        assert_eq!((answer.status, answer.text().as_str()), (status, text));
        assert_eq!(answer.header("content-type").as_deref(), Some("text/plain; charset=UTF-8"));
    }
    let Some(program) = tool("go") else { return };
    let dir = TempDir::new().unwrap();
    write_project(dir.path());
    let said = go(&program, dir.path(), &castier, &["list", "-m", "example.test/gone@v1.0.0"]).fails();
    assert!(said.contains("410") && said.contains("gone: the author took it back"), "{said}");
    let said = go(&program, dir.path(), &castier, &["list", "-m", "example.test/none@v1.0.0"]).fails();
    assert!(said.contains("404") && said.contains("not found: no such module"), "{said}");
}

/// The database of checksums goes the same way.
#[test]
fn checksums_are_kept_as_well() {
    let _turn = turn();
    let upstream = proxy();
    let castier = castier_before(&upstream);
    let paths = ["latest", "lookup/example.test/leaf@v0.2.0", "supported", "tile/8/0/000"];
    for (round, expected) in [&paths[..], &["latest", "supported"]].into_iter().enumerate() {
        for path in paths {
            gets(castier.public, &Request::get(&format!("/go/sumdb/sums.test/{path}")), &files()[&format!("/sumdb/sums.test/{path}")].1);
        }
        let expected: Vec<_> = expected.iter().map(|path| format!("GET /sumdb/sums.test/{path}")).collect();
        assert_eq!(asked(&upstream), expected, "round {round}");
    }
    upstream.kill();
    for path in paths {
        gets(castier.public, &Request::get(&format!("/go/sumdb/sums.test/{path}")), &files()[&format!("/sumdb/sums.test/{path}")].1);
    }
}
