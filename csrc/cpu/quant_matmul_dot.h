// The dot products of quant_matmul: how raw codes become operands, one step of a sum, and the register tile.
//
// Three kinds, each with `columns` of K to a step of one dword per lane:
//   Int8Dot<bits>   4 columns: codes u8 (s8 without VNNI) times activations s8 -> int32, exact
//   Bf16Dot<bits>   2 columns: codes as bf16 (exact) times bf16 activations -> fp32
//   Fp32Dot<bits>   1 column:  codes as fp32 times fp32 activations -> fp32
// A raw dword of a lane holds 8 nibbles or 4 bytes; expand<e>() makes the operand of its e-th step. pack
// order (quant_matmul_activations.h) puts the activations of a dword in the order of these steps.
//
// Codes count from a centre, 8 for nibbles and 0 for bytes: w = scale * (q - centre) + offset. The int8 dot
// takes the raw unsigned code and starts its sum at -zero * sum(x) instead, which is exact.
#pragma once

#include "quant_matmul_lanes.h"

namespace pyarch {

constexpr int kPanel = 64;  // output rows of w that are read together: those of a PackedTensor's panel
constexpr int kVectors = kPanel / W;

// A register tile is up to kTileRows rows of x by kRawVectors vectors of outputs if it expands raw codes
// itself, or by kTileVectors if they are expanded before, which pays where many rows share them and registers
// are few.
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 6, kRawRows = 1 << 30;
#else
constexpr int64_t kTileRows = 4, kRawRows = 2;  // kRawRows: up to here tiles expand codes themselves
#endif
constexpr int kTileVectors = 2, kRawVectors = 4;

template <int bits>
constexpr int kCentre = bits == 4 ? 8 : 0;

template <int bits>
struct Int8Dot {
  static constexpr int kBits = bits, columns = 4, steps = 8 / bits;
  using Acc = I;
#if defined(__AVX512F__)
  static constexpr int zero = bits == 4 ? 8 : 128;  // what the operand counts from
  static I step(I acc, I w, I x) {
    // Not the intrinsic: around it GCC 12 copies every accumulator twice.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
  }
#else
  static constexpr int zero = kCentre<bits>;
#if defined(__AVX2__)
  static I step(I acc, I w, I x) {
    // Pairs fit int16: 2 * 15 * 127, and with the sign moved to x, 2 * 128 * 127.
    const I pairs = bits == 4 ? _mm256_maddubs_epi16(w, x)
                              : _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
#else
  static I step(I acc, I w, I x) {
    acc += (w << 24 >> 24) * (x << 24 >> 24);
    acc += (w << 16 >> 24) * (x << 16 >> 24);
    acc += (w << 8 >> 24) * (x << 8 >> 24);
    return acc + (w >> 24) * (x >> 24);
  }
#endif
#endif
  template <int e>
  static I expand(I raw) {
    if constexpr (bits == 4) return and_i(e == 0 ? raw : shr<4>(raw), set1_i(0x0f0f0f0f));
    if constexpr (zero == 128) return xor_i(raw, set1_i(static_cast<int32_t>(0x80808080)));
    return raw;
  }
  static I start(int32_t x) { return set1_i(x); }
  static F finish(I acc, float scale) { return to_float(acc) * set1(scale); }
};

template <int bits>
struct Fp32Dot {
  static constexpr int kBits = bits, columns = 1, steps = 32 / bits, zero = kCentre<bits>;
  using Acc = F;
  static F step(F acc, I w, I x) { return fma(as_float(w), as_float(x), acc); }
  template <int e>
  static I expand(I raw) {
#if defined(__AVX512F__)
    if constexpr (bits == 4) {  // the permutation reads the low 4 bits of an index
      const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      return as_int(_mm512_permutexvar_ps(shr<4 * e>(raw), table));
    }
#endif
    if constexpr (bits == 4)
      return as_int(to_float(sar<28>(shl<28 - 4 * e>(xor_i(raw, set1_i(static_cast<int32_t>(0x88888888)))))));
    else
      return as_int(to_float(sar<24>(shl<24 - 8 * e>(raw))));
  }
  static F start(int32_t) { return zero_f(); }
  static F finish(F acc, float) { return acc; }
  static F zero_f() { return set1(0.0f); }
};

#if defined(__AVX512BF16__)
template <int bits>
struct Bf16Dot {
  static constexpr int kBits = bits, columns = 2, steps = 16 / bits, zero = kCentre<bits>;
  using Acc = F;
  static F step(F acc, I w, I x) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));  // as in Int8Dot
    return acc;
  }
  template <int e>
  static I expand(I raw) {
    if constexpr (bits == 4) {
      // A step pairs columns e and e + 4, the low nibbles of the two words: an index each. The permutation
      // reads 5 bits of it, so the table is there twice.
      const I table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
          static_cast<short>(0xc100), static_cast<short>(0xc0e0), static_cast<short>(0xc0c0),
          static_cast<short>(0xc0a0), static_cast<short>(0xc080), static_cast<short>(0xc040),
          static_cast<short>(0xc000), static_cast<short>(0xbf80), 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
          0x40c0, 0x40e0));
      return _mm512_permutexvar_epi16(shr<4 * e>(raw), table);
    } else {  // columns e and e + 2; bytes are exact in bf16
      const I low = as_int(to_float(sar<24>(shl<24 - 8 * e>(raw))));
      const I high = as_int(to_float(sar<24>(shl<8 - 8 * e>(raw))));
      return _mm512_mask_blend_epi16(0xaaaaaaaa, shr<16>(low), high);
    }
  }
  static F start(int32_t) { return set1(0.0f); }
  static F finish(F acc, float) { return acc; }
};
#endif

