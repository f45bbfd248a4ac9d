// Weights, read a panel of kPanel output rows at a time: as they lie in a QuantizedTensor
// (pyarch/quantized.py), a block of whose codes is transposed into scratch when it is needed, or in the order
// of a PackedTensor, which is that of the scratch.
#pragma once

#include "quant_matmul_dot.h"
#include "tensor.h"
#include "types.h"

namespace pyarch {

// Rows of bytes of one tensor, [n][row_bytes].
struct ByteRows {
  const uint8_t* data;
  int64_t n, row_bytes;
};

// The bytes [from, from + count) of a panel's rows from `row` on, as dwords: lane n of out[d][v] is dword d
// of row row + v * W + n, for the first `used` vectors. Writes whole 16 bytes, so up to 3 dwords more than
// asked for. Rows past the end repeat the last one: their results are not stored.
inline void transpose_panel(const ByteRows& rows, int64_t row, int64_t from, int64_t count, int used,
                            I* out) {
  const uint8_t* p = rows.data + row * rows.row_bytes + from;
  int64_t stride = rows.row_bytes;
  const int64_t whole = (count + 15) / 16 * 16, lanes = int64_t{used} * W;
  const bool inside = row + lanes <= rows.n && (row + lanes - 1) * stride + from + whole <= rows.n * stride;
  if (!inside) {  // at the end of the tensor: a copy that may be read to whole vectors
    struct Edge;
    uint8_t* copy = scratch<Edge, uint8_t>(lanes * whole);
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t r = std::min(row + i, rows.n - 1);
      std::memcpy(copy + i * whole, rows.data + r * stride + from, count);
      std::memset(copy + i * whole + count, 0, whole - count);
    }
    p = copy, stride = whole;
  }
  for (int v = 0; v < used; ++v)
    for (int64_t b = 0; b < whole; b += 16)
      transpose(p + v * W * stride + b, stride, out + b / 4 * kVectors + v, kVectors);
}

// Element e of each lane's dword as fp32.
template <class T, int e>
inline F element(I v) {
  if constexpr (std::is_same_v<T, float>) return as_float(v);
  if constexpr (std::is_same_v<T, bf16>) return as_float(e == 0 ? shl<16>(v) : and_i(v, set1_i(-65536)));
  if constexpr (std::is_same_v<T, fp16>) return from_halves(shr<16 * e>(v));
  if constexpr (std::is_same_v<T, int32_t>) return to_float(v);
  if constexpr (std::is_same_v<T, int16_t>) return to_float(sar<16>(shl<16 - 16 * e>(v)));
  if constexpr (std::is_same_v<T, int8_t>) return to_float(sar<24>(shl<24 - 8 * e>(v)));
  if constexpr (std::is_same_v<T, uint8_t>) return to_float(and_i(shr<8 * e>(v), set1_i(255)));
}

// A [n][groups] tensor of T as fp32 [group][kVectors] of a panel: out holds groups rounded up to 16 bytes of
// T.
template <class T>
void load_grid(const T* data, int64_t n, int64_t groups, int64_t row, int used, F* out) {
  const ByteRows rows{reinterpret_cast<const uint8_t*>(data), n, groups * static_cast<int64_t>(sizeof(T))};
  constexpr int per = 4 / sizeof(T), kPiece = 128;  // bytes of a row at a time
  I dwords[kPiece / 4 * kVectors];
  for (int64_t from = 0; from < rows.row_bytes; from += kPiece) {
    const int64_t count = std::min<int64_t>(kPiece, rows.row_bytes - from);
    transpose_panel(rows, row, from, count, used, dwords);
    for (int64_t d = 0; d * 4 < count; ++d)
      for (int v = 0; v < used; ++v) {
        F* at = out + (from / 4 + d) * per * kVectors + v;
        const I x = dwords[d * kVectors + v];
        at[0] = element<T, 0>(x);
        if constexpr (per > 1) at[kVectors] = element<T, 1>(x);
        if constexpr (per > 2) {
          at[2 * kVectors] = element<T, 2>(x);
          at[3 * kVectors] = element<T, 3>(x);
        }
      }
  }
}

// The same of a packed tensor, which has that order; the next panel's are fetched meanwhile.
template <class T>
void load_packed_grid(const T* data, int64_t groups, int64_t row, F* out) {
  const int64_t count = groups * kPanel;
  data += row / kPanel * count;
  for (int64_t i = 0; i < count; i += W) {
    __builtin_prefetch(data + count + i);
    if constexpr (std::is_integral_v<T>) {
      float wide[W];
      for (int n = 0; n < W; ++n) wide[n] = static_cast<float>(data[i + n]);
      out[i / W] = load(wide);
    } else {
      out[i / W] = load(data + i);
    }
  }
}

