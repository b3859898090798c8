//! The Python index, as HTML and as JSON (PEP 691), with files on another host: real pip and uv.

use crate::{
    checks::{asked, gets, only_revalidated, refused},
    pack::zip,
    support::{Castier, Ran, Request, Response, Upstream, castier, command, entity, noise, run, sha256, tool, turn},
};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};
use tempfile::TempDir;

/// The media types of the index. Put together here, as the rules on words know their first part.
const JSON: &str = concat!("application/vnd.py", "pi.simple.v1+json");
const HTML: &str = concat!("application/vnd.py", "pi.simple.v1+html");

/// A wheel and its metadata.
#[derive(Clone)]
struct Wheel {
    file: String,
    bytes: Vec<u8>,
    metadata: String,
    /// The hash that the index says.
    sha256: String,
}

impl Wheel {
    fn new(name: &str, version: &str, requires: &str) -> Self {
        let requires = if requires.is_empty() { String::new() } else { format!("Requires-Dist: {requires}\n") };
        let metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: >=3.7\n{requires}");
        let code = format!("VERSION = \"{version}\"\n");
        // Large enough to stream.
        let data = noise(version.len() as u64 + name.len() as u64, 300_000);
        let info = format!("{name}-{version}.dist-info");
        let names = ["__init__.py", "data.bin"].map(|file| format!("{name}/{file}"));
        let [init, bin] = &names;
        let infos = ["METADATA", "WHEEL", "RECORD"].map(|file| format!("{info}/{file}"));
        let record = names.iter().chain(&infos).map(|path| format!("{path},,\n")).collect::<String>();
        let wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
        let bytes = zip(&[
            (init, code.as_bytes()),
            (bin, &data),
            (&infos[0], metadata.as_bytes()),
            (&infos[1], wheel.as_bytes()),
            (&infos[2], record.as_bytes()),
        ]);
        Self { file: format!("{name}-{version}-py3-none-any.whl"), sha256: sha256(&bytes), bytes, metadata }
    }

    fn path(&self) -> String {
        format!("/packages/ab/cd/{}", self.file)
    }
}

/// The pages of a project: text, link, text, link, … text.
#[derive(Default)]
struct Pages {
    html: Vec<String>,
    json: Vec<String>,
}

/// The index and the host of the files.
pub(crate) struct Index {
    pub(crate) index: Upstream,
    pub(crate) files: Upstream,
    pages: Arc<BTreeMap<String, Pages>>,
    wheels: Arc<Mutex<BTreeMap<String, Wheel>>>,
}

impl Index {
    /// With `json` false it knows HTML alone, as old mirrors do.
    pub(crate) fn start(json: bool) -> Self {
        Self::with(json, true)
    }

    /// Without `metadata` its pages name no metadata beside the files, as those of old mirrors.
    fn with(json: bool, metadata: bool) -> Self {
        let app = [Wheel::new("app", "1.0", "lib>=1"), Wheel::new("app", "0.9", "")];
        let lib = [Wheel::new("lib", "2.0", ""), Wheel::new("lib", "1.0", "")];
        let mut bad = [Wheel::new("bad", "1.0", "")];
        bad[0].bytes[5000] ^= 1;
        let projects = [("app", &app[..]), ("lib", &lib[..]), ("bad", &bad[..])];
        let wheels: BTreeMap<_, _> = projects.iter().flat_map(|(_, wheels)| *wheels).map(|wheel| (wheel.path(), wheel.clone())).collect();
        let wheels = Arc::new(Mutex::new(wheels));
        let kept = wheels.clone();
        let files = Upstream::answering(move |request| {
            let wheels = kept.lock().unwrap();
            let beside = request.path().strip_suffix(".metadata").filter(|_| metadata).and_then(|path| wheels.get(path));
            match (wheels.get(request.path()), beside) {
                (Some(wheel), _) => entity(request, "application/octet-stream", &wheel.bytes),
                (_, Some(wheel)) => entity(request, "binary/octet-stream", wheel.metadata.as_bytes()),
                _ => Response::new(404).body("no such file"),
            }
            .with("Cache-Control", "max-age=365000000, immutable, public")
        });
        let pages: BTreeMap<_, _> =
            projects.iter().map(|(name, wheels)| ((*name).to_owned(), pages(name, wheels, metadata, &files.url()))).collect();
        let pages = Arc::new(pages);
        let kept = pages.clone();
        let index = Upstream::answering(move |request| {
            let name = request.path().strip_prefix("/simple/").and_then(|path| path.strip_suffix('/'));
            let Some(pages) = name.and_then(|name| kept.get(name)) else { return Response::new(404).body("404 Not Found") };
            let accept = request.header("accept").unwrap_or_default();
            let (kind, page) = match () {
                () if json && accept.contains(JSON) => (JSON, pages.json.concat()),
                () if json && accept.contains(HTML) => (HTML, pages.html.concat()),
                () => ("text/html", pages.html.concat()),
            };
            entity(request, kind, page.as_bytes()).with("Vary", "Accept").with("Cache-Control", "max-age=600, public")
        });
        Self { index, files, pages, wheels }
    }

