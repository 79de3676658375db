// SPDX-License-Identifier: MIT
#include "simt.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Place here;

namespace {

constexpr std::size_t kStackBytes = 128 << 10;
constexpr unsigned kWarp = 32;

enum class State { kReady, kBarrier, kWarpWait, kDone };

struct Copy {
  void* to;
  const void* from;
  std::size_t size, bytes;
  unsigned group;  // how many groups its thread had committed when it was issued
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  dim3 thread;
  Site site{"", 0};
  unsigned mask = 0;
  uint64_t value = 0;
  uint64_t lanes[kWarp] = {};
  void (*together)(void* const* lanes) = nullptr;
  std::vector<Copy> copies;  // not done yet
  unsigned groups = 0;       // committed so far
};

struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;

struct Shared {
  Site site;
  Memory memory;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches
  unsigned count = 0;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  const char* name = "";
  std::vector<Shared> shared;
  Memory dynamic;
  uint64_t random = 0;
  uint64_t seed = 1;
  std::vector<Site> barriers;
  std::string removed_barrier;
  std::string failure;  // of the fiber that ran last
  bool last_block_dropped = false;
  bool waits_forgotten = false;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_bytes = 0;
#endif
};

Machine& machine() {
  static Machine* m = [] {
    auto* made = new Machine();
    if (const char* text = std::getenv("DALLE_FAST_SIMT_SEED")) made->seed = std::strtoull(text, nullptr, 10);
    return made;
  }();
  return *m;
}

uint64_t next_random(Machine& m) {  // splitmix64
  uint64_t z = (m.random += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// ---- switching

#if defined(__x86_64__)
extern "C" void dalle_fast_simt_switch(void** save, void* to);
asm(R"(
.text
.hidden dalle_fast_simt_switch
.globl dalle_fast_simt_switch
.type dalle_fast_simt_switch, @function
dalle_fast_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dalle_fast_simt_switch, .-dalle_fast_simt_switch
)");
#endif

void to_scheduler(bool done) {
  Machine& m = machine();
  Fiber* self = m.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(done ? nullptr : &fake, m.scheduler_stack, m.scheduler_bytes);
#endif
  (void)done;
#if defined(__x86_64__)
  dalle_fast_simt_switch(&self->stack_pointer, m.scheduler);
#else
  swapcontext(&self->context, &m.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_fiber(Machine& m, Fiber* fiber) {
  m.running = fiber;
  here.thread = fiber->thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber->stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  dalle_fast_simt_switch(&m.scheduler, fiber->stack_pointer);
#else
  swapcontext(&m.scheduler, &fiber->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_bytes);
#endif
  (*m.kernel)();
  m.running->state = State::kDone;
  to_scheduler(true);
}

void prepare(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)  // frames that a failed launch left behind
  __asan_unpoison_memory_region(fiber->stack.get(), kStackBytes);
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<std::uintptr_t>(fiber->stack.get() + kStackBytes) / 16 * 16;
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where a caller's return address would be
  *--slot = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  fiber->stack_pointer = slot;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
#endif
}

// ---- synchronisation

std::string describe(const Machine& m, const Fiber& fiber) {
  std::string text = "thread (" + std::to_string(fiber.thread.x) + ", " + std::to_string(fiber.thread.y) + ", " +
                     std::to_string(fiber.thread.z) + ")";
  switch (fiber.state) {
    case State::kDone: return text + " has returned";
    case State::kReady: return text + " runs";
    case State::kBarrier: text += " waits at __syncthreads"; break;
    case State::kWarpWait: text += " waits for lanes " + std::to_string(fiber.mask); break;
  }
  (void)m;
  return text + " in " + fiber.site.file + ":" + std::to_string(fiber.site.line);
}

[[noreturn]] void fail(const Machine& m, const std::string& what, const Fiber& a, const Fiber& b) {
  throw std::runtime_error(std::string("simt: ") + what + " in " + m.name + ", block (" + std::to_string(here.block.x) +
                           ", " + std::to_string(here.block.y) + ", " + std::to_string(here.block.z) +
                           "): " + describe(m, a) + "; " + describe(m, b));
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Lets the lanes of a collective go on once all of its mask have come.
void try_warp(Machine& m, unsigned index) {
  Fiber& fiber = *m.fibers[index];
  const unsigned base = index / kWarp * kWarp;
  for (unsigned l = 0; l < kWarp; ++l) {
    if (!(fiber.mask >> l & 1u)) continue;
    if (base + l >= m.count) continue;  // a last warp that is not full
    const Fiber& other = *m.fibers[base + l];
    if (other.state != State::kWarpWait || other.mask != fiber.mask || !same(other.site, fiber.site)) return;
  }
  uint64_t values[kWarp] = {};
  for (unsigned l = 0; l < kWarp && base + l < m.count; ++l)
    if (fiber.mask >> l & 1u) values[l] = m.fibers[base + l]->value;
  if (fiber.together) {
    void* lanes[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) lanes[l] = reinterpret_cast<void*>(values[l]);
    fiber.together(lanes);
  }
  const unsigned mask = fiber.mask;
  for (unsigned l = 0; l < kWarp && base + l < m.count; ++l)
    if (mask >> l & 1u) {
      std::memcpy(m.fibers[base + l]->lanes, values, sizeof values);
      m.fibers[base + l]->state = State::kReady;
    }
}

// Nobody can run: opens the barrier or says what is wrong.
bool release(Machine& m) {
  Fiber* first = nullptr;
  for (unsigned i = 0; i < m.count; ++i) {
    Fiber& fiber = *m.fibers[i];
    if (fiber.state == State::kDone) continue;
    if (!first) first = &fiber;
    if (fiber.state == State::kWarpWait) {
      const unsigned base = i / kWarp * kWarp;
      for (unsigned l = 0; l < kWarp && base + l < m.count; ++l)
        if ((fiber.mask >> l & 1u) && m.fibers[base + l].get() != &fiber &&
            (m.fibers[base + l]->state != State::kWarpWait || !same(m.fibers[base + l]->site, fiber.site) ||
             m.fibers[base + l]->mask != fiber.mask))
          fail(m, "a warp waits for a lane that does not come", fiber, *m.fibers[base + l]);
      fail(m, "deadlock", *first, fiber);
    }
    if (!same(fiber.site, first->site)) fail(m, "divergent barrier", *first, fiber);
  }
  if (!first) return false;
  for (unsigned i = 0; i < m.count; ++i) {
    Fiber& fiber = *m.fibers[i];
    if (fiber.state == State::kDone) fail(m, "divergent barrier", *first, fiber);
    fiber.state = State::kReady;
  }
  return true;
}

// Half of the blocks run all that is ready in random order; in the other half warps have random ranks, and one runs
// only while none above it can: a warp may then be a whole loop behind another, which fair turns never show.
void run_block(Machine& m) {
  std::vector<unsigned> ready;
  const bool ranked = next_random(m) % 2;
  std::vector<uint64_t> rank((m.count + kWarp - 1) / kWarp);
  for (uint64_t& r : rank) r = next_random(m);
  for (;;) {
    ready.clear();
    uint64_t best = 0;
    for (unsigned i = 0; i < m.count; ++i)
      if (m.fibers[i]->state == State::kReady) {
        ready.push_back(i);
        if (rank[i / kWarp] > best) best = rank[i / kWarp];
      }
    if (ranked) {
      std::size_t kept = 0;
      for (unsigned i : ready)
        if (rank[i / kWarp] == best) ready[kept++] = i;
      ready.resize(kept);
    }
    if (ready.empty()) {
      if (!release(m)) return;
      continue;
    }
    for (std::size_t i = ready.size(); i > 1; --i) std::swap(ready[i - 1], ready[next_random(m) % i]);
    for (unsigned index : ready) {
      Fiber* fiber = m.fibers[index].get();
      if (fiber->state != State::kReady) continue;
      to_fiber(m, fiber);
      if (!m.failure.empty()) {
        const std::string what = std::move(m.failure);
        m.failure.clear();
        throw std::runtime_error(what);
      }
      if (fiber->state == State::kWarpWait) try_warp(m, index);
    }
  }
}

Memory poisoned(std::size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes + !bytes)) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);  // NaN, or -1
  return Memory(static_cast<char*>(memory));
}

void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
}

}  // namespace

