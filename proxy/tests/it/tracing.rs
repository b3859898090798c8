//! The ids and the client of a request, in the records of every program that works for it, and in the messages between them.

use crate::support::{
    Blob, Castier, Cluster, Conn, Gate, LyingOrigin, RealOrigin, Request, eventually, get, light,
    log::{self, Record},
};
use rustix::process::Signal;

const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
const JSON: &str = "log.format = \"json\"";

/// Waits for a number of records of a request.
async fn records(many: usize, output: impl Fn() -> String, wanted: impl Fn(&Record) -> bool) -> Vec<Record> {
    eventually("the records", async || {
        let found: Vec<_> = log::json(&output()).into_iter().filter(&wanted).collect();
        (found.len() >= many).then_some(found)
    })
    .await
}

#[tokio::test]
async fn a_request_has_one_name_at_every_node_and_at_the_origin() {
    let _turn = light().await;
    let origin = RealOrigin::start_with(&[("CASTIER_LOG__FORMAT", "json")]).await;
    let cluster = Cluster::with_secret(2, &origin.url(), JSON).await;
    let blob = Blob::new(300_000);
    let owner = cluster.owner(&blob);
    let (owner, asker) = (&cluster.nodes[owner], &cluster.nodes[1 - owner]);
    let ask =
        async |request: Request, id: &str| request.header("traceparent", PARENT).header("X-Request-ID", id).send(asker.public()).await;
    let everywhere = async |method: &str, path: &str, id: &str, owner_too: bool| {
        // The owner may ask back what the asker keeps, which it does not.
        let is = |record: &Record| {
            let about = record.get("path").is_some_and(|own| own == path) && record["method"] == method;
            about && record["request_id"] == id && record["status"].starts_with('2')
        };
        let mut all = records(1, || asker.castier().output(), is).await;
        if owner_too {
            all.extend(records(1, || owner.castier().output(), is).await);
        }
        all.extend(records(1, || origin.output(), is).await);
        assert!(all.iter().all(|record| record["trace_id"] == ID), "{all:?}");
        assert_eq!(all[0]["client"], "127.0.0.1");
        all
    };
    let stored = ask(Request::new("PUT", blob.path()).body(blob.whole()), "an-upload").await;
    assert_eq!(stored.status, 201);
    everywhere("PUT", &blob.path(), "an-upload", true).await;

    let purged = Request::new("POST", format!("/purge/{}", blob.digest)).send(asker.castier().admin).await;
    assert_eq!(purged.status, 200);
    ask(Request::get(blob.path()), "a-load").await.assert_is(&blob);
    let load = everywhere("GET", &blob.path(), "a-load", true).await;
    assert_eq!((load[0]["source"].as_str(), load[1]["source"].as_str()), ("peer", "origin"));
    // A hit asks nobody, and has a record with both names all the same.
    let hit = ask(Request::get(blob.path()), "a-hit").await;
    assert!(hit.header("x-request-id").is_none(), "a blob's head is the same for all: {:?}", hit.head);
    let hit = records(1, || asker.castier().output(), |record| record.get("request_id").is_some_and(|id| id == "a-hit")).await;
    assert_eq!((hit.len(), hit[0]["trace_id"].as_str(), hit[0]["cache"].as_str()), (1, ID, "hit"));

    let entry = format!("/ac/{}", "a".repeat(64));
    assert_eq!(ask(Request::new("PUT", &*entry).body("result"), "a-relay").await.status, 201);
    everywhere("PUT", &entry, "a-relay", false).await;
    // Who has trouble can name the request.
    let absent = ask(Request::get(Blob::new(77).path()), "an-absence").await;
    assert_eq!((absent.status, absent.header("x-request-id")), (404, Some("an-absence")));
    let relayed = ask(Request::get("/nothing"), "nothing").await;
    assert_eq!((relayed.status, relayed.header("x-request-id")), (404, Some("nothing")));
}

