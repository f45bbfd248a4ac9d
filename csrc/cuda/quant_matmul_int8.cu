// quant_matmul for 8-bit codes.
#include "quant_matmul_kernel.h"

const char* pyarch_quant_matmul_int8(const QuantMatmul* call, void* stream) {
  return pyarch::run_type<8>(call, stream);
}
