// One task of flash attention: up to kRows packed rows (query, head of the group) of one sequence and one key
// head, against all keys they may see. What a row becomes depends on its own sequence alone, and is bitwise
// the same for every number of threads, batch and position in the tile: a lane never looks at another, blocks
// of keys start at multiples of kKeys, and a masked key adds exactly nothing.
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

template <class T, class Dot, int R>
class Task {
 public:
  Task(const Call<T>& call, const Sequence& sequence, int64_t kv_head, int64_t first_row, int64_t rows)
      : c(call), s(sequence), kv_head(kv_head), rows(static_cast<int>(rows)) {
    words = static_cast<int>((c.head_dim + kPer - 1) / kPer);
    columns = static_cast<int>(round_up(c.value_dim, kColumns));
    const int64_t k_words = round_up(words, W), out_rows = round_up(columns, W);
    float* memory =
        scratch<Task, float>((k_words + out_rows + 2 * kKeys) * kLanes + kKeys * (k_words + columns));
    q_words = memory;
    out = q_words + k_words * kLanes;
    scores = out + out_rows * kLanes;
    addend = scores + kKeys * kLanes;
    k_words_packed = addend + kKeys * kLanes;
    v_words_packed = k_words_packed + kKeys * k_words;
    k_ld = k_words;
    for (int m = 0; m < kLanes; ++m) {  // lanes beyond the rows repeat the last one and are not written
      const int64_t row = first_row + std::min(m, this->rows - 1);
      query[m] = row / c.group;
      head[m] = kv_head * c.group + row % c.group;
      const int64_t own = query[m] + s.k_length - s.q_length;  // causal is aligned to the bottom right
      low[m] = std::max<int64_t>(0, own - c.left);
      high[m] = std::min(s.k_length - 1, own + c.right);
    }
  }

