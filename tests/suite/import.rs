//! What importing a state dict refuses and by which name, what it reads besides, and that no file makes it panic.
//! The numbers that come out are the business of golden.rs.

use crate::common::{message, to_vec, Draws};
use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBagConfig, StateDict};
use safetensors::{Dtype, View};
use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use zip::write::SimpleFileOptions;
use zip::{ZipArchive, ZipWriter};

const CPU: Device = Device::Cpu;

fn config() -> HashedEmbeddingBagConfig {
    HashedEmbeddingBagConfig::default()
}

/// The entries of a state dict, to change and write as safetensors.
type Entries = BTreeMap<String, Tensor>;

fn entries(name: &str, key: Option<&str>) -> Entries {
    let path = format!("tests/golden/{name}.pth");
    let mut state = match key {
        None => StateDict::open(path).unwrap(),
        Some(key) => StateDict::open_nested(path, key).unwrap(),
    };
    let keys: Vec<_> = state.keys().map(str::to_string).collect();
    keys.into_iter()
        .map(|key| (key.clone(), state.take(&key, &CPU).unwrap()))
        .collect()
}

fn state(entries: &Entries) -> StateDict {
    let file = tempfile::NamedTempFile::new().unwrap();
    safetensors::serialize_to_file(entries, None, file.path()).unwrap();
    StateDict::open(file.path()).unwrap()
}

fn changed(entries: &Entries, change: impl Fn(&mut Entries)) -> StateDict {
    let mut entries = entries.clone();
    change(&mut entries);
    state(&entries)
}

fn floats(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &CPU).unwrap()
}

fn ints(values: &[i64]) -> Tensor {
    Tensor::new(values, &CPU).unwrap()
}

fn set(key: &str, tensor: Tensor) -> impl Fn(&mut Entries) {
    let key = key.to_string();
    move |entries| {
        entries.insert(key.clone(), tensor.clone());
    }
}

fn unset(key: &str) -> impl Fn(&mut Entries) {
    let key = key.to_string();
    move |entries| {
        entries.remove(&key).unwrap();
    }
}

/// A change to a state dict, and what is said of it.
type Refusal<'a> = (Box<dyn Fn(&mut Entries)>, &'a str);

#[track_caller]
fn assert_refused<T>(
    entries: &Entries,
    take: impl Fn(&mut StateDict) -> Result<T>,
    refusals: Vec<Refusal>,
) {
    assert!(
        take(&mut state(entries)).is_ok(),
        "the state dict itself is good"
    );
    for (change, said) in refusals {
        let mut state = changed(entries, change);
        let before: Vec<_> = state.keys().map(str::to_string).collect();
        let got = message(take(&mut state));
        assert!(
            got.starts_with(&format!("import: {said}")),
            "{got}\nexpected {said}"
        );
        let after: Vec<_> = state.keys().map(str::to_string).collect();
        assert_eq!(before, after, "a refused call takes nothing");
    }
}

#[test]
fn original_refuses_by_key() {
    let module = entries("original", None);
    let emb = Entries::from([(
        "a.emb.hashed_weight".into(),
        module["hashed_weight"].clone(),
    )]);
    let take =
        |state: &mut StateDict| state.hashed_embedding_bag("a.emb", 1000, 16, config(), &CPU);
    assert_refused(
        &emb,
        take,
        vec![
            (
                Box::new(|entries| {
                    let weight = entries.remove("a.emb.hashed_weight").unwrap();
                    entries.insert("a.embed.hashed_weight".into(), weight);
                }),
                "a.emb.hashed_weight is missing from a.embed.hashed_weight",
            ),
            (
                Box::new(set("a.emb.scale", floats(&[1]))),
                "a.emb.scale is no entry of this module, which has hashed_weight",
            ),
            (
                Box::new(set("a.emb.hashed_weight", floats(&[2, 8]))),
                "a.emb.hashed_weight: hashed-embedding-bag: hashed_weight must have rank 1, got [2, 8]",
            ),
            (
                Box::new(set("a.emb.hashed_weight", ints(&[1, 2]))),
                "a.emb.hashed_weight: hashed-embedding-bag: hashed_weight must have dtype f16 or bf16 or f32 or f64, got i64",
            ),
            (
                Box::new(set("a.emb.hashed_weight", floats(&[0]))),
                "a.emb.hashed_weight: hashed-embedding-bag: hashed_weight must hold at least one block of 1 values, got 0",
            ),
        ],
    );
    // What lies beside the module, or deeper, is not its own.
    let others = changed(&emb, |entries| {
        for key in ["a.emb2", "a.emb.deeper.scale", "scale"] {
            entries.insert(key.into(), floats(&[1]));
        }
    });
    let mut others = others;
    take(&mut others).unwrap();
    let left: Vec<_> = others.keys().collect();
    assert_eq!(left, ["a.emb.deeper.scale", "a.emb2", "scale"]);
    assert!(message(take(&mut others)).contains("a.emb.hashed_weight is missing"));

    let other_hash = HashedEmbeddingBagConfig {
        hash: Some(Hash::default_for(16)),
        ..config()
    };
    let got = message(state(&emb).hashed_embedding_bag("a.emb", 1000, 16, other_hash, &CPU));
    assert!(
        got.starts_with("import: the hash is that of the module"),
        "{got}"
    );
}