#[tokio::test]
async fn what_a_source_is_told() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), JSON).await;
    let told = |seen: &crate::support::origin::Seen| {
        ["traceparent", "tracestate", "x-request-id"].map(|name| seen.head.header(name).map(str::to_owned))
    };
    for (fields, kept) in [
        (&[("traceparent", PARENT), ("tracestate", "a=1, b=2"), ("X-Request-ID", "me")][..], true),
        (&[("traceparent", "00-bad"), ("tracestate", "a=1"), ("X-Request-ID", "not sane")], false),
        (&[], false),
    ] {
        let (blob, entry) = (origin.blob(100), format!("/ac/{}", Blob::new(1).digest));
        for path in [blob.path(), entry.clone()] {
            let request = fields.iter().fold(Request::get(&*path), |request, (name, value)| request.header(name, *value));
            request.send(castier.public).await;
            let seen = origin.seen().into_iter().rev().find(|seen| seen.target == path).unwrap();
            let [parent, state, id] = told(&seen);
            let (parent, id) = (parent.unwrap(), id.unwrap());
            assert_eq!(parent.len(), 55, "{parent}");
            assert_ne!(parent, PARENT, "what castier does is a part of its own");
            assert_eq!((parent.contains(ID), state.as_deref(), id == "me"), (kept, kept.then_some("a=1, b=2"), kept), "{parent} {id}");
            let record =
                records(1, || castier.output(), |record| record.get("path").is_some_and(|own| *own == path) && record["request_id"] == id)
                    .await;
            assert!(parent.contains(&record[0]["trace_id"]), "{record:?}");
        }
    }
    // What castier says itself of a failure names the request, too.
    origin.down().await;
    for path in [Blob::new(9).path(), "/gone".to_owned()] {
        let reply = Request::get(path).header("X-Request-ID", "failing").send(castier.public).await;
        assert_eq!((reply.status, reply.header("x-request-id")), (502, Some("failing")));
    }
}

#[tokio::test]
async fn a_flight_has_the_trace_of_the_request_that_began_it() {
    let _turn = light().await;
    let origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), JSON).await;
    let blob = Blob::new(200_000);
    origin.add(&blob);
    let gate = Gate::new();
    origin.freeze(&gate);
    let ask = |id: &'static str| {
        let (to, path) = (castier.public, blob.path());
        tokio::spawn(async move { Request::get(path).header("X-Request-ID", id).send(to).await })
    };
    let leader = ask("leader");
    eventually("the load", async || (origin.requests("GET", &blob).len() == 1).then_some(())).await;
    let follower = ask("follower");
    eventually("two readers", async || {
        let metrics = crate::support::metrics(&castier).await;
        (metrics.sum("castier_flight_followers", &[]) == 1).then_some(())
    })
    .await;
    gate.open();
    for reply in [leader.await.unwrap(), follower.await.unwrap()] {
        reply.assert_is(&blob);
    }
    let asked = origin.requests("GET", &blob);
    assert_eq!(asked.iter().map(|seen| seen.head.header("x-request-id").unwrap()).collect::<Vec<_>>(), ["leader"]);
    let both = records(2, || castier.output(), |record| record.get("path").is_some_and(|own| *own == blob.path())).await;
    let of = |id: &str| both.iter().find(|record| record["request_id"] == id).unwrap()["cache"].clone();
    assert_eq!((of("leader").as_str(), of("follower").as_str()), ("miss", "collapsed"));
}

