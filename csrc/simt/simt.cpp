// SPDX-License-Identifier: MIT
#include "simt.h"

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace simt {

Place here;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxCluster = 8;  // what every device with clusters can do

enum class State { kReady, kBarrier, kClusterBarrier, kWarpWait, kDone };

struct Copy {
  void* to;
  const void* from;
  std::size_t size, bytes;
  unsigned group;  // how many groups its thread had committed when it was issued
};

struct Fiber {
  Stack stack;
  State state = State::kReady;
  unsigned block = 0;  // its rank in the cluster
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

struct Memory {
  std::unique_ptr<char, Free> at;
  std::size_t bytes = 0;

  explicit Memory(std::size_t size) : bytes(size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes + !bytes)) throw std::bad_alloc();
    at.reset(static_cast<char*>(memory));
    poison();
  }
  void poison() { std::memset(at.get(), 0xff, bytes); }  // NaN, or -1
};

struct Shared {
  Site site;
  Memory memory;
};

struct Block {
  dim3 index;
  Memory dynamic;
  std::vector<Shared> shared = {};
  bool started = false;
  unsigned at_barrier = 0, done = 0;  // threads

  void poison() {
    dynamic.poison();
    for (Shared& s : shared) s.memory.poison();
  }
};

struct Warp {
  uint32_t ready;  // lanes that can run
  uint64_t rank;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept between launches; a block's begin at a multiple of a warp
  std::vector<Block> blocks;                   // of the cluster that runs
  std::vector<Warp> warps;                     // of all its blocks
  unsigned count = 0;                          // threads of a block
  unsigned block_warps = 0;                    // warps of a block
  unsigned at_cluster_barrier = 0;             // threads
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  const char* name = "";
  const void* address = nullptr;
  uint64_t random = 0;
  uint64_t seed = 1;
  std::vector<Site> barriers;
  std::string removed_barrier;
  std::vector<Launched> launches;
  std::string failure;  // of the fiber that ran last
  bool last_block_dropped = false;
  bool waits_forgotten = false;
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

void entry() {
  Stack::begin();
  Machine& m = machine();
  (*m.kernel)();
  m.running->state = State::kDone;
  m.running->stack.suspend(true);
}

void wait(State state, const Site& site) {
  Fiber* self = machine().running;
  self->state = state;
  self->site = site;
  self->stack.suspend(false);
}

// ---- synchronisation

std::string text_of(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string describe(const Machine& m, const Fiber& fiber) {
  std::string text = m.blocks.size() > 1 ? "block " + text_of(m.blocks[fiber.block].index) + " " : "";
  text += "thread " + text_of(fiber.thread);
  switch (fiber.state) {
    case State::kDone: return text + " has returned";
    case State::kReady: return text + " runs";
    case State::kBarrier: text += " waits at __syncthreads"; break;
    case State::kClusterBarrier: text += " waits at sync_cluster"; break;
    case State::kWarpWait: text += " waits for lanes " + std::to_string(fiber.mask); break;
  }
  return text + " in " + fiber.site.file + ":" + std::to_string(fiber.site.line);
}

[[noreturn]] void fail(const Machine& m, const std::string& what, const Fiber& a, const Fiber& b) {
  throw std::runtime_error("simt: " + what + " in " + m.name + ", block " + text_of(m.blocks[a.block].index) + ": " +
                           describe(m, a) + "; " + describe(m, b));
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}
bool same_wait(const Fiber& a, const Fiber& b) {
  return a.state == b.state && same(a.site, b.site) && (a.state != State::kWarpWait || a.mask == b.mask);
}

// The fiber of a thread; threads of a block that do not exist have none.
Fiber& fiber_of(Machine& m, unsigned block, unsigned thread) {
  return *m.fibers[block * m.block_warps * kWarp + thread];
}
unsigned warp_of(const Machine& m, unsigned block, unsigned thread) { return block * m.block_warps + thread / kWarp; }

void wake(Machine& m, unsigned block, unsigned thread) {
  fiber_of(m, block, thread).state = State::kReady;
  m.warps[warp_of(m, block, thread)].ready |= 1u << thread % kWarp;
}

template <typename F>
void for_each_fiber(Machine& m, F f) {
  for (unsigned b = 0; b < m.blocks.size(); ++b)
    for (unsigned t = 0; t < m.count; ++t) f(b, t, fiber_of(m, b, t));
}

// Lets the lanes of a collective go on once all of its mask have come.
void try_warp(Machine& m, const Fiber& fiber, unsigned first) {
  const unsigned mask = fiber.mask, b = fiber.block;
  if (m.warps[warp_of(m, b, first)].ready & mask) return;
  const unsigned lanes = m.count - first < kWarp ? m.count - first : kWarp;  // a last warp may not be full
  uint64_t values[kWarp] = {};
  for (unsigned l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1u)) continue;
    const Fiber& other = fiber_of(m, b, first + l);
    if (!same_wait(fiber, other)) return;
    values[l] = other.value;
  }
  if (fiber.together) {
    void* at[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) at[l] = reinterpret_cast<void*>(values[l]);
    fiber.together(at);
  }
  for (unsigned l = 0; l < lanes; ++l)
    if (mask >> l & 1u) {
      std::memcpy(fiber_of(m, b, first + l).lanes, values, sizeof values);
      wake(m, b, first + l);
    }
}

