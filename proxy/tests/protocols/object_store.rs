//! A bucket of a real object store (SeaweedFS) as castier's origin, with a proxy between them that counts, and lies.

use crate::{
    checks::{gets, refused},
    support::{
        Castier, Port, Request, Response, Running, Seen, Upstream, castier, castier_program, command, eventually, noise, run, sha256, tool,
        turn,
    },
};
use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tempfile::TempDir;

mod copy;
mod leftovers;
mod online;
mod profile;

pub(crate) const KEY: &str = "castier";
const SECRET: &str = "the-secret";
const MIB: usize = 1 << 20;

/// A running SeaweedFS with an empty bucket named `blobs`, and a proxy before it.
pub(crate) struct Weed {
    process: Running,
    pub(crate) dir: TempDir,
    curl: PathBuf,
    /// The store itself.
    direct: String,
    pub(crate) proxy: Upstream,
}

impl Weed {
    pub(crate) fn start() -> Option<Self> {
        let (weed, curl) = (tool("weed")?, tool("curl")?);
        let dir = TempDir::new().unwrap();
        let keys = format!(
            r#"{{"identities":[{{"name":"c","credentials":[{{"accessKey":"{KEY}","secretKey":"{SECRET}"}}],"actions":["Admin","Read","Write","List","Tagging"]}},
             {{"name":"reader","credentials":[{{"accessKey":"reader","secretKey":"{SECRET}"}}],"actions":["Read:blobs","List:blobs"]}}]}}"#
        );
        fs::write(dir.path().join("keys.json"), keys).unwrap();
        fs::write(dir.path().join("secret"), SECRET).unwrap();
        fs::create_dir(dir.path().join("data")).unwrap();
        let ports: Vec<_> = (0..8).map(|_| Port::free()).collect();
        let port = |at: usize| ports[at].number();
        let mut weed = command(weed, dir.path());
        weed.args([
            "server",
            "-dir=data",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            "-s3.config=keys.json",
            "-volume.max=100",
            "-volume.preStopSeconds=0",
        ]);
        weed.args([
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=1024",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
        ]);
        for (at, of) in ["master", "volume", "filer", "s3"].into_iter().enumerate() {
            weed.args([format!("-{of}.port={}", port(2 * at)), format!("-{of}.port.grpc={}", port(2 * at + 1))]);
        }
        let process = Running::start(&mut weed);
        let direct = format!("http://{}", ports[6].addr());
        let mut this = Self { process, dir, curl, direct, proxy: Upstream::before(ports[6].addr()) };
        let addr = ports[6].addr();
        drop(ports);
        this.process.listens(addr);
        eventually("the store makes a bucket", || (this.curl("PUT", "/blobs", &[]).0 == 200).then_some(()));
        // It grows volumes at the first object of a bucket, and fails until it has.
        eventually("the store stores", || (this.curl("PUT", "/blobs/first", b"x").0 == 200).then_some(()));
        Some(this)
    }

    /// A signed request to the store itself: status and body.
    pub(crate) fn curl(&self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let (sent, got) = (self.dir.path().join("sent"), self.dir.path().join("got"));
        fs::write(&sent, body).unwrap();
        let _ = fs::remove_file(&got);
        let mut curl = command(&self.curl, self.dir.path());
        curl.args(["-s", "-o", "got", "-w", "%{http_code}", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user"])
            .arg(format!("{KEY}:{SECRET}"));
        if method == "PUT" {
            curl.args(["-T", "sent"]);
        } else if method == "HEAD" {
            curl.arg("-I");
        } else {
            curl.args(["-X", method]);
        }
        let status = run(curl.arg(format!("{}{target}", self.direct))).ok();
        (status.trim().parse().unwrap(), fs::read(&got).unwrap_or_default())
    }

    pub(crate) fn config(&self, more: &str) -> String {
        self.config_as("s3://blobs", KEY, more)
    }

    /// `more`: top-level keys.
    pub(crate) fn config_as(&self, url: &str, key: &str, more: &str) -> String {
        let secret = self.dir.path().join("secret");
        format!(
            "origin.url = \"{url}\"\nallow_delete = true\n{more}\n[origin.s3]\nendpoint = \"{}\"\naccess_key_id = \"{key}\"\nsecret_access_key_file = \"{}\"\n",
            self.proxy.url(),
            secret.display()
        )
    }

    /// Has asked the bucket what it may do there: that is not counted.
    pub(crate) fn castier(&self, more: &str) -> Castier {
        self.take();
        let castier = castier(&self.config(more));
        // The last question at the start is for uploads that were left behind.
        eventually("the check of the bucket ends", || (self.proxy.count(is_list_of_uploads) > 0).then_some(()));
        self.take();
        castier
    }

    /// The requests that reached the store since the last time, without queries.
    pub(crate) fn take(&self) -> Vec<String> {
        self.proxy.take().iter().map(line).collect()
    }
}

impl Drop for Weed {
    fn drop(&mut self) {
        // Its own end would take ten seconds.
        self.process.kill();
    }
}

fn is_list_of_uploads(seen: &Seen) -> bool {
    seen.method == "GET" && seen.target.contains("uploads=")
}

/// A castier-origin with these lines of configuration. Top-level keys come first. Returns its addresses for clients and for metrics, too.
fn castier_origin(dir: &Path, config: &str, more: impl FnOnce(&mut Command)) -> (Running, SocketAddr, SocketAddr) {
    fs::write(dir.join("origin.toml"), format!("listen.public = \"127.0.0.1:0\"\nlisten.admin = \"127.0.0.1:0\"\n{config}")).unwrap();
    let mut program = command(castier_program().with_file_name("castier-origin"), dir);
    more(program.args(["--config", "origin.toml"]));
    let mut origin = Running::start(&mut program);
    let [public, admin]: [SocketAddr; 2] = ["listening public ", "listening admin "].map(|prefix| {
        origin.says(prefix, |log| log.lines().find_map(|line| line.split(prefix).nth(1)?.split([' ', '"']).next()?.parse().ok()))
    });
    (origin, public, admin)
}

fn line(seen: &Seen) -> String {
    let (path, query) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
    let mark = ["uploads", "partNumber", "uploadId", "list-type"].into_iter().find(|mark| query.contains(mark)).unwrap_or_default();
    let path = path.rsplit('/').next().unwrap_or_default();
    format!("{} {} {mark}", seen.method, &path[..path.len().min(8)]).trim_end().to_owned()
}

fn put(castier: &Castier, body: &[u8]) -> (u16, String) {
    let target = format!("/cas/{}", sha256(body));
    (Request::new("PUT", &target).body(body).send(castier.public).status, target)
}

#[test]
fn what_is_stored_is_in_the_bucket_whole() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("");
    // The first absence asks for the bucket itself, too.
    assert_eq!(Request::head(&format!("/cas/{}", sha256(b"absent"))).send(castier.public).status, 404);
    for (size, form) in [(0, false), (1, false), (100_000, false), (17 * MIB, false), (40 * MIB, false), (300_000, true), (20 * MIB, true)]
    {
        let body = noise(size as u64 + u64::from(form), size);
        let (target, digest) = (format!("/cas/{}", sha256(&body)), sha256(&body));
        weed.take();
        let stored = match form {
            true => Request::new("POST", "/cas").body(body.clone()).send(castier.public),
            false => Request::new("PUT", &target).body(body.clone()).send(castier.public),
        };
        assert_eq!(stored.status, 201, "{size}: {}", stored.text());
        let asked = weed.take();
        let parts = asked.iter().filter(|line| line.contains("partNumber")).count();
        if size > 16 * MIB {
            assert!(parts >= 2 && parts < size / (4 * MIB), "{asked:?}");
        } else {
            assert_eq!((parts, asked.len()), (0, 2), "one HEAD, one PUT: {asked:?}");
        }
        let (status, got) = weed.curl("GET", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"");
        assert!(status == 200 && got == body, "{size}: {status}, {} bytes", got.len());
        // Once more: what was just seen to be there needs no question.
        assert_eq!(put(&castier, &body).0, 200);
        assert_eq!(weed.take(), Vec::<String>::new());
    }
    // Another castier with nothing kept reads them, and its first existence check is one HEAD.
    let body = noise(40 * MIB as u64, 40 * MIB);
    let other = weed.castier("");
    weed.take();
    assert_eq!(put(&other, &body).0, 200);
    assert_eq!(weed.take().len(), 1);
    gets(other.public, &Request::get(&format!("/cas/{}", sha256(&body))), &body);
    let range =
        Request::get(&format!("/cas/{}", sha256(&noise(17 * MIB as u64, 17 * MIB)))).with("Range", "bytes=1000-1999").send(other.public);
    assert!(range.status == 206 && range.body == noise(17 * MIB as u64, 17 * MIB)[1000..2000]);
}

