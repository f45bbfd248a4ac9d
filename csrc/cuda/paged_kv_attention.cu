// paged_attention for few rows a sequence (decode): bound by reading the cache, so every byte of it is copied
// to shared memory once per tile of query vectors, 16 bytes at a time, some tiles of positions ahead.
//
//   block = (tile of a sequence's rows, KV head, every gridDim.z-th split of kSplit positions), 128 threads
//     lane     a query vector: one (row, query head of the KV head's group); L lanes share what is read
//     K tiles  4 threads a position, 16 bytes of it in turn: scores[position][lane]
//     softmax  of this split alone, a warp per lane: maximum m, sum l, probabilities; what is not seen is
//              marked
//     V tiles  a thread owns some elements of the head and every P-th position: acc[lane][elements]; then
//              the P partial sums are added in their order
//     int8     codes are multiplied as they are; a position's scale of K goes into its score, that of V into
//              its probability
//   splits are folded into the answer in their order:
//     m' = max(m, m_i)   a = 2^(m - m')   b = 2^(m_i - m')   l' = l a + l_i b   acc' = acc a + acc_i b
//   by the block itself where it has them all, else by the last of its tile's blocks to come, from memory.
//
// What is added to what depends on absolute positions alone: not on the page size, the other sequences, the
// lanes that a row shares a tile with, or the grid. Scores and sums are fp32, logits in base 2.
#include "paged_kv_split.h"

