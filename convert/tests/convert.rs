//! The program `convert` as a process, on state dicts that PyTorch wrote.

use std::collections::HashMap;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::{
    checkpoint, Checkpoint, HashedEmbeddingBag, HashedEmbeddingBagCollection,
    HashedEmbeddingBagConfig, StateDict,
};
use tempfile::TempDir;

/// The folder that `tests/golden` is in.
const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// The program with these arguments; `{}` stands for `folder`.
fn command(folder: &TempDir, arguments: &str) -> Command {
    let arguments = arguments.replace("{}", &folder.path().display().to_string());
    let mut command = Command::new(env!("CARGO_BIN_EXE_convert"));
    command
        .args(arguments.split_whitespace())
        .current_dir(REPOSITORY);
    command
}

/// What it prints.
fn convert(folder: &TempDir, arguments: &str) -> Result<String> {
    let Output {
        status,
        stdout,
        stderr,
    } = command(folder, arguments).output()?;
    ensure!(
        status.success(),
        "{arguments}: {}",
        String::from_utf8(stderr)?
    );
    Ok(String::from_utf8(stdout)?)
}

/// What it says when it fails, which it must.
fn refused(folder: &TempDir, arguments: &str) -> Result<String> {
    let output = command(folder, arguments).output()?;
    ensure!(!output.status.success(), "{arguments}: not refused");
    Ok(String::from_utf8(output.stderr)?)
}

#[track_caller]
fn assert_says(said: &str, lines: &[&str]) {
    let said: Vec<String> = said
        .lines()
        .map(|line| line.replace(['│', '┆'], " "))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for line in lines {
        assert!(
            said.iter().any(|said| said.contains(line)),
            "{said:#?}\nlacks {line}"
        );
    }
}

#[test]
fn every_kind() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (arguments, lines) in [
        (
            "tests/golden/original.pth {}/out --bag :1000x16,mode=mean,padding_idx=-1,include_last_offset",
            &["1000 16 mean -1 HashedEmbeddingBag's f32 1600 1/10.0 6400", "bytes, checked"][..],
        ),
        (
            "tests/golden/original_embedding.pth {}/out --key state_dict --embedding words:3000x10",
            &["words.hashed_embedding_bag.hashed_weight 3000 10 sum - HashedEmbeddingBag's f32 900", "head.weight f32 [2, 10]"],
        ),
        (
            "tests/golden/robe.pth {}/out --robe :1000x20,uma_chunk_size=8,val_offset=1234",
            &["1000 20 sum - ROBE's, block 8 f32 500 1/40.0 2000"],
        ),
        (
            "tests/golden/robe_cpu.pth {}/out --robe :1000x10,uma_chunk_size=4,val_offset=77",
            &["1000 10 sum - ROBE's, block 4 f32 300"],
        ),
        (
            "tests/golden/robe_dlrm.pth {}/out --key state_dict --robe-dlrm :100+7+1000x16,uma_chunk_size=8",
            &["100 + 7 + 1000 16 sum - ROBE's, block 8 f32 640 1/27.7 2560", "bot_l.0.weight f32 [16, 13]"],
        ),
        (
            "tests/golden/original_embedding.pth {}/out --key state_dict --fit head,compression=1/2",
            &["\"head\" is fitted with a relative error of", "head.hashed_weight 2 10 sum - balanced, seed 0, block 4, signed f32 12"],
        ),
        (
            "tests/golden/robe_dlrm.safetensors {}/out --robe-dlrm :100+7+1000x16,uma_chunk_size=8 --layers-only",
            &["100 + 7 + 1000 16"],
        ),
    ] {
        let said = convert(&folder, arguments)?;
        assert_says(&said, lines);
        assert!(said.ends_with(&convert(&folder, "--inspect {}/out")?));
    }
    assert!(!convert(&folder, "--inspect {}/out")?.contains("bot_l"));
    Ok(())
}

#[test]
fn the_layer_is_the_one_imported() -> Result<()> {
    let folder = tempfile::tempdir()?;
    convert(
        &folder,
        "tests/golden/robe.pth {}/out --robe :1000x20,uma_chunk_size=8,val_offset=1234",
    )?;
    let opened = Checkpoint::open(folder.path().join("out"))?;
    let opened = opened.hashed_embedding_bag("", DType::F32, &Device::Cpu)?;
    let mut state = StateDict::open(Path::new(REPOSITORY).join("tests/golden/robe.pth"))?;
    let config = HashedEmbeddingBagConfig {
        first_row: 1234,
        ..Default::default()
    };
    let imported = state.robe("", 1000, 20, 8, config, &Device::Cpu)?;
    let indices = Tensor::new(&[[0u32, 1, 999], [7, 7, 500]], &Device::Cpu)?;
    assert_eq!(
        opened.forward(&indices)?.to_vec2::<f32>()?,
        imported.forward(&indices)?.to_vec2::<f32>()?
    );
    Ok(())
}

