//! `[events]` as an operator uses it: one section or several, variables, and what castier says about them.
#![expect(clippy::unwrap_used, reason = "a helper outside a test function fails its test by panicking, as the tests do")]

mod support;

use castier_config::{BrokerLogin, Castier, EventKind, EventSink, Protocol, SinkUrl, Span, load_offline, print};
use std::path::Path;
use support::{file, read, variables};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// The lines of the problems of a configuration for another machine that must be wrong, without the file's name.
fn wrong(text: &str, env: &[(&str, &str)]) -> Vec<String> {
    let file = file(text);
    let problems = load_offline::<Castier>(Some(file.path()), variables(env)).unwrap_err().to_string();
    problems.lines().map(|line| line.replace(&format!("{}:", file.path().display()), "")).collect()
}

fn nats(host: &str) -> EventSink {
    EventSink { url: format!("nats://{host}").parse().ok(), ..EventSink::default() }
}

/// One section, a list of one, and variables without and with a number are the same.
#[test]
fn one_section_needs_no_number() {
    let one = [nats("h")];
    for text in
        ["[disk]\n[events]\nurl = \"nats://h\"", "[disk]\n[[events]]\nurl = \"nats://h\"", "disk = {}\nevents = { url = \"nats://h\" }"]
    {
        assert_eq!(read::<Castier>(text, &[]).unwrap().config.events, one, "{text}");
    }
    for name in ["CASTIER_EVENTS__URL", "CASTIER_EVENTS__0__URL"] {
        let loaded = read::<Castier>("[disk]", &[(name, "nats://h")]).unwrap();
        assert!(loaded.is_set("events[0].url"));
        assert_eq!(loaded.config.events, one, "{name}");
        // It wins over each way to write a file.
        for text in ["[disk]\n[events]\nurl = \"nats://other\"", "[disk]\n[[events]]\nurl = \"nats://other\""] {
            assert_eq!(read::<Castier>(text, &[(name, "nats://h")]).unwrap().config.events, one, "{name} {text}");
        }
    }
    assert_eq!(Castier::default().events, []);
}

#[test]
fn several_sections_and_their_variables() {
    let text = "[disk]\n[[events]]\nurl = \"nats://a\"\n[[events]]\nurl = \"nats://b\"\nname = \"two\"";
    let env = [("CASTIER_EVENTS__1__TYPES", "stored, corrupt"), ("CASTIER_EVENTS__2__URL", "nats://c"), ("CASTIER_EVENTS__TIMEOUT", "3s")];
    let sinks = read::<Castier>(text, &env).unwrap().config.events;
    let expected = [
        EventSink { timeout: Span::secs(3), ..nats("a") },
        EventSink { name: "two".into(), types: vec![EventKind::Stored, EventKind::Corrupt], ..nats("b") },
        nats("c"),
    ];
    assert_eq!(sinks, expected);
    assert_eq!(sinks.iter().map(EventSink::name).collect::<Vec<_>>(), ["a", "two", "c"]);
    assert_eq!(wrong(text, &[("CASTIER_EVENTS__5__URL", "nats://c")]).len(), 1);
    assert!(wrong(text, &[("CASTIER_EVENTS__URLS", "nats://c")])[0].contains("CASTIER_EVENTS__URL"));
}

