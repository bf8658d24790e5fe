// Optimiser steps, in place, in one pass over memory: the twin of src/optim/rules.rs, whose structs are passed as
// arguments.
//
// A thread updates vectors of consecutive values and strides by the grid. All loads of a vector come before its stores,
// and each value is read and written once, by one thread, so results do not depend on the order of threads.
//
// Parameters and gradients are T, state and arithmetic Acc<T>. Arithmetic rounds after every operation (Rounded), as on
// the CPU, so both compute the same bits. That costs no time, because these kernels wait for memory.
#pragma once
#include <cstdint>

#include "touched.cuh"
#include "vector.cuh"

// A number whose multiplications are never fused with additions.
template <typename A>
struct Rounded {
  A x;
};

__device__ __forceinline__ Rounded<float> operator+(Rounded<float> a, Rounded<float> b) {
  return {__fadd_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<float> operator-(Rounded<float> a, Rounded<float> b) {
  return {__fsub_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<float> operator*(Rounded<float> a, Rounded<float> b) {
  return {__fmul_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<float> operator/(Rounded<float> a, Rounded<float> b) {
  return {__fdiv_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<float> root(Rounded<float> a) { return {__fsqrt_rn(a.x)}; }
__device__ __forceinline__ Rounded<double> operator+(Rounded<double> a, Rounded<double> b) {
  return {__dadd_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<double> operator-(Rounded<double> a, Rounded<double> b) {
  return {__dsub_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<double> operator*(Rounded<double> a, Rounded<double> b) {
  return {__dmul_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<double> operator/(Rounded<double> a, Rounded<double> b) {
  return {__ddiv_rn(a.x, b.x)};
}
__device__ __forceinline__ Rounded<double> root(Rounded<double> a) { return {__dsqrt_rn(a.x)}; }

// Each rule updates a value and its STATE values of state; see src/optim/rules.rs for the fields.
template <typename A>
struct AdamW {
  static constexpr int STATE = 2;
  Rounded<A> decay, beta1, complement1, beta2, complement2, correction2, step_size, eps;

  __device__ __forceinline__ void update(Rounded<A> &param, Rounded<A> grad, Rounded<A> *state) const {
    Rounded<A> &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg = beta1 * exp_avg + complement1 * grad;
    exp_avg_sq = beta2 * exp_avg_sq + complement2 * (grad * grad);
    const Rounded<A> denominator = root(exp_avg_sq) * correction2 + eps;
    param = decay * param - step_size * (exp_avg / denominator);
  }
};

template <typename A>
struct Adagrad {
  static constexpr int STATE = 1;
  Rounded<A> weight_decay, step_size, eps;

  __device__ __forceinline__ void update(Rounded<A> &param, Rounded<A> grad, Rounded<A> *state) const {
    Rounded<A> &sum = state[0];
    grad = grad + weight_decay * param;
    sum = sum + grad * grad;
    param = param - step_size * (grad / (root(sum) + eps));
  }
};

template <typename A>
struct Sgd {
  static constexpr int STATE = 0;
  Rounded<A> weight_decay, lr;

  __device__ __forceinline__ void update(Rounded<A> &param, Rounded<A> grad, Rounded<A> *) const {
    grad = grad + weight_decay * param;
    param = param - lr * grad;
  }
};

template <typename A>
struct Momentum {
  static constexpr int STATE = 1;
  Rounded<A> weight_decay, momentum, intake, along_grad, along_buffer, lr;

  __device__ __forceinline__ void update(Rounded<A> &param, Rounded<A> grad, Rounded<A> *state) const {
    Rounded<A> &momentum_buffer = state[0];
    grad = grad + weight_decay * param;
    momentum_buffer = momentum * momentum_buffer + intake * grad;
    const Rounded<A> direction = along_grad * grad + along_buffer * momentum_buffer;
    param = param - lr * direction;
  }
};

template <typename A>
struct SparseAdam {
  static constexpr int STATE = 2;
  Rounded<A> zero, complement1, complement2, step_size, eps;

  __device__ __forceinline__ void update(Rounded<A> &param, Rounded<A> grad, Rounded<A> *state) const {
    if (grad.x == zero.x) return;
    Rounded<A> &exp_avg = state[0], &exp_avg_sq = state[1];
    exp_avg = exp_avg + complement1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq + complement2 * (grad * grad - exp_avg_sq);
    param = param - step_size * (exp_avg / (root(exp_avg_sq) + eps));
  }
};

// V consecutive values, moved in accesses of at most 16 bytes.
template <int V, typename T>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Values {
  T x[V];
};

template <int V, typename T>
__device__ __forceinline__ Values<V, T> load_values(const T *from) {
  return *reinterpret_cast<const Values<V, T> *>(from);
}

template <int V, typename T>
__device__ __forceinline__ void store_values(T *to, const Values<V, T> &values) {
  *reinterpret_cast<Values<V, T> *>(to) = values;
}

// Updates V values from position `at` on; their addresses are multiples of 16 bytes unless V is 1.
template <int V, typename T, typename Rule>
__device__ __forceinline__ void update(T *params, const T *grads, Acc<T> *state0, Acc<T> *state1, const Rule &rule,
                                       uint64_t at) {
  Values<V, T> param = load_values<V>(params + at);
  const Values<V, T> grad = load_values<V>(grads + at);
  Values<V, Acc<T>> first = {}, second = {};
  if (Rule::STATE > 0) first = load_values<V>(state0 + at);
  if (Rule::STATE > 1) second = load_values<V>(state1 + at);
#pragma unroll
  for (int v = 0; v < V; v++) {
    Rounded<Acc<T>> value = {widen(param.x[v])}, state[2] = {{first.x[v]}, {second.x[v]}};
    rule.update(value, {widen(grad.x[v])}, state);
    narrow(param.x[v], value.x);
    first.x[v] = state[0].x;
    second.x[v] = state[1].x;
  }
  store_values(params + at, param);
  if (Rule::STATE > 0) store_values(state0 + at, first);
  if (Rule::STATE > 1) store_values(state1 + at, second);
}

// Updates n values. `aligned` says that params and grads start at multiples of 16 bytes, as state always does. State
// that the rule does not use is null.
template <typename T, typename Rule>
__device__ __forceinline__ void step(T *params, const T *grads, Acc<T> *state0, Acc<T> *state1, const Rule &rule,
                                     uint64_t n, bool aligned) {
  constexpr int V = 16 / sizeof(T);  // accesses of 16 bytes
  const uint64_t thread = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x;
  const uint64_t threads = gridDim.x * uint64_t(blockDim.x);
  const uint64_t vectors = aligned ? n / V : 0;
  for (uint64_t i = thread; i < vectors; i += threads) update<V>(params, grads, state0, state1, rule, i * V);
  for (uint64_t i = vectors * V + thread; i < n; i += threads) update<1>(params, grads, state0, state1, rule, i);
}

// Updates N vectors of V values of a sparse gradient, `stride` values apart, and leaves zeros in it. Where a vector of
// it is zero, nothing else is read or written, unless `eager`: then all is read at once, without waiting for the
// gradient.
template <int N, int V, typename T, typename Rule>
__device__ __forceinline__ void update_sparse(T *params, Acc<T> *grads, Acc<T> *state0, Acc<T> *state1,
                                              const Rule &rule, uint64_t at, uint32_t stride, bool eager) {
  using A = Acc<T>;
  Values<V, A> grad[N], first[N] = {}, second[N] = {};
  Values<V, T> param[N];
  const auto load_rest = [&](int i) {
    param[i] = load_values<V>(params + at + i * stride);
    if (Rule::STATE > 0) first[i] = load_values<V>(state0 + at + i * stride);
    if (Rule::STATE > 1) second[i] = load_values<V>(state1 + at + i * stride);
  };
#pragma unroll
  for (int i = 0; i < N; i++) grad[i] = load_values<V>(grads + at + i * stride);
  if (eager) {
#pragma unroll
    for (int i = 0; i < N; i++) load_rest(i);
  }
  bool any[N] = {};
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int v = 0; v < V; v++) any[i] |= grad[i].x[v] != A(0);
    if (!eager && any[i]) load_rest(i);
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (!any[i]) continue;
#pragma unroll
    for (int v = 0; v < V; v++) {
      Rounded<A> value = {widen(param[i].x[v])}, state[2] = {{first[i].x[v]}, {second[i].x[v]}};
      rule.update(value, {grad[i].x[v]}, state);
      narrow(param[i].x[v], value.x);
      first[i].x[v] = state[0].x;
      second[i].x[v] = state[1].x;
    }
    store_values(params + at + i * stride, param[i]);
    store_values(grads + at + i * stride, Values<V, A>{});
    if (Rule::STATE > 0) store_values(state0 + at + i * stride, first[i]);
    if (Rule::STATE > 1) store_values(state1 + at + i * stride, second[i]);
  }
}

// Updates the values of those chunks of n values that are marked, each by a warp, and takes the marks off. No marks
// stand for all of them. `aligned` says that params starts at a multiple of 16 bytes, as everything else always does.
template <typename T, typename Rule>
__device__ __forceinline__ void sparse_step(T *params, Acc<T> *grads, uint8_t *touched, Acc<T> *state0, Acc<T> *state1,
                                            const Rule &rule, uint64_t n, bool aligned, bool eager) {
  constexpr int V = 16 / sizeof(T);
  constexpr int VECTORS = TOUCHED_CHUNK / (32 * V);  // of each lane
  const uint32_t lane = threadIdx.x % 32;
  const uint64_t warps = gridDim.x * uint64_t(blockDim.x) / 32;
  const uint64_t chunks = (n + TOUCHED_CHUNK - 1) / TOUCHED_CHUNK;
  for (uint64_t chunk = (blockIdx.x * uint64_t(blockDim.x) + threadIdx.x) / 32; chunk < chunks; chunk += warps) {
    if (touched && !touched[chunk]) continue;
    const uint64_t start = chunk * TOUCHED_CHUNK;
    if (aligned && start + TOUCHED_CHUNK <= n) {
      update_sparse<VECTORS, V>(params, grads, state0, state1, rule, start + lane * V, 32 * V, eager);
    } else {
      const uint64_t end = start + TOUCHED_CHUNK < n ? start + TOUCHED_CHUNK : n;
      for (uint64_t i = start + lane; i < end; i += 32)
        update_sparse<1, 1>(params, grads, state0, state1, rule, i, 0, eager);
    }
    if (!touched) continue;
    __syncwarp();  // all lanes have read the mark
    if (lane == 0) touched[chunk] = 0;
  }
}

#define SPARSE_OPTIMIZER_STEP_KERNEL(NAME, THREADS, RULE, T)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(T *params, Acc<T> *grads, uint8_t *touched, Acc<T> *state0, Acc<T> *state1, RULE<Acc<T>> rule, uint64_t n,  \
           uint32_t aligned, uint32_t eager) {                                                                         \
    sparse_step(params, grads, touched, state0, state1, rule, n, aligned != 0, eager != 0);                            \
  }

#define OPTIMIZER_STEP_KERNEL(NAME, THREADS, RULE, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                          \
      T *params, const T *grads, Acc<T> *state0, Acc<T> *state1, RULE<Acc<T>> rule, uint64_t n, uint32_t aligned) {    \
    step(params, grads, state0, state1, rule, n, aligned != 0);                                                        \
  }
