//! Compiles kernels/ops.cu to PTX when the feature `cuda` is on; src/ops/cuda.rs loads it.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    compile_kernels();
}

#[cfg(feature = "cuda")]
fn compile_kernels() {
    println!("cargo:rerun-if-changed=kernels");
    let out_dir =
        std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // The builder reuses a file that is newer than its source, even if CUDA_COMPUTE_CAP has changed.
    let _ = std::fs::remove_file(out_dir.join("ops.ptx"));
    bindgen_cuda::Builder::default()
        .kernel_paths(vec!["kernels/ops.cu"])
        .arg("--std=c++17")
        .build_ptx()
        .expect("nvcc compiles the kernels")
        .write(out_dir.join("kernels.rs"))
        .expect("OUT_DIR can be written");
}
