//! Measures lookups on this machine's GPU: time, gathered values per second, and their bandwidth relative to a device copy
//! measured in the same run.
//!
//! ```text
//! cargo run --release -p benches --bin gpu --features cuda
//! cargo run --release -p benches --bin gpu --features cuda -- --json gpu.json --save-indices DIR
//! ```
//!
//! `--save-indices` writes the indices as safetensors, so that the programs in benches/peers/ look up exactly the same rows.

use anyhow::{Context, Result};
use candle_core::cuda_backend::cudarc::driver::sys;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_hashed_embedding_bag::optim::Adagrad;
use candle_hashed_embedding_bag::{
    Bits, BoundsCheck, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, Mode,
};
use candle_nn::Optimizer;
use clap::Parser;
use comfy_table::{presets::ASCII_MARKDOWN, CellAlignment, Table};
use rand::{rngs::SmallRng, Rng, RngExt, SeedableRng};
use serde::Serialize;
use std::cell::RefCell;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Parser)]
struct Options {
    /// Write the results here as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write the indices here, a safetensors file per distribution.
    #[arg(long)]
    save_indices: Option<PathBuf>,
    /// Only workloads whose name contains one of these.
    #[arg(long, value_delimiter = ',', default_value = "")]
    only: Vec<String>,
    /// Timings per workload, of which the median counts.
    #[arg(long, default_value_t = 9)]
    repeats: usize,
    /// The GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
}

const NUM_EMBEDDINGS: usize = 10_000_000;
const NUM_BAGS: usize = 65_536;
const BAG_LEN: usize = 20;

/// How rows are drawn and divided into bags.
#[derive(Clone, Copy, PartialEq)]
enum Rows {
    /// Bags of 20 uniform rows.
    Uniform,
    /// Bags of 20 uniform rows of a million: the row tensors of some hashes then stay in the L2.
    Million,
    /// Bags of 20 rows `floor(n^u) - 1`, u uniform: few rows are drawn most of the time.
    Zipf,
    /// Bags of 0 to 40 uniform rows.
    Ragged,
    /// One bag in 1,000 of 5,000 uniform rows, the others of 15 or so.
    HeavyTail,
    /// 2,048 bags of 0 to 6 of 20,000 rows: the benchmark of HashedEmbeddingBag.
    Original,
}

impl Rows {
    fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Million => "uniform, of a million",
            Self::Zipf => "zipf",
            Self::Ragged => "ragged",
            Self::HeavyTail => "heavy-tail",
            Self::Original => "original",
        }
    }

    fn num_embeddings(self) -> usize {
        match self {
            Self::Original => 20_000,
            Self::Million => 1_000_000,
            _ => NUM_EMBEDDINGS,
        }
    }

    /// Indices and, for bags of different lengths, offsets.
    fn draw(self) -> (Vec<i64>, Option<Vec<i64>>) {
        let mut rng = SmallRng::seed_from_u64(17);
        let nnz = NUM_BAGS * BAG_LEN;
        let lengths: Option<Vec<usize>> = match self {
            Self::Uniform | Self::Million | Self::Zipf => None,
            Self::Ragged => Some(
                (0..NUM_BAGS)
                    .map(|_| rng.random_range(0..=2 * BAG_LEN))
                    .collect(),
            ),
            Self::Original => Some((0..2_048).map(|_| rng.random_range(0..=6)).collect()),
            Self::HeavyTail => {
                let long = |bag: usize| bag % 1_000 == 500;
                let rest = nnz - (0..NUM_BAGS).filter(|&bag| long(bag)).count() * 5_000;
                let short = rest / NUM_BAGS;
                Some(
                    (0..NUM_BAGS)
                        .map(|bag| if long(bag) { 5_000 } else { short })
                        .collect(),
                )
            }
        };
        let nnz = lengths.as_ref().map_or(nnz, |lengths| lengths.iter().sum());
        let n = self.num_embeddings() as f64;
        let draw = |rng: &mut SmallRng| match self {
            Self::Zipf => n.powf(rng.random::<f64>()).floor() as i64 - 1,
            _ => rng.random_range(0..self.num_embeddings() as i64),
        };
        let indices = (0..nnz).map(|_| draw(&mut rng)).collect();
        let offsets = lengths.map(|lengths| {
            lengths
                .iter()
                .scan(0, |next, &len| {
                    Some(std::mem::replace(next, *next + len as i64))
                })
                .collect()
        });
        (indices, offsets)
    }
}

