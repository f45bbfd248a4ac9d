// quant_matmul's plan, and the choice of its kernels (quant_matmul_kernel.h), which are compiled by width of
// code.
#include "quant_matmul.h"

void pyarch_quant_matmul_plan(QuantMatmul* p) {
  constexpr int64_t rows_m[] = {8, 16, 32, 64, 64}, rows_n[] = {16, 32, 128, 128, 64}, pairs = 4;
  const auto ceil = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  QuantMatmulPlan plan{};
  while (plan.kind < 3 && p->m > rows_m[plan.kind]) ++plan.kind;
  if (plan.kind == 3 && p->shift) plan.kind = 4;  // sums of x take the registers of half the rows of w
  plan.m_blocks = ceil(p->m, rows_m[plan.kind]);
  plan.blocks = plan.m_blocks * ceil(p->n, rows_n[plan.kind]);
  // Tiles of 32 and 64 rows fill a GPU with some 100 blocks; fewer of them share their columns.
  plan.splits = plan.kind < 2 || plan.blocks >= 96 ? 1 : plan.blocks >= 48 ? 2 : 4;
  if (plan.splits > 1) plan.partial_floats = plan.blocks * pairs * rows_m[plan.kind] * rows_n[plan.kind];
  p->plan = plan;
}

const char* pyarch_quant_matmul(const QuantMatmul* p, void* stream) {
  if (p->m == 0 || p->n == 0) return nullptr;
  return p->bits == 4 ? pyarch_quant_matmul_int4(p, stream) : pyarch_quant_matmul_int8(p, stream);
}
