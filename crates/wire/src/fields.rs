//! Access to header fields, independent of their representation.

use http::HeaderMap;

/// Header fields: a `HeaderMap`, or a parsed head that was not copied.
pub trait Fields {
    /// The values of a field, in their order. `name` is in lower case.
    fn values<'a>(&'a self, name: &'static str) -> impl DoubleEndedIterator<Item = &'a [u8]>;

    /// The value of a field that may occur once; `None` if it is missing or repeated.
    fn the_one<'a>(&'a self, name: &'static str) -> Option<&'a [u8]> {
        let mut values = self.values(name);
        values.next().filter(|_| values.next().is_none())
    }
}

impl Fields for HeaderMap {
    fn values<'a>(&'a self, name: &'static str) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        self.get_all(name).into_iter().map(http::HeaderValue::as_bytes)
    }
}
