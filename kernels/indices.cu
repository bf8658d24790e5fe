// What is done to index tensors beside the lookups: bounds checks, and the copy that makes one contiguous.
// One thread owns one position.
#include "bags.cuh"

constexpr int THREADS = 256;

// Calls f(i) for each of n positions.
template <typename F>
__device__ __forceinline__ void for_each_position(int64_t n, F f) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += threads) f(i);
}

// first_bad is zero when all is well, else the number of positions counted from the first bad one to the end, which makes
// "first" an atomic maximum and "none" what zeroed memory holds.
__device__ __forceinline__ void report(unsigned long long *first_bad, int64_t n, int64_t position) {
  atomicMax(first_bad, static_cast<unsigned long long>(n - position));
}

// Rows lie in 0..num_embeddings or are padding.
extern "C" __global__ void __launch_bounds__(THREADS)
    hashed_embedding_bag_check_rows(const void *indices, Bags bags, int64_t num_embeddings,
                                    unsigned long long *first_bad) {
  for_each_position(bags.nnz, [&](int64_t i) {
    int64_t row = bags.row(indices, i);
    if ((row < 0 || row >= num_embeddings) && !bags.is_padding(row)) report(first_bad, bags.nnz, i);
  });
}

// The first offset is 0, none decreases, none passes nnz.
extern "C" __global__ void __launch_bounds__(THREADS)
    hashed_embedding_bag_check_offsets(const void *offsets, Bags bags, unsigned long long *first_bad) {
  for_each_position(bags.num_offsets, [&](int64_t i) {
    int64_t offset = load_index(offsets, bags.offset_type, i);
    int64_t lowest = i == 0 ? 0 : load_index(offsets, bags.offset_type, i - 1);
    bool bad = offset < lowest || offset > bags.nnz || (i == 0 && offset != 0);
    if (bad) report(first_bad, bags.num_offsets, i);
  });
}

// The shape and strides of a tensor; twin of Strides in src/op/cuda.rs.
struct Strides {
  int64_t dims[8];
  int64_t strides[8];
  uint32_t rank;
};

// to[i] = element i, in row-major order, of the strided tensor `from`.
extern "C" __global__ void __launch_bounds__(THREADS)
    hashed_embedding_bag_copy_i32(const int32_t *from, int32_t *to, int64_t n, Strides shape) {
  for_each_position(n, [&](int64_t i) {
    int64_t at = 0;
    int64_t rest = i;
    for (int d = int(shape.rank) - 1; d >= 0; d--) {
      at += rest % shape.dims[d] * shape.strides[d];
      rest /= shape.dims[d];
    }
    to[i] = from[at];
  });
}
