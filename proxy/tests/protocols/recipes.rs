//! The recipes of docs/access.md: what stands in their fences is run, with other addresses, ports and paths, and with the real programs.

use crate::{
    cargo::{self, PLACES, cargo_in, write_project},
    entrance::after,
    npm,
    support::{
        Castier, Port, Ran, Request, Running, castier_as_written, castier_program, command, eventually, noise, run, sha256, tool, turn,
    },
};
use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
};
use tempfile::TempDir;

/// The fence number `number` of a language in a section of docs/access.md.
fn fence(heading: &str, language: &str, number: usize) -> String {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/access.md")).unwrap();
    let (mut section, mut found) = (String::new(), Vec::new());
    // Every second piece is the inside of a fence.
    for (index, piece) in text.split("\n```").enumerate() {
        if index % 2 == 0 {
            let last = piece.lines().rfind(|line| line.starts_with('#'));
            section = last.map_or(section, |line| line.trim_start_matches('#').trim().to_owned());
        } else if let Some(lines) = piece.strip_prefix(&format!("{language}\n")).filter(|_| section == heading) {
            found.push(format!("{lines}\n"));
        }
    }
    let fences = found.len();
    found.into_iter().nth(number).unwrap_or_else(|| panic!("docs/access.md: {heading:?} has {fences} fences of {language}"))
}

/// The lines of a fence that begin with this.
fn lines_of(fence: &str, start: &str) -> String {
    let lines: String = fence.lines().filter(|line| line.starts_with(start)).map(|line| format!("{line}\n")).collect();
    assert!(!lines.is_empty(), "no line begins with {start:?}: {fence}");
    lines
}

