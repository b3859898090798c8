//! The admin interface and the log.

use crate::support::{
    Blob, Castier, Cluster, KIB, LyingOrigin, MIB, Reply, Request, RouteUpstream, assert_ledger, eventually, get, light, metrics, stats,
};
use serde_json::{Value, json};

async fn world(config: &str) -> (LyingOrigin, Castier) {
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), config).await;
    (origin, castier)
}

/// Every series of the contract, except those of a cluster.
const SERIES: &[(&str, &str)] = &[
    ("castier_http_requests_total", "counter"),
    ("castier_http_request_duration_seconds", "histogram"),
    ("castier_http_response_bytes_total", "counter"),
    ("castier_gets_total", "counter"),
    ("castier_loads_total", "counter"),
    ("castier_flights_total", "counter"),
    ("castier_collapsed_total", "counter"),
    ("castier_hits_total", "counter"),
    ("castier_source_loads_total", "counter"),
    ("castier_source_load_duration_seconds", "histogram"),
    ("castier_source_resumes_total", "counter"),
    ("castier_flights_in_progress", "gauge"),
    ("castier_flight_followers", "gauge"),
    ("castier_tier_bytes", "gauge"),
    ("castier_tier_capacity_bytes", "gauge"),
    ("castier_tier_blobs", "gauge"),
    ("castier_tier_evictions_total", "counter"),
    ("castier_corrupt_blobs_total", "counter"),
    ("castier_shed_requests_total", "counter"),
    ("castier_build_info", "gauge"),
    ("process_cpu_seconds_total", "counter"),
    ("process_resident_memory_bytes", "gauge"),
    ("process_open_fds", "gauge"),
];

