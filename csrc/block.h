// A block of threads, on a GPU or emulated on the host, so that tests run whole kernels where there is no GPU.
//
// A kernel is a sequence of phases. `phase` runs its body once for every thread and ends with a barrier, so that none
// can be forgotten; on the host it is a loop over the threads. What outlives a phase lies in shared memory, in
// PerThread (registers) or in an Accumulator. Products are C += A B with C 64 x 64 in float32: tensor cores (WMMA) for
// 16-bit operands, float32 FMA for float32 (never TF32); on the host plain loops over the same tiles.
#pragma once
#include "numerics.h"

#ifdef __CUDACC__
#include <cuda_pipeline.h>
#include <mma.h>
#endif

namespace mosa_fast {

constexpr int THREADS = 256;
constexpr int EIGHT = 8;                              // elements that a thread handles at once
constexpr int PARTS = TILE / EIGHT;                   // threads side by side on a row of a tile
constexpr int SLOTS = TILE * PARTS / THREADS;         // rows of a thread: thread / PARTS + slot * LANES
constexpr int LANES = THREADS / PARTS;
constexpr int STAGING = TILE + 4;                     // floats from row to row of a result in shared memory
template <class T>
constexpr int PITCH = TILE + 16 / sizeof(T);          // elements from row to row of an operand: no bank conflicts

template <class F>
MOSA_INLINE void phase(F body) {
#ifdef __CUDACC__
  body(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < THREADS; ++thread) body(thread);
#endif
}

// Without the barrier: only for what touches nothing that another thread touches before the next phase ends.
template <class F>
MOSA_INLINE void phase_without_barrier(F body) {
#ifdef __CUDACC__
  body(static_cast<int>(threadIdx.x));
#else
  for (int thread = 0; thread < THREADS; ++thread) body(thread);
#endif
}

// N values of each thread: registers on a GPU.
template <class T, int N>
struct PerThread {
#ifdef __CUDACC__
  T values[N];
  MOSA_INLINE T* at(int) { return values; }
#else
  T values[THREADS][N];
  T* at(int thread) { return values[thread]; }
#endif
};

// Eight elements as they came from memory: four words of 16-bit elements, or eight of float32.
struct Eight { uint32_t word[8]; };

MOSA_INLINE bool packed(const Array& array) {
  return array.vector && (array.dtype == FLOAT16 || array.dtype == BFLOAT16);
}

struct alignas(16) Sixteen { uint32_t word[4]; };

// Fetch up to eight elements of a row (`count` of them lie inside it, perhaps none); the others are zero.
MOSA_INLINE Eight fetch(const Array& array, int64_t index, int count) {
  Eight eight = {};
  if (count <= 0) return eight;
  if (packed(array)) {
    const Sixteen half = *reinterpret_cast<const Sixteen*>(static_cast<const uint16_t*>(array.data) + index);
    MOSA_UNROLL
    for (int i = 0; i < 4; ++i) eight.word[i] = half.word[i];
  } else if (array.vector && array.dtype == FLOAT32) {
    const Sixteen* source = reinterpret_cast<const Sixteen*>(static_cast<const float*>(array.data) + index);
    const Sixteen low = source[0], high = source[1];
    MOSA_UNROLL
    for (int i = 0; i < 4; ++i) {
      eight.word[i] = low.word[i];
      eight.word[i + 4] = high.word[i];
    }
  } else {
    MOSA_UNROLL
    for (int i = 0; i < EIGHT; ++i) {
      if (i < count) eight.word[i] = float_bits(load(array, index + i));
    }
  }
  return eight;
}

MOSA_INLINE float element(const Array& array, const Eight& eight, int i) {
  if (!packed(array)) return bits_float(eight.word[i]);
  const uint16_t bits = static_cast<uint16_t>(eight.word[i / 2] >> (i % 2 * 16));
  return array.dtype == FLOAT16 ? to_float(Float16{bits}) : to_float(BFloat16{bits});
}

// Write up to eight elements of a row.
MOSA_INLINE void store_eight(const Array& array, int64_t index, int count, const float* values) {
  if (count <= 0) return;
  if (packed(array)) {
    Sixteen half;
    MOSA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float low = values[2 * i], high = values[2 * i + 1];
      half.word[i] = array.dtype == FLOAT16
          ? from_float<Float16>(low).bits | static_cast<uint32_t>(from_float<Float16>(high).bits) << 16
          : from_float<BFloat16>(low).bits | static_cast<uint32_t>(from_float<BFloat16>(high).bits) << 16;
    }
    *reinterpret_cast<Sixteen*>(static_cast<uint16_t*>(array.data) + index) = half;
  } else if (array.vector && array.dtype == FLOAT32) {
    Sixteen* target = reinterpret_cast<Sixteen*>(static_cast<float*>(array.data) + index);
    Sixteen low, high;
    MOSA_UNROLL
    for (int i = 0; i < 4; ++i) {
      low.word[i] = float_bits(values[i]);
      high.word[i] = float_bits(values[i + 4]);
    }
    target[0] = low;
    target[1] = high;
  } else {
    MOSA_UNROLL
    for (int i = 0; i < EIGHT; ++i) {
      if (i < count) store(array, index + i, values[i]);
    }
  }
}

