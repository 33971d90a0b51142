// Backward of the sparse adapter towards its input, row by row. With forward.h's notation, y = dL/d(out),
// x^ = (x - mean) rstd and k the dropout factor of h:
//
//     a  = y U                                                [r]     unscaled gradient of h
//     t  = scale * a * k * act'(p + e)                        [r]     gradient of p, and of e
//     dn = t W diag(g)                                        [D]     gradient of x^
//     dx = rstd (dn - mean(dn) - x^ mean(dn * x^)) + (y if x is added)
//
// where mean(dn) = t . w / D and mean(dn * x^) = t . p / D need no pass over D. The scale's gradient is
// sum(h . a + y . b_up). Written besides: h (after dropout) and t, for the weight gradients. A fork sums the groups' dx
// in the same block.
//
// Bytes, M rows: read y M D s (again from the L2 cache in the second pass, and for each further 64 ranks), x M D s,
// p M r s; write dx M D s, h and t 2 M r s.
#pragma once
#include "forward.h"

namespace mosa_fast {

template <class T>
struct BackwardInputShared {
  alignas(32) T weights[2][TILE * PITCH<T>];
  alignas(32) T grad[TILE * PITCH<T>];
  alignas(32) float staging[TILE * STAGING];
  float means[TILE][PARTS], products[TILE][PARTS], scales[TILE][PARTS];  // of mean(dn), mean(dn * x^), the scale
  // then t: TILE rows of r' and 16 bytes more
};

template <class T>
MOSA_INLINE void backward_input_block(const Arguments& a, int64_t block, char* memory) {
  const Sizes& s = a.sizes;
  auto& shared = *reinterpret_cast<BackwardInputShared<T>*>(memory);
  T* grad_pre = reinterpret_cast<T*>(memory + sizeof(BackwardInputShared<T>));
  const int pitch = hidden_pitch<T>(s);
  const int64_t groups_here = s.fork ? s.groups : 1, first_group = s.fork ? 0 : block % s.groups;
  const int64_t first_row = (s.fork ? block : block / s.groups) * TILE;
  const int column_tiles = tiles(s.width), chunks = tiles(s.bottleneck);
  const int width = column_tiles * TILE, ranks = chunks * TILE;
  const bool normed = a.arrays[NORM_WEIGHT].data != nullptr, scaled = a.arrays[SCALE_PARTIAL].data != nullptr;
  const bool drops = a.arrays[SEED].data != nullptr;
  const float scale = scale_of(a);
  const Array& y = a.arrays[GRAD_OUT];
  auto clamped = [&](int row) { return smaller(first_row + row, s.rows_per_group - 1); };
  PerThread<Eight, SLOTS> ahead;
  Accumulator<T> sums;

  phase([&](int thread) {
    MOSA_UNROLL
    for (int slot = 0; slot < SLOTS; ++slot) {
      const int row = thread / PARTS + slot * LANES, part = thread % PARTS;
      shared.means[row][part] = shared.products[row][part] = shared.scales[row][part] = 0.0f;
    }
  });

  // Pass 1: t of every group, 64 ranks at a time.
  for (int64_t index = 0; index < groups_here; ++index) {
    const int64_t group = first_group + index, out_start = group * s.rows_per_group;
    const int64_t up_slot = slot_of(a, group, 1);
    const T* up = static_cast<const T*>(a.arrays[PREPARED_UP].data) + up_slot * width * ranks;
    const float* up_bias = static_cast<const float*>(a.arrays[PREPARED_UP_BIAS].data) + up_slot * width;
    const float* bias = static_cast<const float*>(a.arrays[PREPARED_VECTORS].data) + slot_of(a, group, 0) * 2 * ranks;
    auto fetch_y = [&](int tile) {
      phase_without_barrier([&](int thread) {
        const int column = tile * TILE + thread % PARTS * EIGHT;
        MOSA_UNROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          const int row = thread / PARTS + slot * LANES;
          ahead.at(thread)[slot] = fetch(y, (out_start + clamped(row)) * s.width + column, s.width - column);
        }
      });
    };
    for (int chunk = 0; chunk < chunks; ++chunk) {
      sums.zero();
      fetch_y(0);
      phase_without_barrier([&](int thread) { copy_tile(shared.weights[0], up + chunk * TILE, ranks, thread); });
      for (int tile = 0; tile < column_tiles; ++tile) {
        phase([&](int thread) {
          const int part = thread % PARTS;
          MOSA_UNROLL
          for (int slot = 0; slot < SLOTS; ++slot) {
            const int row = thread / PARTS + slot * LANES;
            float products = 0.0f;
            MOSA_UNROLL
            for (int i = 0; i < EIGHT; ++i) {
              const float value = element(y, ahead.at(thread)[slot], i);
              if (scaled) products += value * up_bias[tile * TILE + part * EIGHT + i];
              shared.grad[row * PITCH<T> + part * EIGHT + i] = from_float<T>(value);
            }
            if (scaled && chunk == 0) shared.scales[row][part] += products;
          }
          arrived();
        });
        if (tile + 1 < column_tiles) {
          fetch_y(tile + 1);
          phase_without_barrier([&](int thread) {
            copy_tile(
                shared.weights[(tile + 1) % 2], up + (tile + 1) * TILE * ranks + chunk * TILE, ranks, thread);
          });
        }
        sums.template multiply<ALONG_DEPTH, ACROSS_DEPTH>(shared.grad, PITCH<T>, shared.weights[tile % 2], PITCH<T>);
      }
      sums.store_to(shared.staging);
      phase([&](int thread) {
        const int part = thread % PARTS;
        const int rank = chunk * TILE + part * EIGHT, count = s.bottleneck - rank;
        MOSA_UNROLL
        for (int slot = 0; slot < SLOTS; ++slot) {
          const int row = thread / PARTS + slot * LANES;
          const bool inside = first_row + row < s.rows_per_group;
          const int64_t at = (out_start + clamped(row)) * s.bottleneck + rank;
          const Eight pre = fetch(a.arrays[PRE], at, count);
          float hidden[EIGHT], grads[EIGHT], factors[EIGHT];
          if (drops) {
            dropout_factors(
                static_cast<const int64_t*>(a.arrays[SEED].data), s, static_cast<float>(a.numbers.keep_scale), group,
                clamped(row), static_cast<int>(rank), factors);
          }
          float mean = 0.0f, product = 0.0f, scale_product = 0.0f;
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) {
            const float p = element(a.arrays[PRE], pre, i), z = i < count ? p + bias[rank + i] : 0.0f;
            const float factor = i >= count ? 0.0f : drops ? factors[i] : 1.0f;
            const float grad_hidden = shared.staging[row * STAGING + part * EIGHT + i];
            hidden[i] = activate(z, s.activation) * factor;
            grads[i] = scale * grad_hidden * (activation_derivative(z, s.activation) * factor);
            scale_product += hidden[i] * grad_hidden;
            if (normed && i < count) mean += grads[i] * bias[ranks + rank + i];
            product += grads[i] * p;
            grad_pre[row * pitch + rank + i] = from_float<T>(grads[i]);
          }
          shared.means[row][part] += mean / s.width;
          shared.products[row][part] += product / s.width;
          shared.scales[row][part] += scale_product;
          if (inside) {
            store_eight(a.arrays[HIDDEN], at, count, hidden);
            store_eight(a.arrays[GRAD_PRE], at, count, grads);
          }
        }
      });
    }
  }
  phase([&](int thread) {
    if (thread >= TILE) return;
    for (int part = 1; part < PARTS; ++part) {
      shared.means[thread][0] += shared.means[thread][part];
      shared.products[thread][0] += shared.products[thread][part];
      shared.scales[thread][0] += shared.scales[thread][part];
    }
  });
  phase([&](int thread) {
    if (thread > 0 || !scaled) return;
    float total = 0.0f;
    for (int row = 0; row < TILE && first_row + row < s.rows_per_group; ++row) total += shared.scales[row][0];
    static_cast<float*>(a.arrays[SCALE_PARTIAL].data)[block] = total;
  });

  // Pass 2: the gradients of x and of a forked skip.
  const bool need_x = a.arrays[GRAD_X].data != nullptr, need_skip = a.arrays[GRAD_SKIP].data != nullptr;
  if (!need_x && !need_skip) return;
  for (int tile = 0; tile < column_tiles; ++tile) {
    sums.zero();
    for (int64_t step = 0; need_x && step < groups_here * chunks; ++step) {
      const int64_t group = first_group + step / chunks, chunk = step % chunks;
      const T* down = static_cast<const T*>(a.arrays[PREPARED_DOWN].data) + slot_of(a, group, 0) * ranks * width;
      phase([&](int thread) {
        copy_tile(shared.weights[0], down + chunk * TILE * width + tile * TILE, width, thread);
        if (groups_here > 1) {  // each group's t comes back from memory, where this block wrote it
          const int part = thread % PARTS;
          const int rank = chunk * TILE + part * EIGHT;
          MOSA_UNROLL
          for (int slot = 0; slot < SLOTS; ++slot) {
            const int row = thread / PARTS + slot * LANES;
            const int64_t at = (group * s.rows_per_group + clamped(row)) * s.bottleneck + rank;
            const Eight grads = fetch(a.arrays[GRAD_PRE], at, s.bottleneck - rank);
            MOSA_UNROLL
            for (int i = 0; i < EIGHT; ++i) {
              grad_pre[row * pitch + rank + i] = from_float<T>(element(a.arrays[GRAD_PRE], grads, i));
            }
          }
        }
        arrived();
      });
      sums.template multiply<ALONG_DEPTH, ACROSS_DEPTH>(grad_pre + chunk * TILE, pitch, shared.weights[0], PITCH<T>);
    }
    sums.store_to(shared.staging);
    phase([&](int thread) {
      const int part = thread % PARTS;
      const int column = tile * TILE + part * EIGHT, count = s.width - column;
      MOSA_UNROLL
      for (int slot = 0; slot < SLOTS; ++slot) {
        const int row = thread / PARTS + slot * LANES;
        if (first_row + row >= s.rows_per_group) continue;
        const int64_t in_row = first_group * s.rows_per_group + first_row + row, in = in_row * s.width + column;
        float direct[EIGHT] = {}, values[EIGHT];
        for (int64_t index = 0; (s.add_input || need_skip) && index < groups_here; ++index) {
          const Eight grad = fetch(y, in + index * s.rows_per_group * s.width, count);
          MOSA_UNROLL
          for (int i = 0; i < EIGHT; ++i) direct[i] += element(y, grad, i);
        }
        if (need_skip) store_eight(a.arrays[GRAD_SKIP], in, count, direct);
        if (!need_x) continue;
        const float* stats = static_cast<const float*>(a.arrays[STATS].data) + in_row * 2;
        const float mean = normed ? stats[0] : 0.0f, rstd = normed ? stats[1] : 1.0f;
        const Eight old = fetch(a.arrays[X], in, normed ? count : 0);
        MOSA_UNROLL
        for (int i = 0; i < EIGHT; ++i) {
          float value = shared.staging[row * STAGING + part * EIGHT + i];
          if (normed) {
            const float x = (element(a.arrays[X], old, i) - mean) * rstd;
            value = (value - shared.means[row][0] - x * shared.products[row][0]) * rstd;
          }
          values[i] = s.add_input ? value + direct[i] : value;
        }
        store_eight(a.arrays[GRAD_X], in, count, values);
      }
    });
  }
}

}  // namespace mosa_fast
