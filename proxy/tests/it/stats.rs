//! `/stats`, the data of the status page.

use crate::support::{
    Blob, Castier, Cluster, Download, Gate, KIB, Lie, LyingOrigin, MIB, Request, RouteUpstream,
    cluster::{DISK, wait_for_peers},
    eventually, get, light, stats,
};
use serde_json::Value;

/// A moment in UTC, to the second.
fn is_moment(value: &Value) -> bool {
    let text = value.as_str().unwrap_or_default();
    text.len() == 20 && text.ends_with('Z') && text.as_bytes()[10] == b'T'
}

/// The problems, as `what: text`.
fn problems(stats: &Value) -> Vec<String> {
    let problems = stats["problems"].as_array().unwrap();
    assert!(problems.iter().all(|problem| is_moment(&problem["since"]) && problem["severity"].is_string()), "{stats}");
    problems.iter().map(|problem| format!("{}: {}", problem["what"].as_str().unwrap(), problem["text"].as_str().unwrap())).collect()
}

#[tokio::test]
async fn one_node_tells_of_itself_its_origin_and_its_clients() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let config = "origin.connect_timeout = \"500ms\"\norigin.retries = 0\nfill.max_in_flight = 2\nfill.max_wait = \"100ms\"\nlog.stats_interval = \"100ms\"";
    let castier = Castier::start(&origin.url(), config).await;
    let told = stats(&castier).await;
    assert_eq!((&told["version"], &told["node"], &told["state"]), (&env!("CARGO_PKG_VERSION").into(), &Value::Null, &"ready".into()));
    assert!(is_moment(&told["started"]) && is_moment(&told["now"]) && told["uptime_seconds"].as_f64() > Some(0.0), "{told}");
    assert_eq!((told["origin"]["up"].clone(), told["disk_tier"]["state"].clone()), (true.into(), "none".into()));
    for null in ["since", "path"] {
        assert!(told["disk_tier"][null].is_null(), "{told}");
    }
    assert_eq!((problems(&told), told["members"].clone()), (vec![], Value::Array(vec![])));
    assert_eq!(told["routes"], Value::Array(vec![]));
    assert_eq!((&told["history"]["step_seconds"], &told["top"]["seconds"]), (&10.into(), &300.into()));

    // Who asks for what: a hot blob, one that is absent, an upload, something else.
    let (hot, absent) = (origin.blob(100 * KIB), Blob::new(1));
    for _ in 0..3 {
        get(castier.public, &hot).await.assert_is(&hot);
    }
    for _ in 0..2 {
        get(castier.public, &absent).await.assert_problem(404);
    }
    let stored = Blob::new(1000);
    assert_eq!(Request::new("PUT", stored.path()).body(stored.whole()).send(castier.public).await.status, 201);
    Request::get("/elsewhere").send(castier.public).await;
    let told = eventually("all are counted", async || Some(stats(&castier).await).filter(|told| told["requests"]["total"] == 7)).await;
    let top = &told["top"];
    let client = &top["clients"][0];
    assert_eq!((&client["client"], &client["requests"], top["clients"].as_array().unwrap().len()), (&"127.0.0.1".into(), &7.into(), 1));
    assert!(client["bytes"].as_u64() >= Some(3 * hot.size), "{told}");
    let digest = |blob: &Blob| Value::from(blob.digest.to_string());
    let expected = serde_json::json!([{"digest": digest(&hot), "requests": 3, "bytes": 3 * hot.size}]);
    assert_eq!(top["digests"], expected, "reads that were answered");
    assert_eq!(top["refused"], serde_json::json!([{"digest": digest(&absent), "requests": 2}]));
    assert_eq!(told["bytes"], serde_json::json!({"served": 3 * hot.size, "from_origin": hot.size, "from_peers": 0}));
    assert_eq!(
        (&told["requests"]["errors"], &told["requests"]["shed"], &told["origin"]["bytes"]),
        (&0.into(), &0.into(), &hot.size.into())
    );
    assert!(told["origin"]["requests"].as_u64() >= Some(4) && told["first_byte"]["p50_ms"].as_f64() > Some(0.0), "{told}");
    assert!(told["first_byte"]["p99_ms"].as_f64() >= told["first_byte"]["p50_ms"].as_f64(), "{told}");

    // Flights, the oldest first.
    let gate = Gate::new();
    let blobs = [4 * MIB, 5 * MIB].map(|size| origin.blob_with(size, [Lie::honest().stall(2 * MIB, &gate)]));
    let mut clients = Vec::new();
    for (blob, readers) in [(&blobs[0], 1), (&blobs[1], 2)] {
        for _ in 0..readers {
            let (blob, from) = (blob.clone(), castier.public);
            clients.push(tokio::spawn(async move { Download::default().of(&blob, from).await }));
        }
        eventually("the flight is on its way", async || {
            let told = stats(&castier).await;
            let flight = told["flights"].as_array().unwrap().last().cloned().unwrap_or_default();
            (flight["bytes"] == 2 * MIB && flight["readers"] == readers && flight["digest"] == digest(blob)).then_some(())
        })
        .await;
    }
    let told = stats(&castier).await;
    let flights = told["flights"].as_array().unwrap();
    assert_eq!((flights.len(), &told["flights_total"], &told["requests"]["in_flight"]), (2, &2.into(), &3.into()), "{told}");
    for (flight, blob) in flights.iter().zip(&blobs) {
        assert_eq!((&flight["digest"], &flight["size"], &flight["from"]), (&digest(blob), &blob.size.into(), &"origin".into()));
    }
    assert!(flights[0]["age_seconds"].as_f64() >= flights[1]["age_seconds"].as_f64(), "{told}");

    // A limit that is reached.
    let refused = get(castier.public, &origin.blob(MIB)).await;
    refused.assert_problem(503);
    let told = stats(&castier).await;
    assert_eq!(problems(&told), ["shedding: requests are turned away at a limit: fills"]);
    assert_eq!(told["requests"]["shed"], 1);
    gate.open();
    for client in clients {
        assert!(client.await.unwrap().complete);
    }

    // Wrong bytes, and then no origin at all.
    let wrong = origin.blob(1000);
    origin.always(&wrong, Lie::honest().flip_bit(5));
    get(castier.public, &wrong).await.assert_problem(502);
    origin.down().await;
    let gone = Blob::new(1);
    get(castier.public, &gone).await.assert_problem(502);
    let told = stats(&castier).await;
    let expected =
        ["shedding: requests are turned away at a limit: fills", "corrupt: the origin sent wrong bytes", "origin: origin unreachable"];
    let mut found = problems(&told);
    // Of problems within one second the order is that of the kinds.
    found.sort_by_key(|problem| expected.iter().position(|expected| expected == problem));
    assert_eq!(found, expected);
    assert!(told["origin"]["up"] == false && is_moment(&told["origin"]["since"]) && told["origin"]["errors"].as_u64() >= Some(1), "{told}");
    assert_eq!(told["requests"]["errors"], 3, "503, and twice 502: {told}");
    origin.up().await;
    // No client asks for anything that it would be needed for, so castier asks by itself.
    let told =
        eventually("the origin is found to be back", async || Some(stats(&castier).await).filter(|told| told["origin"]["up"] == true))
            .await;
    assert!(is_moment(&told["origin"]["since"]) && !problems(&told).iter().any(|problem| problem.starts_with("origin")), "{told}");

    // The log gets the same without what is long.
    let line =
        eventually("a record", async || castier.output().lines().rev().find(|line| line.contains("LoadsDeduped")).map(str::to_owned)).await;
    assert!(line.contains("first_byte") && line.contains("problems"), "{line}");
    assert!(!["history", "\\\"top\\\"", "\\\"flights\\\"", "members"].iter().any(|long| line.contains(long)), "{line}");

    // The past: a point at least, in which all of this happened.
    let told = eventually("a point", async || {
        Some(stats(&castier).await).filter(|told| !told["history"]["points"].as_array().unwrap().is_empty())
    })
    .await;
    let points = told["history"]["points"].as_array().unwrap();
    let sum = |name: &str| points.iter().map(|point| point[name].as_u64().unwrap()).sum::<u64>();
    assert!(sum("requests") >= 13 && sum("gets") >= 10 && sum("hits") >= 2 && sum("errors") >= 3, "{told}");
    assert!(sum("bytes_served") >= 3 * hot.size + 14 * MIB && sum("bytes_from_origin") >= 9 * MIB, "{told}");
    let unix = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(points.iter().all(|point| point["at"].as_u64().is_some_and(|at| at <= unix && at + 100 > unix)), "{told}");
    assert!(points[0]["first_byte_p50_ms"].as_f64() > Some(0.0) && points[0]["first_byte_p99_ms"].is_number(), "{told}");
}

