//! `hashed_weight` in 8 or 4 bits: rounded once, after training, for checkpoints and serving.
//!
//! ```text
//! 8 bits   value(u) = (u + 1/2 - 128) * scale               u a byte, one scale for the layer
//! 4 bits   value(u) = (u + 1/2 - 8) * scale / 2^shift       u a nibble, one scale, a shift of 0 to 3 for each 32 consecutive slots
//! ```
//!
//! * One scale is enough because the weights are hashed: a slot serves rows of all kinds, so rows with large values are spread
//!   over all of them. It is the scale with the smallest squared error, found by a scan; values beyond the outermost levels are
//!   clipped. In 4 bits each group of 32 slots has the shift that rounds it best.
//! * Levels lie at half-integers so that a sign is a bitwise NOT: `-value(u) = value(!u)`.
//! * Every value is an odd integer times a *unit*: `(2u - 255) * scale / 2` or `((2u - 15) << (3 - shift)) * scale / 16`. So a
//!   bag is summed exactly, in integers and in any order, and multiplied by the unit once.
//!
//! Packed, slot `s` is byte `s` in 8 bits; in 4 bits it is the low half of byte `s / 2` if `s` is even, the high half if it is odd.
//! The shift of group `g` is bits `2 * (g % 4)` and up of byte `g / 4` of the shifts. docs/format.md specifies the same for files.

use crate::error::{bail, error};
use crate::parallel::Team;
use candle_core::{DType, Device, Result, Tensor};
use serde::{Deserialize, Serialize};

/// How many bits a value of `hashed_weight` takes in a layer for serving; see
/// [`HashedEmbeddingBag::to_bits`](crate::HashedEmbeddingBag::to_bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
#[non_exhaustive]
pub enum Bits {
    /// A quarter of the bytes of f32. The loss of quality is hardly measurable.
    Eight,
    /// An eighth of the bytes of f32, and two more bits for each 32 values.
    Four,
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> Self {
        match bits {
            Bits::Eight => 8,
            Bits::Four => 4,
        }
    }
}

impl TryFrom<u32> for Bits {
    type Error = String;

    fn try_from(bits: u32) -> std::result::Result<Self, String> {
        match bits {
            8 => Ok(Self::Eight),
            4 => Ok(Self::Four),
            _ => Err(format!("bits must be 8 or 4, got {bits}")),
        }
    }
}

/// How many consecutive slots share a shift in 4 bits.
pub(crate) const GROUP: usize = 32;
/// How many groups have their shifts in one byte.
const GROUPS_PER_BYTE: usize = 4;
/// Values that a thread rounds at a time: whole bytes of shifts.
const TASK_VALUES: usize = 1 << 15;
/// The smallest scale. Its units are still normal numbers, which no device flushes to zero.
const SMALLEST_SCALE: f32 = 16.0 * f32::MIN_POSITIVE;

impl Bits {
    /// Bytes of a packed `hashed_weight` of `len` values.
    pub(crate) fn packed_len(self, len: usize) -> usize {
        match self {
            Self::Eight => len,
            Self::Four => len / 2,
        }
    }

    /// Values in a packed `hashed_weight` of `bytes` bytes.
    pub(crate) fn len(self, bytes: usize) -> usize {
        match self {
            Self::Eight => bytes,
            Self::Four => bytes.saturating_mul(2),
        }
    }

    /// Bytes of the shifts of `len` values; `None` in 8 bits, which have none.
    pub(crate) fn shifts_len(self, len: usize) -> Option<usize> {
        match self {
            Self::Eight => None,
            Self::Four => Some(len.div_ceil(GROUP * GROUPS_PER_BYTE)),
        }
    }

    /// The number of levels on either side of zero.
    fn half(self) -> f32 {
        match self {
            Self::Eight => 128.0,
            Self::Four => 8.0,
        }
    }
}

/// What turns the bytes of a low-bit `hashed_weight` into values, and how a lookup in it answers.
#[derive(Debug, Clone)]
pub struct LowBit {
    bits: Bits,
    scale: f32,
    /// U8, on the device of `hashed_weight`; only in 4 bits.
    shifts: Option<Tensor>,
    output_dtype: DType,
}