#[test]
fn original_embedding_refuses_by_key() {
    let module = entries("original_embedding", Some("state_dict"));
    assert_refused(
        &module,
        |state| state.hashed_embedding("words", 3000, 10, Default::default(), &CPU),
        vec![
            (
                Box::new(unset("words.hashed_embedding_bag.hashed_weight")),
                "words.hashed_embedding_bag.hashed_weight is missing from head.bias, head.weight",
            ),
            (
                Box::new(set("words.bias", floats(&[1]))),
                "words.bias is no entry of this module, which has hashed_embedding_bag.hashed_weight",
            ),
            (
                Box::new(set("words.hashed_embedding_bag.bias", floats(&[1]))),
                "words.hashed_embedding_bag.bias is no entry of this module, which has hashed_weight",
            ),
        ],
    );
}

#[test]
fn robe_refuses_by_key() {
    let module = entries("robe", None);
    let mut other = to_vec(&module["hashed_weight"]).unwrap();
    other[499] += 1.0;
    let other = Tensor::new(other, &CPU)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap();
    let mut negative = vec![5i64; 51];
    negative[2] = -1;
    let robe = |state: &mut StateDict| state.robe("", 1000, 20, 8, config(), &CPU);
    assert_refused(
        &module,
        robe,
        vec![
            (
                Box::new(|entries| entries.retain(|key, _| !key.ends_with("weight"))),
                "hashed_weight is missing from random_numbers, signature",
            ),
            (
                Box::new(unset("random_numbers")),
                "random_numbers is missing from hashed_weight, signature, weight",
            ),
            (
                Box::new(unset("signature")),
                "signature is missing from hashed_weight, random_numbers, weight",
            ),
            (
                Box::new(set("bias", floats(&[1]))),
                "bias is no entry of this module, which has hashed_weight, weight, random_numbers, signature",
            ),
            (
                Box::new(set("weight", other)),
                "weight must be another name of hashed_weight, but differs from it",
            ),
            (
                Box::new(set("weight", floats(&[250, 2]))),
                "weight must be another name of hashed_weight, but differs from it",
            ),
            (
                Box::new(set("random_numbers", ints(&[5; 50]))),
                "random_numbers must be i64 of shape [51], got i64 of shape [50]",
            ),
            (
                Box::new(set("random_numbers", floats(&[51]))),
                "random_numbers must be i64 of shape [51], got f32 of shape [51]",
            ),
            (
                Box::new(set("random_numbers", ints(&negative))),
                "random_numbers: hashed-embedding-bag: ROBE's random_numbers must not be negative, got -1 at position 2",
            ),
            (
                Box::new(set("random_numbers", ints(&[0; 51]))),
                "random_numbers: hashed-embedding-bag: the modulus of an affine hash must be at least 1, got 0",
            ),
            (
                Box::new(set("signature", ints(&[0, 9]))),
                "signature must be [0, 0], what it is unless the hash is lma_hash",
            ),
            (
                Box::new(set("signature", ints(&[0; 1000]))),
                "signature must be i64 of shape [2], got i64 of shape [1000]",
            ),
            (
                Box::new(|entries| {
                    for key in ["hashed_weight", "weight"] {
                        entries.insert(key.into(), floats(&[7]));
                    }
                }),
                "hashed_weight: hashed-embedding-bag: hashed_weight must hold at least one block of 8 values, got 7",
            ),
            // A later module of the same authors, which would give wrong numbers.
            (
                Box::new(|entries| {
                    entries.retain(|key, _| key == "weight");
                    entries.insert("random_numbers".into(), ints(&[5; 11]));
                }),
                "random_numbers has no helpers beside it: a RobezEmbedding",
            ),
        ],
    );
    // Either name of the parameter will do.
    for name in ["hashed_weight", "weight"] {
        robe(&mut changed(&module, unset(name))).unwrap();
    }
    // A row count that ROBE's signed arithmetic cannot hold, with or without the offset.
    let got = message(state(&module).robe("", 1 << 40, 20, 8, config(), &CPU));
    assert!(
        got.contains("overflow the signed 64-bit arithmetic"),
        "{got}"
    );
    let far = HashedEmbeddingBagConfig {
        first_row: 1 << 40,
        ..config()
    };
    let got = message(state(&module).robe("", 1, 20, 8, far, &CPU));
    assert!(
        got.contains("overflow the signed 64-bit arithmetic"),
        "{got}"
    );
}

