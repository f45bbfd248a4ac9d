// The paged cache as CPU operators see it: where a slot lies, and the checks that come before anything is
// read or written. Shared by every operator that touches pages.
#pragma once

#include <cstring>

#include "tensor.h"
#include "types.h"

namespace pyarch {

// (pages, page_size, heads, dim) with any outer strides, in elements; the last dimension is contiguous.
struct PagedCache {
  char* data;
  int64_t pages, page_size, heads, dim;
  int64_t page_stride, slot_stride, head_stride;
  int64_t item;  // bytes of an element

  int64_t slots() const { return pages * page_size; }
  int64_t offset(int64_t slot) const {  // in elements
    return slot / page_size * page_stride + slot % page_size * slot_stride;
  }
};

inline PagedCache paged_cache(const Tensor& t, const char* name) {
  PYARCH_CHECK(t.dim() == 4, name, ": must be (pages, page_size, heads, head_dim)");
  PagedCache c{static_cast<char*>(t.data_ptr()),
               t.size(0),
               t.size(1),
               t.size(2),
               t.size(3),
               t.stride(0),
               t.stride(1),
               t.stride(2),
               static_cast<int64_t>(t.element_size())};
  PYARCH_CHECK(c.page_size > 0 && c.heads > 0 && c.dim > 0, name,
               ": page_size, heads and head_dim must be at least 1");
  PYARCH_CHECK(c.dim == 1 || t.stride(3) == 1, name, ": the last dimension must be contiguous");
  return c;
}

inline void check_same_shape(const PagedCache& k, const PagedCache& v, const Tensor& k_cache,
                             const Tensor& v_cache) {
  PYARCH_CHECK(k.pages == v.pages && k.page_size == v.page_size && k.heads == v.heads && k.dim == v.dim &&
                   k_cache.scalar_type() == v_cache.scalar_type(),
               "v_cache: must have k_cache's shape and dtype");
}

// What a kernel that writes into pages must know first: every element of both caches lies apart, every slot
// is -1 or in range, and none is named twice.
void check_append(const PagedCache& k, const PagedCache& v, const int64_t* slots, int64_t tokens);

// Whether [data, data + span) can touch the cache; used to refuse an input that the call itself would
// overwrite.
bool touches(const PagedCache& cache, const Tensor& t);

// Copies one token's heads (contiguous in dim, head_stride elements apart) into its slot.
inline void write_slot(const PagedCache& cache, int64_t slot, const char* token, int64_t head_stride) {
  char* to = cache.data + cache.offset(slot) * cache.item;
  const int64_t row = cache.dim * cache.item;
  if (cache.head_stride == cache.dim && head_stride == cache.dim) {
    std::memcpy(to, token, cache.heads * row);
    return;
  }
  for (int64_t h = 0; h < cache.heads; ++h)
    std::memcpy(to + h * cache.head_stride * cache.item, token + h * head_stride * cache.item, row);
}

}  // namespace pyarch