impl LowBit {
    /// For a packed `hashed_weight`, whose outputs are f32.
    ///
    /// # Errors
    /// A tensor that is not of bytes, not 1-D or not of the right length, and those of [`check_scale`].
    pub(crate) fn new(
        bits: Bits,
        scale: f32,
        packed: &Tensor,
        shifts: Option<Tensor>,
    ) -> Result<Self> {
        check_scale(scale).map_err(error)?;
        let len = bits.len(bytes("hashed_weight", packed)?);
        let got = shifts
            .as_ref()
            .map(|shifts| bytes("hashed_weight_shift", shifts));
        match (bits.shifts_len(len), got.transpose()?) {
            (want, got) if want == got => {}
            (None, _) => bail!("hashed_weight_shift goes with 4 bits only"),
            (Some(want), None) => bail!("4 bits need a hashed_weight_shift of {want} bytes"),
            (Some(want), Some(got)) => {
                bail!("hashed_weight_shift must have {want} bytes, got {got}")
            }
        }
        Ok(Self {
            bits,
            scale,
            shifts,
            output_dtype: DType::F32,
        })
    }

    /// The bits of a value.
    pub fn bits(&self) -> Bits {
        self.bits
    }

    /// The scale of the layer, the distance of two levels; in 4 bits, that of groups whose shift is 0.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// In 4 bits, the shifts: U8, a byte for each 128 slots.
    pub fn shifts(&self) -> Option<&Tensor> {
        self.shifts.as_ref()
    }

    /// The dtype of outputs: f32, f16 or bf16.
    pub fn output_dtype(&self) -> DType {
        self.output_dtype
    }

    /// The same with outputs of another dtype.
    pub(crate) fn with_output_dtype(mut self, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            bail!(
                "a layer of {} bits gives f32, f16 or bf16, got {}",
                u32::from(self.bits),
                dtype.as_str()
            );
        }
        self.output_dtype = dtype;
        Ok(self)
    }

    /// The same beside a `hashed_weight` on another device.
    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        let shifts = self.shifts.as_ref();
        Ok(Self {
            shifts: shifts.map(|shifts| shifts.to_device(device)).transpose()?,
            ..self.clone()
        })
    }

    /// What an odd integer is multiplied with to become a value.
    pub(crate) fn unit(&self) -> f32 {
        match self.bits {
            Bits::Eight => self.scale / 2.0,
            Bits::Four => self.scale / 16.0,
        }
    }

    /// The values of a packed `hashed_weight`: `(len,)`, f32, on its device.
    pub(crate) fn unpack(&self, packed: &Tensor) -> Result<Tensor> {
        let host = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_vec1::<u8>();
        let shifts = self.shifts.as_ref().map(host).transpose()?;
        let values = unpack(&host(packed)?, &shifts.unwrap_or_default(), self);
        Tensor::new(values, packed.device())
    }
}

/// The scale, or an error message if it is not a positive finite number, or too small for its unit.
pub(crate) fn check_scale(scale: f32) -> std::result::Result<f32, String> {
    if scale.is_finite() && scale >= SMALLEST_SCALE {
        Ok(scale)
    } else {
        Err(format!(
            "scale must be a finite number of at least {SMALLEST_SCALE:e}, got {scale:e}"
        ))
    }
}

/// The length of a 1-D tensor of bytes.
fn bytes(name: &str, tensor: &Tensor) -> Result<usize> {
    match (tensor.dtype(), tensor.dims()) {
        (DType::U8, &[len]) => Ok(len),
        (DType::U8, dims) => bail!("{name} must have rank 1, got {dims:?}"),
        (dtype, _) => bail!("{name} must have dtype u8, got {}", dtype.as_str()),
    }
}

