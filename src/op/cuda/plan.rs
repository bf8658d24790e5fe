//! Which kernel a call uses, and how its threads are divided among the bags. Nothing here needs a GPU.

use super::abi::LONG_BAG;
use super::instances::{BagKernel, Dtype, Family, Kernel, Pass, Pooling, WARP};
use crate::bags::Division;
use crate::hash::Slots;
use crate::op::{Gradient, Lookup, Mode};

/// The most thread blocks along y; kernels loop over whatever is beyond.
const MAX_GRID_Y: usize = 65_535;
/// The most thread blocks that [`strided_blocks`] gives.
const MAX_STRIDED_BLOCKS: usize = 2048;

impl Family {
    pub fn of(slots: &Slots) -> Self {
        match slots {
            Slots::Affine(_) => Self::Affine,
            Slots::Mix(_) => Self::Mix,
            Slots::Balanced(_) => Self::Balanced,
            Slots::Lma(_) => Self::Lma,
            Slots::Semantic(..) | Slots::SlotTable(_) => Self::RowBlocks,
        }
    }
}

impl Pass {
    /// The pass that computes `grad_weight`.
    pub fn grad_weight(gradient: Gradient) -> Self {
        match gradient {
            Gradient::Fastest => Self::Backward,
            Gradient::Deterministic => Self::BackwardFixedPoint,
        }
    }
}

/// The launch of a pass over bags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    pub kernel: BagKernel,
    /// Threads per group, which share a bag: a power of two.
    pub lanes: usize,
    /// Consecutive bags per group.
    pub bags_per_group: usize,
    /// Thread blocks along x, for consecutive bags.
    pub bag_blocks: usize,
    /// Thread blocks along y, for consecutive columns.
    pub column_blocks: usize,
}

impl Plan {
    /// `aligned`: whether `hashed_weight` is aligned to the widest access.
    pub fn new(pass: Pass, dtype: Dtype, lookup: &Lookup, weighted: bool, aligned: bool) -> Self {
        let kernel = choose(pass, dtype, lookup, weighted, aligned);
        let BagKernel { width, share, .. } = kernel;
        let (embedding_dim, num_bags) = (lookup.table.embedding_dim, lookup.bags.num_bags);
        let lanes = embedding_dim.div_ceil(width).next_power_of_two();
        let lanes = lanes.clamp(share, WARP);
        // A group gets several bags, so that its setup is shared and the rows of the next bag are fetched while one is summed;
        // but only so many that there are still enough threads to fill a large GPU more than twice. Measured on an H200.
        let enough_threads = match pass {
            Pass::Forward if !kernel.plain => 1 << 19,
            _ => 1 << 20,
        };
        let bags_per_group = (num_bags.saturating_mul(lanes) / enough_threads).clamp(1, 8);
        let groups_per_block = Kernel::Bags(kernel).threads() / lanes;
        let column_blocks = match pass {
            // A group goes over all columns of its bag.
            Pass::BackwardPerSampleWeights => 1,
            _ => embedding_dim.div_ceil(lanes * width),
        };
        Self {
            kernel,
            lanes,
            bags_per_group,
            bag_blocks: num_bags.div_ceil(groups_per_block * bags_per_group),
            column_blocks: column_blocks.clamp(1, MAX_GRID_Y),
        }
    }
}

/// The kernel with the widest accesses and the fewest hashes that block and alignment allow.
fn choose(pass: Pass, dtype: Dtype, lookup: &Lookup, weighted: bool, aligned: bool) -> BagKernel {
    let Lookup { table, bags, .. } = lookup;
    let pooling = match (pass, table.mode) {
        (Pass::BackwardPerSampleWeights, _) => Pooling::Weighted,
        (_, Mode::Max) => Pooling::Max,
        (_, Mode::Sum | Mode::Mean) if weighted => Pooling::Weighted,
        (_, Mode::Sum | Mode::Mean) => Pooling::Sum,
    };
    let is_plain = matches!(bags.division, Division::Fixed(len) if len <= LONG_BAG)
        && bags.features == 1
        && table.padding_idx.is_none();
    let is_suitable = |kernel: &BagKernel| {
        kernel.pooling == pooling
            && table
                .slots
                .block()
                .is_multiple_of(kernel.width * kernel.share)
            && (kernel.width == 1 || aligned)
            && (!kernel.plain || is_plain)
    };
    BagKernel::candidates(pass, Family::of(&table.slots), dtype)
        .into_iter()
        .filter(is_suitable)
        .max_by_key(|kernel| (kernel.width, kernel.share, kernel.plain))
        .expect("one column per thread and no sharing suit every call")
}

