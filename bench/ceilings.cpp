// What this machine can do at most, with all threads at once: arithmetic from registers, reads from memory.
//   double ceiling(kind, threads, seconds): operations or bytes a second; 0 where the CPU lacks the
//   instruction.
// Vectors are GCC's own, as wide as -march=native has, so that one source serves every CPU.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

enum Kind { kFp32, kBf16, kInt8, kDram, kL3 };
using Clock = std::chrono::steady_clock;

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
typedef float F __attribute__((vector_size(kBytes)));
typedef uint64_t U __attribute__((vector_size(kBytes), aligned(kBytes)));
constexpr int kLanes = kBytes / 4, kChains = 12;  // enough independent sums to hide an FMA's latency
constexpr int64_t kSteps = 1 << 14;

// The compiler must not know what a vector holds: equal sums would be computed once.
template <class V>
inline void keep(V& v) {
  asm volatile("" : "+v"(v));
}

// Each returns the operations (or bytes) of one call.
double fp32() {
  F sum[kChains] = {}, a = F{} + 0.5f, b = F{} + 0.25f;
  keep(a), keep(b);
  for (F& s : sum) keep(s);
  for (int64_t i = 0; i < kSteps; ++i)
    for (F& s : sum) s = a * b + s;
  for (F& s : sum) keep(s);
  return 2.0 * kLanes * kChains * kSteps;
}

double bf16() {
#if defined(__AVX512BF16__)
  __m512 sum[kChains] = {};
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f00)), b = a;
  keep(a), keep(b);
  for (__m512& s : sum) keep(s);
  for (int64_t i = 0; i < kSteps; ++i)
    for (__m512& s : sum) s = _mm512_dpbf16_ps(s, a, b);
  for (__m512& s : sum) keep(s);
  return 2.0 * 32 * kChains * kSteps;
#else
  return 0;
#endif
}

double int8() {
#if defined(__AVX512VNNI__)
  __m512i sum[kChains] = {}, a = _mm512_set1_epi8(1), b = a;
  keep(a), keep(b);
  for (__m512i& s : sum) keep(s);
  for (int64_t i = 0; i < kSteps; ++i)
    for (__m512i& s : sum) s = _mm512_dpbusd_epi32(s, a, b);
  for (__m512i& s : sum) keep(s);
  return 2.0 * 64 * kChains * kSteps;
#else
  return 0;
#endif
}

// Four streams with prefetch read a little faster than one.
double read(const char* memory, int64_t bytes) {
  const int64_t quarter = bytes / 4 / 256 * 256;
  U sum[4] = {};
  for (int64_t i = 0; i < quarter; i += 256)
    for (int stream = 0; stream < 4; ++stream) {
      const char* p = memory + stream * quarter + i;
      for (int line = 0; line < 256; line += 64) __builtin_prefetch(p + line + 4096);
      for (int at = 0; at < 256; at += kBytes) sum[stream] += *reinterpret_cast<const U*>(p + at);
    }
  U all = sum[0] + sum[1] + sum[2] + sum[3];
  keep(all);
  return 4.0 * quarter;
}

char* memory(int64_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  madvise(p, bytes, MADV_HUGEPAGE);
  for (int64_t i = 0; i < bytes; i += 4096) static_cast<char*>(p)[i] = 1;
  return static_cast<char*>(p);
}

}  // namespace

extern "C" double ceiling(int kind, int threads, double seconds) {
  const int64_t bytes = kind == kDram ? int64_t{256} << 20 : kind == kL3 ? int64_t{6} << 20 : 0;
  std::vector<double> rate(threads, 0);
  std::atomic<int> ready{0};
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t)
    workers.emplace_back([&, t] {
      char* p = bytes ? memory(bytes) : nullptr;
      const auto once = [&] {
        return kind == kFp32 ? fp32() : kind == kBf16 ? bf16() : kind == kInt8 ? int8() : read(p, bytes);
      };
      if (bytes && !p) return;
      once();
      ready.fetch_add(1);
      const auto patience = Clock::now() + std::chrono::seconds(2);
      while (ready.load() < threads && Clock::now() < patience) std::this_thread::yield();
      const auto start = Clock::now();
      double work = 0, elapsed = 0;
      do {
        const double done = once();
        if (done == 0) break;
        work += done;
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      rate[t] = elapsed > 0 ? work / elapsed : 0;
      if (p) munmap(p, bytes);
    });
  for (std::thread& w : workers) w.join();
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}