/// Puts blobs of this size into the bucket, by another castier.
fn stored(weed: &Weed, seeds: &[u64], size: usize) -> Vec<(String, Vec<u8>)> {
    let writer = weed.castier("");
    let blobs = seeds.iter().map(|seed| {
        let body = noise(*seed, size);
        let (status, target) = put(&writer, &body);
        assert_eq!(status, 201);
        (target, body)
    });
    blobs.collect()
}

/// First and last byte of each range that the store was asked for, sorted.
fn ranges(weed: &Weed) -> Vec<(usize, usize)> {
    let seen = weed.proxy.seen();
    let ranges = seen.iter().filter(|seen| seen.method == "GET").filter_map(|seen| seen.header("range"));
    let parse = |range: String| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    let mut ranges: Vec<_> = ranges.filter_map(parse).collect();
    ranges.sort_unstable();
    ranges
}

#[test]
fn a_large_blob_is_read_in_ranges() {
    const RANGE: usize = 8 * MIB;
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let size = 45 * MIB + 11;
    let blobs = stored(&weed, &[81, 82, 83], size);
    let castier = weed.castier("");
    // None is answered before three are there.
    let arrived = Arc::new(AtomicUsize::new(0));
    let count = arrived.clone();
    weed.proxy.intercept(move |request| {
        if request.header("range").is_some() {
            count.fetch_add(1, Ordering::SeqCst);
            eventually("three ranges are asked for", || (count.load(Ordering::SeqCst) >= 3).then_some(()));
        }
        None
    });
    gets(castier.public, &Request::get(&blobs[0].0), &blobs[0].1);
    let once: Vec<_> = (1..6).map(|at| (at * RANGE, (size - 1).min((at + 1) * RANGE - 1))).collect();
    let ranges_seen = ranges(&weed);
    let hedged = castier.metric("castier_fill_ranges_total", &["hedged"]);
    assert!(once.iter().all(|range| ranges_seen.contains(range)), "{}", weed.proxy.history());
    assert_eq!(ranges_seen.len() as f64, 5.0 + hedged, "each byte once: {}", weed.proxy.history());
    assert!(weed.proxy.seen().iter().all(|seen| seen.header("range").is_some() == seen.header("if-match").is_some()));
    assert_eq!(castier.metric("castier_fill_ranges_total", &["\"ok\""]), 6.0);
    assert_eq!(castier.metric("castier_source_loads_total", &["\"ok\"", "origin"]), 1.0);

    // The object is replaced while it is read: the fourth range waits for that.
    let (arrived, replaced) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, go_on) = (arrived.clone(), replaced.clone());
    weed.proxy.intercept(move |request| {
        if request.header("range").is_some() && count.fetch_add(1, Ordering::SeqCst) >= 3 {
            eventually("it is replaced", || (go_on.load(Ordering::SeqCst) > 0).then_some(()));
        }
        None
    });
    let (target, from) = (blobs[1].0.clone(), castier.public);
    let client = std::thread::spawn(move || Request::get(&target).try_send(from));
    eventually("the fourth range is asked for", || (arrived.load(Ordering::SeqCst) > 3).then_some(()));
    let digest = sha256(&blobs[1].1);
    let key = format!("/blobs/cas/{}/{digest}", &digest[..2]);
    assert_eq!(weed.curl("PUT", &key, &noise(84, size)).0, 200);
    replaced.store(1, Ordering::SeqCst);
    let answer = client.join().unwrap();
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.body == blobs[1].1 || answer.status != 200), "a wrong blob that is whole");
    assert!(castier.metric("castier_fill_ranges_total", &["replaced"]) >= 1.0);
    weed.proxy.intercept(|_| None);
    assert_eq!(weed.curl("PUT", &key, &blobs[1].1).0, 200);
    gets(castier.public, &Request::get(&blobs[1].0), &blobs[1].1);

    // A store that answers with the whole object is asked once. After that it is known.
    let other = weed.castier("");
    for (at, most) in [(0, 3), (2, 0)] {
        let whole = blobs[at].1.clone();
        weed.proxy.intercept(move |request| request.header("range").is_some().then(|| object(&whole)));
        weed.take();
        gets(other.public, &Request::get(&blobs[at].0), &blobs[at].1);
        assert!(ranges(&weed).len() <= most, "{}", weed.proxy.history());
    }
    assert_eq!(other.metric("castier_source_resumes_total", &[]), 0.0);
}

