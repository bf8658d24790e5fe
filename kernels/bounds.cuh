// Detects offsets and rows that are out of range. If there are any, the checks in src/bounds.rs, its twin, find out
// what is wrong and where.
//
// The kernel runs before the lookup, so that the host waits for the check and not for the lookup, which is safe for any
// input. Each thread strides over offsets and indices, or each warp over bags.
#pragma once
#include "bags.cuh"

// Sets *out_of_range to 1 if an offset breaks the contract (the first is 0, none decreases, none exceeds nnz), or if a
// row of a bag is neither padding nor in its table.
__device__ __forceinline__ void check_bounds(const void *indices, const void *offsets, const TableRows *table_rows,
                                             uint32_t *out_of_range, BagParams bags) {
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
  if (table_rows == nullptr) {
    // With one feature it does not matter which bag an index is in.
    int64_t end = bags.end(offsets);
    TableRows table = bags.table(table_rows, 0);
#pragma unroll 4
    for (int64_t i = thread; i < end; i += threads) check(i, table);
  } else {
    for (int64_t bag = thread / 32; bag < bags.num_bags; bag += threads / 32) {
      Range range = bags.range(offsets, bag);
      TableRows table = bags.table(table_rows, bag);
#pragma unroll 4
      for (int64_t i = range.start + thread % 32; i < range.end; i += 32) check(i, table);
    }
  }
  if (is_bad) *out_of_range = 1;
}

#define CHECK_BOUNDS_KERNEL(NAME, THREADS)                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                          \
      const void *indices, const void *offsets, const TableRows *table_rows, uint32_t *out_of_range, BagParams bags) { \
    check_bounds(indices, offsets, table_rows, out_of_range, bags);                                                    \
  }
