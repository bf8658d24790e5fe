//! How `indices` are divided into bags, by a fixed length or by offsets, and which table each bag looks into.
//!
//! `kernels/bags.cuh` divides them in the same way on the GPU.

use crate::error::bail;
use candle_core::Result;
use std::ops::Range;

/// An index dtype.
pub(crate) trait Index: Copy + Send + Sync {
    fn as_i64(self) -> i64;
}

impl Index for u32 {
    fn as_i64(self) -> i64 {
        self.into()
    }
}

impl Index for i32 {
    fn as_i64(self) -> i64 {
        self.into()
    }
}

impl Index for i64 {
    fn as_i64(self) -> i64 {
        self
    }
}

/// The order of the jagged bags of several features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JaggedLayout {
    /// All bags of the first feature, then all of the second, as in TorchRec's `KeyedJaggedTensor`: the bag of sample `b` and
    /// feature `f` is number `f * batch + b`.
    FeatureMajor,
    /// The bags of the first sample, then those of the second: the bag of sample `b` and feature `f` is number
    /// `b * features + f`.
    BatchMajor,
}

/// The division of `nnz` indices into `num_bags` bags, as far as the shapes determine it.
///
/// Bags are numbered in the order of the output: bag `bag` is one of feature `bag % features`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BagShape {
    pub nnz: usize,
    pub num_bags: usize,
    pub features: usize,
    pub division: Division,
    /// For jagged bags in feature-major order, the number of bags of each feature; 0 for any other division.
    pub feature_stride: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Division {
    /// Every bag holds this many indices.
    Fixed(usize),
    /// Bag number `b` in `layout` holds the indices from `offsets[b]` to `offsets[b + 1]`, or to `nnz` if there is no
    /// `offsets[b + 1]`.
    Offsets {
        include_last_offset: bool,
        layout: JaggedLayout,
    },
}

/// A bag: its number in the output, and its feature and sample. From one bag to the next no division is needed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bag {
    pub number: usize,
    pub feature: usize,
    sample: usize,
}

impl BagShape {
    /// Bags of 2-D `indices` of shape `(num_bags, bag_len)`.
    pub fn fixed(num_bags: usize, bag_len: usize, features: usize) -> Result<Self> {
        let Some(nnz) = num_bags.checked_mul(bag_len) else {
            bail!("indices of shape [{num_bags}, {bag_len}] are too many");
        };
        Ok(Self {
            nnz,
            num_bags,
            features,
            division: Division::Fixed(bag_len),
            feature_stride: 0,
        })
    }

    /// Bags of 1-D `indices`, divided by `num_offsets` offsets.
    pub fn ragged(
        nnz: usize,
        num_offsets: usize,
        include_last_offset: bool,
        features: usize,
        layout: JaggedLayout,
    ) -> Result<Self> {
        let num_bags = if include_last_offset {
            match num_offsets.checked_sub(1) {
                Some(num_bags) => num_bags,
                None => bail!(
                    "offsets must hold num_bags + 1 values when include_last_offset is set, got none"
                ),
            }
        } else {
            num_offsets
        };
        if !num_bags.is_multiple_of(features) {
            bail!(
                "offsets must tell the same number of bags for each of {features} features, got {num_offsets} offsets with \
                 include_last_offset = {include_last_offset}"
            );
        }
        Ok(Self {
            nnz,
            num_bags,
            features,
            division: Division::Offsets {
                include_last_offset,
                layout,
            },
            feature_stride: match layout {
                JaggedLayout::FeatureMajor if features > 1 => num_bags / features,
                _ => 0,
            },
        })
    }

    /// The length of every bag, if it is fixed.
    pub fn bag_len(&self) -> Option<usize> {
        match self.division {
            Division::Fixed(bag_len) => Some(bag_len),
            Division::Offsets { .. } => None,
        }
    }

    pub fn bag(&self, number: usize) -> Bag {
        Bag {
            number,
            feature: number % self.features,
            sample: number / self.features,
        }
    }

    /// The next bag.
    #[inline(always)]
    pub fn after(&self, bag: Bag) -> Bag {
        let Bag {
            number,
            feature,
            sample,
        } = bag;
        let number = number + 1;
        match feature + 1 == self.features {
            true => Bag {
                number,
                feature: 0,
                sample: sample + 1,
            },
            false => Bag {
                number,
                feature: feature + 1,
                sample,
            },
        }
    }

    /// The indices of `bag`, clamped into `0..nnz` whatever the offsets say.
    pub fn range<O: Index>(&self, bag: Bag, offsets: &[O]) -> Range<usize> {
        match self.division {
            Division::Fixed(bag_len) => bag.number * bag_len..(bag.number + 1) * bag_len,
            Division::Offsets { .. } => {
                let clamp = |offset: O| offset.as_i64().clamp(0, self.nnz as i64) as usize;
                let number = match self.feature_stride {
                    0 => bag.number,
                    stride => bag.feature * stride + bag.sample,
                };
                let start = clamp(offsets[number]);
                let end = offsets.get(number + 1).map_or(self.nnz, |&end| clamp(end));
                start..end.max(start)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bounds::check_offsets;

    fn ragged(nnz: usize, num_offsets: usize, include_last_offset: bool) -> BagShape {
        let layout = JaggedLayout::BatchMajor;
        BagShape::ragged(nnz, num_offsets, include_last_offset, 1, layout).unwrap()
    }

    /// Positions past 2^32, without allocating tensors of that size.
    #[test]
    fn bags_lie_past_32_bits() {
        let fixed = BagShape::fixed((1 << 33) + 1, 3, 1).unwrap();
        assert_eq!(fixed.nnz, 3 * (1 << 33) + 3);
        assert_eq!(
            fixed.range::<i64>(fixed.bag(1 << 33), &[]),
            3 << 33..(3 << 33) + 3
        );

        let (a, b) = ((1i64 << 31) + 1, (1i64 << 33) + 5);
        let (start, middle) = (a as usize, b as usize);
        let nnz = (1 << 40) + 7;
        let bags = ragged(nnz, 3, false);
        assert_eq!(bags.range(bags.bag(0), &[0, a, b]), 0..start);
        assert_eq!(bags.range(bags.bag(1), &[0, a, b]), start..middle);
        assert_eq!(bags.range(bags.bag(2), &[0, a, b]), middle..nnz);
        assert_eq!(
            bags.range(bags.bag(1), &[0u32, u32::MAX, 7]),
            u32::MAX as usize..u32::MAX as usize
        );
        assert_eq!(
            bags.range(bags.bag(0), &[0u32, u32::MAX, 7]),
            0..u32::MAX as usize
        );
        let last = ragged(nnz, 3, true);
        assert_eq!(
            (last.num_bags, last.range(last.bag(1), &[0, a, b])),
            (2, start..middle)
        );
        assert!(check_offsets(&[0, a, nnz as i64], nnz).is_ok());
        assert!(check_offsets(&[0, a, nnz as i64 + 1], nnz).is_err());
    }

    /// Whatever the offsets say, a bag lies within the indices.
    #[test]
    fn offsets_are_clamped() {
        for nnz in [0, 1, 5] {
            let bags = ragged(nnz, 2, true);
            for start in [i64::MIN, -1, 0, 1, 4, 5, 6, 1 << 32, i64::MAX] {
                for end in [i64::MIN, -1, 0, 1, 4, 5, 6, 1 << 32, i64::MAX] {
                    let range = bags.range(bags.bag(0), &[start, end]);
                    assert!(
                        range.start <= range.end && range.end <= nnz,
                        "{start} {end}"
                    );
                }
            }
        }
    }
}
