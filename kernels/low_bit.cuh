// out[bag, column] = pool over rows of the bag of sign * value(hashed_weight[slot]), over a hashed_weight in 8 or 4
// bits
//
// Threads own bags and columns as in forward.cuh. Every value is an odd integer times the unit:
//
//   8 bits   2u - 255                      u a byte
//   4 bits   (2u - 15) * factor            u a nibble; factor = 2^(3 - shift), the same for 32 slots
//
// Signs turn u into its bitwise complement, so a row is signed by an exclusive or with a mask, which leaves the integer
// negated. Sums and maxima are exact, whatever the order of execution: sums of u (times factor) are kept in two 16-bit
// lanes of each 32-bit register, which have room for 256 rows. Only bags of more than LONG_BAG indices are longer;
// their sums are moved to 64 bits in shared memory every 256 rows. With per_sample_weights, sums are taken in floats,
// in the order of the groups.
//
// Assumptions: V is 1, or 16, which are one load. If it is 16, hashed_weight is 16-byte aligned, and the block of the
// hash is a multiple of V * SHARE columns.
#pragma once
#include "forward.cuh"

// 0xFF in every byte whose sign bit is set.
__device__ __forceinline__ uint32_t sign_masks(uint32_t bytes) {
  uint32_t masks;
  asm("prmt.b32 %0, %1, 0, 0xBA98;" : "=r"(masks) : "r"(bytes));
  return masks;
}

// Bytes 1 and 3 of a word, as two 16-bit numbers.
__device__ __forceinline__ uint32_t odd_bytes(uint32_t word) { return __byte_perm(word, 0, 0x4341); }

// The signs of V columns from column `within` of the block on, in the lowest bits.
template <int V>
__device__ __forceinline__ uint32_t sign_bits(BlockPlace place, uint32_t within) {
  // Blocks longer than 32 have no signs, so for them any shift will do.
  return place.signs >> (within & 31);
}
template <int V>
__device__ __forceinline__ uint32_t sign_bits(AffinePlace, uint32_t) {
  return 0;
}

template <int BYTES>
struct PackedLoad;
template <>
struct PackedLoad<1> {
  using type = uint8_t;
};
template <>
struct PackedLoad<8> {
  using type = uint2;
};
template <>
struct PackedLoad<16> {
  using type = uint4;
};

template <int THREADS, Pooling POOLING, int BITS, int V, typename Hash>
struct LowBitForward {
  using Place = typename Hash::Place;
  using Packed = typename PackedLoad<(V * BITS + 7) / 8>::type;
  // Words of four bytes, each with one of the thread's columns; column_of() says with which.
  static constexpr int WORDS = (V + 3) / 4;
  static constexpr int COLUMNS = V == 1 ? 1 : 4;  // of a word
  static constexpr uint32_t MOST_BATCHES = LONG_BAG / BATCH;

  const uint8_t *packed;
  const uint8_t *shifts;
  const float *per_sample_weights;
  float *out;
  const BagParams &bags;
  const Hash &hash;
  Columns<V> columns;
  uint32_t embedding_dim;
  uint32_t mean;
  float unit;
  // For long bags, of this thread block: the sums of its columns, and how many rows are not padding. Zeros between two
  // bags.
  unsigned long long *long_sums;
  unsigned long long *long_count;

  // SUM: sums of whole words modulo 2^32, and of their odd bytes. MAX: the largest of each byte. WEIGHTED: unused.
  uint32_t all[WORDS], odd[WORDS];
  float weighted[POOLING == WEIGHTED ? V : 1];
  uint32_t count;    // rows that are not padding
  uint32_t factors;  // in 4 bits, their factors added up
  uint32_t batches;  // since the sums were last moved
  Packed raw[BATCH];
  uint32_t factor[BATCH];

  // The column, counted from the thread's first, of byte `b` of word `w`.
  static __device__ __forceinline__ constexpr int column_of(int w, int b) {
    // In 4 bits the low halves of four bytes come first, then their high halves.
    return BITS == 8 || V == 1 ? 4 * w + b : 8 * (w / 2) + 2 * b + w % 2;
  }

  __device__ __forceinline__ void clear() {
    factors = batches = 0;
#pragma unroll
    for (int w = 0; w < WORDS; w++) all[w] = odd[w] = 0;
  }

  __device__ __forceinline__ void begin(int64_t) {
    count = 0;
    clear();
#pragma unroll
    for (float &sum : weighted) sum = 0;
  }

