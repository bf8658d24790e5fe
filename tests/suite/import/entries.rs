//! The entries of a file: their dtypes, shapes and other names.

use super::{floats, structure, CPU};
use crate::common::message;
use candle_core::{DType, Result};
use candle_hashed_embedding_bag::StateDict;
use safetensors::{Dtype, View};
use std::collections::HashMap;
use std::path::Path;

/// Every entry is listed with its dtype and shape; what candle has a dtype for is read, bit for bit.
#[test]
fn dtypes_that_candle_does_not_have_are_listed_and_refused_by_name() {
    let mut state = structure("dtypes", None).unwrap();
    let listed: Vec<_> = state
        .keys()
        .map(|key| match state.tensor_info(key) {
            Ok(info) => format!(
                "{key} {} {:?} {}",
                info.dtype,
                info.shape,
                info.candle_dtype.map_or("-", |dtype| dtype.as_str())
            ),
            Err(_) => message(state.tensor_info(key)),
        })
        .collect();
    assert_eq!(
        listed,
        [
            "codes i8 [1, 2] -",
            "has.bfloat16 bf16 [2] bf16",
            "has.float16 f16 [2] f16",
            "has.float64 f64 [2] f64",
            "has.float8_e4m3fn f8e4m3 [2] f8e4m3",
            "has.int16 i16 [2] i16",
            "has.int32 i32 [2] i32",
            "has.int64 i64 [2] i64",
            "has.uint16 u16 [2] u32",
            "has.uint32 u32 [2] u32",
            "has.uint8 u8 [2] u8",
            "head.bias f32 [2] f32",
            "head.weight f32 [2, 4] f32",
            "lacks.complex128 c128 [2] -",
            "lacks.complex64 c64 [2] -",
            "lacks.float8_e5m2 f8e5m2 [2] -",
            "lacks.uint64 u64 [2] -",
            "mask bool [3] -",
            "import: meta: a tensor made by _rebuild_meta_tensor_no_storage, which is not read",
            "import: negated: a view that conjugates or negates; save its resolve_conj().resolve_neg()",
            "quantized qint8 [3] -",
            "import: sparse: a tensor made by _rebuild_sparse_tensor, which is not read",
            "tagged f32 [3] f32",
            "user.hashed_weight f32 [40] f32",
        ]
    );
    let keys: Vec<_> = state.keys().map(str::to_string).collect();
    for key in &keys {
        let info = state.tensor_info(key);
        let taken = state.take(key, &CPU);
        match info.map(|info| (info.candle_dtype, info)) {
            Ok((Some(dtype), info)) => {
                let tensor = taken.unwrap();
                assert_eq!((tensor.dtype(), tensor.dims()), (dtype, &info.shape[..]));
                if key.starts_with("has") {
                    // Not to f64 at once: for f8e4m3, candle never comes back from that.
                    let tensor = tensor.to_dtype(DType::F32).unwrap();
                    assert_eq!(tensor.to_vec1::<f32>().unwrap(), [1.0, 2.0], "{key}");
                }
            }
            Ok((None, info)) => assert_eq!(
                message(taken),
                format!(
                    "import: {key}: candle has no dtype for {}; convert the tensor before saving it",
                    info.dtype
                )
            ),
            Err(_) => assert!(message(taken).contains(&format!("import: {key}: a "))),
        }
    }
    assert!(message(state.tensor_info("mark")).contains("import: mark is missing from codes, "));
}

/// The same of safetensors, which lists through the same type.
#[test]
fn a_bool_in_safetensors_is_listed_and_refused_by_name() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    let views = [("mask", Dtype::BOOL), ("ids", Dtype::U16)].map(|(name, dtype)| {
        let bytes = vec![1; 2 * dtype.bitsize() / 8];
        (name, OwnedTensor(dtype, bytes))
    });
    safetensors::serialize_to_file(views, None, file.path())?;
    let mut state = StateDict::open(file.path())?;
    let info = state.tensor_info("mask")?;
    assert_eq!((info.dtype.as_str(), &info.shape[..]), ("bool", &[2][..]));
    assert_eq!(info.candle_dtype, None);
    assert_eq!(
        message(state.take("mask", &CPU)),
        "import: mask: candle has no dtype for bool; convert the tensor before saving it"
    );
    let info = state.tensor_info("ids")?;
    assert_eq!(
        (info.dtype.as_str(), info.candle_dtype),
        ("u16", Some(DType::U32))
    );
    assert_eq!(state.take("ids", &CPU)?.to_vec1::<u32>()?, [257, 257]);
    Ok(())
}

/// Two values of a dtype.
struct OwnedTensor(Dtype, Vec<u8>);

impl View for OwnedTensor {
    fn dtype(&self) -> Dtype {
        self.0
    }

    fn shape(&self) -> &[usize] {
        &[2]
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.1).into()
    }

    fn data_len(&self) -> usize {
        self.1.len()
    }
}

#[test]
fn safetensors_aliases_only_from_what_is_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let tensors = [("a", floats(&[3])), ("b", floats(&[2]))];
    let metadata = [("c", "a"), ("d", "nothing"), ("b", "a"), ("format", "pt")];
    let metadata = metadata.map(|(k, v)| (k.to_string(), v.to_string()));
    safetensors::serialize_to_file(tensors, Some(HashMap::from(metadata)), Path::new(&path))?;
    let mut state = StateDict::open(&path)?;
    assert_eq!(state.keys().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(state.take("c", &CPU)?.dims(), [3]);
    assert_eq!(state.take("b", &CPU)?.dims(), [2]);
    Ok(())
}
