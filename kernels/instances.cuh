// The table of kernels: pass x mode x how the hash is shared, for a dtype. Included by one .cu file per pass and dtype,
// because the driver translates a file as a whole when the first of its kernels is asked for: a server that looks up f32
// never pays for the rest.
//
//   affine      one value per access, every thread hashes
//   mix_scalar  the same for blocks that are no multiple of 16 bytes, or tensors that are not aligned
//   mix_share1  16 bytes per access; 1, 2 or 4 neighbouring threads share a block's hash
//   mix_share2
//   mix_share4
#pragma once
#include "backward.cuh"

constexpr int THREADS = 256;

#define FORWARD(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS) hashed_embedding_bag_fwd_##mode##_##dtype##_##hash(           \
      const T *hashed_weight, const void *indices, const void *offsets, const T *per_sample_weights, T *out, Bags bags, \
      Hash slots, uint32_t embedding_dim, uint32_t mean) {                                                            \
    forward<MODE, V, SHARE>(hashed_weight, indices, offsets, per_sample_weights, out, bags, slots, embedding_dim,     \
                            mean);                                                                                    \
  }

#define BACKWARD(mode, MODE, T, dtype, hash, Hash, V, SHARE)                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS) hashed_embedding_bag_bwd_##mode##_##dtype##_##hash(           \
      const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                         \
      const T *per_sample_weights, Acc<T> *grad_weight, Bags bags, Hash slots, uint32_t embedding_dim, uint32_t mean, \
      uint32_t grad_output_aligned) {                                                                                 \
    backward<MODE, V, SHARE>(grad_output, hashed_weight, indices, offsets, per_sample_weights, grad_weight, bags,     \
                             slots, embedding_dim, mean, grad_output_aligned);                                        \
  }

#define BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, hash, Hash, V)                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      hashed_embedding_bag_bwd_per_sample_weights_##dtype##_##hash(                                                   \
          const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets, T *grad_weights,    \
          Bags bags, Hash slots, uint32_t embedding_dim, uint32_t grad_output_aligned) {                              \
    backward_per_sample_weights<V>(grad_output, hashed_weight, indices, offsets, grad_weights, bags, slots,           \
                                   embedding_dim, grad_output_aligned);                                               \
  }

#define MODES(PASS, ...)                                                                                              \
  PASS(sum, SUM, __VA_ARGS__)                                                                                         \
  PASS(weighted, WEIGHTED, __VA_ARGS__)                                                                               \
  PASS(max, MAX, __VA_ARGS__)

#define HASHES(PASS, T, dtype, V)                                                                                     \
  MODES(PASS, T, dtype, affine, AffineSlots, 1, 1)                                                                    \
  MODES(PASS, T, dtype, mix_scalar, MixSlots, 1, 1)                                                                   \
  MODES(PASS, T, dtype, mix_share1, MixSlots, V, 1)                                                                   \
  MODES(PASS, T, dtype, mix_share2, MixSlots, V, 2)                                                                   \
  MODES(PASS, T, dtype, mix_share4, MixSlots, V, 4)

#define FORWARD_INSTANCES(T, dtype) HASHES(FORWARD, T, dtype, WIDE<T>)

// Here a thread's access is as wide as its 16 bytes of gradient sums.
#define BACKWARD_INSTANCES(T, dtype)                                                                                  \
  HASHES(BACKWARD, T, dtype, WIDE<Acc<T>>)                                                                            \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, affine, AffineSlots, 1)                                                       \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, mix_scalar, MixSlots, 1)                                                      \
  BACKWARD_PER_SAMPLE_WEIGHTS(T, dtype, mix_wide, MixSlots, WIDE<T>)
