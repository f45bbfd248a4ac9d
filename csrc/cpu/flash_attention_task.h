// One task of flash attention: some tiles of up to kRows packed rows (query, head of the group) of one
// sequence and one key head, against all keys they may see. What a row becomes depends on its own sequence
// alone, and is bitwise the same for every number of threads, batch and position in the tile: a lane never
// looks at another, blocks of keys start at multiples of kKeys, and a masked key adds exactly nothing.
#pragma once

#include <vector>

#include "flash_attention_tile.h"
#include "tensor.h"

namespace pyarch::flash {

struct Strides {  // of a (batch, head, row, column) tensor, in elements
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

struct Sequence {
  int64_t batch, index;  // of the tensors; of the ALiBi slopes
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
};

// All tasks of a call, on torch's threads. paged_attention runs its prompts through it too.
template <class T>
void run(const Call<T>& call, const std::vector<Sequence>& sequences, int64_t kv_heads);

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// At most kRows rows and what they have accumulated.
struct Tile {
  int rows, vectors;  // rows lie in `vectors` vectors of lanes
  float *q, *out;     // [words of D][vectors * W], [Dv][vectors * W]
  float maximum[kRows], total[kRows];
  int64_t query[kRows], head[kRows], low[kRows], high[kRows];  // keys low to high are seen
  int64_t begin, end;                                          // by any row
};

template <class T, class Dot>
class Task {
 public:
  static constexpr int kTiles = 4;  // of one task, which share each block of packed keys and values

  Task(const Call<T>& call, const Sequence& sequence, int64_t kv_head, int64_t first_row, int64_t rows)
      : c(call), s(sequence), kv_head(kv_head), count(static_cast<int>((rows + kRows - 1) / kRows)) {
    words = static_cast<int>((c.head_dim + kPer - 1) / kPer);
    columns = static_cast<int>(round_up(c.value_dim, kColumns));
    k_ld = round_up(words, W);
    const int64_t out_rows = round_up(columns, W);
    float* memory =
        scratch<Task, float>((count * (k_ld + out_rows) + 2 * kKeys) * kRows + kKeys * (k_ld + columns));
    for (int n = 0; n < count; ++n, memory += (k_ld + out_rows) * kRows)
      prepare(tiles[n], memory, memory + k_ld * kRows, first_row + n * kRows,
              std::min<int64_t>(kRows, rows - n * kRows));
    scores = memory;
    addend = scores + kKeys * kRows;
    k_packed = addend + kKeys * kRows;
    v_packed = k_packed + kKeys * k_ld;
  }

  void run() {
    const int64_t end = tiles[count - 1].end;  // both ends grow with the query
    for (int64_t j0 = tiles[0].begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kKeys, end - j0));
      int64_t k_step, v_step;
      const Word *k = load_keys(j0, keys, &k_step), *v = load_values(j0, keys, &v_step);
      for (int n = 0; n < count; ++n)
        if (tiles[n].begin < j0 + keys && tiles[n].end > j0)
          for_vectors(tiles[n], [&](auto vectors) {
            attend<decltype(vectors)::value>(tiles[n], j0, k, k_step, v, v_step);
          });
    }
    for (int n = 0; n < count; ++n)
      for_vectors(tiles[n], [&](auto vectors) { finish<decltype(vectors)::value>(tiles[n]); });
  }

 private:
  static constexpr int kPer = Dot::kPerWord;
  // Whether T lies in memory as the words that Dot multiplies.
  static constexpr bool kNative = kPer == 2 || std::is_same_v<T, float>;

  template <class Function>
  static void for_vectors(const Tile& tile, const Function& f) {
    if (tile.vectors == 1)
      f(std::integral_constant<int, 1>{});
    else if (tile.vectors == 2)
      f(std::integral_constant<int, 2>{});
    else
      f(std::integral_constant<int, kRowVectors>{});
  }

  void prepare(Tile& tile, float* q, float* out, int64_t first_row, int64_t rows) {
    tile.rows = static_cast<int>(rows), tile.vectors = static_cast<int>((rows + W - 1) / W);
    tile.q = q, tile.out = out;
    int64_t query = first_row / c.group, member = first_row % c.group;
    for (int m = 0; m < tile.vectors * W; ++m) {  // lanes beyond the rows repeat the last and are not written
      if (m > 0 && m < tile.rows && ++member == c.group) member = 0, ++query;
      tile.query[m] = query;
      tile.head[m] = kv_head * c.group + member;
      const int64_t own = tile.query[m] + s.k_length - s.q_length;  // causal is aligned to the bottom right
      tile.low[m] = std::max<int64_t>(0, own - c.left);
      tile.high[m] = std::min(s.k_length - 1, own + c.right);
      tile.maximum[m] = c.sinks ? c.sinks[tile.head[m]] * kLog2e : -kInf;
      tile.total[m] = tile.maximum[m] == -kInf ? 0.0f : 1.0f;
    }
    tile.begin = tile.low[0], tile.end = tile.high[tile.vectors * W - 1] + 1;
    std::fill_n(out, columns * tile.vectors * W, 0.0f);
    pack_queries(tile);
  }

