// What a block of quant_matmul (quant_matmul_kernel.h) is about, where its memory lies, and its copies to
// shared memory.
#pragma once

#include "quant_matmul_weights.h"

namespace pyarch {
namespace {

constexpr int kThreads = 256, kWarps = 8, kParts = 8, kPairs = 4;

template <class T>
struct Call {
  Global<const T> x, bias_as_x;
  Global<const float> bias;
  Global<const uint8_t> q, scale, shift;
  Global<T> y;
  Global<float> partial;  // (tile, pair of parts) -> [rows of x][rows of w]
  Global<int> arrived;    // (tile)
  int64_t x_row, x_column;
  int64_t group_factor;  // of groups that end within steps: that of column 32 u is u * group_factor >> 40
  int m, n, k, m_blocks, row_tiles, groups, steps, part_steps;
  int group_steps;  // of other groups; more than there are for the whole row
  int x_rows;       // of x in shared memory
  int scale_type, scale_bytes, shift_type, shift_bytes, activation;
  bool whole_pieces, has_bias, bias_is_float, shift_is_zero;
  float slope;
};

template <int bits_, int m_tiles_, int row_tiles_, int warps_n_, int stages_>
struct Shape {
  static constexpr int bits = bits_, m_tiles = m_tiles_, row_tiles = row_tiles_, warps_n = warps_n_;
  static constexpr int stages = stages_, warps_k = kWarps / warps_n, pairs = warps_k / 2;  // pairs: a round
  static constexpr int rows_m = 8 * m_tiles, rows_n = 16 * row_tiles * warps_n, pitch = rows_n + 4;
  static constexpr int rounds = kParts / warps_k;
};

// Byte offsets in shared memory. A stage has x of each part, then what each warp has for itself: codes,
// scales, shifts. The sums of a round take the ring's place; totals are kept beside it.
template <class S, int fold, bool shifted>
struct Layout {
  static constexpr int codes = 128 * S::bits, halves = 64 / fold, grid = (shifted ? 2 : 1) * halves * 64;
  static constexpr int own = S::row_tiles * (codes + grid);
  int x, stage, totals;

  PYARCH_BOTH explicit Layout(int x_rows) {
    x = 128 * x_rows;
    stage = S::warps_k * x + kWarps * own;
    const int ring = S::stages * stage, sums = 4 * S::warps_k * x_rows * S::pitch;
    totals = ring > sums ? ring : sums;
  }
};

// What a thread is, where its things lie, and what it copies next.
template <class T, class S, int fold, bool shifted>
struct Worker {
  using At = Layout<S, fold, shifted>;
  const Call<T>& c;
  At at;
  int lane, warp_n, warp_k, first_m, rows, first_tile, x_byte, own_byte;

  PYARCH_DEVICE explicit Worker(const Call<T>& call) : c(call), at(call.x_rows) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    lane = thread % 32, warp_n = warp % S::warps_n, warp_k = warp / S::warps_n;
    first_m = static_cast<int>(blockIdx.x) % c.m_blocks * S::rows_m;
    rows = c.m - first_m < S::rows_m ? c.m - first_m : S::rows_m;
    first_tile = (static_cast<int>(blockIdx.x) / c.m_blocks * S::warps_n + warp_n) * S::row_tiles;
    x_byte = warp_k * at.x;
    own_byte = S::warps_k * at.x + warp * At::own;
    // A lane copies 16 bytes of grids: 16 rows of 4, 2 or 1 bytes are that many times 16.
    const int r = lane / 16, half = lane / 4 % 2, piece = lane % 4;
    is_shift = lane / 8 % 2;
    grid_bytes = is_shift ? c.shift_bytes : c.scale_bytes;
    has_grid = r < S::row_tiles && first_tile + r < c.row_tiles && (shifted || !is_shift) &&
               half < At::halves && piece < grid_bytes;
    grid_to = S::row_tiles * At::codes + r * At::grid + (is_shift * At::halves + half) * 64 + piece * 16;
  }

  // Makes `step` the next one to copy.
  PYARCH_DEVICE void start(int step) {
    const int piece = lane % 8, column = step * kStep + piece * 8;
    next = step;
    codes_from = c.q + (int64_t{first_tile} * c.steps + step) * At::codes + lane * 16;
    x_from = c.x + ((first_m + x_first()) * c.x_row + column * c.x_column);
    x_left = c.k - column;
    into_group = fold == 64 ? step % c.group_steps : 0;
    if (has_grid) go_to_group(fold == 64 ? step / c.group_steps : 0);
  }

  // Threads that read the same x wait for one another.
  PYARCH_DEVICE void meet() const { S::warps_n == 1 ? sync_warp() : sync(); }

  PYARCH_DEVICE void copy(int slot) {
    const int base = slot * at.stage, own = base + own_byte;
#pragma unroll
    for (int r = 0; r < S::row_tiles; ++r) {
      if (first_tile + r >= c.row_tiles) break;
      const Global<const uint8_t> from = codes_from + int64_t{r} * c.steps * At::codes;
#pragma unroll
      for (int v = 0; v < S::bits / 4; ++v)
        cp16(shared<uint8_t>(own + r * At::codes + v * 512 + lane * 16), from + v * 512);
    }
    if (has_grid) {
      if constexpr (fold == 32) {
        const int group = static_cast<int>((2 * next + lane / 4 % 2) * c.group_factor >> 40);
        go_to_group(group < c.groups ? group : c.groups - 1);  // the second half of the last step, past K
      }
      cp16(shared<uint8_t>(own + grid_to), grid_from);
    }
    copy_x(base + x_byte);

    ++next;
    codes_from += At::codes;
    x_from += kStep * c.x_column;
    x_left -= kStep;
    if (fold == 64 && ++into_group == c.group_steps) {
      into_group = 0;
      grid_from += 16 * grid_bytes;
    }
  }

 private:
  Global<const uint8_t> codes_from, grid_from;
  Global<const T> x_from;
  int next, x_left, into_group, is_shift, grid_bytes, grid_to;
  bool has_grid;

  PYARCH_DEVICE int x_first() const { return warp_n * 4 + lane / 8; }

  PYARCH_DEVICE void go_to_group(int group) {
    grid_from = (is_shift ? c.shift : c.scale) +
                ((int64_t{first_tile + lane / 16} * c.groups + group) * grid_bytes + lane % 4) * 16;
  }

  // Every thread one piece of 8 columns of some rows.
  PYARCH_DEVICE void copy_x(int byte) const {
    constexpr int apart = 4 * S::warps_n;
    const int left = x_left < 0 ? 0 : x_left < 8 ? x_left : 8;
    Global<const T> from = x_from;
#pragma unroll 1  // registers are dear where there are many rows
    for (int m = x_first(); m < rows; m += apart, from += apart * c.x_row) {
      const Shared<T> to = shared<T>(byte + m * 128 + (lane % 8 ^ (m & 7)) * 16);
      if (c.whole_pieces)
        cp16_part(to, from, 2 * left);
      else  // rows of x that do not begin at multiples of 16 bytes, or are not contiguous
#pragma unroll 1
        for (int e = 0; e < 8; ++e) to[e] = e < left ? from[e * c.x_column] : T{0};
    }
  }
};

}  // namespace
}  // namespace pyarch
