//! Profiles of the AWS tools: `~/.aws/credentials` and `~/.aws/config`, which `object_store` does not read.
//!
//! The format and the precedence are those of the AWS SDKs and tools reference guide. What castier cannot log in with (single sign-on, roles of another
//! profile) is an error that says so, and not a reason to try other credentials.

use async_trait::async_trait;
use configparser::ini::Ini;
use object_store::{CredentialProvider, Error, aws::AwsCredential};
use serde::Deserialize;
use std::{
    env, io,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::AcqRel},
    },
    time::{Duration, Instant, SystemTime},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{io::AsyncReadExt as _, process::Command, sync::Mutex, task::spawn_blocking, time::timeout};

/// How long the keys of a file are used before the file is read again: rotated keys are taken well before the old ones end.
const READ_AGAIN: Duration = Duration::from_secs(60);
/// The least time between two readings when the store refuses the keys.
const LEAST_AGE: Duration = Duration::from_secs(2);
/// Keys that end are replaced this long before.
const BEFORE_END: Duration = Duration::from_secs(300);
/// How long a `credential_process` may take.
const PROCESS_TIME: Duration = Duration::from_secs(30);
/// The most bytes that it may write.
const PROCESS_OUTPUT: u64 = 64 << 10;

/// Which profile, and the files that it is in.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    credentials: Option<PathBuf>,
    config: Option<PathBuf>,
    name: String,
    /// Somebody named the profile. Otherwise it is `default`, which need not exist.
    is_named: bool,
}

/// What a profile says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Profile {
    pub(crate) region: Option<String>,
    pub(crate) endpoint: Option<String>,
    pub(crate) login: Login,
}

/// How a profile logs in.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Login {
    /// It does not say.
    #[default]
    None,
    Keys(AwsCredential),
    /// A command that prints keys.
    Process(String),
    WebIdentity {
        token_file: String,
        role: String,
        session: Option<String>,
    },
    /// In a way that castier does not know. The text says which.
    Unsupported(&'static str),
}

impl Files {
    /// The profile `name`, else that of `AWS_PROFILE`, else `default`; in the files that the environment names, else in `~/.aws`.
    pub(crate) fn of(name: &str) -> Self {
        Self::from(name, |variable| env::var(variable).ok())
    }

