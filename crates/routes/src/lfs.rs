//! Git LFS: the batch API (<https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md>), and the tickets in castier's own links.

use crate::{
    edit::{Edit, range_in},
    json::{self, Step},
    links::Unparsed,
};
use castier_blob::Digest;
use data_encoding::BASE64URL_NOPAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json, value::RawValue};
use sha2::{Digest as _, Sha256};
use std::time::{Duration, SystemTime};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// How many objects a batch may have. Clients ask for 100 at once.
const MOST: usize = 10_000;

/// A client's question about many objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `download` or `upload`.
    pub operation: String,
    /// The transfers that the client knows. None: `basic`.
    pub transfers: Vec<String>,
    /// The name and the size of each object.
    pub objects: Vec<(Digest, u64)>,
    /// The algorithm of the names: `sha256`.
    pub hash_algo: String,
}

/// Parses the body of a batch request. `None`: it is none that castier can answer, so pass it on. It may be broken, have more than 10,000 objects, or name
/// objects by another hash.
pub fn parse_request(body: &[u8]) -> Option<Request> {
    #[derive(Deserialize)]
    struct Text {
        operation: String,
        #[serde(default, deserialize_with = "or_default")]
        transfers: Vec<String>,
        objects: Vec<ObjectText>,
        hash_algo: Option<String>,
    }
    #[derive(Deserialize)]
    struct ObjectText {
        oid: String,
        size: u64,
    }
    let text: Text = serde_json::from_slice(body).ok()?;
    let hash_algo = text.hash_algo.unwrap_or_else(|| "sha256".into());
    if hash_algo != "sha256" || text.objects.len() > MOST {
        return None;
    }
    let objects = text.objects.into_iter().map(|object| Some((Digest::parse(object.oid.as_bytes()).ok()?, object.size)));
    let objects = objects.collect::<Option<_>>()?;
    Some(Request { operation: text.operation, transfers: text.transfers, objects, hash_algo })
}

/// Whether a batch request is for downloads, however its reader parses it: some servers take the names of members in any case, and the last of two.
pub fn only_downloads(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Text {
        operation: String,
    }
    // A second `operation` is an error for the first parser, and one in another case counts for the second.
    let text: Option<Text> = serde_json::from_slice(body).ok();
    let members: Option<serde_json::Map<String, serde_json::Value>> = serde_json::from_slice(body).ok();
    let is_alone = |members: serde_json::Map<_, _>| members.keys().filter(|name| name.eq_ignore_ascii_case("operation")).count() == 1;
    text.is_some_and(|text| text.operation == "download") && members.is_some_and(is_alone)
}

/// An upstream's answer to a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The transfer that the upstream has chosen: `basic` if it does not say so. Pass on the answer as it is if it is another.
    pub transfer: String,
    /// What the upstream says of each object.
    pub objects: Vec<Object>,
}

/// What an upstream says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name.
    pub oid: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The action needs no other credentials.
    pub authenticated: bool,
    /// Why there is no action.
    pub error: Option<ObjectError>,
    /// How to load it.
    pub download: Option<Action>,
}

/// Why an object cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ObjectError {
    /// As the status of HTTP: 404, 410, 422.
    pub code: u16,
    /// For people.
    #[serde(default, deserialize_with = "or_default")]
    pub message: String,
}

/// How an object is loaded.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Action {
    /// The address.
    pub href: String,
    /// The headers of the request, some of which are secrets.
    #[serde(default, deserialize_with = "headers")]
    pub header: Vec<(String, String)>,
    /// For how many seconds after the answer the action holds. It counts more than `expires_at`. Zero: not said.
    #[serde(default, deserialize_with = "or_default")]
    pub expires_in: i64,
    /// Until when the action holds.
    #[serde(default, deserialize_with = "moment")]
    pub expires_at: Option<SystemTime>,
}

