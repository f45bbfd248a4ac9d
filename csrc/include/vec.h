// One vector of floats, as wide as the instruction set this file is compiled for: 16 lanes (AVX-512), 8
// (AVX2), 4 (portable: GCC vector extensions, no intrinsics). Arithmetic is fp32; bf16 and fp16 exist in
// memory only. Every operation rounds the same way on every machine of one instruction set, in full and
// partial vectors alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyarch {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
using F = __m512;
using I = __m512i;
constexpr int W = 16;
#elif defined(__AVX2__)
using F = __m256;
using I = __m256i;
constexpr int W = 8;
#else
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;
#endif

#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

// ---- scalars
// ---------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + (112u << 23)));
  return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 0x1p-24f));
}

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {  // round to nearest even, overflow to infinity, subnormals kept
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (rest < 0x38800000) {  // below the smallest normal: let the adder round at 2^-24
    const float shifted = bits_to_float(rest) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13))};
}

// ---- vectors
// ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)

inline F set1(float x) { return _mm512_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F sqrt(F a) { return _mm512_sqrt_ps(a); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }  // round to nearest even
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n integral
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline F load(const fp16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline F load(const bf16* p, int n) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}
inline F load(const fp16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline __m256i to_bf16(F a) {  // vcvtneps2bf16 flushes subnormals, so round by hand
  const __m512i u = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __m512i bits = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}
inline void store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline void store(bf16* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
inline void store(fp16* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }
inline void store(bf16* p, F a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }
inline void store(fp16* p, F a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__)

inline F set1(float x) { return _mm256_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F sqrt(F a) { return _mm256_sqrt_ps(a); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline I to_int(F a) { return _mm256_cvtps_epi32(a); }
inline F to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline F scale2(F a, F n) {  // in two halves, so that 2^n itself never overflows
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), bias = _mm256_set1_epi32(127);
  const __m256i other = _mm256_sub_epi32(i, half);
  const F x = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(other, bias), 23)));
}
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F load(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, F a) { _mm256_storeu_ps(p, a); }
inline void store(bf16* p, F a) {
  const __m256i u = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
inline void store(fp16* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

#else

inline F set1(float x) { return F{x, x, x, x}; }
#define PYARCH_EACH(expression)                    \
  F r;                                             \
  for (int i = 0; i < W; ++i) r[i] = (expression); \
  return r
inline F fma(F a, F b, F c) {
  return a * b + c;
}  // rounds twice: without an instruction, std::fma is a library call
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F sqrt(F a) { PYARCH_EACH(std::sqrt(a[i])); }
inline F round(F a) { PYARCH_EACH(std::nearbyint(a[i])); }
inline F abs(F a) { PYARCH_EACH(std::fabs(a[i])); }
inline I to_int(F a) {
  I r;
  for (int i = 0; i < W; ++i) r[i] = a[i] == a[i] ? static_cast<int32_t>(std::nearbyint(a[i])) : 0;
  return r;
}
inline F to_float(I a) { PYARCH_EACH(static_cast<float>(a[i])); }
inline F scale2(F a, F n) {
  const I i = to_int(n), half = i >> 1, other = i - half;
  return a * (F)((half + 127) << 23) *
         (F)((other + 127) << 23);  // between vector types a cast keeps the bits
}
template <class T>
inline F load(const T* p) {
  PYARCH_EACH(to_float(p[i]));
}
template <class T>
inline void store(T* p, F a) {
  for (int i = 0; i < W; ++i) p[i] = from_float<T>(a[i]);
}
#undef PYARCH_EACH

#endif

#if !defined(__AVX512F__)
// Partial vectors through a buffer: the lanes beyond n read as 0 and are not written.
template <class T>
inline F load(const T* p, int n) {
  T whole[W] = {};
  std::memcpy(whole, p, n * sizeof(T));
  return load(whole);
}
template <class T>
inline void store(T* p, F a, int n) {
  T whole[W];
  store(whole, a);
  std::memcpy(p, whole, n * sizeof(T));
}
#endif

inline F zero() { return set1(0.0f); }

// Sum and maximum over the lanes, in the same fixed tree on every call.
inline float hsum(F a) {
  float x[W];
  store(x, a);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}
inline float hmax(F a) {
  float x[W];
  store(x, a);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}

// 2^x. Range reduction to |r| <= 1/2 and a degree-6 polynomial: relative error under 2e-7. Infinite above
// 128, 0 below -150, NaN for NaN (the bounds come first in min and max because both return their second
// operand for NaN).
inline F exp2(F x) {
  const F clamped = max(set1(-150.0f), min(set1(129.0f), x));
  const F n = round(clamped), r = clamped - n;
  F p = set1(1.5403530393e-4f);
  p = fma(p, r, set1(1.3333558146e-3f));
  p = fma(p, r, set1(9.6181291076e-3f));
  p = fma(p, r, set1(5.5504108664e-2f));
  p = fma(p, r, set1(2.4022650695e-1f));
  p = fma(p, r, set1(6.9314718056e-1f));
  p = fma(p, r, set1(1.0f));
  return scale2(p, n);
}

// e^x, likewise; infinite above 88.8, 0 below -104.
inline F exp(F x) {
  // n = round(x / ln 2); r = x - n ln 2 in two pieces keeps the error of a plain x * log2(e) out of large
  // |x|.
  const F clamped = max(set1(-104.0f), min(set1(89.0f), x));
  const F n = round(clamped * set1(1.44269504f));
  const F r = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), clamped));
  F p = set1(1.0f / 720);
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return scale2(p, n);
}

}  // namespace pyarch
