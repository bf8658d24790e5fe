//! Layers in 8 and 4 bits. Everything but sums with per-sample weights is compared bit for bit with an oracle in integers, on the
//! CPU and on CUDA, so that both devices agree as well.

use crate::common::strategies::{check, lookups};
use crate::common::{affine, balanced, mix};
use crate::common::{
    config, every_hash, floats, integers, layer, message, naive_element, on_each_device,
    same_on_any_number_of_threads, to_vec, whole_blocks, Case, Draws, Dtypes, Form, Table, FORMS,
    INDEX_DTYPES, MODES, POOLINGS, SIGNED, UNSIGNED,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Bits, Hash, HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use proptest::prelude::*;
use std::collections::HashMap;
use std::rc::Rc;

const BITS: [Bits; 2] = [Bits::Eight, Bits::Four];

/// The slots of a layer as odd integers, read from its bytes as docs/format.md says, and the unit they are multiples of.
struct Oracle {
    slots: Vec<i64>,
    unit: f32,
}

impl Oracle {
    fn of(layer: &HashedEmbeddingBag) -> Result<Self> {
        let low_bit = layer.low_bit().expect("a layer in low bits");
        let bytes = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_vec1::<u8>();
        let packed = bytes(layer.hashed_weight())?;
        Ok(match low_bit.shifts() {
            None => Self {
                slots: packed.iter().map(|&u| 2 * i64::from(u) - 255).collect(),
                unit: low_bit.scale() / 2.0,
            },
            Some(shifts) => {
                let shifts = bytes(shifts)?;
                let slot = |slot: usize| {
                    let nibble = i64::from(packed[slot / 2] >> (4 * (slot % 2)) & 15);
                    let shift = shifts[slot / 128] >> (2 * (slot / 32 % 4)) & 3;
                    (2 * nibble - 15) << (3 - shift)
                };
                Self {
                    slots: (0..2 * packed.len()).map(slot).collect(),
                    unit: low_bit.scale() / 16.0,
                }
            }
        })
    }

    /// The output of a case: exact but for the rounding of the integer, of the unit over the count, and of their product.
    /// With per-sample weights, in f64.
    fn out(&self, case: &Case) -> Vec<f64> {
        let table = &case.table;
        let (mut out, mut position) = (vec![], 0);
        // Each row once, because long bags repeat them.
        let mut seen: HashMap<i64, Rc<Vec<i64>>> = HashMap::new();
        let mut row = |row: i64| -> Rc<Vec<i64>> {
            let values = seen.entry(row).or_insert_with(|| {
                let row = row.wrapping_add(table.first_row as i64);
                let values = (0..table.embedding_dim).map(|column| {
                    let (slot, sign) = naive_element(&table.hash, row, column, table.len);
                    self.slots[slot] * sign as i64
                });
                Rc::new(values.collect())
            });
            values.clone()
        };
        for bag in &case.bags {
            let weights = case.per_sample_weights.as_ref();
            let weights = weights.map(|weights| &weights[position..]);
            position += bag.len();
            let counts = |(_, row): &(usize, &i64)| Some(**row) != table.padding_idx;
            let rows = bag.iter().enumerate().filter(counts);
            let rows: Vec<_> = rows.map(|(i, &index)| (i, row(index))).collect();
            for column in 0..table.embedding_dim {
                let values = rows.iter().map(|(i, row)| (*i, row[column]));
                if let Some(weights) = weights {
                    let sum: f64 = values.map(|(i, value)| weights[i] * value as f64).sum();
                    out.push(sum * f64::from(self.unit));
                    continue;
                }
                let values = values.map(|(_, value)| value);
                let (pooled, unit) = match table.mode {
                    Mode::Sum => (values.sum(), self.unit),
                    Mode::Mean => (values.sum(), self.unit / rows.len().max(1) as f32),
                    Mode::Max => (values.max().unwrap_or(0), self.unit),
                };
                out.push(f64::from(pooled as f32 * unit));
            }
        }
        out
    }

    /// Compares, bit for bit if there are no per-sample weights.
    #[track_caller]
    fn assert_is(&self, got: &Tensor, case: &Case, what: &str) -> Result<()> {
        let (got, want) = (to_vec(&got.to_dtype(DType::F32)?)?, self.out(case));
        if case.per_sample_weights.is_none() {
            assert!(got == want, "{what}\n  got {got:?}\n want {want:?}");
            return Ok(());
        }
        // Weights are at most 1, integers at most 255.
        let longest = case.bags.iter().map(Vec::len).max().unwrap_or(0) as f64;
        let slack = longest * longest.max(1.0) * 255.0 * f64::from(self.unit) * 2f64.powi(-23);
        for (got, want) in got.iter().zip(&want) {
            assert!(
                (got - want).abs() <= slack,
                "{what}\n  got {got}\n want {want}"
            );
        }
        Ok(())
    }
}

/// Real values, as many as the table has slots.
fn with_reals(mut case: Case, seed: u64) -> Case {
    case.hashed_weight = Draws::new(seed).reals(case.table.len);
    case
}

/// Rounds the layer of a case, looks up, and compares.
fn check_case(case: &Case, bits: Bits, form: Form, dtypes: Dtypes, device: &Device) -> Result<()> {
    let weight = floats(&case.hashed_weight, DType::F32, device)?;
    let (layer, _) = case.layer(&weight, form)?.to_bits(bits)?;
    let samples = case.per_sample_weights.as_ref();
    let samples = samples
        .map(|weights| floats(weights, DType::F32, device))
        .transpose()?;
    let out = case.forward(&layer, samples.as_ref(), form, dtypes, device)?;
    assert_eq!(out.dtype(), DType::F32);
    assert_eq!(out.dims(), [case.bags.len(), case.table.embedding_dim]);
    let what = format!("{bits:?} {form:?} {:?} {:?}", device.location(), case.table);
    Oracle::of(&layer)?.assert_is(&out, case, &what)
}

/// All hashes, among them those that have vector loops and blocks that these cut, in every mode, form of bags and dtype.
#[test]
fn lookups_are_those_of_the_integer_oracle() -> Result<()> {
    let hashes = every_hash().into_iter().chain([
        balanced(5, 8, SIGNED),
        balanced(5, 24, SIGNED),
        mix(5, 32, SIGNED),
        balanced(5, 32, UNSIGNED),
        balanced(5, 64, UNSIGNED),
        mix(5, 48, UNSIGNED),
        affine(7, 1 << 40, 3, (1 << 61) - 1, 32),
    ]);
    let hashes: Vec<_> = hashes.collect();
    on_each_device(|device| {
        let mut seed = 0;
        for hash in &hashes {
            for embedding_dim in [1, 5, 16, 33, 40, 64, 100, 130] {
                let (mode, weighted) = POOLINGS[seed as usize % 4];
                let form = FORMS[seed as usize % 3];
                let dtypes = Dtypes {
                    indices: INDEX_DTYPES[seed as usize % 3],
                    offsets: INDEX_DTYPES[seed as usize / 3 % 3],
                    ..Default::default()
                };
                let len = whole_blocks(hash, 700).next_multiple_of(2 * hash.block());
                let table = Table {
                    padding_idx: (seed % 5 < 2).then_some(3),
                    first_row: if seed % 7 == 0 { 1000 } else { 0 },
                    ..Table::new(90, embedding_dim, len, mode, *hash)
                };
                let lens: &[usize] = match form {
                    Form::Fixed => &[21, 21, 21],
                    _ => &[0, 1, 19, 4, 0, 37],
                };
                let case = with_reals(Case::random(seed, lens, table), seed);
                let case = if weighted { case.weighted(seed) } else { case };
                for bits in BITS {
                    check_case(&case, bits, form, dtypes, device)?;
                }
                seed += 1;
            }
        }
        Ok(())
    })
}

/// Every mode and form of bags with each of the blocks that have loops or kernels of their own.
#[test]
fn every_mode_with_every_form() -> Result<()> {
    on_each_device(|device| {
        for block in [1, 4, 8, 16, 32] {
            for (mode, weighted) in POOLINGS {
                for form in FORMS {
                    for padding_idx in [None, Some(2)] {
                        let table = Table {
                            padding_idx,
                            ..Table::new(500, 64, 4096, mode, Hash::balanced(block))
                        };
                        let lens = match form {
                            Form::Fixed => [20; 9],
                            _ => [3, 0, 20, 8, 1, 300, 4, 12, 260],
                        };
                        let case = with_reals(Case::random(1, &lens, table), 2);
                        let case = if weighted { case.weighted(3) } else { case };
                        for bits in BITS {
                            check_case(&case, bits, form, Dtypes::default(), device)?;
                        }
                    }
                }
            }
        }
        Ok(())
    })
}

/// Lengths around those at which 8- and 16-bit sums are full, of levels that fill them most.
#[test]
fn bags_of_any_length_do_not_overflow() -> Result<()> {
    on_each_device(|device| {
        for hash in [
            balanced(0, 32, SIGNED),
            balanced(0, 32, UNSIGNED),
            balanced(0, 16, SIGNED),
            mix(0, 16, UNSIGNED),
            balanced(0, 4, UNSIGNED),
            Hash::original(),
        ] {
            for len in [1, 16, 17, 18, 256, 257, 258, 70_000] {
                for mode in MODES {
                    let table = Table::new(3, 33, 128, mode, hash);
                    // Two other bags, so that the long one is not alone in its window.
                    let mut case = Case::random(5, &[2, len, 3], table);
                    for weight in [vec![1.0; 128], vec![-1.0; 128], Draws::new(1).halves(128)] {
                        case.hashed_weight = weight;
                        for bits in BITS {
                            check_case(&case, bits, Form::Offsets, Dtypes::default(), device)?;
                        }
                    }
                }
            }
            // As long, and all of one length.
            let table = Table::new(3, 33, 128, Mode::Sum, hash);
            let mut case = Case::random(5, &[600, 600, 600], table);
            case.hashed_weight = vec![1.0; 128];
            for bits in BITS {
                check_case(&case, bits, Form::Fixed, Dtypes::default(), device)?;
            }
        }
        Ok(())
    })
}

#[test]
fn any_lookup_in_any_layout() {
    let strategy = (lookups(), prop::sample::select(BITS.to_vec()), any::<u32>());
    check(strategy, |(lookup, bits, seed), device| {
        let mut lookup = lookup.clone();
        lookup.case = with_reals(lookup.case, (*seed).into());
        if *bits == Bits::Four && lookup.case.table.len % 2 == 1 {
            lookup.case.table.len += lookup.case.table.hash.block();
            lookup.case = with_reals(lookup.case, (*seed).into());
        }
        if *bits == Bits::Four && lookup.case.table.len % 2 == 1 {
            return Ok(()); // an affine hash with an even block, of an odd length
        }
        if lookup.dtype == DType::F64 {
            lookup.dtype = DType::F32;
        }
        let layer = lookup.low_bit_layer(*bits, device)?;
        let out = lookup.inputs(device)?.forward(&layer)?;
        assert_eq!(out.dtype(), lookup.dtype);
        let oracle = Oracle::of(&layer)?;
        let what = format!("{:?} {lookup:?}", device.location());
        if lookup.dtype == DType::F32 {
            return oracle.assert_is(&out, &lookup.case, &what);
        }
        // Rounded once more.
        let want = Tensor::new(oracle.out(&lookup.case), &Device::Cpu)?;
        let want = want.to_dtype(DType::F32)?.to_dtype(lookup.dtype)?;
        if lookup.case.per_sample_weights.is_none() {
            assert_eq!(to_vec(&out)?, to_vec(&want)?, "{what}");
        }
        Ok(())
    });
}

#[test]
fn the_order_of_a_bag_and_the_number_of_threads_do_not_matter() -> Result<()> {
    let test = "low_bit::the_order_of_a_bag_and_the_number_of_threads_do_not_matter";
    same_on_any_number_of_threads(test, |report| {
        let (device, mut draws) = (&Device::Cpu, Draws::new(3));
        let (num_bags, bag_len) = (3_000, 7);
        let rows = draws.rows(num_bags * bag_len, 9_000);
        let mut backwards = rows.clone();
        backwards
            .chunks_exact_mut(bag_len)
            .for_each(<[i64]>::reverse);
        for hash in [Hash::default_for(64), Hash::balanced(32), Hash::original()] {
            let weight = floats(&draws.reals(64_000), DType::F32, device)?;
            for mode in MODES {
                for bits in BITS {
                    let (bag, error) =
                        layer(&weight, 9_000, 64, config(mode, hash))?.to_bits(bits)?;
                    report(&[error]);
                    let out = |rows: &[i64]| {
                        let rows = integers(rows, DType::I64, device)?;
                        to_vec(&bag.forward(&rows.reshape((num_bags, bag_len))?)?)
                    };
                    let want = out(&rows)?;
                    report(&want);
                    assert_eq!(out(&backwards)?, want);
                }
            }
        }
        Ok(())
    })
}

/// The values of the rounded layer as a layer of floats look up the same single rows.
#[test]
fn the_values_are_those_of_the_bytes() -> Result<()> {
    on_each_device(|device| {
        for hash in [Hash::balanced(16), Hash::balanced(32), Hash::original()] {
            let weight = floats(&Draws::new(9).reals(640), DType::F32, device)?;
            let trained = layer(&weight, 50, 48, config(Mode::Sum, hash))?;
            for (bits, most) in [(Bits::Eight, 0.005), (Bits::Four, 0.08)] {
                let (served, error) = trained.to_bits(bits)?;
                assert!(error < most, "{bits:?} {error}");
                let values = served.hashed_weight_values()?;
                assert_eq!(values.dims(), [640]);
                let rounded = trained.with_hashed_weight(values)?;
                let table = to_vec(&served.to_table(..)?)?;
                assert_eq!(table, to_vec(&rounded.to_table(..)?)?);
                assert_eq!(served.compression(), trained.compression());

                let embedding = HashedEmbedding::from(trained.clone());
                let (embedding, same) = embedding.to_bits(bits)?;
                assert_eq!(same, error);
                let all = Tensor::arange(0u32, 50, device)?.reshape((5, 10))?;
                assert_eq!(to_vec(&embedding.forward(&all)?)?, table);
            }
        }
        Ok(())
    })
}

#[test]
fn collections_keep_their_tables_apart() -> Result<()> {
    on_each_device(|device| {
        let tables = [("user", 30), ("movie", 17), ("hour", 3)];
        let weight = floats(&Draws::new(4).reals(512), DType::F32, device)?;
        let new =
            |weight| HashedEmbeddingBagCollection::new(weight, tables, 64, Default::default());
        for bits in BITS {
            let (served, _) = new(weight.clone())?.to_bits(bits)?;
            // Of single rows even floats are exact.
            let floats = new(served.hashed_weight_values()?)?;
            let ids = integers(&[1, 2, 0, 29, 16, 2], DType::U32, device)?.reshape((2, 3))?;
            let want = to_vec(&floats.forward(&ids)?)?;
            assert_eq!(to_vec(&served.forward(&ids)?)?, want);
            let jagged = integers(&[1, 29, 2, 16, 0, 2], DType::I64, device)?;
            let offsets = integers(&[0, 1, 2, 3, 4, 5], DType::I64, device)?;
            let layout = JaggedLayout::FeatureMajor;
            assert_eq!(
                to_vec(&served.forward_jagged(&jagged, &offsets, layout)?)?,
                want
            );
            let movies = served.table("movie")?.to_table(..)?;
            assert_eq!(
                to_vec(&movies)?,
                to_vec(&floats.table("movie")?.to_table(..)?)?
            );
            let wrong = integers(&[1, 17, 0], DType::U32, device)?.reshape((1, 3))?;
            let got = message(served.forward(&wrong));
            assert!(
                got.contains("indices of table movie must lie in 0..17, got 17"),
                "{got}"
            );
        }
        Ok(())
    })
}

#[test]
fn it_does_not_train() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&[0.5; 64], DType::F32, device)?;
        let (served, _) = layer(&weight, 9, 4, Default::default())?.to_bits(Bits::Eight)?;
        let rows = integers(&[1, 2], DType::U32, device)?.reshape((1, 2))?;
        let samples = Var::from_tensor(&floats(&[1.0, 2.0], DType::F32, device)?.reshape((1, 2))?)?;
        let out = served.forward_weighted(&rows, &samples)?;
        let got = message(out.sum_all()?.backward());
        let want = "hashed-embedding-bag: a layer in 8 bits does not train, and has no gradients";
        assert!(got.contains(want), "{got}");
        // Detached, they are no obstacle to the gradients of others.
        let factor = Var::from_tensor(&floats(&[2.0], DType::F32, device)?)?;
        let out = served.forward_weighted(&rows, &samples.detach())?;
        let grads = out.broadcast_mul(&factor)?.sum_all()?.backward()?;
        assert!(grads.get(&factor).is_some());
        Ok(())
    })
}

