// The arguments that flash attention and its gradient have in common: checked before anything is written, and
// as the tasks read them.
#pragma once

#include <algorithm>
#include <vector>

#include "flash_attention_block.h"
#include "types.h"

namespace pyarch::flash {

constexpr int64_t kSerialWork =
    1 << 20;  // multiply-adds under which a second thread costs more than it brings
constexpr int64_t kUnbounded = int64_t{1} << 40;

#if defined(__AVX512BF16__)
template <class T>
using DotOf = std::conditional_t<std::is_same_v<T, bf16>, Pair, Single>;
#else
template <class T>
using DotOf = Single;
#endif

inline Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}; }

// Of an operand that broadcasts to (B, H, Sq, Sk), with stride 0 where it does.
inline Strides check_broadcast(const char* name, const Tensor& x, const Tensor& q, const Tensor& k) {
  const auto fits = [&](int64_t d, int64_t n) { return x.size(d) == 1 || x.size(d) == n; };
  PYARCH_CHECK(
      x.dim() == 4 && fits(0, q.size(0)) && fits(1, q.size(1)) && fits(2, q.size(2)) && fits(3, k.size(2)),
      name, ": must have 4 dimensions and broadcast to (B, H, Sq, Sk)");
  const auto step = [&](int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); };
  return {step(0), step(1), step(2), step(3)};
}

inline const int32_t* check_cu_seqlens(const char* name, const Tensor& x, int64_t total) {
  PYARCH_CHECK(x.dim() == 1 && x.size(0) >= 1 && x.is_contiguous() && x.scalar_type() == ScalarType::Int,
               name, ": must be a contiguous int32 vector");
  const int32_t* p = static_cast<const int32_t*>(x.data_ptr());
  PYARCH_CHECK(p[0] == 0, name, ": must begin with 0, not ", p[0]);
  for (int64_t i = 1; i < x.size(0); ++i)
    PYARCH_CHECK(p[i] >= p[i - 1], name, ": must not decrease, but goes from ", p[i - 1], " to ", p[i]);
  PYARCH_CHECK(p[x.size(0) - 1] == total, name, ": must end with the number of rows ", total, ", not ",
               p[x.size(0) - 1]);
  return p;
}

