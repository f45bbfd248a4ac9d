// rms_norm: one row a task; two passes over a row that stays in L1.
//   s = x + residual;  y = s * rsqrt(mean(s^2) + eps) * weight,  in fp32, rounded once on the way out.
#include "operators.h"
#include "tensor.h"
#include "types.h"
#include "vec.h"

namespace pyarch {
namespace {

constexpr int64_t kRowsFloats =
    16384;  // floats a task should touch at least: under that a second thread costs more

template <class T>
float sum_of_squares(const T* x, const T* residual, T* sum, int64_t n) {
  F acc[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0, lane = 0; i < n; i += W, lane = (lane + 1) & 3) {
    const int left = static_cast<int>(std::min<int64_t>(W, n - i));
    F v = left == W ? load(x + i) : load(x + i, left);
    if (residual) {
      v = v + (left == W ? load(residual + i) : load(residual + i, left));
      left == W ? store(sum + i, v) : store(sum + i, v, left);
      v = left == W ? load(sum + i) : load(sum + i, left);  // the norm is of the sum as stored
    }
    acc[lane] = fma(v, v, acc[lane]);
  }
  return hsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

template <class T, class TW>
void row(const T* s, const TW* weight, float inverse, T* y, int64_t n) {
  const F k = set1(inverse);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(s + i) * k * load(weight + i));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store(y + i, load(s + i, left) * k * load(weight + i, left), left);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, std::optional<Tensor> residual, double eps) {
  PYARCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x: must be contiguous [rows, n]");
  const int64_t rows = x.size(0), n = x.size(1);
  PYARCH_CHECK(weight.dim() == 1 && weight.size(0) == n && weight.is_contiguous(),
               "weight: must be contiguous [n]");
  if (residual)
    PYARCH_CHECK(residual->dim() == 2 && residual->size(0) == rows && residual->size(1) == n &&
                     residual->is_contiguous() && residual->scalar_type() == x.scalar_type(),
                 "residual: must be like x");
  Tensor y = empty({rows, n}, x.scalar_type());
  Tensor sum = residual ? empty({rows, n}, x.scalar_type()) : empty({0}, x.scalar_type());
  with_float_type(x.scalar_type(), "x", [&](auto tag) {
    using T = decltype(tag);
    with_float_type(weight.scalar_type(), "weight", [&](auto weight_tag) {
      using TW = decltype(weight_tag);
      const T* px = static_cast<const T*>(x.data_ptr());
      const T* pr = residual ? static_cast<const T*>(residual->data_ptr()) : nullptr;
      const TW* pw = static_cast<const TW*>(weight.data_ptr());
      T *py = static_cast<T*>(y.data_ptr()), *ps = static_cast<T*>(sum.data_ptr());
      const int64_t block = std::max<int64_t>(1, kRowsFloats / std::max<int64_t>(n, 1));
      parallel_tasks((rows + block - 1) / block, [&](int64_t task) {
        for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r) {
          const float squares =
              sum_of_squares<T>(px + r * n, pr ? pr + r * n : nullptr, pr ? ps + r * n : nullptr, n);
          const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(n) + static_cast<float>(eps));
          row<T, TW>(pr ? ps + r * n : px + r * n, pw, inverse, py + r * n, n);
        }
      });
    });
  });
  return {y, sum};
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("rms_norm__cpu", TORCH_BOX(&rms_norm)); }

}  // namespace pyarch
