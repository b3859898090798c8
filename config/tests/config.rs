//! The configuration as an operator uses it: files, variables, and what the programs say about them.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

mod support;

use castier_config::{
    Castier, Cluster, Config, Disk, Loaded, OriginServer, OriginUrl, Policy, Size, Span, changed, keys, load, load_offline, print,
};
use proptest::prelude::*;
use std::path::Path;
use support::{file, read};

/// The lines of the problems of a configuration that must be wrong.
fn wrong(text: &str, env: &[(&str, &str)]) -> Vec<String> {
    let problems = read::<Castier>(text, env).unwrap_err();
    let lines: Vec<String> = problems.to_string().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), problems.subjects().count(), "one line per problem: {lines:#?}");
    lines
}

/// The example is the default. With its optional sections it has every key. Its routes and receivers of events are examples, and sound ones.
fn example_shows_every_default<C: Config + std::fmt::Debug>(name: &str) {
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    assert_eq!(read::<C>(&example, &[]).unwrap().config, C::default());
    let complete: Vec<_> =
        example.lines().map(|line| line.strip_prefix('#').filter(|key| !key.starts_with([' ', '#'])).unwrap_or(line)).collect();
    // A cluster on other machines would need TLS beside these routes.
    let complete = file(&complete.join("\n").replace("10.0.0.", "127.0.0."));
    let loaded = load_offline::<C>(Some(complete.path()), std::iter::empty()).unwrap();
    let differs = changed(&loaded.config, &C::complete());
    assert!(differs.iter().all(|key| ["cluster.advertise", "cluster.peers", "route", "events"].contains(&key.as_str())), "{differs:?}");
    let in_list = |key: &str, list: &str| (0..3).any(|number| loaded.is_set(&key.replacen(list, &format!("{list}[{number}]"), 1)));
    let is_set = |key: &str| loaded.is_set(key) || in_list(key, "route") || in_list(key, "events");
    let missing: Vec<_> = keys::<C>().into_iter().filter(|key| !is_set(key)).collect();
    assert_eq!(missing, Vec::<String>::new(), "keys that {name} does not show");
}

#[test]
fn examples_show_every_key_at_its_default() {
    example_shows_every_default::<Castier>("castier.toml");
    example_shows_every_default::<OriginServer>("castier-origin.toml");
}

#[test]
fn keys_are_dotted_and_in_the_order_of_the_documentation() {
    let keys = keys::<Castier>();
    assert_eq!(keys.len(), 153);
    assert_eq!(&keys[..4], ["allow_delete", "ac_validation", "listen.public", "listen.admin"]);
    assert_eq!(keys.last().unwrap(), "events.timeout");
}

#[test]
fn nothing_at_all_is_the_default() {
    let loaded = load::<Castier>(None, std::iter::empty()).unwrap();
    assert_eq!(loaded.config, Castier::default());
    assert!(!keys::<Castier>().iter().any(|key| loaded.is_set(key)));
    assert_eq!(read::<OriginServer>("", &[]).unwrap().config, OriginServer::default());
}

#[test]
fn environment_beats_file_beats_default() {
    let text = "allow_delete = false\n[memory]\ncapacity = 4096\nmax_blob = \"1KiB\"\npolicy = \"lru\"";
    let env = [("CASTIER_MEMORY__CAPACITY", "2GiB"), ("CASTIER_ALLOW_DELETE", "true"), ("CASTIER_FILL__MAX_IN_FLIGHT", "7"), ("HOME", "/")];
    let Loaded { config, .. } = &read::<Castier>(text, &env).unwrap();
    assert!(config.allow_delete);
    assert_eq!((config.memory.capacity, config.memory.max_blob, config.memory.policy), (Size::gib(2), Size::kib(1), Policy::Lru));
    assert_eq!((config.fill.max_in_flight, config.fill.memory), (7, Size::mib(256)));
    assert_eq!(read::<Castier>(text, &[]).unwrap().config.memory.capacity, Size::new(4096));
    let later = [("CASTIER_SHUTDOWN__GRACE", "1s"), ("CASTIER_SHUTDOWN__GRACE", "2s")];
    assert_eq!(read::<Castier>("", &later).unwrap().config.shutdown.grace, Span::secs(2));
}

