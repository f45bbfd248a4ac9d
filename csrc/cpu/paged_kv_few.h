// paged_attention for sequences with few rows (decode): bound by reading the cache, so it is read once.
//
//   task = (sequence, split of kSplit positions, range of KV heads)
//     K pass   16 positions at a time, all heads of the range: scores of every row that shares the head
//     softmax  of this split alone: maximum m, sum l, probabilities
//     V pass   kBlock positions at a time: acc[row][head][dim] += p * v
//   combine, per row and head, splits in their order: out = sum(2^(m_i - m) acc_i) / sum(2^(m_i - m) l_i)
//
// Splits lie at multiples of kSplit and blocks at multiples of W within them, so what is added to what
// depends on positions alone: not on the page size, the other sequences or the threads.
#pragma once

#include "paged_kv_attention.h"
#include "paged_kv_vec.h"

namespace pyarch {
namespace few {

constexpr int64_t kSplit = 256;         // positions a task covers
constexpr int64_t kBlock = 32;          // positions of V between a load and a store of the accumulators
constexpr int kHold = W == 16 ? 8 : 4;  // vectors of q that stay in registers

// The results of one split: acc, m and l of every (row, query head).
struct Partial {
  float *acc, *m, *l;
  Partial(float* base, int64_t vectors, int64_t dim)
      : acc(base), m(base + vectors * dim), l(base + vectors * (dim + 1)) {}
};
inline int64_t partial_floats(int64_t vectors, int64_t dim) { return vectors * (dim + 2); }

// a[i] += row i . q over NV vectors.
template <class T, int NV>
inline void dot_step(const T* base, const int64_t* offsets, const typename Dot<T>::Q* q, F* a) {
  using D = Dot<T>;
  typename D::V held[NV];
  for (int d = 0; d < NV; ++d) held[d] = D::load(q + d * D::lanes);
  for (int i = 0; i < W; ++i) {
    const T* row = base + offsets[i];
    F sum = a[i];
    for (int d = 0; d < NV; ++d) sum = D::add(sum, D::load(row + d * D::lanes), held[d]);
    a[i] = sum;
  }
}

// The dot products of q with W rows.
template <class T>
inline F dot_rows(const T* base, const int64_t* offsets, const typename Dot<T>::Q* q, int64_t dim) {
  using D = Dot<T>;
  F a[W];
  for (int i = 0; i < W; ++i) a[i] = zero();
  int64_t d = 0;
  for (; d + kHold * D::lanes <= dim; d += kHold * D::lanes) dot_step<T, kHold>(base + d, offsets, q + d, a);
  if (d + kHold / 2 * D::lanes <= dim) {
    dot_step<T, kHold / 2>(base + d, offsets, q + d, a);
    d += kHold / 2 * D::lanes;
  }
  for (; d + D::lanes <= dim; d += D::lanes) dot_step<T, 1>(base + d, offsets, q + d, a);
  if (d < dim) {
    const int left = static_cast<int>(dim - d);
    const typename D::V held = D::load(q + d, left);
    for (int i = 0; i < W; ++i) a[i] = D::add(a[i], D::load(base + offsets[i] + d, left), held);
  }
  return sum_each(a);
}

// acc[g][NV vectors] += p[g][i] * row i, for i in [0, n).
template <class T, int G, int NV>
inline void add_rows(const T* base, const int64_t* offsets, const float* p, int64_t n, float* acc,
                     int64_t dim) {
  F a[G][NV];
  for (int g = 0; g < G; ++g)
    for (int d = 0; d < NV; ++d) a[g][d] = load(acc + g * dim + d * W);
  for (int64_t i = 0; i < n; ++i) {
    F row[NV];
    for (int d = 0; d < NV; ++d) row[d] = load(base + offsets[i] + d * W);
    for (int g = 0; g < G; ++g) {
      const F weight = set1(p[g * kSplit + i]);
      for (int d = 0; d < NV; ++d) a[g][d] = fma(weight, row[d], a[g][d]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int d = 0; d < NV; ++d) store(acc + g * dim + d * W, a[g][d]);
}

template <class T, int G>
inline void add_rows_tail(const T* base, const int64_t* offsets, const float* p, int64_t n, float* acc,
                          int64_t dim, int left) {
  F a[G];
  for (int g = 0; g < G; ++g) a[g] = load(acc + g * dim, left);
  for (int64_t i = 0; i < n; ++i) {
    const F row = load(base + offsets[i], left);
    for (int g = 0; g < G; ++g) a[g] = fma(set1(p[g * kSplit + i]), row, a[g]);
  }
  for (int g = 0; g < G; ++g) store(acc + g * dim, a[g], left);
}

template <class T, int G>
inline void add_block(const T* base, const int64_t* offsets, const float* p, int64_t n, float* acc,
                      int64_t dim) {
  constexpr int wide = W == 16 ? (G <= 2 ? 8 : 4) : (G <= 2 ? 4 : 2);
  int64_t d = 0;
  for (; d + wide * W <= dim; d += wide * W) add_rows<T, G, wide>(base + d, offsets, p, n, acc + d, dim);
  for (; d + W <= dim; d += W) add_rows<T, G, 1>(base + d, offsets, p, n, acc + d, dim);
  if (d < dim) add_rows_tail<T, G>(base + d, offsets, p, n, acc + d, dim, static_cast<int>(dim - d));
}

// The same for any number of heads of one row, four at a time.
template <class T>
inline void add_group(const T* base, const int64_t* offsets, const float* p, int64_t n, float* acc,
                      int64_t dim, int64_t group) {
  for (; group >= 4; group -= 4, p += 4 * kSplit, acc += 4 * dim)
    add_block<T, 4>(base, offsets, p, n, acc, dim);
  if (group == 3) add_block<T, 3>(base, offsets, p, n, acc, dim);
  if (group == 2) add_block<T, 2>(base, offsets, p, n, acc, dim);
  if (group == 1) add_block<T, 1>(base, offsets, p, n, acc, dim);
}

inline void prefetch_rows(const char* base, const int64_t* offsets, int64_t n, int64_t item, int64_t bytes) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(base + offsets[i] * item + b, 0, 2);
}

template <class T>
void split_task(const PagedAttention& a, const PagedSequence& s, int64_t split, int64_t head_begin,
                int64_t head_end, const Partial& partial) {
  using Q = typename Dot<T>::Q;
  const int64_t start = split * kSplit, dim = a.k.dim, group = a.group, rows = s.rows;
  const int64_t low = std::max(s.low, start) - start, high = std::min(s.high, start + kSplit) - start;
  const int64_t from = low / W * W, to = (high + W - 1) / W * W;

  // Offsets of the split's positions; beyond [low, high) those of its ends, whose scores are masked.
  int64_t k_at[kSplit], v_at[kSplit];
  a.offsets(a.k, s, start + low, start + high, k_at + low);
  a.offsets(a.v, s, start + low, start + high, v_at + low);
  for (int64_t i = from; i < low; ++i) k_at[i] = k_at[low];
  for (int64_t i = high; i < to; ++i) k_at[i] = k_at[high - 1];

  struct Scores;
  struct Queries;
  const int64_t heads = (head_end - head_begin) * group, vectors = rows * heads;
  float* scores = scratch<Scores, float>(vectors * kSplit);  // [row][head of the range][kSplit]
  Q* q = scratch<Queries, Q>(vectors * dim);                 // [row][head of the range][dim]
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t h = 0; h < heads; ++h) {
      const T* from_q =
          reinterpret_cast<const T*>(a.q) + (s.first_row + r) * a.q_row + (head_begin * group + h) * a.q_head;
      Q* to_q = q + (r * heads + h) * dim;
      if constexpr (std::is_same<T, Q>::value) {
        std::memcpy(to_q, from_q, dim * sizeof(T));
      } else {
        int64_t d = 0;
        for (; d + W <= dim; d += W) store(to_q + d, load(from_q + d));
        if (d < dim) store(to_q + d, load(from_q + d, static_cast<int>(dim - d)), static_cast<int>(dim - d));
      }
    }

  const T *keys = reinterpret_cast<const T*>(a.k.data), *values = reinterpret_cast<const T*>(a.v.data);
  const int64_t row_bytes = dim * sizeof(T);
  for (int64_t i = from; i < to; i += W)
    for (int64_t h = head_begin; h < head_end; ++h) {
      const T* base = keys + h * a.k.head_stride;
      if (i + W < to)
        prefetch_rows(reinterpret_cast<const char*>(base), k_at + i + W, W, sizeof(T), row_bytes);
      else if (i == from + (to - from - W))
        prefetch_rows(reinterpret_cast<const char*>(values + h * a.v.head_stride), v_at + low,
                      std::min<int64_t>(W, high - low), sizeof(T), row_bytes);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < group; ++g) {
          const int64_t vector = r * heads + (h - head_begin) * group + g;
          store(scores + vector * kSplit + i, dot_rows<T>(base, k_at + i, q + vector * dim, dim));
        }
    }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row_low = std::min(std::max(s.row_low(r, a.left) - start, from), to);
    const int64_t row_high = std::max(std::min(s.row_high(r, a.right) - start, to), row_low);
    for (int64_t h = 0; h < heads; ++h) {
      float* row = scores + (r * heads + h) * kSplit;
      to_logits(row + from, to - from, a.scale, a.softcap);
      for (int64_t i = from; i < row_low; ++i) row[i] = kMinusInf;
      for (int64_t i = row_high; i < to; ++i) row[i] = kMinusInf;
      const float m = row_max(row + from, to - from);
      const int64_t vector = r * a.q_heads + head_begin * group + h;
      partial.m[vector] = m;
      partial.l[vector] = exp2_and_sum(row + from, to - from, m == kMinusInf ? 0.0f : m);
      std::memset(partial.acc + vector * dim, 0, dim * sizeof(float));
    }
  }

  for (int64_t i = low; i < high; i += kBlock) {
    const int64_t n = std::min(kBlock, high - i);
    for (int64_t h = head_begin; h < head_end; ++h) {
      const T* base = values + h * a.v.head_stride;
      if (i + kBlock < high)
        prefetch_rows(reinterpret_cast<const char*>(base), v_at + i + kBlock,
                      std::min(kBlock, high - i - kBlock), sizeof(T), row_bytes);
      for (int64_t r = 0; r < rows; ++r) {  // only what the row attends to: a NaN elsewhere must not reach it
        const int64_t begin = std::max(i, s.row_low(r, a.left) - start);
        const int64_t count = std::min(i + n, s.row_high(r, a.right) - start) - begin;
        if (count <= 0) continue;
        const int64_t head = (h - head_begin) * group;
        add_group<T>(base, v_at + begin, scores + (r * heads + head) * kSplit + begin, count,
                     partial.acc + (r * a.q_heads + h * group) * dim, dim, group);
      }
    }
  }
}

}  // namespace few
}  // namespace pyarch
