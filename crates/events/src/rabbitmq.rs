//! RabbitMQ, with publisher confirms.

use crate::sink::{Failure, Outcome, Record, Sink};
use async_compat::Compat;
use async_trait::async_trait;
use castier_config::{BrokerLogin, EventSink, SinkUrl};
use lapin::{
    AsyncTcpStream, BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, ErrorKind,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    tcp::OwnedTLSConfig,
    uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo},
};
use parking_lot::Mutex;
use std::{
    io,
    net::{Shutdown, TcpStream},
    sync::Arc,
};
use tokio::time::timeout;

/// How many messages may be on their way. Confirms take milliseconds, since the broker writes to disk first; this hides them.
const WINDOW: usize = 64;
/// In seconds. A connection that the broker has forgotten ends after twice this time.
const HEARTBEAT: u16 = 10;
/// `delivery_mode`: the broker writes the message to disk.
const PERSISTENT: u8 = 2;

pub(crate) struct RabbitMq {
    uri: AMQPUri,
    tls: OwnedTLSConfig,
    config: EventSink,
    /// `None`: not connected.
    open: Option<Open>,
    window: usize,
    /// The broker has refused a message, and may have taken later ones.
    has_refused: bool,
}

/// An open connection.
struct Open {
    channel: Channel,
    _connection: Connection,
    _socket: Socket,
}

/// Ends the connection when it is dropped. The thread that `lapin` has for a connection waits for the broker's goodbye, and a broker that hangs
/// says none.
#[derive(Default)]
struct Socket(Arc<Mutex<SocketState>>);

#[derive(Default)]
enum SocketState {
    #[default]
    Connecting,
    Connected(TcpStream),
    /// Nobody waits for the connection any more.
    Ended,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let SocketState::Connected(socket) = std::mem::replace(&mut *self.0.lock(), SocketState::Ended) {
            // Fails if the connection has ended, which is as good.
            socket.shutdown(Shutdown::Both).ok();
        }
    }
}

impl SocketState {
    /// Refuses a connection that comes too late, since nobody would end it.
    fn connected(&mut self, socket: TcpStream) -> io::Result<()> {
        if matches!(self, Self::Ended) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        *self = Self::Connected(socket);
        Ok(())
    }
}

impl RabbitMq {
    pub(crate) fn new(config: &EventSink, url: &SinkUrl) -> Result<Self, String> {
        let login = config.login().map_err(|why| format!("credentials_file: {why}"))?;
        let (username, password) = match login {
            Some(BrokerLogin::Password(user, password)) => (user, password),
            _ => ("guest".into(), "guest".into()),
        };
        let cert_chain = if config.ca_file.as_os_str().is_empty() {
            None
        } else {
            let shown = config.ca_file.display();
            Some(std::fs::read_to_string(&config.ca_file).map_err(|error| format!("ca_file: {shown} cannot be read ({error})"))?)
        };
        let uri = AMQPUri {
            scheme: if url.is_secure() { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
            authority: AMQPAuthority { userinfo: AMQPUserInfo { username, password }, host: url.host().into(), port: url.port() },
            vhost: url.vhost(),
            query: AMQPQueryString { heartbeat: Some(HEARTBEAT), ..AMQPQueryString::default() },
        };
        let tls = OwnedTLSConfig { identity: None, cert_chain };
        Ok(Self { uri, tls, config: config.clone(), open: None, window: 1, has_refused: false })
    }

    async fn connect(&self) -> lapin::Result<Open> {
        let socket = Socket::default();
        let (slot, tls, limit) = (socket.0.clone(), Arc::new(self.tls_copy()), self.config.timeout.get());
        let connect = async move |uri: AMQPUri, _| {
            let (slot, tls) = (slot.clone(), tls.clone());
            let connecting = async move {
                let host = uri.authority.host.as_str();
                let stream = tokio::net::TcpStream::connect((host, uri.authority.port)).await?.into_std()?;
                slot.lock().connected(stream.try_clone()?)?;
                let plain = AsyncTcpStream::Plain(Compat::new(tokio::net::TcpStream::from_std(stream)?));
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(plain),
                    AMQPScheme::AMQPS => plain.into_tls(host, tls.as_ref().as_ref()).await,
                }
            };
            let connected = timeout(limit, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            connected.map_err(|error: io::Error| lapin::Error::from(error))
        };
        let name = ConnectionProperties::default().with_connection_name("castier".into());
        let connection = Connection::connector(self.uri.clone(), lapin::runtime::default_runtime()?, connect, name).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(Open { channel, _connection: connection, _socket: socket })
    }

    fn tls_copy(&self) -> OwnedTLSConfig {
        OwnedTLSConfig { identity: None, cert_chain: self.tls.cert_chain.clone() }
    }

    /// Sends all of the records, and waits for the confirms.
    async fn publish(&mut self, channel: &Channel, records: &[Record]) -> Outcome {
        let EventSink { exchange, subject, .. } = &self.config;
        let mut confirms = Vec::new();
        for record in records {
            let properties = BasicProperties::default()
                .with_content_type("application/cloudevents+json".into())
                .with_delivery_mode(PERSISTENT)
                .with_message_id(record.envelope.id.as_str().into());
            // Without this flag the broker acknowledges a message that no queue takes.
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            match channel.basic_publish(exchange.as_str().into(), subject.as_str().into(), options, &record.json, properties).await {
                Ok(confirm) => confirms.push(confirm),
                Err(error) => return explain(&error).into(),
            }
        }
        let mut acknowledged = 0;
        for confirm in confirms {
            let failure = match confirm.await {
                Ok(Confirmation::Ack(None)) => {
                    acknowledged += 1;
                    continue;
                }
                Ok(Confirmation::Ack(Some(returned)) | Confirmation::Nack(Some(returned))) => Failure::Refused(format!(
                    "no queue takes the routing key {subject:?} of the exchange {exchange:?} ({}); create the queue, and bind it",
                    returned.reply_text
                )),
                Ok(Confirmation::Nack(None)) => {
                    self.has_refused = true;
                    Failure::Refused("the broker refused an event, as a full queue with x-overflow = reject-publish does".into())
                }
                Ok(Confirmation::NotRequested) => Failure::Refused("the broker did not confirm an event".into()),
                Err(error) => explain(&error),
            };
            return Outcome { acknowledged, failure: Some(failure) };
        }
        Outcome::all(acknowledged)
    }
}

fn explain(error: &lapin::Error) -> Failure {
    let text = error.to_string();
    match error.kind() {
        // Such as 404 for a missing exchange, and 403 for a password that is wrong.
        ErrorKind::ProtocolError(_) => Failure::Refused(text),
        _ => Failure::Unreachable(text),
    }
}

#[async_trait]
impl Sink for RabbitMq {
    async fn deliver(&mut self, records: &[Record]) -> Outcome {
        let open = match self.open.take() {
            Some(open) => open,
            None => match self.connect().await {
                Ok(open) => open,
                Err(error) => return explain(&error).into(),
            },
        };
        // On one connection the broker takes messages in order. If the connection ends, it has taken those up to some message, and no later one.
        // But it can refuse one message and take the next one, when the queue was just created, or has space again. So a new connection begins
        // with one message, and a broker that has refused one gets no more than one at a time.
        let window = std::mem::replace(&mut self.window, 1).min(records.len());
        let outcome = self.publish(&open.channel, &records[..window]).await;
        if outcome.failure.is_none() {
            self.window = if self.has_refused { 1 } else { (window * 2).min(WINDOW) };
            self.open = Some(open);
        }
        outcome
    }
}
