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

// Copies positions [begin, end) of a head to `to`; returns NaN if any element is not finite, else 0.
template <class T>
F gather(const PagedAttention& a, const PagedCache& cache, const PagedSequence& s, int64_t head,
         int64_t begin, int64_t end, T* to) {
  int64_t at[kTaskPositions];
  a.offsets(cache, s, begin, end, at);
  const T* from = reinterpret_cast<const T*>(cache.data) + head * cache.head_stride;
  F odd = zero();
  for (int64_t i = 0; i < end - begin; ++i, to += cache.dim) {
    const T* row = from + at[i];
    std::memcpy(to, row, cache.dim * sizeof(T));
    int64_t d = 0;
    for (; d + W <= cache.dim; d += W) odd = fma(load(row + d), zero(), odd);
    if (d < cache.dim) odd = fma(load(row + d, static_cast<int>(cache.dim - d)), zero(), odd);
  }
  return odd;
}

}  // namespace

template <class T>
void attend_prompt(const PagedAttention& a, const PagedSequence& s) {
  const int64_t dim = a.k.dim;
  const int64_t low =
      s.low / flash::kKeys * flash::kKeys;  // blocks of keys start there; the rest of one is zeros
  const int64_t positions = s.high - low;
  const int64_t head_bytes = 2 * positions * dim * static_cast<int64_t>(sizeof(T));
  const int64_t at_once = std::min(a.k.heads, std::max<int64_t>(1, kGatherBytes / head_bytes));
  struct Gathered;
  T* keys = scratch<Gathered, T>(2 * at_once * positions * dim);
  T* values = keys + at_once * positions * dim;
  for (int64_t first = 0; first < a.k.heads; first += at_once) {
    const int64_t heads = std::min(at_once, a.k.heads - first);
    std::atomic<bool> finite{true};
    const int64_t blocks = (positions + kTaskPositions - 1) / kTaskPositions;
    parallel_tasks(blocks, [&](int64_t block) {
      const int64_t begin = low + block * kTaskPositions, end = std::min(s.high, begin + kTaskPositions);
      const int64_t from = std::max(begin, s.low);
      for (int64_t h = 0; h < heads; ++h) {
        T *k = keys + (h * positions + begin - low) * dim, *v = values + (h * positions + begin - low) * dim;
        std::memset(static_cast<void*>(k), 0, (std::min(from, end) - begin) * dim * sizeof(T));
        std::memset(static_cast<void*>(v), 0, (std::min(from, end) - begin) * dim * sizeof(T));
        if (from >= end) continue;
        gather(a, a.k, s, first + h, from, end, k + (from - begin) * dim);
        const float odd = hsum(gather(a, a.v, s, first + h, from, end, v + (from - begin) * dim));
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
      return attend_few<T>(a, pieces);
    }
    flash::Call<T> call{};
    call.q = reinterpret_cast<const T*>(a.q) + first * a.group * a.q_head;
    call.k = keys, call.v = values;
    call.q_strides = {0, a.q_head, a.q_row, 1};
    call.k_strides = call.v_strides = {0, positions * dim, dim, 1};
    call.sinks = a.sinks ? a.sinks + first * a.group : nullptr;
    call.out = reinterpret_cast<T*>(a.out) + first * a.group * dim;
    call.lse = a.lse + first * a.group;
    call.heads = heads * a.group, call.group = a.group, call.rows = 0;
    call.head_step = 1, call.row_step = a.q_heads;
    call.head_dim = call.value_dim = dim;
    call.left = a.left, call.right = a.right;
    call.scale = a.scale, call.softcap = a.softcap;
    flash::run(call, {{0, 0, s.first_row, s.rows, -low, s.length}}, heads);
  }
}

template void attend_prompt<float>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<bf16>(const PagedAttention&, const PagedSequence&);
template void attend_prompt<fp16>(const PagedAttention&, const PagedSequence&);

}  // namespace pyarch
