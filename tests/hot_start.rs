//! Opening a large checkpoint or state dict costs next to nothing: the file is mapped, and only what is asked for is read.
//!
//! A file of their own for these tests, one at a time, since they measure the memory of the process. Each does its work on a
//! small file first, because the pages of the program that run for the first time count as memory too. To see the figures:
//! `cargo test --release --test hot_start -- --nocapture`
#![cfg(target_os = "linux")]

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_hashed_embedding_bag::{checkpoint, Bits, Checkpoint, HashedEmbeddingBag, StateDict};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;

const MB: usize = 1_000_000;

/// Held by the test that measures.
static MEASURING: Mutex<()> = Mutex::new(());

/// The highest resident memory of this process since the last call of [`forget_peak`], in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kib: usize = value.trim().trim_end_matches(" kB").parse().unwrap();
    kib * 1024
}

fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// What `work` returns, how long it took, and by how much it raised the peak of the memory.
fn measured<T>(name: &str, work: impl FnOnce() -> T) -> (T, Duration, usize) {
    forget_peak();
    let (before, start) = (peak(), Instant::now());
    let value = work();
    let (time, more) = (start.elapsed(), peak() - before);
    println!("{name}: {time:.1?}, {:.2} MB more", more as f64 / MB as f64);
    (value, time, more)
}

/// Writes a checkpoint whose layers are f32 zeros, `(name, bytes)`; the file system stores no zeros.
fn write(path: &Path, layers: &[(&str, usize)]) {
    let (mut header, mut specs, mut end) = (json!({}), json!({}), 0);
    for &(name, bytes) in layers {
        specs[name] = json!({
            "num_embeddings": 1u64 << 40, "embedding_dim": 16, "mode": "sum", "padding_idx": null,
            "include_last_offset": false, "hash": {"kind": "mix", "seed": 0, "block": 16, "signed": true},
        });
        header[format!("{name}.hashed_weight")] =
            json!({"dtype": "F32", "shape": [bytes / 4], "data_offsets": [end, end + bytes]});
        end += bytes;
    }
    let description = json!({"version": 1, "layers": specs}).to_string();
    header["__metadata__"] = json!({ "hashed_embedding_bag": description });
    // Padded as every writer does, so that the values are aligned.
    let header = header.to_string();
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
}

#[test]
fn opening_a_gigabyte_reads_none_of_it() -> Result<()> {
    let _alone = MEASURING.lock();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    write(
        &path,
        &[("large", 896 * MB), ("medium", 96 * MB), ("small", 8 * MB)],
    );
    assert!(path.metadata()?.len() > 1000 * MB as u64);
    let little = folder.path().join("little.safetensors");
    write(&little, &[("little", 64)]);
    Checkpoint::open(&little)?;

    let (checkpoint, time, more) = measured("open 1 GB", || Checkpoint::open(&path));
    let checkpoint = checkpoint?;
    assert!(more < MB, "opening took {more} bytes");
    assert!(time < Duration::from_secs(1), "opening took {time:?}");

    // A layer costs its own size, once in the file's pages and once in the tensor, which may get memory that was used before.
    let layer = |name| checkpoint.hashed_embedding_bag(name, DType::F32, &Device::Cpu);
    let (small, _, more) = measured("a layer of 8 MB", || layer("small"));
    assert_eq!(small?.hashed_weight().elem_count(), 2 * MB);
    assert!((4 * MB..20 * MB).contains(&more), "8 MB took {more} bytes");
    let (medium, _, more) = measured("a layer of 96 MB", || layer("medium"));
    assert_eq!(medium?.hashed_weight().elem_count(), 24 * MB);
    assert!(
        (96 * MB..200 * MB).contains(&more),
        "96 MB took {more} bytes"
    );
    Ok(())
}

/// A layer in 4 bits is opened as its bytes, an eighth of what it would take in f32.
#[test]
fn a_layer_in_low_bits_is_not_expanded() -> Result<()> {
    let _alone = MEASURING.lock();
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    let save = |len: usize| -> Result<()> {
        let weight = Tensor::zeros(len, DType::F32, &Device::Cpu)?;
        let layer = HashedEmbeddingBag::new(weight, 1 << 40, 16, Default::default())?;
        checkpoint::save(&path, [], [("a", &layer.to_bits(Bits::Four)?.0)])
    };
    let look_up = || -> Result<usize> {
        let checkpoint = Checkpoint::open(&path)?;
        let layer = checkpoint.hashed_embedding_bag("a", DType::F32, &Device::Cpu)?;
        layer.forward(&Tensor::new(&[[7i64, 1 << 39]], &Device::Cpu)?)?;
        Ok(layer.hashed_weight().elem_count())
    };
    save(64)?;
    look_up()?;
    save(16 * MB)?;
    let (bytes, _, more) = measured("a layer of 16 M values in 4 bits", look_up);
    assert_eq!(bytes?, 8 * MB);
    // Once in the file's pages and once in the tensor.
    assert!((4 * MB..20 * MB).contains(&more), "8 MB took {more} bytes");
    Ok(())
}

/// The pickle of a state dict whose entries are rows of one f32 storage.
fn pickle(rows: usize, columns: usize) -> Vec<u8> {
    let int = |n: usize| [b"J", &(n as i32).to_le_bytes()[..]].concat();
    let text = |text: &str| {
        [
            b"X",
            &(text.len() as u32).to_le_bytes()[..],
            text.as_bytes(),
        ]
        .concat()
    };
    let mut pickle = b"\x80\x02}(".to_vec();
    for row in 0..rows {
        pickle.extend(text(&format!("{row:03}")));
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        pickle.extend([text("storage"), b"ctorch\nFloatStorage\n".to_vec()].concat());
        pickle.extend([text("0"), text("cpu"), int(rows * columns), b"tQ".to_vec()].concat());
        pickle.extend([int(row * columns), int(columns), b"\x85".to_vec()].concat());
        pickle.extend([int(1), b"\x85\x89}tR".to_vec()].concat());
    }
    pickle.extend(b"u.");
    pickle
}

/// A state dict of these rows, all zeros.
fn write_state_dict(rows: usize, columns: usize) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let values = vec![0; 4 * rows * columns];
    let mut zip = zip::ZipWriter::new(file.as_file());
    for (name, bytes) in [
        ("m/data.pkl", &pickle(rows, columns)),
        ("m/data/0", &values),
    ] {
        let options = zip::write::SimpleFileOptions::default();
        zip.start_file(name, options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
    file
}

#[test]
fn listing_a_state_dict_reads_none_of_its_values() -> Result<()> {
    let _alone = MEASURING.lock();
    const ROWS: usize = 100;
    let columns = 64 * MB / 4 / ROWS;
    let list = |path: &Path| {
        let state = StateDict::open(path)?;
        let infos = state.keys().map(|key| state.tensor_info(key));
        infos.collect::<Result<Vec<_>>>()
    };
    list(write_state_dict(1, 1).path())?;

    let file = write_state_dict(ROWS, columns);
    let (listed, _, more) = measured("list a .pth of 64 MB", || list(file.path()));
    let listed = listed?;
    assert_eq!(listed.len(), ROWS);
    assert!(listed.iter().all(|info| info.shape == [columns]));
    assert!(more < MB, "listing took {more} bytes");
    Ok(())
}
