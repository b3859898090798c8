//! Git LFS: git with its extension, and giftless as the server of the objects.

use crate::support::{
    Castier, Port, Ran, Request, Response, Running, Seen, Upstream, castier, command, eventually, lines, noise, run, sha256, skip, tool,
    tools, turn,
};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use std::{fs, net::SocketAddr, path::Path, time::SystemTime};
use tempfile::TempDir;

const KIND: &str = "application/vnd.git-lfs+json";
const KEY: &str = "the key of the users' tokens, which is long enough";
/// The repository's files, by name.
const FILES: [(&str, u64, usize); 3] = [("large.bin", 1, 5 << 20), ("small.bin", 2, 1000), ("other.bin", 3, 200_000)];

fn content((_, seed, length): (&str, u64, usize)) -> Vec<u8> {
    noise(seed, length)
}

// ---- the server ----

pub(crate) struct Giftless {
    _process: Running,
    _port: Port,
    dir: TempDir,
    pub(crate) front: Upstream,
    real: SocketAddr,
}

impl Giftless {
    /// None, after saying so, if the programs are not there. Links live for `lifetime` seconds.
    fn start(auth: &Value, lifetime: u32) -> Option<Self> {
        tool("git")?;
        tool("git-lfs")?;
        let python = tools().join("giftless/bin/python");
        if !python.is_file() {
            skip("giftless is not installed");
            return None;
        }
        let (dir, port) = (TempDir::new().unwrap(), Port::free());
        let config = json!({
            "AUTH_PROVIDERS": auth,
            "TRANSFER_ADAPTERS": {"basic": {"factory": "giftless.transfer.basic_streaming:factory", "options": {
                "storage_class": "giftless.storage.local_storage:LocalStorage",
                "storage_options": {"path": dir.path().join("objects")},
                "action_lifetime": lifetime,
            }}},
        });
        // JSON is YAML.
        fs::write(dir.path().join("giftless.yaml"), config.to_string()).unwrap();
        let mut server = command(python, dir.path());
        server.args(["-m", "flask", "--app", "giftless.wsgi_entrypoint", "run", "--with-threads", "--port", &port.number().to_string()]);
        let mut process = Running::start(server.env("GIFTLESS_CONFIG_FILE", "giftless.yaml"));
        process.listens(port.addr());
        let real = port.addr();
        Some(Self { _process: process, _port: port, dir, front: Upstream::before(real), real })
    }

    /// Stores a file as an object of `org/repo`, past git.
    fn store(&self, file: (&str, u64, usize)) {
        let folder = self.dir.path().join("objects/org/repo");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(sha256(&content(file))), content(file)).unwrap();
    }

    /// Everybody may read and write.
    pub(crate) fn open() -> Option<Self> {
        Self::start(&json!(["giftless.auth.allow_anon:read_write"]), 900)
    }

    /// Users have tokens.
    fn with_users() -> Option<Self> {
        let options = json!({"algorithm": "HS256", "private_key": KEY, "key_id": "users"});
        Self::start(&json!([{"factory": "giftless.auth.jwt:factory", "options": options}]), 900)
    }
}

/// A user's token for repositories: `obj:org/repo/*` for all of one, with `:read` for reading alone.
fn token(user: &str, scope: &str) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let encode = |value: Value| data_encoding::BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let head = encode(json!({"typ": "JWT", "alg": "HS256", "kid": "users"}));
    let text = format!("{head}.{}", encode(json!({"sub": user, "exp": now + 3600, "scopes": [scope]})));
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(KEY.as_bytes()).unwrap();
    mac.update(text.as_bytes());
    format!("{text}.{}", data_encoding::BASE64URL_NOPAD.encode(&mac.finalize().into_bytes()))
}

fn is_object(seen: &Seen) -> bool {
    seen.method == "GET" && seen.target.contains("/objects/storage/")
}

// ---- git ----

/// git, with a home of its own, where LFS is installed.
pub(crate) struct Git {
    pub(crate) home: TempDir,
}

impl Git {
    pub(crate) fn new() -> Self {
        let git = Self { home: TempDir::new().unwrap() };
        for (key, value) in
            [("user.name", "Ann"), ("user.email", "ann@example.org"), ("init.defaultBranch", "main"), ("lfs.locksverify", "false")]
        {
            git.ok(&["config", "--global", key, value]);
        }
        git.ok(&["lfs", "install", "--skip-repo"]);
        git
    }

