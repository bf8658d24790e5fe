//! Threads: results do not depend on their number, and layers and checkpoints may be shared between them.

use crate::common::{
    affine, config, cuda, floats, integers, layer, on_each_device, robe,
    same_on_any_number_of_threads, to_vec, Draws, MODES,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, Hash, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use std::thread::ScopedJoinHandle;

/// More values than one thread takes: the same bits from 1, 2 and 5 threads, and what a few bags at a time give. With few
/// slots, where every thread adds into a buffer of its own, and with many, where each thread owns a slice of them; with blocks
/// that end where a slice ends, and with blocks that straddle two slices.
#[test]
fn lookups_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let test = "threads::lookups_do_not_depend_on_the_number_of_threads";
    same_on_any_number_of_threads(test, |report| {
        let (device, mut draws) = (Device::Cpu, Draws::new(8));
        let hashes = [
            Hash::default_for(32),
            Hash::original(),
            robe(8),
            affine(871_205_356, 3_333, 7, u64::MAX, 3),
        ];
        let (num_bags, bag_len, step) = (4_160, 2, 520);
        let rows = draws.rows(num_bags * bag_len, 5_000);
        let indices = integers(&rows, DType::U32, &device)?.reshape((num_bags, bag_len))?;
        for (len, embedding_dim) in [(1_600, 64), (90_000, 64), (90_000, 65)] {
            let weight = Var::from_tensor(&floats(&draws.reals(len), DType::F32, &device)?)?;
            for hash in hashes {
                for mode in MODES {
                    let bag = layer(&weight, 5_000, embedding_dim, config(mode, hash))?;
                    let results = |indices: &Tensor| -> Result<(Vec<f64>, Vec<f64>)> {
                        let out = bag.forward(indices)?;
                        let grads = out.sqr()?.sum_all()?.backward()?;
                        Ok((to_vec(&out)?, to_vec(grads.get(&weight).unwrap())?))
                    };
                    let want = results(&indices)?;
                    report(&want.0);
                    report(&want.1);
                    // So few bags are not worth dividing among threads.
                    let mut grad_weight = vec![0.0; len];
                    for i in (0..num_bags).step_by(step) {
                        let (out, grad) = results(&indices.narrow(0, i, step)?)?;
                        assert_eq!(out, want.0[i * embedding_dim..(i + step) * embedding_dim]);
                        grad_weight
                            .iter_mut()
                            .zip(grad)
                            .for_each(|(sum, x)| *sum += x);
                    }
                    for (slot, (got, want)) in grad_weight.iter().zip(&want.1).enumerate() {
                        let close = (got - want).abs() <= 1e-3 * want.abs().max(1.0);
                        assert!(close, "{hash:?} {mode:?} {len} slot {slot}: {got}, {want}");
                    }
                }
            }
        }
        Ok(())
    })
}

/// A table large enough for several parts and many tasks: the same bits from 1, 2 and 5 threads, and from a table stored by
/// columns as from one stored by rows.
#[test]
fn fit_does_not_depend_on_the_number_of_threads_or_on_strides() -> Result<()> {
    let test = "threads::fit_does_not_depend_on_the_number_of_threads_or_on_strides";
    same_on_any_number_of_threads(test, |report| {
        let (rows, columns) = (1 << 16, 20);
        let values = Draws::new(rows as u64).reals(rows * columns);
        let table = floats(&values, DType::F32, &Device::Cpu)?.reshape((rows, columns))?;
        let strided = table.t()?.contiguous()?.t()?;
        assert!(!strided.is_contiguous());
        let fit = |table: &Tensor| -> Result<(Vec<f64>, f64)> {
            let config = config(Mode::Sum, Hash::original());
            let (layer, error) = HashedEmbeddingBag::fit(table, 0.01, config)?;
            Ok((to_vec(layer.hashed_weight())?, error))
        };
        let (values, error) = fit(&table)?;
        let bits = |values: &[f64]| -> Vec<_> { values.iter().map(|x| x.to_bits()).collect() };
        let (of_strided, error_of_strided) = fit(&strided)?;
        assert!(bits(&of_strided) == bits(&values), "strides");
        assert_eq!(error_of_strided.to_bits(), error.to_bits());
        report(&values);
        report(&[error]);
        // A hundred unrelated values share a slot, so nearly nothing of each is left: sqrt(1 - 1/100) is lost.
        assert!((error - 0.99f64.sqrt()).abs() < 1e-3, "{error}");
        Ok(())
    })
}

const THREADS: usize = 16;
const ROUNDS: usize = 4;
/// Enough indices and bags that each lookup is itself divided among threads if any are idle.
const BAGS: usize = 512;
const BAG_LEN: usize = 64;
const DIM: usize = 16;
const ROWS: usize = 10_000;

#[test]
fn layers_and_checkpoints_are_send_and_sync() {
    fn check<T: Send + Sync + Clone + std::fmt::Debug>() {}
    check::<HashedEmbeddingBag>();
    check::<HashedEmbedding>();
    check::<HashedEmbeddingBagCollection>();
    check::<HashedEmbeddingBagConfig>();
    check::<Checkpoint>();
    check::<Hash>();
}

/// A layer that trains, and the inputs of one thread.
struct Work {
    weight: Var,
    layer: HashedEmbeddingBag,
    collection: HashedEmbeddingBagCollection,
    indices: Tensor,
    offsets: Tensor,
    per_sample_weights: Tensor,
    grad_output: Tensor,
}