impl Action {
    /// Until when the action holds, if it came at `now`. `None`: the upstream does not say.
    pub fn holds_until(&self, now: SystemTime) -> Option<SystemTime> {
        let seconds = Duration::from_secs(self.expires_in.unsigned_abs());
        match self.expires_in {
            0 => self.expires_at,
            1.. => now.checked_add(seconds),
            _ => now.checked_sub(seconds),
        }
    }
}

impl std::fmt::Debug for Action {
    // The headers and the query of the address are secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Action").field("expires_in", &self.expires_in).field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

/// What a client gets in place of the upstream's action.
#[derive(Clone, PartialEq, Eq)]
pub struct Replacement {
    /// The address.
    pub href: String,
    /// The headers of the client's request. A ticket is one of them, see [`Tickets`].
    pub header: Vec<(String, String)>,
    /// For how many seconds it holds. `None`: without end.
    pub expires_in: Option<u64>,
}

/// `null` is the default too.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(value: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(value)?.unwrap_or_default())
}

/// The headers of an action in their order.
fn headers<'de, D: Deserializer<'de>>(value: D) -> Result<Vec<(String, String)>, D::Error> {
    let raw = <&RawValue>::deserialize(value)?;
    let members = json::members(raw.get()).map_err(serde::de::Error::custom)?;
    Ok(members.into_iter().filter_map(|(name, value)| Some((name, serde_json::from_str(value.get()).ok()?))).collect())
}

/// A moment, if it is one after 1970: Go's servers write the year 1 for none.
fn moment<'de, D: Deserializer<'de>>(value: D) -> Result<Option<SystemTime>, D::Error> {
    let text: Option<String> = Option::deserialize(value)?;
    let moment = text.and_then(|text| OffsetDateTime::parse(&text, &Rfc3339).ok());
    Ok(moment.map(SystemTime::from).filter(|moment| *moment > SystemTime::UNIX_EPOCH))
}

/// The objects of an answer.
const OBJECTS: &[Step] = &[Step::Member("objects"), Step::Each];
/// The action of an object.
const DOWNLOAD: &[Step] = &[Step::Member("actions"), Step::Member("download")];

/// An object of an answer. `None`: it has another form, so it is not for castier.
fn parse_object(text: &str) -> Option<Object> {
    #[derive(Deserialize)]
    struct Text<'t> {
        oid: String,
        size: u64,
        authenticated: Option<bool>,
        error: Option<ObjectError>,
        #[serde(borrow)]
        actions: Option<Actions<'t>>,
    }
    #[derive(Deserialize)]
    struct Actions<'t> {
        #[serde(borrow)]
        download: Option<&'t RawValue>,
    }
    let text: Text<'_> = serde_json::from_str(text).ok()?;
    let download = match text.actions.and_then(|actions| actions.download) {
        Some(raw) if raw.get() != "null" => Some(serde_json::from_str(raw.get()).ok()?),
        _ => None,
    };
    let oid = Digest::parse(text.oid.as_bytes()).ok()?;
    Some(Object { oid, size: text.size, authenticated: text.authenticated.unwrap_or(false), error: text.error, download })
}

impl Batch {
    /// Parses the body of an upstream's answer to a batch for downloads. Objects that are of another form are left out. `None`: it is no such answer, has
    /// more than 10,000 objects, or names them by another hash. Pass it on as it is.
    pub fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Text {
            transfer: Option<String>,
            hash_algo: Option<String>,
        }
        let body = str::from_utf8(body).ok()?;
        let text: Text = serde_json::from_str(body).ok()?;
        if text.hash_algo.is_some_and(|algorithm| algorithm != "sha256") {
            return None;
        }
        let (mut objects, mut count) = (Vec::new(), 0_usize);
        json::each(body, OBJECTS, &mut |object| {
            count += 1;
            if count <= MOST {
                objects.extend(parse_object(object.get()));
            }
        })
        .ok()?;
        (count <= MOST).then(|| Self { transfer: text.transfer.unwrap_or_else(|| "basic".into()), objects })
    }
}

