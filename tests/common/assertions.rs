//! Comparing tensors, and reading error messages.

use candle_core::{DType, Device, Result, Tensor};

/// The message of an error, without the backtrace that RUST_BACKTRACE adds.
#[track_caller]
pub fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("expected an error"),
        Err(e) => e.to_string().lines().next().unwrap_or_default().to_string(),
    }
}

/// All values in row-major order, as f64 on the host.
pub fn to_vec(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor
        .to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// The largest relative error of one rounding to `dtype`.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        DType::F32 => 2f64.powi(-24),
        _ => 2f64.powi(-53),
    }
}

/// Asserts that `got` equals `want` rounded to the dtype of `got`, up to `ulps` units in the last place. Values below 1 may
/// differ by as much as 1 may.
#[track_caller]
pub fn assert_equal(got: &Tensor, want: &Tensor, ulps: f64, what: &str) {
    let same = || -> Result<bool> {
        let epsilon = epsilon(got.dtype());
        let rounded = to_vec(&want.to_dtype(got.dtype())?)?;
        let values = to_vec(got)?;
        let close = |(g, w): (&f64, &f64)| {
            g == w || (g - w).abs() <= ulps * 2.0 * epsilon * w.abs().max(1.0)
        };
        Ok(got.dims() == want.dims() && values.iter().zip(&rounded).all(close))
    };
    match same() {
        Ok(true) => {}
        Ok(false) => panic!("{what}\n  got {got}\n want {want}"),
        Err(e) => panic!("{what}: {e}"),
    }
}
