// What bindings.cpp asks of quant_matmul*.cu: plain pointers and sizes, so that neither side includes the
// other's world.
#pragma once

#include <cstdint>

extern "C" {

// How the work is cut, from sizes alone. No choice changes a result.
struct QuantMatmulPlan {
  int64_t kind;              // the tile: of up to 8, 16, 32, 64 and, with a zero or an offset, 64 rows of x
  int64_t m_blocks, blocks;  // tiles along M; tiles in all
  int64_t splits;            // blocks that share a tile's columns
  int64_t partial_floats;    // what goes through memory, 0 with one split
};

// y [m, n] = act(x [m, k] w^T + bias), w in the order "fragments" of pyarch/orders.py.
struct QuantMatmul {
  const void *x, *q, *scale, *shift, *bias;  // shift: zero or offset, or null; bias: or null
  void* y;                                   // contiguous
  float* partial;                            // plan.partial_floats
  void* arrived;                             // plan.blocks int32, where plan.splits > 1
  int64_t m, n, k, groups, group_size;       // group_size: -1, or a multiple of 32
  int64_t x_row, x_column;                   // strides in elements
  int64_t bits;                              // of a code
  // Of elements: 0 float, 1 bf16, 2 fp16, 3 int32, 4 int16, 5 int8, 6 uint8
  int64_t x_type, scale_type, shift_type, bias_type;
  bool shift_is_zero;
  int64_t activation;  // a code of pyarch/ops/_activation.py
  float slope;
  QuantMatmulPlan plan;
};

void pyarch_quant_matmul_plan(QuantMatmul* call);  // sets call->plan
// Queues the kernel on a cudaStream_t; returns nullptr, or what CUDA says is wrong.
const char* pyarch_quant_matmul(const QuantMatmul* call, void* stream);

const char* pyarch_quant_matmul_int4(const QuantMatmul* call, void* stream);
const char* pyarch_quant_matmul_int8(const QuantMatmul* call, void* stream);
}