/// The answer with the actions that `replace` gives in place of those of the upstream. Of an action only `href`, `header`, `expires_in` and `expires_at`
/// change; every other byte of the answer stays. `None`: nothing changes.
///
/// # Errors
/// [`Unparsed`]: the answer is not JSON. Pass it on as it is.
pub fn rewrite(answer: &str, mut replace: impl FnMut(&Object) -> Option<Replacement>) -> Result<Option<String>, Unparsed> {
    let mut edit = Edit::of(answer);
    json::each(answer, OBJECTS, &mut |object| {
        let known = parse_object(object.get()).filter(|object| object.download.is_some());
        if let Some(new) = known.and_then(|object| replace(&object)) {
            // The object has been parsed, so this finds its actions.
            let _ = json::each(object.get(), DOWNLOAD, &mut |action| {
                if let Ok(text) = action_with(action.get(), &new) {
                    edit.replace(range_in(answer, action.get()), &text);
                }
            });
        }
    })?;
    Ok(edit.finish())
}

/// An action with the members of another.
fn action_with(action: &str, new: &Replacement) -> serde_json::Result<String> {
    let mut members: Vec<String> = own_members(new);
    for (name, value) in json::members(action)? {
        if !matches!(name.as_str(), "href" | "header" | "expires_in" | "expires_at") {
            members.push(format!("{}:{}", Value::from(name), value.get()));
        }
    }
    Ok(format!("{{{}}}", members.join(",")))
}

/// The members of an action, as JSON.
fn own_members(action: &Replacement) -> Vec<String> {
    let mut members = vec![format!("\"href\":{}", Value::from(action.href.as_str()))];
    if !action.header.is_empty() {
        let header: Vec<_> =
            action.header.iter().map(|(name, value)| format!("{}:{}", Value::from(name.as_str()), Value::from(value.as_str()))).collect();
        members.push(format!("\"header\":{{{}}}", header.join(",")));
    }
    members.extend(action.expires_in.map(|seconds| format!("\"expires_in\":{seconds}")));
    members
}

