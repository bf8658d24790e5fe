//! Which tensors a lookup takes: their ranks, dtypes, devices, sizes, and strides of any kind.

use crate::common::{
    config, contiguous, cuda, floats, integers, layer, message, mix, on_each_device, to_vec, Draws,
    DTYPES, INDEX_DTYPES, SIGNED,
};
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    HashedEmbeddingBag, HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, Mode,
};

/// 10 rows of 4 columns.
fn bag(config: HashedEmbeddingBagConfig, device: &Device) -> Result<HashedEmbeddingBag> {
    layer(&Tensor::ones(16, DType::F32, device)?, 10, 4, config)
}

#[test]
fn wrong_ranks_shapes_and_dtypes_are_refused() -> Result<()> {
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
fn wrong_per_sample_weights_are_refused() -> Result<()> {
    on_each_device(|device| {
        let indices = Tensor::zeros((3, 2), DType::U32, device)?;
        let bag = bag(Default::default(), device)?;
        for (shape, dtype, said) in [
            (
                [2, 3],
                DType::F32,
                "have the shape of indices [3, 2], got [2, 3]",
            ),
            ([3, 2], DType::F16, "have dtype f32, got f16"),
        ] {
            let weights = Tensor::ones(&shape, dtype, device)?;
            assert_eq!(
                message(bag.forward_weighted(&indices, &weights)),
                format!("hashed-embedding-bag: per_sample_weights must {said}")
            );
        }
        let weights = Tensor::zeros((3, 2), DType::F32, device)?;
        for mode in [Mode::Mean, Mode::Max] {
            let config = HashedEmbeddingBagConfig {
                mode,
                ..Default::default()
            };
            assert_eq!(
                message(self::bag(config, device)?.forward_weighted(&indices, &weights)),
                format!("hashed-embedding-bag: per_sample_weights need mode sum, got {mode:?}")
            );
        }
        Ok(())
    })
}

#[test]
fn tensors_on_different_devices_are_refused() -> Result<()> {
    let Some(device) = cuda() else { return Ok(()) };
    let bag = bag(Default::default(), &device)?;
    let here = Tensor::zeros(3, DType::U32, &Device::Cpu)?;
    let there = Tensor::zeros(3, DType::U32, &device)?;
    let weights = Tensor::zeros(3, DType::F32, &Device::Cpu)?;
    let location = device.location();
    for (refused, name) in [
        (bag.forward_with_offsets(&here, &there), "indices"),
        (bag.forward_with_offsets(&there, &here), "offsets"),
        (
            bag.forward_weighted_with_offsets(&there, &there, &weights),
            "per_sample_weights",
        ),
    ] {
        assert_eq!(
            message(refused),
            format!("hashed-embedding-bag: {name} must be on the device of hashed_weight ({location:?}), got Cpu")
        );
    }
    Ok(())
}

/// Bags of no indices take no memory, so any number of them may come in; the output may be too large to address.
#[test]
fn outputs_too_large_to_address_are_refused() -> Result<()> {
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

/// Narrowed, transposed and broadcast inputs give what contiguous copies of them give, and so do strided gradients.
#[test]
fn strided_inputs_are_as_good_as_contiguous_ones() -> Result<()> {
    on_each_device(|device| {
        for dtype in DTYPES {
            for index in INDEX_DTYPES {
                let mut draws = Draws::new(3);
                let whole = integers(&draws.rows(48, 40), index, device)?;
                // Starting at element 1, so that it is not aligned to 16 bytes.
                let memory = Var::from_tensor(&floats(&draws.halves(81), dtype, device)?)?;
                let weight = memory.narrow(0, 1, 80)?;
                let config = config(Mode::Sum, mix(0, 8, SIGNED));
                let strided = layer(&weight, 40, 12, config)?;
                let straight_weight = Var::from_tensor(&weight.copy()?)?;
                let straight = layer(&straight_weight, 40, 12, config)?;

                let transposed = whole.reshape((8, 6))?.t()?;
                let columns = whole.reshape((6, 8))?.narrow(1, 2, 3)?;
                let every_other = whole.reshape((24, 2))?.narrow(1, 1, 1)?.squeeze(1)?;
                let offsets = integers(&[0, 99, 5, 99, 5, 99, 20, 99], index, device)?
                    .reshape((4, 2))?
                    .narrow(1, 0, 1)?
                    .squeeze(1)?;
                let one_row = whole.narrow(0, 3, 5)?.unsqueeze(0)?.broadcast_as((4, 5))?;
                let weights = floats(&draws.halves(96), dtype, device)?
                    .reshape((48, 2))?
                    .narrow(1, 1, 1)?
                    .squeeze(1)?;
                for indices in [&transposed, &columns, &one_row] {
                    let a = strided.forward(indices)?;
                    let b = straight.forward(&contiguous(indices)?)?;
                    assert_eq!(to_vec(&a)?, to_vec(&b)?);
                    // A gradient that is itself strided.
                    let grad = |out: &Tensor| out.t()?.contiguous()?.narrow(0, 1, 7)?.sum_all();
                    let (a, b) = (grad(&a)?.backward()?, grad(&b)?.backward()?);
                    let a = a.get(&memory).unwrap().narrow(0, 1, 80)?;
                    assert_eq!(to_vec(&a)?, to_vec(b.get(&straight_weight).unwrap())?);
                }
                let a = strided.forward_with_offsets(&every_other, &offsets)?;
                let b = straight
                    .forward_with_offsets(&contiguous(&every_other)?, &contiguous(&offsets)?)?;
                assert_eq!(to_vec(&a)?, to_vec(&b)?);
                let weights = weights.narrow(0, 7, 24)?;
                let a = strided.forward_weighted_with_offsets(&every_other, &offsets, &weights)?;
                let b = straight.forward_weighted_with_offsets(
                    &contiguous(&every_other)?,
                    &contiguous(&offsets)?,
                    &weights.copy()?,
                )?;
                assert_eq!(to_vec(&a)?, to_vec(&b)?);
            }
        }
        Ok(())
    })
}