/// A key is called as it was written.
#[test]
fn problems_name_the_key_as_it_was_written() {
    let told = |text: &str, env: &[(&str, &str)]| wrong(text, env).join("\n");
    let scheme = "has the scheme \"ftp\"; write \"https://HOST/PATH\", \"nats://HOST:4222\" or \"amqp://USER:PASSWORD@HOST:5672/VHOST\"";
    assert_eq!(told("[disk]\n[events]\nurl = \"ftp://h\"", &[]), format!("3: events.url: {scheme}"));
    assert_eq!(told("[disk]\n[[events]]\nurl = \"ftp://h\"", &[]), format!("3: events[0].url: {scheme}"));
    assert_eq!(told("[disk]", &[("CASTIER_EVENTS__URL", "ftp://h")]), format!("events.url (set by CASTIER_EVENTS__URL): {scheme}"));
    assert_eq!(
        told("[disk]", &[("CASTIER_EVENTS__0__URL", "ftp://h")]),
        format!("events[0].url (set by CASTIER_EVENTS__0__URL): {scheme}")
    );
    assert!(told("[disk]\n[events]\nurls = \"nats://h\"", &[]).contains("3: events.urls: "));
    assert_eq!(
        told("[events]\nurl = \"nats://h\"", &[]),
        "1: events: needs [disk]: castier keeps events in disk.path until they are acknowledged; add [disk], with a path on a disk that outlives a restart"
    );
}

#[test]
fn receivers_that_make_no_sense_are_refused() {
    for (keys, subject) in [
        ("", "url"),
        ("url = \"\"", "url"),
        ("url = \"nats://\"", "url"),
        ("url = \"nats://h:0\"", "url"),
        ("url = \"nats://h/subject\"", "url"),
        ("url = \"nats://h?x\"", "url"),
        ("url = \"amqp://h/a/b\"", "url"),
        ("url = \"amqp://h/?heartbeat=5\"", "url"),
        ("url = \"https://h/#x\"\nsecret_file = \"/x\"", "url"),
        ("url = \"http://10.0.0.7/\"\nsecret_file = \"/x\"", "url"),
        ("url = \"http://localhost.example/\"\nsecret_file = \"/x\"", "url"),
        ("url = \"https://h\"", "secret_file"),
        ("url = \"nats://h\"\nsecret_file = \"/x\"", "secret_file"),
        ("url = \"https://h\"\nsecret_file = \"/x\"\ncredentials_file = \"/x\"", "credentials_file"),
        ("url = \"nats://u:p@h\"\ncredentials_file = \"/x\"", "credentials_file"),
        ("url = \"nats://h\"\nca_file = \"/x\"", "ca_file"),
        ("url = \"nats://h\"\nexchange = \"x\"", "exchange"),
        ("url = \"nats://h\"\nbatch = 2", "batch"),
        ("url = \"nats://h\"\nsubject = \"a.>\"", "subject"),
        ("url = \"nats://h\"\nname = \"a b\"", "name"),
        ("url = \"nats://h\"\ntypes = []", "types"),
        ("url = \"nats://h\"\ntimeout = \"0s\"", "timeout"),
    ] {
        let lines = wrong(&format!("[disk]\n[events]\n{keys}"), &[]);
        assert!(lines.len() == 1 && lines[0].contains(&format!(" events.{subject}: ")), "{keys}: {lines:#?}");
    }
    let twice = wrong("[disk]\n[[events]]\nurl = \"nats://h\"\n[[events]]\nurl = \"amqp://h\"", &[]);
    assert_eq!(twice, ["4: events[1].name: \"h\" is another section's name too; write one of its own"]);
}

#[test]
fn receivers_that_make_sense_are_taken() {
    let secret = file(SECRET);
    let secret = secret.path().display();
    for keys in [
        format!("url = \"https://u:p@h/hook?token=x\"\nsecret_file = \"{secret}\"\nbatch = 100"),
        format!("url = \"http://127.0.0.1:1/\"\nsecret_file = \"{secret}\""),
        format!("url = \"http://[::1]:1/\"\nsecret_file = \"{secret}\""),
        format!("url = \"http://10.0.0.7/\"\ninsecure = true\nsecret_file = \"{secret}\""),
        format!("url = \"tls://h\"\nca_file = \"{secret}\""),
        format!("url = \"amqps://h\"\nca_file = \"{secret}\"\nexchange = \"x\"\nsubject = \"a\""),
    ] {
        let read = read::<Castier>(&format!("[disk]\n[events]\n{keys}"), &[]);
        assert!(read.is_ok(), "{keys}: {}", read.unwrap_err());
    }
}

