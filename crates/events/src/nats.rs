//! NATS JetStream. One event is on its way at a time: the client sends what it has queued again after it has reconnected by itself, and may lose
//! what it had written to the old connection. With two events on their way the second could so be stored without the first.

use crate::sink::{Failure, Outcome, Record, Sink};
use async_nats::{
    ConnectOptions, ServerAddr,
    jetstream::{
        self, Context,
        context::{PublishError, PublishErrorKind},
        message::PublishMessage,
    },
};
use async_trait::async_trait;
use castier_config::{BrokerLogin, EventSink, SinkUrl};
use std::{error::Error, time::Duration};

pub(crate) struct Nats {
    address: ServerAddr,
    config: EventSink,
    login: Option<BrokerLogin>,
    /// `None`: not connected.
    context: Option<Context>,
}

impl Nats {
    pub(crate) fn new(config: &EventSink, url: &SinkUrl) -> Result<Self, String> {
        let login = config.login().map_err(|why| format!("credentials_file: {why}"))?;
        let scheme = if url.is_secure() { "tls" } else { "nats" };
        let host = if url.host().contains(':') { format!("[{}]", url.host()) } else { url.host().to_owned() };
        let address = format!("{scheme}://{host}:{}", url.port()).parse().map_err(|error| format!("url: {error}"))?;
        Ok(Self { address, config: config.clone(), login, context: None })
    }

    async fn connect(&self) -> Result<Context, Failure> {
        let options = ConnectOptions::new().name("castier").connection_timeout(self.config.timeout.get());
        // One attempt, and the client ends. Without a limit the task of a client that was dropped goes on for ever.
        let mut options = options.max_reconnects(1).require_tls(self.config.url.as_ref().is_some_and(SinkUrl::is_secure));
        if !self.config.ca_file.as_os_str().is_empty() {
            options = options.add_root_certificates(self.config.ca_file.clone());
        }
        let options = match self.login.clone() {
            None => options,
            Some(BrokerLogin::Password(user, password)) => options.user_and_password(user, password),
            Some(BrokerLogin::Token(token)) => options.token(token),
            Some(BrokerLogin::Creds(text)) => {
                options.credentials(&text).map_err(|_| Failure::Refused("credentials_file is no .creds file of NATS".into()))?
            }
        };
        let client = options.connect(self.address.clone()).await.map_err(|error| Failure::Unreachable(whole(&error)))?;
        // The dispatcher's own timeout comes first.
        Ok(jetstream::context::ContextBuilder::new().ack_timeout(self.config.timeout.get() + Duration::from_secs(60)).build(client))
    }

    async fn publish(&self, context: &Context, record: &Record) -> Result<(), PublishError> {
        let message = PublishMessage::build()
            .payload(record.json.clone())
            .header("Content-Type", "application/cloudevents+json")
            .message_id(&record.envelope.id);
        context.send_publish(self.config.subject.clone(), message).await?.await.map(drop)
    }
}

/// The errors of the client say the cause only in their sources.
fn whole(error: &(dyn Error + 'static)) -> String {
    let all: Vec<_> = std::iter::successors(Some(error), |&error| error.source()).map(ToString::to_string).collect();
    all.join(": ")
}

#[async_trait]
impl Sink for Nats {
    async fn deliver(&mut self, records: &[Record]) -> Outcome {
        let context = match self.context.take() {
            Some(context) => context,
            None => match self.connect().await {
                Ok(context) => context,
                Err(failure) => return failure.into(),
            },
        };
        let Some(record) = records.first() else { return Outcome::all(0) };
        match self.publish(&context, record).await {
            Ok(()) => {
                self.context = Some(context);
                Outcome::all(1)
            }
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
                self.context = Some(context);
                let subject = &self.config.subject;
                Failure::Refused(format!("no stream takes the subject {subject:?}; create one: nats stream add --subjects {subject}"))
                    .into()
            }
            // The stream is full, for example.
            Err(error) if error.kind() == PublishErrorKind::Other => {
                self.context = Some(context);
                Failure::Refused(whole(&error)).into()
            }
            Err(error) => Failure::Unreachable(whole(&error)).into(),
        }
    }
}
