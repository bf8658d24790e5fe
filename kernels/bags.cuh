// How indices are divided into bags, which table each bag looks into, and how threads are divided among bags: the twin of
// the reading side of src/bags.rs.
//
// `lanes` neighbouring threads (a power of two, at most a warp) are a group; each owns V consecutive columns. A group walks
// through `bags_per_group` consecutive bags, BATCH rows at a time; the warp stays together, but its groups may be in
// different bags. A bag too long for one group is left to all groups of the thread block together, afterwards.
#pragma once
#include "hash.cuh"

constexpr uint32_t WARP = 0xFFFFFFFFu;

// How many rows are in flight per thread: enough independent loads to cover a trip to the L2.
constexpr int BATCH = 4;

// A bag of more indices is worked on by a whole thread block.
constexpr int64_t LONG_BAG = 256;

enum IndexType : uint32_t { U32, I32, I64 };

// The element at `i` of an index tensor. The type is resolved here, per index and uniformly, rather than by three times
// as many kernels: an index serves at least V columns.
__device__ __forceinline__ int64_t load_index(const void *indices, IndexType type, int64_t i) {
  if (type == I64) return static_cast<const int64_t *>(indices)[i];
  int32_t index = static_cast<const int32_t *>(indices)[i];
  return type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
}

struct Range {
  int64_t start, end;
};

// The rows of one table within the virtual table.
struct TableRows {
  int64_t first;
  uint64_t count;
};

// The tensors that say what is looked up.
struct Inputs {
  const void *indices;
  const void *offsets;        // null: bags of bag_len indices
  const int64_t *first_rows;  // (tables + 1,); null: one table
};

// The division of `nnz` indices into bags; passed by value, twin of BagParams in src/op/cuda.rs.
struct Bags {
  int64_t nnz;
  int64_t num_bags;
  int64_t num_offsets;  // 0: bags of bag_len indices
  int64_t bag_len;
  int64_t padding_idx;
  int64_t first_row;  // of the only table
  int64_t num_embeddings;
  int64_t feature_stride;  // the bags of each table, when their offsets are in feature-major order; else 0
  Divisor tables;
  uint32_t has_padding;
  uint32_t lanes;
  uint32_t bags_per_group;
  IndexType index_type;
  IndexType offset_type;

  // Where the offset of a bag stands.
  __device__ __forceinline__ int64_t place(int64_t bag) const {
    if (feature_stride == 0) return bag;
    int64_t table = tables.rem(bag);
    return table * feature_stride + tables.div(bag);
  }

  // The indices of a bag, clamped into 0..nnz whatever the offsets say.
  __device__ __forceinline__ Range range(const void *offsets, int64_t bag) const {
    if (num_offsets == 0) return {bag * bag_len, (bag + 1) * bag_len};
    int64_t at = place(bag);
    int64_t start = clamp(load_index(offsets, offset_type, at));
    int64_t end = at + 1 < num_offsets ? clamp(load_index(offsets, offset_type, at + 1)) : nnz;
    return {start, end < start ? start : end};
  }

  // Where the last bag ends.
  __device__ __forceinline__ int64_t end(const void *offsets) const {
    if (num_offsets == 0) return num_bags * bag_len;
    return num_offsets > num_bags ? clamp(load_index(offsets, offset_type, num_bags)) : nnz;
  }

  // The table a bag looks into.
  __device__ __forceinline__ TableRows table(const int64_t *first_rows, int64_t bag) const {
    if (first_rows == nullptr) return {first_row, uint64_t(num_embeddings)};
    int64_t t = tables.rem(bag);
    return {first_rows[t], uint64_t(first_rows[t + 1] - first_rows[t])};
  }

  __device__ __forceinline__ int64_t row(const void *indices, int64_t i) const {
    return load_index(indices, index_type, i);
  }

  // An index of 64 or 32 bits as a row.
  __device__ __forceinline__ int64_t extend(int64_t index) const { return index; }
  __device__ __forceinline__ int64_t extend(int32_t index) const {
    return index_type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
  }

  __device__ __forceinline__ bool is_padding(int64_t row) const { return has_padding && row == padding_idx; }

