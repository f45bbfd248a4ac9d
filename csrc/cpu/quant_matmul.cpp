// quant_matmul: y = act(x w^T + bias), w read in its canonical layout (pyarch/quantized.py).
//
// A task owns a panel of kPanel output rows of w and up to kRows rows of x. For each block of K it transposes
// the panel's codes into scratch (L1), expands them to operands if several rows of x use them, and adds the
// products of register tiles into fp32 sums [rows][kPanel] (L2); bias, activation and rounding come at the
// end.
//
//             K ->  | block | block | ...          each block holds whole segments; a segment's products are
//     N  panel 0    | ##### |       |              summed from zero in order of K (int32 or fp32), scaled by
//     |  panel 1    |       |       |              its group, and added to the output's fp32 sum
//
// The chain of an output is fixed by the weight alone, so rows do not depend on M, tiles or threads.
#include "epilogue.h"
#include "quant_matmul_activations.h"
#include "quant_matmul_stream.h"
#include "quant_matmul_weights.h"
#include "types.h"

namespace pyarch {
namespace {

constexpr int64_t kBlockSteps = 128;   // of a block: 16 KiB of operands
constexpr int64_t kRows = 192;         // rows of x to a task: 24 KiB of sums
constexpr int64_t kPacked = 8 << 20;   // bytes of packed activations at a time
constexpr int64_t kFetch = 128 << 10;  // bytes of codes read in order before they are used
constexpr int64_t kTask = 128 << 10;   // products: a second thread costs more than fewer
constexpr int64_t kRawRows = 2;        // up to here expanding in registers is cheaper than through scratch

// Names of scratch buffers.
struct Table;
struct Packed;
struct PackedSums;
struct Row;
struct Wide;
struct Most;
struct Scales;
struct Raw;
struct Operands;
struct Sums;
struct Streamed;

struct Call {
  Weight w;
  const void* x;
  int64_t m, row_stride, column_stride;
  bool int8_activations;
  const void* bias;
  ScalarType bias_type;
  Activation activation;
  float slope;
  void* y;
};

// Whether segments can be cut from the groups: they must fill whole raw dwords. Float sums of groups under 16
// columns would end in a chain of additions longer, and less exact, than a plain sum over K.
template <class Dot>
bool contiguous_groups(const Weight& w) {
  if (w.g_idx) return false;
  return w.groups == 1 ||
         (w.group_size % (32 / Dot::kBits) == 0 && (w.group_size >= 16 || Dot::columns == 4));
}

template <class Dot>
Plan make_plan(const Weight& w) {
  constexpr int64_t unit = 32 / Dot::kBits, block = kBlockSteps * Dot::columns;
  const bool whole = contiguous_groups<Dot>(w);
  const int64_t padded = (w.k + unit - 1) / unit * unit;
  const int64_t group = whole ? (w.groups == 1 ? padded : w.group_size) : block;
  const int64_t pieces = (group + block - 1) / block;
  Segment* segments = scratch<Table, Segment>(pieces * (padded / std::max<int64_t>(group, 1) + 1));
  int64_t count = 0;
  for (int64_t begin = 0; begin < padded; begin += group)
    for (int64_t c = begin; c < std::min(begin + group, padded); c += block) {
      const int64_t end = std::min({c + block, begin + group, padded});
      segments[count++] = {c, static_cast<int32_t>(end - c), whole ? static_cast<int32_t>(begin / group) : 0};
    }
  return {w.k, padded, segments, count, whole && w.has_offset()};
}

// Operands of a block whose columns have groups in any order: codes times scale plus offset, fp32. The sums
// are then complete, and a scale of one remains.
template <int bits>
void expand_scaled(const Weight& w, const I* raw, int64_t column, int64_t columns, const F* scale,
                   const F* offset, I* out) {
  expand<Fp32Dot<bits>>(raw, columns * bits / 32, out);
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t g = w.group_of(std::min(column + c, w.k - 1)) * kVectors;
    for (int v = 0; v < kVectors; ++v) {
      const F q = as_float(load_i(out + c * kVectors + v));
      const F value = offset ? fma(q, scale[g + v], offset[g + v]) : q * scale[g + v];
      store_i(out + c * kVectors + v, as_int(value));
    }
  }
}

template <class Dot, bool raw, int rows>
void tiles(int64_t m, const I* codes, int64_t column, const Segment* segments, int64_t count,
           const int32_t* x, int64_t x_stride, const SegmentSums* x_sums, int64_t sums_stride, const F* scale,
           const F* offset, float* sums) {
  for (; m >= rows; m -= rows, x += rows * x_stride, x_sums += rows * sums_stride, sums += rows * kPanel)
    tile<Dot, rows, raw>(codes, column, segments, count, x, x_stride, x_sums, sums_stride, scale, offset,
                         sums);
  if constexpr (rows > 1)
    tiles<Dot, raw, rows - 1>(m, codes, column, segments, count, x, x_stride, x_sums, sums_stride, scale,
                              offset, sums);
}

template <class T>
void finish(const Call& call, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t n = call.w.n;
  for (int64_t v = 0; v < kVectors && column + v * W < n; ++v) {
    const int64_t c = column + v * W;
    const int left = static_cast<int>(std::min<int64_t>(W, n - c));
    F bias = zero();
    if (call.bias)
      with_float_type(call.bias_type, "bias",
                      [&](auto tag) { bias = load(static_cast<const decltype(tag)*>(call.bias) + c, left); });
    for (int64_t r = 0; r < rows; ++r) {
      T* y = static_cast<T*>(call.y) + (row + r) * n + c;
      const F value = activate(call.activation, call.slope, load(sums + r * kPanel + v * W) + bias);
      left == W ? store(y, value) : store(y, value, left);
    }
  }
}

// Scales and offsets of a panel, [group][kVectors] each.
struct PanelScales {
  F *scale, *offset, *ones;
};

template <int bits>
PanelScales panel_scales(const Weight& w, int64_t column) {
  const int64_t grid = (w.groups + 16) * kVectors;  // load_grid writes whole 16 bytes
  F* scale = scratch<Scales, F>(2 * grid + kVectors);
  F* offset = w.has_offset() ? scale + grid : nullptr;
  load_scales(w, kCentre<bits>, column, scale, offset);
  F* ones = scale + 2 * grid;
  for (int v = 0; v < kVectors; ++v) ones[v] = set1(1.0f);
  return {scale, offset, ones};
}

// The panel from output row `column` on, for rows [row, row + rows) of x, packed from row `first` on.
template <class Dot, class T>
void panel(const Call& call, const Plan& plan, const int32_t* x, const SegmentSums* x_sums, int64_t first,
           int64_t row, int64_t rows, int64_t column) {
  constexpr int bits = Dot::kBits;
  const Weight& w = call.w;
  const bool whole = contiguous_groups<Dot>(w);
  const auto [scale, offset, ones] = panel_scales<bits>(w, column);
  I* raw = scratch<Raw, I>((kBlockSteps + 4) * kVectors);
  I* operands = scratch<Operands, I>((kBlockSteps + 8) * kVectors);
  float* sums = scratch<Sums, float>(rows * kPanel);
  std::fill(sums, sums + rows * kPanel, 0.0f);

  const int64_t stride = packed_bytes<Dot>(plan) / 4;
  x += (row - first) * stride;
  x_sums += (row - first) * plan.count;
  for (int64_t i = 0, next; i < plan.count; i = next) {
    const int64_t begin = plan.segments[i].column;
    int64_t end = begin;
    for (next = i; next < plan.count && plan.segments[next].column + plan.segments[next].columns - begin <=
                                            kBlockSteps * Dot::columns;
         ++next)
      end = plan.segments[next].column + plan.segments[next].columns;
    const int64_t last_byte = std::min((end * bits + 7) / 8, w.codes.row_bytes);
    transpose_panel(w.codes, column, begin * bits / 8, last_byte - begin * bits / 8, raw);
    const Segment* segments = plan.segments + i;
    if (!whole) {
      if constexpr (Dot::columns == 1) {
        expand_scaled<bits>(w, raw, begin, end - begin, scale, offset, operands);
        tiles<Dot, false, kTileRows>(rows, operands, begin, segments, next - i, x, stride, x_sums + i,
                                     plan.count, ones, nullptr, sums);
      }
    } else if (rows <= kRawRows) {
      tiles<Dot, true, kRawRows>(rows, raw, begin, segments, next - i, x, stride, x_sums + i, plan.count,
                                 scale, offset, sums);
    } else {
      expand<Dot>(raw, (end - begin) * bits / 32, operands);
      tiles<Dot, false, kTileRows>(rows, operands, begin, segments, next - i, x, stride, x_sums + i,
                                   plan.count, scale, offset, sums);
    }
  }
  finish<T>(call, sums, row, rows, column);
}

template <class Dot, class T>
void pack(const Call& call, const Plan& plan, int64_t row, int32_t* out, SegmentSums* sums) {
  const Weight& w = call.w;
  const T* x = static_cast<const T*>(call.x) + row * call.row_stride;
  float* wide = scratch<Wide, float>(plan.padded + 32);
  if (call.column_stride != 1) {
    T* copy = scratch<Row, T>(plan.k);
    for (int64_t c = 0; c < plan.k; ++c) copy[c] = x[c * call.column_stride];
    x = copy;
  }
  if (Dot::columns == 1 && call.int8_activations) {
    widen(x, plan.k, wide);
    round_activations(
        wide, plan.k, [&](int64_t c) { return w.group_of(c); }, scratch<Most, float>(w.groups), w.groups);
    float* rounded = scratch<Row, float>(plan.k);
    std::copy(wide, wide + plan.k, rounded);
    return pack_row<Dot>(rounded, plan, out, sums, wide);
  }
  pack_row<Dot>(x, plan, out, sums, wide);
}

#if defined(__AVX512F__)
// All of y for the few rows of x that are packed, the codes read in the order in which they lie.
template <class Dot, class T>
void run_stream(const Call& call, const Plan& plan, int64_t lanes, int64_t panels, int64_t group,
                const int32_t* packed, int64_t packed_stride, const SegmentSums* x_sums) {
  const int64_t stride = stream_bytes<Dot>(plan) / 4;
  int32_t* x = scratch<Streamed, int32_t>(call.m * stride);
  for (int64_t r = 0; r < call.m; ++r) stream_row<Dot>(packed + r * packed_stride, plan, x + r * stride);
  parallel_tasks((panels + group - 1) / group, [&](int64_t task) {
    float sums[kStreamRows * kPanel];
    fetch(call.w, task * group * kPanel, group * kPanel, false);
    for (int64_t p = task * group; p < std::min((task + 1) * group, panels); ++p) {
      const auto [scale, offset, ones] = panel_scales<Dot::kBits>(call.w, p * kPanel);
      for (int64_t r = 0; r < call.m; ++r)
        stream_panel<Dot>(call.w.codes, p * kPanel, plan, lanes, reinterpret_cast<const I*>(x + r * stride),
                          x_sums + r * plan.count, scale, offset, sums + r * kPanel);
      finish<T>(call, sums, 0, call.m, p * kPanel);
    }
  });
}
#endif

template <class Dot, class T>
void run(const Call& call) {
  const Plan plan = make_plan<Dot>(call.w);
  const int64_t stride = packed_bytes<Dot>(plan);
  const int64_t panels = (call.w.n + kPanel - 1) / kPanel;
  // Panels to a task: kFetch bytes of codes, but two tasks for every thread unless they would be tiny.
  const int64_t fair = panels / (2 * std::max<int64_t>(torch::stable::get_num_threads(), 1));
  const int64_t least = kTask / std::max<int64_t>(kPanel * call.w.k * std::min(call.m, kRows), 1);
  const int64_t group = std::max<int64_t>(
      {1, least, std::min(fair, kFetch / std::max<int64_t>(kPanel * call.w.codes.row_bytes, 1))});
  const int64_t batch = std::min(call.m, std::max<int64_t>(kRows, kPacked / stride / kRows * kRows));
  int32_t* x = scratch<Packed, int32_t>(batch * stride / 4);
  SegmentSums* sums = scratch<PackedSums, SegmentSums>(batch * plan.count);
  for (int64_t first = 0; first < call.m; first += batch) {
    const int64_t rows = std::min(batch, call.m - first);
    const int64_t together =
        std::max<int64_t>(1, 16384 / std::max<int64_t>(plan.k, 1));  // rows to a packing task
    parallel_tasks((rows + together - 1) / together, [&](int64_t task) {
      for (int64_t r = task * together; r < std::min(rows, (task + 1) * together); ++r)
        pack<Dot, T>(call, plan, first + r, x + r * (stride / 4), sums + r * plan.count);
    });
#if defined(__AVX512F__)
    if constexpr (Dot::columns == 4)
      if (const int64_t lanes = call.m <= kStreamRows ? stream_lanes<Dot>(plan) : 0)
        return run_stream<Dot, T>(call, plan, lanes, panels, group, x, stride / 4, sums);
#endif
    const int64_t pieces = (rows + kRows - 1) / kRows;
    parallel_tasks((panels + group - 1) / group * pieces, [&](int64_t task) {
      const int64_t row = task % pieces * kRows, begin = task / pieces * group,
                    end = std::min(begin + group, panels);
      fetch(call.w, begin * kPanel, (end - begin) * kPanel, true);
      for (int64_t p = begin; p < end; ++p)
        panel<Dot, T>(call, plan, x, sums, first, first + row, std::min(kRows, rows - row), p * kPanel);
    });
  }
}

template <int bits, class T>
void choose(const Call& call) {
  if (call.int8_activations && contiguous_groups<Int8Dot<bits>>(call.w)) return run<Int8Dot<bits>, T>(call);
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (!call.int8_activations && contiguous_groups<Bf16Dot<bits>>(call.w))
      return run<Bf16Dot<bits>, T>(call);
#endif
  run<Fp32Dot<bits>, T>(call);
}

bool matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous();
}

}  // namespace

