//! One contract for everything that can be castier's store: a castier-origin, the embedded files, and a bucket of each service that has an emulator.
//!
//! Of each store: its blobs, by `castier_cache::contract` (a castier-origin and the embedded files run it in `tests/it/contract.rs`); that nothing is
//! left behind; its entries, through castier.

use crate::{
    checks::gets,
    object_store::{KEY, Weed},
    support::{Castier, Port, Request, Running, castier, castier_with, command, run, tool, turn},
};
use castier_bucket::{Bucket, Metrics, Options};
use castier_cache::{
    Budget,
    contract::{self, Lacks},
};
use castier_config::{Origin, OriginUrl};
use data_encoding::BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::{env, fs, path::Path, sync::Arc, time::Duration};
use tempfile::TempDir;

/// Names the configuration of `the_bucket_of_the_environment`.
const CONFIG: &str = "CASTIER_TEST_BUCKET";

/// What it prints before what the store lacks.
const LACKS: &str = "the store lacks: ";

/// The blobs of the bucket that the environment names. `object_store` reads credentials from the environment, and a program cannot change its own
/// while it has threads. So this runs in a process of its own, from `lacks`.
#[test]
fn the_bucket_of_the_environment() {
    let Some(file) = env::var_os(CONFIG) else { return };
    let loaded = castier_config::load::<castier_config::Castier>(Some(file.as_ref()), std::iter::empty()).unwrap();
    let origin: Origin = loaded.config.origin;
    let OriginUrl::Bucket(url) = &origin.url else { panic!("a bucket") };
    let options = Options {
        memory: Budget::new(64 << 20),
        spool: Budget::new(64 << 20),
        spool_dir: Path::new(&file).parent().unwrap().to_owned(),
        allow_delete: true,
        streams: 64,
        metrics: Arc::new(Metrics::new(&prometheus::Registry::new()).unwrap()),
    };
    let bucket = Bucket::new(url, &origin, options).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        println!("{LACKS}{:?}", contract::store(&bucket).await);
        // The ends of uploads that were given up.
        bucket.close(Duration::from_secs(30)).await;
    });
}

