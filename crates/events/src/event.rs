//! A CloudEvent about a blob.

use castier_config::EventKind;
use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// What happened to a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was newly stored through this node.
    Stored,
    /// It was deleted through this node.
    Deleted,
    /// Bytes that came for it were wrong.
    Corrupt(CorruptSource),
}

/// Who gave wrong bytes: the label `source` of `castier_corrupt_blobs_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CorruptSource {
    /// The origin.
    Origin,
    /// Another node.
    Peer,
    /// This node's disk.
    Disk,
    /// The client that uploaded.
    Client,
}

const TYPES: [(EventKind, &str); 3] = [
    (EventKind::Stored, "dev.castier.blob.stored"),
    (EventKind::Deleted, "dev.castier.blob.deleted"),
    (EventKind::Corrupt, "dev.castier.blob.corrupt"),
];

/// A CloudEvent 1.0. Its JSON is what the journal holds, and what receivers get.
#[derive(Debug, Serialize)]
pub struct Event<'e> {
    specversion: &'static str,
    id: &'e str,
    source: String,
    #[serde(rename = "type")]
    kind: &'static str,
    subject: &'e str,
    time: String,
    datacontenttype: &'static str,
    data: Data<'e>,
}

#[derive(Debug, Serialize)]
struct Data<'e> {
    digest: &'e str,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    node: &'e str,
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<&'e str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<CorruptSource>,
}

impl<'e> Event<'e> {
    /// An event. `digest`: 64 hexadecimal characters. `size`: `None` if it is not known. `client`: the name of the client, if it is known.
    /// `id`: unique among all events of all nodes, and the same each time that this event is delivered.
    pub fn new(
        kind: Kind,
        digest: &'e str,
        size: Option<u64>,
        node: &'e str,
        client: Option<&'e str>,
        time: SystemTime,
        id: &'e str,
    ) -> Self {
        let (kind, source) = match kind {
            Kind::Stored => (EventKind::Stored, None),
            Kind::Deleted => (EventKind::Deleted, None),
            Kind::Corrupt(source) => (EventKind::Corrupt, Some(source)),
        };
        let kind = TYPES.iter().find(|(known, _)| *known == kind).map_or("", |(_, name)| name);
        Self {
            specversion: "1.0",
            id,
            source: format!("/castier/{node}"),
            kind,
            subject: digest,
            time: humantime::format_rfc3339_millis(time).to_string(),
            datacontenttype: "application/json",
            data: Data { digest, size, node, client, source },
        }
    }

    /// The JSON of the event, in one line.
    pub fn to_json(&self) -> Vec<u8> {
        // Cannot fail: there is no map, and every text is Unicode.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// What a dispatcher needs to know of an event in the journal.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Envelope {
    pub(crate) id: String,
    /// `None`: a type that this version does not know.
    pub(crate) kind: Option<EventKind>,
    pub(crate) time: SystemTime,
}

impl Envelope {
    /// `None` if this is no event.
    pub(crate) fn of(json: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Fields {
            id: String,
            #[serde(rename = "type")]
            kind: String,
            time: String,
        }
        let fields: Fields = serde_json::from_slice(json).ok()?;
        Some(Self {
            id: fields.id,
            kind: TYPES.iter().find(|(_, name)| *name == fields.kind).map(|(kind, _)| *kind),
            time: humantime::parse_rfc3339(&fields.time).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::time::Duration;

    #[test]
    fn events_are_cloud_events() {
        let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let read = |event: Event<'_>| serde_json::from_slice::<Value>(&event.to_json()).unwrap();
        let stored = Event::new(Kind::Stored, digest, Some(7), "10.0.0.7:8081", Some("ci"), time, "a-1");
        assert_eq!(
            Envelope::of(&stored.to_json()),
            Some(Envelope { id: "a-1".into(), kind: Some(EventKind::Stored), time }),
            "a dispatcher reads what was written"
        );
        assert_eq!(
            read(stored),
            json!({
                "specversion": "1.0", "id": "a-1", "source": "/castier/10.0.0.7:8081", "type": "dev.castier.blob.stored", "subject": digest,
                "time": "2023-11-14T22:13:20.123Z", "datacontenttype": "application/json",
                "data": {"digest": digest, "size": 7, "node": "10.0.0.7:8081", "client": "ci"},
            })
        );
        let corrupt = read(Event::new(Kind::Corrupt(CorruptSource::Peer), digest, None, "n", None, time, "a-2"));
        assert_eq!(corrupt["type"], "dev.castier.blob.corrupt");
        assert_eq!(corrupt["data"], json!({"digest": digest, "node": "n", "source": "peer"}), "what is not known is left out");
        assert_eq!(read(Event::new(Kind::Deleted, digest, None, "n", None, time, "a-3"))["type"], "dev.castier.blob.deleted");
        assert_eq!(Envelope::of(b"{\"id\":\"x\"}"), None);
    }
}
