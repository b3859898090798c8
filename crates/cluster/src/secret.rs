//! Proves between nodes that both know the cluster's secret, without sending the secret.
//!
//! 1. The requester creates a nonce of 16 random bytes. It computes an HMAC-SHA256, with the secret as key, over the nonce, the method, the
//!    path and the fields in [`ASKED`]. It sends the nonce and the HMAC in the field [`PROOF`].
//! 2. The receiver computes the same HMAC. If none of its secrets matches, it answers 403.
//! 3. The receiver answers with an HMAC, by the same secret, over the request's HMAC, the status and the fields in [`ANSWERED`].
//! 4. The requester computes that HMAC. If it does not match, it discards the answer, and counts a failure of the peer.
//!
//! - The request's HMAC covers the nonce and everything that was requested. So an answer is valid for one request only, and a recorded
//!   answer is valid for none.
//! - No clock is needed. A recorded request can be sent again; SECURITY.md says what an attacker gains by that.
//! - The length precedes each field, so that two different lists of fields never give the same bytes. A field that occurs twice is refused.
//! - The first bytes differ between requests and answers, so that one HMAC is never valid as the other.
//!
//! The file has one secret, or two during a change. The first one proves requests. Both are accepted. An answer is proved with the secret of
//! its request. To change the secret without interruption, add the new one as the second on every node; then swap them on every node; then
//! remove the old one. Send SIGHUP after each step.

use arc_swap::ArcSwap;
use castier_config::{Cluster, peer_secrets};
use data_encoding::HEXLOWER;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use sha2::Sha256;
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// The header with the proof: `v1 `, then in hexadecimal the nonce and the HMAC (request) or the HMAC (answer).
pub const PROOF: HeaderName = HeaderName::from_static("castier-proof");

/// The fields of a request that change its meaning.
pub const ASKED: [&str; 7] = ["host", "content-length", "transfer-encoding", "range", "cache-control", "expect", "castier-route"];
/// The fields of an answer that the requester uses. The body is not covered: its digest proves it.
const ANSWERED: [&str; 8] =
    ["content-length", "content-range", "content-type", "content-encoding", "etag", "cache-status", "castier-flight", "castier-node"];

const VERSION: &str = "v1 ";
const REQUEST: &[u8] = b"castier request v1\n";
const ANSWER: &[u8] = b"castier answer v1\n";
const NONCE: usize = 16;
const MAC: usize = 32;

type Key = Hmac<Sha256>;

/// The secrets in force.
pub struct Secrets {
    /// `None` if there is no secret. Then the config guarantees that only this machine can reach the peer listener.
    file: Option<PathBuf>,
    /// The first one proves requests. HMACs whose key is already set up, so that a proof does not pay for it.
    current: ArcSwap<Vec<Key>>,
}

/// A proved request: its answer needs a proof too. `None` if there is no secret, or if the request needs no proof.
pub struct Asked(Option<Box<ProofState>>);

struct ProofState {
    key: Key,
    mac: [u8; MAC],
}

impl Secrets {
    /// Reads `cluster.secret_file`, if it is set.
    ///
    /// # Errors
    /// A text that says what is wrong with the file.
    pub fn open(config: &Cluster) -> Result<Self, String> {
        let file = (!config.secret_file.as_os_str().is_empty()).then(|| config.secret_file.clone());
        let current = file.as_deref().map(read).transpose()?.unwrap_or_default();
        Ok(Self { file, current: ArcSwap::from_pointee(current) })
    }