    fn from(name: &str, variable: impl Fn(&str) -> Option<String>) -> Self {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let named = Some(name.to_owned()).filter(|name| !name.is_empty()).or_else(|| variable("AWS_PROFILE"));
        let home = variable("HOME");
        let file = |name, usual: &str| {
            variable(name).map(PathBuf::from).or_else(|| home.as_ref().map(|home| PathBuf::from(home).join(".aws").join(usual)))
        };
        Self {
            credentials: file("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            config: file("AWS_CONFIG_FILE", "config"),
            is_named: named.is_some(),
            name: named.unwrap_or_else(|| "default".to_owned()),
        }
    }

    pub(crate) const fn is_named(&self) -> bool {
        self.is_named
    }

    /// Reads the profile. Blocks.
    pub(crate) fn read(&self) -> Result<Profile, String> {
        let (credentials, config) = (load(self.credentials.as_ref())?, load(self.config.as_ref())?);
        let name = &self.name;
        let long = format!("profile {name}");
        // `[profile default]` goes before `[default]`. No other profile may go without the word in this file.
        let short = (name == "default").then_some(name.as_str());
        let in_config = [Some(long.as_str()), short].into_iter().flatten().find_map(|section| section_of(&config, section));
        let in_credentials = section_of(&credentials, name);
        if in_config.is_none() && in_credentials.is_none() {
            let shown = |file: &Option<PathBuf>| file.as_ref().map_or_else(String::new, |file| file.display().to_string());
            return match self.is_named {
                true => Err(format!("there is no profile {name:?} in {} and {}", shown(&self.credentials), shown(&self.config))),
                false => Ok(Profile::default()),
            };
        }
        let get = |key: &str| -> Option<String> {
            let value = [in_credentials, in_config].into_iter().flatten().find_map(|section| config_value(section.get(key)?.as_deref()?));
            value.filter(|value| !value.is_empty())
        };
        let service = get("services").and_then(|name| nested(section_of(&config, &format!("services {name}"))?.get("s3")?.as_deref()?));
        let nested_here = || in_config.and_then(|section| nested(section.get("s3")?.as_deref()?));
        Ok(Profile {
            region: get("region"),
            endpoint: service.or_else(nested_here).or_else(|| get("endpoint_url")),
            login: login(name, get)?,
        })
    }
}

fn login(name: &str, get: impl Fn(&str) -> Option<String>) -> Result<Login, String> {
    let role = get("role_arn");
    if role.is_some() && (get("source_profile").is_some() || get("credential_source").is_some()) {
        return Ok(Login::Unsupported("a role of another profile (source_profile, credential_source)"));
    }
    if let (Some(token_file), Some(role)) = (get("web_identity_token_file"), role) {
        return Ok(Login::WebIdentity { token_file, role, session: get("role_session_name") });
    }
    match (get("aws_access_key_id"), get("aws_secret_access_key")) {
        (Some(key_id), Some(secret_key)) => {
            return Ok(Login::Keys(AwsCredential { key_id, secret_key, token: get("aws_session_token") }));
        }
        (None, None) => {}
        _ => return Err(format!("the profile {name:?} has only one of aws_access_key_id and aws_secret_access_key")),
    }
    if ["sso_session", "sso_start_url", "sso_account_id"].into_iter().any(|key| get(key).is_some()) {
        return Ok(Login::Unsupported("single sign-on (sso_…)"));
    }
    if get("login_session").is_some() {
        return Ok(Login::Unsupported("the session of `aws login` (login_session)"));
    }
    Ok(get("credential_process").map_or(Login::None, Login::Process))
}

/// The error for a way to log in that castier does not know.
pub(crate) fn unsupported(how: &str) -> String {
    format!(
        "logs in with {how}, which castier does not know; write keys, credential_process or web_identity_token_file into the profile, \
         such as credential_process = \"aws configure export-credentials --profile NAME\""
    )
}

fn load(file: Option<&PathBuf>) -> Result<Ini, String> {
    // Names of profiles have upper and lower case.
    let mut ini = Ini::new_cs();
    // Indented lines belong to the key above them. Comments behind values are handled in `config_value`: `#` may be part of a value.
    ini.set_multiline(true);
    ini.set_inline_comment_symbols(Some(&[]));
    let Some(file) = file else { return Ok(ini) };
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ini),
        Err(error) => return Err(format!("{} cannot be read ({error})", file.display())),
    };
    // The parser's message names the line, and does not repeat it.
    ini.read(text).map_err(|error| format!("{}: {error}", file.display()))?;
    Ok(ini)
}

type Section = std::collections::HashMap<String, Option<String>>;

fn section_of<'i>(ini: &'i Ini, wanted: &str) -> Option<&'i Section> {
    // "profile   x" is the same as "profile x".
    let is_wanted = |name: &str| name.split_whitespace().eq(wanted.split_whitespace());
    ini.get_map_ref().iter().find(|(name, _)| is_wanted(name)).map(|(_, section)| section)
}

/// A value without a comment behind it, which a space precedes; `None` for a section in a section.
fn config_value(text: &str) -> Option<String> {
    let line = text.lines().next().unwrap_or_default();
    let end = [" #", " ;", "\t#", "\t;"].into_iter().filter_map(|mark| line.find(mark)).min().unwrap_or(line.len());
    Some(line.get(..end)?.trim().to_owned())
}

/// `endpoint_url` in the indented lines of `s3 =`.
fn nested(text: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    lines.find(|(key, _)| key.trim() == "endpoint_url").and_then(|(_, value)| config_value(value)).filter(|value| !value.is_empty())
}

