//! Opening a large checkpoint costs next to nothing: it maps the file and reads only what is asked for.
//!
//! Alone in its file, since it measures the memory of the process. To see the figures:
//! `cargo test --release --test hot_start -- --nocapture`
#![cfg(target_os = "linux")]

use candle_core::{DType, Device, Result};
use candle_hashed_embedding_bag::Checkpoint;
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

const MB: usize = 1_000_000;

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
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    write(
        &path,
        &[("large", 896 * MB), ("medium", 96 * MB), ("small", 8 * MB)],
    );
    assert!(path.metadata()?.len() > 1000 * MB as u64);

    let (checkpoint, time, more) = measured("open 1 GB", || Checkpoint::open(&path));
    let checkpoint = checkpoint?;
    assert!(more < MB, "opening took {more} bytes");
    assert!(time < Duration::from_secs(1), "opening took {time:?}");

    // A layer costs its own size, once in the file's pages and once in the tensor.
    let layer = |name| checkpoint.hashed_embedding_bag(name, DType::F32, &Device::Cpu);
    let (small, _, more) = measured("a layer of 8 MB", || layer("small"));
    assert_eq!(small?.hashed_weight().elem_count(), 2 * MB);
    assert!((8 * MB..20 * MB).contains(&more), "8 MB took {more} bytes");
    let (medium, _, more) = measured("a layer of 96 MB", || layer("medium"));
    assert_eq!(medium?.hashed_weight().elem_count(), 24 * MB);
    assert!(
        (96 * MB..200 * MB).contains(&more),
        "96 MB took {more} bytes"
    );
    Ok(())
}
