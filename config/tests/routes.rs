//! `[[route]]` as an operator uses it: files, variables, and what castier says about them.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

mod support;

use castier_config::{
    Castier, Cluster, ClusterTls, Problems, Route, RouteAccess, RouteCredentials, RouteKind, RouteQuery, Size, Span, changed, load,
    load_offline, load_offline_with, load_with, print,
};
use proptest::prelude::*;
use support::{file, read, variables};

/// The smallest route.
const OCI: &str = "[[route]]\nprotocol = \"oci\"\nupstream = \"https://registry.example\"\n";
/// A cluster on other machines.
const CLUSTER: &str = "[listen]\npeer = \"127.0.0.1:8081\"\n[cluster]\nadvertise = \"10.0.0.7:8081\"\npeers = [\"10.0.0.7:8081\"]\n";

fn routes(text: &str, env: &[(&str, &str)]) -> Vec<Route> {
    read::<Castier>(text, env).unwrap_or_else(|problems| panic!("{text}\n{problems}")).config.route
}

/// The lines of the problems of a configuration that must be wrong, without the file's name.
fn wrong(text: &str, env: &[(&str, &str)]) -> Vec<String> {
    let file = file(text);
    let problems = load::<Castier>(Some(file.path()), variables(env)).unwrap_err().to_string();
    problems.lines().map(|line| line.replace(&format!("{}:", file.path().display()), "")).collect()
}

#[test]
fn a_route_by_protocol_has_defaults_for_everything_else() {
    let route = &routes(OCI, &[])[0];
    let expected = Route { protocol: "oci".into(), upstream: "https://registry.example".into(), ..Route::default() };
    assert_eq!(*route, expected);
    assert_eq!((route.access, route.query, route.kind, route.ttl), (RouteAccess::Upstream, RouteQuery::Key, None, None));
    assert_eq!((route.proof_ttl, route.negative_ttl, route.stale_if_error), (Span::secs(60), Span::secs(1), Span::secs(86_400)));
    assert_eq!((route.max_body, route.upstream_rate, route.priority), (Size::gib(16), 0, None));
    assert_eq!(Castier::default().route, []);
    assert_eq!((Castier::default().limits.names, Castier::default().listen.external_url.as_str()), (Size::mib(64), ""));
}

/// The route of the contract, with every key, and with credentials in which nothing is set.
#[test]
fn a_route_by_hand_takes_every_key() {
    let text = r#"
        listen.external_url = "https://cache.example/below"
        [[route]]
        path = "/v2/{name*}/blobs/sha256:{sha256}"
        upstream = "https://registry.example"
        host = "Cache.example:8080"
        prefix = "/docker.io"
        kind = "blob"
        access = "upstream"
        credentials = { username = "", password_file = "" }
        proof_ttl = "60s"
        redirects = ["*.cdn.example", "*.cdn.example:8443", "10.0.0.7:9000", "[::1]:9000", "cdn.example"]
        ttl = "60s"
        stale_if_error = "24h"
        negative_ttl = "1s"
        query = "ignore"
        vary = ["accept", "X-A_b"]
        digest_header = "docker-content-digest"
        max_body = "16GiB"
        upstream_rate = 5
    "#;
    let route = &routes(text, &[])[0];
    assert_eq!((route.kind, route.query, route.ttl), (Some(RouteKind::Blob), RouteQuery::Ignore, Some(Span::secs(60))));
    assert_eq!((route.credentials.as_ref(), route.redirects.len(), route.upstream_rate), (None, 5, 5));
    for text in [
        "path = \"/{a}/{b}\"\nupstream = \"https://static.example/crates/{a}/{b}/download\"\nkind = \"frozen\"",
        "path = \"/{all*}\"\nupstream = \"http://10.0.0.7:9000/base/\"\nkind = \"fresh\"\nttl = \"0s\"\nproof_ttl = \"24h\"",
        "path = \"/nar/{nix32}.nar\"\nupstream = \"http://[::1]\"\nkind = \"blob\"\nmax_body = 1",
        "protocol = \"nix\"\nupstream = \"https://cache.nixos.org\"\npriority = 0",
        "protocol = \"oci\"\nupstream = \"https://registry.example/base\"\nnamespace = \"localhost:5000\"",
    ] {
        routes(&format!("[[route]]\n{text}"), &[]);
    }
}

