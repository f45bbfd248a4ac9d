// decoder_block: the nine operators of a decoder layer in one call (pyarch/nn/block.py), for single tokens,
// where calls through torch's dispatcher cost more than the arithmetic between the matmuls. Each is the
// operator itself, with all of its checks.
#include <tuple>
#include <vector>

#include "operators.h"

namespace pyarch {
namespace {

// Names of the entries of decoder_block's lists.
enum : size_t {
  kNorm,
  kMlpNorm,
  kQNorm,
  kKNorm,
  kMatmuls,
  kTensorsOfMatmul = 6,
  kTensors = kMatmuls + 4 * kTensorsOfMatmul
};
enum : size_t { kHeads, kCausal, kLeft, kRight, kSizesOfMatmul, kSizes = kSizesOfMatmul + 4 * 4 };
enum : size_t { kEps, kMlpEps, kHeadEps, kSoftcap, kScale, kSlopes, kNumbers = kSlopes + 4 };

using Tensors = std::vector<std::optional<Tensor>>;

// x (T, H, D), contiguous, as (T, H * D).
Tensor rows(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(1) * x.size(2)}, strides[] = {std::max<int64_t>(sizes[1], 1), 1};
  AtenTensorHandle handle;
  if (aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &handle) != 0)
    fail("x: cannot be viewed as rows");
  return Tensor(handle);
}

}  // namespace

std::tuple<Tensor, Tensor> decoder_block(Tensor x, std::optional<Tensor> residual, Tensor cos, Tensor sin,
                                         Tensor positions, Tensor k_cache, Tensor v_cache,
                                         Tensor slot_mapping, Tensor block_table, Tensor seq_lens,
                                         std::optional<Tensor> cu_seqlens_q, bool interleaved,
                                         Tensors tensors, std::vector<int64_t> sizes,
                                         std::vector<double> numbers) {
  PYARCH_CHECK(tensors.size() == kTensors, "tensors: must be ", kTensors, ", not ", tensors.size());
  PYARCH_CHECK(sizes.size() == kSizes, "sizes: must be ", kSizes, ", not ", sizes.size());
  PYARCH_CHECK(numbers.size() == kNumbers, "numbers: must be ", kNumbers, ", not ", numbers.size());
  const auto needed = [&](size_t i) {
    PYARCH_CHECK(tensors[i], "tensors: entry ", i, " must not be None");
    return *tensors[i];
  };
  const auto matmul = [&](size_t i, const Tensor& a) {
    const size_t t = kMatmuls + i * kTensorsOfMatmul;
    const int64_t* n = &sizes[kSizesOfMatmul + i * 4];
    return quant_matmul(a, needed(t), needed(t + 1), tensors[t + 2], tensors[t + 3], tensors[t + 4],
                        tensors[t + 5], n[0], n[1], n[2], n[3], numbers[kSlopes + i]);
  };
  const auto [normed, total] = rms_norm(x, needed(kNorm), residual, numbers[kEps]);
  const Tensor q =
      rotary_append(matmul(0, normed), cos, sin, positions, k_cache, v_cache, slot_mapping, tensors[kQNorm],
                    tensors[kKNorm], sizes[kHeads], interleaved, numbers[kHeadEps]);
  const auto [attended, lse] =
      paged_attention(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, std::nullopt,
                      sizes[kCausal] != 0, sizes[kLeft], sizes[kRight], numbers[kSoftcap], numbers[kScale]);
  auto [y, sum] =
      rms_norm(matmul(1, rows(attended)), needed(kMlpNorm), residual ? total : x, numbers[kMlpEps]);
  return {matmul(3, swiglu(matmul(2, y))), sum};
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("decoder_block__cpu", TORCH_BOX(&decoder_block)); }

}  // namespace pyarch
