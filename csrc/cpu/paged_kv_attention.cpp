// paged_attention: checks every value, then hands each sequence to the kernel for its number of rows.
#include "paged_kv_attention.h"

#include "operators.h"
#include "paged_kv_few.h"

namespace pyarch {
namespace {

constexpr int64_t kPromptLanes = 16;  // rows * group from which flash attention's tiles are the faster ones
constexpr int64_t kRoundFloats =
    4 << 20;  // partial results in memory at a time, unless one sequence has more
constexpr int64_t kSerialBytes = 128 << 10;  // less of the cache than this is read by one thread
constexpr int64_t kPassingBytes = 4 << 20;   // more than this is gone from the caches at the next token
constexpr int64_t kSerialFloats = 32 << 10;  // fewer partial results than these are combined by one thread

// out and lse of one row and query head from its splits.
template <class T, class C>
void combine(const PagedAttention& a, const PagedSequence& s, float* parts, int64_t splits, int64_t row,
             int64_t head) {
  const int64_t dim = a.k.dim, vectors = s.rows * a.q_heads;
  const int64_t vector = (head / a.group * s.rows + row) * a.group + head % a.group;
  const int64_t step = few::partial_floats(vectors, dim);
  const few::Partial first(parts, vectors, dim);
  const float sink = a.sinks ? a.sinks[head] * kLog2e : kMinusInf;
  float m = sink;
  for (int64_t i = 0; i < splits; ++i) m = std::max(m, first.m[i * step + vector]);
  const float shift = m == kMinusInf ? 0.0f : m;
  float sum = a.sinks ? std::exp2(sink - shift) : 0.0f;
  float* acc = first.acc + vector * dim;  // the first split's accumulators become the result
  T* out = reinterpret_cast<T*>(a.out) + ((s.first_row + row) * a.q_heads + head) * dim;
  struct Weights;
  float* weights = scratch<Weights, float>(splits + 1);
  for (int64_t i = 0; i < splits; ++i) {
    weights[i] = std::exp2(first.m[i * step + vector] - shift);
    sum += weights[i] * first.l[i * step + vector];
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const auto total = [&](int64_t d, int n) {
    F sum = zero();
    for (int64_t i = 0; i < splits; ++i) sum = fma(set1(weights[i]), load(acc + i * step + d, n), sum);
    return sum * set1(inverse);
  };
  int64_t d = 0;
  if constexpr (!few::kScaled<C>)  // whose accumulators lie in the order of load_pair<T>
    for (; d + 2 * W <= dim; d += 2 * W) store_pair(out + d, total(d, W), total(d + W, W));
  for (; d < dim; d += W) {
    const int n = static_cast<int>(std::min<int64_t>(W, dim - d));
    store(out + d, total(d, n), n);
  }
  a.lse[(s.first_row + row) * a.q_heads + head] = sum == 0.0f ? kMinusInf : (shift + std::log2(sum)) * kLn2;
}

struct Work {
  const PagedSequence* sequence;
  int64_t first_split, splits, parts;  // parts: offset of its partial results, in floats
};

template <class T, class C>
void attend_round(const PagedAttention& a, const std::vector<Work>& round, int64_t floats, int64_t all_splits,
                  int64_t positions) {
  struct Parts;
  float* parts = scratch<Parts, float>(floats);
  const int64_t bytes = 2 * positions * a.k.heads * a.k.dim * sizeof(C);
  const int64_t threads = bytes < kSerialBytes ? 1 : thread_count();
  // Heads of a split are read together, as they lie in memory, unless there are too few splits to share out.
  const int64_t ranges =
      threads == 1 ? 1 : std::min(a.k.heads, std::max<int64_t>(1, 4 * threads / all_splits));
  std::vector<int64_t> first_task(round.size() + 1, 0);
  for (size_t i = 0; i < round.size(); ++i) first_task[i + 1] = first_task[i] + round[i].splits * ranges;
  const auto task = [&](int64_t t) {
    const size_t i = std::upper_bound(first_task.begin(), first_task.end(), t) - first_task.begin() - 1;
    const Work& w = round[i];
    const int64_t split = (t - first_task[i]) / ranges, range = (t - first_task[i]) % ranges;
    const int64_t vectors = w.sequence->rows * a.q_heads;
    few::split_task<T, C>(
        a, *w.sequence, w.first_split + split, a.k.heads * range / ranges, a.k.heads * (range + 1) / ranges,
        bytes > kPassingBytes,
        few::Partial(parts + w.parts + split * few::partial_floats(vectors, a.k.dim), vectors, a.k.dim));
  };
  const int64_t tasks = first_task.back();
  if (threads == 1) {
    for (int64_t t = 0; t < tasks; ++t) task(t);
  } else {
    parallel_tasks(tasks, task);
  }
  const auto finish = [&](int64_t head) {
    for (const Work& w : round)
      for (int64_t row = 0; row < w.sequence->rows; ++row)
        combine<T, C>(a, *w.sequence, parts + w.parts, w.splits, row, head);
  };
  if (floats < kSerialFloats) {
    for (int64_t head = 0; head < a.q_heads; ++head) finish(head);
  } else {
    parallel_tasks(a.q_heads, finish);
  }
}

}  // namespace

template <class T, class C>
void attend_few(const PagedAttention& a, const std::vector<PagedSequence>& sequences) {
  std::vector<Work> round;
  int64_t floats = 0, splits = 0, positions = 0;
  for (const PagedSequence& s : sequences) {
    const int64_t first = s.low / few::kSplit;
    const int64_t count = s.low < s.high ? (s.high - 1) / few::kSplit + 1 - first : 0;
    const int64_t need = count * few::partial_floats(s.rows * a.q_heads, a.k.dim);
    if (!round.empty() && floats + need > kRoundFloats) {
      attend_round<T, C>(a, round, floats, splits, positions);
      round.clear();
      floats = splits = positions = 0;
    }
    round.push_back({&s, first, count, floats});
    floats += need;
    splits += count;
    positions += s.high - s.low;
  }
  if (!round.empty()) attend_round<T, C>(a, round, floats, std::max<int64_t>(1, splits), positions);
}

template void attend_few<float, float>(const PagedAttention&, const std::vector<PagedSequence>&);
template void attend_few<bf16, bf16>(const PagedAttention&, const std::vector<PagedSequence>&);
template void attend_few<fp16, fp16>(const PagedAttention&, const std::vector<PagedSequence>&);
template void attend_few<float, int8_t>(const PagedAttention&, const std::vector<PagedSequence>&);
template void attend_few<bf16, int8_t>(const PagedAttention&, const std::vector<PagedSequence>&);
template void attend_few<fp16, int8_t>(const PagedAttention&, const std::vector<PagedSequence>&);

namespace {

int64_t int32_at(const Tensor& t, int64_t i) {
  return static_cast<const int32_t*>(t.data_ptr())[i * t.stride(0)];
}

// Sequences with rows, after checking every length and every table entry that will be used.
std::vector<PagedSequence> check_values(const PagedAttention& a, int64_t total, const Tensor& block_table,
                                        const Tensor& seq_lens, const std::optional<Tensor>& cu_seqlens_q) {
  const int64_t batch = seq_lens.size(0), capacity = block_table.size(1) * a.k.page_size;
  if (cu_seqlens_q) {
    PYARCH_CHECK(int32_at(*cu_seqlens_q, 0) == 0, "cu_seqlens_q: must begin with 0, not ",
                 int32_at(*cu_seqlens_q, 0));
    PYARCH_CHECK(int32_at(*cu_seqlens_q, batch) == total, "cu_seqlens_q: must end with q's ", total,
                 " rows, not ", int32_at(*cu_seqlens_q, batch));
  }
  std::vector<PagedSequence> sequences;
  sequences.reserve(batch);
  const int64_t row = block_table.stride(0);
  for (int64_t b = 0; b < batch; ++b) {
    PagedSequence s{};
    s.first_row = cu_seqlens_q ? int32_at(*cu_seqlens_q, b) : b;
    s.rows = cu_seqlens_q ? int32_at(*cu_seqlens_q, b + 1) - s.first_row : 1;
    PYARCH_CHECK(s.rows >= 0 && s.first_row + s.rows <= total, "cu_seqlens_q: must rise, and entry ", b + 1,
                 " falls");
    s.length = int32_at(seq_lens, b);
    PYARCH_CHECK(s.length >= 0 && s.length <= capacity, "seq_lens: entry ", b, " is ", s.length,
                 ", allowed are 0 to ", capacity, " (what block_table can hold)");
    s.position = s.length - s.rows;
    if (s.rows > 0) s.set_span(a.left, a.right);
    s.table = static_cast<const int32_t*>(block_table.data_ptr()) + b * row;
    for (int64_t i = s.low / a.k.page_size; i * a.k.page_size < s.high; ++i) {
      const int64_t page = s.table[i * a.table_stride];
      PYARCH_CHECK(page >= 0 && page < a.k.pages, "block_table: entry [", b, ", ", i, "] is ", page,
                   ", allowed are 0 to ", a.k.pages - 1);
    }
    if (s.rows > 0) sequences.push_back(s);
  }
  return sequences;
}

}  // namespace

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                                           Tensor seq_lens, std::optional<Tensor> cu_seqlens_q,
                                           std::optional<Tensor> sinks, std::optional<Tensor> k_scale,
                                           std::optional<Tensor> v_scale, bool causal, int64_t window_left,
                                           int64_t window_right, double softcap, double scale) {
  PagedAttention a{};
  const PagedCaches caches = paged_caches(k_cache, v_cache, k_scale, v_scale);
  a.k = caches.k, a.v = caches.v, a.k_scale = caches.k_scale, a.v_scale = caches.v_scale;
  PYARCH_CHECK(
      q.dim() == 3 && q.size(2) == a.k.dim && q.size(1) > 0 && q.size(1) % a.k.heads == 0 &&
          caches.suits(q.scalar_type(), k_cache),
      "q: must be (rows, a multiple of k_cache's heads, head_dim) of k_cache's dtype if that is floating");
  PYARCH_CHECK(a.k.dim == 1 || q.size(0) == 0 || q.stride(2) == 1,
               "q: the last dimension must be contiguous");
  PYARCH_CHECK(block_table.dim() == 2 && block_table.scalar_type() == ScalarType::Int,
               "block_table: must be int32 (B, n)");
  const int64_t total = q.size(0), batch = block_table.size(0);
  PYARCH_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch && seq_lens.scalar_type() == ScalarType::Int,
               "seq_lens: must be int32 (B)");
  if (cu_seqlens_q) {
    PYARCH_CHECK(cu_seqlens_q->dim() == 1 && cu_seqlens_q->size(0) == batch + 1 &&
                     cu_seqlens_q->scalar_type() == ScalarType::Int,
                 "cu_seqlens_q: must be int32 (B+1)");
  } else {
    PYARCH_CHECK(total == batch, "q: without cu_seqlens_q must have one row per sequence");
  }
  PYARCH_CHECK(window_left >= -1 && window_right >= -1, "window: must be at least -1");
  PYARCH_CHECK(softcap >= 0, "softcap: must be at least 0");
  constexpr int64_t everything = int64_t{1} << 32;
  a.q = static_cast<const char*>(q.data_ptr());
  a.q_row = q.stride(0);
  a.q_head = q.stride(1);
  a.q_heads = q.size(1);
  a.group = a.q_heads / a.k.heads;
  a.table_stride = block_table.stride(1);
  a.left = window_left < 0 ? everything : std::min(window_left, everything);
  a.right = causal ? 0 : window_right < 0 ? everything : std::min(window_right, everything);
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  std::vector<float> sink(sinks ? a.q_heads : 0);
  if (sinks) {
    PYARCH_CHECK(sinks->dim() == 1 && sinks->size(0) == a.q_heads, "sinks: must be (q heads)");
    with_float_type(sinks->scalar_type(), "sinks", [&](auto tag) {
      const auto* p = static_cast<const decltype(tag)*>(sinks->data_ptr());
      for (int64_t h = 0; h < a.q_heads; ++h) sink[h] = to_float(p[h * sinks->stride(0)]);
    });
    a.sinks = sink.data();
  }
  std::vector<PagedSequence> prompts, few;
  for (const PagedSequence& s : check_values(a, total, block_table, seq_lens, cu_seqlens_q))
    (s.rows > 1 && s.rows * a.group >= kPromptLanes && a.k.dim <= 512 && s.low < s.high ? prompts : few)
        .push_back(s);
  Tensor out = empty({total, a.q_heads, a.k.dim}, q.scalar_type());
  Tensor lse = empty({total, a.q_heads}, ScalarType::Float);
  a.out = static_cast<char*>(out.data_ptr());
  a.lse = static_cast<float*>(lse.data_ptr());
  with_float_type(q.scalar_type(), "q", [&](auto tag) {
    using T = decltype(tag);
    const auto attend = [&](auto cached) {
      using C = decltype(cached);
      for (const PagedSequence& s : prompts) attend_prompt<T, C>(a, s);
      attend_few<T, C>(a, few);
    };
    caches.int8 ? attend(int8_t{}) : attend(T{});
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("paged_attention__cpu", TORCH_BOX(&paged_attention)); }

}  // namespace pyarch
