//! Webhooks: POST requests with CloudEvents, signed as Standard Webhooks has it.

use crate::sink::{Failure, Outcome, Record, Sink};
use async_trait::async_trait;
use castier_config::{EventSink, SinkUrl};
use data_encoding::BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use reqwest::{Client, Response, redirect};
use sha2::Sha256;
use std::{
    error::Error,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// The most bytes of an answer that are read, and for how long. A connection whose answer was read to its end can be used again.
const ANSWER: usize = 16 << 10;
const ANSWER_TIME: Duration = Duration::from_millis(250);

pub(crate) struct Webhook {
    client: Client,
    url: reqwest::Url,
    key: Zeroizing<Vec<u8>>,
    /// `events.batch`.
    batch: usize,
}

impl Webhook {
    pub(crate) fn new(config: &EventSink, url: &SinkUrl) -> Result<Self, String> {
        let mut client = Client::builder()
            .user_agent(concat!("castier/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(config.timeout.get())
            // A redirect would turn the POST into a GET, or send events to a host that nobody configured.
            .redirect(redirect::Policy::none());
        if !config.ca_file.as_os_str().is_empty() {
            let shown = config.ca_file.display();
            let pem = std::fs::read(&config.ca_file).map_err(|error| format!("ca_file: {shown} cannot be read ({error})"))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| format!("ca_file: {shown}: {error}"))?;
            client = certificates.into_iter().fold(client.tls_built_in_root_certs(false), reqwest::ClientBuilder::add_root_certificate);
        }
        Ok(Self {
            client: client.build().map_err(|error| format!("url: {}", root(&error)))?,
            url: url.in_full().clone(),
            key: config.secret().map_err(|why| format!("secret_file: {why}"))?,
            batch: config.batch,
        })
    }

    async fn post(&self, records: &[Record]) -> Result<Response, reqwest::Error> {
        let (kind, body) = match records {
            [one] if self.batch == 1 => ("application/cloudevents+json; charset=utf-8", one.json.to_vec()),
            several => {
                let events: Vec<&[u8]> = several.iter().map(|record| &record.json[..]).collect();
                ("application/cloudevents-batch+json; charset=utf-8", [b"[", &events.join(&b","[..])[..], b"]"].concat())
            }
        };
        let id = message_id(records);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
        let signature = signature(&self.key, &id, &now, &body);
        let request = self.client.post(self.url.clone()).header("content-type", kind);
        request.header("webhook-id", id).header("webhook-timestamp", now).header("webhook-signature", signature).body(body).send().await
    }
}

/// The same for the same events. A full stop has a meaning in what is signed, so the specification forbids it here.
fn message_id(records: &[Record]) -> String {
    let id = records.first().map_or("", |record| &record.envelope.id).replace('.', "_");
    // Header values are visible characters.
    let id: String = id.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).collect();
    if records.len() > 1 { format!("{id}+{}", records.len()) } else { id }
}

fn signature(key: &[u8], id: &str, timestamp: &str, body: &[u8]) -> String {
    // A key of any length will do.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return String::new() };
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(body);
    format!("v1,{}", BASE64.encode(&mac.finalize().into_bytes()))
}

/// The cause alone: the whole text repeats the URL, which may be a secret.
fn root(error: &reqwest::Error) -> String {
    std::iter::successors(Some(error as &dyn Error), |&error| error.source()).last().map(ToString::to_string).unwrap_or_default()
}

#[async_trait]
impl Sink for Webhook {
    async fn deliver(&mut self, records: &[Record]) -> Outcome {
        let records = &records[..records.len().min(self.batch)];
        let mut answer = match self.post(records).await {
            Ok(answer) => answer,
            Err(error) => return Failure::Unreachable(root(&error)).into(),
        };
        let status = answer.status();
        if !status.is_success() {
            return Failure::Refused(format!("the webhook answered {status}")).into();
        }
        let rest = async {
            let mut left = ANSWER;
            while let Ok(Some(part)) = answer.chunk().await {
                let Some(less) = left.checked_sub(part.len()) else { break };
                left = less;
            }
        };
        timeout(ANSWER_TIME, rest).await.ok();
        Outcome::all(records.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification of Standard Webhooks.
    #[test]
    fn signatures_are_those_of_standard_webhooks() {
        let key = BASE64.decode(b"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signed = signature(&key, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", b"{\"test\": 2432232314}");
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
