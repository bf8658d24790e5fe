//! The passes of a lookup: what each of them allocates, checks and launches, and in which order.

use super::bounds::{check_on_host, Flag};
use super::fixed_point::{zero_units, FixedPoint};
use super::instances::{Dtype, Pass};
use super::launch::{self, Element, Launch, TableTensors};
use super::sparse::SparseSums;
use crate::bounds::BoundsCheck;
use crate::error::bail;
use crate::low_bit::Bits;
use crate::op::{lend, Backend, Gradient, Lookup, Mode, Operands, Table, View};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, CudaDevice};
use candle_core::{CudaStorage, DType, Result, Storage};
use cudarc::driver::{CudaSlice, CudaView, DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

pub struct Cuda;

/// Calls `f` with the tensors of a table.
fn lend_table<R>(table: &Table, f: impl FnOnce(TableTensors) -> Result<R>) -> Result<R> {
    lend::<Cuda, _>(table.table_rows.as_ref(), |table_rows| {
        lend::<Cuda, _>(table.row_tensor(), |row_tensor| {
            f(TableTensors {
                table_rows,
                row_tensor,
            })
        })
    })
}

/// Calls `$run`, generic in the dtype of `hashed_weight`, with the launch of a pass.
macro_rules! with_launch {
    ($pass:expr, $lookup:ident, $operands:ident, $launch:ident => $run:expr) => {{
        let pass = $pass;
        lend_table(&$lookup.table, |tensors| {
            macro_rules! run {
                ($t:ty) => {{
                    let $launch =
                        Launch::<$t>::new(pass, <$t>::DTYPE, $lookup, $operands, tensors)?;
                    $run
                }};
            }
            match $operands.hashed_weight.0.dtype() {
                DType::F16 => run!(f16),
                DType::BF16 => run!(bf16),
                DType::F32 => run!(f32),
                _ => run!(f64),
            }
        })
    }};
}

impl Backend for Cuda {
    type Storage = CudaStorage;

    fn storage(storage: &Storage) -> Result<&CudaStorage> {
        match storage {
            Storage::Cuda(storage) => Ok(storage),
            Storage::Cpu(_) | Storage::Metal(_) => {
                bail!("expected a tensor on CUDA, got one elsewhere")
            }
        }
    }

    fn forward(lookup: &Lookup, operands: &Operands<CudaStorage>) -> Result<CudaStorage> {
        let Some(low_bit) = &lookup.table.low_bit else {
            return with_launch!(Pass::Forward, lookup, operands, launch => {
                forward(&launch, operands, |out| launch.forward(out))
            });
        };
        let dtype = match low_bit.bits() {
            Bits::Eight => Dtype::Bits8,
            Bits::Four => Dtype::Bits4,
        };
        lend_table(&lookup.table, |tensors| {
            lend::<Cuda, _>(low_bit.shifts(), |shifts| {
                let shifts = shifts.map(launch::view::<u8>).transpose()?;
                let pass = Pass::Forward;
                let launch = Launch::<f32, u8>::new(pass, dtype, lookup, operands, tensors)?;
                forward(&launch, operands, |out| {
                    launch.forward(low_bit, &shifts, out)
                })
            })
        })
    }

    fn grad_weight(
        lookup: &Lookup,
        grad_output: View<CudaStorage>,
        operands: &Operands<CudaStorage>,
    ) -> Result<CudaStorage> {
        let pass = Pass::grad_weight(lookup.gradient);
        with_launch!(pass, lookup, operands, launch => grad_weight(&launch, grad_output))
    }

    type SparseSums = SparseSums;

    fn add_grad_weight(
        lookup: &Lookup,
        grad_output: View<CudaStorage>,
        operands: &Operands<CudaStorage>,
        sums: &mut SparseSums,
    ) -> Result<()> {
        let pass = Pass::grad_weight(lookup.gradient);
        with_launch!(pass, lookup, operands, launch => sums.add(&launch, grad_output))
    }

    fn grad_per_sample_weights(
        lookup: &Lookup,
        grad_output: View<CudaStorage>,
        operands: &Operands<CudaStorage>,
    ) -> Result<CudaStorage> {
        let pass = Pass::BackwardPerSampleWeights;
        with_launch!(pass, lookup, operands, launch => grad_per_sample_weights(&launch, grad_output))
    }
}

/// `run` queues the kernel, which writes all of the output.
fn forward<T: Element, W: CudaDType>(
    launch: &Launch<T, W>,
    operands: &Operands<CudaStorage>,
    run: impl FnOnce(&mut CudaSlice<T>) -> Result<()>,
) -> Result<CudaStorage> {
    let Launch { lookup, device, .. } = launch;
    let is_checked = lookup.bounds_check == BoundsCheck::Error;
    let len = lookup.bags.num_bags * lookup.table.embedding_dim;
    if len == 0 {
        // No kernel runs, but there may still be an offset to check.
        if is_checked {
            check_on_host(lookup, operands)?;
        }
        return zeros::<T>(device, len);
    }
    // SAFETY: the kernel writes every column of every bag.
    let mut out = unsafe { device.alloc::<T>(len)? };
    // The host only waits for the check. The lookup queued after it is safe for any input, so it may still be running.
    let flag = match is_checked {
        true => {
            let mut flag = Flag::take(&launch.stream)?;
            launch.check_bounds(&mut flag)?;
            Some(flag)
        }
        false => None,
    };
    let launched = run(&mut out);
    if let Some(flag) = flag {
        if flag.wait()? {
            check_on_host(lookup, operands)?;
            bail!("indices or offsets changed during the lookup");
        }
    }
    launched?;
    Ok(CudaStorage::wrap_cuda_slice(out, (*device).clone()))
}

fn grad_weight<T: Element>(
    launch: &Launch<T>,
    grad_output: View<CudaStorage>,
) -> Result<CudaStorage> {
    let device = launch.device;
    let mut grad_weight = device.alloc_zeros::<T::Acc>(launch.hashed_weight.len())?;
    let mut units = None;
    add_grad_weight(
        launch,
        grad_output,
        &mut grad_weight,
        None,
        &mut units,
        false,
    )?;
    Ok(CudaStorage::wrap_cuda_slice(grad_weight, device.clone()))
}

/// Adds to `grad_weight`. `touched`: the marks of a sparse gradient; `units`: what sums in fixed point are kept in, all zero before
/// and, with `keep_units`, after.
fn add_grad_weight<T: Element>(
    launch: &Launch<T>,
    grad_output: View<CudaStorage>,
    grad_weight: &mut CudaSlice<T::Acc>,
    touched: Option<&CudaView<u8>>,
    units: &mut Option<CudaSlice<i64>>,
    keep_units: bool,
) -> Result<()> {
    if launch.is_empty() {
        return Ok(());
    }
    match launch.lookup.gradient {
        Gradient::Fastest => launch.backward(grad_output, grad_weight, touched, None),
        Gradient::Deterministic => {
            let units = match units {
                Some(units) => units,
                None => units.insert(zero_units::<T::Acc>(launch.device, grad_weight.len())?),
            };
            let sums = FixedPoint::new(launch, &launch::view(grad_output)?, units)?;
            launch.backward(grad_output, grad_weight, touched, Some(&sums))?;
            launch::from_fixed_point(&sums, grad_weight, touched, keep_units, &launch.stream)
        }
    }
}

impl SparseSums {
    fn add<T: Element>(
        &mut self,
        launch: &Launch<T>,
        grad_output: View<CudaStorage>,
    ) -> Result<()> {
        let Lookup { table, bags, .. } = launch.lookup;
        // For max, one row of a bag gets the gradient of a column.
        let rows = match table.mode {
            Mode::Max => bags.num_bags.min(bags.nnz),
            Mode::Sum | Mode::Mean => bags.nnz,
        };
        let marks = self.marks_for(rows.saturating_mul(table.embedding_dim));
        let values = self.values.as_cuda_slice_mut::<T::Acc>()?;
        let touched = marks.then(|| self.touched.slice(..));
        add_grad_weight(
            launch,
            grad_output,
            values,
            touched.as_ref(),
            &mut self.units,
            true,
        )
    }
}

fn grad_per_sample_weights<T: Element>(
    launch: &Launch<T>,
    grad_output: View<CudaStorage>,
) -> Result<CudaStorage> {
    let (device, nnz) = (launch.device, launch.lookup.bags.nnz);
    if launch.is_empty() {
        return zeros::<T>(device, nnz);
    }
    // Zeros, because the kernel does not write the gradients of padding and of indices outside every bag.
    let mut grad_weights = device.alloc_zeros::<T>(nnz)?;
    launch.backward_per_sample_weights(grad_output, &mut grad_weights)?;
    Ok(CudaStorage::wrap_cuda_slice(grad_weights, device.clone()))
}

/// `len` zeros, but at least one, because the driver refuses to allocate nothing.
fn zeros<T: CudaDType + DeviceRepr + ValidAsZeroBits>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaStorage> {
    let zeros = device.alloc_zeros::<T>(len.max(1))?;
    Ok(CudaStorage::wrap_cuda_slice(zeros, device.clone()))
}
