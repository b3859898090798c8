//! Who gets what with `access = "upstream"`: every caller, every repository, kept and not kept, with the registry up and gone.
//!
//! The registry is the test's own. It gives `public` to everybody, `private` to ann, and `other` to bob.

use crate::support::{Castier, Request, Response, Upstream, castier, eventually, noise, sha256, turn};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CHALLENGE: &str = "Bearer realm=\"https://tokens.example/token\",service=\"registry\"";

#[derive(Clone, Copy, Debug, PartialEq)]
enum Repository {
    Public,
    Private,
    Other,
}

/// A caller, by its credentials.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Caller {
    Nobody,
    /// A token that never was one.
    Wrong,
    Ann,
    Bob,
    /// A token of ann's that was over before castier saw it.
    Expired,
    /// A token of ann's that castier saw when it was good.
    Lapsed,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Blob,
    ManifestByDigest,
    ManifestByTag,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ask {
    Get,
    Head,
    Range,
    IfNoneMatch,
}

const REPOSITORIES: [Repository; 3] = [Repository::Public, Repository::Private, Repository::Other];
const CALLERS: [Caller; 6] = [Caller::Nobody, Caller::Wrong, Caller::Ann, Caller::Bob, Caller::Expired, Caller::Lapsed];
const KINDS: [Kind; 3] = [Kind::Blob, Kind::ManifestByDigest, Kind::ManifestByTag];
const ASKS: [Ask; 4] = [Ask::Get, Ask::Head, Ask::Range, Ask::IfNoneMatch];

/// What a cell may be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// 200, 206 or 304, with the right bytes.
    Served,
    /// The registry's own refusal.
    Refused(u16),
    /// The last challenge (401), 502 or 504.
    Unknown,
    /// As `Served` or as `Unknown`: whoever leaves the credentials away is served.
    Either,
}

use Expected::{Either, Refused, Served, Unknown};

/// The registry is up, and nobody's proof counts any more: what the registry says now. A row is a caller, a column a repository.
const UP: [(Caller, [Expected; 3]); 6] = [
    //                 public        private       other
    (Caller::Nobody, [Served, Refused(401), Refused(401)]),
    (Caller::Wrong, [Refused(401), Refused(401), Refused(401)]),
    (Caller::Ann, [Served, Served, Refused(403)]),
    (Caller::Bob, [Served, Refused(403), Served]),
    (Caller::Expired, [Refused(401), Refused(401), Refused(401)]),
    (Caller::Lapsed, [Refused(401), Refused(401), Refused(401)]),
];

/// The registry is gone, the body is kept, and who was admitted within `proof_ttl` still is.
const GONE_WITH_PROOF: [(Caller, [Expected; 3]); 6] = [
    (Caller::Nobody, [Served, Unknown, Unknown]),
    (Caller::Wrong, [Either, Unknown, Unknown]),
    (Caller::Ann, [Served, Served, Unknown]),
    (Caller::Bob, [Served, Unknown, Served]),
    (Caller::Expired, [Either, Unknown, Unknown]),
    (Caller::Lapsed, [Served, Served, Unknown]),
];

/// The registry is gone, the body is kept, and all proofs have ended. Only what was public is for everybody who shows no credentials.
const GONE_WITHOUT_PROOF: [(Caller, [Expected; 3]); 6] = [
    (Caller::Nobody, [Served, Unknown, Unknown]),
    (Caller::Wrong, [Either, Unknown, Unknown]),
    (Caller::Ann, [Either, Unknown, Unknown]),
    (Caller::Bob, [Either, Unknown, Unknown]),
    (Caller::Expired, [Either, Unknown, Unknown]),
    (Caller::Lapsed, [Either, Unknown, Unknown]),
];

/// The state in which a cell is asked.
#[derive(Clone, Copy, Debug)]
struct State {
    kept: bool,
    up: bool,
    /// Those who were admitted still are.
    proof: bool,
}

