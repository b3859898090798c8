//! Who may come in: TLS, users, tokens, certificates, the PROXY protocol, and limits per client; with curl and openssl.

use crate::support::{Castier, People, Request, Response, castier, castier_program, command, eventually, noise, run, sha256, tool, turn};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};
use tempfile::TempDir;

/// An authority and what it has signed, in files.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "authority");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, dir }
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// A certificate for these hosts and this common name, and its key: `NAME.pem` and `NAME.key` in `into`.
    pub(crate) fn certify(&self, name: &str, hosts: &[&str], into: &Path) -> (PathBuf, PathBuf) {
        self.certify_until(name, hosts, into, None)
    }

    /// As [`Self::certify`]. `years`: from the first to the second.
    fn certify_until(&self, name: &str, hosts: &[&str], into: &Path, years: Option<(i32, i32)>) -> (PathBuf, PathBuf) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        if let Some((from, to)) = years {
            (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = (into.join(format!("{name}.pem")), into.join(format!("{name}.key")));
        fs::write(&files.0, certificate.pem()).unwrap();
        fs::write(&files.1, key.serialize_pem()).unwrap();
        files
    }
}

pub(crate) struct Curl {
    program: PathBuf,
    pub(crate) dir: TempDir,
}

impl Curl {
    pub(crate) fn find() -> Option<Self> {
        Some(Self { program: tool("curl")?, dir: TempDir::new().unwrap() })
    }

    /// The status (`000` without an answer) and the body.
    pub(crate) fn get(&self, arguments: &[&str], url: &str) -> (String, Vec<u8>) {
        let body = self.dir.path().join("body");
        fs::remove_file(&body).ok();
        let mut curl = command(&self.program, self.dir.path());
        let ran = run(curl.args(["-s", "-m", "20", "-o", "body", "-w", "%{http_code}"]).args(arguments).arg(url));
        (ran.stdout.trim().to_owned(), fs::read(body).unwrap_or_default())
    }
}

fn put(castier: &Castier, body: &[u8]) -> String {
    let target = format!("/cas/{}", sha256(body));
    assert_eq!(Request::new("PUT", &target).body(body).send(castier.public).status, 201);
    target
}

/// The lines of a configuration that name a certificate and its key.
pub(crate) fn tls_config((cert, key): &(PathBuf, PathBuf), more: &str) -> String {
    format!("listen.tls.cert_file = {cert:?}\nlisten.tls.key_file = {key:?}\n{more}\n")
}

pub(crate) fn https(castier: &Castier, target: &str) -> String {
    format!("https://127.0.0.1:{}{target}", castier.public.port())
}

