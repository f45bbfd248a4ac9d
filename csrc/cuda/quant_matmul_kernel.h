// quant_matmul on tensor cores: y^T = act(w x^T + bias), w the left operand, exact in 16 bits.
//
// A block of 8 warps owns a tile of y and works through K in rounds; in a round its warps along K have a part
// of K each, of the 8 parts that K always has:
//
//           K ->  | part 0 | part 1 | ... | part 7 |      warps_n warps read other rows of w and share x;
//     16 rows of  | warp 0 | warp 1 | ... | warp 7 |      up to 16 rows of x have one warp, and one round;
//     w a warp    |        |        |     |        |      tiles of 32 and 64 have 4 and 2 parts a round
//
//   step     64 columns: codes of 16 rows are 16 (4-bit) or 2 x 16 bytes a lane, x is 128 bytes a row
//   copies   cp.async, some stages ahead: every lane its own codes, 16 bytes a lane side by side; of the
//            scales what the step needs; x with 16-byte pieces swizzled by row, zeros beyond K
//   group    part sums p += (q - c) x^T on tensor cores from zero, then acc += scale p + shift sum(x), fp32,
//            where shift is scale (c - zero) or offset + scale c, and sum(x) a product with ones
//   parts    sums are added in one order, ((p0 + p1) + (p2 + p3)) + (p4 + p5)) + (p6 + p7): in shared memory;
//            or, where several blocks share a tile's columns, by the last one of them from memory
//
// Which columns are summed in which order depends on K and the groups alone: a row of y has the same bits for
// any M. Codes are read once for every tile of rows of x, so bytes are M / 64 times the weight's and more.
#pragma once

#include "epilogue.h"
#include "quant_matmul.h"
#include "quant_matmul_copies.h"

namespace pyarch {
namespace {

// The sums of a warp: register e of acc[r][i] is row g + 8 (e / 2) of w's tile r and row 2t + e % 2 of x's
// tile i.
template <class S>
struct Sums {
  float acc[S::row_tiles][S::m_tiles][4] = {}, part[S::row_tiles][S::m_tiles][4] = {};
  float x[S::m_tiles][2] = {};  // sums of x: of rows 2t and 2t + 1 of its tile i

  // Ends a group, or a part of one, whose scales and shifts are at `byte`.
  template <class T, int fold, bool shifted>
  PYARCH_DEVICE void end_group(const Worker<T, S, fold, shifted>& w, int byte, int half) {
    using At = Layout<S, fold, shifted>;
    constexpr float centre = S::bits == 4 ? 8.0f : 0.0f;
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) {
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int row = w.lane / 4 + 8 * high, at = byte + r * At::grid + half * 64;
        const float scale = float_value(w.c.scale_type, at, row);
        float shift = 0.0f;
        if constexpr (shifted) {
          const float value = grid_value(w.c.shift_type, at + At::halves * 64, row);
          shift = w.c.shift_is_zero ? scale * (centre - value) : fmaf(scale, centre, value);
        }
#pragma unroll
        for (int i = 0; i < S::m_tiles; ++i)
#pragma unroll
          for (int e = 2 * high; e < 2 * high + 2; ++e) {
            acc[r][i][e] = fmaf(scale, part[r][i][e], acc[r][i][e]);
            if constexpr (shifted) acc[r][i][e] = fmaf(shift, x[i][e % 2], acc[r][i][e]);
            part[r][i][e] = 0.0f;
          }
      }
    }
    if constexpr (shifted)
#pragma unroll
      for (int i = 0; i < S::m_tiles; ++i) x[i][0] = x[i][1] = 0.0f;
  }

  template <class T, int fold, bool shifted>
  PYARCH_DEVICE void add_step(const Worker<T, S, fold, shifted>& w, int slot, bool ends_group) {
    using At = Layout<S, fold, shifted>;
    const int base = slot * w.at.stage, own = base + w.own_byte, x_byte = base + w.x_byte;
    Bytes16 codes[S::row_tiles];  // of both halves, or of one of 8-bit codes
    [[maybe_unused]] constexpr int at_once = S::m_tiles == 8 ? 1 : 2;
#pragma unroll at_once  // both halves of the largest tile spilled
    for (int half = 0; half < 2; ++half) {
      uint32_t a[S::row_tiles][2][4];
#pragma unroll
      for (int r = 0; r < S::row_tiles; ++r) {
        if (half == 0 || S::bits == 8)
          codes[r] = load16(shared<const uint8_t>(own + r * At::codes + half * 512 + w.lane * 16));
        const Bytes16 b = codes[r];
        const uint32_t words[4] = {S::bits == 4 && half ? b.z : b.x, S::bits == 4 && half ? b.w : b.y, b.z,
                                   b.w};
#pragma unroll
        for (int j = 0; j < 2; ++j) operand<T, S::bits>(words, j, a[r][j]);
      }
      const int piece = ((4 * half + w.lane / 8) ^ w.lane % 8) * 16;
#pragma unroll
      for (int i = 0; i < S::m_tiles; ++i) {
        int row = 8 * i + w.lane % 8;
        if (row >= w.c.x_rows) row = w.c.x_rows - 1;  // any: what comes of it is not stored
        uint32_t b[4];
        ldmatrix4(b, shared<const T>(x_byte + row * 128 + piece));
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int r = 0; r < S::row_tiles; ++r) {
          mma<T>(part[r][i], a[r][0], b0);
          mma<T>(part[r][i], a[r][1], b1);
        }
        if constexpr (shifted) {
          constexpr uint32_t one = Magic<T>::one, ones[4] = {one, one, one, one};
          float sum[4] = {x[i][0], x[i][1], 0.0f, 0.0f};  // the other rows are no different: registers
          mma<T>(sum, ones, b0);
          mma<T>(sum, ones, b1);
          x[i][0] = sum[0], x[i][1] = sum[1];
        }
      }
      if constexpr (fold == 32) end_group(w, own + S::row_tiles * At::codes, half);
    }
    if constexpr (fold == 64)
      if (ends_group) end_group(w, own + S::row_tiles * At::codes, 0);
  }
};