#[test]
fn objects_of_other_programs_are_read() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let bodies = [noise(91, 50_000), noise(92, 50_000)];
    let [theirs, own] = [0, 1].map(|at| sha256(&bodies[at]));
    // bazel-remote, a plain directory, CNCF distribution, Gitea's LFS.
    type Path = fn(&str) -> String;
    let layouts: [(&str, &str, Path); 4] = [
        ("s3://blobs", "cas/{sha256:2}/{sha256}", |digest| format!("cas/{}/{digest}", &digest[..2])),
        ("s3://blobs/team", "{sha256}", |digest| format!("team/{digest}")),
        ("s3://blobs", "docker/registry/v2/blobs/sha256/{sha256:2}/{sha256}/data", |digest| {
            format!("docker/registry/v2/blobs/sha256/{}/{digest}/data", &digest[..2])
        }),
        ("s3://blobs/lfs", "{sha256:2}/{sha256:2:4}/{sha256:4:64}", |digest| {
            format!("lfs/{}/{}/{}", &digest[..2], &digest[2..4], &digest[4..])
        }),
    ];
    for (url, key, path) in layouts {
        let castier = castier(&weed.config_as(url, KEY, &format!("origin.key = \"{key}\"")));
        let target = format!("/cas/{theirs}");
        assert_eq!(Request::get(&target).send(castier.public).status, 404, "{key}");
        assert_eq!(weed.curl("PUT", &format!("/blobs/{}", path(&theirs)), &bodies[0]).0, 200);
        eventually("the absence is over", || (Request::head(&target).send(castier.public).status == 200).then_some(()));
        gets(castier.public, &Request::get(&target), &bodies[0]);
        assert_eq!(put(&castier, &bodies[1]).0, 201);
        assert_eq!(weed.curl("GET", &format!("/blobs/{}", path(&own)), b""), (200, bodies[1].clone()), "{key}");
    }
}

