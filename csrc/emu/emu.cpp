// The scheduler of the emulator: fibers, barriers, shuffles, copies in flight. emu.h says what it promises.
#include "emu.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pyarch {
namespace emu {

struct Region {
  uintptr_t begin, end;
  const char* what;
  std::vector<unsigned char> seen;  // its bytes as other blocks see them

  unsigned char* bytes() const { return reinterpret_cast<unsigned char*>(begin); }
};

namespace {

constexpr size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Write {
  unsigned char *to, value;
};

enum class State { ready, at_barrier, at_warp, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  State state = State::ready;
  bool vote = false, any = false;  // at a barrier: its own, and whether one of all was true
  void* part = nullptr;            // of what its warp does together
  Together all = nullptr;
  std::vector<std::vector<Copy>> groups;  // copies in flight; the last group is not committed yet
};

std::vector<std::unique_ptr<Region>> regions;  // pointers keep their addresses
std::vector<Write> late;  // what the running block let an atomic pass: as others see it, and go on seeing it
std::vector<Write> withheld;  // of blocks that ended, until the launch ends
Region block_memory{0, 0, "shared memory", {}};
std::vector<Fiber> fibers;  // those of the running block
Fiber* running = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
std::string fault_text;
uint64_t random_state = 1;
size_t in_flight = 0;  // copies
unsigned landing = 0;  // chance in 256 that a copy in flight lands when threads change

unsigned random(size_t below) {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return static_cast<unsigned>((z ^ z >> 31) % below);
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  if (running)
    text << ", by thread (" << threadIdx.x << ", " << threadIdx.y << ", " << threadIdx.z << ") of block ("
         << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  throw std::runtime_error(text.str());
}

void hand_over() { swapcontext(&running->context, &scheduler); }

void thread_main() {
  try {
    (*body)();
    wait_groups(0);
  } catch (const std::exception& error) {
    fault_text = error.what();
  }
  running->state = State::done;
  hand_over();
}

void start(Fiber& fiber, size_t index) {
  const unsigned n = static_cast<unsigned>(index);
  fiber.thread = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
  fiber.state = State::ready;
  fiber.groups.assign(1, {});
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
}

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.thread;
  swapcontext(&scheduler, &fiber.context);
  running = nullptr;
}

void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  --in_flight;
}

void land_some() {
  const auto lands = [](const Copy& copy) {
    if (random(256) >= landing) return false;
    land(copy);
    return true;
  };
  for (Fiber& fiber : fibers)
    for (auto& group : fiber.groups)
      group.erase(std::remove_if(group.begin(), group.end(), lands), group.end());
}

// Releases a barrier that every thread which has not ended has come to.
bool open_barrier() {
  for (const Fiber& fiber : fibers)
    if (fiber.state == State::at_warp) return false;
  bool any = false;
  for (const Fiber& fiber : fibers)
    if (fiber.state == State::at_barrier) any = any || fiber.vote;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::at_barrier) fiber.any = any, fiber.state = State::ready;
  return true;
}

// Releases a warp whose lanes have all come to the same thing, and does it.
bool open_warp(size_t first) {
  const size_t last = std::min(first + 32, fibers.size());
  void* parts[32];
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state != State::at_warp) return false;
    parts[i - first] = fibers[i].part;
  }
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].all != fibers[first].all) fail("lanes of a warp come to different instructions");
    fibers[i].state = State::ready;
  }
  fibers[first].all(parts, static_cast<int>(last - first));
  return true;
}

void publish_all() {
  for (const auto& region : regions)
    region->seen.assign(region->bytes(), region->bytes() + region->seen.size());
  for (const Write& write : late) *write.to = write.value;
}

template <class Function>
void for_unseen(const Function& f) {  // f(region, byte) for what the block wrote and did not fence
  for (const auto& region : regions) {
    if (std::memcmp(region->bytes(), region->seen.data(), region->seen.size()) == 0) continue;
    for (size_t i = 0; i < region->seen.size(); ++i)
      if (region->bytes()[i] != region->seen[i]) f(*region, i);
  }
}

// Takes back what the block that ended wrote after its last fence.
void withhold() {
  for_unseen([](Region& region, size_t i) {
    unsigned char* byte = region.bytes() + i;
    withheld.push_back({byte, *byte});
    *byte = region.seen[i];
  });
}

