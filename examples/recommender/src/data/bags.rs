//! Many small lists in two flat arrays: the layout an embedding bag reads.
//!
//! Bag `i` is `indices[offsets[i]..offsets[i + 1]]`. The same type holds a movie's genres, its title words, a user's
//! single occupation (a bag of one) and the list of movies a user has seen.

/// `offsets` always starts at 0, never decreases and ends at `indices.len()`.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct Bags {
    indices: Vec<u32>,
    offsets: Vec<u32>,
}

impl Default for Bags {
    fn default() -> Self {
        Self {
            indices: Vec::new(),
            offsets: vec![0],
        }
    }
}

impl Bags {
    /// Bags from stored arrays; `None` if those do not describe bags.
    pub fn from_parts(indices: Vec<u32>, offsets: Vec<u32>) -> Option<Self> {
        let ends = offsets.first() == Some(&0)
            && offsets.last().map(|&last| last as usize) == Some(indices.len());
        (ends && offsets.is_sorted()).then_some(Self { indices, offsets })
    }

    /// Bags of a single index each.
    pub fn of_one_each(indices: Vec<u32>) -> Self {
        let offsets = (0..=indices.len() as u32).collect();
        Self { indices, offsets }
    }

    /// The contents of all bags, one bag after the other.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The start of each bag in the indices, and the end of the last one.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// The number of bags.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are no bags.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The contents of bag `i`.
    pub fn bag(&self, i: usize) -> &[u32] {
        &self.indices[self.offsets[i] as usize..self.offsets[i + 1] as usize]
    }

    /// Appends a bag.
    pub fn push(&mut self, bag: impl IntoIterator<Item = u32>) {
        self.indices.extend(bag);
        self.offsets.push(self.indices.len() as u32);
    }

    /// Appends other bags.
    pub fn append(&mut self, other: &Self) {
        let start = self.indices.len() as u32;
        self.indices.extend(&other.indices);
        let ends = other.offsets[1..].iter();
        self.offsets.extend(ends.map(|end| start + end));
    }

    /// Replaces every index.
    pub fn map(&mut self, replace: impl Fn(u32) -> u32) {
        self.indices.iter_mut().for_each(|i| *i = replace(*i));
    }

    /// The bags of `rows`, one after the other, as a batch for an embedding bag.
    pub fn gather(&self, rows: &[u32]) -> Self {
        let mut gathered = Self::default();
        for &row in rows {
            gathered.push(self.bag(row as usize).iter().copied());
        }
        gathered
    }
}

/// The bags of several lists of bags, one list after the other.
impl<'a> FromIterator<&'a Bags> for Bags {
    fn from_iter<I: IntoIterator<Item = &'a Bags>>(lists: I) -> Self {
        let mut all = Self::default();
        lists.into_iter().for_each(|bags| all.append(bags));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bags(lists: &[&[u32]]) -> Bags {
        let mut bags = Bags::default();
        lists
            .iter()
            .for_each(|list| bags.push(list.iter().copied()));
        bags
    }

    #[test]
    fn gather_repeats_and_reorders() {
        let gathered = bags(&[&[7], &[], &[1, 2, 3]]).gather(&[2, 1, 0, 2]);
        assert_eq!(gathered.indices(), [1, 2, 3, 7, 1, 2, 3]);
        assert_eq!(gathered.offsets(), [0, 3, 3, 4, 7]);
    }

    #[test]
    fn lists_are_joined() {
        let lists = [bags(&[&[7], &[]]), bags(&[]), bags(&[&[1, 2]])];
        assert_eq!(lists.iter().collect::<Bags>(), bags(&[&[7], &[], &[1, 2]]));
    }

    #[test]
    fn parts_that_are_no_bags_are_refused() {
        assert_eq!(
            Bags::from_parts(vec![5, 6], vec![0, 1, 2]),
            Some(bags(&[&[5], &[6]]))
        );
        for offsets in [vec![], vec![1, 2], vec![0, 1], vec![0, 3], vec![0, 2, 1, 2]] {
            assert_eq!(Bags::from_parts(vec![5, 6], offsets), None);
        }
    }
}
