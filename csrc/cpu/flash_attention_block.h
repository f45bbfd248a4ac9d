// What the tasks of flash attention, forward and backward, share: which keys a tile of rows may see, the
// tensors as words in the layouts that the products read, and everything that changes a score. A tile is up
// to kRows packed rows (query, head of the group) of one sequence and one key head.
#pragma once

#include "flash_attention_dropout.h"
#include "flash_attention_tile.h"
#include "tensor.h"

namespace pyarch::flash {

struct Strides {  // of a (batch, head, row, column) tensor, in elements
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct Sequence {
  int64_t batch, index;  // of the tensors; of the ALiBi slopes and dropout
  int64_t q_start, q_length, k_start, k_length;
};

template <class T>
struct Call {
  const T *q, *k, *v;
  Strides q_strides, k_strides, v_strides, bias_strides, mask_strides;
  const void* bias;  // fp32 or T, or null
  bool bias_is_fp32;
  const uint8_t* mask;    // or null
  const float* sinks;     // [heads] or null
  const float* slopes;    // or null
  int64_t slopes_stride;  // between sequences, 0 if they share them
  T* out;                 // rows of value_dim, head_step rows from head to head, row_step from query to query
  float* lse;             // likewise, one number a row
  int64_t heads, group, rows, head_dim, value_dim;
  int64_t left, right;  // keys that a row may see beside its own; large if all
  int64_t head_step, row_step;
  float scale, softcap;
  Dropout dropout;
};

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// At most kRows rows of a task, and the keys they see.
struct Rows {
  int rows, vectors;                                           // rows lie in `vectors` vectors of lanes
  int64_t query[kRows], head[kRows], low[kRows], high[kRows];  // keys low to high are seen
  int64_t begin, end;                                          // by any row
};

template <class T, class Dot>
class Block {
 protected:
  static constexpr int kPer = Dot::kPerWord;
  // Whether T lies in memory as the words that Dot multiplies.
  static constexpr bool kNative = kPer == 2 || std::is_same_v<T, float>;

  Block(const Call<T>& call, const Sequence& sequence, int64_t kv_head)
      : c(call), s(sequence), kv_head(kv_head) {}

  template <class Function>
  static void for_vectors(const Rows& tile, const Function& f) {
    if (tile.vectors == 1)
      f(std::integral_constant<int, 1>{});
    else if (tile.vectors == 2)
      f(std::integral_constant<int, 2>{});
    else
      f(std::integral_constant<int, kRowVectors>{});
  }

  void place(Rows& tile, int64_t first_row, int64_t rows) {
    tile.rows = static_cast<int>(rows), tile.vectors = static_cast<int>((rows + W - 1) / W);
    int64_t query = first_row / c.group, member = first_row % c.group;
    for (int m = 0; m < tile.vectors * W; ++m) {  // lanes beyond the rows repeat the last and are not written
      if (m > 0 && m < tile.rows && ++member == c.group) member = 0, ++query;
      tile.query[m] = query;
      tile.head[m] = kv_head * c.group + member;
      const int64_t own = tile.query[m] + s.k_length - s.q_length;  // causal is aligned to the bottom right
      tile.low[m] = std::max<int64_t>(0, own - c.left);
      tile.high[m] = std::min(s.k_length - 1, own + c.right);
    }
    tile.begin = tile.low[0], tile.end = tile.high[tile.vectors * W - 1] + 1;
  }

  const T* row_of(const Rows& tile, int m, const T* x, const Strides& t) const {
    return x + s.batch * t.batch + tile.head[m] * t.head + (s.q_start + tile.query[m]) * t.row;
  }

  static float word(const T* p, int64_t step,
                    int left) {  // of one element, or two, the second 0 past the end
    if constexpr (kPer == 1) {
      return to_float(*p);
    } else {
      const uint32_t second = left > 1 ? p[step].bits : 0;
      return bits_to_float(p->bits | second << 16);
    }
  }

  // `n` words of consecutive elements.
  static F load_words(const T* p, int n) {
    if constexpr (kPer == 1)
      return n == W ? load(p) : load(p, n);
    else
      return load(reinterpret_cast<const float*>(p), n);
  }

