//! A document of which some pieces are replaced. Every other byte stays.

use std::ops::Range;

/// A document, and the new one as far as it is made.
pub(crate) struct Edit<'d> {
    document: &'d str,
    edited: String,
    /// How much of the document has been dealt with.
    at: usize,
}

impl<'d> Edit<'d> {
    /// Nothing is replaced yet.
    pub(crate) const fn of(document: &'d str) -> Self {
        Self { document, edited: String::new(), at: 0 }
    }

    /// Replaces a piece. Pieces come in the document's order. A piece that overlaps an earlier one, or does not lie between characters, stays.
    pub(crate) fn replace(&mut self, piece: Range<usize>, new: &str) {
        if let Some(before) = self.document.get(self.at..piece.start)
            && self.document.is_char_boundary(piece.end)
            && piece.start <= piece.end
        {
            self.edited += before;
            self.edited += new;
            self.at = piece.end;
        }
    }

    /// The new document; none if nothing was replaced.
    pub(crate) fn finish(mut self) -> Option<String> {
        if self.at == 0 && self.edited.is_empty() {
            return None;
        }
        self.edited += self.document.get(self.at..).unwrap_or_default();
        Some(self.edited)
    }
}

/// Where `part`, which is a slice of `whole`, stands in it.
pub(crate) fn range_in(whole: &str, part: &str) -> Range<usize> {
    let start = (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize);
    start..start + part.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_replaced() {
        let edited = |pieces: &[(Range<usize>, &str)]| {
            let mut edit = Edit::of("aébc");
            pieces.iter().for_each(|(piece, new)| edit.replace(piece.clone(), new));
            edit.finish()
        };
        assert_eq!(edited(&[]), None);
        assert_eq!(edited(&[(0..0, "x")]).unwrap(), "xaébc");
        assert_eq!(edited(&[(0..1, ""), (3..4, "y")]).unwrap(), "éyc");
        assert_eq!(edited(&[(1..3, "e"), (0..1, "no"), (4..5, "")]).unwrap(), "aeb");
        assert_eq!(edited(&[(2..3, "no"), (0..2, "no"), (9..9, "no")]), None);
        assert_eq!(edited(&[(0..5, "")]).unwrap(), "");
        assert_eq!(range_in("abc", &"abc"[1..2]), 1..2);
    }
}
