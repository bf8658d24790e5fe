// How indices are divided into bags, and which table each bag looks into: the twin of src/bags.rs.
#pragma once
#include "hash.cuh"

constexpr uint32_t FULL_WARP = 0xFFFFFFFFu;

// Element `i` of an index tensor. The dtype is resolved here, for each index and uniformly within a warp, instead of by
// three times as many kernels; it is cheap because one index serves several columns.
__device__ __forceinline__ int64_t load_index(const void *indices, IndexType type, int64_t i) {
  if (type == I64) return static_cast<const int64_t *>(indices)[i];
  int32_t index = static_cast<const int32_t *>(indices)[i];
  return type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
}

struct Range {
  int64_t start, end;
};

// The rows of one table within the virtual table; Tables::table_rows in src/tables.rs writes it as two 64-bit integers.
struct TableRows {
  int64_t first;
  uint64_t count;
};

// The tensors that tell what to look up.
struct Inputs {
  const void *indices;
  const void *offsets;          // null: bags of bag_len indices
  const TableRows *table_rows;  // of the table of each feature; null: one feature
};

// How `nnz` indices are divided into bags, and how threads are divided among the bags; passed by value.
struct BagParams {
  int64_t nnz;
  int64_t num_bags;
  int64_t num_offsets;  // 0: bags of bag_len indices
  int64_t bag_len;
  int64_t padding_idx;
  int64_t first_row;  // if there is one feature: the first row of its table, and its number of rows
  int64_t num_embeddings;
  int64_t feature_stride;  // bags per feature where offsets are in feature-major order, else 0
  Divisor features;
  uint32_t has_padding;
  uint32_t lanes;           // threads that share a bag: a power of two, at most a warp
  uint32_t bags_per_group;  // consecutive bags of `lanes` threads
  IndexType index_type;
  IndexType offset_type;

  // The position in `offsets` at which the start of a bag is stored.
  __device__ __forceinline__ int64_t offset_position(int64_t bag) const {
    if (feature_stride == 0) return bag;
    int64_t feature = features.rem(bag);
    return feature * feature_stride + features.div(bag);
  }

  // The range of a bag's indices, clamped to 0..nnz whatever the offsets are.
  __device__ __forceinline__ Range range(const void *offsets, int64_t bag) const {
    if (num_offsets == 0) return {bag * bag_len, (bag + 1) * bag_len};
    int64_t at = offset_position(bag);
    int64_t start = clamp(load_index(offsets, offset_type, at));
    int64_t end = at + 1 < num_offsets ? clamp(load_index(offsets, offset_type, at + 1)) : nnz;
    return {start, end < start ? start : end};
  }

  // The end of the last bag.
  __device__ __forceinline__ int64_t end(const void *offsets) const {
    if (num_offsets == 0) return num_bags * bag_len;
    return num_offsets > num_bags ? clamp(load_index(offsets, offset_type, num_bags)) : nnz;
  }

  // The table that a bag looks into.
  __device__ __forceinline__ TableRows table(const TableRows *table_rows, int64_t bag) const {
    if (table_rows == nullptr) return {first_row, uint64_t(num_embeddings)};
    return table_rows[features.rem(bag)];
  }

  __device__ __forceinline__ int64_t row(const void *indices, int64_t i) const {
    return load_index(indices, index_type, i);
  }

  // Extends an index of 64 or 32 bits to a row.
  __device__ __forceinline__ int64_t extend(int64_t index) const { return index; }
  __device__ __forceinline__ int64_t extend(int32_t index) const {
    return index_type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
  }

  __device__ __forceinline__ bool is_padding(int64_t row) const { return has_padding && row == padding_idx; }

  // The divisor of the sum of a bag in mode mean: the number of its rows that are not padding, or 1 if there are none.
  // The threads of a bag must call this together.
  template <typename A>
  __device__ __forceinline__ A divisor(const void *indices, Range range) const {
    int64_t count = range.end - range.start;
    if (has_padding) {
      count = 0;
      for (int64_t i = range.start + threadIdx.x % lanes; i < range.end; i += lanes)
        count += !is_padding(row(indices, i));
      uint32_t group = (lanes == 32 ? FULL_WARP : (1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes);
      for (uint32_t step = lanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(group, count, step, lanes);
    }
    return count > 0 ? A(count) : A(1);
  }

private:
  __device__ __forceinline__ int64_t clamp(int64_t offset) const {
    return offset < 0 ? 0 : offset > nnz ? nnz : offset;
  }
};
CHECK_LAYOUT(BagParams);