#[test]
fn an_empty_variable_is_not_set() {
    let text = "[memory]\ncapacity = \"1GiB\"";
    let loaded = read::<Castier>(text, &[("CASTIER_MEMORY__CAPACITY", ""), ("CASTIER_DISK__PATH", ""), ("CASTIER_NO__KEY", "")]).unwrap();
    assert_eq!((loaded.config.memory.capacity, &loaded.config.disk), (Size::gib(1), &None));
    assert!(!loaded.is_set("disk.path"));
}

#[test]
fn problems_of_a_file_have_its_name_and_line() {
    let text = "allow_delete = 1\n\n[memory]\ncapacity = \"lots\"\n\n[limits]\nmax_heders = 9\nmax_headers = 999\n\n[log]\nloki = { wait = \"0s\" }\n\n[cluster]\nrefresh = \"1s\"\n";
    let lines = wrong(text, &[("CASTIER_FILL__MAX_WAIT", "2")]);
    for (line, key) in [
        (1, "allow_delete"),
        (4, "memory.capacity"),
        (7, "limits.max_heders"),
        (8, "limits.max_headers"),
        (11, "log.loki.wait"),
        // A missing key has the line of its section.
        (13, "cluster.advertise"),
    ] {
        let told = |told: &String| told.contains(&format!(":{line}: {key}: "));
        assert!(lines.iter().any(told), "{key} in line {line}: {lines:#?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("fill.max_wait (set by CASTIER_FILL__MAX_WAIT): ")), "{lines:#?}");
}

#[test]
fn a_file_is_a_regular_one_of_a_bounded_size() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let huge = file(&"# comment\n".repeat(200_000));
    for (path, why) in [(pipe.as_path(), "not a regular file"), (directory.path(), "a directory"), (huge.path(), "larger than 1 MiB")] {
        let text = load::<Castier>(Some(path), std::iter::empty()).unwrap_err().to_string();
        assert!(text.contains(why) && text.lines().count() == 1, "{text}");
    }
    let config = format!("[origin]\nca_file = {pipe:?}\n[cluster]\nadvertise = \"a:1\"\npeers = [\"a:1\"]\nsecret_file = {pipe:?}");
    let told = wrong(&config, &[]);
    assert!(told.len() == 2 && told.iter().all(|line| line.contains("not a regular file")), "{told:#?}");
    // A check of a configuration for another machine looks at no file of this one.
    let path = file(&config);
    assert!(load_offline::<Castier>(Some(path.path()), std::iter::empty()).is_ok());
}

#[test]
fn labels_are_a_table_or_a_list() {
    for text in [
        "labels = { env = \"prod\", dc = \"a=b\" }",
        "labels = [\"env=prod\", \"dc = a=b\"]",
        "[log.loki.labels]\nenv = \"prod\"\ndc = \"a=b\"",
    ] {
        let config = read::<Castier>(&format!("[log.loki]\n{text}"), &[]).unwrap().config;
        let labels: Vec<_> = config.log.loki.labels.0.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(labels, [("dc", "a=b"), ("env", "prod")]);
        assert_eq!(read::<Castier>(&print(&config), &[]).unwrap().config, config);
    }
}

#[test]
fn proxies_are_networks_or_addresses() {
    let text = "[log]\ntrusted_proxies = [\"10.1.2.3/8\", \"192.0.2.7\", \"fd00::/8\", \"2001:db8::1\"]";
    let config = read::<Castier>(text, &[]).unwrap().config;
    let proxies = &config.log.trusted_proxies;
    for (address, theirs) in [
        ("10.255.0.1", true),
        ("11.0.0.1", false),
        ("192.0.2.7", true),
        ("192.0.2.8", false),
        ("::ffff:10.0.0.1", true),
        ("fd12::1", true),
        ("2001:db8::1", true),
        ("2001:db8::2", false),
    ] {
        assert_eq!(proxies.contains(&address.parse().unwrap()), theirs, "{address}");
    }
    assert_eq!(read::<Castier>(&print(&config), &[]).unwrap().config, config);
    let listed = read::<OriginServer>("", &[("CASTIER_LOG__TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.7")]).unwrap().config;
    assert_eq!(listed.log.trusted_proxies.0.len(), 2);
    assert!(!Castier::default().log.trusted_proxies.contains(&"127.0.0.1".parse().unwrap()));
    let problems = read::<Castier>("[log]\ntrusted_proxies = [\"10.0.0.0/8\", \"10.0.0.0/33\"]", &[]).unwrap_err().to_string();
    assert!(
        problems.contains("log.trusted_proxies") && problems.contains("10.0.0.0/33") && !problems.contains("10.0.0.0/8\" is"),
        "{problems}"
    );
}

#[test]
fn is_set_tells_choice_from_default() {
    let loaded = read::<Castier>("[listen]\nadmin = \"127.0.0.1:8082\"", &[("CASTIER_LOG__LEVEL", "info")]).unwrap();
    assert_eq!(loaded.config, Castier::default());
    assert!(loaded.is_set("listen.admin") && loaded.is_set("log.level"));
    assert!(!loaded.is_set("listen.public") && !loaded.is_set("listen"));
}

#[test]
fn variables_of_kubernetes_are_ignored_and_slips_are_not() {
    let injected = [
        ("CASTIER_PORT", "tcp://10.0.0.1:8080"),
        ("CASTIER_SERVICE_HOST", "10.0.0.1"),
        ("CASTIER_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("CASTIER_ORIGIN", "x"),
        ("CASTIER_ORIGIN_SERVICE_PORT", "9000"),
        ("CASTIER_SERVICE_PORT_HTTP", "8080"),
        ("CASTIER_PEERS_PORT_8081_TCP_PROTO", "tcp"),
        ("CASTIER_LISTEN_PORT", "tcp://10.0.0.1:80"),
        ("CASTIER_HOME", "/srv"),
    ];
    assert_eq!(read::<Castier>("", &injected).unwrap().config, Castier::default());
    for (slip, meant) in [
        ("CASTIER_MEMROY__CAPACITY", "CASTIER_MEMORY__CAPACITY"),
        ("CASTIER_MEMORY_CAPACITY", "CASTIER_MEMORY__CAPACITY"),
        ("CASTIER_LOG_LEVL", "CASTIER_LOG__LEVEL"),
        ("CASTIER_FILL_MAX_WAIT", "CASTIER_FILL__MAX_WAIT"),
        ("CASTIER_ALOW_DELETE", "CASTIER_ALLOW_DELETE"),
    ] {
        assert_eq!(wrong("", &[(slip, "1")]), [format!("{slip}: unknown variable; did you mean {meant}?")]);
    }
    assert_eq!(
        wrong("", &[("CASTIER_MEMORY__CAPASITY", "1GiB"), ("CASTIER_FROBNICATE__X", "1"), ("CASTIER_DISK__PATHS", "/x")]),
        [
            "CASTIER_MEMORY__CAPASITY: unknown variable; did you mean CASTIER_MEMORY__CAPACITY?",
            "CASTIER_FROBNICATE__X: unknown variable; --print-config shows every key there is",
            "CASTIER_DISK__PATHS: unknown variable; did you mean CASTIER_DISK__PATH?",
        ]
    );
}

#[test]
fn all_problems_are_told_at_once() {
    let text = r#"
        alow_delete = true
        shutdown = 5
        [memory]
        capasity = "1GiB"
        capacity = "lots"
        max_blob = "1TiB"
        policy = "mru"
        [memry]
        capacity = 1
        [fill]
        max_in_flight = -1
        max_wait = 2
        [limits]
        max_connections = 0
        [listen]
        public = "localhost"
        [disk]
        paht = "/x"
        cooldown = "0s"
        open_files = -1
        [cluster]
        peers = ["10.0.0.7:8081", "10.0.0.8"]
        dns = "peers:8081"
        mirror_share = 1
        refesh = "1s"
        [cluster.tls]
        key = "/x"
    "#;
    let env = [("CASTIER_ALLOW_DELETE", "yes"), ("CASTIER_ORIGIN__READ_TIMEOUT", "0s"), ("CASTIER_LIMITS__MAX_HEADERS", "many")];
    let lines = wrong(text, &env);
    let expected = [
        "allow_delete (set by CASTIER_ALLOW_DELETE): \"yes\" is not true or false",
        "limits.max_headers (set by CASTIER_LIMITS__MAX_HEADERS): \"many\" is not a whole number",
        "shutdown: invalid type: integer `5`, expected a section; write its keys below [shutdown]",
        "memory.capacity: \"lots\" is not a size; write a number of bytes, or one with its unit, such as \"64MiB\" or \"1GB\"",
        "memory.policy: unknown variant `mru`, expected `tiny-lfu` or `lru`",
        "fill.max_in_flight: invalid value: integer `-1`, expected a whole number, 0 or more, that is not too large",
        "fill.max_wait: \"2\" is not a duration; write a number with its unit, such as \"5s\", \"250ms\" or \"1m30s\"",
        "alow_delete: unknown key; did you mean allow_delete?",
        "memory.capasity: unknown key; did you mean memory.capacity?",
        "memry: unknown key; did you mean memory?",
        "disk.paht: unknown key; did you mean disk.path?",
        "disk.open_files: invalid value: integer `-1`, expected a whole number, 0 or more, that is not too large",
        "disk.cooldown: must be longer than 0s; write a duration such as \"5s\"",
        "cluster.peers: \"10.0.0.8\" has no port; write HOST:PORT, such as \"10.0.0.7:8081\", or \"10.0.0.7:8081 weight=2\" for twice the share",
        "cluster.mirror_share: 1 is out of range; write 0 to 0.9",
        "cluster.refesh: unknown key; did you mean cluster.refresh?",
        "cluster.tls.key: unknown key; --print-config shows every key there is",
        "cluster.advertise: is missing; write this node's HOST:PORT as its peers reach it, such as \"10.0.0.7:8081\"",
        "limits.max_connections: must be 1 or more",
        "memory.max_blob: 1TiB is more than fill.memory, which is 256MiB; lower the one or raise the other",
        "origin.read_timeout (set by CASTIER_ORIGIN__READ_TIMEOUT): must be longer than 0s; write a duration such as \"5s\"",
    ];
    for line in expected {
        // A key from the file has the file's name and the line in front.
        let is = |told: &String| told == line || (told.ends_with(&format!(": {line}")) && told.starts_with('/'));
        assert!(lines.iter().any(is), "missing: {line}\nin {lines:#?}");
    }
    assert!(lines.iter().any(|line| line.contains("listen.public: \"localhost\" is not an address")), "{lines:#?}");
    // And nothing else: memory.max_blob is not compared with a capacity that could not be read.
    assert_eq!(lines.len(), expected.len() + 1, "{lines:#?}");
}

fn assert_refused(refused: &[(&str, &str)]) {
    for (key, text) in refused {
        let problems = read::<Castier>(text, &[]).map(|_| ()).unwrap_err();
        assert!(problems.subjects().any(|subject| subject == *key), "{text}\n{problems}");
    }
}

#[test]
fn values_that_make_no_sense_are_refused() {
    let refused = [
        ("listen.public", "[listen]\npublic = \":8080\""),
        ("listen.peer", "[listen]\npeer = \"10.0.0.1:99999\""),
        ("listen.public", "[listen]\npublic = \"300.0.0.1:80\""),
        ("listen.admin", "[listen]\nadmin = \"127.0.0.1:8080\""),
        ("listen.admin", "[listen]\nadmin = \"0.0.0.0:8080\""),
        ("origin.url", "[origin]\nurl = \"origin.internal:9000\""),
        ("origin.retries", "[origin]\nretries = 101"),
        ("origin.connect_timeout", "[origin]\nconnect_timeout = \"0s\""),
        ("origin.ca_file", "[origin]\nca_file = \"/does/not/exist.pem\""),
        ("origin.ca_file", "[origin]\nca_file = \"/\""),
        ("memory.capacity", "[memory]\ncapacity = 0\nmax_blob = \"0\""),
        ("memory.max_blob", "[memory]\nmax_blob = \"257MiB\""),
        ("memory.max_blob", "[memory]\nmax_blob = \"256MiB\""),
        ("memory.max_blob", "[fill]\nmemory = \"4MiB\""),
        ("limits.max_blob", "[fill]\nspool = \"1GiB\""),
        ("limits.max_blob", "[fill]\nspool = \"1GiB\"\n[disk]"),
        ("log.loki.batch", "[log.loki]\nbatch = \"5MiB\""),
        ("log.loki.batch", "[log.loki]\nbuffer = \"512KiB\""),
        ("log.loki.labels", "[log.loki]\nlabels = { level = \"x\" }"),
        ("log.loki.labels", "[log.loki]\nlabels = [\"a-b=x\"]"),
        ("log.loki.labels", "[log.loki]\nlabels = [\"a\"]"),
        ("log.loki.tenant", "[log.loki]\ntenant = \"a b\""),
        ("log.loki.wait", "[log.loki]\nwait = \"0s\""),
        ("disk", "disk = 5"),
        ("disk.path", "[disk]\npath = \"\""),
        ("disk.capacity", "[disk]\ncapacity = 0"),
        ("disk.policy", "[disk]\npolicy = \"fifo\""),
        ("disk.write_behind", "[disk]\nwrite_behind = 0"),
        ("disk.open_files", "[disk]\nopen_files = 0"),
        ("disk.scrub_rate", "[disk]\nscrub_rate = \"fast\""),
        ("disk.cooldown", "[disk]\ncooldown = \"0s\""),
        ("verify.buffer_up_to", "[verify]\nbuffer_up_to = \"257MiB\""),
        ("fill.max_in_flight", "[fill]\nmax_in_flight = 0"),
        ("fill.spool", "[fill]\nspool = \"0B\""),
        ("fill.spool_dir", "[fill]\nspool_dir = \"/does/not/exist\""),
        ("limits.max_headers", "[limits]\nmax_headers = 257"),
        ("limits.max_headers", "[limits]\nmax_headers = 0"),
        ("limits.max_header_bytes", "[limits]\nmax_header_bytes = 1023"),
        ("limits.max_blob", "[limits]\nmax_blob = 0"),
        ("limits.write_timeout", "[limits]\nwrite_timeout = \"0ms\""),
        ("limits.idle_timeout", "[limits]\nidle_timeout = \"20years\""),
        ("log.level", "[log]\nlevel = \"loud\""),
        ("log.level", "[log]\nlevel = \"info,debug\""),
        ("log.level", "[log]\nlevel = \"castier=\""),
        ("log.level", "[log]\nlevel = \"\""),
        ("log.level", "[log]\nlevel = \"info, castier=debug\""),
        ("log.format", "[log]\nformat = \"xml\""),
        ("log.loki_url", "[log]\nloki_url = \"loki:3100\""),
        ("log.stats_interval", "[log]\nstats_interval = \"0s\""),
        ("log.trusted_proxies", "[log]\ntrusted_proxies = [\"10.0.0.0/33\"]"),
        ("log.trusted_proxies", "[log]\ntrusted_proxies = [\"10.0.0.0/8\", \"proxy.internal\"]"),
        ("log.trusted_proxies", "[log]\ntrusted_proxies = \"10.0.0.0/8\""),
        ("otlp.endpoint", "[otlp]\nendpoint = \"collector:4318\""),
        ("otlp.sample", "[otlp]\nsample = 1.1"),
        ("otlp.sample", "[otlp]\nsample = nan"),
        ("otlp.buffer", "[otlp]\nbuffer = 0"),
        ("otlp.timeout", "[otlp]\ntimeout = \"0s\""),
    ];
    assert_refused(&refused);
    let origin = read::<OriginServer>("[store]\nroot = \"\"\n[limits]\nmax_headers = 0\n[log]\nlevel = \"x\"\n[disk]\n", &[]).unwrap_err();
    assert_eq!(origin.subjects().collect::<Vec<_>>(), ["disk", "store.root", "limits.max_headers", "log.level"]);
}

#[test]
fn clusters_that_make_no_sense_are_refused() {
    assert_refused(&[
        ("cluster", "cluster = 5"),
        ("cluster.advertise", "[cluster]\npeers = [\"a:1\"]"),
        ("cluster.advertise", "[cluster]\nadvertise = \"a:1 weight=2\"\npeers = [\"a:1\"]"),
        ("cluster.advertise", "[cluster]\nadvertise = \"0.0.0.0:1\"\npeers = [\"a:1\"]"),
        ("cluster.advertise", "[cluster]\nadvertise = \"a:1\"\ndns = \"peers:1\""),
        ("cluster.peers", "[cluster]\nadvertise = \"a:1\""),
        ("cluster.peers", "[cluster]\nadvertise = \"a:1\"\npeers = []"),
        ("cluster.peers", "[cluster]\nadvertise = \"a:1\"\npeers = [\"a:1\", \"b:1\", \"B:1 weight=2\"]"),
        ("memory.max_blob", "[memory]\nmax_blob = \"230MiB\"\n[cluster]\nadvertise = \"a:1\"\npeers = [\"a:1\"]"),
        ("cluster.peers", "[cluster]\nadvertise = \"a:1\"\npeers = \"a:1\""),
        ("cluster.peers", "[cluster]\nadvertise = \"a:1\"\npeers = [\"a:1\", 5]"),
        ("cluster.dns", "[cluster]\nadvertise = \"a:1\"\npeers = [\"a:1\"]\ndns = \"_peer._tcp.peers\""),
        ("cluster.dns", "[cluster]\nadvertise = \"a:1\"\ndns = \"_peer._tcp.peers:1\""),
        ("cluster.dns", "[cluster]\nadvertise = \"10.0.0.7:1\"\ndns = \"peers\""),
        ("cluster.dns", "[cluster]\nadvertise = \"10.0.0.7:1\"\ndns = \"10.0.0.8:1\""),
        ("cluster.refresh", "[cluster]\nrefresh = \"0s\""),
        ("cluster.stall_timeout", "[cluster]\nstall_timeout = \"0s\""),
        ("cluster.probe_interval", "[cluster]\nprobe_interval = \"0s\""),
        ("cluster.probe_timeout", "[cluster]\nprobe_timeout = \"0s\""),
        ("cluster.mirror_share", "[cluster]\nmirror_share = -0.1"),
        ("cluster.mirror_share", "[cluster]\nmirror_share = nan"),
        ("cluster.secret_file", "[cluster]\nsecret_file = \"/does/not/exist\""),
        ("cluster.secret_file", "[listen]\npeer = \"0.0.0.0:8081\"\n[cluster]\n"),
        ("cluster.secret_file", "[listen]\npeer = \"node-7:8081\"\n[cluster]\n"),
        ("cluster.tls.key_file", "[cluster.tls]\ncert_file = \"/\""),
        ("cluster.tls.cert_file", "[cluster.tls]\ncert_file = \"/\""),
        ("listen.peer", "[listen]\npeer = \"127.0.0.1:8080\"\n[cluster]"),
        ("listen.peer", "[listen]\npeer = \"0.0.0.0:8082\"\n[cluster]"),
    ]);
}

#[test]
fn values_that_make_sense_are_taken() {
    let pem = file("-----BEGIN CERTIFICATE-----");
    let text = format!(
        "[listen]\npublic = \"[::]:0\"\nadmin = \"localhost:0\"\n[origin]\nurl = \"https://u:p@origin:1\"\nca_file = {:?}\n\
         [disk]\nscrub_rate = 0\nquarantine = 0\n[verify]\nbuffer_up_to = 0\n[fill]\nmax_wait = \"0s\"\nspool_dir = \"/\"\n[limits]\nnegative_ttl = \"0s\"\nmax_negative = 0\n\
         [log]\nlevel = \"WARN,castier::flight=debug,h2=off\"\nformat = \"json\"\nloki_url = \"http://loki:3100\"\n\
         [shutdown]\ngrace = \"0s\"\n[access]\nanonymous = \"write\"",
        pem.path()
    );
    let config = read::<Castier>(&text, &[]).unwrap().config;
    assert_eq!(config.origin.url, OriginUrl::Remote("https://u:p@origin:1".parse().unwrap()));
}

#[test]
fn unreadable_files_are_one_line_each() {
    let missing = load::<Castier>(Some(Path::new("/does/not/exist.toml")), std::iter::empty()).unwrap_err().to_string();
    assert!(missing.starts_with("/does/not/exist.toml: cannot be read (") && missing.lines().count() == 1, "{missing}");

    let broken = file("[memory]\ncapacity = \"1GiB\"\nsecret = http://u:hunter2@h\n");
    // The variable is right with the file's capacity. The file cannot be read, so the variable is not compared with the default.
    let env = [("CASTIER_MEMORY__MAX_BLOB".to_owned(), "1GiB".to_owned())];
    let text = load::<Castier>(Some(broken.path()), env.into_iter()).unwrap_err().to_string();
    assert!(text.starts_with(&format!("{}:3:", broken.path().display())), "{text}");
    assert!(text.lines().count() == 1 && !text.contains("hunter2"), "{text}");
}

#[test]
fn printing_masks_secrets_and_nothing_else() {
    let text = "[origin]\nurl = \"http://user:hunter2@origin:9000\"\n[log]\nloki_url = \"https://hunter2@loki/x@y\"";
    let config = read::<Castier>(text, &[]).unwrap().config;
    let printed = print(&config);
    assert!(printed.contains("url = \"http://***@origin:9000\"") && printed.contains("loki_url = \"https://***@loki/x@y\""), "{printed}");
    assert!(!printed.contains("hunter2") && !format!("{config:?}").contains("hunter2"));
    let is_optional = |key: &str| ["cluster.", "disk.", "route.", "events."].iter().any(|section| key.starts_with(section));
    let shown = |config: &Castier| print(config).lines().filter(|line| line.contains(" = ")).count();
    assert_eq!(shown(&Castier::complete()), keys::<Castier>().len());
    assert_eq!(shown(&config), keys::<Castier>().iter().filter(|key| !is_optional(key)).count());
}

#[test]
fn problems_never_tell_secrets() {
    let text = "[origin]\nurl = \"http://user:hunter2@origin/path\"\n[log]\nloki_url = \"ftp://user:hunter2@loki\"";
    let lines = wrong(text, &[]);
    assert_eq!(lines.len(), 2);
    assert!(!lines.concat().contains("hunter2"), "{lines:#?}");
}

#[test]
fn one_key_puts_a_section_in_force() {
    assert_eq!(read::<Castier>("", &[]).unwrap().config.disk, None);
    let loaded = read::<Castier>("", &[("CASTIER_DISK__CAPACITY", "1TiB")]).unwrap();
    assert_eq!(loaded.config.disk, Some(Disk { capacity: Size::gib(1024), ..Disk::default() }));
    assert!(loaded.is_set("disk.capacity") && !loaded.is_set("disk.path"));
    assert_eq!(read::<Castier>("[disk]", &[]).unwrap().config.disk, Castier::complete().disk);
    let changes = changed(&Castier::default(), &Castier::complete());
    assert_eq!((changes.len(), &changes[25..]), (27, &["route".to_owned(), "events".to_owned()][..]));
    assert!(changes[..25].iter().all(|key| key.starts_with("disk.") || key.starts_with("cluster.")), "{changes:?}");
    assert_eq!(changed(&Castier::complete(), &Castier::default()), changes);
}

#[test]
fn clusters_are_read() {
    let secret = file("0123456789abcdef\nfedcba9876543210\n");
    let secret = secret.path().to_str().unwrap();
    let text = "[listen]\npeer = \"0.0.0.0:8081\"\n[cluster]\nadvertise = \"10.0.0.7:8081\"\ndns = \"peers.svc:8081\"\nmirror_share = 0";
    let cluster = read::<Castier>(text, &[("CASTIER_CLUSTER__SECRET_FILE", secret)]).unwrap().config.cluster.unwrap();
    assert_eq!((cluster.dns.as_str(), cluster.mirror_share.of(Size::gib(1)), cluster.tls.is_on()), ("peers.svc:8081", Size::new(0), false));

    let env = [("CASTIER_CLUSTER__ADVERTISE", "b:2"), ("CASTIER_CLUSTER__PEERS", "A.:1, b:2 weight=3")];
    let cluster = read::<Castier>("", &env).unwrap().config.cluster.unwrap();
    assert_eq!(cluster.peers.iter().map(|peer| (peer.name(), peer.weight)).collect::<Vec<_>>(), [("a:1".into(), 1), ("b:2".into(), 3)]);
    assert_eq!(cluster, Cluster { advertise: "b:2".into(), peers: cluster.peers.clone(), ..Cluster::default() });
    assert_eq!(cluster.mirror_share.of(Size::mib(256)), Size::mib(32));

    let wrong = wrong("", &[("CASTIER_CLUSTER__PEERS", "a:1,b"), ("CASTIER_CLUSTER__ADVERTISE", "a:1")]);
    assert!(wrong.len() == 1 && wrong[0].starts_with("cluster.peers (set by CASTIER_CLUSTER__PEERS): \"b\" has no port"), "{wrong:#?}");
    // Without a cluster castier does not open the peer address.
    assert_eq!(read::<Castier>("[listen]\npeer = \"0.0.0.0:8080\"", &[]).unwrap().config.cluster, None);
}

#[test]
fn changed_names_what_differs() {
    let old = Castier::default();
    let mut new = old.clone();
    assert_eq!(changed(&old, &new), Vec::<String>::new());
    new.log.level = "debug".into();
    new.allow_delete = true;
    new.limits.max_connections = 1;
    assert_eq!(changed(&old, &new), ["allow_delete", "limits.max_connections", "log.level"]);
    // A new password is a change, though it prints the same.
    let with = |url: &str| Castier { origin: castier_config::Origin { url: url.parse().unwrap(), ..old.origin.clone() }, ..old.clone() };
    assert_eq!(changed(&with("http://u:a@h"), &with("http://u:b@h")), ["origin.url"]);
}

proptest! {
    #[test]
    fn what_is_printed_reads_back(
        allow_delete: bool,
        capacity in 10_000u64..=i64::MAX as u64,
        share in 0u64..800,
        retries in 0u32..=100,
        max_connections in 1usize..1_000_000,
        millis in 1u64..100_000_000,
        nanos in 1u64..5_000_000_000,
        root in "[ -~é]{1,20}",
        lru: bool,
        disk: bool,
        clustered: bool,
        weight in 1u16..,
    ) {
        let mut config = Castier { allow_delete, ..Castier::default() };
        config.memory.capacity = Size::new(capacity);
        config.memory.max_blob = Size::new((capacity / 1000 * share).clamp(1, 256 << 20));
        config.memory.policy = if lru { Policy::Lru } else { Policy::TinyLfu };
        config.disk = disk.then(|| Disk { path: root.clone().into(), capacity: Size::new(capacity), ..Disk::default() });
        config.origin.url = OriginUrl::Embedded(root.clone().into());
        config.origin.retries = retries;
        config.cluster = Castier::complete().cluster.filter(|_| clustered);
        for peer in config.cluster.iter_mut().flat_map(|cluster| &mut cluster.peers) {
            peer.weight = weight;
        }
        config.limits.max_connections = max_connections;
        config.limits.idle_timeout = Span::millis(millis);
        config.limits.negative_ttl = Span::new(std::time::Duration::from_nanos(nanos));
        // Printing masks a path that looks like a URL with a user.
        prop_assume!(!root.contains("://"));
        let loaded = read::<Castier>(&print(&config), &[]).unwrap();
        prop_assert_eq!(&loaded.config, &config);
        let absent = |key: &str| {
            (!clustered && key.starts_with("cluster.")) || (!disk && key.starts_with("disk.")) || key.starts_with("route.") || key.starts_with("events.")
        };
        prop_assert!(keys::<Castier>().iter().all(|key| loaded.is_set(key) || absent(key)));

        let mut server = OriginServer { allow_delete, ..OriginServer::default() };
        server.store.root = root.into();
        prop_assert_eq!(read::<OriginServer>(&print(&server), &[]).unwrap().config, server);
    }

    #[test]
    fn no_file_panics(text in "(\\[(memory|fill|x)\\]\n|[a-z.]{1,8} = (\"[ -~]{0,9}\"|[0-9]{1,20}|\\[\\]|\\{\\})\n|\\PC{0,5}){0,8}") {
        if let Err(problems) = read::<Castier>(&text, &[]) {
            prop_assert!(!problems.is_empty());
            prop_assert_eq!(problems.to_string().lines().count(), problems.subjects().count());
        }
    }
}

#[test]
fn castier_is_not_its_own_origin() {
    let with = |public: &str, admin: &str, url: &str| {
        let text = format!("listen.public = \"{public}\"\nlisten.admin = \"{admin}\"\norigin.url = \"{url}\"\naccess.insecure = true");
        read::<Castier>(&text, &[]).map(drop).map_err(|problems| problems.to_string())
    };
    let admin = "127.0.0.1:8082";
    for (public, url) in [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("127.0.0.1:8080", "http://localhost:8080"),
        ("localhost:8080", "http://127.0.0.1:8080"),
        ("0.0.0.0:8080", "http://127.0.0.9:8080"),
        ("0.0.0.0:8080", "http://localhost:8080"),
        ("[::]:8080", "http://[::1]:8080"),
        ("0.0.0.0:80", "http://localhost"),
        ("127.0.0.1:8080", "http://0.0.0.0:8080"),
        ("cache.example:443", "https://Cache.example"),
        ("127.0.0.1:8080", "http://127.0.0.1:8082"),
    ] {
        let problems = with(public, admin, url).unwrap_err();
        assert!(problems.contains("origin.url") && problems.contains("leads to castier itself"), "{public} {url}: {problems}");
    }
    for (public, url) in [
        ("127.0.0.1:8080", "http://127.0.0.1:9000"),
        ("127.0.0.1:8080", "http://127.0.0.2:8080"),
        ("127.0.0.1:0", "http://127.0.0.1:8080"),
        ("0.0.0.0:8080", "http://origin.example:8080"),
        // Without a cluster castier does not open the peer address.
        ("127.0.0.1:8080", "http://127.0.0.1:8081"),
    ] {
        assert_eq!(with(public, admin, url), Ok(()), "{public} {url}");
    }
    let cluster = "cluster.advertise = \"127.0.0.1:8081\"\ncluster.peers = [\"127.0.0.1:8081\"]\norigin.url = \"http://localhost:8081\"";
    assert!(read::<Castier>(cluster, &[]).unwrap_err().to_string().contains("leads to castier itself"));
}