// A [n][groups] tensor of the operator: scale, zero or offset.
struct Grid {
  const void* data;
  ScalarType type;
  int64_t bytes;  // of an element
};

template <class Function>
inline void with_grid_type(ScalarType type, const Function& f) {
  switch (type) {
    case ScalarType::Int:
      return f(int32_t{});
    case ScalarType::Short:
      return f(int16_t{});
    case ScalarType::Char:
      return f(int8_t{});
    case ScalarType::Byte:
      return f(uint8_t{});
    default:
      with_float_type(type, "zero", f);  // the one that may be an integer
  }
}

struct Weight {
  ByteRows codes;
  int64_t n, k, groups, group_size;  // group_size: columns, k for a whole row
  Grid scale;
  std::optional<Grid> zero, offset;
  const int32_t* g_idx;  // [k] or null
  bool packed;           // codes [panel][dword][kPanel] and grids [panel][group][kPanel]

  bool has_offset() const { return zero || offset; }
  int64_t group_of(int64_t column) const { return g_idx ? g_idx[column] : column / group_size; }
};

// Scales and offsets of a panel in the form w = scale * (q - centre) + offset, each [group][kVectors].
inline void load_scales(const Weight& w, int centre, int64_t row, int used, F* scale, F* offset) {
  const auto load_into = [&](const Grid& grid, F* out) {
    with_grid_type(grid.type, [&](auto tag) {
      const auto* data = static_cast<const decltype(tag)*>(grid.data);
      w.packed ? load_packed_grid(data, w.groups, row, out) : load_grid(data, w.n, w.groups, row, used, out);
    });
  };
  load_into(w.scale, scale);
  if (!w.has_offset()) return;
  load_into(w.zero ? *w.zero : *w.offset, offset);
  const F c = set1(static_cast<float>(centre));
  for (int64_t i = 0; i < w.groups * kVectors; ++i)
    offset[i] = w.zero ? scale[i] * (c - offset[i]) : fma(scale[i], c, offset[i]);
}

// Reads rows [row, row + rows) of scales and codes as they lie, from first to last byte, so that they come
// from DRAM at full speed into L2. The hardware prefetcher follows this order; it does not follow the
// transposition's, a panel of rows side by side, and prefetch instructions ahead of that gained little
// (docs/decisions/0001).
inline void fetch(const Weight& w, int64_t row, int64_t rows) {
  const auto read = [&](const void* data, int64_t row_bytes) {
    const uint8_t* p = static_cast<const uint8_t*>(data) + row * row_bytes;
    uint8_t any = 0;
    for (int64_t i = 0; i < std::min(rows, w.n - row) * row_bytes; i += 64) any |= p[i];
    asm volatile("" : : "r"(any));
  };
  read(w.codes.data, w.codes.row_bytes);
  for (const Grid* grid : {&w.scale, w.zero ? &*w.zero : nullptr, w.offset ? &*w.offset : nullptr})
    if (grid) read(grid->data, w.groups * grid->bytes);
}

// Codes of columns [begin, end) of the panel at `row`, raw: [dword][kVectors], the first `used` vectors of
// each.
template <int bits>
inline const I* raw_codes(const Weight& w, int64_t row, int64_t begin, int64_t end, int used, I* scratch) {
  if (w.packed)
    return reinterpret_cast<const I*>(w.codes.data) +
           (row / kPanel * ((w.k * bits + 31) / 32) + begin * bits / 32) * kVectors;
  const int64_t first = begin * bits / 8, last = std::min((end * bits + 7) / 8, w.codes.row_bytes);
  transpose_panel(w.codes, row, first, last - first, used, scratch);
  return scratch;
}

// Expands kTileVectors vectors of raw dwords to operands: [dword][kVectors] -> [step][kTileVectors].
template <class Dot>
void expand(const I* raw, int64_t dwords, I* out) {
  for (int64_t d = 0; d < dwords; ++d) {
    for (int v = 0; v < kTileVectors; ++v) {
      const I x = load_i(raw + d * kVectors + v);
      const auto put = [&](auto step) {
        constexpr int e = decltype(step)::value;
        if constexpr (e < Dot::steps)
          store_i(out + (d * Dot::steps + e) * kTileVectors + v, Dot::template expand<e>(x));
      };
      put(std::integral_constant<int, 0>{}), put(std::integral_constant<int, 1>{});
      put(std::integral_constant<int, 2>{}), put(std::integral_constant<int, 3>{});
      put(std::integral_constant<int, 4>{}), put(std::integral_constant<int, 5>{});
      put(std::integral_constant<int, 6>{}), put(std::integral_constant<int, 7>{});
    }
  }
}

}  // namespace pyarch
