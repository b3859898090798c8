//! Header fields, wherever they are kept.

use http::HeaderMap;

/// Looks up header fields: in a map, or in a head that was parsed and not copied.
pub trait Fields {
    /// The values of a field, whose name is given in lower case, in the order in which they stand.
    fn values<'a>(&'a self, name: &'static str) -> impl DoubleEndedIterator<Item = &'a [u8]>;

    /// The value of a field that may stand there once. Of two, none counts.
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
