//! What host and kernels must agree on, besides the [table of kernels](super::instances): constants, and the layouts of the
//! structs that are passed by value.
//!
//! From this file `build.rs` writes `constants.cuh`, which asserts that the CUDA structs have these layouts;
//! [`params`](super::params) asserts the same for the Rust structs. Since `build.rs` includes this file, it uses only the
//! standard library.

/// A bag with more indices than this is shared by a whole thread block.
pub const LONG_BAG: usize = 256;
/// The highest rank of a tensor that the contiguous copy can read.
pub const MAX_RANK: usize = 8;
/// So many slots of a sparse gradient share a mark: one warp updates them, eight values a lane.
pub const TOUCHED_CHUNK: usize = 256;

/// The dtype of indices or offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum IndexType {
    U32,
    I32,
    I64,
}

impl IndexType {
    pub const ALL: [Self; 3] = [Self::U32, Self::I32, Self::I64];
}

/// The memory layout of a struct, in bytes.
pub struct StructLayout {
    /// The name, in Rust as in CUDA.
    pub name: &'static str,
    pub size: usize,
    /// The fields with their offsets.
    pub fields: &'static [(&'static str, usize)],
}

pub const DIVISOR: StructLayout = StructLayout {
    name: "Divisor",
    size: 16,
    fields: &[("value", 0), ("reciprocal", 8)],
};

pub const BLOCK_SLOTS: StructLayout = StructLayout {
    name: "BlockSlots",
    size: 32,
    fields: &[
        ("key", 0),
        ("reciprocal", 8),
        ("num_blocks", 16),
        ("block", 20),
        ("sign_mask", 24),
        ("stride", 28),
    ],
};

pub const AFFINE_SLOTS: StructLayout = StructLayout {
    name: "AffineSlots",
    size: 64,
    fields: &[
        ("a", 0),
        ("b", 8),
        ("c", 16),
        ("modulus", 24),
        ("starts", 40),
        ("block", 56),
    ],
};

pub const LMA_SLOTS: StructLayout = StructLayout {
    name: "LmaSlots",
    size: 248,
    fields: &[
        ("a", 0),
        ("b", 8),
        ("c", 16),
        ("modulus", 24),
        ("starts", 40),
        ("positions", 56),
        ("selectors", 72),
        ("key_bits", 232),
        ("keys_to_use", 236),
        ("block", 240),
    ],
};

pub const ROW_TENSOR: StructLayout = StructLayout {
    name: "RowTensor",
    size: 32,
    fields: &[
        ("rows", 0),
        ("last_row", 8),
        ("keys", 16),
        ("key_bits", 24),
        ("row_len", 28),
    ],
};

pub const BAG_PARAMS: StructLayout = StructLayout {
    name: "BagParams",
    size: 104,
    fields: &[
        ("nnz", 0),
        ("num_bags", 8),
        ("num_offsets", 16),
        ("bag_len", 24),
        ("padding_idx", 32),
        ("first_row", 40),
        ("num_embeddings", 48),
        ("feature_stride", 56),
        ("features", 64),
        ("has_padding", 80),
        ("lanes", 84),
        ("bags_per_group", 88),
        ("index_type", 92),
        ("offset_type", 96),
    ],
};

pub const STRIDES: StructLayout = StructLayout {
    name: "Strides",
    size: 136,
    fields: &[("dims", 0), ("strides", 64), ("rank", 128)],
};

pub const STRUCTS: [&StructLayout; 7] = [
    &DIVISOR,
    &BLOCK_SLOTS,
    &AFFINE_SLOTS,
    &LMA_SLOTS,
    &ROW_TENSOR,
    &BAG_PARAMS,
    &STRIDES,
];
