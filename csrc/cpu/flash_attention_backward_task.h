// One task of the gradient of flash attention: blocks of keys of one sequence and one key head against all
// rows that see them. Scores are computed again, and with rows in the lanes as in the forward:
//
//     P  [keys][rows]  =  exp(S - lse)                  S = K Q^T, and what adjust() makes of it
//     dP [keys][rows]  =  V dO^T
//     dS [keys][rows]  =  P (dP + inner)                inner = dlse - sum over the keys of P dP, of a row
//     dV [keys][Dv]   +=  P dO                          P and dS are broadcast, columns in the lanes
//     dK [keys][D]    +=  dS Q
//     dQ^T [D][rows]  +=  K^T dS                        rows in the lanes
//
// With dropout dP, and P in dV, are 0 where a weight is dropped, else 1 / (1 - dropout_p) of themselves.
// A task owns its keys' dK and dV. Its part of dQ is summed with those of the other tasks of the head, in the
// order of the keys, by finish(). So the results do not depend on the number of threads.
#pragma once

#include "flash_attention_block.h"

namespace pyarch::flash {

template <class T>
struct Gradient {
  const T *d_out, *out;
  Strides d_out_strides, out_strides;
  const float *lse, *d_lse;  // [batch][heads][rows], contiguous
  float* inner;              // likewise
  float* d_slopes;           // likewise, of every row; or null
  float* d_bias;             // or null
  Strides d_bias_strides;    // 0 where the bias broadcasts
  T *d_q, *d_k, *d_v;        // contiguous
  int64_t kv_heads, keys;
};

template <class T, class Dot>
class Backward : Block<T, Dot> {
  using Base = Block<T, Dot>;
  using Base::c, Base::s, Base::kv_head, Base::scores, Base::addend, Base::kept, Base::kPer;

 public:
  static constexpr int kBlocks = 4, kMostBlocks = 16;  // of keys, for which a tile of rows is packed once

  Backward(const Call<T>& call, const Gradient<T>& gradient, const Sequence& sequence, int64_t kv_head)
      : Base(call, sequence, kv_head), g(gradient) {
    words = static_cast<int>((c.head_dim + kPer - 1) / kPer);
    v_words = static_cast<int>((c.value_dim + kPer - 1) / kPer);
    columns = static_cast<int>(round_up(c.head_dim, kColumns));
    ld = round_up(c.head_dim, W), v_ld = round_up(c.value_dim, W);
    blocks = narrow(c) && ld + v_ld <= 256 ? kMostBlocks : kBlocks;  // of 512 the span leaves the cache
    constexpr int64_t kTile = kKeys * kRows;
    const int64_t span = blocks * kKeys;
    float* memory = scratch<Backward, float>(7 * kTile + 2 * (kRows + span) * (ld + v_ld) + span * ld);
    const auto take = [&](int64_t n) { return std::exchange(memory, memory + n); };
    scores = take(kTile), addend = take(kTile), d_scores = take(kTile), bend = take(kTile);
    p_lanes = take(kTile), ds_lanes = take(kTile);
    q_tile = take(kRows * ld), q_rows = take(kRows * ld);
    do_tile = take(kRows * v_ld), do_rows = take(kRows * v_ld);
    d_k = take(span * ld), d_v = take(span * v_ld);
    k_packed = take(span * ld), v_packed = take(span * v_ld), columns_packed = take(span * ld);
    kept = take(kTile);
  }

  // Floats of a tile's part of dQ^T, and of the gradient of its slopes.
  static int64_t part_size(const Call<T>& call) { return (round_up(call.head_dim, W) + 1) * kRows; }

  // Keys that a tile of rows sees at most, if there are so many.
  static int64_t width(const Call<T>& call) { return call.left + call.right + kRows; }

  // Whether they are so few that most tiles would lie in several spans of kBlocks, and be packed for each.
  static bool narrow(const Call<T>& call) { return width(call) <= kMostBlocks * kKeys; }