#[test]
fn tls_with_several_names() {
    let _turn = turn();
    let (Some(curl), Some(openssl)) = (Curl::find(), tool("openssl")) else { return };
    let (authority, other, dir) = (Authority::new(), Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1", "a.test"], dir.path());
    let (cert, key) = other.certify("other", &["b.test", "*.c.test"], dir.path());
    let more = format!("listen.tls.more = [\"{} {}\"]", cert.display(), key.display());
    let castier = castier(&tls_config(&own, &more));
    let body = noise(700, 300_000);
    let target = format!("/cas/{}", sha256(&body));
    let (ca, other_ca) = (authority.ca(), other.ca());
    let (ca, other_ca) = (ca.to_str().unwrap(), other_ca.to_str().unwrap());
    fs::write(curl.dir.path().join("sent"), &body).unwrap();
    assert_eq!(curl.get(&["--cacert", ca, "-T", "sent"], &https(&castier, &target)).0, "201");
    for version in [&["--tls-max", "1.2"][..], &["--tlsv1.3"], &[]] {
        let arguments = [&["--cacert", ca], version].concat();
        assert_eq!(curl.get(&arguments, &https(&castier, &target)), ("200".into(), body.clone()), "{version:?}");
    }
    assert_eq!(curl.get(&["--cacert", ca, "--tls-max", "1.1"], &https(&castier, &target)).0, "000");
    // The certificate is chosen by the name; who asks for an unknown one gets the first.
    let port = castier.public.port();
    for (host, authority, status) in [
        ("a.test", ca, "200"),
        ("b.test", other_ca, "200"),
        ("x.c.test", other_ca, "200"),
        ("b.test", ca, "000"),
        ("x.y.c.test", other_ca, "000"),
    ] {
        let resolve = format!("{host}:{port}:127.0.0.1");
        assert_eq!(
            curl.get(&["--cacert", authority, "--resolve", &resolve], &format!("https://{host}:{port}{target}")).0,
            status,
            "{host}"
        );
    }
    // Plain HTTP gets an answer that says so.
    let plain = Request::get(&target).send(castier.public);
    assert_eq!((plain.status, plain.text().contains("https")), (400, true), "{}", plain.text());
    // Sessions are resumed.
    for version in ["-tls1_2", "-tls1_3"] {
        let mut first = Command::new("sh");
        let connect = format!("{} s_client -connect 127.0.0.1:{port} {version} -ign_eof", openssl.display());
        let script = format!("printf 'GET /healthz HTTP/1.1\\r\\nHost: a\\r\\nConnection: close\\r\\n\\r\\n' | {connect}");
        let session = dir.path().join(version);
        let said = run(first.args(["-c", &format!("{script} -sess_out {}", session.display())]));
        assert!(said.stdout.contains("New, TLS"), "{}", said.stdout);
        let said = run(Command::new("sh").args(["-c", &format!("{script} -sess_in {}", session.display())]));
        assert!(said.stdout.contains("Reused, TLS"), "{version}: {}", said.stdout);
    }
    // A connection that says nothing is closed by limits.header_timeout, and one that talks nonsense at once.
    let mut stranger = TcpStream::connect(castier.public).unwrap();
    stranger.write_all(b"\x16\x03\x01\x00\x05hello").unwrap();
    let mut all = Vec::new();
    stranger.read_to_end(&mut all).ok();
    assert!(!all.starts_with(b"HTTP"));
}

#[test]
fn certificates_are_read_again() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    let (authority, other, dir) = (Authority::new(), Authority::new(), TempDir::new().unwrap());
    for (name, authority) in [("one", &authority), ("two", &other)] {
        fs::create_dir(dir.path().join(name)).unwrap();
        authority.certify("tls", &["127.0.0.1"], &dir.path().join(name));
    }
    // As Kubernetes does it: the files are links into a directory which is itself a link.
    let current = dir.path().join("current");
    symlink("one", &current).unwrap();
    let castier = castier(&tls_config(&(current.join("tls.pem"), current.join("tls.key")), ""));
    let status = |authority: &Authority| curl.get(&["--cacert", authority.ca().to_str().unwrap()], &https(&castier, "/nothing")).0;
    assert_eq!((status(&authority).as_str(), status(&other).as_str()), ("404", "000"));
    let expiry = castier.metric("castier_tls_certificate_expiry_seconds", &["listener=\"public\""]);
    assert!(expiry > 1.7e9, "{expiry}");

    // A broken pair changes nothing, and is told.
    fs::create_dir(dir.path().join("broken")).unwrap();
    let (cert, _) = authority.certify("tls", &["127.0.0.1"], &dir.path().join("broken"));
    fs::copy(dir.path().join("one/tls.key"), dir.path().join("broken/tls.key")).unwrap();
    assert!(cert.exists());
    let swap = |to: &str| {
        let next = dir.path().join("next");
        symlink(to, &next).unwrap();
        fs::rename(next, &current).unwrap();
    };
    // Nor does one that has expired.
    fs::create_dir(dir.path().join("expired")).unwrap();
    authority.certify_until("tls", &["127.0.0.1"], &dir.path().join("expired"), Some((2001, 2002)));
    for (number, name) in [(1.0, "broken"), (2.0, "expired")] {
        swap(name);
        eventually("it is told of", || {
            (castier.metric("castier_tls_reload_failures_total", &["listener=\"public\""]) >= number).then_some(())
        });
        assert_eq!(status(&authority), "404");
    }
    swap("two");
    eventually("the new pair is in use", || (status(&other) == "404").then_some(()));
    assert_eq!(status(&authority), "000");
}

#[test]
fn client_certificates_have_a_role() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    let (authority, stranger, dir) = (Authority::new(), Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1"], dir.path());
    authority.certify("reader", &[], dir.path());
    authority.certify("writer", &[], dir.path());
    stranger.certify("stranger", &[], dir.path());
    let config = |required: bool| {
        tls_config(
            &own,
            &format!(
                "listen.tls.client_ca_file = {:?}\nlisten.tls.client_required = {required}\naccess.anonymous = \"none\"\naccess.scopes = {{ writer = [\"write:*\"] }}",
                authority.ca()
            ),
        )
    };
    let castier = castier(&config(false));
    let ca = authority.ca();
    let ask = |castier: &Castier, name: Option<&str>, method: &str| {
        let file = |end: &str| dir.path().join(format!("{}.{end}", name.unwrap_or_default())).to_str().unwrap().to_owned();
        let (cert, key) = (file("pem"), file("key"));
        let mut arguments = vec!["--cacert", ca.to_str().unwrap(), "-X", method];
        if name.is_some() {
            arguments.extend(["--cert", &cert, "--key", &key]);
        }
        curl.get(&arguments, &https(castier, &format!("/cas/{}", sha256(b"")))).0
    };
    assert_eq!(ask(&castier, None, "GET"), "401");
    assert_eq!(ask(&castier, Some("reader"), "GET"), "200");
    assert_eq!(ask(&castier, Some("reader"), "PUT"), "403");
    assert_eq!(ask(&castier, Some("writer"), "PUT"), "201");
    assert_eq!(ask(&castier, Some("writer"), "DELETE"), "403");
    assert_eq!(ask(&castier, Some("stranger"), "GET"), "000");
    let castier = castier.restart(&config(true));
    assert_eq!(ask(&castier, None, "GET"), "000");
    assert_eq!(ask(&castier, Some("reader"), "GET"), "200");
}