#[tokio::test]
async fn every_series_is_there_and_none_names_a_digest() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(100 * KIB);
    get(castier.public, &blob).await.assert_is(&blob);
    get(castier.public, &blob).await.assert_is(&blob);
    get(castier.public, &Blob::new(1)).await.assert_problem(404);
    for method in ["BREW", "PROPFIND", "X1", "X2", "X3"] {
        Request::new(method, "/elsewhere").send(castier.public).await;
    }
    let now = metrics(&castier).await;
    for (name, kind) in SERIES {
        assert!(now.text.contains(&format!("# TYPE {name} {kind}\n")), "{name}, a {kind}, is missing:\n{}", now.text);
        assert!(now.text.contains(&format!("# HELP {name} ")), "{name} is not explained");
    }
    let blob_requests =
        |code| now.sum("castier_http_requests_total", &[("listener", "public"), ("method", "GET"), ("route", "blob"), ("code", code)]);
    assert_eq!((blob_requests("200"), blob_requests("404")), (2, 1));
    let bytes = |from| now.sum("castier_http_response_bytes_total", &[("from", from)]);
    assert_eq!((bytes("flight"), bytes("memory")), (blob.size, blob.size));
    let timed = |result| now.sum("castier_http_request_duration_seconds_count", &[("route", "blob"), ("result", result)]);
    assert_eq!((timed("hit"), timed("miss")), (1, 1), "the third was answered with an error");
    assert_eq!(now.sum("castier_hits_total", &[("tier", "memory")]), 1);
    assert_eq!(now.sum("castier_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1);
    assert_eq!((now.kept(), now.total("castier_tier_capacity_bytes")), (1, 256 * MIB));
    assert!(now.total("castier_tier_bytes") >= blob.size);
    let hex = |text: &str| text.split(|c: char| !c.is_ascii_hexdigit()).any(|word| word.len() >= 32);
    assert!(!now.series().any(hex), "a digest stands in a label");
    let methods = now.series().filter(|series| series.starts_with("castier_http_requests_total") && series.contains("relay")).count();
    assert!(methods <= 1, "any token can be a method, but not a label: {methods} series");
    let reply = Request::get("/metrics").send(castier.admin).await;
    assert!(reply.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{:?}", reply.head);
}

#[tokio::test]
async fn health_stats_and_the_page() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    for path in ["/healthz", "/readyz", "/"] {
        assert_eq!(Request::get(path).send(castier.admin).await.status, 200, "{path}");
        assert_eq!(Request::new("HEAD", path).send(castier.admin).await.status, 200, "HEAD {path}");
    }
    let page = Request::get("/").send(castier.admin).await;
    assert!(page.header("content-type").is_some_and(|kind| kind.starts_with("text/html")), "{:?}", page.head);
    for (name, value) in [("x-content-type-options", "nosniff"), ("cache-control", "no-store"), ("referrer-policy", "no-referrer")] {
        assert_eq!(page.header(name), Some(value), "{:?}", page.head);
    }
    let policy = page.header("content-security-policy").unwrap_or_default();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe"), "{policy}");
    Request::get("/nowhere").send(castier.admin).await.assert_problem(404);
    let wrong = Request::new("POST", "/stats").send(castier.admin).await;
    wrong.assert_problem(405);
    assert!(wrong.header("allow").is_some_and(|allowed| allowed.contains("GET")), "{:?}", wrong.head);

    let blob = origin.blob(50 * KIB);
    for _ in 0..5 {
        get(castier.public, &blob).await.assert_is(&blob);
    }
    assert_ledger(&castier).await;
    let told = stats(&castier).await;
    let figures = [
        ("Gets", 5),
        ("CacheHits", 4),
        ("PeerLoads", 0),
        ("PeerErrors", 0),
        ("Loads", 1),
        ("LoadsDeduped", 1),
        ("LocalLoads", 1),
        ("LocalLoadErrs", 0),
        ("ServerRequests", 0),
    ];
    for (name, value) in figures {
        assert_eq!(told[name].as_u64(), Some(value), "{name}: {told}");
    }
    let memory = &told["tiers"]["memory"];
    assert_eq!((memory["blobs"].as_u64(), memory["hits"].as_u64(), memory["evictions"].as_u64()), (Some(1), Some(4), Some(0)), "{told}");
    assert!(memory["bytes"].as_u64() >= Some(blob.size) && memory["capacity"].as_u64() == Some(256 * MIB), "{told}");
    // Admin paths do not exist on the public listener.
    let relayed = Request::get("/stats").send(castier.public).await;
    assert_eq!(relayed.header("x-from"), Some("origin"));
}

#[tokio::test]
async fn purge() {
    let _turn = light().await;
    let (origin, castier) = world("").await;
    let blob = origin.blob(1000);
    let path = format!("/purge/{}", blob.digest);
    for loads in 1..=3 {
        get(castier.public, &blob).await.assert_is(&blob);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_eq!(origin.gets(&blob), loads);
        let reply = Request::new("POST", path.as_str()).send(castier.admin).await;
        assert_eq!(reply.status, 200);
        let told: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        assert!(told["purged"].is_array() && told["failed"] == serde_json::json!([]), "{told}");
    }
    assert_eq!(metrics(&castier).await.kept(), 0);
    assert!(origin.holds(&blob), "the origin is not touched");
    Request::new("POST", "/purge/abc").send(castier.admin).await.assert_problem(400);
    Request::get(path).send(castier.admin).await.assert_problem(405);
    assert_ledger(&castier).await;
}

/// A castier with a route for each of these lines of TOML, in front of one upstream.
async fn with_routes(lines: &[&str]) -> (LyingOrigin, RouteUpstream, Castier) {
    let upstream = RouteUpstream::start().await;
    let routes: Vec<_> = lines.iter().map(|line| format!("{{ {line}, upstream = \"{}\", access = \"local\" }}", upstream.url())).collect();
    let (origin, castier) = world(&format!("route = [{}]", routes.join(", "))).await;
    (origin, upstream, castier)
}

fn json_of(reply: &Reply) -> Value {
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")), "{:?}", reply.head);
    serde_json::from_slice(&reply.body).unwrap()
}

#[tokio::test]
async fn a_page_of_another_site_cannot_purge() {
    let _turn = light().await;
    let (_origin, upstream, castier) = with_routes(&["protocol = \"npm\", prefix = \"/npm\", ttl = \"1h\""]).await;
    let own = castier.admin.to_string();
    let path = format!("/purge/{}", Blob::new(1).digest);
    let one_name = json!({"url": "/npm/left-pad"}).to_string();
    // What a browser adds to a request of a page, and the status.
    let requests: &[(&[(&str, &str)], u16)] = &[
        // curl and scripts send neither.
        (&[], 200),
        (&[("Sec-Fetch-Site", "same-origin")], 200),
        // Somebody typed the address, or followed a bookmark.
        (&[("Sec-Fetch-Site", "none")], 200),
        (&[("Sec-Fetch-Site", "cross-site")], 403),
        // Another port of the same host, or another host of the same domain.
        (&[("Sec-Fetch-Site", "same-site")], 403),
        (&[("Sec-Fetch-Site", "something new")], 403),
        // An older browser sends only where the page comes from.
        (&[("Origin", &format!("http://{own}"))], 200),
        (&[("Origin", "http://evil.example")], 403),
        (&[("Origin", "http://127.0.0.1:1")], 403),
        (&[("Origin", "null")], 403),
        // The newer header counts.
        (&[("Origin", &format!("http://{own}")), ("Sec-Fetch-Site", "cross-site")], 403),
        (&[("Origin", "https://admin.example"), ("Sec-Fetch-Site", "same-origin")], 200),
    ];
    for (headers, status) in requests {
        let with = |request: Request| {
            headers.iter().fold(request.header("Host", own.as_str()), |request, (name, value)| request.header(name, *value))
        };
        Request::get("/npm/left-pad").send(castier.public).await;
        for (what, request) in
            [("a digest", Request::new("POST", path.as_str())), ("a URL", Request::new("POST", "/purge").body(one_name.as_str()))]
        {
            let reply = with(request).send(castier.admin).await;
            assert_eq!(reply.status, *status, "{what}: {headers:?}");
            match status {
                403 => assert!(reply.assert_problem(403).contains("another site"), "{headers:?}"),
                _ if what == "a URL" => assert!(json_of(&reply)["names"].as_u64() > Some(0), "{headers:?}"),
                _ => assert_eq!(json_of(&reply)["failed"], json!([]), "{headers:?}"),
            }
        }
    }
    let purged = requests.iter().filter(|(_, status)| *status == 200).count();
    assert_eq!(upstream.asked("/left-pad"), purged, "what was refused has purged nothing");
}

#[tokio::test]
async fn names_are_purged_by_url_and_by_route() {
    let _turn = light().await;
    let routes =
        ["protocol = \"npm\", prefix = \"/npm\", ttl = \"1h\"", "path = \"/files/{name*}\", kind = \"frozen\", host = \"files.test\""];
    let (_origin, upstream, castier) = with_routes(&routes).await;
    let load = async |path: &'static str, host: &'static str| {
        let reply = Request::get(path).header("Host", host).send(castier.public).await;
        assert_eq!(reply.status, 200, "{path}");
    };
    let all =
        [("/npm/left-pad", "cache.test"), ("/npm/right-pad", "cache.test"), ("/files/a/1", "files.test"), ("/files/b/1", "files.test")];
    let asked = || ["/left-pad", "/right-pad", "/files/a/1", "/files/b/1"].map(|path| upstream.asked(path));
    let load_all = async || {
        for (path, host) in all {
            load(path, host).await;
        }
        asked()
    };
    assert_eq!(load_all().await, [1, 1, 1, 1]);
    assert_eq!(load_all().await, [1, 1, 1, 1], "all of it is kept");
    let purge = async |body: &str| Request::new("POST", "/purge").body(body).send(castier.admin).await;
    let purges = [
        // By URL: with the host of the route, or a path alone where no host is needed.
        (json!({"url": "http://cache.test/npm/left-pad"}), true, [2, 1, 1, 1]),
        (json!({"url": "/npm/left-pad"}), true, [3, 1, 1, 1]),
        (json!({"url": "https://files.test/files/a/1"}), true, [3, 1, 2, 1]),
        (json!({"url": "/npm/never-asked-for"}), false, [3, 1, 2, 1]),
        // By route: its name, or its protocol, with a pattern.
        (json!({"route": "npm /npm", "path": "/right-*"}), true, [3, 2, 2, 1]),
        (json!({"route": "npm", "path": "/**"}), true, [4, 3, 2, 1]),
        (json!({"route": "/files/{name*} files.test", "path": "/files/*/1"}), true, [4, 3, 3, 2]),
        (json!({"route": "/files/{name*} files.test", "path": "/files/*"}), false, [4, 3, 3, 2]),
    ];
    for (body, has_any, then) in purges {
        // A name with variants counts more than once.
        let told = json_of(&purge(&body.to_string()).await);
        assert_eq!(told["names"].as_u64().map(|names| names > 0), Some(has_any), "{body}: {told}");
        assert_eq!((&told["purged"], &told["failed"]), (&json!([]), &json!([])), "there is no other node");
        assert_eq!(load_all().await, then, "{body}");
    }
    for (body, status, told) in [
        ("", 400, "the body is"),
        ("not JSON", 400, "the body is"),
        ("{}", 400, "the body is"),
        ("[]", 400, "the body is"),
        (r#"{"url": 7}"#, 400, "the body is"),
        (r#"{"route": "npm"}"#, 400, "the body is"),
        (r#"{"path": "/**"}"#, 400, "the body is"),
        (r#"{"url": "/npm/left-pad", "route": "npm", "path": "/**"}"#, 400, "the body is"),
        (r#"{"route": "npm", "path": "/**", "dry": true}"#, 400, "the body is"),
        (r#"{"route": "npm", "path": "no slash"}"#, 400, "path: "),
        (r#"{"route": "pypi", "path": "/**"}"#, 404, "npm /npm, /files/{name*} files.test"),
        (r#"{"url": "/elsewhere"}"#, 404, "no such route"),
        // Without its host the URL is not for the route.
        (r#"{"url": "/files/a/1"}"#, 404, "no such route"),
    ] {
        let detail = purge(body).await.assert_problem(status);
        assert!(detail.contains(told), "{body}: {detail}");
    }
    assert_eq!(asked(), [4, 3, 3, 2], "none of these has purged anything");
    Request::get("/purge").send(castier.admin).await.assert_problem(405);

    let (_origin, castier) = world("").await;
    let reply = Request::new("POST", "/purge").body(json!({"url": "/npm/left-pad"}).to_string()).send(castier.admin).await;
    assert!(reply.assert_problem(404).contains("no route"), "{:?}", reply.head);
}

#[tokio::test]
async fn names_are_purged_on_all_nodes() {
    let _turn = light().await;
    let (origin, upstream) = (LyingOrigin::start().await, RouteUpstream::start().await);
    let config = format!(
        "cluster.stall_timeout = \"1s\"\n\
         route = [{{ path = \"/files/{{name*}}\", kind = \"frozen\", upstream = \"{}\", access = \"local\" }}]",
        upstream.url()
    );
    let mut cluster = Cluster::with_secret(2, &origin.url(), &config).await;
    let names = cluster.names();
    let load = async |cluster: &Cluster, path: &str| {
        for node in cluster.nodes.iter().filter(|node| node.running().is_some()) {
            assert_eq!(Request::get(path).send(node.public()).await.status, 200);
        }
        upstream.asked(path)
    };
    let purge = async |cluster: &Cluster, body: Value| {
        let told = json_of(&Request::new("POST", "/purge").body(body.to_string()).send(cluster.nodes[0].castier().admin).await);
        assert!(told["names"].as_u64() > Some(0), "{told}");
        (told["purged"].clone(), told["failed"].clone())
    };
    // Several, so that each node owns some.
    let paths: Vec<_> = (0..6).map(|number| format!("/files/{number}/a%20b")).collect();
    let by_url = paths.iter().map(|path| json!({"url": path})).collect();
    for (loads, bodies) in [(1, by_url), (2, vec![json!({"route": "/files/{name*}", "path": "/files/*/a%20*"})])] {
        for path in &paths {
            assert_eq!((load(&cluster, path).await, load(&cluster, path).await), (loads, loads), "{path}: one load for both nodes");
        }
        for body in bodies {
            assert_eq!(purge(&cluster, body).await, (json!([names[1]]), json!([])));
        }
    }
    for path in &paths {
        assert_eq!(load(&cluster, path).await, 3, "{path}");
    }
    cluster.nodes[1].kill().await;
    assert_eq!(purge(&cluster, json!({"route": "/files/{name*}", "path": "/**"})).await, (json!([]), json!([names[1]])));
}

#[tokio::test]
async fn why_explains_a_url() {
    let _turn = light().await;
    let (_origin, upstream, castier) = with_routes(&["protocol = \"npm\", prefix = \"/npm\", ttl = \"1h\""]).await;
    let why = async |url: &str| json_of(&Request::get(format!("/why?url={url}")).send(castier.admin).await);
    let url = "http%3A%2F%2Fcache.test%2Fnpm%2Fleft-pad";
    let told = why(url).await;
    assert_eq!(told["url"], "http://cache.test/npm/left-pad");
    assert_eq!((&told["route"], &told["kind"], &told["access"]), (&json!("npm /npm"), &json!("fresh"), &json!("local")), "{told}");
    assert_eq!(
        (&told["upstream"], &told["next"]),
        (&json!(format!("{}/left-pad", upstream.url())), &json!("a GET to the upstream")),
        "{told}"
    );
    assert!(told["kept"].is_null(), "{told}");
    Request::get("/npm/left-pad").send(castier.public).await;
    let told = why(url).await;
    assert_eq!((&told["freshness"], &told["next"]), (&json!("fresh"), &json!("nothing: it is sent from the cache")), "{told}");
    assert!(told["kept"].as_str().is_some_and(|kept| kept.starts_with("status 200, 9 bytes")), "{told}");
    assert_eq!(told["digest"], Blob::of(b"/left-pad").digest.to_string());
    assert_eq!(upstream.asked("/left-pad"), 1, "the explanation asks nobody");

    let told = why("/elsewhere").await;
    assert!(
        told["answer"].as_str().is_some_and(|answer| answer.contains("no route matches")) && told["routes"] == json!(["npm /npm"]),
        "{told}"
    );
    let told = why(&Blob::new(1).path()).await;
    assert!(told["answer"].as_str().is_some_and(|answer| answer.contains("blob")), "{told}");
    for path in ["/why", "/why?uri=/npm/left-pad"] {
        Request::get(path).send(castier.admin).await.assert_problem(400);
    }
    let (_origin, castier) = world("").await;
    Request::get("/why?url=/npm/left-pad").send(castier.admin).await.assert_problem(404);
}

/// The expected fields of one access record, in either format.
async fn assert_access_record(castier: &Castier, blob: &Blob, status: &str) {
    let record = eventually("an access record", async || {
        castier.output().lines().find(|line| line.contains(&blob.path()) && line.contains(status)).map(str::to_owned)
    })
    .await;
    for part in ["GET", "127.0.0.1", &blob.size.to_string()] {
        assert!(record.contains(part), "{part:?} is missing: {record}");
    }
}

#[tokio::test]
async fn one_access_record_per_request() {
    let _turn = light().await;
    for format in ["text", "json"] {
        let (origin, castier) = world(&format!("log.format = \"{format}\"")).await;
        let blob = origin.blob(12_321);
        get(castier.public, &blob).await.assert_is(&blob);
        assert_access_record(&castier, &blob, "miss").await;
        get(castier.public, &blob).await.assert_is(&blob);
        assert_access_record(&castier, &blob, "hit").await;
        assert_eq!(castier.output().lines().filter(|line| line.contains(&blob.path())).count(), 2, "{}", castier.output());
        if format == "json" {
            let output = castier.output();
            let records: Vec<&str> = output.lines().filter(|line| line.contains(&blob.path())).collect();
            for record in records {
                serde_json::from_str::<serde_json::Value>(record).unwrap_or_else(|e| panic!("{e}: {record}"));
            }
        }
    }
    let (origin, castier) = world("log.level = \"warn\"").await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    assert_ledger(&castier).await;
    assert!(!castier.output().contains(&blob.path()), "access records are of level info");
}

#[tokio::test]
async fn the_stats_go_to_the_log() {
    let _turn = light().await;
    let (_origin, castier) = world("log.stats_interval = \"200ms\"").await;
    eventually("two records of the stats", async || {
        (castier.output().lines().filter(|line| line.contains("LoadsDeduped")).count() >= 2).then_some(())
    })
    .await;
}

#[tokio::test]
async fn loki_gets_the_log_and_its_absence_hurts_nobody() {
    let _turn = light().await;
    // The scripted origin takes any request; here it stands in for Loki.
    let mut loki = LyingOrigin::start().await;
    let (origin, castier) = world(&format!("log.loki_url = \"{}\"", loki.url())).await;
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    eventually("the log reaches Loki", async || loki.seen().iter().any(|seen| seen.target == "/loki/api/v1/push").then_some(())).await;
    loki.down().await;
    for _ in 0..50 {
        get(castier.public, &blob).await.assert_is(&blob);
    }
    assert_ledger(&castier).await;
    let mut castier = Castier::start(&origin.url(), &format!("log.loki_url = \"{}\"", loki.url())).await;
    get(castier.public, &blob).await.assert_is(&blob);
    castier.signal(rustix::process::Signal::TERM);
    assert_eq!(castier.exit().await.code(), Some(0), "Loki being away holds up no shutdown");
}
