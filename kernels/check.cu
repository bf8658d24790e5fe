// The bounds checks: the first position whose row or offset breaks the contract.
//
// One thread owns one position. first_bad is zero when all is well, else the number of positions counted from the first
// bad one to the end, which makes "first" an atomic maximum and "none" what fresh memory holds.
#include "bags.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ void report(unsigned long long *first_bad, int64_t n, int64_t position) {
  atomicMax(first_bad, static_cast<unsigned long long>(n - position));
}

// Rows lie in 0..num_embeddings or are padding.
extern "C" __global__ void __launch_bounds__(THREADS)
    hashed_embedding_bag_check_rows(const void *indices, Bags bags, int64_t num_embeddings,
                                    unsigned long long *first_bad) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bags.nnz; i += threads) {
    int64_t row = bags.row(indices, i);
    if ((row < 0 || row >= num_embeddings) && !bags.is_padding(row)) report(first_bad, bags.nnz, i);
  }
}

// The first offset is 0, none decreases, none passes nnz.
extern "C" __global__ void __launch_bounds__(THREADS)
    hashed_embedding_bag_check_offsets(const void *offsets, Bags bags, unsigned long long *first_bad) {
  int64_t threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bags.num_offsets; i += threads) {
    int64_t offset = load_index(offsets, bags.offset_type, i);
    int64_t lowest = i == 0 ? 0 : load_index(offsets, bags.offset_type, i - 1);
    bool bad = offset < lowest || offset > bags.nnz || (i == 0 && offset != 0);
    if (bad) report(first_bad, bags.num_offsets, i);
  }
}
