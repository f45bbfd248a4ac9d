// paged_attention's arithmetic on one split: scores, softmax, values, and the fold of a split into the
// answer.
#pragma once

#include "paged_kv_tile.h"

namespace pyarch {
namespace {

// What codes made, times the scale of their position.
template <class T>
PYARCH_DEVICE float scaled(float x, Shared<const float> scales, int i) {
  if constexpr (kScaled<T>) return x * scales[i];
  return x;
}

PYARCH_DEVICE float to_logit(float score, float scale, float softcap) {
  score *= scale;
  if (softcap > 0.0f) score = softcap * tanhf(score / softcap);
  return score * kLog2e;
}

// scores of one tile of keys; a page outside the cache gives NaN.
template <int L, class T, class Q>
PYARCH_DEVICE void score_keys(const Call<T, Q>& c, Shared<const T> keys, Shared<const float> q,
                              Shared<const int64_t> offsets, Shared<const float> scales,
                              Shared<float> scores) {
  constexpr int E = kPer16<T>, apart = kThreads / kPerKey, keys_a_thread = kTile<T> / apart;
  const int part = static_cast<int>(threadIdx.x) % kPerKey, first = static_cast<int>(threadIdx.x) / kPerKey;
  const int stride = c.key_bytes / static_cast<int>(sizeof(T));
  float sum[keys_a_thread][L] = {};
#pragma unroll 1  // two at a time cost 50 registers at 8 lanes
  for (int d = part * E; d < c.dim; d += kPerKey * E) {
    float key[keys_a_thread][E];
#pragma unroll
    for (int y = 0; y < keys_a_thread; ++y)
      unpack<T>(load16(keys + (first + y * apart) * stride + d), key[y]);
#pragma unroll
    for (int lane = 0; lane < L; ++lane) {
      float query[E];
#pragma unroll
      for (int e = 0; e < E; e += 4) unpack<float>(load16(q + lane * c.dim + d + e), query + e);
#pragma unroll
      for (int y = 0; y < keys_a_thread; ++y)
#pragma unroll
        for (int e = 0; e < E; ++e) sum[y][lane] = fmaf(query[e], key[y][e], sum[y][lane]);
    }
  }
#pragma unroll
  for (int y = 0; y < keys_a_thread; ++y) {
    const int i = first + y * apart;
#pragma unroll
    for (int lane = 0; lane < L; ++lane) {
      float score = sum[y][lane];
      score += shfl_xor(score, 1);
      score += shfl_xor(score, 2);
      if (lane % kPerKey == part)
        scores[i * L + lane] = offsets[i] < 0 ? bits_to_float(0x7fc00000)
                                              : to_logit(scaled<T>(score, scales, i), c.scale, c.softcap);
    }
  }
}

// Probabilities, times the scales of the values, in place of scores, kUnseen where a lane does not see the
// position; m and l of each lane.
template <int L, class T, class Q>
PYARCH_DEVICE void softmax(const Call<T, Q>& c, const Tile& t, int heads, int64_t start,
                           Shared<const float> scales, Shared<float> scores, Shared<float> m_to,
                           Shared<float> l_to) {
  const int in_warp = static_cast<int>(threadIdx.x) % 32;
  for (int lane = static_cast<int>(threadIdx.x) / 32; lane < L; lane += kWarps) {
    const int row = lane / heads;
    const int64_t own = t.position + row, low = own - c.left - start, past = own + c.right + 1;
    const int64_t high = (past < t.length ? past : t.length) - start, least = t.low - start;
    float x[kSplit / 32], m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int k = 0; k < kSplit / 32; ++k) {
      const int i = k * 32 + in_warp;
      const bool seen = row < t.rows && i >= least && i >= low && i < high;
      x[k] = seen ? scores[i * L + lane] : -INFINITY;
      if (!seen) scores[i * L + lane] = bits_to_float(kUnseen);
      m = fmaxf(m, x[k]);
    }
    for (int mask = 16; mask > 0; mask /= 2) m = fmaxf(m, shfl_xor(m, mask));
    const float shift = m == -INFINITY ? 0.0f : m;
#pragma unroll
    for (int k = 0; k < kSplit / 32; ++k) {
      const int i = k * 32 + in_warp;
      const bool seen = row < t.rows && i >= least && i >= low && i < high;
      const float p = exp2f(x[k] - shift);
      if (seen) scores[i * L + lane] = scaled<T>(p, scales, i);
      l += seen ? p : 0.0f;
    }
    for (int mask = 16; mask > 0; mask /= 2) l += shfl_xor(l, mask);
    if (in_warp == 0) m_to[lane] = m, l_to[lane] = l;
  }
}

template <int L>
PYARCH_DEVICE void load_lanes(Shared<const float> from, float* to) {
  if constexpr (L % 4 == 0) {
#pragma unroll
    for (int lane = 0; lane < L; lane += 4) unpack<float>(load16(from + lane), to + lane);
  } else {
#pragma unroll
    for (int lane = 0; lane < L; ++lane) to[lane] = from[lane];
  }
}

// acc += p * v over one tile of values, for the thread's elements of every apart-th position.
template <class T, int L>
PYARCH_DEVICE void add_values(Shared<const T> values, int stride, Shared<const float> p, const Share& own,
                              float (&acc)[L][kOwn<T>]) {
  for (int i = own.first; i < kTile<T>; i += own.apart) {
    float value[kOwn<T>];
    if constexpr (kOwn<T> == kPer16<T>)
      unpack<T>(load16(values + (i * stride + own.mine)), value);
    else
      unpack<T>(load8(values + (i * stride + own.mine)), value);
    float weights[L];
    load_lanes<L>(p + i * L, weights);
#pragma unroll
    for (int lane = 0; lane < L; ++lane) {
      const float weight = weights[lane];
      if (float_to_bits(weight) != kUnseen) {  // its value may be NaN, and 0 times NaN is not 0
#pragma unroll
        for (int e = 0; e < kOwn<T>; ++e) acc[lane][e] = fmaf(weight, value[e], acc[lane][e]);
      }
    }
  }
}

// Takes a split's m_i and l_i into a lane's m and l; a and b are what acc and acc_i are multiplied by, b = -1
// where the split adds nothing.
PYARCH_DEVICE void fold(float m_i, float l_i, float& m, float& l, float& a, float& b) {
  a = 1.0f, b = -1.0f;
  if (l_i == 0.0f) return;
  const float both = fmaxf(m, m_i), shift = both == -INFINITY ? 0.0f : both;
  a = exp2f(m - shift), b = exp2f(m_i - shift);
  l = fmaf(l, a, l_i * b);
  m = both;
}
PYARCH_DEVICE float fold_value(float acc, float acc_i, float a, float b) {
  return b < 0.0f ? acc : fmaf(acc, a, acc_i * b);
}

}  // namespace
}  // namespace pyarch