fn expected(state: State, caller: Caller, repository: Repository) -> Expected {
    let row = |table: &[(Caller, [Expected; 3])]| table.iter().find(|(known, _)| *known == caller).unwrap().1[repository as usize];
    match (state.up, state.proof, state.kept) {
        // A proof outlives the token, for as long as it says, and only for what is kept.
        (true, true, true) if caller == Caller::Lapsed => row(&GONE_WITH_PROOF),
        (true, _, _) => row(&UP),
        (false, _, false) => Unknown,
        (false, true, true) => row(&GONE_WITH_PROOF),
        (false, false, true) => row(&GONE_WITHOUT_PROOF),
    }
}

// ---- the registry ----

impl Repository {
    fn name(self) -> &'static str {
        ["public", "private", "other"][self as usize]
    }
}

impl Caller {
    fn token(self) -> Option<&'static str> {
        [None, Some("wrong"), Some("of-ann"), Some("of-bob"), Some("expired"), Some("lapsed")][self as usize]
    }

    fn ask(self, request: Request) -> Request {
        let request = request.with("Accept", MANIFEST);
        match self.token() {
            Some(token) => request.bearer(token),
            None => request,
        }
    }

    /// Whom the registry lets in, while the lapsed token is good.
    fn may_read(self, repository: Repository) -> bool {
        match self {
            Self::Nobody => repository == Repository::Public,
            Self::Ann | Self::Lapsed => repository != Repository::Other,
            Self::Bob => repository != Repository::Private,
            Self::Wrong | Self::Expired => false,
        }
    }
}

/// An object that only one cell asks for. Every object is in one repository alone.
fn object(repository: Repository, kind: Kind, number: usize) -> Vec<u8> {
    let seed = (number * 3 + repository as usize) as u64;
    match kind {
        Kind::Blob => noise(seed, 2000),
        _ => json!({"schemaVersion": 2, "mediaType": MANIFEST, "annotations": {"number": seed, "kind": format!("{kind:?}")}})
            .to_string()
            .into_bytes(),
    }
}

fn target(repository: Repository, kind: Kind, number: usize) -> String {
    let digest = sha256(&object(repository, kind, number));
    let name = repository.name();
    match kind {
        Kind::Blob => format!("/v2/{name}/blobs/sha256:{digest}"),
        Kind::ManifestByDigest => format!("/v2/{name}/manifests/sha256:{digest}"),
        Kind::ManifestByTag => format!("/v2/{name}/manifests/tag-{number}"),
    }
}

/// Objects with these numbers and below are there.
const OBJECTS: usize = 100;
/// What makes a caller known in a repository, without a cell's object.
const MARKER: usize = OBJECTS;

struct Registry {
    server: Upstream,
    /// The tokens that it accepts.
    good: Arc<Mutex<BTreeSet<String>>>,
}