    fn run(&self, dir: &Path, arguments: &[&str]) -> Ran {
        let mut command = command(tool("git").unwrap(), dir);
        run(command.args(arguments).env("HOME", self.home.path()).env("GIT_TERMINAL_PROMPT", "0").env("GIT_CONFIG_NOSYSTEM", "1"))
    }

    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        self.run(self.home.path(), arguments).ok()
    }

    /// Makes a repository with files in LFS, and pushes it to a bare one in a folder. The objects go to `url`.
    pub(crate) fn publish(&self, hub: &Path, url: &str) {
        self.push(hub, url).ok();
    }

    pub(crate) fn push(&self, hub: &Path, url: &str) -> Ran {
        self.ok(&["init", "--bare", &hub.display().to_string()]);
        let tree = self.home.path().join("tree");
        self.ok(&["init", "tree"]);
        let git = |arguments: &[&str]| self.run(&tree, arguments);
        git(&["lfs", "track", "*.bin"]).ok();
        for file in FILES {
            fs::write(tree.join(file.0), content(file)).unwrap();
        }
        git(&["add", "."]).ok();
        git(&["commit", "-m", "files"]).ok();
        git(&["-c", &format!("lfs.url={url}"), "push", &format!("file://{}", hub.display()), "main"])
    }
}

/// Clones with a fresh git. The objects come from `url`.
pub(crate) fn clone(hub: &Path, url: &str) -> (Ran, Git) {
    let git = Git::new();
    let home = git.home.path().to_owned();
    let ran = git.run(&home, &["-c", &format!("lfs.url={url}"), "clone", &format!("file://{}", hub.display()), "copy"]);
    (ran, git)
}

#[track_caller]
pub(crate) fn clones(hub: &Path, url: &str) {
    let (ran, git) = clone(hub, url);
    ran.ok();
    for file in FILES {
        assert!(fs::read(git.home.path().join("copy").join(file.0)).unwrap() == content(file), "{}", file.0);
    }
}

pub(crate) fn route(upstream: &Upstream, keys: &str) -> String {
    format!("[[route]]\nprotocol = \"lfs\"\nupstream = \"{}\"\n{keys}\n", upstream.url())
}

/// A batch request for downloads of these objects, by digest and size.
fn batch(objects: &[(String, usize)]) -> Request {
    let objects: Vec<_> = objects.iter().map(|(oid, size)| json!({"oid": oid, "size": size})).collect();
    let body = json!({"operation": "download", "transfers": ["basic"], "ref": {"name": "refs/heads/main"}, "objects": objects, "hash_algo": "sha256"});
    Request::new("POST", "/org/repo/objects/batch").with("Accept", KIND).with("Content-Type", KIND).body(body.to_string())
}

/// The request that a batch's answer tells the client to make for its object number `number`.
#[track_caller]
fn download(castier: &Castier, answer: &Response, number: usize) -> Request {
    assert_eq!(answer.status, 200, "{}", answer.text());
    let action = &answer.json()["objects"][number]["actions"]["download"];
    let href = action["href"].as_str().unwrap_or_else(|| panic!("{}", answer.text()));
    let target = href.strip_prefix(&castier.url()).unwrap_or_else(|| panic!("{href} does not lead to castier"));
    let mut request = Request::get(target);
    for (name, value) in action["header"].as_object().into_iter().flatten() {
        request = request.with(name, value.as_str().unwrap());
    }
    request
}

fn object(number: usize) -> (String, usize) {
    let file = FILES[number];
    (sha256(&content(file)), file.2)
}

// ---- tests ----