#[test]
fn robe_cpu_refuses_by_key() {
    let module = entries("robe_cpu", None);
    let robe = |state: &mut StateDict| state.robe("", 1000, 10, 4, config(), &CPU);
    assert_refused(
        &module,
        robe,
        vec![
            (Box::new(unset("weight")), "weight is missing from helper_E1sR"),
            (
                Box::new(unset("random_numbers")),
                "random_numbers is missing from helper_E1sR",
            ),
            (
                Box::new(unset("helper_E1sR")),
                "helper_E1sR is missing from helper_Eidx_base",
            ),
            (
                Box::new(unset("helper_Eidx_base")),
                "helper_Eidx_base is missing from helper_E1sR",
            ),
            (
                Box::new(unset("helper_Eidx_offset")),
                "helper_Eidx_offset is missing from helper_E1sR",
            ),
            (
                Box::new(set("signature", ints(&[0, 0]))),
                "signature is no entry of this module, which has weight, random_numbers, helper_E1sR",
            ),
            (
                Box::new(set("random_numbers", ints(&[5; 51]))),
                "random_numbers must be i64 of shape [11], got i64 of shape [51]",
            ),
            (
                Box::new(set("helper_E1sR", ints(&[5; 10]))),
                "helper_E1sR must hold 871205356 at 0 for a chunk size of 4, got 5",
            ),
        ],
    );
    // Arguments that the helpers contradict.
    let got = message(state(&module).robe("", 1000, 12, 4, config(), &CPU));
    assert_eq!(
        got,
        "import: helper_E1sR must be i64 of shape [12], got i64 of shape [10]"
    );
    let got = message(state(&module).robe("", 1000, 10, 5, config(), &CPU));
    assert_eq!(
        got,
        "import: helper_Eidx_base must hold 0 at 4 for a chunk size of 5, got 1"
    );
    let got = message(state(&module).robe("", 1000, 10, 0, config(), &CPU));
    assert!(
        got.contains("block must lie in 1..=16777216, got 0"),
        "{got}"
    );

    // Before there were chunks.
    let old = |entries: &mut Entries| {
        entries.retain(|key, _| !key.starts_with("helper_Eidx"));
        let columns: Vec<i64> = (0..10).collect();
        entries.insert("helper_Eidx".into(), ints(&columns));
    };
    let layer = changed(&module, old).robe("", 1000, 10, 1, config(), &CPU);
    assert_eq!(layer.unwrap().hash().block(), 1);
    let got = message(changed(&module, old).robe("", 1000, 10, 4, config(), &CPU));
    assert!(got.contains("helper_Eidx must hold 0 at 1"), "{got}");
}

#[test]
fn robe_dlrm_refuses_by_key() {
    let model = entries("robe_dlrm", Some("state_dict"));
    let tables = [("a", 100), ("b", 7), ("c", 1000)];
    assert_refused(
        &model,
        |state| state.robe_dlrm("", tables, 16, 8, config(), &CPU),
        vec![
            (
                Box::new(|entries| entries.retain(|key, _| !key.starts_with("emb_l.2"))),
                "emb_l.2.random_numbers is missing",
            ),
            (
                Box::new(set("emb_l.3.weight", floats(&[640]))),
                "emb_l.3.weight belongs to none of 3 tables",
            ),
            (
                Box::new(set("emb_l.1.random_numbers", ints(&[5; 51]))),
                "emb_l.1.random_numbers differs from emb_l.0.random_numbers",
            ),
            (
                Box::new(set("emb_l.1.weight", floats(&[640]))),
                "emb_l.1.weight must be another name of emb_l.0.hashed_weight, but differs from it",
            ),
            (
                Box::new(set("hashed_weight", floats(&[641]))),
                "hashed_weight must be another name of emb_l.0.hashed_weight, but differs from it",
            ),
            (
                Box::new(set("emb_l.1.bias", floats(&[640]))),
                "emb_l.1.bias is no entry of this module",
            ),
            (
                Box::new(|entries| {
                    entries.retain(|key, _| {
                        !key.ends_with("hashed_weight")
                            && !key.ends_with("l.0.weight")
                            && !key.ends_with("l.1.weight")
                            && !key.ends_with("l.2.weight")
                    })
                }),
                "emb_l.0.hashed_weight is missing",
            ),
        ],
    );
    let none: [(&str, usize); 0] = [];
    let got = message(state(&model).robe_dlrm("", none, 16, 8, config(), &CPU));
    assert_eq!(got, "import: a DLRM has at least one table");
    let got = message(state(&model).robe_dlrm("", [("a", 1); 3], 16, 8, config(), &CPU));
    assert!(got.contains("two tables are named a"), "{got}");
    // Under a prefix, as data parallelism makes one.
    let wrapped = |entries: &mut Entries| {
        *entries = std::mem::take(entries)
            .into_iter()
            .map(|(key, tensor)| (format!("module.{key}"), tensor))
            .collect();
    };
    let mut state = changed(&model, wrapped);
    state
        .robe_dlrm("module", tables, 16, 8, config(), &CPU)
        .unwrap();
    let left: Vec<_> = state.keys().collect();
    assert_eq!(left, ["module.bot_l.0.bias", "module.bot_l.0.weight"]);
}

