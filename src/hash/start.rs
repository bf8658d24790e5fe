//! What the families share whose blocks start at any slot: a place is the first slot of a block, and there are no signs.
//!
//! Affine and LMA are one type here, so that the CPU loops are compiled once for both.

use super::affine::{AffineBlock, AffineRows};
use super::lma::{LmaBlock, LmaRows};
use super::Locate;

#[derive(Debug, Clone, Copy)]
pub(crate) enum StartRows<'a> {
    Affine(AffineRows),
    Lma(LmaRows<'a>),
}

/// The constants of a column block, of the family that made them.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StartColumns {
    Affine(AffineBlock),
    Lma(LmaBlock),
}

impl Locate for StartRows<'_> {
    type ColumnBlock = StartColumns;
    type Place = u64;
    const SIGNED: bool = false;

    #[inline(always)]
    fn block(&self) -> usize {
        match self {
            Self::Affine(rows) => rows.block(),
            Self::Lma(rows) => rows.block(),
        }
    }

    fn column_block(&self, number: u64) -> StartColumns {
        match self {
            Self::Affine(rows) => StartColumns::Affine(rows.column_block(number)),
            Self::Lma(rows) => StartColumns::Lma(rows.column_block(number)),
        }
    }

    #[inline(always)]
    fn locate(
        &self,
        rows: &[u64],
        column_blocks: &[StartColumns],
        places: &mut [u64],
        _: &mut [u32],
    ) {
        let columns = column_blocks.iter();
        match self {
            Self::Affine(hash) => {
                let columns = columns.filter_map(|columns| match columns {
                    StartColumns::Affine(columns) => Some(columns),
                    StartColumns::Lma(_) => None,
                });
                hash.locate(rows, columns, places);
            }
            Self::Lma(hash) => {
                let columns = columns.filter_map(|columns| match columns {
                    StartColumns::Lma(columns) => Some(columns),
                    StartColumns::Affine(_) => None,
                });
                hash.locate(rows, columns, places);
            }
        }
    }

    #[inline(always)]
    fn slot(&self, place: u64, _: usize) -> usize {
        place as usize
    }

    #[inline(always)]
    fn last_place(&self) -> u64 {
        match self {
            Self::Affine(rows) => rows.last_place(),
            Self::Lma(rows) => rows.last_place(),
        }
    }
}
