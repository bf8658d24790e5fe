//! Layers and checkpoints shared between threads: the answers are those of one thread.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, Hash, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, JaggedLayout, Mode,
};
use common::{floats, integers, on_each_device, to_vec, Draws};

const THREADS: usize = 16;
const ROUNDS: usize = 4;
/// Enough indices and bags that each lookup is itself divided among threads, where some are left.
const BAGS: usize = 512;
const BAG_LEN: usize = 32;
const DIM: usize = 16;
const ROWS: usize = 10_000;

#[test]
fn what_crosses_threads() {
    fn crosses<T: Send + Sync + Clone + std::fmt::Debug>() {}
    crosses::<HashedEmbeddingBag>();
    crosses::<HashedEmbedding>();
    crosses::<HashedEmbeddingBagCollection>();
    crosses::<HashedEmbeddingBagConfig>();
    crosses::<Checkpoint>();
    crosses::<Hash>();
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

/// Shared layers, and for every thread the work it does on them.
fn work(device: &Device) -> Result<Vec<Work>> {
    let mut draws = Draws::new(1);
    let weight = Var::from_tensor(&floats(&draws.halves(1 << 14), DType::F32, device)?)?;
    let shared = || weight.as_tensor().clone();
    let layer = HashedEmbeddingBag::new(shared(), ROWS, DIM, Default::default())?;
    let tables = [("a", ROWS / 2), ("b", ROWS / 2)];
    let collection = HashedEmbeddingBagCollection::new(shared(), tables, DIM, Default::default())?;
    (0..THREADS)
        .map(|_| {
            let nnz = BAGS * BAG_LEN;
            let rows: Vec<i64> = (0..nnz).map(|_| draws.below(ROWS / 2) as i64).collect();
            let mut offsets: Vec<i64> = (0..BAGS).map(|_| draws.below(nnz) as i64).collect();
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
            layer,
            indices,
            offsets,
            ..
        } = self;
        let max = HashedEmbeddingBagConfig {
            mode: Mode::Max,
            ..layer.config()
        };
        let max = HashedEmbeddingBag::new(layer.hashed_weight().clone(), ROWS, DIM, max)?;
        let layout = JaggedLayout::FeatureMajor;
        let outs = [
            layer.forward(&indices.reshape((BAGS, BAG_LEN))?)?,
            layer.forward_with_offsets(indices, offsets)?,
            layer.forward_weighted_with_offsets(indices, offsets, &self.per_sample_weights)?,
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

    /// The output of the layer and the collection of a checkpoint.
    fn served(&self, checkpoint: &Checkpoint, device: &Device) -> Result<Vec<Vec<f64>>> {
        let layer = checkpoint.hashed_embedding_bag("layer", DType::F32, device)?;
        Ok(vec![to_vec(
            &layer.forward_with_offsets(&self.indices, &self.offsets)?,
        )?])
    }
}

#[test]
fn sixteen_threads_on_shared_layers() -> Result<()> {
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
            threads
                .into_iter()
                .try_for_each(|thread| match thread.join() {
                    Ok(result) => result,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
        })
    })
}

/// Every device, each with two streams, all at once: each gives the answers of the CPU.
#[test]
fn several_cuda_devices_and_streams() -> Result<()> {
    if common::cuda().is_none() {
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
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}
