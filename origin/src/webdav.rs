//! The answer to `PROPFIND`, RFC 4918: what clients such as sccache's ask of a store that they write to.
//!
//! All properties that there are, are told whatever was asked for: clients look for what they know.

use crate::{
    entries::{Member, Members},
    reply::Source,
    store::Fault,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use quick_xml::{
    Writer,
    events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event},
};
use std::{io, mem};

/// How far below the named resource a client wants to look. RFC 4918 knows a third depth, infinity, which a store with
/// millions of entries does not serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The resource alone.
    Itself,
    /// And what is directly below it.
    Members,
}

impl Depth {
    /// None: infinity, which is also what no header means, or nothing sound.
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

/// A `multistatus` document, written as it is read: a collection may have any number of members.
pub(crate) struct Listing {
    writer: Writer<Vec<u8>>,
    /// None: nothing is left to list.
    members: Option<Members>,
    done: bool,
}

impl Listing {
    /// The resource that was asked for, and then its members if they are wanted.
    pub(crate) fn new(resource: &Member, members: Option<Members>) -> Result<Self, Fault> {
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
                        text(writer, "D:getetag", &digest.etag())
                    })?;
                    text(writer, "D:status", "HTTP/1.1 200 OK")
                })
                .map(drop)
        })
        .map(drop)
}
