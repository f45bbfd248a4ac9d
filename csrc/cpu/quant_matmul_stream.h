// int8 activations, few rows of x: codes are read as they lie, a row of w after the other, since at that size
// nothing matters but how fast DRAM is read, and only one run of addresses is read at full speed.
//
//     row of w   | 64 bytes | 64 bytes | ..   times x -> 16 int32 a vector, `lanes` of them to a segment
//                                              folded to 16 segments' sums a vector (exact, so any order)
//
// The sums of a panel's rows are then transposed, lane n = row n, and added up by the chain that tile() has.
#pragma once

#include "quant_matmul_activations.h"
#include "quant_matmul_weights.h"

namespace pyarch {

#if defined(__AVX512F__)

#define PYARCH_INLINE __attribute__((always_inline))  // else vectors go through memory at each call

constexpr int64_t kStreamRows = 4;  // above, a transposed panel serves more rows than it costs
constexpr int64_t kAhead = 4096;    // bytes: 1, 2 and 16 KiB were slower from DRAM

// Vectors a, b, c, d of 4 x 4 lanes -> lane 4 i + j holds the sum of lanes 4 i to 4 i + 3 of vector j.
inline I fold4(I a, I b, I c, I d) {
  const I ab = add_i(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const I cd = add_i(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  return add_i(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

// 128-bit lanes p0..p3 and q0..q3 -> p0 + p1, p2 + p3, q0 + q1, q2 + q3.
inline I fold2(I p, I q) { return add_i(_mm512_shuffle_i32x4(p, q, 0x88), _mm512_shuffle_i32x4(p, q, 0xdd)); }

// 16 sums of `lanes` (4, 8 or 16) neighbouring lanes each, in order, of the vectors at(0), at(1), ...
template <int lanes, class At>
PYARCH_INLINE inline I fold(const At& at) {
  const auto four = [&](int i) PYARCH_INLINE { return fold4(at(i), at(i + 1), at(i + 2), at(i + 3)); };
  if constexpr (lanes == 4)
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                    four(0));
  else if constexpr (lanes == 8)
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15),
                                    fold2(four(0), four(4)));
  else
    return fold2(fold2(four(0), four(4)), fold2(four(8), four(12)));
}

// Codes of one row of w times int8 activations: out[i] is the sum over segment i of `lanes` dwords of codes.
// x is [64 bytes of codes][Dot::steps], zero beyond the row. Writes whole vectors of 16 sums.
template <class Dot, int lanes>
void row_sums(const uint8_t* codes, int64_t bytes, const I* x, int64_t segments, int32_t* out) {
  constexpr int per = lanes < 16 ? 1 : lanes / 16, span = lanes < 16 ? lanes : 16;  // vectors to a segment
  const int64_t full = bytes / 64;
  const __mmask64 tail = (uint64_t{1} << bytes % 64) - 1;
  const auto dot = [&](const I raw, int64_t c, I acc) PYARCH_INLINE {
    _mm_prefetch(reinterpret_cast<const char*>(codes + c * 64 + kAhead), _MM_HINT_T0);
    acc = Dot::step(acc, Dot::template expand<0>(raw), x[c * Dot::steps]);
    if constexpr (Dot::steps > 1) acc = Dot::step(acc, Dot::template expand<1>(raw), x[c * Dot::steps + 1]);
    return acc;
  };
  for (int64_t first = 0, i = 0; i < segments; i += 16, first += span * per) {
    const auto inside = [&](int j) PYARCH_INLINE {
      I acc = set1_i(0);
      for (int64_t c = first + j * per; c < first + (j + 1) * per; ++c)
        acc = dot(load_i(codes + c * 64), c, acc);
      return acc;
    };
    const auto at_end = [&](int j) PYARCH_INLINE {
      I acc = set1_i(0);
      for (int64_t c = first + j * per; c < std::min(first + (j + 1) * per, full + 1); ++c)
        acc = dot(c < full ? load_i(codes + c * 64) : _mm512_maskz_loadu_epi8(tail, codes + c * 64), c, acc);
      return acc;
    };
    store_i(out + i, first + span * per <= full ? fold<span>(inside) : fold<span>(at_end));
  }
}

// Dwords of codes to a segment if all segments have as many (the last one may be cut) and row_sums is built
// for it, else 0.
template <class Dot>
inline int64_t stream_lanes(const Plan& plan) {
  constexpr int columns = Dot::columns * Dot::steps;  // of a dword
  if (plan.count == 0) return 0;
  const int64_t lanes = plan.count == 1 ? 64 : plan.segments[0].columns / columns;
  for (int64_t i = 0; i < plan.count; ++i)
    if (plan.segments[i].column != i * lanes * columns || plan.segments[i].columns > lanes * columns)
      return 0;
  return lanes == 4 || lanes == 8 || lanes == 16 || lanes == 32 || lanes == 64 ? lanes : 0;
}

// Bytes of stream_row's result.
template <class Dot>
inline int64_t stream_bytes(const Plan& plan) {
  constexpr int64_t columns = 16 * Dot::columns * Dot::steps;
  return (plan.padded / columns + 1) * Dot::steps * 64;
}

// A packed row of x in the order of row_sums.
template <class Dot>
inline void stream_row(const int32_t* packed, const Plan& plan, int32_t* out) {
  constexpr int steps = Dot::steps;
  const int64_t dwords = plan.padded / (Dot::columns * steps);
  std::memset(out, 0, stream_bytes<Dot>(plan));
  for (int64_t d = 0; d < dwords; ++d)
    for (int e = 0; e < steps; ++e) out[d / 16 * 16 * steps + e * 16 + d % 16] = packed[d * steps + e];
}

// The sums of one row of x (as stream_row has it) with a panel of w, as tile() forms them.
template <class Dot>
void stream_panel(const ByteRows& codes, int64_t column, const Plan& plan, int64_t lanes, const I* x,
                  const SegmentSums* x_sums, const F* scale, const F* offset, float* sums) {
  struct Found;
  const int64_t stride = (plan.count + 15) / 16 * 16;
  int32_t* found = scratch<Found, int32_t>(kPanel * stride);
  const auto rows = [&](auto each) {
    for (int64_t n = 0; n < kPanel; ++n)
      row_sums<Dot, decltype(each)::value>(codes.data + std::min(column + n, codes.n - 1) * codes.row_bytes,
                                           codes.row_bytes, x, plan.count, found + n * stride);
  };
  switch (lanes) {
    case 4:
      rows(std::integral_constant<int, 4>{});
      break;
    case 8:
      rows(std::integral_constant<int, 8>{});
      break;
    case 16:
      rows(std::integral_constant<int, 16>{});
      break;
    case 32:
      rows(std::integral_constant<int, 32>{});
      break;
    default:
      rows(std::integral_constant<int, 64>{});
  }
  F total[kVectors];
  for (F& t : total) t = zero();
  for (int64_t i = 0; i < plan.count; i += 4) {
    I four[4 * kVectors];
    for (int v = 0; v < kVectors; ++v)
      transpose(reinterpret_cast<const uint8_t*>(found + v * W * stride + i), stride * 4, four + v, kVectors);
    for (int64_t s = i; s < std::min(i + 4, plan.count); ++s)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t g = static_cast<int64_t>(plan.segments[s].group) * kVectors + v;
        const I sum = add_i(four[(s - i) * kVectors + v], Dot::start(x_sums[s].start));
        total[v] = fma(Dot::finish(sum, x_sums[s].scale), scale[g], total[v]);
        if (offset) total[v] = fma(set1(x_sums[s].sum), offset[g], total[v]);
      }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * W, total[v]);
}

#endif

}  // namespace pyarch