impl Registry {
    fn start() -> Self {
        let mut objects = BTreeMap::new();
        for repository in REPOSITORIES {
            for kind in KINDS {
                for number in 0..=OBJECTS {
                    objects.insert(target(repository, kind, number), object(repository, kind, number));
                }
            }
        }
        let good: Arc<Mutex<BTreeSet<String>>> = Arc::default();
        let accepted = good.clone();
        let server = Upstream::answering(move |request| {
            let refusal = |status: u16, code: &str| {
                let body = json!({"errors": [{"code": code, "message": "said by the registry"}]}).to_string();
                let answer = Response::new(status).with("Content-Type", "application/json").body(body);
                if status == 401 { answer.with("WWW-Authenticate", CHALLENGE) } else { answer }
            };
            let authorization = request.header("authorization");
            let token = authorization.as_deref().and_then(|value| value.strip_prefix("Bearer "));
            if token.is_some_and(|token| !accepted.lock().unwrap().contains(token)) {
                return refusal(401, "UNAUTHORIZED");
            }
            let caller = CALLERS.into_iter().find(|caller| caller.token() == token).unwrap_or(Caller::Ann);
            let Some(repository) = REPOSITORIES.into_iter().find(|repository| request.path().split('/').nth(2) == Some(repository.name()))
            else {
                return Response::new(if request.path() == "/v2/" { 200 } else { 404 });
            };
            if !caller.may_read(repository) {
                return if token.is_none() { refusal(401, "UNAUTHORIZED") } else { refusal(403, "DENIED") };
            }
            let Some(bytes) = objects.get(request.path()) else { return refusal(404, "BLOB_UNKNOWN") };
            let digest = format!("sha256:{}", sha256(bytes));
            let kind = if request.path().contains("/blobs/") { "application/octet-stream" } else { MANIFEST };
            let etag = format!("\"{digest}\"");
            let answer = Response::new(200).with("Content-Type", kind).with("Docker-Content-Digest", &digest).with("ETag", &etag);
            if request.header("if-none-match").is_some_and(|value| value.contains(&etag)) {
                return Response { status: 304, ..answer };
            }
            let range = request.header("range").and_then(|value| {
                let (from, to) = value.strip_prefix("bytes=")?.split_once('-')?;
                let (from, to) = (from.parse().ok()?, to.parse().map_or(bytes.len(), |to: usize| bytes.len().min(to + 1)));
                (kind != MANIFEST && from < to).then_some((from, to))
            });
            match range {
                Some((from, to)) => {
                    let value = format!("bytes {from}-{}/{}", to - 1, bytes.len());
                    Response { status: 206, ..answer }.with("Content-Range", &value).body(&bytes[from..to])
                }
                None => answer.with("Content-Length", &bytes.len().to_string()).body(bytes.clone()),
            }
        });
        Self { server, good }
    }

    fn accepts(&self, token: &str, yes: bool) {
        let mut good = self.good.lock().unwrap();
        if yes {
            good.insert(token.to_owned());
        } else {
            good.remove(token);
        }
    }
}

// ---- the cells ----

fn request(repository: Repository, kind: Kind, number: usize, ask: Ask) -> Request {
    let target = target(repository, kind, number);
    let digest = sha256(&object(repository, kind, number));
    match ask {
        Ask::Get => Request::get(&target),
        Ask::Head => Request::head(&target),
        Ask::Range => Request::get(&target).with("Range", "bytes=10-19"),
        Ask::IfNoneMatch => Request::get(&target).with("If-None-Match", &format!("\"sha256:{digest}\", \"{digest}\"")),
    }
}

/// What is wrong with an answer that should have the body.
fn wrong_body(answer: &Response, bytes: &[u8], ask: Ask, kind: Kind, kept: bool) -> Option<String> {
    let whole = answer.status == 200 && answer.body == bytes;
    let right = match ask {
        Ask::Get => whole,
        Ask::Head => answer.status == 200 && answer.header("content-length") == Some(bytes.len().to_string()),
        // A server need not have ranges of manifests.
        Ask::Range => (answer.status == 206 && answer.body == bytes[10..20]) || (kind != Kind::Blob && whole),
        Ask::IfNoneMatch => answer.status == 304 || (!kept && whole),
    };
    (!right).then(|| format!("{} with {} bytes", answer.status, answer.body.len()))
}

fn wrong_answer(answer: &Response, expected: Expected, body: Option<String>) -> Option<String> {
    let told = |status: u16| answer.status == status && (status != 401 || answer.header("www-authenticate").as_deref() == Some(CHALLENGE));
    let unknown = told(401) || [502, 504].contains(&answer.status);
    let right = match expected {
        Served => return body,
        Refused(status) => told(status) && (answer.body.is_empty() || answer.text().contains("said by the registry")),
        Unknown => unknown,
        Either => unknown || body.is_none(),
    };
    (!right).then(|| format!("{} {:?} {}", answer.status, answer.headers, answer.text()))
}

