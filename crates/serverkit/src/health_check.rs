//! Requests to an admin listener: `--health URL`, for containers without another HTTP client, and the commands that ask a running program.

use reqwest::{Certificate, Client, Method, Url};
use std::{net::IpAddr, path::PathBuf, time::Duration};

/// The longest answer that is read.
const MOST: usize = 1 << 20;
/// How long the answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How to get in where the admin listener has TLS or wants credentials.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Credentials {
    /// A file with USER:PASSWORD or with a token, for an admin listener with access.admin.
    #[arg(long, value_name = "FILE")]
    pub credentials_file: Option<PathBuf>,
    /// A PEM file with the authorities that may sign the certificate of an https:// admin listener. Default: those that the system trusts. On the
    /// loopback no certificate is checked without this: it is for another name.
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
}

/// Why there is no answer with 2xx.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// Something answered with this status.
    #[error("{url}: answered {status}{detail}")]
    Answered {
        /// What was asked.
        url: String,
        /// The status.
        status: u16,
        /// What the answer says, and what may help, behind a colon.
        detail: String,
    },
    /// Nothing listens there.
    #[error("{0}")]
    Refused(String),
    /// Nothing answered in time, or not in HTTP; or the request could not be made. A text that names the URL, and why.
    #[error("{0}")]
    No(String),
}

/// Sends a GET to this URL, and expects a 2xx.
///
/// # Errors
/// Another answer, or none.
pub(crate) fn health_check(url: &str) -> Result<(), String> {
    get(url, &Credentials::default()).map(drop).map_err(|failed| failed.to_string())
}

/// Sends a GET to this URL, and returns the body of a 2xx. Blocks; not for async code.
///
/// # Errors
/// Another answer, or none.
pub fn get(url: &str, credentials: &Credentials) -> Result<String, Failed> {
    ask(Method::GET, url, credentials)
}

/// Sends a POST without a body to this URL, and returns the body of a 2xx. Blocks; not for async code.
///
/// # Errors
/// As [`get`].
pub fn post(url: &str, credentials: &Credentials) -> Result<String, Failed> {
    ask(Method::POST, url, credentials)
}

fn ask(method: Method, url: &str, credentials: &Credentials) -> Result<String, Failed> {
    let parsed = Url::parse(url).ok();
    if let Some(parsed) = parsed.as_ref().filter(|parsed| !parsed.username().is_empty() || parsed.password().is_some()) {
        let host = parsed.host_str().unwrap_or_default();
        let why = "the URL has a user or a password, which others on this machine can see; name a file with --credentials-file";
        return Err(Failed::No(format!("{}://{host}: {why}", parsed.scheme())));
    }
    let no = |why: &dyn std::fmt::Display| Failed::No(format!("{url}: {why}"));
    let parsed = parsed.filter(|parsed| matches!(parsed.scheme(), "http" | "https") && parsed.has_host());
    let mut parsed = parsed.ok_or_else(|| no(&"write http://HOST:PORT/healthz"))?;
    if parsed.path() == "/" && !url.ends_with('/') {
        parsed.set_path("/healthz");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| no(&error))?;
    let client = client(&parsed, credentials).map_err(Failed::No)?;
    let read =
        |file: &PathBuf| std::fs::read_to_string(file).map_err(|error| Failed::No(format!("{} cannot be read ({error})", file.display())));
    if credentials.credentials_file.is_some() && parsed.scheme() == "http" && !is_loopback(&parsed) {
        return Err(no(&"the credentials would travel in the clear; write https://HOST:PORT"));
    }
    let secret = credentials.credentials_file.as_ref().map(read).transpose()?;
    runtime.block_on(async {
        let mut request = client.request(method, parsed);
        match secret.as_deref().map(|secret| (secret.trim(), secret.trim().split_once(':'))) {
            Some((_, Some((user, password)))) => request = request.basic_auth(user, Some(password)),
            Some((token, None)) => request = request.bearer_auth(token),
            None => {}
        }
        let mut answer = request
            .send()
            .await
            .map_err(|error| if is_refused(&error) { Failed::Refused(format!("{url}: {}", why(&error))) } else { no(&why(&error)) })?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|error| no(&why(&error)))? {
            body.extend_from_slice(&part);
            if body.len() > MOST {
                return Err(no(&format!("answered with more than {MOST} bytes")));
            }
        }
        if !status.is_success() {
            let problem = serde_json::from_slice::<serde_json::Value>(&body).unwrap_or_default();
            let detail = problem["detail"].as_str().map(|detail| format!(": {detail}")).unwrap_or_default() + hint(status.as_u16());
            return Err(Failed::Answered { url: url.to_owned(), status: status.as_u16(), detail });
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    })
}

fn client(url: &Url, credentials: &Credentials) -> Result<Client, String> {
    let mut client = Client::builder().no_proxy().timeout(TIMEOUT).redirect(reqwest::redirect::Policy::none());
    if let Some(file) = &credentials.ca_file {
        let bad = |why: &dyn std::fmt::Display| format!("{} cannot be used ({why})", file.display());
        let pem = std::fs::read(file).map_err(|error| bad(&error))?;
        let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| bad(&why(&error)))?;
        client = certificates.into_iter().fold(client.tls_built_in_root_certs(false), reqwest::ClientBuilder::add_root_certificate);
    } else if is_loopback(url) {
        // The certificate is for the name that clients know, and what is sent does not leave the machine.
        client = client.danger_accept_invalid_certs(true);
    }
    client.build().map_err(|error| format!("{url}: {}", why(&error)))
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

const fn hint(status: u16) -> &'static str {
    match status {
        401 => "; name a file with --credentials-file",
        400 => "; if it speaks TLS, write https://HOST:PORT",
        _ => "",
    }
}

fn is_refused(error: &reqwest::Error) -> bool {
    let mut causes = std::iter::successors(Some(error as &dyn std::error::Error), |&error| error.source());
    causes.any(|cause| cause.downcast_ref::<std::io::Error>().is_some_and(|cause| cause.kind() == std::io::ErrorKind::ConnectionRefused))
}

/// The innermost cause, which says most.
fn why(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |&error| error.source());
    causes.last().map(ToString::to_string).unwrap_or_default()
}
