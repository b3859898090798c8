//! Container images: a real registry, with skopeo, containerd's client, and a client of the test that asks what docker asks.

use crate::support::{
    Castier, Port, Ran, Request, Response, Running, Seen, Upstream, castier, command, eventually, lines, noise, run, sha256, skip, tool,
    turn,
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Barrier},
    thread,
    time::SystemTime,
};
use tempfile::TempDir;

const MIB: usize = 1 << 20;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The users of the registry, with their passwords.
const ANN: (&str, &str) = ("ann", "secret of ann");
const BEN: (&str, &str) = ("ben", "secret of ben");
const HTPASSWD: &str = "ann:$2b$04$.E8aY.EDw69Mqk5UgyBPWO1ODmExygvyYT4MqnSwRZ.qH6c5r1Fhm\n\
                        ben:$2b$04$ODsLUZWCXwhJzcaP622NFe8dfBEWAwXTxShWpKOBu2DEdM9QGR3Py\n";

// ---- images ----

/// An image in a folder, as an OCI layout with the tag `1`.
pub(crate) struct Image {
    layout: TempDir,
    manifest: Vec<u8>,
    /// Every blob of it but manifests, by its digest.
    blobs: BTreeMap<String, Vec<u8>>,
}

fn put_blob(layout: &Path, bytes: &[u8]) -> String {
    let digest = sha256(bytes);
    let folder = layout.join("blobs/sha256");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(&digest), bytes).unwrap();
    digest
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": format!("sha256:{}", sha256(bytes)), "size": bytes.len()})
}

fn finish_layout(layout: &Path, kind: &str, top: &[u8]) {
    put_blob(layout, top);
    let mut entry = descriptor(kind, top);
    entry["annotations"] = json!({"org.opencontainers.image.ref.name": "1"});
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string()).unwrap();
}

impl Image {
    /// With layers of about these sizes, for this machine's architecture.
    pub(crate) fn new(seed: u64, sizes: &[usize]) -> Self {
        let layout = TempDir::new().unwrap();
        let (manifest, blobs) = Self::write(layout.path(), seed, sizes, "amd64");
        finish_layout(layout.path(), MANIFEST, &manifest);
        Self { layout, manifest, blobs }
    }

    /// An index of two images, for two architectures.
    fn index(seed: u64) -> Self {
        let layout = TempDir::new().unwrap();
        let mut blobs = BTreeMap::new();
        let entries: Vec<Value> = (0..)
            .zip(["amd64", "arm64"])
            .map(|(number, architecture)| {
                let (manifest, mut own) = Self::write(layout.path(), seed + number, &[4000], architecture);
                put_blob(layout.path(), &manifest);
                blobs.append(&mut own);
                let mut entry = descriptor(MANIFEST, &manifest);
                entry["platform"] = json!({"architecture": architecture, "os": "linux"});
                entry
            })
            .collect();
        let manifest = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).to_string().into_bytes();
        finish_layout(layout.path(), INDEX, &manifest);
        Self { layout, manifest, blobs }
    }

    /// Returns the manifest and the blobs.
    fn write(layout: &Path, seed: u64, sizes: &[usize], architecture: &str) -> (Vec<u8>, BTreeMap<String, Vec<u8>>) {
        let mut blobs = BTreeMap::new();
        let (mut layers, mut contents) = (Vec::new(), Vec::new());
        for (number, size) in (0..).zip(sizes) {
            let dir = TempDir::new().unwrap();
            fs::write(dir.path().join(format!("file-{number}")), noise(seed * 1000 + number, *size)).unwrap();
            let tar =
                ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-cf", "layer.tar", "--exclude=layer.tar", "."];
            run(command("tar", dir.path()).args(tar)).ok();
            contents.push(format!("sha256:{}", sha256(&fs::read(dir.path().join("layer.tar")).unwrap())));
            run(command("gzip", dir.path()).args(["-n", "layer.tar"])).ok();
            let layer = fs::read(dir.path().join("layer.tar.gz")).unwrap();
            layers.push(descriptor(LAYER, &layer));
            blobs.insert(put_blob(layout, &layer), layer);
        }
        let config = json!({"architecture": architecture, "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": contents}});
        let config = config.to_string().into_bytes();
        let kind = "application/vnd.oci.image.config.v1+json";
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(kind, &config), "layers": layers});
        blobs.insert(put_blob(layout, &config), config);
        (manifest.to_string().into_bytes(), blobs)
    }

    pub(crate) fn source(&self) -> String {
        format!("oci:{}:1", self.layout.path().display())
    }

    pub(crate) fn digest(&self) -> String {
        format!("sha256:{}", sha256(&self.manifest))
    }

    /// The largest blob: its digest and bytes.
    fn largest(&self) -> (&str, &[u8]) {
        let (digest, bytes) = self.blobs.iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
        (digest, bytes)
    }

    /// A folder that skopeo has filled with this image has every byte of it.
    pub(crate) fn assert_in(&self, dir: &Path) {
        assert_eq!(fs::read(dir.join("manifest.json")).unwrap(), self.manifest);
        for (digest, bytes) in &self.blobs {
            assert!(fs::read(dir.join(digest)).unwrap() == *bytes, "{digest}");
        }
    }
}

// ---- the registry and its clients ----

pub(crate) struct Registry {
    _process: Running,
    _port: Port,
    _dir: TempDir,
    /// What counts in front of it.
    pub(crate) front: Upstream,
    /// Past the counting.
    pub(crate) real: SocketAddr,
}

impl Registry {
    /// None, after saying so, if the programs are not there.
    pub(crate) fn start(auth: &str) -> Option<Self> {
        let program = tool("docker-registry")?;
        tool("skopeo")?;
        let (dir, port) = (TempDir::new().unwrap(), Port::free());
        fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  accesslog:\n    disabled: true\nstorage:\n  delete:\n    enabled: true\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {}\n{auth}",
            dir.path().join("data").display(),
            port.addr()
        );
        fs::write(dir.path().join("config.yml"), config).unwrap();
        let mut process = Running::start(command(program, dir.path()).args(["serve", "config.yml"]));
        process.listens(port.addr());
        let real = port.addr();
        Some(Self { _process: process, _port: port, _dir: dir, front: Upstream::before(real), real })
    }

    fn basic() -> Option<Self> {
        Self::start("auth:\n  htpasswd:\n    realm: test\n    path: htpasswd\n")
    }

    /// Stores an image, past the counting.
    pub(crate) fn push(&self, image: &Image, name: &str, options: &[&str]) {
        Skopeo::new().copy(&image.source(), &docker(self.real, name), options).ok();
    }
}

pub(crate) fn docker(addr: SocketAddr, name: &str) -> String {
    format!("docker://{addr}/{name}")
}

/// skopeo, with a home of its own.
pub(crate) struct Skopeo {
    dir: TempDir,
}