#[test]
fn routes_that_make_no_sense_are_refused() {
    let files = tempfile::tempdir().unwrap();
    let named = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let (good, empty) = (named("good", "hunter2\n"), named("empty", " \n"));
    let (two, spaced) = (named("two", "hunter2\nhunter3\n"), named("spaced", "hunter2 x"));
    let local = |credentials: &str| format!("protocol = \"npm\"\naccess = \"local\"\ncredentials = {{ {credentials} }}");
    let cases = [
        ("", "", "has neither a protocol nor a path; write protocol = "),
        ("protocol", "protocol = \"docker\"", "\"docker\" is not a protocol; write one of oci, lfs, nix, "),
        ("path", "protocol = \"npm\"\npath = \"/a\"", "is set beside protocol"),
        ("kind", "protocol = \"npm\"\nkind = \"blob\"", "is set beside protocol"),
        ("kind", "path = \"/a\"", "is missing; a path without a protocol needs it: write \"blob\", "),
        ("kind", "path = \"/a\"\nkind = \"Blob\"", "unknown variant `Blob`, expected one of `blob`, `frozen`, `fresh`"),
        ("path", "path = \"a\"\nkind = \"fresh\"", "\"a\" is not a path; write one that begins with /"),
        ("path", "path = \"/a?b={c}\"\nkind = \"fresh\"", "without a query"),
        ("path", "path = \"/{name*}\"\nkind = \"blob\"", "names no SHA-256, which kind = \"blob\" needs; write {sha256}"),
        ("path", "path = 5\nkind = \"blob\"", "expected a string"),
        ("upstream", "protocol = \"npm\"\nupstream = \"\"", "is missing; write \"https://HOST\""),
        ("upstream", "protocol = \"npm\"\nupstream = \"registry.example\"", "is not a URL; write \"https://HOST\""),
        ("upstream", "protocol = \"npm\"\nupstream = \"s3://bucket\"", "has the scheme \"s3\"; write "),
        ("upstream", "protocol = \"npm\"\nupstream = \"u:hunter2@h://x\"", "has the scheme \"u\"; write "),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://u:hunter2@h\"", "has a user or a password; write "),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://h/{package}\"", "has a variable, and the protocol has its own paths"),
        ("upstream", "path = \"/{host}\"\nkind = \"fresh\"\nupstream = \"https://{host}/\"", "has a variable in its host"),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://h/?q\"", "has a query or a fragment"),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://h/a/../b\"", "has a segment . or .."),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://h\\\\@evil\"", "has a character that a URL cannot have"),
        ("upstream", "protocol = \"npm\"\nupstream = \"https://h:0\"", "has the port 0"),
        ("upstream", "protocol = \"npm\"\nupstream = \"http://localhost:8080/npm\"", "leads to castier itself, which takes 127.0.0.1:8080"),
        ("host", "protocol = \"npm\"\nhost = \"https://h\"", "is not what clients send as Host; write HOST or HOST:PORT"),
        ("host", "protocol = \"npm\"\nhost = \"*.h\"", "is not what clients send as Host"),
        ("host", "protocol = \"npm\"\nhost = \"h:99999\"", "is not what clients send as Host"),
        ("host", "protocol = \"npm\"\nhost = \"bücher.example\"", "is not what clients send as Host"),
        ("prefix", "protocol = \"npm\"\nprefix = \"npm\"", "is not the beginning of a path; write one such as \"/npm\""),
        ("prefix", "protocol = \"npm\"\nprefix = \"/npm/\"", "without / at its end"),
        ("prefix", "protocol = \"npm\"\nprefix = \"/\"", "is not the beginning of a path"),
        ("prefix", "protocol = \"npm\"\nprefix = \"/a/../b\"", "is not the beginning of a path"),
        ("prefix", "protocol = \"npm\"\nprefix = \"/{a}\"", "is not the beginning of a path"),
        ("namespace", "protocol = \"npm\"\nnamespace = \"docker.io\"", "is only for protocol = \"oci\"; leave it out"),
        ("namespace", "protocol = \"oci\"\nnamespace = \"docker.io/library\"", "is not the name of a registry"),
        ("priority", "protocol = \"npm\"\npriority = 1", "is only for protocol = \"nix\"; leave it out"),
        ("priority", "protocol = \"nix\"\npriority = -1", "expected a whole number, 0 or more"),
        ("access", "protocol = \"npm\"\naccess = \"none\"", "unknown variant `none`, expected `upstream` or `local`"),
        ("proof_ttl", "protocol = \"npm\"\nproof_ttl = \"25h\"", "90000s is more than 24h"),
        (
            "redirects",
            "protocol = \"npm\"\nredirects = [\"cdn.example\", \"https://cdn.example\"]",
            "\"https://cdn.example\" is not a host",
        ),
        ("redirects", "protocol = \"npm\"\nredirects = [\"*\"]", "\"*\" is not a host; write HOST or HOST:PORT"),
        ("redirects", "protocol = \"npm\"\nredirects = [\"*.10.0.0.7\"]", "\"*.10.0.0.7\" is not a host"),
        ("redirects", "protocol = \"npm\"\nredirects = [\"*.*.example\"]", "\"*.*.example\" is not a host"),
        ("redirects", "protocol = \"npm\"\nredirects = [5]", "expected a string"),
        ("redirects", "protocol = \"npm\"\nredirects = \"h\"", "expected a list in brackets"),
        ("ttl", "protocol = \"npm\"\nttl = 60", "\"60\" is not a duration; write a number with its unit"),
        ("stale_if_error", "protocol = \"npm\"\nstale_if_error = \"11years\"", "is more than ten years"),
        ("query", "protocol = \"npm\"\nquery = \"drop\"", "unknown variant `drop`, expected `key` or `ignore`"),
        ("vary", "protocol = \"npm\"\nvary = [\"accept\", \"*\"]", "\"*\" is not the name of a header"),
        ("vary", "protocol = \"npm\"\nvary = [\"Authorization\"]", "\"Authorization\" has credentials, which are never part of a name"),
        (
            "vary",
            "protocol = \"npm\"\nvary = [\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\"]",
            "has 17 headers; write at most 16",
        ),
        ("digest_header", "protocol = \"npm\"\ndigest_header = \"a:b\"", "\"a:b\" is not the name of a header"),
        ("max_body", "protocol = \"npm\"\nmax_body = 0", "must be more than 0"),
        ("upstream_rate", "protocol = \"npm\"\nupstream_rate = -1", "expected a whole number, 0 or more"),
        ("credentials", "protocol = \"npm\"\ncredentials = 5", "expected a section; write its keys below [route[0].credentials]"),
        (
            "credentials",
            &format!("protocol = \"npm\"\ncredentials = {{ token_file = {good:?} }}"),
            "is set, but with access = \"upstream\"",
        ),
        (
            "credentials",
            &local(&format!("token_file = {good:?}, netrc_file = {good:?}")),
            "has token_file and netrc_file; write one of them",
        ),
        ("credentials.username", &local(&format!("password_file = {good:?}")), "is missing; write whose password is in password_file"),
        ("credentials.username", &local("username = \"u\""), "is set without password_file"),
        ("credentials.username", &local(&format!("username = \"u\", token_file = {good:?}")), "is set without password_file"),
        ("credentials.username", &local(&format!("username = \"u:v\", password_file = {good:?}")), "has a colon"),
        ("credentials.password_file", &local("username = \"u\", password_file = \"/does/not/exist\""), "/does/not/exist cannot be read"),
        (
            "credentials.password_file",
            &local(&format!("username = \"u\", password_file = {empty:?}")),
            "is empty; write the password alone",
        ),
        ("credentials.password_file", &local(&format!("username = \"u\", password_file = {two:?}")), "has more than one line"),
        ("credentials.token_file", &local(&format!("token_file = {spaced:?}")), "has characters that no header can hold"),
        ("credentials.netrc_file", &local(&format!("netrc_file = {empty:?}")), "is empty; write lines such as "),
        (
            "credentials.pasword_file",
            &local(&format!("username = \"u\", password_file = {good:?}, pasword_file = \"x\"")),
            "unknown key; did you mean route[0].credentials.password_file?",
        ),
        ("prefx", "protocol = \"npm\"\nprefx = \"/npm\"", "unknown key; did you mean route[0].prefix?"),
    ];
    for (key, text, why) in cases {
        let upstream = if text.contains("upstream = \"") { "" } else { "upstream = \"https://upstream.example\"\n" };
        let lines = wrong(&format!("[[route]]\n{upstream}{text}"), &[]);
        let subject = if key.is_empty() { "route[0]: ".to_owned() } else { format!("route[0].{key}: ") };
        assert!(lines.len() == 1 && lines[0].contains(&subject) && lines[0].contains(why), "{text}\n{lines:#?}");
        assert!(!lines[0].contains("hunter2"), "{lines:#?}");
    }
}

