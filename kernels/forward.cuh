// out[bag, column] = pool over rows of the bag of sign * hashed_weight[slot]
//
// One group of threads owns a bag and `lanes * V` of its columns; blockIdx.y selects which columns. Sums stay in
// registers; if a thread block shares a bag, they are combined in shared memory.
//
// Assumptions: if V > 1, hashed_weight is 16-byte aligned; the block of the hash is a multiple of V * SHARE columns, so
// that the columns of SHARE threads always lie in one column block. The result does not depend on the order of
// execution.
#pragma once
#include "vector.cuh"
#include "walk.cuh"

// How the rows of a bag are pooled: mode mean is SUM with `mean` set, WEIGHTED is mode sum with per_sample_weights.
enum Pooling { SUM, WEIGHTED, MAX };

// The columns that a thread owns.
template <int V>
struct Columns {
  uint32_t first;   // may be past embedding_dim: such a thread still hashes for its neighbours
  int n;            // how many of its V columns exist
  uint32_t within;  // the position of `first` in its block

  // `thread` counts the threads of a bag.
  template <typename Hash>
  __device__ __forceinline__ Columns(const Hash &hash, uint32_t thread, uint32_t embedding_dim)
      : first(thread * V),
        n(first < embedding_dim ? int(min(embedding_dim - first, uint32_t(V))) : 0),
        within(first % hash.block) {}
};

// Absent rows are loaded from here, which is cheaper than a branch around the load.
__device__ const uint4 ZEROS = {0, 0, 0, 0};

// Starts loading this thread's V columns of the row at `place`. An absent row (Place::none()) loads zeros; ALL promises
// that the row is present. `base` is the address of the thread's first column in block 0 of hashed_weight.
//
// A thread past the last column loads as well: its columns exist in the block, though not in the table.
template <bool ALL, int V, typename T, typename Hash>
__device__ __forceinline__ Raw<V, T> gather(const T *base, const Hash &hash, typename Hash::Place place) {
  const T *block = hash.at(base, place);
  if (!ALL && place.is_none()) block = reinterpret_cast<const T *>(&ZEROS);
  return load<V>(block);
}

// x[v] = sign * hashed_weight[slot], from what gather() loaded; `within` is the first column's position in its block.
template <int V, typename T, typename Place>
__device__ __forceinline__ void arrive(const Raw<V, T> &raw, Place place, uint32_t within, Acc<T> (&x)[V]) {
  unpack<V, T>(raw, x);
  auto signs = place.template signs_of<V>(within);
#pragma unroll
  for (int v = 0; v < V; v++) x[v] = flip<V>(signs, v, x[v]);
}

// The larger of two values; NaN is larger than every number.
__device__ __forceinline__ double larger(double x, double y) { return y > x || y != y ? y : x; }
__device__ __forceinline__ float larger(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
#else
  return y > x || y != y ? y : x;
#endif
}

template <int THREADS, Pooling POOLING, int V, typename T, typename Hash>
struct Forward {
  using A = Acc<T>;
  using Place = typename Hash::Place;

  const T *base;
  const T *per_sample_weights;
  T *out;
  const BagParams &bags;
  const Hash &hash;
  Columns<V> columns;
  uint32_t embedding_dim;
  uint32_t mean;

  A sum[V];
  uint32_t count;  // rows that are not padding
  Raw<V, T> raw[BATCH];
  A scale[BATCH];

  static __device__ __forceinline__ void combine(A &sum, A x) { sum = POOLING == MAX ? larger(sum, x) : sum + x; }

  __device__ __forceinline__ void begin(int64_t) {
    count = 0;
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = POOLING == MAX ? A(-INFINITY) : A(0);
  }

  template <typename Batch>
  __device__ __forceinline__ void load(const Place (&places)[BATCH], Batch) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) raw[j] = gather<Batch::all, V>(base, hash, places[j]);
  }

  template <typename Batch>
  __device__ __forceinline__ void use(const Place (&places)[BATCH], int64_t i, Batch) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      if (!Batch::all && POOLING != SUM && places[j].is_none()) continue;
      A x[V];
      arrive<V, T>(raw[j], places[j], columns.within, x);
      A scale = POOLING == WEIGHTED ? widen(per_sample_weights[i + j]) : A(1);
#pragma unroll
      for (int v = 0; v < V; v++) combine(sum[v], POOLING == WEIGHTED ? scale * x[v] : x[v]);
      count += Batch::all || !places[j].is_none();
    }
  }

  __device__ __forceinline__ void end(int64_t bag) {
    if (columns.n == 0) return;
    A scale = POOLING == SUM && mean && count > 1 ? A(1) / A(count) : A(1);
#pragma unroll
    for (int v = 0; v < V; v++) sum[v] = POOLING == MAX && count == 0 ? A(0) : POOLING == SUM ? sum[v] * scale : sum[v];
    store_row<V>(out + bag * embedding_dim + columns.first, columns.n, embedding_dim % V == 0, sum);
  }

  // Combines the partial results of the groups, in the order of the groups.
  __device__ __forceinline__ void end_together(int64_t bag) {
    __shared__ A sums[V][THREADS];
    __shared__ uint32_t counts[THREADS];
#pragma unroll
    for (int v = 0; v < V; v++) sums[v][threadIdx.x] = sum[v];
    counts[threadIdx.x] = count;
    __syncthreads();
    if (threadIdx.x >= bags.lanes) return;
    for (uint32_t thread = threadIdx.x + bags.lanes; thread < THREADS; thread += bags.lanes) {
#pragma unroll
      for (int v = 0; v < V; v++) combine(sum[v], sums[v][thread]);
      count += counts[thread];
    }
    end(bag);
  }
};

template <int THREADS, Pooling POOLING, int V, int SHARE, bool PLAIN, typename T, typename Hash>
__device__ __forceinline__ void forward(const T *__restrict__ hashed_weight, const Inputs &inputs,
                                        const T *__restrict__ per_sample_weights, T *__restrict__ out,
                                        const BagParams &bags, const Hash &hash, uint32_t embedding_dim,
                                        uint32_t mean) {
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, chunk * bags.lanes + lane, embedding_dim);
    Forward<THREADS, POOLING, V, T, Hash> work = {
        hashed_weight + columns.within, per_sample_weights, out, bags, hash, columns, embedding_dim, mean};
    for_each_batch<THREADS, SHARE, PLAIN>(bags, hash, inputs, columns.first / hash.block, work);
  }
}

#define FORWARD_KERNEL(NAME, THREADS, BLOCKS_PER_MULTIPROCESSOR, POOLING, T, HASH, V, SHARE, PLAIN)                    \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)                                     \
      NAME(const T *hashed_weight, const void *indices, const void *offsets, const TableRows *table_rows,              \
           const T *per_sample_weights, T *out, BagParams bags, HASH slots, uint32_t embedding_dim, uint32_t mean) {   \
    forward<THREADS, POOLING, V, SHARE, PLAIN>(hashed_weight, {indices, offsets, table_rows}, per_sample_weights, out, \
                                               bags, slots, embedding_dim, mean);                                      \
  }