#[test]
fn files_of_other_kinds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pth");
    assert!(message(StateDict::open(&path)).contains("No such file"));
    for bytes in [
        &b""[..],
        b"PK\x03\x04",
        b"PK\x03\x04aaaaaaaaaaaaaa",
        &[0x80, 2, 0x8a],
        &[0xff; 64],
    ] {
        std::fs::write(&path, bytes).unwrap();
        let got = message(StateDict::open(&path));
        assert!(got.contains("model.pth"), "{got}");
    }
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.safetensors",
        "state_dict",
    ));
    assert!(
        got.contains("safetensors holds nothing nested, such as state_dict"),
        "{got}"
    );
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.pth",
        "test_acc",
    ));
    assert!(
        got.contains(
            "import: a value where a state dict should be; save module.state_dict(), not the module"
        ),
        "{got}"
    );
}

// ---- what training scripts save: tests/golden/structures.py ----

fn structure(name: &str, key: Option<&str>) -> Result<StateDict> {
    let path = format!("tests/golden/structures/{name}.pth");
    match key {
        None => StateDict::open(path),
        Some(key) => StateDict::open_nested(path, key),
    }
}

/// Checks that this is the state dict of structures.py, its hashed values counted from `first`.
#[track_caller]
fn assert_state_dict(state: Result<StateDict>, first: f64) {
    let mut state = state.unwrap();
    let layer = state
        .hashed_embedding_bag("user", 10, 4, config(), &CPU)
        .unwrap();
    let values: Vec<f64> = (0..40).map(|i| first + i as f64 / 4.0).collect();
    assert_eq!(to_vec(layer.hashed_weight()).unwrap(), values);
    let mut take = |key| state.take(key, &CPU).unwrap();
    let (weight, bias) = (take("head.weight"), take("head.bias"));
    assert_eq!(weight.dims(), [2, 4]);
    assert_eq!(to_vec(&weight).unwrap(), [0., 1., 2., 3., 4., 5., 6., 7.]);
    assert_eq!(to_vec(&bias).unwrap(), [0.5, -0.5]);
    assert_eq!(state.keys().count(), 0);
}

#[test]
fn a_state_dict_that_is_stored_once_is_read_wherever_it_is_used() {
    for key in ["model", "state_dict", "models.1", "ema.shadow"] {
        assert_state_dict(structure("shared", Some(key)), 0.0);
    }
    assert_state_dict(structure("shared", Some("models.0")), 100.0);
}

#[test]
fn objects_of_any_class_are_passed_over_in_every_protocol() {
    for file in ["objects", "protocol4", "protocol5"] {
        assert_state_dict(structure(file, Some("state_dict")), 0.0);
        // A subclass of dict is a dict, though this one holds no tensors.
        let parameters = structure(file, Some("hyper_parameters")).unwrap();
        assert_eq!(parameters.keys().count(), 0);
        for (key, said) in [
            ("queue", "an object of collections.deque"),
            ("args", "an object of argparse.Namespace"),
            ("countdown", "an object of __main__.Countdown"),
            ("size", "an object of torch.Size"),
            ("surrogate", "a value"),
            ("nothing", "a value"),
        ] {
            let got = message(structure(file, Some(key)));
            assert!(
                got.contains(&format!("import: {said} where a state dict should be")),
                "{got}"
            );
        }
    }
}