/// Rounds `hashed_weight`, `(len,)` of any float dtype, to packed bytes on its device. Returns them, what they mean, and the
/// relative error `|hashed_weight - rounded| / |hashed_weight|` (Euclidean norms; 0 for nothing but zeros).
///
/// # Errors
/// A value that is not finite in f32; in 4 bits an odd length.
pub(crate) fn quantize(hashed_weight: &Tensor, bits: Bits) -> Result<(Tensor, LowBit, f64)> {
    let device = hashed_weight.device();
    let values = hashed_weight.detach().to_device(&Device::Cpu)?;
    let values: Vec<f32> = values.to_dtype(DType::F32)?.to_vec1()?;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        bail!(
            "hashed_weight must be finite in f32, got {} at position {at}",
            values[at]
        );
    }
    if bits == Bits::Four && !values.len().is_multiple_of(2) {
        bail!(
            "hashed_weight must have an even length in 4 bits, got {}",
            values.len()
        );
    }
    let scale = best_scale(&values, bits);
    let Packed {
        bytes,
        shifts,
        squared_error,
    } = pack(&values, bits, scale);
    let squares = values.iter().map(|&value| f64::from(value).powi(2));
    let total: f64 = squares.sum();
    let error = if total > 0.0 {
        (squared_error / total).sqrt()
    } else {
        0.0
    };
    let packed = Tensor::new(bytes, device)?;
    let shifts = match bits {
        Bits::Eight => None,
        Bits::Four => Some(Tensor::new(shifts, device)?),
    };
    let low_bit = LowBit::new(bits, scale, &packed, shifts)?;
    Ok((packed, low_bit, error))
}

/// The scale with the smallest squared error. The scan goes down from the one that clips nothing in factors of the square root
/// of 2, to less than a thousandth, and then halves the step around the best, to 2 %.
fn best_scale(values: &[f32], bits: Bits) -> f32 {
    let largest = values
        .iter()
        .fold(0f32, |most, value| most.max(value.abs()));
    let widest = largest / (bits.half() - 0.5);
    let scale_at = |step: f32| (widest * (-step).exp2()).max(SMALLEST_SCALE);
    let error_at = |step| squared_error(values, bits, scale_at(step));
    let better = |best: (f64, f32), step| {
        let error = error_at(step);
        if error < best.0 {
            (error, step)
        } else {
            best
        }
    };
    let steps = (1..=20).map(|i| i as f32 / 2.0);
    let mut best = steps.fold((error_at(0.0), 0.0), better);
    for step in [0.25, 0.125, 0.0625, 0.03125] {
        let middle = best.1;
        best = [middle - step, middle + step]
            .into_iter()
            .fold(best, better);
    }
    scale_at(best.1)
}

/// The squared error of rounding with this scale; it does not depend on the number of threads.
fn squared_error(values: &[f32], bits: Bits, scale: f32) -> f64 {
    let tasks = values.chunks(TASK_VALUES);
    let errors = Team::new(tasks.len()).map(tasks, |values| {
        let groups = values.chunks(GROUP);
        groups
            .map(|group| Rounded::best(group, bits, scale).error)
            .sum::<f64>()
    });
    errors.into_iter().sum()
}

struct Packed {
    bytes: Vec<u8>,
    shifts: Vec<u8>,
    squared_error: f64,
}

fn pack(values: &[f32], bits: Bits, scale: f32) -> Packed {
    let tasks = values.chunks(TASK_VALUES);
    let parts = Team::new(tasks.len()).map(tasks, |values| {
        let mut part = Packed {
            bytes: Vec::with_capacity(bits.packed_len(values.len())),
            shifts: vec![0; bits.shifts_len(values.len()).unwrap_or(0)],
            squared_error: 0.0,
        };
        for (g, group) in values.chunks(GROUP).enumerate() {
            let rounded = Rounded::best(group, bits, scale);
            let levels = &rounded.levels[..group.len()];
            match bits {
                Bits::Eight => part.bytes.extend(levels),
                Bits::Four => {
                    let pairs = levels.as_chunks::<2>().0;
                    part.bytes
                        .extend(pairs.iter().map(|&[low, high]| low | high << 4));
                    part.shifts[g / GROUPS_PER_BYTE] |=
                        rounded.shift << (2 * (g % GROUPS_PER_BYTE));
                }
            }
            part.squared_error += rounded.error;
        }
        part
    });
    let mut all = Packed {
        bytes: Vec::with_capacity(bits.packed_len(values.len())),
        shifts: vec![],
        squared_error: 0.0,
    };
    for part in parts {
        all.bytes.extend(part.bytes);
        all.shifts.extend(part.shifts);
        all.squared_error += part.squared_error;
    }
    all
}

