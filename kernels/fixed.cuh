// Sums that do not depend on the order of their terms: grad_weight in fixed point, summed with integer atomics.
//
// Addition of integers is associative, so the result is the same bit for bit, from run to run and for any launch. The grid is
// as fine as the largest possible sum allows. With M the largest |term| and N = 2^log2_terms at least the number of terms that
// can meet in one slot, a term x becomes q = rint(x * 2^k), k = 62 - log2_terms - e, 2^e > M: |q| <= 2^(62 - log2_terms), and
// N of them sum to at most 2^62, which fits. Each term is off by at most half a unit, 2^-(k+1) <= M * N * 2^-62: with a
// billion (2^30) terms by M * 2^-32, where every single addition in f32 rounds its sum by up to 2^-24 of it. For f64 what one
// grid leaves over goes to a second one, finer by 2^(62 - log2_terms).
//
// What is not finite has no place on a grid: such terms are added to grad_weight as floats. There, too, the order is of no
// consequence: infinities of one sign stay, all else becomes NaN.
#pragma once
#include "backward.cuh"

// Where a thread puts its additions to grad_weight: in fixed point.
template <int V, typename A>
struct FixedSums {
  // f64 has more bits than one grid.
  static constexpr int GRIDS = sizeof(A) / 4;

  A *grad_weight;         // what is not finite
  int64_t *units;         // GRIDS numbers for each slot, grid by grid
  uint64_t len;           // of grad_weight
  A to_units[GRIDS][2];   // two powers of two whose product is 2^k, since that alone might be out of range
  A from_units[GRIDS][2];

  // `largest`: the largest finite |grad_output|, and |per_sample_weights| or 1
  __device__ __forceinline__ FixedSums(A *grad_weight, int64_t *units, uint64_t len, const A *largest, uint32_t log2_terms)
      : grad_weight(grad_weight), units(units), len(len) {
    int e[2];
    frexp(largest[0], &e[0]);
    frexp(largest[1], &e[1]);
    int k = 62 - int(log2_terms) - (e[0] + e[1]);
#pragma unroll
    for (int g = 0; g < GRIDS; g++) {
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
#pragma unroll
    for (int v = 0; v < V; v++) add_one(hash, place, within + v, x[v]);
  }

  template <typename Hash>
  __device__ __forceinline__ void add_one(const Hash &hash, typename Hash::Place place, uint32_t within, A x) {
    if (!isfinite(x)) {
      add_global(hash.at(grad_weight + within, place), x);
      return;
    }
#pragma unroll
    for (int g = 0; g < GRIDS; g++) {
      int64_t q = llrint(x * to_units[g][0] * to_units[g][1]);
      add_global(hash.at(units + g * len + within, place), q);
      if (g + 1 < GRIDS) x -= A(q) * from_units[g][0] * from_units[g][1];
    }
  }

  // The sum of slot i as a float, with what is not finite.
  __device__ __forceinline__ void finish(uint64_t i) const {
    A sum = 0;
#pragma unroll
    for (int g = GRIDS - 1; g >= 0; g--) sum += A(units[g * len + i]) * from_units[g][0] * from_units[g][1];
    grad_weight[i] += sum;
  }
};

// *largest = the largest finite |value|, which it is not above before. Positive floats are ordered as their bits are.
template <int THREADS, typename T>
__device__ __forceinline__ void find_largest(const T *values, uint64_t n, Acc<T> *largest) {
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
  for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(WARP, most, step));
  if (threadIdx.x % 32 == 0) atomicMax(reinterpret_cast<Bits *>(largest), most);
}