#[test]
fn push_and_clone() {
    let _turn = turn();
    let Some(server) = Giftless::open() else { return };
    let castier = castier(&route(&server.front, "access = \"local\""));
    let (url, dir) = (format!("{}/org/repo", castier.url()), TempDir::new().unwrap());
    let hub = dir.path().join("hub.git");
    Git::new().publish(&hub, &url);
    let seen = server.front.take();
    let stored = seen.iter().filter(|seen| seen.method == "PUT" && seen.status == 200).count();
    assert_eq!(stored, FILES.len(), "{}", lines(&seen));

    // The first clone loads each object at most once, the second none.
    clones(&hub, &url);
    let seen = server.front.take();
    assert!(seen.iter().filter(|seen| is_object(seen)).count() <= FILES.len(), "{}", lines(&seen));
    clones(&hub, &url);
    let seen = server.front.take();
    assert_eq!(seen.iter().filter(|seen| is_object(seen)).count(), 0, "{}", lines(&seen));
    assert!(seen.iter().any(|seen| seen.target.ends_with("/objects/batch")), "{}", lines(&seen));
    // One copy, whatever it is called.
    let (digest, size) = object(0);
    assert_eq!(Request::get(&format!("/cas/{digest}")).send(castier.public).body.len(), size);

    server.front.kill();
    clones(&hub, &url);

    // The server has what was pushed through castier.
    clones(&hub, &format!("http://{}/org/repo", server.real));
}

#[test]
fn a_prefix() {
    let _turn = turn();
    let Some(server) = Giftless::open() else { return };
    let castier = castier(&route(&server.front, "access = \"local\"\nprefix = \"/lfs\""));
    let (url, dir) = (format!("{}/lfs/org/repo", castier.url()), TempDir::new().unwrap());
    let hub = dir.path().join("hub.git");
    Git::new().publish(&hub, &url);
    server.front.take();
    clones(&hub, &url);
    assert_eq!(server.front.count(|seen| seen.target.starts_with("/lfs")), 0, "{}", server.front.history());
    assert!(server.front.seen().iter().all(|seen| seen.header("via").is_some()), "a client went past castier: {}", server.front.history());
    server.front.kill();
    clones(&hub, &url);
}

#[test]
fn users_of_the_upstream() {
    let _turn = turn();
    let Some(server) = Giftless::with_users() else { return };
    let castier = castier(&route(&server.front, "access = \"upstream\"\nproof_ttl = \"1h\""));
    let dir = TempDir::new().unwrap();
    let hub = dir.path().join("hub.git");
    let (ann, ben) = (token("ann", "obj:org/repo/*"), token("ben", "obj:org/other/*"));
    let with = |token: &str| format!("http://_jwt:{token}@{}/org/repo", castier.public);
    Git::new().publish(&hub, &with(&ann));
    let nobody = format!("{}/org/repo", castier.url());
    let refused = || {
        for url in [nobody.clone(), with(&ben), with("no token")] {
            clone(&hub, &url).0.fails();
        }
    };
    refused();
    clones(&hub, &with(&ann));
    server.front.take();
    // Everything is kept now.
    refused();
    clones(&hub, &with(&ann));
    assert_eq!(server.front.count(is_object), 0, "{}", server.front.history());
    // The refusals are the server's own.
    let objects = [object(0)];
    let direct = batch(&objects).basic("_jwt", &ben).send(server.real);
    let answer = batch(&objects).basic("_jwt", &ben).send(castier.public);
    assert_eq!((answer.status, answer.text()), (direct.status, direct.text()));
    assert_eq!(Request::get(&format!("/cas/{}", objects[0].0)).send(castier.public).status, 404);

    server.front.kill();
    clones(&hub, &with(&ann));
    refused();
    for request in [batch(&objects), batch(&objects).basic("_jwt", &ben), batch(&objects).basic("_jwt", "no token")] {
        let answer = request.send(castier.public);
        assert!([401, 403, 502, 504].contains(&answer.status), "{answer:?}");
    }
}