#[tokio::test]
async fn the_client_behind_trusted_proxies() {
    let _turn = light().await;
    let origin =
        RealOrigin::start_with(&[("CASTIER_LOG__FORMAT", "json"), ("CASTIER_LOG__TRUSTED_PROXIES", "127.0.0.0/8, 192.0.2.66")]).await;
    let blob = Blob::new(1000);
    let entry = format!("/ac/{}", blob.digest);
    for trusted in [true, false] {
        let config =
            format!("{JSON}\nlog.trusted_proxies = [{}]", if trusted { "\"192.0.2.66\", \"127.0.0.0/8\"" } else { "\"192.0.2.66\"" });
        let castier = Castier::start(&origin.url(), &config).await;
        for (id, (name, value)) in [
            ("XFF", "198.51.100.9, 203.0.113.5:1234, 192.0.2.66"),
            ("Forwarded", "for=198.51.100.9, for=\"[2001:db8::7]:80\";proto=https, for=192.0.2.66"),
        ]
        .into_iter()
        .enumerate()
        {
            let client = match (trusted, name) {
                (false, _) => "127.0.0.1",
                (true, "XFF") => "203.0.113.5",
                (true, _) => "2001:db8::7",
            };
            let ask = async |method: &'static str, path: &str, many: usize| {
                let name = if name == "XFF" { "X-Forwarded-For" } else { name };
                let request = Request::new(method, path).header(name, value).header("X-Request-ID", format!("{id}-{trusted}"));
                let request = if method == "PUT" { request.body(blob.whole()) } else { request };
                assert!(request.send(castier.public).await.status < 300);
                let is = |record: &Record| {
                    record.get("path").is_some_and(|own| own == path)
                        && record["method"] == method
                        && record["request_id"] == format!("{id}-{trusted}")
                };
                let records = records(many, || castier.output(), is).await;
                assert!(records.iter().all(|record| record["client"] == client), "{client}: {records:?}");
            };
            // Uploaded, from memory on both ways, and relayed.
            ask("PUT", &blob.path(), 1).await;
            ask("GET", &blob.path(), 1).await;
            ask("HEAD", &blob.path(), 1).await;
            ask("PUT", &entry, 1).await;
            // The origin trusts castier, which says by whom it was asked.
            if trusted {
                let is = |record: &Record| {
                    record.get("path").is_some_and(|own| *own == entry) && record["request_id"] == format!("{id}-{trusted}")
                };
                assert_eq!(records(1, || origin.output(), is).await[0]["client"], client);
            }
        }
    }
}

/// Text that must not break a log line.
const EVIL: [&[u8]; 7] = [
    b"quotes \" and ' and \\ and \\\"",
    b"level=error msg=\"all is lost\" status=200",
    b"a\tb",
    b"{\"level\":\"error\"}, {",
    "\u{9b}31m\u{202e}\u{2028}\u{feff}é".as_bytes(),
    b"\xff\xfe no text \xc3",
    b"=,;  ",
];

#[tokio::test]
async fn every_line_is_a_record_for_any_request() {
    let _turn = light().await;
    for format in ["text", "json"] {
        let origin = RealOrigin::start_with(&[("CASTIER_LOG__FORMAT", format), ("CASTIER_LOG__LEVEL", "debug")]).await;
        let mut castier = Castier::start(&origin.url(), &format!("log.format = {format:?}\nlog.level = \"debug\"")).await;
        let blob = Blob::new(100);
        Request::new("PUT", blob.path()).body(blob.whole()).send(castier.public).await;
        for evil in EVIL {
            // In a header: a hit, a request about an absent blob, and a relay.
            for path in [blob.path(), Blob::new(7).path(), "/kv/a/b".to_owned()] {
                let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
                let fields = ["User-Agent: ", "\r\nX-Request-ID: ", "\r\nX-Forwarded-For: ", "\r\ntraceparent: ", "\r\n\r\n"];
                let request = fields.iter().fold(head.into_bytes(), |mut bytes, field| {
                    if !bytes.ends_with(b"close\r\n") {
                        bytes.extend_from_slice(evil);
                    }
                    bytes.extend_from_slice(field.as_bytes());
                    bytes
                });
                let mut conn = Conn::open(castier.public).await;
                conn.send(&request).await;
                assert!(conn.reply("GET").await.status >= 200);
            }
            // In a path and in a method. Most are refused, and that is a record too.
            for (before, after) in [(&b"GET /cas/"[..], &b" HTTP/1.1\r\n"[..]), (b"GET /x/", b" HTTP/1.1\r\n"), (b"", b" / HTTP/1.1\r\n")] {
                let request = [before, evil, after, b"Host: x\r\nConnection: close\r\n\r\n"].concat();
                let mut conn = Conn::open(castier.public).await;
                conn.send(&request).await;
                let _ = conn.head().await;
            }
        }
        for path in ["/a%22b%0Ac", "/a=b", "/%FF%FE", "/x?msg=\"a\"", "/é", "/{\"a\":1}"] {
            Request::get(path).send(castier.public).await;
        }
        let read = |output: &str| log::read(format, output);
        let agent = String::from_utf8_lossy(EVIL[0]).into_owned();
        for (output, at_least) in [(castier.output(), EVIL.len() * 2), (origin.output(), EVIL.len())] {
            let accesses = read(&output).into_iter().filter(|record| record["target"].ends_with("::access")).count();
            assert!(accesses >= at_least, "{accesses} of {at_least}: {output}");
        }
        let agents = eventually("all records", async || {
            let records = read(&castier.output());
            let agents: Vec<_> = records.iter().filter_map(|record| record.get("user_agent")).cloned().collect();
            (agents.len() >= 3 * EVIL.len()).then_some(agents)
        })
        .await;
        for evil in EVIL {
            let sent = String::from_utf8_lossy(evil.trim_ascii()).into_owned();
            assert!(agents.contains(&sent), "{sent:?} round-trips: {agents:?}");
        }
        assert!(read(&origin.output()).iter().any(|record| record.get("user_agent") == Some(&agent)), "{agent:?}");
        // To the last line.
        castier.signal(Signal::TERM);
        assert_eq!(castier.exit().await.code(), Some(0));
        assert!(read(&castier.output()).iter().any(|record| record.get("msg").is_some_and(|text| text == "bye")));
    }
}

