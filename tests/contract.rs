//! Every error of the contract, with its message, on both devices; and that `BoundsCheck::Off` survives the same input.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    hashed_embedding, hashed_embedding_bag, BoundsCheck, Gradient, Hash, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, Mode,
};
use candle_nn::{VarBuilder, VarMap};
use common::{cuda, integers, message, on_each_device, to_vec};

/// 10 rows of 4 columns.
fn bag(config: HashedEmbeddingBagConfig, device: &Device) -> Result<HashedEmbeddingBag> {
    let weight = Tensor::ones(16, DType::F32, device)?;
    HashedEmbeddingBag::new(weight, 10, 4, config)
}

#[test]
fn shapes_and_dtypes() -> Result<()> {
    on_each_device(|device| {
        let bag = bag(Default::default(), device)?;
        let one = Tensor::zeros(3, DType::U32, device)?;
        let two = Tensor::zeros((3, 2), DType::U32, device)?;
        let float = Tensor::zeros((3, 2), DType::F32, device)?;
        assert_eq!(
            message(bag.forward(&one)),
            "hashed-embedding-bag: indices must have rank 2 when there are no offsets, got [3]"
        );
        assert_eq!(
            message(bag.forward(&float)),
            "hashed-embedding-bag: indices must have dtype u32 or i32 or i64, got f32"
        );
        assert_eq!(
            message(bag.forward_with_offsets(&two, &one)),
            "hashed-embedding-bag: indices must have rank 1 when offsets are given, got [3, 2]"
        );
        assert_eq!(
            message(bag.forward_with_offsets(&one, &two)),
            "hashed-embedding-bag: offsets must have rank 1, got [3, 2]"
        );
        assert_eq!(
            message(bag.forward_with_offsets(&one, &one.to_dtype(DType::F32)?)),
            "hashed-embedding-bag: offsets must have dtype u32 or i32 or i64, got f32"
        );
        let mut weights = Tensor::ones((2, 3), DType::F32, device)?;
        assert_eq!(
            message(bag.forward_weighted(&two, &weights)),
            "hashed-embedding-bag: per_sample_weights must have the shape of indices [3, 2], got [2, 3]"
        );
        weights = Tensor::ones((3, 2), DType::F16, device)?;
        assert_eq!(
            message(bag.forward_weighted(&two, &weights)),
            "hashed-embedding-bag: per_sample_weights must have dtype f32, got f16"
        );
        for mode in [Mode::Mean, Mode::Max] {
            let bag = self::bag(
                HashedEmbeddingBagConfig {
                    mode,
                    ..Default::default()
                },
                device,
            )?;
            assert_eq!(
                message(bag.forward_weighted(&two, &float)),
                format!("hashed-embedding-bag: per_sample_weights need mode sum, got {mode:?}")
            );
        }
        let last = self::bag(
            HashedEmbeddingBagConfig {
                include_last_offset: true,
                ..Default::default()
            },
            device,
        )?;
        let none = integers(&[], DType::U32, device)?;
        assert_eq!(
            message(last.forward_with_offsets(&one, &none)),
            "hashed-embedding-bag: offsets must hold num_bags + 1 values when include_last_offset is set, got none"
        );
        Ok(())
    })
}

#[test]
fn tensors_on_different_devices() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let bag = bag(Default::default(), &device)?;
    let here = Tensor::zeros(3, DType::U32, &Device::Cpu)?;
    let there = Tensor::zeros(3, DType::U32, &device)?;
    let location = format!("{:?}", device.location());
    assert_eq!(
        message(bag.forward_with_offsets(&here, &there)),
        format!("hashed-embedding-bag: indices must be on the device of hashed_weight ({location}), got Cpu")
    );
    assert_eq!(
        message(bag.forward_with_offsets(&there, &here)),
        format!("hashed-embedding-bag: offsets must be on the device of hashed_weight ({location}), got Cpu")
    );
    let weights = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    assert_eq!(
        message(bag.forward_weighted_with_offsets(&there, &there, &weights)),
        format!("hashed-embedding-bag: per_sample_weights must be on the device of hashed_weight ({location}), got Cpu")
    );
    Ok(())
}

