// quant_matmul: y = act(x w^T + bias), w in its canonical layout or prepacked (pyarch/quantized.py).
//
// A task owns panels of kPanel output rows of w and up to kRows rows of x. For each block of K it takes the
// panel's codes as dwords side by side, transposed into scratch (L1) unless they are packed so, expands them
// to operands if several rows of x use them, and adds the products of register tiles into fp32 sums
// [rows][kPanel] (L2); bias, activation and rounding come at the end.
//
//             K ->  | block | block | ...          each block holds whole segments; a segment's products are
//     N  panel 0    | ##### |       |              summed from zero in order of K (int32 or fp32), scaled by
//     |  panel 1    |       |       |              its group, and added to the output's fp32 sum
//
// The chain of an output is fixed by the weight alone, so rows do not depend on M, tiles or threads.
#include "epilogue.h"
#include "operators.h"
#include "quant_matmul_activations.h"
#include "quant_matmul_weights.h"
#include "types.h"

namespace pyarch {
namespace {

constexpr int64_t kBlockSteps = 128;   // of a block: 16 KiB of operands, up to 32 KiB of codes
constexpr int64_t kShortSteps = 8;     // a group of up to so many has a tile of its own
constexpr int64_t kRows = 192;         // rows of x to a task, whole tiles: 48 KiB of sums
constexpr int64_t kPacked = 8 << 20;   // bytes of packed activations at a time
constexpr int64_t kFetch = 128 << 10;  // bytes of codes read in order before they are used
constexpr int64_t kTask = 128 << 10;   // products: a second thread costs more than fewer
constexpr int64_t kAhead = 4096;  // bytes from packed codes that are read once to those fetched meanwhile

// Names of scratch buffers.
struct Table;
struct Packed;
struct PackedSums;
struct Row;
struct PackedRow;
struct PackedRowSums;
struct Wide;
struct Most;
struct Scales;
struct Raw;
struct Operands;
struct Sums;

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

// f(the constant n), which is 1 to most.
template <int most, class Function>
inline void with_count(int64_t n, const Function& f) {
  if (n == most) return f(std::integral_constant<int, most>{});
  if constexpr (most > 1) with_count<most - 1>(n, f);
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
    for (int v = 0; v < kTileVectors; ++v) {
      const F q = as_float(load_i(out + c * kTileVectors + v));
      const F value = offset ? fma(q, scale[g + v], offset[g + v]) : q * scale[g + v];
      store_i(out + c * kTileVectors + v, as_int(value));
    }
  }
}

// Outputs of a panel: act(sums + bias), for rows [row, row + rows) of x. Row by row, because the addresses of
// one column often fall into the same sets of a cache.
template <class T>
void finish(const Call& call, const F* bias, const float* sums, int64_t row, int64_t rows, int64_t column) {
  const int64_t left = std::min<int64_t>(call.w.n - column, kPanel);
  for (int64_t r = 0; r < rows; ++r) {
    T* y = static_cast<T*>(call.y) + (row + r) * call.w.n + column;
    for (int64_t c = 0; c < left; c += W) {
      const F value = activate(call.activation, call.slope, load(sums + r * kPanel + c) + bias[c / W]);
      left - c >= W ? store(y + c, value) : store(y + c, value, static_cast<int>(left - c));
    }
  }
}

inline void load_bias(const Call& call, int64_t column, F* bias) {
  for (int v = 0; v < kVectors; ++v) bias[v] = zero();
  if (!call.bias) return;
  with_float_type(call.bias_type, "bias", [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(call.bias) + column;
    const int64_t left = std::min<int64_t>(call.w.n - column, kPanel);
    for (int64_t c = 0; c < left; c += W)
      bias[c / W] = load(from + c, static_cast<int>(std::min<int64_t>(W, left - c)));
  });
}

// What the tiles of some vectors of a panel have in common: a block of its codes, and the rows of x.
struct Work {
  const I* codes;
  const Segment* segments;
  int64_t first, count;  // of the block's segments in a row
  const int32_t* x;      // tiles of [dword][rows], x_stride dwords a row
  int64_t x_stride;
  const SegmentSums* x_sums;  // tiles of [segment][rows], sums_stride segments a row
  int64_t sums_stride;
  const F *scale, *offset;
  const char* next;  // codes to fetch, or null
  int64_t next_bytes;
  float* sums;
};

// Tiles for m rows, with after(first row, rows) at the end of each. The first ones fetch the next codes
// between them, evenly, so that memory is never idle for long.
template <class Dot, int rows, int vectors, bool raw, class Function>
void tiles(int64_t m, const Work& work, const Function& after) {
  const int64_t share = m >= 4 * rows ? 4 : m >= 2 * rows ? 2 : 1;
  for (int64_t done = 0, i = 0; done < m; done += rows, ++i)
    with_count<rows>(std::min<int64_t>(rows, m - done), [&](auto count) {
      constexpr int n = decltype(count)::value;
      tile<Dot, n, vectors, raw>(
          work.codes, work.segments + work.first, work.count, work.x + done * work.x_stride,
          work.x_sums + done * work.sums_stride + work.first * n, work.scale, work.offset,
          i < share && work.next ? work.next + i * work.next_bytes / share : nullptr,
          kFetched<Dot, raw> / share, work.sums + done * kPanel);
      after(done, n);
    });
}

// Scales and offsets of a panel, [group][kVectors] each.
struct PanelScales {
  F *scale, *offset, *ones;
};

template <int bits>
PanelScales panel_scales(const Weight& w, int64_t column, int used) {
  const int64_t grid = (w.groups + 16) * kVectors;  // load_grid writes whole 16 bytes
  F* scale = scratch<Scales, F>(2 * grid + kVectors);
  F* offset = w.has_offset() ? scale + grid : nullptr;
  load_scales(w, kCentre<bits>, column, used, scale, offset);
  F* ones = scale + 2 * grid;
  for (int v = 0; v < kVectors; ++v) ones[v] = set1(1.0f);
  return {scale, offset, ones};
}

// The panel from output row `column` on, for rows [row, row + rows) of x, of which x and x_sums are packed.
template <class Dot, class T>
void panel(const Call& call, const Plan& plan, const int32_t* x, const SegmentSums* x_sums, int64_t row,
           int64_t rows, int64_t column) {
  constexpr int bits = Dot::kBits;
  const Weight& w = call.w;
  const int64_t pairs = (std::min<int64_t>(w.n - column, kPanel) + kTileVectors * W - 1) / (kTileVectors * W);
  const int used = static_cast<int>(pairs) * kTileVectors;
  const auto [scale, offset, ones] = panel_scales<bits>(w, column, used);
  I* scratch_codes = scratch<Raw, I>((kBlockSteps + 4) * kVectors);
  I* operands = scratch<Operands, I>((kBlockSteps + 8) * kTileVectors);
  float* sums = scratch<Sums, float>(rows * kPanel);
  std::fill(sums, sums + rows * kPanel, 0.0f);

  const bool whole = contiguous_groups<Dot>(w), raw = whole && rows <= kRawRows;
  const bool once =
      raw && w.packed && rows <= kTileRows;  // one tile reads the codes: no block need stay in L1
  F bias[kVectors];
  load_bias(call, column, bias);
  if (plan.count == 0) return finish<T>(call, bias, sums, row, rows, column);
  // Blocks of about equal length: a short last one would load and store sums for little.
  const int64_t most = kBlockSteps * Dot::columns, blocks = (plan.padded + most - 1) / most;
  const int64_t block = std::min(most, plan.padded / blocks + plan.segments->columns);
  // Short groups: tiles of fewer vectors, which keep the fp32 sums in registers too while groups end.
  const bool narrow = rows >= kTileRows && plan.segments->columns <= kShortSteps * Dot::columns;
  Work work{};
  work.segments = plan.segments;
  work.x = x, work.x_stride = packed_bytes<Dot>(plan) / 4, work.x_sums = x_sums,
  work.sums_stride = plan.count;
  for (; work.first < plan.count; work.first += work.count) {
    const Segment *segment = plan.segments + work.first, *last = plan.segments + plan.count;
    const int64_t begin = segment->column;
    int64_t end = begin;
    while (segment < last && (once || segment->column + segment->columns - begin <= block))
      end = segment->column + segment->columns, ++segment;
    work.count = segment - plan.segments - work.first;
    const I* codes = raw_codes<bits>(w, column, begin, end, used, scratch_codes);
    const int64_t bytes = (end - begin) * bits * kPanel / 8;
    const char* ahead = w.packed ? reinterpret_cast<const char*>(codes) + (once ? kAhead : bytes) : nullptr;
    for (int v = 0, step; v < used; v += step) {
      step = raw && !narrow && used - v >= kRawVectors ? kRawVectors : kTileVectors;
      const bool complete = work.first + work.count == plan.count && v + step >= used;
      const auto after = [&](int64_t first, int64_t count) {
        if (complete) finish<T>(call, bias, sums + first * kPanel, row + first, count, column);
      };
      work.sums = sums + v * W;
      work.scale = whole ? scale + v : ones, work.offset = whole && offset ? offset + v : nullptr;
      if (raw) {
        work.codes = codes + v, work.next = v == 0 ? ahead : nullptr, work.next_bytes = bytes;
        step == kRawVectors ? tiles<Dot, kTileRows, kRawVectors, true>(rows, work, after)
                            : tiles<Dot, kTileRows, kTileVectors, true>(rows, work, after);
        continue;
      }
      work.codes = operands;
      work.next = ahead ? ahead + bytes * v / kVectors : nullptr,
      work.next_bytes = bytes * kTileVectors / kVectors;
      if (whole) {
        expand<Dot>(codes + v, (end - begin) * bits / 32, operands);
      } else if constexpr (Dot::columns == 1) {
        expand_scaled<bits>(w, codes + v, begin, end - begin, scale + v, offset ? offset + v : nullptr,
                            operands);
      }
      tiles<Dot, kTileRows, kTileVectors, false>(rows, work, after);
    }
  }
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

// Packs rows [row, row + rows) of x for one tile: [dword][rows], and their sums as [segment][rows].
template <class Dot, class T>
void pack_tile(const Call& call, const Plan& plan, int64_t row, int64_t rows, int32_t* out,
               SegmentSums* sums) {
  if (rows == 1) return pack<Dot, T>(call, plan, row, out, sums);
  const int64_t dwords = packed_bytes<Dot>(plan) / 4;
  int32_t* packed = scratch<PackedRow, int32_t>(dwords);
  SegmentSums* packed_sums = scratch<PackedRowSums, SegmentSums>(plan.count);
  for (int64_t r = 0; r < rows; ++r) {
    pack<Dot, T>(call, plan, row + r, packed, packed_sums);
    for (int64_t i = 0; i < dwords; ++i) out[i * rows + r] = packed[i];
    for (int64_t i = 0; i < plan.count; ++i) sums[i * rows + r] = packed_sums[i];
  }
}

template <class Dot, class T>
void run(const Call& call) {
  const Plan plan = make_plan<Dot>(call.w);
  const int64_t stride = packed_bytes<Dot>(plan);
  const int64_t panels = (call.w.n + kPanel - 1) / kPanel;
  // Panels to a task: kFetch bytes of codes, but two tasks for every thread unless they would be tiny.
  const int64_t fair = panels / (2 * std::max<int64_t>(thread_count(), 1));
  const int64_t least = kTask / std::max<int64_t>(kPanel * call.w.k * std::min(call.m, kRows), 1);
  const int64_t group = std::max<int64_t>(
      {1, least, std::min(fair, kFetch / std::max<int64_t>(kPanel * call.w.codes.row_bytes, 1))});
  const int64_t batch = std::min(call.m, std::max<int64_t>(kRows, kPacked / stride / kRows * kRows));
  int32_t* x = scratch<Packed, int32_t>(batch * stride / 4);
  SegmentSums* sums = scratch<PackedSums, SegmentSums>(batch * plan.count);
  for (int64_t first = 0; first < call.m; first += batch) {
    const int64_t rows = std::min(batch, call.m - first);
    const int64_t together = std::max<int64_t>(1, 16384 / std::max<int64_t>(kTileRows * plan.k, 1));
    parallel_tasks((rows + kTileRows * together - 1) / (kTileRows * together), [&](int64_t task) {
      const int64_t begin = task * kTileRows * together, end = std::min(rows, begin + kTileRows * together);
      for (int64_t r = begin; r < end; r += kTileRows)
        pack_tile<Dot, T>(call, plan, first + r, std::min(kTileRows, end - r), x + r * (stride / 4),
                          sums + r * plan.count);
    });
    const int64_t pieces = (rows + kRows - 1) / kRows;
    parallel_tasks((panels + group - 1) / group * pieces, [&](int64_t task) {
      const int64_t row = task % pieces * kRows, begin = task / pieces * group,
                    end = std::min(begin + group, panels);
      if (!call.w.packed) fetch(call.w, begin * kPanel, (end - begin) * kPanel);
      for (int64_t p = begin; p < end; ++p)
        panel<Dot, T>(call, plan, x + row * (stride / 4), sums + row * plan.count, first + row,
                      std::min(kRows, rows - row), p * kPanel);
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

// Whether t is a contiguous [N, groups], or [panels, groups, kPanel] of a packed weight.
bool grid(const Tensor& t, const Weight& w) {
  if (!t.is_contiguous() || t.dim() != (w.packed ? 3 : 2) || t.size(1) != w.groups) return false;
  return w.packed ? t.size(0) == (w.n + kPanel - 1) / kPanel && t.size(2) == kPanel : t.size(0) == w.n;
}

}  // namespace

Tensor quant_matmul(Tensor x, Tensor q, Tensor scale, std::optional<Tensor> zero,
                    std::optional<Tensor> offset, std::optional<Tensor> g_idx, std::optional<Tensor> bias,
                    int64_t out_features, int64_t group_size, int64_t act_bits, int64_t activation,
                    double slope) {
  PYARCH_CHECK(x.dim() == 2, "x: must be [M, K]");
  PYARCH_CHECK(q.is_contiguous(), "q: must be contiguous");
  const bool nibbles = q.scalar_type() == ScalarType::Byte;
  PYARCH_CHECK(nibbles || q.scalar_type() == ScalarType::Char, "q: dtype must be uint8 or int8");
  Call call{};
  Weight& w = call.w;
  call.m = x.size(0), w.k = x.size(1), w.n = out_features, w.packed = q.dim() == 4;
  PYARCH_CHECK(w.n >= 0, "out_features: must be at least 0");
  const int64_t panels = (w.n + kPanel - 1) / kPanel, dwords = (w.k * (nibbles ? 4 : 8) + 31) / 32;
  PYARCH_CHECK(w.packed ? q.size(0) == panels && q.size(1) == dwords && q.size(2) == kPanel && q.size(3) == 4
                        : q.dim() == 2 && q.size(0) == w.n && q.size(1) == (nibbles ? (w.k + 1) / 2 : w.k),
               "q: its shape does not fit out_features and x's columns");
  PYARCH_CHECK(group_size == -1 || group_size >= 1, "group_size: must be -1 or at least 1");
  PYARCH_CHECK(w.k < (int64_t{1} << 31) && w.n < (int64_t{1} << 31), "q: more than 2^31 rows or columns");
  w.groups = group_size == -1 ? 1 : w.k / group_size + (w.k % group_size != 0);
  w.group_size = std::max<int64_t>(group_size == -1 ? w.k : std::min(group_size, w.k), 1);
  PYARCH_CHECK(grid(scale, w), "scale: must be contiguous [N, groups]");
  with_float_type(scale.scalar_type(), "scale", [](auto) {});
  PYARCH_CHECK(!zero || grid(*zero, w), "zero: must be contiguous [N, groups]");
  PYARCH_CHECK(!offset || (grid(*offset, w) && !zero),
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
  w.codes = {static_cast<const uint8_t*>(q.data_ptr()), w.n, nibbles ? (w.k + 1) / 2 : w.k};
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
