// Backward of the sparse adapter towards its weights: a reduction over all tokens in two deterministic stages, without
// atomics. With h, t and y from backward_input.h, x^ = (x - mean) rstd (x itself without a norm), Q = t^T x^:
//
//     dU = scale * owned_up * (y^T h)                         [D, r]
//     dW = owned_down * (Q diag(g) + (sum t) b^T)             [r, D]
//     dg = column sums of W_down[d] * Q,   db = (sum t) W_down[d]                 [D]
//     db_up[u] = scale * sum y,            db_down[d] = sum t                     [D], [r]
//
// Stage 1: the tokens are cut into segments, each inside one group; a block owns some consecutive segments (a slice),
// 64 columns and 64 ranks, and adds what its group owns to its own part of `partial`, so memory does not grow with V.
// Stage 2 sums the slices in a fixed order.
//
// Bytes, M rows, S slices: read y and x, 2 M D s (again from the L2 cache for each further 64 ranks), h and t 2 M r s
// (again for each 64 columns); write and read `partial`, 2 * S * (2 D r + 2 D r' / TILE) * 4.
#pragma once
#include "forward.h"

namespace mosa_fast {

template <class T>
struct BackwardWeightShared {
  alignas(32) T grad[TILE * PITCH<T>], x[TILE * PITCH<T>], hidden[TILE * PITCH<T>], grad_pre[TILE * PITCH<T>];
  alignas(32) float staging[TILE * STAGING];
  float sums[LANES][TILE], rank_sums[TILE];
};

template <class T>
MOSA_INLINE void put(const Array& array, const Eight& eight, T* target) {
  MOSA_UNROLL
  for (int i = 0; i < EIGHT; ++i) target[i] = from_float<T>(element(array, eight, i));
}

template <class T>
MOSA_INLINE void backward_weight_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  auto& shared = *reinterpret_cast<BackwardWeightShared<T>*>(memory);
  const int column_tiles = tiles(s.width), chunks = tiles(s.bottleneck);
  const uint32_t number = static_cast<uint32_t>(block);
  const int chunk = number % chunks, tile = number / chunks % column_tiles;
  const int64_t slice = number / chunks / column_tiles;
  const int first_column = tile * TILE, first_rank = chunk * TILE;
  const bool normed = a.arrays[NORM_WEIGHT].data != nullptr;
  const float scale = scale_of(a);
  float* up_partial = static_cast<float*>(a.arrays[PARTIAL].data) + slice * partial_length(s);
  float* down_partial = up_partial + s.width * s.bottleneck;
  float* norm_partial = down_partial + s.width * s.bottleneck + chunk * 2 * s.width;
  PerThread<Eight, SLOTS> ahead_grad;  // only y: for more, and for h and t in the L2 cache, registers do not suffice
  PerThread<float, EIGHT> grad_sums;
  Accumulator<T> up, down;  // y^T h and Q^T: columns by ranks

  // Sums over the rows of a segment: first each thread its own rows, into its own eight of `sums` (those of t at once, to
  // spare registers), then the threads of a column in order.
  auto own_sums = [&](int thread) { return &shared.sums[thread / PARTS][thread % PARTS * EIGHT]; };
  auto add_up = [&] {
    phase([&](int thread) {
      if (thread >= TILE) return;
      float total = 0.0f;
      for (int lane = 0; lane < LANES; ++lane) total += shared.sums[lane][thread];
      shared.sums[0][thread] = total;
    });
  };

  const int64_t first = slice * s.segments_per_slice;
  const int64_t count = smaller(s.segments_per_slice, s.segments - first);
  for (int64_t index = 0; index < count; ++index) {
    const int64_t segment = first + index, group = segment / s.pieces;
    const int64_t start_row = segment % s.pieces * s.piece_rows;
    const int rows = static_cast<int>(smaller(s.piece_rows, s.rows_per_group - start_row));
    const int64_t out_start = group * s.rows_per_group + start_row, in_start = s.fork ? start_row : out_start;
    auto fetch_rows = [&](int block_row) {
      phase_without_barrier([&](int thread) {
        const int column = first_column + thread % PARTS * EIGHT;
        MOSA_UNROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          const int row = block_row + thread / PARTS + slot * LANES;
          const int columns = row < rows ? s.width - column : 0;
          ahead_grad.at(thread)[slot] = fetch(a.arrays[GRAD_OUT], (out_start + row) * s.width + column, columns);
        }
      });
    };

