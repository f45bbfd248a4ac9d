// Matrix instructions of a warp on 16-bit elements T, bf16 or fp16, as the PTX ISA lays them out. Lane l has
// g = l / 4 and t = l % 4; a register holds two elements, the first one in its low half.
//
//   ldmatrix4(r, row)   four 8x8 matrices from shared memory: lane l gives the address of row l % 8 of
//                       matrix l / 8, 16 bytes, aligned; r[i] is matrix i, row g, columns 2t and 2t + 1
//   ldmatrix4_transposed(r, row)   the same, but r[i] is rows 2t and 2t + 1 of matrix i, column g
//   transpose(x)        of an 8x8 matrix in registers: given row g, columns 2t and 2t + 1; gives rows 2t and
//                       2t + 1, column g
//   mma(d, a, b)        d += a b, with d [16, 8] in fp32, a [16, 16], b [16, 8]:
//                       a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] as these, 8 columns on
//                       b[0] rows 2t and 2t + 1, column g; b[1] as this, 8 rows on
//                       d[0], d[1] row g, columns 2t and 2t + 1; d[2], d[3] row g + 8
//   subtract2<T>(x, y)  x - y, two elements
//   and_or(x, y, z)     x & y | z, which nvcc makes two instructions of where y and z are constants
#pragma once

#include "numbers.h"

namespace pyarch {

#if defined(PYARCH_EMU)

template <bool transposed, class T>
void load_matrices(uint32_t (&r)[4], Shared<const T> row) {
  struct Part {
    const T* row;
    uint32_t* r;
    bool early;  // the row is read as this lane comes, not when all have come: nothing orders the two
    T read[8];
  } mine{row.wide(16), r, emu::chance(), {}};
  if (mine.early) std::memcpy(mine.read, mine.row, 16);
  emu::together(&mine, [](void* const* parts, int lanes) {
    if (lanes != 32) emu::fault("ldmatrix by a warp that is not full");
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        T two[2];
        for (int half = 0; half < 2; ++half) {
          const int row = transposed ? l % 4 * 2 + half : l / 4,
                    column = transposed ? l / 4 : l % 4 * 2 + half;
          const Part& from = *static_cast<Part*>(parts[8 * i + row]);
          two[half] = (from.early ? from.read : from.row)[column];
        }
        std::memcpy(&static_cast<Part*>(parts[l])->r[i], two, 4);
      }
  });
}
template <class T>
void ldmatrix4(uint32_t (&r)[4], Shared<const T> row) {
  load_matrices<false>(r, row);
}
template <class T>
void ldmatrix4_transposed(uint32_t (&r)[4], Shared<const T> row) {
  load_matrices<true>(r, row);
}

inline uint32_t transpose(uint32_t x) {
  struct Part {
    uint32_t given, received;
  } mine{x, 0};
  emu::together(&mine, [](void* const* parts, int lanes) {
    if (lanes != 32) emu::fault("movmatrix by a warp that is not full");
    for (int l = 0; l < 32; ++l)
      for (int half = 0; half < 2; ++half) {
        const int row = l % 4 * 2 + half, column = l / 4;
        const uint32_t word = static_cast<Part*>(parts[row * 4 + column / 2])->given;
        static_cast<Part*>(parts[l])->received |= (word >> 16 * (column % 2) & 0xffffu) << 16 * half;
      }
  });
  return mine.received;
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Part {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  emu::together(&mine, [](void* const* parts, int lanes) {
    if (lanes != 32) emu::fault("mma by a warp that is not full");
    const auto element = [](uint32_t word, int half) {
      return to_float(T{static_cast<uint16_t>(word >> 16 * half)});
    };
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const Part& part = *static_cast<Part*>(parts[l]);
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          a[l / 4 + i % 2 * 8][l % 4 * 2 + i / 2 * 8 + half] = element(part.a[i], half);
        for (int i = 0; i < 2; ++i) b[l % 4 * 2 + i * 8 + half][l / 4] = element(part.b[i], half);
      }
    }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        float& to = static_cast<Part*>(parts[l])->d[i];
        double sum = to;  // rounded once; a GPU cuts the sum's last bits in a way of its own
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(a[l / 4 + i / 2 * 8][k]) * b[k][l % 4 * 2 + i % 2];
        to = static_cast<float>(sum);
      }
  });
}

template <class T>
uint32_t subtract2(uint32_t x, uint32_t y) {
  uint32_t difference = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const T a{static_cast<uint16_t>(x >> shift)}, b{static_cast<uint16_t>(y >> shift)};
    difference |= uint32_t{from_float<T>(to_float(a) - to_float(b)).bits} << shift;
  }
  return difference;
}

inline uint32_t and_or(uint32_t x, uint32_t y, uint32_t z) { return (x & y) | z; }

#else

PYARCH_DEVICE uint32_t and_or(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
}

template <class T>
PYARCH_DEVICE void ldmatrix4(uint32_t (&r)[4], const T* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <class T>
PYARCH_DEVICE void ldmatrix4_transposed(uint32_t (&r)[4], const T* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
PYARCH_DEVICE uint32_t transpose(uint32_t x) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}

template <class T>
PYARCH_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
PYARCH_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
PYARCH_DEVICE void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
PYARCH_DEVICE uint32_t subtract2(uint32_t x, uint32_t y);
template <>
PYARCH_DEVICE uint32_t subtract2<bf16>(uint32_t x, uint32_t y) {  // sm_80 has no subtraction: x * 1 + -y
  uint32_t difference;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(x), "r"(0x3f803f80u), "r"(y ^ 0x80008000u));
  return difference;
}
template <>
PYARCH_DEVICE uint32_t subtract2<fp16>(uint32_t x, uint32_t y) {
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(x), "r"(y));
  return difference;
}

#endif

}  // namespace pyarch