/// A group of at most [`GROUP`] values, rounded.
struct Rounded {
    levels: [u8; GROUP],
    shift: u8,
    /// The squared error.
    error: f64,
}

impl Rounded {
    /// With the shift that rounds the group best; the smallest of those that are equal.
    fn best(group: &[f32], bits: Bits, scale: f32) -> Self {
        let mut best = Self::new(group, bits, scale, 0);
        if bits == Bits::Four {
            for shift in 1..4 {
                let rounded = Self::new(group, bits, scale, shift);
                if rounded.error < best.error {
                    best = rounded;
                }
            }
        }
        best
    }

    fn new(group: &[f32], bits: Bits, scale: f32, shift: u8) -> Self {
        let half = bits.half();
        let (step, per_step) = {
            let step = scale / f32::from(1u8 << shift);
            (step, 1.0 / step)
        };
        let (mut levels, mut error) = ([0; GROUP], 0.0);
        for (level, &value) in levels.iter_mut().zip(group) {
            // The cast rounds down, what with half-integers is to the nearest.
            *level = (value * per_step + half).clamp(0.0, 2.0 * half - 1.0) as u8;
            let lost = value - (f32::from(*level) + 0.5 - half) * step;
            error += f64::from(lost) * f64::from(lost);
        }
        Self {
            levels,
            shift,
            error,
        }
    }
}

fn unpack(packed: &[u8], shifts: &[u8], low_bit: &LowBit) -> Vec<f32> {
    let unit = low_bit.unit();
    let of_level = |level: i16| f32::from(level) * unit;
    match low_bit.bits {
        Bits::Eight => {
            let levels = packed.iter().map(|&byte| 2 * i16::from(byte) - 255);
            levels.map(of_level).collect()
        }
        Bits::Four => {
            let nibbles = packed.iter().flat_map(|&byte| [byte & 15, byte >> 4]);
            let levels = nibbles
                .enumerate()
                .map(|(slot, nibble)| (2 * i16::from(nibble) - 15) << (3 - shift_of(shifts, slot)));
            levels.map(of_level).collect()
        }
    }
}

