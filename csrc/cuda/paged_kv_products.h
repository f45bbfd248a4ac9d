// paged_attention's products of one stage of a warp: kRows positions with 8 or 16 lanes.
//
//   scores       of lane l of the warp, g = l / 4 and t = l % 4: s[o][n][e] is position 8 o + g of the stage
//                and query vector 8 n + 2 t + e
//   add_values   acc[i][n][2 h + e]: dimension dim(i, h), query vector 8 n + 2 t + e
//
// Tensor cores, where q has 16 bits: K is the left operand, 16 positions by 16 dimensions, and q^T the right
// one; then V^T by ldmatrix.trans, and p^T as scores are laid out, transposed in registers. 8 query vectors
// are a whole operand. p has two numbers of 16 bits, p = high + low: fp32's exactness nearly, for 2 mma of
// some 150 instructions a stage. Codes of 8 bits become 16-bit floats in registers, exactly.
//
// fp32 FMA, where q is float: every number in its own registers.
#pragma once

#include <type_traits>

#include "mma.h"
#include "paged_kv_tile.h"

namespace pyarch {
namespace {

// In the place of a probability of what a query vector does not see: a NaN that no arithmetic gives, for any
// number may be one times a scale.
constexpr uint32_t kUnseen = 0xffa5c3e1;

template <class T>
struct Wide {
  using Type = T;
};
template <>
struct Wide<int8_t> {
  using Type = bf16;  // a probability times a scale of fp16's caches may be less than fp16 has
};

// Codes of a word as 16-bit floats: bytes 0 and 2, then 1 and 3. Low bits of a power of two, less that, and
// for a negative code as much again.
template <class T>
PYARCH_DEVICE void widen(uint32_t word, uint32_t& even, uint32_t& odd) {
  constexpr uint32_t base = std::is_same<T, bf16>::value ? 0x43004300u : 0x64006400u;
  even = subtract2<T>(and_or(word, 0x007f007fu, base), and_or(word, 0x00800080u, base));
  odd = subtract2<T>(and_or(word >> 8, 0x007f007fu, base), and_or(word >> 8, 0x00800080u, base));
}

template <class T>
PYARCH_DEVICE uint32_t pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T, class Q, int D, int NT>
struct Products {
  using V = typename Wide<T>::Type;
  static constexpr int kChunks =
      D * static_cast<int>(sizeof(T)) / 32;  // 32 bytes of a row: 16 or 32 dimensions
  static constexpr bool kCodes = kScaled<T>;
  static constexpr int kTogether = kCodes ? 1 : 2;  // chunks that are loaded before they are multiplied
  float unseen = 0.0f;                              // the probability of what is not seen
  const Call<T, Q>& c;
  const Layout& at;
  int lane, key_byte, value_byte, dim_bytes;

  PYARCH_DEVICE Products(const Call<T, Q>& call, const Layout& layout) : c(call), at(layout) {
    lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane % 8, one = lane / 8 % 2,
              two = lane / 16;  // which of the 4 matrices this lane addresses
    key_byte = (row + 8 * one) * c.row_bytes + 16 * two;
    value_byte = (row + 8 * two) * c.row_bytes + 16 * one;
    dim_bytes = c.dim * static_cast<int>(sizeof(T));
  }

  PYARCH_DEVICE Shared<uint32_t> odd() const {
    return shared<uint32_t>(at.odd) + static_cast<int>(threadIdx.x) / 32 * c.dim;
  }
  static PYARCH_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

  PYARCH_DEVICE int dim(int i, int high) const {
    return 16 * i + (kCodes ? 2 * (lane / 4) + high : lane / 4 + 8 * high);
  }

