// The contiguous copy of a strided index tensor. One thread owns one position.
#include <cstdint>

constexpr int STRIDED_THREADS = 512;

// The shape and strides of a tensor; twin of Strides in src/op/cuda.rs.
struct Strides {
  int64_t dims[8];
  int64_t strides[8];
  uint32_t rank;
};

// to[i] = element i, in row-major order, of the strided tensor `from`.
extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)
    hashed_embedding_bag_copy_i32(const int32_t *from, int32_t *to, int64_t n, Strides shape) {
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