  // What divides the sum of a bag in mode mean: the number of its rows without padding, 1 when there is none. A group must
  // call this together.
  template <typename A>
  __device__ __forceinline__ A divisor(const void *indices, Range range) const {
    int64_t count = range.end - range.start;
    if (has_padding) {
      count = 0;
      for (int64_t i = range.start + threadIdx.x % lanes; i < range.end; i += lanes)
        count += !is_padding(row(indices, i));
      uint32_t group = (lanes == 32 ? WARP : (1u << lanes) - 1) << (threadIdx.x % 32 / lanes * lanes);
      for (uint32_t step = lanes / 2; step > 0; step /= 2) count += __shfl_xor_sync(group, count, step, lanes);
    }
    return count > 0 ? A(count) : A(1);
  }

private:
  __device__ __forceinline__ int64_t clamp(int64_t offset) const {
    return offset < 0 ? 0 : offset > nnz ? nnz : offset;
  }
};

// Whether every place of a batch is one.
struct All {
  static constexpr bool all = true;
};
struct Some {
  static constexpr bool all = false;
};

// See for_each_batch. A thread block has THREADS threads. SHARE neighbouring threads own columns of the same block, so each
// hashes only every SHARE-th row and the places are passed around.
template <int THREADS, int SHARE, typename Hash>
struct Walk {
  using Place = typename Hash::Place;
  static constexpr int OWN = BATCH / SHARE;

  const Bags &bags;
  const Hash &hash;
  const Inputs &inputs;
  uint32_t run;  // the number of the block of columns

  __device__ __forceinline__ int64_t block_first() const {
    return int64_t(blockIdx.x) * (THREADS / bags.lanes * bags.bags_per_group);
  }

  // The rows of this thread among those of a batch that starts at `first`, of which `left` are there, unless ALL are.
  template <bool ALL>
  __device__ __forceinline__ void fetch(const char *first, uint32_t left, int64_t (&rows)[OWN]) const {
    bool wide = bags.index_type == I64;
#pragma unroll
    for (int s = 0; s < OWN; s++) {
      rows[s] = 0;
      if (!ALL && threadIdx.x % SHARE + s * SHARE >= left) continue;
      if (wide) {
        rows[s] = reinterpret_cast<const int64_t *>(first)[s * SHARE];
      } else {
        int32_t index = reinterpret_cast<const int32_t *>(first)[s * SHARE];
        rows[s] = bags.index_type == U32 ? int64_t(uint32_t(index)) : int64_t(index);
      }
    }
  }

  // Where fetch starts.
  __device__ __forceinline__ const char *first(int64_t position) const {
    return static_cast<const char *>(inputs.indices) + (position + threadIdx.x % SHARE) * stride();
  }

  __device__ __forceinline__ int64_t stride() const { return bags.index_type == I64 ? 8 : 4; }

  // The places of this thread's rows of a batch of which `left` are there.
  __device__ __forceinline__ void locate(const int64_t (&rows)[OWN], uint32_t left, typename Hash::Part part,
                                         Place (&own)[OWN]) const {
#pragma unroll
    for (int s = 0; s < OWN; s++) {
      bool is_row = threadIdx.x % SHARE + s * SHARE < left && !bags.is_padding(rows[s]);
      own[s] = is_row ? hash.locate(uint64_t(rows[s]), part) : Place::none();
    }
  }

  // The places of a batch, of all threads that share.
  __device__ __forceinline__ void share(const Place (&own)[OWN], Place (&places)[BATCH]) const {
#pragma unroll
    for (int j = 0; j < BATCH; j++)
      places[j] = SHARE == 1 ? own[j] : shuffle(WARP, own[j / SHARE], j % SHARE, SHARE);
  }

