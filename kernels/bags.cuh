// How indices are divided into bags, and how threads are divided among them: the twin of the reading side of src/bags.rs.
//
// `lanes` neighbouring threads (a power of two, at most a warp) own one bag; each owns V consecutive columns.
#pragma once
#include "hash.cuh"

enum IndexType : uint32_t { U32, I32, I64 };

// The element at `i` of an index tensor. The type is resolved here, per index and uniformly, rather than by three times
// as many kernels: an index serves at least V columns.
__device__ __forceinline__ int64_t load_index(const void *indices, IndexType type, int64_t i) {
  switch (type) {
  case U32:
    return static_cast<const uint32_t *>(indices)[i];
  case I32:
    return static_cast<const int32_t *>(indices)[i];
  default:
    return static_cast<const int64_t *>(indices)[i];
  }
}

struct Range {
  int64_t start, end;
};

// The division of `nnz` indices into bags; passed by value, twin of BagParams in src/op/cuda.rs.
struct Bags {
  int64_t nnz;
  int64_t num_bags;
  int64_t num_offsets;  // 0: bags of bag_len indices
  int64_t bag_len;
  int64_t padding_idx;
  uint32_t has_padding;
  uint32_t lanes;
  IndexType index_type;
  IndexType offset_type;

  // The indices of a bag, clamped into 0..nnz whatever the offsets say.
  __device__ __forceinline__ Range range(const void *offsets, int64_t bag) const {
    if (num_offsets == 0) return {bag * bag_len, (bag + 1) * bag_len};
    int64_t start = clamp(load_index(offsets, offset_type, bag));
    int64_t end = bag + 1 < num_offsets ? clamp(load_index(offsets, offset_type, bag + 1)) : nnz;
    return {start, end};
  }

  __device__ __forceinline__ int64_t row(const void *indices, int64_t i) const {
    return load_index(indices, index_type, i);
  }

  __device__ __forceinline__ bool is_padding(int64_t row) const { return has_padding && row == padding_idx; }

  // The number of rows of a bag, without padding. Called by all lanes of the bag together.
  __device__ __forceinline__ int64_t count(const void *indices, Range range, uint32_t mask) const {
    if (!has_padding) return range.end > range.start ? range.end - range.start : 0;
    int64_t count = 0;
    for (int64_t i = range.start + threadIdx.x % lanes; i < range.end; i += lanes)
      count += !is_padding(row(indices, i));
    for (uint32_t step = lanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(mask, count, step, lanes);
    return count;
  }

  // The threads of the warp that share this thread's bag.
  __device__ __forceinline__ uint32_t mask() const {
    uint32_t first = (threadIdx.x % 32) & ~(lanes - 1);
    return (lanes == 32 ? 0xFFFFFFFFu : (1u << lanes) - 1) << first;
  }

  // Calls f(bag) for each bag of this thread's group.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    int64_t group = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / lanes;
    int64_t groups = int64_t(gridDim.x) * blockDim.x / lanes;
    for (int64_t bag = group; bag < num_bags; bag += groups) f(bag);
  }

private:
  __device__ __forceinline__ int64_t clamp(int64_t offset) const {
    return offset < 0 ? 0 : offset > nnz ? nnz : offset;
  }
};

// How many rows are in flight per thread: enough independent loads to cover a trip to the L2.
constexpr int BATCH = 4;

// Calls f(places, i) for each BATCH of indices i, i + 1, … of a bag: where the block of columns `column_part` of those
// rows lies, none for padding and past the end.
//
// SHARE neighbouring threads own columns of the same block, so each hashes only every SHARE-th row and the places are
// passed around. All lanes of the bag must call this together.
template <int SHARE, typename Hash, typename F>
__device__ __forceinline__ void for_each_batch(const Bags &bags, const Hash &hash, const void *indices, Range range,
                                               uint64_t column_part, uint32_t mask, F f) {
  using Place = typename Hash::Place;
  for (int64_t i = range.start; i < range.end; i += BATCH) {
    Place own[BATCH / SHARE];
#pragma unroll
    for (int s = 0; s < BATCH / SHARE; s++) {
      int64_t position = i + s * SHARE + threadIdx.x % SHARE;
      own[s] = Place::none();
      if (position < range.end) {
        int64_t row = bags.row(indices, position);
        if (!bags.is_padding(row)) own[s] = hash.locate(uint64_t(row), column_part);
      }
    }
    Place places[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++)
      places[j] = SHARE == 1 ? own[j] : shuffle(mask, own[j / SHARE], j % SHARE, SHARE);
    f(places, i);
  }
}
