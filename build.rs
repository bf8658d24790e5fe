//! Compiles the CUDA kernels when the feature `cuda` is on; without it nothing here needs a CUDA tool.
//!
//! The code of the kernels is in kernels/. The table in src/op/cuda/instances.rs says which of them are compiled, and for how
//! many threads. From it this script writes, into OUT_DIR,
//!
//! * `constants.cuh`, the constants and struct layouts of src/op/cuda/abi.rs, which kernels/ includes;
//! * a `.cu` file for each module, with one line per kernel;
//! * from each of them a `.fatbin` file, with machine code for the target architecture and PTX for later ones;
//! * `modules.rs`, which src/op/cuda/modules.rs includes: the fatbins by name.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile_kernels();
}

#[cfg(feature = "cuda")]
#[path = "src/op/cuda/abi.rs"]
#[allow(dead_code)]
mod abi;
#[cfg(feature = "cuda")]
#[path = "src/op/cuda/instances.rs"]
#[allow(dead_code)]
mod instances;

#[cfg(feature = "cuda")]
mod cuda {
    use super::abi::{IndexType, StructLayout, LONG_BAG, MAX_RANK, STRUCTS, TOUCHED_CHUNK};
    use super::instances::{self, BagKernel, Dtype, Family, Kernel, Module, Pass, Pooling, Rule};
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::{env, fs, thread};

    pub fn compile_kernels() {
        for path in ["kernels", "src/op/cuda/abi.rs", "src/op/cuda/instances.rs"] {
            println!("cargo:rerun-if-changed={path}");
        }
        let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        remove_stale_ptx(&out_dir);
        write(&out_dir.join("constants.cuh"), &constants());
        let modules = modules();
        let sources: Vec<_> = modules
            .iter()
            .map(|(module, kernels)| {
                let source = out_dir.join(module.name()).with_extension("cu");
                write(&source, &module_source(*module, kernels));
                backdate(&source);
                source
            })
            .collect();
        // The builder copies the headers into the folder of the sources, where these find them.
        bindgen_cuda::Builder::default()
            .kernel_paths(sources.clone())
            .include_paths_glob("kernels/*.cuh")
            .arg("--std=c++17")
            .build_ptx()
            .expect("nvcc compiles the kernels");
        let ptx_files: Vec<_> = sources.iter().map(|s| s.with_extension("ptx")).collect();
        assemble(&ptx_files);
        write(&out_dir.join("modules.rs"), &module_list(&modules));
    }

    /// bindgen_cuda reuses a PTX file that is newer than its source, even if a header or CUDA_COMPUTE_CAP has changed.
    fn remove_stale_ptx(out_dir: &Path) {
        for entry in fs::read_dir(out_dir)
            .expect("OUT_DIR can be read")
            .flatten()
        {
            if entry.path().extension().is_some_and(|e| e == "ptx") {
                fs::remove_file(entry.path()).expect("a stale PTX file can be removed");
            }
        }
    }

    /// Makes a fatbin of each PTX file. If the driver had to translate PTX, the first call would take seconds longer.
    fn assemble(ptx_files: &[PathBuf]) {
        // Older compilers only have the default compression, whose files are four times as large.
        let help = nvcc(&["--help"]);
        let smallest: &[&str] = if help.contains("--compress-mode") {
            &["--compress-mode", "size"]
        } else {
            &[]
        };
        let jobs = env::var("NUM_JOBS").expect("cargo sets NUM_JOBS");
        let jobs: usize = jobs.parse().expect("NUM_JOBS is a number");
        thread::scope(|scope| {
            for job in 0..jobs {
                scope.spawn(move || {
                    for ptx in ptx_files.iter().skip(job).step_by(jobs) {
                        let fatbin = ptx.with_extension("fatbin");
                        let (from, to) = (ptx.to_string_lossy(), fatbin.to_string_lossy());
                        let arch = format!("--gpu-architecture={}", architecture(ptx));
                        nvcc(&[&["--fatbin", &arch, "-o", &to, &from], smallest].concat());
                    }
                });
            }
        });
    }