// What a fiber waits for may have come with it.
void arrived(Machine& m, const Fiber& fiber, unsigned thread) {
  Block& block = m.blocks[fiber.block];
  switch (fiber.state) {
    case State::kReady: break;
    case State::kWarpWait: try_warp(m, fiber, thread / kWarp * kWarp); break;
    case State::kBarrier:
      if (++block.at_barrier < m.count) break;
      block.at_barrier = 0;
      for (unsigned t = 0; t < m.count; ++t)
        if (const Fiber& other = fiber_of(m, fiber.block, t); !same_wait(other, fiber))
          fail(m, "divergent barrier", fiber, other);
      for (unsigned t = 0; t < m.count; ++t) wake(m, fiber.block, t);
      break;
    case State::kClusterBarrier:
      if (++m.at_cluster_barrier < m.count * m.blocks.size()) break;
      m.at_cluster_barrier = 0;
      for_each_fiber(m, [&](unsigned, unsigned, const Fiber& other) {
        if (!same_wait(other, fiber)) fail(m, "divergent cluster barrier", fiber, other);
      });
      for_each_fiber(m, [&](unsigned b, unsigned t, const Fiber&) { wake(m, b, t); });
      break;
    case State::kDone:
      if (++block.done == m.count && m.blocks.size() > 1) block.poison();  // others may run on
      break;
  }
}

// Nobody can run although some have not returned: says why.
[[noreturn]] void explain(Machine& m) {
  const Fiber* barrier = nullptr;  // who waits at one, rather a block's than the cluster's
  for_each_fiber(m, [&](unsigned b, unsigned t, const Fiber& fiber) {
    const bool at_barrier = fiber.state == State::kBarrier;
    if ((at_barrier || fiber.state == State::kClusterBarrier) &&
        (!barrier || (at_barrier && barrier->state != State::kBarrier)))
      barrier = &fiber;
    if (fiber.state != State::kWarpWait) return;
    const unsigned first = t / kWarp * kWarp;
    for (unsigned l = 0; l < kWarp && first + l < m.count; ++l)
      if ((fiber.mask >> l & 1u) && !same_wait(fiber, fiber_of(m, b, first + l)))
        fail(m, "a warp waits for a lane that does not come", fiber, fiber_of(m, b, first + l));
  });
  const bool of_block = barrier->state == State::kBarrier;
  for_each_fiber(m, [&](unsigned b, unsigned, const Fiber& fiber) {
    if ((!of_block || b == barrier->block) && !same_wait(fiber, *barrier))
      fail(m, of_block ? "divergent barrier" : "divergent cluster barrier", *barrier, fiber);
  });
  fail(m, "deadlock", *barrier, *barrier);
}

