// Which weights dropout keeps: a function of the seed and of (sequence, head, query, key) alone, defined in
// pyarch/ops/_dropout.py. Philox4x32-7 with a counter per lane; one call serves 8 of 32 keys.
#pragma once

#include <cstdint>

#include "flash_attention_tile.h"

namespace pyarch::flash {

struct Dropout {
  bool on = false;
  float scale = 1.0f;          // of the weights that are kept
  uint32_t threshold = 0;      // kept: 16 bits of at least this
  uint32_t low = 0, high = 0;  // half of the seed
};

typedef uint32_t U __attribute__((vector_size(4 * W)));

// The high and the low word of a product of two words, in every lane.
struct Product {
  U high, low;
};

inline Product product(U a, uint32_t b) {
#if defined(__AVX512F__)
  constexpr __mmask16 kEven = 0x5555, kOdd = 0xaaaa;
  const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_maskz_srli_epi64(0xff, x, 32), y);
  return {reinterpret_cast<U>(_mm512_mask_shuffle_epi32(odd, kEven, even, _MM_PERM_DDBB)),
          reinterpret_cast<U>(_mm512_mask_shuffle_epi32(even, kOdd, odd, _MM_PERM_CCAA))};
#elif defined(__AVX2__)
  const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {reinterpret_cast<U>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)),
          reinterpret_cast<U>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa))};
#else
  Product p;
  for (int i = 0; i < W; ++i) {
    const uint64_t both = static_cast<uint64_t>(a[i]) * b;
    p.high[i] = static_cast<uint32_t>(both >> 32), p.low[i] = static_cast<uint32_t>(both);
  }
  return p;
#endif
}

struct Philox {
  static constexpr uint32_t kA = 0xd2511f53, kB = 0xcd9e8d57, kWeylA = 0x9e3779b9, kWeylB = 0xbb67ae85;
  static constexpr int kRounds = 7;

  // Of the lanes' queries and heads. Only the first word of the counter differs between the calls for a tile,
  // so half of the first round's and of the second's products are those of all calls.
  Philox(uint32_t k0, uint32_t k1, U query, U head, uint32_t sequence) : k0(k0), k1(k1), sequence(sequence) {
    const Product first = product(head, kB);
    head_low = first.low;
    rows = product(first.high ^ query ^ k0, kA);
  }

  void operator()(uint32_t call, U (&c)[4]) const {
    const uint64_t a = uint64_t{kA} * call;
    const uint64_t b = uint64_t{kB} * (static_cast<uint32_t>(a >> 32) ^ sequence ^ k1);
    uint32_t key0 = k0 + kWeylA, key1 = k1 + kWeylB;
    c[0] = head_low ^ (static_cast<uint32_t>(b >> 32) ^ key0);
    c[1] = U{} + static_cast<uint32_t>(b);
    c[2] = rows.high ^ (static_cast<uint32_t>(a) ^ key1);
    c[3] = rows.low;
#pragma GCC unroll 8
    for (int round = 2; round < kRounds; ++round) {
      key0 += kWeylA, key1 += kWeylB;
      const Product pa = product(c[0], kA), pb = product(c[2], kB);
      c[0] = pb.high ^ c[1] ^ key0, c[1] = pb.low;
      c[2] = pa.high ^ c[3] ^ key1, c[3] = pa.low;
    }
  }

 private:
  uint32_t k0, k1, sequence;
  U head_low;
  Product rows;
};

constexpr int kCallKeys = 32;  // keys that 4 calls serve

// kept [keys][R * W] = 1 or 0, from key `first` of the sequence on. first and keys are multiples of
// kCallKeys.
template <int R>
void draw_kept(const Dropout& dropout, const uint32_t* query, const uint32_t* head, uint32_t sequence,
               uint32_t first, int keys, float* kept) {
  const U least = U{} + (dropout.threshold << 16);
  for (int r = 0; r < R; ++r) {
    U q, h;
    std::memcpy(&q, query + r * W, sizeof q);
    std::memcpy(&h, head + r * W, sizeof h);
    const Philox philox(dropout.low, dropout.high, q, h, sequence);
    for (int i = 0; i < keys / 8; ++i) {
      U words[4];
      philox(first / 8 + i, words);
      float* to = kept + (i / 4 * kCallKeys + i % 4 * 2) * R * W + r * W;
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w, to += 8 * R * W) {
        store(to, select((words[w] << 16) >= least, set1(1.0f), zero()));
        store(to + R * W, select(words[w] >= least, set1(1.0f), zero()));
      }
    }
  }
}

}  // namespace pyarch::flash
