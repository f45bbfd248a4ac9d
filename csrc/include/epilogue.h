// The end of a matrix product, act(sum + bias), in fp32. The codes are those of pyarch/ops/_activation.py.
#pragma once

#include "vec.h"

namespace pyarch {

enum class Activation : int64_t { kNone, kRelu, kSilu, kGelu, kGeluTanh, kLeakyRelu, kCount };

// exp(x^2) * erfc(x) for x >= 0: t times a polynomial in t = 1 / (1 + x / 2), relative error 1e-7.
inline F erfcx(F x) {
  const F t = set1(1.0f) / fma(x, set1(0.5f), set1(1.0f));
  F p = set1(0.042352542f);
  constexpr float kTerms[] = {-0.23085734f, 0.4861781f,  -0.44697645f, 0.1270887f,  -0.057232134f,
                              0.0930005f,   0.17537683f, 0.24688059f,  0.28209385f, 0.2820948f};
  for (const float c : kTerms) p = fma(p, t, set1(c));
  return p * t;
}

// x times the normal distribution's cumulative function Phi(x) = erfc(-x / sqrt 2) / 2.
inline F gelu(F x) {
  const F lower = set1(0.5f) * erfcx(abs(x) * set1(0.70710678f)) * exp(x * x * set1(-0.5f));  // Phi(-|x|)
  // max(x, 0) - |x| Phi(-|x|) is x Phi(x) on both sides.
  return max(set1(0.0f), x) - abs(x) * lower;
}

inline F sigmoid(F x) { return set1(1.0f) / (set1(1.0f) + exp(set1(0.0f) - x)); }

inline F activate(Activation activation, float slope, F x) {
  switch (activation) {
    case Activation::kRelu:
      return max(set1(0.0f), x);  // the second operand is the result for NaN
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh: {
      const F cubic = fma(x * x, set1(0.044715f), set1(1.0f)) * x;
      return x *
             sigmoid(cubic * set1(1.5957691f));  // (1 + tanh(u)) / 2 = sigmoid(2 u), u = sqrt(2 / pi) * cubic
    }
    case Activation::kLeakyRelu:
      return max(set1(0.0f), x) + set1(slope) * min(set1(0.0f), x);
    default:
      return x;
  }
}

}  // namespace pyarch
