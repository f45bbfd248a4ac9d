// Codes and grids of a weight in the order "fragments" (pyarch/orders.py), as the kernel reads them.
//
// A tile of 16 rows and 64 columns is 4 operands a of mma.m16n8k16 (mma.h), whose registers a lane has side
// by side in memory, so that a warp reads 512 bytes of 4-bit codes in order, 16 a lane, and shuffles nothing:
//
//   4-bit   word j of a lane's 16 bytes is operand j: nibbles i and i + 4 are the elements of a[i]
//   8-bit   16 bytes are two operands: bytes i % 2 and i % 2 + 2 of word 2j + i / 2 are the elements of a[i]
//
// The codes become 16-bit floats, less c = 8 (4-bit) or 0 (8-bit), without a conversion and exactly: a code
// is put into the last bits of a power of two, and a constant is subtracted.
#pragma once

#include "mma.h"

namespace pyarch {
namespace {

constexpr int kStep = 64;  // columns of a tile of codes
enum Type { kFloat, kBf16, kFp16, kInt32, kInt16, kInt8, kUint8 };

template <class T>
struct Magic;
template <>
struct Magic<bf16> {
  static constexpr uint32_t base = 0x43004300u, one = 0x3f803f80u;  // 128, of whose 7 bits codes are the last
};
template <>
struct Magic<fp16> {
  static constexpr uint32_t base = 0x64006400u, one = 0x3c003c00u;  // 1024, of 10 bits
};

// Operand j of those in some words.
template <class T, int bits>
PYARCH_DEVICE void operand(const uint32_t (&words)[4], int j, uint32_t (&a)[4]) {
  constexpr uint32_t base = Magic<T>::base;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (bits == 4) {
      a[i] = subtract2<T>(and_or(words[j] >> 4 * i, 0x000f000fu, base), base | 0x00080008u);
    } else {
      const uint32_t pair = words[2 * j + i / 2] >> 8 * (i % 2);
      if constexpr (Magic<T>::base == Magic<bf16>::base)
        // 128 plus the low 7 bits, less 128; of a negative code less 256, whose exponent is one higher.
        a[i] = subtract2<T>(and_or(pair, 0x007f007fu, base), and_or(pair, 0x00800080u, base));
      else
        a[i] = subtract2<T>((pair & 0x00ff00ffu) ^ (base | 0x00800080u), base | 0x00800080u);
    }
  }
}

// A number of a grid in shared memory, of a float type or of any.
PYARCH_DEVICE float float_value(int type, int byte, int i) {
  if (type == kFloat) return shared<const float>(byte)[i];
  if (type == kBf16) return to_float(shared<const bf16>(byte)[i]);
  return to_float(shared<const fp16>(byte)[i]);
}
PYARCH_DEVICE float grid_value(int type, int byte, int i) {
  switch (type) {
    case kInt32:
      return static_cast<float>(shared<const int32_t>(byte)[i]);
    case kInt16:
      return static_cast<float>(shared<const int16_t>(byte)[i]);
    case kInt8:
      return static_cast<float>(shared<const int8_t>(byte)[i]);
    case kUint8:
      return static_cast<float>(shared<const uint8_t>(byte)[i]);
    default:
      return float_value(type, byte, i);
  }
}

}  // namespace
}  // namespace pyarch