  // inner of a tile's rows. The sum of P dP is dO . O, but O has the digits of T: where those are few, and of
  // few keys, over which their error does not average, it is summed itself.
  void weigh(int64_t tile, bool exact) {
    prepare(tile);
    const bool summed = exact || (sizeof(T) == 2 && rows.end - rows.begin <= kKeys);
    if (summed) Base::pack_lanes(rows, c.q, c.q_strides, c.head_dim, q_tile);
    if (!summed) Base::pack_lanes(rows, g.out, g.out_strides, c.value_dim, do_rows);
    Base::for_vectors(rows, [&](auto vectors) {
      constexpr int R = decltype(vectors)::value;
      float sum[kRows];
      summed ? sum_products<R>(sum) : dot_rows<R>(sum);
      for (int m = 0; m < rows.rows; ++m) {
        const int64_t i = index(m);
        g.inner[i] = (g.lse[i] == -kInf ? 0.0f : g.d_lse[i]) - sum[m];
      }
    });
  }

  // dK and dV of the keys from `first` to `last`, and what they add to dQ: parts of the tiles that see them.
  void run(int64_t first, int64_t last, float* parts) {
    const int64_t tiles = (s.q_length * c.group + kRows - 1) / kRows;
    for (int64_t n = 0; n < tiles; ++n)
      if (sees(n, first, last)) std::fill_n(parts + n * part_size(c), part_size(c), 0.0f);
    for (int64_t j0 = first, span = blocks * kKeys; j0 < last; j0 += span) {
      const int64_t j1 = std::min(last, j0 + span);
      load_span(j0, j1);
      std::fill_n(d_k, round_up(j1 - j0, kColumns) * ld, 0.0f);
      std::fill_n(d_v, round_up(j1 - j0, kColumns) * v_ld, 0.0f);
      for (int64_t n = 0; n < tiles; ++n) {
        if (!sees(n, j0, j1)) continue;
        prepare(n);
        Base::pack_lanes(rows, c.q, c.q_strides, c.head_dim, q_tile);
        pack_rows(c.q, c.q_strides, c.head_dim, ld, q_rows);
        pack_rows(g.d_out, g.d_out_strides, c.value_dim, v_ld, do_rows);
        Base::for_vectors(rows, [&](auto vectors) {
          for (int b = 0; b < blocks && j0 + b * kKeys < j1; ++b)
            differentiate<decltype(vectors)::value>(j0, b, j1, parts + n * part_size(c));
        });
      }
      write(d_k, ld, c.head_dim, c.scale, j0, j1, g.d_k);
      write(d_v, v_ld, c.value_dim, c.dropout.scale, j0, j1, g.d_v);
    }
  }

  // dQ of a tile's rows from the parts of every `span` keys, `step` floats apart.
  void finish(int64_t tile, const float* parts, int64_t span, int64_t step) {
    Base::place(rows, tile * kRows, std::min<int64_t>(kRows, s.q_length * c.group - tile * kRows));
    parts += tile * part_size(c);
    const int lanes = rows.vectors * W;
    int64_t begin = 0, end = 0;  // the parts that the tile is in
    for (int64_t j = 0, n = 0; j < s.k_length; j += span, ++n)
      if (sees(tile, j, std::min(j + span, s.k_length))) begin = end == 0 ? n : begin, end = n + 1;
    const auto sum = [&](int64_t at) {
      F x = zero();
      for (int64_t n = begin; n < end; ++n) x = x + load(parts + n * step + at);
      return x;
    };
    for (int r = 0; r < rows.vectors; ++r) {
      const int n = std::min(W, rows.rows - r * W);
      for (int64_t d = 0; d < c.head_dim; d += W) {
        F x[W];
        for (int i = 0; i < W; ++i) x[i] = sum((d + i) * lanes + r * W) * set1(c.scale);
        transpose(x);
        const int left = static_cast<int>(std::min<int64_t>(W, c.head_dim - d));
        for (int i = 0; i < n; ++i) store(g.d_q + index(r * W + i) * c.head_dim + d, x[i], left);
      }
      if (!g.d_slopes) continue;
      float x[W];
      store(x, sum(ld * lanes + r * W));
      for (int i = 0; i < n; ++i) g.d_slopes[index(r * W + i)] = x[i];
    }
  }

