// Makes a contiguous copy of a strided i32 tensor, for which candle has no kernel. Each thread strides over elements.
#pragma once
#include <cstddef>
#include <cstdint>

#include "constants.cuh"

// The shape and strides of a tensor, in elements.
struct Strides {
  int64_t dims[MAX_RANK];
  int64_t strides[MAX_RANK];
  uint32_t rank;
};
CHECK_LAYOUT(Strides);

// to[i] = element i, in row-major order, of the strided tensor `from`.
__device__ __forceinline__ void copy_strided(const int32_t *from, int32_t *to, int64_t n, const Strides &shape) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) {
    int64_t at = 0;
    int64_t rest = i;
    for (int d = int(shape.rank) - 1; d >= 0; d--) {
      at += rest % shape.dims[d] * shape.strides[d];
      rest /= shape.dims[d];
    }
    to[i] = from[at];
  }
}

#define COPY_I32_KERNEL(NAME, THREADS)                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(const int32_t *from, int32_t *to, int64_t n, Strides shape) {                                               \
    copy_strided(from, to, n, shape);                                                                                  \
  }
