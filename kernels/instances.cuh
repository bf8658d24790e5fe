// The table of kernels: pass x mode x how the hash is shared, for a dtype and a hash. build.rs makes a .cu file of each pass,
// hash and dtype, which has one line of the macros at the end: the driver translates a file as a whole when the first of its
// kernels is asked for, so a server that looks up f32 never pays for the rest.
//
//   affine       one value per access, every thread hashes
//   mix_scalar   the same for blocks that are no multiple of 16 bytes, or tensors that are not aligned
//   mix_share1   16 bytes per access; 1, 2 or 4 neighbouring threads share a block's hash
//   mix_share2
//   mix_share4
//   balanced_…   as mix_…; those that end in _plain are for plain bags (see for_each_batch)
#pragma once
#include "fixed.cuh"

// Threads of a block, as in src/op/cuda.rs: few, so that the next block starts as soon as one is done; many, where they share
// sums of hot slots.
constexpr int FORWARD_THREADS = 128;
constexpr int BACKWARD_THREADS = 512;
constexpr int MAX_BACKWARD_THREADS = 256;
constexpr int STRIDED_THREADS = 512;

template <Mode MODE>
constexpr int THREADS_OF = MODE == MAX ? MAX_BACKWARD_THREADS : BACKWARD_THREADS;

// So few registers that so many blocks are in flight. 16-bit values come eight at a time and need more of them.
template <typename T>
constexpr int FORWARD_BLOCKS = sizeof(T) == 2 ? 7 : 8;

#define FORWARD(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                            \
  FORWARD_KERNEL(mode, MODE, T, dtype, hash, Hash, V, SHARE, false)

#define FORWARD_PLAIN(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                      \
  FORWARD_KERNEL(mode, MODE, T, dtype, hash##_plain, Hash, V, SHARE, true)

#define FORWARD_KERNEL(mode, MODE, T, dtype, hash, Hash, V, SHARE, PLAIN)                                              \
  extern "C" __global__ void __launch_bounds__(FORWARD_THREADS, FORWARD_BLOCKS<T>)                                     \
      hashed_embedding_bag_fwd_##mode##_##dtype##_##hash(                                                              \
          const T *hashed_weight, const void *indices, const void *offsets, const int64_t *first_rows,                 \
          const T *per_sample_weights, T *out, Bags bags, Hash slots, uint32_t embedding_dim,  \
          uint32_t mean) {                                                                                             \
    forward<FORWARD_THREADS, MODE, V, SHARE, PLAIN>(hashed_weight, {indices, offsets, first_rows},       \
                                                    per_sample_weights, out, bags, slots, embedding_dim, mean);        \
  }

#define BACKWARD(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS_OF<MODE>) hashed_embedding_bag_bwd_##mode##_##dtype##_##hash(   \
      const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                          \
      const int64_t *first_rows, const T *per_sample_weights, Acc<T> *grad_weight, Bags bags, Hash slots,              \
      uint32_t embedding_dim, uint32_t mean, uint32_t grad_output_aligned) {                                           \
    /* Single values, and the one winner of a whole bag, seldom meet. */                                               \
    using Sums = FloatSums<THREADS_OF<MODE>, V, Acc<T>, MODE != MAX && (V > 1)>;                                       \
    __shared__ Sums::Lines lines;                                                                                      \
    Sums sums = {grad_weight, lines};                                                                                  \
    backward<THREADS_OF<MODE>, MODE, V, SHARE>(grad_output, hashed_weight, {indices, offsets, first_rows}, \
                                                  per_sample_weights, sums, bags, slots, embedding_dim, mean,          \
                                                  grad_output_aligned);                                                \
  }

#define BACKWARD_FIXED(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS_OF<MODE>)                                                       \
      hashed_embedding_bag_bwd_fixed_##mode##_##dtype##_##hash(                                                        \
          const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                      \
          const int64_t *first_rows, const T *per_sample_weights, Acc<T> *grad_weight, int64_t *units, uint64_t len,   \
          const Acc<T> *largest, uint32_t log2_terms, Bags bags, Hash slots, uint32_t embedding_dim, uint32_t mean,    \
          uint32_t grad_output_aligned) {                                                                              \
    FixedSums<V, Acc<T>> sums(grad_weight, units, len, largest, log2_terms);                                           \
    backward<THREADS_OF<MODE>, MODE, V, SHARE>(grad_output, hashed_weight,                                     \
                                                       {indices, offsets, first_rows}, per_sample_weights,    \
                                                       sums, bags, slots, embedding_dim, mean, grad_output_aligned);   \
  }

#define BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, hash, Hash, V)                                                           \
  extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS)                                                       \
      hashed_embedding_bag_bwd_per_sample_weights_##dtype##_##hash(                                                    \
          const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                      \
          const int64_t *first_rows, T *grad_weights, Bags bags, Hash slots, uint32_t embedding_dim,                   \
          uint32_t grad_output_aligned) {                                                                              \
    backward_per_sample_weights<BACKWARD_THREADS, V>(grad_output, hashed_weight,                                       \
                                                     {indices, offsets, first_rows}, grad_weights, bags,      \
                                                     slots, embedding_dim, grad_output_aligned);                       \
  }

#define MODES(PASS, ...)                                                                                               \
  PASS(sum, SUM, __VA_ARGS__)                                                                                          \
  PASS(weighted, WEIGHTED, __VA_ARGS__)                                                                                \
  PASS(max, MAX, __VA_ARGS__)

