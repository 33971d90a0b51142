// The extension's two operators, registered with torch: mosa_fast_cuda::forward and ::backward. They fill buffers that
// Python allocated (ops/extension.py); the arrays come in the order of `Name`, the numbers in that of their structs.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>

#include "arguments.h"

#ifndef MOSA_FAST_EMULATE
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using namespace mosa_fast;

Array array_of(const std::optional<at::Tensor>& tensor) {
  if (!tensor || !tensor->defined()) return {nullptr, FLOAT32, 0};
  TORCH_CHECK(tensor->is_contiguous(), "sparse_adapter's buffers must be contiguous");
  void* data = tensor->data_ptr();
  int32_t dtype = INTEGER;
  switch (tensor->scalar_type()) {
    case at::kFloat: dtype = FLOAT32; break;
    case at::kHalf: dtype = FLOAT16; break;
    case at::kBFloat16: dtype = BFLOAT16; break;
    case at::kDouble: dtype = FLOAT64; break;
    default: break;
  }
  const bool vector = tensor->dim() > 0 && tensor->size(-1) % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, dtype, vector};
}

void call(
    const char* (*function)(const Arguments&, void*), const c10::List<std::optional<at::Tensor>>& tensors,
    at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  Arguments arguments;
  static_assert(sizeof(Sizes) % sizeof(int64_t) == 0 && sizeof(Numbers) % sizeof(double) == 0);
  TORCH_CHECK(tensors.size() == NAMES, "sparse_adapter takes ", static_cast<int>(NAMES), " arrays");
  TORCH_CHECK(sizes.size() * sizeof(int64_t) == sizeof(Sizes) && numbers.size() * sizeof(double) == sizeof(Numbers));
  for (int i = 0; i < NAMES; ++i) arguments.arrays[i] = array_of(tensors.get(i));
  std::memcpy(&arguments.sizes, sizes.data(), sizeof(Sizes));
  std::memcpy(&arguments.numbers, numbers.data(), sizeof(Numbers));
#ifdef MOSA_FAST_EMULATE
  void* stream = nullptr;
#else
  const at::Tensor x = *tensors.get(X);
  const c10::cuda::CUDAGuard guard(x.device());
  void* stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
#endif
  const char* error = function(arguments, stream);
  TORCH_CHECK(error == nullptr, error);
}

void call_forward(
    const c10::List<std::optional<at::Tensor>>& tensors, at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  call(&forward, tensors, sizes, numbers);
}

void call_backward(
    const c10::List<std::optional<at::Tensor>>& tensors, at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  call(&backward, tensors, sizes, numbers);
}

}  // namespace

TORCH_LIBRARY(mosa_fast_cuda, library) {
  library.def("forward(Tensor?[] tensors, int[] sizes, float[] numbers) -> ()");
  library.def("backward(Tensor?[] tensors, int[] sizes, float[] numbers) -> ()");
}

#ifdef MOSA_FAST_EMULATE
TORCH_LIBRARY_IMPL(mosa_fast_cuda, CPU, library) {
#else
TORCH_LIBRARY_IMPL(mosa_fast_cuda, CUDA, library) {
#endif
  library.impl("forward", &call_forward);
  library.impl("backward", &call_backward);
}