  // Bags of one length, up to LONG_BAG, and one table, without padding: whole batches need no test per row, and run on from
  // bag to bag if nothing is left between them.
  template <typename Index, typename Work>
  __device__ __forceinline__ void plain_bags(Work &work) const {
    int64_t first_bag = block_first() + threadIdx.x / bags.lanes * bags.bags_per_group;
    uint32_t mine = uint32_t(max(min(bags.num_bags - first_bag, int64_t(bags.bags_per_group)), int64_t(0)));
    typename Hash::Part part = hash.shift(hash.part(run), bags.first_row);
    uint32_t full = uint32_t(bags.bag_len) / BATCH, tail = uint32_t(bags.bag_len) % BATCH;

    Index rows[OWN];
    const Index *from = nullptr;
    uint32_t next = 0, last = 0;
    // Rows are fetched a batch ahead; the last ones twice.
    auto fetch_next = [&] {
#pragma unroll
      for (int s = 0; s < OWN; s++) rows[s] = from[next + s * SHARE];
      next = min(next + BATCH, last);
    };
    for (uint32_t b = 0; b < bags.bags_per_group; b++) {
      // The warp stays together: past the last bag, that one is looked up once more, for nothing.
      int64_t bag = min(first_bag + b, bags.num_bags - 1);
      if (b >= mine) work.columns.n = 0;
      int64_t start = bag * bags.bag_len;
      work.begin(bag);
      if (full > 0 && (b == 0 || tail > 0)) {
        from = static_cast<const Index *>(inputs.indices) + start + threadIdx.x % SHARE;
        next = 0;
        last = ((tail > 0 ? full : full * max(mine, 1u)) - 1) * BATCH;
        fetch_next();
      }
      for (uint32_t batch = 0; batch < full; batch++) {
        Place own[OWN], places[BATCH];
#pragma unroll
        for (int s = 0; s < OWN; s++) own[s] = hash.locate(uint64_t(bags.extend(rows[s])), part);
        fetch_next();
        share(own, places);
        work.load(places, All());
        work.use(places, start + batch * BATCH, All());
      }
      if (tail > 0) {
        int64_t rest[OWN];
        Place own[OWN], places[BATCH];
        fetch<false>(first(start + full * BATCH), tail, rest);
        locate(rest, tail, part, own);
        share(own, places);
        work.load(places, Some());
        work.use(places, start + full * BATCH, Some());
      }
      work.end(bag);
    }
  }

  // The whole warp makes as many steps as the longest of its bags needs. Batches that are full in every bag of the warp come
  // first and need no test per row.
  template <typename Work>
  __device__ __forceinline__ void own_bags(Work &work) const {
    int64_t rows[OWN];
    const char *fetched = nullptr;  // where `rows` come from
    int64_t bag = block_first() + threadIdx.x / bags.lanes * bags.bags_per_group;
    // Bags of one length need no comparing, but for those that do not exist.
    bool differ = bags.num_offsets > 0 || block_first() + THREADS / bags.lanes * bags.bags_per_group > bags.num_bags;
    for (uint32_t b = 0; b < bags.bags_per_group; b++, bag++) {
      bool is_mine = bag < bags.num_bags;
      Range range = is_mine ? bags.range(inputs.offsets, bag) : Range{0, 0};
      if (range.end - range.start > LONG_BAG) {
        is_mine = false;
        range.end = range.start;
      }
      TableRows table = bags.table(inputs.first_rows, bag);
      typename Hash::Part part = hash.shift(hash.part(run), table.first);
      if (is_mine) work.begin(bag);

      uint32_t length = uint32_t(range.end - range.start);
      uint32_t shortest = length, longest = length;
      for (uint32_t step = bags.lanes; differ && step < 32; step *= 2) {
        shortest = min(shortest, __shfl_xor_sync(WARP, shortest, step));
        longest = max(longest, __shfl_xor_sync(WARP, longest, step));
      }
      uint32_t full = bags.has_padding ? 0 : shortest / BATCH;
      // Rows are fetched a batch ahead, past the end of this bag too: most often, those are the next bag's.
      bool runs_on = range.end + BATCH <= bags.nnz;
      const char *next = first(range.start);
      if (full > 0 && next != fetched) fetch<true>(next, BATCH, rows);
      for (uint32_t batch = 0; batch < full; batch++) {
        Place own[OWN], places[BATCH];
#pragma unroll
        for (int s = 0; s < OWN; s++) own[s] = hash.locate(uint64_t(rows[s]), part);
        next += BATCH * stride();
        if (batch + 1 < full || runs_on) {
          fetch<true>(next, BATCH, rows);
          fetched = next;
        }
        share(own, places);
        work.load(places, All());
        work.use(places, range.start + batch * BATCH, All());
      }
      for (uint32_t i = full * BATCH; i < longest; i += BATCH) {
        uint32_t left = max(length, i) - i;
        Place own[OWN], places[BATCH];
        fetch<false>(first(range.start + i), left, rows);
        fetched = nullptr;
        locate(rows, left, part, own);
        share(own, places);
        work.load(places, Some());
        work.use(places, range.start + i, Some());
      }
      if (is_mine) work.end(bag);
    }
  }

