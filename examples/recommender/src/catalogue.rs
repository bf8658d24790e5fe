//! What changes for those who ask when one model takes the place of another.

use std::fmt;

use crate::saved::Recommender;

/// How the movies of a model differ from those of another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Change {
    /// Movies that the other did not have.
    pub added: usize,
    /// Movies of the other that are gone.
    pub removed: usize,
    /// Whether ids may stand for other titles than before.
    pub retitled: bool,
}

impl Change {
    /// From the movies of `old` to those of `new`; `None` if they are the same.
    pub fn between(old: &Recommender, new: &Recommender) -> Option<Self> {
        let (before, after) = (&old.catalog.movies, &new.catalog.movies);
        let missing = |from: &[i64], ids: &[i64]| {
            let ids = ids.iter();
            ids.filter(|id| from.binary_search(id).is_err()).count()
        };
        let catalogue = |model: &Recommender| model.about.as_ref()?.catalogue.clone();
        let change = Self {
            added: missing(&before.ids, &after.ids),
            removed: missing(&after.ids, &before.ids),
            retitled: catalogue(old) != catalogue(new),
        };
        (change.added > 0 || change.removed > 0 || change.retitled).then_some(change)
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { added, removed, .. } = self;
        match (added, removed) {
            (0, 0) => write!(f, "the same movie ids with other titles"),
            _ => write!(f, "{added} movies added, {removed} removed"),
        }
    }
}
