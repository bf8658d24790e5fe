//! The structs that kernels take by value, and assertions that they have the layouts in [`abi`](super::abi). Those of hashes are
//! in `crate::hash`.

use super::abi::{self, IndexType, StructLayout, MAX_RANK};
use crate::hash::{AffineSlots, BlockSlots, Divisor, LmaSlots};

/// How `nnz` indices are divided into bags, and how threads are divided among the bags; see kernels/bags.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct BagParams {
    pub nnz: i64,
    pub num_bags: i64,
    /// 0: bags of `bag_len` indices
    pub num_offsets: i64,
    pub bag_len: i64,
    pub padding_idx: i64,
    pub first_row: i64,
    pub num_embeddings: i64,
    pub feature_stride: i64,
    pub features: Divisor,
    pub has_padding: u32,
    pub lanes: u32,
    pub bags_per_group: u32,
    pub index_type: IndexType,
    pub offset_type: IndexType,
}

/// What a hash reads of each row, and how; see kernels/hash.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct RowTensor {
    /// The address of the signatures or of the slot table.
    pub rows: u64,
    pub last_row: u64,
    /// Of the semantic family, the bits of the keys that column block 0 selects.
    pub keys: u64,
    pub key_bits: u32,
    /// The column blocks of a row of a slot table; 0 for signatures.
    pub row_len: u32,
}

/// A bound hash followed by its row tensor.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WithRows<S> {
    pub slots: S,
    pub rows: RowTensor,
}

/// The shape and strides of a tensor, in elements; see kernels/contiguous.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Strides {
    pub dims: [i64; MAX_RANK],
    pub strides: [i64; MAX_RANK],
    pub rank: u32,
}

/// Whether a struct of `size` bytes with `fields` has this layout.
const fn is_laid_out(layout: &StructLayout, size: usize, fields: &[(&str, usize)]) -> bool {
    if layout.size != size || layout.fields.len() != fields.len() {
        return false;
    }
    let mut i = 0;
    while i < fields.len() {
        let (want, got) = (layout.fields[i], fields[i]);
        if want.1 != got.1 || !is_equal(want.0.as_bytes(), got.0.as_bytes()) {
            return false;
        }
        i += 1;
    }
    true
}

const fn is_equal(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// Fails to compile unless the struct has the layout.
macro_rules! assert_layout {
    ($struct:ident, $layout:expr, $($field:ident),+) => {
        const _: () = assert!(is_laid_out(
            &$layout,
            size_of::<$struct>(),
            &[$((stringify!($field), std::mem::offset_of!($struct, $field))),+],
        ));
    };
}

assert_layout!(Divisor, abi::DIVISOR, value, reciprocal);
assert_layout!(
    BlockSlots,
    abi::BLOCK_SLOTS,
    key,
    reciprocal,
    num_blocks,
    block,
    sign_mask,
    stride
);
assert_layout!(
    AffineSlots,
    abi::AFFINE_SLOTS,
    a,
    b,
    c,
    modulus,
    starts,
    block
);
assert_layout!(
    LmaSlots,
    abi::LMA_SLOTS,
    a,
    b,
    c,
    modulus,
    starts,
    positions,
    selectors,
    key_bits,
    keys_to_use,
    block
);
assert_layout!(
    RowTensor,
    abi::ROW_TENSOR,
    rows,
    last_row,
    keys,
    key_bits,
    row_len
);
assert_layout!(
    BagParams,
    abi::BAG_PARAMS,
    nnz,
    num_bags,
    num_offsets,
    bag_len,
    padding_idx,
    first_row,
    num_embeddings,
    feature_stride,
    features,
    has_padding,
    lanes,
    bags_per_group,
    index_type,
    offset_type
);
assert_layout!(Strides, abi::STRIDES, dims, strides, rank);
