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
  uint32_t mask = bags.mask();
  bool aligned = grad_output_aligned && embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, (chunk * bags.lanes + lane) * V, embedding_dim);
    uint64_t column_part = hash.column_part(columns.first / hash.block);
    bags.for_each([&](int64_t bag) {
      Range range = bags.range(offsets, bag);
      A grad[V];
      load_row<V>(grad_output + bag * embedding_dim + columns.first, columns.n, aligned, grad);
      if (MODE == SUM && mean) {
        A count = A(bags.count(indices, range, mask));
#pragma unroll
        for (int v = 0; v < V; v++) grad[v] /= count > 0 ? count : A(1);
      }
      A best[V];
      Place winner[V];
      bool first = true;
      for_each_batch<SHARE>(bags, hash, indices, range, column_part, mask, [&](Place(&places)[BATCH], int64_t i) {
        if (MODE == MAX) {
          A x[BATCH][V];
#pragma unroll
          for (int j = 0; j < BATCH; j++) gather<V>(hashed_weight, hash, places[j], columns, x[j]);
#pragma unroll
          for (int j = 0; j < BATCH; j++) {
            if (places[j].is_none()) continue;
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
            if (places[j].is_none() || columns.n == 0) continue;
            A scale = MODE == WEIGHTED ? widen(per_sample_weights[i + j]) : A(1);
            A x[V];
#pragma unroll
            for (int v = 0; v < V; v++)
              x[v] = flip(places[j], columns.within + v, MODE == WEIGHTED ? scale * grad[v] : grad[v]);
            add_atomic<V>(grad_weight + hash.slot(places[j]) + columns.within, x);
          }
        }
      });
      if (MODE == MAX && !first) {
#pragma unroll
        for (int v = 0; v < V; v++) {
          if (v < columns.n) {
            A x = flip(winner[v], columns.within + v, grad[v]);
            atomicAdd(grad_weight + hash.slot(winner[v]) + columns.within + v, x);
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
  uint32_t mask = bags.mask();
  bool aligned = grad_output_aligned && embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  bags.for_each([&](int64_t bag) {
    Range range = bags.range(offsets, bag);
    for (int64_t i = range.start; i < range.end; i++) {
      int64_t row = bags.row(indices, i);
      if (bags.is_padding(row)) continue;
      A dot = 0;
      for (uint64_t column = lane * V; column < embedding_dim; column += bags.lanes * V) {
        Columns<V> columns(hash, uint32_t(column), embedding_dim);
        auto place = hash.locate(uint64_t(row), hash.column_part(columns.first / hash.block));
        A grad[V], x[V];
        load_row<V>(grad_output + bag * embedding_dim + columns.first, columns.n, aligned, grad);
        gather<V>(hashed_weight, hash, place, columns, x);
#pragma unroll
        for (int v = 0; v < V; v++)
          if (v < columns.n) dot += grad[v] * x[v];
      }
      for (uint32_t step = bags.lanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(mask, dot, step, bags.lanes);
      if (lane == 0) narrow(grad_weights[i], dot);
    }
  });
}
