//! The tests' own implementation of the proofs between nodes.

use super::wire::Head;
use castier_cluster::{ASKED, Asked, PROOF, Secrets, Twice};
use castier_config::Cluster;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use std::fs;

/// The secrets of a node with this text in its file.
pub(crate) fn secrets(text: &str) -> Secrets {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Secrets::open(&Cluster { secret_file: file.path().to_owned(), ..Cluster::default() }).unwrap()
}

/// The header line that proves a request with these headers.
pub(crate) fn line(secret: &str, method: &str, target: &str, headers: &[(String, String)]) -> String {
    let (proof, _) = secrets(secret).ask(method, target.split('?').next().unwrap(), &map(headers));
    format!("{PROOF}: {}\r\n", proof.unwrap().to_str().unwrap())
}

/// Checks the proof of a request. Returns the state to prove the answer with; `None` if the proof is not valid.
pub(crate) fn admitted(secrets: &Secrets, head: &Head) -> Option<Asked> {
    let mut words = head.first.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let fields = ASKED.map(|name| {
        let mut values = head.headers.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_bytes());
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(Twice),
        }
    });
    secrets.admit(head.header(PROOF.as_str()).map(str::as_bytes), method, target, fields)
}

/// Adds the proof to the head of an answer. Returns the answer and the proof.
pub(crate) fn proved(asked: &Asked, answer: &str) -> (String, String) {
    let (first, rest) = answer.split_once("\r\n").unwrap();
    let status: u16 = first.split(' ').nth(1).unwrap().parse().unwrap();
    let lines = rest.split("\r\n\r\n").next().unwrap().lines();
    let lines: Vec<_> =
        lines.filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect();
    let proof = asked.prove(StatusCode::from_u16(status).unwrap(), &map(&lines)).unwrap().to_str().unwrap().to_owned();
    (format!("{first}\r\n{PROOF}: {proof}\r\n{rest}"), proof)
}

fn map(headers: &[(String, String)]) -> HeaderMap {
    let one = |(name, value): &(String, String)| Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?));
    let mut map = HeaderMap::new();
    headers.iter().filter_map(one).for_each(|(name, value)| {
        map.append(name, value);
    });
    map
}
