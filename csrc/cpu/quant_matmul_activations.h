// Activations as the dot products read them: a row becomes dwords in the order of Dot's steps, zero beyond K,
// with the sums that every segment of it needs.
#pragma once

#include "int8.h"
#include "quant_matmul_dot.h"
#include "tensor.h"

namespace pyarch {

// The K columns of a weight, cut into segments: whole groups, or pieces of groups longer than a block.
struct Plan {
  int64_t k;
  int64_t padded;  // k rounded up to whole raw dwords
  const Segment* segments;
  int64_t count;
  bool sums;  // whether segments need the sum of their activations (there are offsets)
};

// Bytes of a packed row; vectors may be stored past the last column.
template <class Dot>
inline int64_t packed_bytes(const Plan& plan) {
  return (plan.padded * 4 / Dot::columns + 64 + 63) / 64 * 64;
}

// Copies a row of x to fp32, zero beyond its end up to a whole vector.
template <class T>
inline void widen(const T* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  if (i < n) store(out + i, load(x + i, static_cast<int>(n - i)));
}

inline float sum_of(const float* x, int64_t n) {  // n is a multiple of 4; zeros follow
  F total = zero();
  for (int64_t i = 0; i < n; i += W) {
    const int left = static_cast<int>(std::min<int64_t>(W, n - i));
    total = total + (left == W ? load(x + i) : load(x + i, left));
  }
  return hsum(total);
}

// The columns of each raw dword in the order of Dot's steps. Whole vectors of the row are rewritten.
template <class Dot>
inline void reorder(uint8_t* row, int64_t bytes) {
  constexpr int size = 4 / Dot::columns, columns = Dot::columns * Dot::steps;  // of an activation; of a dword
  if constexpr (Dot::columns > 1 && Dot::steps > 1) {
    uint8_t from[16];  // byte i of 16 comes from byte from[i]
    for (int i = 0; i < 16; ++i) {
      const int place = i / size % columns, column = place % Dot::columns * Dot::steps + place / Dot::columns;
      from[i] = static_cast<uint8_t>(i / (columns * size) * columns * size + column * size + i % size);
    }
    for (int64_t i = 0; i < bytes; i += sizeof(I)) store_i(row + i, shuffle_bytes(load_i(row + i), from));
  }
}

// Packs one row of x (contiguous) at `out`, packed_bytes() long. wide: scratch for plan.padded + 16 floats.
template <class Dot, class T>
void pack_row(const T* x, const Plan& plan, int32_t* out, SegmentSums* sums, float* wide) {
  std::memset(out, 0, packed_bytes<Dot>(plan));
  if constexpr (Dot::columns == 1) {
    widen(x, plan.k, reinterpret_cast<float*>(out));
    for (int64_t i = 0; i < plan.count; ++i)
      sums[i] = {0, 0.0f,
                 plan.sums ? sum_of(reinterpret_cast<float*>(out) + plan.segments[i].column,
                                    plan.segments[i].columns)
                           : 0.0f};
  } else {
    widen(x, plan.k, wide);
    std::fill(wide + plan.k, wide + plan.padded + 16, 0.0f);
    if constexpr (Dot::columns == 2) {
      std::copy(x, x + plan.k, reinterpret_cast<T*>(out));
      for (int64_t i = 0; i < plan.count; ++i)
        sums[i] = {0, 0.0f,
                   plan.sums ? sum_of(wide + plan.segments[i].column, plan.segments[i].columns) : 0.0f};
    } else {
      int8_t* codes = reinterpret_cast<int8_t*>(out);
      for (int64_t i = 0, last; i < plan.count; i = last) {  // the segments of one group share a scale
        const int64_t begin = plan.segments[i].column;
        for (last = i + 1; last < plan.count && plan.segments[last].group == plan.segments[i].group;) ++last;
        const int64_t end = plan.segments[last - 1].column + plan.segments[last - 1].columns;
        const float scale = int8_scale(wide + begin, end - begin);
        if (!(scale >= 0.0f)) std::fill(wide + begin, wide + end, 0.0f);
        const F divisor = set1(scale > 0.0f ? scale : 1.0f);
        for (; i < last; ++i) {
          const Segment& s = plan.segments[i];
          I total = set1_i(0);
          for (int64_t c = s.column; c < s.column + s.columns; c += W) {
            // Beyond the segment: zeros, which the next segment overwrites.
            const int left = static_cast<int>(std::min<int64_t>(W, s.column + s.columns - c));
            const I code = int8_codes(left == W ? load(wide + c) : load(wide + c, left), divisor);
            store_codes(codes + c, code);
            total = add_i(total, code);
          }
          const int32_t sum = sum_lanes(total);
          sums[i] = {-Dot::zero * sum, scale, scale * static_cast<float>(sum)};
        }
      }
    }
    reorder<Dot>(reinterpret_cast<uint8_t*>(out), plan.padded * 4 / Dot::columns);
  }
}

// act_bits=8 for weights whose groups do not fill whole raw dwords: rounds x in place to codes * scale, as
// the definition says. group_of(column) is the group of a column; amax is scratch for `groups` floats.
template <class GroupOf>
void round_activations(float* x, int64_t k, const GroupOf& group_of, float* amax, int64_t groups) {
  std::fill(amax, amax + groups, 0.0f);
  for (int64_t c = 0; c < k; ++c) {
    float& most = amax[group_of(c)];
    const float v = std::fabs(x[c]);
    if (!std::isfinite(v))
      most = std::numeric_limits<float>::quiet_NaN();
    else if (v > most)
      most = v;
  }
  for (int64_t c = 0; c < k; ++c) {
    const float scale = amax[group_of(c)] / 127.0f;
    if (scale > 0.0f)
      x[c] = std::max(-127.0f, std::min(127.0f, std::nearbyint(x[c] / scale))) * scale;
    else
      x[c] = scale;  // 0, or NaN
  }
}

}  // namespace pyarch
