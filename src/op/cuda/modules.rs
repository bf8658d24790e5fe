//! Loads kernels: a module at the first use of one of its kernels, once per GPU.

use super::instances::{Kernel, Module};
use candle_core::cuda_backend::WrapErr;
use candle_core::Result;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

/// Every module's PTX by its name.
static PTX: &[(&str, &str)] = &include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The handle of a CUDA context, which all of candle's devices on one GPU share. It stays valid because what is loaded in a
/// context keeps it alive.
type ContextHandle = usize;

/// What has been loaded.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(ContextHandle, Module), Arc<CudaModule>>,
    kernels: HashMap<(ContextHandle, Kernel), CudaFunction>,
}

static LOADED: LazyLock<RwLock<Loaded>> = LazyLock::new(RwLock::default);

/// The kernel, loaded in this context.
pub fn load(kernel: Kernel, context: &Arc<CudaContext>) -> Result<CudaFunction> {
    let handle = context.cu_ctx() as ContextHandle;
    let loaded = LOADED.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(function) = loaded.kernels.get(&(handle, kernel)) {
        return Ok(function.clone());
    }
    drop(loaded);
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
    let Some((_, ptx)) = PTX.iter().find(|(of, _)| *of == name) else {
        candle_core::bail!("hashed-embedding-bag: there is no CUDA module {name}");
    };
    context.load_module((*ptx).into()).w()
}