    /// Reads the file again. If that fails, the current secrets stay.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn reload(&self) -> Result<(), String> {
        if let Some(file) = &self.file {
            self.current.store(read(file)?.into());
        }
        Ok(())
    }

    /// Whether there is a secret.
    pub const fn is_there(&self) -> bool {
        self.file.is_some()
    }

    /// Proves a request. Returns the value of [`PROOF`] (`None` without a secret), and the state to check the answer with.
    pub fn ask(&self, method: &str, path: &str, headers: &HeaderMap) -> (Option<HeaderValue>, Asked) {
        let current = self.current.load();
        let Some(key) = current.first() else { return (None, Asked(None)) };
        let nonce: [u8; NONCE] = rand::random();
        let mac: [u8; MAC] = request(key, &nonce, method, path, ASKED.map(|name| one(headers, name))).finalize().into_bytes().into();
        let value = text(&[nonce.as_slice(), mac.as_slice()].concat());
        (value, Asked(Some(Box::new(ProofState { key: key.clone(), mac }))))
    }

    /// A key for another use, which all nodes with the same secret derive alike. `None` without a secret.
    pub fn derive(&self, purpose: &str) -> Option<[u8; 32]> {
        let mut mac = self.current.load().first()?.clone();
        mac.update(b"castier key v1\n");
        mac.update(purpose.as_bytes());
        Some(mac.finalize().into_bytes().into())
    }

    /// Checks the proof of a request. Returns `None` if it is not valid; else the state to prove the answer with. `fields` are the values of
    /// [`ASKED`].
    pub fn admit(&self, proof: Option<&[u8]>, method: &str, path: &str, fields: [Field<'_>; ASKED.len()]) -> Option<Asked> {
        let current = self.current.load();
        if current.is_empty() {
            return Some(Asked(None));
        }
        let mut bytes = [0; NONCE + MAC];
        decode(proof?, &mut bytes)?;
        if fields.contains(&Err(Twice)) {
            return None;
        }
        let (nonce, mac) = bytes.split_at(NONCE);
        let fits = |key: &&Key| request(key, nonce, method, path, fields).verify_slice(mac).is_ok();
        let key = current.iter().find(fits)?.clone();
        Some(Asked(Some(Box::new(ProofState { key, mac: mac.try_into().ok()? }))))
    }
}

impl Asked {
    /// A request that needs no proof.
    pub const OPEN: Self = Self(None);

    /// The value of [`PROOF`] for an answer with this status and these headers; `None` without a secret.
    pub fn prove(&self, status: StatusCode, headers: &HeaderMap) -> Option<HeaderValue> {
        let mac = self.0.as_ref()?.answer(status, headers).finalize().into_bytes();
        text(&mac)
    }

    /// Whether a node that knows the secret made this answer to this request. Always true without a secret.
    pub fn is_answered(&self, status: StatusCode, headers: &HeaderMap) -> bool {
        let Some(fresh) = &self.0 else { return true };
        if ANSWERED.iter().any(|name| one(headers, name).is_err()) {
            return false;
        }
        let mut mac = [0; MAC];
        let proof = one(headers, PROOF.as_str()).ok().flatten().and_then(|proof| decode(proof, &mut mac));
        proof.is_some() && fresh.answer(status, headers).verify_slice(&mac).is_ok()
    }
}

impl ProofState {
    fn answer(&self, status: StatusCode, headers: &HeaderMap) -> Key {
        let mut mac = self.key.clone();
        mac.update(ANSWER);
        mac.update(&self.mac);
        mac.update(&status.as_u16().to_be_bytes());
        ANSWERED.iter().for_each(|name| field(&mut mac, one(headers, name)));
        mac
    }
}

/// A field's value; `None` if the field is absent; an error if it occurs twice.
pub type Field<'a> = Result<Option<&'a [u8]>, Twice>;

/// A field that may occur once occurs twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Twice;

fn request(key: &Key, nonce: &[u8], method: &str, path: &str, fields: [Field<'_>; ASKED.len()]) -> Key {
    let mut mac = key.clone();
    mac.update(REQUEST);
    mac.update(nonce);
    field(&mut mac, Ok(Some(method.as_bytes())));
    field(&mut mac, Ok(Some(path.as_bytes())));
    fields.into_iter().for_each(|value| field(&mut mac, value));
    mac
}

/// Adds a field to the HMAC. Absent and empty give different bytes. Both sides refuse a field that occurs twice.
fn field(mac: &mut Key, value: Field<'_>) {
    match value {
        Ok(Some(value)) => {
            mac.update(&[1]);
            mac.update(&(value.len() as u64).to_be_bytes());
            mac.update(value);
        }
        Ok(None) => mac.update(&[0]),
        Err(Twice) => mac.update(&[2]),
    }
}

fn one<'a>(headers: &'a HeaderMap, name: &str) -> Field<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (value, None) => Ok(value.map(|value| value.as_bytes().trim_ascii())),
        _ => Err(Twice),
    }
}

fn text(bytes: &[u8]) -> Option<HeaderValue> {
    HeaderValue::try_from(format!("{VERSION}{}", HEXLOWER.encode(bytes))).ok()
}

fn decode(proof: &[u8], bytes: &mut [u8]) -> Option<()> {
    let hex = proof.strip_prefix(VERSION.as_bytes())?;
    if HEXLOWER.decode_len(hex.len()).ok()? != bytes.len() {
        return None;
    }
    HEXLOWER.decode_mut(hex, bytes).ok().map(drop)
}

