// Vector steps that attention needs beyond vec.h: sums of many vectors at once, dot products in the operand's
// own type, the softmax of a row of scores.
#pragma once

#include "int8.h"
#include "vec.h"

namespace pyarch {

// Lane i is the sum of the lanes of a[i]: a transposition by halves that adds as it goes, in one fixed tree.
inline F sum_each(const F a[W]) {
#if defined(__AVX512F__)
  F x[4];
  for (int i = 0; i < 4; ++i) {
    const F* b = a + 4 * i;
    const __m512 p = _mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
    const __m512 r = _mm512_add_ps(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3]));
    const __m512d pd = _mm512_castps_pd(p), rd = _mm512_castps_pd(r);
    x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pd, rd)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(pd, rd)));
  }
  const F y = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
  const F z = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(y, z, 0x88), _mm512_shuffle_f32x4(y, z, 0xdd));
#elif defined(__AVX2__)
  F x[2];
  for (int i = 0; i < 2; ++i) {
    const F* b = a + 4 * i;
    const __m256 p = _mm256_add_ps(_mm256_unpacklo_ps(b[0], b[1]), _mm256_unpackhi_ps(b[0], b[1]));
    const __m256 r = _mm256_add_ps(_mm256_unpacklo_ps(b[2], b[3]), _mm256_unpackhi_ps(b[2], b[3]));
    const __m256d pd = _mm256_castps_pd(p), rd = _mm256_castps_pd(r);
    x[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(pd, rd)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(pd, rd)));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20), _mm256_permute2f128_ps(x[0], x[1], 0x31));
#else
  F r;
  for (int i = 0; i < W; ++i) r[i] = (a[i][0] + a[i][2]) + (a[i][1] + a[i][3]);
  return r;
#endif
}

// How a cache of C is multiplied with a q of T: in fp32, or bf16 pairs where the machine has them. Products
// are exact: bf16 holds every code of int8.
template <class C, class T>
struct Dot {
  using Cached = C;
  using Q = float;  // q's type in scratch
  using V = F;
  static constexpr int lanes = W;
  static V load(const float* p) { return pyarch::load(p); }
  template <class U>
  static V load(const U* p) {
    return pyarch::load(p);
  }
  template <class U>
  static V load(const U* p, int n) {
    return pyarch::load(p, n);
  }
  static F add(F acc, V a, V b) { return fma(a, b, acc); }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<bf16, bf16> {
  using Cached = bf16;
  using Q = bf16;
  using V = __m512bh;
  static constexpr int lanes = 32;
  static V load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static V load(const bf16* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static F add(F acc, V a, V b) { return _mm512_dpbf16_ps(acc, a, b); }
};
template <>
struct Dot<int8_t, bf16> : Dot<bf16, bf16> {
  using Cached = int8_t;
  using Dot<bf16, bf16>::load;
  static V load(const int8_t* p) { return _mm512_cvtne2ps_pbh(pyarch::load(p + W), pyarch::load(p)); }
  static V load(const int8_t* p, int n) {
    return _mm512_cvtne2ps_pbh(n > W ? pyarch::load(p + W, n - W) : zero(), pyarch::load(p, n < W ? n : W));
  }
};
#endif

// 2W elements as two vectors, in the order that is cheapest for their type, and back. bf16: the even elements
// and the odd ones, a shift and a mask apart.
template <class T>
inline void load_pair(const T* p, F& a, F& b) {
  a = load(p), b = load(p + W);
}
template <class T>
inline void store_pair(T* p, F a, F b) {
  store(p, a), store(p + W, b);
}
#if defined(__AVX512F__)
inline void load_pair(const bf16* p, F& a, F& b) {
  const __m512i x = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void store_pair(bf16* p, F a, F b) {
  const __m512i even = _mm512_cvtepu16_epi32(to_bf16(a)), odd = _mm512_cvtepu16_epi32(to_bf16(b));
  _mm512_storeu_si512(p, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#endif

// tanh with a relative error under 4e-7: an odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline F tanh_lanes(F x) {
  const F z = x * x, ax = abs(x);
  F p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  const F small = fma(p * z, x, x);
  const F far = set1(1.0f) - set1(2.0f) / (exp(ax + ax) + set1(1.0f));
  float s[W], f[W], v[W];
  store(s, small), store(f, far), store(v, x);
  for (int i = 0; i < W; ++i)
    if (std::fabs(v[i]) >= 0.625f || v[i] != v[i]) s[i] = std::copysign(f[i], v[i]);
  return load(s);
}

// Lane i is x[index[i]].
inline F permute(F x, const int32_t* index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), x);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
#else
  return F{x[index[0]], x[index[1]], x[index[2]], x[index[3]]};
#endif
}

// A base-2 logit of q . k: scaled, and capped where softcap is not 0.
inline F to_logit(F s, float scale, float softcap) {
  constexpr float log2e = 1.44269504088896341f;
  if (softcap == 0.0f) return s * set1(scale * log2e);
  return tanh_lanes(s * set1(scale / softcap)) * set1(softcap * log2e);
}

inline void copy_row(const bf16* from, bf16* to, int64_t n) { std::memcpy(to, from, n * sizeof(bf16)); }
template <class T>
inline void copy_row(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

}  // namespace pyarch
