// How threads walk through bags.
//
// `lanes` neighbouring threads form a group; each owns V consecutive columns. A group walks through `bags_per_group`
// consecutive bags, BATCH rows at a time; the warp stays together, but its groups may be in different bags. A bag of
// more than LONG_BAG indices is too long for one group: afterwards, all groups of the thread block share it.
#pragma once
#include "bags.cuh"

// How many rows each thread loads at once: enough independent loads to hide the latency of the L2.
constexpr int BATCH = 4;

// Whether every row of a batch is known to be present.
struct All {
  static constexpr bool all = true;
};
struct Some {
  static constexpr bool all = false;
};

// See for_each_batch. A thread block has THREADS threads. SHARE neighbouring threads own columns of the same column
// block, so each hashes only every SHARE-th row, and they exchange the places.
template <int THREADS, int SHARE, typename Hash>
struct Walk {
  using Place = typename Hash::Place;
  static constexpr int OWN = BATCH / SHARE;

  const BagParams &bags;
  const Hash &hash;
  const Inputs &inputs;
  uint32_t column_block;  // the column block of this thread

  __device__ __forceinline__ int64_t block_first() const {
    return int64_t(blockIdx.x) * (THREADS / bags.lanes * bags.bags_per_group);
  }

  // Loads this thread's rows of the batch that starts at `first`. The batch has `left` rows, or, with ALL, all of them.
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

  // The address of this thread's first index of a batch.
  __device__ __forceinline__ const char *first(int64_t position) const {
    return static_cast<const char *>(inputs.indices) + (position + threadIdx.x % SHARE) * stride();
  }

  __device__ __forceinline__ int64_t stride() const { return bags.index_type == I64 ? 8 : 4; }

  // The places of this thread's rows of a batch that has `left` rows.
  __device__ __forceinline__ void locate(const int64_t (&rows)[OWN], uint32_t left, typename Hash::ColumnBlock columns,
                                         Place (&own)[OWN]) const {
#pragma unroll
    for (int s = 0; s < OWN; s++) {
      bool is_row = threadIdx.x % SHARE + s * SHARE < left && !bags.is_padding(rows[s]);
      own[s] = is_row ? hash.locate(uint64_t(rows[s]), columns) : Place::none();
    }
  }

  // Collects the places of a batch from the threads that share it.
  __device__ __forceinline__ void share(const Place (&own)[OWN], Place (&places)[BATCH]) const {
#pragma unroll
    for (int j = 0; j < BATCH; j++)
      places[j] = SHARE == 1 ? own[j] : shuffle(FULL_WARP, own[j / SHARE], j % SHARE, SHARE);
  }

  // For bags of equal length, up to LONG_BAG, and one feature, without padding. Whole batches need no test per row; if
  // the length is a multiple of BATCH, they continue from one bag into the next.
  template <typename Index, typename Work>
  __device__ __forceinline__ void plain_bags(Work &work) const {
    int64_t first_bag = block_first() + threadIdx.x / bags.lanes * bags.bags_per_group;
    uint32_t mine = uint32_t(max(min(bags.num_bags - first_bag, int64_t(bags.bags_per_group)), int64_t(0)));
    typename Hash::ColumnBlock columns = hash.shift(hash.column_block(column_block), bags.first_row);
    uint32_t full = uint32_t(bags.bag_len) / BATCH, tail = uint32_t(bags.bag_len) % BATCH;

    Index rows[OWN];
    Place own[OWN];
    const Index *from = nullptr;
    uint32_t next = 0, last = 0;
    // Rows are fetched a batch ahead; the last batch is fetched twice.
    auto fetch_next = [&] {
#pragma unroll
      for (int s = 0; s < OWN; s++) rows[s] = from[next + s * SHARE];
      next = min(next + BATCH, last);
    };
    auto locate_next = [&] {
#pragma unroll
      for (int s = 0; s < OWN; s++) own[s] = hash.locate(uint64_t(bags.extend(rows[s])), columns);
      fetch_next();
    };
    for (uint32_t b = 0; b < bags.bags_per_group; b++) {
      // The warp stays together: past the last bag, the last bag is looked up again but not stored.
      int64_t bag = min(first_bag + b, bags.num_bags - 1);
      if (b >= mine) work.columns.n = 0;
      int64_t start = bag * bags.bag_len;
      work.begin(bag);
      if (full > 0 && (b == 0 || tail > 0)) {
        from = static_cast<const Index *>(inputs.indices) + start + threadIdx.x % SHARE;
        next = 0;
        last = ((tail > 0 ? full : full * max(mine, 1u)) - 1) * BATCH;
        fetch_next();
        if (Hash::READS_ROWS) locate_next();
      }
      for (uint32_t batch = 0; batch < full; batch++) {
        Place places[BATCH];
        if (!Hash::READS_ROWS) locate_next();
        share(own, places);
        work.load(places, All());
        // What the hash of the next batch reads arrives while the values of this one do.
        if (Hash::READS_ROWS) locate_next();
        work.use(places, start + batch * BATCH, All());
      }
      if (tail > 0) {
        int64_t rest[OWN];
        Place places[BATCH];
        fetch<false>(first(start + full * BATCH), tail, rest);
        locate(rest, tail, columns, own);
        share(own, places);
        work.load(places, Some());
        work.use(places, start + full * BATCH, Some());
      }
      work.end(bag);
    }
  }

