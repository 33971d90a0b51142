// The kernels and their launchers. nvcc makes GPU code of this file; a host compiler (g++ -x c++) makes the emulation
// that the tests run. No torch header is needed.
#include <cstdlib>
#include <memory>

#include "backward_input.h"
#include "backward_weight.h"

namespace mosa_fast {
namespace {

#ifdef __CUDACC__
#define MOSA_KERNEL(name, body) \
  template <class T> \
  __global__ void __launch_bounds__(THREADS, 2) name##_kernel(const __grid_constant__ Arguments arguments) { \
    extern __shared__ __align__(128) char memory[]; \
    body(arguments, blockIdx.x, memory); \
  }

#define MOSA_LAUNCH(name, blocks, bytes) launch(name##_kernel<T>, arguments, blocks, bytes, stream)

using Kernel = void(const Arguments);

const char* launch(Kernel* kernel, const Arguments& arguments, int64_t blocks, int64_t bytes, void* stream) {
  if (blocks > 0x7FFFFFFF) return "sparse_adapter: more blocks than a launch can have";
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();
    return "sparse_adapter: the bottleneck needs more shared memory than this GPU has";
  }
  kernel<<<static_cast<unsigned>(blocks), THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
#define MOSA_KERNEL(name, body) \
  template <class T> \
  void name##_kernel(const Arguments& arguments, int64_t block, char* memory) { \
    body(arguments, block, memory); \
  }

#define MOSA_LAUNCH(name, blocks, bytes) launch(name##_kernel<T>, arguments, blocks, bytes)

using Kernel = void(const Arguments&, int64_t, char*);

// Every block gets shared memory of NaNs, so that what a kernel reads before it is written shows.
const char* launch(Kernel* kernel, const Arguments& arguments, int64_t blocks, int64_t bytes) {
  const size_t size = (bytes + 127) / 128 * 128;
  std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(128, size), &std::free);
  for (int64_t block = 0; block < blocks; ++block) {
    memset(memory.get(), 0xFF, size);
    kernel(arguments, block, static_cast<char*>(memory.get()));
  }
  return nullptr;
}
#endif

MOSA_KERNEL(prepare, prepare_block<T>)
MOSA_KERNEL(forward, forward_block<T>)
MOSA_KERNEL(backward_input, backward_input_block<T>)
MOSA_KERNEL(backward_weight, backward_weight_block<T>)
MOSA_KERNEL(finish, finish_block)

// Shared memory of TILE rows of h or t in the product's dtype.
template <class T>
int64_t hidden_bytes(const Sizes& s) {
  return TILE * (padded(s.bottleneck) * sizeof(T) + 16);
}

template <class T>
const char* run_prepare(const Arguments& arguments, [[maybe_unused]] void* stream) {
  return MOSA_LAUNCH(prepare, prepare_blocks(arguments.sizes), sizeof(PrepareShared));
}

template <class T>
const char* run_forward(const Arguments& arguments, [[maybe_unused]] void* stream) {
  const Sizes& s = arguments.sizes;
  const int64_t blocks = padded(s.rows_per_group) / TILE * s.groups;
  return MOSA_LAUNCH(forward, blocks, sizeof(ForwardShared<T>) + hidden_bytes<T>(s));
}

// Sums float32 whatever the product's dtype: one kernel.
const char* finish(const Arguments& arguments, int64_t blocks, [[maybe_unused]] void* stream) {
  using T = float;
  return MOSA_LAUNCH(finish, blocks, sizeof(FinishShared));
}

template <class T>
const char* run_backward(const Arguments& arguments, [[maybe_unused]] void* stream) {
  const Sizes& s = arguments.sizes;
  if (const char* error =
          MOSA_LAUNCH(backward_input, s.programs, sizeof(BackwardInputShared<T>) + hidden_bytes<T>(s))) {
    return error;
  }
  if (arguments.arrays[PARTIAL].data) {
    const int64_t blocks = s.slices * padded(s.width) / TILE * padded(s.bottleneck) / TILE;
    if (const char* error = MOSA_LAUNCH(backward_weight, blocks, sizeof(BackwardWeightShared<T>))) return error;
  }
  if (!arguments.arrays[PARTIAL].data && !arguments.arrays[SCALE_PARTIAL].data) return nullptr;
  const int64_t blocks = (finish_elements(s) + THREADS - 1) / THREADS + 1;
  return finish(arguments, blocks, stream);
}

}  // namespace

const char* prepare(const Arguments& arguments, void* stream) {
  switch (arguments.sizes.product_dtype) {
    case FLOAT16: return run_prepare<Float16>(arguments, stream);
    case BFLOAT16: return run_prepare<BFloat16>(arguments, stream);
    default: return run_prepare<float>(arguments, stream);
  }
}

const char* forward(const Arguments& arguments, void* stream) {
  switch (arguments.sizes.product_dtype) {
    case FLOAT16: return run_forward<Float16>(arguments, stream);
    case BFLOAT16: return run_forward<BFloat16>(arguments, stream);
    default: return run_forward<float>(arguments, stream);
  }
}

const char* backward(const Arguments& arguments, void* stream) {
  switch (arguments.sizes.product_dtype) {
    case FLOAT16: return run_backward<Float16>(arguments, stream);
    case BFLOAT16: return run_backward<BFloat16>(arguments, stream);
    default: return run_backward<float>(arguments, stream);
  }
}

}  // namespace mosa_fast
