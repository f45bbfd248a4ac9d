// decoder_blocks: the layers of a decoder in one call (pyarch/nn/block.py), for single tokens, where calls
// through torch's dispatcher cost more than the arithmetic between the matmuls. A layer is its nine
// operators, each with all of its checks.
//
// Weights are most of what a token reads, and memory would be idle while one thread does what lies between
// two matmuls. So the threads form a team for the whole call, and those with nothing to do fetch the weights
// of the matmuls to come into their caches.
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "operators.h"

namespace pyarch {
namespace {

// Names of the entries of a layer in the lists of keep_decoder_blocks.
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
constexpr int64_t kLine = 64;
constexpr int64_t kStep = 16 * kLine;  // bytes fetched between two looks for work
constexpr int64_t kAhead = 768 << 10;  // bytes fetched ahead of the matmul: they must stay in an L2 cache

struct Matmul {
  Tensor q, scale;
  std::optional<Tensor> zero, offset, g_idx, bias;
  int64_t out_features, group_size, act_bits, activation;
  double slope;

  Tensor operator()(const Tensor& x) const {
    return quant_matmul(x, q, scale, zero, offset, g_idx, bias, out_features, group_size, act_bits,
                        activation, slope);
  }
};

struct Layer {
  Tensor norm, mlp_norm;
  std::optional<Tensor> q_norm, k_norm;
  int64_t heads, left, right;
  bool causal;
  double eps, mlp_eps, head_eps, softcap, scale;
  Matmul qkv, out, gate_up, down;
};

struct Memory {
  const char* data;       // only ever prefetched: a tensor may have got other memory since
  int64_t bytes, matmul;  // of which matmul, counted through the layers
};

struct Layers {
  std::vector<Layer> layers;
  std::vector<Memory> weights;  // in the order of their use
};

// What keep_decoder_blocks keeps, by the numbers that it returned.
std::mutex kept_mutex;
std::map<int64_t, std::shared_ptr<const Layers>> kept;

// Fetches weights in order, every `stride`-th step of them, not too far ahead of the matmul that is next.
class Fetcher {
 public:
  Fetcher(const std::vector<Memory>& weights, const std::atomic<int64_t>& next, int64_t first, int64_t stride)
      : weights_(weights), next_(next), first_(first * kStep), stride_(stride * kStep), done_(first_) {}

  void operator()() {
    const int64_t next = next_.load(std::memory_order_relaxed);
    if (next != seen_) seen_ = next, ahead_ = 0;
    while (at_ < weights_.size() && (weights_[at_].matmul < next || done_ >= weights_[at_].bytes))
      ++at_, done_ = first_;
    if (at_ == weights_.size() || ahead_ >= kAhead) return pause();
    const Memory& memory = weights_[at_];
    const int64_t end = std::min(done_ + kStep, memory.bytes);
    for (int64_t i = done_; i < end; i += kLine) __builtin_prefetch(memory.data + i, 0, 3);
    ahead_ += kStep, done_ += stride_;
  }

 private:
  const std::vector<Memory>& weights_;
  const std::atomic<int64_t>& next_;
  const int64_t first_, stride_;
  size_t at_ = 0;
  int64_t done_, ahead_ = 0, seen_ = -1;
};

// x (T, H, D), contiguous, as (T, H * D).
Tensor rows(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(1) * x.size(2)}, strides[] = {std::max<int64_t>(sizes[1], 1), 1};
  AtenTensorHandle handle;
  if (aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &handle) != 0)
    fail("x: cannot be viewed as rows");
  return Tensor(handle);
}

// x[i] of a cache of several layers, or of its scales.
Tensor select(const Tensor& x, int64_t i) {
  int64_t sizes[4], strides[4];
  const int64_t rank = x.dim() - 1;
  for (int64_t d = 0; d < rank; ++d) sizes[d] = x.size(d + 1), strides[d] = x.stride(d + 1);
  AtenTensorHandle handle;
  if (aoti_torch__reinterpret_tensor(x.get(), rank, sizes, strides, x.storage_offset() + i * x.stride(0),
                                     &handle) != 0)
    fail("k_cache: has no layer ", i);
  return Tensor(handle);
}