Tensor quant_matmul(Tensor x, Tensor q, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> offset, std::optional<Tensor> g_idx, std::optional<Tensor> bias,
                    int64_t group_size, int64_t act_bits, int64_t activation, double slope) {
  PYARCH_CHECK(x.dim() == 2, "x: must be [M, K]");
  PYARCH_CHECK(q.dim() == 2 && q.is_contiguous(), "q: must be contiguous and of 2 dimensions");
  const bool nibbles = q.scalar_type() == ScalarType::Byte;
  PYARCH_CHECK(nibbles || q.scalar_type() == ScalarType::Char, "q: dtype must be uint8 or int8");
  Call call{};
  Weight& w = call.w;
  call.m = x.size(0), w.k = x.size(1), w.n = q.size(0);
  PYARCH_CHECK(q.size(1) == (nibbles ? (w.k + 1) / 2 : w.k), "q: its columns do not fit x's");
  PYARCH_CHECK(group_size == -1 || group_size >= 1, "group_size: must be -1 or at least 1");
  PYARCH_CHECK(w.k < (int64_t{1} << 31) && w.n < (int64_t{1} << 31), "q: more than 2^31 rows or columns");
  w.groups = group_size == -1 ? 1 : w.k / group_size + (w.k % group_size != 0);
  w.group_size = std::max<int64_t>(group_size == -1 ? w.k : std::min(group_size, w.k), 1);
  PYARCH_CHECK(matrix(scale, w.n, w.groups), "scale: must be contiguous [N, groups]");
  with_float_type(scale.scalar_type(), "scale", [](auto) {});
  PYARCH_CHECK(!zero || matrix(*zero, w.n, w.groups), "zero: must be contiguous [N, groups]");
  PYARCH_CHECK(!offset || (matrix(*offset, w.n, w.groups) && !zero),
               "offset: must be contiguous [N, groups], and zero None");
  if (offset) with_float_type(offset->scalar_type(), "offset", [](auto) {});
  if (g_idx) {
    PYARCH_CHECK(g_idx->scalar_type() == ScalarType::Int && g_idx->dim() == 1 && g_idx->size(0) == w.k &&
                     g_idx->is_contiguous(),
                 "g_idx: must be contiguous int32 [K]");
    w.g_idx = static_cast<const int32_t*>(g_idx->data_ptr());
    for (int64_t c = 0; c < w.k; ++c)
      PYARCH_CHECK(w.g_idx[c] >= 0 && w.g_idx[c] < w.groups, "g_idx: values must be in [0, ", w.groups,
                   "), not ", w.g_idx[c]);
  }
  PYARCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == w.n && bias->is_contiguous()),
               "bias: must be contiguous [N]");
  PYARCH_CHECK(act_bits == 0 || act_bits == 8, "act_bits: must be 0 or 8");
  PYARCH_CHECK(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount),
               "activation: unknown code ", activation);
  w.codes = {static_cast<const uint8_t*>(q.data_ptr()), w.n, q.size(1)};
  w.scale = {scale.data_ptr(), scale.scalar_type(), static_cast<int64_t>(scale.element_size())};
  if (zero) w.zero = Grid{zero->data_ptr(), zero->scalar_type(), static_cast<int64_t>(zero->element_size())};
  if (zero) with_grid_type(w.zero->type, [](auto) {});
  if (offset)
    w.offset = Grid{offset->data_ptr(), offset->scalar_type(), static_cast<int64_t>(offset->element_size())};
  if (bias) with_float_type(bias->scalar_type(), "bias", [](auto) {});
  call.x = x.data_ptr();
  call.row_stride = x.stride(0), call.column_stride = x.stride(1);
  call.int8_activations = act_bits == 8;
  call.bias = bias ? bias->data_ptr() : nullptr;
  call.bias_type = bias ? bias->scalar_type() : ScalarType::Float;
  call.activation = static_cast<Activation>(activation);
  call.slope = static_cast<float>(slope);
  Tensor y = empty({call.m, w.n}, x.scalar_type());
  call.y = y.data_ptr();
  with_float_type(x.scalar_type(), "x", [&](auto tag) {
    if (call.m == 0 || w.n == 0) return;
    nibbles ? choose<4, decltype(tag)>(call) : choose<8, decltype(tag)>(call);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("quant_matmul__cpu", TORCH_BOX(&quant_matmul)); }

}  // namespace pyarch
