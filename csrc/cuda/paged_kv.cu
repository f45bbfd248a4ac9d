// kv_append: new keys and values into the pages of a cache.
//
//   block (token, k or v)   reads the token's slot once, then copies its heads * dim elements, 16 bytes a
//                           thread where every address is a multiple of 16, else an element a thread
//
// Moves each byte once in and once out; threads of a block read and write consecutive units. Into int8
// caches:
//
//   block (token, k or v)   a warp a head: the largest of its elements, then their codes; the second read of
//                           an element comes from L1
#include <cmath>

#include "numbers.h"
#include "paged_kv.h"

namespace pyarch {
namespace {

constexpr int kThreads = 128;

// One of the two copies; strides and row in units.
template <class Unit>
struct Copy {
  Global<const Unit> from;
  Global<Unit> to;
  int64_t from_token, from_head, to_page, to_position, to_head;
};

template <class Unit>
PYARCH_KERNEL kv_append(Copy<Unit> keys, Copy<Unit> values, Global<const int64_t> slots, int64_t heads,
                        int64_t row, int64_t pages, int64_t page_size) {
  const int64_t token = blockIdx.x, slot = slots[token];
  if (slot < 0 || slot >= pages * page_size)
    return;  // a bad write is skipped: to raise, the host would have to wait
  const Copy<Unit> copy = blockIdx.y == 0 ? keys : values;
  const Global<const Unit> from = copy.from + token * copy.from_token;
  const Global<Unit> to = copy.to + slot / page_size * copy.to_page + slot % page_size * copy.to_position;
  for (int64_t i = threadIdx.x; i < heads * row; i += kThreads) {
    const int64_t head = i / row, unit = i % row;
    to[head * copy.to_head + unit] = from[head * copy.from_head + unit];
  }
}

// One of the two roundings; strides in elements.
template <class T>
struct Rounding {
  Global<const T> from;
  Global<int8_t> to;
  Global<float> scales;
  int64_t from_token, from_head, to_page, to_position, to_head, scale_page, scale_position, scale_head;
};

template <class T>
PYARCH_KERNEL kv_append_int8(Rounding<T> keys, Rounding<T> values, Global<const int64_t> slots, int64_t heads,
                             int64_t dim, int64_t pages, int64_t page_size) {
  constexpr float largest = 3.402823466e38f;
  const int64_t token = blockIdx.x, slot = slots[token];
  if (slot < 0 || slot >= pages * page_size) return;
  const Rounding<T> r = blockIdx.y == 0 ? keys : values;
  const int64_t page = slot / page_size, position = slot % page_size, lane = threadIdx.x % 32;
  for (int64_t head = threadIdx.x / 32; head < heads; head += kThreads / 32) {
    const Global<const T> from = r.from + (token * r.from_token + head * r.from_head);
    const Global<int8_t> to = r.to + (page * r.to_page + position * r.to_position + head * r.to_head);
    float amax = 0.0f;
    for (int64_t i = lane; i < dim; i += 32) {
      const float x = fabsf(to_float(from[i]));
      amax = fmaxf(amax, x <= largest ? x : INFINITY);  // NaN too, which fmaxf would pass over
    }
    for (int mask = 16; mask > 0; mask /= 2) amax = fmaxf(amax, shfl_xor(amax, mask));
    const float scale = amax <= largest ? amax / 127.0f : bits_to_float(0x7fc00000);
    for (int64_t i = lane; i < dim; i += 32) {
      const float code = scale > 0.0f ? rintf(to_float(from[i]) / scale) : 0.0f;
      to[i] = static_cast<int8_t>(fminf(fmaxf(code, -127.0f), 127.0f));
    }
    if (lane == 0) r.scales[page * r.scale_page + position * r.scale_position + head * r.scale_head] = scale;
  }
}

template <class T>
const char* run_int8(const KvAppend& c, Stream stream) {
  const auto rounding = [&](int which, const void* from, void* to, float* scales) {
    const int64_t *s = c.source[which], *t = c.target[which], *u = c.scale[which];
    return Rounding<T>{static_cast<const T*>(from),
                       static_cast<int8_t*>(to),
                       scales,
                       s[0],
                       s[1],
                       t[0],
                       t[1],
                       t[2],
                       u[0],
                       u[1],
                       u[2]};
  };
  return launch(kv_append_int8<T>, dim3(static_cast<unsigned>(c.tokens), 2), dim3(kThreads), 0, stream,
                rounding(0, c.k, c.k_cache, c.k_scale), rounding(1, c.v, c.v_cache, c.v_scale),
                Global<const int64_t>(c.slots), c.heads, c.dim, c.pages, c.page_size);
}

template <class Unit>
const char* run(const KvAppend& c, Stream stream) {
  const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / c.item;  // elements
  const auto copy = [&](int which, const void* from, void* to) {
    return Copy<Unit>{static_cast<const Unit*>(from), static_cast<Unit*>(to),
                      c.source[which][0] / per_unit,  c.source[which][1] / per_unit,
                      c.target[which][0] / per_unit,  c.target[which][1] / per_unit,
                      c.target[which][2] / per_unit};
  };
  return launch(kv_append<Unit>, dim3(static_cast<unsigned>(c.tokens), 2), dim3(kThreads), 0, stream,
                copy(0, c.k, c.k_cache), copy(1, c.v, c.v_cache), Global<const int64_t>(c.slots), c.heads,
                c.dim / per_unit, c.pages, c.page_size);
}

// Whether every address that the copy touches is a multiple of 16.
bool in_16_bytes(const KvAppend& c) {
  int64_t all = c.dim * c.item;
  for (const void* p : {c.k, c.v, const_cast<const void*>(c.k_cache), const_cast<const void*>(c.v_cache)})
    all |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(p));
  for (int which = 0; which < 2; ++which) {
    for (int64_t stride : c.source[which]) all |= stride * c.item;
    for (int64_t stride : c.target[which]) all |= stride * c.item;
  }
  return all % 16 == 0;
}

}  // namespace
}  // namespace pyarch

const char* pyarch_kv_append(const KvAppend* call, void* stream) {
  const auto queue = static_cast<pyarch::Stream>(stream);
  if (call->tokens == 0 || call->heads * call->dim == 0) return nullptr;
  if (call->k_scale) {
    if (call->type == 0) return pyarch::run_int8<float>(*call, queue);
    if (call->type == 1) return pyarch::run_int8<pyarch::bf16>(*call, queue);
    return pyarch::run_int8<pyarch::fp16>(*call, queue);
  }
  if (pyarch::in_16_bytes(*call)) return pyarch::run<pyarch::Bytes16>(*call, queue);
  if (call->item == 4) return pyarch::run<uint32_t>(*call, queue);
  return pyarch::run<uint16_t>(*call, queue);
}
