//! A layer as a value: its configuration, the same layer on another weight, its rows as a table, and how it is initialised.

use crate::common::{floats, integers, message, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    hashed_embedding, hashed_embedding_bag, hashed_embedding_bag_collection, BoundsCheck, Gradient,
    Hash, HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, HashedEmbeddingConfig, HashedWeightConfig, JaggedLayout, Mode,
};
use candle_nn::{Init, VarBuilder, VarMap};

const TABLES: [(&str, usize); 2] = [("user", 30), ("movie", 20)];

/// Nothing in it is the default.
fn config() -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig {
        mode: Mode::Mean,
        hash: Some(Hash::mix(4)),
        padding_idx: Some(7),
        include_last_offset: true,
        first_row: 5,
        bounds_check: BoundsCheck::Off,
        gradient: Gradient::Deterministic,
    }
}

#[test]
fn the_config_is_that_of_construction() -> Result<()> {
    let weight = Tensor::zeros(64, DType::F32, &Device::Cpu)?;
    let bag = HashedEmbeddingBag::new(weight.clone(), 30, 6, config())?;
    assert_eq!(bag.config(), config());
    let again = HashedEmbeddingBag::new(weight.clone(), 30, 6, bag.config())?;
    assert_eq!(again.config(), config());

    // The hash is the one in use, not the one that was not chosen.
    let defaults = HashedEmbeddingBag::new(weight.clone(), 30, 6, Default::default())?;
    let with_hash = HashedEmbeddingBagConfig {
        hash: Some(Hash::default_for(6)),
        ..Default::default()
    };
    assert_eq!(defaults.config(), with_hash);
    assert_eq!(defaults.hash(), Hash::default_for(6));

    let of_collection = HashedEmbeddingBagConfig {
        first_row: 0,
        ..config()
    };
    let collection = HashedEmbeddingBagCollection::new(weight.clone(), TABLES, 6, of_collection)?;
    assert_eq!(collection.config(), of_collection);
    let of_movie = HashedEmbeddingBagConfig {
        first_row: 30,
        ..of_collection
    };
    assert_eq!(collection.table("movie")?.config(), of_movie);

    let of_embedding = HashedEmbeddingConfig {
        hash: Some(Hash::original()),
        padding_idx: Some(-1),
        first_row: 9,
        bounds_check: BoundsCheck::Off,
        gradient: Gradient::Deterministic,
    };
    let embedding = HashedEmbedding::new(weight, 30, 6, of_embedding)?;
    assert_eq!(embedding.config(), of_embedding);
    let checked = embedding.with_bounds_check(BoundsCheck::Error);
    assert_eq!(checked.config().bounds_check, BoundsCheck::Error);
    Ok(())
}

#[test]
fn another_weight_changes_nothing_else() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(3).halves(64), DType::F32, device)?;
        let bag = HashedEmbeddingBag::new(weight.clone(), 30, 6, config())?;
        let (indices, offsets) = (
            integers(&[3, 7, 0, 29, 11], DType::I64, device)?,
            integers(&[0, 2, 5], DType::I64, device)?,
        );
        let forward = |bag: &HashedEmbeddingBag| bag.forward_with_offsets(&indices, &offsets);
        let want = to_vec(&(forward(&bag)? * 2.0)?)?;
        let doubled = Var::from_tensor(&(&weight * 2.0)?)?;
        for dtype in [DType::F32, DType::F16, DType::F64] {
            let again = bag.with_hashed_weight(doubled.to_dtype(dtype)?)?;
            assert_eq!(again.config(), bag.config());
            assert_eq!(again.hashed_weight().dtype(), dtype);
            let out = forward(&again)?;
            let error = (out.to_dtype(DType::F64)?
                - floats(&want, DType::F64, device)?.reshape((2, 6))?)?;
            let error = error.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-2, "{dtype:?}: {error}");
        }
        // A variable trains, its detached tensor does not.
        let trained = bag.with_hashed_weight(doubled.as_tensor().clone())?;
        assert!(forward(&trained)?.track_op());
        let frozen = trained.with_hashed_weight(doubled.as_detached_tensor())?;
        assert!(!forward(&frozen)?.track_op());
        assert_eq!(to_vec(&forward(&frozen)?)?, to_vec(&forward(&trained)?)?);
        // To another device.
        let moved = trained.with_hashed_weight(doubled.to_device(&Device::Cpu)?)?;
        let on_cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        let out = moved.forward_with_offsets(&on_cpu(&indices)?, &on_cpu(&offsets)?)?;
        assert!(out.device().is_cpu());

        let of_collection = HashedEmbeddingBagConfig {
            first_row: 0,
            include_last_offset: false,
            ..config()
        };
        let collection =
            HashedEmbeddingBagCollection::new(weight.clone(), TABLES, 6, of_collection)?;
        let again = collection.with_hashed_weight((&weight * 2.0)?)?;
        assert_eq!(again.config(), collection.config());
        assert!(again.tables().eq(collection.tables()));
        let indices = integers(&[29, 19, 0, 7], DType::U32, device)?.reshape((2, 2))?;
        assert_eq!(
            to_vec(&again.forward(&indices)?)?,
            to_vec(&(collection.forward(&indices)? * 2.0)?)?
        );

        let embedding = HashedEmbedding::from(bag.clone());
        let again = embedding.with_hashed_weight((&weight * 2.0)?)?;
        assert_eq!(again.config(), embedding.config());
        assert_eq!(
            to_vec(&again.forward(&indices)?)?,
            to_vec(&(embedding.forward(&indices)? * 2.0)?)?
        );

        assert_eq!(
            message(bag.with_hashed_weight(Tensor::zeros(60, DType::F32, device)?)),
            "hashed-embedding-bag: hashed_weight must have the shape of the one it replaces, [64], got [60]"
        );
        assert_eq!(
            message(bag.with_hashed_weight(Tensor::zeros(64, DType::U32, device)?)),
            "hashed-embedding-bag: hashed_weight must have dtype f16 or bf16 or f32 or f64, got u32"
        );
        Ok(())
    })
}