impl Skopeo {
    pub(crate) fn new() -> Self {
        Self { dir: TempDir::new().unwrap() }
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        let program = tool("skopeo").unwrap();
        // No password of this machine's user, and none of an earlier call.
        let auth = self.dir.path().join("auth.json");
        let mut command = command(program, self.dir.path());
        run(command.args(["--insecure-policy", "--tmpdir", "."]).args(arguments).env("REGISTRY_AUTH_FILE", auth))
    }

    pub(crate) fn copy(&self, from: &str, to: &str, options: &[&str]) -> Ran {
        let copy = ["copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"];
        let arguments: Vec<_> = copy.iter().chain(options).copied().chain([from, to]).collect();
        self.run(&arguments)
    }
}

/// Pulls with skopeo into a fresh folder. Returns how that ended, and the folder.
pub(crate) fn pull_to(addr: SocketAddr, name: &str, options: &[&str]) -> (Ran, TempDir) {
    let dir = TempDir::new().unwrap();
    let ran = Skopeo::new().copy(&docker(addr, name), &format!("dir:{}", dir.path().display()), options);
    (ran, dir)
}

/// Pulls with skopeo, and compares every byte.
#[track_caller]
pub(crate) fn pull(addr: SocketAddr, name: &str, image: &Image, options: &[&str]) {
    let (ran, dir) = pull_to(addr, name, options);
    ran.ok();
    image.assert_in(dir.path());
}

/// skopeo's option for these credentials.
fn credentials((user, password): (&str, &str)) -> String {
    format!("--src-creds={user}:{password}")
}

fn is_blob(seen: &Seen) -> bool {
    seen.target.contains("/blobs/sha256:")
}

/// The GETs of blobs, by digest.
fn blob_gets(seen: &[Seen]) -> BTreeMap<String, usize> {
    let mut gets = BTreeMap::new();
    for one in seen.iter().filter(|seen| is_blob(seen) && seen.method == "GET") {
        *gets.entry(one.target.rsplit(':').next().unwrap().to_owned()).or_default() += 1;
    }
    gets
}

/// Each blob of the image was loaded exactly once.
#[track_caller]
fn assert_loaded_once(seen: &[Seen], image: &Image) {
    let expected = image.blobs.keys().map(|digest| (digest.clone(), 1)).collect();
    assert_eq!(blob_gets(seen), expected, "{}", lines(seen));
}

#[track_caller]
fn assert_no_bodies(seen: &[Seen]) {
    let bodies = seen
        .iter()
        .filter(|seen| seen.method == "GET" && seen.status == 200 && (is_blob(seen) || seen.target.contains("/manifests/")))
        .count();
    assert_eq!(bodies, 0, "{}", lines(seen));
}

/// The code of a registry's error.
#[track_caller]
fn error_code(answer: &Response) -> String {
    assert!(answer.header("content-type").is_some_and(|kind| kind.starts_with("application/json")), "{answer:?}");
    let error = answer.json();
    error["errors"][0]["code"].as_str().unwrap_or_else(|| panic!("{error}")).to_owned()
}

pub(crate) fn route(upstream: &str, keys: &str) -> String {
    format!("[[route]]\nprotocol = \"oci\"\nupstream = \"{upstream}\"\n{keys}\n")
}

// ---- an open registry ----

#[test]
fn open_registry() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(1, &[6 * MIB, 70_000, 300]);
    registry.push(&image, "team/app:1", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"0s\""));

    pull(castier.public, "team/app:1", &image, &[]);
    assert_loaded_once(&registry.front.take(), &image);

    // Again: nothing but questions about the tag.
    pull(castier.public, "team/app:1", &image, &[]);
    let seen = registry.front.take();
    assert_no_bodies(&seen);
    assert!(seen.iter().all(|seen| !is_blob(seen)), "{}", lines(&seen));

    // What a client sees of it.
    let (digest, bytes) = image.largest();
    let blob = format!("/v2/team/app/blobs/sha256:{digest}");
    let head = Request::head(&blob).send(castier.public);
    assert_eq!((head.status, head.header("content-length")), (200, Some(bytes.len().to_string())));
    assert_eq!(head.header("docker-content-digest"), Some(format!("sha256:{digest}")));
    let range = Request::get(&blob).with("Range", "bytes=100-199").send(castier.public);
    assert_eq!((range.status, &range.body[..]), (206, &bytes[100..200]));
    assert_eq!(range.header("content-range"), Some(format!("bytes 100-199/{}", bytes.len())));
    let manifest = Request::get("/v2/team/app/manifests/1").with("Accept", MANIFEST).send(castier.public);
    assert_eq!((manifest.status, &manifest.body), (200, &image.manifest));
    assert_eq!(manifest.header("content-type").as_deref(), Some(MANIFEST));
    assert_eq!(manifest.header("docker-content-digest"), Some(image.digest()));
    // One copy, whatever it is called.
    assert!(Request::get(&format!("/cas/{digest}")).send(castier.public).body == bytes);

    registry.front.kill();
    pull(castier.public, "team/app:1", &image, &[]);
    assert_eq!(Request::head(&blob).send(castier.public).status, 200);

    // The registry is back: a tag that moved is seen at once, and what both images have in common is not loaded again.
    registry.front.up();
    let moved = Image::new(1, &[6 * MIB, 70_000]);
    registry.push(&moved, "team/app:1", &[]);
    pull(castier.public, "team/app:1", &moved, &[]);
    let loaded = blob_gets(&registry.front.take());
    let new = moved.blobs.keys().filter(|digest| !image.blobs.contains_key(*digest));
    assert_eq!(loaded, new.map(|digest| (digest.clone(), 1)).collect());
}

/// A manifest that came by a tag is known by its digest, and the reverse: some clients ask for the one, some for the other.
#[test]
fn by_tag_and_by_digest() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let images = [Image::new(60, &[300_000]), Image::new(61, &[300_000])];
    registry.push(&images[0], "app:tag-first", &[]);
    registry.push(&images[1], "app:digest-first", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"0s\""));
    let by_digest = images.each_ref().map(|image| format!("app@{}", image.digest()));
    pull(castier.public, "app:tag-first", &images[0], &[]);
    pull(castier.public, &by_digest[1], &images[1], &[]);
    registry.front.take();
    pull(castier.public, &by_digest[0], &images[0], &[]);
    pull(castier.public, "app:digest-first", &images[1], &[]);
    assert_no_bodies(&registry.front.take());
    registry.front.kill();
    pull(castier.public, &by_digest[0], &images[0], &[]);
    pull(castier.public, "app:digest-first", &images[1], &[]);
}

#[test]
fn an_index_of_two_architectures() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::index(10);
    registry.push(&image, "multi:1", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\""));
    pull(castier.public, "multi:1", &image, &[]);
    assert_loaded_once(&registry.front.take(), &image);
    registry.front.kill();
    pull(castier.public, "multi:1", &image, &[]);
}