/// Indices and offsets that break the contract, and what is said of them.
const BAD_ROWS: [(&[i64], &str); 4] = [
    (&[0, 9, 10, 11], "got 10 at position 2"),
    (&[-1, 0, 0, 0], "got -1 at position 0"),
    (
        &[0, 0, 0, i64::MAX],
        "got 9223372036854775807 at position 3",
    ),
    (
        &[0, i64::MIN, 0, 77],
        "got -9223372036854775808 at position 1",
    ),
];
const BAD_OFFSETS: [(&[i64], &str); 6] = [
    (&[1, 2, 3], "must start at 0, got 1 at position 0"),
    (&[-1, 2, 3], "must start at 0, got -1 at position 0"),
    (&[0, 3, 2], "must not decrease, got 2 after 3 at position 2"),
    (
        &[0, -5, 2],
        "must not decrease, got -5 after 0 at position 1",
    ),
    (
        &[0, 5, 5],
        "must not pass the number of indices (4), got 5 at position 1",
    ),
    (
        &[0, 4, i64::MAX],
        "must not pass the number of indices (4), got 9223372036854775807 at position 2",
    ),
];

#[test]
fn values_out_of_range_name_position_and_value() -> Result<()> {
    on_each_device(|device| {
        let bag = bag(Default::default(), device)?;
        let indices = integers(&[0, 1, 2, 9], DType::I64, device)?;
        for (rows, said) in BAD_ROWS {
            let rows = integers(rows, DType::I64, device)?;
            let expected = format!("hashed-embedding-bag: indices must lie in 0..10, {said}");
            assert_eq!(message(bag.forward(&rows.reshape((2, 2))?)), expected);
            let offsets = integers(&[0, 1], DType::I32, device)?;
            assert_eq!(message(bag.forward_with_offsets(&rows, &offsets)), expected);
        }
        // A u32 above i32, and an i32 below zero.
        for (dtype, row) in [
            (DType::U32, 3_000_000_000),
            (DType::I32, -7),
            (DType::I32, i64::from(i32::MIN)),
        ] {
            let rows = integers(&[1, row], dtype, device)?.reshape((2, 1))?;
            assert_eq!(
                message(bag.forward(&rows)),
                format!("hashed-embedding-bag: indices must lie in 0..10, got {row} at position 1")
            );
        }
        for (offsets, said) in BAD_OFFSETS {
            let offsets = integers(offsets, DType::I64, device)?;
            assert_eq!(
                message(bag.forward_with_offsets(&indices, &offsets)),
                format!("hashed-embedding-bag: offsets {said}")
            );
        }
        // The device is none the worse for it.
        let out = bag.forward(&indices.reshape((2, 2))?)?;
        assert_eq!(out.dims(), [2, 4]);
        Ok(())
    })
}

/// The first bad position is named, wherever others follow.
#[test]
fn the_first_of_many_bad_rows_is_named() -> Result<()> {
    on_each_device(|device| {
        let bag = bag(Default::default(), device)?;
        let mut rows = vec![3; 10_000];
        rows[4_321] = 10;
        rows[4_322..].fill(-1);
        let rows = integers(&rows, DType::I32, device)?.reshape((100, 100))?;
        assert_eq!(
            message(bag.forward(&rows)),
            "hashed-embedding-bag: indices must lie in 0..10, got 10 at position 4321"
        );
        Ok(())
    })
}

/// Unchecked, the same inputs read and write nothing outside the tensors; a sanitizer run over this test shows it.
#[test]
fn unchecked_values_out_of_range_are_harmless() -> Result<()> {
    on_each_device(|device| {
        for mode in [Mode::Sum, Mode::Mean, Mode::Max] {
            for hash in [Hash::original(), Hash::default_for(4)] {
                let weight = candle_core::Var::ones(16, DType::F32, device)?;
                let config = HashedEmbeddingBagConfig {
                    mode,
                    hash: Some(hash),
                    bounds_check: BoundsCheck::Off,
                    ..Default::default()
                };
                let bag = HashedEmbeddingBag::new(weight.as_tensor().clone(), 10, 4, config)?;
                let indices = integers(&[0, 1, 2, 9], DType::I64, device)?;
                for (rows, _) in BAD_ROWS {
                    let rows = integers(rows, DType::I64, device)?.reshape((2, 2))?;
                    let out = bag.forward(&rows)?;
                    assert_eq!(out.dims(), [2, 4]);
                    assert!(to_vec(&out)?.iter().all(|x| x.abs() <= 2.0));
                    let grads = out.sum_all()?.backward()?;
                    let grad = to_vec(grads.get(&weight).unwrap())?;
                    assert!(grad.iter().all(|x| x.abs() <= 16.0));
                }
                for (offsets, _) in BAD_OFFSETS {
                    let offsets = integers(offsets, DType::I64, device)?;
                    let out = bag.forward_with_offsets(&indices, &offsets)?;
                    assert_eq!(out.dims(), [3, 4]);
                    assert!(to_vec(&out)?.iter().all(|x| x.abs() <= 4.0));
                    out.sum_all()?.backward()?;
                    if mode == Mode::Sum {
                        let weights = candle_core::Var::ones(4, DType::F32, device)?;
                        let out =
                            bag.forward_weighted_with_offsets(&indices, &offsets, &weights)?;
                        out.sum_all()?.backward()?;
                    }
                }
            }
        }
        Ok(())
    })
}

