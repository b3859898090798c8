//! Upstreams that lie, lead astray and fail, and requests that try to reach what they should not: never a wrong body, always a clear answer.

use crate::{
    checks::{gets, refused},
    support::{Castier, Port, Request, Response, Running, Upstream, castier, command, entity, eventually, noise, sha256, tool, turn},
};
use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    thread,
};

/// Routes of each kind to an upstream, with these keys in each.
fn routes(upstream: &str, more: &str) -> String {
    let kinds = [("blob", "/blob/{sha256}", ""), ("frozen", "/frozen/{name*}", ""), ("fresh", "/fresh/{name*}", "ttl = \"0s\"\n")];
    let route = |(kind, path, own): &(&str, &str, &str)| {
        let own = if more.contains("\nttl") || more.starts_with("ttl") { "" } else { own };
        let digest = if *kind == "blob" { "" } else { "digest_header = \"x-digest\"\n" };
        format!("[[route]]\npath = \"{path}\"\nkind = \"{kind}\"\nupstream = \"{upstream}\"\nproof_ttl = \"1h\"\n{digest}{own}{more}\n")
    };
    kinds.iter().map(route).collect()
}

/// castier with these routes.
fn before(upstream: &Upstream, more: &str) -> Castier {
    castier(&routes(&upstream.url(), more))
}

fn get(castier: &Castier, target: &str) -> Response {
    Request::get(target).send(castier.public)
}

/// A clear refusal: a status that says who is at fault, and a body that tells nothing of the inside.
#[track_caller]
fn assert_clear(answer: &Response, statuses: &[u16]) {
    assert!(statuses.contains(&answer.status), "{} {:?} {}", answer.status, answer.headers, answer.text());
    let text = answer.text();
    for inside in ["127.0.0.1", "localhost", "os error", "panicked", ".rs:"] {
        assert!(!text.contains(inside), "{inside:?} leaks: {text}");
    }
}

// ---- redirects ----

const REDIRECTS: [u16; 5] = [301, 302, 303, 307, 308];

/// `/x/chain/N` redirects N times, with each status in turn; `/x/loop` for ever.
fn redirecting() -> Upstream {
    Upstream::answering(|request| {
        let (kind, rest) = request.path()[1..].split_once('/').unwrap();
        match rest.split_once('/') {
            _ if rest == "loop" => Response::new(302).with("Location", &format!("/{kind}/loop")),
            Some(("chain", "0")) => entity(request, "text/plain", b"the end of the chain"),
            Some(("chain", left)) => {
                let left: u16 = left.parse().unwrap();
                let status = REDIRECTS[usize::from(left) % REDIRECTS.len()];
                Response::new(status).with("Location", &format!("/{kind}/chain/{}", left - 1)).body("a redirect")
            }
            _ => Response::new(404),
        }
    })
}

#[test]
fn five_redirects_are_followed_and_no_more() {
    let _turn = turn();
    let upstream = redirecting();
    let castier = before(&upstream, "");
    for kind in ["frozen", "fresh"] {
        for hops in 1..=5 {
            let answer = gets(castier.public, &Request::get(&format!("/{kind}/chain/{hops}")), b"the end of the chain");
            assert_eq!(answer.header("location"), None);
        }
        upstream.take();
        for target in [format!("/{kind}/chain/6"), format!("/{kind}/loop"), format!("/{kind}/chain/9")] {
            assert_clear(&get(&castier, &target), &[502]);
            let times = upstream.take().len();
            assert!(times <= 6, "{target}: {times} requests");
            assert_eq!(Request::head(&target).send(castier.public).status, 502, "{target}");
            upstream.take();
        }
    }
}

/// Where a redirect may not lead, in all the ways in which it can be written.
#[test]
fn redirects_to_hosts_that_are_not_listed_are_not_followed() {
    let _turn = turn();
    let secret = Upstream::answering(|_| Response::ok("text/plain", "the secret"));
    let port = secret.addr().port();
    let location = Arc::new(Mutex::new(String::new()));
    let to = location.clone();
    let upstream = Upstream::answering(move |_| Response::new(302).with("Location", &to.lock().unwrap()).body("a redirect"));
    let own = upstream.addr();
    // A listed host has its port.
    let castier = before(
        &upstream,
        &format!("redirects = [\"127.0.0.1\", \"*.files.invalid:{port}\", \"files.invalid:{port}\"]\nnegative_ttl = \"0s\"\n"),
    );
    let cases = [
        format!("http://127.0.0.1:{port}/x"),
        format!("http://localhost:{port}/x"),
        format!("//127.0.0.1:{port}/x"),
        format!("http://127.1:{port}/x"),
        format!("http://2130706433:{port}/x"),
        format!("http://0x7f000001:{port}/x"),
        format!("http://0.0.0.0:{port}/x"),
        format!("http://[::1]:{port}/x"),
        format!("http://[::ffff:127.0.0.1]:{port}/x"),
        format!("http://{own}@127.0.0.1:{port}/x"),
        format!("http://files.invalid:{port}@127.0.0.1:{port}/x"),
        format!("http://127.0.0.1:{port}#@{own}/x"),
        format!("http://127.0.0.1:{port}\\@{own}/x"),
        format!("\\\\127.0.0.1:{port}/x"),
        format!("http:/\\127.0.0.1:{port}/x"),
        format!("HTTP:127.0.0.1:{port}/x"),
        format!("http://127.0.0.1.:{port}/x"),
        format!("http://\u{ff11}27.0.0.1:{port}/x"),
        "file:///etc/passwd".to_owned(),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://".to_owned(),
        "http://[/".to_owned(),
        String::new(),
    ];
    for (number, case) in cases.iter().enumerate() {
        *location.lock().unwrap() = case.clone();
        for kind in ["frozen", "fresh"] {
            let answer = get(&castier, &format!("/{kind}/{number}"));
            assert!(!(200..300).contains(&answer.status), "{case:?}: {} {}", answer.status, answer.text());
            assert!(!answer.text().contains("secret") && !answer.text().contains("root:"), "{case:?}");
            assert!(secret.seen().is_empty(), "{case:?}: {}", secret.history());
            let blob = get(&castier, &format!("/blob/{}", sha256(format!("{number}").as_bytes())));
            assert!(!(200..300).contains(&blob.status), "{case:?}: {} {}", blob.status, blob.text());
        }
    }
    assert!(secret.seen().is_empty(), "{}", secret.history());
}

/// The same for the links of metadata: what is not listed stays as it is, and castier has no address for it.
#[test]
fn links_to_hosts_that_are_not_listed_stay() {
    let _turn = turn();
    let secret = Upstream::answering(|_| Response::ok("text/plain", "the secret"));
    let (address, port) = (secret.addr(), secret.addr().port());
    let document = format!(
        "{{\"name\":\"x\",\"versions\":{{\"1.0.0\":{{\"dist\":{{\"tarball\":\"http://{address}/x/-/x-1.0.0.tgz\"}}}},\
         \"1.0.1\":{{\"dist\":{{\"tarball\":\"http://localhost:{port}/x.tgz\"}}}},\"1.0.2\":{{\"dist\":{{\"tarball\":\"file:///etc/passwd\"}}}}}}}}"
    );
    let text = document.clone();
    let upstream = Upstream::answering(move |request| entity(request, "application/json", text.as_bytes()));
    let castier = castier(&format!("[[route]]\nprotocol = \"npm\"\nupstream = \"{}\"\nredirects = [\"127.0.0.1:1\"]\n", upstream.url()));
    gets(castier.public, &Request::get("/x"), document.as_bytes());
    assert!(secret.seen().is_empty());
}