struct Workload {
    name: &'static str,
    rows: Rows,
    mode: Mode,
    hash: Hash,
    dtype: DType,
    embedding_dim: usize,
    len: usize,
    bounds_check: BoundsCheck,
    gradient: Gradient,
    /// Rounds the layer, which then has a forward only.
    bits: Option<Bits>,
}

fn workloads() -> Result<Vec<Workload>> {
    let base = || -> Result<Workload> {
        Ok(Workload {
            name: "default",
            rows: Rows::Uniform,
            mode: Mode::Sum,
            hash: Hash::balanced(16),
            dtype: DType::F32,
            embedding_dim: 128,
            len: 1_280_000,
            bounds_check: BoundsCheck::Off,
            gradient: Gradient::Fastest,
            bits: None,
        })
    };
    let low_bit = |name, bits, rows, len, block| -> Result<Workload> {
        Ok(Workload {
            name,
            rows,
            len,
            hash: Hash::balanced(block),
            bits: Some(bits),
            ..base()?
        })
    };
    let by_rows = |name, rows, hash| -> Result<Workload> {
        Ok(Workload {
            name,
            rows,
            hash,
            ..base()?
        })
    };
    // Those of the ROBE package by default, as far as they matter.
    let numbers = [
        2_038_074_743,
        634_329_019,
        1_825_252_241,
        871_205_356,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
        369_480_626,
        585_176_928,
        1_830_667_799,
        17_682_904,
        42_749_099,
        642_135_753,
        666_118_921,
        852_289_015,
        1_807_511_361,
        400_946_194,
        961_960_675,
        1_717_623_355,
        348_735_301,
        1_908_929_968,
        1_392_981_797,
        1_360_581_189,
    ];
    let (eight, four) = (Bits::Eight, Bits::Four);
    let checked = BoundsCheck::Error;
    Ok(vec![
        base()?,
        Workload {
            name: "checked",
            bounds_check: checked,
            ..base()?
        },
        Workload {
            name: "deterministic",
            gradient: Gradient::Deterministic,
            ..base()?
        },
        Workload {
            name: "zipf",
            rows: Rows::Zipf,
            ..base()?
        },
        Workload {
            name: "f16",
            dtype: DType::F16,
            ..base()?
        },
        Workload {
            name: "f16 block 32",
            dtype: DType::F16,
            hash: Hash::balanced(32),
            ..base()?
        },
        Workload {
            name: "bf16",
            dtype: DType::BF16,
            ..base()?
        },
        Workload {
            name: "bf16 block 32",
            dtype: DType::BF16,
            hash: Hash::balanced(32),
            ..base()?
        },
        Workload {
            name: "block 32",
            hash: Hash::balanced(32),
            ..base()?
        },
        low_bit("8 bits", eight, Rows::Uniform, 1_280_000, 16)?,
        low_bit("8 bits block 32", eight, Rows::Uniform, 1_280_000, 32)?,
        low_bit("8 bits zipf", eight, Rows::Zipf, 1_280_000, 32)?,
        low_bit("8 bits ragged", eight, Rows::Ragged, 1_280_000, 32)?,
        low_bit("8 bits 100M", eight, Rows::Uniform, 100_000_000, 32)?,
        low_bit("4 bits", four, Rows::Uniform, 1_280_000, 16)?,
        low_bit("4 bits block 32", four, Rows::Uniform, 1_280_000, 32)?,
        low_bit("4 bits zipf", four, Rows::Zipf, 1_280_000, 32)?,
        low_bit("4 bits ragged", four, Rows::Ragged, 1_280_000, 32)?,
        low_bit("4 bits 100M", four, Rows::Uniform, 100_000_000, 32)?,
        Workload {
            name: "dim 16",
            embedding_dim: 16,
            ..base()?
        },
        Workload {
            name: "dim 16 zipf",
            embedding_dim: 16,
            rows: Rows::Zipf,
            ..base()?
        },
        Workload {
            name: "dim 64",
            embedding_dim: 64,
            ..base()?
        },
        Workload {
            name: "100M block 32",
            len: 100_000_000,
            hash: Hash::balanced(32),
            ..base()?
        },
        Workload {
            name: "random places",
            hash: Hash::mix(16),
            ..base()?
        },
        Workload {
            name: "original",
            hash: Hash::original(),
            ..base()?
        },
        by_rows("robe block 8", Rows::Uniform, Hash::robe(&numbers, 8)?)?,
        by_rows("lma", Rows::Uniform, Hash::lma(&numbers, 4, 8, 1)?)?,
        by_rows("lma block 8", Rows::Uniform, Hash::lma(&numbers, 4, 8, 8)?)?,
        by_rows("semantic", Rows::Uniform, Hash::semantic(16))?,
        by_rows("semantic, million", Rows::Million, Hash::semantic(16))?,
        by_rows("slot table", Rows::Uniform, Hash::slot_table(16))?,
        by_rows("slot table, million", Rows::Million, Hash::slot_table(16))?,
        Workload {
            name: "the original's own",
            rows: Rows::Original,
            hash: Hash::original(),
            embedding_dim: 16,
            len: 10_000,
            ..base()?
        },
        Workload {
            name: "the same, balanced",
            rows: Rows::Original,
            embedding_dim: 16,
            len: 10_000,
            ..base()?
        },
        Workload {
            name: "max",
            mode: Mode::Max,
            ..base()?
        },
        Workload {
            name: "mean",
            mode: Mode::Mean,
            ..base()?
        },
        Workload {
            name: "ragged",
            rows: Rows::Ragged,
            ..base()?
        },
        Workload {
            name: "heavy tail",
            rows: Rows::HeavyTail,
            ..base()?
        },
    ])
}

