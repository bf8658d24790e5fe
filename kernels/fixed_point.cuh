// Sums that do not depend on the order of their terms: grad_weight in fixed point, summed with integer atomics.
//
// Addition of integers is associative, so the result is the same bit for bit, from run to run and for any launch. The
// unit is as small as the largest possible sum allows. Let M be the largest |term|, and let N = 2^log2_terms be at
// least the number of terms that can meet in one slot. A term x becomes q = rint(x * 2^k) with k = 62 - log2_terms - e
// and 2^e > M. Then |q| <= 2^(62 - log2_terms), and N such terms sum to at most 2^62, which fits. Each term is off by
// at most half a unit, 2^-(k+1) <= M * N * 2^-62: with a billion (2^30) terms by M * 2^-32, whereas every addition in
// f32 rounds its sum by up to 2^-24 of it. f64 has more bits than one such integer: the remainder goes to a second
// integer, whose unit is smaller by 2^(62 - log2_terms).
//
// Terms that are not finite have no fixed-point value: they are added to grad_weight as floats. The order does not
// matter there either: infinities of one sign stay, everything else becomes NaN.
#pragma once
#include "backward.cuh"

// Adds to grad_weight in fixed point.
template <int V, typename A>
struct FixedPointSums {
  static constexpr int INTEGERS = sizeof(A) / 4;  // per slot

  A *grad_weight;  // the sums of terms that are not finite
  Touched touched;
  int64_t *units;           // (INTEGERS, len): the sums of all other terms, in units
  uint64_t len;             // of grad_weight
  A to_units[INTEGERS][2];  // two powers of two whose product is 2^k, which may itself be out of range
  A from_units[INTEGERS][2];

  // `largest`: the largest finite |grad_output|, and |per_sample_weights| or 1
  __device__ __forceinline__ FixedPointSums(A *grad_weight, uint8_t *touched, int64_t *units, uint64_t len,
                                            const A *largest, uint32_t log2_terms)
      : grad_weight(grad_weight), touched{touched}, units(units), len(len) {
    int e[2];
    frexp(largest[0], &e[0]);
    frexp(largest[1], &e[1]);
    int k = 62 - int(log2_terms) - (e[0] + e[1]);
#pragma unroll
    for (int g = 0; g < INTEGERS; g++) {
      int half = k / 2;
      to_units[g][0] = ldexp(A(1), half);
      to_units[g][1] = ldexp(A(1), k - half);
      from_units[g][0] = ldexp(A(1), -half);
      from_units[g][1] = ldexp(A(1), half - k);
      k += 62 - int(log2_terms);
    }
  }

  __device__ __forceinline__ void begin() {}
  __device__ __forceinline__ void end() {}

  template <typename Hash>
  __device__ __forceinline__ void add(const Hash &hash, typename Hash::Place place, uint32_t within, const A (&x)[V]) {
    touched.mark<V>(hash, place, within);
#pragma unroll
    for (int v = 0; v < V; v++) add_value(hash, place, within + v, x[v]);
  }

  template <typename Hash>
  __device__ __forceinline__ void add_one(const Hash &hash, typename Hash::Place place, uint32_t within, A x) {
    touched.mark(hash.template vector<1>(place, within));
    add_value(hash, place, within, x);
  }

  // Adds the sum of slot i to grad_weight, if it may not be zero. With `reset`, its units are zero again.
  __device__ __forceinline__ void finish(uint64_t i, bool reset) const {
    if (touched.marks && !touched.marks[i / TOUCHED_CHUNK]) return;
    A sum = 0;
#pragma unroll
    for (int g = INTEGERS - 1; g >= 0; g--) {
      sum += A(units[g * len + i]) * from_units[g][0] * from_units[g][1];
      if (reset) units[g * len + i] = 0;
    }
    grad_weight[i] += sum;
  }

private:
  template <typename Hash>
  __device__ __forceinline__ void add_value(const Hash &hash, typename Hash::Place place, uint32_t within, A x) {
    if (!isfinite(x)) {
      add_global(hash.at(grad_weight + within, place), x);
      return;
    }
#pragma unroll
    for (int g = 0; g < INTEGERS; g++) {
      int64_t q = llrint(x * to_units[g][0] * to_units[g][1]);
      add_global(hash.at(units + g * len + within, place), q);
      if (g + 1 < INTEGERS) x -= A(q) * from_units[g][0] * from_units[g][1];
    }
  }
};

// *largest = max(*largest, |value|) over all finite values. Positive floats have the same order as their bits.
template <int THREADS, typename T>
__device__ __forceinline__ void largest_magnitude(const T *values, uint64_t n, Acc<T> *largest) {
  using A = Acc<T>;
  using Bits = typename std::conditional<sizeof(A) == 8, unsigned long long, unsigned int>::type;
  Bits most = 0;
  uint64_t threads = uint64_t(gridDim.x) * THREADS;
  for (uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += threads) {
    A x = fabs(widen(values[i]));
    Bits bits;
    memcpy(&bits, &x, sizeof(x));
    if (isfinite(x)) most = max(most, bits);
  }
  for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(FULL_WARP, most, step));
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<Bits *>(largest), most);
}

#define BACKWARD_FIXED_POINT_KERNEL(NAME, THREADS, POOLING, T, HASH, V, SHARE)                                         \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                     \
           const TableRows *table_rows, const T *per_sample_weights, Acc<T> *grad_weight, uint8_t *touched,            \
           int64_t *units, uint64_t len, const Acc<T> *largest, uint32_t log2_terms, BagParams bags, HASH slots,       \
           uint32_t embedding_dim, uint32_t mean, uint32_t grad_output_aligned) {                                      \
    FixedPointSums<V, Acc<T>> sums(grad_weight, touched, units, len, largest, log2_terms);                             \
    backward<THREADS, POOLING, V, SHARE>(grad_output, hashed_weight, {indices, offsets, table_rows},                   \
                                         per_sample_weights, sums, bags, slots, embedding_dim, mean,                   \
                                         grad_output_aligned);                                                         \
  }

#define LARGEST_MAGNITUDE_KERNEL(NAME, THREADS, T)                                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const T *values, uint64_t n, Acc<T> *largest) {           \
    largest_magnitude<THREADS>(values, n, largest);                                                                    \
  }

#define FROM_FIXED_POINT_KERNEL(NAME, THREADS, A)                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(A *grad_weight, uint8_t *touched, int64_t *units, uint64_t len, const A *largest, uint32_t log2_terms,      \
           uint32_t reset) {                                                                                           \
    FixedPointSums<1, A> sums(grad_weight, touched, units, len, largest, log2_terms);                                  \
    uint64_t threads = uint64_t(gridDim.x) * THREADS;                                                                  \
    for (uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x; i < len; i += threads) sums.finish(i, reset != 0); \
  }
