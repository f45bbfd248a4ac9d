// swiglu: y = silu(gate) * up for rows [gate | up]; one pass, fp32, rounded once.
#include "operators.h"
#include "tensor.h"
#include "types.h"
#include "vec.h"

namespace pyarch {
namespace {

constexpr int64_t kTaskFeatures = 16384;  // a second thread costs more than less work than this

template <class T>
void gated(const T* gate, const T* up, T* y, int64_t n) {
  const F one = set1(1.0f);
  const auto silu = [&](F g, F u) { return g / (one + exp(zero() - g)) * u; };
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, silu(load(gate + i), load(up + i)));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(y + i, silu(load(gate + i, left), load(up + i, left)), left);
  }
}

}  // namespace

Tensor swiglu(Tensor x) {
  PYARCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x: must be [rows, 2 * features]");
  PYARCH_CHECK(x.numel() == 0 || x.stride(1) == 1, "x: the last dimension must be contiguous");
  const int64_t rows = x.size(0), n = x.size(1) / 2, step = x.stride(0);
  Tensor y = empty({rows, n}, x.scalar_type());
  if (rows * n == 0) return y;
  with_float_type(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    const T* px = static_cast<const T*>(x.data_ptr());
    T* py = static_cast<T*>(y.data_ptr());
    // Long rows are cut into pieces, short ones put together.
    const int64_t pieces = (n + kTaskFeatures - 1) / kTaskFeatures,
                  together = std::max<int64_t>(1, kTaskFeatures / n);
    parallel_tasks((rows + together - 1) / together * pieces, [&](int64_t task) {
      const int64_t first = task / pieces * together, from = task % pieces * kTaskFeatures;
      for (int64_t r = first; r < std::min(rows, first + together); ++r)
        gated<T>(px + r * step + from, px + r * step + n + from, py + r * n + from,
                 std::min(kTaskFeatures, n - from));
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("swiglu__cpu", TORCH_BOX(&swiglu)); }

}  // namespace pyarch