/// A redirect that leads to a listed host loses the credentials.
#[test]
fn credentials_stay_with_the_upstream() {
    let _turn = turn();
    let body = noise(1, 2000);
    let (bytes, path) = (body.clone(), format!("/blob/{}", sha256(&body)));
    let cdn = Upstream::answering(move |request| entity(request, "application/octet-stream", &bytes));
    let to = cdn.url();
    let upstream = Upstream::answering(move |request| Response::new(307).with("Location", &format!("{to}{}", request.target)));
    let castier = before(&upstream, &format!("redirects = [\"{}\"]\n", cdn.addr()));
    for target in [path.as_str(), "/frozen/a", "/fresh/a"] {
        let request =
            Request::get(target).bearer("the-secret").with("Cookie", "session=the-secret").with("Proxy-Authorization", "Basic eDp5");
        gets(castier.public, &request, &body);
    }
    assert_eq!(upstream.take()[0].authorization().as_deref(), Some("Bearer the-secret"));
    let seen = cdn.take();
    let leak = seen.iter().flat_map(|seen| &seen.headers).find(|(_, value)| value.contains("the-secret") || value.contains("eDp5"));
    assert!(!seen.is_empty() && leak.is_none(), "{leak:?}");
}

/// castier's own paths for links to listed hosts lead to those hosts alone.
#[test]
fn paths_of_links_lead_to_listed_hosts_alone() {
    let _turn = turn();
    let secret = Upstream::answering(|_| Response::ok("text/plain", "the secret"));
    let files = Upstream::answering(|request| entity(request, "text/plain", request.path().as_bytes()));
    let (address, port) = (secret.addr(), secret.addr().port());
    let document =
        format!("{{\"name\":\"x\",\"versions\":{{\"1.0.0\":{{\"dist\":{{\"tarball\":\"{}/x/-/x-1.0.0.tgz\"}}}}}}}}", files.url());
    let upstream = Upstream::answering(move |request| match request.path() {
        "/x" => entity(request, "application/json", document.as_bytes()),
        _ => Response::new(404),
    });
    // A listed name is one thing, where it leads another: below a wildcard, nothing private.
    let listed = format!("redirects = [\"{}\", \"*.localhost:{port}\"]\n", files.addr());
    let castier = castier(&format!("[[route]]\nprotocol = \"npm\"\nprefix = \"/js\"\nupstream = \"{}\"\n{listed}", upstream.url()));
    let packument = get(&castier, "/js/x").json();
    let link = packument["versions"]["1.0.0"]["dist"]["tarball"].as_str().unwrap().to_owned();
    let path = link.strip_prefix(&castier.url()).unwrap_or_else(|| panic!("{link} leads past castier"));
    let request = Request::get(path).bearer("the-secret").with("Cookie", "the-secret");
    gets(castier.public, &request, b"/x/-/x-1.0.0.tgz");
    let leak = files.take().into_iter().flat_map(|seen| seen.headers).find(|(_, value)| value.contains("the-secret"));
    assert_eq!(leak, None, "credentials are for the upstream");
    // The same form, with another host in it.
    let own = files.addr().to_string();
    assert!(path.contains(&own), "{path}");
    let hosts = [
        address.to_string(),
        format!("localhost:{port}"),
        format!("x.localhost:{port}"),
        format!("{own}@{address}"),
        format!("{address}%23{own}"),
        format!("{address}%2f{own}"),
        format!("127.1:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        format!("0:{port}"),
        format!("{}%5c@{address}", own),
        format!("%31%32%37.0.0.1:{port}"),
    ];
    for host in hosts {
        let answer = get(&castier, &path.replace(&own, &host));
        assert!(!(200..300).contains(&answer.status) && !answer.text().contains("secret"), "{host}: {} {}", answer.status, answer.text());
        assert!(secret.seen().is_empty(), "{host}: {}", secret.history());
    }
}

/// Two castiers that have each other as upstream notice it.
#[test]
fn a_circle_of_caches_ends() {
    let _turn = turn();
    let first = castier("");
    let second = castier(&routes(&first.url(), ""));
    let first = first.restart(&routes(&second.url(), ""));
    for target in ["/frozen/x", "/fresh/x", &format!("/blob/{}", sha256(b"x"))] {
        assert_clear(&get(&first, target), &[502, 508]);
        assert_clear(&get(&second, target), &[502, 508]);
    }
}

/// With nginx as an upstream with TLS: a redirect from https to http is not followed.
#[test]
fn a_redirect_from_https_to_http_is_not_followed() {
    let _turn = turn();
    let Some(nginx) = tool("nginx") else { return };
    let dir = tempfile::TempDir::new().unwrap();
    let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    fs::write(dir.path().join("cert.pem"), key.cert.pem()).unwrap();
    fs::write(dir.path().join("key.pem"), key.signing_key.serialize_pem()).unwrap();
    let plain = Upstream::answering(|_| Response::ok("text/plain", "sent in the clear"));
    let port = Port::free();
    let at = port.number();
    let text = format!(
        "daemon off; worker_processes 1; pid nginx.pid; error_log stderr; events {{}}\nhttp {{ access_log off; client_body_temp_path t1; \
         proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5; server {{ listen 127.0.0.1:{at} ssl; \
         ssl_certificate cert.pem; ssl_certificate_key key.pem; location = /frozen/down {{ return 302 http://{plain}/frozen/down; }} \
         location = /frozen/up {{ return 302 https://localhost:{at}/end; }} location / {{ return 200 \"sent with TLS\"; }} }} }}\n",
        plain = plain.addr()
    );
    fs::write(dir.path().join("nginx.conf"), text).unwrap();
    let mut command = command(&nginx, dir.path());
    let mut server = Running::start(command.args(["-p", ".", "-c", "nginx.conf"]));
    server.listens(port.addr());
    let certificate = dir.path().join("cert.pem");
    let castier = castier(&format!(
        "origin.ca_file = \"{}\"\n{}",
        certificate.display(),
        routes(&format!("https://localhost:{at}"), &format!("redirects = [\"{}\"]\n", plain.addr()))
    ));
    gets(castier.public, &Request::get("/frozen/up"), b"sent with TLS");
    let answer = get(&castier, "/frozen/down");
    assert!(!(200..300).contains(&answer.status), "{answer:?}");
    assert!(plain.seen().is_empty(), "{}", plain.history());
}

/// The place for tokens that an upstream names gets nothing if it is not listed: neither castier's credentials nor the client's.
#[test]
fn a_realm_that_is_not_listed_gets_no_credentials() {
    let _turn = turn();
    let thief = Upstream::answering(|_| Response::ok("application/json", "{\"token\":\"a\",\"access_token\":\"a\",\"expires_in\":300}"));
    let realm = format!("Bearer realm=\"{}/token\",service=\"registry\",scope=\"repository:a/b:pull\"", thief.url());
    let upstream = Upstream::answering(move |_| {
        Response::new(401).with("WWW-Authenticate", &realm).body("{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}")
    });
    let passwords = tempfile::TempDir::new().unwrap();
    let file = passwords.path().join("password");
    fs::write(&file, "the-secret\n").unwrap();
    let credentials = format!("credentials = {{ username = \"u\", password_file = \"{}\" }}\n", file.display());
    for (protocol, target) in [("oci", "/v2/a/b/manifests/latest"), ("pypi", "/simple/a/"), ("npm", "/a")] {
        for access in
            [format!("access = \"local\"\n{credentials}"), "access = \"local\"\n".to_owned(), "access = \"upstream\"\n".to_owned()]
        {
            let castier = castier(&format!("[[route]]\nprotocol = \"{protocol}\"\nupstream = \"{}\"\n{access}", upstream.url()));
            let answer = Request::get(target).basic("client", "its-secret").send(castier.public);
            assert!([401, 403, 502].contains(&answer.status), "{protocol} {access}: {answer:?}");
            assert!(thief.seen().is_empty(), "{protocol} {access}: {}", thief.history());
        }
    }
}

// ---- bodies ----

/// Metadata that cannot be parsed passes as it is.
#[test]
fn metadata_that_does_not_parse_is_relayed() {
    let _turn = turn();
    let link = "http://127.0.0.1:9/x/-/x-1.0.0.tgz";
    let cut = format!("{{\"versions\":{{\"1.0.0\":{{\"dist\":{{\"tarball\":\"{link}\"");
    let deep = format!("{}\"{link}\"{}", "[".repeat(100_000), "]".repeat(100_000));
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        ("cut", cut.into_bytes()),
        ("empty", Vec::new()),
        ("other", b"<html>Service maintenance</html>".to_vec()),
        ("list", b"[]".to_vec()),
        ("null", b"null".to_vec()),
        ("deep", deep.into_bytes()),
        ("latin", b"{\"versions\":{\"1.0.0\":{\"dist\":{\"tarball\":\"\xff\xfe\"}}}}".to_vec()),
        ("numbers", b"{\"versions\":{\"1.0.0\":{\"dist\":{\"tarball\":7}},\"2\":[],\"3\":null}}".to_vec()),
    ];
    let answers = bodies.clone();
    let upstream = Upstream::answering(move |request| {
        let name = request.path().trim_matches('/').rsplit('/').next().unwrap();
        let body = &answers.iter().find(|(known, _)| *known == name).unwrap().1;
        entity(request, if request.path().starts_with("/simple") { "text/html" } else { "application/json" }, body)
    });
    let castier = castier(&format!(
        "[[route]]\nprotocol = \"npm\"\nprefix = \"/npm\"\nupstream = \"{0}\"\n[[route]]\nprotocol = \"pypi\"\nprefix = \"/py\"\nupstream = \"{0}\"\n",
        upstream.url()
    ));
    for _ in 0..2 {
        for (name, body) in &bodies {
            gets(castier.public, &Request::get(&format!("/npm/{name}")), body);
            gets(castier.public, &Request::get(&format!("/py/simple/{name}/")), body);
        }
    }
}

