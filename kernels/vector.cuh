// Accesses V consecutive values at once, widened to the accumulator's type: f16 and bf16 are summed in f32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void narrow(__half &to, float x) { to = __float2half(x); }
__device__ __forceinline__ void narrow(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void narrow(float &to, float x) { to = x; }
__device__ __forceinline__ void narrow(double &to, double x) { to = x; }

// The type of one access to V values. V is 1, or V values take 8 or 16 bytes.
template <int V, typename T>
struct Access;
template <typename T>
struct Access<1, T> {
  using type = T;
};
template <typename T>
struct Access<2, T> {
  using type = typename std::conditional<sizeof(T) == 8, uint4, uint2>::type;
};
template <typename T>
struct Access<4, T> {
  using type = typename std::conditional<sizeof(T) == 4, uint4, uint2>::type;
};
template <typename T>
struct Access<8, T> {
  using type = uint4;
};
template <int V, typename T>
using Raw = typename Access<V, T>::type;

// `from` is aligned to V values.
template <int V, typename T>
__device__ __forceinline__ Raw<V, T> load(const T *__restrict__ from) {
  return __ldg(reinterpret_cast<const Raw<V, T> *>(from));
}

template <int V, typename T>
__device__ __forceinline__ void unpack(const Raw<V, T> &raw, Acc<T> (&x)[V]) {
  T values[V];
  memcpy(values, &raw, sizeof(raw));
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = widen(values[v]);
}

// x[v] = from[v] for the first `n` values, zero for the others. Aligned as for `load` whenever n >= V.
template <int V, typename T>
__device__ __forceinline__ void load_row(const T *__restrict__ from, int n, bool aligned, Acc<T> (&x)[V]) {
  if (n >= V && (V == 1 || aligned)) {
    unpack<V, T>(load<V>(from), x);
  } else {
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = v < n ? widen(from[v]) : Acc<T>(0);
  }
}

// to[v] = x[v] for the first `n` values. They are not read again, so a hint keeps them from evicting rows from the
// cache.
template <int V, typename T>
__device__ __forceinline__ void store_row(T *to, int n, bool aligned, const Acc<T> (&x)[V]) {
  T values[V];
#pragma unroll
  for (int v = 0; v < V; v++) narrow(values[v], x[v]);
  if (V > 1 && n >= V && aligned) {
    if constexpr (V > 1) {
      Raw<V, T> raw;
      memcpy(&raw, values, sizeof(raw));
      __stcs(reinterpret_cast<Raw<V, T> *>(to), raw);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; v++)
      if (v < n) to[v] = values[v];
  }
}

// *to += x, atomically, in global memory. Written in PTX, because the compiler does not always see that a pointer is
// global, and then tests it at every addition.
__device__ __forceinline__ void add_global(float *to, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(x) : "memory");
}
__device__ __forceinline__ void add_global(double *to, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(x) : "memory");
}
__device__ __forceinline__ void add_global(int64_t *to, int64_t x) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "l"(x) : "memory");
}

// to[v] += x[v], atomically: in vectors of 16 bytes if the GPU has such reductions, otherwise value by value. The order
// of additions depends on timing, so the last bits of a sum may differ from run to run.
template <int V, typename A>
__device__ __forceinline__ void add_atomic(A *to, const A (&x)[V]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr bool vectors = V % 4 == 0 && sizeof(A) == 4;
#else
  constexpr bool vectors = false;
#endif
  if constexpr (vectors) {
#pragma unroll
    for (int v = 0; v < V; v += 4)
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to + v)), "f"(x[v]),
                   "f"(x[v + 1]), "f"(x[v + 2]), "f"(x[v + 3])
                   : "memory");
  } else {
#pragma unroll
    for (int v = 0; v < V; v++) add_global(to + v, x[v]);
  }
}