 private:
  // Whether a row of the tile can see a key from `first` to `last`.
  bool sees(int64_t tile, int64_t first, int64_t last) const {
    const int64_t own = s.k_length - s.q_length, row = tile * kRows;
    const int64_t end = std::min(row + kRows, s.q_length * c.group) - 1;
    return end / c.group + own + c.right >= first && row / c.group + own - c.left < last;
  }

  int64_t index(int m) const {
    return (s.batch * c.heads + rows.head[m]) * c.rows + s.q_start + rows.query[m];
  }

  void prepare(int64_t tile) {
    Base::place(rows, tile * kRows, std::min<int64_t>(kRows, s.q_length * c.group - tile * kRows));
    for (int m = 0; m < rows.vectors * W; ++m) {
      const int64_t i = index(m);
      const bool real = m < rows.rows && g.lse[i] != -kInf;  // of other lanes P is 0
      lse[m] = real ? g.lse[i] : kInf;
      inner[m] = real ? g.inner[i] : 0.0f;
    }
    Base::pack_lanes(rows, g.d_out, g.d_out_strides, c.value_dim, do_tile);
  }

  // Rows of x as words of neighbouring rows, [rows / kPer][ld], padded with zeros.
  void pack_rows(const T* x, const Strides& t, int64_t dim, int64_t ld, float* to) {
    for (int m = 0; m < rows.rows; m += kPer, to += ld) {
      const T* a = Base::row_of(rows, m, x, t);
      if constexpr (kPer == 1) {
        Base::pack_row(a, t.column, dim, to);
      } else {
        const T* b = m + 1 < rows.rows ? Base::row_of(rows, m + 1, x, t) : nullptr;
        if (t.column == 1)
          Dot::interleave(a, b, dim, to);
        else
          for (int64_t d = 0; d < dim; ++d)
            to[d] = bits_to_float(a[d * t.column].bits | (b ? b[d * t.column].bits : 0u) << 16);
      }
      std::fill(to + dim, to + ld, 0.0f);
    }
  }

