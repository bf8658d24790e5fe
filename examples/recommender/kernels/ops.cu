// The CUDA forms of src/ops: what follows a product in a linear layer, and the
// interaction of an example's vectors.
//
// Matrices are contiguous, row by row. Sums are taken in f32 and in a fixed
// order, so that a run can be repeated.
#include <cuda_bf16.h>
#include <stddef.h>
#include <stdint.h>

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float &to, float x) { to = x; }
__device__ __forceinline__ void narrow(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }

// y = y + bias, and the larger of that and 0 if `relu`. Threads stride over the
// values, `PER_THREAD` neighbours at a time.
template <typename T, int PER_THREAD>
__device__ void add_bias(T *y, const T *bias, size_t rows, uint32_t columns, uint32_t relu) {
  struct alignas(sizeof(T) * PER_THREAD) Values {
    T at[PER_THREAD];
  };
  uint32_t per_row = columns / PER_THREAD;
  size_t count = rows * per_row;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    Values values = reinterpret_cast<Values *>(y)[i];
    Values biases = reinterpret_cast<const Values *>(bias)[i % per_row];
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      float sum = widen(values.at[k]) + widen(biases.at[k]);
      narrow(values.at[k], relu && sum < 0 ? 0 : sum);
    }
    reinterpret_cast<Values *>(y)[i] = values;
  }
}

// `aligned`: four values of each may be accessed at once.
template <typename T>
__device__ void add_bias(T *y, const T *bias, size_t rows, uint32_t columns, uint32_t relu, uint32_t aligned) {
  if (aligned && columns % 4 == 0)
    add_bias<T, 4>(y, bias, rows, columns, relu);
  else
    add_bias<T, 1>(y, bias, rows, columns, relu);
}

// out = grad where y is above 0, else 0.
template <typename T>
__device__ void where_positive(const T *grad, const T *y, T *out, size_t count) {
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    if (widen(y[i]) > 0)
      out[i] = grad[i];
    else
      narrow(out[i], 0);
  }
}

// sums[part, column] = the sum over the rows of this part: `rows_per_part`
// rows, one part per blockIdx.y. A thread block has 32 columns and 8 rows at a
// time.
template <typename T>
__device__ void column_sums(const T *x, float *sums, size_t rows, uint32_t columns, uint32_t rows_per_part) {
  __shared__ float shares[8][32];
  uint32_t column = blockIdx.x * 32 + threadIdx.x;
  size_t first = size_t(blockIdx.y) * rows_per_part, last = min(first + rows_per_part, rows);
  float sum = 0;
  if (column < columns)
    for (size_t row = first + threadIdx.y; row < last; row += 8) sum += widen(x[row * columns + column]);
  shares[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= columns) return;
  for (int y = 1; y < 8; y++) sum += shares[y][threadIdx.x];
  sums[size_t(blockIdx.y) * columns + column] = sum;
}

// The sizes of an interaction: Sizes in src/ops/interaction.rs.
struct Sizes {
  uint32_t tables;
  uint32_t vectors;  // tables, and one more if there is an output of the bottom MLP
  uint32_t dim;
  uint32_t kept;   // values of the last vectors that precede the dots
  uint32_t width;  // values per example; those after the dots are zero

  __device__ uint32_t pairs() const { return vectors * (vectors - 1) / 2; }
  // The position of a value in `vectors * dim` minus its position among the
  // values that are kept.
  __device__ uint32_t skipped() const { return vectors * dim - kept; }
};

// The vectors of an example.
template <typename T>
struct Example {
  const T *vectors;
  const T *bottom;
  Sizes sizes;

  __device__ Example(const T *vectors, const T *bottom, Sizes sizes)
      : vectors(vectors + size_t(blockIdx.x) * sizes.tables * sizes.dim),
        bottom(bottom + size_t(blockIdx.x) * sizes.dim),
        sizes(sizes) {}

  __device__ float at(uint32_t vector, uint32_t column) const {
    const T *row = vector < sizes.tables ? vectors + vector * sizes.dim : bottom;
    return widen(row[column]);
  }
};