    up.zero();
    down.zero();
    phase_without_barrier([&](int thread) {
      MOSA_UNROLL
      for (int i = 0; i < EIGHT; ++i) grad_sums.at(thread)[i] = own_sums(thread)[i] = 0.0f;
    });
    fetch_rows(0);
    for (int block_row = 0; block_row < rows; block_row += TILE) {
      phase([&](int thread) {
        const int part = thread % PARTS, column = first_column + part * EIGHT, rank = first_rank + part * EIGHT;
        MOSA_UNROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          put(a.arrays[GRAD_OUT], ahead_grad.at(thread)[slot],
              shared.grad + (thread / PARTS + slot * LANES) * PITCH<T> + part * EIGHT);
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) {
            grad_sums.at(thread)[i] += element(a.arrays[GRAD_OUT], ahead_grad.at(thread)[slot], i);
          }
        }
        MOSA_ROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          const int tile_row = thread / PARTS + slot * LANES, at = tile_row * PITCH<T> + part * EIGHT;
          const int row = block_row + tile_row;
          const bool inside = row < rows;
          const int columns = inside ? s.width - column : 0, ranks = inside ? s.bottleneck - rank : 0;
          const Eight x = fetch(a.arrays[X], (in_start + row) * s.width + column, columns);
          float mean = 0.0f, rstd = 1.0f;
          if (normed && inside) {
            const float* stats = static_cast<const float*>(a.arrays[STATS].data) + (in_start + row) * 2;
            mean = stats[0];
            rstd = stats[1];
          }
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) {
            shared.x[at + i] = from_float<T>(i < columns ? (element(a.arrays[X], x, i) - mean) * rstd : 0.0f);
          }
          const int64_t rank_at = (out_start + row) * s.bottleneck + rank;
          put(a.arrays[HIDDEN], fetch(a.arrays[HIDDEN], rank_at, ranks), shared.hidden + at);
          const Eight grad_pre = fetch(a.arrays[GRAD_PRE], rank_at, ranks);
          put(a.arrays[GRAD_PRE], grad_pre, shared.grad_pre + at);
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) own_sums(thread)[i] += element(a.arrays[GRAD_PRE], grad_pre, i);
        }
      });
      if (block_row + TILE < rows) fetch_rows(block_row + TILE);
      up.template multiply<ACROSS_DEPTH, ACROSS_DEPTH>(shared.grad, PITCH<T>, shared.hidden, PITCH<T>);
      down.template multiply<ACROSS_DEPTH, ACROSS_DEPTH>(shared.x, PITCH<T>, shared.grad_pre, PITCH<T>);
    }

    add_up();
    phase([&](int thread) {
      if (thread >= TILE) return;
      shared.rank_sums[thread] = shared.sums[0][thread];  // sum t
      if (first_rank + thread < s.bottleneck && tile == 0) {
        static_cast<float*>(a.arrays[DOWN_SUMS].data)[segment * s.bottleneck + first_rank + thread] =
            shared.sums[0][thread];
      }
    });
    phase([&](int thread) {
      MOSA_UNROLL
      for (int i = 0; i < EIGHT; ++i) own_sums(thread)[i] = grad_sums.at(thread)[i];
    });
    add_up();
    phase([&](int thread) {
      if (thread < TILE && first_column + thread < s.width && chunk == 0) {
        static_cast<float*>(a.arrays[UP_SUMS].data)[segment * s.width + first_column + thread] = shared.sums[0][thread];
      }
    });

    // What this segment's group owns goes to the slice: stored first, added to later, by the same thread.
    const bool later = index > 0;
    const int down_expert = expert_of(a, group, 0), up_expert = expert_of(a, group, 1);
    up.store_to(shared.staging);
    phase([&](int thread) {
      for (int i = thread; i < TILE * TILE; i += THREADS) {
        const int64_t column = first_column + i / TILE, rank = first_rank + i % TILE;
        if (column >= s.width || rank >= s.bottleneck) continue;
        const int64_t at = column * s.bottleneck + rank;
        const float value = shared.staging[i / TILE * STAGING + i % TILE] * scale *
            weight_ownership(a.arrays[UP_OWNER], at, up_expert, s.up_experts);
        up_partial[at] = later ? up_partial[at] + value : value;
      }
    });
    down.store_to(shared.staging);
    phase([&](int thread) {
      for (int i = thread; i < TILE * TILE; i += THREADS) {
        const int64_t rank = first_rank + i / TILE, column = first_column + i % TILE;
        if (column >= s.width || rank >= s.bottleneck) continue;
        const int64_t at = rank * s.width + column;
        float value = shared.staging[i % TILE * STAGING + i / TILE];
        if (normed) {
          value = value * load(a.arrays[NORM_WEIGHT], column) +
              shared.rank_sums[i / TILE] * load(a.arrays[NORM_BIAS], column);
        }
        value *= weight_ownership(a.arrays[DOWN_OWNER], at, down_expert, s.down_experts);
        down_partial[at] = later ? down_partial[at] + value : value;
      }
    });
    if (!normed) continue;
    phase([&](int thread) {
      const int64_t column = first_column + thread;
      if (thread >= TILE || column >= s.width) return;
      float grad_weight = later ? norm_partial[column] : 0.0f;
      float grad_bias = later ? norm_partial[s.width + column] : 0.0f;
      for (int i = 0; i < TILE && first_rank + i < s.bottleneck; ++i) {
        const float weight = weight_value(
            a.arrays[DOWN_WEIGHT], &a.arrays[DOWN_INIT], a.arrays[DOWN_OWNER], (first_rank + i) * s.width + column,
            down_expert, s.down_experts);
        grad_weight += weight * shared.staging[thread * STAGING + i];
        grad_bias += weight * shared.rank_sums[i];
      }
      norm_partial[column] = grad_weight;
      norm_partial[s.width + column] = grad_bias;
    });
  }
}

