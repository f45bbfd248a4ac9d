// paged_attention for few rows a sequence (decode): bound by reading the cache, so every byte of it is copied
// to shared memory once per tile of query vectors, and copies never stop.
//
//   block = (tile of a sequence's rows, KV head, every gridDim.z-th split of kSplit positions), 4 warps
//     lane      a query vector: one (row, query head of the KV head's group); 8 or 16 share what is read
//     warp      a quarter of each split's positions, by itself: its copies (paged_kv_copies.h) are one
//               sequence of stages over all its splits, K's then V's of each, and only its lanes wait for
//               them
//     products  scores and probabilities stay in registers (paged_kv_products.h)
//     softmax   of the warp's positions of this split alone
//   then sums (paged_kv_sums.h): of the 4 warps, of kSpan splits, of spans, always in their order: by the
//   block itself where it has all splits, else by the last blocks of a span and of a tile to come, from
//   memory.
//
// What is added to what depends on absolute positions alone: not on the page size, the other sequences, the
// lanes that a row shares a tile with, or the grid. Blocks that follow one another have the KV heads of one
// sequence, whose keys follow one another in memory. Scores and sums are fp32, logits in base 2.
#include "paged_kv_copies.h"
#include "paged_kv_products.h"
#include "paged_kv_sums.h"

