//! The client of S3: what the configuration, the environment and a profile say about it, in this order.

use crate::{
    profile::{self, Files, Login, Profile, ProfileKeys},
    transport::Transport,
};
use castier_config as config;
use object_store::{
    RetryConfig, StaticCredentialProvider,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, Checksum},
};
use std::{env, sync::Arc};

pub(crate) fn open(url: &config::Bucket, keys: &config::S3, retries: RetryConfig, transport: Transport) -> Result<AmazonS3, String> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&url.name)
        .with_virtual_hosted_style_request(!keys.path_style)
        .with_checksum_algorithm(Checksum::SHA256)
        // By default one object is deleted with the request for many, which fewer stores know.
        .with_disable_bulk_delete(true)
        .with_retry(retries);
    let files = Files::of(&keys.profile);
    // A configuration that has keys says where the bucket is, too: a profile that nobody has named is not part of it.
    let profile = match keys.access_key_id.is_empty() || files.is_named() {
        true => files.read().map_err(|why| format!("origin.s3.profile: {why}"))?,
        false => Profile::default(),
    };
    let named = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"].into_iter().find_map(|name| env::var(name).ok());
    let endpoint = Some(keys.endpoint.clone()).filter(|endpoint| !endpoint.is_empty()).or(named).or(profile.endpoint);
    if let Some(endpoint) = endpoint {
        let endpoint = if keys.path_style { endpoint } else { host_style(&endpoint, &url.name)? };
        let allow_http = endpoint.starts_with("http://");
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint.trim_end_matches('/')).with_allow_http(allow_http);
    }
    if !keys.region.is_empty() {
        builder = builder.with_region(&keys.region);
    } else if let Some(region) = profile.region.filter(|_| builder.get_config_value(&AmazonS3ConfigKey::Region).is_none()) {
        builder = builder.with_region(region);
    }
    let in_environment = builder.get_config_value(&AmazonS3ConfigKey::AccessKeyId).is_some();
    if !keys.access_key_id.is_empty() {
        let secret = keys.secret().map_err(|error| format!("origin.s3.secret_access_key_file: {error}"))?;
        // Without a session token of the environment, which belongs to other keys.
        let keys =
            AwsCredential { key_id: keys.access_key_id.clone(), secret_key: secret.as_deref().cloned().unwrap_or_default(), token: None };
        builder = builder.with_credentials(Arc::new(StaticCredentialProvider::new(keys)));
    } else if !in_environment || !keys.profile.is_empty() {
        builder = match profile.login {
            Login::Keys(_) | Login::Process(_) => builder.with_credentials(Arc::new(ProfileKeys::new(files, transport.refused()))),
            Login::WebIdentity { token_file, role, session } => {
                let builder =
                    builder.with_config(AmazonS3ConfigKey::WebIdentityTokenFile, token_file).with_config(AmazonS3ConfigKey::RoleArn, role);
                match session {
                    Some(session) => builder.with_config(AmazonS3ConfigKey::RoleSessionName, session),
                    None => builder,
                }
            }
            Login::Unsupported(how) => return Err(format!("origin.s3.profile: the profile {}", profile::unsupported(how))),
            Login::None if !keys.profile.is_empty() => {
                return Err(format!("origin.s3.profile: the profile {:?} has no keys and no other way to log in", keys.profile));
            }
            Login::None => builder,
        };
    }
    builder.with_http_connector(transport).build().map_err(|error| format!("origin.url: {error}"))
}

/// The address of the bucket with its name in the host.
fn host_style(endpoint: &str, bucket: &str) -> Result<String, String> {
    let (scheme, rest) = endpoint.split_once("://").ok_or("origin.s3.endpoint: is no URL")?;
    if rest.starts_with('[') || rest.split([':', '/']).next().is_some_and(|host| host.parse::<std::net::Ipv4Addr>().is_ok()) {
        return Err("origin.s3.path_style: is false, and the endpoint is an address, before which no name can be; write true".into());
    }
    Ok(format!("{scheme}://{bucket}.{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_in_the_host() {
        for (endpoint, expected) in [
            ("https://s3.example", Some("https://blobs.s3.example")),
            ("http://store:8333", Some("http://blobs.store:8333")),
            ("http://127.0.0.1:8333", None),
            ("http://[::1]:8333", None),
            ("store", None),
        ] {
            assert_eq!(host_style(endpoint, "blobs").ok().as_deref(), expected, "{endpoint}");
        }
    }
}
