// From a torch dtype to the C++ type it is in memory.
#pragma once

#include "tensor.h"
#include "vec.h"

namespace pyarch {

// Calls f with a value of the matching type: with_float_type(x.scalar_type(), "x", [&](auto tag) { using T =
// decltype(tag); ... })
template <class Function>
inline void with_float_type(ScalarType type, const char* argument, const Function& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bf16{});
    case ScalarType::Half:
      return f(fp16{});
    default:
      fail(argument, ": dtype must be float32, bfloat16 or float16");
  }
}

}  // namespace pyarch
