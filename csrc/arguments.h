// What the launchers take: plain data, no torch. ops/extension.py lists the same names in the same order.
#pragma once
#include <cstdint>

namespace mosa_fast {

enum Dtype : int32_t { FLOAT32, FLOAT16, BFLOAT16, FLOAT64, INTEGER };

struct Array {
  void* data;      // null: not given
  int32_t dtype;   // a Dtype; only floating-point arrays are read through it
  int32_t vector;  // every eighth element of a row lies on a 16-byte address
};

// Shapes: T rows of x, M rows of out, D width, r bottleneck, V groups; padded to multiples of TILE: D', r'.
enum Name {
  X, NORM_WEIGHT, NORM_BIAS, DOWN_WEIGHT, DOWN_BIAS, UP_WEIGHT, UP_BIAS, DOWN_INIT, DOWN_OWNER, UP_OWNER, EXPERTS,
  SCALE_TENSOR, SEED,                                     // inputs, as the operator has them
  SKIP, OUT, STATS, PRE, VECTORS,                         // forward
  DOWN_EFFECTIVE, UP_EFFECTIVE, UP_BIAS_EFFECTIVE,        // scratch of both: [V, r', D'], [V, D', r'], [V, D']
  GRAD_OUT, GRAD_X, GRAD_SKIP, HIDDEN, GRAD_PRE,          // backward towards the input
  SCALE_PARTIAL, PARTIAL, UP_SUMS, DOWN_SUMS,             // scratch of the weight gradients
  GRAD_NORM_WEIGHT, GRAD_NORM_BIAS, GRAD_DOWN_WEIGHT, GRAD_DOWN_BIAS, GRAD_UP_WEIGHT, GRAD_UP_BIAS, GRAD_SCALE,
  NAMES
};

struct Sizes {
  int64_t width, bottleneck, groups, rows_per_group, tokens, down_experts, up_experts;
  int64_t activation, product_dtype, add_input, fork, first_sample, dropout_threshold;
  int64_t pieces, piece_rows, segments_per_slice, slices, programs;
};

struct Numbers {
  double scale, keep_scale, eps;
};

struct Arguments {
  Array arrays[NAMES];
  Sizes sizes;
  Numbers numbers;
};

// Each returns null, or what went wrong. stream: a cudaStream_t.
const char* forward(const Arguments& arguments, void* stream);
const char* backward(const Arguments& arguments, void* stream);

}  // namespace mosa_fast