#[tokio::test]
async fn what_keeps_a_program_from_starting_is_a_record_too() {
    let _turn = light().await;
    for format in ["text", "json"] {
        let refused = Castier::once(|command, _| {
            command.env("CASTIER_LOG__FORMAT", format).env("CASTIER_LOG__TRUSTED_PROXIES", "10.0.0.0/8, 10.0.0.0/40\"\t\u{9b}");
        });
        assert_eq!(refused.status.code(), Some(2));
        let records = log::read(format, &String::from_utf8(refused.stderr).unwrap());
        let named = |record: &Record| record["msg"].contains("log.trusted_proxies") && record["msg"].contains("10.0.0.0/40");
        assert!(records.len() == 1 && named(&records[0]), "{records:?}");
    }
}

#[tokio::test]
async fn the_origins_state_is_told_once_per_change() {
    let _turn = light().await;
    let mut origin = LyingOrigin::start().await;
    let castier = Castier::start(&origin.url(), &format!("{JSON}\norigin.connect_timeout = \"1s\"\norigin.retries = 1")).await;
    let told = |text: &str| {
        let records = log::json(&castier.output());
        records.into_iter().filter(|record| record.get("msg").is_some_and(|msg| msg.starts_with(text))).collect::<Vec<_>>()
    };
    let blob = origin.blob(1000);
    get(castier.public, &blob).await.assert_is(&blob);
    for round in 1..=2 {
        origin.down().await;
        for path in [Blob::new(1).path(), "/relayed".to_owned(), Blob::new(2).path()] {
            assert_eq!(Request::get(path).send(castier.public).await.status, 502);
        }
        assert_eq!((told("the origin is down").len(), told("the origin is up again").len()), (round, round - 1));
        origin.up().await;
        for _ in 0..3 {
            let blob = origin.blob(1000);
            get(castier.public, &blob).await.assert_is(&blob);
        }
        let up = told("the origin is up again");
        assert_eq!((told("the origin is down").len(), up.len()), (round, round));
        assert!(up.iter().all(|record| record["level"] == "info" && record["seconds"].parse::<f64>().unwrap() > 0.0), "{up:?}");
    }
    let down = told("the origin is down");
    assert!(down.iter().all(|record| record["level"] == "warn" && record["origin"] == origin.addr.to_string()), "{down:?}");
}

#[tokio::test]
async fn what_alloy_reads_of_a_record_is_there() {
    let _turn = light().await;
    let origin = RealOrigin::start_with(&[("CASTIER_LOG__FORMAT", "json")]).await;
    let castier = Castier::start(&origin.url(), JSON).await;
    Request::get("/ac/x").send(castier.public).await;
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../grafana/alloy/config.alloy");
    let text = std::fs::read_to_string(file).unwrap();
    let block = text.split("expressions = {").nth(1).and_then(|rest| rest.split('}').next()).unwrap();
    let names: Vec<_> = block.split('"').skip(1).step_by(2).collect();
    assert!(names.contains(&"ts") && names.contains(&"level") && names.contains(&"trace_id"), "{names:?}");
    let (at_castier, at_origin) = (|| castier.output(), || origin.output());
    for output in [&at_castier as &dyn Fn() -> String, &at_origin] {
        let record = &records(1, output, |record| record.get("path").is_some_and(|own| own == "/ac/x")).await[0];
        for name in &names {
            assert!(record.contains_key(*name), "{name} in {record:?}");
        }
    }
}