#[tokio::test]
async fn routes_have_figures_and_an_upstream_that_is_away_is_a_problem() {
    let _turn = light().await;
    let (origin, upstream) = (LyingOrigin::start().await, RouteUpstream::start().await);
    let config = format!(
        "log.stats_interval = \"100ms\"\nroute = [\
           {{ protocol = \"npm\", prefix = \"/npm\", upstream = \"{0}\", access = \"local\", ttl = \"1h\" }}, \
           {{ path = \"/files/{{name}}\", kind = \"fresh\", upstream = \"{0}\", access = \"local\", ttl = \"0s\" }}]",
        upstream.url()
    );
    let castier = Castier::start(&origin.url(), &config).await;
    let told = stats(&castier).await;
    let route = |route: &str| {
        serde_json::json!({"route": route, "upstream": format!("{}/", upstream.url()), "up": true, "breaker": "closed", "since": null, "requests": 0, "hits": 0,
            "revalidated": 0, "stale": 0, "misses": 0, "refused": 0, "questions": 0, "saved_bytes": 0})
    };
    assert_eq!(told["routes"], serde_json::json!([route("npm /npm"), route("/files/{name}")]));
    for path in ["/npm/left-pad", "/npm/left-pad", "/npm/left-pad", "/npm/secret", "/npm/absent", "/files/a", "/files/a"] {
        Request::get(path).send(castier.public).await;
    }
    let told = eventually("all are counted", async || Some(stats(&castier).await).filter(|told| told["routes"][1]["requests"] == 2)).await;
    let mut npm = route("npm /npm");
    for (name, value) in [("requests", 5), ("hits", 2), ("misses", 1), ("refused", 1), ("questions", 3), ("saved_bytes", 2 * 9)] {
        npm[name] = value.into();
    }
    assert_eq!(told["routes"][0], npm);
    let files = &told["routes"][1];
    assert_eq!((&files["hits"], &files["revalidated"], &files["misses"]), (&1.into(), &1.into(), &1.into()), "{told}");
    assert_eq!(problems(&told), Vec::<String>::new());

    upstream.goes();
    assert_eq!(Request::get("/files/a").send(castier.public).await.status, 200);
    let told = stats(&castier).await;
    let (npm, files) = (&told["routes"][0], &told["routes"][1]);
    assert!(files["up"] == false && is_moment(&files["since"]) && files["stale"] == 1 && npm["up"] == true, "{told}");
    assert_eq!(problems(&told), ["upstream: the upstream of route /files/{name} is down"]);
    assert_eq!((&told["problems"][0]["since"], &told["problems"][0]["severity"]), (&files["since"], &"warning".into()));
    assert_eq!(told["origin"]["up"], true, "the origin is another server");

    upstream.is_back();
    assert_eq!(Request::get("/files/a").send(castier.public).await.status, 200);
    let told = stats(&castier).await;
    assert!(told["routes"][1]["up"] == true && is_moment(&told["routes"][1]["since"]), "{told}");
    assert_eq!(problems(&told), Vec::<String>::new());
    let log =
        eventually("a record", async || castier.output().lines().rev().find(|line| line.contains("LoadsDeduped")).map(str::to_owned)).await;
    assert!(!log.contains("saved_bytes"), "{log}");
    let changes = |text: &str| castier.output().lines().filter(|line| line.contains(text)).count();
    assert_eq!(
        (changes("the upstream of a route is down"), changes("the upstream of a route is up again")),
        (1, 1),
        "{}",
        castier.output()
    );
}

