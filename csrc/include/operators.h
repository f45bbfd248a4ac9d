// The CPU operators that others call as functions: the ops' own, with their checks (csrc/cpu/<op>.cpp).
#pragma once

#include <tuple>

#include "tensor.h"

namespace pyarch {

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, std::optional<Tensor> residual, double eps);

Tensor quant_matmul(Tensor x, Tensor q, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> offset, std::optional<Tensor> g_idx, std::optional<Tensor> bias,
                    int64_t out_features, int64_t group_size, int64_t act_bits, int64_t activation,
                    double slope);

Tensor rotary_append(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor k_cache, Tensor v_cache,
                     Tensor slot_mapping, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                     std::optional<Tensor> k_scale, std::optional<Tensor> v_scale, int64_t num_heads,
                     bool interleaved, double eps);

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                                           Tensor seq_lens, std::optional<Tensor> cu_seqlens_q,
                                           std::optional<Tensor> sinks, std::optional<Tensor> k_scale,
                                           std::optional<Tensor> v_scale, bool causal, int64_t window_left,
                                           int64_t window_right, double softcap, double scale);

Tensor swiglu(Tensor x);

}  // namespace pyarch