#[test]
fn every_problem_of_every_route_has_its_line() {
    let text = "[[route]]\nprotocol = \"npm\"\nupstream = \"https://a\"\nprefix = \"npm\"\nttl = \"soon\"\n\n\
                [[route]]\npath = \"/{a}\"\nkind = 5\nvary = [\"a b\"]\n[route.credentials]\nusernme = \"u\"\n\n\
                [[route]]\n\n[log]\nlevel = \"loud\"\n";
    let mut lines = wrong(text, &[]);
    lines.sort();
    let starts = [
        "10: route[1].vary: \"a b\"",
        "12: route[1].credentials.usernme: unknown key; did you mean route[1].credentials.username?",
        "14: route[2].upstream: is missing",
        "14: route[2]: has neither",
        "17: log.level: \"loud\"",
        "4: route[0].prefix: \"npm\"",
        "5: route[0].ttl: \"soon\"",
        "7: route[1].upstream: is missing",
        "9: route[1].kind: ",
    ];
    assert_eq!(lines.len(), starts.len(), "{lines:#?}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line} is not {start}…");
    }
    // The same in one line each.
    let inline = "route = [\n  { protocol = \"npm\", upstream = \"https://a\" },\n  { protocol = \"npm\" },\n]\n";
    assert!(wrong(inline, &[])[0].starts_with("3: route[1].upstream: is missing"), "{:?}", wrong(inline, &[]));
}

