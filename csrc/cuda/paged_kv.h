// The C launchers of paged_kv.cu and paged_kv_attention.cu: plain pointers and sizes, so that neither side
// includes the other's world.
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
  // Of int8 caches alone: their scales (pages, page_size, heads), or null; the type of k and v, 0 float, 1
  // bf16, 2 fp16.
  float *k_scale, *v_scale;
  int64_t scale[2][3];  // strides: page, position, head
  int64_t type;
};

// Queues the copy on a cudaStream_t; returns nullptr, or what CUDA says is wrong.
const char* pyarch_kv_append(const KvAppend* call, void* stream);

// How the work is cut, from sizes alone. No choice changes a result.
struct PagedAttentionPlan {
  int64_t lanes, heads_a_tile, rows_a_tile;  // query vectors of a tile: rows_a_tile * heads_a_tile <= lanes
  int64_t head_tiles, blocks, grid_splits;   // the grid: blocks = tiles * head_tiles, by grid_splits
  int64_t splits, spans;                     // of a tile at most
  int64_t partial_floats, counters;          // what goes through memory, 0 with one grid split
};

// q (total, q_heads, dim) over caches (pages, page_size, heads, dim); strides in elements, the last dimension
// contiguous; the caches' addresses and strides are multiples of 16 bytes.
struct PagedAttention {
  const void *q, *k, *v, *sinks;            // sinks: (q_heads) or null
  const int32_t *table, *lengths, *starts;  // (batch, columns), (batch), (batch + 1) or null: one row each
  void* out;                                // (total, q_heads, dim), contiguous
  float* lse;                               // (total, q_heads)
  void* arrived;                            // plan.counters int32
  float* partial;                           // plan.partial_floats
  const float *k_scale, *v_scale;  // (pages, page_size, heads) of int8 caches, else null: of q's type
  int64_t type;                    // of q: 0 float, 1 bf16, 2 fp16
  int64_t total, q_heads, dim, pages, page_size, heads, batch, columns;
  int64_t q_row, q_head, table_row, table_column, length_step, start_step, sink_step;
  int64_t k_stride[3], v_stride[3];  // page, position, head
  int64_t k_scale_stride[3], v_scale_stride[3];
  int64_t left, right;  // positions that a row sees besides its own; right is 0 for causal
  float scale, softcap;
  bool sinks_are_float;
  PagedAttentionPlan plan;
};

void pyarch_paged_attention_plan(PagedAttention* call);  // sets call->plan
const char* pyarch_paged_attention(const PagedAttention* call, void* stream);
}
