//! Checkpoints: round trips, the exact description, and everything that opening refuses.

use crate::common::strategies::{check, dtypes, tables};
use crate::common::{floats, integers, message, on_each_device, to_vec, Draws};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, hashed_embedding, hashed_embedding_bag, Checkpoint, Hash, HashedEmbeddingBag,
    HashedEmbeddingBagCollection, HashedEmbeddingBagConfig, Mix, Mode, StateDict,
};
use candle_nn::{VarBuilder, VarMap};
use proptest::collection::vec;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn tensors(vars: &VarMap) -> Vec<(String, Tensor)> {
    let vars = vars.data().lock().unwrap();
    vars.iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect()
}

fn metadata(path: &Path) -> HashMap<String, String> {
    let file = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    metadata.metadata().clone().unwrap()
}

#[test]
fn a_model_is_rebuilt_from_the_file_alone() -> Result<()> {
    on_each_device(|device| {
        let (folder, vars) = (Folder::new(), VarMap::new());
        let path = folder.file("model.safetensors");
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let users = hashed_embedding_bag(100, 8, 0.1, Default::default(), vb.pp("users"))?;
        let config = HashedEmbeddingBagConfig {
            mode: Mode::Max,
            hash: Some(Hash::original()),
            padding_idx: Some(-1),
            include_last_offset: true,
            ..Default::default()
        };
        let items = hashed_embedding_bag(50, 6, 0.3, config, vb.pp("deep.items"))?;
        let words = hashed_embedding(1000, 4, 0.1, Default::default(), vb.pp("words"))?;
        let head = candle_nn::linear(8, 3, vb.pp("head"))?;
        let ids = Tensor::new(&[7i64, 1 << 40], device)?;
        let all = tensors(&vars).into_iter().chain([("ids".into(), ids)]);
        let layers = [
            ("users", &users),
            ("deep.items", &items),
            ("words.hashed_embedding_bag", words.bag()),
        ];
        checkpoint::save(&path, all, layers)?;

        let opened = Checkpoint::open(&path)?;
        let names: Vec<_> = opened.layers().map(|(name, _)| name.to_string()).collect();
        assert_eq!(names, ["deep.items", "users", "words.hashed_embedding_bag"]);
        let (_, spec) = opened.layers().next().unwrap();
        assert_eq!((spec.num_embeddings, spec.embedding_dim), (50, 6));
        assert_eq!(spec.hash, Hash::original());

        let two = integers(&[1, 2, 3, 4, 5, 6], DType::U32, device)?.reshape((3, 2))?;
        let users2 = opened.hashed_embedding_bag("users", DType::F32, device)?;
        assert_eq!(
            to_vec(&users.forward(&two)?)?,
            to_vec(&users2.forward(&two)?)?
        );
        assert!(!users2.hashed_weight().is_variable());
        let items2 = opened.hashed_embedding_bag("deep.items", DType::F32, device)?;
        let rows = integers(&[1, -1, 49, 3], DType::I64, device)?;
        let offsets = integers(&[0, 3, 4], DType::I64, device)?;
        assert_eq!(
            to_vec(&items.forward_with_offsets(&rows, &offsets)?)?,
            to_vec(&items2.forward_with_offsets(&rows, &offsets)?)?
        );
        assert_eq!(
            (items2.config().mode, items2.config().padding_idx),
            (Mode::Max, Some(-1))
        );
        assert!(items2.config().include_last_offset);
        let words2 = opened.hashed_embedding("words", DType::F32, device)?;
        assert_eq!(
            to_vec(&words.forward(&two)?)?,
            to_vec(&words2.forward(&two)?)?
        );

        let vb = opened.var_builder(DType::F32, device);
        assert!(vb.contains_tensor("head.weight") && !vb.contains_tensor("head"));
        let head2 = candle_nn::linear(8, 3, vb.pp("head"))?;
        let x = users.forward(&two)?;
        assert_eq!(to_vec(&head.forward(&x)?)?, to_vec(&head2.forward(&x)?)?);
        assert!(message(vb.get((2, 8), "head.weight")).contains("shape mismatch for head.weight"));
        assert!(message(vb.get(3, "tail")).contains("cannot find tensor tail"));
        let ids = opened.tensor("ids", device)?;
        assert_eq!(ids.to_vec1::<i64>()?, [7, 1 << 40]);

        // In another dtype.
        let half = opened.hashed_embedding_bag("users", DType::F16, device)?;
        assert_eq!(half.forward(&two)?.dtype(), DType::F16);
        assert_eq!(
            message(opened.hashed_embedding_bag("user", DType::F32, device)),
            "checkpoint: no layer user, only deep.items, users, words.hashed_embedding_bag"
        );
        Ok(())
    })
}

