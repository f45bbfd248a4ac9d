// The paged cache as CPU operators see it: where a slot lies, and the checks that come before anything is
// read or written. Shared by every operator that touches pages.
#pragma once

#include <cstring>

#include "int8.h"
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

// What a call reads or writes. The scales of int8 caches are (pages, page_size, heads, 1) of float, any
// strides.
struct PagedCaches {
  PagedCache k, v, k_scale, v_scale;
  bool int8;

  // Whether tensors of this type can be rounded to, or multiplied with, what is cached.
  bool suits(ScalarType type, const Tensor& k_cache) const {
    return int8 ? type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half
                : type == k_cache.scalar_type();
  }
};

inline PagedCache paged_scales(const std::optional<Tensor>& scales, const char* name,
                               const PagedCache& cache) {
  PYARCH_CHECK(scales, name, ": int8 caches need one");
  const Tensor& t = *scales;
  PYARCH_CHECK(t.dim() == 3 && t.scalar_type() == ScalarType::Float && t.size(0) == cache.pages &&
                   t.size(1) == cache.page_size && t.size(2) == cache.heads,
               name, ": must be float32 (pages, page_size, heads) as the cache is");
  return {static_cast<char*>(t.data_ptr()),
          cache.pages,
          cache.page_size,
          cache.heads,
          1,
          t.stride(0),
          t.stride(1),
          t.stride(2),
          static_cast<int64_t>(sizeof(float))};
}

inline PagedCaches paged_caches(const Tensor& k_cache, const Tensor& v_cache,
                                const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale) {
  PagedCaches c{paged_cache(k_cache, "k_cache"), paged_cache(v_cache, "v_cache"), {}, {}, false};
  PYARCH_CHECK(c.k.pages == c.v.pages && c.k.page_size == c.v.page_size && c.k.heads == c.v.heads &&
                   c.k.dim == c.v.dim && k_cache.scalar_type() == v_cache.scalar_type(),
               "v_cache: must have k_cache's shape and dtype");
  c.int8 = k_cache.scalar_type() == ScalarType::Char;
  if (c.int8) {
    c.k_scale = paged_scales(k_scale, "k_scale", c.k), c.v_scale = paged_scales(v_scale, "v_scale", c.v);
  } else {
    PYARCH_CHECK(!k_scale, "k_scale: is for int8 caches");
    PYARCH_CHECK(!v_scale, "v_scale: is for int8 caches");
  }
  return c;
}

// What a kernel that writes into pages must know first: every element that it writes lies apart, every slot
// is -1 or in range, and none is named twice.
void check_append(const PagedCaches& caches, const int64_t* slots, int64_t tokens);

// Whether the tensor's memory can be written by an append; used to refuse an input that the call itself would
// overwrite.
bool touches(const PagedCaches& caches, const Tensor& t);

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

// The same, rounded to int8: codes into the cache, a scale for each head.
template <class T>
inline void round_slot(const PagedCache& cache, const PagedCache& scales, int64_t slot, const T* token,
                       int64_t head_stride) {
  int8_t* to = reinterpret_cast<int8_t*>(cache.data) + cache.offset(slot);
  float* scale = reinterpret_cast<float*>(scales.data) + scales.offset(slot);
  for (int64_t h = 0; h < cache.heads; ++h)
    scale[h * scales.head_stride] =
        round_to_int8(token + h * head_stride, to + h * cache.head_stride, cache.dim);
}

}  // namespace pyarch
