// flash_attention: the division into tasks (flash_attention_task.h).
#include <algorithm>
#include <vector>

#include "flash_attention_call.h"
#include "flash_attention_task.h"

namespace pyarch {
namespace {

using namespace flash;

struct Piece {  // of the work: a task
  int32_t sequence, kv_head;
  int64_t first_row;
};

}  // namespace

namespace flash {

template <class T>
void run(const Call<T>& call, const std::vector<Sequence>& sequences, int64_t kv_heads) {
  using Work = Task<T, DotOf<T>>;
  int64_t work = 0, tiles = 0;
  for (const Sequence& s : sequences) {
    work += s.q_length * call.heads * (s.k_length + 1) * (call.head_dim + call.value_dim);
    tiles += (s.q_length * call.group + kRows - 1) / kRows * kv_heads;
  }
  // Few tiles go to as many tasks; of many, some share the packing of keys and values. Both give the same
  // bits.
  const int64_t threads = thread_count();
  const int64_t step = std::clamp<int64_t>(tiles / (4 * threads), 1, Work::kTiles) * kRows;
  std::vector<Piece> pieces;
  for (size_t n = 0; n < sequences.size(); ++n)
    // Keys and values of one head stay in the cache for all its rows; later rows may see more keys and come
    // first.
    for (int64_t h = 0; h < kv_heads; ++h)
      for (int64_t i = (sequences[n].q_length * call.group + step - 1) / step - 1; i >= 0; --i)
        pieces.push_back({static_cast<int32_t>(n), static_cast<int32_t>(h), i * step});
  const auto one = [&](int64_t i) {
    const Piece& piece = pieces[i];
    const Sequence& s = sequences[piece.sequence];
    const int64_t rows = std::min(step, s.q_length * call.group - piece.first_row);
    Work(call, s, piece.kv_head, piece.first_row, rows).run();
  };
  const int64_t count = static_cast<int64_t>(pieces.size());
  if (work < kSerialWork)
    for (int64_t i = 0; i < count; ++i) one(i);
  else
    parallel_tasks(count, one);
}

template void run(const Call<float>&, const std::vector<Sequence>&, int64_t);
template void run(const Call<bf16>&, const std::vector<Sequence>&, int64_t);
template void run(const Call<fp16>&, const std::vector<Sequence>&, int64_t);

}  // namespace flash

namespace {

std::tuple<Tensor, Tensor> flash_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                           std::optional<Tensor> bias, std::optional<Tensor> mask,
                                           std::optional<Tensor> slopes, std::optional<Tensor> cu_seqlens_q,
                                           std::optional<Tensor> cu_seqlens_k, std::optional<Tensor> seed,
                                           int64_t left, int64_t right, double softcap, double scale,
                                           double dropout_p) {
  const Arguments arguments{q,    k,    v,     sinks,   bias,  mask,     slopes, cu_seqlens_q, cu_seqlens_k,
                            seed, left, right, softcap, scale, dropout_p};
  const std::vector<Sequence> sequences = check(arguments);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2);
  Tensor out = empty({batch, heads, rows, v.size(3)}, q.scalar_type());
  Tensor lse = empty({batch, heads, rows}, ScalarType::Float);
  if (batch * heads * rows == 0) return {out, lse};
  with_float_type(q.scalar_type(), "q", [&](auto tag) {
    using T = decltype(tag);
    Call<T> call = call_of<T>(arguments);
    call.out = static_cast<T*>(out.data_ptr()), call.lse = static_cast<float*>(lse.data_ptr());
    run(call, sequences, k.size(1));
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("flash_attention__cpu", TORCH_BOX(&flash_attention)); }

}  // namespace pyarch
