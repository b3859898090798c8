//! HTTP/2 with real clients: curl, nghttp2's h2load, and a browser.

use crate::{
    entrance::{Authority, Curl, https, tls_config},
    support::{Request, Response, Upstream, castier, command, noise, run, sha256, skip, tool, turn},
};
use std::{fs, process::Command};
use tempfile::TempDir;

#[test]
fn curl_over_tls_and_by_prior_knowledge() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    if !run(Command::new("curl").arg("--version")).stdout.contains("HTTP2") {
        return skip("this curl speaks no HTTP/2");
    }
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let pair = authority.certify("own", &["127.0.0.1"], dir.path());
    let (secured, plain) = (castier(&tls_config(&pair, "")), castier(""));
    let ca = authority.ca();
    let ca = ca.to_str().unwrap();
    let body = noise(900, 3_000_000);
    fs::write(curl.dir.path().join("sent"), &body).unwrap();
    let target = format!("/cas/{}", sha256(&body));
    for (castier, url, arguments) in
        [(&secured, https(&secured, ""), vec!["--http2", "--cacert", ca]), (&plain, plain.url(), vec!["--http2-prior-knowledge"])]
    {
        let url = |path: &str| format!("{url}{path}");
        let version = |more: &[&str]| {
            let mut ran = command("curl", curl.dir.path());
            run(ran.args(["-s", "-o", "/dev/null", "-w", "%{http_version} %{http_code}"]).args(&arguments).args(more)).ok()
        };
        assert_eq!(version(&["-T", "sent", &url(&target)]), "2 201");
        assert_eq!(version(&["-I", &url(&target)]), "2 200");
        assert_eq!(version(&["-H", "Expect: 100-continue", "-T", "sent", &url(&target)]), "2 200");
        assert_eq!(version(&["-F", "file=@sent", &url("/cas")]), "2 201");
        assert_eq!(version(&["-T", "sent", &url("/kv/a")]), "2 201");
        assert_eq!(version(&["-X", "PATCH", &url(&target)]).split(' ').next(), Some("2"));
        assert_eq!(curl.get(&arguments, &url(&target)), ("200".into(), body.clone()));
        assert_eq!(curl.get(&arguments, &url("/kv/a")), ("200".into(), body.clone()));
        let range = [&arguments[..], &["-r", "1000000-"]].concat();
        assert_eq!(curl.get(&range, &url(&target)), ("206".into(), body[1_000_000..].to_vec()));
        castier.says("proto=HTTP/2.0");
    }
    // A client that offers HTTP/1.1 only gets it.
    let mut ran = command("curl", curl.dir.path());
    let said =
        run(ran.args(["-s", "-o", "/dev/null", "-w", "%{http_version}", "--http1.1", "--cacert", ca, &https(&secured, &target)])).ok();
    assert_eq!(said, "1.1");
}

#[test]
fn links_lead_back_to_castier() {
    let _turn = turn();
    let Some(curl) = Curl::find() else { return };
    let upstream = Upstream::answering(|request| {
        let host = request.header("host").unwrap_or_default();
        let text = format!(
            r#"{{"name":"a","versions":{{"1.0.0":{{"name":"a","version":"1.0.0","dist":{{"tarball":"http://{host}/a/-/a-1.0.0.tgz"}}}}}}}}"#
        );
        Response::ok("application/json", text)
    });
    let route = format!("[[route]]\nprotocol = \"npm\"\nprefix = \"/npm\"\nupstream = \"{}\"\naccess = \"local\"\n", upstream.url());
    let castier = castier(&route);
    let (status, body) = curl.get(&["--http2-prior-knowledge"], &format!("{}/npm/a", castier.url()));
    let text = String::from_utf8(body).unwrap();
    assert!(status == "200" && text.contains(&format!("\"{}/npm/a/-/a-1.0.0.tgz\"", castier.url())), "{status} {text}");
}

#[test]
fn h2load_with_64_streams() {
    let _turn = turn();
    let Some(h2load) = tool("h2load") else { return };
    let castier = castier("");
    let body = noise(901, 1024);
    let target = format!("/cas/{}", sha256(&body));
    assert_eq!(Request::new("PUT", &target).body(&body[..]).send(castier.public).status, 201);
    let dir = TempDir::new().unwrap();
    let mut load = command(h2load, dir.path());
    let said = run(load.args(["-n", "20000", "-c", "4", "-m", "64", &format!("{}{target}", castier.url())])).ok();
    assert!(said.contains("20000 succeeded, 0 failed, 0 errored, 0 timeout"), "{said}");
    assert_eq!(castier.metric("castier_http2_streams", &[]), 0.0);
    assert_eq!(castier.metric("castier_http2_floods_total", &[]), 0.0);
}

#[test]
fn a_browser_loads_many_blobs_over_one_connection() {
    let _turn = turn();
    let Some(browser) = ["chromium", "chromium-browser"].into_iter().find_map(which) else {
        return skip("chromium is not installed");
    };
    let (authority, dir) = (Authority::new(), TempDir::new().unwrap());
    let pair = authority.certify("own", &["127.0.0.1"], dir.path());
    // A page of another server, relayed through a route, which asks for blobs and counts the bytes.
    let page = "<!doctype html><title>waits</title><script>
        Promise.all(location.hash.slice(1).split(',').map(d => fetch('/cas/' + d).then(r => r.arrayBuffer()).then(b => b.byteLength)))
          .then(all => { document.title = 'bytes ' + all.reduce((a, b) => a + b) + ' ' + performance.getEntriesByType('resource')[0].nextHopProtocol })
          .catch(e => { document.title = 'failed ' + e });
        </script>";
    let server = Upstream::answering(move |_| Response::ok("text/html", page));
    let route = format!("[[route]]\npath = \"/page/{{name}}\"\nupstream = \"{}\"\nkind = \"fresh\"\naccess = \"local\"", server.url());
    let castier = castier(&format!("{}{route}\n", tls_config(&pair, "")));
    let curl = Curl::find();
    let mut digests = Vec::new();
    for n in 0..30 {
        let body = noise(1000 + n, 50_000);
        let digest = sha256(&body);
        let Some(curl) = &curl else { return };
        fs::write(curl.dir.path().join("sent"), &body).unwrap();
        assert_eq!(curl.get(&["-k", "-T", "sent"], &https(&castier, &format!("/cas/{digest}"))).0, "201");
        digests.push(digest);
    }
    let url = https(&castier, &format!("/page/a#{}", digests.join(",")));
    let mut chromium = Command::new(browser);
    let profile = format!("--user-data-dir={}", dir.path().join("profile").display());
    let said = run(chromium.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--ignore-certificate-errors",
        "--virtual-time-budget=20000",
        &profile,
        "--dump-dom",
        &url,
    ]));
    assert!(said.stdout.contains("<title>bytes 1500000 h2</title>"), "{}", said.said());
}

fn which(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}