void seed(uint64_t value) { machine().seed = value; }

std::string place_of(const Site& site) {
  const char* slash = std::strstr(site.file, "csrc/");
  return std::string(slash ? slash + 5 : site.file) + ":" + std::to_string(site.line);
}

void remove_barrier(const std::string& place) { machine().removed_barrier = place; }
void forget_waits(bool forget) { machine().waits_forgotten = forget; }
void drop_last_block(bool drop) { machine().last_block_dropped = drop; }
std::vector<std::string> barriers() {
  std::vector<std::string> places;
  for (const Site& site : machine().barriers) places.push_back(place_of(site));
  return places;
}
void forget_barriers() { machine().barriers.clear(); }

void launch(const dim3& grid, const dim3& block, std::size_t shared_bytes, const char* name,
            const std::function<void()>& kernel) {
  Machine& m = machine();
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024 || !blocks || grid.y > 65535 || grid.z > 65535 || shared_bytes > (227u << 10))
    throw std::runtime_error(std::string("simt: launch of ") + name + ": bad configuration");
  m.count = static_cast<unsigned>(threads);
  while (m.fibers.size() < m.count) m.fibers.emplace_back(new Fiber());
  m.kernel = &kernel;
  m.name = name;
  m.random = m.seed;
  here.block_size = block;
  here.grid = grid;
  const uint64_t first = next_random(m) % blocks;  // blocks in turn, from anywhere
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t b = (first + k) % blocks;
    if (m.last_block_dropped && b + 1 == blocks) continue;
    here.block = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                      static_cast<unsigned>(b / grid.x / grid.y));
    m.shared.clear();
    m.dynamic = poisoned(shared_bytes);
    for (unsigned i = 0; i < m.count; ++i) {
      Fiber* fiber = m.fibers[i].get();
      fiber->state = State::kReady;
      fiber->copies.clear();
      fiber->groups = 0;
      fiber->thread = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      prepare(fiber);
    }
    run_block(m);
  }
}

