// CUDA kernels on the host: what csrc/cuda/device.h means to g++ (-DPYARCH_EMU). It proves indexing, barriers
// and the order of asynchronous copies; it says nothing of time or bank conflicts.
//
//   block     one at a time, in random order; its dynamic shared memory starts as 0xff bytes (NaN)
//   thread    a fiber; barriers, shuffles, atomics and some accesses hand over to a random other one
//   warp      shuffles and matrix instructions (csrc/cuda/mma.h) happen when all of its lanes have come to
//   one access    through Checked pointers: outside its allocation, or misaligned, it ends the launch fence
//   what a block wrote and did not fence before its next atomic, or its end, may stay unseen by
//             others until the launch ends
//   cp16      lands at a random time between its issue and the wait for its group
//   deadlock  threads that wait for others that never come end the launch
//
// What a kernel does depends on the seed alone. Run it under several: a missing barrier shows in the results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define PYARCH_KERNEL void
#define PYARCH_DEVICE inline
#define PYARCH_BOTH inline
#define PYARCH_THREADS(threads, blocks)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the fiber that runs

namespace pyarch {
namespace emu {

struct Region;                           // an allocation that the kernel may touch
const Region* region_of(const void* p);  // the one that p lies in, or nullptr
const Region* shared_region();           // the running block's shared memory
unsigned char* shared_base();
void touch(const Region* region, const void* p, size_t bytes, size_t alignment);  // checks one access
bool barrier(bool mine = false);  // whether any thread that came said true
void fence();
void publish(const void* p, size_t bytes);  // these bytes alone, as an atomic does
// What a warp does together: every lane comes with its part; then, once, all(parts, lanes).
using Together = void (*)(void* const* parts, int lanes);
void together(void* part, Together all);
[[noreturn]] void fault(const char* text);
bool chance();  // either, by the seed
int lane();
void yield();
void copy16(void* to, const void* from, int bytes);  // the first bytes of 16; the others become 0
void commit_group();
void wait_groups(int newest);  // until all groups but the newest ones have landed
const char* run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// A pointer that knows its allocation. Making one checks nothing, using it does.
template <class T>
class Checked {
 public:
  Checked() : p_(nullptr), region_(nullptr) {}
  Checked(T* p) : p_(p), region_(region_of(p)) {}
  Checked(T* p, const Region* region) : p_(p), region_(region) {}
  operator Checked<const T>() const { return {p_, region_}; }
  T& operator[](int64_t i) const {
    touch(region_, p_ + i, sizeof(T), alignof(T));
    return p_[i];
  }
  T& operator*() const { return (*this)[0]; }
  Checked operator+(int64_t i) const { return {p_ + i, region_}; }
  Checked& operator+=(int64_t i) { return *this = *this + i; }
  T* wide(size_t bytes) const { return part(bytes, bytes); }
  T* part(size_t aligned, size_t bytes) const {  // the address of so many bytes, checked as one access
    touch(region_, p_, bytes, aligned);
    return p_;
  }

 private:
  T* p_;
  const Region* region_;
};

}  // namespace emu

template <class T>
using Global = emu::Checked<T>;
template <class T>
using Shared = emu::Checked<T>;
struct alignas(8) Bytes8 {
  uint32_t x, y;
};
struct alignas(16) Bytes16 {
  uint32_t x, y, z, w;
};
using Stream = void*;

template <class T>
Shared<T> shared(int64_t byte = 0) {
  return {reinterpret_cast<T*>(emu::shared_base() + byte), emu::shared_region()};
}

template <class T>
Bytes8 load8(emu::Checked<T> p) {
  Bytes8 value;
  std::memcpy(&value, p.wide(8), 8);
  return value;
}
template <class T>
Bytes16 load16(emu::Checked<T> p) {
  Bytes16 value;
  std::memcpy(&value, p.wide(16), 16);
  return value;
}
template <class T>
void store16(emu::Checked<T> p, Bytes16 value) {
  std::memcpy(p.wide(16), &value, 16);
}

template <class T, class U>
void cp16(emu::Checked<T> to, emu::Checked<U> from) {
  static_assert(std::is_same<const T, const U>::value, "cp16: copies between pointers to one type");
  emu::copy16(to.wide(16), from.wide(16), 16);
}
template <class T, class U>
void cp16_part(emu::Checked<T> to, emu::Checked<U> from, int bytes) {
  static_assert(std::is_same<const T, const U>::value, "cp16: copies between pointers to one type");
  emu::copy16(to.wide(16), bytes > 0 ? from.part(16, bytes) : nullptr, bytes);
}
inline void commit() { emu::commit_group(); }
template <int N>
void wait() {
  emu::wait_groups(N);
}

inline void sync() { emu::barrier(); }
inline bool sync_any(bool mine) { return emu::barrier(mine); }
inline void fence() { emu::fence(); }
inline void sync_warp() {
  emu::together(nullptr, [](void* const*, int) {});
}
inline bool all_of_warp(bool mine) {
  emu::together(&mine, [](void* const* parts, int lanes) {
    bool all = true;
    for (int i = 0; i < lanes; ++i) all = all && *static_cast<bool*>(parts[i]);
    for (int i = 0; i < lanes; ++i) *static_cast<bool*>(parts[i]) = all;
  });
  return mine;
}
template <class T>
T shuffle_from(T value, int from_lane) {
  struct Part {
    T offered, received;
    int from_lane;
  } mine{value, value, from_lane};
  emu::together(&mine, [](void* const* parts, int lanes) {
    for (int i = 0; i < lanes; ++i) {
      Part& part = *static_cast<Part*>(parts[i]);
      if (part.from_lane >= lanes) emu::fault("a shuffle reads a lane that the warp does not have");
      part.received = static_cast<Part*>(parts[part.from_lane])->offered;
    }
  });
  return mine.received;
}
template <class T>
T shfl(T value, int lane) {
  return shuffle_from(value, lane);
}
template <class T>
T shfl_xor(T value, int mask) {
  return shuffle_from(value, emu::lane() ^ mask);
}
template <class T>
T shfl_down(T value, int lanes) {  // the last lanes keep their own value, as on the GPU
  return shuffle_from(value, emu::lane() + lanes < 32 ? emu::lane() + lanes : emu::lane());
}
template <class T>
T atomic_add(emu::Checked<T> p, typename std::remove_const<T>::type value) {
  emu::yield();
  T* address = p.wide(sizeof(T));
  const T before = *address;
  *address = before + value;
  emu::publish(address, sizeof(T));
  return before;
}

inline const char* clear(void* p, size_t bytes, Stream) {
  std::memset(p, 0, bytes);
  return nullptr;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
                   Arguments... arguments) {
  return emu::run(grid, block, shared_bytes, [=] { kernel(Parameters(arguments)...); });
}

}  // namespace pyarch

// For the host program, which may be in another language.
extern "C" {
void pyarch_emu_seed(uint64_t seed);
void pyarch_emu_allow(const void* p, uint64_t bytes);  // kernels may touch this allocation
void pyarch_emu_forget();                              // they may touch none
}
