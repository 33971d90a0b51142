// Forward of the sparse adapter, one kernel. For a row x of a group with experts (d, u), W = W_down[d], U = W_up[u]:
//
//     p   = rstd (x - mean) diag(g) W^T                       [r]     `pre`: the projection without its biases
//     e   = W b + b_down[d]                                   [r]     one vector a group
//     h   = drop(act(p + e))                                  [r]
//     out = (x) + (skip) + scale * (h U^T + b_up[u])          [D]
//
// Statistics and projection are made in one pass over x, since the norm can be applied afterwards: for the pivot c (the mean
// of the row's first TILE columns), x' = x - c, m' = mean(x') and the row sums w of W diag(g),
//
//     rstd = (mean(x'^2) - m'^2 + eps)^(-1/2),      p = rstd (x' (W diag(g))^T - m' w).
//
// Bytes, M rows of out, T rows of x, s bytes an element: read x T D s (again from the L2 cache to add it, and once more
// for each further 64 ranks) and skip T D s; write out M D s; for backward M r s + 8 T. Weights: 2 D r s for each 64
// rows, from the L2 cache.
#pragma once
#include "prepare.h"

namespace mosa_fast {

template <class T>
struct ForwardShared {
  alignas(32) T weights[2][TILE * PITCH<T>];
  alignas(32) T x[TILE * PITCH<T>];
  alignas(32) float staging[TILE * STAGING];
  float totals[TILE][PARTS], squares[TILE][PARTS];
  float pivot[TILE], mean[TILE], rstd[TILE];
  // then h: TILE rows of r' and 16 bytes more
};

template <class T>
MOSA_INLINE int hidden_pitch(const Sizes& sizes) {
  return static_cast<int>(tiles(sizes.bottleneck)) * TILE + 16 / sizeof(T);
}

MOSA_INLINE float scale_of(const Arguments& a) {
  return a.arrays[SCALE_TENSOR].data ? load(a.arrays[SCALE_TENSOR], 0) : static_cast<float>(a.numbers.scale);
}

MOSA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
MOSA_INLINE void forward_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  auto& shared = *reinterpret_cast<ForwardShared<T>*>(memory);
  T* hidden = reinterpret_cast<T*>(memory + sizeof(ForwardShared<T>));
  const int pitch = hidden_pitch<T>(s);
  const int64_t group = block % s.groups, first_row = block / s.groups * TILE;
  const int column_tiles = tiles(s.width), chunks = tiles(s.bottleneck);
  const int width = column_tiles * TILE, ranks = chunks * TILE;
  const int64_t out_start = group * s.rows_per_group, in_start = s.fork ? 0 : out_start;
  const int64_t down_slot = slot_of(a, group, 0);
  const T* down = static_cast<const T*>(a.arrays[PREPARED_DOWN].data) + down_slot * ranks * width;
  const bool normed = a.arrays[NORM_WEIGHT].data != nullptr;
  const Array& x = a.arrays[X];
  // Rows past the group's end read its last row again and are not stored.
  auto clamped = [&](int row) { return smaller(first_row + row, s.rows_per_group - 1); };
  PerThread<Eight, SLOTS> ahead;
  Accumulator<T> sums;