    fn castier(&self) -> Castier {
        castier(&format!(
            "[[route]]\nprotocol = \"pypi\"\nprefix = \"/python\"\nupstream = \"{}\"\nredirects = [\"{}\"]\nttl = \"0s\"\nproof_ttl = \"1h\"\n",
            self.index.url(),
            self.files.addr()
        ))
    }

    /// Checks the page, and returns its links: all but them is as the index wrote it.
    fn links(&self, project: &str, json: bool, reply: &Response) -> Vec<String> {
        let pages = &self.pages[project];
        let pieces = if json { &pages.json } else { &pages.html };
        let (text, mut links) = (reply.text(), Vec::new());
        let mut rest = text.strip_prefix(pieces[0].as_str()).unwrap_or_else(|| panic!("another beginning: {text}"));
        for pair in pieces[1..].chunks(2) {
            let end = rest.find(&pair[1]).unwrap_or_else(|| panic!("{:?} is missing in {rest}", pair[1]));
            links.push(rest[..end].to_owned());
            rest = &rest[end + pair[1].len()..];
        }
        assert_eq!(rest, "");
        links
    }
}

/// Both pages of a project.
fn pages(name: &str, wheels: &[Wheel], metadata: bool, files: &str) -> Pages {
    let mut html = format!(
        "<!DOCTYPE html>\n<html>\n  <head><meta name=\"pi:repository-version\" content=\"1.1\"><title>Links for {name}</title></head>\n\
         <!-- <a href=\"{files}/packages/in-a-comment.whl\">no link</a> -->\n<body ><h1>Links for {name}</h1>\n"
    );
    let mut json = format!("{{\"meta\": {{\"api-version\" : \"1.1\"}},\n\t\"name\":\"{name}\", \"note\": \"{files}/x\", \"files\":[");
    let mut pages = Pages::default();
    for (index, wheel) in wheels.iter().enumerate() {
        let link = format!("{files}{}", wheel.path());
        let digest = sha256(wheel.metadata.as_bytes());
        let in_html = format!("data-dist-info-metadata=\"sha256={digest}\" data-core-metadata=\"sha256={digest}\"");
        let in_json = format!("\"core-metadata\":{{\"sha256\":\"{digest}\"}},");
        let [in_html, in_json] = [in_html, in_json].map(|text| if metadata { text } else { String::new() });
        let (open, quote) = [("<a href=", '"'), ("<A  data-x='1' HREF =  ", '\'')][index % 2];
        html += &format!("{open}{quote}");
        let fragment = format!("#sha256={}", wheel.sha256);
        pages.html.extend([html, format!("{link}{fragment}")]);
        html = format!("{quote} data-requires-python=\"&gt;=3.7\" {in_html} >{}</a><br />\n", wheel.file);
        json += &format!("{{\"filename\": \"{}\",\"url\" :\"", wheel.file);
        pages.json.extend([json, link]);
        json = format!(
            "\", \"hashes\":{{\"sha256\":\"{}\"}}, \"requires-python\":\">=3.7\" ,\"size\": {},\"yanked\":false, {in_json}\
             \"upload-time\":\"2024-01-02T03:04:05.678901Z\"}},\n",
            wheel.sha256,
            wheel.bytes.len()
        );
    }
    // A file on a host that the route does not list.
    let foreign = format!("http://files.invalid/packages/{name}-0.1-py3-none-any.whl");
    html += "<a href=\"";
    pages.html.extend([html, foreign.clone(), format!("\">{name}-0.1-py3-none-any.whl</a>\n</body>\n</html>\n<!--SERIAL 12345-->")]);
    json += &format!("{{\"filename\":\"{name}-0.1-py3-none-any.whl\",\"hashes\":{{}},\"url\":\"");
    pages.json.extend([json, foreign, "\"}],\"versions\":[\"0.1\"]}\n".to_owned()]);
    pages
}