int64_t keep_decoder_blocks(Tensors tensors, std::vector<int64_t> sizes, std::vector<double> numbers) {
  const size_t count = tensors.size() / kTensors;
  PYARCH_CHECK(tensors.size() == count * kTensors, "tensors: must be ", kTensors, " a layer, not ",
               tensors.size());
  PYARCH_CHECK(sizes.size() == count * kSizes, "sizes: must be ", kSizes, " a layer, not ", sizes.size());
  PYARCH_CHECK(numbers.size() == count * kNumbers, "numbers: must be ", kNumbers, " a layer, not ",
               numbers.size());
  auto made = std::make_shared<Layers>();
  for (const auto& t : tensors) PYARCH_CHECK(!t || t->is_cpu(), "tensors: must be on the CPU");
  for (size_t i = 0; i < count; ++i) {
    const auto* t = &tensors[i * kTensors];
    const int64_t* s = &sizes[i * kSizes];
    const double* n = &numbers[i * kNumbers];
    const auto needed = [&](size_t at) {
      PYARCH_CHECK(t[at], "tensors: entry ", at, " of a layer must not be None");
      return *t[at];
    };
    const auto matmul = [&](size_t m) -> Matmul {
      const size_t at = kMatmuls + m * kTensorsOfMatmul;
      const int64_t* k = s + kSizesOfMatmul + m * 4;
      for (size_t j : {at, at + 1, at + 2, at + 3})
        if (t[j])
          made->weights.push_back({static_cast<const char*>(t[j]->data_ptr()),
                                   static_cast<int64_t>(t[j]->numel() * t[j]->element_size()),
                                   static_cast<int64_t>(i * 4 + m)});
      return {needed(at), needed(at + 1), t[at + 2], t[at + 3], t[at + 4],     t[at + 5],
              k[0],       k[1],           k[2],      k[3],      n[kSlopes + m]};
    };
    made->layers.push_back({needed(kNorm), needed(kMlpNorm), t[kQNorm], t[kKNorm], s[kHeads], s[kLeft],
                            s[kRight], s[kCausal] != 0, n[kEps], n[kMlpEps], n[kHeadEps], n[kSoftcap],
                            n[kScale], matmul(0), matmul(1), matmul(2), matmul(3)});
  }
  static int64_t last = 0;
  const std::lock_guard lock(kept_mutex);
  kept.emplace(++last, std::move(made));
  return last;
}

void drop_decoder_blocks(int64_t layers) {
  const std::lock_guard lock(kept_mutex);
  PYARCH_CHECK(kept.erase(layers), "layers: none are kept as ", layers);
}

std::shared_ptr<const Layers> find(int64_t layers) {
  const std::lock_guard lock(kept_mutex);
  const auto found = kept.find(layers);
  PYARCH_CHECK(found != kept.end(), "layers: none are kept as ", layers);
  return found->second;
}

}  // namespace

std::tuple<Tensor, Tensor> decoder_blocks(Tensor x, std::optional<Tensor> residual, Tensor cos, Tensor sin,
                                          Tensor positions, Tensor k_cache, Tensor v_cache,
                                          std::optional<Tensor> k_scale, std::optional<Tensor> v_scale,
                                          Tensor slot_mapping, Tensor block_table, Tensor seq_lens,
                                          std::optional<Tensor> cu_seqlens_q, bool interleaved,
                                          int64_t layers, int64_t first) {
  const std::shared_ptr<const Layers> found = find(layers);
  const int64_t count = static_cast<int64_t>(found->layers.size());
  const auto check_layers = [&](const Tensor& x, int64_t rank, const char* name) {
    PYARCH_CHECK(x.dim() == rank && first >= 0 && first <= x.size(0) - count, name, ": must have layers ",
                 first, " to ", first + count);
  };
  check_layers(k_cache, 5, "k_cache"), check_layers(v_cache, 5, "v_cache");
  if (k_scale) check_layers(*k_scale, 4, "k_scale");
  if (v_scale) check_layers(*v_scale, 4, "v_scale");
  const auto layer_of = [](const std::optional<Tensor>& x, int64_t i) {
    return x ? std::optional(select(*x, i)) : std::nullopt;
  };
  std::atomic<int64_t> next{0};
  const auto matmul = [&](const Matmul& m, const Tensor& a) {
    next.fetch_add(1, std::memory_order_relaxed);
    return m(a);
  };
  const auto work = [&] {
    for (int64_t i = 0; i < count; ++i) {
      const Layer& l = found->layers[i];
      const Tensor k = select(k_cache, first + i), v = select(v_cache, first + i);
      const std::optional<Tensor> ks = layer_of(k_scale, first + i), vs = layer_of(v_scale, first + i);
      auto [normed, total] = rms_norm(x, l.norm, residual, l.eps);
      const Tensor q = rotary_append(matmul(l.qkv, normed), cos, sin, positions, k, v, slot_mapping, l.q_norm,
                                     l.k_norm, ks, vs, l.heads, interleaved, l.head_eps);
      const auto [attended, lse] = paged_attention(q, k, v, block_table, seq_lens, cu_seqlens_q, std::nullopt,
                                                   ks, vs, l.causal, l.left, l.right, l.softcap, l.scale);
      auto [y, sum] = rms_norm(matmul(l.out, rows(attended)), l.mlp_norm, residual ? total : x, l.mlp_eps);
      x = matmul(l.down, swiglu(matmul(l.gate_up, y)));
      residual = sum;
    }
  };
  Team::gather(work, [&](int64_t i, int64_t n) { return Fetcher(found->weights, next, i, n); });
  return {x, *residual};
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("decoder_blocks__cpu", TORCH_BOX(&decoder_blocks)); }

STABLE_TORCH_LIBRARY_IMPL(pyarch, CompositeExplicitAutograd, m) {
  m.impl("keep_decoder_blocks", TORCH_BOX(&keep_decoder_blocks));
  m.impl("drop_decoder_blocks", TORCH_BOX(&drop_decoder_blocks));
}

}  // namespace pyarch