#[test]
fn outputs_are_f16_and_bf16_on_request() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(1).reals(64), DType::F32, device)?;
        let (served, _) = layer(&weight, 9, 4, Default::default())?.to_bits(Bits::Four)?;
        let rows = integers(&[1, 2, 7, 8], DType::U32, device)?.reshape((2, 2))?;
        let exact = served.forward(&rows)?;
        for dtype in [DType::F16, DType::BF16] {
            let served = served.clone().with_output_dtype(dtype)?;
            let out = served.forward(&rows)?;
            assert_eq!(out.dtype(), dtype);
            assert_eq!(to_vec(&out)?, to_vec(&exact.to_dtype(dtype)?)?);
            let samples = Tensor::ones((2, 2), dtype, device)?;
            assert_eq!(
                to_vec(&served.forward_weighted(&rows, &samples)?)?,
                to_vec(&out)?
            );
            let got = message(served.forward_weighted(&rows, &samples.to_dtype(DType::F32)?));
            assert!(got.contains("per_sample_weights must have dtype"), "{got}");
        }
        let got = message(served.with_output_dtype(DType::F64));
        assert!(
            got.contains("a layer of 4 bits gives f32, f16 or bf16, got f64"),
            "{got}"
        );
        Ok(())
    })
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let device = &Device::Cpu;
    let weight = floats(&[0.5; 65], DType::F32, device)?;
    let odd = layer(&weight, 9, 4, config(Mode::Sum, Hash::original()))?;
    let got = message(odd.to_bits(Bits::Four));
    assert!(
        got.ends_with("must have an even length in 4 bits, got 65"),
        "{got}"
    );
    let (served, _) = odd.to_bits(Bits::Eight)?;
    let got = message(served.to_bits(Bits::Four));
    assert!(got.ends_with("this one has 8 bits already"), "{got}");
    let got = message(odd.with_output_dtype(DType::F16));
    assert!(got.contains("a layer of floats"), "{got}");
    let got = message(served.with_hashed_weight(weight));
    assert!(
        got.contains("hashed_weight must have dtype u8, got f32"),
        "{got}"
    );
    let rows = integers(&[9], DType::U32, device)?.reshape((1, 1))?;
    let got = message(served.forward(&rows));
    assert!(
        got.contains("indices must lie in 0..9, got 9 at position 0"),
        "{got}"
    );
    Ok(())
}

/// f64, f16 and bf16 layers are rounded from their values in f32; zeros and constants keep their sign.
#[test]
fn layers_of_every_dtype_are_rounded() -> Result<()> {
    on_each_device(|device| {
        for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
            let values: Vec<f64> = (0..64).map(|i| f64::from(i - 32) / 8.0).collect();
            let weight = floats(&values, dtype, device)?;
            let config = HashedEmbeddingBagConfig::default();
            let (served, error) = layer(&weight, 9, 4, config)?.to_bits(Bits::Eight)?;
            assert!(error < 0.01);
            let rounded = to_vec(&served.hashed_weight_values()?)?;
            for (value, rounded) in values.iter().zip(&rounded) {
                assert!(
                    (value - rounded).abs() < 0.02,
                    "{dtype:?} {value} {rounded}"
                );
            }
        }
        Ok(())
    })
}