#[track_caller]
pub(crate) fn assert_installed(dir: &Path) {
    for (name, version) in [("app", "1.0"), ("lib", "2.0")] {
        assert_eq!(fs::read_to_string(dir.join(name).join("__init__.py")).unwrap(), format!("VERSION = \"{version}\"\n"));
        let data = noise(version.len() as u64 + name.len() as u64, 300_000);
        assert!(fs::read(dir.join(name).join("data.bin")).unwrap() == data);
    }
}

/// Installs with an empty cache, three times: cold, kept, and with both hosts dead.
fn installs(upstream: &Index, install: impl Fn(&str, &Path)) {
    let castier = upstream.castier();
    let url = format!("{}/python/simple/", castier.url());
    let installed = || {
        let dir = TempDir::new().unwrap();
        install(&url, dir.path());
        assert_installed(&dir.path().join("target"));
    };
    installed();
    assert_eq!(asked(&upstream.index), ["GET /simple/app/", "GET /simple/lib/"]);
    let mut files = asked(&upstream.files);
    let path = |file: &str| format!("GET /packages/ab/cd/{file}-py3-none-any.whl");
    // Whether a client asks for the metadata first, or for the size, is its own choice.
    let once = files.len();
    files.dedup();
    assert_eq!(once, files.len(), "{files:?}");
    files.retain(|line| line.starts_with("GET ") && !line.ends_with(".metadata"));
    assert_eq!(files, [path("app-1.0"), path("lib-2.0")]);

    installed();
    assert_eq!(upstream.index.seen().len(), 2);
    only_revalidated(&upstream.index);
    assert_eq!(asked(&upstream.files), [""; 0]);

    upstream.index.kill();
    upstream.files.kill();
    installed();
}

/// pip without settings and without a cache.
pub(crate) fn pip(program: &Path, dir: &Path, args: &[&str], index: &str) -> Ran {
    let mut pip = command(program, dir);
    pip.args(["-m", "pip", "--isolated", "--no-cache-dir", "--disable-pip-version-check", "--retries", "0"]);
    run(pip.args(args).args(["--index-url", index]).env("PIP_CONFIG_FILE", "/dev/null"))
}

fn pip_installs(upstream: &Index) {
    let Some(python) = tool("python") else { return };
    installs(upstream, |url, dir| {
        pip(&python, dir, &["install", "--target", "target", "app"], url).ok();
    });
}

fn uv_installs(upstream: &Index) {
    let (Some(uv), Some(python)) = (tool("uv"), tool("python")) else { return };
    installs(upstream, |url, dir| {
        let mut uv = command(&uv, dir);
        uv.args(["pip", "install", "--no-config", "--cache-dir", "cache", "--target", "target", "app", "--index-url", url, "--python"]);
        run(uv.arg(&python)).ok();
    });
}

#[test]
fn pip_with_json() {
    let _turn = turn();
    pip_installs(&Index::start(true));
}

#[test]
fn pip_with_html() {
    let _turn = turn();
    pip_installs(&Index::start(false));
}

#[test]
fn uv_with_json() {
    let _turn = turn();
    uv_installs(&Index::start(true));
}

#[test]
fn uv_with_html() {
    let _turn = turn();
    uv_installs(&Index::start(false));
}

/// Without metadata beside the files, uv reads the end of each archive: parts of a file that castier does not have yet.
#[test]
fn uv_reads_parts_of_a_wheel() {
    let _turn = turn();
    uv_installs(&Index::with(true, false));
}

#[test]
fn pip_downloads_the_bytes() {
    let _turn = turn();
    let Some(python) = tool("python") else { return };
    let upstream = Index::start(true);
    let castier = upstream.castier();
    let url = format!("{}/python/simple/", castier.url());
    for dead in [false, true] {
        if dead {
            upstream.index.kill();
            upstream.files.kill();
        }
        let dir = TempDir::new().unwrap();
        pip(&python, dir.path(), &["download", "--dest", "got", "app"], &url).ok();
        for wheel in upstream.wheels.lock().unwrap().values() {
            let got = fs::read(dir.path().join("got").join(&wheel.file)).ok();
            let wanted = wheel.file.starts_with("app-1.0") || wheel.file.starts_with("lib-2.0");
            assert!(got.as_ref() == wanted.then_some(&wheel.bytes), "{}", wheel.file);
        }
    }
}