#[test]
fn a_route_in_one_bracket_and_other_slips() {
    for (text, line) in [
        ("[route]\nprotocol = \"npm\"", "1: route: is one section, and there can be several; write [[route]], in two brackets"),
        ("route = 5", "1: route: invalid type: integer `5`, expected sections; write the keys of each below [[route]]"),
        ("route = [5]", "1: route: invalid type: integer `5`, expected a section; write its keys below [[route]]"),
        ("route = [[{}]]", "1: route: invalid type: map, expected a string"),
        ("[[rout]]\nprotocol = \"npm\"", "1: rout: unknown key; did you mean route?"),
    ] {
        assert_eq!(wrong(text, &[]), [line], "{text}");
    }
}

#[test]
fn other_keys_of_routes() {
    for (key, text) in [
        ("listen.external_url", "[listen]\nexternal_url = \"cache.example\""),
        ("listen.external_url", "[listen]\nexternal_url = \"ftp://cache.example\""),
        ("listen.external_url", "[listen]\nexternal_url = \"https://user:hunter2@cache.example\""),
        ("listen.external_url", "[listen]\nexternal_url = \"https://cache.example/?a\""),
        ("limits.names", "[limits]\nnames = \"1023KiB\""),
        ("route", &OCI.repeat(1001)),
    ] {
        let lines = wrong(text, &[]);
        assert!(lines.len() == 1 && lines[0].contains(&format!(": {key}: ")) && !lines[0].contains("hunter2"), "{lines:#?}");
    }
    assert_eq!(routes(&OCI.repeat(1000), &[]).len(), 1000);
}

