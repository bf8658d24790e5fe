//! Applies a rule to slices in one pass over memory, on all threads and with vector instructions.

use super::rules::{AnyRule, Real, Rule};
use crate::error::bail;
use crate::op::cpu::{prefetch, SparseSums, ValuesMut, REGION};
use crate::parallel::Team;
use candle_core::{Result, Storage};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::{array, iter};

/// Values that a thread takes at a time: enough to outweigh the overhead, few enough to be divided evenly.
const CHUNK: usize = 1 << 14;

/// Values of f16 or bf16 that are widened at a time: few enough to stay in the L1 cache.
const WIDENED: usize = 1 << 10;

/// How many runs of touched values before it is updated one is asked for: they are too far apart for the processor to do so.
const UPDATE_AHEAD: usize = 8;

/// A dtype of parameters.
pub(super) trait ParamDType: ValuesMut {
    /// The dtype of state and arithmetic.
    type State: Real + ValuesMut;

    /// Updates the values of slices of equal length. Gradients are of this dtype, or of that of the state.
    fn apply<G: GradValue<Self::State>, R: Rule<Self::State, S>, const S: usize>(
        rule: R,
        params: &mut [Self],
        grads: &[G],
        state: [&mut [Self::State]; S],
    );
}

/// A dtype of gradients, for arithmetic in `A`.
pub(super) trait GradValue<A>: Copy + Sync {
    /// `grads` in the dtype of the arithmetic; `buffer` has room for them.
    fn widen<'a>(grads: &'a [Self], buffer: &'a mut [A]) -> &'a [A];
}

macro_rules! wide_gradient {
    ($t:ty) => {
        impl GradValue<$t> for $t {
            fn widen<'a>(grads: &'a [$t], _: &'a mut [$t]) -> &'a [$t] {
                grads
            }
        }
    };
}
wide_gradient!(f32);
wide_gradient!(f64);

macro_rules! half_gradient {
    ($t:ty) => {
        impl GradValue<f32> for $t {
            fn widen<'a>(grads: &'a [$t], buffer: &'a mut [f32]) -> &'a [f32] {
                let buffer = &mut buffer[..grads.len()];
                grads.convert_to_f32_slice(buffer);
                buffer
            }
        }
    };
}
half_gradient!(f16);
half_gradient!(bf16);

macro_rules! full_precision {
    ($t:ty) => {
        impl ParamDType for $t {
            type State = $t;

            fn apply<G: GradValue<$t>, R: Rule<$t, S>, const S: usize>(
                rule: R,
                params: &mut [$t],
                grads: &[G],
                state: [&mut [$t]; S],
            ) {
                apply(rule, params, G::widen(grads, &mut []), state);
            }
        }
    };
}
full_precision!(f32);
full_precision!(f64);

macro_rules! half_precision {
    ($t:ty) => {
        impl ParamDType for $t {
            type State = f32;

            fn apply<G: GradValue<f32>, R: Rule<f32, S>, const S: usize>(
                rule: R,
                params: &mut [$t],
                grads: &[G],
                state: [&mut [f32]; S],
            ) {
                for (params, grads, state) in chunks(WIDENED, params, grads, state) {
                    let n = params.len();
                    let (mut wide, mut wide_grads) = ([0.0; WIDENED], [0.0; WIDENED]);
                    params.convert_to_f32_slice(&mut wide[..n]);
                    let grads = G::widen(grads, &mut wide_grads);
                    apply(rule, &mut wide[..n], grads, state);
                    params.convert_from_f32_slice(&wide[..n]);
                }
            }
        }
    };
}
half_precision!(f16);
half_precision!(bf16);

/// Divides slices of equal length into chunks of at most `len` values.
fn chunks<'a, T, G, A, const S: usize>(
    len: usize,
    params: &'a mut [T],
    grads: &'a [G],
    state: [&'a mut [A]; S],
) -> impl Iterator<Item = (&'a mut [T], &'a [G], [&'a mut [A]; S])> {
    let state = state_chunks(len, state);
    let chunks = params.chunks_mut(len).zip(grads.chunks(len)).zip(state);
    chunks.map(|((params, grads), state)| (params, grads, state))
}

/// Divides arrays of state into chunks; there is no end to those of no arrays.
fn state_chunks<A, const S: usize>(
    len: usize,
    state: [&mut [A]; S],
) -> impl Iterator<Item = [&mut [A]; S]> {
    let mut state = state.map(|values| values.chunks_mut(len));
    iter::repeat_with(move || array::from_fn(|s| state[s].next().unwrap_or_default()))
}

/// Updates values one after the other.
///
/// The compiler turns this loop into vector instructions. They round like scalar ones, so results are the same on every machine.
#[inline(always)]
fn update_all<A: Real, R: Rule<A, S>, const S: usize>(
    rule: R,
    params: &mut [A],
    grads: &[A],
    state: [&mut [A]; S],
) {
    // Equal lengths, which the compiler can see.
    let n = params.len();
    let grads = &grads[..n];
    let state = state.map(|values| &mut values[..n]);
    for i in 0..n {
        let (param, new) = rule.update(params[i], grads[i], array::from_fn(|s| state[s][i]));
        params[i] = param;
        for s in 0..S {
            state[s][i] = new[s];
        }
    }
}

/// [`update_all`], with AVX2 if available: twice as fast as the instructions that all x86-64 processors have. AVX-512 gains
/// nothing, because memory is the limit.
fn apply<A: Real, R: Rule<A, S>, const S: usize>(
    rule: R,
    params: &mut [A],
    grads: &[A],
    state: [&mut [A]; S],
) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<A: Real, R: Rule<A, S>, const S: usize>(
            rule: R,
            params: &mut [A],
            grads: &[A],
            state: [&mut [A]; S],
        ) {
            update_all(rule, params, grads, state);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was just detected.
            return unsafe { avx2(rule, params, grads, state) };
        }
    }
    update_all(rule, params, grads, state);
}