/// The description, byte for byte: others may rely on it.
#[test]
fn the_description_is_as_specified() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = |len, config| {
        HashedEmbeddingBag::new(
            Tensor::zeros(len, DType::BF16, &device).unwrap(),
            10,
            4,
            config,
        )
    };
    let with = |hash| HashedEmbeddingBagConfig {
        hash: Some(hash),
        ..Default::default()
    };
    let plain = layer(16, Default::default())?;
    let large = layer(
        32,
        with(Hash::from(Mix {
            seed: u64::MAX,
            block: 16,
            signed: false,
        })),
    )?;
    let original = layer(9, with(Hash::original()))?;
    let robe = layer(9, with(Hash::robe(&[5, 4, 3, 2], 3)?))?;
    let layers = [("", &plain), ("b", &large), ("c", &original), ("d", &robe)];
    checkpoint::save(&path, [], layers)?;
    let file = metadata(&path);
    assert_eq!(file.len(), 1);
    assert_eq!(
        file["hashed_embedding_bag"],
        concat!(
            r#"{"version":1,"layers":{"#,
            r#""":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"mix","seed":0,"block":4,"signed":true,"balanced":true}},"#,
            r#""b":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"mix","seed":18446744073709551615,"block":16,"signed":false}},"#,
            r#""c":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"affine","a":9824516537,"b":57857966300227,"c":104729,"modulus":117130198221199,"block":1}},"#,
            r#""d":{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"#,
            r#""hash":{"kind":"affine","a":2,"b":3,"c":4,"modulus":5,"block":3,"overflow":"refuse"}}}}"#
        )
    );
    let opened = Checkpoint::open(&path)?;
    for (name, layer) in layers {
        let again = opened.hashed_embedding_bag(name, DType::BF16, &device)?;
        assert_eq!(again.hash(), layer.hash());
    }
    let bytes = std::fs::read(&path)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    assert_eq!(tensors.tensor("hashed_weight")?.dtype(), Dtype::BF16);
    assert_eq!(tensors.tensor("b.hashed_weight")?.shape(), [32]);

    // The same model gives the same bytes.
    checkpoint::save(folder.file("again"), [], layers)?;
    assert_eq!(std::fs::read(folder.file("again"))?, bytes);
    Ok(())
}

#[test]
fn saving_refuses_two_tensors_of_one_name() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let layer = HashedEmbeddingBag::new(weight.clone(), 10, 4, Default::default())?;
    let same = [("a.hashed_weight".to_string(), weight.clone())];
    checkpoint::save(&path, same, [("a", &layer)])?;
    let other = [("a.hashed_weight".to_string(), weight.copy()?)];
    let refused = checkpoint::save(&path, other, [("a", &layer)]);
    assert!(message(refused).contains("two different tensors are named a.hashed_weight"));
    let refused = checkpoint::save(&path, [], [("a", &layer), ("a", &layer)]);
    assert!(message(refused).contains("two layers are named a"));
    Checkpoint::open(&path)?;
    Ok(())
}

/// The one name that the format keeps for itself.
#[test]
fn saving_refuses_a_tensor_named_metadata() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let layer = HashedEmbeddingBag::new(weight.clone(), 10, 4, Default::default())?;
    let refused = checkpoint::save(&path, [("__metadata__".into(), weight)], [("a", &layer)]);
    assert!(message(refused).contains("no tensor can be named __metadata__"));
    assert!(!path.exists());
    Ok(())
}

/// A file of many tables opens in a time that grows no faster than the file.
#[test]
fn many_tables() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let weight = Tensor::zeros(16, DType::F32, &device)?;
    let tables = (0..100_000).map(|t| (t.to_string(), 1));
    let collection = HashedEmbeddingBagCollection::new(weight, tables, 4, Default::default())?;
    checkpoint::save(&path, [], [("a", &collection)])?;
    let opened = Checkpoint::open(&path)?;
    let (_, spec) = opened.collections().next().unwrap();
    assert_eq!(spec.tables.len(), 100_000);
    Ok(())
}