namespace pyarch {
namespace {

template <class T, class Q, int L>
PYARCH_KERNEL PYARCH_THREADS(kThreads, kBlocks<L>) paged_attention(Call<T, Q> c) {
  const int thread = static_cast<int>(threadIdx.x);
  const int tiles_a_head = (c.group + c.heads_a_tile - 1) / c.heads_a_tile;
  const int64_t kv_head = blockIdx.y / tiles_a_head;
  const int first_in_group = static_cast<int>(blockIdx.y) % tiles_a_head * c.heads_a_tile;
  const int heads = c.group - first_in_group < c.heads_a_tile ? c.group - first_in_group : c.heads_a_tile;
  const int64_t first_head = kv_head * c.group + first_in_group;

  const Tile t = find_tile(c);
  if (t.rows <= 0) return;
  const int lanes = t.rows * heads;  // lane = row * heads + head
  const int64_t first_split = t.low / kSplit;
  const int64_t count = t.valid && t.low < t.high ? (t.high - 1) / kSplit + 1 - first_split : 0;
  if (blockIdx.z >= count && blockIdx.z > 0) return;

  const Layout at = layout<T>(L, c.dim, c.key_bytes);
  const Shared<float> q = shared<float>(at.q), scores = shared<float>(at.scores), acc = shared<float>(at.acc);
  const Shared<float> sums = shared<float>(), m_split = shared<float>(at.m), l_split = shared<float>(at.l);
  const Shared<float> a = shared<float>(at.a), b = shared<float>(at.b);
  const Shared<int64_t> offsets = shared<int64_t>(at.offsets);
  const Shared<float> k_scale = shared<float>(at.k_scale), v_scale = shared<float>(at.v_scale);
  for (int i = thread; i < L * c.dim; i += kThreads) {
    const int lane = i / c.dim, d = i % c.dim;
    q[i] = lane < lanes
               ? to_float(
                     c.q[(t.first_row + lane / heads) * c.q_row + (first_head + lane % heads) * c.q_head + d])
               : 0.0f;
    acc[i] = 0.0f;
  }
  float m = -INFINITY, l = 0.0f;  // of lane `thread`, so far

  const Share copied = share<T>(c.dim, kPer16<T>), own = share<T>(c.dim, kOwn<T>);
  const int stride = c.key_bytes / static_cast<int>(sizeof(T));
  const bool in_memory = gridDim.z > 1 && count > 1;  // other blocks have splits of this tile
  const int64_t tile_head = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
  const int64_t partial_floats = int64_t{L} * (c.dim + 2);

  for (int64_t split = blockIdx.z; split < count; split += gridDim.z) {
    const int64_t start = (first_split + split) * kSplit;
    const int64_t end = t.high - start < kSplit ? t.high - start : kSplit;
    const int first_tile = static_cast<int>(t.low > start ? (t.low - start) / kTile<T> : 0);
    const int tiles = static_cast<int>((end + kTile<T> - 1) / kTile<T>) - first_tile;
    const Scales scales = find_positions(c, t, kv_head, start, offsets);
    sync();
    const auto copy = [&](int step) {  // the tiles of K, then those of V
      if (step < 2 * tiles) {
        const bool values = step >= tiles;
        const int i0 = (first_tile + (values ? step - tiles : step)) * kTile<T>;
        const Shared<T> to = shared<T>(int64_t{step % kStages<T>} * kTile<T> * c.key_bytes) + copied.mine;
        const Shared<const int64_t> from = offsets + (values ? kSplit + i0 : i0);
        const Global<const T> cache = values ? c.v : c.k;
        for (int i = copied.first; i < kTile<T>; i += copied.apart) {
          const int64_t offset = from[i];
          if (offset >= 0) cp16(to + i * stride, cache + (offset + copied.mine));
        }
      }
      commit();
    };
    float sum[L][kOwn<T>] = {};
    for (int step = 0; step < kStages<T> - 1; ++step) copy(step);
    if constexpr (kScaled<T>) {
#pragma unroll
      for (int n = 0; n < kSplit / kThreads; ++n) {
        k_scale[thread + n * kThreads] = scales.k[n];
        v_scale[thread + n * kThreads] = scales.v[n];
      }
    }
    for (int step = 0; step < 2 * tiles; ++step) {
      wait<kStages<T> - 2>();
      sync();
      copy(step + kStages<T> - 1);
      const Shared<const T> tile = shared<T>(int64_t{step % kStages<T>} * kTile<T> * c.key_bytes);
      if (step < tiles) {
        const int i0 = (first_tile + step) * kTile<T>;
        score_keys<L>(c, tile, q, offsets + i0, k_scale + i0, scores + i0 * L);
        continue;
      }
      if (step == tiles) {
        softmax<L>(c, t, heads, start, v_scale, scores, m_split, l_split);
        sync();
      }
      const int i0 = (first_tile + step - tiles) * kTile<T>;
      add_values<T, L>(tile, stride, scores + i0 * L, own, sum);
    }

    wait<0>();
    sync();
    if (own.first < kTile<T>)
#pragma unroll
      for (int lane = 0; lane < L; ++lane)
#pragma unroll
        for (int e = 0; e < kOwn<T>; e += 4)
          store16(sums + (own.first * L + lane) * c.dim + own.mine + e, pack(sum[lane] + e));
    if (!in_memory && thread < L) {
      float a_lane, b_lane;
      fold(m_split[thread], l_split[thread], m, l, a_lane, b_lane);
      a[thread] = a_lane, b[thread] = b_lane;
    }
    sync();
    const Global<float> partial = c.partial + (tile_head * c.splits + split) * partial_floats;
    for (int i = thread; i < L * c.dim; i += kThreads) {
      float total = sums[i];
      for (int part = 1; part < own.apart; ++part) total += sums[part * L * c.dim + i];
      if (in_memory)
        partial[i] = total;
      else
        acc[i] = fold_value(acc[i], total, a[i / c.dim], b[i / c.dim]);
    }
    if (in_memory && thread < L) {
      partial[L * c.dim + thread] = m_split[thread];
      partial[L * (c.dim + 1) + thread] = l_split[thread];
    }
    sync();
  }

  if (in_memory) {
    const int64_t blocks = count < gridDim.z ? count : gridDim.z;
    bool last = false;
    if (thread == 0) {
      fence();
      last = atomic_add(c.arrived + tile_head, 1) == blocks - 1;
      fence();
    }
    if (!sync_any(last)) return;
    const Global<const float> partial = c.partial + tile_head * c.splits * partial_floats;
    for (int64_t done = 0; done < count; done += kBatch) {
      const int batch = static_cast<int>(count - done < kBatch ? count - done : kBatch);
      for (int i = thread; i < batch * L; i += kThreads) {  // a and b hold m_i and l_i first
        const Global<const float> from = partial + (done + i / L) * partial_floats + L * c.dim + i % L;
        a[i] = from[0];
        b[i] = from[L];
      }
      sync();
      if (thread < L)
        for (int i = thread; i < batch * L; i += L) {
          float a_lane, b_lane;
          fold(a[i], b[i], m, l, a_lane, b_lane);
          a[i] = a_lane, b[i] = b_lane;
        }
      sync();
      for (int i = thread; i < L * c.dim; i += kThreads) {
        const int lane = i / c.dim;
        float total = acc[i];
#pragma unroll 8
        for (int s = 0; s < batch; ++s)
          total =
              fold_value(total, partial[(done + s) * partial_floats + i], a[s * L + lane], b[s * L + lane]);
        acc[i] = total;
      }
      sync();
    }
  }

  // Lane `thread`: its sink and its lse; a: what its values are multiplied by.
  if (thread < lanes) {
    const int64_t head = first_head + thread % heads;
    float both = m, sink = -INFINITY;
    if (c.has_sinks) {
      sink = (c.sinks_are_float ? c.sinks[head * c.sink_step] : to_float(c.sinks_as_q[head * c.sink_step])) *
             kLog2e;
      both = fmaxf(m, sink);
    }
    const float shift = both == -INFINITY ? 0.0f : both, own = exp2f(m - shift);
    float total = c.has_sinks ? fmaf(l, own, exp2f(sink - shift)) : l * own;
    if (!t.valid) total = bits_to_float(0x7fc00000);
    a[thread] = total == 0.0f ? 0.0f : own / total;
    c.lse[(t.first_row + thread / heads) * c.heads + head] =
        total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
  }
  sync();
  for (int i = thread; i < lanes * c.dim; i += kThreads) {
    const int lane = i / c.dim;
    c.out[((t.first_row + lane / heads) * c.heads + first_head + lane % heads) * c.dim + i % c.dim] =
        from_float<Q>(acc[i] * a[lane]);
  }
}

// ---- the launcher

template <class T, class Q, int L>
const char* run(const PagedAttention& p, Stream stream) {
  const int64_t group = p.q_heads / p.heads, dim_bytes = p.dim * static_cast<int64_t>(sizeof(T));
  Call<T, Q> c{};
  c.q = static_cast<const Q*>(p.q), c.k = static_cast<const T*>(p.k), c.v = static_cast<const T*>(p.v);
  c.table = p.table, c.lengths = p.lengths, c.has_starts = p.starts != nullptr;
  if (c.has_starts) c.starts = p.starts;
  c.has_sinks = p.sinks != nullptr, c.sinks_are_float = p.sinks_are_float;
  if (c.has_sinks && p.sinks_are_float) c.sinks = static_cast<const float*>(p.sinks);
  if (c.has_sinks && !p.sinks_are_float) c.sinks_as_q = static_cast<const Q*>(p.sinks);
  c.out = static_cast<Q*>(p.out), c.lse = p.lse;
  const auto strides = [](const int64_t* s) { return Strides{s[0], s[1], s[2]}; };
  c.k_stride = strides(p.k_stride), c.v_stride = strides(p.v_stride);
  if (kScaled<T>) {
    c.k_scale = p.k_scale, c.v_scale = p.v_scale;
    c.k_scale_stride = strides(p.k_scale_stride), c.v_scale_stride = strides(p.v_scale_stride);
  }
  c.q_row = p.q_row, c.q_head = p.q_head, c.table_row = p.table_row, c.table_column = p.table_column;
  c.length_step = p.length_step, c.start_step = p.start_step, c.sink_step = p.sink_step;
  c.batch = p.batch, c.total = p.total, c.pages = p.pages, c.page_size = p.page_size;
  c.capacity = p.columns * p.page_size, c.left = p.left, c.right = p.right, c.splits = p.plan.splits;
  c.heads = static_cast<int>(p.q_heads), c.group = static_cast<int>(group);
  c.heads_a_tile = static_cast<int>(p.plan.heads_a_tile),
  c.rows_a_tile = static_cast<int>(p.plan.rows_a_tile);
  c.dim = static_cast<int>(p.dim), c.scale = p.scale, c.softcap = p.softcap;
  // 64 bytes past a multiple of 128, so that the two positions that 8 threads read lie in different banks.
  c.key_bytes = static_cast<int>((dim_bytes + 63) / 128 * 128 + 64);
  if (p.plan.grid_splits > 1) {
    c.arrived = static_cast<int*>(p.arrived), c.partial = p.partial;
    const size_t tiles = static_cast<size_t>(p.plan.tiles * p.plan.head_tiles);
    if (const char* error = clear(p.arrived, 4 * tiles, stream)) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.plan.tiles), static_cast<unsigned>(p.plan.head_tiles),
                  static_cast<unsigned>(p.plan.grid_splits));
  const size_t bytes = static_cast<size_t>(layout<T>(L, c.dim, c.key_bytes).bytes);
  return launch(paged_attention<T, Q, L>, grid, dim3(kThreads), bytes, stream, c);
}

template <class T, class Q>
const char* run_lanes(const PagedAttention& p, Stream stream) {
  switch (p.plan.lanes) {
    case 1:
      return run<T, Q, 1>(p, stream);
    case 2:
      return run<T, Q, 2>(p, stream);
    case 4:
      return run<T, Q, 4>(p, stream);
    default:
      return run<T, Q, 8>(p, stream);
  }
}

template <class Q>
const char* run_cache(const PagedAttention& p, Stream stream) {
  return p.k_scale ? run_lanes<int8_t, Q>(p, stream) : run_lanes<Q, Q>(p, stream);
}

}  // namespace
}  // namespace pyarch