#[test]
fn the_table_is_the_rows_of_lookups() -> Result<()> {
    on_each_device(|device| {
        let weight = Var::from_tensor(&floats(&Draws::new(4).halves(64), DType::F32, device)?)?;
        for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
            let config = HashedEmbeddingBagConfig { mode, ..config() };
            let bag = HashedEmbeddingBag::new(weight.as_tensor().clone(), 30, 6, config)?;
            let table = bag.to_table(..)?;
            assert_eq!(table.dims(), [30, 6]);
            let values = to_vec(&table)?;
            let parameter = to_vec(bag.hashed_weight())?;
            for (at, value) in values.iter().enumerate() {
                let (row, column) = (at / 6, at % 6);
                let (slot, sign) = bag.hash().slot(row as i64 + 5, column, 64)?;
                let want = if row == 7 {
                    0.0
                } else {
                    f64::from(sign) * parameter[slot]
                };
                assert_eq!(*value, want, "{mode:?} row {row} column {column}");
            }
            for (part, start, end) in [
                (bag.to_table(3..9)?, 3, 9),
                (bag.to_table(28..)?, 28, 30),
                (bag.to_table(..=4)?, 0, 5),
                (bag.to_table(29..=29)?, 29, 30),
            ] {
                assert_eq!(part.dims(), [end - start, 6]);
                assert_eq!(to_vec(&part)?, values[start * 6..end * 6]);
            }
            let rows = HashedEmbedding::from(bag.clone()).to_table(3..9)?;
            assert_eq!(to_vec(&rows)?, values[18..54]);
            // As every lookup, it has a gradient: each slot's is the sum of the signs of its 29 rows.
            let grads = table.sum_all()?.backward()?;
            let grad = grads.get(&weight).expect("a gradient of the parameter");
            let mut want = vec![0.0; 64];
            for (row, column) in (0..30).flat_map(|row| (0..6).map(move |column| (row, column))) {
                let (slot, sign) = bag.hash().slot(row + 5, column, 64)?;
                want[slot] += if row == 7 { 0.0 } else { f64::from(sign) };
            }
            assert_eq!(to_vec(grad)?, want);
            for (start, end) in [(3, 31), (9, 8), (31, 31)] {
                assert_eq!(
                    message(bag.to_table(start..end)),
                    format!("hashed-embedding-bag: rows must lie in 0..30, got {start}..{end}")
                );
            }
        }
        Ok(())
    })?;
    let cpu = &Device::Cpu;
    let weight = Tensor::zeros(64, DType::F32, cpu)?;
    let huge = HashedEmbeddingBag::new(weight, 1 << 62, 4, Default::default())?;
    assert!(message(huge.to_table(..)).contains("is too large"));
    assert_eq!(huge.to_table((1 << 61)..(1 << 61) + 2)?.dims(), [2, 4]);
    assert_eq!(huge.to_table(7..7)?.dims(), [0, 4]);
    Ok(())
}

