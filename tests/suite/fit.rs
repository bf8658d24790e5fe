//! Fitting a layer to a given table: against sums by the formulas, and by laws that must hold.
//!
//! That fit gives the same bits with any number of threads is in threads.rs, that it leaves padding out in padding.rs.

use crate::common::{
    floats, identity, layer, message, mix, naive_slot, on_each_device, robe, to_vec, Draws, SIGNED,
    UNSIGNED,
};
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mode};

fn config(hash: Hash) -> HashedEmbeddingBagConfig {
    crate::common::config(Mode::Sum, hash)
}

fn random_table(rows: usize, columns: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let values = Draws::new(rows as u64).reals(rows * columns);
    floats(&values, dtype, device)?.reshape((rows, columns))
}

/// The best weight, unrounded, and the error of `fitted`, by the formulas, one element after the other.
fn naive(
    table: &Tensor,
    config: &HashedEmbeddingBagConfig,
    fitted: &[f64],
) -> Result<(Vec<f64>, f64)> {
    let table: Vec<Vec<f64>> = table
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .to_vec2()?;
    let len = fitted.len();
    let elements = || {
        table.iter().enumerate().flat_map(move |(row, values)| {
            let counts = Some(row as i64) != config.padding_idx;
            values
                .iter()
                .enumerate()
                .filter(move |_| counts)
                .map(move |(column, &value)| {
                    let row = (config.first_row + row) as i64;
                    let (slot, sign) = naive_slot(&config.hash.unwrap(), row, column, len);
                    (slot, sign, value)
                })
        })
    };
    let (mut sums, mut counts) = (vec![0.0; len], vec![0.0; len]);
    for (slot, sign, value) in elements() {
        sums[slot] += sign * value;
        counts[slot] += 1.0;
    }
    let means = sums
        .iter()
        .zip(&counts)
        .map(|(sum, count)| sum / f64::max(*count, 1.0));
    let (mut lost, mut total) = (0.0, 0.0);
    for (slot, sign, value) in elements() {
        lost += (value - sign * fitted[slot]).powi(2);
        total += value * value;
    }
    Ok((means.collect(), f64::sqrt(lost / total)))
}

#[test]
fn each_slot_is_the_mean_of_what_it_holds() -> Result<()> {
    let hashes = [
        Hash::default_for(21),
        mix(7, 3, UNSIGNED),
        mix(7, 40, UNSIGNED),
        mix(1, 32, SIGNED),
        Hash::original(),
        robe(8),
    ];
    on_each_device(|device| {
        for hash in hashes {
            for (rows, columns, compression) in
                [(97, 21, 0.1), (300, 1, 0.7), (5, 21, 1.0), (64, 33, 1e-9)]
            {
                for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                    let table = random_table(rows, columns, dtype, device)?;
                    let config = HashedEmbeddingBagConfig {
                        first_row: 1 << 20,
                        padding_idx: Some(3),
                        ..config(hash)
                    };
                    let (layer, error) = HashedEmbeddingBag::fit(&table, compression, config)?;
                    let what = format!("{hash:?} {rows} {columns} {compression} {dtype:?}");
                    let weight = layer.hashed_weight();
                    assert_eq!(weight.dtype(), dtype, "{what}");
                    assert!(weight.device().same_device(device), "{what}");
                    assert_eq!(layer.config(), config, "{what}");
                    let weight = to_vec(weight)?;
                    let (means, naive_error) = naive(&table, &config, &weight)?;
                    let means = floats(&means, dtype, &Device::Cpu)?;
                    assert_eq!(weight, to_vec(&means)?, "{what}");
                    assert!(
                        (error - naive_error).abs() <= 1e-12,
                        "{what}: {error} {naive_error}"
                    );
                }
            }
        }
        Ok(())
    })
}

/// A table that a layer can hold is found without error: the fit of the table of a layer is that layer.
#[test]
fn a_table_that_a_layer_holds_is_fitted_without_error() -> Result<()> {
    on_each_device(|device| {
        for hash in [mix(3, 8, SIGNED), Hash::original()] {
            let weight = floats(&Draws::new(9).halves(240), DType::F32, device)?;
            let config = config(hash);
            let layer = layer(&weight, 100, 24, config)?;
            let table = layer.to_table(..)?;
            let (fitted, error) = HashedEmbeddingBag::fit(&table, 0.1, config)?;
            assert_eq!(error, 0.0, "{hash:?}");
            assert_eq!(to_vec(&fitted.to_table(..)?)?, to_vec(&table)?, "{hash:?}");
        }
        // With a slot for every value, any table is held.
        let table = random_table(50, 6, DType::F32, device)?;
        let (fitted, error) = HashedEmbeddingBag::fit(&table, 1.0, config(identity(6)))?;
        assert_eq!(error, 0.0);
        assert_eq!(to_vec(fitted.hashed_weight())?, to_vec(&table)?);
        Ok(())
    })
}

#[test]
fn a_table_of_zeros_is_fitted_without_error() -> Result<()> {
    let zeros = Tensor::zeros((10, 4), DType::F32, &Device::Cpu)?;
    let (layer, error) = HashedEmbeddingBag::fit(&zeros, 0.1, Default::default())?;
    assert_eq!((error, layer.hashed_weight().dims()), (0.0, &[4][..]));
    Ok(())
}

#[test]
fn tables_that_cannot_be_fitted_are_refused() -> Result<()> {
    let device = &Device::Cpu;
    let table = random_table(10, 4, DType::F32, device)?;
    let fit = |table: &Tensor, compression: f64| {
        let config = config(Hash::original());
        message(HashedEmbeddingBag::fit(table, compression, config))
    };
    let infinity = Tensor::full(f32::INFINITY, (1, 4), device)?;
    let infinite = Tensor::cat(&[&table, &infinity], 0)?;
    for (got, said) in [
        (
            fit(&infinite, 0.5),
            "table must be finite, got inf at row 10, column 0",
        ),
        (
            fit(&table.flatten_all()?, 0.5),
            "table must have rank 2, got [40]",
        ),
        (
            fit(&table.to_dtype(DType::I64)?, 0.5),
            "table must have dtype f16 or bf16 or f32 or f64, got i64",
        ),
        (fit(&table, 0.0), "compression must lie in (0, 1], got 0"),
        (
            fit(&table.narrow(0, 0, 0)?, 0.5),
            "num_embeddings must lie in 1..2^63, got 0",
        ),
        (
            fit(&table.narrow(1, 0, 0)?, 0.5),
            "embedding_dim must lie in 1..2^31, got 0",
        ),
    ] {
        assert_eq!(got, format!("hashed-embedding-bag: {said}"));
    }
    Ok(())
}

/// More than 2^32 elements, in a table that repeats one row. Takes minutes without optimisation.
#[test]
#[ignore = "more than 2^32 elements; run with --release"]
fn tables_past_32_bits() -> Result<()> {
    let row = random_table(1, 64, DType::F32, &Device::Cpu)?;
    let table = row.broadcast_as(((1 << 26) + 1, 64))?;
    // hashed_weight is one block, and every row is that block.
    let (layer, error) = HashedEmbeddingBag::fit(&table, 1e-9, config(identity(64)))?;
    assert_eq!(to_vec(layer.hashed_weight())?, to_vec(&row)?);
    assert_eq!(error, 0.0);
    Ok(())
}