void run_fiber(Machine& m, unsigned warp, unsigned lane) {
  const unsigned b = warp / m.block_warps, thread = warp % m.block_warps * kWarp + lane;
  Fiber& fiber = fiber_of(m, b, thread);
  Block& block = m.blocks[b];
  if (!block.started && m.blocks.size() > 1) block.poison();  // what others did to it too early
  block.started = true;
  m.warps[warp].ready &= ~(1u << lane);
  m.running = &fiber;
  here.thread = fiber.thread;
  here.block = block.index;
  here.cluster_rank = b;
  fiber.stack.resume();
  if (!m.failure.empty()) {
    const std::string what = std::move(m.failure);
    m.failure.clear();
    throw std::runtime_error(what);
  }
  arrived(m, fiber, thread);
}

// All that is ready runs in random order; or warps have random ranks, and one runs only while none above it can: it may
// then be a whole loop ahead of another, which fair turns never show. In a cluster whole blocks may have such ranks
// too.
void run_cluster(Machine& m) {
  enum { kFair, kRankedWarps, kRankedBlocks };
  const uint64_t order = next_random(m) % (m.blocks.size() > 1 ? 3 : 2);
  for (unsigned b = 0; b < m.blocks.size(); ++b) {
    const uint64_t of_block = next_random(m) >> 32 << 32;
    for (unsigned w = 0; w < m.block_warps; ++w) {
      uint64_t& rank = m.warps[b * m.block_warps + w].rank;
      rank = order == kFair ? 0 : next_random(m);
      if (order == kRankedBlocks) rank = of_block | rank >> 32;
    }
  }
  struct Turn {
    unsigned warp, lane;
  };
  std::vector<Turn> turns;
  for (;;) {
    turns.clear();
    uint64_t best = 0;
    for (const Warp& warp : m.warps)
      if (warp.ready && warp.rank > best) best = warp.rank;
    for (unsigned w = 0; w < m.warps.size(); ++w)
      for (uint32_t ready = m.warps[w].rank == best ? m.warps[w].ready : 0; ready; ready &= ready - 1)
        turns.push_back({w, static_cast<unsigned>(__builtin_ctz(ready))});
    if (turns.empty()) {
      for (const Block& block : m.blocks)
        if (block.done < m.count) explain(m);
      return;
    }
    for (std::size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[next_random(m) % i]);
    for (const Turn& turn : turns) run_fiber(m, turn.warp, turn.lane);
  }
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
std::vector<Launched> take_launches() { return std::exchange(machine().launches, {}); }
std::vector<std::string> barriers() {
  std::vector<std::string> places;
  for (const Site& site : machine().barriers) places.push_back(place_of(site));
  return places;
}
void forget_barriers() { machine().barriers.clear(); }

void launch(const Launch& launch, const std::function<void()>& kernel) {
  Machine& m = machine();
  const auto& [grid, block, cluster, shared_bytes, name, address] = launch;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024 || !blocks || grid.y > 65535 || grid.z > 65535 || !cluster || cluster > kMaxCluster ||
      grid.x % cluster || (cluster > 1 && !has_clusters()))
    throw std::runtime_error(std::string("simt: launch of ") + name + ": bad configuration");
  if (const std::string why = refusal(address, 0, shared_bytes); !why.empty())
    throw std::runtime_error(std::string("simt: launch of ") + name + ": " + why);
  m.count = static_cast<unsigned>(threads);
  m.block_warps = (m.count + kWarp - 1) / kWarp;
  m.warps.assign(cluster * m.block_warps, {});
  while (m.fibers.size() < m.warps.size() * kWarp) m.fibers.emplace_back(new Fiber());
  m.kernel = &kernel;
  m.name = name;
  m.address = address;
  m.random = m.seed;
  m.failure.clear();
  here.block_size = block;
  here.grid = grid;
  here.cluster_size = cluster;
  const uint64_t clusters = blocks / cluster;
  const uint64_t first = next_random(m) % clusters;  // in turn, from anywhere
  for (uint64_t k = 0; k < clusters; ++k) {
    const uint64_t c = (first + k) % clusters;
    if (m.last_block_dropped && c + 1 == clusters) continue;
    m.blocks.clear();
    m.at_cluster_barrier = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const uint64_t b = c * cluster + rank;
      m.blocks.push_back({dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                               static_cast<unsigned>(b / grid.x / grid.y)),
                          Memory(shared_bytes)});
      for (unsigned t = 0; t < m.count; ++t) {
        Fiber& fiber = fiber_of(m, rank, t);
        fiber.block = rank;
        fiber.copies.clear();
        fiber.groups = 0;
        fiber.thread = dim3(t % block.x, t / block.x % block.y, t / block.x / block.y);
        fiber.stack.prepare(entry);
        wake(m, rank, t);
      }
    }
    run_cluster(m);
  }
  std::size_t fixed_bytes = 0;
  for (const Block& b : m.blocks) {
    std::size_t its = 0;
    for (const Shared& shared : b.shared) its += shared.memory.bytes;
    fixed_bytes = its > fixed_bytes ? its : fixed_bytes;
  }
  constexpr std::size_t kMostKept = 4096;  // so that nobody has to ask
  if (m.launches.size() == kMostKept) m.launches.clear();
  m.launches.push_back({name, blocks, cluster, fixed_bytes, shared_bytes});
}

