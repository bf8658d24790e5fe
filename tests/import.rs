//! What importing a state dict refuses and by which name, what it reads besides, and that no file makes it panic.
//! The numbers that come out are the business of tests/golden.rs.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBagConfig, StateDict};
use common::{message, to_vec, Draws};
use std::collections::{BTreeMap, HashMap};
use std::io::{Cursor, Read, Write};
use std::path::Path;
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
    let got = message(StateDict::open("tests/golden/robe_dlrm.pth"));
    assert!(
        got.contains("no tensors at the top; the state dict may be under state_dict"),
        "{got}"
    );
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.pth",
        "model",
    ));
    assert!(got.contains("the file holds no model"), "{got}");
    let got = message(StateDict::open_nested(
        "tests/golden/robe_dlrm.pth",
        "test_acc",
    ));
    assert!(
        got.contains("save module.state_dict(), not the module"),
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
    let got = message(load("BoolStorage", 0, &[1], &[1]));
    assert_eq!(got, "import: a: candle has no dtype for BoolStorage");
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
            "save module.state_dict()",
        ),
        (
            vec![("m/data.pkl", b"\x80\x04\x95")],
            "the pickle is not one of a state dict: unknown op-code 149",
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

/// Pickles that ask candle's machine for what it would not survive.
#[test]
fn pickles_that_ask_too_much() {
    let asks = |pickle: Vec<u8>, said: &str| {
        let got = message(open_pickle(&pickle));
        assert!(got.contains(said), "{got}\nexpected {said}");
    };
    // A string of 4 GiB, of which there are two bytes.
    asks(
        b"\x80\x02X\xff\xff\xff\xffab.".to_vec(),
        "ends within a string",
    );
    asks(
        [&b"\x80\x02\x8a\x09"[..], &[1; 9], b"."].concat(),
        "more than 64 bits",
    );
    asks(b"\x80\x02}".to_vec(), "ends early");
    asks(b"\x80\x02.".to_vec(), "unexpected empty stack");
    // A tuple in a tuple in a tuple: dropping it recurses.
    asks(
        [&b")"[..], &[0x85; 1_000_000], b"."].concat(),
        "nests deeper than 1000",
    );
    asks(
        [b"]".repeat(1_000_000), b"a".repeat(999_999)].concat(),
        "nests deeper than 1000",
    );
    // Remember, recall twice, pair: each round doubles.
    let bomb = [&b")q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(900), b"."].concat();
    asks(bomb, "bytes of copies");
    // The same without depth: a long tuple, recalled again and again.
    let long = [
        &b"("[..],
        &b")".repeat(10_000),
        b"tq\x00",
        &b"h\x00".repeat(10_000),
        b".",
    ]
    .concat();
    asks(long, "bytes of copies");
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
            if let Err(e) = open_pickle(&dict(&[("a", call)])) {
                assert!(e.to_string().contains("not of the form"), "{e}");
            }
        }
    }
}

/// Truncations, and changed bytes, some behind good checksums: errors, or tensors, but no panic.
#[test]
fn no_file_panics() {
    let whole = std::fs::read("tests/golden/robe_cpu.pth").unwrap();
    let everything = |bytes: &[u8]| {
        let Ok(mut state) = open(bytes) else {
            return;
        };
        let _ = state.robe("", 1000, 10, 4, config(), &CPU);
        let keys: Vec<_> = state.keys().map(str::to_string).collect();
        for key in keys {
            let _ = state.take(&key, &CPU);
        }
    };
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
    let mut draws = Draws::new(5);
    for round in 0..1500 {
        // The archive's own bytes, or the pickle's with the archive written anew.
        if round % 3 == 0 {
            let mut bytes = whole.clone();
            let at = draws.below(bytes.len());
            bytes[at] = draws.below(256) as u8;
            everything(&bytes);
            continue;
        }
        let mut files = files.clone();
        let pickle = files.get_mut("robe_cpu/data.pkl").unwrap();
        for _ in 0..1 + round % 4 {
            let at = draws.below(pickle.len());
            // An opcode as often as any byte.
            const OPCODES: &[u8] = b"cqr)R(XJtQKM\x85\x86\x87\x88\x89Nhjsu}db.\x81]Gae\x8a";
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