#[test]
fn dotted_keys_lead_further_down() {
    assert_state_dict(structure("nested", Some("state_dict.generator")), 0.0);
    // The second key has a dot itself.
    assert_state_dict(structure("nested", Some("state_dict.critic.v2")), 100.0);
    let mut state = structure("nested", Some("optimizer.state.0")).unwrap();
    let step = state.take("step", &CPU).unwrap();
    assert_eq!(to_vec(&step).unwrap(), [7.0]);

    let all = "state_dict.generator or state_dict.critic.v2 or optimizer.state.0";
    for (key, said) in [
        (None, "no tensors at the top; the state dict may be under "),
        (
            Some("model"),
            "the file holds no model; the state dict may be under ",
        ),
        (
            Some("state_dict.gen"),
            "the file holds no state_dict.gen; the state dict may be under ",
        ),
        (
            Some("epoch.1"),
            "the file holds no epoch.1; the state dict may be under ",
        ),
    ] {
        let got = message(structure("nested", key));
        assert!(got.contains(&format!("import: {said}{all}")), "{got}");
        assert!(got.contains("nested.pth"), "{got}");
    }
    let got = message(structure("nested", Some("state_dict")));
    assert!(
        got.contains(
            "no tensors under state_dict; the state dict may be under state_dict.generator or state_dict.critic.v2: open it with that key"
        ),
        "{got}"
    );
}

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
fn an_entry_that_is_missing_is_found_within_wrappers() {
    let mut state = structure("wrapped", None).unwrap();
    let got = message(state.hashed_embedding_bag("user", 10, 4, config(), &CPU));
    assert_eq!(
        got,
        "import: user.hashed_weight is missing, but there is module._orig_mod.user.hashed_weight; begin the prefix with module._orig_mod."
    );
    let layer = state.hashed_embedding_bag("module._orig_mod.user", 10, 4, config(), &CPU);
    assert_eq!(layer.unwrap().hashed_weight().dims(), [40]);
    // Wrapped in the middle as well.
    let got = message(state.take("tower.weight", &CPU));
    assert_eq!(
        got,
        "import: tower.weight is missing, but there is module._orig_mod.tower._orig_mod.weight"
    );
    // A prefix that a framework adds is found too, by the end of the key.
    let got = message(state.take("weight", &CPU));
    assert!(
        got.starts_with(
            "import: weight is missing, but there is module._orig_mod.head.weight and "
        ),
        "{got}"
    );
    let got = message(state.take("tail.weight", &CPU));
    assert!(
        got.starts_with("import: tail.weight is missing from module._orig_mod.head.bias, "),
        "{got}"
    );
}

// ---- archives by hand ----

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in files {
        zip.start_file(*name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn open(bytes: &[u8]) -> Result<StateDict> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    StateDict::open(file.path())
}

fn open_at(bytes: &[u8], key: &str) -> Result<StateDict> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    StateDict::open_nested(file.path(), key)
}

fn open_pickle(pickle: &[u8]) -> Result<StateDict> {
    open(&archive(&[("m/data.pkl", pickle), ("m/data/0", &[0; 48])]))
}

fn string(text: &str) -> Vec<u8> {
    [
        &b"X"[..],
        &(text.len() as u32).to_le_bytes(),
        text.as_bytes(),
    ]
    .concat()
}

fn integer(n: i64) -> Vec<u8> {
    [&[0x8a, 8], &n.to_le_bytes()[..]].concat()
}

fn tuple(items: &[Vec<u8>]) -> Vec<u8> {
    [b"(", items.concat().as_slice(), b"t"].concat()
}

/// The pickle of a tensor in storage 0.
fn tensor(class: &str, offset: i64, dims: &[i64], strides: &[i64]) -> Vec<u8> {
    let integers = |values: &[i64]| tuple(&values.iter().map(|&n| integer(n)).collect::<Vec<_>>());
    let storage = tuple(&[
        string("storage"),
        format!("ctorch\n{class}\n").into_bytes(),
        string("0"),
        string("cpu"),
        integer(12),
    ]);
    let args = [
        [storage, b"Q".to_vec()].concat(),
        integer(offset),
        integers(dims),
        integers(strides),
        vec![0x89],
        b"}".to_vec(),
    ];
    [
        &b"ctorch._utils\n_rebuild_tensor_v2\n"[..],
        &tuple(&args),
        b"R",
    ]
    .concat()
}

fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<Vec<u8>> = entries
        .iter()
        .map(|(key, value)| [string(key), value.clone()].concat())
        .collect();
    [&[0x80, 2, b'}', b'('], entries.concat().as_slice(), b"u."].concat()
}