/// The thread blocks of a kernel whose threads stride over `n` values.
pub fn strided_blocks(kernel: Kernel, n: usize) -> usize {
    n.div_ceil(kernel.threads()).clamp(1, MAX_STRIDED_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::super::instances::{self, Module, Rule, WIDEST_ACCESS};
    use super::*;
    use crate::bags::{BagShape, JaggedLayout};
    use crate::bounds::BoundsCheck;
    use crate::hash::{Balanced, Hash, Mix, Semantic};
    use crate::op::Table;
    use crate::tables::Tables;
    use std::collections::{BTreeSet, HashSet};
    use std::sync::Arc;

    const LAYOUT: JaggedLayout = JaggedLayout::FeatureMajor;
    const MODES: [Mode; 3] = [Mode::Sum, Mode::Mean, Mode::Max];

    fn lookup(hash: Hash, embedding_dim: usize, mode: Mode, bags: BagShape) -> Lookup {
        let len = hash.round_up_len(1 << 16).unwrap();
        let tables = (0..bags.features).map(|t| (t.to_string(), 1000));
        Lookup {
            table: Table {
                slots: hash.slots(len).unwrap(),
                tables: Arc::new(Tables::named(tables).unwrap()),
                table_rows: None,
                embedding_dim,
                mode,
                padding_idx: None,
                sparse_gradient: None,
                low_bit: None,
                row_tensor: None,
            },
            bags,
            out_shape: (bags.num_bags, embedding_dim).into(),
            bounds_check: BoundsCheck::Error,
            gradient: Gradient::Fastest,
        }
    }

    fn hashes(block: usize) -> [Hash; 6] {
        let signed = block <= 32;
        [
            Hash::affine(3, 5, 7, 1_000_003, block),
            Hash::Mix(Mix {
                signed,
                ..Mix::new(block)
            }),
            Hash::Balanced(Balanced {
                signed,
                ..Balanced::new(block)
            }),
            Hash::lma(&[7; 51], 4, 8, block).unwrap(),
            Hash::from(Semantic {
                signed,
                ..Semantic::new(block)
            }),
            Hash::slot_table(block),
        ]
    }

    /// Bags of every form: fixed (none, short, long), with offsets, of one feature or of several.
    fn bag_shapes() -> Vec<BagShape> {
        let mut shapes = vec![];
        for features in [1, 3] {
            for bag_len in [0, 1, LONG_BAG, LONG_BAG + 1] {
                shapes.push(BagShape::fixed(6, bag_len, features).unwrap());
            }
            for include_last in [false, true] {
                let offsets = 6 + usize::from(include_last);
                shapes.push(BagShape::ragged(50, offsets, include_last, features, LAYOUT).unwrap());
            }
        }
        shapes
    }

    /// Every kind of lookup that a layer can ask for.
    fn lookups() -> Vec<Lookup> {
        let mut lookups = vec![];
        for block in (1..=33).chain([40, 48, 64, 100, 128, 1 << 16]) {
            for hash in hashes(block) {
                for mode in MODES {
                    for bags in bag_shapes() {
                        for padding_idx in [None, Some(0)] {
                            for gradient in [Gradient::Fastest, Gradient::Deterministic] {
                                let mut lookup = lookup(hash, 20, mode, bags);
                                lookup.table.padding_idx = padding_idx;
                                lookup.gradient = gradient;
                                lookups.push(lookup);
                            }
                        }
                    }
                }
            }
        }
        lookups
    }

    /// The passes of a lookup, each with whether there are per-sample weights, which only mode sum takes.
    fn passes(lookup: &Lookup) -> Vec<(Pass, bool)> {
        let grad_weight = Pass::grad_weight(lookup.gradient);
        let mut passes = vec![(Pass::Forward, false), (grad_weight, false)];
        if lookup.table.mode == Mode::Sum {
            passes.extend([
                (Pass::Forward, true),
                (grad_weight, true),
                (Pass::BackwardPerSampleWeights, true),
            ]);
        }
        passes
    }

    /// Every call finds a kernel in the table that is right for it, and every kernel in the table is found by some call.
    #[test]
    #[cfg_attr(miri, ignore = "takes hours there")]
    fn the_table_has_what_layers_ask_for_and_no_more() {
        let table: HashSet<Kernel> = instances::all().into_iter().collect();
        let mut used = HashSet::new();
        let mut check = |pass, weighted, dtype, aligned, lookup: &Lookup| {
            let kernel = Plan::new(pass, dtype, lookup, weighted, aligned).kernel;
            assert!(table.contains(&Kernel::Bags(kernel)), "{kernel:?}");
            let Lookup { table, bags, .. } = lookup;
            assert_eq!((kernel.pass, kernel.dtype), (pass, dtype));
            assert_eq!(kernel.family, Family::of(&table.slots));
            let want = match table.mode {
                Mode::Max => Pooling::Max,
                _ if weighted => Pooling::Weighted,
                _ => Pooling::Sum,
            };
            assert_eq!(kernel.pooling, want);
            // What the kernels assume, see kernels/forward.cuh and kernels/walk.cuh.
            if kernel.width > 1 {
                assert!(aligned);
                assert!(!matches!(kernel.family, Family::Affine | Family::Lma));
            }
            assert_eq!(table.slots.block() % (kernel.width * kernel.share), 0);
            if kernel.plain {
                assert!(table.padding_idx.is_none() && bags.features == 1 && !weighted);
                assert!(bags.bag_len().is_some_and(|len| len <= LONG_BAG));
            }
            used.insert(Kernel::Bags(kernel));
        };
        for lookup in lookups() {
            for (pass, weighted) in passes(&lookup) {
                let low_bits = Dtype::LOW_BITS
                    .into_iter()
                    .filter(|_| pass == Pass::Forward);
                for dtype in Dtype::FLOATS.into_iter().chain(low_bits) {
                    check(pass, weighted, dtype, false, &lookup);
                    check(pass, weighted, dtype, true, &lookup);
                }
            }
        }
        // The others serve calls of every kind.
        used.extend([Kernel::CheckBounds, Kernel::CopyI32]);
        for dtype in Dtype::FLOATS {
            used.insert(Kernel::LargestMagnitude(dtype));
            used.insert(Kernel::FromFixedPoint(dtype.accumulator()));
            // What optimisers launch, each for every dtype.
            used.extend(Rule::ALL.map(|rule| Kernel::OptimizerStep(rule, dtype)));
            used.extend(Rule::SPARSE.map(|rule| Kernel::SparseOptimizerStep(rule, dtype)));
        }
        let unused: Vec<_> = table.difference(&used).collect();
        assert!(unused.is_empty(), "{unused:?}");
        assert_eq!(table, used);
    }

    /// The choice itself, in the cases that matter most for speed.
    #[test]
    fn the_widest_accesses_and_the_fewest_hashes() {
        let fixed = BagShape::fixed(6, 20, 1).unwrap();
        let ragged = BagShape::ragged(50, 6, false, 1, LAYOUT).unwrap();
        let shape = |pass, dtype, block, mode, bags, aligned| {
            let hash = Hash::balanced(block);
            let lookup = lookup(hash, 64, mode, bags);
            let kernel = Plan::new(pass, dtype, &lookup, false, aligned).kernel;
            (kernel.width, kernel.share, kernel.plain)
        };
        use {Dtype::*, Mode::*, Pass::*};
        assert_eq!(shape(Forward, F32, 16, Sum, fixed, true), (4, 4, true));
        assert_eq!(shape(Forward, F32, 16, Mean, ragged, true), (4, 4, false));
        assert_eq!(shape(Forward, F32, 8, Max, fixed, true), (4, 2, true));
        assert_eq!(shape(Forward, F32, 4, Sum, fixed, true), (4, 1, true));
        assert_eq!(shape(Forward, F32, 6, Sum, fixed, true), (1, 1, false));
        assert_eq!(shape(Forward, F32, 16, Sum, fixed, false), (1, 1, false));
        assert_eq!(shape(Forward, F16, 16, Sum, fixed, true), (8, 2, true));
        assert_eq!(shape(Forward, F64, 16, Sum, fixed, true), (2, 4, true));
        assert_eq!(shape(Forward, Bits8, 32, Sum, fixed, true), (16, 2, true));
        assert_eq!(shape(Forward, Bits8, 16, Max, ragged, true), (16, 1, false));
        assert_eq!(shape(Forward, Bits8, 8, Sum, fixed, true), (1, 1, false));
        assert_eq!(shape(Forward, Bits4, 32, Mean, fixed, true), (16, 2, true));
        assert_eq!(shape(Forward, Bits4, 16, Sum, fixed, true), (16, 1, true));
        assert_eq!(shape(Forward, Bits4, 32, Sum, fixed, false), (1, 1, false));
        // Gradients of 16-bit values are summed in f32.
        assert_eq!(shape(Backward, F16, 16, Sum, fixed, true), (4, 4, false));
        let fixed_point = BackwardFixedPoint;
        assert_eq!(shape(fixed_point, F32, 16, Sum, fixed, true), (1, 4, false));
        assert_eq!(
            shape(fixed_point, F32, 16, Sum, fixed, false),
            (1, 4, false)
        );
        assert_eq!(shape(fixed_point, F32, 6, Sum, fixed, true), (1, 1, false));
        assert_eq!(shape(fixed_point, F32, 16, Max, fixed, true), (4, 4, false));
        assert_eq!(
            shape(BackwardPerSampleWeights, F16, 16, Sum, fixed, true),
            (8, 1, false)
        );
    }

    /// Groups and thread blocks cover all bags and columns, and fit what a launch takes.
    #[test]
    fn every_bag_and_column_has_a_thread() {
        for num_bags in [1, 2, 127, 4096, 65_536, 1 << 20, 1 << 28] {
            for embedding_dim in [1, 3, 16, 64, 100, 128, 1000, 1 << 20] {
                for pass in Pass::ALL {
                    let bags = BagShape::fixed(num_bags, 2, 1).unwrap();
                    let hash = Hash::default_for(embedding_dim);
                    let lookup = lookup(hash, embedding_dim, Mode::Sum, bags);
                    let plan = Plan::new(pass, Dtype::F32, &lookup, false, true);
                    let threads = Kernel::Bags(plan.kernel).threads();
                    assert!(plan.lanes.is_power_of_two() && plan.lanes <= WARP);
                    assert!(plan.lanes >= plan.kernel.share);
                    assert!((1..=8).contains(&plan.bags_per_group));
                    let groups = threads / plan.lanes * plan.bag_blocks;
                    assert!(groups * plan.bags_per_group >= num_bags);
                    let columns = plan.lanes * plan.kernel.width * plan.column_blocks;
                    let strides =
                        pass == Pass::BackwardPerSampleWeights || plan.column_blocks == MAX_GRID_Y;
                    assert!(columns >= embedding_dim || strides);
                }
            }
        }
        let threads = Kernel::CheckBounds.threads();
        assert_eq!(strided_blocks(Kernel::CheckBounds, 0), 1);
        assert_eq!(strided_blocks(Kernel::CheckBounds, threads + 1), 2);
        assert_eq!(strided_blocks(Kernel::CheckBounds, usize::MAX), 2048);
    }

    #[test]
    fn kernels_and_modules_have_names_of_their_own() {
        let kernels = instances::all();
        let names: BTreeSet<String> = kernels.iter().map(|kernel| kernel.name()).collect();
        assert_eq!(names.len(), kernels.len());
        let modules: HashSet<Module> = kernels.iter().map(|kernel| kernel.module()).collect();
        let names: BTreeSet<String> = modules.iter().map(|module| module.name()).collect();
        assert_eq!(names.len(), modules.len());
        for kernel in kernels {
            let threads = kernel.threads();
            assert!(threads.is_multiple_of(WARP) && threads <= 1024);
            if let Kernel::Bags(BagKernel { width, dtype, .. }) = kernel {
                assert!(width == 1 || width * dtype.bits() <= 8 * WIDEST_ACCESS);
            }
        }
    }
}