  template <typename Batch>
  __device__ __forceinline__ void load(const Place (&places)[BATCH], Batch) {
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      bool present = Batch::all || !places[j].is_none();
      if (BITS == 8) {
        raw[j] = load_packed(gather_address(hash.at(packed + columns.within, places[j]), present));
      } else {
        // Slots in units of V; an absent row is at unit 0.
        uint64_t at = present ? hash.template vector<V>(places[j], columns.within) : 0;
        const uint8_t *address = V == 1 ? packed + at / 2 : packed + at * (V / 2);
        raw[j] = load_packed(gather_address(address, present));
        uint64_t group = at * V / 32;
        uint32_t shift = __ldg(shifts + group / 4) >> (2 * (uint32_t(group) & 3)) & 3;
        if constexpr (V == 1) raw[j] = raw[j] >> (4 * (uint32_t(at) & 1)) & 15;
        factor[j] = present ? 8u >> shift : 0;
      }
    }
  }

  static __device__ __forceinline__ const uint8_t *gather_address(const uint8_t *address, bool present) {
    return present ? address : reinterpret_cast<const uint8_t *>(&ZEROS);
  }

  static __device__ __forceinline__ Packed load_packed(const uint8_t *address) {
    return __ldg(reinterpret_cast<const Packed *>(address));
  }

  // The signed u of word `w` of row `j`, each in a byte of its own.
  __device__ __forceinline__ uint32_t levels(int j, int w, uint32_t signs) const {
    uint32_t words[(sizeof(Packed) + 3) / 4] = {};
    memcpy(words, &raw[j], sizeof(Packed));
    if (V == 1) return words[0] ^ ((signs & 1) ? (BITS == 8 ? 255 : 15) : 0);
    // A multiplication copies the sign bits so that each becomes the highest of a byte. In 8 bits there are four, in
    // four copies that do not overlap; the upper four of eight are multiplied by a 16th of the number.
    if (BITS == 8) {
      uint32_t bits = signs >> (4 * (w & ~1));
      uint32_t spread = w % 2 == 0 ? (bits & 0x0F) * 0x10204080u : (bits & 0xF0) * 0x01020408u;
      return words[w] ^ sign_masks(spread);
    }
    // In 4 bits it is every other of eight. Two copies overlap in one bit, which carries into one that is zero in all
    // of them.
    uint32_t bits = signs >> (8 * (w / 2));
    uint32_t spread = w % 2 == 0 ? (bits & 0x55) * 0x02082080u : (bits & 0xAA) * 0x01041040u;
    uint32_t halves = w % 2 == 0 ? words[w / 2] : words[w / 2] >> 4;
    return (halves ^ sign_masks(spread)) & 0x0F0F0F0Fu;
  }

  // The integer of one row, from u (times factor).
  static __device__ __forceinline__ float integer(uint32_t scaled, uint32_t factor) {
    return BITS == 8 ? float(2 * int32_t(scaled) - 255) : float(2 * int32_t(scaled) - 15 * int32_t(factor));
  }

  template <typename Batch>
  __device__ __forceinline__ void use(const Place (&places)[BATCH], int64_t i, Batch) {
    if (POOLING == SUM && batches++ == MOST_BATCHES) {
      move_sums();
      batches = 1;
    }
    uint32_t signs[BATCH];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      signs[j] = sign_bits<V>(places[j], columns.within);
      count += Batch::all || !places[j].is_none();
      if (BITS == 4) factors += factor[j];
    }
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      if (POOLING == SUM && BITS == 8) {
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          uint32_t word = levels(j, w, signs[j]);
          all[w] += word;
          if (V > 1) odd[w] += odd_bytes(word);
        }
      } else if (POOLING == SUM) {
        // Two rows fit a byte, 2 * 15 * 8.
#pragma unroll
        for (int j = 0; j < BATCH; j += 2) {
          uint32_t word = levels(j, w, signs[j]) * factor[j] + levels(j + 1, w, signs[j + 1]) * factor[j + 1];
          all[w] += word;
          if (V > 1) odd[w] += odd_bytes(word);
        }
      } else if (POOLING == MAX) {
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          uint32_t word = levels(j, w, signs[j]);
          // In 4 bits the integer plus 120, which is never negative; 0 for an absent row.
          if (BITS == 4) word = word * (2 * factor[j]) + (factor[j] ? 120 - 15 * factor[j] : 0) * 0x01010101u;
          all[w] = __vmaxu4(all[w], word);
        }
      } else {
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          if (!Batch::all && places[j].is_none()) continue;
          uint32_t word = levels(j, w, signs[j]);
          uint32_t row_factor = BITS == 8 ? 1 : factor[j];
          float weight = per_sample_weights[i + j];
#pragma unroll
          for (int b = 0; b < COLUMNS; b++) {
            float x = integer((word >> (8 * b) & 255) * row_factor, row_factor);
            float &sum = weighted[column_of(w, b)];
            // Rounded twice, as on the CPU.
            sum = __fadd_rn(sum, __fmul_rn(weight, x));
          }
        }
      }
    }
  }

  // The sum of u (times factor) in a column since the sums were last moved: at most 256 * 255.
  __device__ __forceinline__ uint32_t sum_of(int w, int b) const { return __byte_perm(pair_of(w, b), 0, half_of(b)); }

  // The same as a float. With 0x4B00 above it, a 16-bit number is a float, and 2^23 too large.
  __device__ __forceinline__ float float_sum_of(int w, int b) const {
    return __uint_as_float(__byte_perm(pair_of(w, b), 0x4B00, half_of(b))) - 0x1p23f;
  }

  // The 32-bit register that has the sum of a column in one of its halves, and the choice of that half.
  __device__ __forceinline__ uint32_t pair_of(int w, int b) const {
    return V == 1 || b % 2 == 0 ? all[w] - (odd[w] << 8) : odd[w];
  }
  static __device__ __forceinline__ constexpr uint32_t half_of(int b) { return b < 2 ? 0x5410 : 0x5432; }

  // What makes integers of sums of u (times factor): integer = 2 * sum - offset().
  __device__ __forceinline__ uint32_t offset() const { return BITS == 8 ? 255 * count : 15 * factors; }

  // Moves the sums of a long bag to shared memory; in 8 bits without the 255 of each row, which end_together()
  // subtracts.
  __device__ __forceinline__ void move_sums() {
    uint32_t lane = threadIdx.x % bags.lanes;
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
      for (int b = 0; b < COLUMNS; b++) {
        int64_t integer = 2 * int64_t(sum_of(w, b)) - (BITS == 8 ? 0 : int64_t(offset()));
        atomicAdd(&long_sums[lane * V + column_of(w, b)], static_cast<unsigned long long>(integer));
      }
    clear();
  }

  // The value of an integer summed over so many rows, per unit.
  __device__ __forceinline__ float unit_of(uint64_t rows) const {
    return mean && rows > 0 ? __fdiv_rn(unit, __ull2float_rn(rows)) : unit;
  }

  // The threads of a bag call this together. The widest store takes 16 bytes, half of a sector, which costs the L2 as
  // much as a whole one. So two neighbours exchange halves, and store whole sectors: of the first one's columns, then
  // of the second one's.
  __device__ __forceinline__ void store(int64_t bag, const float (&x)[V]) const {
    float *to = out + bag * embedding_dim + columns.first;
    bool aligned = embedding_dim % 4 == 0;
    if constexpr (V == 1) {
      if (columns.n > 0) to[0] = x[0];
    } else if (bags.lanes == 1) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        float four[4] = {x[v], x[v + 1], x[v + 2], x[v + 3]};
        store_row<4>(to + v, columns.n - v, aligned, four);
      }
    } else {
      uint32_t half = threadIdx.x % 2, pair = 3u << (threadIdx.x % 32 - half);
      int others = __shfl_xor_sync(pair, columns.n, 1);
#pragma unroll
      for (int v = 0; v < V; v += 8) {
        float kept[4], received[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float low = x[v + i], high = x[v + 4 + i];
          kept[i] = half ? high : low;
          received[i] = __shfl_xor_sync(pair, half ? low : high, 1);
        }
        int at = v + 4 * half;
#pragma unroll
        for (uint32_t owner = 0; owner < 2; owner++) {
          bool is_own = owner == half;
          float four[4];
#pragma unroll
          for (int i = 0; i < 4; i++) four[i] = is_own ? kept[i] : received[i];
          int distance = is_own ? 0 : half ? -V : V;
          store_row<4>(to + distance + at, (is_own ? columns.n : others) - at, aligned, four);
        }
      }
    }
  }

  __device__ __forceinline__ void end(int64_t bag) {
    float x[V], scale = POOLING == SUM ? unit_of(count) : unit, subtrahend = __uint2float_rn(offset());
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
      for (int b = 0; b < COLUMNS; b++) {
        float integer;  // exact: of at most 17 bits
        if (POOLING == WEIGHTED) {
          integer = weighted[column_of(w, b)];
        } else if (POOLING == MAX) {
          int32_t most = all[w] >> (8 * b) & 255;
          integer = count == 0 ? 0 : __int2float_rn(BITS == 8 ? 2 * most - 255 : most - 120);
        } else {
          integer = __fmaf_rn(2, float_sum_of(w, b), -subtrahend);
        }
        x[column_of(w, b)] = __fmul_rn(integer, scale);
      }
    store(bag, x);
  }

  // Combines the partial results of the groups.
  __device__ __forceinline__ void end_together(int64_t bag) {
    uint32_t lane = threadIdx.x % bags.lanes;
    if constexpr (POOLING == SUM) {
      move_sums();
      if (lane == 0) atomicAdd(long_count, static_cast<unsigned long long>(count));
      __syncthreads();
      uint64_t rows = *long_count;
      if (threadIdx.x < bags.lanes) {
        float x[V], scale = unit_of(rows);
#pragma unroll
        for (int v = 0; v < V; v++) {
          int64_t sum = int64_t(long_sums[lane * V + v]);
          long_sums[lane * V + v] = 0;
          x[v] = __fmul_rn(__ll2float_rn(BITS == 8 ? sum - 255 * int64_t(rows) : sum), scale);
        }
        store(bag, x);
      }
      __syncthreads();
      if (threadIdx.x == 0) *long_count = 0;
    } else {
      constexpr int N = POOLING == MAX ? WORDS : V;
      using Part = typename std::conditional<POOLING == MAX, uint32_t, float>::type;
      __shared__ Part parts[N][THREADS];
      __shared__ uint32_t counts[THREADS];
#pragma unroll
      for (int n = 0; n < N; n++) {
        if constexpr (POOLING == MAX)
          parts[n][threadIdx.x] = all[n];
        else
          parts[n][threadIdx.x] = weighted[n];
      }
      counts[threadIdx.x] = count;
      __syncthreads();
      if (threadIdx.x >= bags.lanes) return;
      for (uint32_t thread = threadIdx.x + bags.lanes; thread < THREADS; thread += bags.lanes) {
#pragma unroll
        for (int n = 0; n < N; n++) {
          if constexpr (POOLING == MAX)
            all[n] = __vmaxu4(all[n], parts[n][thread]);
          else
            weighted[n] = __fadd_rn(weighted[n], parts[n][thread]);
        }
        count += counts[thread];
      }
      end(bag);
    }
  }
};