/// The shift of the group of a slot.
#[inline(always)]
pub(crate) fn shift_of(shifts: &[u8], slot: usize) -> u8 {
    let group = slot / GROUP;
    shifts[group / GROUPS_PER_BYTE] >> (2 * (group % GROUPS_PER_BYTE)) & 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantized(values: &[f32], bits: Bits) -> (Vec<f32>, LowBit, f64) {
        let weight = Tensor::new(values, &Device::Cpu).unwrap();
        let (packed, low_bit, error) = quantize(&weight, bits).unwrap();
        let unpacked = low_bit.unpack(&packed).unwrap();
        (unpacked.to_vec1().unwrap(), low_bit, error)
    }

    /// Bell-shaped values: sums of twelve draws.
    fn normal(n: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut draw = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..n)
            .map(|_| (0..12).map(|_| draw()).sum::<f32>() - 6.0)
            .collect()
    }

    #[test]
    fn levels_are_packed_low_half_first() {
        let weight = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap();
        let bytes = |tensor: &Tensor| tensor.to_vec1::<u8>().unwrap();
        // All levels of 4 bits once, so that the scale is 1: -7.5, -6.5, … 7.5; twice in a group.
        let levels: Vec<f32> = (0..32).map(|i| (i % 16) as f32 - 7.5).collect();
        let (packed, low_bit, error) = quantize(&weight(&levels), Bits::Four).unwrap();
        assert_eq!((low_bit.scale(), error), (1.0, 0.0));
        assert_eq!(&bytes(&packed)[..3], [0x10, 0x32, 0x54]);
        // Then a group half as large, one an eighth, and one that is cut off.
        let groups = [1.0, 0.5, 0.125, 1.0, 0.25].map(|f| levels.iter().map(move |x| x * f));
        let mut groups: Vec<f32> = groups.into_iter().flatten().collect();
        groups.truncate(4 * 32 + 16);
        let (packed, low_bit, error) = quantize(&weight(&groups), Bits::Four).unwrap();
        assert_eq!((low_bit.scale(), error), (1.0, 0.0));
        assert_eq!(bytes(low_bit.shifts().unwrap()), [0b00_11_01_00, 0b10]);
        assert_eq!(bytes(&packed).len(), 72);
        assert_eq!(
            low_bit.unpack(&packed).unwrap().to_vec1::<f32>().unwrap(),
            groups
        );

        let levels: Vec<f32> = (0..256).map(|i| (i as f32 - 127.5) * 0.25).collect();
        let (packed, low_bit, error) = quantize(&weight(&levels), Bits::Eight).unwrap();
        assert_eq!((low_bit.scale(), error), (0.25, 0.0));
        assert!(bytes(&packed).into_iter().eq(0..=255));
        assert!(low_bit.shifts().is_none());
    }

    #[test]
    fn the_error_is_that_of_the_rounded_values_and_small() {
        let values = normal(100_002);
        for (bits, most) in [(Bits::Eight, 0.009), (Bits::Four, 0.105)] {
            let (rounded, _, error) = quantized(&values, bits);
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
            let pairs = values.iter().zip(&rounded);
            let lost = norm(&mut pairs.map(|(a, b)| f64::from(*a) - f64::from(*b)));
            let all = norm(&mut values.iter().map(|&x| f64::from(x)));
            assert!(
                (error - (lost / all).sqrt()).abs() < 1e-9,
                "{bits:?} {error}"
            );
            assert!(error < most, "{bits:?} {error}");
        }
    }

    /// Of scales on a fine grid none is better by more than the last step of the scan allows.
    #[test]
    fn the_scan_finds_the_best_scale() {
        for outlier in [1.0, 30.0] {
            let mut values = normal(4096);
            values[5] *= outlier;
            for bits in [Bits::Eight, Bits::Four] {
                let found = squared_error(&values, bits, best_scale(&values, bits));
                let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
                let widest = largest / (bits.half() - 0.5);
                let grid = (0..2000).map(|i| widest * (-i as f32 / 200.0).exp2());
                let best = grid.map(|scale| squared_error(&values, bits, scale));
                let best = best.fold(f64::INFINITY, f64::min);
                assert!(found <= best * 1.02, "{bits:?} {outlier}: {found} {best}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite() {
        for bits in [Bits::Eight, Bits::Four] {
            assert_eq!(quantized(&[0.0; 6], bits).2, 0.0);
            let (values, _, error) = quantized(&[f32::MAX, -f32::MAX], bits);
            assert!(
                values.iter().all(|x| x.is_finite()) && error < 0.1,
                "{values:?}"
            );
            let (values, _, _) = quantized(&[1e-45, 0.0], bits);
            assert!(values.iter().all(|x| x.abs() < 1e-35), "{values:?}");
        }
    }

    #[test]
    fn what_cannot_be_rounded_is_refused() {
        let message = |values: &[f32], bits| {
            let weight = Tensor::new(values, &Device::Cpu).unwrap();
            let error = quantize(&weight, bits).unwrap_err().to_string();
            error.lines().next().unwrap().to_string()
        };
        let start = "hashed-embedding-bag: hashed_weight must";
        assert_eq!(
            message(&[0.0, f32::NAN], Bits::Eight),
            format!("{start} be finite in f32, got NaN at position 1")
        );
        assert_eq!(
            message(&[0.0; 3], Bits::Four),
            format!("{start} have an even length in 4 bits, got 3")
        );
    }
}
