//! Sizes past 31 and 32 bits, on a GPU with the memory for them. They take minutes and up to 60 GB of its memory, and so run
//! on request:
//!
//! ```text
//! cargo test --release --features cuda --test large -- --ignored --test-threads 1
//! ```

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    BoundsCheck, Gradient, Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mode,
};
use common::{cuda, naive_slot, to_vec};

const PAST_32: usize = (1 << 32) + 64;

fn layer(weight: &Tensor, dim: usize, hash: Hash, mode: Mode) -> Result<HashedEmbeddingBag> {
    let config = HashedEmbeddingBagConfig {
        hash: Some(hash),
        mode,
        ..Default::default()
    };
    HashedEmbeddingBag::new(weight.clone(), 1 << 40, dim, config)
}

fn row(device: &Device, row: i64) -> Result<Tensor> {
    Tensor::new(&[[row]], device)
}

#[test]
#[ignore = "needs a large GPU"]
fn slots_past_32_bits() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    for hash in [
        Hash::mix(0, 16, true)?,
        Hash::mix(0, 2, true)?,
        Hash::original(),
    ] {
        // f16, 8.6 GB; zeros but for the slots of one row, which are written one by one.
        let weight = Tensor::zeros(PAST_32, DType::F16, &device)?;
        let mut highest = 0;
        let mut want = vec![];
        let number = (0..1i64 << 20)
            .find(|&row| {
                let slots = (0..16).map(|column| naive_slot(&hash, row, column, PAST_32).0);
                slots.max().unwrap_or(0) > 1 << 32
            })
            .unwrap_or(12_345);
        for column in 0..16 {
            let (slot, sign) = naive_slot(&hash, number, column, PAST_32);
            highest = highest.max(slot);
            let value = column as f64 + 1.0;
            weight.slice_set(
                &Tensor::new(&[value as f32], &device)?.to_dtype(DType::F16)?,
                0,
                slot,
            )?;
            want.push(sign * value);
        }
        assert!(highest > 1 << 31);
        let out = layer(&weight, 16, hash, Mode::Sum)?.forward(&row(&device, number)?)?;
        assert_eq!(to_vec(&out)?, want, "{hash:?}");
    }
    Ok(())
}

#[test]
#[ignore = "needs a large GPU"]
fn gradients_of_slots_up_to_31_bits() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    // As many slots as candle itself can add up: its kernels count in 32 bits, and past 31 never end.
    let len = (1usize << 31) - 64;
    let hash = Hash::mix(0, 16, true)?;
    for gradient in [Gradient::Fastest, Gradient::Deterministic] {
        let weight = Var::zeros(len, DType::BF16, &device)?;
        let config = HashedEmbeddingBagConfig {
            hash: Some(hash),
            gradient,
            ..Default::default()
        };
        let layer = HashedEmbeddingBag::new(weight.as_tensor().clone(), 1 << 40, 64, config)?;
        let rows = [7i64, 1 << 33, 7];
        let out = layer.forward(&Tensor::new(&[rows], &device)?)?;
        let grads = out.sum_all()?.backward()?;
        let grad = grads.get(&weight).expect("a variable");
        for (row, times) in [(7, 2.0), (1 << 33, 1.0)] {
            for column in 0..64 {
                let (slot, sign) = naive_slot(&hash, row, column, len);
                let got = to_vec(&grad.narrow(0, slot, 1)?)?;
                assert_eq!(
                    got,
                    [sign * times],
                    "{gradient:?} row {row} column {column}"
                );
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a large GPU"]
fn indices_past_32_bits() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    // 17 GB of row 0, but for the last two of the last bag.
    let (num_bags, bag_len) = ((1 << 22) + 1, 1024);
    let indices = Tensor::zeros((num_bags, bag_len), DType::U32, &device)?;
    let others = Tensor::new(&[[5u32, 6]], &device)?;
    let start = bag_len - 2;
    let kept = Tensor::zeros((1, start), DType::U32, &device)?;
    let last_bag = Tensor::cat(&[&kept, &others], 1)?;
    indices.slice_set(&last_bag, 0, num_bags - 1)?;
    let hash = Hash::identity(4)?;
    let weight = Tensor::arange(0f32, 40f32, &device)?;
    for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
        let config = HashedEmbeddingBagConfig {
            hash: Some(hash),
            mode,
            bounds_check: BoundsCheck::Error,
            ..Default::default()
        };
        let layer = HashedEmbeddingBag::new(weight.clone(), 10, 4, config)?;
        let out = layer.forward(&indices)?;
        let got = to_vec(&out.narrow(0, num_bags - 1, 1)?)?;
        let want = (0..4).map(|column| {
            let (zero, five, six) = (column as f64, 20.0 + column as f64, 24.0 + column as f64);
            match mode {
                Mode::Sum => zero * start as f64 + five + six,
                Mode::Mean => (zero * start as f64 + five + six) / bag_len as f64,
                Mode::Max => six,
            }
        });
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() <= 1e-6 * want.abs(),
                "{mode:?}: {got} is not {want}"
            );
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a large GPU"]
fn outputs_past_32_bits() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    // 2^26 bags of 65 columns: 4.4 billion values of f16.
    let (num_bags, dim) = ((1usize << 26) + 3, 65);
    let indices = Tensor::zeros((num_bags, 1), DType::U32, &device)?;
    for bag in [0, 1 << 25, num_bags - 1] {
        let row = Tensor::new(&[[(bag % 1000) as u32 + 1]], &device)?;
        indices.slice_set(&row, 0, bag)?;
    }
    for hash in [Hash::mix(0, 16, true)?, Hash::original()] {
        let weight = Tensor::randn(0f32, 1f32, 4096, &device)?.to_dtype(DType::F16)?;
        let layer = layer(&weight, dim, hash, Mode::Sum)?;
        let out = layer.forward(&indices)?;
        for bag in [0, 1 << 25, num_bags - 2, num_bags - 1] {
            let number = if bag == num_bags - 2 {
                0
            } else {
                bag % 1000 + 1
            };
            let want = layer.forward(&row(&device, number as i64)?)?;
            let got = to_vec(&out.narrow(0, bag, 1)?)?;
            assert_eq!(got, to_vec(&want)?, "bag {bag} {hash:?}");
        }
    }
    Ok(())
}
