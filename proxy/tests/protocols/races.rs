//! What several clients do at once, or what changes while an answer is on its way: each gets what is its own, and nothing old comes back.

use crate::{
    checks::gets,
    support::{Castier, Request, Response, Upstream, castier, entity, eventually, noise, sha256, turn},
};
use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

/// A server of entries that PUT replaces. A GET takes its answer first, and waits for a permit if `holds` is set.
struct Store {
    upstream: Upstream,
    holds: Arc<AtomicBool>,
    held: Arc<AtomicUsize>,
    permits: mpsc::Sender<()>,
}

impl Store {
    fn start() -> Self {
        let entries: Arc<Mutex<BTreeMap<String, Vec<u8>>>> = Arc::default();
        let (holds, held) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (permits, wait) = mpsc::channel();
        let (wait, holding, count) = (Mutex::new(wait), holds.clone(), held.clone());
        let upstream = Upstream::answering(move |request| {
            let path = request.path().to_owned();
            if request.method == "PUT" {
                entries.lock().unwrap().insert(path, request.body.clone());
                return Response::new(201);
            }
            let body = entries.lock().unwrap().get(&path).cloned();
            if holding.swap(false, Ordering::AcqRel) {
                count.fetch_add(1, Ordering::AcqRel);
                wait.lock().unwrap().recv().unwrap();
            }
            body.map_or_else(|| Response::new(404).body("absent"), |body| entity(request, "text/plain", &body))
        });
        Self { upstream, holds, held, permits }
    }

    /// Begins a GET, and waits until the upstream has its answer and holds it back.
    fn begin(&self, castier: &Castier, request: Request) -> thread::JoinHandle<Response> {
        self.holds.store(true, Ordering::Release);
        let (addr, before) = (castier.public, self.held.load(Ordering::Acquire));
        let asking = thread::spawn(move || request.send(addr));
        eventually("the upstream holds an answer", || (self.held.load(Ordering::Acquire) > before).then_some(()));
        asking
    }
}

const FRESH: &str = "path = \"/x/{name*}\"\nkind = \"fresh\"\nttl = \"1h\"\n";

fn route(upstream: &str, keys: &str) -> String {
    format!("[[route]]\nupstream = \"{upstream}\"\n{keys}\n")
}

fn put(castier: &Castier, target: &str, body: &str) {
    let answer = Request::new("PUT", target).body(body).send(castier.public);
    assert_eq!(answer.status, 201, "{}", answer.text());
}

#[test]
fn an_answer_of_before_a_write_is_not_shared_and_not_noted() {
    let _turn = turn();
    for keys in ["access = \"local\"\n", "access = \"upstream\"\n", "access = \"local\"\ndigest_header = \"x-digest\"\n"] {
        let store = Store::start();
        let castier = castier(&route(&store.upstream.url(), &format!("{FRESH}{keys}")));
        put(&castier, "/x/a", "old");
        let before = store.begin(&castier, Request::get("/x/a"));
        put(&castier, "/x/a", "new");
        gets(castier.public, &Request::get("/x/a"), b"new");
        store.permits.send(()).unwrap();
        assert_eq!(before.join().unwrap().text(), "old", "it had asked before");
        store.upstream.take();
        gets(castier.public, &Request::get("/x/a"), b"new");
        assert_eq!(store.upstream.history(), "", "what came after the write is kept");
    }
}

#[test]
fn a_purge_is_not_undone_by_what_was_on_its_way() {
    let _turn = turn();
    for purge in [r#"{"url":"/x/a"}"#, r#"{"route":"/x/{name*}","path":"/x/**"}"#] {
        let store = Store::start();
        let castier = castier(&route(&store.upstream.url(), &format!("{FRESH}access = \"local\"\n")));
        Request::new("PUT", "/x/a").body("old").send(store.upstream.addr());
        let before = store.begin(&castier, Request::get("/x/a"));
        let purged = Request::new("POST", "/purge").body(purge).send(castier.admin);
        assert_eq!(purged.status, 200, "{purge}: {}", purged.text());
        Request::new("PUT", "/x/a").body("new").send(store.upstream.addr());
        store.permits.send(()).unwrap();
        before.join().unwrap();
        gets(castier.public, &Request::get("/x/a"), b"new");
    }
}

