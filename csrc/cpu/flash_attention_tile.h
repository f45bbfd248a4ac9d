// The register-level parts of flash attention. Everything is kept transposed: the rows (queries) of a tile
// lie across the lanes of R vectors, so that keys are walked one by one, maxima and sums over keys are plain
// vector operations, and K and V are read as scalars broadcast to all rows, straight from the caller's
// memory:
//
//     scores^T [keys][rows]  =  K [keys][D]  Q^T [D][rows]          both products are multiply() below
//     out^T    [Dv][rows]   +=  V^T [Dv][keys]  P^T [keys][rows]
//
// The unit of memory is a 32-bit word: one fp32 (Single), or two bf16 that are neighbours in the summed
// dimension (Pair, for the dot-product instruction).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace pyarch::flash {

// A word wherever it lies: K and V of bf16 are aligned to 2 bytes only.
typedef float Word __attribute__((may_alias, aligned(2)));

#if defined(__AVX512F__)
constexpr int kRowVectors = 3, kColumns = 8;  // of the register tile: 24 accumulators in 32 registers
#elif defined(__AVX2__)
constexpr int kRowVectors = 3, kColumns = 4;  // 12 in 16
#else
constexpr int kRowVectors = 2, kColumns = 4;  // 8 in 16, the rest for the products: no fused multiply-add
#endif
constexpr int kRows = kRowVectors * W;  // rows of a task at most
constexpr int kKeys = 64;               // keys of a block; blocks start at multiples of it in every sequence
constexpr int kChain = 128;             // words of a product of q and k that are added one after the other
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// a > b ? x : y per lane: comparisons and selections of GCC's vector extensions.
template <class Mask>
inline F select(Mask m, F x, F y) {
  return m ? x : y;
}

// 2^x for x <= 0 (and NaN); 0 for -infinity; exactly 1 for 0. Relative error 1e-7.
inline F exp2_nonpositive(F x) {
#if defined(__AVX512F__)
  constexpr __mmask16 kAll = 0xffff;  // the forms without a mask make GCC 12 warn of its own header
  const F r =
      _mm512_maskz_reduce_ps(kAll, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x), 0 for -inf
  F p = fma(set1(1.867130305e-3f), r, set1(9.017029824e-3f));
  p = fma(p, r, set1(5.579991346e-2f));
  p = fma(p, r, set1(0.2401644501f));
  p = fma(p, r, set1(0.6931513118f));
  return _mm512_maskz_scalef_ps(kAll, fma(p, r, set1(1.0f)), x);  // scalef takes the floor itself
#else
  return exp2(x);
#endif
}

// tanh: an odd polynomial near 0, where 1 - 2 / (e^2|x| + 1) would lose digits. Relative error 2e-7.
inline F tanh(F x) {
  const F z = x * x, a = abs(x);
  F p = fma(set1(-5.895157271e-3f), z, set1(2.079597106e-2f));
  p = fma(p, z, set1(-5.378383013e-2f));
  p = fma(p, z, set1(0.1333192413f));
  p = fma(p, z, set1(-0.33333298f));
  const F small = fma(x * z, p, x);
  const F large = set1(1.0f) - set1(2.0f) / (exp(a + a) + set1(1.0f));
  return select(a < set1(0.6f), small, select(x < zero(), zero() - large, large));
}

// How words are multiplied, and how they are made of what is kPerWord neighbours in the summed dimension.
struct Single {
  static constexpr int kPerWord = 1;
  static F dot(F a, F b, F sum) { return fma(a, b, sum); }
  static F pack(const F (&x)[1]) { return x[0]; }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int kPerWord = 2;
  static F dot(F a, F b, F sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static F pack(const F (&x)[2]) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<F>(_mm512_permutexvar_epi16(
        _mm512_load_si512(kInterleave), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(x[1], x[0]))));
  }
  // Neighbouring lanes as words: W / 2 of them.
  static void store_lanes(float* words, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  // words[i] = (a[i], b[i]) for i < n; b may be null for zeros.
  static void interleave(const bf16* a, const bf16* b, int64_t n, float* words) {
    for (int64_t i = 0; i < n; i += W) {
      const __mmask16 m = n - i < W ? first(static_cast<int>(n - i)) : static_cast<__mmask16>(-1);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, a + i));
      const __m512i high =
          b ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, b + i)) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(words + i, m, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
};
#endif

// sum[j][r] += over k: a[k][r] * b[j * step_j + k * step_k]; a is [depth][R * W] words, its rows ld apart,
// and b is broadcast.
template <class Dot, int R>
__attribute__((always_inline)) inline void multiply(const float* a, int64_t ld, const Word* b, int64_t step_j,
                                                    int64_t step_k, int depth, F (&sum)[kColumns][R]) {
  for (int k = 0; k < depth; ++k, a += ld, b += step_k) {
    F x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(a + r * W);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const F y = set1(b[j * step_j]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[j][r] = Dot::dot(x[r], y, sum[j][r]);
    }
  }
}

template <int R>
__attribute__((always_inline)) inline void clear(F (&sum)[kColumns][R]) {
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[j][r] = zero();
}