/// Shared layers, and the lookups that each thread makes in them.
fn work(device: &Device) -> Result<Vec<Work>> {
    let mut draws = Draws::new(1);
    let weight = Var::from_tensor(&floats(&draws.halves(1 << 14), DType::F32, device)?)?;
    let layer = layer(&weight, ROWS, DIM, Default::default())?;
    let tables = [("a", ROWS / 2), ("b", ROWS / 2)];
    let collection = HashedEmbeddingBagCollection::new(
        weight.as_tensor().clone(),
        tables,
        DIM,
        Default::default(),
    )?;
    (0..THREADS)
        .map(|_| {
            let nnz = BAGS * BAG_LEN;
            let rows = draws.rows(nnz, ROWS / 2);
            let mut offsets = draws.rows(BAGS, nnz);
            offsets.sort_unstable();
            offsets[0] = 0;
            Ok(Work {
                weight: weight.clone(),
                layer: layer.clone(),
                collection: collection.clone(),
                indices: integers(&rows, DType::U32, device)?,
                offsets: integers(&offsets, DType::I64, device)?,
                per_sample_weights: floats(&draws.halves(nnz), DType::F32, device)?,
                grad_output: floats(&draws.halves(BAGS * DIM), DType::F32, device)?,
            })
        })
        .collect()
}

impl Work {
    /// Outputs and gradients of every kind of lookup; exact, so that they can be compared for equality on every device.
    fn results(&self) -> Result<Vec<Vec<f64>>> {
        let Self {
            layer: sum,
            indices,
            offsets,
            ..
        } = self;
        let max = HashedEmbeddingBagConfig {
            mode: Mode::Max,
            ..sum.config()
        };
        let max = layer(sum.hashed_weight(), ROWS, DIM, max)?;
        let layout = JaggedLayout::FeatureMajor;
        let outs = [
            sum.forward(&indices.reshape((BAGS, BAG_LEN))?)?,
            sum.forward_with_offsets(indices, offsets)?,
            sum.forward_weighted_with_offsets(indices, offsets, &self.per_sample_weights)?,
            max.forward_with_offsets(indices, offsets)?,
            self.collection.forward_jagged(indices, offsets, layout)?,
        ];
        let mut results = vec![];
        for out in outs {
            let loss = out.flatten_all()?.mul(&self.grad_output)?.sum_all()?;
            let grads = loss.backward()?;
            let grad = grads
                .get(&self.weight)
                .expect("hashed_weight is a variable");
            results.extend([to_vec(&out)?, to_vec(grad)?]);
        }
        Ok(results)
    }

    /// The output of the layer of a checkpoint.
    fn served(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Vec<f64>> {
        let layer = checkpoint.hashed_embedding_bag("layer", DType::F32, device)?;
        to_vec(&layer.forward_with_offsets(&self.indices, &self.offsets)?)
    }
}

/// The first error or panic of the threads, if there is one.
fn join_all(threads: Vec<ScopedJoinHandle<Result<()>>>) -> Result<()> {
    threads
        .into_iter()
        .try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
}

#[test]
fn sixteen_threads_on_shared_layers_and_a_checkpoint_agree_with_one() -> Result<()> {
    on_each_device(|device| {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("model.safetensors");
        let works = work(device)?;
        let save = || checkpoint::save(&path, [], [("layer", &works[0].layer)]);
        save()?;
        let opened = Checkpoint::open(&path)?;
        let alone: Vec<_> = works
            .iter()
            .map(|work| Ok((work.results()?, work.served(&opened, device)?)))
            .collect::<Result<_>>()?;
        std::thread::scope(|scope| {
            let threads: Vec<_> = works
                .iter()
                .zip(&alone)
                .enumerate()
                .map(|(i, (work, (results, served)))| {
                    let (opened, path, save) = (&opened, &path, &save);
                    scope.spawn(move || -> Result<()> {
                        for round in 0..ROUNDS {
                            assert!(work.results()? == *results, "thread {i}, round {round}");
                            let reopened = Checkpoint::open(path)?;
                            for checkpoint in [opened, &reopened] {
                                assert!(work.served(checkpoint, device)? == *served);
                            }
                            // The file is replaced while others read it.
                            if i % 4 == round {
                                save()?;
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            join_all(threads)
        })
    })
}

/// Every CUDA device with two streams, all at the same time, gives the results of the CPU.
#[test]
fn several_cuda_devices_and_streams_agree_with_the_cpu() -> Result<()> {
    if cuda().is_none() {
        return Ok(());
    }
    let want: Vec<_> = work(&Device::Cpu)?
        .iter()
        .map(Work::results)
        .collect::<Result<_>>()?;
    let devices: Vec<_> = (0..8)
        .flat_map(|ordinal| [ordinal, ordinal])
        .map_while(|ordinal| Device::new_cuda_with_stream(ordinal).ok())
        .collect();
    println!("{} streams", devices.len());
    assert!(devices.len() >= 2);
    std::thread::scope(|scope| {
        let threads: Vec<_> = devices
            .iter()
            .map(|device| {
                let want = &want;
                scope.spawn(move || -> Result<()> {
                    for _ in 0..ROUNDS {
                        for (work, want) in work(device)?.iter().zip(want) {
                            assert!(work.results()? == *want, "{:?}", device.location());
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        join_all(threads)
    })
}