#[test]
fn a_refusal_is_named_and_is_no_absence() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let body = noise(93, 1000);
    let target = format!("/cas/{}", sha256(&body));
    let says = |castier: &Castier, request: &Request, what: &str| {
        let answer = request.send(castier.public);
        assert_eq!(answer.status, 502, "{what}: {}", answer.text());
        assert!(request.method == "HEAD" || answer.text().contains(what), "{what}: {}", answer.text());
    };
    let get = Request::get(&target);
    let upload = Request::new("PUT", &target).body(body.clone());
    for (url, key, what) in [("s3://none", KEY, "NoSuchBucket"), ("s3://blobs", "nobody", "InvalidAccessKeyId")] {
        let castier = castier(&weed.config_as(url, key, ""));
        says(&castier, &get, what);
        says(&castier, &upload, what);
        says(&castier, &Request::head(&target), what);
        assert_eq!(Request::get("/readyz").send(castier.admin).status, 200);
    }
    let wrong = weed.dir.path().join("wrong");
    fs::write(&wrong, "another secret").unwrap();
    let castier_wrong =
        castier(&weed.config("").replace(&weed.dir.path().join("secret").display().to_string(), &wrong.display().to_string()));
    says(&castier_wrong, &get, "SignatureDoesNotMatch");
    let reader = castier(&weed.config_as("s3://blobs", "reader", ""));
    assert_eq!(get.send(reader.public).status, 404);
    says(&reader, &upload, "AccessDenied");
    // What S3 says of a missing key to those who may not list, and of a wrong clock.
    let castier = weed.castier("limits.negative_ttl = \"0s\"");
    for (status, code) in [(403, "AccessDenied"), (403, "RequestTimeTooSkewed"), (400, "ExpiredToken")] {
        weed.proxy.intercept(move |_| {
            Some(
                Response::new(status)
                    .with("Content-Type", "application/xml")
                    .body(format!("<Error><Code>{code}</Code><Message>no</Message></Error>")),
            )
        });
        // A request that comes as the load before fails shares that load's end.
        eventually(code, || {
            let answer = get.send(castier.public);
            assert_eq!(answer.status, 502, "{code}: {}", answer.text());
            answer.text().contains(code).then_some(())
        });
    }
    weed.proxy.intercept(|_| None);
    eventually("there is no blob", || (get.send(castier.public).status == 404).then_some(()));
}