#[test]
fn upstreams_are_not_castier_itself() {
    let with =
        |listen: &str, upstream: &str| wrong(&format!("[listen]\n{listen}\n[[route]]\nprotocol = \"npm\"\nupstream = \"{upstream}\""), &[]);
    assert!(with("public = \"0.0.0.0:80\"", "http://127.0.0.9/npm")[0].contains("which takes 0.0.0.0:80 as listen.public"));
    assert!(with("admin = \"127.0.0.1:9\"", "http://localhost:9")[0].contains("which takes 127.0.0.1:9 as listen.admin"));
    let cluster = CLUSTER.replace("10.0.0.7", "127.0.0.1") + "[[route]]\nprotocol = \"npm\"\nupstream = \"http://127.0.0.1:8081\"";
    assert!(wrong(&cluster, &[])[0].contains("as listen.peer"));
    assert_eq!(routes("[[route]]\nprotocol = \"npm\"\nupstream = \"http://127.0.0.1:8081\"", &[]).len(), 1);
}

#[test]
fn credentials_of_clients_do_not_travel_in_the_clear() {
    let told = wrong(&format!("{CLUSTER}{OCI}"), &[]);
    assert!(told.len() == 1 && told[0].starts_with("3: cluster.tls: is missing, and with route[0].access = \"upstream\""), "{told:#?}");
    // The route is named that needs it.
    let local = OCI.to_owned() + "access = \"local\"\n";
    assert!(wrong(&format!("{CLUSTER}{local}{OCI}"), &[])[0].contains("route[1].access"));
    assert_eq!(routes(&format!("{CLUSTER}{local}"), &[]).len(), 1);
    // All nodes on the loopback.
    for (from, to) in [("10.0.0.7", "127.0.0.1"), ("10.0.0.7", "[::1]"), ("10.0.0.7", "localhost")] {
        assert_eq!(routes(&format!("{}{OCI}", CLUSTER.replace(from, to)), &[]).len(), 1, "{to}");
    }
    // One of them elsewhere, or anywhere.
    let here = CLUSTER.replace("10.0.0.7", "127.0.0.1");
    for cluster in [
        here.replace("peers = [", "peers = [\"10.0.0.8:8081\", "),
        here.replace("peers = [\"127.0.0.1:8081\"]", "dns = \"peers.svc:8081\""),
        here.replace("peers = [\"127.0.0.1:8081\"]", "dns = \"_peers._tcp.svc\""),
    ] {
        assert!(wrong(&format!("{cluster}{OCI}"), &[])[0].contains("cluster.tls: is missing"), "{cluster}");
    }
    let tls = "[cluster.tls]\ncert_file = \"a\"\nkey_file = \"b\"\nca_file = \"c\"\n";
    let config = load_offline::<Castier>(Some(file(&format!("{CLUSTER}{tls}{OCI}")).path()), std::iter::empty()).unwrap().config;
    assert!(matches!(config.cluster, Some(Cluster { tls: ClusterTls { .. }, .. })));
}