void pyarch_paged_attention_plan(PagedAttention* p) {
  const auto ceil = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t group = p->q_heads / p->heads;
  const int64_t rows = p->starts && p->batch > 0 ? ceil(p->total, p->batch) : 1;  // of a sequence, on average
  PagedAttentionPlan plan{};
  plan.lanes = 1;
  while (plan.lanes < 8 && plan.lanes < group * rows) plan.lanes *= 2;
  plan.heads_a_tile = group < plan.lanes ? group : plan.lanes;
  plan.rows_a_tile = p->starts ? plan.lanes / plan.heads_a_tile : 1;
  plan.tiles = p->starts ? p->total / plan.rows_a_tile + p->batch : p->total;
  plan.head_tiles = p->heads * ceil(group, plan.heads_a_tile);
  // Positions that a tile can attend to (lengths are int32), and splits that these can touch.
  constexpr int64_t longest = int64_t{1} << 31;
  const int64_t columns = p->columns < longest / p->page_size ? p->columns : longest / p->page_size + 1;
  const int64_t span = p->left + p->right + plan.rows_a_tile;
  const int64_t touched = (span - 1) / pyarch::kSplit + 2, all = ceil(columns * p->page_size, pyarch::kSplit);
  plan.splits = touched < all ? touched : all;
  if (plan.splits < 1) plan.splits = 1;
  // Enough blocks to fill the GPU; each takes every grid_splits-th split of its tile.
  constexpr int64_t enough = 1024, most_floats = int64_t{64} << 20;
  const int64_t blocks = plan.tiles * plan.head_tiles, floats = plan.lanes * (p->dim + 2);
  plan.grid_splits = blocks > 0 ? ceil(enough, blocks) : 1;
  if (plan.grid_splits > plan.splits) plan.grid_splits = plan.splits;
  if (blocks > 0 && plan.splits > most_floats / floats / blocks) plan.grid_splits = 1;
  if (plan.grid_splits > 1) plan.partial_floats = blocks * plan.splits * floats;
  p->plan = plan;
}

const char* pyarch_paged_attention(const PagedAttention* p, void* stream) {
  const auto queue = static_cast<pyarch::Stream>(stream);
  if (p->total == 0) return nullptr;
  switch (p->type) {
    case 0:
      return pyarch::run_cache<float>(*p, queue);
    case 1:
      return pyarch::run_cache<pyarch::bf16>(*p, queue);
    default:
      return pyarch::run_cache<pyarch::fp16>(*p, queue);
  }
}