/// Starts castier, and brings it into this state: everybody was there before, and what the cells ask for is kept or not.
fn prepare(registry: &Registry, state: State) -> Castier {
    for caller in [Caller::Ann, Caller::Bob, Caller::Lapsed] {
        registry.accepts(caller.token().unwrap(), true);
    }
    let proof = if state.proof { "1h" } else { "1s" };
    let config = format!(
        "[[route]]\nprotocol = \"oci\"\nupstream = \"{}\"\naccess = \"upstream\"\nproof_ttl = \"{proof}\"\nttl = \"1h\"\nstale_if_error = \"24h\"\n",
        registry.server.url()
    );
    let castier = castier(&config);
    let read = |caller: Caller, repository: Repository, kind: Kind, number: usize| {
        let answer = caller.ask(Request::get(&target(repository, kind, number))).send(castier.public);
        assert_eq!(answer.status, 200, "{caller:?} {repository:?} {kind:?} {answer:?}");
    };
    if state.kept {
        let owners = [Caller::Nobody, Caller::Ann, Caller::Bob];
        for (owner, repository) in owners.into_iter().zip(REPOSITORIES) {
            for kind in KINDS {
                (0..OBJECTS).for_each(|number| read(owner, repository, kind, number));
            }
        }
    }
    for caller in CALLERS {
        for repository in REPOSITORIES {
            let answer = caller.ask(Request::get(&target(repository, Kind::Blob, MARKER))).send(castier.public);
            assert_eq!(answer.status == 200, caller.may_read(repository), "{caller:?} {repository:?} {answer:?}");
        }
    }
    registry.accepts(Caller::Lapsed.token().unwrap(), false);
    if !state.proof {
        // The last proof is that of another token. Once it has ended, all have.
        registry.accepts("canary", true);
        let canary = Request::get(&target(Repository::Private, Kind::Blob, MARKER)).bearer("canary");
        assert_eq!(canary.send(castier.public).status, 200);
        registry.accepts("canary", false);
        eventually("all proofs have ended", || (canary.send(castier.public).status != 200).then_some(()));
    }
    if !state.up {
        registry.server.kill();
    }
    castier
}