namespace pyarch {
namespace {

// That a multiprocessor has registers for.
template <class Q, int D, int NT>
constexpr int kBlocks = D > 128 || NT > 1 || sizeof(Q) == 4 ? 2 : 3;

// The answer of the thread's query vector, with its sink.
template <class T, class Q, int D>
PYARCH_DEVICE void finish(const Call<T, Q>& c, const Sum<D>& sum, int64_t row, int64_t head, bool valid) {
  float both = sum.m, sink = -INFINITY;
  if (c.has_sinks) {
    sink = (c.sinks_are_float ? c.sinks[head * c.sink_step] : to_float(c.sinks_as_q[head * c.sink_step])) *
           kLog2e;
    both = fmaxf(sum.m, sink);
  }
  const float shift = both == -INFINITY ? 0.0f : both, own = exp2f(sum.m - shift);
  float total = c.has_sinks ? fmaf(sum.l, own, exp2f(sink - shift)) : sum.l * own;
  if (!valid) total = bits_to_float(0x7fc00000);
  const float factor = total == 0.0f ? 0.0f : own / total;
  const int first = static_cast<int>(threadIdx.x) / 8;
  const int64_t at = row * c.heads + head;
  if (first == 0) c.lse[at] = total == 0.0f ? -INFINITY : (shift + log2f(total)) * kLn2;
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    if (first + 16 * i < c.dim) c.out[at * c.dim + first + 16 * i] = from_float<Q>(sum.value[i] * factor);
}

template <class T, class Q, int D, int NT>
PYARCH_KERNEL PYARCH_THREADS(kThreads, (kBlocks<Q, D, NT>)) paged_attention(Call<T, Q> c) {
  const int thread = static_cast<int>(threadIdx.x), in_warp = thread % 32, warp = thread / 32;
  const int head_tile = static_cast<int>(blockIdx.x % c.head_tiles);
  const int tiles_a_head = (c.group + c.heads_a_tile - 1) / c.heads_a_tile;
  const int first_in_group = head_tile % tiles_a_head * c.heads_a_tile;
  const int heads = c.group - first_in_group < c.heads_a_tile ? c.group - first_in_group : c.heads_a_tile;
  const int kv_head = head_tile / tiles_a_head, first_head = kv_head * c.group + first_in_group;

  const Tile t = find_tile(c);
  if (t.rows <= 0) return;
  const int lanes = t.rows * heads;  // lane = row * heads + head
  const int first_split = t.low / kSplit, first_span = first_split / kSpan;
  const int count = t.valid && t.low < t.high ? (t.high - 1) / kSplit + 1 - first_split : 0;
  const int every = static_cast<int>(gridDim.z);
  if (static_cast<int>(blockIdx.z) >= count && blockIdx.z > 0) return;

  const Layout at = layout<T, D, NT>(c.dim, c.row_bytes);
  Copies<T, Q, D> copies(c, t, at, kv_head, first_split, count);
  const Products<T, Q, D, NT> products(c, at);
  products.put_queries([&](int lane, int d) {
    if (lane >= lanes || d >= c.dim) return Q{};
    return c.q[(t.first_row + lane / heads) * c.q_row + (first_head + lane % heads) * c.q_head + d];
  });
  products.start_odd();
  if (count > 0) copies.start();
  sync();

  const bool in_memory = every > 1 && count > 1;  // other blocks have splits of this tile
  const int spans = count > 0 ? (first_split + count - 1) / kSpan - first_span + 1 : 0;
  const Partial partial =
      Partial{c.partial, c.heads_a_tile * c.rows_a_tile, c.dim} + int64_t{blockIdx.x} * (c.splits + c.spans);
  const Global<int> arrived = c.arrived + int64_t{blockIdx.x} * (1 + c.spans);
  const Sight sight{t, c.left, c.right, heads};
  const Partial own{shared<float>(at.own), partial.lanes, c.dim};  // of this block's spans, where it has all
  Sum<D> of_span[NT];
  bool last = !in_memory;

  for (int split = static_cast<int>(blockIdx.z); split < count; split += every) {
    const int start = (first_split + split) * kSplit;
    copies.begin_split();
    const Sight::Range seen = sight.of_tile(start), by_all = sight.of_all(start);
    Sight::Range ranges[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) ranges[n][e] = sight.of_lane(start, 8 * n + in_warp % 4 * 2 + e);
    float acc[D / 16][NT][4] = {};
    Softmax<D, NT> softmax;
    int byte = 0;
#pragma unroll 1
    for (int i = seen.low / kTile<T>; i * kTile<T> < seen.high; ++i) {
      const int first = i * kTile<T> + warp * kRows<T>, mine = i * kRows<T>;
      float x[kOctets<T>][NT][2];
      products.scores(copies.stage(), x);
      softmax.add(
          x, acc, first + in_warp / 4, ranges, c.softcap, c.per_softcap, products.unseen,
          [&](int o) { return copies.k_factor(mine + 8 * o + in_warp / 4) * c.scale; },
          [&](int o) { return copies.v_factor(mine + 8 * o + in_warp / 4); });
      byte = copies.stage();
      if (t.rows > 1 && (first < by_all.low || first + kRows<T> > by_all.high))
        products.take_out_odd(byte,
                              [&](int lane, int row) { return sight.of_lane(start, lane).has(first + row); });
      products.add_values(byte, x, acc);
    }
    softmax.end();

    // What the 4 warps have, 8 lanes at a time, by way of their last stages: nothing is copied there before
    // the next stage is asked for.
    const Shared<float> m_of = shared<float>(at.sums), l_of = m_of + NT * kWarps * 8;
    sync_warp();
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const Shared<float> own = shared<float>(byte) + in_warp % 4 * 2;
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int d = products.dim(i, e / 2);
          if (d < c.dim)
            own[8 * d + e % 2] =
                products.result(acc[i][n][e], d, 8 * n + in_warp % 4 * 2 + e % 2, t.rows > 1);
        }
      if (in_warp < 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          m_of[(n * kWarps + warp) * 8 + in_warp * 2 + e] = softmax.m[n][e];
          l_of[(n * kWarps + warp) * 8 + in_warp * 2 + e] = softmax.l[n][e];
        }
      sync();
      Sum<D> sum;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const int lane = (n * kWarps + w) * 8 + thread % 8;
        const Shared<const float> from =
            shared<const float>(byte + (w - warp) * kStages<D> * at.stage) + thread;
        sum.add(m_of[lane], l_of[lane],
                [&](int i) { return thread / 8 + 16 * i < c.dim ? from[i * kThreads] : 0.0f; });
      }
      sync();
      if (in_memory)
        (partial + split).put(sum, n);
      else
        of_span[n].add(sum);
    }

    const int span = (first_split + split) / kSpan - first_span;
    const int from = span == 0 ? 0 : (first_span + span) * kSpan - first_split;
    const int to = span + 1 == spans ? count : (first_span + span + 1) * kSpan - first_split;
    if (!in_memory && split + 1 == to) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        Sum<D> sum = own.template total<D>(span > 0, n);
        sum.add(of_span[n]);
        sync();
        own.put(sum, n);
        of_span[n] = Sum<D>();
      }
    } else if (in_memory && is_last(arrived + 1 + span, to - from)) {
      last = spans == 1;
      if (!last) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
          (partial + c.splits + span).put((partial + from).template total<D>(to - from, n), n);
        last = is_last(arrived, spans);
      }
    }
  }

  if (!last) return;
  sync();
  const Partial all = !in_memory ? own : spans > 1 ? partial + c.splits : partial;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const Sum<D> sum = all.template total<D>(!in_memory ? count > 0 : spans > 1 ? spans : count, n);
    const int lane = 8 * n + thread % 8;
    if (lane < lanes) finish(c, sum, t.first_row + lane / heads, first_head + lane % heads, t.valid);
  }
}

