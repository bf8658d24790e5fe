//! Making layers: the length, name and initial values of the parameter, the configuration, the same layer on another weight,
//! and what is refused.

use crate::common::{
    affine, floats, integers, layer, message, mix, on_each_device, robe, to_vec,
    unlike_the_default, Draws, SIGNED,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    hashed_embedding, hashed_embedding_bag, hashed_embedding_bag_collection, BoundsCheck, Gradient,
    Hash, HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, HashedEmbeddingConfig, HashedWeightConfig, Mode,
};
use candle_nn::{Init, VarBuilder, VarMap};

const TABLES: [(&str, usize); 2] = [("user", 30), ("movie", 20)];

/// The length rule, the name and the initial values of the variable, and the accessors.
#[test]
fn the_parameter_has_its_length_name_and_initial_values() -> Result<()> {
    let device = &Device::Cpu;
    for (num_embeddings, embedding_dim, compression, hash, len) in [
        (1000, 16, 0.1, None, 1600),
        (1000, 16, 0.1, Some(Hash::original()), 1600),
        (1000, 16, 1.0 / 64.0, None, 256),
        (1000, 16, 1.0 / 64.0, Some(Hash::original()), 250),
        (10, 3, 1e-9, Some(Hash::original()), 1),
        (10, 16, 1e-9, None, 8),
        (10, 16, 1e-9, Some(affine(1, 1, 1, 7, 5)), 5),
        (7, 3, 1.0, None, 22),
        (7, 3, 0.5, Some(Hash::original()), 10),
    ] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, device).pp("items");
        let config = HashedEmbeddingBagConfig {
            mode: Mode::Mean,
            hash,
            padding_idx: Some(3),
            include_last_offset: true,
            first_row: 0,
            bounds_check: BoundsCheck::Off,
            gradient: Gradient::Deterministic,
            sparse: true,
        };
        let bag = hashed_embedding_bag(num_embeddings, embedding_dim, compression, config, vb)?;
        assert_eq!(bag.hashed_weight().dims(), [len]);
        assert_eq!(bag.num_embeddings(), num_embeddings);
        assert_eq!(bag.embedding_dim(), embedding_dim);
        let table = (num_embeddings * embedding_dim) as f64;
        assert_eq!(bag.compression(), len as f64 / table);
        let hash = hash.unwrap_or(Hash::default_for(embedding_dim));
        assert_eq!(bag.hash(), hash);
        let hash = Some(hash);
        assert_eq!(bag.config(), HashedEmbeddingBagConfig { hash, ..config });
        let bag = bag.with_bounds_check(BoundsCheck::Error);
        assert_eq!(bag.config().bounds_check, BoundsCheck::Error);

        let data = vars.data().lock().unwrap();
        assert_eq!(data.keys().collect::<Vec<_>>(), ["items.hashed_weight"]);
        let bound = (1.0 / num_embeddings as f64).sqrt();
        let values = to_vec(bag.hashed_weight())?;
        assert!(values.iter().all(|x| x.abs() <= bound));
        if len > 100 {
            assert!(values.iter().any(|&x| x > 0.8 * bound));
            assert!(values.iter().any(|&x| x < -0.8 * bound));
        }
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    hashed_embedding(10, 4, 0.5, Default::default(), vb)?;
    let data = vars.data().lock().unwrap();
    let names: Vec<_> = data.keys().collect();
    assert_eq!(names, ["hashed_embedding_bag.hashed_weight"]);
    Ok(())
}