fn check(state: State) {
    let _turn = turn();
    let registry = Registry::start();
    let castier = prepare(&registry, state);
    let mut wrong = Vec::new();
    let mut number = 0;
    for caller in CALLERS {
        for ask in ASKS {
            number += 1;
            for repository in REPOSITORIES {
                for kind in KINDS {
                    let (cell, bytes) = (expected(state, caller, repository), object(repository, kind, number));
                    let answer = caller.ask(request(repository, kind, number, ask)).try_send(castier.public);
                    let found = match &answer {
                        Ok(answer) => wrong_answer(answer, cell, wrong_body(answer, &bytes, ask, kind, state.kept)),
                        Err(error) => Some(format!("no answer: {error}")),
                    };
                    let unmarked = answer.is_ok_and(|answer| answer.status < 500 && !answer.cache_status().contains("castier"));
                    let found = found.or(unmarked.then(|| "no Cache-Status".to_owned()));
                    wrong.extend(found.map(|found| format!("{caller:?} {repository:?} {kind:?} {ask:?}: expected {cell:?}, got {found}")));
                    // By its plain name it is not there, for nobody.
                    let plain = caller.ask(Request::get(&format!("/cas/{}", sha256(&bytes)))).send(castier.public);
                    if plain.status != 404 {
                        wrong.push(format!("/cas for {caller:?} {repository:?} {kind:?}: {}", plain.status));
                    }
                }
            }
        }
    }
    assert!(number <= OBJECTS);
    assert!(wrong.is_empty(), "{state:?}, {} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn up_and_kept_with_proofs() {
    check(State { kept: true, up: true, proof: true });
}

#[test]
fn up_and_kept_without_proofs() {
    check(State { kept: true, up: true, proof: false });
}

#[test]
fn up_and_not_kept_with_proofs() {
    check(State { kept: false, up: true, proof: true });
}

#[test]
fn up_and_not_kept_without_proofs() {
    check(State { kept: false, up: true, proof: false });
}

#[test]
fn gone_and_kept_with_proofs() {
    check(State { kept: true, up: false, proof: true });
}

#[test]
fn gone_and_kept_without_proofs() {
    check(State { kept: true, up: false, proof: false });
}

#[test]
fn gone_and_not_kept_with_proofs() {
    check(State { kept: false, up: false, proof: true });
}

#[test]
fn gone_and_not_kept_without_proofs() {
    check(State { kept: false, up: false, proof: false });
}

/// An object of one repository is not found through another one that the caller may read.
#[test]
fn a_repository_has_only_its_own() {
    let _turn = turn();
    let registry = Registry::start();
    let castier = prepare(&registry, State { kept: true, up: true, proof: true });
    let check = |allowed: &[u16]| {
        let mut wrong = Vec::new();
        for (caller, through, of) in [
            (Caller::Nobody, Repository::Public, Repository::Private),
            (Caller::Bob, Repository::Other, Repository::Private),
            (Caller::Ann, Repository::Private, Repository::Other),
            (Caller::Ann, Repository::Public, Repository::Private),
        ] {
            for kind in [Kind::Blob, Kind::ManifestByDigest] {
                for ask in ASKS {
                    let mut request = request(of, kind, 1, ask);
                    request.target = request.target.replace(of.name(), through.name());
                    let answer = caller.ask(request).send(castier.public);
                    if !allowed.contains(&answer.status) {
                        let told = format!("{} {}", answer.status, answer.cache_status());
                        wrong.push(format!("{caller:?} reads {kind:?} of {of:?} through {through:?} with {ask:?}: {told}"));
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "only {allowed:?} are right:\n{}", wrong.join("\n"));
    };
    check(&[404]);
    registry.server.kill();
    check(&[401, 404, 502, 504]);
}

/// What came by such a route is there for `/cas` only once somebody has stored it at the origin, and then without a question about the body.
#[test]
fn one_copy_and_the_plain_name() {
    let _turn = turn();
    let registry = Registry::start();
    let castier = prepare(&registry, State { kept: true, up: true, proof: true });
    let bytes = object(Repository::Private, Kind::Blob, 1);
    let plain = format!("/cas/{}", sha256(&bytes));
    let status = |method: &str| Request::new(method, &plain).send(castier.public).status;
    assert_eq!([status("GET"), status("HEAD")], [404, 404]);
    // A part of it, or another name for it, is no proof of having it.
    assert_eq!(Request::get(&plain).with("Range", "bytes=0-0").send(castier.public).status, 404);
    let conditional = Request::get(&plain).with("If-None-Match", &format!("\"{}\"", sha256(&bytes))).send(castier.public);
    assert!([304, 404].contains(&conditional.status), "{conditional:?}");
    let mut wrong = bytes.clone();
    wrong[0] ^= 1;
    assert_eq!(Request::new("PUT", &plain).body(wrong).send(castier.public).status, 422);
    assert_eq!(status("GET"), 404);
    // Whoever has the bytes may store them, and learns nothing from how that goes.
    assert_eq!(Request::new("PUT", &plain).body(bytes.clone()).send(castier.public).status, 201);
    assert!(Request::get(&plain).send(castier.public).body == bytes);

    // The other way: what was stored is a hit for the route, once the caller is admitted.
    registry.server.take();
    let bytes = object(Repository::Private, Kind::Blob, MARKER - 1);
    let fresh = castier.restart(&format!(
        "[[route]]\nprotocol = \"oci\"\nupstream = \"{}\"\naccess = \"upstream\"\nproof_ttl = \"1h\"\n",
        registry.server.url()
    ));
    assert_eq!(Request::new("PUT", &format!("/cas/{}", sha256(&bytes))).body(bytes.clone()).send(fresh.public).status, 201);
    let blob = Request::get(&target(Repository::Private, Kind::Blob, MARKER - 1));
    assert_eq!(Caller::Nobody.ask(blob.clone()).send(fresh.public).status, 401);
    assert_eq!(Caller::Bob.ask(blob.clone()).send(fresh.public).status, 403);
    assert!(Caller::Ann.ask(blob).send(fresh.public).body == bytes);
    assert_eq!(registry.server.count(|seen| seen.sent >= bytes.len() as u64), 0, "{}", registry.server.history());
}