/// Updates all values of a parameter.
pub(super) fn step<T: ParamDType + GradValue<T::State>>(
    rule: AnyRule<T::State>,
    params: &mut [T],
    grads: &[T],
    state: &mut [Storage],
) -> Result<()> {
    match rule {
        AnyRule::AdamW(rule) => on_all_threads(rule, params, grads, arrays::<T, 2>(state)?),
        AnyRule::Adagrad(rule) => on_all_threads(rule, params, grads, arrays::<T, 1>(state)?),
        AnyRule::Sgd(rule) => on_all_threads(rule, params, grads, []),
        AnyRule::Momentum(rule) => on_all_threads(rule, params, grads, arrays::<T, 1>(state)?),
        AnyRule::SparseAdam(rule) => on_all_threads(rule, params, grads, arrays::<T, 2>(state)?),
    }
    Ok(())
}

/// Updates the values that a sparse gradient has touched, and leaves zeros in it.
pub(super) fn sparse_step<T: ParamDType<State: GradValue<T::State>>>(
    rule: AnyRule<T::State>,
    params: &mut [T],
    sums: &mut SparseSums,
    state: &mut [Storage],
) -> Result<()> {
    match rule {
        AnyRule::Adagrad(rule) => on_touched(rule, params, sums, arrays::<T, 1>(state)?),
        AnyRule::Sgd(rule) => on_touched(rule, params, sums, []),
        AnyRule::SparseAdam(rule) => on_touched(rule, params, sums, arrays::<T, 2>(state)?),
        AnyRule::AdamW(_) | AnyRule::Momentum(_) => {
            bail!("this step has no form for sparse gradients")
        }
    }
}

fn on_touched<T: ParamDType<State: GradValue<T::State>>, R: Rule<T::State, S>, const S: usize>(
    rule: R,
    params: &mut [T],
    SparseSums { values, touched }: &mut SparseSums,
    state: [&mut [T::State]; S],
) -> Result<()> {
    let sums = T::State::values_mut(values)?.chunks_mut(REGION);
    let state = state_chunks(REGION, state);
    let regions = touched
        .regions()
        .zip(params.chunks_mut(REGION))
        .zip(sums)
        .zip(state);
    let regions = regions.filter_map(|(((mut region, params), sums), state)| {
        region.is_touched().then_some((region, params, sums, state))
    });
    let regions: Vec<_> = regions.collect();
    let team = Team::new(regions.len());
    team.for_each(regions.into_iter(), |(region, params, sums, mut state)| {
        let runs = region.take(params.len());
        for (i, run) in runs.iter().enumerate() {
            if let Some(next) = runs.get(i + UPDATE_AHEAD) {
                prefetch(&params[next.start]);
                prefetch(&sums[next.start]);
                state
                    .iter()
                    .for_each(|values| prefetch(&values[next.start]));
            }
            let run = run.clone();
            let sums = &mut sums[run.clone()];
            let state = state.each_mut().map(|values| &mut values[run.clone()]);
            T::apply(rule, &mut params[run], sums, state);
            sums.fill(<T::State as Real>::from_f64(0.0));
        }
    });
    Ok(())
}

fn on_all_threads<T: ParamDType, G: GradValue<T::State>, R: Rule<T::State, S>, const S: usize>(
    rule: R,
    params: &mut [T],
    grads: &[G],
    state: [&mut [T::State]; S],
) {
    let team = Team::new(params.len() / CHUNK);
    team.for_each(
        chunks(CHUNK, params, grads, state),
        |(params, grads, state)| T::apply(rule, params, grads, state),
    );
}

/// The state of a parameter.
fn arrays<T: ParamDType, const S: usize>(state: &mut [Storage]) -> Result<[&mut [T::State]; S]> {
    let mut arrays = array::from_fn(|_| Default::default());
    for (array, storage) in arrays.iter_mut().zip(state) {
        *array = match storage {
            Storage::Cpu(storage) => T::State::values_mut(storage)?,
            Storage::Cuda(_) | Storage::Metal(_) => bail!("state is not on the CPU"),
        };
    }
    Ok(arrays)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::rules::{Algorithm, Step};
    use candle_nn::ParamsAdamW;

    /// [`apply`] uses the vectors of this machine; machines without them run the plain loop.
    #[test]
    fn vectors_compute_the_bits_of_the_plain_loop() {
        let step = Step {
            count: 3,
            is_first: false,
        };
        let AnyRule::AdamW(rule) = ParamsAdamW::default().rule::<f32>(step) else {
            unreachable!("the rule of AdamW");
        };
        for n in [0, 1, 7, 8, 100] {
            let values = |scale: f32| -> Vec<f32> {
                let value = |i| ((i + 1) as f32 * 0.7).sin() * scale;
                (0..n).map(value).collect()
            };
            let arrays = || {
                [
                    values(1.0),
                    values(1e-3),
                    values(1e-4).iter().map(|v| v * v).collect(),
                ]
            };
            let (grads, mut got, mut want) = (values(0.1), arrays(), arrays());
            let [param, first, second] = &mut got;
            apply(rule, param, &grads, [first, second]);
            let [param, first, second] = &mut want;
            update_all(rule, param, &grads, [first, second]);
            assert_eq!(got, want);
            assert!(n == 0 || got != arrays());
        }
    }
}
