//! The layers of each kind of module, and what they refuse, by key.

use super::{config, floats, CPU};
use crate::common::{message, to_vec};
use candle_core::{DType, Module, Result, Tensor};
use candle_hashed_embedding_bag::import::{self, LmaModule};
use candle_hashed_embedding_bag::{Hash, HashedEmbeddingBag, HashedEmbeddingBagConfig, StateDict};
use std::collections::BTreeMap;

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

/// The tensors of tests/golden/semantic.safetensors under other names.
fn semantic_entries(names: &[(&str, &str)]) -> Entries {
    let all = candle_core::safetensors::load("tests/golden/semantic.safetensors", &CPU).unwrap();
    let names = names.iter();
    names
        .map(|(to, from)| (to.to_string(), all[*from].clone()))
        .collect()
}

#[test]
fn lma_modules() -> Result<()> {
    let entries = semantic_entries(&[
        ("emb.hashed_weight", "a.hashed_weight"),
        ("emb.weight", "a.hashed_weight"),
        ("emb.random_numbers", "random_numbers"),
        ("emb.signature", "a.signature"),
        ("head", "a.output"),
    ]);
    let golden = semantic_entries(&[
        ("indices", "a.indices"),
        ("offsets", "a.offsets"),
        ("output", "a.output"),
        ("signature", "a.signature"),
    ]);
    let take =
        |state: &mut StateDict, module, config| state.lma("emb", 3000, 16, module, config, &CPU);
    let check = |layer: HashedEmbeddingBag| -> Result<()> {
        let layer = layer.with_hashed_weight(layer.hashed_weight().to_dtype(DType::F64)?)?;
        let output = layer.forward_with_offsets(&golden["indices"], &golden["offsets"])?;
        // They were taken in f64 and rounded.
        assert!(to_vec(&output.to_dtype(DType::F32)?)? == to_vec(&golden["output"])?);
        Ok(())
    };
    let mut whole = state(&entries);
    check(take(&mut whole, Default::default(), Default::default())?)?;
    assert_eq!(whole.keys().collect::<Vec<_>>(), ["head"]);
    // The signatures from elsewhere, and a module that starts at a later row.
    let given = |signature: &Tensor| LmaModule {
        signature: Some(signature.clone()),
        ..Default::default()
    };
    let mut without = changed(&entries, unset("emb.signature"));
    check(take(
        &mut without,
        given(&golden["signature"]),
        Default::default(),
    )?)?;
    let later = HashedEmbeddingBagConfig {
        first_row: 500,
        ..Default::default()
    };
    let before = Tensor::cat(
        &[
            &golden["signature"].narrow(0, 0, 500)?,
            &golden["signature"],
        ],
        0,
    )?;
    check(take(
        &mut changed(&entries, unset("emb.signature")),
        given(&before),
        later,
    )?)?;

    let refusals: Vec<Refusal> = vec![
        (
            Box::new(unset("emb.signature")),
            "emb.signature is missing",
        ),
        (
            Box::new(unset("emb.random_numbers")),
            "emb.random_numbers is missing",
        ),
        (
            Box::new(set("emb.signature", ints(&[1; 2999]))),
            "emb.hashed_weight: hashed-embedding-bag: signatures must have at least 3000 rows, and so shape [3000], got [2999]",
        ),
        (
            Box::new(set("emb.signature", floats(&[3000]))),
            "emb.hashed_weight: hashed-embedding-bag: signatures must have dtype i64, got f32",
        ),
        (
            Box::new(set("emb.random_numbers", ints(&[-1; 51]))),
            "emb.random_numbers: hashed-embedding-bag: LMA's random_numbers must lie in 1..2^31, got -1 at position 0",
        ),
        (
            Box::new(set("emb.helper_Eidx", ints(&[1]))),
            "emb.helper_Eidx is no entry of this module",
        ),
    ];
    let take = |state: &mut StateDict| take(state, Default::default(), Default::default());
    assert_refused(&entries, take, refusals);
    Ok(())
}

#[test]
fn scma_models() -> Result<()> {
    let entries = semantic_entries(&[
        ("model.hashed_weight", "scma.hashed_weight"),
        ("model.top.weight", "a.output"),
    ]);
    let golden = semantic_entries(&[
        ("table", "scma.table"),
        ("indices", "scma.indices"),
        ("output", "scma.output"),
    ]);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("table.npz");
    Tensor::write_npz(&[("big_min_hash_table", &golden["table"])], &path)?;
    let table = import::scma_table(&path, 60, 8)?;
    let take = |state: &mut StateDict, table: &Tensor| {
        let tables = [("a", 45), ("b", 15)];
        state.scma("model", tables, 8, table, Default::default(), &CPU)
    };
    let mut whole = state(&entries);
    let collection = take(&mut whole, &table)?;
    assert_eq!(whole.keys().collect::<Vec<_>>(), ["model.top.weight"]);
    // As one table, since these indices count the rows of both.
    let config = HashedEmbeddingBagConfig {
        hash: Some(Hash::slot_table(1)),
        ..Default::default()
    };
    let (weight, slots) = (collection.hashed_weight(), collection.row_tensor().unwrap());
    assert_eq!(slots.dtype(), DType::U32);
    let layer = HashedEmbeddingBag::with_row_tensor(weight.clone(), slots, 60, 8, config)?;
    assert_eq!(
        to_vec(&layer.forward(&golden["indices"])?)?,
        to_vec(&golden["output"])?
    );
    let row = |row: i64| ints(&[row]).unsqueeze(0);
    assert_eq!(
        to_vec(&collection.table("b")?.forward(&row(3)?)?)?,
        to_vec(&layer.forward(&row(48)?)?)?
    );

    let mut untaken = state(&entries);
    for (table, said) in [
        (
            table.narrow(0, 0, 59)?,
            "import: model.hashed_weight: hashed-embedding-bag: slot_table must have 60 rows, and so shape [60, 8], got [59, 8]",
        ),
        (
            table.to_dtype(DType::U32)?,
            "hashed-embedding-bag: big_min_hash_table must have dtype i64, got u32",
        ),
    ] {
        assert_eq!(message(take(&mut untaken, &table)), said);
        assert_eq!(untaken.keys().count(), 2);
    }
    let said = message(import::scma_table(&path, 61, 8));
    assert!(
        said.ends_with(
            "import: big_min_hash_table must be i64 of shape [61, 8], got i64 of shape [60, 8]"
        ),
        "{said}"
    );
    Tensor::write_npz(&[("other", &golden["table"])], &path)?;
    let said = message(import::scma_table(&path, 60, 8));
    assert!(
        said.ends_with("import: no big_min_hash_table, only other"),
        "{said}"
    );
    assert!(
        message(import::scma_table(folder.path().join("none"), 60, 8)).contains("No such file")
    );
    Ok(())
}
