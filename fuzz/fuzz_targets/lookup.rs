//! Arbitrary indices, offsets and layers. With bounds checks, exactly what breaks the contract is refused; without them, nothing
//! outside the tensors is read or written, which the address sanitizer checks.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_hashed_embedding_bag::{
    Balanced, BoundsCheck, Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, Mix, Mode, Semantic,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Integers {
    U32(Vec<u32>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    /// Small values, which are often valid.
    Small(Vec<u8>),
}

impl Integers {
    fn values(&self) -> Vec<i64> {
        match self {
            Self::U32(v) => v.iter().map(|&i| i.into()).collect(),
            Self::I32(v) => v.iter().map(|&i| i.into()).collect(),
            Self::I64(v) => v.clone(),
            Self::Small(v) => v.iter().map(|&i| (i % 16).into()).collect(),
        }
    }

    fn tensor(&self) -> Result<Tensor> {
        let device = &Device::Cpu;
        match self {
            Self::U32(v) => Tensor::from_slice(v, v.len(), device),
            Self::I32(v) => Tensor::from_slice(v, v.len(), device),
            Self::I64(v) => Tensor::from_slice(v, v.len(), device),
            Self::Small(_) => Tensor::from_vec(self.values(), self.values().len(), device),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum HashKind {
    Default,
    Mix {
        seed: u64,
        block: u8,
        signed: bool,
        balanced: bool,
    },
    Affine {
        a: u64,
        b: u64,
        c: u64,
        modulus: u64,
        block: u8,
    },
    Lma {
        numbers: [u32; 23],
        key_bits: u8,
        keys_to_use: u8,
        block: u8,
    },
    Semantic {
        seed: u64,
        log2_key_bits: u8,
        keys_to_use: u8,
        block: u8,
        signed: bool,
    },
    SlotTable {
        block: u8,
    },
}

#[derive(Arbitrary, Debug)]
struct Input {
    indices: Integers,
    offsets: Option<Integers>,
    /// Used if there are no offsets.
    bag_len: u8,
    weighted: bool,
    hash: HashKind,
    /// Signatures, or entries of a slot table.
    row_values: Vec<i64>,
    len: u16,
    num_embeddings: u64,
    embedding_dim: u8,
    mode: u8,
    padding_idx: Option<i64>,
    include_last_offset: bool,
    first_row: u64,
    dtype: u8,
}

fn run(input: &Input) -> Result<()> {
    let hash = match input.hash {
        HashKind::Default => None,
        HashKind::Mix {
            seed,
            block,
            signed,
            balanced: false,
        } => Some(Hash::from(Mix {
            seed,
            block: block.into(),
            signed,
        })),
        HashKind::Mix {
            seed,
            block,
            signed,
            balanced: true,
        } => Some(Hash::from(Balanced {
            seed,
            block: block.into(),
            signed,
        })),
        HashKind::Affine {
            a,
            b,
            c,
            modulus,
            block,
        } => Some(Hash::affine(a, b, c, modulus, block.into())),
        HashKind::Lma {
            numbers,
            key_bits,
            keys_to_use,
            block,
        } => Some(Hash::lma(
            &numbers.map(i64::from),
            key_bits.into(),
            keys_to_use.into(),
            block.into(),
        )?),
        HashKind::Semantic {
            seed,
            log2_key_bits,
            keys_to_use,
            block,
            signed,
        } => Some(Hash::from(Semantic {
            seed,
            key_bits: 1 << (log2_key_bits % 8),
            keys_to_use: keys_to_use.into(),
            block: block.into(),
            signed,
        })),
        HashKind::SlotTable { block } => Some(Hash::slot_table(block.into())),
    };
    let dtypes = [DType::F32, DType::F16, DType::BF16, DType::F64];
    let dtype = dtypes[usize::from(input.dtype) % 4];
    let weight = Tensor::ones(usize::from(input.len), dtype, &Device::Cpu)?;
    let weight = Var::from_tensor(&weight)?;
    let config = HashedEmbeddingBagConfig {
        mode: [Mode::Sum, Mode::Mean, Mode::Max][usize::from(input.mode) % 3],
        hash,
        padding_idx: input.padding_idx,
        include_last_offset: input.include_last_offset,
        first_row: input.first_row as usize,
        ..Default::default()
    };
    let (hashed_weight, dim) = (weight.as_tensor().clone(), usize::from(input.embedding_dim));
    let row_tensor = match hash.and_then(|hash| Some((hash.row_tensor()?, hash.block()))) {
        None => None,
        Some(("signatures", _)) => Some(Tensor::from_slice(
            &input.row_values,
            input.row_values.len(),
            &Device::Cpu,
        )?),
        Some((_, block)) => {
            let entries: Vec<_> = input.row_values.iter().map(|&value| value as u32).collect();
            let columns = dim.div_ceil(block.max(1)).max(1);
            let rows = entries.len() / columns;
            let entries =
                Tensor::from_slice(&entries[..rows * columns], rows * columns, &Device::Cpu)?;
            Some(entries.reshape((rows, columns))?)
        }
    };
    let rows = input.num_embeddings as usize;
    let layer = match &row_tensor {
        None => HashedEmbeddingBag::new(hashed_weight, rows, dim, config)?,
        Some(tensor) => {
            HashedEmbeddingBag::with_row_tensor(hashed_weight, tensor, rows, dim, config)?
        }
    };

    let mut indices = input.indices.tensor()?;
    let nnz = indices.elem_count();
    if input.offsets.is_none() {
        let bag_len = usize::from(input.bag_len).max(1);
        indices = indices.narrow(0, 0, nnz / bag_len * bag_len)?;
        indices = indices.reshape((nnz / bag_len, bag_len))?;
    }
    let offsets = input.offsets.as_ref().map(Integers::tensor).transpose()?;
    let weights = Var::ones(indices.shape(), dtype, &Device::Cpu)?;
    let weighted = input.weighted && layer.config().mode == Mode::Sum;
    let forward = |layer: &HashedEmbeddingBag| match &offsets {
        None if weighted => layer.forward_weighted(&indices, &weights),
        Some(offsets) if weighted => {
            layer.forward_weighted_with_offsets(&indices, offsets, &weights)
        }
        None => layer.forward(&indices),
        Some(offsets) => layer.forward_with_offsets(&indices, offsets),
    };

    // Indices outside every bag are not checked.
    let looked_at = match input.offsets.as_ref().map(Integers::values) {
        None => indices.elem_count(),
        Some(offsets) => match offsets.last() {
            Some(&end) if input.include_last_offset => end.clamp(0, nnz as i64) as usize,
            Some(_) => nnz,
            None => 0,
        },
    };
    let rows = &input.indices.values()[..looked_at];
    let is_row = |&row: &i64| {
        Some(row) == input.padding_idx || (0..input.num_embeddings as i64).contains(&row)
    };
    let offsets_are_valid = input.offsets.as_ref().is_none_or(|offsets| {
        let offsets = offsets.values();
        (!offsets.is_empty() || !input.include_last_offset)
            && offsets.first().is_none_or(|&first| first == 0)
            && offsets.is_sorted()
            && offsets.last().is_none_or(|&last| last <= nnz as i64)
    });
    let valid = rows.iter().all(is_row) && offsets_are_valid;
    let checked = forward(&layer);
    assert_eq!(checked.is_ok(), valid, "{:?}", checked.err());

    let layer = layer.with_bounds_check(BoundsCheck::Off);
    let out = forward(&layer)?;
    if let Ok(checked) = checked {
        let bits = |out: &Tensor| out.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        assert_eq!(bits(&checked)?, bits(&out)?);
    }
    let grads = out.sum_all()?.backward()?;
    let grad = grads.get(&weight).expect("hashed_weight is a variable");
    assert_eq!(grad.shape(), weight.shape());
    Ok(())
}

fuzz_target!(|input: Input| {
    let _ = run(&input);
});
