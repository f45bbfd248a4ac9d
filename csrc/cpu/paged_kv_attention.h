// paged_attention's problem, as its two kernels share it: few rows (split over keys) and prompts (tiles of
// rows).
#pragma once

#include <limits>
#include <vector>

#include "paged_kv.h"

namespace pyarch {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct PagedSequence {
  int64_t first_row, rows;  // its rows of q
  int64_t length;           // its tokens in the cache
  int64_t position;         // where its first row stands
  int64_t low, high;        // the positions [low, high) that any of its rows attends to
  const int32_t* table;     // the page of positions i * page_size and up, at table[i * table_stride]

  // What row i attends to.
  int64_t row_low(int64_t i, int64_t left) const { return std::max<int64_t>(0, position + i - left); }
  int64_t row_high(int64_t i, int64_t right) const {
    return std::max<int64_t>(0, std::min(length, position + i + right + 1));
  }
  void set_span(int64_t left, int64_t right) {
    low = row_low(0, left), high = row_high(rows - 1, right);
    if (low >= high) low = high = 0;
  }
};

struct PagedAttention {
  const char* q;                      // (total_q, q_heads, dim)
  int64_t q_row, q_head;              // its strides, in elements
  PagedCache k, v, k_scale, v_scale;  // the scales of int8 caches alone
  int64_t q_heads, group;             // group: query heads of one KV head
  int64_t table_stride;
  int64_t left, right;   // how far a row sees; right is 0 for causal
  float scale, softcap;  // softcap 0: none
  const float* sinks;    // (q_heads), or null
  char* out;             // (total_q, q_heads, dim), contiguous
  float* lse;            // (total_q, q_heads), natural

  // In elements from the cache's start, for the positions [low, high) of a sequence: to[i - low].
  void offsets(const PagedCache& cache, const PagedSequence& s, int64_t low, int64_t high,
               int64_t* to) const {
    int64_t page = low / cache.page_size, in = low % cache.page_size;
    for (int64_t i = low; i < high; in = 0, ++page) {
      int64_t at = s.table[page * table_stride] * cache.page_stride + in * cache.slot_stride;
      for (; in < cache.page_size && i < high; ++in, ++i, at += cache.slot_stride) *to++ = at;
    }
  }
};

// Sequences with few rows: each KV range of kSplit positions is a task of its own, for all heads that share
// it. T: of q and out; C: of the caches, T or int8_t.
template <class T, class C>
void attend_few(const PagedAttention& a, const std::vector<PagedSequence>& sequences);

// One sequence with many rows: its pages are gathered once, and flash attention's tiles do the rest.
template <class T, class C>
void attend_prompt(const PagedAttention& a, const PagedSequence& sequence);

}  // namespace pyarch