#[test]
fn a_write_ends_the_absences_of_all_clients() {
    let _turn = turn();
    let store = Store::start();
    let castier = castier(&route(&store.upstream.url(), &format!("{FRESH}access = \"upstream\"\nnegative_ttl = \"1h\"\n")));
    let asks = |user: &str| Request::get("/x/a").basic(user, "password");
    for user in ["ann", "bob", "ann", "bob"] {
        assert_eq!(asks(user).send(castier.public).status, 404);
    }
    assert_eq!(store.upstream.take().len(), 2, "each is told once");
    put(&castier, "/x/a", "new");
    for user in ["ann", "bob"] {
        gets(castier.public, &asks(user), b"new");
    }
}

/// Sends the head and the first half of a body to each GET, and the rest once it is told to.
struct Halves {
    addr: SocketAddr,
    rest: Arc<AtomicBool>,
    begun: Arc<AtomicUsize>,
}

impl Halves {
    fn of(body: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (addr, rest, begun) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (may, count) = (rest.clone(), begun.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (body, may, count) = (body.clone(), may.clone(), count.clone());
                thread::spawn(move || Self::serve(stream, &body, &may, &count));
            }
        });
        Self { addr, rest, begun }
    }

    fn serve(mut stream: TcpStream, body: &[u8], may: &AtomicBool, begun: &AtomicUsize) {
        let mut request = [0; 65_536];
        let length = stream.read(&mut request).unwrap_or(0);
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.write_all(head.as_bytes());
        if !request[..length].starts_with(b"GET") {
            return;
        }
        let (first, second) = body.split_at(body.len() / 2);
        let _ = stream.write_all(first);
        begun.fetch_add(1, Ordering::AcqRel);
        eventually("the rest may go", || may.load(Ordering::Acquire).then_some(()));
        let _ = stream.write_all(second);
    }
}

/// The blob comes for a client with credentials, and at the same time another route, which asks nobody's, wants it of its own upstream.
#[test]
fn a_blob_that_comes_for_others_only_is_loaded_again() {
    let _turn = turn();
    let body = noise(81, 3_000_000);
    let digest = sha256(&body);
    let (private, upstream) = (Halves::of(body.clone()), Halves::of(body.clone()));
    upstream.rest.store(true, Ordering::Release);
    let keys = |path: &str, access: &str| format!("path = \"/{path}/{{sha256}}\"\nkind = \"blob\"\naccess = \"{access}\"\n");
    let castier = castier(&format!(
        "{}{}",
        route(&format!("http://{}", private.addr), &keys("private", "upstream")),
        route(&format!("http://{}", upstream.addr), &keys("local", "local"))
    ));
    let (addr, target) = (castier.public, format!("/private/{digest}"));
    let first = thread::spawn(move || Request::get(&target).basic("ann", "password").send(addr));
    eventually("it comes", || (private.begun.load(Ordering::Acquire) > 0).then_some(()));
    gets(castier.public, &Request::get(&format!("/local/{digest}")), &body);
    assert_eq!(upstream.begun.load(Ordering::Acquire), 1);
    private.rest.store(true, Ordering::Release);
    assert!(first.join().unwrap().body == body);
    gets(castier.public, &Request::get(&format!("/local/{digest}")), &body);
    assert_eq!(upstream.begun.load(Ordering::Acquire), 1, "it is kept");
}

