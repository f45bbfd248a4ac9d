// rotary_append: per token, q and k heads through fp32 scratch in L1 (norm, rotation), rounded once on the
// way out, k and v straight into their slots. Every index is checked before the first write.
#include "operators.h"
#include "paged_kv.h"
#include "tensor.h"
#include "types.h"
#include "vec.h"

namespace pyarch {
namespace {

constexpr int64_t kTaskFloats = 16384;  // a second thread costs more than less work than this

struct Norm {
  const void* weight;  // null: none
  bool wide;           // fp32, whatever the heads are
  float eps;
};

// f(i, lanes) for consecutive vectors over n; lanes < W in the last one only.
template <class Function>
void vectors(int64_t n, const Function& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T>
F some(const T* p, int lanes) {
  return lanes == W ? load(p) : load(p, lanes);
}
template <class T>
void put(T* p, F v, int lanes) {
  lanes == W ? store(p, v) : store(p, v, lanes);
}

template <class TW>
void scale_by(float* x, const TW* weight, float eps, int64_t dim) {
  F sum = zero();
  vectors(dim, [&](int64_t i, int lanes) {
    const F v = some(x + i, lanes);
    sum = fma(v, v, sum);
  });
  const F inverse = set1(1.0f / std::sqrt(hsum(sum) / static_cast<float>(dim) + eps));
  vectors(dim, [&](int64_t i, int lanes) {
    put(x + i, some(x + i, lanes) * inverse * some(weight + i, lanes), lanes);
  });
}

// One head: x (dim) -> y (dim). `wide` is scratch of 2 * dim floats.
template <class T>
void head(const T* x, T* y, const float* cos, const float* sin, const Norm& norm, bool interleaved,
          int64_t dim, float* wide) {
  const int64_t half = dim / 2;
  vectors(dim, [&](int64_t i, int lanes) { put(wide + i, some(x + i, lanes), lanes); });
  if (norm.weight && norm.wide) scale_by(wide, static_cast<const float*>(norm.weight), norm.eps, dim);
  if (norm.weight && !norm.wide) scale_by(wide, static_cast<const T*>(norm.weight), norm.eps, dim);
  if (!interleaved) {
    vectors(half, [&](int64_t i, int lanes) {
      const F a = some(wide + i, lanes), b = some(wide + half + i, lanes);
      const F c = some(cos + i, lanes), s = some(sin + i, lanes);
      put(y + i, a * c - b * s, lanes);
      put(y + half + i, b * c + a * s, lanes);
    });
    return;
  }
  float* turned = wide + dim;
  for (int64_t j = 0; j < half; ++j) {
    const float a = wide[2 * j], b = wide[2 * j + 1];
    turned[2 * j] = a * cos[j] - b * sin[j];
    turned[2 * j + 1] = b * cos[j] + a * sin[j];
  }
  vectors(dim, [&](int64_t i, int lanes) { put(y + i, some(turned + i, lanes), lanes); });
}

Norm norm_of(const std::optional<Tensor>& weight, const char* name, const Tensor& qkv, int64_t dim,
             double eps) {
  if (!weight) return {nullptr, false, 0};
  const bool wide = weight->scalar_type() == ScalarType::Float;
  PYARCH_CHECK(weight->dim() == 1 && weight->size(0) == dim && (dim == 1 || weight->stride(0) == 1), name,
               ": must be contiguous [head_dim]");
  PYARCH_CHECK(wide || weight->scalar_type() == qkv.scalar_type(), name, ": dtype must be qkv's or float32");
  return {weight->data_ptr(), wide, static_cast<float>(eps)};
}

const int64_t* indices(const Tensor& t, const char* name, int64_t tokens) {
  PYARCH_CHECK(t.dim() == 1 && t.size(0) == tokens && t.scalar_type() == ScalarType::Long &&
                   (tokens <= 1 || t.stride(0) == 1),
               name, ": must be contiguous int64 [tokens]");
  return static_cast<const int64_t*>(t.data_ptr());
}

const float* table(const Tensor& t, const char* name, int64_t positions, int64_t half) {
  PYARCH_CHECK(t.dim() == 2 && t.size(0) == positions && t.size(1) == half && t.is_contiguous() &&
                   t.scalar_type() == ScalarType::Float,
               name, ": must be contiguous float32 [max_positions, head_dim / 2]");
  return static_cast<const float*>(t.data_ptr());
}

}  // namespace

Tensor rotary_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache,
                     Tensor slot_mapping, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                     std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, int64_t num_heads,
                     bool interleaved, double eps) {
  const PagedCaches caches = paged_caches(k_cache, v_cache, k_scale, v_scale);
  const PagedCache &kc = caches.k, &vc = caches.v;
  const int64_t dim = kc.dim, kv_heads = kc.heads, half = dim / 2;
  PYARCH_CHECK(dim % 2 == 0, "k_cache: head_dim must be even");
  PYARCH_CHECK(qkv.dim() == 2 && num_heads >= 1 && num_heads <= qkv.size(1) &&
                   qkv.size(1) == (num_heads + 2 * kv_heads) * dim,
               "qkv: must be [tokens, (num_heads + 2 * kv_heads) * head_dim]");
  PYARCH_CHECK(qkv.numel() == 0 || qkv.stride(1) == 1, "qkv: the last dimension must be contiguous");
  PYARCH_CHECK(caches.suits(qkv.scalar_type(), k_cache), "qkv: must have k_cache's dtype, or that be int8");
  const int64_t tokens = qkv.size(0), step = qkv.stride(0);
  const int64_t limit = cos.dim() == 2 ? cos.size(0) : 0;
  const float *pc = table(cos, "cos", limit, half), *ps = table(sin, "sin", limit, half);
  const int64_t *at = indices(positions, "positions", tokens),
                *slots = indices(slot_mapping, "slot_mapping", tokens);
  const Norm qn = norm_of(q_norm, "q_norm", qkv, dim, eps), kn = norm_of(k_norm, "k_norm", qkv, dim, eps);
  const std::pair<const Tensor*, const char*> inputs[] = {{&qkv, "qkv"},
                                                          {&cos, "cos"},
                                                          {&sin, "sin"},
                                                          {&positions, "positions"},
                                                          {&slot_mapping, "slot_mapping"},
                                                          {q_norm ? &*q_norm : &cos, "q_norm"},
                                                          {k_norm ? &*k_norm : &cos, "k_norm"}};
  for (const auto& [t, name] : inputs)
    PYARCH_CHECK(!touches(caches, *t), name, ": must not share memory with the caches");
  for (int64_t t = 0; t < tokens; ++t)
    PYARCH_CHECK(at[t] >= 0 && at[t] < limit, "positions: entry ", t, " is ", at[t], ", allowed are 0 to ",
                 limit - 1);
  check_append(caches, slots, tokens);

  Tensor q = empty({tokens, num_heads, dim}, qkv.scalar_type());
  with_float_type(qkv.scalar_type(), "qkv", [&](auto tag) {
    using T = decltype(tag);
    const T* px = static_cast<const T*>(qkv.data_ptr());
    T* pq = static_cast<T*>(q.data_ptr());
    const int64_t row = qkv.size(1), block = std::max<int64_t>(1, kTaskFloats / row);
    parallel_tasks((tokens + block - 1) / block, [&](int64_t task) {
      struct Wide;
      float* wide = scratch<Wide, float>(2 * dim);
      struct Turned;
      T* turned = caches.int8 ? scratch<Turned, T>(kv_heads * dim) : nullptr;
      for (int64_t t = task * block; t < std::min(tokens, (task + 1) * block); ++t) {
        const float *c = pc + at[t] * half, *s = ps + at[t] * half;
        const T *x = px + t * step, *k = x + num_heads * dim, *v = k + kv_heads * dim;
        for (int64_t h = 0; h < num_heads; ++h)
          head(x + h * dim, pq + (t * num_heads + h) * dim, c, s, qn, interleaved, dim, wide);
        if (slots[t] < 0) continue;
        T* to = caches.int8 ? turned : reinterpret_cast<T*>(kc.data) + kc.offset(slots[t]);
        for (int64_t h = 0; h < kv_heads; ++h)
          head(k + h * dim, to + h * (caches.int8 ? dim : kc.head_stride), c, s, kn, interleaved, dim, wide);
        if (caches.int8) {
          round_slot(kc, caches.k_scale, slots[t], turned, dim);
          round_slot(vc, caches.v_scale, slots[t], v, dim);
        } else {
          write_slot(vc, slots[t], reinterpret_cast<const char*>(v), dim);
        }
      }
    });
  });
  return q;
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("rotary_append__cpu", TORCH_BOX(&rotary_append)); }

}  // namespace pyarch