#[test]
fn views_of_a_storage() -> Result<()> {
    let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let load = |class: &str, offset, dims: &[i64], strides: &[i64]| {
        let pickle = dict(&[("a", tensor(class, offset, dims, strides))]);
        let file = archive(&[("m/data.pkl", &pickle), ("m/data/0", &bytes)]);
        open(&file)?.take("a", &CPU)
    };
    let flat = |offset, dims: &[i64], strides: &[i64]| -> Result<Vec<f64>> {
        to_vec(&load("FloatStorage", offset, dims, strides)?)
    };
    assert_eq!(flat(2, &[2, 3], &[3, 1])?, [2., 3., 4., 5., 6., 7.]);
    assert_eq!(flat(0, &[3, 2], &[1, 3])?, [0., 3., 1., 4., 2., 5.]);
    assert_eq!(flat(1, &[3], &[4])?, [1., 5., 9.]);
    assert_eq!(flat(11, &[1, 1], &[1000, 7])?, [11.]);
    assert_eq!(flat(5, &[], &[])?, [5.]);
    assert_eq!(load("FloatStorage", 0, &[0, 4], &[4, 1])?.dims(), [0, 4]);
    assert_eq!(load("ShortStorage", 0, &[24], &[1])?.dtype(), DType::I16);
    assert_eq!(
        load("BFloat16Storage", 0, &[24], &[1])?.dtype(),
        DType::BF16
    );

    let refused = |offset, dims: &[i64], strides: &[i64]| message(flat(offset, dims, strides));
    for got in [
        refused(0, &[13], &[1]),
        refused(12, &[1], &[1]),
        refused(0, &[4, 4], &[4, 1]),
        // A repetition, as `expand` makes one, and one that would fill the memory.
        refused(0, &[13, 1], &[0, 1]),
        refused(0, &[i64::MAX], &[0]),
        refused(0, &[i64::MAX, i64::MAX], &[i64::MAX, 1]),
        refused(0, &[0, i64::MAX, i64::MAX], &[0, 0, 0]),
        refused(i64::MAX, &[2], &[i64::MAX]),
    ] {
        assert!(got.contains("import: a: shape"), "{got}");
        assert!(got.contains("does not fit a storage of 12 values"), "{got}");
    }
    for (offset, dims, strides) in [
        (-1, &[1][..], &[1][..]),
        (0, &[-1], &[1]),
        (0, &[1], &[1, 1]),
    ] {
        let got = message(load("FloatStorage", offset, dims, strides));
        assert!(
            got.contains("not of the form that torch.save writes"),
            "{got}"
        );
    }
    Ok(())
}

#[test]
fn archives_that_are_none() {
    let good = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    assert_eq!(
        open_pickle(&good).unwrap().keys().collect::<Vec<_>>(),
        ["a"]
    );
    // Values that are no tensors are passed over, as torch's _metadata is.
    let mixed = dict(&[("a", integer(1)), ("_metadata", b"}".to_vec())]);
    assert_eq!(open_pickle(&mixed).unwrap().keys().count(), 0);

    let float = tensor("FloatStorage", 0, &[12], &[1]);
    let twice = dict(&[("a", float.clone()), ("a", float)]);
    for (files, said) in [
        (vec![("m/data.txt", &b""[..])], "this zip file 0"),
        (
            vec![("m/data.pkl", &good[..]), ("n/data.pkl", &good)],
            "this zip file 2",
        ),
        (
            vec![("m/data.pkl", &good), ("m/byteorder", b"big")],
            "big-endian",
        ),
        (vec![("m/data.pkl", &twice)], "a is there twice"),
        (
            vec![("m/data.pkl", b"\x80\x02]q\x00.")],
            "a list where a state dict should be; save module.state_dict()",
        ),
        (
            vec![("m/data.pkl", b"\x80\x04\x95")],
            "import: m/data.pkl: the pickle ends early",
        ),
    ] {
        let got = message(open(&archive(&files)));
        assert!(got.contains(said), "{got}\nexpected {said}");
    }
    let mut lacking = open(&archive(&[("m/data.pkl", &good)])).unwrap();
    let got = message(lacking.take("a", &CPU));
    assert!(got.contains("not found"), "{got}");
    // One bit of a weight flipped: the checksum of the archive tells.
    let mut broken = archive(&[("m/data.pkl", &good), ("m/data/0", &[7; 48])]);
    let at = broken
        .windows(48)
        .position(|bytes| bytes == [7; 48])
        .unwrap();
    broken[at + 20] ^= 1;
    let got = message(open(&broken).unwrap().take("a", &CPU));
    assert!(got.contains("checksum"), "{got}");
}