/// State dicts as LMA and SCMA write them, the table of SCMA as .npz; then the layers rounded, with their row tensors.
#[test]
fn allocations_by_meaning() -> Result<()> {
    let (folder, device) = (tempfile::tempdir()?, &Device::Cpu);
    let golden = Path::new(REPOSITORY).join("tests/golden/semantic.safetensors");
    let golden = candle_core::safetensors::load(golden, device)?;
    let write = |name: &str, entries: &[(&str, &str)]| {
        let entries = entries
            .iter()
            .map(|(to, from)| (*to, golden[*from].clone()));
        candle_core::safetensors::save(
            &entries.collect::<HashMap<_, _>>(),
            folder.path().join(name),
        )
    };
    write(
        "lma.safetensors",
        &[
            ("hashed_weight", "b.hashed_weight"),
            ("random_numbers", "random_numbers"),
            ("signature", "b.signature"),
        ],
    )?;
    write(
        "scma.safetensors",
        &[
            ("hashed_weight", "scma.hashed_weight"),
            ("top.weight", "a.output"),
        ],
    )?;
    let table = [("big_min_hash_table", &golden["scma.table"])];
    Tensor::write_npz(&table, folder.path().join("table.npz"))?;
    let said = convert(
        &folder,
        "{}/lma.safetensors {}/lma --lma :2000x32,uma_chunk_size=8,key_bits=8,keys_to_use=4",
    )?;
    assert_says(
        &said,
        &["hashed_weight 2000 32 sum - LMA, 4 keys of 8 bits, block 8 f32 50000 1/1.3 216000"],
    );
    let said = convert(
        &folder,
        "{}/scma.safetensors {}/scma --scma :50+10x8,table={}/table.npz",
    )?;
    assert_says(
        &said,
        &[
            "hashed_weight 50 + 10 8 sum - slot table, block 1 f32 131 1/3.7 2444",
            "top.weight f32 [40, 16]",
        ],
    );
    let opened = Checkpoint::open(folder.path().join("lma"))?;
    let layer = opened.hashed_embedding_bag("", DType::F64, device)?;
    let output = layer.forward_with_offsets(&golden["b.indices"], &golden["b.offsets"])?;
    assert_eq!(
        output.to_dtype(DType::F32)?.to_vec2::<f32>()?,
        golden["b.output"].to_vec2::<f32>()?
    );

    for name in ["lma", "scma"] {
        convert(&folder, &format!("{{}}/{name} {{}}/{name}-8 --bits 8"))?;
        let opened = Checkpoint::open(folder.path().join(format!("{name}-8")))?;
        assert_eq!(opened.layers().count() + opened.collections().count(), 1);
    }
    let missing = refused(&folder, "{}/scma.safetensors {}/out --scma :50+10x8")?;
    assert!(missing.contains("--scma needs table=FILE.npz"), "{missing}");
    let wrong = refused(
        &folder,
        "{}/scma.safetensors {}/out --scma :50+11x8,table={}/table.npz",
    )?;
    let what = "big_min_hash_table must be i64 of shape [61, 8], got i64 of shape [60, 8]";
    assert!(wrong.contains(what), "{wrong}");
    Ok(())
}

#[test]
fn what_it_says_of_mistakes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (arguments, said) in [
        (
            "tests/golden/robe.pth {}/out",
            "which entries are hashed layers?",
        ),
        (
            "tests/golden/robe.pth {}/out --bag 1000x16",
            "no :ROWSxCOLUMNS",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :1000",
            "no x in ROWSxCOLUMNS",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :1e3x16",
            "rows must be a number in range, got \"1e3\"",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :5+5x16",
            "one table has one number of rows",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :5x16,mode=median",
            "mode must be sum, mean or max",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :5x16,val_offset=3",
            "unknown option \"val_offset\", only mode, padding_idx, include_last_offset",
        ),
        (
            "tests/golden/robe.pth {}/out --bag :1000x16",
            "random_numbers is no entry of this module",
        ),
        (
            "tests/golden/robe_dlrm.pth {}/out --bag :1000x16",
            "the state dict may be under state_dict",
        ),
        (
            "--inspect tests/golden/robe_dlrm.safetensors",
            "no hashed_embedding_bag in __metadata__",
        ),
        ("--inspect {}/out --layers-only", "cannot be used with"),
        ("{}/none.pth", "No such file"),
    ] {
        let got = refused(&folder, arguments)?;
        assert!(got.contains(said), "{got}\nlacks {said}");
    }
    assert!(
        !folder.path().join("out").exists(),
        "nothing is written on an error"
    );

    let nan = HashedEmbeddingBag::new(
        Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?,
        10,
        2,
        HashedEmbeddingBagConfig::default(),
    )?;
    checkpoint::save(folder.path().join("nan"), [], [("a", &nan)])?;
    let got = refused(&folder, "--inspect {}/nan")?;
    assert!(
        got.contains("a.hashed_weight: 1 of 2 values are not finite"),
        "{got}"
    );
    Ok(())
}