/// A client certificate counts as long as its authority does: not longer for who resumes a session, or keeps a connection open.
#[test]
fn a_client_certificate_ends_with_its_authority() {
    let _turn = turn();
    let (Some(curl), Some(openssl)) = (Curl::find(), tool("openssl")) else { return };
    let (authority, next, dir) = (Authority::new(), Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1"], dir.path());
    let (cert, key) = authority.certify("old", &[], dir.path());
    let trusted = dir.path().join("trusted.pem");
    fs::copy(authority.ca(), &trusted).unwrap();
    let config = format!("listen.tls.client_ca_file = {trusted:?}\naccess.anonymous = \"none\"\nlog.level = \"info\"\n");
    let castier = castier(&tls_config(&own, &config));
    let port = castier.public.port();
    let request = format!("GET /cas/{} HTTP/1.1\r\nHost: a\r\n", sha256(b""));
    let certificate = format!("-cert {} -key {}", cert.display(), key.display());
    // Nobody gets a session that could be resumed.
    for version in ["-tls1_2", "-tls1_3"] {
        let session = dir.path().join(version);
        let connect = format!("{} s_client -connect 127.0.0.1:{port} {certificate} {version} -ign_eof", openssl.display());
        let script = format!("printf '{}Connection: close\r\n\r\n' | {connect}", request.replace("\r\n", "\\r\\n"));
        let said = run(Command::new("sh").args(["-c", &format!("{script} -sess_out {}", session.display())]));
        assert!(said.stdout.contains("HTTP/1.1 200") && !session.exists(), "{}", said.stdout);
    }
    let connect = |alpn: &str| {
        let mut open = Command::new(&openssl)
            .args(["s_client", "-quiet", "-no_ign_eof", "-alpn", alpn, "-connect", &format!("127.0.0.1:{port}")])
            .args(certificate.split(' '))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (say, hear) = (open.stdin.take().unwrap(), BufReader::new(open.stdout.take().unwrap()));
        (open, say, hear)
    };
    let (one, mut say, mut hear) = connect("http/1.1");
    let mut ask = || {
        say.write_all(format!("{request}\r\n").as_bytes()).unwrap();
        let (mut status, mut line) = (String::new(), String::new());
        while line != "\r\n" {
            line.clear();
            assert!(hear.read_line(&mut line).unwrap() > 0, "the connection is closed");
            if line.starts_with("HTTP/1.1") {
                status = line[9..12].to_owned();
            }
        }
        status
    };
    // HTTP/2 with its frames made by hand: a GET, and then what comes until it is answered and, if so wanted, until GOAWAY.
    let (two, mut say2, mut hear2) = connect("h2");
    say2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
    let mut ask2 = |stream: u8, until_goaway: bool| {
        let path = format!("/cas/{}", sha256(b""));
        // `:method: GET`, `:scheme: https`, and two literals: `:path` and `:authority`.
        let block = [&[0x82, 0x87, 0x04, u8::try_from(path.len()).unwrap()], path.as_bytes(), &[0x01, 1, b'a']].concat();
        say2.write_all(&[&[0, 0, u8::try_from(block.len()).unwrap(), 1, 5, 0, 0, 0, stream], &block[..]].concat()).unwrap();
        let (mut answer, mut goaway) = (Vec::new(), false);
        while answer.is_empty() || (until_goaway && !goaway) {
            let mut head = [0; 9];
            hear2.read_exact(&mut head).unwrap();
            let mut payload = vec![0; usize::from(head[1]) * 256 + usize::from(head[2])];
            hear2.read_exact(&mut payload).unwrap();
            match head[3] {
                1 if head[8] == stream => answer = payload,
                7 => goaway = true,
                _ => {}
            }
        }
        answer
    };
    assert_eq!((ask(), ask()), ("200".into(), "200".into()));
    // `:status: 200` is in the table of HPACK.
    assert_eq!(ask2(1, false)[0], 0x88);
    // One authority more takes nothing away.
    let loads = |count: usize| {
        eventually("the file is read again", || {
            (castier.log().matches("the changed certificates are in use").count() == count).then_some(())
        })
    };
    fs::write(&trusted, [fs::read(authority.ca()).unwrap(), fs::read(next.ca()).unwrap()].concat()).unwrap();
    loads(1);
    assert_eq!((ask(), ask2(3, false)[0]), ("200".into(), 0x88));
    fs::copy(next.ca(), &trusted).unwrap();
    loads(2);
    assert_ne!(ask2(5, true)[0], 0x88, "an open connection of HTTP/2, which is told to end");
    assert_eq!(ask(), "401", "an open connection");
    for mut open in [one, two] {
        open.kill().ok();
        open.wait().unwrap();
    }
    let with =
        ["--cacert", authority.ca().to_str().unwrap(), "--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()].map(str::to_owned);
    let with: Vec<&str> = with.iter().map(String::as_str).collect();
    assert_eq!(curl.get(&with, &https(&castier, "/cas/x")).0, "000", "a new one");
}

#[test]
fn the_admin_listener_takes_client_certificates() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1"], dir.path());
    authority.certify("reader", &[], dir.path());
    authority.certify("boss", &[], dir.path());
    let more = format!(
        "listen.tls.client_ca_file = {:?}\nlisten.tls.admin = true\naccess.admin = true\naccess.anonymous = \"none\"\naccess.scopes = {{ boss = [\"admin:*\"] }}",
        authority.ca()
    );
    let castier = castier(&tls_config(&own, &more));
    let ask = |name: &str, arguments: &[&str], target: &str| {
        let [ca, cert, key] = [authority.ca(), dir.path().join(format!("{name}.pem")), dir.path().join(format!("{name}.key"))]
            .map(|path| path.to_str().unwrap().to_owned());
        let shows = if name.is_empty() { vec![] } else { vec!["--cert", cert.as_str(), "--key", &key] };
        curl.get(&[&["--cacert", &ca], &shows[..], arguments].concat(), &format!("https://{}{target}", castier.admin)).0
    };
    let purge = format!("/purge/{}", sha256(b""));
    assert_eq!(ask("", &[], "/stats"), "401");
    assert_eq!(ask("reader", &[], "/stats"), "200");
    assert_eq!(ask("reader", &["-X", "POST"], &purge), "403");
    assert_eq!(ask("boss", &["-X", "POST"], &purge), "200");
}

/// Without a log-in the name of any site can lead a browser to the loopback.
#[test]
fn a_browser_asks_the_admin_listener_by_address() {
    let _turn = turn();
    let castier = castier("");
    for (host, header, status) in [
        ("castier.example:8082", Some("Origin"), 403),
        ("castier.example", Some("Sec-Fetch-Site"), 403),
        ("castier.example:8082", None, 200),
        ("127.0.0.1:8082", Some("Origin"), 200),
        ("[::1]:8082", Some("Origin"), 200),
        ("localhost", Some("Sec-Fetch-Site"), 200),
        ("LocalHost:8082", Some("Origin"), 200),
        ("localhost.example", Some("Origin"), 403),
    ] {
        let mut request = Request::new("POST", &format!("/purge/{}", sha256(b""))).with("Host", host);
        if let Some(name) = header {
            let origin = format!("http://{host}");
            request = request.with(name, if name == "Origin" { &origin } else { "same-origin" });
        }
        assert_eq!(request.send(castier.admin).status, status, "{host} {header:?}");
    }
}

/// A body that does not come keeps nobody else out.
#[test]
fn the_admin_listener_does_not_wait_for_bodies() {
    let _turn = turn();
    let castier = castier("limits.max_admin_connections = 4\nlimits.header_timeout = \"1s\"\n");
    let mut stuck: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = TcpStream::connect(castier.admin).unwrap();
            stream.write_all(b"POST /purge HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\n").unwrap();
            stream
        })
        .collect();
    let mut answer = String::new();
    stuck[0].read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    eventually("a health check is answered", || (Request::get("/healthz").try_send(castier.admin).ok()?.status == 200).then_some(()));
}

