// Marks for the parts of a sparse gradient that may not be zero: a byte for each TOUCHED_CHUNK slots.
#pragma once
#include <cstdint>

#include "constants.cuh"

struct Touched {
  uint8_t *marks;  // null where the gradient is dense

  // Any thread may mark any chunk at any time. A mark that is seen is not written again, so that those of frequent rows
  // stay in the L1 caches; a mark that is not seen yet is written twice.
  __device__ __forceinline__ void mark(uint64_t slot) const {
    if (marks && !marks[slot / TOUCHED_CHUNK]) marks[slot / TOUCHED_CHUNK] = 1;
  }

  // Marks the V slots of columns `within` … + V - 1 of the block at `place`, if no other thread does: that of the first
  // columns of the block, or of the first in the chunk.
  template <int V, typename Hash>
  __device__ __forceinline__ void mark(const Hash &hash, typename Hash::Place place, uint32_t within) const {
    if (!marks) return;
    uint64_t slot = hash.template vector<V>(place, within) * V;
    if (within == 0 || slot % TOUCHED_CHUNK < V) mark(slot);
  }
};
