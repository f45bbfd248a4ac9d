// paged_attention's call, as the kernel sees it; what a block works on; where its memory lies.
#pragma once

#include <cmath>

#include "numbers.h"
#include "paged_kv.h"

namespace pyarch {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSplit = 256;  // positions that are summed before they are folded
constexpr int kPerKey = 4;   // threads that share a position's product with q
constexpr int kBatch = 32;   // splits that the last block folds between two barriers
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr int64_t kNowhere = -1;  // the offset of a position that is not read
// In the place of a probability that is none: a NaN that no arithmetic gives, for any number may be one times
// a scale.
constexpr uint32_t kUnseen = 0xffa5c3e1;

template <class T>
constexpr int kTile = sizeof(T) == 4 ? 32 : 64;  // positions
template <class T>
constexpr int kStages =
    sizeof(T) == 1 ? 4 : 3;  // tiles in shared memory: one in use, the others on their way
template <int L>
constexpr int kBlocks = L == 8   ? 2
                        : L == 4 ? 3
                                 : 4;  // that a multiprocessor has registers for
template <class T>
constexpr int kOwn = sizeof(T) == 4 ? 4 : 8;  // elements of the answer that a thread adds up
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
  Global<float> lse, partial;  // partial: (tile, group of heads, split) -> acc [L][dim], m [L], l [L]
  Global<int> arrived;         // (tile, group of heads)
  Strides k_stride, v_stride, k_scale_stride, v_scale_stride;
  int64_t q_row, q_head, table_row, table_column, length_step, start_step, sink_step;
  int64_t batch, total, pages, page_size, capacity, left, right, splits;
  int heads, group, heads_a_tile, rows_a_tile, dim,
      key_bytes;  // key_bytes: of a row in shared memory, padded
  bool has_starts, has_sinks, sinks_are_float;
  float scale, softcap;
};

// Byte offsets of what lies in shared memory. `sums` takes the ring's place once all its tiles are used.
struct Layout {
  int64_t q, scores, offsets, k_scale, v_scale, acc, m, l, a, b, bytes;
};
template <class T>
PYARCH_BOTH Layout layout(int lanes, int dim, int key_bytes) {
  const int64_t ring = int64_t{kStages<T>} * kTile<T> * key_bytes;
  const int64_t sums = int64_t{kThreads} * lanes * kOwn<T> * 4, scales = kScaled<T> ? 4 * kSplit : 0;
  const int64_t fold = int64_t{kBatch} * 2 * lanes * 4;
  Layout at{};
  at.q = ring > sums ? ring : sums;
  at.scores = at.q + int64_t{4} * lanes * dim;
  at.offsets = at.scores + int64_t{4} * kSplit * lanes;
  at.k_scale = at.offsets + int64_t{2} * 8 * kSplit;
  at.v_scale = at.k_scale + scales;
  at.acc = at.v_scale + scales;
  at.m = at.acc + int64_t{4} * lanes * dim;
  at.l = at.m + 64;
  at.a = at.l + 64;
  at.b = at.a + fold / 2;
  at.bytes = at.b + fold / 2;
  return at;
}

// The tile of a block: rows of one sequence, and what they attend to.
struct Tile {
  int64_t sequence, first_row, position, low, high, length;  // position: of the first row
  int rows;
  bool valid;  // false: the lengths or starts are, and the rows become NaN
};

template <class T, class Q>
PYARCH_DEVICE Tile find_tile(const Call<T, Q>& c) {
  const int64_t index = blockIdx.x, rows = c.rows_a_tile;
  Tile t{index, index, 0, 0, 0, 0, 1, true};
  int64_t sequence_rows = 1, first_in_sequence = 0;
  if (c.has_starts) {
    // Sequence b has the tiles from starts[b] / rows + b on: enough, and some of them are empty.
    const Shared<int64_t> found = shared<int64_t>();
    bool wrong = false;
    for (int64_t b = threadIdx.x; b < c.batch; b += kThreads) {
      const int64_t begin = c.starts[b * c.start_step], end = c.starts[(b + 1) * c.start_step];
      wrong = wrong || end < begin || (b == 0 && begin != 0) || (b + 1 == c.batch && end != c.total);
      if (begin / rows + b <= index && index <= end / rows + b) found[0] = b;
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
  t.length = c.lengths[t.sequence * c.length_step];
  t.valid = t.length >= 0 && t.length <= c.capacity;
  t.position = t.length - sequence_rows + first_in_sequence;
  const int64_t low = t.position - c.left, high = t.position + t.rows + c.right;
  t.low = low > 0 ? low : 0;
  t.high = high < t.length ? high : t.length;
  if (t.low >= t.high) t.low = t.high = 0;
  return t;
}

// The pieces of `elements` that a thread has of rows of `dim`: element `mine` of positions first, first +
// apart,
// ... of a tile; first is kTile where it has none.
struct Share {
  int mine, first, apart;
};
template <class T>
PYARCH_DEVICE Share share(int dim, int elements) {
  const int thread = static_cast<int>(threadIdx.x), pieces = dim / elements, row = thread / pieces;
  const int apart = kThreads / pieces < kTile<T> ? kThreads / pieces : kTile<T>;
  return {thread % pieces * elements, row < apart ? row : kTile<T>, apart};
}

// The scales of a thread's positions of a split, between global and shared memory.
struct Scales {
  float k[kSplit / kThreads], v[kSplit / kThreads];
};

// Where the positions of a split lie in the caches: offsets[0] of K, offsets[kSplit] of V. Their scales are
// asked for and not waited for.
template <class T, class Q>
PYARCH_DEVICE Scales find_positions(const Call<T, Q>& c, const Tile& t, int64_t head, int64_t start,
                                    Shared<int64_t> offsets) {
  Scales scales{};
#pragma unroll
  for (int n = 0; n < kSplit / kThreads; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kThreads;
    const int64_t position = start + i;
    int64_t k = kNowhere, v = kNowhere;
    if (position >= t.low && position < t.high) {
      const int64_t in = position % c.page_size;
      const int64_t page = c.table[t.sequence * c.table_row + position / c.page_size * c.table_column];
      if (page >= 0 && page < c.pages) {
        const auto offset = [&](const Strides& s) { return page * s.page + in * s.position + head * s.head; };
        k = offset(c.k_stride), v = offset(c.v_stride);
        if constexpr (kScaled<T>)
          scales.k[n] = c.k_scale[offset(c.k_scale_stride)],
          scales.v[n] = c.v_scale[offset(c.v_scale_stride)];
      }
    }
    offsets[i] = k;
    offsets[kSplit + i] = v;
  }
  return scales;
}

}  // namespace
}  // namespace pyarch
