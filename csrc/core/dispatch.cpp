// SPDX-License-Identifier: MIT
#include "dispatch.h"

#include <atomic>

#include "cpu_features.h"

// DF_CPU_BUILT_<level>: what CMakeLists.txt builds (DF_CPU_LEVELS).
namespace dalle_fast {
namespace {

bool is_built(CpuLevel level) {
  switch (level) {
#if defined(DF_CPU_BUILT_PORTABLE)
    case CpuLevel::kPortable: return true;
#endif
#if defined(DF_CPU_BUILT_V3)
    case CpuLevel::kV3: return true;
#endif
#if defined(DF_CPU_BUILT_V4)
    case CpuLevel::kV4: return true;
#if defined(DF_CPU_BUILT_V4_BF16)
    case CpuLevel::kBf16:
    case CpuLevel::kAmx: return true;
#endif
#endif
    default: return false;
  }
}

// The highest of the build that is not above `most`; without one the lowest that the processor runs.
CpuLevel choose(CpuLevel most) {
  const CpuLevel processor = processor_level();
  for (int i = kNumCpuLevels - 1; i >= 0; --i)
    if (kCpuLevels[i] <= most && kCpuLevels[i] <= processor && is_built(kCpuLevels[i])) return kCpuLevels[i];
  for (const CpuLevel level : kCpuLevels)
    if (level <= processor && is_built(level)) return level;
  return CpuLevel::kNone;
}

std::atomic<CpuLevel>& current() {
  static std::atomic<CpuLevel> level{best_cpu_level()};
  return level;
}

}  // namespace

std::vector<CpuLevel> built_cpu_levels() {
  std::vector<CpuLevel> built;
  for (const CpuLevel level : kCpuLevels)
    if (is_built(level)) built.push_back(level);
  return built;
}

CpuLevel best_cpu_level() {
  static const CpuLevel best = choose(CpuLevel::kAmx);
  return best;
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(CpuLevel level) { current().store(choose(level), std::memory_order_relaxed); }

}  // namespace dalle_fast