void run_block(size_t threads) {
  late.clear();
  fibers.resize(threads);
  for (size_t i = 0; i < threads; ++i) start(fibers[i], i);
  std::vector<Fiber*> able;
  size_t done = 0;
  while (done < threads) {
    if (able.empty()) {
      for (Fiber& fiber : fibers)
        if (fiber.state == State::ready) able.push_back(&fiber);
    }
    if (able.empty()) {  // everybody waits, so what can be released is complete
      bool released = false;
      for (size_t first = 0; first < threads; first += 32) released = open_warp(first) || released;
      if (!released && !open_barrier())
        fail("deadlock: some threads wait at a barrier, others for lanes of their warp that do not come");
      continue;
    }
    Fiber*& next = able[random(able.size())];
    resume(*next);
    if (!fault_text.empty()) throw std::runtime_error(fault_text);
    if (next->state == State::done) ++done;
    if (next->state != State::ready) next = able.back(), able.pop_back();
    if (in_flight > 0) land_some();
  }
}

}  // namespace

const Region* region_of(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  for (const auto& region : regions)
    if (region->begin <= address && address < region->end) return region.get();
  return nullptr;
}

const Region* shared_region() { return &block_memory; }
unsigned char* shared_base() { return reinterpret_cast<unsigned char*>(block_memory.begin); }

void touch(const Region* region, const void* p, size_t bytes, size_t alignment) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  if (!region) fail("access of ", bytes, " bytes outside every allocation");
  const int64_t offset = static_cast<int64_t>(address - region->begin);
  const int64_t size = static_cast<int64_t>(region->end - region->begin);
  if (offset < 0 || offset + static_cast<int64_t>(bytes) > size)
    fail("access of ", bytes, " bytes at byte ", offset, " of ", region->what, " of ", size, " bytes");
  if (address % alignment) fail("access of ", bytes, " bytes at a misaligned address");
  if (running && random(8) == 0) hand_over();
}

bool chance() { return random(2) == 0; }
int lane() { return static_cast<int>((running - fibers.data()) % 32); }
void yield() { hand_over(); }

bool barrier(bool mine) {
  running->vote = mine;
  running->state = State::at_barrier;
  hand_over();
  return running->any;
}

void fence() {
  publish_all();
  hand_over();
}

void publish(const void* p, size_t bytes) {
  for (const auto& region : regions) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    if (region->begin <= at && at < region->end && !region->seen.empty())
      std::memcpy(&region->seen[at - region->begin], p, bytes);
  }
  if (random(2))
    for_unseen([](Region& region, size_t i) { late.push_back({&region.seen[i], region.seen[i]}); });
}

void together(void* part, Together all) {
  running->part = part;
  running->all = all;
  running->state = State::at_warp;
  hand_over();
}

void fault(const char* text) { fail(text); }

void copy16(void* to, const void* from, int bytes) {
  running->groups.back().push_back({to, from, bytes});
  ++in_flight;
}
void commit_group() { running->groups.emplace_back(); }

void wait_groups(int newest) {
  auto& groups = running->groups;
  for (size_t i = 0; i + 1 + static_cast<size_t>(newest) < groups.size(); ++i) {
    std::for_each(groups[i].begin(), groups[i].end(), land);
    groups[i].clear();
  }
  hand_over();
}

const char* run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const size_t blocks = size_t{grid.x} * grid.y * grid.z, threads = size_t{block.x} * block.y * block.z;
  const unsigned chances[] = {1, 64, 255};
  landing = chances[random(3)];
  in_flight = 0;
  fault_text.clear();
  body = &thread;
  gridDim = grid;
  blockDim = block;
  std::vector<unsigned char> memory(shared_bytes + 128);
  block_memory.begin = (reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128;
  block_memory.end = block_memory.begin + shared_bytes;
  try {
    if (blocks == 0 || grid.y > 65535 || grid.z > 65535 || threads == 0 || threads > 1024 ||
        shared_bytes > 163 << 10)  // what a block can have on sm_80
      fail("invalid launch: ", blocks, " blocks of ", threads, " threads, ", shared_bytes, " bytes shared");
    std::vector<size_t> order(blocks);
    std::iota(order.begin(), order.end(), size_t{0});
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random(i)]);
    for (const auto& region : regions)
      region->seen.assign(region->bytes(), region->bytes() + (region->end - region->begin));
    for (const size_t index : order) {
      const unsigned n = static_cast<unsigned>(index);
      blockIdx = dim3(n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y);
      std::fill(memory.begin(), memory.end(), 0xff);
      run_block(threads);
      !late.empty() || random(2) ? withhold() : publish_all();
    }
  } catch (const std::exception& error) {
    fault_text = error.what();
  }
  for (const Write& write : withheld) *write.to = write.value;
  withheld.clear();
  return fault_text.empty() ? nullptr : fault_text.c_str();
}

}  // namespace emu
}  // namespace pyarch

void pyarch_emu_seed(uint64_t seed) { pyarch::emu::random_state = seed; }
void pyarch_emu_allow(const void* p, uint64_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  pyarch::emu::regions.emplace_back(new pyarch::emu::Region{begin, begin + bytes, "an allocation", {}});
}
void pyarch_emu_forget() { pyarch::emu::regions.clear(); }