  void run() {
    pack_queries();
    F maximum[R], total[R], most[R], decay[R];
    for (int r = 0; r < R; ++r) {
      float sink[W], one[W];
      for (int i = 0; i < W; ++i) {
        sink[i] = c.sinks ? c.sinks[head[r * W + i]] * kLog2e : -kInf;
        one[i] = sink[i] == -kInf ? 0.0f : 1.0f;
      }
      maximum[r] = load(sink), total[r] = load(one);
    }
    std::fill(out, out + columns * kLanes, 0.0f);
    const float factor = c.softcap > 0 ? c.scale / c.softcap : c.scale * kLog2e;
    const int64_t begin = low[0], end = high[kLanes - 1] + 1;  // both grow with the query
    for (int64_t j0 = begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kKeys, end - j0));
      const int padded = static_cast<int>(round_up(keys, kColumns));
      int64_t ld;
      const Word* k = load_keys(j0, keys, padded, &ld);
      score<Dot, R>(q_words, k, ld, padded, words, factor, scores, most);
      const bool whole = high[0] >= j0 + padded - 1 && low[kLanes - 1] <= j0;
      if (!whole || c.softcap > 0 || c.bias || c.mask || c.slopes) adjust(j0, keys, padded, most);
      const int even = static_cast<int>(round_up(keys, kPer));
      soften<R>(scores, even, most, maximum, total, decay);
      Dot::template pack_probabilities<R>(scores, even);
      const Word* v = load_values(j0, keys, &ld);
      accumulate<Dot, R>(scores, v, ld, columns, even / kPer, decay, out);
    }
    finish(maximum, total);
  }

 private:
  static constexpr int kPer = Dot::kPerWord, kLanes = R * W;
  // Whether T lies in memory as the words that Dot multiplies.
  static constexpr bool kNative = kPer == 2 || std::is_same_v<T, float>;

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

  void pack_queries() {
    float row[W][W];
    const int64_t step = c.q_strides.column;
    for (int r = 0; r < R; ++r)
      for (int w = 0; w < words; w += W) {
        F x[W];
        for (int i = 0; i < W; ++i) {
          const int m = r * W + i;
          const T* p = c.q + s.batch * c.q_strides.batch + head[m] * c.q_strides.head +
                       (s.q_start + query[m]) * c.q_strides.row + w * kPer * step;
          const int64_t left = c.head_dim - w * kPer;
          if (step == 1 && left >= W * kPer) {
            x[i] = load_words(p, W);
          } else {
            pack_row(p, step, std::min<int64_t>(left, W * kPer), row[i]);
            x[i] = load(row[i], static_cast<int>(std::min<int64_t>(W, words - w)));
          }
        }
        transpose(x);
        for (int i = 0; i < std::min(W, words - w); ++i) store(q_words + (w + i) * kLanes + r * W, x[i]);
      }
  }

  const Word* load_keys(int64_t j0, int keys, int padded, int64_t* ld) {
    const Strides& t = c.k_strides;
    const T* p = c.k + s.batch * t.batch + kv_head * t.head + (s.k_start + j0) * t.row;
    if (kNative && t.column == 1 && c.head_dim % kPer == 0 && t.row % kPer == 0 &&
        j0 + padded <= s.k_length) {
      *ld = t.row / kPer;
      return reinterpret_cast<const Word*>(p);
    }
    *ld = k_ld;
    for (int j = 0; j < keys; ++j) pack_row(p + j * t.row, t.column, c.head_dim, k_words_packed + j * k_ld);
    for (int j = keys; j < padded; ++j) std::fill_n(k_words_packed + j * k_ld, words, 0.0f);
    return k_words_packed;
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
        pack_row(p + j * t.row, t.column, n, v_words_packed + j * columns);
        std::fill(v_words_packed + j * columns + n, v_words_packed + (j + 1) * columns, 0.0f);
      }
    } else {
      for (int j = 0; j < keys; j += 2, p += 2 * t.row) {
        float* to = v_words_packed + j / 2 * columns;
        const bool both = j + 1 < keys;
        if (t.column == 1)
          Dot::interleave(p, both ? p + t.row : nullptr, n, to);
        else
          for (int64_t d = 0; d < n; ++d) to[d] = word(p + d * t.column, t.row, both ? 2 : 1);
        std::fill(to + n, to + columns, 0.0f);
      }
    }
    return v_words_packed;
  }

  // What a key and a row have between them: bias and mask, as one number to add in the exponent.
  void gather_addend(int64_t j0, int keys) {
    const auto at = [&](const Strides& t, int m) {
      return s.batch * t.batch + head[m] * t.head + (s.q_start + query[m]) * t.row +
             (s.k_start + j0) * t.column;
    };
    for (int m = 0; m < kLanes; ++m) {
      if (c.bias) {
        const int64_t offset = at(c.bias_strides, m), step = c.bias_strides.column;
        for (int j = 0; j < keys; ++j) {
          const int64_t i = offset + j * step;
          const float b = c.bias_is_fp32 ? static_cast<const float*>(c.bias)[i]
                                         : to_float(static_cast<const T*>(c.bias)[i]);
          addend[j * kLanes + m] = b * kLog2e;
        }
      } else {
        for (int j = 0; j < keys; ++j) addend[j * kLanes + m] = 0.0f;
      }
      if (c.mask) {
        const int64_t offset = at(c.mask_strides, m), step = c.mask_strides.column;
        for (int j = 0; j < keys; ++j)
          if (!c.mask[offset + j * step]) addend[j * kLanes + m] = -kInf;
      }
    }
  }

  // Softcap, bias, ALiBi, masks and the borders of the window, on a block of scores; its maxima anew.
  void adjust(int64_t j0, int keys, int padded, F (&most)[R]) {
    const bool added = c.bias || c.mask;
    if (added) gather_addend(j0, keys);
    for (int r = 0; r < R; ++r) {
      float from[W], to[W], own[W], slope[W];
      for (int i = 0; i < W; ++i) {  // relative to the block, where they are exact in fp32
        const int m = r * W + i;
        from[i] = static_cast<float>(std::min<int64_t>(low[m] - j0, kKeys));
        to[i] = static_cast<float>(std::max<int64_t>(std::min<int64_t>(high[m] - j0, kKeys), -1));
        own[i] = static_cast<float>(query[m] + s.k_length - s.q_length - j0);
        slope[i] = c.slopes ? c.slopes[s.index * c.slopes_stride + head[m]] * kLog2e : 0.0f;
      }
      const F lowest = load(from), highest = load(to), position = load(own), steep = load(slope);
      F top = set1(-kInf);
      for (int j = 0; j < padded; ++j) {
        float* p = scores + j * kLanes + r * W;
        const F key = set1(static_cast<float>(j)), none = set1(-kInf);
        F t = load(p);
        if (c.softcap > 0) t = tanh(t) * set1(c.softcap * kLog2e);
        if (c.slopes) t = t - steep * abs(position - key);
        if (added && j < keys) {
          const F a = load(addend + j * kLanes + r * W);
          t = select(a == none, none, t + a);
        }
        t = select((key >= lowest) & (key <= highest), t, none);
        top = max(top, t);
        store(p, t);
      }
      most[r] = top;
    }
  }

  void finish(const F (&maximum)[R], const F (&total)[R]) {
    for (int r = 0; r < R; ++r) {
      const F inverse = select(total[r] == zero(), zero(), set1(1.0f) / total[r]);
      float top[W], sum[W];
      store(top, maximum[r]), store(sum, total[r]);
      int64_t row[W];
      const int count = std::min(W, rows - r * W);
      for (int i = 0; i < count; ++i) {
        const int m = r * W + i;
        row[i] = s.batch * c.heads * c.rows + head[m] * c.head_step + (s.q_start + query[m]) * c.row_step;
        c.lse[row[i]] = sum[i] == 0.0f ? -kInf : top[i] * kLn2 + std::log(sum[i]);
      }
      for (int64_t d = 0; d < c.value_dim; d += W) {
        F x[W];
        for (int i = 0; i < W; ++i) x[i] = load(out + (d + i) * kLanes + r * W) * inverse;
        transpose(x);
        const int n = static_cast<int>(std::min<int64_t>(W, c.value_dim - d));
        for (int i = 0; i < count; ++i) store(c.out + row[i] * c.value_dim + d, x[i], n);
      }
    }
  }

  const Call<T>& c;
  const Sequence& s;
  int64_t kv_head, k_ld;
  int rows, words, columns;
  float *q_words, *out, *scores, *addend, *k_words_packed, *v_words_packed;
  int64_t query[kLanes], head[kLanes], low[kLanes], high[kLanes];
};

}  // namespace pyarch::flash