#[test]
fn a_throttling_store_is_asked_more_gently() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier =
        weed.castier("origin.read_timeout = \"3s\"\nmemory.capacity = \"1MiB\"\nmemory.max_blob = \"64KiB\"\nlimits.negative_ttl = \"0s\"");
    let body = noise(94, 200_000);
    let slow = || Response::new(503).with("Content-Type", "application/xml").body("<Error><Code>SlowDown</Code></Error>");
    let left = Arc::new(AtomicUsize::new(0));
    let count = left.clone();
    weed.proxy.intercept(move |_| count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).is_ok().then(slow));
    for times in [1, 3] {
        left.store(times, Ordering::Release);
        let (status, target) = put(&castier, &[&body[..], &[times as u8]].concat());
        assert_eq!(status, 201);
        left.store(times, Ordering::Release);
        gets(castier.public, &Request::get(&target), &[&body[..], &[times as u8]].concat());
    }
    assert!(castier.metric("castier_bucket_throttled_total", &[]) >= 8.0);
    assert!(castier.metric("castier_bucket_max_requests", &[]) < 200.0, "{}", castier.metric("castier_bucket_max_requests", &[]));
    left.store(usize::MAX, Ordering::Release);
    let answer = Request::get(&format!("/cas/{}", sha256(b"other"))).send(castier.public);
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert!(answer.header("retry-after").is_some());
    left.store(0, Ordering::Release);
    assert_eq!(put(&castier, b"afterwards").0, 201);
}

#[test]
fn a_lying_store_never_makes_a_wrong_blob() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("origin.read_timeout = \"2s\"\nmemory.capacity = \"1MiB\"\nmemory.max_blob = \"64KiB\"");
    let body = noise(95, 3_000_000);
    let (status, target) = put(&castier, &body);
    assert_eq!(status, 201);
    let lie = |answer: fn(&[u8], usize) -> Response| {
        let (body, asked) = (body.clone(), AtomicUsize::new(0));
        weed.proxy.intercept(move |request| {
            (request.method == "GET" && request.target.contains("/cas/")).then(|| answer(&body, asked.fetch_add(1, Ordering::AcqRel)))
        });
    };
    // Wrong bytes, too few, too many, another length, none; always.
    for (what, answer) in [
        ("wrong bytes", (|body, _| object(&[&body[..1000], &[body[1000] ^ 1], &body[1001..]].concat())) as fn(&[u8], usize) -> Response),
        ("a short object", |body, _| object(&body[..2_999_999])),
        ("a long object", |body, _| object(&[body, b"x"].concat())),
        ("a body that breaks", |body, _| object(&body[..1_000_000]).with("Content-Length", "3000000").with("Connection", "close")),
        ("an error", |_, _| Response::new(500).body("<Error><Code>InternalError</Code></Error>")),
        ("a range that is ignored", |body, n| {
            if n == 0 { object(&body[..1_000_000]).with("Content-Length", "3000000").with("Connection", "close") } else { object(body) }
        }),
    ] {
        lie(answer);
        let status = refused(castier.public, &Request::get(&target));
        assert!([0, 502, 503, 504].contains(&status), "{what}: {status}");
    }
    // A break is resumed where it was.
    weed.proxy.intercept({
        let (body, asked) = (body.clone(), AtomicUsize::new(0));
        move |request| {
            let is_first = request.method == "GET" && asked.fetch_add(1, Ordering::AcqRel) == 0;
            is_first.then(|| object(&body[..1_000_000]).with("Content-Length", "3000000").with("Connection", "close"))
        }
    });
    weed.take();
    gets(castier.public, &Request::get(&target), &body);
    let seen = weed.take();
    assert_eq!(seen.len(), 2, "{seen:?}");
}

