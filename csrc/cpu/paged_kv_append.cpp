// kv_append: copies new tokens' keys and values into their slots, after every check.
#include <array>
#include <vector>

#include "paged_kv.h"

namespace pyarch {
namespace {

constexpr int64_t kTaskBytes = 128 << 10;  // a task copies at least this much: less costs more to hand out

struct Dim {
  int64_t stride, size;
};

// The dimensions with more than one element, smallest stride first.
std::vector<Dim> dims(const PagedCache& c) {
  std::vector<Dim> d;
  for (Dim one : {Dim{1, c.dim}, Dim{c.head_stride, c.heads}, Dim{c.slot_stride, c.page_size},
                  Dim{c.page_stride, c.pages}})
    if (one.size > 1) d.push_back(one);
  std::sort(d.begin(), d.end(), [](Dim a, Dim b) { return a.stride < b.stride; });
  return d;
}

int64_t span(const PagedCache& c) {  // elements from the first to just past the last
  if (c.pages == 0) return 0;
  return 1 + (c.dim - 1) + (c.heads - 1) * c.head_stride + (c.page_size - 1) * c.slot_stride +
         (c.pages - 1) * c.page_stride;
}

// Each dimension steps over everything the smaller ones reach. Layouts that torch makes are so nested.
bool nested(const std::vector<Dim>& d) {
  int64_t reach = 1;
  for (const Dim& one : d) {
    if (one.stride < reach) return false;
    reach += one.stride * (one.size - 1);
  }
  return true;
}

// Whether two elements of equal nested layouts, `gap` elements apart, can meet: gap = sum of d_i * stride_i
// with |d_i| < size_i. Nesting leaves at most two candidates for each d_i, the largest stride first.
bool meet(const std::vector<Dim>& d, size_t count, int64_t gap) {
  if (count == 0) return gap == 0;
  const Dim& one = d[count - 1];
  const int64_t near = gap / one.stride;
  for (int64_t i : {near - 1, near, near + 1})
    if (std::abs(i) < one.size && meet(d, count - 1, gap - i * one.stride)) return true;
  return false;
}

bool ranges_meet(const char* a, int64_t a_bytes, const char* b, int64_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes && a_bytes > 0 && b_bytes > 0;
}

// Tokens that write distinct slots can be copied in any order. A bit per slot, only where they do not simply
// rise.
void check_slots(const int64_t* slots, int64_t tokens, int64_t limit) {
  bool rising = true;
  int64_t last = -1;
  for (int64_t t = 0; t < tokens; ++t) {
    PYARCH_CHECK(slots[t] >= -1 && slots[t] < limit, "slot_mapping: entry ", t, " is ", slots[t],
                 ", allowed are -1 and 0 to ", limit - 1);
    if (slots[t] < 0) continue;
    rising = rising && slots[t] > last;
    last = slots[t];
  }
  if (rising) return;
  struct Seen;
  const size_t words = static_cast<size_t>(limit + 63) / 64;
  uint64_t* seen = scratch<Seen, uint64_t>(words);
  std::memset(seen, 0, words * sizeof(uint64_t));
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots[t] < 0) continue;
    uint64_t& word = seen[slots[t] / 64];
    const uint64_t bit = uint64_t{1} << (slots[t] % 64);
    PYARCH_CHECK(!(word & bit), "slot_mapping: slot ", slots[t], " is named twice, the second time by entry ",
                 t);
    word |= bit;
  }
}

bool reaches(const PagedCache& cache, const Tensor& t) {
  int64_t elements = 1;
  for (int64_t i = 0; i < t.dim(); ++i) elements += (t.size(i) - 1) * t.stride(i);
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) == 0) elements = 0;
  return ranges_meet(cache.data, span(cache) * cache.item, static_cast<const char*>(t.data_ptr()),
                     elements * static_cast<int64_t>(t.element_size()));
}

