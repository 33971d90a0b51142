// The extension's operators, registered with torch: mosa_fast_cuda::prepare, ::forward and ::backward fill buffers that
// Python allocated (mosa_fast/ops/*_cuda.py); ::names says in which order they take what Python knows by name.
// Before a launch every array is checked against its line in arguments.h, so that a mistake is an error, not a read or a
// write out of bounds.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cctype>
#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "arguments.h"

#ifndef MOSA_FAST_EMULATE
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace {

using namespace mosa_fast;

constexpr const char* ARRAY_NAMES[] = {
#define MOSA_STRING(name, elements, count, needed) #name,
    MOSA_ARRAYS(MOSA_STRING)
#undef MOSA_STRING
};
constexpr const char* DTYPE_NAMES[] = {"float32", "float16", "bfloat16", "float64", "uint8", "int32", "int64", "other"};
constexpr const char* SIZE_NAMES[] = {
#define MOSA_STRING(name) #name,
    MOSA_SIZES(MOSA_STRING)
};
constexpr const char* NUMBER_NAMES[] = {MOSA_NUMBERS(MOSA_STRING)};
#undef MOSA_STRING

std::string lower(std::string name) {
  for (char& letter : name) letter = static_cast<char>(std::tolower(letter));
  return name;
}

// kind: "arrays", "sizes" or "numbers".
std::vector<std::string> names(const std::string& kind) {
  std::vector<std::string> found;
  if (kind == "arrays") {
    for (const char* name : ARRAY_NAMES) found.push_back(lower(name));
  } else if (kind == "sizes") {
    found.assign(std::begin(SIZE_NAMES), std::end(SIZE_NAMES));
  } else {
    TORCH_CHECK(kind == "numbers", "there are arrays, sizes and numbers, not ", kind);
    found.assign(std::begin(NUMBER_NAMES), std::end(NUMBER_NAMES));
  }
  return found;
}

int32_t dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return FLOAT32;
    case at::kHalf: return FLOAT16;
    case at::kBFloat16: return BFLOAT16;
    case at::kDouble: return FLOAT64;
    case at::kByte: return UINT8;
    case at::kInt: return INT32;
    case at::kLong: return INT64;
    default: return DTYPES;
  }
}

bool fits(int32_t dtype, Elements elements, const Sizes& s) {
  switch (elements) {
    case FLOATING: return dtype <= FLOAT64;
    case PRODUCT: return dtype == s.product_dtype;
    case FLOAT32S: return dtype == FLOAT32;
    case UINT8S: return dtype == UINT8;
    case INT32S: return dtype == INT32;
    case INT64S: return dtype == INT64;
  }
  return false;
}

using Tensors = c10::List<std::optional<at::Tensor>>;

using Operation = const char*(const Arguments&, void*);

void check(const Tensors& tensors, const Arguments& arguments, Operation* operation) {
  const bool preparing = operation == &mosa_fast::prepare, backward = operation == &mosa_fast::backward;
  const Sizes& s = arguments.sizes;
  const auto given = [&](Name name) { return arguments.arrays[name].data != nullptr; };
  TORCH_CHECK(s.product_dtype >= FLOAT32 && s.product_dtype <= BFLOAT16, "product_dtype must be 0, 1 or 2");
  const auto check_one = [&](Name name, Elements elements, int64_t count, bool needed) {
    if (!given(name)) {
      TORCH_CHECK(!needed, lower(ARRAY_NAMES[name]), " is missing");
      return;
    }
    const at::Tensor tensor = *tensors.get(name);
    const int32_t dtype = arguments.arrays[name].dtype;
    TORCH_CHECK(fits(dtype, elements, s), lower(ARRAY_NAMES[name]), " cannot be ", DTYPE_NAMES[dtype]);
    TORCH_CHECK(tensor.numel() == count, lower(ARRAY_NAMES[name]), " has ", tensor.numel(), " elements, not ", count);
    TORCH_CHECK(tensor.is_contiguous(), lower(ARRAY_NAMES[name]), " is not contiguous");
    TORCH_CHECK(tensor.device() == tensors.get(EXPERTS)->device(), lower(ARRAY_NAMES[name]),
                " is on another device than experts");
  };
#define MOSA_CHECK(name, elements, count, needed) check_one(name, elements, count, needed);
  MOSA_ARRAYS(MOSA_CHECK)
#undef MOSA_CHECK
}

Array array_of(const std::optional<at::Tensor>& tensor) {
  if (!tensor || !tensor->defined() || !tensor->numel()) return {nullptr, FLOAT32, 0};
  void* data = tensor->data_ptr();
  const bool vector = tensor->dim() > 0 && tensor->size(-1) % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, dtype_of(*tensor), vector};
}

template <Operation* operation>
void call(const Tensors& tensors, at::IntArrayRef sizes, at::ArrayRef<double> numbers) {
  Arguments arguments;
  TORCH_CHECK(tensors.size() == std::size(ARRAY_NAMES), "there are ", std::size(ARRAY_NAMES), " arrays");
  TORCH_CHECK(sizes.size() == std::size(SIZE_NAMES), "there are ", std::size(SIZE_NAMES), " sizes");
  TORCH_CHECK(numbers.size() == std::size(NUMBER_NAMES), "there are ", std::size(NUMBER_NAMES), " numbers");
  static_assert(sizeof(Sizes) == sizeof(int64_t) * std::size(SIZE_NAMES));
  static_assert(sizeof(Numbers) == sizeof(double) * std::size(NUMBER_NAMES));
  for (int i = 0; i < NAMES; ++i) arguments.arrays[i] = array_of(tensors.get(i));
  std::memcpy(&arguments.sizes, sizes.data(), sizeof(Sizes));
  std::memcpy(&arguments.numbers, numbers.data(), sizeof(Numbers));
  check(tensors, arguments, operation);
#ifdef MOSA_FAST_EMULATE
  void* stream = nullptr;
#else
  const at::Device device = tensors.get(EXPERTS)->device();
  const c10::cuda::CUDAGuard guard(device);
  void* stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
#endif
  const char* error = operation(arguments, stream);
  TORCH_CHECK(error == nullptr, error);
}

}  // namespace

TORCH_LIBRARY(mosa_fast_cuda, library) {
  library.def("names(str kind) -> str[]", &names);
  library.def("prepare(Tensor?[] tensors, int[] sizes, float[] numbers) -> ()");
  library.def("forward(Tensor?[] tensors, int[] sizes, float[] numbers) -> ()");
  library.def("backward(Tensor?[] tensors, int[] sizes, float[] numbers) -> ()");
}

#ifdef MOSA_FAST_EMULATE
TORCH_LIBRARY_IMPL(mosa_fast_cuda, CPU, library) {
#else
TORCH_LIBRARY_IMPL(mosa_fast_cuda, CUDA, library) {
#endif
  library.impl("prepare", &call<mosa_fast::prepare>);
  library.impl("forward", &call<mosa_fast::forward>);
  library.impl("backward", &call<mosa_fast::backward>);
}
