//! Compiles kernels/*.cu to PTX in OUT_DIR when the feature `cuda` is on; without it nothing here needs a CUDA tool.

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
    bindgen_cuda::Builder::default()
        .kernel_paths_glob("kernels/*.cu")
        .include_paths_glob("kernels/*.cuh")
        .arg("--std=c++17")
        .build_ptx()
        .expect("nvcc compiles the kernels");
}
