// Small kernels that use all of device.h, each with bugs that can be planted: test_emulator.py runs them on
// the host and expects every bug to be caught. nvcc compiles the same file.
#include "device.h"

using namespace pyarch;

namespace {

constexpr int kBlock = 128, kTile = 4 * kBlock, kHalf = 4 * kTile;

enum Bug {
  none,
  no_barrier_after_store,    // sum: reads what other threads have not stored yet
  no_barrier_between_steps,  // sum
  store_out_of_bounds,       // sum
  load_out_of_bounds,        // sum
  shared_out_of_bounds,      // sum
  shuffle_not_reached,       // sum: half a warp shuffles
  wait_one_late,             // scale: reads a tile whose copy may be in flight
  no_barrier_after_wait,     // scale: reads what other threads copied
  no_barrier_before_reuse,   // scale: copies into a tile that other threads still read
  misaligned_copy,           // scale
  plain_add,                 // count: read, add, write
  no_fence,                  // total: arrives before its results can be seen
  no_barrier_before_fence,   // total: the fence does not cover what other threads write
  last_one_early             // total: adds up before the last block has come
};

// y[block] = sum of x[block * 128 ...], n in all.
PYARCH_KERNEL sum(Global<const float> x, Global<float> y, int64_t n, int bug) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = int64_t{blockIdx.x} * kBlock + thread;
  const Shared<float> partial = shared<float>();
  partial[bug == shared_out_of_bounds ? thread + 1 : thread] =
      i < n || bug == load_out_of_bounds ? x[i] : 0.0f;
  if (bug != no_barrier_after_store) sync();
  for (int step = kBlock / 2; step >= 32; step /= 2) {
    if (thread < step) partial[thread] = partial[thread] + partial[thread + step];
    if (bug != no_barrier_between_steps) sync();
  }
  if (thread >= (bug == shuffle_not_reached ? 16 : 32)) return;
  float total = partial[thread];
  for (int lanes = 16; lanes > 0; lanes /= 2) total += shfl_down(total, lanes);
  if (thread == 0) y[bug == store_out_of_bounds ? blockIdx.x + 1 : blockIdx.x] = total;
}

// y = 2 x over `tiles` tiles of 512, through two tiles of shared memory: one is copied while the other is
// used.
PYARCH_KERNEL scale(Global<const float> x, Global<float> y, int tiles, int bug) {
  const int thread = static_cast<int>(threadIdx.x);
  const int mine = 4 * thread;                  // what this thread copies
  const int other = 4 * (kBlock - 1 - thread);  // what it uses
  cp16(shared<float>() + (bug == misaligned_copy ? mine + 1 : mine), x + mine);
  commit();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles)
      cp16(shared<float>((tile + 1) % 2 * kHalf) + mine, x + int64_t{tile + 1} * kTile + mine);
    commit();
    bug == wait_one_late ? wait<2>() : wait<1>();
    if (bug != no_barrier_after_wait) sync();
    const Shared<float> now = shared<float>(tile % 2 * kHalf) + other;
    for (int i = 0; i < 4; ++i) y[int64_t{tile} * kTile + other + i] = 2 * now[i];
    if (bug != no_barrier_before_reuse) sync();
  }
}

// y[0] += the number of threads, and y[1] the same in another way.
PYARCH_KERNEL count(Global<int> y, int bug) {
  if (bug == plain_add)
    y[0] = y[0] + 1;
  else
    atomic_add(y, 1);
  int lanes = 1;
  for (int mask = 1; mask < 32; mask *= 2) lanes += shfl_xor(lanes, mask);
  if (threadIdx.x % 32 == 0) atomic_add(y + 1, lanes);
}

// y = sum over blocks of x[block], by the block that comes last, from what each has left in `left`.
PYARCH_KERNEL PYARCH_THREADS(kBlock, 1)
    total(Global<const float> x, Global<float> left, Global<int> arrived, Global<float> y, int bug) {
  const int64_t thread = threadIdx.x, blocks = gridDim.x;
  left[blockIdx.x * int64_t{kBlock} + thread] = 2 * x[blockIdx.x * int64_t{kBlock} + thread];
  if (bug != no_barrier_before_fence) sync();
  bool last = false;
  if (thread == 0) {
    if (bug != no_fence) fence();
    last = atomic_add(arrived, 1) == blocks - (bug == last_one_early ? 2 : 1);
    fence();
  }
  if (!sync_any(last)) return;
  float sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += left[block * kBlock + thread];
  y[thread] = sum;
}

}  // namespace

extern "C" const char* run_sum(const float* x, float* y, int64_t n, int bug) {
  return launch(sum, dim3(static_cast<unsigned>((n + kBlock - 1) / kBlock)), dim3(kBlock), 4 * kBlock,
                Stream(), x, y, n, bug);
}
extern "C" const char* run_scale(const float* x, float* y, int tiles, int bug) {
  return launch(scale, dim3(1), dim3(kBlock), 2 * kHalf, Stream(), x, y, tiles, bug);
}
extern "C" const char* run_count(int* y, int blocks, int bug) {
  return launch(count, dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 0, Stream(), y, bug);
}
extern "C" const char* run_total(const float* x, float* left, int* arrived, float* y, int blocks, int bug) {
  if (const char* error = clear(arrived, sizeof(int), Stream())) return error;
  return launch(total, dim3(static_cast<unsigned>(blocks)), dim3(kBlock), 0, Stream(), x, left, arrived, y,
                bug);
}