  // Where some rows of a tile do not see what others see, its values may be anything, and 0 times NaN is not
  // 0. Those that are not finite become 0, and are remembered for the rows that see them: sees(vector,
  // position of the stage). Only then; elsewhere they spoil what they should.
  PYARCH_DEVICE void start_odd() const {
    if constexpr (!kCodes)
      for (int d = lane; d < c.dim; d += 32) odd()[d] = 0;
  }
  template <class F>
  PYARCH_DEVICE void take_out_odd(int stage, const F& sees) const {
    if constexpr (!kCodes) {
#pragma unroll 1
      for (int row = 0; row < kRows<T>; ++row) {
        const Shared<T> values = shared<T>(stage + row * c.row_bytes);
        for (int d = lane; d < c.dim; d += 32) {
          if (is_finite(to_float(values[d]))) continue;
          values[d] = T{};
          for (int vector = 0; vector < 8 * NT; ++vector)
            if (sees(vector, row)) odd()[d] = odd()[d] | 1u << vector;
        }
      }
      sync_warp();
    }
  }
  // A sum of values. With infinities it is infinite or NaN, by what else is in their tile: always NaN.
  PYARCH_DEVICE float result(float sum, int d, int vector, bool may_be_odd) const {
    if constexpr (!kCodes)
      if (!is_finite(sum) || (may_be_odd && (odd()[d] >> vector & 1))) return bits_to_float(0x7fc00000);
    return sum;
  }

  // The right operands in order, 8 bytes a lane: (16 dimensions, 8 query vectors).
  template <class F>
  PYARCH_DEVICE void put_queries(const F& query) const {
    const Shared<uint32_t> to = shared<uint32_t>(at.q);
    const int words = (c.dim + 63) / 64 * NT * 256;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
      const int t = i / 2 % 4, g = i / 8 % 8, step = i / 64 / NT, vector = i / 64 % NT * 8 + g;
      const int d = 16 * step + (kCodes ? 4 * t + i % 2 : 2 * t + i % 2 * 8);
      const uint32_t first = query(vector, d).bits, second = query(vector, d + (kCodes ? 2 : 1)).bits;
      to[i] = first | second << 16;
    }
  }

  PYARCH_DEVICE void scores(int stage, float (&s)[kOctets<T>][NT][2]) const {
#pragma unroll
    for (int half = 0; half < kRows<T> / 16; ++half) {
      float sum[2][NT][4] = {};  // of every other step: two products are under way at a time
      const auto add = [&](const uint32_t (&keys)[4], int step) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const Bytes8 query = load8(shared<const uint32_t>(at.q) + ((step * NT + n) * 32 + lane) * 2);
          const uint32_t b[2] = {query.x, query.y};
          mma<Q>(sum[step % 2][n], keys, b);
        }
      };
#pragma unroll
      for (int i = 0; i < kChunks; i += kTogether) {
        if (32 * i >= dim_bytes) break;
        uint32_t r[kTogether][4];
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          ldmatrix4(r[k], shared<const Q>(stage + half * 16 * c.row_bytes + key_byte + 32 * (i + k)));
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (32 * (i + k) >= dim_bytes) r[k][0] = r[k][1] = 0;  // past the row: anything
          if (32 * (i + k) + 16 >= dim_bytes) r[k][2] = r[k][3] = 0;
          if constexpr (kCodes) {
            uint32_t a[4];
            widen<Q>(r[k][0], a[0], a[2]), widen<Q>(r[k][1], a[1], a[3]);
            add(a, 2 * (i + k));
            widen<Q>(r[k][2], a[0], a[2]), widen<Q>(r[k][3], a[1], a[3]);
            add(a, 2 * (i + k) + 1);
          } else {
            add(r[k], i + k);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[2 * half + e / 2][n][e % 2] = sum[0][n][e] + sum[1][n][e];
    }
  }