/// The keys of a profile, read again now and then, and when the store refuses them.
#[derive(Debug)]
pub(crate) struct ProfileKeys {
    files: Files,
    held: Mutex<Option<Held>>,
    /// The store has refused the keys.
    refused: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Held {
    keys: Arc<AwsCredential>,
    read: Instant,
    /// When they are to be read again; `None`: only if the store refuses them.
    until: Option<Instant>,
}

impl ProfileKeys {
    pub(crate) fn new(files: Files, refused: Arc<AtomicBool>) -> Self {
        Self { files, held: Mutex::default(), refused }
    }

    async fn read(&self) -> Result<Held, String> {
        let files = self.files.clone();
        let profile = spawn_blocking(move || files.read()).await.map_err(|stopped| stopped.to_string())??;
        let read = Instant::now();
        match profile.login {
            Login::Keys(keys) => Ok(Held { keys: Arc::new(keys), read, until: Some(read + READ_AGAIN) }),
            Login::Process(command) => {
                let (keys, end) = run(&command).await.map_err(|why| format!("credential_process: {why}"))?;
                Ok(Held { keys: Arc::new(keys), read, until: end.map(|left| read + left.saturating_sub(BEFORE_END).max(LEAST_AGE)) })
            }
            Login::Unsupported(how) => Err(unsupported(how)),
            Login::WebIdentity { .. } => Err("has a web identity by now; restart castier".into()),
            Login::None => Err("has no keys any more".into()),
        }
    }
}

#[async_trait]
impl CredentialProvider for ProfileKeys {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut held = self.held.lock().await;
        let now = Instant::now();
        let is_good = |held: &Held| {
            let is_refused = now >= held.read + LEAST_AGE && self.refused.swap(false, AcqRel);
            !is_refused && held.until.is_none_or(|until| now < until)
        };
        if let Some(held) = held.as_ref().filter(|held| is_good(held)) {
            return Ok(held.keys.clone());
        }
        match self.read().await {
            Ok(new) => Ok(held.insert(new).keys.clone()),
            Err(why) => match held.as_mut() {
                Some(old) => {
                    tracing::warn!(
                        profile = self.files.name,
                        why,
                        "the keys of the profile could not be read again; castier goes on with those that it has"
                    );
                    old.until = Some(now + LEAST_AGE);
                    Ok(old.keys.clone())
                }
                None => {
                    let why = format!("the profile {:?}: {why}", self.files.name);
                    Err(Error::Unauthenticated { path: String::new(), source: why.into() })
                }
            },
        }
    }
}

/// What a `credential_process` prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<String>,
}