// A 64 x 64 operand from a padded scratch array: asynchronous 16-byte copies, done after `arrived` and a barrier.
template <class T>
MOSA_INLINE void copy_tile(T* target, const T* source, int64_t row_length, int thread) {
  constexpr int SIXTEEN_BYTES = 16 / sizeof(T), ACROSS = TILE / SIXTEEN_BYTES;
  for (int index = thread; index < TILE * ACROSS; index += THREADS) {
    const int row = index / ACROSS, column = index % ACROSS * SIXTEEN_BYTES;
#ifdef __CUDACC__
    __pipeline_memcpy_async(target + row * PITCH<T> + column, source + row * row_length + column, 16);
#else
    memcpy(target + row * PITCH<T> + column, source + row * row_length + column, 16);
#endif
  }
#ifdef __CUDACC__
  __pipeline_commit();
#endif
}

MOSA_INLINE void arrived() {
#ifdef __CUDACC__
  __pipeline_wait_prior(0);
#endif
}

// How an operand lies in shared memory. Depth is the dimension that is summed over.
enum Layout { ALONG_DEPTH, ACROSS_DEPTH };  // depth runs along a row of the tile, or from row to row

// C (64 x 64) += A (64 x depth 64) B (depth 64 x 64).
template <class T>
struct Accumulator {
#ifdef __CUDACC__
  using Element = std::conditional_t<std::is_same_v<T, Float16>, __half, __nv_bfloat16>;
  using Fragment = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  Fragment fragments[2];  // warp w: rows w / 2 * 16, columns (w % 2) * 32 and 16 more

  MOSA_INLINE void zero() {
    for (auto& fragment : fragments) nvcuda::wmma::fill_fragment(fragment, 0.0f);
  }

  template <Layout A, Layout B>
  MOSA_INLINE void multiply(const T* a, int a_pitch, const T* b, int b_pitch) {
    using namespace nvcuda;
    using RowOrColumnA = std::conditional_t<A == ALONG_DEPTH, wmma::row_major, wmma::col_major>;
    using RowOrColumnB = std::conditional_t<B == ALONG_DEPTH, wmma::col_major, wmma::row_major>;
    const int warp = threadIdx.x / 32, row = warp / 2 * 16, column = warp % 2 * 32;
    const Element* left = reinterpret_cast<const Element*>(a);
    const Element* right = reinterpret_cast<const Element*>(b);
#pragma unroll 2  // 4 would not fit the registers
    for (int depth = 0; depth < TILE; depth += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, Element, RowOrColumnA> fragment_a;
      wmma::load_matrix_sync(
          fragment_a, left + (A == ALONG_DEPTH ? row * a_pitch + depth : depth * a_pitch + row), a_pitch);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = column + 16 * half;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, Element, RowOrColumnB> fragment_b;
        wmma::load_matrix_sync(
            fragment_b, right + (B == ALONG_DEPTH ? n * b_pitch + depth : depth * b_pitch + n), b_pitch);
        wmma::mma_sync(fragments[half], fragment_a, fragment_b, fragments[half]);
      }
    }
    __syncthreads();
  }

  MOSA_INLINE void store_to(float* staging) {
    const int warp = threadIdx.x / 32, row = warp / 2 * 16, column = warp % 2 * 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      nvcuda::wmma::store_matrix_sync(
          staging + row * STAGING + column + 16 * half, fragments[half], STAGING, nvcuda::wmma::mem_row_major);
    }
    __syncthreads();
  }
#else
  float sums[TILE][TILE];

  void zero() { memset(sums, 0, sizeof sums); }

  template <Layout A, Layout B>
  void multiply(const T* a, int a_pitch, const T* b, int b_pitch) {
    for (int depth = 0; depth < TILE; ++depth) {
      float right[TILE];
      for (int n = 0; n < TILE; ++n) {
        right[n] = to_float(b[B == ALONG_DEPTH ? n * b_pitch + depth : depth * b_pitch + n]);
      }
      for (int m = 0; m < TILE; ++m) {
        const float left = to_float(a[A == ALONG_DEPTH ? m * a_pitch + depth : depth * a_pitch + m]);
        for (int n = 0; n < TILE; ++n) sums[m][n] += left * right[n];
      }
    }
  }

  void store_to(float* staging) {
    for (int m = 0; m < TILE; ++m) memcpy(staging + m * STAGING, sums[m], sizeof sums[m]);
  }
#endif
};

#ifdef __CUDACC__
// Exact float32: each thread keeps rows thread / 16 + 16 i and columns thread % 16 + 16 j.
template <>
struct Accumulator<float> {
  float sums[4][4];

  MOSA_INLINE void zero() {
    for (auto& row : sums) {
      for (float& sum : row) sum = 0.0f;
    }
  }

  template <Layout A, Layout B>
  MOSA_INLINE void multiply(const float* a, int a_pitch, const float* b, int b_pitch) {
    const int m = threadIdx.x / 16, n = threadIdx.x % 16;
#pragma unroll 4
    for (int depth = 0; depth < TILE; ++depth) {
      float left[4], right[4];
      MOSA_UNROLL
      for (int i = 0; i < 4; ++i) {
        left[i] = a[A == ALONG_DEPTH ? (m + 16 * i) * a_pitch + depth : depth * a_pitch + m + 16 * i];
        right[i] = b[B == ALONG_DEPTH ? (n + 16 * i) * b_pitch + depth : depth * b_pitch + n + 16 * i];
      }
      MOSA_UNROLL
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
      }
    }
    __syncthreads();
  }

  MOSA_INLINE void store_to(float* staging) {
    MOSA_UNROLL
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        staging[(threadIdx.x / 16 + 16 * i) * STAGING + threadIdx.x % 16 + 16 * j] = sums[i][j];
      }
    }
    __syncthreads();
  }
};
#endif

// Of the width or of the bottleneck, which 32 bits count; rows and elements take 64.
MOSA_INLINE int tiles(int64_t size) { return static_cast<int>(padded(size) / TILE); }

}  // namespace mosa_fast
