//! Loads kernels: a module at the first use of one of its kernels, once per GPU.
//!
//! candle loads kernels as PTX only, which the driver has to translate first. These are fatbins, which hold machine code.

use super::instances::{Kernel, Module};
use crate::error::{bail, NAME};
use candle_core::cuda_backend::WrapErr;
use candle_core::Result;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use cudarc::nvrtc::Ptx;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

/// Every module's name and fatbin.
static FATBINS: &[(&str, &[u8])] = &include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The handle of a CUDA context, which all candle devices on one GPU share. It stays valid, because modules loaded in a context
/// keep it alive.
type ContextHandle = usize;

/// The modules and kernels loaded so far.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(ContextHandle, Module), Arc<CudaModule>>,
    kernels: HashMap<(ContextHandle, Kernel), CudaFunction>,
}

static LOADED: LazyLock<RwLock<Loaded>> = LazyLock::new(RwLock::default);

/// Returns the kernel, loaded in this context if it was not yet.
pub fn load(kernel: Kernel, context: &Arc<CudaContext>) -> Result<CudaFunction> {
    let handle = context.cu_ctx() as ContextHandle;
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = loaded.kernels.get(&(handle, kernel)) {
        return Ok(function.clone());
    }
    drop(loaded);
    context.bind_to_thread().w()?;
    let mut loaded = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    let module = kernel.module();
    let loaded_module = match loaded.modules.get(&(handle, module)) {
        Some(module) => module.clone(),
        None => {
            let loaded_module = load_module(module, context)?;
            let at = (handle, module);
            loaded.modules.insert(at, loaded_module.clone());
            loaded_module
        }
    };
    let function = loaded_module.load_function(&kernel.name()).w()?;
    loaded.kernels.insert((handle, kernel), function.clone());
    Ok(function)
}

fn load_module(module: Module, context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
    let name = module.name();
    let Some((_, fatbin)) = FATBINS.iter().find(|(of, _)| *of == name) else {
        bail!("there is no CUDA module {name}");
    };
    let image = Ptx::from_binary(fatbin.to_vec());
    context.load_module(image).w().map_err(|e| {
        // bindgen_cuda sets the variable.
        let built_for = env!("CUDA_COMPUTE_CAP");
        e.context(format!(
            "{NAME}: loading the CUDA module {name}, built for compute capability {built_for} and later"
        ))
    })
}
