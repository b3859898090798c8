//! What it takes to be let in at a source, and to know that it is the right one.

use castier_config as config;
use castier_serverkit::pem;
use data_encoding::BASE64;
use http::HeaderValue;
use percent_encoding::percent_decode_str;
use std::path::Path;
use url::Url;

/// The `Authorization` for the user and the password in a URL (RFC 7617); none if it names neither.
pub(crate) fn basic(url: &Url) -> Option<HeaderValue> {
    let (user, password) = (url.username(), url.password().unwrap_or_default());
    if user.is_empty() && password.is_empty() {
        return None;
    }
    let pair: Vec<u8> = percent_decode_str(user).chain(b":".iter().copied()).chain(percent_decode_str(password)).collect();
    let mut value = HeaderValue::try_from(format!("Basic {}", BASE64.encode(&pair))).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// `origin.ca_file` as pingora takes it; none for the system's roots. Checked here, since pingora panics over a bad one.
///
/// # Errors
/// A text that names the file.
pub fn ca_file(config: &config::Origin) -> Result<Option<String>, String> {
    if config.ca_file.as_os_str().is_empty() {
        return Ok(None);
    }
    certificates_file("origin.ca_file", &config.ca_file)
}

/// The path of a file that holds certificates, as pingora takes it.
pub fn certificates_file(key: &str, path: &Path) -> Result<Option<String>, String> {
    pem::certificates(key, path)?;
    pem::path_text(key, path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_those_of_the_url() {
        let basic = |text: &str| basic(&Url::parse(text).unwrap());
        assert_eq!(basic("http://origin:9000"), None);
        // The example of RFC 7617, section 2.
        assert_eq!(basic("http://Aladdin:open%20sesame@origin").unwrap(), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("http://token@origin").unwrap(), "Basic dG9rZW46");
    }
}
