//! Which tensors travel together: a collective of a few large buffers takes less time than one of each tensor.

use candle_core::{DType, Result, Tensor};

/// The bytes that a buffer is filled to. A single tensor may be larger.
const BUCKET: usize = 64 << 20;

/// Tensors start at multiples of so many values, so that optimisers can read their gradients in the widest accesses.
const ALIGNMENT: usize = 8;

/// Tensors of one dtype in one buffer.
#[derive(Debug, PartialEq)]
pub(super) struct Bucket {
    dtype: DType,
    /// The length of the buffer.
    len: usize,
    /// The number of each tensor, and where it starts.
    members: Vec<(usize, usize)>,
}

/// Divides tensors, given by dtype and number of values, in their order.
pub(super) fn divide(sizes: &[(DType, usize)]) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = vec![];
    for (i, &(dtype, len)) in sizes.iter().enumerate() {
        if len == 0 {
            continue;
        }
        let open = buckets.iter_mut().rev().find(|b| b.dtype == dtype);
        let fits = open.filter(|b| (b.end() + len) * dtype.size_in_bytes() <= BUCKET);
        match fits {
            Some(bucket) => {
                let start = bucket.end();
                bucket.members.push((i, start));
                bucket.len = start + len;
            }
            None => buckets.push(Bucket {
                dtype,
                len,
                members: vec![(i, 0)],
            }),
        }
    }
    buckets
}

impl Bucket {
    /// Where the next tensor would start.
    fn end(&self) -> usize {
        self.len.next_multiple_of(ALIGNMENT)
    }

    /// A new tensor, `(len,)`, with the values of the members.
    pub fn join(&self, tensors: &[Tensor]) -> Result<Tensor> {
        if let [(i, _)] = self.members[..] {
            return tensors[i].flatten_all()?.force_contiguous();
        }
        let device = tensors[self.members[0].0].device();
        let flat = Tensor::zeros(self.len, self.dtype, device)?;
        for &(i, start) in &self.members {
            flat.slice_set(&tensors[i].flatten_all()?.contiguous()?, 0, start)?;
        }
        Ok(flat)
    }

    /// Puts a view of `flat` in the place of each member.
    pub fn split(&self, flat: &Tensor, tensors: &mut [Tensor]) -> Result<()> {
        for &(i, start) in &self.members {
            let tensor = &mut tensors[i];
            let values = flat.narrow(0, start, tensor.elem_count())?;
            *tensor = values.reshape(tensor.shape())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn small_tensors_share_a_buffer_and_dtypes_do_not() -> Result<()> {
        let large = BUCKET / DType::F32.size_in_bytes();
        let sizes = [
            (DType::F32, 3),
            (DType::F64, 1),
            (DType::F32, large),
            (DType::F32, 0),
            (DType::F32, 5),
            (DType::F64, 2),
        ];
        let bucket = |dtype, len, members: &[(usize, usize)]| Bucket {
            dtype,
            len,
            members: members.to_vec(),
        };
        let expected = [
            bucket(DType::F32, 3, &[(0, 0)]),
            bucket(DType::F64, 10, &[(1, 0), (5, 8)]),
            bucket(DType::F32, large, &[(2, 0)]),
            bucket(DType::F32, 5, &[(4, 0)]),
        ];
        assert_eq!(divide(&sizes), expected);
        Ok(())
    }

    #[test]
    fn what_is_joined_splits_again() -> Result<()> {
        let tensors = [
            Tensor::arange(0f32, 6., &Device::Cpu)?
                .reshape((2, 3))?
                .t()?,
            Tensor::new(7f32, &Device::Cpu)?,
            Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?,
            Tensor::new(&[[8f64], [9.]], &Device::Cpu)?,
        ];
        let sizes: Vec<_> = tensors
            .iter()
            .map(|t| (t.dtype(), t.elem_count()))
            .collect();
        let mut split = tensors.to_vec();
        for bucket in divide(&sizes) {
            bucket.split(&(bucket.join(&tensors)? * 2.)?, &mut split)?;
        }
        for (split, tensor) in split.iter().zip(&tensors) {
            assert_eq!(split.dims(), tensor.dims());
            assert!(split.is_contiguous());
            let doubled = (tensor * 2.)?.flatten_all()?.to_dtype(DType::F64)?;
            let split = split.flatten_all()?.to_dtype(DType::F64)?;
            assert_eq!(split.to_vec1::<f64>()?, doubled.to_vec1::<f64>()?);
        }
        Ok(())
    }
}
