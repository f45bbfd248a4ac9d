// The CUDA operators: each rechecks what memory safety needs, then queues its kernel on the current stream of
// the tensors' GPU. Compiled by g++ against torch's stable ABI; the kernels know nothing of torch.
#include "on_device.h"
#include "paged_kv.h"

namespace pyarch {
namespace {

void kv_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping) {
  PYARCH_CHECK(k.dim() == 3 && v.dim() == 3, "k, v: must be (tokens, heads, dim)");
  PYARCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4,
               "k_cache, v_cache: must be (pages, page_size, heads, dim)");
  const ScalarType dtype = k.scalar_type();
  const int64_t item = dtype == ScalarType::Float ? 4 : 2;
  PYARCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
               "k: dtype must be float32, bfloat16 or float16");
  KvAppend c{k.data_ptr(),
             v.data_ptr(),
             k_cache.data_ptr(),
             v_cache.data_ptr(),
             nullptr,
             k.size(0),
             k.size(1),
             k.size(2),
             k_cache.size(0),
             k_cache.size(1),
             item,
             {},
             {}};
  const Tensor* sources[] = {&k, &v};
  const Tensor* caches[] = {&k_cache, &v_cache};
  for (int i = 0; i < 2; ++i) {
    const Tensor &from = *sources[i], &to = *caches[i];
    PYARCH_CHECK(from.scalar_type() == dtype && to.scalar_type() == dtype,
                 "v, k_cache, v_cache: dtype must be k's");
    PYARCH_CHECK(same_gpu(from, k) && same_gpu(to, k), "v, k_cache, v_cache: must be on k's GPU");
    PYARCH_CHECK(from.size(0) == c.tokens && from.size(1) == c.heads && from.size(2) == c.dim,
                 "v: shape must be k's");
    PYARCH_CHECK(
        to.size(0) == c.pages && to.size(1) == c.page_size && to.size(2) == c.heads && to.size(3) == c.dim,
        "k_cache, v_cache: shapes must be equal and fit k");
    PYARCH_CHECK((from.stride(2) == 1 && to.stride(3) == 1) || c.dim <= 1,
                 "k, v, k_cache, v_cache: the last dimension must be contiguous");
    for (int d = 0; d < 2; ++d) c.source[i][d] = from.stride(d);
    for (int d = 0; d < 3; ++d) c.target[i][d] = to.stride(d);
  }
  PYARCH_CHECK(slot_mapping.dim() == 1 && slot_mapping.size(0) == c.tokens &&
                   slot_mapping.scalar_type() == ScalarType::Long && slot_mapping.is_contiguous() &&
                   same_gpu(slot_mapping, k),
               "slot_mapping: must be int64 (tokens), contiguous, on k's GPU");
  PYARCH_CHECK(c.tokens < (int64_t{1} << 31), "k: more than 2^31 tokens");
  c.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  const OnDeviceOf on(k);
  check_queued("kv_append", pyarch_kv_append(&c, on.stream));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyarch, PYARCH_CUDA_KEY, m) { m.impl("kv_append__cuda", TORCH_BOX(&kv_append)); }

}  // namespace pyarch