/// The path at castier to which a link leads, without its fragment.
fn path_of(castier: &Castier, link: &str) -> String {
    let path = link.strip_prefix(&castier.url()).unwrap_or_else(|| panic!("{link} leads past castier"));
    path.split('#').next().unwrap().to_owned()
}

/// A page by each of its media types, kept apart; only the links differ from what the index wrote.
#[test]
fn pages_are_kept_apart_and_only_links_change() {
    let _turn = turn();
    let upstream = Index::start(true);
    let castier = upstream.castier();
    let cases = [(JSON, JSON), ("text/html", "text/html"), (HTML, HTML)];
    for (accept, kind) in cases.iter().chain(&cases) {
        let json = *kind == JSON;
        let request = Request::get("/python/simple/app/").with("Accept", accept);
        let answer = request.send(castier.public);
        assert_eq!((answer.status, answer.header("content-type").as_deref()), (200, Some(*kind)), "{answer:?}");
        let links = upstream.links("app", json, &answer);
        let pages = &upstream.pages["app"];
        let original = if json { &pages.json } else { &pages.html };
        for (link, before) in links.iter().zip(original[1..].iter().step_by(2)) {
            if before.contains("files.invalid") {
                assert_eq!(link, before, "the route does not list that host");
                continue;
            }
            assert!(path_of(&castier, link).starts_with("/python/"), "{link}");
            assert!(link.ends_with(&before[before.rfind('/').unwrap()..]), "the name and the fragment stay: {link}, before {before}");
            // Metadata is where the name with an ending leads.
            let path = path_of(&castier, link);
            let wheels = upstream.wheels.lock().unwrap().clone();
            let wheel = wheels.values().find(|wheel| before.contains(&wheel.file)).unwrap();
            gets(castier.public, &Request::get(&path), &wheel.bytes);
            gets(castier.public, &Request::get(&format!("{path}.metadata")), wheel.metadata.as_bytes());
        }
        // The changed page has a validator of its own.
        let etag = answer.header("etag").expect("an ETag");
        let of_original = format!("\"{}\"", &sha256(original.concat().as_bytes())[..16]);
        assert_ne!(etag, of_original);
        assert_eq!(request.clone().with("If-None-Match", &etag).send(castier.public).status, 304);
        assert_eq!(request.clone().with("If-None-Match", &of_original).send(castier.public).status, 200);
        let length = answer.header("content-length").map(|length| length.parse::<usize>().unwrap());
        assert!(length.is_none_or(|length| length == answer.body.len()));
    }
    // Each file came once, whatever page named it.
    let files = asked(&upstream.files);
    let mut once = files.clone();
    once.dedup();
    assert_eq!(files, once);
    assert_eq!(files.len(), 4, "{files:?}");
}

/// A client may write a link with other escapes, as pip does.
#[test]
fn a_link_works_with_its_characters_escaped() {
    let _turn = turn();
    let upstream = Index::start(true);
    let castier = upstream.castier();
    let page = Request::get("/python/simple/app/").with("Accept", JSON).send(castier.public);
    let link = upstream.links("app", true, &page)[0].clone();
    let is_plain = |c: &char| c.is_ascii_alphanumeric() || "-._~/%".contains(*c);
    let escaped: String =
        path_of(&castier, &link).chars().map(|c| if is_plain(&c) { c.to_string() } else { format!("%{:02X}", u32::from(c)) }).collect();
    let wheel = upstream.wheels.lock().unwrap().values().find(|wheel| link.contains(&wheel.file)).unwrap().clone();
    gets(castier.public, &Request::get(&escaped), &wheel.bytes);
}

/// A wheel whose bytes are not what the page says is not kept, and not passed on as whole. Once it is right, it is.
#[test]
fn a_wheel_with_another_hash_is_refused() {
    let _turn = turn();
    for accept in [JSON, "text/html"] {
        let upstream = Index::start(true);
        let castier = upstream.castier();
        let page = Request::get("/python/simple/bad/").with("Accept", accept).send(castier.public);
        let link = upstream.links("bad", accept == JSON, &page)[0].clone();
        let request = Request::get(&path_of(&castier, &link));
        for _ in 0..2 {
            refused(castier.public, &request);
            let times = asked(&upstream.files).len();
            assert!((1..=2).contains(&times), "it is not kept, and fetched again at most once: {times}");
        }
        let right = Wheel::new("bad", "1.0", "");
        upstream.wheels.lock().unwrap().get_mut(&right.path()).unwrap().bytes = right.bytes.clone();
        gets(castier.public, &request, &right.bytes);
        upstream.files.kill();
        gets(castier.public, &request, &right.bytes);
    }
}