/// What the shell does where a recipe asks for a password, or for what only the internet has. The passwords are as the recipes write them.
const SHELL: &str = "\
htpasswd() { echo PASSWORD | command htpasswd -i \"$@\"; }
curl() { for word; do shift; test \"$word\" != alice || word=alice:PASSWORD; set -- \"$@\" \"$word\"; done; command curl \"$@\"; }
certbot() { :; }
chgrp() { while test \"$1\" != castier; do shift; done; shift; command chgrp -R \"$(id -g)\" \"$@\"; }
";

/// A machine to follow recipes on: its `/etc` and its home are folders. In the home curl finds castier as `cache.example`.
struct Machine {
    dir: TempDir,
    body: Vec<u8>,
}

impl Machine {
    /// None, after saying so, if these programs are not there.
    fn with(programs: &[&str]) -> Option<Self> {
        for program in programs {
            tool(program)?;
        }
        let machine = Self { dir: TempDir::new().unwrap(), body: noise(90, 100_000) };
        fs::create_dir_all(machine.at("etc/castier")).unwrap();
        fs::write(machine.at("file"), &machine.body).unwrap();
        Some(machine)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A recipe for this machine.
    fn own(&self, recipe: &str) -> String {
        let digest = sha256(&self.body);
        recipe.replace("/etc/", &format!("{}/etc/", self.dir.path().display())).replace("DIGEST", &digest)
    }

    /// Runs the lines of a recipe.
    fn sh(&self, recipe: &str) -> Ran {
        let script = format!("set -eu\n{SHELL}{}", self.own(recipe));
        run(command("sh", self.dir.path()).args(["-c", &script]).env("npm_config_userconfig", self.at("none")))
    }

    /// The status of the answer to each `curl` of a recipe.
    #[track_caller]
    fn curl(&self, recipe: &str) -> String {
        let ran = self.sh(recipe);
        assert!(!ran.stdout.is_empty(), "{ran}");
        ran.stdout.trim().to_owned()
    }

    fn castier(&self, config: &str) -> Castier {
        let castier = castier_as_written(&self.own(config));
        self.leads_to(&castier.public.to_string());
        castier
    }

    /// `cache.example` is at this address from now on.
    fn leads_to(&self, addr: &str) {
        let curlrc =
            format!("silent\nmax-time = 20\noutput = body\nwrite-out = \"%{{http_code}}\\n\"\nconnect-to = \"cache.example:443:{addr}\"\n");
        fs::write(self.at(".curlrc"), curlrc).unwrap();
    }

    /// Makes an authority, and a certificate for `cache.example`.
    fn authority(&self) {
        self.sh(&fence("An authority of your own", "sh", 0)).ok();
    }
}

/// The recipe's own machine is this one.
fn here(config: &str) -> String {
    config.replace("\"10.0.0.1\"", "\"127.0.0.1\"")
}

#[test]
fn tls_with_an_authority_of_your_own() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl"]) else { return };
    machine.authority();
    let _castier = machine.castier(&fence("TLS", "toml", 0));
    let ask = fence("An authority of your own", "sh", 1);
    assert_eq!(machine.curl("curl --cacert ca.pem -T file https://cache.example/cas/DIGEST"), "201");
    assert_eq!(machine.curl(&ask), "200");
    assert_eq!(fs::read(machine.at("body")).unwrap(), machine.body);
    // Who does not know the authority does not trust it.
    assert_eq!(machine.sh(&ask.replace("--cacert ca.pem", "")).stdout.trim(), "000");
}

#[test]
fn certificates_of_lets_encrypt_are_renewed() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl"]) else { return };
    let (archive, live) = (machine.at("etc/letsencrypt/archive/cache.example"), machine.at("etc/letsencrypt/live/cache.example"));
    for folder in [&archive, &live] {
        fs::create_dir_all(folder).unwrap();
    }
    let kinds = ["cert", "privkey", "chain", "fullchain"];
    // The files of a number, from an authority of their own, so that a client sees which it gets.
    let issue = |number: u8| {
        machine.authority();
        let [ca, cert, key] = ["ca.pem", "cert.pem", "key.pem"].map(|file| fs::read_to_string(machine.at(file)).unwrap());
        for (kind, text) in kinds.iter().zip([&cert, &key, &ca, &format!("{cert}{ca}")]) {
            fs::write(archive.join(format!("{kind}{number}.pem")), text).unwrap();
        }
        fs::rename(machine.at("ca.pem"), machine.at(&format!("ca{number}.pem"))).unwrap();
    };
    // As certbot does it: link after link, each removed first.
    let link = |number: u8| {
        for kind in kinds {
            let link = live.join(format!("{kind}.pem"));
            fs::remove_file(&link).ok();
            symlink(format!("../../archive/cache.example/{kind}{number}.pem"), link).unwrap();
        }
    };
    issue(1);
    link(1);
    machine.sh(&fence("Let's Encrypt", "sh", 0)).ok();
    let castier = machine.castier(&fence("Let's Encrypt", "toml", 0));
    let status =
        |number: u8| machine.sh(&format!("curl --cacert ca{number}.pem https://cache.example/cas/DIGEST")).stdout.trim().to_owned();
    assert_eq!(status(1), "404");
    for number in [2, 3] {
        issue(number);
        assert_eq!((status(number - 1).as_str(), status(number).as_str()), ("404", "000"), "the links are as before");
        link(number);
        eventually("the new certificate is served", || (status(number) == "404").then_some(()));
        assert_eq!(status(number - 1), "000");
    }
    assert_eq!(castier.log().matches("listening public ").count(), 1, "it was not started again");
}

#[test]
fn certificates_of_build_machines() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl"]) else { return };
    machine.authority();
    let make = fence("Client certificates", "sh", 0);
    machine.sh(&make).ok();
    machine.sh(&make.replace("ci", "pc")).ok();
    let castier = machine.castier(&fence("Client certificates", "toml", 0));
    let store = lines_of(&fence("Client certificates", "sh", 1), "curl ");
    assert_eq!(machine.curl(&store.replace("ci.", "pc.")), "403");
    assert_eq!(machine.curl(&store), "201");
    let read = store.replace("-T file", "");
    assert_eq!(machine.curl(&read.replace("ci.", "pc.")), "200");
    assert_eq!(machine.curl(&read.replace("--cert ci.pem --key ci.key", "")), "401");
    castier.says("client=127.0.0.1");
}

