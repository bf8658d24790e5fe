// out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]
//
// One group of lanes owns one bag and `lanes * V` columns of it (blockIdx.y the next ones); sums stay in registers.
// Assumptions: hashed_weight is 16-byte aligned and its blocks are multiples of V columns when V > 1; each place of SHARE
// threads lies in one block. The result does not depend on the order of execution.
#pragma once
#include "bags.cuh"
#include "vector.cuh"

enum Mode { SUM, WEIGHTED, MAX };

// The columns a thread owns.
template <int V>
struct Columns {
  uint32_t first;   // may lie past embedding_dim: such a thread still hashes for its neighbours
  int n;            // how many of its V columns exist
  uint32_t within;  // the place of `first` in its block

  template <typename Hash>
  __device__ __forceinline__ Columns(const Hash &hash, uint32_t first, uint32_t embedding_dim)
      : first(first), n(first < embedding_dim ? int(min(embedding_dim - first, uint32_t(V))) : 0),
        within(first % hash.block) {}
};

// What a place that is none points to: a load from here is cheaper than a branch around one.
__device__ const uint4 ZEROS = {0, 0, 0, 0};

// x[v] = sign * hashed_weight[slot] of the thread's columns in the row at `place`; zeros where there is none, unless ALL
// places are one. `base` is the thread's first column in the first block of hashed_weight.
//
// A thread past the last column loads too: its columns exist in the block, if not in the table.
template <bool ALL, int V, typename T, typename Hash>
__device__ __forceinline__ void gather(const T *base, const Hash &hash, typename Hash::Place place,
                                       const Columns<V> &columns, Acc<T> (&x)[V]) {
  const T *block = hash.at(base, place);
  if (!ALL && place.is_none()) block = reinterpret_cast<const T *>(&ZEROS);
  load<V>(block, x);
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = flip(place, columns.within + v, x[v]);
}

// Whether x replaces best: the first of equals stays, and NaN is larger than every number.
template <typename A>
__device__ __forceinline__ bool wins(A x, A best) {
  return x > best || (x != x && best == best);
}

template <Mode MODE, int V, int SHARE, typename T, typename Hash>
__device__ __forceinline__ void forward(const T *__restrict__ hashed_weight, const void *__restrict__ indices,
                                        const void *__restrict__ offsets, const T *__restrict__ per_sample_weights,
                                        T *__restrict__ out, const Bags &bags, const Hash &hash,
                                        uint32_t embedding_dim, uint32_t mean) {
  using A = Acc<T>;
  using Place = typename Hash::Place;
  bool aligned = embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, (chunk * bags.lanes + lane) * V, embedding_dim);
    uint64_t column_part = hash.column_part(columns.first / hash.block);
    const T *base = hashed_weight + columns.within;
    bags.for_each([&](int64_t bag) {
      Range range = bags.range(offsets, bag);
      A sum[V] = {};
      bool first = true;
      for_each_batch<SHARE>(bags, hash, indices, range, column_part,
                            [&](Place(&places)[BATCH], int64_t i, auto batch) {
        constexpr bool ALL = decltype(batch)::all;
        A x[BATCH][V];
        A scale[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          gather<ALL, V>(base, hash, places[j], columns, x[j]);
          if (MODE == WEIGHTED) scale[j] = !ALL && places[j].is_none() ? A(0) : widen(per_sample_weights[i + j]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          if (MODE == MAX && !ALL && places[j].is_none()) continue;
#pragma unroll
          for (int v = 0; v < V; v++) {
            if (MODE == MAX)
              sum[v] = first || wins(x[j][v], sum[v]) ? x[j][v] : sum[v];
            else
              sum[v] += MODE == WEIGHTED ? scale[j] * x[j][v] : x[j][v];
          }
          first = false;
        }
      });
      if (MODE == SUM && mean) {
        A count = bags.divisor<A>(indices, range);
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] /= count;
      }
      if (columns.n > 0 && bag < bags.num_bags) store_row<V>(out + bag * embedding_dim + columns.first, columns.n, aligned, sum);
    });
  }
}
