// What the launchers take: plain data, no torch. Python asks the extension for the names below and their order
// (binding.cpp), so that they are written here only; and the binding checks every array against its line.
#pragma once
#include <cstdint>

namespace mosa_fast {

constexpr int TILE = 64;  // rows, columns and ranks of every tile

enum Dtype : int32_t { FLOAT32, FLOAT16, BFLOAT16, FLOAT64, UINT8, INT32, INT64, DTYPES };

// What an array's elements may be: FLOATING is any floating point, PRODUCT the matrix products' dtype.
enum Elements { FLOATING, PRODUCT, FLOAT32S, UINT8S, INT32S, INT64S };

struct Array {
  void* data;      // null: not given
  int32_t dtype;   // a Dtype
  int32_t vector;  // every eighth element of a row lies on a 16-byte address
};

// SIZE(name)
#define MOSA_SIZES(SIZE) \
  SIZE(width) SIZE(bottleneck) SIZE(groups) SIZE(rows_per_group) SIZE(tokens) SIZE(down_experts) SIZE(up_experts) \
  SIZE(activation) SIZE(product_dtype) SIZE(add_input) SIZE(fork) SIZE(first_sample) SIZE(dropout_threshold) \
  SIZE(by_expert) SIZE(down_slots) SIZE(up_slots) \
  SIZE(pieces) SIZE(piece_rows) SIZE(segments) SIZE(segments_per_slice) SIZE(slices) SIZE(programs)

// NUMBER(name)
#define MOSA_NUMBERS(NUMBER) NUMBER(scale) NUMBER(keep_scale) NUMBER(eps)

#define MOSA_MEMBER(name) int64_t name;
struct Sizes { MOSA_SIZES(MOSA_MEMBER) };
#undef MOSA_MEMBER
#define MOSA_MEMBER(name) double name;
struct Numbers { MOSA_NUMBERS(MOSA_MEMBER) };
#undef MOSA_MEMBER

#ifdef __CUDACC__
#define MOSA_BOTH __host__ __device__
#else
#define MOSA_BOTH
#endif

MOSA_BOTH inline int64_t padded(int64_t size) { return (size + TILE - 1) / TILE * TILE; }
MOSA_BOTH inline int64_t weights(const Sizes& s) { return s.width * s.bottleneck; }
MOSA_BOTH inline int64_t out_rows(const Sizes& s) { return s.groups * s.rows_per_group; }
MOSA_BOTH inline int64_t in_rows(const Sizes& s) { return s.fork ? s.rows_per_group : out_rows(s); }

// float32s of one slice of PARTIAL: dU, dW, and (dg, db) for each TILE ranks.
MOSA_BOTH inline int64_t partial_length(const Sizes& s) {
  return 2 * weights(s) + 2 * s.width * (padded(s.bottleneck) / TILE);
}

// ARRAY(name, what its elements are, how many there are, when it must be given): T rows of x, M rows of out, D width,
// r bottleneck, V groups; D' and r' are padded to multiples of TILE; d and u slots of prepared weights (prepare.h).
// `preparing` and `backward` tell the operation.
#define MOSA_ARRAYS(ARRAY) \
  /* inputs, as the operator has them */ \
  ARRAY(X, FLOATING, in_rows(s) * s.width, !preparing) \
  ARRAY(SKIP, FLOATING, in_rows(s) * s.width, false) \
  ARRAY(NORM_WEIGHT, FLOATING, s.width, given(NORM_BIAS)) \
  ARRAY(NORM_BIAS, FLOATING, s.width, given(NORM_WEIGHT)) \
  ARRAY(DOWN_WEIGHT, FLOATING, weights(s), true) \
  ARRAY(DOWN_BIAS, FLOATING, s.down_experts * s.bottleneck, true) \
  ARRAY(UP_WEIGHT, FLOATING, weights(s), true) \
  ARRAY(UP_BIAS, FLOATING, s.up_experts * s.width, true) \
  ARRAY(DOWN_INIT, FLOATING, weights(s), false) \
  ARRAY(DOWN_OWNER, UINT8S, weights(s), false) \
  ARRAY(UP_OWNER, UINT8S, weights(s), false) \
  ARRAY(EXPERTS, INT32S, 2 * s.groups, true) \
  ARRAY(SCALE_TENSOR, FLOATING, 1, false) \
  ARRAY(SEED, INT64S, s.first_sample ? 2 : 1, s.dropout_threshold > 0) \
  /* what `prepare` writes and the others read: [d, r', D'], [u, D', r'], [d, 2, r'], [u, D'] */ \
  ARRAY(PREPARED_DOWN, PRODUCT, s.down_slots * padded(s.bottleneck) * padded(s.width), true) \
  ARRAY(PREPARED_UP, PRODUCT, s.up_slots * padded(s.width) * padded(s.bottleneck), true) \
  ARRAY(PREPARED_VECTORS, FLOAT32S, 2 * s.down_slots * padded(s.bottleneck), true) \
  ARRAY(PREPARED_UP_BIAS, FLOAT32S, s.up_slots * padded(s.width), true) \
  /* forward: out [M, D]; for backward stats [T, 2], pre [M, r] */ \
  ARRAY(OUT, FLOATING, out_rows(s) * s.width, !preparing && !backward) \
  ARRAY(STATS, FLOAT32S, 2 * in_rows(s), backward && given(NORM_WEIGHT)) \
  ARRAY(PRE, PRODUCT, out_rows(s) * s.bottleneck, backward) \
  /* backward towards the input; hidden and grad_pre [M, r] are scratch */ \
  ARRAY(GRAD_OUT, FLOATING, out_rows(s) * s.width, backward) \
  ARRAY(GRAD_X, FLOATING, in_rows(s) * s.width, false) \
  ARRAY(GRAD_SKIP, FLOATING, in_rows(s) * s.width, false) \
  ARRAY(HIDDEN, PRODUCT, out_rows(s) * s.bottleneck, backward) \
  ARRAY(GRAD_PRE, PRODUCT, out_rows(s) * s.bottleneck, backward) \
  /* scratch of the weight gradients */ \
  ARRAY(SCALE_PARTIAL, FLOAT32S, s.programs, given(GRAD_SCALE_TENSOR)) \
  ARRAY(PARTIAL, FLOAT32S, s.slices * partial_length(s), given(GRAD_UP_WEIGHT)) \
  ARRAY(UP_SUMS, FLOAT32S, s.segments * s.width, given(PARTIAL)) \
  ARRAY(DOWN_SUMS, FLOAT32S, s.segments * s.bottleneck, given(PARTIAL)) \
  /* weight gradients */ \
  ARRAY(GRAD_NORM_WEIGHT, FLOATING, s.width, given(PARTIAL) && given(NORM_WEIGHT)) \
  ARRAY(GRAD_NORM_BIAS, FLOATING, s.width, given(PARTIAL) && given(NORM_WEIGHT)) \
  ARRAY(GRAD_DOWN_WEIGHT, FLOATING, weights(s), given(PARTIAL)) \
  ARRAY(GRAD_DOWN_BIAS, FLOATING, s.down_experts * s.bottleneck, given(PARTIAL)) \
  ARRAY(GRAD_UP_WEIGHT, FLOATING, weights(s), given(PARTIAL)) \
  ARRAY(GRAD_UP_BIAS, FLOATING, s.up_experts * s.width, given(PARTIAL)) \
  ARRAY(GRAD_SCALE_TENSOR, FLOATING, 1, given(SCALE_PARTIAL))

#define MOSA_NAME(name, elements, count, needed) name,
enum Name { MOSA_ARRAYS(MOSA_NAME) NAMES };
#undef MOSA_NAME

struct Arguments {
  Array arrays[NAMES];
  Sizes sizes;
  Numbers numbers;
};

// Each returns null, or what went wrong. stream: a cudaStream_t.
const char* prepare(const Arguments& arguments, void* stream);
const char* forward(const Arguments& arguments, void* stream);
const char* backward(const Arguments& arguments, void* stream);

}  // namespace mosa_fast