template <class T>
PYARCH_DEVICE void finish(const Call<T>& c, int m, int n, float value) {
  if (c.has_bias) value += c.bias_is_float ? c.bias[n] : to_float(c.bias_as_x[n]);
  c.y[int64_t{m} * c.n + n] = from_float<T>(activate(c.activation, c.slope, value));
}

template <class T, class S, int fold, bool shifted>
PYARCH_KERNEL PYARCH_THREADS(kThreads, S::m_tiles == 1 ? 3 : 1) quant_matmul(Call<T> c) {
  Worker<T, S, fold, shifted> w(c);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_n = static_cast<int>(blockIdx.x) / c.m_blocks * S::rows_n;
  const int splits = static_cast<int>(gridDim.y), rounds = S::rounds / splits;
  const int first_round = static_cast<int>(blockIdx.y) * rounds;
  const Shared<float> sums = shared<float>(), totals = shared<float>(w.at.totals);
  const int64_t tile_floats = S::rows_m * S::rows_n;
  const Global<float> partial = c.partial + int64_t{blockIdx.x} * kPairs * tile_floats;

  for (int round = first_round; round < first_round + rounds; ++round) {
    const int part = round * S::warps_k + w.warp_k;
    const int begin = part * c.part_steps < c.steps ? part * c.part_steps : c.steps;
    const int end = begin + c.part_steps < c.steps ? begin + c.part_steps : c.steps;
    Sums<S> mine;
    w.start(begin);
    for (int i = 0; i < S::stages - 1; ++i) {
      if (begin + i < end) w.copy(i);
      commit();
    }
    int slot = 0, free = S::stages - 1, into_group = fold == 64 ? begin % c.group_steps : 0;
    for (int i = 0; i < c.part_steps; ++i) {
      const int step = begin + i;
      wait<S::stages - 2>();
      w.meet();
      if (step + S::stages - 1 < end) w.copy(free);
      commit();
      if (step < end) {
        const bool ends = ++into_group == c.group_steps || step + 1 == end;
        mine.add_step(w, slot, ends);
        if (ends) into_group = 0;
      }
      slot = slot + 1 < S::stages ? slot + 1 : 0;
      free = free + 1 < S::stages ? free + 1 : 0;
    }
    wait<0>();
    sync();
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r)
#pragma unroll
      for (int i = 0; i < S::m_tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = 8 * i + w.lane % 4 * 2 + e % 2;
          const int n = (w.warp_n * S::row_tiles + r) * 16 + w.lane / 4 + 8 * (e / 2);
          if (m < w.rows) sums[(w.warp_k * c.x_rows + m) * S::pitch + n] = mine.acc[r][i][e];
        }
    sync();
    for (int i = thread; i < w.rows * S::rows_n; i += kThreads) {
      const int m = i / S::rows_n, n = i % S::rows_n;
      float total = 0.0f;
#pragma unroll
      for (int pair = 0; pair < S::pairs; ++pair) {
        const int at = (2 * pair * c.x_rows + m) * S::pitch + n;
        const float both = sums[at] + sums[at + c.x_rows * S::pitch];
        if (splits > 1) {
          partial[(round * S::pairs + pair) * tile_floats + i] = both;
          continue;
        }
        if (pair > 0)
          total += both;
        else
          total = round > 0 ? totals[i] + both : both;
      }
      if (splits > 1) continue;
      if (round + 1 < S::rounds)
        totals[i] = total;
      else if (first_n + n < c.n)
        finish(c, w.first_m + m, first_n + n, total);
    }
    sync();
  }

  if (splits == 1) return;
  bool last = false;
  if (thread == 0) {
    fence();
    last = atomic_add(c.arrived + blockIdx.x, 1) == splits - 1;
    fence();
  }
  if (!sync_any(last)) return;
  for (int i = thread; i < w.rows * S::rows_n; i += kThreads) {
    const int m = i / S::rows_n, n = first_n + i % S::rows_n;
    float total = partial[i];
#pragma unroll
    for (int pair = 1; pair < kPairs; ++pair) total += partial[pair * tile_floats + i];
    if (n < c.n) finish(c, w.first_m + m, n, total);
  }
}

