// Element-wise mathematics, the same on device and host: conversions, activations, owners, dropout's random numbers.
//
//   owned(owner, e)   = [owner == e], or 1 / E where e = -1 (merged)
//   W_e               = W0 + (W - W0) * owned
//   16 bits of dropout: half c % 2 of lane c % 8 / 2 of Philox-4x32-7(key = seed, counter = (c / 8, t, s, v)); kept
//   where they are at least the threshold
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "arguments.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MOSA_INLINE __device__ __forceinline__
#define MOSA_ROLL _Pragma("unroll 1")  // where two rows at once would not fit the registers
#define MOSA_UNROLL _Pragma("unroll")  // whatever indexes registers: a run-time index would be in memory
#else
#define MOSA_INLINE inline
#define MOSA_ROLL
#define MOSA_UNROLL
#endif

namespace mosa_fast {

struct Float16 { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

MOSA_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

MOSA_INLINE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

MOSA_INLINE float to_float(float value) { return value; }
MOSA_INLINE float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
MOSA_INLINE float to_float(Float16 value) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), bits_float(sign));
  if (exponent == 31) return bits_float(sign | 0x7F800000u | fraction << 13);
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

template <class T>
MOSA_INLINE T from_float(float value);

template <>
MOSA_INLINE float from_float<float>(float value) { return value; }

template <>
MOSA_INLINE BFloat16 from_float<BFloat16>(float value) {
#ifdef __CUDACC__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_bits(value);
  if (value != value) return {static_cast<uint16_t>(bits >> 16 | 64)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
#endif
}

template <>
MOSA_INLINE Float16 from_float<Float16>(float value) {
#ifdef __CUDACC__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u;
  const float magnitude = std::fabs(value);
  if (value != value) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 6.103515625e-5f) {  // subnormal: a whole number of 2^-24; nearbyint rounds ties to even
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 24))))};
  }
  const uint32_t bits = float_bits(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0x0FFFu + (bits >> 13 & 1)) >> 13)};
#endif
}

template <class T>
MOSA_INLINE float rounded(float value) { return to_float(from_float<T>(value)); }

// One element through the array's dtype; 64-bit indices throughout.
MOSA_INLINE float load(const Array& array, int64_t index) {
  switch (array.dtype) {
    case FLOAT16: return to_float(static_cast<const Float16*>(array.data)[index]);
    case BFLOAT16: return to_float(static_cast<const BFloat16*>(array.data)[index]);
    case FLOAT64: return static_cast<float>(static_cast<const double*>(array.data)[index]);
    default: return static_cast<const float*>(array.data)[index];
  }
}

MOSA_INLINE void store(const Array& array, int64_t index, float value) {
  switch (array.dtype) {
    case FLOAT16: static_cast<Float16*>(array.data)[index] = from_float<Float16>(value); break;
    case BFLOAT16: static_cast<BFloat16*>(array.data)[index] = from_float<BFloat16>(value); break;
    case FLOAT64: static_cast<double*>(array.data)[index] = value; break;
    default: static_cast<float*>(array.data)[index] = value;
  }
}

constexpr int MERGED = -1;  // the expert id that means: all of them, averaged

// How much of a weight the group uses.
MOSA_INLINE float ownership(int owner, int expert, int64_t experts) {
  return expert == MERGED ? 1.0f / experts : owner == expert ? 1.0f : 0.0f;
}

// The same of weight `index` of a projection; 1 where it is dense.
MOSA_INLINE float weight_ownership(const Array& owner, int64_t index, int expert, int64_t experts) {
  return owner.data ? ownership(static_cast<const uint8_t*>(owner.data)[index], expert, experts) : 1.0f;
}

MOSA_INLINE float weight_value(
    const Array& weight, const Array* init, const Array& owner, int64_t index, int expert, int64_t experts) {
  const float value = load(weight, index);
  if (!owner.data) return value;
  const float owned = weight_ownership(owner, index, expert, experts);
  if (!init || !init->data) return value * owned;
  const float start = load(*init, index);
  return start + (value - start) * owned;
}

// Column `index` of the group's bias: its expert's row of [experts, columns], or the mean of all rows.
MOSA_INLINE float bias_value(
    const Array& bias, bool split, int64_t index, int64_t columns, int expert, int64_t experts) {
  if (!split) return load(bias, index);
  if (expert != MERGED) return expert >= 0 && expert < experts ? load(bias, expert * columns + index) : 0.0f;
  float total = 0.0f;
  for (int64_t row = 0; row < experts; ++row) total += load(bias, row * columns + index) * (1.0f / experts);
  return total;
}

enum Activation : int64_t { GELU, RELU, SILU };

MOSA_INLINE float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

MOSA_INLINE float activate(float z, int64_t activation) {
  if (activation == GELU) return 0.5f * z * (1.0f + erff(z * 0.7071067811865476f));
  if (activation == RELU) return z > 0.0f ? z : z != z ? z : 0.0f;
  return z * sigmoid(z);
}

MOSA_INLINE float activation_derivative(float z, int64_t activation) {
  constexpr float INVERSE_SQRT_TWO_PI = 0.3989422804014327f;
  if (activation == GELU) {
    return 0.5f * (1.0f + erff(z * 0.7071067811865476f)) + z * expf(-0.5f * z * z) * INVERSE_SQRT_TWO_PI;
  }
  if (activation == RELU) return z > 0.0f ? 1.0f : 0.0f;
  const float gate = sigmoid(z);
  return gate * (1.0f + z * (1.0f - gate));
}

struct Words { uint32_t lane[4]; };

MOSA_INLINE Words philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  MOSA_UNROLL
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// What dropout multiplies the eight channels of one call by, from channel % 8 = 0: 0 or 1 / (1 - p).
MOSA_INLINE void dropout_factors(
    const int64_t* seed, const Sizes& sizes, float keep_scale, int64_t group, int64_t row, int channel,
    float* factors) {
  const int64_t sample = row / sizes.tokens + (sizes.first_sample ? seed[1] : 0);
  const Words words = philox(
      static_cast<uint64_t>(seed[0]), channel / 8, static_cast<uint32_t>(row % sizes.tokens),
      static_cast<uint32_t>(sample), static_cast<uint32_t>(group));
  // A half is compared in the upper bits of a word, where those below it decide nothing.
  const uint32_t threshold = static_cast<uint32_t>(sizes.dropout_threshold) << 16;
  MOSA_UNROLL
  for (int lane = 0; lane < 4; ++lane) {
    factors[2 * lane] = words.lane[lane] << 16 >= threshold ? keep_scale : 0.0f;
    factors[2 * lane + 1] = words.lane[lane] >= threshold ? keep_scale : 0.0f;
  }
}

}  // namespace mosa_fast
