// Gradients of hashed_weight and per_sample_weights. Nothing is kept from the forward pass: rows are hashed again, and
// for max the largest values are searched again.
#pragma once
#include "forward.cuh"
#include "touched.cuh"

// Whether x replaces best: the first of equals stays, and NaN is larger than every number.
template <typename A>
__device__ __forceinline__ bool wins(A x, A best) {
  return x > best || (x != x && best == best);
}

// Adds to grad_weight in floats, atomically; see add_atomic for what that means for the last bits.
//
// With CACHED, the sums of frequent slots are kept in shared memory until the end: if a few rows cause most of the
// traffic, their additions would otherwise queue at one address of the L2. A line holds V consecutive slots. It is
// claimed by the first slots that hit it twice in a row; all others are added to global memory directly.
template <int THREADS, int V, typename A, bool CACHED>
struct FloatSums {
  static constexpr uint32_t LINES = CACHED ? 1024 : 1;
  static constexpr uint32_t NONE = ~0u;

  struct Lines {
    alignas(16) A sums[LINES][V];
    alignas(8) uint2 tags[LINES];  // x: the number of the V slots that claimed the line; y: of those seen last
  };

  A *grad_weight;
  Touched touched;
  Lines &lines;

  __device__ __forceinline__ void begin() {
    if (!CACHED) return;
    for (uint32_t line = threadIdx.x; line < LINES; line += THREADS) {
      lines.tags[line] = {NONE, NONE};
#pragma unroll
      for (int v = 0; v < V; v++) lines.sums[line][v] = 0;
    }
    __syncthreads();
  }

  // Adds x[v] to the slot of column `within + v` of the block at `place`.
  template <typename Hash>
  __device__ __forceinline__ void add(const Hash &hash, typename Hash::Place place, uint32_t within, const A (&x)[V]) {
    touched.mark<V>(hash, place, within);
    if (!CACHED || !keep(hash.template vector<V>(place, within), x))
      add_atomic<V>(hash.at(grad_weight + within, place), x);
  }

  template <typename Hash>
  __device__ __forceinline__ void add_one(const Hash &hash, typename Hash::Place place, uint32_t within, A x) {
    touched.mark(hash.template vector<1>(place, within));
    add_global(hash.at(grad_weight + within, place), x);
  }

  __device__ __forceinline__ void end() {
    if (!CACHED) return;
    __syncthreads();
    for (uint32_t line = threadIdx.x; line < LINES; line += THREADS) {
      uint32_t number = lines.tags[line].x;
      if (number != NONE) add_atomic<V>(grad_weight + uint64_t(number) * V, lines.sums[line]);
    }
  }

private:
  // Adds to the line of slots `number * V` … + V - 1; returns false if the line belongs to others.
  __device__ __forceinline__ bool keep(uint64_t number, const A (&x)[V]) {
    if (number >= NONE) return false;
    uint32_t line = number % LINES;
    uint2 tag = lines.tags[line];
    if (tag.x != number) {
      if (tag.x != NONE) return false;
      if (tag.y != number) {
        // Other threads may read the old value meanwhile; it is only a hint.
        atomicExch(&lines.tags[line].y, uint32_t(number));
        return false;
      }
      uint32_t owner = atomicCAS(&lines.tags[line].x, NONE, uint32_t(number));
      if (owner != NONE && owner != number) return false;
    }
#pragma unroll
    for (int v = 0; v < V; v++) atomicAdd(&lines.sums[line][v], x[v]);
    return true;
  }
};

// grad_weight[slot] += sign * scale * grad_output[bag, column], with scale 1, the weight of the sample, or 1 / count.
// For max only the winner of each column gets the gradient.
//
// Bags and columns are divided as in Forward, under the same assumptions; also, grad_weight is 16-byte aligned. `Sums`
// adds up the contributions of many threads to one slot: FloatSums, or FixedPointSums of fixed_point.cuh.
template <int THREADS, Pooling POOLING, int V, typename T, typename Hash, typename Sums>
struct Backward {
  using A = Acc<T>;
  using Place = typename Hash::Place;

  const T *grad_output;
  const T *base;
  const T *per_sample_weights;
  Sums &sums;
  const BagParams &bags;
  const Hash &hash;
  const Inputs &inputs;
  Columns<V> columns;
  uint32_t embedding_dim;
  uint32_t mean;
  bool aligned;