#[test]
fn padding_may_lie_outside_the_table() -> Result<()> {
    on_each_device(|device| {
        let config = HashedEmbeddingBagConfig {
            padding_idx: Some(-1),
            ..Default::default()
        };
        let bag = bag(config, device)?;
        let rows = integers(&[3, -1, -1, -1], DType::I64, device)?.reshape((2, 2))?;
        assert_eq!(to_vec(&bag.forward(&rows)?.get(1)?)?, [0.0; 4]);
        let rows = integers(&[3, -2], DType::I64, device)?.reshape((1, 2))?;
        assert_eq!(
            message(bag.forward(&rows)),
            "hashed-embedding-bag: indices must lie in 0..10, got -2 at position 1"
        );
        Ok(())
    })
}

#[test]
fn layers_that_cannot_be() -> Result<()> {
    let device = &Device::Cpu;
    let new = |shape: &[usize], dtype, num_embeddings, embedding_dim, hash| {
        let config = HashedEmbeddingBagConfig {
            hash,
            ..Default::default()
        };
        let weight = Tensor::zeros(shape, dtype, device)?;
        HashedEmbeddingBag::new(weight, num_embeddings, embedding_dim, config)
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
    let robe = Hash::robe(&[2_038_074_743, 634_329_019, 1_825_252_241, 871_205_356], 1)?;
    assert!(new(&[16], DType::F32, 10_000_000_000, 4, Some(robe)).is_ok());
    assert_eq!(
        message(new(&[16], DType::F32, 11_000_000_000, 4, Some(robe))),
        "hashed-embedding-bag: 11000000000 rows of 4 columns overflow the signed 64-bit arithmetic of this hash"
    );
    assert!(new(&[16], DType::F32, 1 << 62, 4, Some(Hash::original())).is_ok());

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
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
        hash: Some(Hash::mix(1)),
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

/// The length rule, the name and the initial values of the variable, and the accessors.
#[test]
fn construction() -> Result<()> {
    let device = &Device::Cpu;
    for (num_embeddings, embedding_dim, compression, hash, len) in [
        (1000, 16, 0.1, None, 1600),
        (1000, 16, 0.1, Some(Hash::original()), 1600),
        (1000, 16, 1.0 / 64.0, None, 256),
        (1000, 16, 1.0 / 64.0, Some(Hash::original()), 250),
        (10, 3, 1e-9, Some(Hash::original()), 1),
        (10, 16, 1e-9, None, 8),
        (10, 16, 1e-9, Some(Hash::affine(1, 1, 1, 7, 5)), 5),
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

/// Bags of no indices take no memory, so there may be any number of them; what would come out may not.
#[test]
fn outputs_too_large_to_address() -> Result<()> {
    on_each_device(|device| {
        let bag = bag(Default::default(), device)?;
        let none = integers(&[], DType::U32, device)?;
        let bags = |num_bags: usize| none.reshape((num_bags, 0));
        assert_eq!(bag.forward(&bags(3)?)?.dims(), [3, 4]);
        for num_bags in [1 << 60, 1 << 62, usize::MAX] {
            assert_eq!(
                message(bag.forward(&bags(num_bags)?)),
                format!(
                    "hashed-embedding-bag: an output of {num_bags} bags of 4 columns is too large"
                )
            );
        }
        let weights = Tensor::ones(1, DType::F32, device)?
            .narrow(0, 0, 0)?
            .reshape((1 << 62, 0))?;
        let refused = message(bag.forward_weighted(&bags(1 << 62)?, &weights));
        assert!(refused.contains("is too large"), "{refused}");

        let hashed_weight = bag.hashed_weight().clone();
        let tables = [("a", 5), ("b", 5)];
        let collection =
            HashedEmbeddingBagCollection::new(hashed_weight, tables, 4, Default::default())?;
        assert_eq!(
            collection.forward(&none.reshape((3, 2, 0))?)?.dims(),
            [3, 2, 4]
        );
        for batch in [1 << 60, 1 << 62] {
            let refused = message(collection.forward(&none.reshape((batch, 2, 0))?));
            assert!(refused.starts_with("hashed-embedding-bag: "), "{refused}");
        }
        let one = integers(&[1], DType::U32, device)?;
        let many = one.broadcast_as((1 << 40, 1 << 40))?;
        assert_eq!(
            message(bag.forward(&many)),
            "hashed-embedding-bag: indices of shape [1099511627776, 1099511627776] are too many"
        );
        Ok(())
    })
}