  // One row of `elements` as words, the last padded with a zero.
  static void pack_row(const T* p, int64_t step, int64_t elements, float* to) {
    int64_t d = 0;
    if (step == 1)
      for (; d + kPer <= elements; d += W * kPer) {
        const int n = static_cast<int>(std::min<int64_t>(W, (elements - d) / kPer));
        store(to + d / kPer, load_words(p + d, n), n);
      }
    for (d = std::min(d, elements / kPer * kPer); d < elements; d += kPer)
      to[d / kPer] = word(p + d * step, step, static_cast<int>(elements - d));
  }

  // Rows of x, of `dim` elements, as words [words of dim][vectors * W].
  void pack_lanes(const Rows& tile, const T* x, const Strides& t, int64_t dim, float* to) {
    float row[W][W];
    const int words = static_cast<int>((dim + kPer - 1) / kPer);
    for (int r = 0; r < tile.vectors; ++r)
      for (int w = 0; w < words; w += W) {
        F y[W];
        for (int i = 0; i < W; ++i) {
          const T* p = row_of(tile, r * W + i, x, t) + w * kPer * t.column;
          const int64_t left = dim - w * kPer;
          if (t.column == 1 && left >= W * kPer) {
            y[i] = load_words(p, W);
          } else {
            pack_row(p, t.column, std::min<int64_t>(left, W * kPer), row[i]);
            y[i] = load(row[i], static_cast<int>(std::min<int64_t>(W, words - w)));
          }
        }
        transpose(y);
        for (int i = 0; i < std::min(W, words - w); ++i) store(to + ((w + i) * tile.vectors + r) * W, y[i]);
      }
  }

  // Keys' or values' rows of `dim` elements as words, [keys][ld], rounded up to kColumns keys with zeros: in
  // the caller's memory where they lie so there, else packed.
  const Word* load_rows(const T* x, const Strides& t, int64_t dim, int64_t j0, int keys, float* packed,
                        int64_t* ld) {
    const int padded = static_cast<int>(round_up(keys, kColumns));
    const T* p = x + s.batch * t.batch + kv_head * t.head + (s.k_start + j0) * t.row;
    if (kNative && t.column == 1 && dim % kPer == 0 && t.row % kPer == 0 && j0 + padded <= s.k_length) {
      *ld = t.row / kPer;
      return reinterpret_cast<const Word*>(p);
    }
    const int64_t words = (dim + kPer - 1) / kPer;
    *ld = round_up(words, W);
    for (int j = 0; j < keys; ++j) pack_row(p + j * t.row, t.column, dim, packed + j * *ld);
    for (int j = keys; j < padded; ++j) std::fill_n(packed + j * *ld, words, 0.0f);
    return packed;
  }

  // Rows of n elements as words of neighbouring keys, [keys / kPer][ld], ld rounded up to kColumns with
  // zeros.
  const Word* load_columns(const T* x, const Strides& t, int64_t n, int64_t j0, int keys, float* packed,
                           int64_t* ld) {
    const T* p = x + s.batch * t.batch + kv_head * t.head + (s.k_start + j0) * t.row;
    const int64_t columns = round_up(n, kColumns);
    *ld = columns;
    if constexpr (kPer == 1) {
      if (kNative && t.column == 1 && n % kColumns == 0) {
        *ld = t.row;
        return reinterpret_cast<const Word*>(p);
      }
      for (int j = 0; j < keys; ++j) {
        pack_row(p + j * t.row, t.column, n, packed + j * columns);
        std::fill(packed + j * columns + n, packed + (j + 1) * columns, 0.0f);
      }
    } else {
      for (int j = 0; j < keys; j += 2, p += 2 * t.row) {
        float* to = packed + j / 2 * columns;
        const bool both = j + 1 < keys;
        if (t.column == 1)
          Dot::interleave(p, both ? p + t.row : nullptr, n, to);
        else
          for (int64_t d = 0; d < n; ++d) to[d] = word(p + d * t.column, t.row, both ? 2 : 1);
        std::fill(to + n, to + columns, 0.0f);
      }
    }
    return packed;
  }