void kv_append(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping,
               std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  const PagedCaches c = paged_caches(k_cache, v_cache, k_scale, v_scale);
  const int64_t tokens = slot_mapping.dim() == 1 ? slot_mapping.size(0) : -1;
  PYARCH_CHECK(tokens >= 0 && slot_mapping.scalar_type() == ScalarType::Long,
               "slot_mapping: must be int64 (T)");
  PYARCH_CHECK(tokens <= 1 || slot_mapping.stride(0) == 1, "slot_mapping: must be contiguous");
  PYARCH_CHECK(!touches(c, slot_mapping), "slot_mapping: must not share memory with the caches");
  for (const auto& [x, name] : {std::pair{&k, "k"}, {&v, "v"}}) {
    PYARCH_CHECK(x->dim() == 3 && x->size(0) == tokens && x->size(1) == c.k.heads && x->size(2) == c.k.dim,
                 name, ": must be (T, heads, head_dim) as slot_mapping and k_cache say");
    PYARCH_CHECK(c.suits(x->scalar_type(), k_cache) && x->scalar_type() == k.scalar_type(), name,
                 ": must have k_cache's dtype, or that of k beside int8 caches");
    PYARCH_CHECK(c.k.dim == 1 || tokens == 0 || x->stride(2) == 1, name,
                 ": the last dimension must be contiguous");
    PYARCH_CHECK(!touches(c, *x), name, ": must not share memory with the caches");
  }
  const int64_t* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  check_append(c, slots, tokens);

  const int64_t item = static_cast<int64_t>(k.element_size());
  const int64_t block = std::max<int64_t>(1, kTaskBytes / (2 * c.k.heads * c.k.dim * item));
  const auto each_token = [&](const auto& append) {
    parallel_tasks((tokens + block - 1) / block, [&](int64_t task) {
      for (int64_t t = task * block; t < std::min(tokens, (task + 1) * block); ++t)
        if (slots[t] >= 0) append(t, slots[t]);
    });
  };
  const int64_t k_row = k.stride(0), v_row = v.stride(0), k_head = k.stride(1), v_head = v.stride(1);
  if (!c.int8) {
    const char *pk = static_cast<const char*>(k.data_ptr()), *pv = static_cast<const char*>(v.data_ptr());
    each_token([&](int64_t t, int64_t slot) {
      write_slot(c.k, slot, pk + t * k_row * item, k_head);
      write_slot(c.v, slot, pv + t * v_row * item, v_head);
    });
    return;
  }
  with_float_type(k.scalar_type(), "k", [&](auto tag) {
    using T = decltype(tag);
    const T *pk = static_cast<const T*>(k.data_ptr()), *pv = static_cast<const T*>(v.data_ptr());
    each_token([&](int64_t t, int64_t slot) {
      round_slot(c.k, c.k_scale, slot, pk + t * k_row, k_head);
      round_slot(c.v, c.v_scale, slot, pv + t * v_row, v_head);
    });
  });
}

struct Written {
  const PagedCache* cache;
  const char* name;
};

std::array<Written, 4> written(const PagedCaches& c) {  // two of them null where there are no scales
  return {{{&c.k, "k_cache"},
           {&c.v, "v_cache"},
           {c.int8 ? &c.k_scale : nullptr, "k_scale"},
           {c.int8 ? &c.v_scale : nullptr, "v_scale"}}};
}

void check_apart(const Written& one, const Written& other) {
  const PagedCache &a = *one.cache, &b = *other.cache;
  if (!ranges_meet(a.data, span(a) * a.item, b.data, span(b) * b.item)) return;
  const int64_t gap = b.data - a.data;
  const bool alike = a.item == b.item && a.page_stride == b.page_stride && a.slot_stride == b.slot_stride &&
                     a.head_stride == b.head_stride && gap % a.item == 0;  // interleaved in one buffer
  const std::vector<Dim> d = dims(a);
  PYARCH_CHECK(alike && !meet(d, d.size(), gap / a.item), other.name, ": must not share memory with ",
               one.name);
}

}  // namespace

void check_append(const PagedCaches& caches, const int64_t* slots, int64_t tokens) {
  const std::array<Written, 4> all = written(caches);
  const size_t count = caches.int8 ? 4 : 2;
  for (size_t i = 0; i < count; ++i) {
    PYARCH_CHECK(nested(dims(*all[i].cache)), all[i].name,
                 ": is written to, so no two of its elements may share memory");
    for (size_t j = 0; j < i; ++j) check_apart(all[j], all[i]);
  }
  check_slots(slots, tokens, caches.k.slots());
}

bool touches(const PagedCaches& caches, const Tensor& t) {
  for (const Written& one : written(caches))
    if (one.cache && reaches(*one.cache, t)) return true;
  return false;
}

STABLE_TORCH_LIBRARY_IMPL(pyarch, CPU, m) { m.impl("kv_append__cpu", TORCH_BOX(&kv_append)); }

}  // namespace pyarch
