// The CUDA operators: each rechecks what memory safety needs, then queues its kernel on the current stream of
// the tensors' GPU. Compiled by g++ against torch's stable ABI; the kernels know nothing of torch.
#include "on_device.h"
#include "paged_kv.h"
#include "quant_matmul.h"

namespace pyarch {
namespace {

// What the kernels call the type, or -1.
int64_t type_of(ScalarType dtype) {
  return dtype == ScalarType::Float      ? 0
         : dtype == ScalarType::BFloat16 ? 1
         : dtype == ScalarType::Half     ? 2
                                         : -1;
}

// The memory and the strides of the scales of int8 caches; null where the caches are not int8.
float* scales_of(const std::optional<Tensor>& scales, const char* name, const Tensor& cache,
                 int64_t* strides) {
  const bool int8 = cache.scalar_type() == ScalarType::Char;
  PYARCH_CHECK(scales.has_value() == int8, name, int8 ? ": int8 caches need one" : ": is for int8 caches");
  if (!int8) return nullptr;
  PYARCH_CHECK(scales->dim() == 3 && scales->scalar_type() == ScalarType::Float && same_gpu(*scales, cache),
               name, ": must be float32 (pages, page_size, heads) on the cache's GPU");
  for (int d = 0; d < 3; ++d) {
    PYARCH_CHECK(scales->size(d) == cache.size(d), name,
                 ": shape must be the cache's without the last dimension");
    strides[d] = scales->stride(d);
  }
  return static_cast<float*>(scales->data_ptr());
}

void kv_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
               std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  PYARCH_CHECK(k.dim() == 3 && v.dim() == 3, "k, v: must be (tokens, heads, dim)");
  PYARCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4,
               "k_cache, v_cache: must be (pages, page_size, heads, dim)");
  const ScalarType dtype = k.scalar_type();
  const ScalarType cached = k_cache.scalar_type() == ScalarType::Char ? ScalarType::Char : dtype;
  const int64_t item = dtype == ScalarType::Float ? 4 : 2;
  PYARCH_CHECK(type_of(dtype) >= 0, "k: dtype must be float32, bfloat16 or float16");
  KvAppend c{k.data_ptr(),
             v.data_ptr(),
             k_cache.data_ptr(),
             v_cache.data_ptr(),
             nullptr,
             k.size(0),
             k.size(1),
             k.size(2),
             k_cache.size(0),
             k_cache.size(1),
             item,
             {},
             {}};
  const Tensor* sources[] = {&k, &v};
  const Tensor* caches[] = {&k_cache, &v_cache};
  for (int i = 0; i < 2; ++i) {
    const Tensor &from = *sources[i], &to = *caches[i];
    PYARCH_CHECK(from.scalar_type() == dtype && to.scalar_type() == cached,
                 "v, k_cache, v_cache: dtype must be k's, or int8 for both caches");
    PYARCH_CHECK(same_gpu(from, k) && same_gpu(to, k), "v, k_cache, v_cache: must be on k's GPU");
    PYARCH_CHECK(from.size(0) == c.tokens && from.size(1) == c.heads && from.size(2) == c.dim,
                 "v: shape must be k's");
    PYARCH_CHECK(
        to.size(0) == c.pages && to.size(1) == c.page_size && to.size(2) == c.heads && to.size(3) == c.dim,
        "k_cache, v_cache: shapes must be equal and fit k");
    PYARCH_CHECK((from.stride(2) == 1 && to.stride(3) == 1) || c.dim <= 1,
                 "k, v, k_cache, v_cache: the last dimension must be contiguous");
    for (int d = 0; d < 2; ++d) c.source[i][d] = from.stride(d);
    for (int d = 0; d < 3; ++d) c.target[i][d] = to.stride(d);
  }
  PYARCH_CHECK(slot_mapping.dim() == 1 && slot_mapping.size(0) == c.tokens &&
                   slot_mapping.scalar_type() == ScalarType::Long && slot_mapping.is_contiguous() &&
                   same_gpu(slot_mapping, k),
               "slot_mapping: must be int64 (tokens), contiguous, on k's GPU");
  PYARCH_CHECK(c.tokens < (int64_t{1} << 31), "k: more than 2^31 tokens");
  c.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  c.type = type_of(dtype);
  c.k_scale = scales_of(k_scale, "k_scale", k_cache, c.scale[0]);
  c.v_scale = scales_of(v_scale, "v_scale", v_cache, c.scale[1]);
  const OnDeviceOf on(k);
  check_queued("kv_append", pyarch_kv_append(&c, on.stream));
}

