// paged_attention's call, as the kernel sees it; what a block works on; where its memory lies.
#pragma once

#include <cmath>

#include "numbers.h"
#include "paged_kv.h"

namespace pyarch {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSplit = 256,
              kMine = kSplit / kWarps;  // positions that are summed before they are folded; a warp's
constexpr int kSpan = 16;               // splits that are folded before they are, from multiples of it
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int64_t kNowhere = -1;  // the offset of a position that is not read

// A stage of a warp's copies: so many positions, 32 bytes for each element of the head.
template <class T>
constexpr int kRows = 32 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kTile = kWarps * kRows<T>;  // positions of a block's stage
template <class T>
constexpr int kOctets = kRows<T> / 8;
template <int D>
constexpr int kStages = D > 128 ? 2 : 3;  // one in use, the others on their way
template <class T>
constexpr bool kScaled = sizeof(T) == 1;  // codes, with a scale for each position and head

struct Strides {
  int64_t page, position, head;
};

// T: of the caches; Q: of q, the sinks and out.
template <class T, class Q>
struct Call {
  Global<const Q> q;
  Global<const T> k, v;
  Global<const float> k_scale, v_scale;
  Global<const int32_t> table, lengths, starts;  // starts: where each sequence's rows begin
  Global<const float> sinks;
  Global<const Q> sinks_as_q;
  Global<Q> out;
  Global<float> lse, partial;  // partial: (tile, its splits, then its spans) -> acc [dim][L], m [L], l [L]
  Global<int> arrived;         // (tile, all its spans, then each)
  Strides k_stride, v_stride, k_scale_stride, v_scale_stride;
  int64_t q_row, q_head, table_row, table_column, length_step, start_step, sink_step;
  int64_t batch, total, pages, page_size, capacity, left, right;
  int head_tiles, splits, spans;  // of a tile at most
  int heads, group, heads_a_tile, rows_a_tile, dim;
  int row_bytes;  // of a position in shared memory: an odd number of 16 bytes, so that 8 lie in different
                  // banks
  bool has_starts, has_sinks, sinks_are_float;
  float scale, softcap, per_softcap;  // per_softcap: 1 / softcap
};

// Where things lie in shared memory, in bytes: the ring of each warp, the offsets of its positions, then what
// the block shares.
struct Layout {
  int stage, offsets, q, odd, own, sums, bytes;
};
template <class T, int D, int NT>
PYARCH_BOTH constexpr Layout layout(int dim, int row_bytes) {
  Layout at{};
  at.stage = kRows<T> * row_bytes;
  at.offsets = kWarps * kStages<D> * at.stage;
  at.q = at.offsets + kWarps * 2 * 2 * kMine * 8;
  at.odd = at.q + ((dim + 63) / 64 * 64 + 4) * 32;  // 8 query vectors of float, or 16 of 16 bits
  at.own = at.odd + kWarps * dim * 4;
  at.sums = at.own + NT * 8 * (dim + 2) * 4;
  at.bytes = at.sums + NT * kWarps * 2 * 8 * 4;
  return at;
}
// An odd number of 16 bytes, so that 8 positions lie in different banks.
template <class T>
PYARCH_BOTH constexpr int row_bytes(int dim) {
  return (dim * static_cast<int>(sizeof(T)) / 16 | 1) * 16;
}
// What a block can have on the GPUs with the least (sm_86, sm_89).
template <class T, int D, int NT>
constexpr bool kFits = layout<T, D, NT>(D, row_bytes<T>(D)).bytes <= 99 * 1024;
static_assert(kFits<float, 256, 1> && kFits<uint16_t, 256, 1> && kFits<int8_t, 256, 1>, "of every head size");
static_assert(kFits<float, 128, 1> && kFits<uint16_t, 128, 2> && kFits<int8_t, 128, 2>,
              "and number of lanes");

// The tile of a block: rows of one sequence, and the positions that they attend to.
struct Tile {
  int64_t first_row;
  int sequence, rows, position, low, high;  // position: of the first row
  bool valid;                               // false: the lengths or starts are, and the rows become NaN
};

template <class T, class Q>
PYARCH_DEVICE Tile find_tile(const Call<T, Q>& c) {
  const int64_t index = blockIdx.x / c.head_tiles, rows = c.rows_a_tile;
  Tile t{index, static_cast<int>(index), 1, 0, 0, 0, true};
  int64_t sequence_rows = 1, first_in_sequence = 0;
  if (c.has_starts) {
    // Sequence b has the tiles from starts[b] / rows + b on: enough, and some of them are empty.
    const Shared<int> found = shared<int>();
    bool wrong = false;
    for (int64_t b = threadIdx.x; b < c.batch; b += kThreads) {
      const int64_t begin = c.starts[b * c.start_step], end = c.starts[(b + 1) * c.start_step];
      wrong = wrong || end < begin || (b == 0 && begin != 0) || (b + 1 == c.batch && end != c.total);
      if (begin / rows + b <= index && index <= end / rows + b) found[0] = static_cast<int>(b);
    }
    t.valid = !sync_any(wrong);
    if (!t.valid) {
      t.first_row = index * rows;
      t.rows = static_cast<int>(t.first_row + rows < c.total ? rows : c.total - t.first_row);
      return t;
    }
    t.sequence = found[0];
    sync();
    const int64_t begin = c.starts[t.sequence * c.start_step];
    sequence_rows = c.starts[(t.sequence + 1) * c.start_step] - begin;
    first_in_sequence = (index - (begin / rows + t.sequence)) * rows;
    t.first_row = begin + first_in_sequence;
    const int64_t left = sequence_rows - first_in_sequence;
    t.rows = static_cast<int>(left < rows ? left : rows);
    if (t.rows <= 0) return t;
  }
  const int64_t length = c.lengths[t.sequence * c.length_step];
  t.valid = length >= 0 && length <= c.capacity;
  const int64_t position = length - sequence_rows + first_in_sequence;
  const int64_t low = position - c.left, high = position + t.rows + c.right;
  t.position = static_cast<int>(position);
  t.low = static_cast<int>(low > 0 ? low : 0);
  t.high = static_cast<int>(high < length ? high : length);
  if (low >= length || high <= t.low) t.low = t.high = 0;
  return t;
}

// What rows and lanes of a tile see of a split that begins at `start`.
struct Sight {
  const Tile& t;
  int64_t left, right;
  int heads;

  // Positions of the split from .low on and before .high.
  struct Range {
    int low, high;
    PYARCH_DEVICE bool has(int i) const { return i >= low && i < high; }
  };
  PYARCH_DEVICE Range of_rows(int start, int64_t low, int64_t high) const {
    low = (low > t.low ? low : t.low) - start, high = (high < t.high ? high : t.high) - start;
    return {static_cast<int>(low < 0        ? 0
                             : low > kSplit ? kSplit
                                            : low),
            static_cast<int>(high < 0        ? 0
                             : high > kSplit ? kSplit
                                             : high)};
  }
  PYARCH_DEVICE Range of_tile(int start) const { return of_rows(start, t.low, t.high); }
  PYARCH_DEVICE Range of_lane(int start, int lane) const {
    const int row = lane / heads;
    const int64_t own = int64_t{t.position} + row;
    return row < t.rows ? of_rows(start, own - left, own + right + 1) : Range{0, 0};
  }
  // What every row sees.
  PYARCH_DEVICE Range of_all(int start) const {
    return of_rows(start, int64_t{t.position} + t.rows - 1 - left, int64_t{t.position} + right + 1);
  }
};

}  // namespace
}  // namespace pyarch