#[test]
fn passwords_and_tokens() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl", "htpasswd"]) else { return };
    machine.authority();
    machine.sh(&fence("Users", "sh", 0)).ok();
    let token = machine.sh(&format!("{}echo $token", fence("Tokens", "sh", 0))).ok();
    let (access, clients) = (fence("Roles", "toml", 0), fence("Clients", "sh", 0));
    let _castier = machine.castier(&format!("{access}{}", fence("TLS", "toml", 0)));
    let with_token = |recipe: &str, token: &str| format!("token={}\nexport CURL_CA_BUNDLE=ca.pem\n{recipe}", token.trim());
    let curls = lines_of(&clients, "curl ");
    let (reads, writes) = curls.split_once('\n').unwrap();
    assert_eq!(machine.curl(&with_token("curl -T file https://cache.example/cas/DIGEST", "")), "401", "only credentials write");
    assert_eq!(machine.curl(&with_token(writes, "guessed")), "401");
    assert_eq!(machine.curl(&with_token(writes, &token)), "201");
    assert_eq!(machine.curl(&with_token(reads, &token)), "200");
    assert_eq!(machine.curl(&with_token(&reads.replace("alice", "alice:guessed"), &token)), "401");
    // What Bazel would send.
    let bazel = lines_of(&clients, "bazel ");
    let header = bazel.split("--remote_header=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap();
    let (name, value) = header.split_once('=').unwrap();
    let sent = format!("curl -H \"{name}: {value}\" -T file https://cache.example/cas/DIGEST");
    assert_eq!(machine.curl(&with_token(&sent, &token)), "200");
}

#[test]
fn scopes_limits_and_the_admin_listener() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl", "htpasswd"]) else { return };
    machine.authority();
    machine.sh(&fence("Users", "sh", 0)).ok();
    machine.sh(&fence("Tokens", "sh", 0)).ok();
    let more = "echo \"$1 write $(printf %s \"$1\" | sha256sum | cut -d' ' -f1)\" >> /etc/castier/tokens\n";
    for name in ["pull-requests", "mirror"] {
        machine.sh(&format!("set -- {name}\n{more}")).ok();
    }
    // What the scopes name must be there.
    let refused = |config: &str| {
        fs::write(machine.at("castier.toml"), machine.own(config)).unwrap();
        run(command(castier_program(), machine.dir.path()).args(["--config", "castier.toml", "--check-config"])).fails()
    };
    let (roles, scopes, limits) = (fence("Roles", "toml", 0), fence("Scopes", "toml", 0), fence("Limits per client", "toml", 0));
    let said = refused(&format!("{roles}{scopes}"));
    assert!(said.contains("route \"npm\"") && said.contains("route \"pypi\""), "{said}");
    let route = |protocol: &str| {
        format!("[[route]]\nprotocol = \"{protocol}\"\nprefix = \"/{protocol}\"\nupstream = \"http://127.0.0.1:9\"\naccess = \"local\"\n")
    };
    let access = roles.replace("[access]", "[access]\nadmin = true");
    let tls = format!("{}admin = true\n", fence("TLS", "toml", 0));
    let castier = machine.castier(&format!("{access}{scopes}{limits}{tls}{}{}", route("npm"), route("pypi")));
    let with =
        |token: &str, what: &str| machine.curl(&format!("export CURL_CA_BUNDLE=ca.pem\ncurl -H 'Authorization: Bearer {token}' {what}\n"));
    for (token, what, status) in [
        ("pull-requests", "https://cache.example/cas/DIGEST", "404"),
        ("pull-requests", "-T file https://cache.example/cas/DIGEST", "201"),
        ("pull-requests", "-T file https://cache.example/kv/DIGEST", "403"),
        ("pull-requests", "-T file https://cache.example/pr/ac/DIGEST", "201"),
        ("pull-requests", "-T file https://cache.example/ac/DIGEST", "403"),
        ("mirror", "https://cache.example/cas/DIGEST", "403"),
        // There is no upstream, but that is not the entrance's.
        ("mirror", "https://cache.example/npm/x", "502"),
    ] {
        assert_eq!(with(token, what), status, "{token} {what}");
    }
    // The admin listener's commands, with alice, whose scope makes her an administrator.
    fs::write(machine.at("etc/castier/boss"), "alice:PASSWORD\n").unwrap();
    fs::copy(machine.at("etc/castier/boss"), machine.at("boss")).unwrap();
    let addr = format!("https://localhost:{}", castier.admin.port());
    for line in lines_of(&fence("The admin listener", "sh", 0), "castier ").lines() {
        let line = line.replace("castier --config /etc/castier/castier.toml drain", &format!("castier drain --admin {addr}"));
        let line = line.replace("https://cache.example:8082", &addr).replace("--ca-file ca.pem", "").replacen(
            "castier",
            castier_program().to_str().unwrap(),
            1,
        );
        machine.sh(&line).ok();
    }
}