void sync_block(const Site& site) {
  Machine& m = machine();
  bool known = false;
  for (const Site& other : m.barriers) known = known || same(other, site);
  if (!known) m.barriers.push_back(site);
  if (!m.removed_barrier.empty() && m.removed_barrier == place_of(site)) return;
  Fiber* self = m.running;
  self->state = State::kBarrier;
  self->site = site;
  to_scheduler(false);
}

const uint64_t* exchange(unsigned mask, uint64_t value, const Site& site) {
  Fiber* self = machine().running;
  self->state = State::kWarpWait;
  self->site = site;
  self->mask = mask;
  self->value = value;
  self->together = nullptr;
  to_scheduler(false);
  return self->lanes;
}

void collective(void* mine, void (*together)(void* const* lanes), const Site& site) {
  Fiber* self = machine().running;
  if (machine().count % kWarp) fail_here("an instruction of whole warps in a block of another size", site);
  self->state = State::kWarpWait;
  self->site = site;
  self->mask = 0xffffffffu;
  self->value = reinterpret_cast<std::uintptr_t>(mine);
  self->together = together;
  to_scheduler(false);
}

void copy_async(void* to, const void* from, std::size_t size, std::size_t bytes, const Site& site) {
  Machine& m = machine();
  require_aligned(to, size, "the target of an asynchronous copy", site);
  require_aligned(from, size, "the source of an asynchronous copy", site);
  const Copy copy{to, from, size, bytes, m.running->groups};
  if (next_random(m) % 2)
    perform(copy);
  else
    m.running->copies.push_back(copy);
}

void commit_copies() { ++machine().running->groups; }

void wait_copies(unsigned pending_groups) {
  Machine& m = machine();
  if (m.waits_forgotten) return;
  std::vector<Copy> left;
  for (const Copy& copy : m.running->copies)
    if (copy.group + pending_groups < m.running->groups)
      perform(copy);
    else
      left.push_back(copy);
  m.running->copies.swap(left);
}

void fail_here(const std::string& what, const Site& site) {
  Machine& m = machine();
  m.running->site = site;
  // A fiber cannot throw past its first frame: the scheduler does it.
  m.failure = std::string("simt: ") + what + " in " + m.name + ", block (" + std::to_string(here.block.x) + ", " +
              std::to_string(here.block.y) + ", " + std::to_string(here.block.z) + "), thread (" +
              std::to_string(here.thread.x) + ", " + std::to_string(here.thread.y) + ", " +
              std::to_string(here.thread.z) + "), " + place_of(site);
  m.running->state = State::kDone;
  to_scheduler(false);
  std::abort();
}

void* static_shared(std::size_t bytes, const Site& site) {
  Machine& m = machine();
  for (Shared& shared : m.shared)
    if (same(shared.site, site)) return shared.memory.get();
  m.shared.push_back({site, poisoned(bytes)});
  return m.shared.back().memory.get();
}

void* dynamic_shared() { return machine().dynamic.get(); }

}  // namespace simt