  template <typename Work>
  __device__ __forceinline__ void long_bags(Work &work) const {
    __shared__ int64_t next_long;
    uint32_t groups = THREADS / bags.lanes;
    uint32_t group = threadIdx.x / bags.lanes;
    int64_t last = min(block_first() + groups * bags.bags_per_group, bags.num_bags);
    for (int64_t bag = block_first();; bag++) {
      __syncthreads();
      if (threadIdx.x == 0) next_long = last;
      __syncthreads();
      for (int64_t candidate = bag + threadIdx.x; candidate < last; candidate += THREADS) {
        Range range = bags.range(inputs.offsets, candidate);
        if (range.end - range.start > LONG_BAG)
          atomicMin(reinterpret_cast<long long *>(&next_long), static_cast<long long>(candidate));
      }
      __syncthreads();
      bag = next_long;
      if (bag >= last) return;

      // Each group takes a part of whole batches, as many as any other.
      Range range = bags.range(inputs.offsets, bag);
      int64_t batches = (range.end - range.start + groups * BATCH - 1) / (groups * BATCH);
      int64_t start = range.start + group * batches * BATCH;
      TableRows table = bags.table(inputs.first_rows, bag);
      typename Hash::Part part = hash.shift(hash.part(run), table.first);
      work.begin(bag);
      auto left_at = [&](int64_t i) { return uint32_t(max(min(range.end - i, int64_t(BATCH)), int64_t(0))); };
      int64_t rows[OWN];
      Place own[OWN];
      fetch<false>(first(start), left_at(start), rows);
      locate(rows, left_at(start), part, own);
      fetch<false>(first(start + BATCH), left_at(start + BATCH), rows);
      for (int64_t i = start; i < start + batches * BATCH; i += BATCH) {
        Place places[BATCH];
        share(own, places);
        work.load(places, Some());
        // Hashed while the values are on their way.
        locate(rows, left_at(i + BATCH), part, own);
        fetch<false>(first(i + 2 * BATCH), left_at(i + 2 * BATCH), rows);
        work.use(places, i, Some());
      }
      work.end_together(bag);
    }
  }
};

// Walks through the bags of this thread's group, and then with the whole thread block through those of its bags that are
// long, which the block's groups divide among them. The whole thread block must call this together.
//
// For each bag or part of one:
//   work.begin(bag)
//   for each BATCH of its indices i, i + 1, …, with where block `run` of the columns of those rows lies, none for padding
//   and past the end, the whole warp together:
//     work.load(places, All or Some)     starts what takes long
//     work.use(places, i, All or Some)
//   work.end(bag), or for a long one work.end_together(bag), the whole thread block together
//
// The rows of the next batch, be it of the next bag, are fetched while the values of this one are on their way, so that
// neither waits for the other.
//
// PLAIN says that the bags are of one length, of at most LONG_BAG, and one table, without padding. That is a kernel of its
// own, because one that can do both does neither well: it has the registers of both.
template <int THREADS, int SHARE, bool PLAIN, typename Hash, typename Work>
__device__ __forceinline__ void for_each_batch(const Bags &bags, const Hash &hash, const Inputs &inputs, uint32_t run,
                                               Work &work) {
  Walk<THREADS, SHARE, Hash> walk = {bags, hash, inputs, run};
  if constexpr (PLAIN) {
    if (bags.index_type == I64) walk.template plain_bags<int64_t>(work);
    else walk.template plain_bags<int32_t>(work);
  } else {
    walk.own_bags(work);
    if (bags.num_offsets > 0 || bags.bag_len > LONG_BAG) walk.long_bags(work);
  }
}