  PYARCH_DEVICE void add_values(int stage, const float (&p)[kOctets<T>][NT][2],
                                float (&acc)[D / 16][NT][4]) const {
#pragma unroll
    for (int half = 0; half < kRows<T> / 16; ++half) {
      uint32_t high[NT][2], low[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const float* x = p[2 * half + o][n];
          const uint32_t upper = pair<V>(x[0], x[1]);
          const float x0 = to_float(V{static_cast<uint16_t>(upper)});
          const float x1 = to_float(V{static_cast<uint16_t>(upper >> 16)});
          high[n][o] = transpose(upper);
          low[n][o] = transpose(pair<V>(x[0] - x0, x[1] - x1));
        }
      const auto add = [&](const uint32_t (&values)[4], float (&to)[NT][4]) {
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<V>(to[n], values, high[n]), mma<V>(to[n], values, low[n]);
      };
#pragma unroll
      for (int i = 0; i < kChunks; i += kTogether) {
        if (32 * i >= dim_bytes) break;  // what is past the row is not taken from acc
        uint32_t r[kTogether][4];
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          ldmatrix4_transposed(r[k],
                               shared<const V>(stage + half * 16 * c.row_bytes + value_byte + 32 * (i + k)));
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          if constexpr (kCodes) {
            uint32_t a[4];
            widen<V>(r[k][0], a[0], a[1]), widen<V>(r[k][2], a[2], a[3]);
            add(a, acc[2 * (i + k)]);
            widen<V>(r[k][1], a[0], a[1]), widen<V>(r[k][3], a[2], a[3]);
            add(a, acc[2 * (i + k) + 1]);
          } else {
            add(r[k], acc[i + k]);
          }
      }
    }
  }
};

template <class T, int D>
struct Products<T, float, D, 1> {
  float unseen = bits_to_float(kUnseen);
  const Call<T, float>& c;
  const Layout& at;
  int g, t, pitch;  // pitch: of a query vector in shared memory, so that 4 of them lie in different banks

  PYARCH_DEVICE Products(const Call<T, float>& call, const Layout& layout) : c(call), at(layout) {
    g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
    pitch = (c.dim + 15) / 16 * 16 + 4;
  }

  PYARCH_DEVICE int dim(int i, int high) const { return i / 2 * 32 + 4 * g + i % 2 * 2 + high; }
  PYARCH_DEVICE void start_odd() const {}
  template <class F>
  PYARCH_DEVICE void take_out_odd(int, const F&) const {}
  PYARCH_DEVICE float result(float sum, int, int, bool) const { return sum; }

  template <class F>
  PYARCH_DEVICE void put_queries(const F& query) const {
    const Shared<float> to = shared<float>(at.q);
    for (int i = static_cast<int>(threadIdx.x); i < 8 * c.dim; i += kThreads)
      to[i / c.dim * pitch + i % c.dim] = query(i / c.dim, i % c.dim);
  }

  PYARCH_DEVICE void scores(int stage, float (&s)[kOctets<T>][1][2]) const {
    const Shared<const float> q = shared<const float>(at.q) + 2 * t * pitch;
    float sum[kOctets<T>][2] = {};
#pragma unroll 1
    for (int d = 0; d < c.dim; d += 4) {
      float first[4], second[4];
      unpack<float>(load16(q + d), first);
      unpack<float>(load16(q + pitch + d), second);
#pragma unroll
      for (int o = 0; o < kOctets<T>; ++o) {
        float key[4];
        four(stage + (8 * o + g) * c.row_bytes, d, key);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[o][0] = fmaf(first[e], key[e], sum[o][0]);
          sum[o][1] = fmaf(second[e], key[e], sum[o][1]);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kOctets<T>; ++o) s[o][0][0] = sum[o][0], s[o][0][1] = sum[o][1];
  }

  PYARCH_DEVICE void add_values(int stage, const float (&p)[kOctets<T>][1][2],
                                float (&acc)[D / 16][1][4]) const {
#pragma unroll
    for (int o = 0; o < kOctets<T>; ++o)
#pragma unroll 1
      for (int row = 0; row < 8; ++row) {
        const float weight[2] = {shfl(p[o][0][0], 4 * row + t), shfl(p[o][0][1], 4 * row + t)};
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
          const int d = 32 * i + 4 * g;
          if (d >= c.dim) break;
          float value[4];
          four(stage + (8 * o + row) * c.row_bytes, d, value);
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (float_to_bits(weight[e]) != kUnseen)  // its value may be NaN, and 0 times NaN is not 0
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                float& to = acc[2 * i + j / 2][0][j % 2 * 2 + e];
                to = fmaf(weight[e], value[j], to);
              }
        }
      }
  }

 private:
  // 4 elements of a row from d on.
  static PYARCH_DEVICE void four(int row, int d, float* to) {
    if constexpr (sizeof(T) == 4)
      unpack<float>(load16(shared<const float>(row) + d), to);
    else
      unpack_word(shared<const uint32_t>(row)[d / 4], T{}, to);
  }
};

}  // namespace
}  // namespace pyarch