  // The whole warp takes as many steps as the longest of its bags needs. The batches that are full in every bag of the
  // warp come first, and need no test per row.
  template <typename Work>
  __device__ __forceinline__ void own_bags(Work &work) const {
    int64_t rows[OWN];
    const char *fetched = nullptr;  // the address from which `rows` were loaded
    int64_t bag = block_first() + threadIdx.x / bags.lanes * bags.bags_per_group;
    // Bags of equal length need no comparison, unless some bags of this thread block do not exist.
    bool differ = bags.num_offsets > 0 || block_first() + THREADS / bags.lanes * bags.bags_per_group > bags.num_bags;
    for (uint32_t b = 0; b < bags.bags_per_group; b++, bag++) {
      bool is_mine = bag < bags.num_bags;
      Range range = is_mine ? bags.range(inputs.offsets, bag) : Range{0, 0};
      if (range.end - range.start > LONG_BAG) {
        is_mine = false;
        range.end = range.start;
      }
      TableRows table = bags.table(inputs.table_rows, bag);
      typename Hash::ColumnBlock columns = hash.shift(hash.column_block(column_block), table.first);
      if (is_mine) work.begin(bag);

      uint32_t length = uint32_t(range.end - range.start);
      uint32_t shortest = length, longest = length;
      for (uint32_t step = bags.lanes; differ && step < 32; step *= 2) {
        shortest = min(shortest, __shfl_xor_sync(FULL_WARP, shortest, step));
        longest = max(longest, __shfl_xor_sync(FULL_WARP, longest, step));
      }
      uint32_t full = bags.has_padding ? 0 : shortest / BATCH;
      // Rows are fetched a batch ahead, even past the end of this bag, where the next bag usually starts.
      bool runs_on = range.end + BATCH <= bags.nnz;
      const char *next = first(range.start);
      if (full > 0 && next != fetched) fetch<true>(next, BATCH, rows);
      for (uint32_t batch = 0; batch < full; batch++) {
        Place own[OWN], places[BATCH];
#pragma unroll
        for (int s = 0; s < OWN; s++) own[s] = hash.locate(uint64_t(rows[s]), columns);
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
        locate(rows, left, columns, own);
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

      // The bag is divided among the groups in equal parts of whole batches.
      Range range = bags.range(inputs.offsets, bag);
      int64_t batches = (range.end - range.start + groups * BATCH - 1) / (groups * BATCH);
      int64_t start = range.start + group * batches * BATCH;
      TableRows table = bags.table(inputs.table_rows, bag);
      typename Hash::ColumnBlock columns = hash.shift(hash.column_block(column_block), table.first);
      work.begin(bag);
      auto left_at = [&](int64_t i) { return uint32_t(max(min(range.end - i, int64_t(BATCH)), int64_t(0))); };
      int64_t rows[OWN];
      Place own[OWN];
      fetch<false>(first(start), left_at(start), rows);
      locate(rows, left_at(start), columns, own);
      fetch<false>(first(start + BATCH), left_at(start + BATCH), rows);
      for (int64_t i = start; i < start + batches * BATCH; i += BATCH) {
        Place places[BATCH];
        share(own, places);
        work.load(places, Some());
        // The next batch is hashed while the values of this one are being loaded.
        locate(rows, left_at(i + BATCH), columns, own);
        fetch<false>(first(i + 2 * BATCH), left_at(i + 2 * BATCH), rows);
        work.use(places, i, Some());
      }
      work.end_together(bag);
    }
  }
};

// Walks through the bags of this thread's group. Then the whole thread block walks through its long bags, which its
// groups divide among themselves. The whole thread block must call this together.
//
// For each bag, or this group's part of a long one:
//   work.begin(bag)
//   for each BATCH of its indices i, i + 1, …, with their places (none() for padding and past the end); the whole warp
//   together:
//     work.load(places, All or Some)     starts the loads
//     work.use(places, i, All or Some)   uses what they loaded
//   work.end(bag), or, for a long bag and the whole thread block together, work.end_together(bag)
//
// The rows of the next batch, possibly of the next bag, are fetched while the values of this one are being loaded, so
// that neither waits for the other.
//
// PLAIN promises bags of equal length, at most LONG_BAG, and one feature, without padding. That is a kernel of its own,
// because a kernel with both loops needs the registers of both and is slower at either.
template <int THREADS, int SHARE, bool PLAIN, typename Hash, typename Work>
__device__ __forceinline__ void for_each_batch(const BagParams &bags, const Hash &hash, const Inputs &inputs,
                                               uint32_t column_block, Work &work) {
  Walk<THREADS, SHARE, Hash> walk = {bags, hash, inputs, column_block};
  if constexpr (PLAIN) {
    if (bags.index_type == I64)
      walk.template plain_bags<int64_t>(work);
    else
      walk.template plain_bags<int32_t>(work);
  } else {
    walk.own_bags(work);
    if (bags.num_offsets > 0 || bags.bag_len > LONG_BAG) walk.long_bags(work);
  }
}
