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

// x[v] = sign * hashed_weight[slot] of the thread's columns in the row at `place`; zeros where there is none.
template <int V, typename T, typename Hash>
__device__ __forceinline__ void gather(const T *__restrict__ hashed_weight, const Hash &hash,
                                       typename Hash::Place place, const Columns<V> &columns, Acc<T> (&x)[V]) {
  if (place.is_none() || columns.n == 0) {
#pragma unroll
    for (int v = 0; v < V; v++) x[v] = 0;
    return;
  }
  load<V>(hashed_weight + hash.slot(place) + columns.within, x);
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
  uint32_t mask = bags.mask();
  bool aligned = embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, (chunk * bags.lanes + lane) * V, embedding_dim);
    uint64_t column_part = hash.column_part(columns.first / hash.block);
    bags.for_each([&](int64_t bag) {
      Range range = bags.range(offsets, bag);
      A sum[V] = {};
      int64_t count = 0;
      for_each_batch<SHARE>(bags, hash, indices, range, column_part, mask, [&](Place(&places)[BATCH], int64_t i) {
        A x[BATCH][V];
        A scale[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          gather<V>(hashed_weight, hash, places[j], columns, x[j]);
          if (MODE == WEIGHTED) scale[j] = places[j].is_none() ? A(0) : widen(per_sample_weights[i + j]);
        }
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          bool first = count == 0;
          if (places[j].is_none()) continue;
          count++;
#pragma unroll
          for (int v = 0; v < V; v++) {
            if (MODE == MAX)
              sum[v] = first || wins(x[j][v], sum[v]) ? x[j][v] : sum[v];
            else
              sum[v] += MODE == WEIGHTED ? scale[j] * x[j][v] : x[j][v];
          }
        }
      });
      if (MODE == SUM && mean && count > 0) {
#pragma unroll
        for (int v = 0; v < V; v++) sum[v] /= A(count);
      }
      if (columns.n > 0) store_row<V>(out + bag * embedding_dim + columns.first, columns.n, aligned, sum);
    });
  }
}
