//! Object stores as the origin: their URLs, the layout of their keys, and how castier logs in.

use crate::{
    Malformed, Problems, Span,
    file::read_secret,
    value::{as_text, path_text},
};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};
use url::Url;
use zeroize::Zeroizing;

/// The service that an object store speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Amazon S3, and the many stores that speak its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage.
    Az,
}

impl Service {
    const ALL: [(&'static str, Self); 3] = [("s3", Self::S3), ("gs", Self::Gs), ("az", Self::Az)];

    /// The scheme of its URLs.
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gs => "gs",
            Self::Az => "az",
        }
    }
}

/// A bucket, or a part of one: `s3://BUCKET[/PREFIX]`, `gs://…` or `az://CONTAINER[/PREFIX]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// The service.
    pub service: Service,
    /// The name of the bucket or container.
    pub name: String,
    /// What all keys begin with, without slashes at its ends. Empty: nothing.
    pub prefix: String,
}

impl Bucket {
    /// `None` if the URL is one of another kind.
    pub(crate) fn of(url: &Url) -> Option<Result<Self, &'static str>> {
        let (_, service) = Service::ALL.into_iter().find(|(scheme, _)| *scheme == url.scheme())?;
        Some(Self::read(service, url))
    }

    fn read(service: Service, url: &Url) -> Result<Self, &'static str> {
        let name = url.host_str().filter(|name| !name.is_empty()).ok_or("names no bucket")?;
        if !url.username().is_empty() || url.password().is_some() || url.port().is_some() {
            return Err("has a user, a password or a port; write the credentials and the endpoint into [origin.s3]");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("has a query or fragment");
        }
        let prefix = url.path().trim_matches('/');
        let is_plain = |part: &str| {
            !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) && part != "." && part != ".."
        };
        if !prefix.is_empty() && !prefix.split('/').all(is_plain) {
            return Err("has a prefix with characters other than letters, digits, - _ . and /");
        }
        Ok(Self { service, name: name.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.service.scheme(), self.name)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

/// How the key of a blob is made of its SHA-256: text with the variables `{sha256}`, `{sha256:N}` (the first N characters) and `{sha256:A:B}`
/// (those from A on, and before B).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyTemplate {
    text: String,
    parts: Vec<KeyPart>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum KeyPart {
    Text(String),
    /// The characters from the first number on, and before the second, of the digest in hexadecimal.
    Digest(usize, usize),
}

/// The characters of a SHA-256 in hexadecimal.
const DIGEST: usize = 64;

impl KeyTemplate {
    /// The key of a blob. `digest`: 64 lowercase hexadecimal characters.
    pub fn key(&self, digest: &str) -> String {
        let part = |part: &KeyPart| match part {
            KeyPart::Text(text) => text.clone(),
            KeyPart::Digest(from, to) => digest.get(*from..*to).unwrap_or_default().to_owned(),
        };
        self.parts.iter().map(part).collect()
    }

    /// What all keys begin with.
    pub fn literal_prefix(&self) -> &str {
        match self.parts.first() {
            Some(KeyPart::Text(text)) => text,
            _ => "",
        }
    }

    /// The digest of the blob whose key this is; `None` if it is the key of no blob.
    pub fn digest<'k>(&self, key: &'k str) -> Option<String> {
        let mut digest: [Option<char>; DIGEST] = [None; DIGEST];
        let mut rest: &'k str = key;
        for part in &self.parts {
            match part {
                KeyPart::Text(text) => rest = rest.strip_prefix(text.as_str())?,
                KeyPart::Digest(from, to) => {
                    let here = rest.get(..to - from)?;
                    for (place, c) in digest[*from..*to].iter_mut().zip(here.chars()) {
                        if !matches!(c, '0'..='9' | 'a'..='f') || place.is_some_and(|known| known != c) {
                            return None;
                        }
                        *place = Some(c);
                    }
                    rest = &rest[to - from..];
                }
            }
        }
        if rest.is_empty() { digest.into_iter().collect() } else { None }
    }
}

impl Default for KeyTemplate {
    fn default() -> Self {
        let parts = vec![KeyPart::Text("cas/".into()), KeyPart::Digest(0, 2), KeyPart::Text("/".into()), KeyPart::Digest(0, DIGEST)];
        Self { text: "cas/{sha256:2}/{sha256}".into(), parts }
    }
}

