// sample: a token per row, one row a task. The weights of a row are computed once into scratch. Without a
// limit the draw walks their running sum. With one, a floor that no kept weight can be under (from the maxima
// of groups for top_k, from the mass for top_p) leaves few candidates. Each limit keeps a prefix of these in
// the order "larger first, of equal ones the lower index first"; where it ends is found by radix selection on
// the bits of the weights (bits of positive floats order like their values): count and mass per bucket of the
// leading bits, then of the next bits within the bucket where the prefix ends, and so on. Nothing is sorted.
#include <cfloat>
#include <functional>

#include "tensor.h"
#include "types.h"
#include "vec.h"

namespace pyarch {
namespace {

constexpr int kShift[] = {20, 10, 0};  // the levels of the selection: a weight in [0, 1] has 30 bits
constexpr int kBuckets = 1024;
constexpr int64_t kBlock = 1024;  // weights are summed as floats within a block, as doubles over blocks
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Limits {
  float temperature;
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  float min_p;    // 0: none
};

// The largest logit; infinite if there is a NaN.
template <class T>
float largest(const T* x, int64_t n) {
  F top = set1(-kInfinity);
  int64_t i = 0;
  for (; i + W <= n; i += W)
    top = max(top, min(load(x + i), set1(kInfinity)));  // min gives its second operand for NaN
  float result = hmax(top);
  for (; i < n; ++i) {
    const float v = to_float(x[i]);
    result = v != v ? kInfinity : std::max(result, v);
  }
  return result;
}

template <class T>
int64_t first_of(const T* x, float value) {
  int64_t i = 0;
  while (to_float(x[i]) != value) ++i;
  return i;
}

// w = exp((x - top) / temperature), and zeros up to a multiple of kBlock.
template <class T>
void weigh(const T* x, float* w, int64_t n, float top, float temperature) {
  const F t = set1(top), divisor = set1(temperature);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(w + i, exp((load(x + i) - t) / divisor));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(w + i, exp((load(x + i, left) - t) / divisor), left);
  }
  for (i = n; i % kBlock; ++i) w[i] = 0;
}

double block_sum(const float* w) {
  F sum[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < kBlock; i += 4 * W)
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(w + i + j * W);
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

double sum(const float* w, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; i += kBlock) total += block_sum(w + i);
  return total;
}

// At least k weights are as large as the k-th largest of the maxima of groups. A group is a lane of a block.
float floor_of_top(const float* w, int64_t n, int64_t k) {
  struct Maxima;
  const int64_t groups = n / kBlock * W;
  if (k > groups) return 0;
  float* maxima = scratch<Maxima, float>(groups);
  for (int64_t block = 0; block < n / kBlock; ++block) {
    F top = zero();
    for (int64_t i = 0; i < kBlock; i += W) top = max(top, load(w + block * kBlock + i));
    store(maxima + block * W, top);
  }
  std::nth_element(maxima, maxima + k - 1, maxima + groups, std::greater<float>());
  return maxima[k - 1];
}

struct Candidate {
  float weight;
  int32_t index;
};

int64_t collect(const float* w, int64_t n, float floor, Candidate* found) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    found[count] = {w[i], static_cast<int32_t>(i)};
    count += w[i] >= floor;
  }
  return count;
}

double mass(const Candidate* c, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += c[i].weight;
  return total;
}

// Keeps the shortest prefix of the order that has so many candidates or so much mass; returns how many.
int64_t keep(Candidate* c, int64_t n, int64_t count, double mass) {
  struct Bucket {
    int64_t count;
    double mass;
  };
  Bucket* buckets = scratch<Bucket, Bucket>(kBuckets);
  uint32_t last = 0;  // the bits of the prefix's last weight, level by level
  for (int level = 0; level < 3; ++level) {
    const int shift = kShift[level], above = level == 0 ? 30 : kShift[level - 1];
    std::fill_n(buckets, kBuckets, Bucket{0, 0});
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = float_to_bits(c[i].weight);
      if (bits >> above != last >> above) continue;
      Bucket& b = buckets[bits >> shift & (kBuckets - 1)];
      ++b.count;
      b.mass += c[i].weight;
    }
    uint32_t at = kBuckets - 1;
    for (; at > 0 && buckets[at].count < count && buckets[at].mass < mass; --at) {
      count -= buckets[at].count;
      mass -= buckets[at].mass;
    }
    last |= at << shift;
  }
  const float least = bits_to_float(last);
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool tie = c[i].weight == least && count > 0 && mass > 0;
    if (tie) {
      --count;
      mass -= least;
    }
    if (tie || c[i].weight > least) c[kept++] = c[i];
  }
  return kept;
}

