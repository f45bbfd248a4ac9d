// Integers in the lanes of a vector, and the transposition that turns rows of bytes into lanes.
//
// A panel is W output rows, one to a lane. transpose() takes 16 bytes of each row and gives 4 vectors; lane n
// of vector j holds bytes 4j..4j+3 of row n:
//
//     row 0   b0 b1 b2 b3 | b4 ..            out[0]   row 0: b0..b3 | row 1: b0..b3 | ... | row W-1: b0..b3
//     row 1   b0 b1 b2 b3 | b4 ..     ->     out[1]   row 0: b4..b7 | row 1: b4..b7 | ...
#pragma once

#include "vec.h"

namespace pyarch {

#if defined(__AVX512F__)

inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i(void* p, I a) { _mm512_storeu_si512(p, a); }
inline I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline I and_i(I a, I b) { return _mm512_and_si512(a, b); }
inline I or_i(I a, I b) { return _mm512_or_si512(a, b); }
inline I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
template <int n>
inline I shl(I a) {
  return _mm512_slli_epi32(a, n);
}
template <int n>
inline I shr(I a) {
  return _mm512_srli_epi32(a, n);
}
template <int n>
inline I sar(I a) {
  return _mm512_srai_epi32(a, n);
}
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline I as_int(F a) { return _mm512_castps_si512(a); }
inline F from_halves(I a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }  // fp16 in each low word
inline I shuffle_bytes(I a, const uint8_t* from) {  // byte i of every 16 becomes byte from[i] of them
  return _mm512_shuffle_epi8(a,
                             _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

__attribute__((always_inline)) inline void transpose(const uint8_t* p, int64_t stride, I* out, int64_t step) {
  __m512i r[4];
  for (int i = 0; i < 4; ++i) {  // 128-bit lane b holds row 4b + i: unpacking within lanes ends in row order
    const auto at = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + row * stride));
    };
    r[i] = _mm512_castsi128_si512(at(i));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x00f0, at(4 + i));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0x0f00, at(8 + i));
    r[i] = _mm512_mask_broadcast_i32x4(r[i], 0xf000, at(12 + i));
  }
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  store_i(out, _mm512_unpacklo_epi64(a, c));
  store_i(out + step, _mm512_unpackhi_epi64(a, c));
  store_i(out + 2 * step, _mm512_unpacklo_epi64(b, d));
  store_i(out + 3 * step, _mm512_unpackhi_epi64(b, d));
}

#elif defined(__AVX2__)

inline I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_i(void* p, I a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline I set1_i(int32_t x) { return _mm256_set1_epi32(x); }
inline I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
inline I and_i(I a, I b) { return _mm256_and_si256(a, b); }
inline I or_i(I a, I b) { return _mm256_or_si256(a, b); }
inline I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
template <int n>
inline I shl(I a) {
  return _mm256_slli_epi32(a, n);
}
template <int n>
inline I shr(I a) {
  return _mm256_srli_epi32(a, n);
}
template <int n>
inline I sar(I a) {
  return _mm256_srai_epi32(a, n);
}
inline F as_float(I a) { return _mm256_castsi256_ps(a); }
inline I as_int(F a) { return _mm256_castps_si256(a); }
inline F from_halves(I a) {  // fp16 in each low word
  const __m256i low = and_i(a, set1_i(0xffff));
  return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
}
inline I shuffle_bytes(I a, const uint8_t* from) {
  return _mm256_shuffle_epi8(
      a, _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

__attribute__((always_inline)) inline void transpose(const uint8_t* p, int64_t stride, I* out, int64_t step) {
  __m256i r[4];
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + row * stride));
    };
    r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(i)), at(4 + i), 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
  const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  store_i(out, _mm256_unpacklo_epi64(a, c));
  store_i(out + step, _mm256_unpackhi_epi64(a, c));
  store_i(out + 2 * step, _mm256_unpacklo_epi64(b, d));
  store_i(out + 3 * step, _mm256_unpackhi_epi64(b, d));
}

#else

inline I load_i(const void* p) {
  I a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store_i(void* p, I a) { std::memcpy(p, &a, sizeof a); }
inline I set1_i(int32_t x) { return I{x, x, x, x}; }
inline I add_i(I a, I b) { return a + b; }
inline I and_i(I a, I b) { return a & b; }
inline I or_i(I a, I b) { return a | b; }
inline I xor_i(I a, I b) { return a ^ b; }
typedef uint32_t U __attribute__((vector_size(16)));
template <int n>
inline I shl(I a) {
  return (I)((U)a << n);
}
template <int n>
inline I shr(I a) {
  return (I)((U)a >> n);
}
template <int n>
inline I sar(I a) {
  return a >> n;
}
inline F as_float(I a) { return (F)a; }  // between vector types a cast keeps the bits
inline I as_int(F a) { return (I)a; }
inline F from_halves(I a) {
  F r;
  for (int i = 0; i < W; ++i) r[i] = to_float(fp16{static_cast<uint16_t>(a[i])});
  return r;
}
inline I shuffle_bytes(I a, const uint8_t* from) {
  uint8_t in[16], out[16];
  store_i(in, a);
  for (int i = 0; i < 16; ++i) out[i] = in[from[i]];
  return load_i(out);
}

__attribute__((always_inline)) inline void transpose(const uint8_t* p, int64_t stride, I* out, int64_t step) {
  for (int j = 0; j < 4; ++j) {
    int32_t lane[W];
    for (int n = 0; n < W; ++n) std::memcpy(&lane[n], p + n * stride + 4 * j, 4);
    store_i(out + j * step, load_i(lane));
  }
}

#endif

// Sum of the lanes; their maximum, if none is NaN; whether all are 0 (not NaN).
#if defined(__AVX512F__)
inline int32_t sum_lanes(I a) { return _mm512_reduce_add_epi32(a); }
#else
inline int32_t sum_lanes(I a) {
  int32_t x[W], total = 0;
  store_i(x, a);
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}
#endif

}  // namespace pyarch