#[test]
fn clients_with_passwords_and_tokens() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "htpasswd", "ccache", "npm", "cargo", "cc"]) else { return };
    machine.sh(&fence("Users", "sh", 0)).ok();
    let token = machine.sh(&format!("{}echo $token", fence("Tokens", "sh", 0))).ok();
    let cargo = tool("cargo").unwrap();
    let (crates, packages) = (cargo::Registry::start(&cargo, PLACES[0]), npm::Registry::start());
    let route = |protocol: &str, prefix: &str, upstream: &str, more: String| {
        format!("[[route]]\nprotocol = \"{protocol}\"\nprefix = \"{prefix}\"\nupstream = \"{upstream}\"\naccess = \"local\"\n{more}\n")
    };
    let redirects = format!("redirects = [\"{}\"]", crates.files.addr());
    let castier = machine.castier(&format!(
        "{}{}{}",
        fence("Roles", "toml", 0).replace("\"read\"", "\"none\""),
        route("cargo", "/crates", &crates.index.url(), redirects),
        route("npm", "/npm", &packages.upstream.url(), String::new())
    ));
    let addr = castier.public.to_string();
    let clients = fence("Clients", "sh", 0);
    // Without TLS, as the names of the recipes do not lead here.
    let clients =
        clients.replace("cache.example", &addr).replace("cache.internal", &addr).replace("https:", "http:").replace("ci:", "bob:");

    fs::write(machine.at("a.c"), "int main(void) { return 42; }\n").unwrap();
    let compile = "export CCACHE_DIR=$PWD/$(mktemp -d -p .) CCACHE_CONFIGPATH=/dev/null\nccache cc -c a.c -o a.o\nccache --print-stats";
    for (number, settings) in lines_of(&clients, "export CCACHE").lines().enumerate() {
        let stats = machine.sh(&format!("token={}\n{settings}\n{compile}", token.trim())).ok();
        let counted = |name: &str| stats.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0);
        assert_eq!((counted("remote_storage_error"), counted("direct_cache_hit")), (0, number), "{settings}: {stats}");
    }

    for setting in lines_of(&clients, "npm ").lines() {
        fs::remove_file(machine.at("none")).ok();
        machine.sh(&format!("token={}\n{setting}", token.trim())).ok();
        fs::write(machine.at("package.json"), r#"{"name":"x","version":"1.0.0","dependencies":{"app":"^1.0.0"}}"#).unwrap();
        npm::npm(&tool("npm").unwrap(), machine.dir.path(), &["install"], &format!("http://{addr}/npm/")).ok();
        npm::assert_installed(machine.dir.path());
        fs::remove_dir_all(machine.at("node_modules")).unwrap();
        fs::remove_dir_all(machine.at("cache")).unwrap();
    }

    let dir = TempDir::new().unwrap();
    write_project(dir.path(), &castier);
    let settings = fence("Clients", "toml", 0).replace("https://cache.example", &castier.url()).replace("TOKEN", token.trim());
    let config = dir.path().join(".cargo/config.toml");
    fs::write(&config, format!("{}{settings}", fs::read_to_string(&config).unwrap())).unwrap();
    cargo_in(&cargo, dir.path(), &["fetch"]).ok();
}

#[test]
fn behind_nginx() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl", "nginx"]) else { return };
    let packages = npm::Registry::start();
    machine.authority();
    fs::create_dir_all(machine.at("etc/nginx")).unwrap();
    fs::rename(machine.at("etc/castier/tls"), machine.at("etc/nginx/tls")).unwrap();
    let castier = machine.castier(&format!(
        "{}\n[[route]]\nprotocol = \"npm\"\nprefix = \"/npm\"\nupstream = \"{}\"\naccess = \"local\"\n",
        here(&fence("nginx", "toml", 0)),
        packages.upstream.url()
    ));
    let port = Port::free();
    let server = machine.own(&fence("nginx", "nginx", 0));
    let server = server.replace("listen 443", &format!("listen {}", port.addr())).replace("10.0.0.7:8080", &castier.public.to_string());
    let at = machine.dir.path().display();
    let folders = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|name| format!("{name}_temp_path {at}/{name};\n")).concat();
    // Its workers must come into the folder.
    let config = format!("user root;\npid {at}/pid;\nevents {{}}\nhttp {{\naccess_log off;\n{folders}{server}}}\n");
    fs::write(machine.at("nginx.conf"), config).unwrap();
    let mut nginx = command(tool("nginx").unwrap(), machine.dir.path());
    let mut nginx = Running::start(nginx.arg("-c").arg(machine.at("nginx.conf")).args(["-e", "stderr", "-g", "daemon off;"]));
    nginx.listens(port.addr());
    machine.leads_to(&port.addr().to_string());
    let ask = "curl --cacert ca.pem --interface 127.0.0.2 -H 'X-Forwarded-For: 192.0.2.66' https://cache.example";
    assert_eq!(machine.curl(&format!("{ask}/npm/left")), "200");
    castier.says("client=127.0.0.2");
    assert!(!castier.log().contains("192.0.2.66"), "what a client says of itself does not count: {}", castier.log());
    let document = fs::read_to_string(machine.at("body")).unwrap();
    assert!(document.contains("\"https://cache.example/npm/left/-/left-1.2.3.tgz\""), "{document}");
    // Who comes past nginx is not believed: its address is no proxy's.
    let stranger = format!("curl --interface 127.0.0.3 -H 'X-Forwarded-For: 192.0.2.77' http://{}/cas/DIGEST", castier.public);
    assert_eq!(machine.curl(&stranger), "404");
    castier.says("client=127.0.0.3");
    assert!(!castier.log().contains("192.0.2.77"), "{}", castier.log());
    assert_eq!(machine.curl(&format!("{ask}/cas/DIGEST -T file")), "401", "nobody writes");
}