/// A body that ends before its announced end is not passed on as whole, and not kept.
#[test]
fn a_body_that_is_cut_is_not_whole() {
    let _turn = turn();
    let lies = Arc::new(AtomicUsize::new(0));
    let body = noise(2, 300_000);
    let (lie, bytes) = (lies.clone(), body.clone());
    let upstream = Upstream::answering(move |request| {
        if lie.load(Ordering::Relaxed) == 0 {
            return entity(request, "application/octet-stream", &bytes);
        }
        // Without a range, so that there is no way to go on.
        let answer = Response::ok("application/octet-stream", &bytes[..bytes.len() / lie.load(Ordering::Relaxed)]);
        answer.with("Content-Length", &bytes.len().to_string()).with("Connection", "close")
    });
    let castier = before(&upstream, "stale_if_error = \"0s\"\n");
    let blob = format!("/blob/{}", sha256(&body));
    for target in [blob.as_str(), "/frozen/x", "/fresh/x"] {
        for part in [2, 300_000] {
            lies.store(part, Ordering::Relaxed);
            let status = refused(castier.public, &Request::get(target));
            assert!([0, 502, 504].contains(&status), "{target}: {status}");
        }
        lies.store(0, Ordering::Relaxed);
        gets(castier.public, &Request::get(target), &body);
    }
}

/// A body that goes on after its announced end does not become another answer.
#[test]
fn a_body_that_is_too_long_poisons_nothing() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| {
        if request.path().ends_with("/evil") {
            let next = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\npoison";
            return Response::ok("text/plain", format!("right{next}{next}")).with("Content-Length", "5");
        }
        entity(request, "text/plain", request.path().as_bytes())
    });
    let castier = before(&upstream, "");
    for kind in ["frozen", "fresh"] {
        for round in 0..20 {
            if let Ok(answer) = Request::get(&format!("/{kind}/{round}/evil")).try_send(castier.public) {
                assert!(answer.text() == "right" || answer.status == 502, "{answer:?}");
            }
            let path = format!("/{kind}/{round}/good");
            let answer = get(&castier, &path);
            assert_eq!((answer.status, answer.text()), (200, path));
        }
    }
}

/// An upstream that sends the same bytes to each request.
struct Raw {
    addr: SocketAddr,
    _thread: thread::JoinHandle<()>,
}

impl Raw {
    fn sending(bytes: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let thread = thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let bytes = bytes.clone();
                thread::spawn(move || {
                    let _ = stream.read(&mut [0; 65_536]);
                    let _ = stream.write_all(&bytes);
                });
            }
        });
        Self { addr, _thread: thread }
    }
}