template <int THREADS, Pooling POOLING, int BITS, int V, int SHARE, bool PLAIN, typename Hash>
__device__ __forceinline__ void forward_low_bit(const uint8_t *__restrict__ packed, const uint8_t *__restrict__ shifts,
                                                const Inputs &inputs, const float *__restrict__ per_sample_weights,
                                                float *__restrict__ out, const BagParams &bags, const Hash &hash,
                                                uint32_t embedding_dim, uint32_t mean, float unit) {
  constexpr bool HAS_LONG = !PLAIN && POOLING == SUM;
  __shared__ unsigned long long long_sums[HAS_LONG ? 32 * V : 1];
  __shared__ unsigned long long long_count;
  if (HAS_LONG) {
    // The first barrier of the walk through long bags comes before their first use.
    for (uint32_t i = threadIdx.x; i < 32 * V; i += THREADS) long_sums[i] = 0;
    if (threadIdx.x == 0) long_count = 0;
  }
  uint32_t lane = threadIdx.x % bags.lanes;
  for (uint32_t chunk = blockIdx.y; uint64_t(chunk) * bags.lanes * V < embedding_dim; chunk += gridDim.y) {
    Columns<V> columns(hash, chunk * bags.lanes + lane, embedding_dim);
    LowBitForward<THREADS, POOLING, BITS, V, Hash> work = {packed,    shifts,     per_sample_weights, out,  bags,
                                                           hash,      columns,    embedding_dim,      mean, unit,
                                                           long_sums, &long_count};
    for_each_batch<THREADS, SHARE, PLAIN>(bags, hash, inputs, columns.first / hash.block, work);
  }
}

#define FORWARD_LOW_BIT_KERNEL(NAME, THREADS, POOLING, BITS, HASH, V, SHARE, PLAIN)                                    \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
      NAME(const uint8_t *packed, const uint8_t *shifts, const void *indices, const void *offsets,                     \
           const TableRows *table_rows, const float *per_sample_weights, float *out, BagParams bags, HASH slots,       \
           uint32_t embedding_dim, uint32_t mean, float unit) {                                                        \
    forward_low_bit<THREADS, POOLING, BITS, V, SHARE, PLAIN>(packed, shifts, {indices, offsets, table_rows},           \
                                                             per_sample_weights, out, bags, slots, embedding_dim,      \
                                                             mean, unit);                                              \
  }
