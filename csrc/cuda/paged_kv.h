// The C launchers of paged_kv.cu: plain pointers and sizes, so that neither side includes the other's world.
#pragma once

#include <cstdint>

extern "C" {

// Two tensors (tokens, heads, dim) into two caches (pages, page_size, heads, dim); strides in elements of
// `item` bytes (2 or 4), the last dimension contiguous; k and v may have different strides.
struct KvAppend {
  const void *k, *v;
  void *k_cache, *v_cache;
  const int64_t* slots;  // (tokens): page * page_size + position; anything outside the cache is skipped
  int64_t tokens, heads, dim, pages, page_size, item;
  int64_t source[2][2];  // of k and v: token, head
  int64_t target[2][3];  // of k_cache and v_cache: page, position, head
};

// Queues the copy on a cudaStream_t; returns nullptr, or what CUDA says is wrong.
const char* pyarch_kv_append(const KvAppend* call, void* stream);
}