fn is_refused(answer: &Response, status: u16) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("content-type").as_deref(), Some("application/problem+json"));
    for secret in ["read me", "s:e:c", "t0ken", "b0ss", "reader", "writer"] {
        assert!(!answer.text().contains(secret), "{}", answer.text());
    }
}

#[test]
fn users_and_tokens_have_roles_and_scopes() {
    let _turn = turn();
    let people = People::new();
    let castier = castier(&people.config("none", ""));
    let body = b"a blob";
    let blob = format!("/cas/{}", sha256(body));
    let put = || Request::new("PUT", &blob).body(&body[..]);
    let nobody = Request::get(&blob).send(castier.public);
    is_refused(&nobody, 401);
    assert_eq!(nobody.header("www-authenticate").as_deref(), Some("Basic realm=\"castier\", Bearer realm=\"castier\""));
    is_refused(&put().basic("reader", "read me").send(castier.public), 403);
    assert_eq!(put().basic("writer", "s:e:c").send(castier.public).status, 201);
    assert_eq!(put().bearer("t0ken").send(castier.public).status, 200);
    for good in
        [Request::get(&blob).basic("reader", "read me"), Request::get(&blob).bearer("pull-t0ken"), Request::get(&blob).bearer("b0ss")]
    {
        assert_eq!(good.send(castier.public).body, body);
    }
    for bad in [
        Request::get(&blob).basic("reader", "wrong"),
        Request::get(&blob).basic("nobody", "read me"),
        Request::get(&blob).bearer("wrong"),
        Request::get(&blob).with("Authorization", "Digest x"),
        Request::get(&blob).with("Authorization", "Basic !"),
        Request::get(&blob).bearer("b0ss").with("Authorization", "Bearer b0ss"),
    ] {
        is_refused(&bad.send(castier.public), 401);
    }
    is_refused(&Request::new("DELETE", &blob).bearer("t0ken").send(castier.public), 403);
    assert_eq!(Request::new("DELETE", &blob).bearer("b0ss").send(castier.public).status, 204);
    // A build of a pull request reads everything, and writes its own action cache.
    let entry = |name: &str| Request::new("PUT", &format!("/{name}/{}", "0".repeat(64))).body("x").basic("ci", "pull");
    assert_eq!(entry("ci/ac").send(castier.public).status, 201);
    is_refused(&entry("ac").send(castier.public), 403);
    is_refused(&entry("other/ac").send(castier.public), 403);
    is_refused(&put().basic("ci", "pull").send(castier.public), 403);
    assert_eq!(Request::get(&format!("/ci/ac/{}", "0".repeat(64))).basic("ci", "pull").send(castier.public).status, 200);
    is_refused(&Request::get(&format!("/ci/ac/{}", "0".repeat(64))).send(castier.public), 401);
    is_refused(&Request::get("/kv/a").send(castier.public), 401);
    is_refused(&Request::get("/unknown").send(castier.public), 401);
    let registry = Request::get("/v2/").send(castier.public);
    assert_eq!(registry.header("www-authenticate").as_deref(), Some("Basic realm=\"castier\""));
    assert_eq!(registry.header("docker-distribution-api-version").as_deref(), Some("registry/2.0"));
    for (reason, least) in [("missing", 5.0), ("credentials", 5.0), ("role", 5.0)] {
        let counted = castier.metric("castier_denied_requests_total", &[&format!("reason=\"{reason}\"")]);
        assert!(counted >= least, "{reason}: {counted}");
    }
}

