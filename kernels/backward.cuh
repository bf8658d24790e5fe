// Gradients. Nothing is stored between forward and backward: rows are hashed again, and for max the largest values are
// found again.
#pragma once
#include "forward.cuh"

// grad_weight[slot] += sign * scale * grad_output[bag, column], with scale 1, the weight of the sample, or 1 / count.
// For max only the winner of each column gets the gradient.
//
// Bags and columns are divided as in `forward`, under the same assumptions, and grad_weight is 16-byte aligned. The
// additions are atomic: see add_atomic for what that means for the last bits.
template <Mode MODE, int V, int SHARE, typename T, typename Hash>
__device__ __forceinline__ void backward(const T *__restrict__ grad_output, const T *__restrict__ hashed_weight,
                                         const void *__restrict__ indices, const void *__restrict__ offsets,
                                         const T *__restrict__ per_sample_weights, Acc<T> *__restrict__ grad_weight,
                                         const Bags &bags, const Hash &hash, uint32_t embedding_dim, uint32_t mean,
                                         uint32_t grad_output_aligned) {
  using A = Acc<T>;
  using Place = typename Hash::Place;
  bool aligned = grad_output_aligned && embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, (chunk * bags.lanes + lane) * V, embedding_dim);
    uint64_t column_part = hash.column_part(columns.first / hash.block);
    const T *base = hashed_weight + columns.within;
    A *grad_base = grad_weight + columns.within;
    bags.for_each([&](int64_t bag) {
      Range range = bags.range(offsets, bag);
      A grad[V];
      int n = bag < bags.num_bags ? columns.n : 0;
      load_row<V>(grad_output + bag * embedding_dim + columns.first, n, aligned, grad);
      if (MODE == SUM && mean) {
        A count = bags.divisor<A>(indices, range);
#pragma unroll
        for (int v = 0; v < V; v++) grad[v] /= count;
      }
      A best[V];
      Place winner[V];
      bool first = true;
      for_each_batch<SHARE>(bags, hash, indices, range, column_part,
                            [&](Place(&places)[BATCH], int64_t i, auto batch) {
        constexpr bool ALL = decltype(batch)::all;
        if (MODE == MAX) {
          A x[BATCH][V];
#pragma unroll
          for (int j = 0; j < BATCH; j++) gather<ALL, V>(base, hash, places[j], columns, x[j]);
#pragma unroll
          for (int j = 0; j < BATCH; j++) {
            if (!ALL && places[j].is_none()) continue;
#pragma unroll
            for (int v = 0; v < V; v++) {
              if (first || wins(x[j][v], best[v])) {
                best[v] = x[j][v];
                winner[v] = places[j];
              }
            }
            first = false;
          }
        } else {
#pragma unroll
          for (int j = 0; j < BATCH; j++) {
            if ((!ALL && places[j].is_none()) || columns.n == 0) continue;
            A scale = MODE == WEIGHTED ? widen(per_sample_weights[i + j]) : A(1);
            A x[V];
#pragma unroll
            for (int v = 0; v < V; v++)
              // A column past the last has no gradient, whatever the weight: zero times infinity would be one.
              x[v] = flip(places[j], columns.within + v,
                          MODE == WEIGHTED && v < columns.n ? scale * grad[v] : grad[v]);
            add_atomic<V>(hash.at(grad_base, places[j]), x);
          }
        }
      });
      if (MODE == MAX && !first) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (v < columns.n) {
            A x = flip(winner[v], columns.within + v, grad[v]);
            atomicAdd(hash.at(grad_base, winner[v]) + v, x);
          }
        }
      }
    });
  }
}

// grad_weights[i] = <row i, grad_output[bag]> for each position i of the bag that is not padding.
//
// One group of lanes owns one bag and all its columns, `lanes * V` at a time; the order of additions is fixed.
template <int V, typename T, typename Hash>
__device__ __forceinline__ void backward_per_sample_weights(
    const T *__restrict__ grad_output, const T *__restrict__ hashed_weight, const void *__restrict__ indices,
    const void *__restrict__ offsets, T *__restrict__ grad_weights, const Bags &bags, const Hash &hash,
    uint32_t embedding_dim, uint32_t grad_output_aligned) {
  using A = Acc<T>;
  bool aligned = grad_output_aligned && embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  bags.for_each([&](int64_t bag) {
    Range range = bags.range(offsets, bag);
    int64_t longest = bags.longest(range.end - range.start);
    for (int64_t i = range.start; i < range.start + longest; i++) {
      int64_t row = i < range.end ? bags.row(indices, i) : 0;
      bool counts = i < range.end && !bags.is_padding(row);
      A dot = 0;
      for (uint64_t column = lane * V; counts && column < embedding_dim; column += bags.lanes * V) {
        Columns<V> columns(hash, uint32_t(column), embedding_dim);
        auto place = hash.locate(uint64_t(row), hash.column_part(columns.first / hash.block));
        A grad[V], x[V];
        load_row<V>(grad_output + bag * embedding_dim + columns.first, columns.n, aligned, grad);
        gather<true, V>(hashed_weight + columns.within, hash, place, columns, x);
#pragma unroll
        for (int v = 0; v < V; v++)
          if (v < columns.n) dot += grad[v] * x[v];
      }
      for (uint32_t step = bags.lanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(WARP, dot, step, bags.lanes);
      if (lane == 0 && counts) narrow(grad_weights[i], dot);
    }
  });
}
