//! The table of kernel instances: every CUDA kernel of this crate, with the threads it is compiled for, and its name.
//!
//! `build.rs` writes the CUDA sources from [`all`], and [`plan`](super::plan) chooses among [`BagKernel::candidates`]. Since
//! `build.rs` includes this file, it uses only the standard library.
//!
//! A pass over bags is compiled for each family of hashes, dtype of `hashed_weight` and pooling, and for several ways to
//! share a row among threads. [`Module`] says which kernels are compiled and loaded together.

/// The widest memory access of a thread, in bytes.
pub const WIDEST_ACCESS: usize = 16;
/// Threads of a warp.
pub const WARP: usize = 32;

/// The kind of hash a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Affine,
    Mix,
    Balanced,
    Lma,
    /// Aligned blocks that depend on a row tensor: the semantic family and slot tables.
    RowBlocks,
}

/// A dtype of `hashed_weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F16,
    Bf16,
    F32,
    F64,
    /// Packed bytes in 8 or 4 bits, which give f32 and have no gradient.
    Bits8,
    Bits4,
}

/// What a kernel computes for every bag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    Forward,
    /// `grad_weight`, summed in floats in the order in which threads happen to add.
    Backward,
    /// `grad_weight`, summed in fixed point: the same bits in every run.
    BackwardFixedPoint,
    BackwardPerSampleWeights,
}

/// How the rows of a bag are pooled. Mode mean is `Sum`, with a flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pooling {
    Sum,
    /// The sum of the rows, each times its per-sample weight.
    Weighted,
    Max,
}

/// A kernel that walks through bags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BagKernel {
    pub pass: Pass,
    pub family: Family,
    pub dtype: Dtype,
    pub pooling: Pooling,
    /// Consecutive columns per thread. If there are several, they are loaded in one access, and `hashed_weight` must be aligned
    /// to [`WIDEST_ACCESS`].
    pub width: usize,
    /// Neighbouring threads that share their hashes. Their columns must lie in one block: `width * share` divides the block.
    pub share: usize,
    /// Compiled for plain bags: of equal length, at most [`LONG_BAG`](super::abi::LONG_BAG), of one feature, without padding.
    pub plain: bool,
}

/// How an optimiser updates a value; see `src/optim/rules.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    AdamW,
    Adagrad,
    Sgd,
    Momentum,
    SparseAdam,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    Bags(BagKernel),
    /// The largest finite magnitude of a tensor, which determines the unit of fixed-point sums.
    LargestMagnitude(Dtype),
    /// Converts fixed-point sums to floats of the dtype.
    FromFixedPoint(Dtype),
    CheckBounds,
    CopyI32,
    /// An optimiser step, for parameters of the dtype.
    OptimizerStep(Rule, Dtype),
    /// The same with a sparse gradient, for the rules of [`Rule::SPARSE`].
    SparseOptimizerStep(Rule, Dtype),
}

/// Kernels that are compiled and loaded together. There are several modules, so that a process only loads the dtypes and families
/// that it uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Module {
    /// `Backward` holds the gradients of `per_sample_weights` as well.
    Bags(Pass, Family, Dtype),
    FixedPoint,
    Bounds,
    Contiguous,
    Optimizer(Dtype),
}

impl Family {
    pub const ALL: [Self; 5] = [
        Self::Affine,
        Self::Mix,
        Self::Balanced,
        Self::Lma,
        Self::RowBlocks,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mix => "mix",
            Self::Balanced => "balanced",
            Self::Lma => "lma",
            Self::RowBlocks => "row_blocks",
        }
    }
}

impl Dtype {
    pub const FLOATS: [Self; 4] = [Self::F16, Self::Bf16, Self::F32, Self::F64];
    pub const LOW_BITS: [Self; 2] = [Self::Bits8, Self::Bits4];

    fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bits8 => "bits8",
            Self::Bits4 => "bits4",
        }
    }

    /// Bits of a value.
    pub fn bits(self) -> usize {
        match self {
            Self::Bits4 => 4,
            Self::Bits8 => 8,
            Self::F16 | Self::Bf16 => 16,
            Self::F32 => 32,
            Self::F64 => 64,
        }
    }

    /// How many values the widest access takes.
    pub fn widest(self) -> usize {
        8 * WIDEST_ACCESS / self.bits()
    }

    pub fn is_low_bit(self) -> bool {
        Self::LOW_BITS.contains(&self)
    }

    /// The dtype in which values of this one are summed.
    pub fn accumulator(self) -> Self {
        match self {
            Self::F16 | Self::Bf16 | Self::F32 | Self::Bits8 | Self::Bits4 => Self::F32,
            Self::F64 => Self::F64,
        }
    }
}