    /// The architecture that bindgen_cuda compiled for, such as `sm_90`.
    fn architecture(ptx: &Path) -> String {
        let text = fs::read_to_string(ptx).expect("bindgen_cuda writes PTX to OUT_DIR");
        let target = text.lines().find_map(|line| line.strip_prefix(".target "));
        let target = target.expect("PTX names its target");
        target.split(',').next().unwrap_or(target).trim().into()
    }

    /// Runs nvcc and returns what it prints.
    fn nvcc(args: &[&str]) -> String {
        let output = Command::new("nvcc").args(args).output();
        let output = output.expect("nvcc can be started");
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        assert!(
            output.status.success(),
            "nvcc {}:\n{stdout}{stderr}",
            args.join(" ")
        );
        stdout.into()
    }

    /// bindgen_cuda tells cargo to rerun this script when a source changes. The script writes the sources itself, so to cargo
    /// they would always seem to have changed since. Therefore they get the modification time of this file.
    fn backdate(source: &Path) {
        let age = fs::metadata("build.rs").and_then(|build| build.modified());
        let age = age.expect("build.rs has a time of modification");
        let file = fs::File::options().write(true).open(source);
        file.and_then(|file| file.set_modified(age))
            .expect("OUT_DIR can be written");
    }

    fn write(path: &Path, text: &str) {
        fs::write(path, text).expect("OUT_DIR can be written");
    }

    /// Every module with its kernels.
    fn modules() -> Vec<(Module, Vec<Kernel>)> {
        let mut modules: Vec<(Module, Vec<Kernel>)> = vec![];
        for kernel in instances::all() {
            match modules.iter_mut().find(|(m, _)| *m == kernel.module()) {
                Some((_, kernels)) => kernels.push(kernel),
                None => modules.push((kernel.module(), vec![kernel])),
            }
        }
        modules
    }

    /// Every module's name and fatbin.
    fn module_list(modules: &[(Module, Vec<Kernel>)]) -> String {
        let mut text = String::from("[\n");
        for (module, _) in modules {
            let name = module.name();
            writeln!(
                text,
                r#"("{name}", include_bytes!(concat!(env!("OUT_DIR"), "/{name}.fatbin"))),"#
            )
            .expect("a string can be written");
        }
        text + "]\n"
    }

    fn constants() -> String {
        let index_types: Vec<_> = IndexType::ALL
            .map(|t| format!("{t:?} = {}", t as u32).to_uppercase())
            .into();
        let layouts: String = STRUCTS.iter().map(|layout| layout_check(layout)).collect();
        format!(
            "// Written by build.rs from src/op/cuda/abi.rs.
#pragma once
#include <cstddef>
#include <cstdint>

constexpr int64_t LONG_BAG = {LONG_BAG};
constexpr int MAX_RANK = {MAX_RANK};
constexpr uint32_t TOUCHED_CHUNK = {TOUCHED_CHUNK};

enum IndexType : uint32_t {{ {} }};

// Asserts that a struct has the layout of its twin in Rust.
#define CHECK_LAYOUT(STRUCT) CHECK_LAYOUT_OF_##STRUCT
{layouts}",
            index_types.join(", ")
        )
    }

    fn layout_check(layout: &StructLayout) -> String {
        let StructLayout { name, size, fields } = layout;
        let fields: String = fields
            .iter()
            .map(|(field, offset)| format!(" && offsetof({name}, {field}) == {offset}"))
            .collect();
        format!(
            "#define CHECK_LAYOUT_OF_{name} \\\n  static_assert(sizeof({name}) == {size}{fields}, \"{name} differs from its twin in Rust\")\n"
        )
    }

    fn module_source(module: Module, kernels: &[Kernel]) -> String {
        let header = match module {
            Module::Bags(Pass::Forward, _, dtype) if dtype.is_low_bit() => "low_bit",
            Module::Bags(Pass::Forward, ..) => "forward",
            Module::Bags(Pass::Backward | Pass::BackwardPerSampleWeights, ..) => "backward",
            Module::Bags(Pass::BackwardFixedPoint, ..) | Module::FixedPoint => "fixed_point",
            Module::Bounds => "bounds",
            Module::Contiguous => "contiguous",
            Module::Optimizer(_) => "optimizer",
        };
        let kernels: String = kernels
            .iter()
            .map(|&kernel| kernel_source(kernel))
            .collect();
        format!("#include \"{header}.cuh\"\n{kernels}")
    }