/// A page of metadata that is too long to be rewritten is passed on, also in parts and also without an announced length.
#[test]
fn a_range_of_a_long_document_is_that_range() {
    let _turn = turn();
    let page: Vec<u8> = (0..).flat_map(|n: u64| format!("<a href=\"/packages/{n}\">{n}</a>\n").into_bytes()).take(65 << 20).collect();
    let sent = page.clone();
    let upstream = Upstream::answering(move |request| {
        let answer = Response::ok("text/html", sent.clone()).with("ETag", "\"one\"");
        if request.path().contains("chunked") { answer.with("Transfer-Encoding", "chunked") } else { answer }
    });
    let keys = "protocol = \"pypi\"\naccess = \"local\"\nprefix = \"/py\"\nttl = \"1h\"\n";
    let castier = castier(&format!("memory.capacity = \"512MiB\"\nmemory.max_blob = \"128MiB\"\n{}", route(&upstream.url(), keys)));
    for target in ["/py/simple/long/", "/py/simple/chunked/"] {
        for round in ["cold", "kept"] {
            let range = Request::get(target).with("Range", "bytes=1000000-1000099").send(castier.public);
            assert_eq!((range.status, range.body.len()), (206, 100), "{target} {round}: {:?}", range.headers);
            assert!(range.body == page[1_000_000..1_000_100], "{target} {round}: {}", range.text());
        }
        gets(castier.public, &Request::get(target), &page);
        assert_eq!(upstream.take().len(), 1, "{target}");
    }
}

#[test]
fn a_redirect_takes_no_secret_along() {
    let _turn = turn();
    let other = Upstream::answering(|request| entity(request, "text/plain", b"the file"));
    let to = other.url();
    let upstream = Upstream::answering(move |_| Response::new(302).with("Location", &format!("{to}/file")));
    let keys = format!(
        "path = \"/x/{{name*}}\"\nkind = \"frozen\"\naccess = \"upstream\"\nvary = [\"x-api-key\", \"x-tenant\"]\nredirects = [\"{}\"]\n",
        other.addr()
    );
    let castier = castier(&route(&upstream.url(), &keys));
    let request =
        Request::get("/x/a").basic("ann", "password").with("X-Tenant", "one").with("X-Api-Key", "key").with("Accept", "text/plain");
    gets(castier.public, &request, b"the file");
    let first = &upstream.take()[0];
    assert_eq!((first.header("x-tenant").as_deref(), first.header("x-api-key").as_deref()), (Some("one"), Some("key")));
    for seen in other.take() {
        for secret in ["authorization", "x-tenant", "x-api-key"] {
            assert_eq!(seen.header(secret), None, "{seen}");
        }
        assert_eq!(seen.header("accept").as_deref(), Some("text/plain"));
    }
}