impl Pass {
    pub const ALL: [Self; 4] = [
        Self::Forward,
        Self::Backward,
        Self::BackwardFixedPoint,
        Self::BackwardPerSampleWeights,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::BackwardFixedPoint => "backward_fixed_point",
            Self::BackwardPerSampleWeights => "backward_per_sample_weights",
        }
    }

    fn poolings(self) -> &'static [Pooling] {
        match self {
            Self::BackwardPerSampleWeights => &[Pooling::Weighted],
            _ => &[Pooling::Sum, Pooling::Weighted, Pooling::Max],
        }
    }
}

impl Pooling {
    fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Weighted => "weighted",
            Self::Max => "max",
        }
    }
}

impl Rule {
    pub const ALL: [Self; 5] = [
        Self::AdamW,
        Self::Adagrad,
        Self::Sgd,
        Self::Momentum,
        Self::SparseAdam,
    ];

    /// Those that change nothing where the gradient is zero.
    pub const SPARSE: [Self; 3] = [Self::Adagrad, Self::Sgd, Self::SparseAdam];

    fn name(self) -> &'static str {
        match self {
            Self::AdamW => "adamw",
            Self::Adagrad => "adagrad",
            Self::Sgd => "sgd",
            Self::Momentum => "momentum",
            Self::SparseAdam => "sparse_adam",
        }
    }
}

impl BagKernel {
    /// The kernels for one pass, family and dtype.
    pub fn candidates(pass: Pass, family: Family, dtype: Dtype) -> Vec<Self> {
        if dtype.is_low_bit() && pass != Pass::Forward {
            return vec![];
        }
        // Gradients are added in the accumulator's dtype.
        let widest = match pass {
            Pass::Backward | Pass::BackwardFixedPoint => dtype.accumulator().widest(),
            Pass::Forward | Pass::BackwardPerSampleWeights => dtype.widest(),
        };
        let mut candidates = vec![];
        for &pooling in pass.poolings() {
            let shapes: &[(usize, usize)] = match (family, pass, pooling) {
                // Blocks are not aligned.
                (Family::Affine | Family::Lma, ..) => &[(1, 1)],
                // Every thread hashes for itself.
                (_, Pass::BackwardPerSampleWeights, _) => &[(1, 1), (widest, 1)],
                // Integers are added one by one. Each thread has one column, so that a warp adds to neighbouring slots in one
                // access. (Four columns per thread take 1.6 times as long.) For max there are few additions, so it uses the
                // same shapes as in floats.
                (_, Pass::BackwardFixedPoint, Pooling::Sum | Pooling::Weighted) => {
                    &[(1, 1), (1, 4)]
                }
                // In 8 bits the widest access. In 4 bits, twice as many columns per thread take so many registers that fewer loads
                // are in flight, and 1.02 times as long.
                _ if dtype.is_low_bit() => &[(1, 1), (16, 1), (16, 2)],
                // Two threads that share a hash gain little over one or four, and each shape costs every build time.
                (Family::RowBlocks, ..) => &[(1, 1), (widest, 1), (widest, 4)],
                _ => &[(1, 1), (widest, 1), (widest, 2), (widest, 4)],
            };
            let has_plain = match family {
                Family::Affine | Family::Lma | Family::Mix => false,
                Family::Balanced => pooling != Pooling::Weighted,
                Family::RowBlocks => pooling == Pooling::Sum,
            };
            for &(width, share) in shapes {
                let kernel = Self {
                    pass,
                    family,
                    dtype,
                    pooling,
                    width,
                    share,
                    plain: false,
                };
                candidates.push(kernel);
                if pass == Pass::Forward && has_plain && width > 1 {
                    candidates.push(Self {
                        plain: true,
                        ..kernel
                    });
                }
            }
        }
        candidates
    }