  // What a key and a row have between them: bias and mask, as one number to add in the exponent.
  template <int R>
  void gather_addend(const Rows& tile, int64_t j0, int keys) {
    const auto at = [&](const Strides& t, int m) {
      return s.batch * t.batch + tile.head[m] * t.head + (s.q_start + tile.query[m]) * t.row +
             (s.k_start + j0) * t.column;
    };
    for (int m = 0; m < R * W; ++m) {
      if (c.bias) {
        const int64_t offset = at(c.bias_strides, m), step = c.bias_strides.column;
        for (int j = 0; j < keys; ++j) {
          const int64_t i = offset + j * step;
          const float b = c.bias_is_fp32 ? static_cast<const float*>(c.bias)[i]
                                         : to_float(static_cast<const T*>(c.bias)[i]);
          addend[j * R * W + m] = b * kLog2e;
        }
      } else {
        for (int j = 0; j < keys; ++j) addend[j * R * W + m] = 0.0f;
      }
      if (c.mask) {
        const int64_t offset = at(c.mask_strides, m), step = c.mask_strides.column;
        for (int j = 0; j < keys; ++j)
          if (!c.mask[offset + j * step]) addend[j * R * W + m] = -kInf;
      }
    }
  }

  // Whether adjust() has anything to do for a block.
  bool plain(const Rows& tile, int64_t j0, int padded) const {
    const bool whole = tile.high[0] >= j0 + padded - 1 && tile.low[tile.vectors * W - 1] <= j0;
    return whole && !(c.softcap > 0 || c.bias || c.mask || c.slopes);
  }

  // Softcap, bias, ALiBi, masks and the borders of the window, on a block of scores; its maxima anew, and the
  // derivative of the softcap where asked.
  template <int R>
  void adjust(const Rows& tile, int64_t j0, int keys, int padded, F (&most)[R], float* bend = nullptr) {
    const bool added = c.bias || c.mask;
    if (added) gather_addend<R>(tile, j0, keys);
    for (int r = 0; r < R; ++r) {
      float from[W], to[W], own[W], slope[W];
      for (int i = 0; i < W; ++i) {  // relative to the block, where they are exact in fp32
        const int m = r * W + i;
        from[i] = static_cast<float>(std::min<int64_t>(tile.low[m] - j0, kKeys));
        to[i] = static_cast<float>(std::max<int64_t>(std::min<int64_t>(tile.high[m] - j0, kKeys), -1));
        own[i] = static_cast<float>(tile.query[m] + s.k_length - s.q_length - j0);
        slope[i] = c.slopes ? c.slopes[s.index * c.slopes_stride + tile.head[m]] * kLog2e : 0.0f;
      }
      const F lowest = load(from), highest = load(to), position = load(own), steep = load(slope);
      F top = set1(-kInf);
      for (int j = 0; j < padded; ++j) {
        float* p = scores + j * R * W + r * W;
        const F key = set1(static_cast<float>(j)), none = set1(-kInf);
        F t = load(p);
        if (c.softcap > 0) {
          t = tanh(t);
          if (bend) store(bend + j * R * W + r * W, set1(1.0f) - t * t);
          t = t * set1(c.softcap * kLog2e);
        }
        if (c.slopes) t = t - steep * abs(position - key);
        if (added && j < keys) {
          const F a = load(addend + j * R * W + r * W);
          t = select(a == none, none, t + a);
        }
        t = select((key >= lowest) & (key <= highest), t, none);
        top = max(top, t);
        store(p, t);
      }
      most[r] = top;
    }
  }

  // What dropout keeps of a block's keys from `first` to `last`, in their place of [keys][R * W].
  template <int R>
  void draw(const Rows& tile, int64_t block, int first, int last, float* kept) {
    uint32_t query[R * W], head[R * W];
    for (int m = 0; m < R * W; ++m) {
      query[m] = static_cast<uint32_t>(tile.query[m]), head[m] = static_cast<uint32_t>(tile.head[m]);
    }
    first = first / kCallKeys * kCallKeys;
    const int keys = static_cast<int>(round_up(last, kCallKeys)) - first;
    draw_kept<R>(c.dropout, query, head, static_cast<uint32_t>(s.index), static_cast<uint32_t>(block + first),
                 keys, kept + first * R * W);
  }

  const Call<T>& c;
  const Sequence& s;
  int64_t kv_head;
  float *scores, *addend, *kept;
};

}  // namespace pyarch::flash