#[test]
fn anonymous_clients_may_read_and_the_files_are_read_again() {
    let _turn = turn();
    let people = People::new();
    let castier = castier(&people.config("read", ""));
    let body = b"a blob";
    let blob = format!("/cas/{}", sha256(body));
    let put = |user: &str, password: &str| Request::new("PUT", &blob).body(&body[..]).basic(user, password).send(castier.public).status;
    is_refused(&Request::new("PUT", &blob).body(&body[..]).send(castier.public), 401);
    assert_eq!(put("writer", "s:e:c"), 201);
    assert_eq!(Request::get(&blob).send(castier.public).body, body);
    // Broken: the users before stay.
    fs::write(people.dir.path().join("users"), "writer:$apr1$abc$def\n").unwrap();
    castier.hang_up();
    castier.says("access.htpasswd_file");
    castier.says("line 1: ");
    assert_eq!(put("writer", "s:e:c"), 200);
    people.write_users("writer:another");
    castier.hang_up();
    eventually("the new password is in force", || (put("writer", "another") == 200).then_some(()));
    assert_eq!(put("writer", "s:e:c"), 401);
    assert_eq!(castier.metric("castier_access_reload_failures_total", &["file=\"htpasswd\""]), 1.0);
    // A broken file of tokens keeps nobody in who has left the other one, and an empty one is no mistake.
    fs::write(people.dir.path().join("tokens"), "robot write t0ken\n").unwrap();
    fs::write(people.dir.path().join("users"), "").unwrap();
    castier.hang_up();
    eventually("nobody is left", || (put("writer", "another") == 401).then_some(()));
    assert_eq!(Request::new("PUT", &blob).body(&body[..]).bearer("t0ken").send(castier.public).status, 200);
    assert_eq!(castier.metric("castier_access_reload_failures_total", &["file=\"tokens\""]), 1.0);
}

#[test]
fn the_admin_listener_asks_for_users() {
    let _turn = turn();
    let people = People::new();
    let castier = castier(&people.config("read", "access.admin = true"));
    let purge = format!("/purge/{}", sha256(b""));
    for probe in ["/metrics", "/healthz", "/readyz"] {
        assert_eq!(Request::get(probe).send(castier.admin).status, 200, "{probe}: on the loopback");
    }
    for target in ["/", "/stats"] {
        is_refused(&Request::get(target).send(castier.admin), 401);
        assert_eq!(Request::get(target).basic("reader", "read me").send(castier.admin).status, 200, "{target}");
    }
    is_refused(&Request::new("POST", &purge).send(castier.admin), 401);
    is_refused(&Request::new("POST", &purge).bearer("t0ken").send(castier.admin), 403);
    assert_eq!(Request::new("POST", &purge).bearer("b0ss").send(castier.admin).status, 200);
}

#[test]
fn the_commands_ask_an_admin_listener_with_tls_and_users() {
    let _turn = turn();
    let (people, authority, dir) = (People::new(), Authority::new(), TempDir::new().unwrap());
    let pair = authority.certify("own", &["127.0.0.1"], dir.path());
    let route = "[[route]]\npath = \"/kv/{name}\"\nupstream = \"http://127.0.0.1:9\"\nkind = \"frozen\"\naccess = \"local\"\n";
    let config = people.config("read", &format!("access.admin = true\n{}{route}", tls_config(&pair, "listen.tls.admin = true")));
    let castier = castier(&config);
    fs::write(dir.path().join("boss"), "b0ss\n").unwrap();
    fs::write(dir.path().join("reader"), "reader:read me\n").unwrap();
    let https = format!("https://{}", castier.admin);
    let ask = |arguments: &[&str]| run(command(castier_program(), dir.path()).args(arguments));
    let ca = authority.ca();
    let ca = ca.to_str().unwrap();
    // The right authority, and on the loopback none; another one is refused.
    for more in [&["--ca-file", ca][..], &[]] {
        let told = ask(&[&["why", "/kv/x", "--admin", &https, "--credentials-file", "reader"], more].concat()).ok();
        assert!(told.contains("/kv/{name}"), "{told}");
    }
    let other = Authority::new();
    let refused =
        ask(&["why", "/kv/x", "--admin", &https, "--credentials-file", "reader", "--ca-file", other.ca().to_str().unwrap()]).fails();
    assert!(refused.to_lowercase().contains("certificate"), "{refused}");
    let missing = ask(&["why", "/kv/x", "--admin", &https]).fails();
    assert!(missing.contains("401") && missing.contains("--credentials-file"), "{missing}");
    let plain = ask(&["why", "/kv/x", "--admin", &castier.admin.to_string()]).fails();
    assert!(plain.contains("400") && plain.contains("https://"), "{plain}");
    let shown = ask(&["drain", "--admin", &https.replace("https://", "https://boss:b0ss@")]).fails();
    assert!(shown.contains("--credentials-file") && !shown.contains("b0ss"), "{shown}");
    let role = ask(&["drain", "--admin", &https, "--credentials-file", "reader"]).fails();
    assert!(role.contains("403"), "{role}");
    assert!(ask(&["drain", "--admin", &https, "--credentials-file", "boss"]).ok().contains("is empty"));
    // A browser or curl gets HTTP/1.1 here, also if it would like HTTP/2.
    let Some(curl) = Curl::find() else { return };
    assert_eq!(curl.get(&["--http2", "--cacert", ca, "-u", "reader:read me"], &format!("{https}/stats")).0, "200");
}