// The first index at which the running sum exceeds u times the sum of all.
int64_t draw(const float* w, int64_t n, double u) {
  double left = u * sum(w, n);
  for (int64_t start = 0; start < n; start += kBlock) {
    const double block = block_sum(w + start);
    if (left >= block) {
      left -= block;
      continue;
    }
    for (int64_t i = start; i < start + kBlock; ++i) {
      left -= w[i];
      if (left < 0) return i;
    }
  }
  int64_t i = n - 1;  // rounding: the last one kept
  while (w[i] == 0) --i;
  return i;
}

// The same among candidates.
int64_t draw(const Candidate* c, int64_t n, double u) {
  double left = u * mass(c, n);
  int64_t i = 0;
  while (i + 1 < n && (left -= c[i].weight) >= 0) ++i;
  return c[i].index;
}

template <class T>
int64_t token(const T* x, int64_t n, float top, double u, const Limits& limits) {
  struct Weights;
  struct Candidates;
  const int64_t padded = (n + kBlock - 1) / kBlock * kBlock;
  float* w = scratch<Weights, float>(padded);
  weigh(x, w, n, top, limits.temperature);
  const bool some = limits.top_k > 0 && limits.top_k < n;
  if (!some && limits.min_p == 0 && limits.top_p == 1) return draw(w, padded, u);

  float floor = limits.min_p;
  if (some) floor = std::max(floor, floor_of_top(w, padded, limits.top_k));
  double total = 0;
  if (!some && limits.min_p == 0) {
    // All under this together have no more than half of what top_p leaves out.
    total = sum(w, padded);
    floor = static_cast<float>(0.5 * (1 - limits.top_p) * total / static_cast<double>(n));
  }
  Candidate* c = scratch<Candidates, Candidate>(n + 1);
  int64_t count = collect(w, n, floor, c);
  if (some) count = keep(c, count, limits.top_k, DBL_MAX);
  if (limits.top_p < 1)
    count = keep(c, count, INT64_MAX, limits.top_p * (total > 0 ? total : mass(c, count)));
  return draw(c, count, u);
}

}  // namespace

Tensor sample(Tensor logits, std::optional<Tensor> uniform, double temperature, int64_t top_k, double top_p,
              double min_p) {
  PYARCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: must be [rows, vocabulary]");
  const int64_t rows = logits.size(0), n = logits.size(1), step = logits.stride(0);
  PYARCH_CHECK(n <= INT32_MAX, "logits: more than 2^31 - 1 columns");
  PYARCH_CHECK(n == 1 || rows == 0 || logits.stride(1) == 1, "logits: the last dimension must be contiguous");
  PYARCH_CHECK(temperature >= 0 && temperature < kInfinity, "temperature: must be finite and at least 0");
  PYARCH_CHECK(top_k >= 0, "top_k: must be at least 0");
  PYARCH_CHECK(top_p > 0 && top_p <= 1, "top_p: must be above 0 and at most 1");
  PYARCH_CHECK(min_p >= 0 && min_p <= 1, "min_p: must be 0 to 1");
  const double* u = nullptr;
  if (temperature > 0) {
    PYARCH_CHECK(uniform && uniform->dim() == 1 && uniform->size(0) == rows && uniform->is_contiguous() &&
                     uniform->scalar_type() == ScalarType::Double,
                 "uniform: must be contiguous float64 [rows]");
    u = static_cast<const double*>(uniform->data_ptr());
  }
  const Limits limits{std::max(static_cast<float>(temperature), FLT_MIN), top_k, top_p,
                      static_cast<float>(min_p)};
  Tensor tokens = empty({rows}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(tokens.data_ptr());
  with_float_type(logits.scalar_type(), "logits", [&](auto tag) {
    using T = decltype(tag);
    const T* x = static_cast<const T*>(logits.data_ptr());
    struct Tops;
    float* tops = scratch<Tops, float>(rows);
    parallel_tasks(rows, [&](int64_t r) { tops[r] = largest(x + r * step, n); });
    for (int64_t r = 0; r < rows; ++r)
      PYARCH_CHECK(std::fabs(tops[r]) < kInfinity, "logits: row ", r,
                   " holds NaN or +inf, or nothing above -inf");
    parallel_tasks(rows, [&](int64_t r) {
      out[r] = u ? token(x + r * step, n, tops[r], u[r], limits) : first_of(x + r * step, tops[r]);
    });
  });
  return tokens;
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("sample__cpu", TORCH_BOX(&sample)); }

}  // namespace pyarch
