//! A hub of models, which sends large files from another host: the real client.

use crate::{
    checks::{gets, refused},
    support::{Castier, Ran, Request, Response, Seen, Upstream, castier, command, entity, lines, noise, run, sha256, tool, turn},
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const SMALL: &[u8] = b"{\"model_type\": \"tiny\"}\n";
/// A file that looks like an answer of the hub.
const NOTES: &[u8] = b"[{\"xetHash\" : \"0123\", \"path\": \"model.bin\"}]\n";
const TOKEN: &str = "hf_testtoken";
const REPOSITORIES: [&str; 3] = ["team/tiny", "team/copy", "team/secret"];

/// The large file.
fn large() -> Vec<u8> {
    noise(11, 5 * 1024 * 1024 + 17)
}

/// The hub, and the host of its large files.
struct Hub {
    hub: Upstream,
    cdn: Upstream,
    /// What the CDN sends.
    stored: Arc<Mutex<Vec<u8>>>,
    /// Whether the CDN refuses HEAD, as a URL signed for GET does.
    only_get: Arc<AtomicBool>,
}

impl Hub {
    fn start() -> Self {
        let stored = Arc::new(Mutex::new(large()));
        let only_get = Arc::new(AtomicBool::new(false));
        let (bytes, refuses) = (stored.clone(), only_get.clone());
        let cdn = Upstream::answering(move |request| {
            if !request.target.contains("?Signature=") || (request.method == "HEAD" && refuses.load(Ordering::Relaxed)) {
                return Response::new(403).with("Content-Type", "application/xml").body("<Error/>");
            }
            entity(request, "binary/octet-stream", &bytes.lock().unwrap())
        });
        let (to, digest, size) = (cdn.url(), sha256(&large()), large().len());
        let serial = Mutex::new(0);
        let hub = Upstream::answering(move |request| {
            let common =
                |answer: Response| answer.with("Vary", "Origin").with("X-Repo-Commit", COMMIT).with("Access-Control-Allow-Origin", "x");
            let Some(repository) = REPOSITORIES.iter().find(|name| request.path().contains(**name)) else {
                return Response::new(404).with("X-Error-Code", "RepoNotFound").body("{\"error\":\"Repository not found\"}");
            };
            if *repository == "team/secret" && request.header("authorization").as_deref() != Some(&format!("Bearer {TOKEN}")) {
                let refusal = Response::new(401).with("X-Error-Code", "GatedRepo").with("X-Error-Message", "Access is restricted");
                return refusal.with("WWW-Authenticate", "Bearer realm=\"Authentication required\"").body("Access is restricted");
            }
            if let Some(rest) = request.path().strip_prefix(&format!("/api/models/{repository}")) {
                return common(match rest {
                    "" | "/revision/main" => api(request, repository, &digest),
                    _ if rest == format!("/revision/{COMMIT}") => api(request, repository, &digest),
                    _ if rest.starts_with("/tree/") => tree(request, &digest),
                    _ if rest.starts_with("/xet-read-token/") => {
                        Response::ok("application/json", "{\"accessToken\":\"x\",\"casUrl\":\"http://cas.invalid\",\"exp\":1}")
                    }
                    _ => Response::new(404).body("{\"error\":\"Not found\"}"),
                });
            }
            let file =
                ["main", COMMIT].iter().find_map(|revision| request.path().strip_prefix(&format!("/{repository}/resolve/{revision}/")));
            match file {
                Some("config.json") => common(entity(request, "text/plain; charset=utf-8", SMALL)),
                Some("notes.json") => common(entity(request, "application/json", NOTES)),
                Some("model.bin") => {
                    // Each signature is another.
                    let mut serial = serial.lock().unwrap();
                    *serial += 1;
                    let location = format!("{to}/repos/ab/{digest}?Signature={serial}&Expires=1");
                    let xet = format!("<http://hub.invalid/api/models/{repository}/xet-read-token/{COMMIT}>; rel=\"xet-auth\"");
                    let xet = format!("{xet}, <http://cas.invalid/v1/reconstructions/{digest}>; rel=\"xet-reconstruction-info\"");
                    let answer = Response::new(302).with("Location", &location).with("X-Linked-Etag", &format!("\"{digest}\""));
                    let answer = answer.with("X-Linked-Size", &size.to_string()).with("X-Xet-Hash", &digest).with("Link", &xet);
                    common(answer.with("Content-Type", "text/plain; charset=utf-8").body(format!("Found. Redirecting to {location}")))
                }
                _ => common(Response::new(404).with("X-Error-Code", "EntryNotFound").body("Entry not found")),
            }
        });
        Self { hub, cdn, stored, only_get }
    }

    /// Without a prefix, as the whole of an address.
    fn castier(&self, more: &str) -> Castier {
        let (hub, cdn) = (self.hub.url(), self.cdn.addr());
        castier(&format!(
            "[[route]]\nprotocol = \"huggingface\"\nupstream = \"{hub}\"\nredirects = [\"{cdn}\"]\nttl = \"0s\"\nproof_ttl = \"1h\"\n{more}"
        ))
    }

    fn kill(&self) {
        self.hub.kill();
        self.cdn.kill();
    }
}

/// What the hub says of a repository.
fn api(request: &Request, repository: &str, digest: &str) -> Response {
    let siblings = format!("[{{\"rfilename\":\"config.json\"}},{{\"rfilename\":\"model.bin\",\"xetHash\":\"{digest}\"}}]");
    let text =
        format!("{{\"id\":\"{repository}\",\"sha\":\"{COMMIT}\",\"private\":false,\"tags\":[],\"downloads\":0,\"siblings\":{siblings}}}");
    entity(request, "application/json; charset=utf-8", text.as_bytes())
}

/// What the hub says of the files.
fn tree(request: &Request, digest: &str) -> Response {
    let (small, large) = (SMALL.len(), large().len());
    let oid = &COMMIT[..40];
    let text = format!(
        "[{{\"type\":\"file\",\"oid\":\"{oid}\",\"size\":{small},\"path\":\"config.json\"}},\n\
         {{\"type\":\"file\",\"oid\":\"{oid}\",\"size\":{large},\"lfs\":{{\"oid\":\"{digest}\",\"size\":{large},\"pointerSize\":134}},\
         \"xetHash\" : \"{digest}\",\"path\":\"model.bin\"}}]"
    );
    entity(request, "application/json; charset=utf-8", text.as_bytes())
}

/// Python with the client. None, after saying so, if it is missing.
fn client() -> Option<PathBuf> {
    let python = tool("python")?;
    let dir = TempDir::new().unwrap();
    let works = run(command(&python, dir.path()).args(["-c", "import huggingface_hub"])).success();
    if !works {
        crate::support::skip("huggingface_hub is not installed");
    }
    works.then_some(python)
}

/// Runs the client with an empty cache.
fn python(program: &Path, dir: &Path, endpoint: &str, code: &str) -> Ran {
    let code = format!("from huggingface_hub import hf_hub_download, snapshot_download\n{code}\n");
    let mut python = command(program, dir);
    python.args(["-c", &code]).env("HF_ENDPOINT", endpoint).env("HF_HOME", dir.join("hub")).env("HF_HUB_DISABLE_TELEMETRY", "1");
    run(python.env("HF_HUB_DISABLE_PROGRESS_BARS", "1").env("HF_HUB_ETAG_TIMEOUT", "60").env("DO_NOT_TRACK", "1"))
}

fn assert_snapshot(dir: &Path) {
    let snapshot = dir.join("hub/hub/models--team--tiny/snapshots").join(COMMIT);
    assert_eq!(fs::read(snapshot.join("config.json")).unwrap(), SMALL);
    assert!(fs::read(snapshot.join("model.bin")).unwrap() == large());
    // The client names what it keeps by the hub's own validators.
    let blobs = dir.join("hub/hub/models--team--tiny/blobs");
    let names: Vec<_> = fs::read_dir(blobs).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    for name in [sha256(&large()), sha256(SMALL)[..16].to_owned()] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
}

/// The bytes that these answers had.
fn bytes(seen: &[Seen]) -> u64 {
    seen.iter().map(|seen| seen.sent).sum()
}

/// A snapshot of a revision, three times: cold, kept, and with both hosts dead.
fn snapshots(revision: &str, prefix: &str) {
    let Some(program) = client() else { return };
    let upstream = Hub::start();
    let castier = upstream.castier(&format!("prefix = \"{prefix}\"\n"));
    let endpoint = format!("{}{prefix}", castier.url());
    let snapshot = || {
        let dir = TempDir::new().unwrap();
        python(&program, dir.path(), &endpoint, &format!("snapshot_download('team/tiny', revision='{revision}')")).ok();
        assert_snapshot(dir.path());
    };
    snapshot();
    let size = large().len() as u64;
    assert_eq!(bytes(&upstream.cdn.take()), size, "the file came once");
    let hub = upstream.hub.take();
    assert!(!hub.iter().any(|seen| seen.target.contains("xet")), "{}", lines(&hub));

    snapshot();
    assert_eq!(bytes(&upstream.cdn.take()), 0, "the file is kept");
    let hub = upstream.hub.take();
    // A commit never changes; the word of what `main` is does. The body of a redirect is no file.
    let is_file = |seen: &Seen| seen.target.contains("/resolve/");
    assert!(revision == "main" || !hub.iter().any(is_file), "{}", lines(&hub));
    assert!(hub.iter().all(|seen| [302, 304].contains(&seen.status) || seen.method == "HEAD"), "{}", lines(&hub));

    upstream.kill();
    snapshot();
}

#[test]
fn a_snapshot_of_main() {
    let _turn = turn();
    snapshots("main", "");
}

#[test]
fn a_snapshot_of_a_commit() {
    let _turn = turn();
    snapshots(COMMIT, "");
}

#[test]
fn a_snapshot_below_a_prefix() {
    let _turn = turn();
    snapshots("main", "/hub");
}

#[test]
fn single_files() {
    let _turn = turn();
    let Some(program) = client() else { return };
    let upstream = Hub::start();
    let castier = upstream.castier("");
    for round in 0..3 {
        if round == 2 {
            upstream.kill();
        }
        let dir = TempDir::new().unwrap();
        let code = format!(
            "for revision in ('main', '{COMMIT}'):\n for file in ('config.json', 'model.bin'):\n  hf_hub_download('team/tiny', file, revision=revision)"
        );
        python(&program, dir.path(), &castier.url(), &code).ok();
        assert_snapshot(dir.path());
        assert_eq!(bytes(&upstream.cdn.take()), if round == 0 { large().len() as u64 } else { 0 }, "round {round}");
    }
}

/// The hub's own headers come with the file, whichever answer had them; what leads past the cache does not.
#[test]
fn headers_of_the_redirect_stay_and_shortcuts_go() {
    let _turn = turn();
    let upstream = Hub::start();
    let castier = upstream.castier("");
    let (large, digest) = (large(), sha256(&large()));
    for revision in ["main", COMMIT] {
        for round in 0..2 {
            for method in ["HEAD", "GET"] {
                let answer = Request::new(method, &format!("/team/tiny/resolve/{revision}/model.bin")).send(castier.public);
                assert_eq!(answer.status, 200, "{method} {revision}: {answer:?}");
                let header = |name: &str| answer.header(name).unwrap_or_default();
                assert_eq!(header("x-repo-commit"), COMMIT, "{method} {revision}, round {round}");
                assert_eq!(header("x-linked-etag"), format!("\"{digest}\""));
                assert_eq!(header("x-linked-size"), large.len().to_string());
                assert_eq!(header("content-length"), large.len().to_string());
                assert!(method == "HEAD" || answer.body == large);
                let shortcut =
                    answer.headers.iter().find(|(name, value)| name.to_ascii_lowercase().starts_with("x-xet") || value.contains("xet"));
                assert_eq!(shortcut, None);
                assert_eq!(answer.header("location"), None);
            }
        }
    }
    let seen = upstream.cdn.take();
    assert_eq!(bytes(&seen), large.len() as u64, "{}", lines(&seen));
    // A part, as a client that resumes asks for.
    let part = Request::get(&format!("/team/tiny/resolve/{COMMIT}/model.bin")).with("Range", "bytes=1000000-").send(castier.public);
    assert_eq!(part.status, 206);
    assert!(part.body == large[1_000_000..]);
    // In what the hub says of its files, nothing but the shortcut is missing.
    let tree = format!("/api/models/team/tiny/tree/{COMMIT}?recursive=true");
    let (direct, through) = (Request::get(&tree).send(upstream.hub.addr()), Request::get(&tree).send(castier.public));
    assert!(direct.text().contains("xetHash") && !through.text().contains("xetHash"), "{}", through.text());
    let mut expected = direct.json();
    expected[1].as_object_mut().unwrap().remove("xetHash");
    assert_eq!(through.json(), expected);
    // What is not there is told in the hub's words.
    let absent = Request::get("/team/tiny/resolve/main/none.txt").send(castier.public);
    assert_eq!((absent.status, absent.header("x-error-code").as_deref()), (404, Some("EntryNotFound")));
}

/// A file that another repository has as well comes once.
#[test]
fn one_copy_for_two_repositories() {
    let _turn = turn();
    let upstream = Hub::start();
    let castier = upstream.castier("");
    for repository in ["tiny", "copy", "tiny"] {
        gets(castier.public, &Request::get(&format!("/team/{repository}/resolve/{COMMIT}/model.bin")), &large());
    }
    // castier may have asked for the file again, and have ended that as soon as it knew the digest.
    let received = castier.metric("castier_source_bytes_total", &["source=\"origin\""]);
    assert!(received < 1.5 * large().len() as f64, "{received}");
}

/// A file of a repository stays as it is, whatever it is about.
#[test]
fn files_are_not_rewritten() {
    let _turn = turn();
    let upstream = Hub::start();
    let castier = upstream.castier("");
    for revision in [COMMIT, "main"] {
        let target = format!("/team/tiny/resolve/{revision}/notes.json");
        for _ in 0..2 {
            let answer = gets(castier.public, &Request::get(&target), NOTES);
            assert_eq!(answer.header("etag"), Some(format!("\"{}\"", &sha256(NOTES)[..16])));
            let head = Request::head(&target).send(castier.public);
            assert_eq!(head.header("etag"), answer.header("etag"));
            assert_eq!(head.header("content-length"), Some(NOTES.len().to_string()));
        }
    }
}

/// A host that refuses HEAD is asked in another way.
#[test]
fn a_signed_link_may_be_for_get_alone() {
    let _turn = turn();
    let upstream = Hub::start();
    upstream.only_get.store(true, Ordering::Relaxed);
    let castier = upstream.castier("");
    let head = Request::head(&format!("/team/tiny/resolve/{COMMIT}/model.bin")).send(castier.public);
    assert_eq!((head.status, head.header("x-linked-size")), (200, Some(large().len().to_string())), "{head:?}");
    gets(castier.public, &Request::get(&format!("/team/tiny/resolve/{COMMIT}/model.bin")), &large());
}

/// A file that is not what `X-Linked-Etag` says is not kept, and not passed on as whole.
#[test]
fn a_file_with_another_digest_is_refused() {
    let _turn = turn();
    let upstream = Hub::start();
    upstream.stored.lock().unwrap()[3_000_000] ^= 1;
    let castier = upstream.castier("");
    for revision in [COMMIT, "main"] {
        let request = Request::get(&format!("/team/tiny/resolve/{revision}/model.bin"));
        refused(castier.public, &request);
        refused(castier.public, &request);
    }
    *upstream.stored.lock().unwrap() = large();
    for revision in [COMMIT, "main"] {
        gets(castier.public, &Request::get(&format!("/team/tiny/resolve/{revision}/model.bin")), &large());
    }
}

/// Credentials go to the hub alone. What is kept for those who have them is not for others.
#[test]
fn a_repository_with_restricted_access() {
    let _turn = turn();
    let Some(program) = client() else { return };
    let upstream = Hub::start();
    let castier = upstream.castier("access = \"upstream\"\n");
    let download = |token: &str| {
        let dir = TempDir::new().unwrap();
        python(
            &program,
            dir.path(),
            &castier.url(),
            &format!("print(hf_hub_download('team/secret', 'model.bin', revision='{COMMIT}', token={token}))"),
        )
    };
    let refusal = download("False").fails();
    assert!(refusal.contains("GatedRepoError"), "{refusal}");
    download(&format!("'{TOKEN}'")).ok();
    let cdn = upstream.cdn.take();
    assert!(!cdn.is_empty() && cdn.iter().all(|seen| seen.authorization().is_none()), "{}", lines(&cdn));
    download(&format!("'{TOKEN}'")).ok();
    assert_eq!(bytes(&upstream.cdn.take()), 0);
    for token in ["False", "'hf_another'"] {
        let refusal = download(token).fails();
        assert!(refusal.contains("GatedRepoError"), "{refusal}");
    }
    let refusal = Request::get(&format!("/team/secret/resolve/{COMMIT}/model.bin")).send(castier.public);
    assert_eq!((refusal.status, refusal.text().as_str()), (401, "Access is restricted"));
    assert_eq!(refusal.header("x-error-message").as_deref(), Some("Access is restricted"));
    assert_eq!(refusal.header("www-authenticate").as_deref(), Some("Bearer realm=\"Authentication required\""));
}
