// The thin layer that CUDA kernels are written against: nvcc maps it to instructions, the host emulator
// (csrc/emu/emu.h, g++ -DPYARCH_EMU) to fibers that check every access.
//
//   Global<T>, Shared<T>   pointers to global and shared memory: p[i], p + i; int64 indices
//   shared<T>(byte)        the block's dynamic shared memory from that byte on
//   load8, load16, store16 8 or 16 bytes at an aligned address, as one access
//   cp16, commit, wait<N>  asynchronous copy of 16 bytes, global to shared; a group; all but the N newest
//                          groups done
//   cp16_part              the same of the first 0 to 16 bytes, with zeros for the others
//   sync, sync_any         barrier of the block; the same, and whether any of its threads said true
//   sync_warp, all_of_warp barrier of a warp; the same, and whether all of its lanes said true
//   fence                  what this thread wrote or, before a barrier, its block did is visible to other
//   blocks
//                          before what it writes next; what it reads next is not older than what it read
//   shfl, shfl_xor, shfl_down  exchange within a full warp: with a lane by its number, or as far away
//   atomic_add             returns the value before
//   clear(p, bytes, stream), launch(kernel, grid, block, shared bytes, stream, arguments...)
//                          -> nullptr, or what CUDA says is wrong
#pragma once

#include <cstdint>

#if defined(PYARCH_EMU)
#include "emu.h"
#else

#include <cuda_runtime.h>

#define PYARCH_KERNEL __global__ void
#define PYARCH_DEVICE __device__ __forceinline__
// What the host calls too: in a template nvcc compiles a host's call of a device function to exit(), unsaid.
#define PYARCH_BOTH __host__ __device__ __forceinline__
// Between PYARCH_KERNEL and the name: threads of a block, and blocks that a multiprocessor must have room
// for.
#define PYARCH_THREADS(threads, blocks) __launch_bounds__(threads, blocks)

namespace pyarch {

template <class T>
using Global = T*;
template <class T>
using Shared = T*;
using Bytes8 = uint2;
using Bytes16 = uint4;
using Stream = cudaStream_t;

template <class T>
PYARCH_DEVICE Shared<T> shared(int64_t byte = 0) {
  extern __shared__ __align__(128) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory + byte);
}

template <class T>
PYARCH_DEVICE Bytes8 load8(const T* p) {
  return *reinterpret_cast<const Bytes8*>(p);
}
template <class T>
PYARCH_DEVICE Bytes16 load16(const T* p) {
  return *reinterpret_cast<const Bytes16*>(p);
}
template <class T>
PYARCH_DEVICE void store16(T* p, Bytes16 value) {
  *reinterpret_cast<Bytes16*>(p) = value;
}

template <class T>
PYARCH_DEVICE void cp16(Shared<T> to, Global<const T> from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
template <class T>
PYARCH_DEVICE void cp16_part(Shared<T> to, Global<const T> from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
PYARCH_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
PYARCH_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

PYARCH_DEVICE void sync() { __syncthreads(); }
PYARCH_DEVICE bool sync_any(bool mine) { return __syncthreads_or(mine); }
PYARCH_DEVICE void sync_warp() { __syncwarp(); }
PYARCH_DEVICE bool all_of_warp(bool mine) { return __all_sync(0xffffffff, mine); }
PYARCH_DEVICE void fence() { __threadfence(); }
template <class T>
PYARCH_DEVICE T shfl(T value, int lane) {
  return __shfl_sync(0xffffffff, value, lane);
}
template <class T>
PYARCH_DEVICE T shfl_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}
template <class T>
PYARCH_DEVICE T shfl_down(T value, int lanes) {
  return __shfl_down_sync(0xffffffff, value, lanes);
}
template <class T>
PYARCH_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(p, value);
}

inline const char* clear(void* p, size_t bytes, Stream stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
                   Arguments... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is not the next call's
      return "a block of this kernel needs more shared memory than this GPU has";
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pyarch
#endif