impl fmt::Display for KeyTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for KeyTemplate {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bad = |why: &str| Malformed::new(format!("{text:?} {why}; write a layout such as \"cas/{{sha256:2}}/{{sha256}}\""));
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (plain, variable) = rest.split_once('{').map_or((rest, None), |(plain, more)| (plain, Some(more)));
            if !plain.is_empty() {
                if !plain.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./".contains(&b)) {
                    return Err(bad("has characters other than letters, digits, - _ . and /"));
                }
                parts.push(KeyPart::Text(plain.to_owned()));
            }
            let Some(variable) = variable else { break };
            let (name, more) = variable.split_once('}').ok_or_else(|| bad("has a { without a }"))?;
            rest = more;
            let mut fields = name.split(':');
            let number = |field: Option<&str>| field.map(str::parse::<usize>).transpose();
            let is_digest = fields.next() == Some("sha256");
            let range = match (number(fields.next()), number(fields.next()), fields.next()) {
                (Ok(None), _, _) => Some((0, DIGEST)),
                (Ok(Some(to)), Ok(None), None) => Some((0, to)),
                (Ok(Some(from)), Ok(Some(to)), None) => Some((from, to)),
                _ => None,
            };
            match range.filter(|(from, to)| is_digest && from < to && *to <= DIGEST) {
                Some((from, to)) => parts.push(KeyPart::Digest(from, to)),
                None => {
                    return Err(bad(&format!("has the variable {{{name}}}, which is none of {{sha256}}, {{sha256:N}} and {{sha256:A:B}}")));
                }
            }
        }
        let covered =
            (0..DIGEST).all(|at| parts.iter().any(|part| matches!(part, KeyPart::Digest(from, to) if (*from..*to).contains(&at))));
        if !covered {
            return Err(bad("does not have the whole digest, so that two blobs would have one key"));
        }
        if text.starts_with('/') || text.ends_with('/') || text.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(bad("begins or ends with /, or has an empty part, . or .."));
        }
        if ["ac/", "kv/"].iter().any(|own| text.starts_with(own)) {
            return Err(bad("begins with ac/ or kv/, where entries are"));
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

as_text!(KeyTemplate);

/// How castier reaches an S3 store. What is empty here comes from the usual variables (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, …), then from a profile in `~/.aws`. If there are no keys, castier takes those of a web identity
/// (`AWS_WEB_IDENTITY_TOKEN_FILE` and `AWS_ROLE_ARN`), of the container or of the machine, and renews them before they end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct S3 {
    /// The store's address, such as `http://127.0.0.1:8333`. Empty: `AWS_ENDPOINT_URL`, else Amazon's for the region.
    ///
    /// The default is for Amazon S3.
    ///
    /// - Type: URL
    pub endpoint: String,
    /// The region. Empty: `AWS_REGION`, else `us-east-1`.
    ///
    /// Stores of your own often take any region.
    pub region: String,
    /// The id of the access key. Empty: `AWS_ACCESS_KEY_ID`.
    ///
    /// The default keeps credentials out of this file.
    pub access_key_id: String,
    /// A file with the secret of that key, in one line. Empty: `AWS_SECRET_ACCESS_KEY`.
    ///
    /// It is a file, so that anybody may read this configuration.
    #[serde(serialize_with = "path_text")]
    pub secret_access_key_file: PathBuf,
    /// The profile in `~/.aws/credentials` and `~/.aws/config` to log in with. Empty: `AWS_PROFILE`, else `default` if there is one.
    ///
    /// If it is set, its keys go before those of the environment. `AWS_SHARED_CREDENTIALS_FILE` and `AWS_CONFIG_FILE` name other files. castier
    /// reads the keys again every minute, and when the store refuses them. The default is that of the AWS tools.
    pub profile: String,
    /// Whether the bucket's name is in the path of URLs (`true`), or in the host name.
    ///
    /// Stores of your own need it in the path. Amazon takes both for most buckets.
    pub path_style: bool,
    /// At the start castier aborts uploads to keys of blobs that were begun longer ago than this and have not ended. 0s: never.
    ///
    /// A castier that is killed in the middle of an upload of over 16 MiB leaves such a one behind. Its parts take space and are not listed as
    /// objects. The default is longer than any upload should take. Uploads of other programs to other keys stay.
    pub abort_leftovers_after: Span,
}

impl Default for S3 {
    fn default() -> Self {
        Self {
            endpoint: String::new(),
            region: String::new(),
            access_key_id: String::new(),
            secret_access_key_file: PathBuf::new(),
            profile: String::new(),
            path_style: true,
            abort_leftovers_after: Span::secs(24 * 3600),
        }
    }
}

