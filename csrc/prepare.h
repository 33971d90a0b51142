// The weights that each group computes with, made once a pass instead of once for each block of rows.
//
// For each slot with experts (d, u), rounded to the product's dtype and padded with zeros to multiples of TILE:
//
//     prepared_down = W_down[d] diag(g)      [r', D']          prepared_up = W_up[u]     [D', r']
//     prepared_up_bias = b_up[u]             [D']
//     prepared_vectors[0] = e = W_down[d] b + b_down[d]        prepared_vectors[1] = w = row sums of prepared_down
//
// A dense projection has one slot; one that is split has a slot for every group, or (by_expert) for every expert, for
// merged and for ids out of range, as mosa_fast/ops/slots.py has it.
//
// Bytes a slot: reads 4 to 9 a weight, writes 2 or 4; the main kernels then copy the tiles to shared memory
// asynchronously, without masks or arithmetic.
#pragma once
#include "block.h"

namespace mosa_fast {

constexpr int UP_WEIGHTS_A_BLOCK = 8 * THREADS;
constexpr int NOBODY = -2;  // an expert that owns nothing

struct PrepareShared { float bias[THREADS], sums[THREADS]; };

MOSA_INLINE int expert_of(const Arguments& a, int64_t group, int projection) {
  return static_cast<const int32_t*>(a.arrays[EXPERTS].data)[2 * group + projection];
}

// Which of a projection's prepared weights (0 down, 1 up) a group computes with.
MOSA_INLINE int64_t slot_of(const Arguments& a, int64_t group, int projection) {
  if (!a.arrays[projection ? UP_OWNER : DOWN_OWNER].data) return 0;
  if (!a.sizes.by_expert) return group;
  const int64_t experts = projection ? a.sizes.up_experts : a.sizes.down_experts;
  const int64_t expert = expert_of(a, group, projection);
  return expert >= 0 && expert < experts ? expert : expert == MERGED ? experts : experts + 1;
}

// The expert whose weights a slot holds.
MOSA_INLINE int expert_of_slot(const Arguments& a, int64_t slot, int projection) {
  if (!a.sizes.by_expert) return expert_of(a, slot, projection);
  const int64_t experts = projection ? a.sizes.up_experts : a.sizes.down_experts;
  return slot < experts ? static_cast<int>(slot) : slot == experts ? MERGED : NOBODY;
}

// Blocks of one slot of the up-projection: its weights', then its bias's.
MOSA_BOTH inline int64_t up_blocks(int64_t padded_width, int64_t padded_ranks) {
  return (padded_width * padded_ranks + UP_WEIGHTS_A_BLOCK - 1) / UP_WEIGHTS_A_BLOCK +
      (padded_width + THREADS - 1) / THREADS;
}

// A block for each padded rank of each slot of the down-projection, then the up-projection's.
MOSA_BOTH inline int64_t prepare_blocks(const Sizes& s) {
  const int64_t width = padded(s.width), ranks = padded(s.bottleneck);
  return s.down_slots * ranks + s.up_slots * up_blocks(width, ranks);
}

template <class T>
MOSA_INLINE void prepare_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  // 32 bits for what counts within a slot: a block is known by a 32-bit number, and D' r' is far below 2^31.
  const int width = static_cast<int>(tiles(s.width)) * TILE, ranks = static_cast<int>(tiles(s.bottleneck)) * TILE;

  if (block < s.down_slots * ranks) {
    const int64_t slot = block / ranks;
    const int rank = static_cast<int>(block % ranks), down_expert = expert_of_slot(a, slot, 0);
    T* row = static_cast<T*>(a.arrays[PREPARED_DOWN].data) + block * width;
    const bool normed = a.arrays[NORM_WEIGHT].data != nullptr;
    phase([&](int thread) {
      float bias = 0.0f, sum = 0.0f;
      for (int column = thread; column < width; column += THREADS) {
        float value = 0.0f;
        if (rank < s.bottleneck && column < s.width) {
          value = weight_value(
              a.arrays[DOWN_WEIGHT], &a.arrays[DOWN_INIT], a.arrays[DOWN_OWNER], rank * s.width + column,
              down_expert, s.down_experts);
          if (normed) {
            bias += value * load(a.arrays[NORM_BIAS], column);
            value = value * load(a.arrays[NORM_WEIGHT], column);
            sum += rounded<T>(value);  // as the product rounds it, so that the mean cancels exactly
          }
        }
        row[column] = from_float<T>(value);
      }
      shared.bias[thread] = bias;
      shared.sums[thread] = sum;
    });
    for (int half = THREADS / 2; half > 0; half /= 2) {
      phase([&](int thread) {
        if (thread < half) {
          shared.bias[thread] += shared.bias[thread + half];
          shared.sums[thread] += shared.sums[thread + half];
        }
      });
    }
    phase([&](int thread) {
      if (thread > 0) return;
      float* vectors = static_cast<float*>(a.arrays[PREPARED_VECTORS].data) + slot * 2 * ranks;
      vectors[rank] = shared.bias[0];
      if (rank < s.bottleneck) {
        vectors[rank] += bias_value(
            a.arrays[DOWN_BIAS], a.arrays[DOWN_OWNER].data != nullptr, rank, s.bottleneck, down_expert, s.down_experts);
      }
      vectors[ranks + rank] = shared.sums[0];
    });
    return;
  }

  const int64_t up_block = block - s.down_slots * ranks, each = up_blocks(width, ranks), slot = up_block / each;
  const int part = static_cast<int>(up_block % each), up_expert = expert_of_slot(a, slot, 1);
  const int weight_blocks = (width * ranks + UP_WEIGHTS_A_BLOCK - 1) / UP_WEIGHTS_A_BLOCK;
  if (part < weight_blocks) {
    T* weights = static_cast<T*>(a.arrays[PREPARED_UP].data) + slot * (width * ranks);
    phase([&](int thread) {
      for (int i = 0; i < UP_WEIGHTS_A_BLOCK / THREADS; ++i) {
        const int index = part * UP_WEIGHTS_A_BLOCK + i * THREADS + thread;
        if (index >= width * ranks) return;
        const int column = index / ranks, rank = index % ranks;
        const bool inside = column < s.width && rank < s.bottleneck;
        weights[index] = from_float<T>(
            inside ? weight_value(a.arrays[UP_WEIGHT], nullptr, a.arrays[UP_OWNER], column * s.bottleneck + rank,
                                  up_expert, s.up_experts)
                   : 0.0f);
      }
    });
    return;
  }
  phase([&](int thread) {
    const int column = (part - weight_blocks) * THREADS + thread;
    if (column >= width) return;
    static_cast<float*>(a.arrays[PREPARED_UP_BIAS].data)[slot * width + column] = column < s.width
        ? bias_value(a.arrays[UP_BIAS], a.arrays[UP_OWNER].data != nullptr, column, s.width, up_expert, s.up_experts)
        : 0.0f;
  });
}

}  // namespace mosa_fast