/// Runs a `credential_process`, as the AWS tools do. Returns the keys, and how long they are good.
async fn run(command: &str) -> Result<(AwsCredential, Option<Duration>), String> {
    let printed = async {
        // Its messages are for people, and may go where castier's own go.
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot be run ({error})"))?;
        let mut text = Vec::new();
        let Some(stdout) = child.stdout.take() else { return Err("has no output".into()) };
        stdout.take(PROCESS_OUTPUT).read_to_end(&mut text).await.map_err(|error| format!("cannot be read ({error})"))?;
        let status = child.wait().await.map_err(|error| error.to_string())?;
        if status.success() { Ok(text) } else { Err(format!("ended with {status}")) }
    };
    let text = timeout(PROCESS_TIME, printed).await.map_err(|_| format!("has not ended within {} s", PROCESS_TIME.as_secs()))??;
    // The message of the parser could repeat a secret.
    let printed: Printed = serde_json::from_slice(&text).map_err(|_| "has not printed the JSON that the AWS tools expect".to_owned())?;
    if printed.version != 1 {
        return Err(format!("has printed version {}, and castier knows 1", printed.version));
    }
    let end = printed.expiration.map(|end| OffsetDateTime::parse(&end, &Rfc3339)).transpose();
    let end = end.map_err(|_| "has printed an Expiration that is no time".to_owned())?;
    let left = end.map(|end| SystemTime::from(end).duration_since(SystemTime::now()).unwrap_or_default());
    let Printed { access_key_id: key_id, secret_access_key: secret_key, session_token: token, .. } = printed;
    Ok((AwsCredential { key_id, secret_key, token }, left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};
    use tempfile::TempDir;

    fn files(dir: &Path, name: &str, variables: &[(&str, &str)]) -> Files {
        let variables: Vec<_> = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Files::from(name, |wanted| {
            let found = variables.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.clone());
            found.or_else(|| (wanted == "HOME").then(|| dir.display().to_string()))
        })
    }

    fn home(credentials: &str, config: &str) -> TempDir {
        let dir = TempDir::new().unwrap();
        fs::create_dir(dir.path().join(".aws")).unwrap();
        fs::write(dir.path().join(".aws/credentials"), credentials).unwrap();
        fs::write(dir.path().join(".aws/config"), config).unwrap();
        dir
    }

    fn keys(id: &str, secret: &str, token: Option<&str>) -> Login {
        Login::Keys(AwsCredential { key_id: id.into(), secret_key: secret.into(), token: token.map(str::to_owned) })
    }

    const CREDENTIALS: &str = "# a comment\n[default]\naws_access_key_id = d\naws_secret_access_key=x/y+z#1 # the secret\n\n\
        [Team]\naws_access_key_id=t\naws_secret_access_key=s\naws_session_token = tok=en==\n[half]\naws_access_key_id=h\n\
        [both]\naws_access_key_id=from-credentials\naws_secret_access_key=c\n";
    const CONFIG: &str = "[default]\nregion = eu-central-1\ns3 =\n  max_concurrent_requests = 20\n  region = nested\noutput=json\n\
        [profile   Team]\nregion=eu-west-3\nendpoint_url = https://general.example\nservices = own\n\
        [services own]\ndynamodb =\n  endpoint_url = https://dynamo.example\ns3 =\n  endpoint_url = https://s3.example\n\
        [profile both]\naws_access_key_id=from-config\naws_secret_access_key=f\nendpoint_url=https://e.example ; why\n\
        [profile process]\ncredential_process = /bin/echo \"a b\"\n\
        [profile web]\nweb_identity_token_file=/t\nrole_arn=arn:aws:iam::1:role/r\nrole_session_name=me\n\
        [profile sso]\nsso_session = x\n[profile role]\nrole_arn=r\nsource_profile=default\n[plain]\nregion=no\n";

    #[test]
    fn profiles_are_read_as_the_aws_tools_do() {
        let home = home(CREDENTIALS, CONFIG);
        let read = |name: &str| files(home.path(), name, &[]).read();
        let default = read("").unwrap();
        assert_eq!(default.region.as_deref(), Some("eu-central-1"));
        assert_eq!((default.endpoint, default.login), (None, keys("d", "x/y+z#1", None)));
        let team = read("Team").unwrap();
        assert_eq!(team.login, keys("t", "s", Some("tok=en==")));
        assert_eq!((team.region.as_deref(), team.endpoint.as_deref()), (Some("eu-west-3"), Some("https://s3.example")));
        let both = read("both").unwrap();
        assert_eq!((both.login, both.endpoint.as_deref()), (keys("from-credentials", "c", None), Some("https://e.example")));
        assert_eq!(read("process").unwrap().login, Login::Process("/bin/echo \"a b\"".into()));
        let web = Login::WebIdentity { token_file: "/t".into(), role: "arn:aws:iam::1:role/r".into(), session: Some("me".into()) };
        assert_eq!(read("web").unwrap().login, web);
        for (name, word) in [("sso", "single sign-on"), ("role", "source_profile")] {
            let Login::Unsupported(how) = read(name).unwrap().login else { panic!("{name}") };
            assert!(unsupported(how).contains(word), "{how}");
        }
        for (name, word) in [("half", "only one of"), ("none", "no profile \"none\""), ("team", "no profile"), ("plain", "no profile")] {
            assert!(read(name).unwrap_err().contains(word), "{name}");
        }
    }

    #[test]
    fn the_environment_names_files_and_profile() {
        let (home, other) =
            (home(CREDENTIALS, CONFIG), home("[x]\naws_access_key_id=o\naws_secret_access_key=o\n", "[profile x]\nregion=o\n"));
        let elsewhere = |name: &str| other.path().join(".aws").join(name).display().to_string();
        let variables = [
            ("AWS_PROFILE", "x".to_owned()),
            ("AWS_SHARED_CREDENTIALS_FILE", elsewhere("credentials")),
            ("AWS_CONFIG_FILE", elsewhere("config")),
        ];
        let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let read = files(home.path(), "", &variables).read().unwrap();
        assert_eq!((read.login, read.region.as_deref()), (keys("o", "o", None), Some("o")));
        // The key of the configuration goes before AWS_PROFILE.
        assert!(files(home.path(), "Team", &variables).read().unwrap_err().contains("Team"));
        // Without any file there is no default profile, and that is no error.
        let nowhere = TempDir::new().unwrap();
        assert_eq!(files(nowhere.path(), "", &[]).read().unwrap(), Profile::default());
        assert!(files(nowhere.path(), "", &[("AWS_PROFILE", "x")]).read().is_err());
    }

    #[tokio::test]
    async fn refused_keys_are_read_again() {
        let home = home("[default]\naws_access_key_id=1\naws_secret_access_key=s\n", "");
        let refused = Arc::new(AtomicBool::new(false));
        let provider = ProfileKeys::new(files(home.path(), "", &[]), refused.clone());
        let id = async || provider.get_credential().await.unwrap().key_id.clone();
        assert_eq!(id().await, "1");
        let write = |text: &str| fs::write(home.path().join(".aws/credentials"), text).unwrap();
        write("[default]\naws_access_key_id=2\naws_secret_access_key=s\n");
        assert_eq!(id().await, "1", "within READ_AGAIN");
        let age = async |by: Duration| provider.held.lock().await.as_mut().unwrap().read -= by;
        age(LEAST_AGE).await;
        refused.store(true, std::sync::atomic::Ordering::Release);
        assert_eq!(id().await, "2");
        // A file that is being written must not end what works.
        write("[default\n");
        age(LEAST_AGE).await;
        refused.store(true, std::sync::atomic::Ordering::Release);
        assert_eq!(id().await, "2");
        // Without a refusal they are read again as well.
        write("[default]\naws_access_key_id=3\naws_secret_access_key=s\n");
        provider.held.lock().await.as_mut().unwrap().until = Some(Instant::now());
        assert_eq!(id().await, "3");
    }

    #[tokio::test]
    async fn a_process_prints_keys() {
        let print = |json: &str| format!("printf '%s' '{json}'");
        let (keys, left) = run(&print(r#"{"Version":1,"AccessKeyId":"a","SecretAccessKey":"s"}"#)).await.unwrap();
        assert_eq!((keys.key_id.as_str(), keys.token, left), ("a", None, None));
        let json = r#"{"Version":1,"AccessKeyId":"a","SecretAccessKey":"s","SessionToken":"t","Expiration":"2999-01-01T00:00:00Z"}"#;
        let (keys, left) = run(&print(json)).await.unwrap();
        assert!(keys.token.as_deref() == Some("t") && left.unwrap() > Duration::from_secs(1 << 30));
        for (command, word) in [
            ("exit 3", "3"),
            ("echo secret", "JSON"),
            ("/no/such/program", "127"),
            (r#"echo '{"Version":2,"AccessKeyId":"a","SecretAccessKey":"s"}'"#, "version 2"),
            (r#"echo '{"Version":1,"AccessKeyId":"a","SecretAccessKey":"s","Expiration":"soon"}'"#, "Expiration"),
        ] {
            let error = run(command).await.unwrap_err();
            assert!(error.contains(word) && !error.contains("secret"), "{command}: {error}");
        }
    }
}
