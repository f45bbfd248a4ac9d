// paged_attention for sequences with few rows (decode): bound by reading the cache, so it is read once and in
// order.
//
//   task = (sequence, split of kSplit positions, range of KV heads)
//     K pass   position by position, head by head, as they lie in memory; a head's K vectors stay in
//              registers for all its lanes. A lane is one (KV head, row, query head of the group):
//              scores[position][lane]
//     softmax  of this split alone, lanes side by side: maximum m, sum l, probabilities
//     V pass   a few positions at a time, head by head: acc[lane][dim] += p * v
//     int8     codes are multiplied as they are; in the softmax a position's scale of K goes into its score,
//              that of V into its probability
//   combine, lane by lane, splits in their order: out = sum(2^(m_i - m) acc_i) / sum(2^(m_i - m) l_i)
//
// Splits lie at multiples of kSplit and a lane adds position after position, so what is added to what depends
// on positions alone: not on the page size, the other sequences or the threads.
#pragma once

#include <type_traits>

#include "paged_kv_attention.h"
#include "paged_kv_vec.h"

namespace pyarch {
namespace few {

constexpr int64_t kSplit = 256;  // positions a task covers
constexpr int64_t kMost = 16;    // positions between a prefetch and its use at most
template <class C>
constexpr bool kScaled = std::is_same_v<C, int8_t>;

// The results of one split: acc, m and l of every lane of the sequence.
struct Partial {
  float *acc, *m, *l;
  Partial(float* base, int64_t lanes, int64_t dim)
      : acc(base), m(base + lanes * dim), l(base + lanes * (dim + 1)) {}
};
inline int64_t partial_floats(int64_t lanes, int64_t dim) { return (lanes * (dim + 2) + 15) / 16 * 16; }

// passing: past the outer caches, since what does not stay there must not evict, and write back, what others
// left.
template <class T>
inline void prefetch(const T* p, int64_t n, bool passing) {
  if (passing)
    for (int64_t b = 0; b < n; b += 64 / sizeof(T)) __builtin_prefetch(p + b, 0, 0);
  else
    for (int64_t b = 0; b < n; b += 64 / sizeof(T)) __builtin_prefetch(p + b);
}

// to[i] = k . q[i] for U lanes, as vectors yet to be summed over their lanes. NV: vectors of k, 0 for any
// number.
template <class D, int NV, int U>
inline void dots(const typename D::Cached* k, const typename D::Q* q, int64_t dim, F* to) {
  F sum[U];
  for (int i = 0; i < U; ++i) sum[i] = zero();
  if constexpr (NV > 0) {
    typename D::V held[NV];
    for (int d = 0; d < NV; ++d) held[d] = D::load(k + d * D::lanes);
    for (int i = 0; i < U; ++i)
      for (int d = 0; d < NV; ++d) sum[i] = D::add(sum[i], held[d], D::load(q + (i * NV + d) * D::lanes));
  } else {
    int64_t d = 0;
    for (; d + D::lanes <= dim; d += D::lanes) {
      const typename D::V held = D::load(k + d);
      for (int i = 0; i < U; ++i) sum[i] = D::add(sum[i], held, D::load(q + i * dim + d));
    }
    const int left = static_cast<int>(dim - d);
    if (left > 0)
      for (int i = 0; i < U; ++i)
        sum[i] = D::add(sum[i], D::load(k + d, left), D::load(q + i * dim + d, left));
  }
  for (int i = 0; i < U; ++i) to[i] = sum[i];
}

// What a task works on, beside the problem and the sequence.
struct Range {
  int64_t head_begin, head_end;  // KV heads
  int64_t start, low, high;      // positions start + low to start + high - 1
  int64_t lanes,
      stride;  // of a row of scores: (head_end - head_begin) * rows * group, and padded past W more
  const int64_t *k_at, *v_at;  // offsets of position start + i
  int64_t ahead;               // positions between a prefetch and its use
  bool passing;                // the call reads more than a cache keeps until the next one
  int64_t block;  // positions of V that a head adds between a load and a store of its accumulators
  const float *k_scale, *v_scale;  // of int8 caches: [position][scale_stride], a scale for each head
  int64_t scale_stride;            // heads, and padded for whole vectors
};

// What is prefetched must still lie in L1 when its turn comes: a load that misses L1 waits behind all the
// prefetches under way. So few bytes ahead, and V in blocks that keep nearly to the order of memory; larger
// ones where several lanes share the loads of V.
template <class T>
inline void set_pace(const PagedAttention& a, Range& r) {
  const int64_t row = a.v.dim * static_cast<int64_t>(sizeof(T));
  r.block = std::clamp<int64_t>((a.group > 1 ? (kScaled<T> ? 2048 : 1024) : 512) / row, 1, kMost);
  r.ahead = std::clamp<int64_t>((8 << 10) / (row * (r.head_end - r.head_begin)), r.block, kMost);
}

// The first `count` positions of a pass, whose loop prefetches only those further on.
template <class T>
inline void prefetch_rows(const PagedCache& cache, const Range& r, const int64_t* at, int64_t count) {
  const T* base = reinterpret_cast<const T*>(cache.data);
  for (int64_t i = r.low; i < std::min(r.low + count, r.high); ++i)
    for (int64_t h = r.head_begin; h < r.head_end; ++h)
      prefetch(base + at[i] + h * cache.head_stride, cache.dim, r.passing);
}

// The K pass. A unit is U lanes of one head; W / U units are summed over their lanes together.
template <class D, int NV, int U>
void score(const PagedAttention& a, const Range& r, int64_t per_head, const typename D::Q* q, float* scores) {
  constexpr int batch = W / U;
  const auto* keys = reinterpret_cast<const typename D::Cached*>(a.k.data) + r.head_begin * a.k.head_stride;
  const int64_t dim = a.k.dim;
  for (int64_t i = r.low; i < r.high; ++i) {
    const auto *row = keys + r.k_at[i], *ahead = keys + r.k_at[i + r.ahead];
    const typename D::Q* unit_q = q;
    float* to = scores + i * r.stride;
    for (int64_t lane = 0, in_head = 0; lane < r.lanes; to += batch * U) {
      F sums[W];
      for (int b = 0; b < batch; ++b) {
        if (lane < r.lanes) {
          if (in_head == 0) prefetch(ahead, dim, r.passing);
          dots<D, NV, U>(row, unit_q, dim, sums + b * U);
          lane += U, in_head += U, unit_q += U * dim;
          if (in_head == per_head) in_head = 0, row += a.k.head_stride, ahead += a.k.head_stride;
        } else {
          for (int u = 0; u < U; ++u) sums[b * U + u] = zero();
        }
      }
      for (int u = batch * U; u < W; ++u) sums[u] = zero();
      store(to, sum_each(sums));  // where U does not divide W, the next store overwrites lanes past batch * U
    }
  }
}

template <class D, int U>
void score_any(const PagedAttention& a, const Range& r, int64_t per_head, const typename D::Q* q,
               float* scores) {
  constexpr int lanes = D::lanes;
  if (a.k.dim == 8 * lanes) return score<D, 8, U>(a, r, per_head, q, scores);
  if (a.k.dim == 4 * lanes) return score<D, 4, U>(a, r, per_head, q, scores);
  if (a.k.dim == 2 * lanes) return score<D, 2, U>(a, r, per_head, q, scores);
  score<D, 0, U>(a, r, per_head, q, scores);
}

template <class D>
void score_all(const PagedAttention& a, const Range& r, int64_t per_head, const typename D::Q* q,
               float* scores) {
  if (per_head % 4 == 0) return score_any<D, 4>(a, r, per_head, q, scores);
  if (per_head % 3 == 0) return score_any<D, 3>(a, r, per_head, q, scores);
  if (per_head % 2 == 0) return score_any<D, 2>(a, r, per_head, q, scores);
  score_any<D, 1>(a, r, per_head, q, scores);
}

// acc[g][NV vectors] += p[i][g] * row i, for i in [0, n), the vectors in the order of load_pair.
template <class T, int G, int NV>
inline void add_rows(const T* base, const int64_t* at, const float* p, int64_t stride, int64_t n, float* acc,
                     int64_t dim, const Range& r) {
  F a[G][NV];
  for (int g = 0; g < G; ++g)
    for (int d = 0; d < NV; ++d) a[g][d] = load(acc + g * dim + d * W);
  for (int64_t i = 0; i < n; ++i) {
    prefetch(base + at[i + r.ahead], NV * W, r.passing);
    F row[NV];
    for (int d = 0; d < NV; d += 2) load_pair(base + at[i] + d * W, row[d], row[d + 1]);
    for (int g = 0; g < G; ++g) {
      const F weight = set1(p[i * stride + g]);
      for (int d = 0; d < NV; ++d) a[g][d] = fma(weight, row[d], a[g][d]);
    }
  }
  for (int g = 0; g < G; ++g)
    for (int d = 0; d < NV; ++d) store(acc + g * dim + d * W, a[g][d]);
}

template <class T, int G>
inline void add_tail(const T* base, const int64_t* at, const float* p, int64_t stride, int64_t n, float* acc,
                     int64_t dim, int left) {
  F a[G];
  for (int g = 0; g < G; ++g) a[g] = load(acc + g * dim, left);
  for (int64_t i = 0; i < n; ++i) {
    const F row = load(base + at[i], left);
    for (int g = 0; g < G; ++g) a[g] = fma(set1(p[i * stride + g]), row, a[g]);
  }
  for (int g = 0; g < G; ++g) store(acc + g * dim, a[g], left);
}

template <class T, int G>
inline void add_lanes(const T* base, const int64_t* at, const float* p, int64_t stride, int64_t n, float* acc,
                      int64_t dim, const Range& r) {
  constexpr int wide = W == 16 ? (G <= 2 ? 8 : 4) : (G <= 2 ? 4 : 2);
  int64_t d = 0;
  for (; d + wide * W <= dim; d += wide * W)
    add_rows<T, G, wide>(base + d, at, p, stride, n, acc + d, dim, r);
  for (; d + 2 * W <= dim; d += 2 * W) add_rows<T, G, 2>(base + d, at, p, stride, n, acc + d, dim, r);
  for (; d < dim; d += W)
    add_tail<T, G>(base + d, at, p, stride, n, acc + d, dim, static_cast<int>(std::min<int64_t>(W, dim - d)));
}

// The same for any number of lanes that share the rows, four at a time.
template <class T>
inline void add_group(const T* base, const int64_t* at, const float* p, int64_t stride, int64_t n, float* acc,
                      int64_t dim, int64_t group, const Range& r) {
  for (; group >= 4; group -= 4, p += 4, acc += 4 * dim) add_lanes<T, 4>(base, at, p, stride, n, acc, dim, r);
  if (group == 3) add_lanes<T, 3>(base, at, p, stride, n, acc, dim, r);
  if (group == 2) add_lanes<T, 2>(base, at, p, stride, n, acc, dim, r);
  if (group == 1) add_lanes<T, 1>(base, at, p, stride, n, acc, dim, r);
}

// The scales of a range, from anywhere in memory to [position][head].
inline void gather_scales(const PagedAttention& a, const PagedCache& scales, const PagedSequence& s,
                          const Range& r, float* to) {
  int64_t at[kSplit];
  a.offsets(scales, s, r.start + r.low, r.start + r.high, at);
  const float* from = reinterpret_cast<const float*>(scales.data) + r.head_begin * scales.head_stride;
  const int64_t heads = r.head_end - r.head_begin;
  to += r.low * r.scale_stride;
  for (int64_t i = 0; i < r.high - r.low; ++i, to += r.scale_stride)
    for (int64_t h = 0; h < heads; ++h) to[h] = from[at[i] + h * scales.head_stride];
}
inline void prefetch_scales(const PagedAttention& a, const PagedCache& scales, const PagedSequence& s,
                            const Range& r) {
  int64_t at[kSplit];
  a.offsets(scales, s, r.start + r.low, r.start + r.high, at);
  const float* from = reinterpret_cast<const float*>(scales.data) + r.head_begin * scales.head_stride;
  for (int64_t i = 0; i < r.high - r.low; ++i)
    for (int64_t h = 0; h < r.head_end - r.head_begin; ++h)
      __builtin_prefetch(from + at[i] + h * scales.head_stride);
}

// Probabilities in place of scores, and m and l of each lane.
template <class C>
inline void softmax(const PagedAttention& a, const PagedSequence& s, const Range& r, float* scores,
                    float* m_to, float* l_to) {
  for (int64_t lane = 0; lane < r.lanes; lane += W) {
    F m = set1(kMinusInf), l = zero();
    const int64_t per_head = s.rows * a.group, head = lane / per_head;
    int32_t head_of[W];  // of each lane, from `head` on
    for (int64_t j = 0; j < W; ++j) head_of[j] = static_cast<int32_t>((lane + j) / per_head - head);
    const auto scaled = [&](F x, const float* scales, int64_t i) {
      if constexpr (kScaled<C>) return x * permute(load(scales + i * r.scale_stride + head), head_of);
      return x;
    };
    for (int64_t i = r.low; i < r.high; ++i) {
      const F x = to_logit(scaled(load(scores + i * r.stride + lane), r.k_scale, i), a.scale, a.softcap);
      store(scores + i * r.stride + lane, x);
      m = max(m, x);
    }
    if (s.rows > 1) {  // lanes of several rows see different positions
      const auto row_of = [&](int64_t j) { return (lane + j) % (s.rows * a.group) / a.group; };
      int64_t low[W], high[W];
      for (int64_t j = 0; j < W; ++j) {
        low[j] = s.row_low(row_of(j), a.left) - r.start;
        high[j] = s.row_high(row_of(j), a.right) - r.start;
      }
      m = set1(kMinusInf);
      for (int64_t i = r.low; i < r.high; ++i) {
        float* x = scores + i * r.stride + lane;
        for (int64_t j = 0; j < W; ++j)
          if (i < low[j] || i >= high[j]) x[j] = kMinusInf;
        m = max(m, load(x));
      }
    }
    float shift[W];
    store(shift, m);
    const int n = static_cast<int>(std::min<int64_t>(W, r.lanes - lane));
    std::memcpy(m_to + lane, shift, n * sizeof(float));
    for (float& x : shift) x = x == kMinusInf ? 0.0f : x;  // a lane that sees nothing: 2^-inf is 0
    const F base = load(shift);
    for (int64_t i = r.low; i < r.high; ++i) {
      const F p = exp2(load(scores + i * r.stride + lane) - base);
      store(scores + i * r.stride + lane, scaled(p, r.v_scale, i));
      l = l + p;
    }
    store(l_to + lane, l, n);
  }
}

template <class T, class C>
void split_task(const PagedAttention& a, const PagedSequence& s, int64_t split, int64_t head_begin,
                int64_t head_end, bool passing, const Partial& partial) {
  using D = Dot<C, T>;
  using Q = typename D::Q;
  const int64_t dim = a.k.dim, per_head = s.rows * a.group;
  Range r{};
  r.head_begin = head_begin, r.head_end = head_end, r.passing = passing;
  r.start = split * kSplit;
  r.low = std::max(s.low, r.start) - r.start;
  r.high = std::min(s.high, r.start + kSplit) - r.start;
  r.lanes = (head_end - head_begin) * per_head;
  r.stride = (r.lanes + 2 * W - 1) / W * W;
  set_pace<C>(a, r);
  int64_t k_at[kSplit + kMost], v_at[kSplit + kMost];  // with what a prefetch past the end looks at
  a.offsets(a.k, s, r.start + r.low, r.start + r.high, k_at + r.low);
  prefetch_rows<C>(a.k, r, k_at, r.ahead);
  a.offsets(a.v, s, r.start + r.low, r.start + r.high, v_at + r.low);
  for (int64_t i = 0; i < r.ahead; ++i)
    k_at[r.high + i] = k_at[r.high - 1], v_at[r.high + i] = v_at[r.high - 1];
  r.k_at = k_at, r.v_at = v_at;

  struct Scores;
  struct Queries;
  float* scores = scratch<Scores, float>(kSplit * r.stride);
  Q* q = scratch<Queries, Q>(r.lanes * dim);
  Q* to = q;
  for (int64_t head = head_begin * a.group; head < head_end * a.group; head += a.group)
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t g = 0; g < a.group; ++g, to += dim)
        copy_row(reinterpret_cast<const T*>(a.q) + (s.first_row + row) * a.q_row + (head + g) * a.q_head, to,
                 dim);

