// kv_append: new keys and values into the pages of a cache.
//
//   block (token, k or v)   reads the token's slot once, then copies its heads * dim elements, 16 bytes a
//                           thread where every address is a multiple of 16, else an element a thread
//
// Moves each byte once in and once out; threads of a block read and write consecutive units.
#include "device.h"
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
  if (pyarch::in_16_bytes(*call)) return pyarch::run<pyarch::Bytes16>(*call, queue);
  if (call->item == 4) return pyarch::run<uint32_t>(*call, queue);
  return pyarch::run<uint16_t>(*call, queue);
}
