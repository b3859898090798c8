//! Keys of a route that no protocol's own tests use.

use crate::{
    checks::gets,
    support::{Request, Response, Upstream, castier, entity, turn},
};
use std::{fs, thread, time::Instant};
use tempfile::TempDir;

fn route(upstream: &Upstream, keys: &str) -> String {
    format!("[[route]]\nupstream = \"{}\"\naccess = \"local\"\n{keys}\n", upstream.url())
}

const FROZEN: &str = "path = \"/x/{name*}\"\nkind = \"frozen\"\n";

#[test]
fn castiers_own_credentials_come_from_files() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| match request.header("authorization") {
        Some(credentials) => entity(request, "text/plain", credentials.as_bytes()),
        None => Response::new(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    });
    let files = TempDir::new().unwrap();
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let host = upstream.addr().ip();
    let token = file("token", "the-token\n");
    let password = file("password", "the-password\n");
    let netrc = file("netrc", &format!("machine example.test login no password no\nmachine {host} login me password mine\n"));
    for (keys, expected) in [
        (format!("token_file = \"{token}\""), "Bearer the-token"),
        (format!("username = \"me\", password_file = \"{password}\""), "Basic bWU6dGhlLXBhc3N3b3Jk"),
        (format!("netrc_file = \"{netrc}\""), "Basic bWU6bWluZQ=="),
    ] {
        let castier = castier(&route(&upstream, &format!("{FROZEN}credentials = {{ {keys} }}\n")));
        // The client's own are not sent on.
        gets(castier.public, &Request::get("/x/a").basic("client", "secret"), expected.as_bytes());
        gets(castier.public, &Request::get("/x/a"), expected.as_bytes());
    }
}

#[test]
fn a_query_is_part_of_a_name_or_not() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| entity(request, "text/plain", request.target.as_bytes()));
    let with = |query: &str| castier(&route(&upstream, &format!("{FROZEN}{query}\n")));
    let castier = with("query = \"ignore\"");
    for target in ["/x/a?signature=1", "/x/a?signature=2", "/x/a"] {
        gets(castier.public, &Request::get(target), b"/x/a?signature=1");
    }
    assert_eq!(upstream.take().len(), 1);
    for castier in [with("query = \"key\""), with("")] {
        for target in ["/x/a?version=1", "/x/a?version=2", "/x/a", "/x/a?version=1"] {
            gets(castier.public, &Request::get(target), target.as_bytes());
        }
        assert_eq!(upstream.take().len(), 3);
    }
}

/// The rate holds, those over it are told when to come again, and hits do not count.
#[test]
fn an_upstream_is_asked_no_faster_than_its_rate() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| entity(request, "text/plain", b"body"));
    let config = format!("origin.read_timeout = \"200ms\"\n{}", route(&upstream, &format!("{FROZEN}upstream_rate = 1\n")));
    let castier = castier(&config);
    let (addr, started) = (castier.public, Instant::now());
    gets(addr, &Request::get("/x/kept"), b"body");
    let answers: Vec<_> = (0..8).map(|n| thread::spawn(move || Request::get(&format!("/x/{n}")).send(addr))).collect();
    for _ in 0..20 {
        gets(addr, &Request::get("/x/kept"), b"body");
    }
    let answers: Vec<_> = answers.into_iter().map(|answer| answer.join().unwrap()).collect();
    let (most, asked) = (1 + started.elapsed().as_secs() as usize, upstream.take().len());
    assert!(asked <= most, "{asked} questions where {most} are allowed");
    let (done, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 200);
    assert_eq!((done.len() + 1, refused.len()), (asked, 9 - asked));
    for answer in refused {
        assert_eq!(answer.status, 503, "{}", answer.text());
        assert!(answer.header("retry-after").is_some(), "{:?}", answer.headers);
    }
}

/// Behind another proxy, links lead to what clients know as castier.
#[test]
fn links_lead_to_the_external_url() {
    let _turn = turn();
    let upstream = Upstream::answering(|request| {
        let host = request.header("host").unwrap();
        if request.path() == "/moved" {
            return Response::new(201).with("Location", &format!("http://{host}/there"));
        }
        let text = format!(r#"{{"versions":{{"1.0.0":{{"dist":{{"tarball":"http://{host}/pad/-/pad-1.0.0.tgz"}}}}}}}}"#);
        entity(request, "application/json", text.as_bytes())
    });
    let config =
        format!("listen.external_url = \"https://cache.example/castier\"\n{}", route(&upstream, "protocol = \"npm\"\nprefix = \"/npm\"\n"));
    let castier = castier(&config);
    let answer = Request::get("/npm/pad").send(castier.public);
    let link = answer.json()["versions"]["1.0.0"]["dist"]["tarball"].as_str().unwrap().to_owned();
    assert_eq!(link, "https://cache.example/castier/npm/pad/-/pad-1.0.0.tgz");
    let answer = Request::new("PUT", "/npm/moved").body("x").send(castier.public);
    assert_eq!(answer.header("location").as_deref(), Some("/castier/npm/there"));
}