  if constexpr (kScaled<C>) prefetch_scales(a, a.k_scale, s, r), prefetch_scales(a, a.v_scale, s, r);
  score_all<D>(a, r, per_head, q, scores);
  prefetch_rows<C>(a.v, r, v_at, r.ahead);
  const int64_t first = head_begin * per_head;
  if constexpr (kScaled<C>) {
    struct Scales;
    r.scale_stride = head_end - head_begin + W;
    float* scales = scratch<Scales, float>(2 * kSplit * r.scale_stride);
    r.k_scale = scales, r.v_scale = scales + kSplit * r.scale_stride;
    gather_scales(a, a.k_scale, s, r, scales);
    gather_scales(a, a.v_scale, s, r, scales + kSplit * r.scale_stride);
  }
  softmax<C>(a, s, r, scores, partial.m + first, partial.l + first);

  const C* values = reinterpret_cast<const C*>(a.v.data);
  float* acc = partial.acc + first * dim;
  std::memset(acc, 0, r.lanes * dim * sizeof(float));
  for (int64_t i = r.low; i < r.high; i += r.block) {
    const int64_t n = std::min(r.block, r.high - i);
    for (int64_t h = head_begin; h < head_end; ++h) {
      const C* base = values + h * a.v.head_stride;
      for (int64_t row = 0; row < s.rows;
           ++row) {  // only what it attends to: a NaN elsewhere must not reach it
        const int64_t begin = std::max(i, s.row_low(row, a.left) - r.start);
        const int64_t count = std::min(i + n, s.row_high(row, a.right) - r.start) - begin;
        const int64_t lane = (h - head_begin) * per_head + row * a.group;
        if (count > 0)
          add_group<C>(base, v_at + begin, scores + begin * r.stride + lane, r.stride, count,
                       acc + lane * dim, dim, a.group, r);
      }
    }
  }
}

}  // namespace few
}  // namespace pyarch
