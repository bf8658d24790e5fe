//! Products of matrices that lie within slices, on the calling thread.

use candle_core::{bail, Result};
use gemm::Parallelism;

/// A matrix within a slice: its size, and how far apart neighbours in a column and in a row are.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// The matrix at the start of `values` whose rows are `row_stride` values apart.
    ///
    /// # Errors
    /// Too few values.
    pub fn new(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Result<Self> {
        check_len(values.len(), rows, columns, row_stride)?;
        Ok(Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        })
    }

    /// Rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }
}

/// Adds `lhs rhs` to the matrix at the start of `out` whose rows are `row_stride` values apart.
///
/// # Errors
/// Sizes that do not fit.
pub fn add_product(out: &mut [f32], row_stride: usize, lhs: Matrix, rhs: Matrix) -> Result<()> {
    let (m, k, n) = (lhs.rows, lhs.columns, rhs.columns);
    if k != rhs.rows {
        bail!("cannot multiply ({m}, {k}) by ({}, {n})", rhs.rows);
    }
    check_len(out.len(), m, n, row_stride)?;
    // SAFETY: `check_len` has shown of all three matrices that they lie within their slices; `out` is borrowed mutably, so it
    // overlaps neither of the others.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            true,
            lhs.values.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.values.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    Ok(())
}

/// Whether `len` values hold so many rows.
fn check_len(len: usize, rows: usize, columns: usize, row_stride: usize) -> Result<()> {
    let end = match rows {
        0 => Some(0),
        rows => (rows - 1)
            .checked_mul(row_stride)
            .and_then(|start| start.checked_add(columns)),
    };
    if columns > row_stride || end.is_none_or(|end| end > len) {
        bail!("{len} values are no ({rows}, {columns}) matrix with rows {row_stride} apart");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_may_lie_apart() -> Result<()> {
        // [[1, 2], [3, 4]] and its transpose, with a stranger behind each row.
        let values = [1.0, 2.0, 9.0, 3.0, 4.0];
        let a = Matrix::new(&values, 2, 2, 3)?;
        let mut out = [1.0, 0.0, 7.0, 0.0, 0.0];
        add_product(&mut out, 3, a, a.transposed())?;
        assert_eq!(out, [6.0, 11.0, 7.0, 11.0, 25.0]);
        Ok(())
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() -> Result<()> {
        let values = [0.0; 6];
        assert!(Matrix::new(&values, 2, 3, 4).is_err());
        assert!(Matrix::new(&values, 2, 3, 2).is_err());
        assert!(Matrix::new(&values, usize::MAX, 3, 3).is_err());
        assert!(Matrix::new(&[], 0, 3, 3).is_ok());
        let a = Matrix::new(&values, 2, 3, 3)?;
        assert!(add_product(&mut [0.0; 4], 2, a, a).is_err());
        assert!(add_product(&mut [0.0; 3], 2, a, a.transposed()).is_err());
        Ok(())
    }
}