/// An answer of castier's own to a batch for downloads: the objects that it has, and those that it has not, with the reason.
pub fn answer(objects: &[(Digest, u64, Replacement)], errors: &[(Digest, u64, ObjectError)]) -> String {
    let found = objects.iter().map(|(oid, size, action)| {
        let action = own_members(action).join(",");
        format!(r#"{{"oid":"{oid}","size":{size},"authenticated":true,"actions":{{"download":{{{action}}}}}}}"#)
    });
    let missing = errors.iter().map(|(oid, size, error)| {
        json!({ "oid": oid.to_string(), "size": size, "error": { "code": error.code, "message": error.message } }).to_string()
    });
    let all: Vec<_> = found.chain(missing).collect();
    format!(r#"{{"transfer":"basic","objects":[{}],"hash_algo":"sha256"}}"#, all.join(","))
}

/// Issues and checks tickets. A ticket proves that the upstream has given its holder an action for one object of one repository. It ends at a set time.
///
/// It is a value of `Authorization`: a client sends the headers of an action as they are, and no credentials beside them.
pub struct Tickets {
    /// Signs. Nodes with the same key take each other's tickets.
    keyed: Hmac<Sha256>,
}

/// What a ticket begins with.
const PREFIX: &str = "castier.";

impl Tickets {
    /// With a key that other nodes have too. Its length is free; take 32 random bytes.
    pub fn new(key: &[u8]) -> Self {
        let mut block = [0; 64];
        block[..32].copy_from_slice(&Sha256::digest(key));
        Self { keyed: Hmac::new(&block.into()) }
    }

    /// With a key of its own: tickets end with the process.
    pub fn random() -> Self {
        Self::new(&rand::random::<[u8; 32]>())
    }

    /// A ticket for an object, as the value of `Authorization`. `expires_at_unix`: in seconds since 1970.
    pub fn issue(&self, repository: &str, oid: &Digest, size: u64, expires_at_unix: u64) -> String {
        let signed = [size.to_be_bytes(), expires_at_unix.to_be_bytes()].concat();
        let mac = self.mac(repository, oid, &signed).finalize().into_bytes();
        format!("Bearer {PREFIX}{}", BASE64URL_NOPAD.encode(&[&signed[..], &mac].concat()))
    }

    /// The size of the object, if the value of `Authorization` is a ticket for it that holds at `now_unix`. Takes the same time for every wrong ticket of
    /// the right form.
    pub fn check(&self, ticket: &str, repository: &str, oid: &Digest, now_unix: u64) -> Option<u64> {
        let (scheme, token) = ticket.split_once(' ')?;
        let text = token.trim_start().strip_prefix(PREFIX).filter(|_| scheme.eq_ignore_ascii_case("bearer"))?;
        let bytes: [u8; 48] = BASE64URL_NOPAD.decode(text.as_bytes()).ok()?.try_into().ok()?;
        let (signed, mac) = bytes.split_at(16);
        self.mac(repository, oid, signed).verify_slice(mac).ok()?;
        let (size, expires_at) = signed.split_at(8);
        (now_unix < u64::from_be_bytes(expires_at.try_into().ok()?)).then_some(u64::from_be_bytes(size.try_into().ok()?))
    }

    fn mac(&self, repository: &str, oid: &Digest, signed: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.keyed.clone();
        // All parts but the last have a fixed length, so no two tickets sign the same bytes.
        mac.update(b"castier lfs ticket 1\0");
        mac.update(oid.as_bytes());
        mac.update(signed);
        mac.update(repository.as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn oid(letter: char) -> Digest {
        Digest::parse(letter.to_string().repeat(64).as_bytes()).unwrap()
    }

    fn with_oids(document: &str) -> String {
        "abcdef".chars().fold(document.to_owned(), |document, letter| document.replace(&format!("<{letter}>"), &oid(letter).to_string()))
    }

    fn replacement(href: &str) -> Replacement {
        Replacement { href: href.into(), header: vec![("Authorization".into(), "Bearer castier.x".into())], expires_in: Some(60) }
    }

    const ANSWER: &str = r#"{ "transfer" : "basic", "x": 1.50, "objects":[
        {"oid":"<a>","size":10,"authenticated":true,"extra":[1 ],"actions":{"verify":{"href":"https://up.example/v"},"download":
            {"href":"https:\/\/store.example/a?sig=1","header":{"X-B":"2","X-A":"1"},"id":"é","expires_at":"2026-09-21T14:13:20Z","expires_in":3600}}},
        {"oid":"<b>","size":20,"actions":{"download":{"href":"https://store.example/b","expires_at":"2026-09-21T16:13:20.5+02:00"}}},
        {"oid":"<c>","size":30,"error":{"code":404,"message":"no"}},
        {"oid":"<d>","size":40},
        {"oid":"sha512","size":50,"actions":{"download":{"href":"https://store.example/e"}}},
        {"oid":"<e>","size":60,"actions":{"download":{"href":"https://store.example/e","expires_at":"0001-01-01T00:00:00Z","header":null}}} ]}"#;

    #[test]
    fn questions() {
        let request = with_oids(
            r#"{"operation":"download","transfers":["lfs-standalone-file","basic","ssh"],"ref":{"name":"refs/heads/main"},
            "objects":[{"oid":"<a>","size":123},{"oid":"<b>","size":0}],"hash_algo":"sha256"}"#,
        );
        let expected = Request {
            operation: "download".into(),
            transfers: ["lfs-standalone-file", "basic", "ssh"].map(str::to_owned).into(),
            objects: vec![(oid('a'), 123), (oid('b'), 0)],
            hash_algo: "sha256".into(),
        };
        assert_eq!(parse_request(request.as_bytes()), Some(expected));
        let least = parse_request(br#"{"operation":"upload","objects":[],"transfers":null}"#).unwrap();
        assert_eq!((least.transfers.len(), least.objects.len(), least.hash_algo.as_str()), (0, 0, "sha256"));
        for wrong in [
            "",
            "[]",
            r#"{"objects":[]}"#,
            r#"{"operation":"download"}"#,
            r#"{"operation":"download","objects":[{"oid":"<a>"}]}"#,
            r#"{"operation":"download","objects":[{"oid":"<a>","size":-1}]}"#,
            r#"{"operation":"download","objects":[{"oid":"a","size":1}]}"#,
            r#"{"operation":"download","objects":[],"hash_algo":"sha512"}"#,
        ] {
            assert_eq!(parse_request(with_oids(wrong).as_bytes()), None, "{wrong}");
        }
        let many =
            |count| format!(r#"{{"operation":"download","objects":[{}]}}"#, vec![with_oids(r#"{"oid":"<a>","size":1}"#); count].join(","));
        assert!(parse_request(many(MOST).as_bytes()).is_some() && parse_request(many(MOST + 1).as_bytes()).is_none());
    }

    #[test]
    fn downloads_and_nothing_else() {
        for (body, only) in [
            (r#"{"operation":"download","objects":[]}"#, true),
            (r#"{"operation":"download","hash_algo":"sha512"}"#, true),
            (r#"{"operation":"upload","objects":[]}"#, false),
            (r#"{"operation":"Download"}"#, false),
            (r#"{"operation":"download","operation":"upload"}"#, false),
            (r#"{"operation":"upload","operation":"download"}"#, false),
            (r#"{"operation":"download","Operation":"upload"}"#, false),
            (r#"{"OPERATION":"upload","operation":"download"}"#, false),
            (r#"{"operation":"download","\u004fperation":"upload"}"#, false),
            (r#"{"operation":"download"} {"operation":"upload"}"#, false),
            (r#"{"objects":[]}"#, false),
            (r#"["download"]"#, false),
            ("", false),
        ] {
            assert_eq!(only_downloads(body.as_bytes()), only, "{body}");
        }
    }

    #[test]
    fn answers_of_upstreams() {
        let batch = Batch::parse(with_oids(ANSWER).as_bytes()).unwrap();
        assert_eq!(batch.transfer, "basic");
        assert_eq!(batch.objects.iter().map(|object| object.size).collect::<Vec<_>>(), [10, 20, 30, 40, 60]);
        let [a, b, c, d, e] = &batch.objects[..] else { panic!("five objects") };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_790_000_000);
        let action = a.download.as_ref().unwrap();
        assert_eq!((a.oid, a.authenticated, action.href.as_str()), (oid('a'), true, "https://store.example/a?sig=1"));
        assert_eq!(action.header, [("X-B".to_owned(), "2".to_owned()), ("X-A".to_owned(), "1".to_owned())]);
        assert_eq!((action.expires_in, action.expires_at), (3600, Some(at)));
        assert_eq!(action.holds_until(at), Some(at + Duration::from_secs(3600)));
        let action = b.download.as_ref().unwrap();
        assert_eq!((b.authenticated, action.holds_until(at)), (false, Some(at + Duration::from_millis(500))));
        assert_eq!((&c.error, &c.download), (&Some(ObjectError { code: 404, message: "no".into() }), &None));
        assert_eq!((&d.error, &d.download), (&None, &None));
        assert_eq!((e.download.as_ref().unwrap().holds_until(at), e.download.as_ref().unwrap().header.len()), (None, 0));
        assert!(!format!("{a:?}").contains("sig=1") && !format!("{a:?}").contains("X-A"), "secrets are not logged");

        let ended = Action { href: String::new(), header: Vec::new(), expires_in: -60, expires_at: None };
        assert_eq!(ended.holds_until(at), Some(at - Duration::from_secs(60)));
        let never = Action { expires_in: i64::MAX, ..ended };
        assert_eq!(never.holds_until(at), at.checked_add(Duration::from_secs(i64::MAX as u64)));
        assert_eq!(Batch::parse(br#"{"objects":[],"transfer":"tus"}"#).unwrap().transfer, "tus");
        for wrong in ["", "[]", "7", r#"{"objects":[],"hash_algo":"sha512"}"#, r#"{"objects":[}"#] {
            assert_eq!(Batch::parse(wrong.as_bytes()), None, "{wrong}");
        }
        let many = format!(r#"{{"objects":[{}]}}"#, vec!["{}"; MOST + 1].join(","));
        assert_eq!(Batch::parse(many.as_bytes()), None);
    }

    #[test]
    fn only_actions_change() {
        let answer = with_oids(ANSWER);
        let mut asked = Vec::new();
        let rewritten = rewrite(&answer, |object| {
            asked.push(object.oid);
            (object.oid != oid('b')).then(|| replacement(&format!("http://castier/{}?\"", object.oid)))
        });
        assert_eq!(asked, [oid('a'), oid('b'), oid('e')], "those that have an action");
        let own = |letter| {
            format!(r#"{{"href":"http://castier/{}?\"","header":{{"Authorization":"Bearer castier.x"}},"expires_in":60"#, oid(letter))
        };
        let a = answer.find(r#"{"href":"https:\/\/store.example/a"#).unwrap();
        let e = answer.rfind(r#"{"href":"https://store.example/e","expires_at""#).unwrap();
        let end = |from: usize| from + answer[from..].find("}}}").unwrap() + 1;
        let expected = [&answer[..a], &own('a'), r#","id":"é"}"#, &answer[end(a)..e], &own('e'), "}", &answer[end(e)..]].concat();
        assert_eq!(rewritten.unwrap().unwrap(), expected);
        assert_eq!(rewrite(&answer, |_| None), Ok(None));
        assert!(rewrite("{\"objects\":[", |_| None).is_err());
        // Of members with one name all change, whichever of them a client reads.
        let twice = with_oids(r#"{"objects":[{"oid":"<a>","size":1,"actions":{"download":{"href":"x","href":"y","x":{}}}}]}"#);
        assert_eq!(rewrite(&twice, |_| Some(replacement("z"))), Ok(None), "an action with two addresses is none");
    }

    #[test]
    fn answers_of_castier() {
        let bare = Replacement { href: "http://castier/b".into(), header: Vec::new(), expires_in: None };
        let missing = ObjectError { code: 404, message: "not \"kept\"".into() };
        let text = answer(&[(oid('a'), 10, replacement("http://castier/a")), (oid('b'), 0, bare)], &[(oid('c'), 30, missing.clone())]);
        let expected = with_oids(
            r#"{"transfer":"basic","objects":[{"oid":"<a>","size":10,"authenticated":true,"actions":{"download":{"href":"http://castier/a","header":{"Authorization":"Bearer castier.x"},"expires_in":60}}},{"oid":"<b>","size":0,"authenticated":true,"actions":{"download":{"href":"http://castier/b"}}},{"#,
        );
        assert!(text.starts_with(&expected), "{text}");
        let batch = Batch::parse(text.as_bytes()).unwrap();
        assert_eq!(batch.objects.len(), 3);
        assert_eq!(batch.objects[2], Object { oid: oid('c'), size: 30, authenticated: false, error: Some(missing), download: None });
        assert_eq!(answer(&[], &[]), r#"{"transfer":"basic","objects":[],"hash_algo":"sha256"}"#);
    }

    #[test]
    fn tickets() {
        let tickets = Tickets::new(b"key");
        let ticket = tickets.issue("team/project", &oid('a'), 42, 1000);
        assert!(ticket.starts_with("Bearer castier.") && ticket.len() == 15 + 64, "{ticket}");
        assert_eq!(tickets.check(&ticket, "team/project", &oid('a'), 999), Some(42));
        assert_eq!(tickets.check(&ticket.replace("Bearer ", "bearer  "), "team/project", &oid('a'), 0), Some(42));
        assert_eq!(Tickets::new(b"key").check(&ticket, "team/project", &oid('a'), 999), Some(42), "nodes with one key");
        for (checks, repository, object, now) in [
            (&tickets, "team/project", 'a', 1000),
            (&tickets, "team/project", 'b', 999),
            (&tickets, "team/projec", 'a', 999),
            (&tickets, "", 'a', 999),
            (&Tickets::new(b"other"), "team/project", 'a', 999),
            (&Tickets::random(), "team/project", 'a', 999),
        ] {
            assert_eq!(checks.check(&ticket, repository, &oid(object), now), None, "{repository} {object} {now}");
        }
        let token = ticket.strip_prefix("Bearer castier.").unwrap();
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer castier.",
            token,
            &format!("Basic castier.{token}"),
            &format!("Bearer {token}"),
            &format!("Bearer castier.{token}="),
            &format!("Bearer castier.{token} "),
            &ticket[..ticket.len() - 1],
        ] {
            assert_eq!(tickets.check(wrong, "team/project", &oid('a'), 999), None, "{wrong}");
        }
        // Each bit of it counts.
        let bytes = BASE64URL_NOPAD.decode(token.as_bytes()).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            let changed = format!("Bearer castier.{}", BASE64URL_NOPAD.encode(&changed));
            assert_eq!(tickets.check(&changed, "team/project", &oid('a'), 0), None, "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(
            text in r#"(\{|\}|\[|\]|:|,|"objects"|"oid"|"size"|"actions"|"download"|"href"|"header"|"expires_in"|null|7|-1|"é"){0,30}"#,
            ticket in "(Bearer )?(castier\\.)?[A-Za-z0-9_.= é-]{0,70}",
        ) {
            parse_request(text.as_bytes());
            Batch::parse(text.as_bytes());
            let _ = rewrite(&text, |_| Some(replacement("x")));
            prop_assert_eq!(Tickets::new(b"key").check(&ticket, "a", &Digest::EMPTY, 0), None);
        }

        #[test]
        fn a_rewritten_answer_differs_in_nothing_else(href in "[ -~é]{0,20}", header in "[ -~é]{0,20}", size: u64, expires_in in any::<i64>(), pretty: bool) {
            let document = json!({ "z": [1, { "objects": 2 }], "objects": [7, { "size": size, "oid": Digest::EMPTY.to_string(), "actions": {
                "upload": { "href": href }, "download": { "expires_in": expires_in, "href": "x", "header": { header.clone(): header } } } }] });
            let text = if pretty { serde_json::to_string_pretty(&document).unwrap() } else { document.to_string() };
            let new = Replacement { href: href.clone(), header: vec![(header.clone(), href.clone())], expires_in: None };
            let rewritten = rewrite(&text, |object| (object.size == size).then(|| new.clone())).unwrap().unwrap();
            let mut expected = document;
            expected["objects"][1]["actions"]["download"] = json!({ "href": href, "header": { header.clone(): href } });
            prop_assert_eq!(serde_json::from_str::<Value>(&rewritten).unwrap(), expected);
        }

        #[test]
        fn tickets_are_for_what_they_were_issued_for(repository in "[a-z/]{0,20}", size: u64, expires: u64, now: u64) {
            let tickets = Tickets::new(b"key");
            let ticket = tickets.issue(&repository, &oid('a'), size, expires);
            prop_assert_eq!(tickets.check(&ticket, &repository, &oid('a'), now), (now < expires).then_some(size));
        }
    }
}
