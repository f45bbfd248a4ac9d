// Where an operator's tensors are: their GPU and its current stream; for the host emulator (-DPYARCH_EMU),
// where the same operators take CPU tensors, the CPU.
#pragma once

#include "tensor.h"

#if defined(PYARCH_EMU)
#include "emu.h"
#define PYARCH_CUDA_KEY CPU
#else
#include <torch/csrc/stable/accelerator.h>
#define PYARCH_CUDA_KEY CUDA
#endif

namespace pyarch {

// Whether kernels may touch both tensors' memory in one launch.
inline bool same_gpu(const Tensor& a, const Tensor& b) {
#if defined(PYARCH_EMU)
  return a.is_cpu() && b.is_cpu();
#else
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
#endif
}

// Makes the tensor's GPU the current one while it lives, and gives that GPU's current stream.
class OnDeviceOf {
 public:
#if defined(PYARCH_EMU)
  explicit OnDeviceOf(const Tensor&) {}
  void* stream = nullptr;
#else
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    PYARCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0,
                 "no CUDA stream on device ", t.get_device_index());
  }
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A contiguous tensor on the same GPU as `other`, from torch's allocator, with uninitialised memory.
inline Tensor empty_beside(const Tensor& other, std::initializer_list<int64_t> sizes, ScalarType dtype) {
#if defined(PYARCH_EMU)
  const Tensor made = empty(sizes, dtype);
  const size_t bytes = static_cast<size_t>(made.numel() * made.element_size());
  if (bytes > 0) std::memset(made.data_ptr(), 0xff, bytes);
  pyarch_emu_allow(made.data_ptr(), bytes);
  return made;
#else
  return empty(sizes, dtype, aoti_torch_device_type_cuda(), other.get_device_index());
#endif
}

inline void check_queued(const char* op, const char* error) { PYARCH_CHECK(!error, op, ": CUDA: ", error); }

}  // namespace pyarch
