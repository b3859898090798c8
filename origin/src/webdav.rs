//! The answer to `PROPFIND` (RFC 4918). Clients such as sccache send it before they write.
//!
//! The answer always has all properties, no matter which ones the request names. Clients ignore the others.

use crate::{entries::Member, reply::Source, store::Fault};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use quick_xml::{
    Writer,
    events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event},
};
use std::{io, mem};

/// `Depth`. RFC 4918 has a third value, infinity, which this store refuses: it may have millions of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The resource only.
    Itself,
    /// The resource and its members.
    Members,
}

impl Depth {
    /// `None` for infinity, which is also the default without a header, and for an invalid value.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        match headers.get("depth")?.as_bytes() {
            b"0" => Some(Self::Itself),
            b"1" => Some(Self::Members),
            _ => None,
        }
    }
}

/// The headers of the answer.
pub(crate) fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/xml; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers
}

/// The members of a collection.
type Listed = Box<dyn Iterator<Item = Result<Member, Fault>> + Send>;

/// A `multistatus` document. Made in chunks, since a collection may have any number of members.
pub(crate) struct Listing {
    writer: Writer<Vec<u8>>,
    /// `None`: all members are listed.
    members: Option<Listed>,
    done: bool,
}

impl Listing {
    /// Lists the resource, then its members if there are any to list.
    pub(crate) fn new(resource: &Member, members: Option<Listed>) -> Result<Self, Fault> {
        let mut writer = Writer::new(Vec::new());
        writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("utf-8"), None)))?;
        writer.write_event(Event::Start(BytesStart::new("D:multistatus").with_attributes([("xmlns:D", "DAV:")])))?;
        write(&mut writer, resource)?;
        Ok(Self { writer, members, done: false })
    }
}

impl Source for Listing {
    fn next(&mut self, most: usize) -> Result<Bytes, Fault> {
        while !self.done && self.writer.get_ref().len() < most {
            match self.members.as_mut().and_then(Iterator::next) {
                Some(member) => write(&mut self.writer, &member?)?,
                None => {
                    self.writer.write_event(Event::End(BytesEnd::new("D:multistatus")))?;
                    self.done = true;
                }
            }
        }
        Ok(mem::take(self.writer.get_mut()).into())
    }

    fn is_done(&self) -> bool {
        self.done
    }
}

fn write(writer: &mut Writer<Vec<u8>>, member: &Member) -> io::Result<()> {
    let text = |writer: &mut Writer<Vec<u8>>, name: &str, text: &str| {
        writer.create_element(name).write_text_content(BytesText::new(text)).map(drop)
    };
    writer
        .create_element("D:response")
        .write_inner_content(|writer| {
            text(writer, "D:href", &member.name.href())?;
            writer
                .create_element("D:propstat")
                .write_inner_content(|writer| {
                    writer.create_element("D:prop").write_inner_content(|writer| {
                        text(writer, "D:getlastmodified", &httpdate::fmt_http_date(member.modified))?;
                        let Some((size, digest)) = member.content else {
                            let kind = writer.create_element("D:resourcetype");
                            return kind
                                .write_inner_content(|writer| writer.create_element("D:collection").write_empty().map(drop))
                                .map(drop);
                        };
                        writer.create_element("D:resourcetype").write_empty()?;
                        text(writer, "D:getcontentlength", &size.to_string())?;
                        text(writer, "D:getcontenttype", "application/octet-stream")?;
                        digest.map_or(Ok(()), |digest| text(writer, "D:getetag", &digest.etag()))
                    })?;
                    text(writer, "D:status", "HTTP/1.1 200 OK")
                })
                .map(drop)
        })
        .map(drop)
}