/// Answers that are no HTTP, or contradict themselves.
#[test]
fn answers_that_make_no_sense() {
    let _turn = turn();
    let body = "0123456789";
    let cases: Vec<(&str, String, &[u16])> = vec![
        ("nothing", String::new(), &[502]),
        ("no HTTP", "SSH-2.0-OpenSSH_9.9\r\n".into(), &[502]),
        ("half a head", "HTTP/1.1 200 OK\r\nContent-Le".into(), &[502]),
        ("no such status", format!("HTTP/1.1 99999 OK\r\nContent-Length: 10\r\n\r\n{body}"), &[502]),
        ("two lengths", format!("HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 4\r\n\r\n{body}"), &[502]),
        ("a list of lengths", format!("HTTP/1.1 200 OK\r\nContent-Length: 10, 4\r\n\r\n{body}"), &[502]),
        ("no number", format!("HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n{body}"), &[502]),
        ("a sign", format!("HTTP/1.1 200 OK\r\nContent-Length: +10\r\n\r\n{body}"), &[502]),
        ("negative", format!("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{body}"), &[502]),
        ("far too large", format!("HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n{body}"), &[502]),
        ("a bad chunk", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n0123456789\r\n0\r\n\r\n".into(), &[0, 502]),
        ("chunks without an end", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n".into(), &[0, 502]),
        ("nothing has changed", "HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n".into(), &[502]),
        (
            "a part that nobody asked for",
            format!("HTTP/1.1 206 Partial\r\nContent-Range: bytes 0-9/20\r\nContent-Length: 10\r\n\r\n{body}"),
            &[502],
        ),
        ("a header too large", format!("HTTP/1.1 200 OK\r\nX: {}\r\nContent-Length: 10\r\n\r\n{body}", "x".repeat(2_000_000)), &[502]),
        ("too many headers", format!("HTTP/1.1 200 OK\r\n{}Content-Length: 10\r\n\r\n{body}", "X: y\r\n".repeat(20_000)), &[502]),
    ];
    let mut wrong = Vec::new();
    for (what, bytes, statuses) in cases {
        let upstream = Raw::sending(bytes.into_bytes());
        let castier = castier(&routes(&format!("http://{}", upstream.addr), ""));
        for target in ["/frozen/x", "/fresh/x", &format!("/blob/{}", sha256(body.as_bytes()))] {
            let answer = Request::get(target).try_send(castier.public);
            let status = answer.as_ref().map_or(0, |answer| answer.status);
            if !statuses.contains(&status) {
                wrong.push(format!("{what}, {target}: {status} {:?}", answer.map(|answer| answer.text())));
            }
        }
        assert_eq!(Request::get("/readyz").send(castier.admin).status, 200, "{what}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A transfer that broke goes on only if what comes is the rest of the same body.
#[test]
fn no_body_is_put_together_from_two() {
    let _turn = turn();
    let (old, new) = (noise(6, 2_000_000), noise(7, 2_000_000));
    // What the upstream does when it is asked again.
    let cases = ["goes on", "has another", "begins elsewhere", "has another size", "knows no ranges", "goes on with another"];
    for case in cases {
        let turns = Mutex::new(BTreeMap::<String, usize>::new());
        let (first, second) = (old.clone(), new.clone());
        let upstream = Upstream::answering(move |request| {
            let mut turns = turns.lock().unwrap();
            let turn = turns.entry(request.path().to_owned()).or_default();
            *turn += 1;
            if *turn == 1 {
                let answer = Response::ok("text/plain", &first[..1_000_000]).with("ETag", "\"old\"").with("Accept-Ranges", "bytes");
                return answer.with("Content-Length", "2000000").with("Connection", "close");
            }
            let from = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
            let part = |from: usize, total: usize, etag: &str, body: &[u8]| {
                let range = format!("bytes {from}-{}/{total}", from + body.len() - 1);
                Response { status: 206, ..Response::ok("text/plain", body) }.with("ETag", etag).with("Content-Range", &range)
            };
            match (case, from) {
                ("goes on", Some(from)) => part(from, 2_000_000, "\"old\"", &first[from..]),
                ("goes on with another", Some(from)) => part(from, 2_000_000, "\"new\"", &second[from..]),
                ("begins elsewhere", Some(from)) => part(from - 10, 2_000_000, "\"old\"", &first[from - 10..]),
                ("has another size", Some(from)) => part(from, 3_000_000, "\"old\"", &first[from..]),
                ("goes on" | "knows no ranges" | "begins elsewhere" | "has another size", _) => {
                    Response::ok("text/plain", first.clone()).with("ETag", "\"old\"")
                }
                _ => Response::ok("text/plain", second.clone()).with("ETag", "\"new\""),
            }
        });
        for target in ["/frozen/x", "/fresh/x", &format!("/blob/{}", sha256(&old))] {
            // A castier for each, as they share a body.
            let castier = before(&upstream, "");
            match Request::get(target).try_send(castier.public) {
                Ok(answer) => {
                    let is_whole = answer.status == 200 && (answer.body == old || (answer.body == new && !target.starts_with("/blob")));
                    assert!(is_whole || answer.status == 502, "the upstream {case}, {target}: {} {:?}", answer.status, answer.headers);
                }
                Err(_) => assert_ne!(case, "goes on", "{target}"),
            }
            if case == "goes on" {
                assert_eq!(upstream.count(|seen| seen.header("range").is_some() && seen.target == target), 1, "{}", upstream.history());
                let question = upstream.seen().into_iter().find(|seen| seen.header("range").is_some() && seen.target == target).unwrap();
                assert!(question.header("if-range").is_some_and(|tag| tag == "\"old\"") || target.starts_with("/blob"), "{question:?}");
            }
            upstream.take();
        }
    }
}

/// A coding is for those who asked for it, even if the upstream forgets to say that its answers differ.
#[test]
fn coded_bodies_are_for_those_who_asked() {
    let _turn = turn();
    let plain = noise(8, 3000);
    let coded = crate::pack::gzip(&plain);
    let (text, gz) = (plain.clone(), coded.clone());
    let upstream = Upstream::answering(move |request| {
        let wants = request.header("accept-encoding").is_some_and(|codings| codings.contains("gzip"));
        // Some code what they were asked not to.
        if wants || request.path().ends_with("always") {
            entity(request, "text/plain", &gz).with("Content-Encoding", "gzip")
        } else {
            entity(request, "text/plain", &text)
        }
    });
    let castier = before(&upstream, "");
    for kind in ["frozen", "fresh"] {
        for _ in 0..2 {
            let request = Request::get(&format!("/{kind}/x"));
            // Who takes gzip takes a plain body too.
            let answer = request.clone().with("Accept-Encoding", "gzip").send(castier.public);
            let is_coded = answer.header("content-encoding").as_deref() == Some("gzip");
            assert!(answer.status == 200 && answer.body == *if is_coded { &coded } else { &plain }, "{answer:?}");
            let answer = gets(castier.public, &request, &plain);
            assert_eq!(answer.header("content-encoding"), None);
        }
    }
    // A blob is its own bytes, and nothing else.
    gets(castier.public, &Request::get(&format!("/blob/{}", sha256(&plain))).with("Accept-Encoding", "gzip"), &plain);
    let upstream = Upstream::answering({
        let coded = coded.clone();
        move |request| entity(request, "text/plain", &coded).with("Content-Encoding", "gzip")
    });
    let castier = before(&upstream, "");
    let target = format!("/blob/{}", sha256(&plain));
    if let Ok(answer) = Request::get(&target).try_send(castier.public) {
        assert!(answer.status == 502 || (answer.status == 200 && answer.body == plain), "{answer:?}");
    }
}

/// Parts of a body, cold and kept, are what they say.
#[test]
fn parts_are_right() {
    let _turn = turn();
    let body = noise(9, 1_000_000);
    let bytes = body.clone();
    let upstream = Upstream::answering(move |request| entity(request, "text/plain", &bytes));
    let ranges = [
        ("0-0", 0..1),
        ("5-9", 5..10),
        ("999999-", 999_999..1_000_000),
        ("-10", 999_990..1_000_000),
        ("500000-2000000", 500_000..1_000_000),
    ];
    for (range, part) in ranges {
        // Each range once to a castier that has nothing.
        let castier = before(&upstream, "");
        for target in ["/frozen/x", "/fresh/x", &format!("/blob/{}", sha256(&body))] {
            for _ in 0..2 {
                let answer = Request::get(target).with("Range", &format!("bytes={range}")).send(castier.public);
                assert_eq!(answer.status, 206, "{target} {range}: {answer:?}");
                assert!(answer.body == body[part.clone()], "{target} {range}");
                let said = format!("bytes {}-{}/1000000", part.start, part.end - 1);
                assert_eq!(answer.header("content-range"), Some(said), "{target}");
            }
            let outside = Request::get(target).with("Range", "bytes=1000000-").send(castier.public);
            assert_eq!((outside.status, outside.header("content-range").as_deref()), (416, Some("bytes */1000000")), "{target}");
            let other = Request::get(target).with("Range", "bytes=0-0").with("If-Range", "\"another\"");
            gets(castier.public, &other, &body);
        }
    }
}

/// What is changed through castier is asked for again. Where a change says its new place, that leads back to castier.
#[test]
fn a_change_ends_what_is_kept() {
    let _turn = turn();
    let version = Arc::new(AtomicUsize::new(1));
    let (now, own) = (version.clone(), Arc::new(Mutex::new(String::new())));
    let url = own.clone();
    let upstream = Upstream::answering(move |request| match request.method.as_str() {
        "GET" | "HEAD" => entity(request, "text/plain", format!("version {}", now.load(Ordering::Relaxed)).as_bytes()),
        _ if request.body == b"refused" => Response::new(409).body("conflict"),
        _ => {
            now.fetch_add(1, Ordering::Relaxed);
            Response::new(201).with("Location", &format!("{}{}", url.lock().unwrap(), request.target)).body(request.body.clone())
        }
    });
    *own.lock().unwrap() = upstream.url();
    let castier = castier(&format!(
        "[[route]]\npath = \"/x/{{name*}}\"\nkind = \"frozen\"\nprefix = \"/here\"\nupstream = \"{}\"\nproof_ttl = \"1h\"\n",
        upstream.url()
    ));
    let get = || get(&castier, "/here/x/a").text();
    assert_eq!((get(), get()), ("version 1".to_owned(), "version 1".to_owned()));
    let put = |body: &str| Request::new("PUT", "/here/x/a").body(body).send(castier.public);
    let refused = put("refused");
    assert_eq!((refused.status, refused.text().as_str(), get().as_str()), (409, "conflict", "version 1"));
    let stored = put("new");
    assert_eq!((stored.status, stored.text().as_str()), (201, "new"));
    let location = stored.header("location").unwrap();
    assert!(location == "/here/x/a" || location == format!("{}/here/x/a", castier.url()), "{location}");
    assert_eq!((get(), get()), ("version 2".to_owned(), "version 2".to_owned()));
    Request::new("DELETE", "/here/x/a").send(castier.public);
    assert_eq!(get(), "version 3");
}

/// A header that names the digest of the body, and lies.
#[test]
fn a_digest_that_does_not_fit_is_refused() {
    let _turn = turn();
    let body = noise(3, 200_000);
    let digest = Arc::new(Mutex::new(sha256(b"something else")));
    let (said, bytes) = (digest.clone(), body.clone());
    let upstream = Upstream::answering(move |request| {
        entity(request, "text/plain", &bytes).with("X-Digest", &format!("sha256:{}", said.lock().unwrap()))
    });
    let castier = before(&upstream, "");
    for target in ["/frozen/x", "/fresh/x", &format!("/blob/{}", sha256(b"something else"))] {
        for _ in 0..2 {
            let status = refused(castier.public, &Request::get(target));
            assert!([0, 502].contains(&status), "{target}: {status}");
            let times = upstream.take().len();
            assert!((1..=2).contains(&times), "{target} is not kept, and fetched again at most once: {times}");
        }
    }
    *digest.lock().unwrap() = sha256(&body);
    for target in ["/frozen/x", "/fresh/x"] {
        gets(castier.public, &Request::get(target), &body);
    }
}

#[test]
fn a_body_over_the_limit_is_refused() {
    let _turn = turn();
    let body = noise(4, 100_000);
    let bytes = body.clone();
    let upstream = Upstream::answering(move |request| match request.path() {
        "/frozen/chunks" | "/fresh/chunks" => {
            Response::ok("text/plain", bytes.clone()).with("Connection", "close").with("Content-Length", "100000")
        }
        _ => entity(request, "text/plain", &bytes),
    });
    let castier = before(&upstream, "max_body = \"64KiB\"\n");
    for target in ["/frozen/x", "/fresh/x", "/frozen/chunks", "/fresh/chunks", &format!("/blob/{}", sha256(&body))] {
        let status = refused(castier.public, &Request::get(target));
        assert!([0, 502, 507, 413].contains(&status), "{target}: {status}");
    }
}

// ---- what is not kept ----

#[test]
fn what_may_not_be_kept_is_asked_for_each_time() {
    let _turn = turn();
    let serial = Mutex::new(0);
    let upstream = Upstream::answering(move |request| {
        let mut serial = serial.lock().unwrap();
        *serial += 1;
        let answer = Response::ok("text/plain", format!("answer {serial}"));
        let name = request.path().rsplit('/').next().unwrap();
        match name {
            "star" => answer.with("Vary", "*"),
            "star-in-list" => answer.with("Vary", "Accept").with("Vary", "*"),
            "no-store" => answer.with("Cache-Control", "max-age=3600, No-Store"),
            "no-store-later" => answer.with("Cache-Control", "public, max-age=3600").with("Cache-Control", "no-store"),
            "cookie" => answer.with("Cache-Control", "max-age=3600").with("Set-Cookie", &format!("session={serial}; Path=/")),
            _ => answer.with("Cache-Control", "max-age=3600"),
        }
    });
    let castier = castier(&routes(&upstream.url(), "").replace("ttl = \"0s\"\n", ""));
    for kind in ["frozen", "fresh"] {
        let twice = |name: &str| [0, 1].map(|_| get(&castier, &format!("/{kind}/{name}")));
        for name in ["star", "star-in-list", "no-store", "no-store-later"] {
            upstream.take();
            let [first, second] = twice(name);
            assert_eq!((first.status, second.status), (200, 200));
            assert_ne!(first.text(), second.text(), "{kind}/{name} was kept");
            assert_eq!(upstream.seen().len(), 2, "{kind}/{name}: {}", upstream.history());
        }
        // A cookie is for one client alone.
        let [first, second] = twice("cookie");
        let is_new = first.text() != second.text();
        assert!(is_new || second.header("set-cookie").is_none(), "{kind}: a cookie was kept: {second:?}");
        let [first, second] = twice("plain");
        assert_eq!(first.text(), second.text(), "{kind}: the others are kept");
    }
}

/// `Vary` of the upstream is honoured.
#[test]
fn answers_for_other_headers_are_kept_apart() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| {
        let language = request.header("accept-language").unwrap_or_default();
        entity(request, "text/plain", format!("in {language}").as_bytes())
            .with("Vary", "Accept-Language")
            .with("Cache-Control", "max-age=3600")
    });
    let castier = castier(&routes(&upstream.url(), "").replace("ttl = \"0s\"\n", ""));
    for kind in ["frozen", "fresh"] {
        for language in ["de", "fr", "de", "fr", ""] {
            let request = Request::get(&format!("/{kind}/x"));
            let request = if language.is_empty() { request } else { request.with("Accept-Language", language) };
            gets(castier.public, &request, format!("in {language}").as_bytes());
        }
        assert_eq!(upstream.take().len(), 3, "one for each language, and one for none");
    }
}

// ---- who may read ----

/// An upstream that has things for those with a token alone. To others it says 401, or below `/hidden` that there is no such thing.
fn guarded(body: &[u8]) -> Upstream {
    let body = body.to_vec();
    Upstream::answering(move |request| {
        let may =
            request.header("authorization").as_deref() == Some("Bearer good") || request.header("private-token").as_deref() == Some("good");
        if may || request.header("cookie").is_some_and(|cookie| cookie.contains("session=good")) {
            return entity(request, "text/plain", &body).with("Cache-Control", "max-age=3600");
        }
        if request.path().contains("hidden") { Response::new(404).body("not found") } else { Response::new(401).body("who are you?") }
    })
}

/// What is kept for those who may read it is not for others, however they ask.
#[test]
fn what_is_kept_is_for_those_who_may_read_it() {
    let _turn = turn();
    let body = noise(10, 100_000);
    let upstream = guarded(&body);
    let castier = castier(&routes(&upstream.url(), "negative_ttl = \"1h\"\n").replace("ttl = \"0s\"\n", "ttl = \"1h\"\n"));
    let blob = format!("/blob/{}", sha256(&body));
    for target in [blob.as_str(), "/frozen/x", "/fresh/x", "/frozen/hidden", "/fresh/hidden"] {
        let refusal = if target.contains("hidden") { 404 } else { 401 };
        let request = |method: &str| Request::new(method, target);
        let ask = |request: Request| request.send(castier.public);
        // Before and after somebody who may.
        for _ in 0..2 {
            assert_eq!(ask(request("GET")).status, refusal, "{target}");
            gets(castier.public, &request("GET").bearer("good"), &body);
        }
        let etag = ask(request("HEAD").bearer("good")).header("etag").expect("an ETag");
        for who in [None, Some("Bearer bad"), Some("Basic Z29vZDpnb29k"), Some("bearer  good"), Some("Bearer good, Bearer bad")] {
            for (name, value) in
                [("X", "x"), ("Range", "bytes=0-9"), ("If-None-Match", etag.as_str()), ("If-None-Match", "*"), ("If-Range", etag.as_str())]
            {
                for method in ["GET", "HEAD"] {
                    let request = request(method).with(name, value);
                    let request = if let Some(who) = who { request.with("Authorization", who) } else { request };
                    let answer = ask(request);
                    assert_eq!(answer.status, refusal, "{target} {who:?} {method} {name}: {:?}", answer.headers);
                    assert!(answer.body.len() < 100 && answer.header("etag").is_none(), "{target} {who:?} {method} {name}: {answer:?}");
                }
            }
        }
        // Without the upstream nobody new comes in.
        upstream.kill();
        gets(castier.public, &request("GET").bearer("good"), &body);
        let answer = ask(request("GET"));
        assert!(answer.status >= 400 && answer.body != body, "{target}: {answer:?}");
        upstream.up();
    }
}

/// What two lines of credentials open together, the first of them alone does not.
#[test]
fn two_lines_of_credentials_are_not_one() {
    let _turn = turn();
    let body = noise(14, 1000);
    let kept = body.clone();
    let upstream = Upstream::answering(move |request| {
        if request.headers.iter().any(|(name, value)| name.eq_ignore_ascii_case("authorization") && value == "Bearer good") {
            return entity(request, "text/plain", &kept);
        }
        Response::new(401).body("who are you?")
    });
    let castier = castier(&routes(&upstream.url(), ""));
    for target in ["/frozen/a", "/fresh/a", &format!("/blob/{}", sha256(&body))] {
        let both = Request::get(target).with("Authorization", "Bearer bad").with("Authorization", "Bearer good");
        gets(castier.public, &both, &body);
        assert_eq!(Request::get(target).bearer("bad").send(castier.public).status, 401, "{target}");
        assert_eq!(Request::get(target).send(castier.public).status, 401, "{target}");
    }
}

/// Other ways to say who one is: what they open is not kept for others. (They may also not get to the upstream at all.)
#[test]
fn other_credentials_open_nothing_for_others() {
    let _turn = turn();
    let body = noise(12, 1000);
    let upstream = guarded(&body);
    let castier = castier(&routes(&upstream.url(), "").replace("ttl = \"0s\"\n", "ttl = \"1h\"\n"));
    for (name, value) in [("Cookie", "session=good"), ("Private-Token", "good")] {
        for target in ["/frozen/a", "/fresh/a", &format!("/blob/{}", sha256(&body))] {
            let target = format!("{target}?{name}");
            for _ in 0..2 {
                Request::get(&target).with(name, value).send(castier.public);
                let answer = get(&castier, &target);
                assert_eq!(answer.status, 401, "{name} {target}: {answer:?}");
            }
        }
    }
}

/// Headers that are no part of a name do not choose what others get. (For the client's program and language the upstream should say `Vary`.)
#[test]
fn odd_request_headers_poison_nothing() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| {
        let headers: Vec<_> = request.headers.iter().filter(|(_, value)| value.contains("evil")).map(|(name, _)| name.as_str()).collect();
        entity(request, "text/plain", format!("for {headers:?}").as_bytes()).with("Cache-Control", "max-age=3600")
    });
    let castier = castier(&routes(&upstream.url(), "").replace("ttl = \"0s\"\n", "ttl = \"1h\"\n"));
    let headers = [
        "X-Forwarded-Host",
        "X-Forwarded-Proto",
        "X-Forwarded-For",
        "Forwarded",
        "X-Original-URL",
        "X-Rewrite-URL",
        "X-Host",
        "Host",
        "Origin",
        "Referer",
        "Cookie",
        "X-HTTP-Method-Override",
        "X-Custom",
        "True-Client-IP",
        "TE",
        "Pragma",
    ];
    for kind in ["frozen", "fresh"] {
        for header in headers {
            let target = format!("/{kind}/{header}");
            Request::get(&target).with(header, "evil").send(castier.public);
            gets(castier.public, &Request::get(&target), b"for []");
        }
    }
}

// ---- names ----

/// An upstream that says which target it got.
fn echo() -> Upstream {
    Upstream::answering(|request| entity(request, "text/plain", format!("target:{}", request.target).as_bytes()))
}

/// The target as castier compares it: unreserved characters without escapes, other escapes in upper case.
fn plain(target: &str) -> String {
    let (mut out, mut at) = (String::new(), 0);
    while at < target.len() {
        let code = target[at..].strip_prefix('%').and_then(|rest| u8::from_str_radix(rest.get(..2)?, 16).ok());
        match code {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => out.push(char::from(byte)),
            Some(byte) => out.push_str(&format!("%{byte:02X}")),
            None => out.push_str(&target[at..=at]),
        }
        at += if code.is_some() { 3 } else { 1 };
    }
    out
}

#[test]
fn strange_names_get_their_own_body_or_a_clear_refusal() {
    let _turn = turn();
    let upstream = echo();
    let castier = before(&upstream, "");
    let long = "a".repeat(8192);
    let many = "a/".repeat(2000);
    let names = [
        "..",
        "../fresh/x",
        "a/../../blob/x",
        "%2e%2e/x",
        ".%2E/x",
        "a/./b",
        "a//b",
        "a/b",
        "a%2fb",
        "a%2Fb",
        "a%252fb",
        "a%5cb",
        "a\\b",
        "a;b",
        "%00",
        "%0d%0aX-Injected:%20yes",
        "%zz",
        "%",
        "%e4%b8%ad",
        "%7Ea",
        "~a",
        "a?b=c",
        "a?b=../..",
        "a?",
        "a%3Fb=c",
        "a+b",
        "a%20b",
        "a#b",
        &long,
        &many,
    ];
    for round in 0..2 {
        for kind in ["frozen", "fresh"] {
            for name in names {
                let target = format!("/{kind}/{name}");
                let Ok(answer) = Request::get(&target).try_send(castier.public) else { panic!("{target}: no answer") };
                let short = &target[..target.len().min(60)];
                if answer.status != 200 {
                    assert!([400, 403, 404, 414, 431].contains(&answer.status), "{short}: {} {}", answer.status, answer.text());
                    continue;
                }
                let got = answer.text().strip_prefix("target:").unwrap_or_else(|| panic!("{short}: {}", answer.text())).to_owned();
                // What is behind `#` never belongs to a target.
                let wanted = target.split('#').next().unwrap();
                // A segment `.` means nothing.
                assert_eq!(plain(&got), plain(&wanted.replace("/./", "/")), "{short}, round {round}");
                assert_eq!(answer.header("x-injected"), None);
            }
        }
    }
    // What is usual works.
    for name in ["a/b", "a%2fb", "~a", "a?b=c", "a%20b", "%e4%b8%ad"] {
        assert_eq!(get(&castier, &format!("/frozen/{name}")).status, 200, "{name}");
    }
    // No name reached the upstream changed.
    for seen in upstream.take() {
        let mut known = names.iter().map(|name| name.split('#').next().unwrap());
        let known = known.any(|name| seen.target == format!("/frozen/{name}") || seen.target == format!("/fresh/{name}"));
        assert!(known, "{}", seen.target);
    }
}

/// A request for another host is not a way through castier.
#[test]
fn castier_is_no_open_proxy() {
    let _turn = turn();
    let (upstream, secret) = (echo(), echo());
    let castier = before(&upstream, "");
    for target in [format!("{}/x", secret.url()), format!("{}/frozen/x", secret.url()), "http://metadata.invalid/frozen/x".to_owned()] {
        assert_clear(&get(&castier, &target), &[403]);
    }
    let answer = Request::new("CONNECT", &secret.addr().to_string()).try_send(castier.public);
    assert!(answer.is_ok_and(|answer| (400..600).contains(&answer.status)));
    assert!(secret.seen().is_empty());
}

/// The links of a page have the client's `Host`. It cannot break out of them.
#[test]
fn a_host_cannot_break_out_of_a_link() {
    let _turn = turn();
    let page = Arc::new(Mutex::new(String::new()));
    let text = page.clone();
    let upstream = Upstream::answering(move |request| {
        let kind = if request.path().starts_with("/simple") { "text/html" } else { "application/json" };
        entity(request, kind, text.lock().unwrap().as_bytes()).with("Cache-Control", "max-age=3600")
    });
    let link = format!("{}/packages/x-1.0.tgz", upstream.url());
    let config = "[[route]]\nprotocol = \"pypi\"\nprefix = \"/py\"\nupstream = \"URL\"\n[[route]]\nprotocol = \"npm\"\nprefix = \"/npm\"\nupstream = \"URL\"\n";
    let castier = castier(&config.replace("URL", &upstream.url()));
    let hosts =
        ["x\"><script>alert(1)</script>", "x'><b>", "x\",\"evil\":\"1", "a b", "user@evil.test", "evil.test/path", "evil.test#", "x\\", ""];
    for (target, document) in [
        ("/py/simple/x/", format!("<a href=\"{link}\">x</a><a href='{link}'>x</a>")),
        ("/npm/x", format!("{{\"versions\":{{\"1\":{{\"dist\":{{\"tarball\":\"{link}\"}}}}}}}}")),
    ] {
        page.lock().unwrap().clone_from(&document);
        for host in hosts {
            let Ok(answer) = Request::get(target).with("Host", host).try_send(castier.public) else { continue };
            if answer.status != 200 {
                assert_eq!(answer.status, 400, "{host:?}: {answer:?}");
                continue;
            }
            let text = answer.text();
            assert!(!text.contains("<script>") && !text.contains("<b>"), "{host:?}: {text}");
            if target.starts_with("/npm") {
                assert_eq!(answer.json()["versions"]["1"]["dist"].as_object().unwrap().len(), 1, "{host:?}: {text}");
            }
        }
        // An ordinary client still gets its own.
        assert!(get(&castier, target).text().contains(&castier.url()));
    }
}

// ---- upstreams that fail ----

/// An upstream that answers with this status: 200 as it should.
fn failing() -> (Upstream, Arc<AtomicU16>) {
    let status = Arc::new(AtomicU16::new(200));
    let now = status.clone();
    let upstream = Upstream::answering(move |request| match now.load(Ordering::Relaxed) {
        200 => entity(request, "text/plain", b"as it should be"),
        status => {
            Response::new(status).with("Content-Type", "text/plain").with("Retry-After", "7").body(format!("the upstream says {status}"))
        }
    });
    (upstream, status)
}

#[test]
fn an_old_answer_is_better_than_an_error() {
    let _turn = turn();
    let (upstream, status) = failing();
    let keys = "stale_if_error = \"1h\"\nnegative_ttl = \"0s\"\n";
    let castier = castier(&format!("origin.read_timeout = \"1s\"\n{}", routes(&upstream.url(), keys)));
    gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    for code in [429, 500, 502, 503, 504, 0] {
        if code == 0 {
            upstream.kill();
        }
        status.store(code, Ordering::Relaxed);
        let stale = gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
        assert!(
            stale.cache_status().starts_with("castier; ") && stale.cache_status().contains("stale"),
            "{code}: {}",
            stale.cache_status()
        );
        assert!(stale.header("age").is_some(), "{code}: {:?}", stale.headers);
        // Without an old answer, the error is the upstream's own.
        let error = get(&castier, "/fresh/unknown");
        if code == 0 {
            assert_clear(&error, &[502, 503, 504]);
        } else {
            assert_eq!((error.status, error.text()), (code, format!("the upstream says {code}")));
            assert_eq!(error.header("retry-after").as_deref(), Some("7"), "{code}");
        }
    }
    // Nor does one that says nothing hold anybody up for ever.
    upstream.up();
    upstream.hang();
    let stale = gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    assert!(stale.cache_status().contains("stale"), "{}", stale.cache_status());
    upstream.up();
    status.store(200, Ordering::Relaxed);
    let fresh = gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    assert!(fresh.cache_status().contains("fwd-status=304"), "{}", fresh.cache_status());
    // Other statuses are news, and no failure.
    for code in [404, 410, 403] {
        status.store(code, Ordering::Relaxed);
        assert_eq!(get(&castier, "/fresh/x").status, code);
    }
}

/// An upstream that hangs is not waited for by everybody: after some failures in a row its requests fail at once, and one of them tries again.
#[test]
fn an_upstream_that_hangs_has_a_circuit_breaker() {
    let _turn = turn();
    let (upstream, _) = failing();
    let config = "origin.read_timeout = \"300ms\"\norigin.breaker_failures = 2\norigin.breaker_pause = \"1s\"\n";
    let castier = castier(&format!("{config}{}", routes(&upstream.url(), "negative_ttl = \"0s\"\n")));
    gets(castier.public, &Request::get("/frozen/x"), b"as it should be");
    let breaker = || Request::get("/stats").send(castier.admin).json()["routes"][1]["breaker"].as_str().unwrap().to_owned();
    let state = |state: &str| castier.metric("castier_circuit_breakers", &["source=\"upstream\"", &format!("state=\"{state}\"")]);
    assert_eq!((breaker().as_str(), state("open"), state("half-open")), ("closed", 0.0, 0.0));
    upstream.hang();
    let (mut number, mut asked) = (0, 0);
    let refused = eventually("the breaker opens", || {
        number += 1;
        let answer = get(&castier, &format!("/frozen/new-{number}"));
        assert_clear(&answer, &[502, 503, 504]);
        asked += usize::from(!answer.cache_status().contains("detail=breaker"));
        answer.cache_status().contains("detail=breaker").then_some(answer)
    });
    assert_eq!((refused.status, refused.header("retry-after").as_deref()), (502, Some("1")));
    assert_eq!((breaker().as_str(), state("open")), ("open", 1.0));
    assert!(asked >= 2, "{asked}");
    // What is relayed says that it is no question to the cache.
    let relayed = eventually("a relayed request is refused", || {
        let answer = Request::new("POST", "/frozen/new").body("x").send(castier.public);
        answer.cache_status().contains("detail=breaker").then_some(answer)
    });
    assert_eq!(relayed.cache_status(), "castier; fwd=bypass; detail=breaker");
    // What is kept does not need it.
    gets(castier.public, &Request::get("/frozen/x"), b"as it should be");
    upstream.up();
    eventually("the breaker closes", || (get(&castier, "/frozen/later").status == 200).then_some(()));
    assert_eq!((breaker().as_str(), state("open"), state("half-open")), ("closed", 0.0, 0.0));
}

/// Errors are not kept, and an old answer is not served for longer than it may be.
#[test]
fn an_old_answer_has_its_time() {
    let _turn = turn();
    let (upstream, status) = failing();
    let castier = before(&upstream, "stale_if_error = \"1s\"\n");
    gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    status.store(503, Ordering::Relaxed);
    eventually("the old answer is too old", || (get(&castier, "/fresh/x").status == 503).then_some(()));
    status.store(200, Ordering::Relaxed);
    gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    // Without that time, never.
    let (upstream, status) = failing();
    let castier = before(&upstream, "stale_if_error = \"0s\"\n");
    gets(castier.public, &Request::get("/fresh/x"), b"as it should be");
    status.store(500, Ordering::Relaxed);
    assert_eq!(get(&castier, "/fresh/x").status, 500);
    upstream.kill();
    assert_clear(&get(&castier, "/fresh/x"), &[502, 503, 504]);
}

/// By RFC 9211, an answer is a hit or it was forwarded for, and a validated one was forwarded for.
#[test]
fn a_hit_was_not_forwarded() {
    let _turn = turn();
    let (upstream, status) = failing();
    let castier = before(&upstream, "");
    for code in [200, 200, 503] {
        status.store(code, Ordering::Relaxed);
        let said = get(&castier, "/fresh/x").cache_status();
        assert!(!(said.contains("; hit") && said.contains("; fwd=")), "{code}: {said}");
    }
}

#[test]
fn the_age_is_told() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| {
        let answer = entity(request, "text/plain", b"x").with("Cache-Control", "max-age=3600");
        if request.path().ends_with("/old") { answer.with("Age", "100") } else { answer }
    });
    let castier = castier(&routes(&upstream.url(), "").replace("ttl = \"0s\"\n", ""));
    let age = |name: &str| get(&castier, name).header("age").and_then(|age| age.parse::<u64>().ok());
    for kind in ["frozen", "fresh"] {
        let (new, old) = (format!("/{kind}/new"), format!("/{kind}/old"));
        assert!(age(&new).is_none_or(|age| age < 60));
        eventually("a hit has an age", || age(&new).filter(|age| (1..60).contains(age)));
        age(&old);
        let old = age(&old);
        assert!(old.is_some_and(|age| (100..200).contains(&age)), "{kind}: {old:?}");
    }
}