    /// A line that defines the kernel with a macro of kernels/.
    fn kernel_source(kernel: Kernel) -> String {
        let start = format!("{}, {}", kernel.name(), kernel.threads());
        match kernel {
            Kernel::Bags(bags) => bag_kernel_source(bags, &start),
            Kernel::LargestMagnitude(dtype) => {
                format!("LARGEST_MAGNITUDE_KERNEL({start}, {})\n", c_type(dtype))
            }
            Kernel::FromFixedPoint(dtype) => {
                format!("FROM_FIXED_POINT_KERNEL({start}, {})\n", c_type(dtype))
            }
            Kernel::CheckBounds => format!("CHECK_BOUNDS_KERNEL({start})\n"),
            Kernel::CopyI32 => format!("COPY_I32_KERNEL({start})\n"),
            Kernel::OptimizerStep(rule, dtype) => {
                let (rule, t) = (c_rule(rule), c_type(dtype));
                format!("OPTIMIZER_STEP_KERNEL({start}, {rule}, {t})\n")
            }
            Kernel::SparseOptimizerStep(rule, dtype) => {
                let (rule, t) = (c_rule(rule), c_type(dtype));
                format!("SPARSE_OPTIMIZER_STEP_KERNEL({start}, {rule}, {t})\n")
            }
        }
    }

    fn bag_kernel_source(kernel: BagKernel, start: &str) -> String {
        let BagKernel {
            width,
            share,
            plain,
            ..
        } = kernel;
        let hash = match kernel.family {
            Family::Affine => "AffineSlots",
            Family::Mix => "MixSlots",
            Family::Balanced => "BalancedSlots",
            Family::Lma => "LmaRows",
            Family::RowBlocks => "RowBlocks",
        };
        let pooling = match kernel.pooling {
            Pooling::Sum => "SUM",
            Pooling::Weighted => "WEIGHTED",
            Pooling::Max => "MAX",
        };
        if kernel.dtype.is_low_bit() {
            let bits = kernel.dtype.bits();
            return format!("FORWARD_LOW_BIT_KERNEL({start}, {pooling}, {bits}, {hash}, {width}, {share}, {plain})\n");
        }
        let t = c_type(kernel.dtype);
        let blocks = kernel
            .blocks_per_multiprocessor()
            .map_or(String::new(), |blocks| format!("{blocks}, "));
        match kernel.pass {
            Pass::Forward => {
                format!("FORWARD_KERNEL({start}, {blocks}{pooling}, {t}, {hash}, {width}, {share}, {plain})\n")
            }
            Pass::Backward => {
                format!("BACKWARD_KERNEL({start}, {pooling}, {t}, {hash}, {width}, {share})\n")
            }
            Pass::BackwardFixedPoint => {
                format!("BACKWARD_FIXED_POINT_KERNEL({start}, {pooling}, {t}, {hash}, {width}, {share})\n")
            }
            Pass::BackwardPerSampleWeights => {
                format!("BACKWARD_PER_SAMPLE_WEIGHTS_KERNEL({start}, {t}, {hash}, {width})\n")
            }
        }
    }

    fn c_rule(rule: Rule) -> &'static str {
        match rule {
            Rule::AdamW => "AdamW",
            Rule::Adagrad => "Adagrad",
            Rule::Sgd => "Sgd",
            Rule::Momentum => "Momentum",
            Rule::SparseAdam => "SparseAdam",
        }
    }

    fn c_type(dtype: Dtype) -> &'static str {
        match dtype {
            Dtype::F16 => "__half",
            Dtype::Bf16 => "__nv_bfloat16",
            Dtype::F32 => "float",
            Dtype::F64 => "double",
            Dtype::Bits8 | Dtype::Bits4 => {
                unreachable!("kernels over low bits have macros of their own")
            }
        }
    }
}
