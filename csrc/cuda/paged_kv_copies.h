// The copies of paged_attention: a warp's positions of all splits of a block, as one sequence of stages.
#pragma once

#include "paged_kv_tile.h"

namespace pyarch {
namespace {

static_assert(kMine == 64, "a lane finds two positions of a split");

// Of each tile of a split K, then V; of each tile a warp has kRows positions one after another.
// A stage is copied kStages - 1 stages before its use, across splits too; only lanes of a warp wait for one
// another. The pages of a split are found while the one before it is used, and asked for one earlier.
template <class T, class Q, int D>
class Copies {
 public:
  PYARCH_DEVICE Copies(const Call<T, Q>& call, const Tile& tile, const Layout& at, int kv_head,
                       int splits_before, int splits)
      : c(call), t(tile), head(kv_head), before(splits_before), count(splits) {
    lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    stage_bytes = at.stage, ring = warp * kStages<D> * at.stage;
    offsets = shared<int64_t>(at.offsets) + warp * 4 * kMine;
    split = next = static_cast<int>(blockIdx.z);
    ask();
  }

  // Starts the first stages.
  PYARCH_DEVICE void start() {
    find();
    go_to_split();
    for (int i = 0; i < kStages<D> - 1; ++i) copy();
  }

  // Called at the beginning of each split: sets its factors, finds the positions of the next one.
  PYARCH_DEVICE void begin_split() {
#pragma unroll
    for (int n = 0; n < 2; ++n) k_now[n] = next_k[n], v_now[n] = next_v[n];
    find();
  }

  // What the scores and the probabilities of the warp's i-th position of this split are multiplied by: their
  // scales, or 1; NaN where a table entry is not a page. All lanes call it, with i from one half of kMine.
  PYARCH_DEVICE float k_factor(int i) const { return shfl(i < 32 ? k_now[0] : k_now[1], i % 32); }
  PYARCH_DEVICE float v_factor(int i) const {
    if constexpr (!kScaled<T>) return 1.0f;
    return shfl(i < 32 ? v_now[0] : v_now[1], i % 32);
  }

  // Waits for the next stage and starts a later one; returns the byte where it begins. Its memory is used
  // until the next call.
  PYARCH_DEVICE int stage() {
    wait<kStages<D> - 2>();
    sync_warp();
    copy();
    const int byte = ring + used * stage_bytes;
    used = used + 1 < kStages<D> ? used + 1 : 0;
    return byte;
  }

 private:
  const Call<T, Q>& c;
  const Tile& t;
  Shared<int64_t> offsets;  // of the splits whose number is even, and odd: of K, of V
  int lane, warp, head, before, count, stage_bytes, ring;
  int32_t page[2];                                 // what the table says, of split `next`
  float k_now[2], v_now[2], next_k[2], next_v[2];  // factors of this split and of the next one
  int next, found = 0;                             // the split to find; how many have been
  int split, tile = 0, past = 0, copied = 0;       // the tile to copy and those of its split, before `past`
  bool values = false, all_there, all_there_next;  // no position of the split is nowhere
  int free = 0, used = 0;                          // slots: to copy to, to use

  PYARCH_DEVICE int position(int n) const {
    const int mine = lane + n * 32;
    return (before + next) * kSplit + (mine / kRows<T> * kWarps + warp) * kRows<T> + mine % kRows<T>;
  }

  PYARCH_DEVICE uint32_t page_size() const { return static_cast<uint32_t>(c.page_size); }

  PYARCH_DEVICE void ask() {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int at = position(n);
      page[n] = -1;
      if (next < count && at >= t.low && at < t.high)
        page[n] =
            c.table[t.sequence * c.table_row + static_cast<uint32_t>(at) / page_size() * c.table_column];
    }
  }

  // Where the positions of the next split lie, and their factors.
  PYARCH_DEVICE void find() {
    const Shared<int64_t> to = offsets + found++ % 2 * 2 * kMine;
    bool there = true;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      int64_t k = kNowhere, v = kNowhere;
      next_k[n] = bits_to_float(0x7fc00000), next_v[n] = 0.0f;
      if (page[n] >= 0 && page[n] < c.pages) {
        const int64_t in = static_cast<uint32_t>(position(n)) % page_size();
        const auto offset = [&](const Strides& s) {
          return page[n] * s.page + in * s.position + head * s.head;
        };
        k = offset(c.k_stride), v = offset(c.v_stride);
        if constexpr (kScaled<T>)
          next_k[n] = c.k_scale[offset(c.k_scale_stride)], next_v[n] = c.v_scale[offset(c.v_scale_stride)];
        else
          next_k[n] = 1.0f;
      }
      there = there && k != kNowhere;
      to[lane + n * 32] = k;
      to[kMine + lane + n * 32] = v;
    }
    all_there_next = all_of_warp(there);
    next += static_cast<int>(gridDim.z);
    ask();
  }

  PYARCH_DEVICE void go_to_split() {
    all_there = all_there_next;
    const int start = (before + split) * kSplit, low = t.low - start, high = t.high - start;
    tile = low > 0 ? low / kTile<T> : 0;
    past = ((high < kSplit ? high : kSplit) + kTile<T> - 1) / kTile<T>;
  }

  PYARCH_DEVICE void copy() {
    if (split < count) {
      constexpr int pieces = D * static_cast<int>(sizeof(T)) / 16, across = pieces < 32 ? pieces : 32;
      constexpr int apart = 32 / across;  // rows
      const Shared<const int64_t> from =
          offsets + (copied % 2 * 2 + values) * kMine + tile * kRows<T> + lane / across;
      const int to = ring + free * stage_bytes + lane / across * c.row_bytes;
      const Global<const T> cache = values ? c.v : c.k;
      const int row_elements = c.row_bytes / static_cast<int>(sizeof(T));
#pragma unroll
      for (int more = 0; more < pieces; more += across) {
        const int element = (lane % across + more) * kPer16<T>;
        if (element >= c.dim) break;
        const Shared<T> slot = shared<T>(to) + element;
        if (all_there) {
          constexpr int batch =
              kRows<T> * across / 32 < 4 ? kRows<T> * across / 32 : 4;  // looked up at a time
#pragma unroll
          for (int row = 0; row < kRows<T>; row += batch * apart) {
            int64_t offset[batch];
#pragma unroll
            for (int k = 0; k < batch; ++k) offset[k] = from[row + k * apart];
#pragma unroll
            for (int k = 0; k < batch; ++k)
              cp16(slot + (row + k * apart) * row_elements, cache + (offset[k] + element));
          }
        } else {  // zeros where nothing is: what is not seen has weight 0
#pragma unroll 1
          for (int row = 0; row < kRows<T>; row += apart) {
            const int64_t offset = from[row];
            cp16_part(slot + row * row_elements, cache + ((offset < 0 ? 0 : offset) + element),
                      offset < 0 ? 0 : 16);
          }
        }
      }
      if (values && ++tile == past) {
        ++copied, split += static_cast<int>(gridDim.z);
        if (split < count) go_to_split();
      }
      values = !values;
    }
    commit();
    free = free + 1 < kStages<D> ? free + 1 : 0;
  }
};

}  // namespace
}  // namespace pyarch
