// How indices are divided into bags, and how threads are divided among them: the twin of the reading side of src/bags.rs.
//
// `lanes` neighbouring threads (a power of two, at most a warp) own one bag; each owns V consecutive columns. A warp works
// on 32 / lanes bags at a time and stays together: all its threads make as many steps as its longest bag needs.
#pragma once
#include "hash.cuh"

enum IndexType : uint32_t { U32, I32, I64 };

// The element at `i` of an index tensor. The type is resolved here, per index and uniformly, rather than by three times
// as many kernels: an index serves at least V columns.
__device__ __forceinline__ int64_t load_index(const void *indices, IndexType type, int64_t i) {
  if (type == I64) return static_cast<const int64_t *>(indices)[i];
  int32_t index = static_cast<const int32_t *>(indices)[i];
  return type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
}

constexpr uint32_t WARP = 0xFFFFFFFFu;

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

  // The indices of a bag, clamped into 0..nnz whatever the offsets say; none for a bag past the last.
  __device__ __forceinline__ Range range(const void *offsets, int64_t bag) const {
    if (bag >= num_bags) return {0, 0};
    if (num_offsets == 0) return {bag * bag_len, (bag + 1) * bag_len};
    int64_t start = clamp(load_index(offsets, offset_type, bag));
    int64_t end = bag + 1 < num_offsets ? clamp(load_index(offsets, offset_type, bag + 1)) : nnz;
    return {start, end < start ? start : end};
  }

  __device__ __forceinline__ int64_t row(const void *indices, int64_t i) const {
    return load_index(indices, index_type, i);
  }

  __device__ __forceinline__ bool is_padding(int64_t row) const { return has_padding && row == padding_idx; }

  // What divides the sum of a bag in mode mean: the number of its rows without padding, 1 when there is none. The whole
  // warp must call this together.
  template <typename A>
  __device__ __forceinline__ A divisor(const void *indices, Range range) const {
    int64_t count = range.end - range.start;
    if (has_padding) {
      count = 0;
      for (int64_t i = range.start + threadIdx.x % lanes; i < range.end; i += lanes)
        count += !is_padding(row(indices, i));
      for (uint32_t step = lanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(WARP, count, step, lanes);
    }
    return count > 0 ? A(count) : A(1);
  }

  // Calls f(bag) for each bag of this thread's group, the whole warp together: a bag may lie past the last.
  template <typename F>
  __device__ __forceinline__ void for_each(F f) const {
    uint32_t per_warp = 32 / lanes;
    int64_t warp = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    int64_t warps = int64_t(gridDim.x) * blockDim.x / 32;
    for (int64_t first = warp * per_warp; first < num_bags; first += warps * per_warp)
      f(first + threadIdx.x % 32 / lanes);
  }

  // The longest of the bags of the warp.
  __device__ __forceinline__ int64_t longest(int64_t length) const {
    for (uint32_t step = lanes; step < 32; step *= 2) {
      int64_t other = __shfl_xor_sync(WARP, length, step);
      length = other > length ? other : length;
    }
    return length;
  }

private:
  __device__ __forceinline__ int64_t clamp(int64_t offset) const {
    return offset < 0 ? 0 : offset > nnz ? nnz : offset;
  }
};

// How many rows are in flight per thread: enough independent loads to cover a trip to the L2.
constexpr int BATCH = 4;

// Whether every place of a batch is one.
struct All {
  static constexpr bool all = true;
};
struct Some {
  static constexpr bool all = false;
};

// Calls f(places, i, All or Some) for each BATCH of indices i, i + 1, … of a bag: where the block of columns `column_part`
// of those rows lies, none for padding and past the end. The whole warp must call this together.
//
// SHARE neighbouring threads own columns of the same block, so each hashes only every SHARE-th row and the places are
// passed around. Batches that are full in every bag of the warp come first and need no test per row; there the rows of the
// next batch are fetched before the values of this one, so that neither waits for the other.
template <int SHARE, typename Hash, typename F>
__device__ __forceinline__ void for_each_batch(const Bags &bags, const Hash &hash, const void *indices, Range range,
                                               uint64_t column_part, F f) {
  using Place = typename Hash::Place;
  constexpr int OWN = BATCH / SHARE;
  // Kept, where the compiler would rather compute it again for every batch.
  asm volatile("" : "+l"(column_part));
  int64_t length = range.end - range.start;
  int64_t longest = bags.longest(length);
  int64_t shortest = -bags.longest(-length);
  int64_t full = bags.has_padding ? 0 : shortest / BATCH;
  uint32_t batches = full < 0x7FFFFFFF ? uint32_t(full) : 0x7FFFFFFF;
  int64_t first = range.start + threadIdx.x % SHARE;
  Place places[BATCH];
  auto share = [&](const Place(&own)[OWN]) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) places[j] = SHARE == 1 ? own[j] : shuffle(WARP, own[j / SHARE], j % SHARE, SHARE);
  };

  if (batches > 0) {
    bool wide = bags.index_type == I64;
    uint32_t sign_mask = bags.index_type == U32 ? 0 : ~0u;
    int64_t stride = wide ? 8 : 4;
    const char *next = static_cast<const char *>(indices) + first * stride;
    int64_t rows[OWN];
    auto fetch = [&]() {
#pragma unroll
      for (int s = 0; s < OWN; s++) {
        const char *at = next + s * SHARE * stride;
        if (wide) {
          rows[s] = *reinterpret_cast<const int64_t *>(at);
        } else {
          int32_t low = *reinterpret_cast<const int32_t *>(at);
          rows[s] = int64_t(uint64_t(uint32_t(low >> 31) & sign_mask) << 32 | uint32_t(low));
        }
      }
      next += BATCH * stride;
    };
    fetch();
    for (uint32_t batch = 0; batch < batches; batch++) {
      Place own[OWN];
#pragma unroll
      for (int s = 0; s < OWN; s++) own[s] = hash.locate(uint64_t(rows[s]), column_part);
      if (batch + 1 < batches) fetch();
      share(own);
      f(places, range.start + int64_t(batch) * BATCH, All());
    }
  }
  for (int64_t i = int64_t(batches) * BATCH; i < longest; i += BATCH) {
    Place own[OWN];
#pragma unroll
    for (int s = 0; s < OWN; s++) {
      int64_t position = first + i + s * SHARE;
      own[s] = Place::none();
      if (position < range.end) {
        int64_t row = bags.row(indices, position);
        if (!bags.is_padding(row)) own[s] = hash.locate(uint64_t(row), column_part);
      }
    }
    share(own);
    f(places, range.start + i, Some());
  }
}