std::tuple<Tensor, Tensor> paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                                           Tensor seq_lens, std::optional<Tensor> cu_seqlens_q,
                                           std::optional<Tensor> sinks, std::optional<Tensor> k_scale,
                                           std::optional<Tensor> v_scale, bool causal, int64_t window_left,
                                           int64_t window_right, double softcap, double scale) {
  PYARCH_CHECK(k_cache.dim() == 4 && v_cache.dim() == 4,
               "k_cache, v_cache: must be (pages, page_size, heads, dim)");
  PYARCH_CHECK(q.dim() == 3, "q: must be (rows, heads, dim)");
  PYARCH_CHECK(block_table.dim() == 2, "block_table: must be (B, n)");
  const ScalarType dtype = q.scalar_type();
  const bool int8 = k_cache.scalar_type() == ScalarType::Char;
  const int64_t item = int8 ? 1 : dtype == ScalarType::Float ? 4 : 2;
  PagedAttention c{};
  c.type = type_of(dtype);
  PYARCH_CHECK(c.type >= 0, "q: dtype must be float32, bfloat16 or float16");
  c.total = q.size(0), c.q_heads = q.size(1), c.dim = q.size(2), c.q_row = q.stride(0),
  c.q_head = q.stride(1);
  c.pages = k_cache.size(0), c.page_size = k_cache.size(1), c.heads = k_cache.size(2);
  c.batch = block_table.size(0), c.columns = block_table.size(1);
  c.table_row = block_table.stride(0), c.table_column = block_table.stride(1);
  PYARCH_CHECK(c.dim >= 8 && c.dim <= 256 && c.dim % (int8 ? 16 : 8) == 0,
               "q: head size must be a multiple of ", int8 ? 16 : 8, " up to 256");
  PYARCH_CHECK(c.page_size > 0 && c.heads > 0 && c.q_heads > 0 && c.q_heads % c.heads == 0,
               "q: heads must be a multiple of k_cache's");
  PYARCH_CHECK(q.stride(2) == 1 || c.total == 0, "q: the last dimension must be contiguous");
  const Tensor* caches[] = {&k_cache, &v_cache};
  int64_t* strides[] = {c.k_stride, c.v_stride};
  for (int i = 0; i < 2; ++i) {
    const Tensor& cache = *caches[i];
    PYARCH_CHECK(cache.scalar_type() == (int8 ? ScalarType::Char : dtype) && same_gpu(cache, q),
                 "k_cache, v_cache: must be of q's dtype or both int8, and on q's GPU");
    PYARCH_CHECK(cache.size(0) == c.pages && cache.size(1) == c.page_size && cache.size(2) == c.heads &&
                     cache.size(3) == c.dim,
                 "k_cache, v_cache: shapes must be equal and fit q");
    int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(cache.data_ptr()));
    for (int d = 0; d < 3; ++d) strides[i][d] = cache.stride(d), all |= cache.stride(d) * item;
    PYARCH_CHECK(c.pages == 0 || (cache.stride(3) == 1 && all % 16 == 0),
                 "k_cache, v_cache: rows must be contiguous and begin at multiples of 16 bytes");
  }
  c.k_scale = scales_of(k_scale, "k_scale", k_cache, c.k_scale_stride);
  c.v_scale = scales_of(v_scale, "v_scale", v_cache, c.v_scale_stride);
  const auto indices = [&](const Tensor& t, int64_t size) {
    return t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Int && same_gpu(t, q);
  };
  PYARCH_CHECK(block_table.scalar_type() == ScalarType::Int && same_gpu(block_table, q),
               "block_table: must be int32 and on q's GPU");
  PYARCH_CHECK(indices(seq_lens, c.batch), "seq_lens: must be int32 (B) on q's GPU");
  PYARCH_CHECK(!cu_seqlens_q || indices(*cu_seqlens_q, c.batch + 1),
               "cu_seqlens_q: must be int32 (B+1) on q's GPU");
  PYARCH_CHECK(cu_seqlens_q ? c.batch > 0 || c.total == 0 : c.total == c.batch,
               "q: must have one row per sequence, or cu_seqlens_q");
  PYARCH_CHECK(c.total + c.batch < (int64_t{1} << 31) && c.columns < (int64_t{1} << 31) &&
                   c.q_heads < 65536 && c.page_size < (int64_t{1} << 31),
               "q, block_table: too many rows, heads or columns");
  PYARCH_CHECK(window_left >= -1 && window_right >= -1, "window: must be at least -1");
  PYARCH_CHECK(softcap >= 0, "softcap: must be at least 0");
  if (sinks) {
    c.sinks_are_float = sinks->scalar_type() == ScalarType::Float;
    PYARCH_CHECK(sinks->dim() == 1 && sinks->size(0) == c.q_heads &&
                     (c.sinks_are_float || sinks->scalar_type() == dtype) && same_gpu(*sinks, q),
                 "sinks: must be (q heads) of float32 or q's dtype on q's GPU");
    c.sinks = sinks->data_ptr(), c.sink_step = sinks->stride(0);
  }
  constexpr int64_t everything = int64_t{1} << 32;
  c.left = window_left < 0 ? everything : std::min(window_left, everything);
  c.right = causal ? 0 : window_right < 0 ? everything : std::min(window_right, everything);
  c.scale = static_cast<float>(scale), c.softcap = static_cast<float>(softcap);
  c.q = q.data_ptr(), c.k = k_cache.data_ptr(), c.v = v_cache.data_ptr();
  c.table = static_cast<const int32_t*>(block_table.data_ptr());
  c.lengths = static_cast<const int32_t*>(seq_lens.data_ptr()), c.length_step = seq_lens.stride(0);
  if (cu_seqlens_q) {
    c.starts = static_cast<const int32_t*>(cu_seqlens_q->data_ptr());
    c.start_step = cu_seqlens_q->stride(0);
  }
  pyarch_paged_attention_plan(&c);
  PYARCH_CHECK(c.plan.blocks < int64_t{1} << 31, "q: more than 2^31 tiles");

  const OnDeviceOf on(q);
  Tensor out = empty_beside(q, {c.total, c.q_heads, c.dim}, dtype);
  Tensor lse = empty_beside(q, {c.total, c.q_heads}, ScalarType::Float);
  c.out = out.data_ptr(), c.lse = static_cast<float*>(lse.data_ptr());
  const Tensor arrived = empty_beside(q, {c.plan.counters}, ScalarType::Int);
  const Tensor partial = empty_beside(q, {c.plan.partial_floats}, ScalarType::Float);
  c.arrived = arrived.data_ptr(), c.partial = static_cast<float*>(partial.data_ptr());
  check_queued("paged_attention", pyarch_paged_attention(&c, on.stream));
  return {out, lse};
}