#[test]
fn weights_in_every_form_of_bags() -> Result<()> {
    on_each_device(|device| {
        let weight = floats(&Draws::new(5).halves(64), DType::F32, device)?;
        let config = HashedEmbeddingBagConfig {
            padding_idx: Some(7),
            ..Default::default()
        };
        let collection = HashedEmbeddingBagCollection::new(weight.clone(), TABLES, 4, config)?;
        // Three samples of two bags of two rows; some of them padding.
        let rows = [29, 7, 19, 3, 0, 1, 7, 7, 12, 12, 5, 6];
        let indices = integers(&rows, DType::I64, device)?.reshape((3, 2, 2))?;
        let samples = Draws::new(6).halves(rows.len());
        let samples = Var::from_tensor(&floats(&samples, DType::F32, device)?.reshape((3, 2, 2))?)?;
        let pooled = collection.forward_weighted(&indices, &samples)?;
        assert_eq!(pooled.dims(), [3, 2, 4]);
        // The same bags by offsets, and each table as a layer.
        let jagged = collection.forward_weighted_jagged(
            &indices.flatten_all()?,
            &integers(&[0, 2, 4, 6, 8, 10], DType::I64, device)?,
            JaggedLayout::BatchMajor,
            &samples.flatten_all()?,
        )?;
        assert_eq!(to_vec(&pooled)?, to_vec(&jagged)?);
        for (t, (name, _)) in TABLES.into_iter().enumerate() {
            let part = |tensor: &Tensor| tensor.narrow(1, t, 1)?.squeeze(1);
            let (indices, samples) = (part(&indices)?, part(&samples)?);
            let bag = collection.table(name)?;
            let want = to_vec(&part(&pooled)?)?;
            assert_eq!(to_vec(&bag.forward_weighted(&indices, &samples)?)?, want);
            let by_offsets = bag.forward_weighted_with_offsets(
                &indices.flatten_all()?,
                &integers(&[0, 2, 4], DType::I64, device)?,
                &samples.flatten_all()?,
            )?;
            assert_eq!(to_vec(&by_offsets)?, want);
        }
        // One row per table and sample.
        let single = indices.narrow(2, 0, 1)?.squeeze(2)?;
        let of_single = samples.narrow(2, 0, 1)?.squeeze(2)?;
        let out = collection.forward_weighted(&single, &of_single)?;
        let unweighted = collection.forward(&single)?;
        assert_eq!(
            to_vec(&out)?,
            to_vec(&unweighted.broadcast_mul(&of_single.unsqueeze(2)?)?)?
        );
        // The weights have a gradient in their own shape.
        let grads = pooled.sum_all()?.backward()?;
        let grad = grads.get(&samples).expect("a gradient of the weights");
        assert_eq!(grad.dims(), [3, 2, 2]);
        let by_rows = collection
            .with_hashed_weight(weight.clone())?
            .forward(&indices.reshape((3, 2, 2))?.narrow(2, 0, 1)?)?;
        assert_eq!(
            to_vec(&grad.narrow(2, 0, 1)?.squeeze(2)?)?,
            to_vec(&by_rows.sum(2)?)?
        );

        assert_eq!(
            message(collection.forward_weighted(&indices, &samples.reshape((3, 4))?)),
            "hashed-embedding-bag: per_sample_weights must have the shape of indices [3, 2, 2], got [3, 4]"
        );
        let mean = HashedEmbeddingBagConfig {
            mode: Mode::Mean,
            ..config
        };
        let mean = HashedEmbeddingBagCollection::new(weight, TABLES, 4, mean)?;
        assert_eq!(
            message(mean.forward_weighted(&indices, &samples)),
            "hashed-embedding-bag: per_sample_weights need mode sum, got Mean"
        );
        Ok(())
    })
}

#[test]
fn initial_values_may_be_chosen() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let weight = |init| HashedWeightConfig {
        compression: 0.5,
        init,
    };
    let seven = weight(Some(Init::Const(7.0)));
    let bag = hashed_embedding_bag(20, 8, seven, Default::default(), vb.pp("bag"))?;
    assert_eq!(to_vec(bag.hashed_weight())?, [7.0; 80]);
    let embedding = hashed_embedding(20, 8, seven, Default::default(), vb.pp("embedding"))?;
    assert_eq!(to_vec(embedding.bag().hashed_weight())?, [7.0; 80]);
    let collection =
        hashed_embedding_bag_collection(TABLES, 8, seven, Default::default(), vb.pp("c"))?;
    assert_eq!(to_vec(collection.hashed_weight())?, [7.0; 200]);

    let by_default = weight(None);
    let bag = hashed_embedding_bag(25, 8, by_default, Default::default(), vb.pp("default"))?;
    let values = to_vec(bag.hashed_weight())?;
    assert!(values.iter().all(|x| x.abs() <= 0.2) && values.iter().any(|x| x.abs() > 0.1));
    Ok(())
}