/// An absence is remembered for its time, in the upstream's own words.
#[test]
fn an_absence_is_remembered_for_its_time() {
    let _turn = turn();
    let (upstream, status) = failing();
    for (ttl, times) in [("1h", 1), ("0s", 3)] {
        let castier = before(&upstream, &format!("negative_ttl = \"{ttl}\"\n"));
        for code in [404, 410] {
            status.store(code, Ordering::Relaxed);
            for target in [format!("/frozen/{code}"), format!("/fresh/{code}"), format!("/blob/{}", sha256(format!("{code}").as_bytes()))] {
                upstream.take();
                for _ in 0..3 {
                    let answer = get(&castier, &target);
                    assert_eq!((answer.status, answer.text()), (code, format!("the upstream says {code}")), "{target}");
                }
                assert_eq!(upstream.seen().len(), times, "{ttl} {target}: {}", upstream.history());
            }
        }
        // Nothing else is remembered.
        for code in [400, 403, 451, 500] {
            status.store(code, Ordering::Relaxed);
            upstream.take();
            for _ in 0..2 {
                assert_eq!(get(&castier, &format!("/frozen/{code}")).status, code);
            }
            assert_eq!(upstream.take().len(), 2, "{code}");
        }
    }
    // By default it is soon forgotten.
    let castier = before(&upstream, "");
    status.store(404, Ordering::Relaxed);
    assert_eq!(get(&castier, "/frozen/later").status, 404);
    status.store(200, Ordering::Relaxed);
    eventually("what has appeared is found", || (get(&castier, "/frozen/later").status == 200).then_some(()));
}

/// What came through a route that asks for credentials is not to be had at `/cas`.
#[test]
fn the_store_does_not_show_what_came_through_a_route() {
    let _turn = turn();
    let body = noise(5, 5000);
    let bytes = body.clone();
    let upstream = Upstream::answering(move |request| entity(request, "text/plain", &bytes));
    let castier = before(&upstream, "access = \"upstream\"\n");
    let digest = sha256(&body);
    gets(castier.public, &Request::get(&format!("/blob/{digest}")).bearer("t"), &body);
    gets(castier.public, &Request::get("/frozen/x").bearer("t"), &body);
    let cas = format!("/cas/{digest}");
    for request in [Request::get(&cas), Request::head(&cas), Request::get(&cas).bearer("t"), Request::get(&cas).with("Range", "bytes=0-0")]
    {
        assert_eq!(request.send(castier.public).status, 404);
    }
    // Who has the bytes may store them, and then they are there.
    assert_eq!(Request::new("PUT", &cas).body(body.clone()).send(castier.public).status, 201);
    gets(castier.public, &Request::get(&cas), &body);
}
