//! Slot tables: every block of every row wherever a tensor says.

use super::block::BlockSlots;

/// No hash function but a table, the tensor `slot_table` beside `hashed_weight`: u32, `(rows, column_blocks)`, the number of the
/// block of `hashed_weight` that holds a column block of a row. Values have no signs.
///
/// Any allocation can be written as such a table, for example that of SCMA. It takes `4 / block` bytes for each value of the
/// virtual table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotTable {
    /// How many consecutive columns lie side by side, `1..=2^24`. With 1, the table holds slots.
    pub block: usize,
}

impl SlotTable {
    /// Binds it to a length that has passed [`Hash::check_len`](super::Hash::check_len).
    pub(super) fn bind(&self, len: usize) -> BlockSlots {
        BlockSlots::new(0, self.block, false, len, |_| 0)
    }
}