#[test]
fn urls_have_usual_ports_and_hosts() {
    for (text, protocol, host, port, vhost) in [
        ("https://h/x", Protocol::Webhook, "h", 443, "x"),
        ("nats://nats.example", Protocol::Nats, "nats.example", 4222, "/"),
        ("tls://[::1]:1", Protocol::Nats, "::1", 1, "/"),
        ("amqp://h", Protocol::RabbitMq, "h", 5672, "/"),
        ("amqp://h/", Protocol::RabbitMq, "h", 5672, "/"),
        ("amqps://h/%2Fa", Protocol::RabbitMq, "h", 5671, "/a"),
    ] {
        let url: SinkUrl = text.parse().unwrap();
        assert_eq!((url.protocol(), url.host(), url.port(), url.vhost().as_str()), (protocol, host, port, vhost), "{text}");
    }
}

#[test]
fn secrets_come_from_files_and_are_never_shown() {
    let with = |text: &str| EventSink { secret_file: file(text).into_temp_path().keep().unwrap(), ..EventSink::default() };
    let key = with(SECRET).secret().unwrap();
    assert_eq!((key.len(), key[0]), (24, 0x31));
    assert_eq!(with(&format!("{}\n", &SECRET[6..])).secret().unwrap(), key, "the prefix may be absent");
    for text in ["", "hunter2", "whsec_aHVudGVyMg==", "whsec_!"] {
        let why = with(text).secret().unwrap_err();
        assert!(why.contains("openssl rand") && !why.contains("hunter2"), "{why}");
    }

    let login = |url: &str, text: Option<&str>| {
        let credentials_file = text.map(|text| file(text).into_temp_path().keep().unwrap()).unwrap_or_default();
        EventSink { url: url.parse().ok(), credentials_file, ..EventSink::default() }.login()
    };
    let password = |user: &str, password: &str| Ok(Some(BrokerLogin::Password(user.into(), password.into())));
    let creds = "-----BEGIN NATS USER JWT-----\nx\n";
    for (url, text, expected) in [
        ("nats://h", None, Ok(None)),
        ("nats://u:p%40@h", None, password("u", "p@")),
        ("nats://t@h", None, Ok(Some(BrokerLogin::Token("t".into())))),
        ("nats://h", Some("t\n"), Ok(Some(BrokerLogin::Token("t".into())))),
        ("nats://h", Some("u:p:q\n"), password("u", "p:q")),
        ("nats://h", Some(creds), Ok(Some(BrokerLogin::Creds(creds.into())))),
        ("amqp://u:p@h", None, password("u", "p")),
        ("amqp://h", Some("u:p"), password("u", "p")),
    ] {
        assert!(login(url, text) == expected, "{url} {text:?}");
    }
    assert!(login("amqp://h", Some("hunter2")).is_err_and(|why| why.contains("USER:PASSWORD") && !why.contains("hunter2")));
    assert!(login("nats://h", Some("a\nb")).is_err_and(|why| why.contains("one line")));
    let missing = EventSink { credentials_file: Path::new("/nowhere").into(), ..nats("h") };
    assert!(missing.login().is_err_and(|why| why.contains("/nowhere")));

    let text = "[disk]\n[events]\nurl = \"amqp://user:hunter2@h/v\"";
    let config = read::<Castier>(text, &[]).unwrap().config;
    assert!(print(&config).contains("url = \"amqp://***@h/v\""), "{}", print(&config));
    let url = config.events[0].url.clone().unwrap();
    assert_eq!(url.to_string(), "amqp://h");
    assert!(!format!("{config:?} {url:?} {}", print(&config)).contains("hunter2"));
    assert!(!wrong("[disk]\n[events]\nurl = \"amqp://user:hunter2@h/v/w\"", &[]).concat().contains("hunter2"));
}
