//! Every expression of the dashboards, of the rules and of the manual, against a real Prometheus that scrapes real nodes under load.
//!
//! 1. castier-origin, a cluster of three with TLS, disk tiers and a route in front of it, and a fourth castier whose origin lies.
//! 2. Prometheus with the rules scrapes them every second. castier-load asks for more than the tiers hold.
//! 3. One node is killed; somebody without the secret asks at the peer listener; the origin lies.
//! 4. Each expression must come to have numbers, and the alerts on what happened must rise.

use crate::{
    monitoring::{dashboards, expressions, fields, items, rules, series},
    tools::{Running, bin, eventually, python, root, run, skipped, stdout, text, tool},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How long numbers may take to appear. Half a minute, on a machine with nothing else to do.
const DEADLINE: Duration = Duration::from_secs(180);
const PUBLIC: u16 = 8080;
const PEER: u16 = 8081;
const ADMIN: u16 = 8082;

/// An address that nobody else has, so that its ports are free.
fn address(serial: u32) -> Ipv4Addr {
    let host = ((std::process::id() & 0xffff) << 6 | (serial & 0x3f)) + (2 << 22);
    Ipv4Addr::from((127 << 24) | (host & 0x00ff_ffff))
}

/// An origin that has every blob, and never the right bytes.
fn lying_origin() -> SocketAddr {
    server(|_| ("200 OK", ""))
}

/// The upstream of a route, which has everything, limits some and fails for some.
fn upstream() -> SocketAddr {
    server(|head| {
        let path = head.split(' ').nth(1).unwrap_or_default();
        match () {
            () if path.contains("limited") => ("429 Too Many Requests", ""),
            () if path.contains("fault") => ("503 Service Unavailable", ""),
            () => ("200 OK", "Cache-Control: max-age=3600\r\n"),
        }
    })
}

/// A server that chooses a status and further headers by the head of a request.
fn server(choose: fn(&str) -> (&'static str, &'static str)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the process.
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                loop {
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") {
                        if reader.read_line(&mut head).unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let body = if head.starts_with("HEAD") { "" } else { "a lie" };
                    let (status, headers) = choose(&head);
                    if write!(&stream, "HTTP/1.1 {status}\r\n{headers}Content-Length: 5\r\n\r\n{body}").is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// A program with this configuration.
fn start(dir: &Path, name: &str, program: &str, config: &str) -> Running {
    let file = dir.join(format!("{name}.toml"));
    fs::write(&file, config).unwrap();
    Running::start(Command::new(bin().join(program)).arg("--config").arg(&file))
}

struct Certificates {
    authority: PathBuf,
    /// Of all nodes, and of the stranger, which TLS lets in as well.
    certificate: PathBuf,
    key: PathBuf,
}

fn certify(dir: &Path, hosts: &[String]) -> Certificates {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "authority");
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(hosts.to_vec()).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let files = Certificates { authority: dir.join("ca.pem"), certificate: dir.join("cert.pem"), key: dir.join("key.pem") };
    fs::write(&files.certificate, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(&files.authority, issuer.pem()).unwrap();
    fs::write(&files.key, key.serialize_pem()).unwrap();
    files
}

/// A Prometheus, asked by curl.
struct Prometheus {
    running: Running,
    address: SocketAddr,
    curl: PathBuf,
}

impl Prometheus {
    fn get(&self, path: &str, parameters: &[&str]) -> Value {
        let mut command = Command::new(&self.curl);
        command.args(["--silent", "--show-error", "--max-time", "20", "--get"]);
        for parameter in parameters {
            command.args(["--data-urlencode", parameter]);
        }
        let said = stdout(command.arg(format!("http://{}/api/v1/{path}", self.address)), b"");
        let said: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
        assert_eq!(said["status"], "success", "{path} {parameters:?}: {said}");
        said["data"].clone()
    }

    /// The numbers that an expression has now, with their labels.
    fn ask(&self, expression: &str) -> Vec<(Value, f64)> {
        let data = self.get("query", &[&format!("query={expression}")]);
        let number = |sample: &Value| sample[1].as_str().unwrap().parse().unwrap();
        if data["resultType"] == "scalar" {
            return vec![(json!({}), number(&data["result"]))];
        }
        items(&data["result"]).iter().map(|found| (found["metric"].clone(), number(&found["value"]))).collect()
    }
}

/// As Grafana puts its variables in.
fn filled(expression: &str) -> String {
    let values =
        [("$namespace", ".*"), ("$node", ".*"), ("$store", ".*"), ("$route", ".*"), ("$__rate_interval", "15s"), ("$__range", "2m")];
    let expression = values.iter().fold(expression.to_owned(), |text, (name, value)| text.replace(name, value));
    assert!(!expression.contains('$'), "{expression}");
    expression
}

/// An expression, what names it, and whether each of its numbers must be one.
struct Wanted {
    what: String,
    expression: String,
    /// Alerts may look at what never happened yet; a panel would show an empty field.
    strictly: bool,
}

/// What keeps an expression from being good.
fn fault(prometheus: &Prometheus, wanted: &Wanted) -> Option<String> {
    let found = prometheus.ask(&wanted.expression);
    let finite = found.iter().filter(|(_, number)| number.is_finite()).count();
    let why = if found.is_empty() {
        "nothing".to_owned()
    } else if finite == 0 || (wanted.strictly && finite < found.len()) {
        format!("no finite number: {found:?}")
    } else {
        return None;
    };
    Some(format!("{}: {}: {why}", wanted.what, wanted.expression))
}

fn wanted(python: &Path) -> Vec<Wanted> {
    let mut all: Vec<_> = expressions("prometheus")
        .into_iter()
        .map(|(what, expression)| Wanted { what, expression: filled(&expression), strictly: true })
        .collect();
    assert!(all.len() > 100, "{}", all.len());
    let rules = rules().unwrap();
    let sources: Vec<_> = rules.iter().map(|rule| rule["expr"].as_str().unwrap()).collect();
    let script = root().join("proxy/tests/deploy/split.py");
    let split = stdout(Command::new(python).arg(script), json!(sources).to_string().as_bytes());
    let split: Vec<Vec<String>> = serde_json::from_str(&split).unwrap();
    for (rule, compared) in rules.iter().zip(split) {
        if let Some(record) = rule["record"].as_str() {
            all.push(Wanted { what: format!("the recording {record}"), expression: record.to_owned(), strictly: true });
            continue;
        }
        for expression in compared {
            all.push(Wanted { what: format!("the alert {}", rule["alert"]), expression, strictly: false });
        }
    }
    all
}

#[test]
fn every_expression_has_numbers_in_a_real_prometheus() {
    let (Some(prometheus), Some(curl), Some(python)) = (tool("prometheus"), tool("curl"), python()) else { return };
    if !run(Command::new(&python).args(["-c", "import promql_parser"]), b"").status.success() {
        return skipped("there is no promql-parser");
    }
    let wanted = wanted(&python);
    let dir = TempDir::new().unwrap();
    let dir = dir.path();

    // ---- the programs ----
    let store = address(0);
    let origin_config = format!(
        "listen.public = \"{store}:{PUBLIC}\"\nlisten.admin = \"{store}:{ADMIN}\"\nstore.root = {:?}\nlog.format = \"json\"\n",
        dir.join("store")
    );
    let mut origin = start(dir, "origin", "castier-origin", &origin_config);
    origin.wait_for((store, PUBLIC).into());
    let nodes: Vec<_> = (1..4).map(address).collect();
    let names: Vec<_> = nodes.iter().map(|node| format!("{node}:{PEER}")).collect();
    let certificates = certify(dir, &nodes.iter().map(ToString::to_string).collect::<Vec<_>>());
    let secret = dir.join("secret");
    fs::write(&secret, "the-secret-of-this-cluster").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    // A receiver of events that is away: they wait in the outbox.
    let hook = dir.join("hook");
    fs::write(&hook, "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=").unwrap();
    let routed = upstream();
    // Tiers that hold a part of what is asked for, so that all of them evict.
    let node_config = |node: &Ipv4Addr| {
        format!(
            "listen.public = \"{node}:{PUBLIC}\"\nlisten.peer = \"{node}:{PEER}\"\nlisten.admin = \"{node}:{ADMIN}\"\n\
             origin.url = \"http://{store}:{PUBLIC}\"\nmemory.capacity = \"2MiB\"\nmemory.max_blob = \"64KiB\"\nmemory.policy = \"lru\"\n\
             disk.path = {:?}\ndisk.capacity = \"4MiB\"\ndisk.policy = \"lru\"\nfill.spool_dir = {:?}\n\
             cluster.advertise = \"{node}:{PEER}\"\ncluster.peers = {names:?}\ncluster.secret_file = {secret:?}\ncluster.mirror_share = 0.25\n\
             cluster.tls.cert_file = {:?}\ncluster.tls.key_file = {:?}\ncluster.tls.ca_file = {:?}\nlog.format = \"json\"\n\
             route = [{{ path = \"/files/{{name}}\", kind = \"fresh\", upstream = \"http://{routed}\", access = \"local\" }}]\n\
             events = [{{ name = \"hook\", url = \"http://{store}:1/hook\", secret_file = {hook:?} }}]\n",
            dir.join(format!("disk-{node}")),
            dir,
            certificates.certificate,
            certificates.key,
            certificates.authority
        )
    };
    let mut running: Vec<_> = nodes.iter().map(|node| start(dir, &node.to_string(), "castier", &node_config(node))).collect();
    let lied_to = address(4);
    let mut deceived = start(
        dir,
        "deceived",
        "castier",
        &format!(
            "listen.public = \"{lied_to}:{PUBLIC}\"\nlisten.admin = \"{lied_to}:{ADMIN}\"\norigin.url = \"http://{}\"\nlog.format = \"json\"\n\
             fill.spool_dir = {dir:?}\n",
            lying_origin()
        ),
    );
    for (node, castier) in nodes.iter().zip(&mut running) {
        castier.wait_for((*node, PUBLIC).into());
    }
    deceived.wait_for((lied_to, PUBLIC).into());

    // ---- Prometheus ----
    let listen = SocketAddr::from((address(5), 9090));
    let targets: Vec<_> = nodes.iter().chain([&lied_to]).map(|node| format!("{node}:{ADMIN}")).collect();
    let config = json!({
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [root().join("grafana/prometheus/*.rules.yaml")],
        "scrape_configs": [
            {"job_name": "castier", "static_configs": [{"targets": targets}]},
            {"job_name": "castier-origin", "static_configs": [{"targets": [format!("{store}:{ADMIN}")]}]},
        ],
    });
    fs::write(dir.join("prometheus.yml"), config.to_string()).unwrap();
    let mut command = Command::new(prometheus);
    command
        .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
        .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
        .arg(format!("--web.listen-address={listen}"))
        .arg("--web.enable-lifecycle");
    let mut prometheus = Prometheus { running: Running::start(&mut command), address: listen, curl: curl.clone() };
    prometheus.running.wait_for(listen);
    eventually("Prometheus is ready", || {
        let asked = run(Command::new(&curl).args(["--silent", "--fail", "--max-time", "5", &format!("http://{listen}/-/ready")]), b"");
        asked.status.success().then_some(())
    });

    // ---- the load, and what goes wrong ----
    let mut load = Command::new(bin().join("castier-load"));
    load.args(["--objects", "800", "--size", "32KiB", "--mix", "get=90,put=4,post=4,head=2", "--zipf", "0.7"])
        .args(["--concurrency", "8", "--rate", "150", "--duration", "5m", "--fill", &format!("http://{store}:{PUBLIC}")])
        // Not the third node: that one is killed.
        .args(["--target", &format!("http://{}:{PUBLIC}", nodes[0]), "--target", &format!("http://{}:{PUBLIC}", nodes[1])]);
    let load = Running::start(&mut load);
    let fetch = |url: &str, more: &[&str]| {
        let mut command = Command::new(&curl);
        command.args(["--silent", "--max-time", "10", "--output", "/dev/null", "--write-out", "%{http_code}"]).args(more).arg(url);
        text(&run(&mut command, b""))
    };
    let digest = |byte: usize| format!("{byte:02x}").repeat(32);
    let stranger = [
        "--cacert",
        certificates.authority.to_str().unwrap(),
        "--cert",
        certificates.certificate.to_str().unwrap(),
        "--key",
        certificates.key.to_str().unwrap(),
    ];
    let began = Instant::now();
    let up = |expected: f64| {
        let ask = || prometheus.ask("sum(up)").first().map(|(_, number)| *number);
        while ask() != Some(expected) {
            assert!(began.elapsed() < DEADLINE, "not all is scraped: {}\n{}", prometheus.get("targets", &[]), prometheus.running.log());
            std::thread::sleep(Duration::from_millis(200));
        }
    };
    up(5.0);
    // With the third node the load is spread over three; then it is gone.
    let hits =
        |tier: &str| prometheus.ask(&format!("sum(castier_hits_total{{tier=\"{tier}\"}})")).first().map_or(0.0, |(_, number)| *number);
    while ["memory", "mirror", "disk"].iter().any(|tier| hits(tier) == 0.0) {
        assert!(began.elapsed() < DEADLINE, "no hits in some tier: {}", load.log());
        std::thread::sleep(Duration::from_millis(200));
    }
    drop(running.pop());
    up(4.0);

    let mut number = 0;
    let rising = loop {
        // Each of these once in a while, since a counter has no rate before it has moved twice.
        number += 1;
        assert_eq!(fetch(&format!("http://{lied_to}:{PUBLIC}/cas/{}", digest(number)), &[]), "502", "{}", deceived.log());
        assert_eq!(fetch(&format!("http://{}:{PUBLIC}/cas/{}", nodes[0], digest(number)), &[]), "404");
        assert_eq!(fetch(&format!("https://{}/cas/{}", names[0], digest(1)), &stranger), "403");
        fetch(&format!("http://{}:{PUBLIC}/other", nodes[0]), &[]);
        // In turns, so that the upstream is not down for long. What is new is a miss.
        for (file, status) in [("limited", "429"), ("fault", "503"), ("kept", "200"), (&*format!("new-{number}"), "200")] {
            assert_eq!(fetch(&format!("http://{}:{PUBLIC}/files/{file}", nodes[0]), &[]), status, "{file}");
        }

        let mut faults: Vec<_> = wanted.iter().filter_map(|wanted| fault(&prometheus, wanted)).collect();
        let rising: BTreeSet<_> = items(&prometheus.get("alerts", &[])["alerts"])
            .iter()
            .map(|alert| {
                format!("{} {}", alert["labels"]["alertname"].as_str().unwrap(), alert["labels"]["instance"].as_str().unwrap_or_default())
            })
            .collect();
        let expected = [
            format!("CastierNodeDown {}:{ADMIN}", nodes[2]),
            format!("CastierPeerDown {}:{ADMIN}", nodes[0]),
            format!("CastierPeerRefused {}:{ADMIN}", nodes[0]),
            format!("CastierCorruptFromOrigin {lied_to}:{ADMIN}"),
            format!("CastierOriginFails {lied_to}:{ADMIN}"),
        ];
        faults.extend(expected.iter().filter(|alert| !rising.contains(*alert)).map(|alert| format!("no alert {alert}: {rising:?}")));
        if faults.is_empty() {
            break rising;
        }
        assert!(began.elapsed() < DEADLINE, "after {:?}:\n{}\n{}", began.elapsed(), faults.join("\n"), load.log());
        std::thread::sleep(Duration::from_millis(500));
    };
    // No noise about what works.
    for alert in [
        "CastierDown",
        "CastierOriginStoreDown",
        "CastierOriginStoreDamaged",
        "CastierScrubOverdue",
        "CastierCertificateExpires",
        "CastierDiskErrors",
    ] {
        assert!(!rising.iter().any(|rising| rising.starts_with(&format!("{alert} "))), "{alert}: {rising:?}");
    }

    // ---- each name is one that Prometheus knows ----
    let known: BTreeSet<_> =
        items(&prometheus.get("label/__name__/values", &[])).iter().map(|name| name.as_str().unwrap().to_owned()).collect();
    for wanted in &wanted {
        for name in series(&wanted.expression) {
            assert!(known.contains(&name), "{}: there is no series {name}", wanted.what);
        }
    }

    // ---- the records have the fields that LogQL asks for ----
    let mut seen: BTreeMap<String, Value> = BTreeMap::new();
    let logs = running.iter().chain([&deceived]).map(Running::log).collect::<Vec<_>>().join("\n");
    for line in logs.lines().filter(|line| !line.is_empty()) {
        let record: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        seen.extend(record.as_object().unwrap().iter().map(|(name, value)| (name.clone(), value.clone())));
    }
    let queries = expressions("loki");
    assert!(queries.len() > 15, "{}", queries.len());
    for (what, query) in queries {
        for field in fields(&query) {
            assert!(seen.contains_key(&field), "{what}: no record has the field {field}: {:?}", seen.keys());
        }
        for name in query.split("|= `").skip(1).map(|rest| rest.split('`').next().unwrap()).filter(|name| !name.starts_with('$')) {
            assert!(logs.contains(name), "{what}: no record says {name}");
        }
    }
    assert_eq!(dashboards().len(), 6);
}