#[test]
fn variables_set_and_add_routes() {
    let env = [
        ("CASTIER_ROUTE__10__PROTOCOL", "cargo"),
        ("CASTIER_ROUTE__1__UPSTREAM", "https://npm.example"),
        ("CASTIER_ROUTE__0__UPSTREAM", "https://mirror.example"),
        ("CASTIER_ROUTE__0__REDIRECTS", "*.cdn.example, cdn.example:8443"),
        ("CASTIER_ROUTE__1__PROTOCOL", "npm"),
        ("CASTIER_ROUTE__1__TTL", "5s"),
        ("CASTIER_ROUTE__1__UPSTREAM_RATE", "7"),
        ("CASTIER_ROUTE__2__PATH", "/{sha256}"),
        ("CASTIER_ROUTE__2__KIND", "blob"),
        ("CASTIER_ROUTE__2__UPSTREAM", "https://c"),
        ("CASTIER_ROUTE__2__PREFIX", ""),
    ];
    let loaded = read::<Castier>(OCI, &env[1..]).unwrap();
    let routes = &loaded.config.route;
    assert_eq!(routes.len(), 3);
    assert_eq!((routes[0].protocol.as_str(), routes[0].upstream.as_str()), ("oci", "https://mirror.example"));
    assert_eq!(routes[0].redirects, ["*.cdn.example", "cdn.example:8443"]);
    assert_eq!((routes[1].protocol.as_str(), routes[1].ttl, routes[1].upstream_rate), ("npm", Some(Span::secs(5)), 7));
    assert_eq!((routes[2].kind, routes[2].path.as_str()), (Some(RouteKind::Blob), "/{sha256}"));
    assert!(loaded.is_set("route[0].protocol") && loaded.is_set("route[2].kind") && !loaded.is_set("route[2].prefix"));
    // Without a file, and with credentials.
    let token = file("0123456789");
    let token_file = token.path().to_str().unwrap();
    let env_only = [
        ("CASTIER_ROUTE__0__PROTOCOL", "npm"),
        ("CASTIER_ROUTE__0__UPSTREAM", "https://npm.example"),
        ("CASTIER_ROUTE__0__ACCESS", "local"),
        ("CASTIER_ROUTE__0__CREDENTIALS__TOKEN_FILE", token_file),
    ];
    let route = load::<Castier>(None, variables(&env_only)).unwrap().config.route;
    assert_eq!(route[0].credentials.as_ref().unwrap().secret().as_deref(), Ok(&"0123456789".to_owned()));

    assert_eq!(
        wrong(OCI, &env),
        ["route[10].protocol (set by CASTIER_ROUTE__10__PROTOCOL): is set, and the next section has the number 3; write \
          CASTIER_ROUTE__3__PROTOCOL, without a gap"]
    );
    for (name, value, line) in [
        ("CASTIER_ROUTE__UPSTREAM", "https://x", "CASTIER_ROUTE__UPSTREAM: unknown variable; did you mean CASTIER_ROUTE__0__UPSTREAM?"),
        ("CASTIER_ROUTE__0__UPSTREM", "https://x", "CASTIER_ROUTE__0__UPSTREM: unknown variable; did you mean CASTIER_ROUTE__0__UPSTREAM?"),
        ("CASTIER_ROUTE__1__UPSTREM", "https://x", "CASTIER_ROUTE__1__UPSTREM: unknown variable; did you mean CASTIER_ROUTE__1__UPSTREAM?"),
        ("CASTIER_ROUTE_0_UPSTREAM", "https://x", "CASTIER_ROUTE_0_UPSTREAM: unknown variable; did you mean CASTIER_ROUTE__0__UPSTREAM?"),
        (
            "CASTIER_ROUTE__00__UPSTREAM",
            "https://x",
            "CASTIER_ROUTE__00__UPSTREAM: unknown variable; did you mean CASTIER_ROUTE__0__UPSTREAM?",
        ),
        (
            "CASTIER_ROUTE__0__UPSTREAM_RATE",
            "x",
            "route[0].upstream_rate (set by CASTIER_ROUTE__0__UPSTREAM_RATE): \"x\" is not a whole number",
        ),
        (
            "CASTIER_ROUTE__0__MAX_BODY",
            "x",
            "route[0].max_body (set by CASTIER_ROUTE__0__MAX_BODY): \"x\" is not a size; write a number of bytes, or one with its unit, such as \"64MiB\" or \"1GB\"",
        ),
    ] {
        assert_eq!(wrong(OCI, &[(name, value)]), [line], "{name}");
    }
}