// The code of an element type in csrc/cuda/quant_matmul.h.
int64_t element_type(const Tensor& t, const char* argument, bool may_be_integer) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Int,
                                   ScalarType::Short, ScalarType::Char,     ScalarType::Byte};
  for (int64_t i = 0; i < (may_be_integer ? 7 : 3); ++i)
    if (t.scalar_type() == kTypes[i]) return i;
  fail(argument, ": dtype is not one of the format's");
}

Tensor quant_matmul(Tensor x, Tensor q, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> offset, std::optional<Tensor> g_idx, std::optional<Tensor> bias,
                    int64_t out_features, int64_t group_size, int64_t act_bits, int64_t activation,
                    double slope) {
  PYARCH_CHECK(x.dim() == 2, "x: must be [M, K]");
  QuantMatmul c{};
  c.x_type = element_type(x, "x", false);
  PYARCH_CHECK(c.x_type != 0, "x: dtype must be bfloat16 or float16");
  c.m = x.size(0), c.k = x.size(1), c.n = out_features, c.group_size = group_size;
  c.x_row = x.stride(0), c.x_column = x.stride(1);
  constexpr int64_t most = int64_t{1} << 30;
  PYARCH_CHECK(c.n >= 0 && c.n < most, "out_features: must be at least 0 and less than 2^30");
  PYARCH_CHECK(c.m < most && c.k < int64_t{1} << 24, "x: more than 2^30 rows or 2^24 columns");
  const bool nibbles = q.scalar_type() == ScalarType::Byte;
  PYARCH_CHECK(nibbles || q.scalar_type() == ScalarType::Char, "q: dtype must be uint8 or int8");
  c.bits = nibbles ? 4 : 8;
  const int64_t tiles = (c.n + 15) / 16, steps = (c.k + 63) / 64;
  const auto pieces = [&](const Tensor& t) {  // on x's GPU, in whole 16 bytes
    return same_gpu(t, x) && t.is_contiguous() && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  };
  PYARCH_CHECK(q.dim() == 4 && q.size(0) == tiles && q.size(1) == steps && q.size(2) == 8 * c.bits &&
                   q.size(3) == 16 && pieces(q),
               "q: must be packed as fragments that fit out_features and x's columns, contiguous, aligned to "
               "16 bytes, on x's GPU");
  PYARCH_CHECK(group_size == -1 || (group_size > 0 && group_size % 32 == 0),
               "group_size: must be -1 or a multiple of 32");
  c.groups = group_size == -1 ? 1 : c.k / group_size + (c.k % group_size != 0);
  const auto grid = [&](const Tensor& t) {
    return t.dim() == 3 && t.size(0) == tiles && t.size(1) == c.groups && t.size(2) == 16 && pieces(t);
  };
  PYARCH_CHECK(grid(scale), "scale: must be packed as fragments [tiles, groups, 16] on x's GPU");
  c.scale_type = element_type(scale, "scale", false);
  PYARCH_CHECK(!(zero && offset), "offset: must be None when zero is given");
  if (zero || offset) {
    const Tensor& shift = zero ? *zero : *offset;
    const char* name = zero ? "zero" : "offset";
    PYARCH_CHECK(grid(shift), name, ": must be packed as fragments [tiles, groups, 16] on x's GPU");
    c.shift = shift.data_ptr(), c.shift_type = element_type(shift, name, zero.has_value());
    c.shift_is_zero = zero.has_value();
  }
  PYARCH_CHECK(!g_idx, "g_idx: must be None on the cuda backend");
  PYARCH_CHECK(act_bits == 0, "act_bits: must be 0 on the cuda backend");
  if (bias) {
    c.bias = bias->data_ptr(), c.bias_type = element_type(*bias, "bias", false);
    PYARCH_CHECK((c.bias_type == 0 || c.bias_type == c.x_type) && bias->dim() == 1 && bias->size(0) == c.n &&
                     bias->is_contiguous() && same_gpu(*bias, x),
                 "bias: must be contiguous [N] of float32 or x's dtype on x's GPU");
  }
  PYARCH_CHECK(activation >= 0 && activation <= 5, "activation: unknown code ", activation);
  c.activation = activation, c.slope = static_cast<float>(slope);
  c.x = x.data_ptr(), c.q = q.data_ptr(), c.scale = scale.data_ptr();
  pyarch_quant_matmul_plan(&c);
  PYARCH_CHECK(c.plan.blocks < int64_t{1} << 31, "x, out_features: more than 2^31 tiles");

  const OnDeviceOf on(x);
  Tensor y = empty_beside(x, {c.m, c.n}, x.scalar_type());
  c.y = y.data_ptr();
  const Tensor arrived = empty_beside(x, {c.plan.splits > 1 ? c.plan.blocks : 0}, ScalarType::Int);
  const Tensor partial = empty_beside(x, {c.plan.partial_floats}, ScalarType::Float);
  c.arrived = arrived.data_ptr(), c.partial = static_cast<float*>(partial.data_ptr());
  check_queued("quant_matmul", pyarch_quant_matmul(&c, on.stream));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyarch, PYARCH_CUDA_KEY, m) {
  m.impl("kv_append__cuda", TORCH_BOX(&kv_append));
  m.impl("paged_attention__cuda", TORCH_BOX(&paged_attention));
  m.impl("quant_matmul__cuda", TORCH_BOX(&quant_matmul));
}

}  // namespace pyarch