#define BLOCKS(PASS, T, dtype, hash, Hash, V)                                                                          \
  MODES(PASS, T, dtype, hash##_scalar, Hash, 1, 1)                                                                     \
  MODES(PASS, T, dtype, hash##_share1, Hash, V, 1)                                                                     \
  MODES(PASS, T, dtype, hash##_share2, Hash, V, 2)                                                                     \
  MODES(PASS, T, dtype, hash##_share4, Hash, V, 4)

#define FORWARD_AFFINE(T, dtype) MODES(FORWARD, T, dtype, affine, AffineSlots, 1, 1)

#define FORWARD_MIX(T, dtype) BLOCKS(FORWARD, T, dtype, mix, MixSlots, WIDE<T>)

#define FORWARD_BALANCED(T, dtype)                                                                                     \
  BLOCKS(FORWARD, T, dtype, balanced, BalancedSlots, WIDE<T>)                                                          \
  FORWARD_PLAIN(sum, SUM, T, dtype, balanced_share1, BalancedSlots, WIDE<T>, 1)                                        \
  FORWARD_PLAIN(sum, SUM, T, dtype, balanced_share2, BalancedSlots, WIDE<T>, 2)                                        \
  FORWARD_PLAIN(sum, SUM, T, dtype, balanced_share4, BalancedSlots, WIDE<T>, 4)                                        \
  FORWARD_PLAIN(max, MAX, T, dtype, balanced_share1, BalancedSlots, WIDE<T>, 1)                                        \
  FORWARD_PLAIN(max, MAX, T, dtype, balanced_share2, BalancedSlots, WIDE<T>, 2)                                        \
  FORWARD_PLAIN(max, MAX, T, dtype, balanced_share4, BalancedSlots, WIDE<T>, 4)

// Here a thread's access is as wide as its 16 bytes of gradient sums.
#define BACKWARD_AFFINE(T, dtype)                                                                                      \
  MODES(BACKWARD, T, dtype, affine, AffineSlots, 1, 1)                                                                 \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, affine, AffineSlots, 1)

#define BACKWARD_BLOCKS(T, dtype, hash, Hash)                                                                          \
  BLOCKS(BACKWARD, T, dtype, hash, Hash, WIDE<Acc<T>>)                                                                 \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, hash##_scalar, Hash, 1)                                                        \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, hash##_wide, Hash, WIDE<T>)

#define BACKWARD_MIX(T, dtype) BACKWARD_BLOCKS(T, dtype, mix, MixSlots)

#define BACKWARD_BALANCED(T, dtype) BACKWARD_BLOCKS(T, dtype, balanced, BalancedSlots)

#define DETERMINISTIC_AFFINE(T, dtype)                                                                                 \
  MODES(BACKWARD_FIXED, T, dtype, affine, AffineSlots, 1, 1)                                                           \
  FIXED_POINT(T, dtype)

// Integers are added one by one: a thread owns one column, so that a warp adds to neighbouring slots in one access. (Four
// columns per thread take 1.6 times as long.) The winners of max are few, and found as for floats.
#define DETERMINISTIC_BLOCKS(T, dtype, hash, Hash)                                                                     \
  MODES(BACKWARD_FIXED, T, dtype, hash##_scalar, Hash, 1, 1)                                                           \
  BACKWARD_FIXED(sum, SUM, T, dtype, hash##_scalar_share4, Hash, 1, 4)                                                 \
  BACKWARD_FIXED(weighted, WEIGHTED, T, dtype, hash##_scalar_share4, Hash, 1, 4)                                       \
  BACKWARD_FIXED(max, MAX, T, dtype, hash##_share1, Hash, WIDE<Acc<T>>, 1)                                             \
  BACKWARD_FIXED(max, MAX, T, dtype, hash##_share2, Hash, WIDE<Acc<T>>, 2)                                             \
  BACKWARD_FIXED(max, MAX, T, dtype, hash##_share4, Hash, WIDE<Acc<T>>, 4)                                             \
  FIXED_POINT(T, dtype)

#define DETERMINISTIC_MIX(T, dtype) DETERMINISTIC_BLOCKS(T, dtype, mix, MixSlots)

#define DETERMINISTIC_BALANCED(T, dtype) DETERMINISTIC_BLOCKS(T, dtype, balanced, BalancedSlots)

#define FIXED_POINT(T, dtype)                                                                                          \
  extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)                                                        \
      hashed_embedding_bag_largest_##dtype(const T *values, uint64_t n, Acc<T> *largest) {                             \
    find_largest<STRIDED_THREADS>(values, n, largest);                                                                 \
  }                                                                                                                    \
  extern "C" __global__ void __launch_bounds__(STRIDED_THREADS) hashed_embedding_bag_from_fixed_##dtype(               \
      Acc<T> *grad_weight, int64_t *units, uint64_t len, const Acc<T> *largest, uint32_t log2_terms) {                 \
    FixedSums<1, Acc<T>> sums(grad_weight, units, len, largest, log2_terms);                                           \
    uint64_t threads = uint64_t(gridDim.x) * STRIDED_THREADS;                                                          \
    for (uint64_t i = uint64_t(blockIdx.x) * STRIDED_THREADS + threadIdx.x; i < len; i += threads) sums.finish(i);     \
  }