fn object(body: &[u8]) -> Response {
    Response::ok("application/octet-stream", body).with("ETag", "\"e\"").with("Last-Modified", "Mon, 30 Nov 2026 12:00:00 GMT")
}

#[test]
fn an_upload_that_fails_leaves_nothing() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("limits.negative_ttl = \"0s\"\nlimits.idle_timeout = \"2s\"");
    let body = noise(96, 40 * MIB);
    let wrong = format!("/cas/{}", sha256(b"another"));
    weed.take();
    // It does not match.
    assert_eq!(Request::new("PUT", &wrong).body(body.clone()).send(castier.public).status, 422);
    let is_aborted = || weed.proxy.seen().iter().any(|seen| seen.method == "DELETE" && seen.target.contains("uploadId"));
    eventually("the upload is aborted", || is_aborted().then_some(()));
    let completes = |seen: &Seen| seen.method == "POST" && seen.target.contains("uploadId");
    assert!(!weed.proxy.seen().iter().any(completes), "{}", weed.proxy.history());
    weed.take();
    // The client leaves in the middle.
    let mut client = TcpStream::connect(castier.public).unwrap();
    let digest = sha256(&body);
    write!(client, "PUT /cas/{digest} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
    client.write_all(&body[..30 * MIB]).unwrap();
    eventually("a part is sent", || (weed.proxy.count(|seen| seen.target.contains("partNumber")) > 0).then_some(()));
    drop(client);
    eventually("the upload is aborted", || is_aborted().then_some(()));
    assert!(!weed.proxy.seen().iter().any(completes), "{}", weed.proxy.history());
    weed.take();
    // A part fails for good.
    weed.proxy.intercept(|request| {
        request.target.contains("partNumber=3").then(|| Response::new(500).body("<Error><Code>InternalError</Code></Error>"))
    });
    let answer = Request::new("PUT", &format!("/cas/{digest}")).body(body.clone()).try_send(castier.public);
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status == 502));
    eventually("the upload is aborted", || is_aborted().then_some(()));
    weed.proxy.intercept(|_| None);
    for target in [wrong, format!("/cas/{digest}")] {
        assert_eq!(Request::get(&target).send(castier.public).status, 404, "{target}");
    }
    assert_eq!(castier.metric("castier_bucket_uploads_aborted_total", &[]), 3.0);
    assert_eq!(put(&castier, &body).0, 201);
}

#[test]
fn deletion_and_purge_end_what_is_known() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("limits.negative_ttl = \"0s\"");
    let body = noise(97, 1000);
    let (status, target) = put(&castier, &body);
    assert_eq!(status, 201);
    assert_eq!(Request::new("DELETE", &target).send(castier.public).status, 204);
    assert_eq!(Request::get(&target).send(castier.public).status, 404);
    assert_eq!(put(&castier, &body).0, 201, "it is stored again");
    // Somebody else deletes it; a purge says so.
    let digest = sha256(&body);
    assert_eq!(weed.curl("DELETE", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b"").0, 204);
    assert_eq!(Request::new("POST", &format!("/purge/{digest}")).send(castier.admin).status, 200);
    assert_eq!(put(&castier, &body).0, 201, "it is stored again");
    gets(weed.castier("").public, &Request::get(&target), &body);
}

