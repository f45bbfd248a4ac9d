// bf16, fp16 and int8 as kernels see them: fewer bits in memory, float in registers; 8 and 16 bytes as
// floats.
#pragma once

#include "device.h"

#if defined(PYARCH_EMU)
#include "../include/vec.h"  // the same types and conversions on the host
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pyarch {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

PYARCH_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
PYARCH_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }

PYARCH_DEVICE float to_float(float x) { return x; }
PYARCH_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYARCH_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
PYARCH_DEVICE T from_float(float x);  // to the nearest, of two the even one
template <>
PYARCH_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
PYARCH_DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
PYARCH_DEVICE fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

}  // namespace pyarch
#endif

namespace pyarch {

template <class T>
constexpr int kPer16 = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

PYARCH_DEVICE void unpack_word(uint32_t word, float, float* to) { to[0] = bits_to_float(word); }
PYARCH_DEVICE void unpack_word(uint32_t word, bf16, float* to) {
  to[0] = bits_to_float(word << 16);
  to[1] = bits_to_float(word & 0xffff0000u);
}
PYARCH_DEVICE void unpack_word(uint32_t word, fp16, float* to) {
  to[0] = to_float(fp16{static_cast<uint16_t>(word)});
  to[1] = to_float(fp16{static_cast<uint16_t>(word >> 16)});
}

PYARCH_DEVICE void unpack_word(uint32_t word, int8_t, float* to) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = static_cast<float>(static_cast<int8_t>(word >> 8 * i));
}

// The elements of 8 bytes, and the kPer16<T> of 16.
template <class T>
PYARCH_DEVICE void unpack(Bytes8 bytes, float* to) {
  unpack_word(bytes.x, T{}, to);
  unpack_word(bytes.y, T{}, to + kPer16<T> / 4);
}
template <class T>
PYARCH_DEVICE void unpack(Bytes16 bytes, float* to) {
  constexpr int each = kPer16<T> / 4;
  unpack_word(bytes.x, T{}, to);
  unpack_word(bytes.y, T{}, to + each);
  unpack_word(bytes.z, T{}, to + 2 * each);
  unpack_word(bytes.w, T{}, to + 3 * each);
}

PYARCH_DEVICE Bytes16 pack(const float* from) {
  return {float_to_bits(from[0]), float_to_bits(from[1]), float_to_bits(from[2]), float_to_bits(from[3])};
}

}  // namespace pyarch
