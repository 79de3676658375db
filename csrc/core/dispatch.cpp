// SPDX-License-Identifier: MIT
#include "dispatch.h"

#include <atomic>

namespace dalle_fast {
namespace {

std::atomic<CpuLevel>& current() {
  static std::atomic<CpuLevel> level{best_cpu_level()};
  return level;
}

}  // namespace

CpuLevel best_cpu_level() {
#if defined(DF_HAVE_X86_LEVELS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? CpuLevel::kV4 : v3 ? CpuLevel::kV3 : CpuLevel::kPortable;
#else
  return CpuLevel::kPortable;
#endif
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(CpuLevel level) {
  current().store(level < best_cpu_level() ? level : best_cpu_level(), std::memory_order_relaxed);
}

}  // namespace dalle_fast