#[test]
fn tickets() {
    let _turn = turn();
    let Some(server) = Giftless::with_users() else { return };
    let castier = castier(&route(&server.front, "access = \"upstream\"\nproof_ttl = \"1h\""));
    let dir = TempDir::new().unwrap();
    let ann = token("ann", "obj:org/repo/*");
    Git::new().publish(&dir.path().join("hub.git"), &format!("http://_jwt:{ann}@{}/org/repo", castier.public));
    let answer = batch(&[object(0), object(1)]).basic("_jwt", &ann).send(castier.public);
    let requests = [0, 1].map(|number| download(&castier, &answer, number));
    assert!(requests.iter().all(|request| !request.headers.is_empty()), "there is no ticket: {}", answer.text());
    // It is good for its object, several times, and for a part of it.
    for _ in 0..2 {
        for (request, file) in requests.iter().zip(FILES) {
            let got = request.send(castier.public);
            assert!(got.status == 200 && got.body == content(file), "{} {:?}", got.status, got.headers);
        }
    }
    let part = requests[0].clone().with("Range", "bytes=10-19").send(castier.public);
    assert_eq!((part.status, &part.body[..]), (206, &content(FILES[0])[10..20]));

    let refused = |request: &Request, what: &str| {
        for method in ["GET", "HEAD"] {
            let got = Request { method: method.to_owned(), ..request.clone() }.send(castier.public);
            assert!(got.status >= 400, "{what}: {method} {} {:?}", got.status, got.headers);
        }
    };
    let refuse_all = || {
        refused(&Request { headers: Vec::new(), ..requests[0].clone() }, "no ticket");
        refused(&Request { headers: requests[1].headers.clone(), ..requests[0].clone() }, "the ticket of another object");
        // Every character of it counts.
        for (name, value) in &requests[0].headers {
            for at in (0..value.len()).filter(|at| at % 7 == 0 || at + 2 > value.len()) {
                let forged: String =
                    value.chars().enumerate().map(|(place, c)| if place == at { if c == 'A' { 'B' } else { 'A' } } else { c }).collect();
                if forged != *value {
                    refused(&Request { headers: vec![(name.clone(), forged.clone())], ..requests[0].clone() }, &forged);
                }
            }
        }
        // A user's own credentials are no ticket.
        refused(&Request { headers: Vec::new(), ..requests[0].clone() }.basic("_jwt", &token("ben", "obj:org/other/*")), "another user");
    };
    refuse_all();
    server.front.kill();
    assert_eq!(requests[0].send(castier.public).status, 200);
    refuse_all();
}

/// A download may come to another node than the batch: that one asks the others.
#[test]
fn two_nodes() {
    let _turn = turn();
    let Some(server) = Giftless::with_users() else { return };
    let dir = TempDir::new().unwrap();
    let secret = dir.path().join("secret");
    fs::write(&secret, "a-secret-of-the-nodes-which-is-long-enough").unwrap();
    let ports = [Port::free(), Port::free()];
    let peers = ports.each_ref().map(|port| format!("\"{}\"", port.addr())).join(", ");
    let nodes = ports.each_ref().map(|port| {
        let cluster = format!("[cluster]\nadvertise = \"{0}\"\npeers = [{peers}]\nsecret_file = \"{1}\"\n", port.addr(), secret.display());
        let listen = format!("listen.peer = \"{}\"\n", port.addr());
        castier(&format!("{listen}{cluster}{}", route(&server.front, "access = \"upstream\"\nproof_ttl = \"1h\"")))
    });
    for node in &nodes {
        eventually("the nodes have found each other", || (node.metric("castier_cluster_peers", &["state=\"up\""]) >= 1.0).then_some(()));
    }
    let ann = token("ann", "obj:org/repo/*");
    Git::new().publish(&dir.path().join("hub.git"), &format!("http://_jwt:{ann}@{}/org/repo", nodes[0].public));
    server.front.take();
    let answer = batch(&[object(0), object(1)]).basic("_jwt", &ann).send(nodes[0].public);
    for (number, file) in FILES.into_iter().enumerate().take(2) {
        let request = download(&nodes[0], &answer, number);
        for _ in 0..2 {
            let got = request.send(nodes[1].public);
            assert!(got.status == 200 && got.body == content(file), "{} {:?}", got.status, got.headers);
        }
    }
    let loaded = server.front.take().iter().filter(|seen| is_object(seen)).count();
    assert_eq!(loaded, 2, "{}", server.front.history());
}

#[test]
fn a_ticket_expires() {
    let _turn = turn();
    let options = json!({"algorithm": "HS256", "private_key": KEY, "key_id": "users"});
    let Some(server) = Giftless::start(&json!([{"factory": "giftless.auth.jwt:factory", "options": options}]), 2) else { return };
    let castier = castier(&route(&server.front, "access = \"upstream\"\nproof_ttl = \"2s\""));
    // Not with git, which does not upload to a link that ends so soon.
    server.store(FILES[1]);
    let ann = token("ann", "obj:org/repo/*");
    let answer = batch(&[object(1)]).basic("_jwt", &ann).send(castier.public);
    let request = download(&castier, &answer, 0);
    assert_eq!(request.send(castier.public).status, 200);
    eventually("the ticket has expired", || (request.send(castier.public).status >= 400).then_some(()));
    // A new batch gives a new one.
    let answer = batch(&[object(1)]).basic("_jwt", &ann).send(castier.public);
    assert_eq!(download(&castier, &answer, 0).send(castier.public).status, 200);
}