#[test]
fn a_hashed_weight_that_does_not_suit_is_refused() -> Result<()> {
    let new = |shape: &[usize], dtype, num_embeddings, embedding_dim, hash| {
        let config = HashedEmbeddingBagConfig {
            hash,
            ..Default::default()
        };
        let weight = Tensor::zeros(shape, dtype, &Device::Cpu)?;
        layer(&weight, num_embeddings, embedding_dim, config)
    };
    assert_eq!(
        message(new(&[4, 4], DType::F32, 10, 4, None)),
        "hashed-embedding-bag: hashed_weight must have rank 1, got [4, 4]"
    );
    assert_eq!(
        message(new(&[16], DType::I64, 10, 4, None)),
        "hashed-embedding-bag: hashed_weight must have dtype f16 or bf16 or f32 or f64, got i64"
    );
    assert_eq!(
        message(new(&[16], DType::F32, 0, 4, None)),
        "hashed-embedding-bag: num_embeddings must lie in 1..2^63, got 0"
    );
    assert_eq!(
        message(new(&[16], DType::F32, 10, 0, None)),
        "hashed-embedding-bag: embedding_dim must lie in 1..2^31, got 0"
    );
    assert_eq!(
        message(new(&[18], DType::F32, 10, 4, None)),
        "hashed-embedding-bag: the length of hashed_weight must be a multiple of the block, got 18 and block 4"
    );
    assert!(new(&[16], DType::F32, 10_000_000_000, 4, Some(robe(1))).is_ok());
    assert_eq!(
        message(new(&[16], DType::F32, 11_000_000_000, 4, Some(robe(1)))),
        "hashed-embedding-bag: 11000000000 rows of 4 columns overflow the signed 64-bit arithmetic of this hash"
    );
    assert!(new(&[16], DType::F32, 1 << 62, 4, Some(Hash::original())).is_ok());
    Ok(())
}

#[test]
fn a_compression_that_does_not_suit_is_refused_before_anything_is_made() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    for compression in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(
            message(hashed_embedding_bag(
                10,
                4,
                compression,
                Default::default(),
                vb.clone()
            )),
            format!("hashed-embedding-bag: compression must lie in (0, 1], got {compression}")
        );
    }
    let refused = message(hashed_embedding_bag(
        10,
        4,
        64.0,
        Default::default(),
        vb.clone(),
    ));
    assert_eq!(
        refused,
        "hashed-embedding-bag: compression must lie in (0, 1], got 64: it is the length of hashed_weight over the size of \
         the table; for one that is 64 times smaller, pass 1.0 / 64.0"
    );
    let refused = message(hashed_embedding_bag(
        1 << 60,
        4,
        1.0,
        Default::default(),
        vb.clone(),
    ));
    assert!(
        refused.contains("makes hashed_weight too large"),
        "{refused}"
    );
    let config = HashedEmbeddingBagConfig {
        hash: Some(mix(0, 1, SIGNED)),
        ..Default::default()
    };
    assert_eq!(
        message(hashed_embedding_bag(1 << 33, 1, 1.0, config, vb.clone())),
        "hashed-embedding-bag: hashed_weight must hold fewer than 2^32 blocks, got 8589934592 of 1 values"
    );
    assert!(
        vars.all_vars().is_empty(),
        "nothing is made before it is checked"
    );
    Ok(())
}

#[test]
fn the_config_is_that_of_construction() -> Result<()> {
    let weight = Tensor::zeros(64, DType::F32, &Device::Cpu)?;
    let bag = HashedEmbeddingBag::new(weight.clone(), 30, 6, unlike_the_default())?;
    assert_eq!(bag.config(), unlike_the_default());
    let again = HashedEmbeddingBag::new(weight.clone(), 30, 6, bag.config())?;
    assert_eq!(again.config(), unlike_the_default());

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
        ..unlike_the_default()
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
        sparse: true,
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
        let bag = HashedEmbeddingBag::new(weight.clone(), 30, 6, unlike_the_default())?;
        let (indices, offsets) = (
            integers(&[3, 7, 0, 29, 11], DType::I64, device)?,
            integers(&[0, 2, 5], DType::I64, device)?,
        );
        let forward = |bag: &HashedEmbeddingBag| bag.forward_with_offsets(&indices, &offsets);
        let want = to_vec(&(forward(&bag)? * 2.0)?)?;
        let doubled = Var::from_tensor(&(&weight * 2.0)?)?;
        for dtype in [DType::F32, DType::F16, DType::F64] {
            let again = bag.with_hashed_weight(doubled.to_dtype(dtype)?.detach())?;
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
        let moved = trained.with_hashed_weight(doubled.to_device(&Device::Cpu)?.detach())?;
        let on_cpu = |tensor: &Tensor| tensor.to_device(&Device::Cpu);
        let out = moved.forward_with_offsets(&on_cpu(&indices)?, &on_cpu(&offsets)?)?;
        assert!(out.device().is_cpu());

        let of_collection = HashedEmbeddingBagConfig {
            first_row: 0,
            include_last_offset: false,
            ..unlike_the_default()
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