#[test]
fn castier_does_not_open_itself_to_the_world_by_mistake() {
    let dir = TempDir::new().unwrap();
    let said = |config: &str| {
        fs::write(dir.path().join("castier.toml"), config).unwrap();
        run(command(castier_program(), dir.path()).args(["--config", "castier.toml", "--check-config"])).fails()
    };
    let public = said("listen.public = \"0.0.0.0:8080\"");
    assert!(public.contains("access.anonymous") && public.contains("\"read\""), "{public}");
    let admin = said("listen.admin = \"0.0.0.0:8082\"");
    assert!(admin.contains("access.insecure"), "{admin}");
    let both = "listen.public = \"0.0.0.0:8080\"\nlisten.admin = \"0.0.0.0:8082\"\n";
    fs::write(dir.path().join("castier.toml"), format!("{both}access.insecure = true\n")).unwrap();
    run(command(castier_program(), dir.path()).args(["--config", "castier.toml", "--check-config"])).ok();
    fs::write(dir.path().join("castier.toml"), "listen.public = \"0.0.0.0:8080\"\naccess.anonymous = \"write\"\n").unwrap();
    run(command(castier_program(), dir.path()).args(["--config", "castier.toml", "--check-config"])).ok();
    fs::write(dir.path().join("users"), "a:{SHA}xyz\n").unwrap();
    let users = said("access.htpasswd_file = \"users\"");
    assert!(users.contains("line 1") && users.contains("SHA-1") && users.contains("htpasswd -B") && !users.contains("xyz"), "{users}");
}

/// Certificates that cannot be used are found before the start, with a text that says what is wrong.
#[test]
fn files_of_certificates_are_checked_before_the_start() {
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let (cert, key) = authority.certify("own", &["127.0.0.1"], dir.path());
    let (_, other) = authority.certify("other", &["127.0.0.1"], dir.path());
    let expired = authority.certify_until("expired", &["127.0.0.1"], dir.path(), Some((2001, 2002)));
    let text = fs::read_to_string(&cert).unwrap();
    let [cut, empty] = [("cut.pem", &text[..text.len() / 2]), ("empty.pem", "")].map(|(name, text)| {
        fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name)
    });
    let check = |pair: (&PathBuf, &PathBuf), more: &str| {
        fs::write(dir.path().join("castier.toml"), tls_config(&(pair.0.clone(), pair.1.clone()), more)).unwrap();
        run(command(castier_program(), dir.path()).args(["--config", "castier.toml", "--check-config"]))
    };
    check((&cert, &key), "").ok();
    for (pair, says) in [
        ((&cert, &other), ["listen.tls.key_file", "is not the key of the certificate"]),
        ((&key, &cert), ["listen.tls.cert_file", "holds no PEM certificate"]),
        ((&cert, &cert), ["listen.tls.key_file", "holds no PEM private key"]),
        ((&cut, &key), ["listen.tls.cert_file", "is cut"]),
        ((&empty, &key), ["listen.tls.cert_file", "it is empty"]),
    ] {
        let said = check(pair, "").fails();
        assert!(says.iter().all(|words| said.contains(words)), "{says:?}: {said}");
    }
    let said = check((&cert, &key), &format!("listen.tls.client_ca_file = {key:?}")).fails();
    assert!(said.contains("listen.tls.client_ca_file") && said.contains("holds no PEM certificate"), "{said}");
    let noted = check((&expired.0, &expired.1), "");
    assert!(noted.success() && noted.said().contains("listen.tls.cert_file") && noted.said().contains("not now"), "{noted}");
}

/// One request over a connection that begins with `before`: the status line.
pub(crate) fn after(addr: SocketAddr, before: &[u8], target: &str) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    // castier may have closed it already.
    stream.write_all(before).ok();
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes()).ok();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).ok();
    String::from_utf8_lossy(&all).lines().next().unwrap_or_default().to_owned()
}

#[test]
fn the_proxy_protocol_names_the_client() {
    let _turn = turn();
    let config =
        "listen.proxy_protocol = true\nlisten.trusted_proxies = [\"127.0.0.1\"]\nlimits.requests_per_second = 1\nlog.level = \"info\"\n";
    let castier = castier(config);
    let target = format!("/cas/{}", sha256(b""));
    let header = |last: u8| format!("PROXY TCP4 192.0.2.{last} 192.0.2.1 4711 443\r\n").into_bytes();
    // Each client has a limit of its own.
    for last in 1..=3 {
        assert!(after(castier.public, &header(last), &target).contains(" 200 "), "{last}");
        assert!(after(castier.public, &header(last), &target).contains(" 429 "), "{last}");
    }
    castier.says("client=192.0.2.3");
    let mut two = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x24".to_vec();
    two.extend(std::net::Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, 0, 7).octets());
    two.extend(std::net::Ipv6Addr::LOCALHOST.octets());
    two.extend([1, 2, 3, 4]);
    assert!(after(castier.public, &two, &target).contains(" 200 "));
    // The same /64.
    two[31] = 9;
    assert!(after(castier.public, &two, &target).contains(" 429 "));
    assert_eq!(after(castier.public, b"", &target), "", "without a header there is no answer");
    // A proxy that does not know the client: what the client says of itself does not count.
    let as_if =
        |address: &str| format!("PROXY UNKNOWN\r\nGET {target} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {address}\r\n\r\n").into_bytes();
    assert!(after(castier.public, &as_if("192.0.2.20"), &target).contains(" 200 "));
    assert!((21..100).any(|last| after(castier.public, &as_if(&format!("192.0.2.{last}")), &target).contains(" 429 ")));
    let castier = castier.restart("listen.proxy_protocol = true\nlisten.trusted_proxies = [\"10.0.0.0/8\"]\n");
    assert_eq!(after(castier.public, &header(1), &target), "", "not from a stranger");
}