#[test]
fn a_blob_of_another_repository_is_not_loaded_again() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(2, &[MIB, 300]);
    registry.push(&image, "one:1", &[]);
    registry.push(&image, "two:1", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\""));
    pull(castier.public, "one:1", &image, &[]);
    registry.front.take();
    pull(castier.public, "two:1", &image, &[]);
    let seen = registry.front.take();
    assert_eq!(blob_gets(&seen), BTreeMap::new(), "{}", lines(&seen));
}

#[test]
fn wrong_bytes_never_arrive() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(3, &[3 * MIB, 300]);
    registry.push(&image, "app:1", &[]);
    let (digest, bytes) = image.largest();
    let (path, mut wrong) = (format!("/v2/app/blobs/sha256:{digest}"), bytes.to_vec());
    wrong[MIB] ^= 1;
    let lie = path.clone();
    registry.front.intercept(move |request| {
        (request.method == "GET" && request.path() == lie).then(|| Response::ok("application/octet-stream", wrong.clone()))
    });
    let castier = castier(&route(&registry.front.url(), "access = \"local\""));
    pull_to(castier.public, "app:1", &[]).0.fails();
    assert!(Request::get(&path).try_send(castier.public).map_or(true, |answer| answer.status >= 500));
    registry.front.intercept(|_| None);
    pull(castier.public, "app:1", &image, &[]);
}

// ---- passwords ----

#[test]
fn basic_of_the_upstream() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(4, &[2 * MIB, 300]);
    let push = format!("--dest-creds={}:{}", ANN.0, ANN.1);
    registry.push(&image, "app:1", &[&push]);
    let castier = castier(&route(&registry.front.url(), "access = \"upstream\"\nttl = \"0s\"\nproof_ttl = \"1h\""));
    let (ann, ben) = (credentials(ANN), credentials(BEN));
    let wrong = credentials(("ann", "a wrong password"));
    let refused = |name: &str, options: &[&str]| {
        let said = pull_to(castier.public, name, options).0.fails();
        assert!(said.contains("unauthorized") || said.contains("authentication required"), "{said}");
    };

    // Nobody comes in before, nor after, the image is kept.
    refused("app:1", &[]);
    refused("app:1", &[&wrong]);
    pull(castier.public, "app:1", &image, &[&ann]);
    assert_loaded_once(&registry.front.take(), &image);
    refused("app:1", &[]);
    refused("app:1", &[&wrong]);
    refused(&format!("app@{}", image.digest()), &[&wrong]);

    let (digest, bytes) = image.largest();
    let blob = Request::get(&format!("/v2/app/blobs/sha256:{digest}"));
    // Without credentials, the plain name is not there.
    assert_eq!(Request::get(&format!("/cas/{digest}")).send(castier.public).status, 404);
    assert_eq!(Request::head(&format!("/cas/{digest}")).send(castier.public).status, 404);
    assert_eq!(Request::get(&format!("/cas/{digest}")).basic(ANN.0, ANN.1).send(castier.public).status, 404);

    // Another user's are asked about once, and load nothing.
    registry.front.take();
    pull(castier.public, "app:1", &image, &[&ben]);
    let seen = registry.front.take();
    assert_no_bodies(&seen);
    let as_ben = crate::support::basic(BEN.0, BEN.1);
    assert!(
        seen.iter().any(|seen| seen.authorization().as_ref() == Some(&as_ben) && [200, 304].contains(&seen.status)),
        "{}",
        lines(&seen)
    );

    registry.front.kill();
    pull(castier.public, "app:1", &image, &[&ann]);
    pull(castier.public, "app:1", &image, &[&ben]);
    assert!(blob.clone().basic(ANN.0, ANN.1).send(castier.public).body == bytes);
    refused("app:1", &[]);
    for request in [blob.clone(), blob.clone().basic(ANN.0, "a wrong password")] {
        let answer = request.send(castier.public);
        assert_eq!(answer.status, 401, "{answer:?}");
        assert!(answer.header("www-authenticate").is_some_and(|value| value.starts_with("Basic")), "{answer:?}");
    }
}

/// A client sees the registry's refusals as they are, whether castier keeps what it asks for or not.
#[test]
fn refusals_are_the_registry_s() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(62, &[MIB]);
    registry.push(&image, "app:1", &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    let castier = castier(&route(&registry.front.url(), "access = \"upstream\"\nttl = \"0s\"\nproof_ttl = \"1h\""));
    let targets = [
        format!("/v2/app/blobs/sha256:{}", image.largest().0),
        format!("/v2/app/manifests/{}", image.digest()),
        "/v2/app/manifests/1".to_owned(),
        "/v2/app/tags/list".to_owned(),
        "/v2/".to_owned(),
    ];
    let check = || {
        for target in &targets {
            for request in [Request::get(target), Request::head(target)] {
                for request in [request.clone(), request.basic(ANN.0, "a wrong password")] {
                    let (own, through) = (request.send(registry.real), request.send(castier.public));
                    assert_eq!((own.status, through.status), (401, 401), "{} {target}", request.method);
                    for name in ["www-authenticate", "docker-distribution-api-version", "content-type"] {
                        assert_eq!(own.header(name), through.header(name), "{} {target}: {name}", request.method);
                    }
                    assert_eq!(own.text(), through.text(), "{} {target}", request.method);
                }
            }
        }
    };
    check();
    pull(castier.public, "app:1", &image, &[&credentials(ANN)]);
    check();
    // An absence is the registry's own as well, also of what is kept for another repository.
    for target in [format!("/v2/other/blobs/sha256:{}", image.largest().0), format!("/v2/other/manifests/{}", image.digest())] {
        let request = Request::get(&target).basic(ANN.0, ANN.1);
        let (own, through) = (request.send(registry.real), request.send(castier.public));
        assert_eq!((through.status, error_code(&through)), (404, error_code(&own)), "{target}");
    }
}

// ---- tokens ----

/// A server of tokens, which the registry trusts: `ann` may read everything, `ben` what begins with `other`, and everybody what begins with `public`.
struct Realm {
    server: Upstream,
    certificate: String,
}