// ---- the launcher

template <class T, class Q, int D, int NT>
const char* run(const PagedAttention& p, Stream stream) {
  const int64_t group = p.q_heads / p.heads;
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
  c.capacity = p.columns * p.page_size, c.left = p.left, c.right = p.right;
  c.splits = static_cast<int>(p.plan.splits), c.spans = static_cast<int>(p.plan.spans);
  c.head_tiles = static_cast<int>(p.plan.head_tiles);
  c.heads = static_cast<int>(p.q_heads), c.group = static_cast<int>(group);
  c.heads_a_tile = static_cast<int>(p.plan.heads_a_tile),
  c.rows_a_tile = static_cast<int>(p.plan.rows_a_tile);
  c.dim = static_cast<int>(p.dim), c.scale = p.scale, c.softcap = p.softcap;
  c.per_softcap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
  c.row_bytes = row_bytes<T>(c.dim);
  if (p.plan.grid_splits > 1) {
    c.arrived = static_cast<int*>(p.arrived), c.partial = p.partial;
    if (const char* error = clear(p.arrived, 4 * static_cast<size_t>(p.plan.counters), stream)) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.plan.blocks), 1, static_cast<unsigned>(p.plan.grid_splits));
  const size_t bytes = static_cast<size_t>(layout<T, D, NT>(c.dim, c.row_bytes).bytes);
  return launch(paged_attention<T, Q, D, NT>, grid, dim3(kThreads), bytes, stream, c);
}

template <class T, class Q, int D>
const char* run_lanes(const PagedAttention& p, Stream stream) {
  if constexpr (sizeof(Q) == 2 && D == 128)
    if (p.plan.lanes > 8) return run<T, Q, D, 2>(p, stream);
  return run<T, Q, D, 1>(p, stream);
}

template <class T, class Q>
const char* run_dim(const PagedAttention& p, Stream stream) {
  return p.dim <= 128 ? run_lanes<T, Q, 128>(p, stream) : run_lanes<T, Q, 256>(p, stream);
}

template <class Q>
const char* run_cache(const PagedAttention& p, Stream stream) {
  return p.k_scale ? run_dim<int8_t, Q>(p, stream) : run_dim<Q, Q>(p, stream);
}

}  // namespace
}  // namespace pyarch

void pyarch_paged_attention_plan(PagedAttention* p) {
  const auto ceil = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t group = p->q_heads / p->heads;
  const int64_t rows = p->starts && p->batch > 0 ? ceil(p->total, p->batch) : 1;  // of a sequence, on average
  PagedAttentionPlan plan{};
  plan.lanes = p->type != 0 && p->dim <= 128 && group * rows > 8 ? 16 : 8;
  plan.heads_a_tile = group < plan.lanes ? group : plan.lanes;
  plan.rows_a_tile = p->starts ? plan.lanes / plan.heads_a_tile : 1;
  plan.head_tiles = p->heads * ceil(group, plan.heads_a_tile);
  plan.blocks = (p->starts ? p->total / plan.rows_a_tile + p->batch : p->total) * plan.head_tiles;
  // Positions that a tile can attend to (lengths are int32), and splits that these can touch.
  constexpr int64_t longest = int64_t{1} << 31;
  const int64_t columns = p->columns < longest / p->page_size ? p->columns : longest / p->page_size + 1;
  const int64_t span = p->left + p->right + plan.rows_a_tile;
  const int64_t touched = (span - 1) / pyarch::kSplit + 2, all = ceil(columns * p->page_size, pyarch::kSplit);
  plan.splits = touched < all ? touched : all;
  if (plan.splits < 1) plan.splits = 1;
  plan.spans = (plan.splits - 1) / pyarch::kSpan + 2;
  // Enough blocks to fill the GPU; each takes every grid_splits-th split of its tile.
  constexpr int64_t enough = 1024, most_floats = int64_t{64} << 20;
  const int64_t sums = plan.splits + plan.spans, floats = plan.heads_a_tile * plan.rows_a_tile * (p->dim + 2);
  plan.grid_splits = plan.blocks > 0 ? ceil(enough, plan.blocks) : 1;
  if (plan.grid_splits > plan.splits) plan.grid_splits = plan.splits;
  if (plan.blocks > 0 && sums > most_floats / floats / plan.blocks) plan.grid_splits = 1;
  if (plan.grid_splits > 1) {
    plan.partial_floats = plan.blocks * sums * floats;
    plan.counters = plan.blocks * (1 + plan.spans);
  }
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