/// Pickles that ask for more memory, time or stack than they may have.
#[test]
fn pickles_that_ask_too_much() {
    let asks = |pickle: Vec<u8>, said: &str| {
        let got = message(open_pickle(&pickle));
        assert!(got.contains(said), "{got}\nexpected {said}");
    };
    // Strings, bytes and integers of which there are two bytes.
    for op in [
        &b"X\xff\xff\xff\xff"[..],
        b"\x8c\xff",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"C\xff",
        b"B\xff\xff\xff\xff",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\xff",
        b"cab",
        b"N",
    ] {
        asks([b"\x80\x02", op, b"NN"].concat(), "ends early");
    }
    for (pickle, said) in [
        (&b"\x80\x02."[..], "takes a value that is not there"),
        (b"\x80\x02(N\x85\x86.", "takes a value that is not there"),
        (b"\x80\x02Nt.", "up to a mark that is not there"),
        (
            b"\x80\x02h\x07.",
            "recalls an object 7 that it has not stored",
        ),
        (b"\x80\x02}(Nu.", "a key without a value"),
        (b"\x80\x02]NNs.", "sets entries of what is no dict"),
        (b"\x80\x01}.", "pickle protocol 1, only 2 to 5 are read"),
        (
            b"\x80\x02}I1\n.",
            "opcode 0x49 is not one that Python 3 writes",
        ),
        (
            b"\x80\x02\x82\x01.",
            "opcode 0x82 is not one that Python 3 writes",
        ),
    ] {
        asks(pickle.to_vec(), said);
    }
    asks(b")".repeat((1 << 24) + 1), "uses more than 16777216 values");
    let uses = [&b"N"[..], &b"2".repeat(1 << 24)].concat();
    asks(uses, "uses more than 16777216 values");
    asks(b"(".repeat((1 << 24) + 1), "uses more than 16777216 values");
    // A tuple in a tuple in a tuple, a list in a list in a list, a dict in a dict in a dict.
    let no_state_dict = "where a state dict should be";
    asks(
        [&b")"[..], &[0x85; 1_000_000], b"."].concat(),
        no_state_dict,
    );
    asks(
        [&b"]".repeat(1_000_000)[..], &b"a".repeat(999_999), b"."].concat(),
        no_state_dict,
    );
    let deep = [
        &b"}K\x01".repeat(1_000_000)[..],
        b"}",
        &b"s".repeat(1_000_000),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&deep).unwrap().keys().count(), 0);
    // With a tensor at the bottom, too deep for its key to be named.
    let tensors = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    let bottom = &tensors[2..tensors.len() - 1];
    let deep = [
        &b"}K\x01".repeat(1_000_000)[..],
        bottom,
        &b"s".repeat(1_000_000),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&deep).unwrap().keys().count(), 0);

    // Remember, recall twice, pair: each round doubles what is reached, but not what is held.
    let pairs = [&b")q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(900), b"."].concat();
    asks(pairs, no_state_dict);
    let dicts = [
        &b"}q\x00"[..],
        &b"}(K\x01h\x00K\x02h\x00uq\x00".repeat(900),
        b".",
    ]
    .concat();
    assert_eq!(open_pickle(&dicts).unwrap().keys().count(), 0);
    // A long tuple, recalled again and again.
    let long = [
        &b"("[..],
        &b")".repeat(10_000),
        b"tq\x00",
        &b"h\x00".repeat(10_000),
        b".",
    ]
    .concat();
    asks(long, no_state_dict);
    // A shape of more dimensions than any tensor has.
    let dims = tensor("FloatStorage", 0, &[1; 65], &[1; 65]);
    let got = message(open_pickle(&dict(&[("a", dims)])).unwrap().take("a", &CPU));
    assert_eq!(got, "import: a: not of the form that torch.save writes");
    // A dict that holds itself.
    let own = [&b"}q\x00"[..], &string("a"), b"h\x00s."].concat();
    let file = archive(&[("m/data.pkl", &own)]);
    assert_eq!(open(&file).unwrap().keys().count(), 0);
    let file = archive(&[("m/data.pkl", &own)]);
    assert_eq!(open_at(&file, "a.a.a").unwrap().keys().count(), 0);
    assert!(message(open_at(&file, "a.b")).contains("holds no a.b, nor any other state dict"));

    // Arguments that are not there.
    let sparse = b"ctorch._utils\n_rebuild_sparse_tensor\n)R".to_vec();
    let got = message(
        open_pickle(&dict(&[("a", sparse)]))
            .unwrap()
            .take("a", &CPU),
    );
    assert_eq!(
        got,
        "import: a: a tensor made by _rebuild_sparse_tensor, which is not read"
    );
    for args in [&b")"[..], b"(K\x01t", b"(K\x01K\x01K\x01K\x01t", b"}", b"N"] {
        for callable in [
            "_rebuild_tensor_v2",
            "_rebuild_parameter",
            "_rebuild_from_type_v2",
        ] {
            let call = [
                format!("ctorch._utils\n{callable}\n").as_bytes(),
                args,
                b"R",
            ]
            .concat();
            let got = message(open_pickle(&dict(&[("a", call)])).unwrap().take("a", &CPU));
            assert!(
                got.contains("not of the form")
                    || got.contains("which is not read")
                    || got.contains("a is missing"),
                "{got}"
            );
        }
    }
}