/// Saving replaces the file, leaves no other behind, and an open checkpoint goes on reading the old one.
#[test]
fn saving_replaces_the_file_whole() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let save = |value: f64| {
        let weight = Tensor::full(value, 1 << 16, &device)?;
        let layer = HashedEmbeddingBag::new(weight, 1 << 16, 4, Default::default())?;
        checkpoint::save(&path, [], [("a", &layer)])
    };
    save(1.0)?;
    let old = Checkpoint::open(&path)?;
    save(2.0)?;
    let new = Checkpoint::open(&path)?;
    let first = |checkpoint: &Checkpoint| -> Result<f64> {
        checkpoint
            .tensor("a.hashed_weight", &device)?
            .get(0)?
            .to_scalar()
    };
    assert_eq!((first(&old)?, first(&new)?), (1.0, 2.0));
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 1);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let other = folder.file("other");
        std::fs::write(&other, "")?;
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&other));
    }

    let refused = checkpoint::save(
        folder.file("no/such/folder"),
        [],
        [] as [(&str, &HashedEmbeddingBag); 0],
    );
    assert!(message(refused).contains("No such file"));
    Ok(())
}

/// A link stays and the file behind it is replaced, where the link leads to one, and where it does not yet.
#[cfg(unix)]
#[test]
fn saving_follows_symbolic_links() -> Result<()> {
    use std::os::unix::fs::symlink;
    let (folder, device) = (Folder::new(), Device::Cpu);
    std::fs::create_dir(folder.file("models"))?;
    let save = |path: &Path, value: f32| {
        let layer =
            HashedEmbeddingBag::new(Tensor::full(value, 16, &device)?, 10, 4, Default::default())?;
        checkpoint::save(path, [], [("a", &layer)])
    };
    let first = |path: &Path| -> Result<f32> {
        let weight = Checkpoint::open(path)?.tensor("a.hashed_weight", &device)?;
        weight.get(0)?.to_scalar()
    };
    // Relative links, of which one leads to the other.
    let (link, next, real) = (
        folder.file("current"),
        folder.file("models/latest"),
        folder.file("models/2"),
    );
    symlink("models/latest", &link)?;
    symlink("2", &next)?;
    for value in [1.0, 2.0] {
        save(&link, value)?;
        assert!(link.is_symlink() && next.is_symlink() && !real.is_symlink());
        assert_eq!((first(&real)?, first(&link)?), (value, value));
    }
    assert_eq!(std::fs::read_dir(folder.file("models"))?.count(), 2);

    let (a, b) = (folder.file("a"), folder.file("b"));
    symlink("a", &b)?;
    symlink("b", &a)?;
    assert!(message(save(&a, 1.0)).contains("too many levels of symbolic links"));
    Ok(())
}

#[cfg(unix)]
#[test]
fn saving_keeps_the_mode_of_the_file_it_replaces() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::F32, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let save = |path: &Path| checkpoint::save(path, [], [("a", &layer)]);
    save(&path)?;
    for mode in [0o600, 0o640, 0o664] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode))?;
        save(&path)?;
        assert_eq!(path.metadata()?.permissions().mode() & 0o7777, mode);
    }
    Ok(())
}

/// What is not a regular file is not replaced: a rename would put a file in its place.
#[cfg(unix)]
#[test]
fn saving_refuses_what_is_not_a_regular_file() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::F32, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let socket = folder.file("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let directory = folder.file("folder");
    std::fs::create_dir(&directory)?;
    for path in [&socket, &directory] {
        let got = message(checkpoint::save(path, [], [("a", &layer)]));
        assert!(got.contains("not a regular file"), "{got}");
        assert!(got.contains(path.to_str().unwrap()), "{got}");
        let checked = message(checkpoint::check_writable(path));
        assert!(checked.contains("not a regular file"), "{checked}");
    }
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 2);
    Ok(())
}

/// What can be saved is known before, and finding out leaves nothing behind.
#[test]
fn checking_a_path_changes_nothing() -> Result<()> {
    let folder = Folder::new();
    let (new, old) = (folder.file("new"), folder.file("old"));
    std::fs::write(&old, "kept")?;
    checkpoint::check_writable(&new)?;
    checkpoint::check_writable(&old)?;
    assert_eq!(std::fs::read_to_string(&old)?, "kept");
    assert_eq!(std::fs::read_dir(folder.0.path())?.count(), 1);

    let none = folder.file("no/such/folder");
    let said = message(checkpoint::check_writable(&none));
    assert!(said.contains("No such file"), "{said}");
    #[cfg(unix)]
    {
        // A link leads there; a save would follow it.
        let link = folder.file("link");
        std::os::unix::fs::symlink(&none, &link)?;
        let said = message(checkpoint::check_writable(&link));
        assert!(said.contains("No such file"), "{said}");
    }
    Ok(())
}