/// Before the state dict is read, and so before any layer is fitted.
#[test]
fn a_checkpoint_that_cannot_be_written_is_refused_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (checkpoint, said) in [
        ("{}/no/such/out", "No such file"),
        ("{}", "not a regular file"),
    ] {
        let arguments = format!("{{}}/none.pth {checkpoint} --bag :10x4");
        let got = refused(&folder, &arguments)?;
        assert!(got.contains("cannot write") && got.contains(said), "{got}");
    }
    Ok(())
}

#[test]
fn keys_with_dots_and_wrappers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let nested = "tests/golden/structures/nested.pth";
    let bag = "{}/out --bag user:10x4 --layers-only";
    let said = convert(
        &folder,
        &format!("{nested} --key state_dict.generator {bag}"),
    )?;
    assert_says(&said, &["user.hashed_weight 10 4 sum"]);
    let said = refused(&folder, &format!("{nested} {bag}"))?;
    assert_says(&said, &["may be under state_dict.generator or"]);

    let wrapped = "tests/golden/structures/wrapped.pth";
    let said = refused(&folder, &format!("{wrapped} {bag}"))?;
    assert_says(&said, &["begin the prefix with module._orig_mod."]);
    let said = convert(
        &folder,
        &format!("{wrapped} {{}}/out --bag module._orig_mod.user:10x4"),
    )?;
    assert_says(&said, &["module._orig_mod.user.hashed_weight 10 4 sum"]);

    let objects = "tests/golden/structures/objects.pth --key hyper_parameters";
    assert_says(&convert(&folder, objects)?, &["no tensors; --key"]);
    let help = convert(&folder, "--help")?;
    assert!(help.contains("state_dict.generator") && help.contains("_orig_mod."));
    Ok(())
}

/// A file of half a gigabyte, within less memory than that.
#[cfg(target_os = "linux")]
#[test]
fn listing_takes_no_memory_for_values() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("large.safetensors");
    let len = 512 << 20;
    let header =
        format!(r#"{{"mask":{{"dtype":"BOOL","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.as_bytes());
    std::fs::write(&path, &start)?;
    // A hole, which takes no room on the disk.
    let file = std::fs::File::options().write(true).open(&path)?;
    file.set_len(start.len() as u64 + len)?;
    let output = Command::new("sh")
        .args(["-c", "ulimit -d 262144 && exec \"$0\" \"$1\""])
        .arg(env!("CARGO_BIN_EXE_convert"))
        .arg(&path)
        .output()?;
    assert!(output.status.success(), "{output:?}");
    assert_says(
        &String::from_utf8(output.stdout)?,
        &["mask bool [536870912]"],
    );
    Ok(())
}

/// A damaged value is not noticed by a listing, only by who reads it.
#[test]
fn listing_reads_no_values() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let golden = Path::new(REPOSITORY).join("tests/golden/structures/lacking.pth");
    let mut bytes = std::fs::read(golden)?;
    let values = [0.25f32, 0.5, 0.75].map(f32::to_le_bytes).concat();
    let at = bytes.windows(values.len()).position(|part| part == values);
    bytes[at.context("the hashed values are not there")?] ^= 1;
    std::fs::write(folder.path().join("damaged.pth"), bytes)?;
    let said = convert(&folder, "{}/damaged.pth")?;
    assert_says(&said, &["mask bool", "user.hashed_weight f32 [40]"]);
    let said = refused(&folder, "{}/damaged.pth {}/out --bag user:10x4")?;
    assert_says(&said, &["import: user.hashed_weight: ", "Invalid checksum"]);
    Ok(())
}

#[test]
fn listing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let said = convert(&folder, "tests/golden/robe.pth")?;
    assert_says(
        &said,
        &[
            "hashed_weight f32 [500]",
            "random_numbers i64 [51]",
            "signature i64 [2]",
        ],
    );
    Ok(())
}

