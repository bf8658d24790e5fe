//! PyTorch state dicts: arbitrary files, and arbitrary pickles in a valid archive. The first byte of the input selects which.
#![no_main]

use candle_core::Device;
use candle_hashed_embedding_bag::import::StateDict;
use candle_hashed_embedding_bag_fuzz::folder;
use libfuzzer_sys::fuzz_target;
use std::io::{Cursor, Write};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// An archive like those of `torch.save`, with `pickle` as the description of its tensors and some bytes for each storage.
fn archive(pickle: &[u8]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let mut add = |name: &str, content: &[u8]| {
        zip.start_file(name, options)
            .expect("a file in the archive");
        zip.write_all(content).expect("its content");
    };
    add("archive/data.pkl", pickle);
    for storage in 0..5 {
        add(&format!("archive/data/{storage}"), &[storage; 408]);
    }
    zip.finish().expect("an archive").into_inner()
}

fuzz_target!(|input: &[u8]| {
    let path = folder().join("state_dict");
    let file = match input.split_first() {
        Some((b'p', pickle)) => archive(pickle),
        Some((_, file)) => file.to_vec(),
        None => return,
    };
    std::fs::write(&path, file).expect("a file for the input");
    let device = &Device::Cpu;
    for state_dict in [
        StateDict::open(&path),
        StateDict::open_nested(&path, "state_dict"),
        StateDict::open_nested(&path, "models.0"),
    ] {
        let mut state_dict = match state_dict {
            Ok(state_dict) => state_dict,
            Err(e) => {
                assert!(!e.to_string().is_empty());
                continue;
            }
        };
        let config = Default::default();
        let _ = state_dict.hashed_embedding_bag("", 10, 4, config, device);
        let _ = state_dict.robe("", 10, 4, 1, config, device);
        let _ = state_dict.robe_dlrm("", [("a", 10), ("b", 7)], 4, 2, config, device);
        let keys: Vec<_> = state_dict.keys().map(str::to_string).collect();
        for key in keys {
            let info = state_dict.tensor_info(&key);
            // A tensor is what its description says.
            if let Ok(tensor) = state_dict.take(&key, device) {
                let info = info.expect("the tensor is described");
                assert_eq!(tensor.dims(), info.shape);
                assert_eq!(Some(tensor.dtype()), info.candle_dtype);
            }
        }
    }
});