impl Realm {
    fn start() -> Self {
        use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let certificate = CertificateParams::new(vec!["realm".into()]).unwrap().self_signed(&key).unwrap();
        let der = data_encoding::BASE64.encode(certificate.der());
        let server = Upstream::answering(move |request| {
            let user = request.header("authorization");
            let name = match &user {
                None => "",
                Some(known) if *known == crate::support::basic(ANN.0, ANN.1) => "ann",
                Some(known) if *known == crate::support::basic(BEN.0, BEN.1) => "ben",
                Some(_) => return Response::new(401).with("WWW-Authenticate", "Basic realm=\"tokens\"").body("no such user\n"),
            };
            let scope = request.parameter("scope").unwrap_or_default();
            let mut parts = scope.split_once(':').unwrap_or_default().1.rsplitn(2, ':');
            let (actions, repository) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let allowed = repository.starts_with("public") || name == "ann" || (name == "ben" && repository.starts_with("other"));
            let granted: Vec<_> = actions.split(',').filter(|action| *action == "pull" || name == "ann").collect();
            let access = if allowed && !repository.is_empty() {
                json!([{"type": "repository", "name": repository, "actions": granted}])
            } else {
                json!([])
            };
            let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
            let claims = json!({"iss": "realm", "sub": name, "aud": "registry", "exp": now + 300, "nbf": now - 5, "iat": now,
                "jti": now.to_string(), "access": access});
            let head = json!({"typ": "JWT", "alg": "ES256", "x5c": [der]});
            let encode = |bytes: &[u8]| data_encoding::BASE64URL_NOPAD.encode(bytes);
            let text = format!("{}.{}", encode(head.to_string().as_bytes()), encode(claims.to_string().as_bytes()));
            let signature = raw_signature(&rcgen::SigningKey::sign(&key, text.as_bytes()).unwrap());
            let token = format!("{text}.{}", encode(&signature));
            Response::ok("application/json", json!({"token": token, "access_token": token, "expires_in": 300}).to_string())
        });
        Self { server, certificate: certificate.pem() }
    }

    fn registry(&self, certificate: &Path) -> Option<Registry> {
        fs::write(certificate, &self.certificate).unwrap();
        Registry::start(&format!(
            "auth:\n  token:\n    realm: {}/token\n    service: registry\n    issuer: realm\n    rootcertbundle: {}\n",
            self.server.url(),
            certificate.display()
        ))
    }

    fn token(&self, (user, password): (&str, &str), scope: &str) -> String {
        let request = Request::get(&format!("/token?service=registry&scope={scope}")).basic(user, password);
        request.send(self.server.addr()).json()["token"].as_str().unwrap().to_owned()
    }
}

/// The two numbers of an ECDSA signature in DER, of 32 bytes each.
fn raw_signature(der: &[u8]) -> Vec<u8> {
    let mut raw = Vec::new();
    let mut at = 2;
    for _ in 0..2 {
        let length = usize::from(der[at + 1]);
        let number = &der[at + 2..at + 2 + length];
        let number = &number[number.len().saturating_sub(32)..];
        raw.extend(std::iter::repeat_n(0, 32 - number.len()).chain(number.iter().copied()));
        at += 2 + length;
    }
    raw
}

#[test]
fn tokens_of_the_upstream() {
    let _turn = turn();
    let (realm, dir) = (Realm::start(), TempDir::new().unwrap());
    let Some(registry) = realm.registry(&dir.path().join("realm.pem")) else { return };
    let (private, public) = (Image::new(5, &[2 * MIB, 300]), Image::new(6, &[MIB]));
    let push = format!("--dest-creds={}:{}", ANN.0, ANN.1);
    registry.push(&private, "private/app:1", &[&push]);
    registry.push(&public, "public/app:1", &[&push]);
    let castier = castier(&route(&registry.front.url(), "access = \"upstream\"\nttl = \"0s\"\nproof_ttl = \"1h\""));
    let (ann, ben) = (credentials(ANN), credentials(BEN));

    // Each client gets its tokens from the realm that the challenge names, which is the registry's.
    let challenge = Request::get("/v2/").send(castier.public);
    assert_eq!(challenge.status, 401);
    let challenge = challenge.header("www-authenticate").unwrap();
    assert!(challenge.contains(&format!("realm=\"{}/token\"", realm.server.url())), "{challenge}");
    pull(castier.public, "public/app:1", &public, &[]);
    pull(castier.public, "private/app:1", &private, &[&ann]);
    registry.front.take();
    pull_to(castier.public, "private/app:1", &[&ben]).0.fails();
    pull_to(castier.public, "private/app:1", &[]).0.fails();

    // A token for one repository does not open another, whose blobs are kept.
    let (digest, bytes) = private.largest();
    let blob = Request::get(&format!("/v2/private/app/blobs/sha256:{digest}"));
    let of_public = realm.token(ANN, "repository:public/app:pull");
    for request in [blob.clone(), blob.clone().bearer(&of_public), blob.clone().bearer(&realm.token(BEN, "repository:private/app:pull"))] {
        let answer = request.send(castier.public);
        assert_eq!(answer.status, 401, "{answer:?}");
        assert!(answer.header("www-authenticate").unwrap().contains("scope=\"repository:private/app:pull\""), "{answer:?}");
    }
    // Nor is it found through a repository that the client may read.
    let elsewhere = Request::get(&format!("/v2/public/app/blobs/sha256:{digest}")).bearer(&of_public).send(castier.public);
    assert_eq!(elsewhere.status, 404, "{elsewhere:?}");

    let of_private = realm.token(ANN, "repository:private/app:pull");
    let bearer = blob.clone().bearer(&of_private);
    assert!(bearer.send(castier.public).body == bytes);
    registry.front.kill();
    assert!(bearer.send(castier.public).body == bytes);
    let answer = blob.send(castier.public);
    assert!(answer.status == 401 && answer.header("www-authenticate").is_some_and(|value| value.starts_with("Bearer")), "{answer:?}");
    let unknown = blob.bearer(&of_public).send(castier.public);
    assert!([401, 502, 504].contains(&unknown.status), "{unknown:?}");
}

#[test]
fn tokens_that_castier_gets() {
    let _turn = turn();
    let (realm, dir) = (Realm::start(), TempDir::new().unwrap());
    let Some(registry) = realm.registry(&dir.path().join("realm.pem")) else { return };
    let image = Image::new(7, &[2 * MIB, 300]);
    let push = format!("--dest-creds={}:{}", ANN.0, ANN.1);
    registry.push(&image, "private/app:1", &[&push]);
    registry.push(&image, "public/app:1", &[&push]);
    let password = dir.path().join("password");
    fs::write(&password, ANN.1).unwrap();
    let listed = format!("access = \"local\"\nttl = \"0s\"\nredirects = [\"{}\"]\n", realm.server.addr());
    let with = format!("{listed}credentials = {{ username = \"ann\", password_file = \"{}\" }}", password.display());
    let known = castier(&route(&registry.front.url(), &with));
    realm.server.take();

    // The clients need no credentials, and those that they send stay here.
    pull(known.public, "private/app:1", &image, &[]);
    assert_loaded_once(&registry.front.seen(), &image);
    let asked = realm.server.take();
    let own = crate::support::basic(ANN.0, ANN.1);
    assert!(!asked.is_empty() && asked.iter().all(|seen| seen.authorization().as_ref() == Some(&own)), "{}", lines(&asked));
    // One for each repository, and perhaps one without a scope for `/v2/`.
    assert!(asked.len() <= 2, "{}", lines(&asked));
    pull(known.public, "private/app:1", &image, &[]);
    assert_eq!(realm.server.take().len(), 0, "a token is used until it expires");
    pull(known.public, "public/app:1", &image, &[]);
    assert!(registry.front.seen().iter().all(|seen| seen.authorization().is_none_or(|value| value.starts_with("Bearer"))));
    registry.front.kill();
    realm.server.kill();
    pull(known.public, "private/app:1", &image, &[]);
    drop(known);

    // Without credentials it gets tokens for what is public.
    registry.front.up();
    realm.server.up();
    realm.server.take();
    let anonymous = castier(&route(&registry.front.url(), &listed));
    pull(anonymous.public, "public/app:1", &image, &[]);
    assert!(realm.server.take().iter().all(|seen| seen.authorization().is_none()));
    pull_to(anonymous.public, "private/app:1", &[]).0.fails();
}