// A run of columns inside one group, at most a block long, whose sum is finished and scaled at its end.
struct Segment {
  int64_t column;   // the first, a multiple of a raw dword's columns
  int32_t columns;  // rounded up to whole raw dwords
  int32_t group;
};

// What a row of activations brings to a segment.
struct SegmentSums {
  int32_t start;  // -zero * sum of the int8 activations
  float scale;    // of the int8 activations
  float sum;      // of the activations, for the offset
};

// Sums of `rows` rows of x with `vectors` vectors of a panel's outputs over the segments given:
//   sums[r] += (sum of codes * x over the segment) * scale[group] + offset[group] * (sum of x)
// codes is raw, [dword][kVectors], and expanded here, or expanded already, [step][vectors]; scale and offset
// are [group][kVectors] and sums is [row][kPanel], all from the tile's first vector on. An output's chain of
// additions is the same in every instantiation, so a row's result does not depend on the rows around it.
// next: null, or raw codes that will be read soon. They are fetched meanwhile, so much in a step that the
// tiles of a block's vectors fetch as many bytes as the block has.
template <class Dot, bool raw>
constexpr int kFetched = raw ? kPanel * 4 : kPanel * 4 * kTileVectors / kVectors / Dot::steps;

template <class Dot, int rows, int vectors, bool raw>
void tile(const I* codes, const Segment* segments, int64_t count, const int32_t* x, const SegmentSums* x_sums,
          const F* scale, const F* offset, const char* next, int64_t next_step, float* sums) {
  constexpr int expansions = raw ? Dot::steps : 1, columns = Dot::columns * expansions;
  constexpr int stride = raw ? kVectors : vectors;
  F total[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) total[r][v] = load(sums + r * kPanel + v * W);
  for (int64_t i = 0; i < count; ++i) {
    const Segment segment = segments[i];
    typename Dot::Acc acc[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[r][v] = Dot::start(x_sums[i * rows + r].start);
    const I* w = codes + (segment.column - segments[0].column) / columns * stride;
    const int32_t* at = x + segment.column / Dot::columns * rows;
    const int dwords = segment.columns / columns;
    for (int d = 0; d < dwords; ++d, w += stride, at += expansions * rows) {
      if (next) {
        for (int line = 0; line < kFetched<Dot, raw>; line += 64) __builtin_prefetch(next + line);
        next += next_step;
      }
      const auto one = [&](auto expansion) {
        constexpr int e = decltype(expansion)::value;
        if constexpr (e < expansions) {
          I operand[vectors];
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            operand[v] = load_i(w + v);
            if constexpr (raw) operand[v] = Dot::template expand<e>(operand[v]);
          }
#pragma GCC unroll 16
          for (int r = 0; r < rows; ++r) {
            const I broadcast = set1_i(at[e * rows + r]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) acc[r][v] = Dot::step(acc[r][v], operand[v], broadcast);
          }
        }
      };
      one(std::integral_constant<int, 0>{}), one(std::integral_constant<int, 1>{});
      one(std::integral_constant<int, 2>{}), one(std::integral_constant<int, 3>{});
      one(std::integral_constant<int, 4>{}), one(std::integral_constant<int, 5>{});
      one(std::integral_constant<int, 6>{}), one(std::integral_constant<int, 7>{});
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const SegmentSums& s = x_sums[i * rows + r];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t g = static_cast<int64_t>(segment.group) * kVectors + v;
        total[r][v] = fma(Dot::finish(acc[r][v], s.scale), scale[g], total[r][v]);
        if (offset) total[r][v] = fma(set1(s.sum), offset[g], total[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(sums + r * kPanel + v * W, total[r][v]);
}

}  // namespace pyarch
