// paged_attention's sums: of a lane's split among warps, of splits, of spans of splits, in that order.
//
//   m' = max(m, m_i)   a = 2^(m - m')   b = 2^(m_i - m')   l' = l a + l_i b   acc' = acc a + acc_i b
//
// From nothing (m = -inf, l = 0, acc = 0), a sum takes exactly what it is given, so that it does not matter
// who adds up what, as long as the order is this one.
#pragma once

#include "paged_kv_tile.h"

namespace pyarch {
namespace {

// Of the thread's dimensions, thread / 8 + 16 i, of query vector thread % 8 of a tile of 8.
template <int D>
struct Sum {
  float m = -INFINITY, l = 0.0f, value[D / 16] = {};

  template <class F>
  PYARCH_DEVICE void add(float m_i, float l_i, const F& value_i) {
    if (l_i == 0.0f) return;
    const float both = fmaxf(m, m_i), shift = both == -INFINITY ? 0.0f : both;
    const float a = exp2f(m - shift), b = exp2f(m_i - shift);
    l = fmaf(l, a, l_i * b);
    m = both;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) value[i] = fmaf(value[i], a, value_i(i) * b);
  }
  PYARCH_DEVICE void add(const Sum& other) {
    add(other.m, other.l, [&](int i) { return other.value[i]; });
  }
};

// A sum of all lanes of a tile in memory: [dim][lanes], m [lanes], l [lanes].
struct Partial {
  Global<float> at;
  int lanes, dim;

  PYARCH_DEVICE int64_t floats() const { return int64_t{lanes} * (dim + 2); }
  PYARCH_DEVICE Partial operator+(int64_t n) const { return {at + n * floats(), lanes, dim}; }

  template <int D>
  PYARCH_DEVICE void put(const Sum<D>& sum, int tile) const {
    const int lane = tile * 8 + static_cast<int>(threadIdx.x) % 8, first = static_cast<int>(threadIdx.x) / 8;
    if (lane >= lanes) return;
    Global<float> to = at + (first * lanes + lane);
#pragma unroll
    for (int i = 0; i < D / 16 && first + 16 * i < dim; ++i, to += 16 * lanes) to[0] = sum.value[i];
    if (first == 0) at[dim * lanes + lane] = sum.m, at[(dim + 1) * lanes + lane] = sum.l;
  }

  // The sum of this one and those after it.
  template <int D>
  PYARCH_DEVICE Sum<D> total(int count, int tile) const {
    constexpr int batch = D > 128 ? 2 : 4;  // asked for at a time
    Sum<D> sum;
    const int lane = tile * 8 + static_cast<int>(threadIdx.x) % 8, first = static_cast<int>(threadIdx.x) / 8;
    if (lane >= lanes) return sum;
    Global<const float> next = at + lane;
#pragma unroll 1
    for (int n = 0; n < count; n += batch) {
      Sum<D> each[batch];
#pragma unroll
      for (int k = 0; k < batch && n + k < count; ++k, next += floats()) {
        each[k].m = next[dim * lanes], each[k].l = next[(dim + 1) * lanes];
        Global<const float> from = next + first * lanes;
#pragma unroll
        for (int i = 0; i < D / 16 && first + 16 * i < dim; ++i, from += 16 * lanes)
          each[k].value[i] = from[0];
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) sum.add(each[k]);  // what was not read adds nothing
    }
    return sum;
  }
};

// Whether this block is the last of `blocks` to come here: it then sees what the others have written.
PYARCH_DEVICE bool is_last(Global<int> arrived, int blocks) {
  sync();
  bool last = false;
  if (threadIdx.x == 0) {
    fence();
    last = atomic_add(arrived, 1) == blocks - 1;
    fence();
  }
  return sync_any(last);
}

// The largest scores m and the sums l of a warp so far, of query vectors 8 n + 2 t + e (lane = 4 g + t); l is
// of the positions of this g alone until end().
template <int D, int NT>
struct Softmax {
  float m[NT][2], l[NT][2] = {};

  PYARCH_DEVICE Softmax() {
#pragma unroll
    for (int n = 0; n < NT; ++n) m[n][0] = m[n][1] = -INFINITY;
  }

  // x: scores of 8 o + g from `first` on, times scale_of(o), becomes probabilities in base 2, times
  // weight_of(o), or `unseen`; acc is made to fit.
  template <int octets, class F, class G>
  PYARCH_DEVICE void add(float (&x)[octets][NT][2], float (&acc)[D / 16][NT][4], int first,
                         const Sight::Range (&ranges)[NT][2], float softcap, float per_softcap, float unseen,
                         const F& scale_of, const G& weight_of) {
    float scale[octets], weight[octets], most[NT][2];
#pragma unroll
    for (int o = 0; o < octets; ++o) scale[o] = scale_of(o), weight[o] = weight_of(o);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        most[n][e] = m[n][e];
#pragma unroll
        for (int o = 0; o < octets; ++o) {
          float score = x[o][n][e] * scale[o];
          if (softcap > 0.0f) score = softcap * tanhf(score * per_softcap);
          x[o][n][e] = ranges[n][e].has(first + 8 * o) ? score * kLog2e : -INFINITY;
          most[n][e] = fmaxf(most[n][e], x[o][n][e]);
        }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) most[n][e] = fmaxf(most[n][e], shfl_xor(most[n][e], mask));
        const float shift = most[n][e] == -INFINITY ? 0.0f : most[n][e], fit = exp2f(m[n][e] - shift);
        m[n][e] = most[n][e];
        l[n][e] *= fit;
#pragma unroll
        for (int o = 0; o < octets; ++o) {
          const bool seen = ranges[n][e].has(first + 8 * o);
          const float p = exp2f(x[o][n][e] - shift);
          if (seen) l[n][e] += p;
          x[o][n][e] = seen ? p * weight[o] : unseen;
        }
#pragma unroll
        for (int i = 0; i < D / 16; ++i) acc[i][n][e] *= fit, acc[i][n][2 + e] *= fit;
      }
  }

  PYARCH_DEVICE void end() {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) l[n][e] += shfl_xor(l[n][e], mask);
  }
};

}  // namespace
}  // namespace pyarch