/// What castier itself may not read in a repository is not there, also if it keeps the same blob of another one.
#[test]
fn a_kept_blob_is_no_way_into_another_repository() {
    let _turn = turn();
    let (realm, dir) = (Realm::start(), TempDir::new().unwrap());
    let Some(registry) = realm.registry(&dir.path().join("realm.pem")) else { return };
    let image = Image::new(63, &[MIB]);
    for name in ["private/app:1", "public/app:1"] {
        registry.push(&image, name, &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    }
    let castier = castier(&route(&registry.front.url(), &format!("access = \"local\"\nredirects = [\"{}\"]", realm.server.addr())));
    pull(castier.public, "public/app:1", &image, &[]);
    for name in [format!("blobs/sha256:{}", image.largest().0), format!("manifests/{}", image.digest())] {
        let answer = Request::get(&format!("/v2/private/app/{name}")).send(castier.public);
        assert!([401, 403, 404].contains(&answer.status), "{name}: {} {:?}", answer.status, answer.headers);
    }
}

#[test]
fn a_realm_that_is_not_listed_gets_no_password() {
    let _turn = turn();
    let (realm, dir) = (Realm::start(), TempDir::new().unwrap());
    let Some(registry) = realm.registry(&dir.path().join("realm.pem")) else { return };
    let password = dir.path().join("password");
    fs::write(&password, ANN.1).unwrap();
    let keys = format!("access = \"local\"\ncredentials = {{ username = \"ann\", password_file = \"{}\" }}", password.display());
    let castier = castier(&route(&registry.front.url(), &keys));
    let answer = Request::get("/v2/private/app/manifests/1").send(castier.public);
    assert!(answer.status >= 400, "{answer:?}");
    assert_eq!(realm.server.take().len(), 0, "the realm is a private address that nobody has listed");
}

// ---- layers elsewhere ----

/// A registry that keeps its layers on another server, and redirects to it.
fn redirecting(registry: &Registry, image: &Image) -> Upstream {
    let blobs = image.blobs.clone();
    let store = Upstream::answering(move |request| {
        let found = request.path().strip_prefix("/store/").and_then(|digest| blobs.get(digest));
        let Some(bytes) = found.filter(|_| request.parameter("signature").as_deref() == Some("1")) else { return Response::new(403) };
        let answer = Response::ok("application/octet-stream", bytes.clone()).with("ETag", "\"its own\"").with("Accept-Ranges", "bytes");
        if request.method == "HEAD" { answer.with("Content-Length", &bytes.len().to_string()) } else { answer }
    });
    let url = store.url();
    registry.front.intercept(move |request| {
        let digest = request.path().split_once("/blobs/sha256:")?.1;
        let goes = request.method == "GET" && request.header("authorization").is_some();
        goes.then(|| Response::new(307).with("Location", &format!("{url}/store/{digest}?signature=1")).body("<a>elsewhere</a>"))
    });
    store
}

#[test]
fn layers_on_another_host() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(8, &[4 * MIB, 300]);
    registry.push(&image, "app:1", &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    let store = redirecting(&registry, &image);
    let keys = format!("access = \"upstream\"\nproof_ttl = \"1h\"\nredirects = [\"{}\"]", store.addr());
    let castier = castier(&route(&registry.front.url(), &keys));
    let ann = credentials(ANN);
    pull(castier.public, "app:1", &image, &[&ann]);
    let asked = store.take();
    assert_eq!(asked.iter().filter(|seen| seen.method == "GET").count(), image.blobs.len(), "{}", lines(&asked));
    assert!(asked.iter().all(|seen| seen.authorization().is_none()), "the password went to another host: {}", lines(&asked));

    // The client is not sent there.
    let (digest, bytes) = image.largest();
    let blob = Request::get(&format!("/v2/app/blobs/sha256:{digest}")).basic(ANN.0, ANN.1);
    let answer = blob.send(castier.public);
    assert!(answer.status == 200 && answer.body == bytes && answer.header("location").is_none(), "{:?}", answer.headers);
    store.kill();
    pull(castier.public, "app:1", &image, &[&ann]);
    registry.front.kill();
    pull(castier.public, "app:1", &image, &[&ann]);
    assert_eq!(store.take().len(), 0);
}

#[test]
fn a_redirect_to_a_host_that_is_not_listed() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(9, &[MIB]);
    registry.push(&image, "app:1", &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    let store = redirecting(&registry, &image);
    let castier = castier(&route(&registry.front.url(), "access = \"upstream\""));
    let (digest, _) = image.largest();
    let answer = Request::get(&format!("/v2/app/blobs/sha256:{digest}")).basic(ANN.0, ANN.1).send(castier.public);
    assert!(answer.status >= 300, "{answer:?}");
    assert_eq!(store.take().len(), 0, "castier went to a host that is not listed");
}

// ---- pushes ----

#[test]
fn push_and_pull() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"60s\""));
    let image = Image::new(20, &[5 * MIB, 300]);
    let to = docker(castier.public, "new/app:1");
    // The tag is known to be absent, before it is pushed.
    assert_eq!(Request::head("/v2/new/app/manifests/1").with("Accept", MANIFEST).send(castier.public).status, 404);
    Skopeo::new().copy(&image.source(), &to, &[]).ok();
    let seen = registry.front.take();
    // The registry tells the client to go on at an address, which must be castier's.
    let past: Vec<_> = seen.iter().filter(|seen| seen.header("via").is_none()).cloned().collect();
    assert!(past.is_empty(), "these did not come from castier: {}", lines(&past));
    assert!(seen.iter().any(|seen| seen.method == "PUT" && seen.status == 201), "{}", lines(&seen));

    pull(castier.public, "new/app:1", &image, &[]);
    pull(registry.real, "new/app:1", &image, &[]);
    // The tag moves, within its `ttl`, through castier.
    let moved = Image::new(21, &[MIB]);
    Skopeo::new().copy(&moved.source(), &to, &[]).ok();
    pull(castier.public, "new/app:1", &moved, &[]);
    // Deleted, through castier.
    let path = format!("/v2/new/app/manifests/{}", moved.digest());
    assert_eq!(Request::get(&path).with("Accept", MANIFEST).send(castier.public).status, 200);
    assert_eq!(Request::new("DELETE", &path).send(castier.public).status, 202);
    assert_eq!(Request::get(&path).with("Accept", MANIFEST).send(castier.public).status, 404);
    // Everything else is still there, and kept.
    let other = format!("new/app@{}", image.digest());
    pull(castier.public, &other, &image, &[]);
    registry.front.kill();
    pull(castier.public, &other, &image, &[]);
}