/// A real client sees an error as well, and no wrong bytes.
#[test]
fn pip_gets_no_wheel_with_another_hash() {
    let _turn = turn();
    let Some(python) = tool("python") else { return };
    let upstream = Index::start(true);
    let castier = upstream.castier();
    let dir = TempDir::new().unwrap();
    let said = pip(&python, dir.path(), &["install", "--target", "target", "bad"], &format!("{}/python/simple/", castier.url())).fails();
    // pip's own check would say so.
    assert!(!said.contains("DO NOT MATCH THE HASHES"), "{said}");
    assert!(!dir.path().join("target/bad").exists());
}

/// An index below a path, with links of every form, and files beside and outside of that path.
#[test]
fn links_of_every_form() {
    let _turn = turn();
    let links = [
        "../../packages/a-1.whl",
        "/base/packages/a-2.whl",
        "//HOST/base/packages/a-3.whl",
        "http://HOST/base/packages/a-4.whl",
        "http://HOST/elsewhere/a-5.whl",
        "/elsewhere/a-6.whl",
        "../../packages/a-7.whl?x=1&amp;y=%2f",
        "../../packages/a-8%2Bcu1.whl",
        "../../packages/a-9+cu1.whl",
        "../../packages/a%20b/a-10.whl",
        "../../packages/%E4%B8%AD/a-11.whl",
        "./beside/a-12.whl",
    ];
    let file = |link: &str| link.rsplit('/').next().unwrap().split('?').next().unwrap().replace("%2B", "+");
    let bytes = |file: &str| noise(file.bytes().map(u64::from).sum(), 70_000);
    let page: String = links
        .iter()
        .map(|link| {
            let name = link.rsplit('/').next().unwrap().split('?').next().unwrap().replace("%2B", "+");
            format!("<a href=\"{link}#sha256={}\">{name}</a>\n", sha256(&bytes(&name)))
        })
        .collect();
    let wrong = Arc::new(Mutex::new(String::new()));
    let lie = wrong.clone();
    let upstream = Upstream::answering(move |request| match request.path() {
        "/base/simple/a/" => entity(request, "text/html", page.replace("HOST", &request.header("host").unwrap()).as_bytes()),
        path if path.ends_with(".whl") => {
            let name = path.rsplit('/').next().unwrap().replace("%2B", "+");
            let mut body = bytes(&name);
            if *lie.lock().unwrap() == name {
                body[5] ^= 1;
            }
            entity(request, "application/octet-stream", &body).with("X-Target", &request.target)
        }
        _ => Response::new(404),
    });
    let config =
        format!("[[route]]\nprotocol = \"pypi\"\nprefix = \"/python\"\nupstream = \"{}/base\"\nproof_ttl = \"1h\"\n", upstream.url());
    let castier = castier(&config);
    let html = Request::get("/python/simple/a/").with("Accept", "text/html").send(castier.public).text();
    let at = url::Url::parse(&format!("{}/python/simple/a/", castier.url())).unwrap();
    let rewritten: Vec<_> = html.split("<a href=\"").skip(1).map(|rest| rest.split('"').next().unwrap().replace("&amp;", "&")).collect();
    assert_eq!(rewritten.len(), links.len(), "{html}");
    for (link, original) in rewritten.iter().zip(links) {
        let url = at.join(link).unwrap();
        assert_eq!(url.origin(), at.origin(), "{original} leads to {url}");
        let (target, name) = (&url[url::Position::BeforePath..url::Position::AfterQuery], file(original));
        let request = Request::get(target);
        // First the wrong bytes: the page has said which are right.
        wrong.lock().unwrap().clone_from(&name);
        refused(castier.public, &request);
        wrong.lock().unwrap().clear();
        let answer = gets(castier.public, &request, &bytes(&name));
        // The upstream got the path as it was written.
        let wanted = original
            .replace("&amp;", "&")
            .replace("../../", "/base/")
            .replace("//HOST", "")
            .replace("http:", "")
            .replace("./beside", "/base/simple/a/beside");
        assert_eq!(answer.header("x-target"), Some(wanted), "{original}");
    }
}