  auto fetch_x = [&](int tile) {
    phase_without_barrier([&](int thread) {
      const int column = tile * TILE + thread % PARTS * EIGHT;
      MOSA_UNROLL
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = thread / PARTS + slot * LANES;
        ahead.at(thread)[slot] = fetch(x, (in_start + clamped(row)) * s.width + column, s.width - column);
      }
    });
  };

  fetch_x(0);
  phase([&](int thread) {
    MOSA_UNROLL
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int row = thread / PARTS + slot * LANES, part = thread % PARTS;
      float total = 0.0f;
      MOSA_UNROLL
      for (int i = 0; i < EIGHT; ++i) total += element(x, ahead.at(thread)[slot], i);
      shared.staging[row * STAGING + part] = total;
      shared.totals[row][part] = shared.squares[row][part] = 0.0f;
    }
  });
  phase([&](int thread) {
    if (thread >= TILE) return;
    float total = 0.0f;
    for (int part = 0; part < PARTS; ++part) total += shared.staging[thread * STAGING + part];
    shared.pivot[thread] = normed ? total / smaller(TILE, s.width) : 0.0f;
  });

  // Pass 1: statistics and projection, 64 ranks at a time.
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const T* weights = down + chunk * TILE * width;
    sums.zero();
    if (chunk > 0) fetch_x(0);
    phase_without_barrier([&](int thread) { copy_tile(shared.weights[0], weights, width, thread); });
    for (int tile = 0; tile < column_tiles; ++tile) {
      phase([&](int thread) {
        const int part = thread % PARTS;
        const int count = s.width - tile * TILE - part * EIGHT;
        MOSA_UNROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          const int row = thread / PARTS + slot * LANES;
          float total = 0.0f, squares = 0.0f;
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) {
            const float value = i < count ? element(x, ahead.at(thread)[slot], i) - shared.pivot[row] : 0.0f;
            total += value;
            squares += value * value;
            shared.x[row * PITCH<T> + part * EIGHT + i] = from_float<T>(value);
          }
          if (normed && chunk == 0) {
            shared.totals[row][part] += total;
            shared.squares[row][part] += squares;
          }
        }
        arrived();
      });
      if (tile + 1 < column_tiles) {
        fetch_x(tile + 1);
        phase_without_barrier([&](int thread) {
          copy_tile(shared.weights[(tile + 1) % 2], weights + (tile + 1) * TILE, width, thread);
        });
      }
      sums.template multiply<ALONG_DEPTH, ALONG_DEPTH>(shared.x, PITCH<T>, shared.weights[tile % 2], PITCH<T>);
    }
    sums.store_to(shared.staging);
    if (chunk == 0) {
      phase([&](int thread) {
        if (thread >= TILE) return;
        float total = 0.0f, squares = 0.0f;
        for (int part = 0; part < PARTS; ++part) {
          total += shared.totals[thread][part];
          squares += shared.squares[thread][part];
        }
        const float mean = total / s.width, variance = fmaxf(squares / s.width - mean * mean, 0.0f);
        shared.mean[thread] = normed ? mean : 0.0f;
        shared.rstd[thread] = normed ? 1.0f / sqrtf(variance + static_cast<float>(a.numbers.eps)) : 1.0f;
        const int64_t row = first_row + thread;
        if (normed && a.arrays[STATS].data && row < s.rows_per_group && (!s.fork || group == 0)) {
          float* stats = static_cast<float*>(a.arrays[STATS].data) + (in_start + row) * 2;
          stats[0] = shared.pivot[thread] + mean;
          stats[1] = shared.rstd[thread];
        }
      });
    }
    // Here, and up's below, since an address that is made early takes a register all along.
    const float* bias = static_cast<const float*>(a.arrays[PREPARED_VECTORS].data) + down_slot * 2 * ranks;
    phase([&](int thread) {
      const int part = thread % PARTS;
      const int rank = chunk * TILE + part * EIGHT, count = s.bottleneck - rank;
      MOSA_ROLL
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = thread / PARTS + slot * LANES;
        float values[EIGHT], factors[EIGHT];
        MOSA_UNROLL
        for (int i = 0; i < EIGHT; ++i) {
          const float weight_sum = normed && i < count ? bias[ranks + rank + i] : 0.0f;
          values[i] = shared.rstd[row] *
              (shared.staging[row * STAGING + part * EIGHT + i] - shared.mean[row] * weight_sum);
        }
        if (a.arrays[PRE].data && first_row + row < s.rows_per_group) {
          store_eight(a.arrays[PRE], (out_start + first_row + row) * s.bottleneck + rank, count, values);
        }
        const bool drops = a.arrays[SEED].data != nullptr;
        if (drops) {
          dropout_factors(
              static_cast<const int64_t*>(a.arrays[SEED].data), s, static_cast<float>(a.numbers.keep_scale), group,
              clamped(row), static_cast<int>(rank), factors);
        }
        MOSA_UNROLL
        for (int i = 0; i < EIGHT; ++i) {
          float value = i < count ? activate(values[i] + bias[rank + i], s.activation) : 0.0f;
          if (drops) value *= factors[i];
          hidden[row * pitch + rank + i] = from_float<T>(value);
        }
      }
    });
  }

  // Pass 2: back to D columns.
  const float scale = scale_of(a);
  const int64_t up_slot = slot_of(a, group, 1);
  const T* up = static_cast<const T*>(a.arrays[PREPARED_UP].data) + up_slot * width * ranks;
  const float* up_bias = static_cast<const float*>(a.arrays[PREPARED_UP_BIAS].data) + up_slot * width;
  phase_without_barrier([&](int thread) { copy_tile(shared.weights[0], up, ranks, thread); });
  for (int step = 0; step < column_tiles * chunks; ++step) {
    const int tile = step / chunks, chunk = step % chunks, next = step + 1;
    if (chunk == 0) sums.zero();
    phase([&](int) { arrived(); });
    if (next < column_tiles * chunks) {
      phase_without_barrier([&](int thread) {
        copy_tile(shared.weights[next % 2], up + next / chunks * TILE * ranks + next % chunks * TILE, ranks, thread);
      });
    }
    sums.template multiply<ALONG_DEPTH, ALONG_DEPTH>(hidden + chunk * TILE, pitch, shared.weights[step % 2], PITCH<T>);
    if (chunk + 1 < chunks) continue;
    sums.store_to(shared.staging);
    phase([&](int thread) {
      const int part = thread % PARTS;
      const int column = tile * TILE + part * EIGHT, count = s.width - column;
      MOSA_UNROLL
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = thread / PARTS + slot * LANES;
        if (first_row + row >= s.rows_per_group) continue;
        const int64_t in = (in_start + first_row + row) * s.width + column;
        const Eight old = fetch(x, in, s.add_input ? count : 0);
        const Eight skip = fetch(a.arrays[SKIP], in, a.arrays[SKIP].data ? count : 0);
        float values[EIGHT];
        MOSA_UNROLL
        for (int i = 0; i < EIGHT; ++i) {
          float value = (shared.staging[row * STAGING + part * EIGHT + i] + up_bias[column + i]) * scale;
          if (s.add_input) value += element(x, old, i);
          if (a.arrays[SKIP].data) value += element(a.arrays[SKIP], skip, i);
          values[i] = value;
        }
        store_eight(a.arrays[OUT], (out_start + first_row + row) * s.width + column, count, values);
      }
    });
  }
}

}  // namespace mosa_fast
