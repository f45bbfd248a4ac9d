// quant_matmul for 4-bit codes.
#include "quant_matmul_kernel.h"

const char* pyarch_quant_matmul_int4(const QuantMatmul* call, void* stream) {
  return pyarch::run_type<4>(call, stream);
}