/// Workloads that differ in the hash alone.
const PAIRS: [(&str, &str); 6] = [
    ("lma", "original"),
    ("lma block 8", "robe block 8"),
    ("semantic", "default"),
    ("semantic, million", "default"),
    ("slot table", "default"),
    ("slot table, million", "default"),
];

/// The row tensor of a hash, if it reads one, of random numbers.
fn row_tensor(w: &Workload, device: &Device) -> Result<Option<Tensor>> {
    let rows = w.rows.num_embeddings();
    let mut rng = SmallRng::seed_from_u64(23);
    let tensor = match w.hash.row_tensor() {
        None => return Ok(None),
        Some("signatures") => {
            let signatures = (0..rows).map(|_| rng.random::<i64>());
            Tensor::from_iter(signatures, device)?
        }
        Some(_) => {
            let column_blocks = w.embedding_dim.div_ceil(w.hash.block());
            let num_blocks = (w.len / w.hash.block()) as u32;
            let entries = (0..rows * column_blocks).map(|_| rng.random_range(0..num_blocks));
            Tensor::from_iter(entries, device)?.reshape((rows, column_blocks))?
        }
    };
    Ok(Some(tensor))
}

#[derive(Serialize)]
struct Measurement {
    name: &'static str,
    rows: &'static str,
    gathered_values: usize,
    forward_ms: f64,
    /// Of a layer that trains, as the three below.
    forward_backward_ms: Option<f64>,
    /// Forward, backward and Adagrad, with a sparse gradient.
    step_ms: Option<f64>,
    forward_gel_per_s: f64,
    backward_gel_per_s: Option<f64>,
    /// Bytes of gathered values per second.
    forward_tb_per_s: f64,
    share_of_copy: f64,
    /// Peak device memory of a forward and backward, without indices, weight, output and the gradients of weight and output.
    step_mib: Option<f64>,
}

