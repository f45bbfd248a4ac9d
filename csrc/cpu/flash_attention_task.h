// One task of flash attention: some tiles of rows against all keys they may see. What a row becomes depends
// on its own sequence alone, and is bitwise the same for every number of threads, batch and position in the
// tile: a lane never looks at another, blocks of keys start at multiples of kKeys, and a masked key adds
// exactly nothing.
#pragma once

#include <vector>

#include "flash_attention_block.h"

namespace pyarch::flash {

// All tasks of a call, on torch's threads. paged_attention runs its prompts through it too.
template <class T>
void run(const Call<T>& call, const std::vector<Sequence>& sequences, int64_t kv_heads);

// Rows and what they have accumulated.
struct Tile : Rows {
  float *q, *out;  // [words of D][vectors * W], [Dv][vectors * W]
  float maximum[kRows], total[kRows];
};

template <class T, class Dot>
class Task : Block<T, Dot> {
  using Base = Block<T, Dot>;
  using Base::c, Base::s, Base::kv_head, Base::scores, Base::kept, Base::kPer;

 public:
  static constexpr int kTiles = 4;  // of one task, which share each block of packed keys and values

  Task(const Call<T>& call, const Sequence& sequence, int64_t kv_head, int64_t first_row, int64_t rows)
      : Base(call, sequence, kv_head), count(static_cast<int>((rows + kRows - 1) / kRows)) {
    words = static_cast<int>((c.head_dim + kPer - 1) / kPer);
    columns = static_cast<int>(round_up(c.value_dim, kColumns));
    const int64_t k_ld = round_up(words, W), out_rows = round_up(columns, W);
    float* memory =
        scratch<Task, float>((count * (k_ld + out_rows) + 3 * kKeys) * kRows + kKeys * (k_ld + columns));
    for (int n = 0; n < count; ++n, memory += (k_ld + out_rows) * kRows)
      prepare(tiles[n], memory, memory + k_ld * kRows, first_row + n * kRows,
              std::min<int64_t>(kRows, rows - n * kRows));
    scores = memory;
    Base::addend = scores + kKeys * kRows;
    k_packed = Base::addend + kKeys * kRows;
    v_packed = k_packed + kKeys * k_ld;
    kept = v_packed + kKeys * columns;
  }

  void run() {
    const int64_t end = tiles[count - 1].end;  // both ends grow with the query
    for (int64_t j0 = tiles[0].begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kKeys, end - j0));
      int64_t k_step, v_step;
      const Word* k = Base::load_rows(c.k, c.k_strides, c.head_dim, j0, keys, k_packed, &k_step);
      const Word* v = Base::load_columns(c.v, c.v_strides, c.value_dim, j0, keys, v_packed, &v_step);
      for (int n = 0; n < count; ++n)
        if (tiles[n].begin < j0 + keys && tiles[n].end > j0)
          Base::for_vectors(tiles[n], [&](auto vectors) {
            attend<decltype(vectors)::value>(tiles[n], j0, k, k_step, v, v_step);
          });
    }
    for (int n = 0; n < count; ++n)
      Base::for_vectors(tiles[n], [&](auto vectors) { finish<decltype(vectors)::value>(tiles[n]); });
  }

 private:
  void prepare(Tile& tile, float* q, float* out, int64_t first_row, int64_t rows) {
    Base::place(tile, first_row, rows);
    tile.q = q, tile.out = out;
    for (int m = 0; m < tile.vectors * W; ++m) {
      tile.maximum[m] = c.sinks ? c.sinks[tile.head[m]] * kLog2e : -kInf;
      tile.total[m] = tile.maximum[m] == -kInf ? 0.0f : 1.0f;
    }
    std::fill_n(out, columns * tile.vectors * W, 0.0f);
    Base::pack_lanes(tile, c.q, c.q_strides, c.head_dim, q);
  }

  template <int R>
  void attend(Tile& tile, int64_t j0, const Word* k, int64_t k_step, const Word* v, int64_t v_step) {
    F most[R], decay[R];
    const int keys = static_cast<int>(std::min<int64_t>(kKeys, tile.end - j0));
    const int padded = static_cast<int>(round_up(keys, kColumns)),
              even = static_cast<int>(round_up(keys, kPer));
    const float factor = c.softcap > 0 ? c.scale / c.softcap : c.scale * kLog2e;
    score<Dot, R>(tile.q, k, k_step, padded, words, factor, scores, most);
    if (!this->plain(tile, j0, padded)) this->template adjust<R>(tile, j0, keys, padded, most);
    if (c.dropout.on) {
      this->template draw<R>(tile, j0, 0, even, kept);
      soften<Dot, R, true>(scores, kept, even, most, tile.maximum, tile.total, decay);
    } else {
      soften<Dot, R, false>(scores, nullptr, even, most, tile.maximum, tile.total, decay);
    }
    accumulate<Dot, R>(scores, v, v_step, columns, even / kPer, decay, tile.out);
  }

  template <int R>
  void finish(const Tile& tile) {
    for (int r = 0; r < R; ++r) {
      const F total = load(tile.total + r * W);
      const F inverse = select(total == zero(), zero(), set1(c.dropout.scale) / total);
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

  int count, words, columns;
  float *k_packed, *v_packed;
  Tile tiles[kTiles];
};

}  // namespace pyarch::flash