#[test]
fn a_program_adds_problems_and_notes() {
    let text = format!("{OCI}prefix = \"npm\"\n\n[[route]]\npath = \"/{{a\"\nkind = \"fresh\"\nupstream = \"https://h\"\n");
    let file = file(&text);
    let check = |config: &Castier, problems: &mut Problems| {
        for (number, route) in config.route.iter().enumerate().filter(|(_, route)| route.path.contains('{')) {
            problems.add(format!("route[{number}].path"), "a brace is not closed");
            problems.note(format!("route[{number}].vary"), format!("is {:?}", route.vary));
        }
        // There is one already.
        problems.add("route[0].prefix", "is not a path");
    };
    let problems = load_with::<Castier>(Some(file.path()), std::iter::empty(), check).unwrap_err();
    assert_eq!(problems.subjects().collect::<Vec<_>>(), ["route[0].prefix", "route[1].path"]);
    assert!(problems.to_string().ends_with(":7: route[1].path: a brace is not closed"), "{problems}");

    let note = |config: &Castier, problems: &mut Problems| {
        problems.note("route[1]", format!("is one of {}", config.route.len()));
        problems.note("route[2].path", "is nowhere");
    };
    let env =
        variables(&[("CASTIER_ROUTE__0__PREFIX", "/npm"), ("CASTIER_ROUTE__0__ACCESS", "local"), ("CASTIER_ROUTE__1__ACCESS", "local")]);
    let loaded = load_offline_with::<Castier>(Some(file.path()), env, note).unwrap();
    assert_eq!(loaded.notes, [format!("{}:6: route[1]: is one of 2", file.path().display()), "route[2].path: is nowhere".to_owned()]);
}

#[test]
fn a_note_says_where_castiers_own_passwords_do_not_count() {
    let loaded = read::<Castier>(
        &format!("{OCI}{OCI}access = \"local\"\n[[route]]\nprotocol = \"npm\"\naccess = \"upstream\"\nupstream = \"https://h\""),
        &[],
    )
    .unwrap();
    assert_eq!(loaded.notes.len(), 2);
    assert!(loaded.notes[0].contains(":1: route[0].access: with \"upstream\" the upstream decides"), "{:?}", loaded.notes);
    assert!(loaded.notes[1].contains(":10: route[2].access: "), "{:?}", loaded.notes);
    assert_eq!(read::<Castier>("", &[]).unwrap().notes, Vec::<String>::new());
}

#[test]
fn files_of_another_machine_are_not_opened() {
    let text = "[[route]]\nprotocol = \"npm\"\nupstream = \"https://h\"\naccess = \"local\"\n\
                credentials = { username = \"u\", password_file = \"/does/not/exist\" }";
    let file = file(text);
    let route = load_offline::<Castier>(Some(file.path()), std::iter::empty()).unwrap().config.route;
    assert!(route[0].credentials.as_ref().unwrap().secret().unwrap_err().starts_with("/does/not/exist cannot be read"));
    assert!(load::<Castier>(Some(file.path()), std::iter::empty()).is_err());
}

#[test]
fn secrets_are_read_from_their_files() {
    let read = |name: &str, text: &str| {
        let file = file(text);
        let path = file.path().to_owned();
        let none = RouteCredentials::default();
        match name {
            "password" => RouteCredentials { username: "u".into(), password_file: path, ..none },
            "token" => RouteCredentials { token_file: path, ..none },
            _ => RouteCredentials { netrc_file: path, ..none },
        }
        .secret()
        .map(|secret| secret.to_string())
    };
    assert_eq!(read("password", " pass word \r\n"), Ok(" pass word ".into()));
    assert_eq!(read("token", "abc\n\n"), Ok("abc".into()));
    assert_eq!(read("netrc", "machine h\nlogin u\n"), Ok("machine h\nlogin u\n".into()));
    for (name, text) in [("password", "\n"), ("password", "a\nb"), ("token", ""), ("token", "a b"), ("token", "\u{fc}"), ("netrc", " ")] {
        assert!(read(name, text).is_err(), "{name} {text:?}");
    }
    assert!(RouteCredentials::default().secret().is_err());
}