#[derive(Serialize)]
struct Report {
    copy_tb_per_s: f64,
    workloads: Vec<Measurement>,
    small: Vec<Small>,
}

#[derive(Serialize)]
struct Small {
    name: &'static str,
    forward_us: f64,
}

/// The median time of a call of `run`, in milliseconds. Each timing covers many calls and ends when the device is done.
fn median_ms<T>(
    device: &Device,
    repeats: usize,
    run: impl Fn() -> candle_core::Result<T>,
) -> Result<f64> {
    for _ in 0..3 {
        run()?;
    }
    device.synchronize()?;
    let calls = 50;
    let mut times = vec![];
    for _ in 0..repeats {
        let start = Instant::now();
        for _ in 0..calls {
            run()?;
        }
        device.synchronize()?;
        times.push(start.elapsed().as_secs_f64() * 1e3 / f64::from(calls));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// Bytes read plus bytes written per second by a large copy.
fn copy_tb_per_s(device: &Device, repeats: usize) -> Result<f64> {
    let values = 1 << 29;
    let from = Tensor::zeros(values, DType::F32, device)?;
    let ms = median_ms(device, repeats, || from.copy())?;
    Ok(2.0 * 4.0 * values as f64 / ms / 1e9)
}

fn measure(w: &Workload, device: &Device, repeats: usize, copy: f64) -> Result<Measurement> {
    let (indices, offsets) = w.rows.draw();
    let nnz = indices.len();
    let indices = Tensor::new(indices, device)?;
    let offsets = match offsets {
        Some(offsets) => Some(Tensor::new(offsets, device)?),
        None => None,
    };
    let indices = match &offsets {
        None => indices.reshape((NUM_BAGS, BAG_LEN))?,
        Some(_) => indices,
    };
    let weight = Tensor::randn(0f32, 1f32, w.len, device)?.to_dtype(w.dtype)?;
    let config = HashedEmbeddingBagConfig {
        mode: w.mode,
        hash: Some(w.hash),
        bounds_check: w.bounds_check,
        gradient: w.gradient,
        ..Default::default()
    };
    let num_embeddings = w.rows.num_embeddings();
    let row_tensor = row_tensor(w, device)?;
    let layer = |weight: &Tensor| {
        let (weight, dim) = (weight.clone(), w.embedding_dim);
        match &row_tensor {
            None => HashedEmbeddingBag::new(weight, num_embeddings, dim, config),
            Some(rows) => {
                HashedEmbeddingBag::with_row_tensor(weight, rows, num_embeddings, dim, config)
            }
        }
    };
    let forward = |layer: &HashedEmbeddingBag| match &offsets {
        None => layer.forward(&indices),
        Some(offsets) => layer.forward_with_offsets(&indices, offsets),
    };
    let frozen = match w.bits {
        None => layer(&weight)?,
        Some(bits) => layer(&weight)?.to_bits(bits)?.0,
    };
    let forward_ms = median_ms(device, repeats, || forward(&frozen))?;
    let step = match w.bits {
        None => {
            let var = Var::from_tensor(&weight)?;
            let trained = layer(&var)?;
            let ms = median_ms(device, repeats, || forward(&trained)?.backward())?;

            let sparse = trained.with_sparse(true)?;
            let optimizer = RefCell::new(Adagrad::new_lr(vec![var.clone()], 0.01)?);
            let step_ms = median_ms(device, repeats, || {
                optimizer.borrow_mut().backward_step(&forward(&sparse)?)
            })?;
            drop((optimizer, sparse));

            let memory = DeviceMemory::start(device)?;
            let out = forward(&trained)?;
            let grads = out.backward()?;
            device.synchronize()?;
            // The weight's gradient, the output and the gradient it starts from.
            let kept = (w.len + 2 * out.elem_count()) * w.dtype.size_in_bytes();
            let mib = (memory.peak()? as f64 - kept as f64) / f64::from(1 << 20);
            drop(grads);
            Some((ms, step_ms, mib))
        }
        Some(_) => None,
    };

    let values = nnz * w.embedding_dim;
    let bits = match w.bits {
        None => 8 * w.dtype.size_in_bytes(),
        Some(bits) => u32::from(bits) as usize,
    };
    let tb_per_s = (values * bits) as f64 / 8.0 / forward_ms / 1e9;
    Ok(Measurement {
        name: w.name,
        rows: w.rows.name(),
        gathered_values: values,
        forward_ms,
        forward_backward_ms: step.map(|(ms, ..)| ms),
        step_ms: step.map(|(_, ms, _)| ms),
        forward_gel_per_s: values as f64 / forward_ms / 1e6,
        backward_gel_per_s: step.map(|(ms, ..)| values as f64 / (ms - forward_ms) / 1e6),
        forward_tb_per_s: tb_per_s,
        share_of_copy: tb_per_s / copy,
        step_mib: step.map(|(.., mib)| mib),
    })
}

/// The device memory in use, as counted by the driver's pool, from which candle allocates.
struct DeviceMemory {
    pool: sys::CUmemoryPool,
    before: u64,
}

impl DeviceMemory {
    fn pool(device: &Device) -> Result<sys::CUmemoryPool> {
        let stream = device.as_cuda_device()?.cuda_stream();
        stream.synchronize()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: the device exists, and the driver writes its pool to `pool`.
        unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()) }
            .result()?;
        Ok(pool)
    }

    /// Lets the pool keep freed memory, as torch's allocator does. By default it returns memory at every synchronisation, and the
    /// next call pays for mapping it again.
    fn keep(device: &Device) -> Result<()> {
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut all = u64::MAX;
        // SAFETY: the attribute is a u64.
        unsafe {
            sys::cuMemPoolSetAttribute(Self::pool(device)?, attribute, (&raw mut all).cast())
        }
        .result()?;
        Ok(())
    }

    fn start(device: &Device) -> Result<Self> {
        let pool = Self::pool(device)?;
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let mut zero = 0u64;
        // SAFETY: the attribute is a u64; writing zero resets it to the present use.
        unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast()) }.result()?;
        let mut memory = Self { pool, before: 0 };
        memory.before = memory.read()?;
        Ok(memory)
    }

    /// The most bytes in use at any time since `start`.
    fn read(&self) -> Result<u64> {
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        let mut bytes = 0u64;
        // SAFETY: the attribute is a u64.
        unsafe { sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut bytes).cast()) }
            .result()?;
        Ok(bytes)
    }

    /// How far use rose above what it was at `start`.
    fn peak(&self) -> Result<u64> {
        Ok(self.read()? - self.before)
    }
}