/// A client sends a blob that is there, slowly; meanwhile it is deleted. Neither that upload nor the next one is acknowledged without storing it.
#[test]
fn an_upload_over_a_deletion_is_not_taken_for_stored() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("limits.negative_ttl = \"0s\"");
    let body = noise(98, 3 * MIB);
    let (status, target) = put(&castier, &body);
    assert_eq!(status, 201);
    let mut client = TcpStream::connect(castier.public).unwrap();
    write!(client, "PUT {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
    client.write_all(&body[..MIB]).unwrap();
    eventually("castier reads it", || (castier.metric("castier_uploads_in_progress", &[]) > 0.0).then_some(()));
    assert_eq!(Request::new("DELETE", &target).send(castier.public).status, 204);
    client.write_all(&body[MIB..]).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    let is_stored = answer.starts_with("HTTP/1.1 20") && Request::get(&target).send(castier.public).status == 200;
    assert!(is_stored || answer.starts_with("HTTP/1.1 503"), "{answer}");
    let digest = sha256(&body);
    assert!([200, 201].contains(&put(&castier, &body).0));
    assert_eq!(weed.curl("GET", &format!("/blobs/cas/{}/{digest}", &digest[..2]), b""), (200, body));
}

/// What another program left there by half is replaced by an upload.
#[test]
fn an_object_of_another_size_is_replaced() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("limits.negative_ttl = \"0s\"");
    for (seed, size) in [(301, 10_000), (302, 20 * MIB)] {
        for form in [false, true] {
            let body = noise(seed + u64::from(form), size);
            let digest = sha256(&body);
            let object = format!("/blobs/cas/{}/{digest}", &digest[..2]);
            assert_eq!(weed.curl("PUT", &object, &body[..size / 2]).0, 200);
            let target = format!("/cas/{digest}");
            let request = if form { Request::new("POST", "/cas") } else { Request::new("PUT", &target) };
            let stored = request.body(body.clone()).send(castier.public);
            assert!([200, 201].contains(&stored.status), "{size} {form}: {} {}", stored.status, stored.text());
            assert!(weed.curl("GET", &object, b"") == (200, body.clone()), "{size} {form}");
        }
    }
}

fn castier_of(weed: &Weed) -> Castier {
    castier(&weed.config("limits.negative_ttl = \"0s\""))
}

/// A 404 of a server that is no such store is no absence.
#[test]
fn only_the_stores_word_is_an_absence() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("limits.negative_ttl = \"0s\"");
    let get = Request::get(&format!("/cas/{}", sha256(b"absent")));
    for body in ["<html>not here</html>", "", "<Error><Code>ContainerNotFound</Code></Error>", "<Error><Code>NoSuch"] {
        weed.proxy.intercept(move |_| Some(Response::new(404).with("Content-Type", "text/html").body(body)));
        assert_eq!(get.send(castier.public).status, 502, "{body}");
    }
    // What asks without a body is told by a list.
    weed.proxy.intercept(|_| Some(Response::new(404)));
    let castier = castier_of(&weed);
    assert_eq!(Request::head(&get.target).send(castier.public).status, 502);
    weed.proxy.intercept(|_| None);
    assert_eq!(get.send(castier.public).status, 404);
    assert_eq!(Request::head(&get.target).send(castier.public).status, 404);
}

#[test]
fn entries_are_in_the_bucket() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("");
    let key = sha256(b"an action");
    for (target, object) in [(format!("/ac/{key}"), format!("/blobs/ac/{key}")), ("/kv/a/b%20c".into(), "/blobs/kv/a/b%20c".into())] {
        assert_eq!(Request::get(&target).send(castier.public).status, 404);
        assert_eq!(Request::new("PUT", &target).body("one").send(castier.public).status, 201);
        let tag = gets(castier.public, &Request::get(&target), b"one").header("etag").unwrap();
        assert_eq!(weed.curl("GET", &object, b""), (200, b"one".to_vec()), "{object}");
        assert_eq!(Request::get(&target).with("If-None-Match", &tag).send(castier.public).status, 304);
        assert_eq!(Request::new("PUT", &target).with("If-None-Match", "*").body("two").send(castier.public).status, 412);
        assert_eq!(Request::new("PUT", &target).with("If-Match", "\"other\"").body("two").send(castier.public).status, 412);
        assert_eq!(Request::new("PUT", &target).with("If-Match", &tag).body("two").send(castier.public).status, 200);
        gets(castier.public, &Request::get(&target), b"two");
        let part = Request::get(&target).with("Range", "bytes=1-1").send(castier.public);
        assert_eq!((part.status, part.text().as_str()), (206, "w"));
        gets(weed.castier("").public, &Request::get(&target), b"two");
    }
    let list = Request::new("PROPFIND", "/kv/a/").with("Depth", "1").send(castier.public);
    assert_eq!(list.status, 207);
    assert!(list.text().contains("/kv/a/b%20c"), "{}", list.text());
    assert_eq!(Request::new("MKCOL", "/kv/new/").send(castier.public).status, 201);
    assert_eq!(Request::new("DELETE", "/kv/a/b%20c").send(castier.public).status, 204);
    assert_eq!(Request::get("/kv/a/b%20c").send(castier.public).status, 404);
    assert_eq!(Request::get("/elsewhere").send(castier.public).status, 404);
}