// scores [keys][R * W] = factor * (K Q^T), and most[r] = their maximum over the keys. K [keys][depth] words,
// ld words apart, keys a multiple of kColumns. A long product is summed in pieces of kChain words, and the
// pieces in their order: a row lies in the lanes, so that one chain would be as long as the head.
template <class Dot, int R>
void score(const float* q, const Word* k, int64_t ld, int keys, int depth, float factor, float* scores,
           F (&most)[R]) {
  for (int r = 0; r < R; ++r) most[r] = set1(-kInf);
  for (int j0 = 0; j0 < keys; j0 += kColumns) {
    float* to = scores + j0 * R * W;
    F sum[kColumns][R];
    for (int d = 0;; d += kChain) {
      clear<R>(sum);
      multiply<Dot, R>(q + d * R * W, R * W, k + j0 * ld + d, ld, 1, std::min(kChain, depth - d), sum);
      if (d > 0)
        for (int j = 0; j < kColumns; ++j)
          for (int r = 0; r < R; ++r) sum[j][r] = load(to + (j * R + r) * W) + sum[j][r];
      if (d + kChain >= depth) break;
      for (int j = 0; j < kColumns; ++j)
        for (int r = 0; r < R; ++r) store(to + (j * R + r) * W, sum[j][r]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F s = sum[j][r] * set1(factor);
        most[r] = max(most[r], s);
        store(to + (j * R + r) * W, s);
      }
  }
}

// One step of the online softmax: scores become P = 2^(score - maximum), as words [keys / kPerWord][R * W] in
// their place; the running maximum and sum take the block in, and decay[r] is what everything accumulated
// before must be multiplied with. keys is a multiple of kPerWord. With dropout P is multiplied by kept, like
// scores, after the sum.
template <class Dot, int R, bool kDropout>
void soften(float* scores, const float* kept, int keys, const F (&most)[R], float* maximum, float* total,
            F (&decay)[R]) {
  constexpr int kPer = Dot::kPerWord;
  F origin[R], sum[R];
  for (int r = 0; r < R; ++r) {
    const F before = load(maximum + r * W), now = max(before, most[r]);
    origin[r] = select(now == set1(-kInf), zero(), now);  // no key yet: -inf - 0, not -inf - -inf
    decay[r] = exp2_nonpositive(before - origin[r]);
    store(maximum + r * W, now);
    sum[r] = zero();
  }
  for (int j = 0; j < keys; j += kPer)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F p[kPer];
#pragma GCC unroll 2
      for (int e = 0; e < kPer; ++e) {
        p[e] = exp2_nonpositive(load(scores + (j + e) * R * W + r * W) - origin[r]);
        sum[r] = sum[r] + p[e];
        if constexpr (kDropout) p[e] = p[e] * load(kept + (j + e) * R * W + r * W);
      }
      // Only rows that are read already are written: row j / kPer, of which lane block r is this one's own.
      store(scores + j / kPer * R * W + r * W, Dot::pack(p));
    }
  for (int r = 0; r < R; ++r) store(total + r * W, fma(load(total + r * W), decay[r], sum[r]));
}

// out [columns][R * W] = out * decay + V^T P. V [depth][columns] words, ld words apart, columns a multiple of
// kColumns. The block is summed on its own before it is added: fewer roundings than one long chain.
template <class Dot, int R>
void accumulate(const float* p, const Word* v, int64_t ld, int columns, int depth, const F (&decay)[R],
                float* out) {
  for (int c = 0; c < columns; c += kColumns) {
    F sum[kColumns][R];
    clear<R>(sum);
    multiply<Dot, R>(p, R * W, v + c, 1, ld, depth, sum);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* o = out + (c + j) * R * W + r * W;
        store(o, fma(load(o), decay[r], sum[j][r]));
      }
  }
}

template <class Dot, int R>
void combine_columns(const float* x, int64_t ld, const Word* p, int64_t step, int keys, int depth,
                     float* out) {
  for (int j0 = 0; j0 < keys; j0 += kColumns, p += kColumns * step, out += kColumns * ld) {
    F sum[kColumns][R];
    clear<R>(sum);
    multiply<Dot, R>(x, ld, p, step, 1, depth, sum);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* o = out + j * ld + r * W;
        store(o, load(o) + sum[j][r]);
      }
  }
}

// out [keys][ld] += P X: P [keys][rows] words, step apart; X [depth][ld] words of the rows, ld a multiple of
// W; keys a multiple of kColumns. Here the columns lie in the lanes, of up to kRowVectors vectors at a time.
template <class Dot>
void combine(const float* x, int64_t ld, const Word* p, int64_t step, int keys, int depth, float* out) {
  for (int64_t left = ld / W; left > 0;) {
    const int64_t groups = (left + kRowVectors - 1) / kRowVectors, n = (left + groups - 1) / groups;
    if (n == 1)
      combine_columns<Dot, 1>(x, ld, p, step, keys, depth, out);
    else if (n == 2)
      combine_columns<Dot, 2>(x, ld, p, step, keys, depth, out);
    else
      combine_columns<Dot, kRowVectors>(x, ld, p, step, keys, depth, out);
    left -= n, x += n * W, out += n * W;
  }
}

// ---- transposition of W x W words in registers

// The two halves of one exchange: lanes with bit S from b, the others from a, moved so that they meet.
template <int S, size_t... L>
inline void exchange(F& a, F& b, std::index_sequence<L...>) {
  const F low = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L - S) : static_cast<int>(L))...);
  b = __builtin_shufflevector(a, b, (L & S ? static_cast<int>(W + L) : static_cast<int>(L + S))...);
  a = low;
}

template <int S = W / 2>
inline void transpose(F (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(x[i], x[i + S], std::make_index_sequence<W>{});
  if constexpr (S > 1) transpose<S / 2>(x);
}

}  // namespace pyarch::flash