    fn name(self) -> String {
        let Self { width, share, .. } = self;
        format!(
            "{}_{}_{}_{}_width{width}_share{share}{}",
            self.pass.name(),
            self.pooling.name(),
            self.family.name(),
            self.dtype.name(),
            if self.plain { "_plain" } else { "" }
        )
    }

    /// Thread blocks that must fit on a multiprocessor at once. This limits the registers per thread, so that many loads are in
    /// flight. 16-bit values are loaded eight at a time and need more registers; low bits need more still.
    pub fn blocks_per_multiprocessor(self) -> Option<usize> {
        match (self.pass, self.dtype) {
            (Pass::Forward, Dtype::F16 | Dtype::Bf16) => Some(7),
            (Pass::Forward, Dtype::F32 | Dtype::F64) => Some(8),
            _ => None,
        }
    }
}

impl Kernel {
    /// The name of the kernel's entry point.
    pub fn name(self) -> String {
        let name = match self {
            Self::Bags(kernel) => kernel.name(),
            Self::LargestMagnitude(dtype) => format!("largest_magnitude_{}", dtype.name()),
            Self::FromFixedPoint(dtype) => format!("from_fixed_point_{}", dtype.name()),
            Self::CheckBounds => "check_bounds".into(),
            Self::CopyI32 => "copy_i32".into(),
            Self::OptimizerStep(rule, dtype) => format!("{}_{}", rule.name(), dtype.name()),
            Self::SparseOptimizerStep(rule, dtype) => {
                format!("{}_of_sparse_{}", rule.name(), dtype.name())
            }
        };
        format!("hashed_embedding_bag_{name}")
    }

    /// Threads of a block.
    pub fn threads(self) -> usize {
        match self {
            // Few, so that the next thread block starts as soon as one is done.
            Self::Bags(BagKernel {
                pass: Pass::Forward,
                ..
            }) => 128,
            Self::Bags(BagKernel {
                pooling: Pooling::Max,
                ..
            })
            | Self::OptimizerStep(..)
            | Self::SparseOptimizerStep(..) => 256,
            // Many, because they share the cached sums of frequent slots.
            _ => 512,
        }
    }

    pub fn module(self) -> Module {
        match self {
            Self::Bags(kernel) => {
                let pass = match kernel.pass {
                    Pass::BackwardPerSampleWeights => Pass::Backward,
                    pass => pass,
                };
                Module::Bags(pass, kernel.family, kernel.dtype)
            }
            Self::LargestMagnitude(_) | Self::FromFixedPoint(_) => Module::FixedPoint,
            Self::CheckBounds => Module::Bounds,
            Self::CopyI32 => Module::Contiguous,
            Self::OptimizerStep(_, dtype) | Self::SparseOptimizerStep(_, dtype) => {
                Module::Optimizer(dtype)
            }
        }
    }
}

impl Module {
    /// The stem of the module's files.
    pub fn name(self) -> String {
        match self {
            Self::Bags(pass, family, dtype) => {
                format!("{}_{}_{}", pass.name(), family.name(), dtype.name())
            }
            Self::FixedPoint => "fixed_point".into(),
            Self::Bounds => "bounds".into(),
            Self::Contiguous => "contiguous".into(),
            Self::Optimizer(dtype) => format!("optimizer_{}", dtype.name()),
        }
    }
}

/// Every kernel of this crate.
pub fn all() -> Vec<Kernel> {
    let mut kernels = vec![Kernel::CheckBounds, Kernel::CopyI32];
    kernels.extend(Dtype::FLOATS.map(Kernel::LargestMagnitude));
    kernels.extend([Dtype::F32, Dtype::F64].map(Kernel::FromFixedPoint));
    for dtype in Dtype::FLOATS {
        kernels.extend(Rule::ALL.map(|rule| Kernel::OptimizerStep(rule, dtype)));
        kernels.extend(Rule::SPARSE.map(|rule| Kernel::SparseOptimizerStep(rule, dtype)));
    }
    for family in Family::ALL {
        for dtype in Dtype::FLOATS.into_iter().chain(Dtype::LOW_BITS) {
            for pass in Pass::ALL {
                let candidates = BagKernel::candidates(pass, family, dtype);
                kernels.extend(candidates.into_iter().map(Kernel::Bags));
            }
        }
    }
    kernels
}
