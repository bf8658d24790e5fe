//! Shared by the targets: a folder in memory, and the properties of every checkpoint that opens.

use candle_core::{DType, Device, Module, Tensor};
use candle_hashed_embedding_bag::checkpoint::{self, Checkpoint, Layer};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A folder for this process, in memory if the system offers that.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() {
            memory.to_path_buf()
        } else {
            std::env::temp_dir()
        };
        let folder = parent.join(format!("fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for the inputs");
        folder
    })
}

/// Opens `bytes` as a checkpoint. If it opens, its layers must load, look up their first and last rows, and survive a round trip.
pub fn open_checkpoint(bytes: &[u8]) {
    let path = folder().join("checkpoint");
    std::fs::write(&path, bytes).expect("a file for the input");
    let checkpoint = match Checkpoint::open(&path) {
        Ok(checkpoint) => checkpoint,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes).expect("it was opened");
    let vb = checkpoint.var_builder(DType::F32, &Device::Cpu);
    for (name, info) in metadata.tensors() {
        // A dtype that candle does not have is an error; nothing may panic.
        let _ = checkpoint.tensor(&name, &Device::Cpu);
        let _ = vb.get(info.shape.as_slice(), &name);
    }
    let (mut layers, mut collections) = (vec![], vec![]);
    for (name, spec) in checkpoint.layers() {
        let layer = checkpoint
            .hashed_embedding_bag(name, DType::F32, &Device::Cpu)
            .expect("what opens can be loaded");
        // Only outputs of moderate size, which the caller is responsible for.
        if spec.embedding_dim <= 4096 {
            let rows = [0, spec.num_embeddings as i64 - 1];
            let indices = Tensor::new(&[rows], &Device::Cpu).expect("a tensor");
            let out = layer.forward(&indices).expect("rows of the table");
            assert_eq!(out.dims(), [1, spec.embedding_dim]);
        }
        layers.push((name, layer));
    }
    for (name, spec) in checkpoint.collections() {
        let collection = checkpoint
            .hashed_embedding_bag_collection(name, DType::F32, &Device::Cpu)
            .expect("what opens can be loaded");
        if spec.embedding_dim <= 4096 {
            let last = |(_, rows): (&str, usize)| rows as i64 - 1;
            let rows: Vec<_> = collection.tables().map(last).collect();
            let indices = Tensor::new(vec![rows], &Device::Cpu).expect("a tensor");
            let out = collection.forward(&indices).expect("rows of the tables");
            assert_eq!(out.dims(), [1, spec.tables.len(), spec.embedding_dim]);
        }
        collections.push((name, collection));
    }
    let again = folder().join("again");
    let layers = layers
        .iter()
        .map(|(name, layer)| (*name, Layer::from(layer)));
    let collections = collections
        .iter()
        .map(|(name, layer)| (*name, Layer::from(layer)));
    checkpoint::save(&again, [], layers.chain(collections)).expect("what opens can be saved");
    let again = Checkpoint::open(&again).expect("what was saved opens");
    assert!(again.layers().eq(checkpoint.layers()));
    assert!(again.collections().eq(checkpoint.collections()));
}