// out[example] = what is kept of the vectors, the dot of each pair (1, 0), (2,
// 0), (2, 1), (3, 0), …, and zeros. A thread block computes one example. Its
// vectors lie in shared memory, `columns` of them at a time, a multiple of 4,
// each `columns + 4` values from the next, so that neighbouring rows are in
// different banks.
template <typename T>
__device__ void interaction(const T *vectors, const T *bottom, T *out, Sizes sizes, uint32_t columns) {
  extern __shared__ float4 shared[];
  float *x = reinterpret_cast<float *>(shared);
  Example<T> example(vectors, bottom, sizes);
  out += size_t(blockIdx.x) * sizes.width;
  for (uint32_t i = threadIdx.x; i < sizes.kept; i += blockDim.x) {
    uint32_t from = sizes.skipped() + i;
    narrow(out[i], example.at(from / sizes.dim, from % sizes.dim));
  }
  for (uint32_t i = sizes.kept + sizes.pairs() + threadIdx.x; i < sizes.width; i += blockDim.x) narrow(out[i], 0);

  uint32_t stride = columns + 4, warps = blockDim.x / 32;
  for (uint32_t first = 0; first < sizes.dim; first += columns) {
    __syncthreads();
    for (uint32_t vector = threadIdx.x / 32; vector < sizes.vectors; vector += warps)
      for (uint32_t column = threadIdx.x % 32; column < columns; column += 32)
        x[vector * stride + column] = first + column < sizes.dim ? example.at(vector, first + column) : 0;
    __syncthreads();
    for (uint32_t pair = threadIdx.x; pair < sizes.pairs(); pair += blockDim.x) {
      // The largest i with i (i - 1) / 2 <= pair; the root may be off by one.
      uint32_t i = uint32_t((1 + sqrtf(8.0f * pair + 1)) / 2);
      if (i * (i - 1) / 2 > pair) i--;
      if (i * (i + 1) / 2 <= pair) i++;
      uint32_t j = pair - i * (i - 1) / 2;
      const float4 *a = shared + i * stride / 4, *b = shared + j * stride / 4;
      float dot = 0;
      for (uint32_t column = 0; column < columns / 4; column++) {
        float4 u = a[column], v = b[column];
        dot += u.x * v.x + u.y * v.y + u.z * v.z + u.w * v.w;
      }
      T &to = out[sizes.kept + pair];
      narrow(to, first == 0 ? dot : widen(to) + dot);
    }
  }
}

// out[example, row, :] = the gradient of vector `first + row`, for `count`
// vectors. A thread block computes one example: each thread some columns, of
// eight vectors at a time. The gradients of the dots lie in shared memory as a
// symmetric matrix.
template <typename T>
__device__ void interaction_backward(const T *vectors, const T *bottom, const T *grad, T *out, Sizes sizes,
                                     uint32_t first, uint32_t count) {
  extern __shared__ float4 shared[];
  float *of_dots = reinterpret_cast<float *>(shared);
  Example<T> example(vectors, bottom, sizes);
  uint32_t n = sizes.vectors, padded = (n + 7) / 8 * 8;
  grad += size_t(blockIdx.x) * sizes.width;
  out += size_t(blockIdx.x) * count * sizes.dim;
  for (uint32_t place = threadIdx.x; place < n * padded; place += blockDim.x) {
    uint32_t i = max(place / padded, place % padded), j = min(place / padded, place % padded);
    of_dots[place] = i == j || i >= n ? 0 : widen(grad[sizes.kept + i * (i - 1) / 2 + j]);
  }
  __syncthreads();
  for (uint32_t column = threadIdx.x; column < sizes.dim; column += blockDim.x)
    for (uint32_t tile = first / 8 * 8; tile < first + count; tile += 8) {
      float sums[8] = {};
      for (uint32_t j = 0; j < n; j++) {
        float x = example.at(j, column);
        float4 low = shared[(j * padded + tile) / 4], high = shared[(j * padded + tile) / 4 + 1];
        sums[0] += low.x * x;
        sums[1] += low.y * x;
        sums[2] += low.z * x;
        sums[3] += low.w * x;
        sums[4] += high.x * x;
        sums[5] += high.y * x;
        sums[6] += high.z * x;
        sums[7] += high.w * x;
      }
#pragma unroll
      for (uint32_t k = 0; k < 8; k++) {
        uint32_t vector = tile + k;
        if (vector < first || vector >= first + count) continue;
        uint32_t at = vector * sizes.dim + column;
        float kept = at < sizes.skipped() ? 0 : widen(grad[at - sizes.skipped()]);
        narrow(out[(vector - first) * sizes.dim + column], sums[k] + kept);
      }
    }
}

#define KERNELS(T, NAME)                                                                                               \
  extern "C" __global__ void add_bias_##NAME(T *y, const T *bias, size_t rows, uint32_t columns, uint32_t relu,        \
                                             uint32_t aligned) {                                                       \
    add_bias<T>(y, bias, rows, columns, relu, aligned);                                                                \
  }                                                                                                                    \
  extern "C" __global__ void where_positive_##NAME(const T *grad, const T *y, T *out, size_t count) {                  \
    where_positive<T>(grad, y, out, count);                                                                            \
  }                                                                                                                    \
  extern "C" __global__ void column_sums_##NAME(const T *x, float *sums, size_t rows, uint32_t columns,                \
                                                uint32_t rows_per_part) {                                              \
    column_sums<T>(x, sums, rows, columns, rows_per_part);                                                             \
  }                                                                                                                    \
  extern "C" __global__ void interaction_##NAME(const T *vectors, const T *bottom, T *out, Sizes sizes,                \
                                                uint32_t columns) {                                                    \
    interaction<T>(vectors, bottom, out, sizes, columns);                                                              \
  }                                                                                                                    \
  extern "C" __global__ void interaction_backward_##NAME(const T *vectors, const T *bottom, const T *grad, T *out,     \
                                                         Sizes sizes, uint32_t first, uint32_t count) {                \
    interaction_backward<T>(vectors, bottom, grad, out, sizes, first, count);                                          \
  }
KERNELS(float, f32)
KERNELS(__nv_bfloat16, bf16)