  A grad[V];
  // For max: the largest values so far, and their places.
  A best[V];
  Place winner[V];
  Raw<V, T> raw[BATCH];

  __device__ __forceinline__ void begin(int64_t bag) {
    load_row<V>(grad_output + bag * embedding_dim + columns.first, columns.n, aligned, grad);
    if (POOLING == SUM && mean) {
      A scale = A(1) / bags.divisor<A>(inputs.indices, bags.range(inputs.offsets, bag));
#pragma unroll
      for (int v = 0; v < V; v++) grad[v] *= scale;
    }
#pragma unroll
    for (int v = 0; v < V; v++) winner[v] = Place::none();
  }

  template <typename Batch>
  __device__ __forceinline__ void load(const Place (&places)[BATCH], Batch) {
    if (POOLING != MAX) return;
#pragma unroll
    for (int j = 0; j < BATCH; j++) raw[j] = gather<Batch::all, V>(base, hash, places[j]);
  }

  template <typename Batch>
  __device__ __forceinline__ void use(const Place (&places)[BATCH], int64_t i, Batch) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if ((!Batch::all && places[j].is_none()) || columns.n == 0) continue;
      A x[V];
      if (POOLING == MAX) {
        arrive<V, T>(raw[j], places[j], columns.within, x);
#pragma unroll
        for (int v = 0; v < V; v++) raise(v, x[v], places[j]);
      } else {
        A scale = POOLING == WEIGHTED ? widen(per_sample_weights[i + j]) : A(1);
        auto signs = places[j].template signs_of<V>(columns.within);
#pragma unroll
        for (int v = 0; v < V; v++)
          // A column past the last has no gradient; zero times an infinite weight would be NaN.
          x[v] = flip<V>(signs, v, POOLING == WEIGHTED && v < columns.n ? scale * grad[v] : grad[v]);
        sums.add(hash, places[j], columns.within, x);
      }
    }
  }

  __device__ __forceinline__ void raise(int v, A x, Place place) {
    if (winner[v].is_none() || wins(x, best[v])) {
      best[v] = x;
      winner[v] = place;
    }
  }

  __device__ __forceinline__ void end(int64_t) {
    if (POOLING != MAX) return;
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (v >= columns.n || winner[v].is_none()) continue;
      auto sign = winner[v].template signs_of<1>(columns.within + v);
      sums.add_one(hash, winner[v], columns.within + v, flip<1>(sign, 0, grad[v]));
    }
  }

  // Compares the winners of the groups in the order of the groups, so that the first of equal values wins.
  __device__ __forceinline__ void end_together(int64_t bag) {
    if (POOLING != MAX) return;
    __shared__ A bests[V][THREADS];
    __shared__ Place winners[V][THREADS];
#pragma unroll
    for (int v = 0; v < V; v++) {
      bests[v][threadIdx.x] = best[v];
      winners[v][threadIdx.x] = winner[v];
    }
    __syncthreads();
    if (threadIdx.x >= bags.lanes) return;
    for (uint32_t thread = threadIdx.x + bags.lanes; thread < THREADS; thread += bags.lanes) {
#pragma unroll
      for (int v = 0; v < V; v++)
        if (!winners[v][thread].is_none()) raise(v, bests[v][thread], winners[v][thread]);
    }
    end(bag);
  }
};

template <int THREADS, Pooling POOLING, int V, int SHARE, typename T, typename Hash, typename Sums>
__device__ __forceinline__ void backward(const T *__restrict__ grad_output, const T *__restrict__ hashed_weight,
                                         const Inputs &inputs, const T *__restrict__ per_sample_weights, Sums &sums,
                                         const BagParams &bags, const Hash &hash, uint32_t embedding_dim, uint32_t mean,
                                         uint32_t grad_output_aligned) {
  uint32_t lane = threadIdx.x % bags.lanes;
  sums.begin();
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, chunk * bags.lanes + lane, embedding_dim);
    Backward<THREADS, POOLING, V, T, Hash, Sums> work = {grad_output,
                                                         hashed_weight + columns.within,
                                                         per_sample_weights,
                                                         sums,
                                                         bags,
                                                         hash,
                                                         inputs,
                                                         columns,
                                                         embedding_dim,
                                                         mean,
                                                         grad_output_aligned && embedding_dim % V == 0};
    for_each_batch<THREADS, SHARE, false>(bags, hash, inputs, columns.first / hash.block, work);
  }
  sums.end();
}

