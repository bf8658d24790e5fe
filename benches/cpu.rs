//! Measures lookups on the CPU, in gathered values per second: `cargo bench -p benches --bench cpu`.
//!
//! Names read `forward/default sum f32 64`: pass, hash, mode, dtype, embedding_dim. benches/peers/torch_cpu.py looks up the
//! same rows with torch and prints the ratios. `CANDLE_NUM_THREADS=1` measures one thread.
//!
//! Memory comes from mimalloc, which starts large tensors at a cache line, as torch's own allocator does, so that a block of 64
//! bytes lies in one line and not in two.

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::optim::Adagrad;
use candle_hashed_embedding_bag::{
    Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, JaggedLayout,
    Mode,
};
use candle_nn::Optimizer;
use criterion::{criterion_group, criterion_main, Criterion, SamplingMode, Throughput};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const NUM_EMBEDDINGS: u64 = 1_000_000;
const NUM_BAGS: usize = 4_096;
const BAG_LEN: usize = 20;

/// Row `i` of the workload, as in benches/peers/torch_cpu.py: the finaliser of SplitMix64.
fn row(i: u64) -> i64 {
    let mut h = i.wrapping_add(0x9E37_79B9_7F4A_7C15);
    h = (h ^ (h >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((h ^ (h >> 31)) % NUM_EMBEDDINGS) as i64
}

fn indices(num_bags: usize, bag_len: usize) -> Result<Tensor> {
    let rows: Vec<i64> = (0..(num_bags * bag_len) as u64).map(row).collect();
    Tensor::from_vec(rows, (num_bags, bag_len), &Device::Cpu)
}

struct Layer {
    name: String,
    weight: Var,
    bag: HashedEmbeddingBag,
}

/// A layer of a million rows at compression 1/64.
fn layer(hash: &str, mode: Mode, dtype: DType, embedding_dim: usize) -> Result<Layer> {
    let config = HashedEmbeddingBagConfig {
        mode,
        hash: match hash {
            "original" => Some(Hash::original()),
            _ => None,
        },
        ..Default::default()
    };
    let len = NUM_EMBEDDINGS as usize * embedding_dim / 64;
    let weight = Tensor::randn(0f32, 1f32, len, &Device::Cpu)?.to_dtype(dtype)?;
    let weight = Var::from_tensor(&weight)?;
    let bag = HashedEmbeddingBag::new(
        weight.as_tensor().clone(),
        NUM_EMBEDDINGS as usize,
        embedding_dim,
        config,
    )?;
    let mode = format!("{mode:?}").to_lowercase();
    Ok(Layer {
        name: format!("{hash} {mode} {} {embedding_dim}", dtype.as_str()),
        weight,
        bag,
    })
}

fn large(c: &mut Criterion) {
    let indices = indices(NUM_BAGS, BAG_LEN).unwrap();
    let mut layers = vec![];
    for embedding_dim in [64, 128] {
        for hash in ["default", "original"] {
            for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
                layers.push(layer(hash, mode, DType::F32, embedding_dim).unwrap());
            }
        }
        for dtype in [DType::F16, DType::BF16, DType::F64] {
            layers.push(layer("default", Mode::Sum, dtype, embedding_dim).unwrap());
        }
    }
    layers.push(layer("default", Mode::Sum, DType::F32, 16).unwrap());

    let values = |layer: &Layer| {
        let values = indices.elem_count() * layer.bag.embedding_dim();
        Throughput::Elements(values as u64)
    };
    let mut group = c.benchmark_group("forward");
    group.sampling_mode(SamplingMode::Flat);
    for layer in &layers {
        let frozen = HashedEmbeddingBag::clone(&layer.bag);
        group.throughput(values(layer));
        group.bench_function(&layer.name, |b| {
            b.iter(|| frozen.forward(&indices).unwrap())
        });
    }
    group.finish();

    let mut group = c.benchmark_group("forward and backward");
    group.sampling_mode(SamplingMode::Flat);
    for layer in &layers {
        group.throughput(values(layer));
        group.bench_function(&layer.name, |b| {
            b.iter(|| {
                let out = layer.bag.forward(&indices).unwrap();
                let grads = out.backward().unwrap();
                grads.get(&layer.weight).unwrap().clone()
            })
        });
    }
    // Without the tensors that candle makes for a dense gradient.
    for embedding_dim in [64, 128] {
        let layer = layer("default", Mode::Sum, DType::F32, embedding_dim).unwrap();
        let bag = layer.bag.with_sparse(true).unwrap();
        group.throughput(values(&layer));
        group.bench_function(format!("{} sparse", layer.name), |b| {
            b.iter(|| bag.forward(&indices).unwrap().backward().unwrap())
        });
    }
    group.finish();
}

/// Whole steps of training: forward, backward and Adagrad, with a sparse gradient.
fn steps(c: &mut Criterion) {
    let indices = indices(NUM_BAGS, BAG_LEN).unwrap();
    let mut group = c.benchmark_group("step");
    group.sampling_mode(SamplingMode::Flat);
    for (embedding_dim, len) in [
        (64, 1_000_000),
        (64, 16_000_000),
        (64, 64_000_000),
        (128, 2_000_000),
    ] {
        let weight = Tensor::randn(0f32, 1f32, len, &Device::Cpu).unwrap();
        let weight = Var::from_tensor(&weight).unwrap();
        let config = HashedEmbeddingBagConfig {
            sparse: true,
            ..Default::default()
        };
        let rows = NUM_EMBEDDINGS as usize;
        let bag = weight.as_tensor().clone();
        let bag = HashedEmbeddingBag::new(bag, rows, embedding_dim, config).unwrap();
        let mut optimizer = Adagrad::new_lr(vec![weight], 0.01).unwrap();
        let name = format!("{embedding_dim} {}M", len / 1_000_000);
        group.bench_function(name, |b| {
            b.iter(|| {
                let out = bag.forward(&indices).unwrap();
                optimizer.backward_step(&out).unwrap();
            })
        });
    }
    group.finish();
}

/// Jagged bags of 26 tables: 2,048 samples of 0 to 3 rows each, by feature or by sample.
fn jagged(c: &mut Criterion) {
    let (tables, batch) = (26usize, 2_048usize);
    let len = |bag: usize| row(bag as u64) as usize % 4;
    let mut group = c.benchmark_group("jagged");
    let weight = Tensor::randn(0f32, 1f32, 26 * 10_000 * 16 / 16, &Device::Cpu).unwrap();
    let weight = Var::from_tensor(&weight).unwrap();
    let names = (0..tables).map(|t| (t.to_string(), 10_000));
    let weight = weight.as_tensor().clone();
    let collection =
        HashedEmbeddingBagCollection::new(weight, names, 16, Default::default()).unwrap();
    // The same bags in either order: bag `sample * tables + table` of the batch-major one.
    let rows_of = |bag: usize| (0..len(bag)).map(move |i| row((bag * 4 + i) as u64) % 10_000);
    let batch_major: Vec<usize> = (0..batch * tables).collect();
    let feature_major: Vec<usize> = (0..batch * tables)
        .map(|i| (i % batch) * tables + i / batch)
        .collect();
    for (name, layout, bags) in [
        ("batch-major", JaggedLayout::BatchMajor, batch_major),
        ("feature-major", JaggedLayout::FeatureMajor, feature_major),
    ] {
        let values: Vec<i64> = bags.iter().flat_map(|&bag| rows_of(bag)).collect();
        let mut offsets = vec![];
        let mut next = 0;
        for &bag in &bags {
            offsets.push(next);
            next += len(bag) as i64;
        }
        let values = Tensor::new(values, &Device::Cpu).unwrap();
        let offsets = Tensor::new(offsets, &Device::Cpu).unwrap();
        let forward = || {
            collection
                .forward_jagged(&values, &offsets, layout)
                .unwrap()
        };
        group.bench_function(format!("{name} forward"), |b| b.iter(forward));
        group.bench_function(format!("{name} forward and backward"), |b| {
            b.iter(|| forward().backward().unwrap())
        });
    }
    group.finish();
}

/// The cost of a call that is too small to be divided among threads.
fn small(c: &mut Criterion) {
    let layer = layer("default", Mode::Sum, DType::F32, 64).unwrap();
    let mut group = c.benchmark_group("small");
    for num_bags in [1, 64] {
        let indices = indices(num_bags, 26).unwrap();
        group.bench_function(format!("{num_bags} x 26"), |b| {
            b.iter(|| layer.bag.forward(&indices).unwrap())
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = large, steps, jagged, small
}
criterion_main!(benches);