/// Runs the contract of blobs on a bucket.
#[track_caller]
fn lacks(dir: &Path, config: &str, variables: &[(&'static str, String)]) -> String {
    let file = dir.join("contract.toml");
    fs::write(&file, config).unwrap();
    let mut test = command(env::current_exe().unwrap(), dir);
    test.args(["--exact", "stores::the_bucket_of_the_environment", "--nocapture"]).env(CONFIG, &file);
    test.envs(variables.iter().map(|(name, value)| (name, value)));
    let said = run(&mut test).ok();
    said.lines().find_map(|line| Some(line.split_once(LACKS)?.1.to_owned())).unwrap_or_else(|| panic!("nothing was tested: {said}"))
}

fn is(lacks: Lacks) -> String {
    format!("{lacks:?}")
}

/// The entries of castier over any store: names that a store could mix up, take apart or not take at all.
fn entries(castier: &Castier) {
    let key = "0123456789abcdef".repeat(4);
    // SeaweedFS has keys of 255 bytes at most between two slashes, and S3 of 1024 in all. There, an umlaut is its escaped form.
    let long = ["n".repeat(255), "%C3%A4".repeat(42), "d/".repeat(60) + "n"];
    // Escaped as they are listed.
    let names = "plain Plain a%20b a%2Bb a%25b a%2525b a%26b%3Dc a%3Fb a%23b a%3Ab a%5Cb a%22b a%3Cb%3E a%2Ab a%7Cb a%60b a%5Eb a%7Bb%7D a%5Bb%5D ~ - _ \
                 ... a. .a %20a a%20 %C3%A4 a%CC%88 %E2%98%83 %F0%9F%92%BE con cas %27";
    let put = |target: &str, body: &str| Request::new("PUT", target).body(body).send(castier.public);
    let targets: Vec<_> = names.split_whitespace().map(|name| format!("/kv/odd/{name}")).collect();
    let others = [format!("/ac/{key}"), format!("/team.x/ac/{key}")].into_iter().chain(long.map(|name| format!("/kv/{name}")));
    let all: Vec<_> = targets.iter().cloned().chain(others).collect();
    for target in &all {
        assert_eq!(Request::get(target).send(castier.public).status, 404, "{target}");
        let stored = put(target, target);
        assert_eq!(stored.status, 201, "{target}: {}", stored.text());
    }
    for target in &targets {
        gets(castier.public, &Request::get(target), target.as_bytes());
    }
    let list = Request::new("PROPFIND", "/kv/odd/").with("Depth", "1").send(castier.public);
    assert_eq!(list.status, 207, "{}", list.text());
    let text = list.text();
    let mut listed: Vec<_> = text.split("<D:href>").skip(1).map(|rest| rest.split('<').next().unwrap().to_owned()).collect();
    let mut expected: Vec<_> = targets.iter().cloned().chain(["/kv/odd/".to_owned()]).collect();
    listed.sort();
    expected.sort();
    assert_eq!(listed, expected);
    for target in &all {
        assert_eq!(put(target, "changed").status, 200, "{target}");
        gets(castier.public, &Request::get(target), b"changed");
        assert_eq!(Request::new("DELETE", target).send(castier.public).status, 204, "{target}");
        assert_eq!(Request::get(target).send(castier.public).status, 404, "{target}");
        assert_eq!(Request::new("DELETE", target).send(castier.public).status, 404, "{target}");
    }
    conditions(castier);
    // An entry, and another one below it as if it were a directory.
    for target in ["/kv/both", "/kv/both/below"] {
        let stored = put(target, target);
        assert_eq!(stored.status, 201, "{target}: {}", stored.text());
    }
    for target in ["/kv/both", "/kv/both/below"] {
        gets(castier.public, &Request::get(target), target.as_bytes());
        assert_eq!(Request::new("DELETE", target).send(castier.public).status, 204, "{target}");
    }
}

/// An entry is changed only if it is what the client has seen.
fn conditions(castier: &Castier) {
    let target = "/kv/conditional";
    let put = |header: &str, value: &str, body: &str| Request::new("PUT", target).with(header, value).body(body).send(castier.public);
    assert_eq!(put("If-Match", "\"other\"", "none").status, 412);
    assert_eq!(put("If-None-Match", "*", "one").status, 201);
    assert_eq!(put("If-None-Match", "*", "two").status, 412);
    let tag = gets(castier.public, &Request::get(target), b"one").header("etag").unwrap();
    assert_eq!(put("If-Match", "\"other\"", "two").status, 412);
    assert_eq!(put("If-Match", &tag, "two").status, 200);
    assert_eq!(put("If-Match", &tag, "three").status, 412);
    gets(castier.public, &Request::get(target), b"two");
    assert_eq!(Request::new("DELETE", target).send(castier.public).status, 204);
}

#[test]
fn entries_of_the_embedded_files() {
    let _turn = turn();
    entries(&castier("allow_delete = true"));
}

#[test]
fn a_bucket_of_seaweedfs() {
    let _turn = turn();
    let Some(weed) = Weed::start() else { return };
    // Nothing is remembered here; the other stores run with the default.
    let config = weed.config_as("s3://blobs", KEY, "origin.existence_ttl = \"0s\"");
    assert_eq!(lacks(weed.dir.path(), &config, &[]), is(Lacks { one_creator: false, one_creator_of_many_parts: true }));
    entries(&castier(&weed.config_as("s3://blobs", KEY, "")));
    let left = |query: &str, mark: &str| -> Vec<String> {
        let (status, text) = weed.curl("GET", &format!("/blobs?{query}"), b"");
        assert_eq!(status, 200);
        String::from_utf8(text).unwrap().split(mark).skip(1).map(|rest| rest.split('<').next().unwrap().to_owned()).collect()
    };
    assert_eq!(left("list-type=2", "<Key>"), ["first"]);
    assert_eq!(left("uploads=", "<UploadId>"), [""; 0]);
}

#[test]
fn a_bucket_of_moto() {
    let _turn = turn();
    let (Some(moto), Some(curl)) = (tool("moto_server"), tool("curl")) else { return };
    let (dir, port) = (TempDir::new().unwrap(), Port::free());
    let url = format!("http://{}", port.addr());
    let mut process = Running::start(command(moto, dir.path()).args(["-H", "127.0.0.1", "-p", &port.number().to_string()]));
    process.listens(port.addr());
    let ask = |method: &str, target: &str| {
        let signed = ["-sS", "--fail", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", "castier:secret", "-X", method];
        run(command(&curl, dir.path()).args(signed).arg(format!("{url}{target}"))).ok()
    };
    ask("PUT", "/blobs");
    fs::write(dir.path().join("secret"), "secret").unwrap();
    let config = format!(
        "allow_delete = true\norigin.url = \"s3://blobs\"\n[origin.s3]\nendpoint = \"{url}\"\naccess_key_id = \"castier\"\nsecret_access_key_file = \"{}\"\n",
        dir.path().join("secret").display()
    );
    assert_eq!(lacks(dir.path(), &config, &[]), is(Lacks { one_creator: false, one_creator_of_many_parts: true }));
    entries(&castier(&config));
    assert!(!ask("GET", "/blobs?list-type=2").contains("<Key>"), "objects are left");
    assert!(!ask("GET", "/blobs?uploads=").contains("<UploadId>"), "uploads are left");
}

/// The account that Azurite has, with its well-known key.
const ACCOUNT: &str = "devstoreaccount1";
const ACCOUNT_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// The query that lets everything be done with that account.
fn azure_access() -> String {
    let (permissions, end, version) = ("rwdlac", "2099-01-01T00:00:00Z", "2018-11-09");
    let text = format!("{ACCOUNT}\n{permissions}\nb\nsco\n\n{end}\n\n\n{version}\n");
    let mut mac = Hmac::<Sha256>::new_from_slice(&BASE64.decode(ACCOUNT_KEY.as_bytes()).unwrap()).unwrap();
    mac.update(text.as_bytes());
    let signature = BASE64.encode(&mac.finalize().into_bytes()).replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    format!("sv={version}&ss=b&srt=sco&sp={permissions}&se={end}&sig={signature}")
}

#[test]
fn a_container_of_azurite() {
    let _turn = turn();
    let (Some(azurite), Some(curl), Some(_)) = (tool("azurite-blob"), tool("curl"), tool("node")) else { return };
    let (dir, port) = (TempDir::new().unwrap(), Port::free());
    let options =
        ["--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--blobHost", "127.0.0.1", "--blobPort"];
    let mut process = Running::start(command(azurite, dir.path()).args(options).arg(port.number().to_string()));
    process.listens(port.addr());
    let url = format!("http://{}", port.addr());
    let ask = |method: &str, query: &str| {
        let target = format!("{url}/{ACCOUNT}/blobs?restype=container{query}&{}", azure_access());
        run(command(&curl, dir.path()).args(["-sS", "--fail", "-X", method, "-H", "Content-Length: 0", &target])).ok()
    };
    ask("PUT", "");
    let variables = [("AZURE_STORAGE_USE_EMULATOR", "true".to_owned()), ("AZURITE_BLOB_STORAGE_URL", url.clone())];
    let config = "allow_delete = true\norigin.url = \"az://blobs\"\n";
    let lacks = lacks(dir.path(), config, &variables);
    // Who is completed second finds its parts gone, unless it was quick enough: this is not always so.
    assert!(lacks.contains("one_creator: false"), "{lacks}");
    entries(&castier_with(config, &variables));
    // Parts that were not joined stay for a week; they are no blob.
    let left = ask("GET", "&comp=list");
    assert!(left.contains("<Blobs") && !left.contains("<Name>"), "blobs are left: {left}");
}