// Stage 2: one thread for each element of every gradient, and a last block for the scale's.
struct FinishShared { float totals[THREADS]; };

MOSA_BOTH inline int64_t finish_elements(const Sizes& s) {
  return 2 * s.width * s.bottleneck + 2 * s.width + s.up_experts * s.width + s.down_experts * s.bottleneck;
}

MOSA_INLINE float bias_gradient(
    const Arguments& a, Name name, int projection, bool split, int64_t index, int64_t columns, int64_t experts) {
  const Sizes& s = a.sizes;
  const float* sums = static_cast<const float*>(a.arrays[name].data);
  const int row = static_cast<int>(index / columns);
  float total = 0.0f;
  for (int64_t segment = 0; segment < s.segments; ++segment) {
    const float owned = split ? ownership(row, expert_of(a, segment / s.pieces, projection), experts) : 1.0f;
    total += owned * sums[segment * columns + index % columns];
  }
  return total;
}

MOSA_INLINE void finish_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  auto& shared = *reinterpret_cast<FinishShared*>(memory);
  const int64_t weights = s.width * s.bottleneck, length = partial_length(s), chunks = tiles(s.bottleneck);
  if (block * THREADS < finish_elements(s)) {
    phase([&](int thread) {
      if (!a.arrays[PARTIAL].data) return;
      int64_t index = block * THREADS + thread;
      if (index < 2 * weights + 2 * s.width) {
        const bool norms = index >= 2 * weights;
        const Name target = index < weights ? GRAD_UP_WEIGHT
            : !norms                        ? GRAD_DOWN_WEIGHT
            : index < 2 * weights + s.width ? GRAD_NORM_WEIGHT
                                            : GRAD_NORM_BIAS;
        if (!a.arrays[target].data) return;
        const float* partial = static_cast<const float*>(a.arrays[PARTIAL].data) + index;
        float total = 0.0f;
        for (int64_t slice = 0; slice < s.slices; ++slice) {
          for (int64_t chunk = 0; chunk < (norms ? chunks : 1); ++chunk) {
            total += partial[slice * length + chunk * 2 * s.width];
          }
        }
        const int64_t at = norms ? (index - 2 * weights) % s.width : index % weights;
        store(a.arrays[target], at, total);
        return;
      }
      index -= 2 * weights + 2 * s.width;
      if (index < s.up_experts * s.width) {
        store(a.arrays[GRAD_UP_BIAS], index,
              scale_of(a) * bias_gradient(a, UP_SUMS, 1, a.arrays[UP_OWNER].data, index, s.width, s.up_experts));
        return;
      }
      index -= s.up_experts * s.width;
      if (index < s.down_experts * s.bottleneck) {
        store(a.arrays[GRAD_DOWN_BIAS], index,
              bias_gradient(a, DOWN_SUMS, 0, a.arrays[DOWN_OWNER].data, index, s.bottleneck, s.down_experts));
      }
    });
    return;
  }
  if (!a.arrays[SCALE_PARTIAL].data) return;
  phase([&](int thread) {
    float total = 0.0f;
    for (int64_t i = thread; i < s.programs; i += THREADS) {
      total += static_cast<const float*>(a.arrays[SCALE_PARTIAL].data)[i];
    }
    shared.totals[thread] = total;
  });
  for (int half = THREADS / 2; half > 0; half /= 2) {
    phase([&](int thread) {
      if (thread < half) shared.totals[thread] += shared.totals[thread + half];
    });
  }
  phase([&](int thread) {
    if (thread == 0) store(a.arrays[GRAD_SCALE_TENSOR], 0, shared.totals[0]);
  });
}

}  // namespace mosa_fast