/// castier-origin has the same interface over a bucket as over files.
#[test]
fn castier_origin_over_a_bucket() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let dir = TempDir::new().unwrap();
    let config = weed.config("").replace("origin.url", "store.url").replace("[origin.s3]", "[store.s3]");
    let (_origin, public, admin) = castier_origin(dir.path(), &config, |_| {});
    for (size, form) in [(0, false), (70_000, false), (20 * MIB, false), (1000, true), (3 * MIB, true)] {
        let body = noise(200 + size as u64, size);
        let target = format!("/cas/{}", sha256(&body));
        let request = if form { Request::new("POST", "/cas") } else { Request::new("PUT", &target) };
        let stored = request.body(body.clone()).send(public);
        assert_eq!(stored.status, 201, "{size}: {}", stored.text());
        assert_eq!(Request::new("PUT", &target).body(body.clone()).send(public).status, 200);
        let whole = gets(public, &Request::get(&target), &body);
        assert_eq!(whole.header("etag").unwrap(), format!("\"{}\"", sha256(&body)));
        assert_eq!(Request::head(&target).send(public).header("content-length").unwrap(), size.to_string());
        assert_eq!(Request::get(&target).with("If-None-Match", &whole.header("etag").unwrap()).send(public).status, 304);
        if size > 1000 {
            let part = Request::get(&target).with("Range", "bytes=500-1499").send(public);
            assert!(part.status == 206 && part.body == body[500..1500], "{}", part.status);
        }
    }
    let absent = format!("/cas/{}", sha256(b"absent"));
    for (request, status) in [
        (Request::get(&absent), 404),
        (Request::new("PUT", &absent).body("other bytes"), 422),
        (Request::new("DELETE", &absent), 404),
        (Request::get("/nothing"), 404),
        (Request::get("/cas/short"), 400),
    ] {
        assert_eq!(request.send(public).status, status, "{request:?}");
    }
    // A whole blob that is damaged in the store never looks complete.
    let body = noise(220, 200_000);
    let digest = sha256(&body);
    let wrong = [&body[..199_999], &[body[199_999] ^ 1]].concat();
    assert_eq!(weed.curl("PUT", &format!("/blobs/cas/{}/{digest}", &digest[..2]), &wrong).0, 200);
    refused(public, &Request::get(&format!("/cas/{digest}")));
    // A castier before it.
    let castier = castier(&format!("origin.url = \"http://{public}\""));
    let body = noise(221, 100_000);
    assert_eq!(put(&castier, &body).0, 201);
    gets(castier.public, &Request::get(&format!("/cas/{}", sha256(&body))), &body);
    assert!(Request::get("/metrics").send(admin).text().contains("castier_bucket_max_requests "));
}

/// A name that the store does not take is the client's fault, and says nothing about the store.
#[test]
fn names_that_are_too_long() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    let castier = weed.castier("");
    // SeaweedFS takes 255 bytes between two slashes, and no store more than 1024 in all. In a key an umlaut has 6.
    for (name, asked) in [("n".repeat(300), true), (("%C3%A4".repeat(30) + "/").repeat(10) + "n", false)] {
        let target = format!("/kv/{name}");
        weed.take();
        let refused = Request::new("PUT", &target).body("x").send(castier.public);
        assert_eq!((refused.status, refused.text().contains("long")), (400, true), "{}", refused.text());
        assert_eq!(!weed.take().is_empty(), asked);
        let read = Request::get(&target).send(castier.public);
        assert!(matches!(read.status, 400 | 404), "{}", read.text());
        assert_eq!(castier.metric("castier_origin_up", &[]), 1.0);
    }
}