/// `log.trusted_proxies` name the client in records. Limits and log-ins do not believe them.
#[test]
fn a_proxy_of_the_log_moves_no_limit() {
    let _turn = turn();
    let castier = castier("log.trusted_proxies = [\"127.0.0.1\"]\nlimits.requests_per_second = 1\nlog.level = \"info\"\n");
    let ask = |client: u8| {
        Request::get(&format!("/cas/{}", sha256(b""))).with("X-Forwarded-For", &format!("192.0.2.{client}")).send(castier.public).status
    };
    assert!((1..100).any(|client| ask(client) == 429), "each has another address, but only in the log");
    castier.says("client=192.0.2.1");
    castier.says("client=192.0.2.2");
}

#[test]
fn clients_have_limits() {
    let _turn = turn();
    let castier = castier(
        "limits.connections_per_client = 3\nlimits.bandwidth_per_client = \"1MiB\"\nmemory.max_blob = \"1MiB\"\ndisk.path = \"disk\"\n",
    );
    let body = noise(710, 3 << 20);
    let small = noise(711, 200_000);
    let (large, small) = (put(&castier, &body), put(&castier, &small));
    assert_eq!(Request::get(&small).send(castier.public).status, 200);
    // A second's worth at once, the rest as it comes.
    let start = Instant::now();
    assert_eq!(Request::get(&large).send(castier.public).body, body);
    assert!(start.elapsed().as_secs_f64() >= 1.5, "{:?}", start.elapsed());
    let open: Vec<_> = (0..3).map(|_| TcpStream::connect(castier.public).unwrap()).collect();
    eventually("they count", || (castier.metric("castier_connections", &[]) >= 3.0).then_some(()));
    let refused = Request::get(&small).send(castier.public);
    assert_eq!((refused.status, refused.header("retry-after").as_deref()), (429, Some("1")), "{}", refused.text());
    drop(open);
    eventually("they are closed", || (Request::get("/cas/x").try_send(castier.public).ok()?.status == 400).then_some(()));
}

/// Each limit that is reached is counted, with an answer that says when to come again.
#[test]
fn limits_per_client_are_counted() {
    let _turn = turn();
    let castier = castier("limits.requests_per_second = 1\nlimits.connections_per_client = 2\n");
    let target = format!("/cas/{}", sha256(b""));
    assert_eq!(Request::get(&target).send(castier.public).status, 200);
    let refused = Request::get(&target).send(castier.public);
    assert_eq!((refused.status, refused.header("retry-after").as_deref()), (429, Some("1")), "{}", refused.text());
    assert_eq!(castier.metric("castier_denied_requests_total", &["reason=\"requests\""]), 1.0);
    let _open: Vec<_> = (0..2).map(|_| TcpStream::connect(castier.public).unwrap()).collect();
    eventually("a connection is refused", || {
        TcpStream::connect(castier.public).unwrap();
        (castier.metric("castier_denied_requests_total", &["reason=\"connections\""]) >= 1.0).then_some(())
    });
}

/// A misspelt name would leave its client unconfined.
#[test]
fn scopes_are_for_somebody() {
    let _turn = turn();
    let (people, dir) = (People::new(), TempDir::new().unwrap());
    let check = |more: &str, arguments: &[&str]| {
        let config = people.config("read", "");
        let scopes = config.lines().find(|line| line.starts_with("access.scopes")).unwrap();
        fs::write(dir.path().join("castier.toml"), config.replace(scopes, more)).unwrap();
        run(command(castier_program(), dir.path()).args(["--config", "castier.toml", "--check-config"]).args(arguments))
    };
    let noted = check("access.scopes = { ic = [\"read:*\"] }", &[]);
    assert!(noted.success() && noted.said().contains("\"ic\" is no user and no token"), "{noted}");
    let wrong = check("access.scopes = { ci = [\"route/pypi\"] }", &["--offline"]).fails();
    assert!(wrong.contains("route \"pypi\"") && wrong.contains("there are none"), "{wrong}");
    let wrong = check("access.scopes = { ci = [\"reads:*\"] }", &["--offline"]).fails();
    assert!(wrong.contains("access.scopes") && wrong.contains("reads"), "{wrong}");
    let sound = check("access.scopes = { ci = [\"cas\"], \"*\" = [\"read:*\"] }", &[]);
    assert!(sound.success() && !sound.said().contains("note: access.scopes"), "{sound}");

    // Later somebody may leave, and must not stay in because of that.
    let castier = castier(&people.config("none", ""));
    let blob = format!("/cas/{}", sha256(b""));
    let ask = || Request::get(&blob).basic("reader", "read me").send(castier.public).status;
    assert_eq!(ask(), 200);
    people.write_users("writer:s:e:c");
    castier.hang_up();
    eventually("who has left is out", || (ask() == 401).then_some(()));
    castier.says("confines a name that no user and no token has");
}