/// 26 tables, one row of each for 64 samples: as one collection, and as 26 layers.
fn tables(device: &Device, repeats: usize) -> Result<[Small; 2]> {
    let (batch, tables, rows) = (64, 26, NUM_EMBEDDINGS / 26);
    let mut rng = SmallRng::seed_from_u64(5);
    let ids: Vec<i64> = (0..batch * tables)
        .map(|_| rng.random_range(0..rows as i64))
        .collect();
    let ids = Tensor::from_vec(ids, (batch, tables), device)?;
    let weight = Tensor::randn(0f32, 1f32, 1_280_000, device)?;
    let config = HashedEmbeddingBagConfig {
        bounds_check: BoundsCheck::Off,
        ..Default::default()
    };
    let names = (0..tables).map(|t| (t.to_string(), rows));
    let collection = HashedEmbeddingBagCollection::new(weight, names, 64, config)?;
    let layers = (0..tables).map(|t| collection.table(&t.to_string()));
    let layers = layers.collect::<candle_core::Result<Vec<_>>>()?;
    let columns = (0..tables).map(|t| ids.narrow(1, t, 1)?.contiguous());
    let columns = columns.collect::<candle_core::Result<Vec<_>>>()?;
    let together = median_ms(device, repeats, || collection.forward(&ids))?;
    let apart = median_ms(device, repeats, || {
        let rows = layers.iter().zip(&columns);
        rows.map(|(layer, ids)| layer.forward(ids))
            .collect::<candle_core::Result<Vec<_>>>()
    })?;
    Ok([
        Small {
            name: "26 tables x 64, dim 64, one collection",
            forward_us: together * 1e3,
        },
        Small {
            name: "26 tables x 64, dim 64, a layer each",
            forward_us: apart * 1e3,
        },
    ])
}

