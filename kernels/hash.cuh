// From a virtual element (row, column) to its slot in hashed_weight: the twin of src/hash. Both must place every
// element alike. All arithmetic is on u64 and wraps; a row is an i64 index reinterpreted as u64.
//
// The interface of every family to the loops:
//
// Hash::Place                     the location of one column block of one row; Place::none() stands for "no row"
// hash.column_block(number)       a Hash::ColumnBlock: the constants of a column block, computed once per thread
// hash.shift(column_block, rows)  the same for a table whose row 0 is row `rows` of the virtual table
// hash.locate(row, column_block)  the place of that column block of that row
// hash.at(base, place)            `base` is an address in block 0 of hashed_weight (affine: counted from slot 0);
//                                 returns the corresponding address at `place`
// hash.vector<V>(place, i)        the slots of columns i … i + V - 1 of the block, numbered in units of V slots
// place.signs_of<V>(i)            the signs of columns i … i + V - 1 of the block
// flip<V>(signs, v, x)            x, negated if the v-th of those signs is negative
// shuffle(mask, place, lane, n)   the place held by thread `lane` of a group of n threads
// Hash::READS_ROWS                whether locate() reads memory, and so is worth calling before its result is needed
#pragma once
#include <cstddef>
#include <cstdint>

#include "constants.cuh"

// Divides many numbers by the same one, with a multiplication and one correction. The quotient by the reciprocal is
// exact or one too small; src/hash/divisor.rs has the proof.
struct Divisor {
  uint64_t value;
  uint64_t reciprocal;

  __device__ __forceinline__ uint64_t rem(uint64_t x) const {
    uint64_t remainder = x - __umul64hi(x, reciprocal) * value;
    return remainder >= value ? remainder - value : remainder;
  }

  __device__ __forceinline__ uint64_t div(uint64_t x) const {
    uint64_t quotient = __umul64hi(x, reciprocal);
    return x - quotient * value >= value ? quotient + 1 : quotient;
  }
};
CHECK_LAYOUT(Divisor);

struct BlockSigns {
  uint32_t top;
};

template <int V>
__device__ __forceinline__ float flip(BlockSigns signs, int v, float x) {
  return __uint_as_float(__float_as_uint(x) ^ ((signs.top << (V - 1 - v)) & 0x80000000u));
}

template <int V>
__device__ __forceinline__ double flip(BlockSigns signs, int v, double x) {
  return int32_t(signs.top << (V - 1 - v)) < 0 ? -x : x;
}

struct BlockPlace {
  uint32_t block;  // at most 2^32 - 2, since there are fewer than 2^32 blocks
  uint32_t signs;

  static __device__ __forceinline__ BlockPlace none() { return {0xFFFFFFFFu, 0}; }
  __device__ __forceinline__ bool is_none() const { return block == 0xFFFFFFFFu; }

  // Moves the sign of the last column to the highest bit, so that each sign is a constant shift away from the sign bit
  // of a float. Blocks longer than 32 have no signs, so for them any shift will do.
  template <int V>
  __device__ __forceinline__ BlockSigns signs_of(uint32_t i) const {
    return {signs << ((32 - V - i) & 31)};
  }
};

// What the families that place rows in aligned blocks have in common.
struct BlockSlots {
  static constexpr bool READS_ROWS = false;

  uint64_t key;
  uint64_t reciprocal;
  uint32_t num_blocks;
  uint32_t block;
  uint32_t sign_mask;
  uint32_t stride;

  using Place = BlockPlace;

  static __device__ __forceinline__ uint64_t finalize(uint64_t h) {
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    return h ^ (h >> 31);
  }

  // The state of SplitMix64 for row 0 of a column block.
  __device__ __forceinline__ uint64_t start(uint32_t column_block) const {
    return key + (uint64_t(column_block) + 1) * 0x9E3779B97F4A7C15ull;
  }

  // A single multiply-add, because a block of at most 2^24 values takes less than 2^32 bytes.
  template <typename T>
  __device__ __forceinline__ T *at(T *base, Place place) const {
    uint32_t bytes = block * uint32_t(sizeof(T));
    return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(base) + uint64_t(place.block) * bytes);
  }

  template <int V>
  __device__ __forceinline__ uint64_t vector(Place place, uint32_t within) const {
    return uint64_t(place.block) * (block / V) + within / V;
  }
};
CHECK_LAYOUT(BlockSlots);

// Rows at random places.
struct MixSlots : BlockSlots {
  using ColumnBlock = uint64_t;

  __device__ __forceinline__ ColumnBlock column_block(uint32_t number) const { return start(number); }

  __device__ __forceinline__ ColumnBlock shift(ColumnBlock column_block, int64_t rows) const {
    return column_block + rows;
  }

  __device__ __forceinline__ Place locate(uint64_t row, ColumnBlock column_block) const {
    uint64_t h = finalize(column_block + row);
    return {__umulhi(uint32_t(h >> 32), num_blocks), uint32_t(h) & sign_mask};
  }
};
static_assert(sizeof(MixSlots) == sizeof(BlockSlots), "the host passes BlockSlots");

