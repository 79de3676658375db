// SPDX-License-Identifier: MIT
// One CPU source, up to three builds of it (baseline, AVX2, AVX-512), chosen once at run time. A room may have a
// cpu_bf16.cpp besides, for processors that multiply bfloat16 (AVX512-BF16 dot products, AMX tiles).
#pragma once

#include <vector>

namespace dalle_fast {

enum class CpuLevel : int { kNone = -1, kPortable = 0, kV3 = 3, kV4 = 4, kBf16 = 5, kAmx = 6 };

constexpr CpuLevel kCpuLevels[] = {CpuLevel::kPortable, CpuLevel::kV3, CpuLevel::kV4, CpuLevel::kBf16, CpuLevel::kAmx};
constexpr int kNumCpuLevels = sizeof kCpuLevels / sizeof kCpuLevels[0];

std::vector<CpuLevel> built_cpu_levels();  // ascending
CpuLevel best_cpu_level();                 // of those the highest that this processor runs; kNone: it runs none
CpuLevel cpu_level();                      // what is in use
void set_cpu_level(CpuLevel level);        // no more than this; without one in the build, the lowest there is

}  // namespace dalle_fast

// A build may leave levels out (DF_CPU_LEVELS): their functions are null then, and dispatch.cpp chooses none of them.
// So the choice changes what is linked and nothing that is compiled.
#if defined(__ELF__)
#define DF_CPU_FUNCTION __attribute__((weak)) void
#else
#define DF_CPU_FUNCTION void
#endif

// Declares portable::fn, v3::fn, v4::fn, which cpu.cpp defines as DF_CPU_NAMESPACE::fn, and fn_cpu, which picks.
#if defined(DF_HAVE_X86_LEVELS)
#define DF_CPU_LAUNCHER(fn, Params)                                        \
  namespace portable {                                                     \
  DF_CPU_FUNCTION fn(const Params&);                                       \
  }                                                                        \
  namespace v3 {                                                           \
  DF_CPU_FUNCTION fn(const Params&);                                       \
  }                                                                        \
  namespace v4 {                                                           \
  DF_CPU_FUNCTION fn(const Params&);                                       \
  }                                                                        \
  inline void fn##_cpu(const Params& params) {                             \
    switch (::dalle_fast::cpu_level()) {                                   \
      case ::dalle_fast::CpuLevel::kAmx:                                   \
      case ::dalle_fast::CpuLevel::kBf16:                                  \
      case ::dalle_fast::CpuLevel::kV4: return v4::fn(params);             \
      case ::dalle_fast::CpuLevel::kV3: return v3::fn(params);             \
      case ::dalle_fast::CpuLevel::kPortable: return portable::fn(params); \
      case ::dalle_fast::CpuLevel::kNone: return;                          \
    }                                                                      \
  }
#else
#define DF_CPU_LAUNCHER(fn, Params) \
  namespace portable {              \
  void fn(const Params&);           \
  }                                 \
  inline void fn##_cpu(const Params& params) { portable::fn(params); }
#endif

// Declares bf16::fn of cpu_bf16.cpp, and fn_bf16, which says whether it ran: false asks for fn_cpu.
#if defined(DF_HAVE_BF16_LEVEL)
#define DF_BF16_LAUNCHER(fn, Params)                                             \
  namespace v4_bf16 {                                                            \
  DF_CPU_FUNCTION fn(const Params&);                                             \
  }                                                                              \
  inline bool fn##_bf16(const Params& params) {                                  \
    if (::dalle_fast::cpu_level() < ::dalle_fast::CpuLevel::kBf16) return false; \
    v4_bf16::fn(params);                                                         \
    return true;                                                                 \
  }
#else
#define DF_BF16_LAUNCHER(fn, Params) \
  inline bool fn##_bf16(const Params&) { return false; }
#endif