  template <int R>
  void attend(Tile& tile, int64_t j0, const Word* k, int64_t k_step, const Word* v, int64_t v_step) {
    F most[R], decay[R];
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, tile.end - j0));
    const int padded = static_cast<int>(round_up(keys, kColumns)),
              even = static_cast<int>(round_up(keys, kPer));
    const float factor = c.softcap > 0 ? c.scale / c.softcap : c.scale * kLog2e;
    score<Dot, R>(tile.q, k, k_step, padded, words, factor, scores, most);
    const bool whole = tile.high[0] >= j0 + padded - 1 && tile.low[R * W - 1] <= j0;
    if (!whole || c.softcap > 0 || c.bias || c.mask || c.slopes) adjust<R>(tile, j0, keys, padded, most);
    soften<Dot, R>(scores, even, most, tile.maximum, tile.total, decay);
    accumulate<Dot, R>(scores, v, v_step, columns, even / kPer, decay, tile.out);
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

  void pack_queries(const Tile& tile) {
    float row[W][W];
    const int64_t step = c.q_strides.column;
    for (int r = 0; r < tile.vectors; ++r)
      for (int w = 0; w < words; w += W) {
        F x[W];
        for (int i = 0; i < W; ++i) {
          const int m = r * W + i;
          const T* p = c.q + s.batch * c.q_strides.batch + tile.head[m] * c.q_strides.head +
                       (s.q_start + tile.query[m]) * c.q_strides.row + w * kPer * step;
          const int64_t left = c.head_dim - w * kPer;
          if (step == 1 && left >= W * kPer) {
            x[i] = load_words(p, W);
          } else {
            pack_row(p, step, std::min<int64_t>(left, W * kPer), row[i]);
            x[i] = load(row[i], static_cast<int>(std::min<int64_t>(W, words - w)));
          }
        }
        transpose(x);
        for (int i = 0; i < std::min(W, words - w); ++i)
          store(tile.q + ((w + i) * tile.vectors + r) * W, x[i]);
      }
  }

  const Word* load_keys(int64_t j0, int keys, int64_t* ld) {
    const int padded = static_cast<int>(round_up(keys, kColumns));
    const Strides& t = c.k_strides;
    const T* p = c.k + s.batch * t.batch + kv_head * t.head + (s.k_start + j0) * t.row;
    if (kNative && t.column == 1 && c.head_dim % kPer == 0 && t.row % kPer == 0 &&
        j0 + padded <= s.k_length) {
      *ld = t.row / kPer;
      return reinterpret_cast<const Word*>(p);
    }
    *ld = k_ld;
    for (int j = 0; j < keys; ++j) pack_row(p + j * t.row, t.column, c.head_dim, k_packed + j * k_ld);
    for (int j = keys; j < padded; ++j) std::fill_n(k_packed + j * k_ld, words, 0.0f);
    return k_packed;
  }

  const Word* load_values(int64_t j0, int keys, int64_t* ld) {
    const Strides& t = c.v_strides;
    const T* p = c.v + s.batch * t.batch + kv_head * t.head + (s.k_start + j0) * t.row;
    const int64_t n = c.value_dim;
    *ld = columns;
    if constexpr (kPer == 1) {
      if (kNative && t.column == 1 && n % kColumns == 0) {
        *ld = t.row;
        return reinterpret_cast<const Word*>(p);
      }
      for (int j = 0; j < keys; ++j) {
        pack_row(p + j * t.row, t.column, n, v_packed + j * columns);
        std::fill(v_packed + j * columns + n, v_packed + (j + 1) * columns, 0.0f);
      }
    } else {
      for (int j = 0; j < keys; j += 2, p += 2 * t.row) {
        float* to = v_packed + j / 2 * columns;
        const bool both = j + 1 < keys;
        if (t.column == 1)
          Dot::interleave(p, both ? p + t.row : nullptr, n, to);
        else
          for (int64_t d = 0; d < n; ++d) to[d] = word(p + d * t.column, t.row, both ? 2 : 1);
        std::fill(to + n, to + columns, 0.0f);
      }
    }
    return v_packed;
  }

  // What a key and a row have between them: bias and mask, as one number to add in the exponent.
  template <int R>
  void gather_addend(const Tile& tile, int64_t j0, int keys) {
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

  // Softcap, bias, ALiBi, masks and the borders of the window, on a block of scores; its maxima anew.
  template <int R>
  void adjust(const Tile& tile, int64_t j0, int keys, int padded, F (&most)[R]) {
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
        if (c.softcap > 0) t = tanh(t) * set1(c.softcap * kLog2e);
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

  template <int R>
  void finish(const Tile& tile) {
    for (int r = 0; r < R; ++r) {
      const F total = load(tile.total + r * W);
      const F inverse = select(total == zero(), zero(), set1(1.0f) / total);
      int64_t row[W];
      const int rows = std::min(W, tile.rows - r * W);
      for (int i = 0; i < rows; ++i) {
        const int m = r * W + i;
        row[i] = s.batch * c.heads * c.rows + tile.head[m] * c.head_step +
                 (s.q_start + tile.query[m]) * c.row_step;
        c.lse[row[i]] = tile.total[m] == 0.0f ? -kInf : tile.maximum[m] * kLn2 + std::log(tile.total[m]);
      }
      for (int64_t d = 0; d < c.value_dim; d += W) {
        F x[W];
        for (int i = 0; i < W; ++i) x[i] = load(tile.out + (d + i) * R * W + r * W) * inverse;
        transpose(x);
        const int n = static_cast<int>(std::min<int64_t>(W, c.value_dim - d));
        for (int i = 0; i < rows; ++i) store(c.out + row[i] * c.value_dim + d, x[i], n);
      }
    }
  }

  const Call<T>& c;
  const Sequence& s;
  int64_t kv_head, k_ld;
  int count, words, columns;
  float *scores, *addend, *k_packed, *v_packed;
  Tile tiles[kTiles];
};

}  // namespace pyarch::flash
