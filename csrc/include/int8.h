// Rounding to int8 with one scale: amax / 127, codes to the nearest, of two the even one; and codes as fp32.
#pragma once

#include <algorithm>
#include <limits>

#include "vec.h"

namespace pyarch {

inline float to_float(int8_t x) { return static_cast<float>(x); }

#if defined(__AVX512F__)
inline float max_lanes(F a) { return _mm512_reduce_max_ps(a); }
inline bool all_zero(F a) { return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_EQ_OQ) == 0xffff; }
inline F load(const int8_t* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load(const int8_t* p, int n) {
  return to_float(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
inline void store_codes(int8_t* p, I codes) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
}
inline void store_codes(int8_t* p, I codes, int n) { _mm512_mask_cvtepi32_storeu_epi8(p, first(n), codes); }
#else
inline float max_lanes(F a) { return hmax(a); }
inline bool all_zero(F a) { return hsum(a) == 0.0f; }
#if defined(__AVX2__)
inline F load(const int8_t* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store_codes(int8_t* p, I codes) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
#else
inline F load(const int8_t* p) { return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }
inline void store_codes(int8_t* p, I codes) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(codes[i]);
}
#endif
inline F load(const int8_t* p, int n) {
  int8_t whole[W] = {};
  std::memcpy(whole, p, n);
  return load(whole);
}
inline void store_codes(int8_t* p, I codes, int n) {
  int8_t whole[W];
  store_codes(whole, codes);
  std::memcpy(p, whole, n);
}
#endif

// amax / 127 of n numbers; NaN if one of them is not finite, so that what is made of the codes is NaN too.
template <class T>
inline float int8_scale(const T* x, int64_t n) {
  F most = zero(), check = zero();
  for (int64_t i = 0; i < n; i += W) {
    const int left = static_cast<int>(std::min<int64_t>(W, n - i));
    const F v = left == W ? load(x + i) : load(x + i, left);
    most = max(most, abs(v));
    check = fma(v, zero(), check);
  }
  return all_zero(check) ? max_lanes(most) / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

// round(x / scale) within -127..127.
inline I int8_codes(F x, F scale) { return to_int(max(set1(-127.0f), min(set1(127.0f), x / scale))); }

// Codes of n numbers; returns their scale. Codes are 0 where it is 0 or NaN.
template <class T>
inline float round_to_int8(const T* x, int8_t* codes, int64_t n) {
  const float scale = int8_scale(x, n);
  if (!(scale > 0.0f)) {
    std::memset(codes, 0, n);
    return scale;
  }
  const F divisor = set1(scale);
  int64_t i = 0;
  for (; i + W <= n; i += W) store_codes(codes + i, int8_codes(load(x + i), divisor));
  const int left = static_cast<int>(n - i);
  if (left > 0) store_codes(codes + i, int8_codes(load(x + i, left), divisor), left);
  return scale;
}

}  // namespace pyarch