/// What an upstream has shown to its users is not everybody's because castier logs in itself from now on.
#[test]
fn another_access_does_not_open_what_is_kept() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| match request.header("authorization") {
        Some(_) => entity(request, "text/plain", b"for users"),
        None => Response::new(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let config = |access: &str| {
        let keys = format!("path = \"/x/{{name*}}\"\nkind = \"frozen\"\naccess = \"{access}\"\n");
        format!("disk.path = \"./disk\"\n{}", route(&upstream.url(), &keys))
    };
    let castier = castier(&config("upstream"));
    gets(castier.public, &Request::get("/x/a").basic("ann", "password"), b"for users");
    let castier = castier.restart(&config("local"));
    let answer = Request::get("/x/a").send(castier.public);
    assert!(matches!(answer.status, 401 | 502), "{} {}", answer.status, answer.text());
}

/// As a proxy, castier takes each request to the route of the host that it names.
#[test]
fn whole_urls_go_to_the_route_of_their_host() {
    let _turn = turn();
    let upstreams = ["one", "two"].map(|name| Upstream::answering(move |request| entity(request, "text/plain", name.as_bytes())));
    let keys = "path = \"/x/{name*}\"\nkind = \"frozen\"\naccess = \"local\"\n";
    let castier = castier(&upstreams.iter().map(|upstream| route(&upstream.url(), keys)).collect::<String>());
    for (upstream, name) in upstreams.iter().zip(["one", "two"]) {
        let request = Request::get(&format!("{}/x/a", upstream.url())).with("Host", &upstream.addr().to_string());
        gets(castier.public, &request, name.as_bytes());
    }
}

/// The tag that castier makes of the digest is one that it knows again.
#[test]
fn a_tag_of_castiers_own_is_honoured() {
    let _turn = turn();
    let upstream = Upstream::answering(|_| Response::ok("text/plain", "body"));
    let castier = castier(&route(&upstream.url(), "path = \"/x/{name*}\"\nkind = \"frozen\"\naccess = \"local\"\n"));
    gets(castier.public, &Request::get("/x/a"), b"body");
    let tag = gets(castier.public, &Request::get("/x/a"), b"body").header("etag").unwrap();
    assert_eq!(Request::get("/x/a").with("If-None-Match", &tag).send(castier.public).status, 304);
    assert_eq!(Request::head("/x/a").with("If-None-Match", &tag).send(castier.public).status, 304);
    let part = Request::get("/x/a").with("If-Range", &tag).with("Range", "bytes=1-2").send(castier.public);
    assert_eq!((part.status, part.text().as_str()), (206, "od"));
}

/// What no cache may keep is for the one client that asked, also if others ask at the same time.
#[test]
fn an_answer_with_a_cookie_is_shared_with_nobody() {
    let _turn = turn();
    for access in ["local", "upstream"] {
        for kind in ["fresh", "frozen"] {
            let (serial, waiting) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
            let (count, all) = (waiting.clone(), Arc::new(AtomicBool::new(false)));
            let go = all.clone();
            let upstream = Upstream::answering(move |_| {
                let serial = serial.fetch_add(1, Ordering::AcqRel);
                count.fetch_add(1, Ordering::AcqRel);
                eventually("all have come", || go.load(Ordering::Acquire).then_some(()));
                Response::ok("text/plain", format!("for {serial}")).with("Set-Cookie", &format!("session={serial}"))
            });
            let castier = castier(&route(&upstream.url(), &format!("path = \"/x/{{name*}}\"\nkind = \"{kind}\"\naccess = \"{access}\"\n")));
            let addr = castier.public;
            let clients: Vec<_> = (0..5).map(|_| thread::spawn(move || Request::get("/x/a").send(addr))).collect();
            eventually("the upstream is asked", || (waiting.load(Ordering::Acquire) > 0).then_some(()));
            eventually("the others wait, or have asked as well", || {
                (waiting.load(Ordering::Acquire) == 5 || castier.metric("castier_connections", &[]) >= 5.0).then_some(())
            });
            all.store(true, Ordering::Release);
            let mut bodies: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
            bodies.sort_by_key(Response::text);
            for answer in &bodies {
                assert_eq!(answer.header("set-cookie").unwrap().replace("session=", "for "), answer.text());
            }
            bodies.dedup_by_key(|answer| answer.text());
            assert_eq!(bodies.len(), 5, "{access} {kind}: {}", upstream.history());
        }
    }
}

/// A body of unknown length that becomes too large for the route never looks complete.
#[test]
fn a_body_without_a_length_is_cut_at_the_limit() {
    let _turn = turn();
    let body = noise(82, 100_000);
    let sent = body.clone();
    let upstream = Upstream::answering(move |_| Response::ok("text/plain", sent.clone()).with("Transfer-Encoding", "chunked"));
    for kind in ["fresh", "frozen"] {
        for (limit, is_served) in [("64KiB", false), ("100000B", true)] {
            let castier = castier(&route(
                &upstream.url(),
                &format!("path = \"/x/{{name*}}\"\nkind = \"{kind}\"\naccess = \"local\"\nmax_body = \"{limit}\"\n"),
            ));
            match Request::get("/x/a").try_send(castier.public) {
                Ok(answer) if is_served => assert!(answer.status == 200 && answer.body == body),
                Ok(answer) => assert_eq!(answer.status, 502),
                Err(error) => assert!(!is_served, "{error}"),
            }
        }
    }
}