/// HTTP/2 has the same entrance.
#[test]
fn users_and_limits_over_http2() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    let (people, authority, dir) = (People::new(), Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1"], dir.path());
    authority.certify("machine", &[], dir.path());
    let more = tls_config(&own, &format!("listen.tls.client_ca_file = {:?}", authority.ca()));
    let castier = castier(&people.config("none", &more));
    let ca = authority.ca();
    let url = https(&castier, &format!("/cas/{}", sha256(b"")));
    let [cert, key] = ["machine.pem", "machine.key"].map(|file| dir.path().join(file).to_str().unwrap().to_owned());
    let ask = |arguments: &[&str]| {
        let version = ["--cacert", ca.to_str().unwrap(), "--http2", "-w", "%{http_code} %{http_version}"];
        curl.get(&[&version[..], arguments].concat(), &url)
    };
    for (arguments, expected) in [
        (&[][..], "401 2"),
        (&["-u", "reader:read me"], "200 2"),
        (&["-u", "reader:wrong"], "401 2"),
        (&["-u", "reader:read me", "-X", "PUT", "--data-binary", ""], "403 2"),
        (&["-u", "writer:s:e:c", "-X", "PUT", "--data-binary", ""], "201 2"),
        (&["-H", "Authorization: Bearer pull-t0ken"], "200 2"),
        (&["--cert", &cert, "--key", &key], "200 2"),
        (&["--cert", &cert, "--key", &key, "-X", "DELETE"], "403 2"),
    ] {
        let (told, body) = ask(arguments);
        assert_eq!(told, expected, "{arguments:?}");
        if !expected.starts_with('2') {
            assert!(String::from_utf8_lossy(&body).contains("\"status\":"), "{arguments:?}: {}", String::from_utf8_lossy(&body));
        }
    }
    // Malformed requests count as well. Over HTTP/1.1 each would end its connection.
    let castier = castier.restart("limits.requests_per_second = 1\n");
    let plain = format!("http://{}/cas/{}", castier.public, sha256(b""));
    let trace = || curl.get(&["--http2-prior-knowledge", "-X", "TRACE"], &plain).0;
    assert_eq!(trace(), "405");
    assert!((0..100).any(|_| trace() == "429"));
}

/// The conformance tests of `h2spec`, over TLS and over plain TCP.
#[test]
fn h2spec_finds_nothing() {
    let _turn = turn();
    let (Some(h2spec), Some(curl)) = (tool("h2spec"), Curl::find()) else { return };
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let own = authority.certify("own", &["127.0.0.1"], dir.path());
    let body = noise(720, 300_000);
    let target = format!("/cas/{}", sha256(&body));
    for (config, more) in [(tls_config(&own, ""), &["-t", "-k"][..]), (String::new(), &[])] {
        let castier = castier(&config);
        fs::write(dir.path().join("body"), &body).unwrap();
        let scheme = if more.is_empty() { "http" } else { "https" };
        let url = format!("{scheme}://127.0.0.1:{}{target}", castier.public.port());
        assert_eq!(curl.get(&["-k", "-T", dir.path().join("body").to_str().unwrap()], &url).0, "201");
        let port = castier.public.port().to_string();
        let ran = run(command(&h2spec, dir.path()).args(["-h", "127.0.0.1", "-p", &port, "-P", &target, "-o", "5"]).args(more));
        let failures = ran.stdout.split_once("Failures:").map_or("", |(_, failures)| failures);
        // On plain TCP a wrong preface is a request of HTTP/1.1, and is answered as one.
        let is_http1 = more.is_empty() && failures.contains("Sends invalid connection preface") && failures.contains(" 1 failed");
        assert!(ran.stdout.contains("146 tests") && (ran.success() || is_http1), "{more:?}: {}", ran.stdout);
    }
}

/// Other names in the configuration need a restart, as the log says; until then nothing of them counts.
#[test]
fn other_scopes_need_a_restart() {
    let _turn = turn();
    let people = People::new();
    let castier = castier(&people.config("read", ""));
    let put = || Request::new("PUT", "/kv/x").body("x").basic("ci", "pull").send(castier.public).status;
    assert_eq!(put(), 403);
    let file = castier.dir.path().join("castier.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("write:ac/ci", "write:*")).unwrap();
    castier.hang_up();
    castier.says("these changes need a restart");
    castier.says("access.scopes");
    assert_eq!(put(), 403);
}

#[test]
fn files_are_for_their_owner_only() {
    let _turn = turn();
    let castier = castier("disk.path = \"./cache\"\ndisk.capacity = \"64MiB\"\n");
    put(&castier, &noise(701, 300_000));
    assert_eq!(Request::new("PUT", "/kv/a").body("an entry").send(castier.public).status, 201);
    eventually("the disk has the blob", || (castier.metric("castier_tier_blobs", &["tier=\"disk\""]) > 0.0).then_some(()));
    let mut left: Vec<_> = ["cache", "origin"].map(|name| castier.dir.path().join(name)).into();
    let mut files = 0;
    while let Some(path) = left.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!(found.permissions().mode() & 0o077, 0, "{}", path.display());
        if found.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            files += 1;
        }
    }
    assert!(files >= 3, "{files}");
}