impl S3 {
    /// The secret in `secret_access_key_file`; `None` if it names no file.
    ///
    /// # Errors
    /// The file cannot be read, or has not one line.
    pub fn secret(&self) -> Result<Option<Zeroizing<String>>, String> {
        let file: &Path = &self.secret_access_key_file;
        if file.as_os_str().is_empty() {
            return Ok(None);
        }
        let shown = file.display();
        let text =
            read_secret(file).map_err(|error| format!("{shown} cannot be read as text ({error}); name a file that this user may read"))?;
        let secret = text.trim();
        if secret.is_empty() || secret.contains(['\n', '\r']) {
            return Err(format!("{shown} does not have one line; write the secret key into it, and nothing else"));
        }
        Ok(Some(Zeroizing::new(secret.to_owned())))
    }

    /// `section`: `origin.s3` or `store.s3`.
    pub(crate) fn check(&self, section: &str, problems: &mut Problems) {
        let key = |key: &str| format!("{section}.{key}");
        if !self.endpoint.is_empty() {
            let url = Url::parse(&self.endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
            if url.is_none_or(|url| {
                url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() || url.password().is_some()
            }) {
                problems.add(key("endpoint"), format!("{:?} is no address; write http://HOST:PORT or https://HOST", self.endpoint));
            }
        }
        if self.access_key_id.is_empty() != self.secret_access_key_file.as_os_str().is_empty() {
            problems.add(key("access_key_id"), format!("and {section}.secret_access_key_file belong together; set both or none"));
        }
        if !self.access_key_id.is_empty() && !self.profile.is_empty() {
            problems.add(key("profile"), format!("and {section}.access_key_id are two ways to log in; set one of them"));
        }
        if problems.ask_machine()
            && let Err(why) = self.secret()
        {
            problems.add(key("secret_access_key_file"), why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OF_NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn layouts_of_others() {
        for (template, key) in [
            ("cas/{sha256:2}/{sha256}", format!("cas/e3/{OF_NOTHING}")),
            ("{sha256}", OF_NOTHING.to_owned()),
            ("docker/registry/v2/blobs/sha256/{sha256:2}/{sha256}/data", format!("docker/registry/v2/blobs/sha256/e3/{OF_NOTHING}/data")),
            ("lfs/{sha256:2}/{sha256:2:4}/{sha256:4:64}", format!("lfs/e3/b0/{}", &OF_NOTHING[4..])),
        ] {
            let template: KeyTemplate = template.parse().unwrap();
            assert_eq!(template.key(OF_NOTHING), key);
            assert_eq!(template.digest(&key).as_deref(), Some(OF_NOTHING), "{key}");
            assert!(key.starts_with(template.literal_prefix()));
            for other in [key.replace("e3", "00"), format!("{key}x"), format!("x{key}"), key.to_uppercase(), String::new()] {
                assert_ne!(template.digest(&other).as_deref(), Some(OF_NOTHING), "{other}");
            }
        }
        assert_eq!(KeyTemplate::default(), "cas/{sha256:2}/{sha256}".parse().unwrap());
        assert_eq!(KeyTemplate::default().digest(&format!("cas/e4/{OF_NOTHING}")), None, "the parts contradict each other");
    }

    #[test]
    fn templates_that_are_none() {
        for text in [
            "",
            "cas",
            "{sha256:63}",
            "{sha256:0:32}/{sha256:33:64}",
            "{sha256:65}",
            "{sha256:4:4}{sha256}",
            "{sha1}",
            "{sha256",
            "a b/{sha256}",
            "/{sha256}",
            "{sha256}/",
            "a//{sha256}",
            "../{sha256}",
            "ac/{sha256}",
            "kv/{sha256}",
            "{sha256:1:2:3}{sha256}",
        ] {
            let error = text.parse::<KeyTemplate>().unwrap_err().to_string();
            assert!(error.contains("such as \"cas/"), "{text}: {error}");
        }
    }

    #[test]
    fn urls_of_buckets() {
        let bucket = |text: &str| Bucket::of(&Url::parse(text).unwrap());
        for text in ["s3://blobs", "gs://blobs/a/b", "az://container/x"] {
            assert_eq!(bucket(text).unwrap().unwrap().to_string(), text);
        }
        assert_eq!(bucket("s3://blobs/a/").unwrap().unwrap().prefix, "a");
        assert_eq!(bucket("http://blobs"), None);
        for text in ["s3://", "s3://u:p@b", "s3://b:9000", "s3://b/a b", "s3://b/a?x", "s3://b//a//b"] {
            assert!(bucket(text).unwrap().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_template_panics(text in "[a-z/.{}:0-9]{0,40}|(\\{sha256(:[0-9]{1,3}){0,3}\\}|/|x){0,6}") {
            if let Ok(template) = text.parse::<KeyTemplate>() {
                prop_assert_eq!(template.digest(&template.key(OF_NOTHING)).unwrap(), OF_NOTHING);
            }
        }
    }
}
