// What is done to tensors of indices: one is checked, or copied. Each thread strides over elements.
#include "bags.cuh"

constexpr int STRIDED_THREADS = 512;

// Sets out_of_range to 1 where an offset breaks the contract (the first is 0, none decreases, none passes nnz), or a row of a
// bag is neither padding nor in its table: the twin of check_offsets and check_rows of src/bags.rs.
//
// It comes before the lookup, which is safe whatever it is given, so that the host can wait for this and not for that.
extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)
    hashed_embedding_bag_check(const void *indices, const void *offsets, const int64_t *first_rows,
                               uint32_t *out_of_range, Bags bags) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x;
  int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  bool is_bad = false;
  for (int64_t at = thread; at < bags.num_offsets; at += threads) {
    int64_t offset = load_index(offsets, bags.offset_type, at);
    int64_t before = at > 0 ? load_index(offsets, bags.offset_type, at - 1) : 0;
    is_bad |= offset < before || offset > bags.nnz || (at == 0 && offset != 0);
  }
  auto check = [&](int64_t i, TableRows table) {
    int64_t row = bags.row(indices, i);
    is_bad |= uint64_t(row) >= table.count && !bags.is_padding(row);
  };
  if (first_rows == nullptr) {
    // One table: it does not matter which bag an index is in.
    int64_t end = bags.end(offsets);
    TableRows table = bags.table(first_rows, 0);
#pragma unroll 4
    for (int64_t i = thread; i < end; i += threads) check(i, table);
  } else {
    for (int64_t bag = thread / 32; bag < bags.num_bags; bag += threads / 32) {
      Range range = bags.range(offsets, bag);
      TableRows table = bags.table(first_rows, bag);
#pragma unroll 4
      for (int64_t i = range.start + thread % 32; i < range.end; i += 32) check(i, table);
    }
  }
  if (is_bad) *out_of_range = 1;
}

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