/// The links of some servers lead to another host, with a header of their own and a moment at which they end.
#[test]
fn objects_on_another_host() {
    let _turn = turn();
    let bytes = content(FILES[0]);
    let (digest, size) = object(0);
    let given = bytes.clone();
    let store = Upstream::answering(move |request| {
        if request.header("x-signature").as_deref() != Some("1") || request.parameter("s").as_deref() != Some("2") {
            return Response::new(403);
        }
        Response::ok("application/octet-stream", given.clone())
    });
    let (url, oid) = (store.url(), digest.clone());
    let server = Upstream::answering(move |request| {
        if request.header("authorization").is_none() {
            return Response::new(401)
                .with("LFS-Authenticate", "Basic realm=\"lfs\"")
                .with("Content-Type", KIND)
                .body(r#"{"message":"who?"}"#);
        }
        let action = json!({"href": format!("{url}/{oid}?s=2"), "header": {"X-Signature": "1"}, "expires_in": 600});
        let object = json!({"oid": oid, "size": size, "authenticated": true, "actions": {"download": action}});
        Response::ok(KIND, json!({"transfer": "basic", "objects": [object]}).to_string())
    });
    let castier = castier(&route(&server, &format!("access = \"upstream\"\nproof_ttl = \"1h\"\nredirects = [\"{}\"]", store.addr())));
    let objects = [(digest, size)];
    let nobody = batch(&objects).send(castier.public);
    assert_eq!((nobody.status, nobody.text().as_str()), (401, r#"{"message":"who?"}"#));
    assert_eq!(nobody.header("lfs-authenticate").as_deref(), Some("Basic realm=\"lfs\""));
    let answer = batch(&objects).basic("ann", "her password").send(castier.public);
    assert!(!answer.text().contains("X-Signature"), "the client gets the header of the other host: {}", answer.text());
    let request = download(&castier, &answer, 0);
    for _ in 0..2 {
        assert!(request.send(castier.public).body == bytes);
    }
    let asked = store.take();
    assert_eq!(asked.len(), 1, "{}", lines(&asked));
    assert_eq!(asked[0].authorization(), None);
    server.kill();
    store.kill();
    // castier answers the batch itself, to the one who was admitted.
    let answer = batch(&objects).basic("ann", "her password").send(castier.public);
    assert!(download(&castier, &answer, 0).send(castier.public).body == bytes);
    assert!([401, 502, 504].contains(&batch(&objects).send(castier.public).status));
    // With another size it is another object.
    let other = batch(&[(objects[0].0.clone(), size + 1)]).basic("ann", "her password").send(castier.public);
    assert!(other.status != 200 || other.json()["objects"][0].get("actions").is_none(), "{}", other.text());
}

/// The server's word about the size counts, also where the digest is right.
#[test]
fn a_wrong_size() {
    let _turn = turn();
    let bytes = content(FILES[2]);
    let (digest, size) = object(2);
    let url = std::sync::Arc::new(std::sync::OnceLock::<String>::new());
    let (own, oid) = (url.clone(), digest.clone());
    let server = Upstream::answering(move |request| {
        if request.method == "GET" {
            return Response::ok("application/octet-stream", bytes.clone());
        }
        let action = json!({"href": format!("{}/objects/{oid}", own.get().unwrap())});
        let object = json!({"oid": oid, "size": size + 1, "actions": {"download": action}});
        Response::ok(KIND, json!({"transfer": "basic", "objects": [object]}).to_string())
    });
    url.set(server.url()).unwrap();
    let castier = castier(&route(&server, "access = \"local\""));
    let answer = batch(&[(digest, size + 1)]).send(castier.public);
    let got = download(&castier, &answer, 0).try_send(castier.public);
    assert!(got.as_ref().map_or(true, |got| got.status >= 500), "{}", got.unwrap().status);
}