  void load_block(int64_t j0, int b, int64_t j1) {
    const int64_t j = j0 + b * kKeys;
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, j1 - j));
    k[b] = Base::load_rows(c.k, c.k_strides, c.head_dim, j, keys, k_packed + b * kKeys * ld, &k_step);
    v[b] = Base::load_rows(c.v, c.v_strides, c.value_dim, j, keys, v_packed + b * kKeys * v_ld, &v_step);
    k_steps[b] = k_step, v_steps[b] = v_step;
  }

  void load_span(int64_t j0, int64_t j1) {
    for (int b = 0; b < blocks && j0 + b * kKeys < j1; ++b) {
      load_block(j0, b, j1);
      const int64_t j = j0 + b * kKeys;
      k_columns[b] = Base::load_columns(c.k, c.k_strides, c.head_dim, j,
                                        static_cast<int>(std::min<int64_t>(kKeys, j1 - j)),
                                        columns_packed + b * kKeys * ld, &column_steps[b]);
    }
  }

  // Scores of block b from its key `skip` on, which is j, as exponents of 2 before the lse is taken off; dP,
  // scaled by dropout, and in `kept` what it keeps.
  template <int R>
  void score_block(int64_t j, int b, int skip, int keys) {
    const int padded = static_cast<int>(round_up(keys, kColumns));
    const float factor = c.softcap > 0 ? c.scale / c.softcap : c.scale * kLog2e;
    F most[R];
    score<Dot, R>(do_tile, v[b] + skip * v_steps[b], v_steps[b], padded, v_words, c.dropout.scale, d_scores,
                  most);
    score<Dot, R>(q_tile, k[b] + skip * k_steps[b], k_steps[b], padded, words, factor, scores, most);
    if (!this->plain(rows, j, padded)) this->template adjust<R>(rows, j, keys, padded, most, bend);
    if (c.dropout.on) this->template draw<R>(rows, j - skip, skip, skip + padded, kept);
  }

  static F probability(F score, F lse) { return exp2_nonpositive(fma(lse, set1(-kLog2e), score)); }

  template <int R>
  void differentiate(int64_t j0, int b, int64_t j1, float* part) {
    const int64_t block = j0 + b * kKeys;
    if (rows.begin >= std::min(block + kKeys, j1) || rows.end <= block) return;
    const int skip = static_cast<int>(std::max<int64_t>(rows.begin - block, 0) / kColumns * kColumns);
    const int keys = static_cast<int>(std::min({int64_t{kKeys}, j1 - block, rows.end - block})) - skip;
    const int padded = static_cast<int>(round_up(keys, kColumns));
    const int64_t j = block + skip, at = b * kKeys + skip;
    score_block<R>(j, b, skip, keys);
    c.dropout.on ? derive<R, true>(j, skip, padded, part) : derive<R, false>(j, skip, padded, part);
    if (g.d_bias) add_bias<R>(j, keys);
    const float *p = kPer == 1 ? scores : p_lanes, *ds = kPer == 1 ? d_scores : ds_lanes;
    const int64_t step = R * W / kPer;
    const int depth = (rows.rows + kPer - 1) / kPer;
    combine<Dot>(do_rows, v_ld, p, step, padded, depth, d_v + at * v_ld);
    combine<Dot>(q_rows, ld, ds, step, padded, depth, d_k + at * ld);
    F one[R];
    for (int r = 0; r < R; ++r) one[r] = set1(1.0f);
    accumulate<Dot, R>(d_scores, k_columns[b] + skip / kPer * column_steps[b], column_steps[b], columns,
                       (keys + kPer - 1) / kPer, one, part);
  }

  // P and dS of a block's keys from `skip` on, which is j0, in the layouts of the three products; the
  // gradient of the slopes.
  template <int R, bool kDropout>
  void derive(int64_t j0, int skip, int padded, float* part) {
    const float* keep = kept + skip * R * W;
    for (int r = 0; r < R; ++r) {
      const F row_lse = load(lse + r * W), row_inner = load(inner + r * W);
      float own[W];
      for (int i = 0; i < W; ++i)
        own[i] = static_cast<float>(rows.query[r * W + i] + s.k_length - s.q_length - j0);
      const F position = load(own);
      F slope = zero();
      for (int j = 0; j < padded; j += kPer) {
        F ds[kPer];
#pragma GCC unroll 2
        for (int e = 0; e < kPer; ++e) {
          const int64_t at = ((j + e) * R + r) * W;
          F p = probability(load(scores + at), row_lse), dp = load(d_scores + at);
          if constexpr (kDropout) dp = dp * load(keep + at);
          F d = p * (dp + row_inner);
          if constexpr (kDropout) p = p * load(keep + at);
          if (g.d_slopes) slope = slope - d * abs(position - set1(static_cast<float>(j + e)));
          if (g.d_bias) store(addend + at, d);
          if (c.softcap > 0) d = d * load(bend + at);
          ds[e] = d;
          if constexpr (kPer == 1) {
            store(scores + at, p);
          } else {
            Dot::store_lanes(p_lanes + at / 2, p);
            Dot::store_lanes(ds_lanes + at / 2, d);
          }
        }
        // Only rows that are read already are written, as in soften().
        store(d_scores + (j / kPer * R + r) * W, Dot::pack(ds));
      }
      if (g.d_slopes) {
        float* to = part + ld * R * W + r * W;
        store(to, load(to) + slope);
      }
    }
  }

  template <int R>
  void add_bias(int64_t j, int keys) {
    const Strides& t = g.d_bias_strides;
    const auto at = [&](int m) {
      return g.d_bias + s.batch * t.batch + rows.head[m] * t.head + (s.q_start + rows.query[m]) * t.row +
             (s.k_start + j) * t.column;
    };
    if (t.row == 0 &&
        (t.head == 0 || c.group == 1)) {  // one element for all rows; in lanes beyond them dS is 0
      for (int n = 0; n < keys; ++n) {
        F sum = load(addend + n * R * W);
        for (int r = 1; r < R; ++r) sum = sum + load(addend + (n * R + r) * W);
        at(0)[n * t.column] += hsum(sum);
      }
      return;
    }
    for (int r = 0; r < R && t.column == 1; ++r)
      for (int n = 0; n < keys; n += W) {
        const int left = std::min(W, keys - n);
        F x[W];
        for (int i = 0; i < W; ++i) x[i] = load(addend + ((n + i) * R + r) * W);
        transpose(x);
        for (int i = 0; i < std::min(W, rows.rows - r * W); ++i) {
          float* to = at(r * W + i) + n;
          store(to, load(to, left) + x[i], left);
        }
      }
    for (int m = 0; m < rows.rows && t.column != 1; ++m)
      for (int n = 0; n < keys; ++n) at(m)[n * t.column] += addend[n * R * W + m];
  }

  // dO . O, summed in the order of dP: one key alone gives exactly 0 for dS.
  template <int R>
  void dot_rows(float* to) {
    for (int r = 0; r < R; ++r) {
      F total = zero();
      for (int w = 0; w < v_words; w += kChain) {
        F sum = zero();
        for (int i = w; i < std::min(v_words, w + kChain); ++i)
          sum = Dot::dot(load(do_tile + (i * R + r) * W), load(do_rows + (i * R + r) * W), sum);
        total = w == 0 ? sum : total + sum;
      }
      store(to + r * W, total);
    }
  }

  // The sum of P dP itself.
  template <int R>
  void sum_products(float* to) {
    F total[R];
    for (int r = 0; r < R; ++r) total[r] = zero();
    for (int64_t j = rows.begin / kKeys * kKeys; j < rows.end; j += kKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kKeys, rows.end - j));
      load_block(j, 0, j + keys);
      score_block<R>(j, 0, 0, keys);
      for (int r = 0; r < R; ++r)
        for (int n = 0; n < keys; ++n) {
          const int64_t at = (n * R + r) * W;
          F dp = load(d_scores + at);
          if (c.dropout.on) dp = dp * load(kept + at);
          total[r] = fma(probability(load(scores + at), load(lse + r * W)), dp, total[r]);
        }
    }
    for (int r = 0; r < R; ++r) store(to + r * W, total[r]);
  }

  void write(const float* from, int64_t ld, int64_t dim, float factor, int64_t j0, int64_t j1, T* to) const {
    to += ((s.batch * g.kv_heads + kv_head) * g.keys + s.k_start + j0) * dim;
    for (int64_t j = j0; j < j1; ++j, from += ld, to += dim)
      for (int64_t d = 0; d < dim; d += W)
        store(to + d, load(from + d) * set1(factor), static_cast<int>(std::min<int64_t>(W, dim - d)));
  }

  const Gradient<T>& g;
  int words, v_words, columns, blocks;
  int64_t ld, v_ld, k_step, v_step, k_steps[kMostBlocks], v_steps[kMostBlocks], column_steps[kMostBlocks];
  const Word *k[kMostBlocks], *v[kMostBlocks], *k_columns[kMostBlocks];
  float *d_scores, *bend, *p_lanes, *ds_lanes, *q_tile, *q_rows, *do_tile, *do_rows, *d_k, *d_v;
  float *k_packed, *v_packed, *columns_packed;
  float lse[kRows], inner[kRows];
  Rows rows;
};

}  // namespace pyarch::flash