#[test]
fn behind_haproxy() {
    let _turn = turn();
    let Some(machine) = Machine::with(&["openssl", "curl", "haproxy"]) else { return };
    machine.authority();
    let castier = machine.castier(&here(&fence("HAProxy", "toml", 0)));
    let port = Port::free();
    let config = fence("HAProxy", "haproxy", 0);
    let config = config.replace("bind :443", &format!("bind {}", port.addr())).replace("10.0.0.7:8080", &castier.public.to_string());
    let control = machine.at("control");
    fs::write(machine.at("haproxy.cfg"), format!("global\n    stats socket {}\n\n{config}", control.display())).unwrap();
    let mut haproxy = Running::start(command(tool("haproxy").unwrap(), machine.dir.path()).args(["-db", "-f", "haproxy.cfg"]));
    haproxy.listens(port.addr());
    machine.leads_to(&port.addr().to_string());
    assert_eq!(machine.curl("curl --cacert ca.pem --interface 127.0.0.2 https://cache.example/cas/DIGEST"), "404");
    castier.says("client=127.0.0.2");
    // Its own checks are let in.
    eventually("HAProxy has checked castier", || {
        let (mut state, mut stream) = (String::new(), UnixStream::connect(&control).unwrap());
        stream.write_all(b"show stat\n").unwrap();
        stream.read_to_string(&mut state).unwrap();
        state.lines().any(|line| line.starts_with("castier,castier-1,") && line.contains(",UP,") && line.contains(",L4OK,")).then_some(())
    });
    assert_eq!(machine.curl("curl --cacert ca.pem --interface 127.0.0.4 https://cache.example/cas/DIGEST"), "404");
    castier.says("client=127.0.0.4");
    // Past HAProxy nobody comes in.
    machine.leads_to(&castier.public.to_string());
    assert_eq!(machine.sh("curl --cacert ca.pem https://cache.example/cas/DIGEST").stdout.trim(), "000");
}

/// What a Network Load Balancer sends: version 2, with the name of an endpoint behind the addresses, and without a client in its health checks.
#[test]
fn behind_a_network_load_balancer() {
    let _turn = turn();
    let Some(machine) = Machine::with(&[]) else { return };
    let config = here(&fence("HAProxy", "toml", 0));
    let (before, tls) = config.split_once("[listen.tls]").unwrap();
    let castier = machine.castier(&format!("{before}[access]{}", tls.split_once("[access]").unwrap().1));
    let target = format!("/cas/{}", sha256(b""));
    let endpoint = b"\x01vpce-0123456789abcdef0";
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0".to_vec();
    header.push(12 + 3 + u8::try_from(endpoint.len()).unwrap());
    header.extend([192, 0, 2, 9, 10, 0, 0, 7, 0x12, 0x67, 0x01, 0xbb]);
    header.extend([0xea, 0, u8::try_from(endpoint.len()).unwrap()]);
    header.extend(endpoint);
    assert!(after(castier.public, &header, &target).contains(" 200 "));
    castier.says("client=192.0.2.9");
    assert!(after(castier.public, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", &target).contains(" 200 "));
    castier.says("client=127.0.0.1");
    assert!(Request::get(&target).try_send(castier.public).is_err(), "without the header");
}
