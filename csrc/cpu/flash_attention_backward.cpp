// flash_attention_backward: checks, and the division into tasks (flash_attention_backward_task.h).
#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "flash_attention_backward_task.h"
#include "flash_attention_call.h"

namespace pyarch {
namespace {

using namespace flash;

constexpr int64_t kGrain = 256;
constexpr int64_t kParts = 32;  // tasks that a small batch is divided into; each has a dQ of its own head

struct Piece {  // of the work: keys of one head
  int64_t first, last;
  float* parts;
};

struct Head {
  const Sequence* sequence;
  int64_t kv_head, tiles;
  float* parts;
  int64_t span, count, step;  // keys of a part, parts, floats of a part
};

// Which pieces add to the same elements of the bias's gradient, and follow one another.
std::array<int64_t, 3> group_of(const Tensor* bias, bool packed, int64_t chunk, int64_t sequence,
                                int64_t head) {
  if (!bias) return {chunk, sequence, head};
  const bool rows = bias->size(2) > 1, keys = bias->size(3) > 1;
  return {keys ? chunk : 0, bias->size(0) > 1 || (packed && (rows || keys)) ? sequence : 0,
          bias->size(1) > 1 ? head : 0};
}

template <class T>
void run(const Call<T>& call, const Gradient<T>& gradient, const std::vector<Sequence>& sequences,
         bool packed, const Tensor* d_bias, bool exact, float* d_sinks) {
  using Work = Backward<T, DotOf<T>>;
  const int64_t heads = static_cast<int64_t>(sequences.size()) * gradient.kv_heads;
  std::vector<Head> all;
  int64_t work = 0, floats = 0, tiles = 0;
  for (const Sequence& s : sequences) {
    const int64_t n = (s.q_length * call.group + kRows - 1) / kRows, step = n * Work::part_size(call);
    // Parts begin at multiples of kGrain keys; a tile of rows shall lie in few of them.
    const int64_t least = Work::narrow(call) ? round_up(Work::width(call), kGrain) : kGrain;
    const int64_t most = std::max<int64_t>(1, (s.k_length + least - 1) / least);
    const int64_t wanted = std::min((kParts + heads - 1) / std::max<int64_t>(heads, 1), most);
    const int64_t grains = (s.k_length + kGrain - 1) / kGrain;
    const int64_t span = std::max<int64_t>((grains + wanted - 1) / wanted, 1) * kGrain;
    const int64_t count = (s.k_length + span - 1) / span;
    for (int64_t h = 0; h < gradient.kv_heads; ++h) {
      all.push_back({&s, h, n, nullptr, span, count, step});
      floats += count * step, tiles += n;
    }
    work += s.q_length * call.heads * (s.k_length + 1) * (call.head_dim + call.value_dim);
  }
  Tensor memory = empty({floats}, ScalarType::Float);
  float* next = static_cast<float*>(memory.data_ptr());
  std::map<std::array<int64_t, 3>, std::vector<std::pair<const Head*, Piece>>> groups;
  std::vector<std::pair<const Head*, int64_t>> tile_of;
  for (Head& head : all) {
    head.parts = next;
    next += head.count * head.step;
    for (int64_t n = 0; n < head.count; ++n)
      groups[group_of(d_bias, packed, n, head.sequence - sequences.data(), head.kv_head)].push_back(
          {&head,
           {n * head.span, std::min((n + 1) * head.span, head.sequence->k_length),
            head.parts + n * head.step}});
    for (int64_t n = 0; n < head.tiles; ++n) tile_of.push_back({&head, n});
  }
  std::vector<const std::vector<std::pair<const Head*, Piece>>*> pieces;  // many rows may see the first keys
  for (const auto& group : groups) pieces.push_back(&group.second);

  const auto each = [&](int64_t count, const auto& f) {
    if (work >= kSerialWork) return parallel_tasks(count, f);
    for (int64_t i = 0; i < count; ++i) f(i);
  };
  each(tiles, [&](int64_t i) {
    const auto& [head, n] = tile_of[i];
    Work(call, gradient, *head->sequence, head->kv_head).weigh(n, exact);
  });
  each(static_cast<int64_t>(pieces.size()), [&](int64_t i) {
    for (const auto& [head, piece] : *pieces[i])
      Work(call, gradient, *head->sequence, head->kv_head).run(piece.first, piece.last, piece.parts);
  });
  each(tiles, [&](int64_t i) {
    const auto& [head, n] = tile_of[i];
    Work(call, gradient, *head->sequence, head->kv_head).finish(n, head->parts, head->span, head->step);
  });
  if (!d_sinks) return;
  const int64_t batch = packed ? 1 : static_cast<int64_t>(sequences.size());
  each(call.heads, [&](int64_t h) {
    double sum = 0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = (b * call.heads + h) * call.rows, end = i + call.rows; i < end; ++i)
        if (gradient.lse[i] != -kInf) sum += std::exp(call.sinks[h] - gradient.lse[i]) * gradient.inner[i];
    d_sinks[h] = static_cast<float>(sum);
  });
}

Tensor zeros_like(const Tensor& x) {
  Tensor made = x.dim() == 1   ? empty({x.size(0)}, ScalarType::Float)
                : x.dim() == 2 ? empty({x.size(0), x.size(1)}, ScalarType::Float)
                               : empty({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Float);
  if (made.numel() > 0) std::fill_n(static_cast<float*>(made.data_ptr()), made.numel(), 0.0f);
  return made;
}

// The sum over the rows of every sequence and head, or of every head.
void sum_slopes(const Tensor& each, const std::vector<Sequence>& sequences, const Tensor& d_slopes) {
  const int64_t heads = each.size(1), rows = each.size(2), step = d_slopes.dim() == 2 ? heads : 0;
  std::vector<double> sums(d_slopes.numel());
  const float* p = static_cast<const float*>(each.data_ptr());
  for (const Sequence& s : sequences)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < s.q_length; ++i)
        sums[s.index * step + h] += p[(s.batch * heads + h) * rows + s.q_start + i];
  std::copy(sums.begin(), sums.end(), static_cast<float*>(d_slopes.data_ptr()));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> flash_attention_backward(
    Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> sinks, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::optional<Tensor> slopes, std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k,
    std::optional<Tensor> seed, int64_t left, int64_t right, double softcap, double scale, double dropout_p,
    bool bias_gradient, bool slopes_gradient) {
  const Arguments arguments{q,    k,    v,     sinks,   bias,  mask,     slopes, cu_seqlens_q, cu_seqlens_k,
                            seed, left, right, softcap, scale, dropout_p};
  const std::vector<Sequence> sequences = check(arguments);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2);
  const auto check_rows = [&](const char* name, const Tensor& x) {
    PYARCH_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == rows &&
                     x.size(3) == v.size(3) && x.scalar_type() == q.scalar_type(),
                 name, ": must be (B, H, Sq, Dv) of q's dtype");
  };
  const auto check_numbers = [&](const char* name, const Tensor& x) {
    PYARCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == heads && x.size(2) == rows &&
                     x.is_contiguous() && x.scalar_type() == ScalarType::Float,
                 name, ": must be contiguous fp32 (B, H, Sq)");
  };
  check_rows("d_out", d_out), check_rows("out", out);
  check_numbers("d_lse", d_lse), check_numbers("lse", lse);
  PYARCH_CHECK(bias || !bias_gradient, "bias: its gradient needs it");
  PYARCH_CHECK(slopes || !slopes_gradient, "alibi_slopes: their gradient needs them");

  const auto none = [] { return empty({0}, ScalarType::Float); };
  Tensor d_q = empty({batch, heads, rows, q.size(3)}, q.scalar_type());
  Tensor d_k = empty({batch, k.size(1), k.size(2), k.size(3)}, q.scalar_type());
  Tensor d_v = empty({batch, k.size(1), k.size(2), v.size(3)}, q.scalar_type());
  Tensor d_sinks = sinks ? zeros_like(*sinks) : none(), d_bias = bias_gradient ? zeros_like(*bias) : none();
  Tensor d_slopes = slopes_gradient ? zeros_like(*slopes) : none();
  Tensor inner = empty({batch, heads, rows}, ScalarType::Float);
  Tensor each = slopes_gradient ? empty({batch, heads, rows}, ScalarType::Float) : none();
  with_float_type(q.scalar_type(), "q", [&](auto tag) {
    using T = decltype(tag);
    Gradient<T> g{};
    g.d_out = static_cast<const T*>(d_out.data_ptr()), g.d_out_strides = strides_of(d_out);
    g.out = static_cast<const T*>(out.data_ptr()), g.out_strides = strides_of(out);
    g.lse = static_cast<const float*>(lse.data_ptr()), g.d_lse = static_cast<const float*>(d_lse.data_ptr());
    g.inner = static_cast<float*>(inner.data_ptr());
    g.d_slopes = slopes_gradient ? static_cast<float*>(each.data_ptr()) : nullptr;
    g.d_bias = bias_gradient ? static_cast<float*>(d_bias.data_ptr()) : nullptr;
    if (bias_gradient) g.d_bias_strides = check_broadcast("bias", d_bias, q, k);
    g.d_q = static_cast<T*>(d_q.data_ptr()), g.d_k = static_cast<T*>(d_k.data_ptr());
    g.d_v = static_cast<T*>(d_v.data_ptr()), g.kv_heads = k.size(1), g.keys = k.size(2);
    // The gradient of an fp32 bias is the one result that may have more digits than a 16-bit out.
    run(call_of<T>(arguments), g, sequences, cu_seqlens_q.has_value(), bias_gradient ? &d_bias : nullptr,
        bias_gradient && sizeof(T) == 2 && bias->scalar_type() == ScalarType::Float,
        sinks ? static_cast<float*>(d_sinks.data_ptr()) : nullptr);
  });
  if (slopes_gradient) sum_slopes(each, sequences, d_slopes);
  return {d_q, d_k, d_v, d_sinks, d_bias, d_slopes};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) {
  m.impl("flash_attention_backward__cpu", TORCH_BOX(&flash_attention_backward));
}

}  // namespace pyarch