#[test]
fn what_candle_has_no_dtype_for_is_listed_and_left_out() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let said = convert(&folder, "tests/golden/structures/dtypes.pth")?;
    assert_says(
        &said,
        &[
            "mask bool [3]",
            "codes i8 [1, 2]",
            "sparse - -",
            "user.hashed_weight f32 [40]",
            "\"mask\": candle has no dtype for bool",
            "import: sparse: a tensor made by _rebuild_sparse_tensor, which is not read",
        ],
    );
    let arguments = "tests/golden/structures/dtypes.pth {}/out --bag user:10x4";
    // Tensors of other kinds cannot be left out by their dtype.
    let said = refused(&folder, arguments)?;
    assert_says(&said, &["import: meta: a tensor made by"]);
    convert(&folder, &format!("{arguments} --layers-only"))?;

    let arguments = "tests/golden/structures/lacking.pth {}/out --bag user:10x4";
    let said = convert(&folder, arguments)?;
    assert_says(
        &said,
        &[
            "\"mask\" is left out: candle has no dtype for bool",
            "\"codes\" is left out: candle has no dtype for i8",
            "user.hashed_weight 10 4 sum",
            "head.weight f32 [2, 4]",
        ],
    );
    let opened = Checkpoint::open(folder.path().join("out"))?;
    let names: Vec<_> = opened.tensor_names().collect();
    assert_eq!(names, ["head.bias", "head.weight", "user.hashed_weight"]);
    Ok(())
}

#[test]
fn a_closed_standard_output_is_no_error() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut process = command(&folder, "tests/golden/robe.pth")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(process.stdout.take());
    let output = process.wait_with_output()?;
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    Ok(())
}

/// From a state dict at once, and from the checkpoint that the same command without --bits writes.
#[test]
fn layers_are_rounded_to_fewer_bits() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let layers =
        "tests/golden/original_embedding.pth {}/f32 --key state_dict --embedding words:3000x10";
    convert(&folder, layers)?;
    for (bits, size, error) in [(8, 900, "0.00"), (4, 450 + 8, "0.")] {
        let of_checkpoint = convert(&folder, &format!("{{}}/f32 {{}}/a --bits {bits}"))?;
        let at_once = layers.replace("{}/f32", "{}/b");
        let at_once = convert(&folder, &format!("{at_once} --bits {bits}"))?;
        for said in [of_checkpoint, at_once] {
            assert_says(
                &said,
                &[
                    &format!("\"words.hashed_embedding_bag\" is rounded to {bits} bits with a relative error of {error}"),
                    &format!("{size} bytes instead of 3600"),
                    &format!("words.hashed_embedding_bag.hashed_weight 3000 10 sum - HashedEmbeddingBag's {bits} bits 900 1/33.3 {size}"),
                    "head.weight f32 [2, 10]",
                ],
            );
            assert!(!said.contains("hashed_weight_shift"), "{said}");
        }
        let bytes = |name| std::fs::read(folder.path().join(name));
        assert_eq!(bytes("a")?, bytes("b")?);
        let opened = Checkpoint::open(folder.path().join("a"))?;
        let layer = opened.hashed_embedding("words", DType::F32, &Device::Cpu)?;
        let rows = Tensor::new(&[7u32, 2999], &Device::Cpu)?;
        assert_eq!(layer.forward(&rows)?.dims(), [2, 10]);
    }
    for (arguments, said) in [
        (
            "{}/a {}/c --bits 8",
            "a layer is rounded once: this one has 4 bits already",
        ),
        ("{}/f32 {}/c --bits 5", "bits must be 8 or 4, got 5"),
        (
            "tests/golden/robe.pth {}/c --bits 8",
            "rounds the layers of a checkpoint",
        ),
    ] {
        let got = refused(&folder, arguments)?;
        assert!(got.contains(said), "{got}");
    }
    Ok(())
}

/// Rounding changes the layers and nothing else: the model's own metadata stays, and so do its features.
#[test]
fn a_rounded_checkpoint_keeps_what_is_the_models_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let collection = HashedEmbeddingBagCollection::new(
        Tensor::randn(0f32, 1.0, 1600, &Device::Cpu)?,
        [("user", 600), ("movie", 400)],
        16,
        HashedEmbeddingBagConfig::default(),
    )?;
    let features = [("user", "user"), ("last", "movie"), ("candidate", "movie")];
    let collection = collection.with_features(features)?;
    let metadata = [
        ("history_len", "20"),
        ("ids", "[\"a\", \"b\"]"),
        ("", "nothing"),
    ];
    let layers = [("sparse", &collection)];
    checkpoint::save_with_metadata(folder.path().join("f32"), [], layers, metadata)?;
    for bits in [8, 4] {
        let said = convert(&folder, &format!("{{}}/f32 {{}}/low --bits {bits}"))?;
        assert_says(
            &said,
            &[
                &format!("600 + 400 16 sum - balanced, seed 0, block 8, signed {bits} bits"),
                "sparse user user 600",
                "sparse last movie 400",
                "sparse candidate movie 400",
            ],
        );
        let opened = Checkpoint::open(folder.path().join("low"))?;
        let mut expected = metadata;
        expected.sort_unstable();
        assert!(opened.own_metadata().eq(expected));
        let (_, spec) = opened.collections().next().context("no collection")?;
        assert_eq!(spec.features.as_ref().map(Vec::len), Some(3));
    }
    Ok(())
}
