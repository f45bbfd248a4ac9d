// The end of a matrix product, act(sum + bias), in fp32: csrc/include/epilogue.h for one number. The codes
// are those of pyarch/ops/_activation.py.
#pragma once

#include <cmath>

#include "numbers.h"

namespace pyarch {

PYARCH_DEVICE float activate(int activation, float slope, float x) {
  switch (activation) {
    case 1:  // relu; NaN stays
      return x < 0.0f ? 0.0f : x;
    case 2:  // silu
      return x / (1.0f + expf(-x));
    case 3:  // gelu: erfc, since 1 + erf loses the digits of negative x
      return 0.5f * x * erfcf(-0.70710678f * x);
    case 4: {  // gelu_tanh: (1 + tanh u) / 2 = 1 / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
      const float u2 = 1.5957691f * fmaf(0.044715f * x * x, x, x);
      return x / (1.0f + expf(-u2));
    }
    case 5:  // leaky_relu
      return x < 0.0f ? slope * x : x;
    default:
      return x;
  }
}

}  // namespace pyarch