/// A named pipe that nobody writes to would keep whoever opens it waiting for ever.
#[cfg(unix)]
#[test]
fn opening_what_is_not_a_regular_file_is_refused_at_once() -> Result<()> {
    let folder = Folder::new();
    let pipe = folder.file("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status()?;
    assert!(made.success());
    for path in [&pipe, folder.0.path()] {
        for said in [
            message(Checkpoint::open(path)),
            message(StateDict::open(path)),
        ] {
            assert!(said.contains("not a regular file"), "{said}");
        }
    }
    Ok(())
}

/// The dtype and the shape of every tensor, also of those that candle cannot read.
#[test]
fn tensors_are_described_without_being_read() -> Result<()> {
    let (folder, device) = (Folder::new(), Device::Cpu);
    let path = folder.file("model.safetensors");
    let layer = HashedEmbeddingBag::new(
        Tensor::zeros(16, DType::BF16, &device)?,
        10,
        4,
        Default::default(),
    )?;
    let ids = Tensor::zeros((2, 3), DType::I64, &device)?;
    checkpoint::save(&path, [("ids".to_string(), ids)], [("a", &layer)])?;
    let opened = Checkpoint::open(&path)?;
    let listed: Vec<_> = opened
        .tensor_names()
        .map(|name| opened.tensor_info(&name).map(|info| (name, info)))
        .collect::<Result<_>>()?;
    let [(weight, weight_info), (ids, ids_info)] = &listed[..] else {
        panic!("{listed:?}");
    };
    assert_eq!((weight.as_str(), ids.as_str()), ("a.hashed_weight", "ids"));
    assert_eq!(
        (weight_info.dtype.as_str(), &weight_info.shape[..]),
        ("bf16", &[16][..])
    );
    assert_eq!(weight_info.candle_dtype, Some(DType::BF16));
    assert_eq!(
        (ids_info.dtype.as_str(), &ids_info.shape[..]),
        ("i64", &[2, 3][..])
    );
    assert_eq!(
        message(opened.tensor_info("b")),
        "checkpoint: cannot find tensor b"
    );
    Ok(())
}

/// Writes a file with this description and one 1-D tensor.
fn file_with(path: &Path, description: &str, tensor: &str, dtype: DType, shape: &[usize]) {
    let tensor = (tensor, Tensor::zeros(shape, dtype, &Device::Cpu).unwrap());
    let metadata = HashMap::from([("hashed_embedding_bag".to_string(), description.to_string())]);
    safetensors::serialize_to_file([tensor], Some(metadata), path).unwrap();
}

#[test]
fn opening_refuses_by_layer_and_field() {
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    let hash = r#"{"kind":"mix","seed":0,"block":4,"signed":true}"#;
    let layer = format!(
        r#"{{"num_embeddings":10,"embedding_dim":4,"mode":"sum","padding_idx":null,"include_last_offset":false,"hash":{hash}}}"#
    );
    let good = format!(r#"{{"version":1,"layers":{{"a":{layer}}}}}"#);
    let open = |description: &str, tensor: &str, dtype, shape: &[usize]| {
        file_with(&path, description, tensor, dtype, shape);
        Checkpoint::open(&path)
    };
    assert!(open(&good, "a.hashed_weight", DType::F32, &[16]).is_ok());

    for (from, to, said) in [
        (
            r#""version":1"#,
            r#""version":2"#,
            "version must be 1, got 2",
        ),
        (
            r#""version":1"#,
            r#""version":"1""#,
            r#"version must be 1, got "1""#,
        ),
        (r#""version":1,"#, "", "version is missing"),
        (
            r#""layers""#,
            r#""layer""#,
            "layer: unknown field `layer`, expected one of",
        ),
        ("{", "", "hashed_embedding_bag is no JSON"),
        (
            r#""mix""#,
            r#""md5""#,
            "layers.a.hash.kind: unknown variant `md5`, expected `mix` or `affine`",
        ),
        (
            r#""kind":"mix","#,
            "",
            "layers.a.hash: missing field `kind`",
        ),
        (r#""seed":0,"#, "", "layers.a.hash: missing field `seed`"),
        (
            r#""seed":0"#,
            r#""seed":-1"#,
            "layers.a.hash: invalid value: integer `-1`",
        ),
        (
            r#""block":4"#,
            r#""block":0"#,
            "layers.a.hash: block must lie in 1..=16777216, got 0",
        ),
        (
            r#""block":4"#,
            r#""block":64"#,
            "layers.a.hash: a signed block must be at most 32, got 64",
        ),
        (
            r#""signed":true"#,
            r#""signed":true,"salt":1"#,
            "layers.a.hash: unknown field `salt`",
        ),
        (
            r#""num_embeddings":10,"#,
            "",
            "layers.a: missing field `num_embeddings`",
        ),
        (
            r#""num_embeddings":10"#,
            r#""num_embeddings":0"#,
            "layer a: hashed-embedding-bag: num_embeddings must lie in 1..2^63, got 0",
        ),
        (
            r#""num_embeddings":10"#,
            r#""num_embeddings":1e3"#,
            "layers.a.num_embeddings: invalid type: floating point `1000.0`",
        ),
        (
            r#""embedding_dim":4"#,
            r#""embedding_dim":0"#,
            "layer a: hashed-embedding-bag: embedding_dim must lie in 1..2^31, got 0",
        ),
        (
            r#""mode":"sum""#,
            r#""mode":"median""#,
            "layers.a.mode: unknown variant `median`",
        ),
        (
            r#""padding_idx":null"#,
            r#""padding_idx":"x""#,
            "layers.a.padding_idx: invalid type: string",
        ),
        (
            r#""layers":{"a""#,
            r#""layers":{"b""#,
            "layer b: no tensor b.hashed_weight",
        ),
    ] {
        let bad = good.replacen(from, to, 1);
        assert_ne!(bad, good);
        let got = message(open(&bad, "a.hashed_weight", DType::F32, &[16]));
        assert!(got.contains(&format!("checkpoint: {said}")), "{bad}\n{got}");
        assert!(got.contains("model.safetensors"), "{got}");
    }
    for (tensor, dtype, shape, said) in [
        ("b", DType::F32, &[16][..], "layer a: no tensor a.hashed_weight"),
        ("a.hashed_weight", DType::I64, &[16], "layer a: a.hashed_weight must have a float dtype, got I64"),
        ("a.hashed_weight", DType::F32, &[4, 4], "layer a: hashed-embedding-bag: hashed_weight must have rank 1, got [4, 4]"),
        ("a.hashed_weight", DType::F32, &[18], "layer a: hashed-embedding-bag: the length of hashed_weight must be a multiple of the block, got 18 and block 4"),
        ("a.hashed_weight", DType::F32, &[0], "layer a: hashed-embedding-bag: hashed_weight must hold at least one block of 4 values, got 0"),
    ] {
        let got = message(open(&good, tensor, dtype, shape));
        assert!(got.contains(&format!("checkpoint: {said}")), "{got}");
    }
}

#[test]
fn opening_refuses_other_files() {
    let folder = Folder::new();
    let path = folder.file("model.safetensors");
    assert!(message(Checkpoint::open(&path)).contains("No such file"));
    for bytes in [&b""[..], b"PK\x03\x04", &[0xff; 64], &[0; 64]] {
        std::fs::write(&path, bytes).unwrap();
        assert!(Checkpoint::open(&path).is_err(), "{bytes:?}");
    }
    let tensor = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
    safetensors::serialize_to_file([("a.hashed_weight", tensor)], None, &path).unwrap();
    let got = message(Checkpoint::open(&path));
    assert!(
        got.contains("checkpoint: no hashed_embedding_bag in __metadata__"),
        "{got}"
    );
    let whole = std::fs::read(&path).unwrap();
    for len in [whole.len() - 1, whole.len() / 2, 9] {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(Checkpoint::open(&path).is_err());
    }
}

/// What is saved is what is opened: every layer under every name, to the bit.
#[test]
fn checkpoints_round_trip() {
    let layers = vec(
        (".{0,6}", tables(), any::<bool>(), dtypes(), any::<u32>()),
        0..4,
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    check(layers, |layers, device| {
        let mut saved = std::collections::BTreeMap::new();
        for (name, table, include_last_offset, dtype, seed) in layers {
            let weight = Draws::new((*seed).into()).halves(table.len);
            let config = HashedEmbeddingBagConfig {
                include_last_offset: *include_last_offset,
                ..table.config()
            };
            let weight = floats(&weight, *dtype, device)?;
            let (rows, columns) = (table.num_embeddings, table.embedding_dim);
            let layer = HashedEmbeddingBag::new(weight, rows, columns, config)?;
            saved.insert(name.clone(), layer);
        }
        checkpoint::save(&path, [], saved.iter())?;
        let opened = Checkpoint::open(&path)?;
        assert!(opened.layers().map(|(name, _)| name).eq(saved.keys()));
        for (name, layer) in &saved {
            let dtype = layer.hashed_weight().dtype();
            let again = opened.hashed_embedding_bag(name, dtype, device)?;
            let all = |layer: &HashedEmbeddingBag| -> Result<_> {
                let sizes = (layer.num_embeddings(), layer.embedding_dim());
                Ok((sizes, layer.config(), to_vec(layer.hashed_weight())?))
            };
            assert_eq!(all(&again)?, all(layer)?);
        }
        Ok(())
    });
}