/// A layer of one repository, mounted into another one.
#[test]
fn a_mount() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nnegative_ttl = \"1h\""));
    let image = Image::new(24, &[MIB]);
    registry.push(&image, "one:1", &[]);
    let (digest, bytes) = image.largest();
    let mounted = format!("/v2/two/blobs/sha256:{digest}");
    assert_eq!(Request::head(&mounted).send(castier.public).status, 404);
    let mount = format!("/v2/two/blobs/uploads/?mount=sha256:{digest}&from=one");
    assert_eq!(Request::new("POST", &mount).send(castier.public).status, 201);
    assert_eq!(Request::head(&mounted).send(castier.public).status, 200);
    assert!(Request::get(&mounted).send(castier.public).body == bytes);
}

/// Before it uploads a layer, a client asks whether the repository has it. What another repository has does not count: the registry would refuse the manifest.
#[test]
fn push_of_layers_that_another_repository_has() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let castier = castier(&route(&registry.front.url(), "access = \"local\""));
    let image = Image::new(23, &[MIB, 300]);
    registry.push(&image, "one:1", &[]);
    pull_as_docker(castier.public, "one", &image).unwrap();
    let pushed = Skopeo::new().copy(&image.source(), &docker(castier.public, "two:1"), &[]);
    assert!(pushed.success(), "{pushed}{}", registry.front.history());
    pull(registry.real, "two:1", &image, &[]);
}

#[test]
fn push_with_a_password_through_a_prefix() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let config = route(&registry.front.url(), "access = \"upstream\"\nnamespace = \"mirror\"");
    let castier = castier(&config);
    let image = Image::new(22, &[2 * MIB, 300]);
    let to = docker(castier.public, "mirror/app:1");
    let said = Skopeo::new().copy(&image.source(), &to, &[]).fails();
    assert!(said.contains("unauthorized") || said.contains("authentication required"), "{said}");
    Skopeo::new().copy(&image.source(), &to, &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]).ok();
    assert!(registry.front.count(|seen| seen.target.contains("mirror")) == 0, "{}", registry.front.history());
    pull(castier.public, "mirror/app:1", &image, &[&credentials(ANN)]);
    pull(registry.real, "app:1", &image, &[&credentials(BEN)]);
}

// ---- containerd ----

/// containerd, with data of its own.
struct Containerd {
    _process: Running,
    ctr: PathBuf,
    dir: TempDir,
}

impl Containerd {
    /// None, after saying so, if it does not run here.
    fn start() -> Option<Self> {
        let (program, ctr) = (tool("containerd")?, tool("ctr")?);
        if !rustix::process::geteuid().is_root() {
            skip("containerd needs root");
            return None;
        }
        // The path of a socket must be short.
        let dir = tempfile::Builder::new().prefix("ctr").tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{}\"\n",
            at("data"),
            at("state"),
            at("socket")
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let mut process = Running::start(command(program, dir.path()).args(["--config", "config.toml"]));
        process.says("serving", |log| log.contains("containerd successfully booted").then_some(()));
        Some(Self { _process: process, ctr, dir })
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        run(command(&self.ctr, self.dir.path()).args(["--address", "socket"]).args(arguments))
    }

    /// castier as the mirror of a registry's host.
    fn mirror(&self, host: &str, castier: &Castier) {
        let folder = self.dir.path().join("hosts").join(host);
        fs::create_dir_all(&folder).unwrap();
        let text = format!("server = \"{0}\"\n[host.\"{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", castier.url());
        fs::write(folder.join("hosts.toml"), text).unwrap();
    }

    fn pull(&self, reference: &str) -> Ran {
        self.run(&["content", "fetch", "--hosts-dir", "hosts", reference])
    }

    /// Everything of the image is there.
    fn assert_has(&self, image: &Image) {
        for (digest, bytes) in &image.blobs {
            let got = self.dir.path().join("data/io.containerd.content.v1.content/blobs/sha256").join(digest);
            assert!(fs::read(&got).unwrap() == *bytes, "{digest}");
        }
    }
}

#[test]
fn containerd_with_mirrors_of_two_registries() {
    let _turn = turn();
    let (Some(one), Some(two), Some(first)) = (Registry::start(""), Registry::start(""), Containerd::start()) else { return };
    // The same name in both.
    let images = [Image::new(30, &[2 * MIB, 300]), Image::new(31, &[MIB])];
    one.push(&images[0], "team/app:1", &[]);
    two.push(&images[1], "team/app:1", &[]);
    let hosts = ["one.example", "two.example"];
    let routes = [route(&one.front.url(), "namespace = \"one.example\""), route(&two.front.url(), "namespace = \"two.example\"")].concat();
    let castier = castier(&routes);
    let pull = |containerd: &Containerd| {
        for (host, image) in hosts.iter().zip(&images) {
            containerd.mirror(host, &castier);
            containerd.pull(&format!("{host}/team/app:1")).ok();
            containerd.assert_has(image);
        }
    };
    pull(&first);
    for (registry, image) in [&one, &two].iter().zip(&images) {
        let seen = registry.front.take();
        assert_loaded_once(&seen, image);
        assert!(seen.iter().all(|seen| !seen.target.contains("ns=")), "{}", lines(&seen));
    }
    // The other spelling: the registry is the first part of the name.
    let skopeo = format!("{}/team/app:1", hosts[1]);
    crate::oci::pull(castier.public, &skopeo, &images[1], &[]);
    one.front.kill();
    two.front.kill();
    drop(first);
    let Some(second) = Containerd::start() else { return };
    pull(&second);
}

// ---- many at once ----

/// Pulls as docker does. Returns what was wrong.
fn pull_as_docker(addr: SocketAddr, name: &str, image: &Image) -> Result<(), String> {
    let ask = |request: Request| {
        let accept = format!("{INDEX}, {MANIFEST}, application/vnd.docker.distribution.manifest.v2+json");
        let answer = request.clone().with("Accept", &accept).try_send(addr).map_err(|error| format!("{}: {error}", request.target))?;
        if answer.status == 200 { Ok(answer) } else { Err(format!("{}: {} {}", request.target, answer.status, answer.text())) }
    };
    ask(Request::get("/v2/"))?;
    let tag = format!("/v2/{name}/manifests/1");
    let head = ask(Request::head(&tag))?;
    if head.header("docker-content-digest") != Some(image.digest()) {
        return Err(format!("{head:?}"));
    }
    // docker asks for the digest that it was told.
    for target in [tag, format!("/v2/{name}/manifests/{}", image.digest())] {
        if ask(Request::get(&target))?.body != image.manifest {
            return Err("another manifest".into());
        }
    }
    for (digest, bytes) in &image.blobs {
        if ask(Request::get(&format!("/v2/{name}/blobs/sha256:{digest}")))?.body != *bytes {
            return Err(format!("other bytes of {digest}"));
        }
    }
    Ok(())
}