namespace {

void meet(State state, const Site& site) {
  Machine& m = machine();
  bool known = false;
  for (const Site& other : m.barriers) known = known || same(other, site);
  if (!known) m.barriers.push_back(site);
  if (!m.removed_barrier.empty() && m.removed_barrier == place_of(site)) return;
  wait(state, site);
}

}  // namespace

void sync_block(const Site& site) { meet(State::kBarrier, site); }
void cluster_barrier(const Site& site) { meet(State::kClusterBarrier, site); }

const uint64_t* exchange(unsigned mask, uint64_t value, const Site& site) {
  Fiber* self = machine().running;
  self->mask = mask;
  self->value = value;
  self->together = nullptr;
  wait(State::kWarpWait, site);
  return self->lanes;
}

void collective(void* mine, void (*together)(void* const* lanes), const Site& site) {
  Fiber* self = machine().running;
  if (machine().count % kWarp) fail_here("an instruction of whole warps in a block of another size", site);
  self->mask = 0xffffffffu;
  self->value = reinterpret_cast<std::uintptr_t>(mine);
  self->together = together;
  wait(State::kWarpWait, site);
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
  // A fiber cannot throw past its first frame: the scheduler does it.
  m.failure = "simt: " + what + " in " + m.name + ", block " + text_of(here.block) + ", thread " +
              text_of(here.thread) + ", " + place_of(site);
  wait(State::kDone, site);
  std::abort();
}

void* static_shared(std::size_t bytes, const Site& site) {
  Block& block = machine().blocks[machine().running->block];
  std::size_t in_all = bytes;
  for (Shared& shared : block.shared) {
    if (same(shared.site, site)) return shared.memory.at.get();
    in_all += shared.memory.bytes;
  }
  // A device knows before the launch; here arrays are known once a thread has come to them.
  if (const std::string why = refusal(machine().address, in_all, block.dynamic.bytes); !why.empty())
    fail_here(why, site);
  block.shared.push_back({site, Memory(bytes)});
  return block.shared.back().memory.at.get();
}

void* dynamic_shared() { return machine().blocks[machine().running->block].dynamic.at.get(); }

void* map_shared(const void* mine, unsigned rank, const Site& site) {
  Machine& m = machine();
  if (rank >= m.blocks.size()) fail_here("no such block in the cluster", site);
  if (m.blocks[rank].done == m.count) fail_here("the shared memory of a block that has returned", site);
  const unsigned self = m.running->block;
  const auto offset = [&](const Memory& memory) { return static_cast<const char*>(mine) - memory.at.get(); };
  const auto inside = [&](const Memory& memory) {
    return offset(memory) >= 0 && offset(memory) <= static_cast<std::ptrdiff_t>(memory.bytes);
  };
  if (inside(m.blocks[self].dynamic)) return m.blocks[rank].dynamic.at.get() + offset(m.blocks[self].dynamic);
  for (const Shared& shared : m.blocks[self].shared) {
    if (!inside(shared.memory)) continue;
    for (const Shared& other : m.blocks[rank].shared)
      if (same(other.site, shared.site)) return other.memory.at.get() + offset(shared.memory);
    const std::ptrdiff_t at = offset(shared.memory);
    m.blocks[rank].shared.push_back({shared.site, Memory(shared.memory.bytes)});
    return m.blocks[rank].shared.back().memory.at.get() + at;
  }
  fail_here("not an address in the shared memory of this block", site);
}

}  // namespace simt
