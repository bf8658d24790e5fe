//! Compiles the kernels to PTX in OUT_DIR when the feature `cuda` is on; without it nothing here needs a CUDA tool.
//!
//! Each pass, hash and dtype of `hashed_weight` is a module of its own, made of a line of kernels/instances.cuh;
//! src/op/cuda.rs includes them by the same names. kernels/indices.cu and kernels/optimizer.cu are modules as they are.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    compile_kernels();
}

#[cfg(feature = "cuda")]
fn compile_kernels() {
    use std::{env, fs, path::PathBuf};

    println!("cargo:rerun-if-changed=kernels");
    // bindgen_cuda keeps a PTX that is newer than its .cu, even when a header or CUDA_COMPUTE_CAP has changed since.
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for entry in fs::read_dir(&out_dir)
        .expect("OUT_DIR is readable")
        .flatten()
    {
        if entry.path().extension().is_some_and(|e| e == "ptx") {
            fs::remove_file(entry.path()).expect("a stale PTX file can be removed");
        }
    }
    let mut sources: Vec<PathBuf> = ["indices", "optimizer"]
        .map(|name| format!("kernels/{name}.cu").into())
        .into();
    for pass in ["forward", "backward", "deterministic"] {
        for hash in ["affine", "mix", "balanced"] {
            for (dtype, name) in [
                ("float", "f32"),
                ("double", "f64"),
                ("__half", "f16"),
                ("__nv_bfloat16", "bf16"),
            ] {
                let instances = format!("{pass}_{hash}").to_uppercase();
                let source = out_dir.join(format!("{pass}_{hash}_{name}.cu"));
                let text = format!("#include \"instances.cuh\"\n{instances}({dtype}, {name})\n");
                fs::write(&source, text).expect("OUT_DIR can be written");
                sources.push(source);
            }
        }
    }
    bindgen_cuda::Builder::default()
        .kernel_paths(sources)
        .include_paths_glob("kernels/*.cuh")
        .arg("-Ikernels")
        .arg("--std=c++17")
        .build_ptx()
        .expect("nvcc compiles the kernels");
}
