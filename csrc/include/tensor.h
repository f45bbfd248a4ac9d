// What every CPU operator needs of torch: checks with a clean message, allocation, scratch; and threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace pyarch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// The operators are open to anyone through torch.ops, so each rechecks what memory safety needs.
#define PYARCH_CHECK(condition, ...)                                    \
  do {                                                                  \
    if (__builtin_expect(!(condition), 0)) ::pyarch::fail(__VA_ARGS__); \
  } while (0)

// While set, empty() and scratch() give memory full of 0xff, NaN in every float type (csrc/cpu/poison.cpp).
inline std::atomic<bool> poison_memory{false};

// A contiguous tensor with uninitialised memory, on the CPU by default; half the cost of
// torch::stable::empty.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype,
                    int32_t device = aoti_torch_device_type_cpu(), int32_t index = 0) {
  int64_t strides[8], step = 1;
  const int64_t rank = static_cast<int64_t>(sizes.size());
  PYARCH_CHECK(rank <= 8, "rank above 8");
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = step;
    step *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(rank, sizes.begin(), strides, static_cast<int32_t>(dtype), device, index,
                               &handle) != 0)
    fail("out of memory");
  Tensor made(handle);
  if (__builtin_expect(poison_memory.load(std::memory_order_relaxed), 0) && made.numel() > 0)
    std::memset(made.data_ptr(), 0xff, static_cast<size_t>(made.numel() * made.element_size()));
  return made;
}

// Memory that one thread keeps between calls, 64-byte aligned, uninitialised by every call. `Tag` names the
// buffer, so that a function and the one it calls do not share.
template <class Tag, class T>
inline T* scratch(size_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  if (bytes > capacity) {
    memory.reset(std::aligned_alloc(64, bytes));
    capacity = memory ? bytes : 0;
    PYARCH_CHECK(memory, "out of memory: ", bytes, " bytes of scratch");
  }
  if (__builtin_expect(poison_memory.load(std::memory_order_relaxed), 0) && bytes > 0)
    std::memset(memory.get(), 0xff, bytes);
  return static_cast<T*>(memory.get());
}

}  // namespace pyarch