/// The questions that reached the registry, with how often each was asked.
fn questions(seen: &[Seen]) -> BTreeMap<String, usize> {
    let mut all = BTreeMap::new();
    for one in seen {
        *all.entry(format!("{} {}", one.method, one.target)).or_default() += 1;
    }
    all
}

#[track_caller]
fn assert_questions(asked: &BTreeMap<String, usize>, expected: &BTreeMap<String, usize>) {
    let all: BTreeSet<_> = asked.keys().chain(expected.keys()).collect();
    let count = |of: &BTreeMap<String, usize>, question: &String| of.get(question).copied().unwrap_or_default();
    let wrong: Vec<_> = all
        .into_iter()
        .filter(|question| count(asked, question) != count(expected, question))
        .map(|question| format!("{question}: {} times in place of {}", count(asked, question), count(expected, question)))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn fifty_clients_cost_what_one_does() {
    const CLIENTS: usize = 50;
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Arc::new(Image::new(40, &[4 * MIB, 70_000, 300]));
    registry.push(&image, "app:1", &[]);
    let start = || castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"60s\""));

    let alone = start();
    pull_as_docker(alone.public, "app", &image).unwrap();
    let one = questions(&registry.front.take());
    // As often as it likes.
    pull_as_docker(alone.public, "app", &image).unwrap();
    assert_questions(&questions(&registry.front.take()), &BTreeMap::new());
    drop(alone);

    let shared = start();
    let (barrier, addr) = (Arc::new(Barrier::new(CLIENTS)), shared.public);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (barrier, image) = (barrier.clone(), image.clone());
            thread::spawn(move || {
                barrier.wait();
                pull_as_docker(addr, "app", &image)
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap().unwrap();
    }
    assert_questions(&questions(&registry.front.take()), &one);
}

#[test]
fn eight_skopeos_cost_what_one_does() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(41, &[4 * MIB, 70_000, 300]);
    registry.push(&image, "app:1", &[]);
    let start = || castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"60s\""));
    let alone = start();
    pull(alone.public, "app:1", &image, &[]);
    let one = questions(&registry.front.take());
    drop(alone);
    let shared = start();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| pull(shared.public, "app:1", &image, &[]));
        }
    });
    assert_questions(&questions(&registry.front.take()), &one);
}

/// Small bodies come so fast that clients arrive when a load has just ended.
#[test]
fn many_small_things_are_loaded_once() {
    const CLIENTS: usize = 50;
    let _turn = turn();
    let registry = Upstream::answering(|request| {
        let number = request.path().split('/').nth(2).and_then(|name| name[1..].parse().ok()).unwrap_or_default();
        Response::ok("application/octet-stream", noise(number, 400)).with("ETag", "\"strong\"")
    });
    let castier = castier(&route(&registry.url(), "access = \"local\"\nttl = \"60s\""));
    for round in 0..20 {
        // Every client asks for the same things in the same order.
        let target = |number: u64| match number % 2 {
            0 => format!("/v2/r{number}/blobs/sha256:{}", sha256(&noise(number, 400))),
            _ => format!("/v2/r{number}/manifests/tag"),
        };
        let targets: Vec<_> = (round * 20..(round + 1) * 20).map(target).collect();
        let (barrier, addr) = (Barrier::new(CLIENTS), castier.public);
        thread::scope(|scope| {
            for _ in 0..CLIENTS {
                scope.spawn(|| {
                    barrier.wait();
                    targets.iter().for_each(|target| assert_eq!(Request::get(target).send(addr).status, 200));
                });
            }
        });
        let expected = targets.iter().map(|target| (format!("GET {target}"), 1)).collect();
        assert_questions(&questions(&registry.take()), &expected);
    }
}

// ---- several nodes, and a node that starts again ----

#[test]
fn three_nodes_load_once() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(45, &[4 * MIB, 70_000, 300]);
    registry.push(&image, "app:1", &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    let dir = TempDir::new().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "a-secret-of-the-nodes-which-is-long-enough").unwrap();
    let ports = [Port::free(), Port::free(), Port::free()];
    let peers = ports.each_ref().map(|port| format!("\"{}\"", port.addr())).join(", ");
    let nodes = ports.each_ref().map(|port| {
        let cluster = format!("[cluster]\nadvertise = \"{0}\"\npeers = [{peers}]\nsecret_file = \"{1}\"\n", port.addr(), secret.display());
        let listen = format!("listen.peer = \"{}\"\n", port.addr());
        castier(&format!("{listen}{cluster}{}", route(&registry.front.url(), "access = \"upstream\"\nproof_ttl = \"1h\"\nttl = \"60s\"")))
    });
    for node in &nodes {
        eventually("the nodes have found each other", || (node.metric("castier_cluster_peers", &["state=\"up\""]) >= 2.0).then_some(()));
    }
    let addresses = nodes.each_ref().map(|node| node.public);
    thread::scope(|scope| {
        for addr in addresses {
            let image = &image;
            scope.spawn(move || pull(addr, "app:1", image, &[&credentials(ANN)]));
        }
    });
    let loaded = registry.front.take();
    for addr in addresses {
        pull_to(addr, "app:1", &[]).0.fails();
        pull_to(addr, "app:1", &[&credentials(("ann", "a wrong password"))]).0.fails();
        pull(addr, "app:1", &image, &[&credentials(BEN)]);
    }
    assert_eq!(blob_gets(&registry.front.take()), BTreeMap::new());
    registry.front.kill();
    for addr in addresses {
        pull(addr, "app:1", &image, &[&credentials(ANN)]);
    }
    assert_loaded_once(&loaded, &image);
}

#[test]
fn a_node_with_a_disk_starts_again() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(46, &[4 * MIB, 300]);
    registry.push(&image, "app:1", &[]);
    let route = route(&registry.front.url(), "access = \"local\"\nttl = \"0s\"");
    let config = format!("disk.path = \"./kept\"\ndisk.capacity = \"1GiB\"\n{route}");
    let castier = castier(&config);
    pull(castier.public, "app:1", &image, &[]);
    registry.front.kill();
    let castier = castier.restart(&config);
    pull(castier.public, "app:1", &image, &[]);
}

// ---- a registry in trouble ----

