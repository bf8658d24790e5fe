//! Fitting a layer to a given table: against sums by the formulas, and by what must hold.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix};
use common::{
    floats, message, naive_slot, on_each_device, same_on_any_number_of_threads, to_vec, Draws,
};

fn config(hash: Hash) -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        hash: Some(hash),
        ..Default::default()
    }
}

/// Values between -1 and 1 that no float dtype rounds further than its own.
fn random_table(rows: usize, columns: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let mut draws = Draws::new(rows as u64);
    let values: Vec<f64> = (0..rows * columns)
        .map(|_| draws.below(1 << 20) as f64 / (1 << 19) as f64 - 1.0)
        .collect();
    floats(&values, dtype, device)?.reshape((rows, columns))
}

/// The weight, unrounded, and the error of `fitted` by the formulas, one element after the other.
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
    let numbers = [2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356];
    let hashes = [
        Hash::default_for(21),
        Hash::from(Mix {
            seed: 7,
            block: 3,
            signed: false,
        }),
        Hash::from(Mix {
            seed: 7,
            block: 40,
            signed: false,
        }),
        Hash::from(Mix {
            seed: 1,
            block: 32,
            signed: true,
        }),
        Hash::original(),
        Hash::robe(&numbers, 8)?,
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

/// A table that a layer can hold is held: the fit of a layer's own table is that layer, without error.
#[test]
fn what_fits_is_found() -> Result<()> {
    on_each_device(|device| {
        for hash in [
            Hash::from(Mix {
                seed: 3,
                block: 8,
                signed: true,
            }),
            Hash::original(),
        ] {
            let weight = Draws::new(9).halves(240);
            let config = config(hash);
            let weight = floats(&weight, DType::F32, device)?;
            let layer = HashedEmbeddingBag::new(weight, 100, 24, config)?;
            let table = layer.to_table(..)?;
            let (fitted, error) = HashedEmbeddingBag::fit(&table, 0.1, config)?;
            assert_eq!(error, 0.0, "{hash:?}");
            assert_eq!(to_vec(&fitted.to_table(..)?)?, to_vec(&table)?, "{hash:?}");
        }
        // With a slot for every value, any table is.
        let table = random_table(50, 6, DType::F32, device)?;
        let (fitted, error) = HashedEmbeddingBag::fit(&table, 1.0, config(Hash::identity(6)))?;
        assert_eq!(error, 0.0);
        assert_eq!(to_vec(fitted.hashed_weight())?, to_vec(&table)?);
        Ok(())
    })
}

/// More than one part and many tasks: the same bits on any number of threads, from strides as from rows.
#[test]
fn threads_and_strides_make_no_difference() -> Result<()> {
    same_on_any_number_of_threads("threads_and_strides_make_no_difference", |report| {
        let table = random_table(1 << 16, 20, DType::F32, &Device::Cpu)?;
        let strided = table.t()?.contiguous()?.t()?;
        assert!(!strided.is_contiguous());
        let fit = |table: &Tensor| -> Result<(Vec<f64>, f64)> {
            let config = config(Hash::original());
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
        // A hundred unrelated values share a slot: next to nothing of each is left, sqrt(1 - 1/100).
        assert!((error - 0.99f64.sqrt()).abs() < 1e-3, "{error}");
        Ok(())
    })
}

#[test]
fn edges() -> Result<()> {
    let device = &Device::Cpu;
    let zeros = Tensor::zeros((10, 4), DType::F32, device)?;
    let (layer, error) = HashedEmbeddingBag::fit(&zeros, 0.1, Default::default())?;
    assert_eq!((error, layer.hashed_weight().dims()), (0.0, &[4][..]));

    // All padding: nothing counts, and not even NaN does harm.
    let nan = Tensor::full(f32::NAN, (1, 4), device)?;
    let padded = HashedEmbeddingBagConfig {
        padding_idx: Some(0),
        ..Default::default()
    };
    let (layer, error) = HashedEmbeddingBag::fit(&nan, 0.1, padded)?;
    assert_eq!((error, to_vec(layer.hashed_weight())?), (0.0, vec![0.0; 4]));

    let table = random_table(10, 4, DType::F32, device)?;
    let fit = |table: &Tensor, compression| {
        message(HashedEmbeddingBag::fit(
            table,
            compression,
            config(Hash::original()),
        ))
    };
    let infinite = Tensor::cat(&[&table, &(nan.ones_like()? / 0.0)?], 0)?;
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

/// More than 2^32 elements, of a table that is one row over and over: minutes without optimisation.
#[test]
#[ignore = "more than 2^32 elements; run with --release"]
fn larger_than_32_bits() -> Result<()> {
    let row = random_table(1, 64, DType::F32, &Device::Cpu)?;
    let table = row.broadcast_as(((1 << 26) + 1, 64))?;
    // A hashed_weight of one block: every row is that block, and all rows are the same.
    let (layer, error) = HashedEmbeddingBag::fit(&table, 1e-9, config(Hash::identity(64)))?;
    assert_eq!(to_vec(layer.hashed_weight())?, to_vec(&row)?);
    assert_eq!(error, 0.0);
    Ok(())
}
