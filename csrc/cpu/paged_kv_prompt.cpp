// paged_attention for a sequence with many rows (a prompt): the keys and values of some KV heads are gathered
// from the pages, one head after another, and flash attention's tiles do the rest. The copy is read once per
// tile of rows, so it costs little beside them.
#include "flash_attention_task.h"
#include "paged_kv_attention.h"

namespace pyarch {
namespace {

constexpr int64_t kGatherBytes = 32 << 20;  // of keys and values at a time, unless one head has more
constexpr int64_t kTaskPositions = 128;
constexpr int64_t kFewRows = 4;  // at a time on the other kernel

// Copies positions [begin, end) of a head to `to`, codes times their scales; returns NaN if any element is
// not finite, else 0.
template <class C, class G>
F gather(const PagedAttention& a, const PagedCache& cache, const PagedCache& scales, const PagedSequence& s,
         int64_t head, int64_t begin, int64_t end, G* to) {
  int64_t at[kTaskPositions], scale_at[kTaskPositions];
  a.offsets(cache, s, begin, end, at);
  const C* from = reinterpret_cast<const C*>(cache.data) + head * cache.head_stride;
  const float* scale_from = nullptr;
  if constexpr (!std::is_same_v<C, G>) {
    a.offsets(scales, s, begin, end, scale_at);
    scale_from = reinterpret_cast<const float*>(scales.data) + head * scales.head_stride;
  }
  F odd = zero();
  for (int64_t i = 0; i < end - begin; ++i, to += cache.dim) {
    const C* row = from + at[i];
    const F scale = std::is_same_v<C, G> ? zero() : set1(scale_from[scale_at[i]]);
    if constexpr (std::is_same_v<C, G>) std::memcpy(to, row, cache.dim * sizeof(G));
    for (int64_t d = 0; d < cache.dim; d += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, cache.dim - d));
      F x = n == W ? load(row + d) : load(row + d, n);
      if constexpr (!std::is_same_v<C, G>) {
        x = x * scale;
        n == W ? store(to + d, x) : store(to + d, x, n);
      }
      odd = fma(x, zero(), odd);
    }
  }
  return odd;
}

// to[row][head][dim] = from[row][head][dim], rows shared out among the threads; strides of `from` and `to`.
template <class From, class To>
void convert(const From* from, int64_t row_stride, int64_t head_stride, To* to, int64_t rows, int64_t heads,
             int64_t dim) {
  const int64_t block = std::max<int64_t>(1, (32 << 10) / (heads * dim));
  parallel_tasks((rows + block - 1) / block, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t d = 0; d < dim; d += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, dim - d));
          store(to + (r * heads + h) * dim + d, load(from + r * row_stride + h * head_stride + d, n), n);
        }
  });
}

}  // namespace

// Codes become fp32 on the way, and q with them: flash attention takes one type.
template <class T, class C>
void attend_prompt(const PagedAttention& a, const PagedSequence& s) {
  using G = std::conditional_t<std::is_same_v<C, int8_t>, float, C>;
  constexpr bool converted = !std::is_same_v<G, T>;
  const int64_t dim = a.k.dim;
  const int64_t low =
      s.low / flash::kKeys * flash::kKeys;  // blocks of keys start there; the rest of one is zeros
  const int64_t positions = s.high - low;
  const int64_t head_bytes = 2 * positions * dim * static_cast<int64_t>(sizeof(G));
  const int64_t at_once = std::min(a.k.heads, std::max<int64_t>(1, kGatherBytes / head_bytes));
  struct Gathered;
  G* keys = scratch<Gathered, G>(2 * at_once * positions * dim);
  G* values = keys + at_once * positions * dim;
  // This sequence's rows of q and out.
  const T* q_rows = reinterpret_cast<const T*>(a.q) + s.first_row * a.q_row;
  T* out_rows = reinterpret_cast<T*>(a.out) + s.first_row * a.q_heads * dim;
  const G* q;
  G* out;
  int64_t q_row = a.q_row, q_head = a.q_head;
  if constexpr (converted) {
    struct Queries;
    struct Results;
    G* wide = scratch<Queries, G>(s.rows * a.q_heads * dim);
    convert(q_rows, a.q_row, a.q_head, wide, s.rows, a.q_heads, dim);
    q = wide, q_row = a.q_heads * dim, q_head = dim;
    out = scratch<Results, G>(s.rows * a.q_heads * dim);
  } else {
    q = q_rows, out = out_rows;
  }
  for (int64_t first = 0; first < a.k.heads; first += at_once) {
    const int64_t heads = std::min(at_once, a.k.heads - first);
    std::atomic<bool> finite{true};
    const int64_t blocks = (positions + kTaskPositions - 1) / kTaskPositions;
    parallel_tasks(blocks, [&](int64_t block) {
      const int64_t begin = low + block * kTaskPositions, end = std::min(s.high, begin + kTaskPositions);
      const int64_t from = std::max(begin, s.low);
      for (int64_t h = 0; h < heads; ++h) {
        G *k = keys + (h * positions + begin - low) * dim, *v = values + (h * positions + begin - low) * dim;
        std::memset(static_cast<void*>(k), 0, (std::min(from, end) - begin) * dim * sizeof(G));
        std::memset(static_cast<void*>(v), 0, (std::min(from, end) - begin) * dim * sizeof(G));
        if (from >= end) continue;
        gather<C>(a, a.k, a.k_scale, s, first + h, from, end, k + (from - begin) * dim);
        const F odd_lanes = gather<C>(a, a.v, a.v_scale, s, first + h, from, end, v + (from - begin) * dim);
        const float odd = hsum(odd_lanes);
        if (odd != 0.0f) finite.store(false, std::memory_order_relaxed);
      }
    });
    if (!finite) {  // a tile multiplies the values that a row does not see by 0, which a NaN would survive
      std::vector<PagedSequence> pieces;
      for (int64_t i = 0; i < s.rows; i += kFewRows) {
        PagedSequence piece = s;
        piece.first_row += i, piece.position += i, piece.rows = std::min(kFewRows, s.rows - i);
        piece.set_span(a.left, a.right);
        pieces.push_back(piece);
      }
      return attend_few<T, C>(a, pieces);
    }
    flash::Call<G> call{};
    call.q = q + first * a.group * q_head;
    call.k = keys, call.v = values;
    call.q_strides = {0, q_head, q_row, 1};
    call.k_strides = call.v_strides = {0, positions * dim, dim, 1};
    call.sinks = a.sinks ? a.sinks + first * a.group : nullptr;
    call.out = out + first * a.group * dim;
    call.lse = a.lse + s.first_row * a.q_heads + first * a.group;
    call.heads = heads * a.group, call.group = a.group, call.rows = 0;
    call.head_step = 1, call.row_step = a.q_heads;
    call.head_dim = call.value_dim = dim;
    call.left = a.left, call.right = a.right;
    call.scale = a.scale, call.softcap = a.softcap;
    flash::run(call, {{0, 0, 0, s.rows, -low, s.length}}, heads);
  }
  if constexpr (converted) convert(out, a.q_heads * dim, dim, out_rows, s.rows, a.q_heads, dim);
}

template void attend_prompt<float, float>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<bf16, bf16>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<fp16, fp16>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<float, int8_t>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<bf16, int8_t>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<fp16, int8_t>(const PagedAttention&, const PagedSequence&);

}  // namespace pyarch
