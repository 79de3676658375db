// SPDX-License-Identifier: MIT
// Huge pages for large results, as NumPy asks for them: the first write to a fresh mapping of small pages takes several
// times as long as the bytes. Where the system gives none, or the memory is not fresh, nothing happens.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dalle_fast {

inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = 32 << 20;  // glibc maps what is larger by itself, and unmaps it when it is freed
  constexpr std::uintptr_t kPage = 2 << 20;
  if (bytes < kLeast) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace dalle_fast