#[tokio::test]
async fn nodes_tell_of_each_other_and_count_no_peer_as_a_client() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let config = format!("{DISK}\ncluster.stall_timeout = \"1s\"\nmemory.capacity = \"4MiB\"\nmemory.max_blob = \"1MiB\"");
    let mut cluster = Cluster::start(2, &origin.url(), &config).await;
    let blob = origin.blob(300 * KIB);
    let owner = cluster.owner(&blob);
    let (asked, name) = (1 - owner, cluster.nodes[owner].name.clone());
    for _ in 0..2 {
        get(cluster.nodes[asked].public(), &blob).await.assert_is(&blob);
    }
    let told = stats(cluster.nodes[owner].castier()).await;
    assert_eq!((told["ServerRequests"].as_u64(), &told["requests"]["total"], &told["bytes"]["served"]), (Some(1), &0.into(), &0.into()));
    let top = &told["top"];
    for kind in ["clients", "digests", "refused"] {
        assert_eq!(top[kind], serde_json::json!([]), "a peer is no client: {told}");
    }
    assert_eq!(told["first_byte"]["p50_ms"], Value::Null, "{told}");
    let disk = &told["disk_tier"];
    assert!(disk["state"] == "ok" && disk["path"].as_str().is_some_and(|path| path.ends_with("/disk")), "{told}");
    assert!(disk["filesystem_avail_bytes"].as_u64() > Some(0) && disk["errors"] == 0, "{told}");

    let node = &cluster.nodes[asked];
    let told = eventually("a probe", async || {
        Some(stats(node.castier()).await)
            .filter(|told| told["members"].as_array().unwrap().iter().any(|member| member["probe_ms"].is_number()))
    })
    .await;
    assert_eq!((&told["node"], &told["top"]["clients"][0]["requests"]), (&node.name.clone().into(), &2.into()));
    assert_eq!(told["bytes"]["from_peers"], blob.size);
    let members = told["members"].as_array().unwrap();
    let member = |told: &Value, name: &str| {
        told["members"].as_array().unwrap().iter().find(|member| member["name"] == name).cloned().expect("a member")
    };
    assert_eq!(members.iter().map(|member| member["share"].as_f64().unwrap()).sum::<f64>(), 1.0);
    let own = member(&told, &node.name);
    assert!(own["self"] == true && own["up"] == true && own["probe_ms"].is_null(), "{told}");
    let other = member(&told, &name);
    assert!(other["self"] == false && other["up"] == true && other["since"].is_null() && other["errors"] == 0, "{told}");

    // Blobs push each other out, and the disk fills.
    let mut blobs = Vec::new();
    eventually("an eviction", async || {
        let blob = origin.blob(MIB - 1000);
        get(node.public(), &blob).await.assert_is(&blob);
        blobs.push(blob);
        let told = stats(node.castier()).await;
        (told["tiers"]["memory"]["evicted_age_seconds"].is_number()).then_some(())
    })
    .await;

    cluster.nodes[owner].kill().await;
    let node = &cluster.nodes[asked];
    wait_for_peers(node, 0, 1).await;
    let told = stats(node.castier()).await;
    let other = member(&told, &name);
    assert!(other["up"] == false && is_moment(&other["since"]), "{told}");
    assert_eq!(problems(&told), [format!("peer: {name} is down")]);
    assert_eq!(told["problems"][0]["since"], other["since"]);
}
