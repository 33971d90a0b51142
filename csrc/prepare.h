// The weights that each group computes with, made once for each call instead of once for each block of rows.
//
// For group v with experts (d, u), rounded to the product's dtype and padded with zeros to multiples of TILE:
//
//     down_effective[v] = W_down[d] diag(g)      [r', D']          up_effective[v] = W_up[u]     [D', r']
//     up_bias_effective[v] = b_up[u]             [D']
//     vectors[v, 0] = e = W_down[d] b + b_down[d]                  vectors[v, 1] = w = row sums of the same
//
// Bytes a group: reads 4 to 9 a weight of each projection, writes 2 or 4; the main kernels then copy the tiles to
// shared memory asynchronously, without masks or arithmetic. Scratch: V D' r' elements a projection.
#pragma once
#include "block.h"

namespace mosa_fast {

constexpr int UP_WEIGHTS_A_BLOCK = 8 * THREADS;

struct PrepareShared { float bias[THREADS], sums[THREADS]; };

MOSA_INLINE int expert_of(const Arguments& a, int64_t group, int projection) {
  return static_cast<const int32_t*>(a.arrays[EXPERTS].data)[2 * group + projection];
}

// Blocks of one group: one for each padded rank, then the up-projection's, then its bias's.
MOSA_BOTH inline int64_t prepare_blocks(int64_t padded_width, int64_t padded_ranks) {
  return padded_ranks + (padded_width * padded_ranks + UP_WEIGHTS_A_BLOCK - 1) / UP_WEIGHTS_A_BLOCK +
      (padded_width + THREADS - 1) / THREADS;
}

template <class T>
MOSA_INLINE void prepare_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(memory);
  // 32 bits for what counts within a group: a block is known by a 32-bit number, and D' r' is far below 2^31.
  const int width = static_cast<int>(tiles(s.width)) * TILE, ranks = static_cast<int>(tiles(s.bottleneck)) * TILE;
  const int each = static_cast<int>(prepare_blocks(width, ranks));
  const int part = static_cast<int>(static_cast<uint32_t>(block) % each);
  const int64_t group = static_cast<uint32_t>(block) / each;
  const int down_expert = expert_of(a, group, 0), up_expert = expert_of(a, group, 1);

  if (part < ranks) {
    const int rank = part;
    T* row = static_cast<T*>(a.arrays[DOWN_EFFECTIVE].data) + (group * ranks + rank) * width;
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
    if (!a.arrays[VECTORS].data || rank >= s.bottleneck) return;
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
      float* vectors = static_cast<float*>(a.arrays[VECTORS].data) + group * 2 * s.bottleneck;
      vectors[rank] = shared.bias[0] +
          bias_value(a.arrays[DOWN_BIAS], a.arrays[DOWN_OWNER].data != nullptr, rank, s.bottleneck, down_expert,
                     s.down_experts);
      vectors[s.bottleneck + rank] = shared.sums[0];
    });
    return;
  }

  const int up_blocks = (width * ranks + UP_WEIGHTS_A_BLOCK - 1) / UP_WEIGHTS_A_BLOCK;
  if (part < ranks + up_blocks) {
    T* weights = static_cast<T*>(a.arrays[UP_EFFECTIVE].data) + group * (width * ranks);
    phase([&](int thread) {
      for (int i = 0; i < UP_WEIGHTS_A_BLOCK / THREADS; ++i) {
        const int index = (part - ranks) * UP_WEIGHTS_A_BLOCK + i * THREADS + thread;
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
    const int column = (part - ranks - up_blocks) * THREADS + thread;
    if (column >= width) return;
    static_cast<float*>(a.arrays[UP_BIAS_EFFECTIVE].data)[group * width + column] = column < s.width
        ? bias_value(a.arrays[UP_BIAS], a.arrays[UP_OWNER].data != nullptr, column, s.width, up_expert, s.up_experts)
        : 0.0f;
  });
}

}  // namespace mosa_fast