// grad_weights[i] = <row i, grad_output[bag]> for each position i of the bag that is not padding.
//
// One group of threads owns one bag and all of its columns, `lanes * V` at a time; the order of additions is fixed.
template <int THREADS, int V, typename T, typename Hash>
__device__ __forceinline__ void backward_per_sample_weights(const T *__restrict__ grad_output,
                                                            const T *__restrict__ hashed_weight, const Inputs &inputs,
                                                            T *__restrict__ grad_weights, const BagParams &bags,
                                                            const Hash &hash, uint32_t embedding_dim,
                                                            uint32_t grad_output_aligned) {
  using A = Acc<T>;
  bool aligned = grad_output_aligned && embedding_dim % V == 0;
  uint32_t lane = threadIdx.x % bags.lanes;
  int64_t groups = int64_t(gridDim.x) * THREADS / bags.lanes;
  int64_t group = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / bags.lanes;
  uint32_t mask = (bags.lanes == 32 ? FULL_WARP : (1u << bags.lanes) - 1)
                  << (threadIdx.x % 32 / bags.lanes * bags.lanes);
  for (int64_t bag = group; bag < bags.num_bags; bag += groups) {
    Range range = bags.range(inputs.offsets, bag);
    int64_t first_row = bags.table(inputs.table_rows, bag).first;
    for (int64_t i = range.start; i < range.end; i++) {
      int64_t row = bags.row(inputs.indices, i);
      if (bags.is_padding(row)) continue;
      A dot = 0;
      for (uint64_t column = lane * V; column < embedding_dim; column += bags.lanes * V) {
        Columns<V> columns(hash, uint32_t(column / V), embedding_dim);
        auto place = hash.locate(uint64_t(row), hash.shift(hash.column_block(columns.first / hash.block), first_row));
        A grad[V], x[V];
        load_row<V>(grad_output + bag * embedding_dim + columns.first, columns.n, aligned, grad);
        arrive<V, T>(gather<true, V>(hashed_weight + columns.within, hash, place), place, columns.within, x);
#pragma unroll
        for (int v = 0; v < V; v++)
          if (v < columns.n) dot += grad[v] * x[v];
      }
      for (uint32_t step = bags.lanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(mask, dot, step, bags.lanes);
      if (lane == 0) narrow(grad_weights[i], dot);
    }
  }
}

// Sums are not cached for single values, nor for max, where each column of a bag has one winner: such additions rarely
// meet another one to the same slot.
#define BACKWARD_KERNEL(NAME, THREADS, POOLING, T, HASH, V, SHARE)                                                     \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                     \
           const TableRows *table_rows, const T *per_sample_weights, Acc<T> *grad_weight, uint8_t *touched,            \
           BagParams bags, HASH slots, uint32_t embedding_dim, uint32_t mean, uint32_t grad_output_aligned) {          \
    using Sums = FloatSums<THREADS, V, Acc<T>, POOLING != MAX && (V > 1)>;                                             \
    __shared__ Sums::Lines lines;                                                                                      \
    Sums sums = {grad_weight, {touched}, lines};                                                                       \
    backward<THREADS, POOLING, V, SHARE>(grad_output, hashed_weight, {indices, offsets, table_rows},                   \
                                         per_sample_weights, sums, bags, slots, embedding_dim, mean,                   \
                                         grad_output_aligned);                                                         \
  }

#define BACKWARD_PER_SAMPLE_WEIGHTS_KERNEL(NAME, THREADS, T, HASH, V)                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(const T *grad_output, const T *hashed_weight, const void *indices, const void *offsets,                     \
           const TableRows *table_rows, T *grad_weights, BagParams bags, HASH slots, uint32_t embedding_dim,           \
           uint32_t grad_output_aligned) {                                                                             \
    backward_per_sample_weights<THREADS, V>(grad_output, hashed_weight, {indices, offsets, table_rows}, grad_weights,  \
                                            bags, slots, embedding_dim, grad_output_aligned);                          \
  }