fn read(file: &Path) -> Result<Vec<Key>, String> {
    let secrets = peer_secrets(file).map_err(|why| format!("cluster.secret_file: {why}"))?;
    // Only a warning: Kubernetes mounts secrets with this mode.
    if std::fs::metadata(file).is_ok_and(|file| file.permissions().mode() & 0o004 != 0) {
        tracing::warn!(file = %file.display(), "every user of this machine can read cluster.secret_file; remove that right (chmod o-r)");
    }
    let key = |secret: &Zeroizing<String>| Key::new_from_slice(secret.as_bytes()).map_err(|error| format!("cluster.secret_file: {error}"));
    secrets.iter().map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "old-old-old-old-old";
    const NEW: &str = "new-new-new-new-new";

    fn secrets(text: &str) -> Secrets {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Secrets::open(&Cluster { secret_file: file.path().to_owned(), ..Cluster::default() }).unwrap()
    }

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(HeaderName::try_from(*name).unwrap(), value.parse().unwrap());
        }
        headers
    }

    /// Proves a request with `from` and checks it with `by`. Returns both states if `by` accepts it.
    fn admitted(from: &Secrets, by: &Secrets) -> Option<(Asked, Asked)> {
        let head = headers(&[("host", "a:1"), ("range", "bytes=5-")]);
        let (proof, asked) = from.ask("GET", "/cas/x", &head);
        let fields = ASKED.map(|name| one(&head, name));
        Some((asked, by.admit(proof.as_ref().map(HeaderValue::as_bytes), "GET", "/cas/x", fields)?))
    }

    #[test]
    fn secrets_rotate_without_an_interruption() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, OLD).unwrap();
        let node = Secrets::open(&Cluster { secret_file: file.clone(), ..Cluster::default() }).unwrap();
        let others = [secrets(OLD), secrets(NEW), secrets(&format!("{OLD}\n{NEW}")), secrets(&format!("{NEW}\n{OLD}"))];
        // For each other node: whether `node` admits its requests, and whether it admits those of `node`.
        let state = |node: &Secrets| [0, 1, 2, 3].map(|i| (admitted(&others[i], node).is_some(), admitted(node, &others[i]).is_some()));
        let (both, in_, out, none) = ((true, true), (true, false), (false, true), (false, false));
        assert_eq!(state(&node), [both, none, both, out]);
        for (text, expected) in [
            (format!("{OLD}\n{NEW}\n"), [both, in_, both, both]),
            (format!("{NEW}\n{OLD}\n"), [in_, both, both, both]),
            (format!("{NEW}\n"), [none, both, out, both]),
        ] {
            std::fs::write(&file, text).unwrap();
            node.reload().unwrap();
            assert_eq!(state(&node), expected);
        }
        for broken in ["", "short", "a b c d e f g h i j k l"] {
            std::fs::write(&file, broken).unwrap();
            let why = node.reload().unwrap_err();
            assert!(why.starts_with("cluster.secret_file: ") && !why.contains("short"), "{why}");
            assert_eq!(state(&node), [none, both, out, both], "the current secrets stay");
        }
    }

    #[test]
    fn an_answer_is_proved_with_the_secret_of_its_request() {
        let answer = headers(&[("content-length", "5")]);
        for (from, by) in [(OLD.to_owned(), format!("{NEW}\n{OLD}")), (NEW.to_owned(), format!("{OLD}\n{NEW}"))] {
            let (asked, admitted) = admitted(&secrets(&from), &secrets(&by)).unwrap();
            let mut answer = answer.clone();
            answer.insert(PROOF, admitted.prove(StatusCode::OK, &answer).unwrap());
            assert!(asked.is_answered(StatusCode::OK, &answer));
        }
    }

    #[test]
    fn a_changed_request_does_not_match_its_proof() {
        let node = secrets(OLD);
        let head = headers(&[("host", "a:1"), ("content-length", "5")]);
        let (proof, _) = node.ask("PUT", "/cas/x", &head);
        let proof = proof.unwrap();
        let proof = proof.to_str().unwrap();
        let fits = |proof: &str, method: &str, path: &str, lines: &[(&str, &str)]| {
            let head = headers(lines);
            node.admit(Some(proof.as_bytes()), method, path, ASKED.map(|name| one(&head, name))).is_some()
        };
        let as_it_was: &[_] = &[("host", "a:1"), ("content-length", "5")];
        assert!(fits(proof, "PUT", "/cas/x", as_it_was));
        assert!(fits(proof, "PUT", "/cas/x", &[("content-length", " 5 "), ("user-agent", "x"), ("host", "a:1")]), "the rest may differ");
        assert!(
            !fits(proof, "GET", "/cas/x", as_it_was) && !fits(proof, "PUT", "/cas/y", as_it_was) && !fits(proof, "PUT", "/cas/", as_it_was)
        );
        for other in [
            &[("host", "a:2"), ("content-length", "5")][..],
            &[("host", "a:1"), ("content-length", "6")],
            &[("host", "a:1")],
            &[("host", "a:1"), ("content-length", "5"), ("content-length", "5")],
            &[("host", "a:1"), ("content-length", "5"), ("cache-control", "only-if-cached")],
            &[("host", "a:1"), ("content-length", "5"), ("range", "")],
            &[("host", "a:1"), ("transfer-encoding", "5")],
            &[("host", "a:15"), ("content-length", "")],
        ] {
            assert!(!fits(proof, "PUT", "/cas/x", other), "{other:?}");
        }
        let mut flipped = proof.to_owned();
        let last = flipped.pop().unwrap();
        flipped.push(if last == '0' { '1' } else { '0' });
        for wrong in ["", "v1 ", &flipped, &proof[..proof.len() - 2], &proof[3..], &proof.replace("v1", "v2"), &proof.to_uppercase(), OLD] {
            assert!(!fits(wrong, "PUT", "/cas/x", as_it_was), "{wrong:?}");
        }
        assert!(node.admit(None, "PUT", "/cas/x", [Ok(None); ASKED.len()]).is_none());
        assert!(!proof.contains("old"));
    }

    #[test]
    fn an_answer_is_valid_for_one_request_and_unchanged() {
        let node = secrets(OLD);
        let (asked, admitted_) = admitted(&node, &node).unwrap();
        let proved = |lines: &[(&str, &str)]| {
            let mut answer = headers(lines);
            answer.insert(PROOF, admitted_.prove(StatusCode::OK, &answer).unwrap());
            answer
        };
        let lines: &[_] = &[("content-length", "5"), ("etag", "\"x\"")];
        let answer = proved(lines);
        assert!(asked.is_answered(StatusCode::OK, &answer));
        assert!(!asked.is_answered(StatusCode::CREATED, &answer));
        for (name, value) in
            [("content-length", "6"), ("content-range", "bytes 0-4/5"), ("castier-flight", "filling"), ("castier-node", "x")]
        {
            let mut other = answer.clone();
            other.insert(HeaderName::try_from(name).unwrap(), value.parse().unwrap());
            assert!(!asked.is_answered(StatusCode::OK, &other), "{name}");
        }
        let mut twice = answer.clone();
        twice.append(http::header::CONTENT_LENGTH, "5".parse().unwrap());
        assert!(!asked.is_answered(StatusCode::OK, &twice));
        let mut none = answer.clone();
        none.remove(PROOF);
        assert!(!asked.is_answered(StatusCode::OK, &none));
        // The same request, sent again.
        let (again, _) = admitted(&node, &node).unwrap();
        assert!(!again.is_answered(StatusCode::OK, &answer));
        // A request's proof is not valid for an answer.
        let (proof, own) = node.ask("GET", "/cas/x", &headers(&[]));
        let mut echoed = headers(lines);
        let proof = proof.unwrap().to_str().unwrap().to_owned();
        for reflected in [proof.clone(), format!("v1 {}", &proof[3 + 32..])] {
            echoed.insert(PROOF, reflected.parse().unwrap());
            assert!(!own.is_answered(StatusCode::OK, &echoed));
        }
    }

    #[test]
    fn without_a_secret_everyone_is_admitted_and_nothing_is_proved() {
        let secrets = Secrets::open(&Cluster::default()).unwrap();
        secrets.reload().unwrap();
        let (proof, asked) = secrets.ask("GET", "/", &HeaderMap::new());
        assert!(proof.is_none() && !secrets.is_there() && asked.is_answered(StatusCode::OK, &HeaderMap::new()));
        let admitted = secrets.admit(Some(b"x"), "GET", "/", [Ok(None); ASKED.len()]).unwrap();
        assert!(admitted.prove(StatusCode::OK, &HeaderMap::new()).is_none());
    }
}
