// SPDX-License-Identifier: MIT
#include "dispatch.h"

#include <atomic>
#if defined(DF_HAVE_BF16_LEVEL)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dalle_fast {
namespace {

std::atomic<CpuLevel>& current() {
  static std::atomic<CpuLevel> level{best_cpu_level()};
  return level;
}

#if defined(DF_HAVE_BF16_LEVEL)
bool has_bf16_dot() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1u);
}

// The processor has tiles and the system lets this process keep their state (Linux asks to be asked).
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1u) || !(d >> 24 & 1u)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

CpuLevel find_best() {
#if defined(DF_HAVE_X86_LEVELS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#if defined(DF_HAVE_BF16_LEVEL)
  if (v4 && has_bf16_dot()) return has_amx() ? CpuLevel::kAmx : CpuLevel::kBf16;
#endif
  return v4 ? CpuLevel::kV4 : v3 ? CpuLevel::kV3 : CpuLevel::kPortable;
#else
  return CpuLevel::kPortable;
#endif
}

}  // namespace

CpuLevel best_cpu_level() {
  static const CpuLevel best = find_best();
  return best;
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(CpuLevel level) {
  if (level < CpuLevel::kV3) level = CpuLevel::kPortable;  // there are none between
  current().store(level < best_cpu_level() ? level : best_cpu_level(), std::memory_order_relaxed);
}

}  // namespace dalle_fast