// ---- the launcher

template <class T, class S, int fold, bool shifted>
const char* run(const QuantMatmul& p, Stream stream) {
  constexpr int kBytes[] = {4, 2, 2, 4, 2, 1, 1};
  Call<T> c{};
  c.x = static_cast<const T*>(p.x), c.y = static_cast<T*>(p.y);
  c.q = static_cast<const uint8_t*>(p.q), c.scale = static_cast<const uint8_t*>(p.scale);
  if (shifted) c.shift = static_cast<const uint8_t*>(p.shift);
  c.has_bias = p.bias != nullptr, c.bias_is_float = p.bias_type == 0;
  if (c.has_bias && c.bias_is_float) c.bias = static_cast<const float*>(p.bias);
  if (c.has_bias && !c.bias_is_float) c.bias_as_x = static_cast<const T*>(p.bias);
  c.x_row = p.x_row, c.x_column = p.x_column;
  c.whole_pieces = (p.x_column == 1 || p.k <= 1) && (p.x_row % 8 == 0 || p.m <= 1) &&
                   reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  c.group_steps = fold == 64 && p.group_size != -1 ? static_cast<int>(p.group_size / 64) : 1 << 30;
  if (fold == 32) c.group_factor = (int64_t{1} << 40) / (p.group_size / 32) + 1;
  c.m = static_cast<int>(p.m), c.n = static_cast<int>(p.n), c.k = static_cast<int>(p.k);
  c.m_blocks = static_cast<int>(p.plan.m_blocks), c.row_tiles = static_cast<int>((p.n + 15) / 16);
  c.groups = static_cast<int>(p.groups), c.steps = static_cast<int>((p.k + kStep - 1) / kStep);
  c.part_steps = (c.steps + kParts - 1) / kParts;
  c.x_rows = c.m < S::rows_m ? c.m : S::rows_m;
  c.scale_type = static_cast<int>(p.scale_type), c.shift_type = static_cast<int>(p.shift_type);
  c.scale_bytes = kBytes[p.scale_type], c.shift_bytes = kBytes[p.shift_type];
  c.shift_is_zero = p.shift_is_zero;
  c.activation = static_cast<int>(p.activation), c.slope = p.slope;
  if (p.plan.splits > 1) {
    c.arrived = static_cast<int*>(p.arrived), c.partial = p.partial;
    if (const char* error = clear(p.arrived, 4 * static_cast<size_t>(p.plan.blocks), stream)) return error;
  }
  const Layout<S, fold, shifted> at(c.x_rows);
  const bool keeps_totals = S::rounds > 1 && p.plan.splits == 1;
  const int bytes = at.totals + (keeps_totals ? 4 * c.x_rows * S::rows_n : 0);
  const dim3 grid(static_cast<unsigned>(p.plan.blocks), static_cast<unsigned>(p.plan.splits));
  return launch(quant_matmul<T, S, fold, shifted>, grid, dim3(kThreads), static_cast<size_t>(bytes), stream,
                c);
}

template <class T, class S, bool shifted>
const char* run_groups(const QuantMatmul& p, Stream stream) {
  if (p.group_size == -1 || p.group_size % 64 == 0) return run<T, S, 64, shifted>(p, stream);
  return run<T, S, 32, shifted>(p, stream);
}

template <class T, class S>
const char* run_any(const QuantMatmul& p, Stream stream) {
  return p.shift ? run_groups<T, S, true>(p, stream) : run_groups<T, S, false>(p, stream);
}

template <class T, int bits>
const char* run_shape(const QuantMatmul& p, Stream stream) {
  constexpr bool four = bits == 4;  // 8-bit codes fill shared memory with fewer stages
  switch (p.plan.kind) {
    case 0:
      return run_any<T, Shape<bits, 1, 1, 1, four ? 8 : 4>>(p, stream);
    case 1:
      return run_any<T, Shape<bits, 2, 2, 1, four ? 5 : 4>>(p, stream);
    case 2:
      return run_any<T, Shape<bits, 4, 2, 4, 4>>(p, stream);
    case 3:
      return run_groups<T, Shape<bits, 8, 2, 4, four ? 4 : 3>, false>(p, stream);
    default:
      return run_groups<T, Shape<bits, 8, 1, 4, 4>, true>(p, stream);
  }
}

template <int bits>
const char* run_type(const QuantMatmul* p, void* stream) {
  const auto queue = static_cast<Stream>(stream);
  return p->x_type == 1 ? run_shape<bf16, bits>(*p, queue) : run_shape<fp16, bits>(*p, queue);
}

}  // namespace
}  // namespace pyarch