inline std::vector<Sequence> sequences_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& cu_q,
                                          const std::optional<Tensor>& cu_k) {
  PYARCH_CHECK(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q, cu_seqlens_k: both or neither");
  std::vector<Sequence> all;
  if (!cu_q) {
    for (int64_t b = 0; b < q.size(0); ++b) all.push_back({b, b, 0, q.size(2), 0, k.size(2)});
    return all;
  }
  PYARCH_CHECK(q.size(0) == 1, "q: must have batch 1 with cu_seqlens_q");
  const int32_t* pq = check_cu_seqlens("cu_seqlens_q", *cu_q, q.size(2));
  const int32_t* pk = check_cu_seqlens("cu_seqlens_k", *cu_k, k.size(2));
  PYARCH_CHECK(cu_q->size(0) == cu_k->size(0), "cu_seqlens_k: must be as long as cu_seqlens_q");
  for (int64_t i = 0; i + 1 < cu_q->size(0); ++i)
    all.push_back({0, i, pq[i], pq[i + 1] - pq[i], pk[i], pk[i + 1] - pk[i]});
  return all;
}

struct Arguments {
  const Tensor &q, &k, &v;
  const std::optional<Tensor>&sinks, &bias, &mask, &slopes, &cu_seqlens_q, &cu_seqlens_k, &seed;
  int64_t left, right;
  double softcap, scale, dropout_p;
};

inline std::vector<Sequence> check(const Arguments& a) {
  const auto& [q, k, v, sinks, bias, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, left, right, softcap,
               scale, dropout_p] = a;
  PYARCH_CHECK(q.dim() == 4, "q: must be (B, H, Sq, D)");
  PYARCH_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3),
               "k: must be (B, Hkv, Sk, D)");
  PYARCH_CHECK(v.dim() == 4 && v.size(0) == q.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
               "v: must be (B, Hkv, Sk, Dv)");
  const int64_t heads = q.size(1), kv_heads = k.size(1);
  PYARCH_CHECK(q.size(3) >= 1 && q.size(3) <= 512, "q: head size must be 1 to 512, not ", q.size(3));
  PYARCH_CHECK(v.size(3) >= 1 && v.size(3) <= 512, "v: head size must be 1 to 512, not ", v.size(3));
  PYARCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, "q: heads must be a multiple of k's");
  PYARCH_CHECK(k.scalar_type() == q.scalar_type(), "k: dtype must be q's");
  PYARCH_CHECK(v.scalar_type() == q.scalar_type(), "v: dtype must be q's");
  PYARCH_CHECK(left >= -1 && right >= -1, "window: must be at least -1");
  PYARCH_CHECK(dropout_p >= 0 && dropout_p < 1, "dropout_p: must be at least 0 and below 1, not ", dropout_p);
  PYARCH_CHECK(seed || dropout_p == 0, "seed: dropout needs it");
  if (seed)
    PYARCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                 "seed: must be one int64 element");
  const std::vector<Sequence> sequences = sequences_of(q, k, cu_seqlens_q, cu_seqlens_k);
  if (sinks)
    PYARCH_CHECK(sinks->dim() == 1 && sinks->size(0) == heads && sinks->is_contiguous() &&
                     sinks->scalar_type() == ScalarType::Float,
                 "sinks: must be contiguous fp32 (H)");
  if (slopes)
    PYARCH_CHECK((slopes->dim() == 1 ||
                  (slopes->dim() == 2 && slopes->size(0) == static_cast<int64_t>(sequences.size()))) &&
                     slopes->size(slopes->dim() - 1) == heads && slopes->is_contiguous() &&
                     slopes->scalar_type() == ScalarType::Float,
                 "alibi_slopes: must be contiguous fp32 (H) or (sequences, H)");
  if (bias)
    PYARCH_CHECK(bias->scalar_type() == q.scalar_type() || bias->scalar_type() == ScalarType::Float,
                 "bias: dtype must be q's or float32");
  if (mask) PYARCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: dtype must be bool");
  if (bias) check_broadcast("bias", *bias, q, k);
  if (mask) check_broadcast("mask", *mask, q, k);
  return sequences;
}

// Without what is written.
template <class T>
Call<T> call_of(const Arguments& a) {
  const auto& [q, k, v, sinks, bias, mask, slopes, cu_seqlens_q, cu_seqlens_k, seed, left, right, softcap,
               scale, dropout_p] = a;
  Call<T> call{};
  call.q = static_cast<const T*>(q.data_ptr()), call.q_strides = strides_of(q);
  call.k = static_cast<const T*>(k.data_ptr()), call.k_strides = strides_of(k);
  call.v = static_cast<const T*>(v.data_ptr()), call.v_strides = strides_of(v);
  call.bias = bias ? bias->data_ptr() : nullptr,
  call.bias_strides = bias ? check_broadcast("bias", *bias, q, k) : Strides{};
  call.bias_is_fp32 = bias && bias->scalar_type() == ScalarType::Float;
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr,
  call.mask_strides = mask ? check_broadcast("mask", *mask, q, k) : Strides{};
  call.sinks = sinks ? static_cast<const float*>(sinks->data_ptr()) : nullptr;
  call.slopes = slopes ? static_cast<const float*>(slopes->data_ptr()) : nullptr;
  call.slopes_stride = slopes && slopes->dim() == 2 ? q.size(1) : 0;
  call.heads = q.size(1), call.group = k.size(1) > 0 ? q.size(1) / k.size(1) : 0, call.rows = q.size(2);
  call.head_step = q.size(2), call.row_step = 1;
  call.head_dim = q.size(3), call.value_dim = v.size(3);
  call.left = left < 0 ? kUnbounded : std::min(left, kUnbounded);
  call.right = right < 0 ? kUnbounded : std::min(right, kUnbounded);
  call.scale = static_cast<float>(scale), call.softcap = static_cast<float>(softcap);
  if (dropout_p > 0) {
    const uint64_t number = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    call.dropout.on = true, call.dropout.scale = static_cast<float>(1 / (1 - dropout_p));
    call.dropout.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 65536), 65535.0));
    call.dropout.low = static_cast<uint32_t>(number), call.dropout.high = static_cast<uint32_t>(number >> 32);
  }
  return call;
}

}  // namespace pyarch::flash