#[test]
fn a_change_of_routes_is_one_key() {
    let with = |text: &str| load_offline::<Castier>(Some(file(text).path()), std::iter::empty()).unwrap().config;
    let (one, other) = (with(OCI), with(&format!("{OCI}ttl = \"5s\"\n")));
    assert_eq!(changed(&one, &other), ["route"]);
    assert_eq!(changed(&one, &with(&OCI.repeat(2))), ["route"]);
    assert_eq!(changed(&one, &Castier::default()), ["route"]);
    assert_eq!(changed(&one, &one.clone()), Vec::<String>::new());
}

#[test]
fn printing_masks_secrets_in_routes() {
    // No such file passes the checks. A secret stays one all the same.
    let route = Route { upstream: "https://u:hunter2@h/a".into(), redirects: vec!["x://hunter2@h".into()], ..Route::default() };
    let printed = print(&Castier { route: vec![route], ..Castier::default() });
    assert!(printed.contains("upstream = \"https://***@h/a\"") && !printed.contains("hunter2"), "{printed}");
}

fn any_route() -> impl Strategy<Value = Route> {
    let names = prop::sample::select(vec![
        ("oci", "", None),
        ("nix", "", None),
        ("", "/a/{sha256}", Some(RouteKind::Blob)),
        ("", "/{a*}", Some(RouteKind::Fresh)),
    ]);
    let texts = (
        prop::sample::select(vec!["", "h", "h.example:1"]),
        prop::sample::select(vec!["", "/npm", "/a/b%2Fc"]),
        prop::collection::vec("[a-z]{1,9}", 0..3),
    );
    let numbers = (prop::option::of(0u32..), 0u32.., prop::option::of(0u64..100_000), 1u64..1 << 40, 0u64..86_400_000);
    let token = prop::option::of("[ -~é]{1,9}");
    (names, texts, numbers, token, any::<bool>()).prop_map(
        |((protocol, path, kind), (host, prefix, words), (priority, upstream_rate, ttl, max_body, millis), token, ignore)| Route {
            protocol: protocol.into(),
            path: path.into(),
            upstream: "https://upstream.example/base".into(),
            host: host.into(),
            prefix: prefix.into(),
            kind,
            access: if token.is_some() { RouteAccess::Local } else { RouteAccess::Upstream },
            credentials: token.map(|token| RouteCredentials { token_file: token.into(), ..RouteCredentials::default() }),
            proof_ttl: Span::millis(millis),
            redirects: words.clone(),
            vary: words,
            query: if ignore { RouteQuery::Ignore } else { RouteQuery::Key },
            ttl: ttl.map(Span::millis),
            priority: priority.filter(|_| protocol == "nix"),
            max_body: Size::new(max_body),
            upstream_rate,
            ..Route::default()
        },
    )
}

proptest! {
    #[test]
    fn printed_routes_read_back(route in prop::collection::vec(any_route(), 0..4)) {
        let config = Castier { route, ..Castier::default() };
        let printed = file(&print(&config));
        let loaded = load_offline::<Castier>(Some(printed.path()), std::iter::empty());
        prop_assert_eq!(loaded.map(|loaded| loaded.config).map_err(|problems| problems.to_string()), Ok(config));
    }

    #[test]
    fn no_route_and_no_variable_panics(
        text in "\\[\\[route\\]\\]\n((protocol|path|upstream|kind|ttl|redirects|credentials|\\PC{1,3}) = (\"\\PC{0,9}\"|[0-9]{1,20}|\\[\\]|\\{\\}|\\[\\{\\}\\])\n|\\[\\[route\\]\\]\n|\\[route\\.credentials\\]\n){0,6}",
        name in "CASTIER_(ROUTE|LOG)?(__([0-9]{1,21}|UPSTREAM|[A-Z\\[\\].]{0,3})){0,4}",
    ) {
        if let Err(problems) = read::<Castier>(&text, &[(&name, "x")]) {
            prop_assert!(!problems.is_empty());
            prop_assert_eq!(problems.to_string().lines().count(), problems.subjects().count());
        }
    }
}