/// Two thousand views of 16 MiB: the storage is read and verified once, not for each of them.
#[test]
fn many_views_of_one_storage() -> Result<()> {
    const VIEWS: usize = 2000;
    let values: Vec<u8> = (0..1 << 22).flat_map(|i: u32| i.to_le_bytes()).collect();
    let row = |i: usize| tensor("IntStorage", i as i64, &[2], &[1 << 20]);
    let keys: Vec<String> = (0..VIEWS).map(|i| format!("{i:04}")).collect();
    let views: Vec<_> = (keys.iter().enumerate())
        .map(|(i, key)| (key.as_str(), row(i)))
        .collect();
    let file = archive(&[("m/data.pkl", &dict(&views)), ("m/data/0", &values)]);
    let mut state = open(&file)?;
    let start = Instant::now();
    for (i, key) in keys.iter().enumerate() {
        let tensor = state.take(key, &CPU)?.to_vec1::<i32>()?;
        assert_eq!(tensor, [i as i32, i as i32 + (1 << 20)]);
    }
    let time = start.elapsed();
    // Some 0.2 s; once for each view would be minutes, in a debug build.
    assert!(time < Duration::from_secs(20), "{time:?}");
    Ok(())
}

/// Files of an archive that are the same bytes could add up to any length.
#[test]
fn files_that_overlap_are_refused() {
    let pickle = dict(&[("a", tensor("FloatStorage", 0, &[12], &[1]))]);
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    for (name, bytes) in [("m/data.pkl", &pickle[..]), ("m/data/0", &[0; 48])] {
        zip.start_file(name, SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.shallow_copy_file("m/data/0", "m/data/1").unwrap();
    let file = zip.finish().unwrap().into_inner();
    let got = message(open(&file));
    assert!(got.contains("files of the archive overlap"), "{got}");
}

/// Truncations, and changed bytes, some behind good checksums: errors, or tensors, but no panic.
#[test]
fn no_file_panics() {
    let everything = |bytes: &[u8]| {
        for state in [open(bytes), open_at(bytes, "state_dict")] {
            let Ok(mut state) = state else {
                continue;
            };
            let _ = state.robe("", 1000, 10, 4, config(), &CPU);
            let keys: Vec<_> = state.keys().map(str::to_string).collect();
            for key in keys {
                let _ = (state.tensor_info(&key), state.take(&key, &CPU));
            }
        }
    };
    for (seed, path) in ["robe_cpu", "structures/objects", "structures/protocol4"]
        .iter()
        .enumerate()
    {
        let whole = std::fs::read(format!("tests/golden/{path}.pth")).unwrap();
        everything(&whole);
        for len in (0..whole.len()).step_by(17) {
            everything(&whole[..len]);
        }
        let mut files = HashMap::new();
        let mut zip = ZipArchive::new(Cursor::new(&whole)).unwrap();
        for i in 0..zip.len() {
            let mut file = zip.by_index(i).unwrap();
            let mut bytes = vec![];
            file.read_to_end(&mut bytes).unwrap();
            files.insert(file.name().unwrap().to_string(), bytes);
        }
        let mut draws = Draws::new(5 + seed as u64);
        for round in 0..1000 {
            // The archive's own bytes, or the pickle's with the archive written anew.
            if round % 3 == 0 {
                let mut bytes = whole.clone();
                let at = draws.below(bytes.len());
                bytes[at] = draws.below(256) as u8;
                everything(&bytes);
                continue;
            }
            let mut files = files.clone();
            let (_, pickle) = files
                .iter_mut()
                .find(|(name, _)| name.ends_with("data.pkl"))
                .unwrap();
            for _ in 0..1 + round % 4 {
                let at = draws.below(pickle.len());
                // An opcode as often as any byte.
                const OPCODES: &[u8] = b"cqr)R(XJtQKM\x85\x86\x87\x88\x89Nhjsu}b.\x81]Gae\x8a012\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96CB";
                pickle[at] = match draws.below(2) {
                    0 => OPCODES[draws.below(OPCODES.len())],
                    _ => draws.below(256) as u8,
                };
            }
            let files: Vec<_> = files
                .iter()
                .map(|(n, b)| (n.as_str(), b.as_slice()))
                .collect();
            everything(&archive(&files));
        }
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