// The same number of rows in every block.
struct BalancedSlots : BlockSlots {
  struct ColumnBlock {
    uint64_t first_row;
    uint32_t key;
  };

  __device__ __forceinline__ ColumnBlock column_block(uint32_t number) const {
    return {0, uint32_t(finalize(start(number)) >> 32)};
  }

  __device__ __forceinline__ ColumnBlock shift(ColumnBlock column_block, int64_t rows) const {
    return {column_block.first_row + rows, column_block.key};
  }

  __device__ __forceinline__ Place locate(uint64_t row, ColumnBlock column_block) const {
    uint64_t x = column_block.first_row + row;
    // Bits 32 to 95 of x * reciprocal: the lower half is the position of x in its stratum of rows, the upper half the
    // number of the stratum.
    uint32_t low = uint32_t(x), high = uint32_t(x >> 32), factor = uint32_t(reciprocal >> 32);
    uint64_t product = mad_wide(low, factor, __umulhi(low, uint32_t(reciprocal)));
    product = mad_wide(high, uint32_t(reciprocal), product);
    uint32_t stratum = uint32_t(product >> 32) + high * factor;
    uint32_t turn = stratum * 0x9E3779B9u + column_block.key;
    turn = (turn ^ turn >> 15) * 0x846CA68Bu;
    uint32_t signs = (low ^ turn) * 0x7FEB352Du;
    signs = (signs ^ signs >> 15) * 0x846CA68Bu;
    return {__umulhi(uint32_t(product) * stride + turn, num_blocks), (signs ^ signs >> 16) & sign_mask};
  }

private:
  // a * b + c in one instruction; the compiler would use several.
  static __device__ __forceinline__ uint64_t mad_wide(uint32_t a, uint32_t b, uint64_t c) {
    uint64_t sum;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(sum) : "r"(a), "r"(b), "l"(c));
    return sum;
  }
};
static_assert(sizeof(BalancedSlots) == sizeof(BlockSlots), "the host passes BlockSlots");

// The tensor from which a hash reads what it hashes of each row. Rows past the last, which only a lookup without bounds
// checks has, read the last.
struct RowTensor {
  const void *rows;
  uint64_t last_row;
  uint64_t keys;      // semantic: the bits of a signature that column block 0 hashes
  uint32_t key_bits;  // semantic: how far they move from one column block to the next
  uint32_t row_len;   // the column blocks of a row of a slot table; 0: signatures

  __device__ __forceinline__ uint64_t signature(uint64_t row) const {
    return static_cast<uint64_t>(__ldg(static_cast<const long long *>(rows) + min(row, last_row)));
  }

  __device__ __forceinline__ uint32_t entry(uint64_t row, uint32_t column_block) const {
    return __ldg(static_cast<const uint32_t *>(rows) + min(row, last_row) * row_len + column_block);
  }
};
CHECK_LAYOUT(RowTensor);

// Aligned blocks that depend on a row tensor: the semantic family, which hashes some keys of the row's signature as the
// mix family hashes the row, and slot tables. Which of them is the same for all threads.
struct RowBlocks : BlockSlots {
  static constexpr bool READS_ROWS = true;

  RowTensor tensor;

  struct ColumnBlock {
    uint64_t first_row;
    uint64_t start;  // of a slot table: the number of the column block
    uint64_t keys;
  };

  __device__ __forceinline__ ColumnBlock column_block(uint32_t number) const {
    // A thread past the last column has a column block that no row of the table holds.
    if (tensor.row_len > 0) return {0, min(number, tensor.row_len - 1), 0};
    uint32_t bits = number * tensor.key_bits % 64;
    return {0, start(number), bits == 0 ? tensor.keys : tensor.keys << bits | tensor.keys >> (64 - bits)};
  }

  __device__ __forceinline__ ColumnBlock shift(ColumnBlock column_block, int64_t rows) const {
    return {column_block.first_row + rows, column_block.start, column_block.keys};
  }

  __device__ __forceinline__ Place locate(uint64_t row, ColumnBlock column_block) const {
    row += column_block.first_row;
    // A table that was changed after it was checked still leads to blocks that exist.
    if (tensor.row_len > 0) return {min(tensor.entry(row, uint32_t(column_block.start)), num_blocks - 1), 0};
    uint64_t h = finalize(column_block.start + (tensor.signature(row) & column_block.keys));
    return {__umulhi(uint32_t(h >> 32), num_blocks), uint32_t(h) & sign_mask};
  }
};
static_assert(sizeof(RowBlocks) == sizeof(BlockSlots) + sizeof(RowTensor), "the host passes one behind the other");

__device__ __forceinline__ BlockPlace shuffle(uint32_t mask, BlockPlace place, int lane, int threads) {
  return {__shfl_sync(mask, place.block, lane, threads), __shfl_sync(mask, place.signs, lane, threads)};
}

struct NoSigns {};

template <int V, typename A>
__device__ __forceinline__ A flip(NoSigns, int, A x) {
  return x;
}