#[test]
fn too_many_requests() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(50, &[MIB, 300]);
    registry.push(&image, "app:1", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nttl = \"0s\"\nstale_if_error = \"1h\""));
    pull(castier.public, "app:1", &image, &[]);
    registry.front.busy(17);
    // What is kept is better than nothing.
    pull(castier.public, "app:1", &image, &[]);
    let answer = Request::get("/v2/app/manifests/1").with("Accept", MANIFEST).send(castier.public);
    assert_eq!((answer.status, &answer.body), (200, &image.manifest), "{answer:?}");
    assert!(answer.cache_status().contains("hit") || answer.cache_status().contains("stale"), "{:?}", answer.headers);
    // What is not kept: the registry's own answer.
    let answer = Request::get("/v2/app/manifests/2").with("Accept", MANIFEST).send(castier.public);
    assert_eq!((answer.status, answer.header("retry-after").as_deref()), (429, Some("17")), "{answer:?}");
    // Without stale answers, also for what was kept.
    registry.front.up();
    let castier = castier.restart(&route(&registry.front.url(), "access = \"local\"\nttl = \"0s\"\nstale_if_error = \"0s\""));
    assert_eq!(Request::get("/v2/app/manifests/1").with("Accept", MANIFEST).send(castier.public).status, 200);
    registry.front.busy(17);
    let answer = Request::get("/v2/app/manifests/1").with("Accept", MANIFEST).send(castier.public);
    assert_eq!((answer.status, answer.header("retry-after").as_deref()), (429, Some("17")), "{answer:?}");
}

#[test]
fn errors_are_the_registry_s() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(51, &[300]);
    registry.push(&image, "app:1", &[]);
    let castier = castier(&route(&registry.front.url(), "access = \"local\"\nnegative_ttl = \"0s\""));
    let absent = "0".repeat(64);
    let expected = [
        ("/v2/app/manifests/2".to_owned(), "MANIFEST_UNKNOWN"),
        (format!("/v2/app/manifests/sha256:{absent}"), "MANIFEST_UNKNOWN"),
        (format!("/v2/app/blobs/sha256:{absent}"), "BLOB_UNKNOWN"),
        ("/v2/nothing/tags/list".to_owned(), "NAME_UNKNOWN"),
    ];
    for (target, code) in expected {
        let answer = Request::get(&target).send(castier.public);
        assert_eq!((answer.status, error_code(&answer).as_str()), (404, code), "{target}");
        if !target.contains("/tags/") {
            assert_eq!(Request::head(&target).send(castier.public).status, 404, "{target}");
        }
    }
    registry.front.kill();
    // castier's own.
    for target in ["/v2/app/manifests/1".to_owned(), format!("/v2/app/blobs/sha256:{}", image.largest().0), "/v2/app/tags/list".to_owned()]
    {
        let answer = Request::get(&target).send(castier.public);
        assert!([502, 504].contains(&answer.status), "{target}: {answer:?}");
        error_code(&answer);
    }
    assert!(pull_to(castier.public, "app:1", &[]).0.fails().contains("50"));
}

/// A registry that neither answers nor refuses.
#[test]
fn a_registry_that_hangs() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(52, &[MIB, 300]);
    registry.push(&image, "app:1", &[]);
    let config = format!(
        "origin.read_timeout = \"1s\"\n{}",
        route(&registry.front.url(), "access = \"local\"\nttl = \"0s\"\nstale_if_error = \"1h\"")
    );
    let castier = castier(&config);
    pull(castier.public, "app:1", &image, &[]);
    registry.front.hang();
    pull(castier.public, "app:1", &image, &[]);
    let answer = Request::get("/v2/app/manifests/2").send(castier.public);
    assert!([502, 504].contains(&answer.status), "{answer:?}");
    registry.front.up();
    pull(castier.public, "app:1", &image, &[]);
}

#[test]
fn pages_of_tags() {
    let _turn = turn();
    let Some(registry) = Registry::start("") else { return };
    let image = Image::new(53, &[300]);
    for tag in ["a", "b", "c"] {
        registry.push(&image, &format!("team/app:{tag}"), &[]);
    }
    // This version of the registry gives all tags at once. Its successor gives pages, with a link in either form.
    let url = registry.front.url();
    registry.front.intercept(move |request| {
        (request.path() == "/v2/team/app/tags/list").then(|| {
            let (tag, next) = match request.parameter("last").as_deref() {
                None => ("a", Some("</v2/team/app/tags/list?last=a&n=1>; rel=\"next\"".to_owned())),
                Some("a") => ("b", Some(format!("<{url}/v2/team/app/tags/list?last=b&n=1>; rel=\"next\""))),
                Some(_) => ("c", None),
            };
            let answer = Response::ok("application/json", json!({"name": "team/app", "tags": [tag]}).to_string());
            if let Some(next) = next { answer.with("Link", &next) } else { answer }
        })
    });
    for namespace in ["", "mirror"] {
        let keys = if namespace.is_empty() { String::new() } else { format!("namespace = \"{namespace}\"\n") };
        let castier = castier(&route(&registry.front.url(), &format!("access = \"local\"\nttl = \"60s\"\n{keys}")));
        let name = if namespace.is_empty() { "team/app".to_owned() } else { format!("{namespace}/team/app") };
        let list = || Skopeo::new().run(&["list-tags", "--tls-verify=false", &docker(castier.public, &name)]).ok();
        let tags: Value = serde_json::from_str(&list()).unwrap();
        assert_eq!(tags["Tags"], json!(["a", "b", "c"]), "{tags}");
        let second = Request::get(&format!("/v2/{name}/tags/list?last=a&n=1")).send(castier.public);
        let link = second.header("link").unwrap();
        let target = link.strip_prefix('<').and_then(|link| link.split('>').next()).unwrap();
        let target = target.strip_prefix(&castier.url()).unwrap_or(target);
        assert_eq!(target, format!("/v2/{name}/tags/list?last=b&n=1"), "{link}");
        registry.front.kill();
        list();
        registry.front.up();
    }
}

/// A proof ends: whoever was refused meanwhile gets nothing.
#[test]
fn a_password_that_is_no_longer_valid() {
    let _turn = turn();
    let Some(registry) = Registry::basic() else { return };
    let image = Image::new(54, &[MIB]);
    registry.push(&image, "app:1", &[&format!("--dest-creds={}:{}", ANN.0, ANN.1)]);
    let castier = castier(&route(&registry.front.url(), "access = \"upstream\"\nproof_ttl = \"1s\""));
    let (digest, bytes) = image.largest();
    let blob = Request::get(&format!("/v2/app/blobs/sha256:{digest}")).basic(ANN.0, ANN.1);
    assert!(blob.send(castier.public).body == bytes);
    registry.front.intercept(|request| {
        let refusal = json!({"errors": [{"code": "UNAUTHORIZED", "message": "revoked"}]}).to_string();
        request.header("authorization").map(|_| Response::new(401).with("WWW-Authenticate", "Basic realm=\"test\"").body(refusal))
    });
    let refused = eventually("the proof has ended", || Some(blob.send(castier.public)).filter(|answer| answer.status != 200));
    assert_eq!(refused.status, 401, "{refused:?}");
    assert!(refused.header("www-authenticate").is_some(), "{refused:?}");
}