/// The cost of a call with next to nothing to look up.
fn small(name: &'static str, num_bags: usize, device: &Device, repeats: usize) -> Result<Small> {
    let mut rng = SmallRng::seed_from_u64(3);
    let indices: Vec<i64> = (0..num_bags * 26)
        .map(|_| (rng.next_u64() % NUM_EMBEDDINGS as u64) as i64)
        .collect();
    let indices = Tensor::from_vec(indices, (num_bags, 26), device)?;
    let weight = Tensor::randn(0f32, 1f32, 1_280_000, device)?;
    let config = HashedEmbeddingBagConfig {
        bounds_check: BoundsCheck::Off,
        ..Default::default()
    };
    let layer = HashedEmbeddingBag::new(weight, NUM_EMBEDDINGS, 64, config)?;
    let ms = median_ms(device, repeats, || layer.forward(&indices))?;
    Ok(Small {
        name,
        forward_us: ms * 1e3,
    })
}

fn main() -> Result<()> {
    let options = Options::parse();
    let device = Device::new_cuda(options.gpu).context("this benchmark needs a CUDA device")?;
    DeviceMemory::keep(&device)?;
    if let Some(folder) = &options.save_indices {
        std::fs::create_dir_all(folder)?;
        for rows in [Rows::Uniform, Rows::Zipf, Rows::Ragged, Rows::HeavyTail] {
            let (indices, offsets) = rows.draw();
            let mut tensors = vec![("indices", Tensor::new(indices, &Device::Cpu)?)];
            if let Some(offsets) = offsets {
                tensors.push(("offsets", Tensor::new(offsets, &Device::Cpu)?));
            }
            let path = folder.join(format!("{}.safetensors", rows.name()));
            safetensors::serialize_to_file(tensors, None, &path)?;
        }
    }
    let copy = copy_tb_per_s(&device, options.repeats)?;
    let mut report = Report {
        copy_tb_per_s: copy,
        workloads: vec![],
        small: vec![],
    };
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "workload",
        "forward ms",
        "Gel/s",
        "TB/s",
        "of copy",
        "fwd+bwd ms",
        "bwd Gel/s",
        "with sparse Adagrad ms",
        "step MiB",
    ]);
    for w in workloads()?
        .iter()
        .filter(|w| options.only.iter().any(|only| w.name.contains(only)))
    {
        let m = measure(w, &device, options.repeats, copy).context(w.name)?;
        let shown = |value: Option<f64>, digits| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_string(),
        };
        table.add_row([
            m.name.to_string(),
            format!("{:.3}", m.forward_ms),
            format!("{:.0}", m.forward_gel_per_s),
            format!("{:.2}", m.forward_tb_per_s),
            format!("{:.0} %", m.share_of_copy * 1e2),
            shown(m.forward_backward_ms, 3),
            shown(m.backward_gel_per_s, 0),
            shown(m.step_ms, 3),
            shown(m.step_mib, 1),
        ]);
        report.workloads.push(m);
    }
    for (name, num_bags) in [("1 x 26, dim 64", 1), ("64 x 26, dim 64", 64)] {
        report
            .small
            .push(small(name, num_bags, &device, options.repeats)?);
    }
    report.small.extend(tables(&device, options.repeats)?);
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    for small in &report.small {
        println!(
            "{}: {:.1} us per forward call",
            small.name, small.forward_us
        );
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("copy: {copy:.2} TB/s, read and written\n{table}");
    for (name, other) in PAIRS {
        let find = |name| report.workloads.iter().find(|m| m.name == name);
        if let (Some(m), Some(other)) = (find(name), find(other)) {
            println!(
                "{name} beside {}: forward {:.2}x its speed",
                other.name,
                other.forward_ms / m.forward_ms
            );
        }
    }
    Ok(())
}
