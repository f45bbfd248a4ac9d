// Small kernels with matrix instructions, with bugs that can be planted: test_emulator_matrix.py runs them on
// the host and expects every bug to be caught. nvcc compiles the same file.
#include "mma.h"

using namespace pyarch;

namespace {

enum Bug {
  none,
  wrong_matrix,      // lanes 8 to 15 give the rows of the third matrix, 16 to 23 those of the second
  wrong_row,         // lanes give the rows of a matrix in another order
  row_past_the_end,  // one lane gives a row outside of shared memory
  row_misaligned,    // addresses that are not multiples of 16
  no_barrier,        // reads what other lanes have not copied yet
  wrong_fragment,    // the registers of a in another order
  wrong_result,      // takes d for its transpose's layout
  half_a_warp,       // lanes that do not come
  other_instruction  // half of the lanes do something else
};

// d [16, 16] = a [16, 16] b^T with b [16, 16], rows of 16 elements: one warp, as product kernels do it.
template <class T>
PYARCH_KERNEL product(Global<const T> a, Global<const T> b, Global<float> d, int bug) {
  const int lane = static_cast<int>(threadIdx.x), row = 15 - lane % 16, half = lane / 16;
  const Shared<T> at = shared<T>(), bt = shared<T>(512);
  cp16(at + row * 16 + half * 8, a + row * 16 + half * 8);
  cp16(bt + row * 16 + half * 8, b + row * 16 + half * 8);
  commit();
  wait<0>();
  if (bug != no_barrier) sync_warp();
  if (bug == half_a_warp && lane >= 16) return;
  int matrix = lane / 8, in_matrix = lane % 8;
  if (bug == wrong_matrix && (matrix == 1 || matrix == 2)) matrix = 3 - matrix;
  if (bug == wrong_row) in_matrix = 7 - in_matrix;
  uint32_t x[4], y[4];
  Shared<const T> rows = at + (matrix % 2 * 8 + in_matrix) * 16 + matrix / 2 * 8;
  if (bug == row_misaligned) rows = rows + 1;
  if (bug == row_past_the_end && lane == 31) rows = at + 512;
  if (bug == other_instruction && lane < 16) sync_warp();
  ldmatrix4(x, rows);
  ldmatrix4(y, Shared<const T>(bt + (lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8));
  if (bug == wrong_fragment) {
    const uint32_t kept = x[1];
    x[1] = x[2], x[2] = kept;
  }
  for (int n = 0; n < 2; ++n) {
    float sum[4] = {};
    const uint32_t columns[2] = {y[2 * n], y[2 * n + 1]};
    mma<T>(sum, x, columns);
    for (int i = 0; i < 4; ++i) {
      const int high = bug == wrong_result ? i % 2 : i / 2, odd = bug == wrong_result ? i / 2 : i % 2;
      d[(lane / 4 + high * 8) * 16 + n * 8 + lane % 4 * 2 + odd] = sum[i];
    }
  }
}

// One instruction each, registers from and to memory: [lane][register].
template <class T>
PYARCH_KERNEL multiply(Global<const uint32_t> a, Global<const uint32_t> b, Global<float> d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t x[4], y[2] = {b[2 * lane], b[2 * lane + 1]};
  float sum[4];
  for (int i = 0; i < 4; ++i) x[i] = a[4 * lane + i], sum[i] = d[4 * lane + i];
  mma<T>(sum, x, y);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = sum[i];
}
PYARCH_KERNEL load_rows(Global<const bf16> rows, Global<uint32_t> r) {  // 32 rows of 8, one for each lane
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared<bf16>()[lane * 8 + i] = rows[lane * 8 + i];
  sync_warp();
  uint32_t got[4];
  ldmatrix4(got, shared<const bf16>(lane * 16));
  for (int i = 0; i < 4; ++i) r[4 * lane + i] = got[i];
}
PYARCH_KERNEL transpose_rows(Global<const bf16> rows,
                             Global<uint32_t> r) {  // the same, and of the first matrix
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared<bf16>()[lane * 8 + i] = rows[lane * 8 + i];
  sync_warp();
  uint32_t got[4];
  ldmatrix4_transposed(got, shared<const bf16>(lane * 16));
  for (int i = 0; i < 4; ++i) r[5 * lane + i] = got[i];
  r[5 * lane + 4] = transpose(shared<const uint32_t>()[lane]);
}
// Of every lane: the number of lane (lane + 5) % 32, and whether all numbers are below `limit`.
PYARCH_KERNEL exchange(Global<int> y, int limit) {
  const int lane = static_cast<int>(threadIdx.x);
  y[2 * lane] = shfl(lane, (lane + 5) % 32);
  y[2 * lane + 1] = all_of_warp(lane < limit);
}

// 16 bytes of which the first `bytes` are copied.
PYARCH_KERNEL copy_part(Global<const float> x, Global<float> y, int bytes) {
  cp16_part(shared<float>(), x, bytes);
  commit();
  wait<0>();
  for (int i = 0; i < 4; ++i) y[i] = shared<float>()[i];
}

}  // namespace

extern "C" const char* run_product(const uint16_t* a, const uint16_t* b, float* d, int is_bf16, int bug) {
  if (is_bf16)
    return launch(product<bf16>, dim3(1), dim3(32), 1024, Stream(), reinterpret_cast<const bf16*>(a),
                  reinterpret_cast<const bf16*>(b), d, bug);
  return launch(product<fp16>, dim3(1), dim3(32), 1024, Stream(), reinterpret_cast<const fp16*>(a),
                reinterpret_cast<const fp16*>(b), d, bug);
}
extern "C" const char* run_multiply(const uint32_t* a, const uint32_t* b, float* d, int is_bf16) {
  return launch(is_bf16 ? multiply<bf16> : multiply<fp16>, dim3(1), dim3(32), 0, Stream(), a, b, d);
}
extern "C" const char* run_load(const uint16_t* rows, uint32_t* r) {
  return launch(load_rows, dim3(1), dim3(32), 512, Stream(), reinterpret_cast<const bf16*>(rows), r);
}
extern "C" const char* run_transpose(const uint16_t* rows, uint32_t* r) {
  return launch(transpose_rows, dim3(1), dim3(32), 512, Stream(), reinterpret_cast<const bf16*>(rows), r);
}
extern "C" const char* run_exchange(int* y, int limit) {
  return launch(exchange, dim3(1), dim3(32), 0, Stream(), y, limit);
}
extern "C" const char* run_copy_part(const float* x, float* y, int bytes) {
  return launch(copy_part, dim3(1), dim3(1), 16, Stream(), x, y, bytes);
}