struct AffinePlace {
  uint64_t first_slot;

  static __device__ __forceinline__ AffinePlace none() { return {~0ull}; }
  __device__ __forceinline__ bool is_none() const { return first_slot == ~0ull; }

  template <int V>
  __device__ __forceinline__ NoSigns signs_of(uint32_t) const {
    return {};
  }
};

// The family of HashedEmbeddingBag and ROBE: linear in row and column block. Blocks can start at any slot.
struct AffineSlots {
  static constexpr bool READS_ROWS = false;

  uint64_t a, b, c;
  Divisor modulus;
  Divisor starts;
  uint32_t block;

  using Place = AffinePlace;
  using ColumnBlock = uint64_t;

  __device__ __forceinline__ ColumnBlock column_block(uint32_t number) const { return number * b + c; }

  __device__ __forceinline__ ColumnBlock shift(ColumnBlock column_block, int64_t rows) const {
    return column_block + rows * a;
  }

  __device__ __forceinline__ Place locate(uint64_t row, ColumnBlock column_block) const {
    return {starts.rem(modulus.rem(row * a + column_block))};
  }

  template <typename T>
  __device__ __forceinline__ T *at(T *base, Place place) const {
    return base + place.first_slot;
  }

  template <int V>
  __device__ __forceinline__ uint64_t vector(Place place, uint32_t within) const {
    return (place.first_slot + within) / V;
  }
};
CHECK_LAYOUT(AffineSlots);

__device__ __forceinline__ AffinePlace shuffle(uint32_t mask, AffinePlace place, int lane, int threads) {
  return {__shfl_sync(mask, place.first_slot, lane, threads)};
}

// LMA: like the affine family, with some keys of the row's signature in place of the row.
struct LmaSlots {
  static constexpr uint32_t MAX_KEYS = 20;

  uint64_t a, b, c;
  Divisor modulus;
  Divisor starts;
  Divisor positions;  // how many keys of a signature can be selected
  uint32_t selectors[2 * MAX_KEYS];
  uint32_t key_bits;
  uint32_t keys_to_use;
  uint32_t block;
};
CHECK_LAYOUT(LmaSlots);

struct LmaRows : LmaSlots {
  static constexpr bool READS_ROWS = true;
  static constexpr uint32_t WORDS = MAX_KEYS / 4;
  static constexpr uint32_t NO_KEY = 64;

  RowTensor tensor;

  using Place = AffinePlace;
  struct ColumnBlock {
    uint64_t first_row;
    uint64_t sum;
    uint32_t shifts[WORDS];  // by how many bits each key is shifted down, a byte each
  };

  __device__ __forceinline__ ColumnBlock column_block(uint32_t number) const {
    ColumnBlock column_block = {0, number * b + c, {}};
#pragma unroll
    for (uint32_t w = 0; w < WORDS; w++) {
#pragma unroll 1
      for (uint32_t t = 4 * w; t < 4 * w + 4; t++) {
        uint32_t shift = NO_KEY;
        if (t < keys_to_use) {
          uint64_t selector = uint64_t(number) * selectors[2 * t] + selectors[2 * t + 1];
          shift = key_bits * uint32_t(positions.rem(modulus.rem(selector)));
        }
        column_block.shifts[w] |= shift << (t % 4 * 8);
      }
    }
    return column_block;
  }

  __device__ __forceinline__ ColumnBlock shift(ColumnBlock column_block, int64_t rows) const {
    column_block.first_row += rows;
    return column_block;
  }

  __device__ __forceinline__ Place locate(uint64_t row, const ColumnBlock &column_block) const {
    uint64_t signature = tensor.signature(column_block.first_row + row);
    uint32_t keys = 0, mask = 0xFFFFFFFFu >> (32 - key_bits);
#pragma unroll
    for (uint32_t w = 0; w < WORDS; w++) {
      if (4 * w >= keys_to_use) break;
#pragma unroll
      for (uint32_t j = 0; j < 4; j++)
        // Behind the last key, both shifts may exceed the word. Then they give zero, unlike those of C++.
        keys |= __funnelshift_lc(0, shifted(signature, column_block.shifts[w] >> (8 * j) & 0xFF) & mask,
                                 (4 * w + j) * key_bits);
    }
    return {starts.rem(modulus.rem(uint64_t(keys) * a + column_block.sum))};
  }

  template <typename T>
  __device__ __forceinline__ T *at(T *base, Place place) const {
    return base + place.first_slot;
  }

  template <int V>
  __device__ __forceinline__ uint64_t vector(Place place, uint32_t within) const {
    return (place.first_slot + within) / V;
  }

private:
  // The low half of word >> bits; 0 if there are 64 bits or more.
  static __device__ __forceinline__ uint32_t shifted(uint64_t word, uint32_t bits) {
    uint64_t result;
    asm("shr.u64 %0, %1, %2;" : "=l"(result) : "l"(word), "r"(bits));
    return uint32_t(result);
  }
};
static_assert(sizeof(LmaRows) == sizeof(LmaSlots) + sizeof(RowTensor), "the host passes one behind the other");
