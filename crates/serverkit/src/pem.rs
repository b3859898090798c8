//! Certificates and private keys in PEM files. Errors name the key of the configuration that names the file.

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use std::{fmt::Display, path::Path};

/// The certificates in a file: one or more.
///
/// # Errors
/// The file cannot be read, is not PEM, or has no certificate.
pub fn certificates(key: &str, file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    let found = found.map_err(|error| unusable(key, file, &said(&error, "PEM certificate")))?;
    if found.is_empty() { Err(unusable(key, file, &"holds no PEM certificate")) } else { Ok(found) }
}

/// The private key in a file.
///
/// # Errors
/// The file cannot be read, or has no private key.
pub fn private_key(key: &str, file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_file(file).map_err(|error| unusable(key, file, &said(&error, "PEM private key without a password")))
}

/// What is wrong with a file that should hold `what`.
fn said(error: &pem::Error, what: &str) -> String {
    match error {
        pem::Error::NoItemsFound => format!("holds no {what}"),
        pem::Error::MissingSectionEnd { .. } => format!("is cut: a section of it does not end; name a file with a whole {what}"),
        pem::Error::Base64Decode(_) | pem::Error::IllegalSectionStart { .. } => {
            format!("is damaged, or encrypted; name a file with a {what}")
        }
        error => error.to_string(),
    }
}

/// The path of a file, for a library that takes text.
///
/// # Errors
/// The path is not UTF-8.
pub fn path_text(key: &str, file: &Path) -> Result<String, String> {
    file.to_str().map(str::to_owned).ok_or_else(|| unusable(key, file, &"is not a path in UTF-8"))
}

/// The error text for an unusable file.
pub fn unusable(key: &str, file: &Path, why: &dyn Display) -> String {
    format!("{key}: {}: {why}", file.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn errors_name_the_key_and_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        let shown = file.display();
        assert!(certificates("a.b", &file).unwrap_err().starts_with(&format!("a.b: {shown}: ")));
        assert!(private_key("a.b", &file).unwrap_err().starts_with(&format!("a.b: {shown}: ")));
        fs::write(&file, "no PEM").unwrap();
        assert_eq!(certificates("a.b", &file).unwrap_err(), format!("a.b: {shown}: holds no PEM certificate"));
        assert_eq!(path_text("a.b", &file).unwrap(), shown.to_string());
    }
}
