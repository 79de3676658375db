// SPDX-License-Identifier: MIT
// Threads for cpu.cpp files. OpenMP resolves to the libgomp that torch has loaded, so torch.set_num_threads rules.
// Iterations are independent and each writes its own outputs: the result is the same at any number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dalle_fast {
namespace DF_CPU_NAMESPACE {

// Work below about this many elements is done sooner than a second thread wakes up.
inline constexpr int64_t kSerialBelow = 8192;

// How many threads a parallel loop gets.
inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// f(i) for i in [0, n), in equal shares; `threads` = false keeps small work on the calling thread.
template <typename F>
static inline void parallel_for(int64_t n, F&& f, bool threads = true) {
  if (!threads || n <= 1) {  // entering a parallel region costs 0.3 us even with one thread
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(static)
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

// f(i) for i in [0, n), handed out one by one: for tasks of unequal length.
template <typename F>
static inline void parallel_for_dynamic(int64_t n, F&& f, bool threads = true) {
  if (!threads || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1)
#endif
  for (int64_t i = 0; i < n; ++i) f(i);
}

// f(begin, end) over [0, n) in chunks of fixed length: chunk borders never depend on the number of threads.
template <typename F>
static inline void parallel_chunks(int64_t n, int64_t chunk, F&& f) {
  const int64_t num_chunks = (n + chunk - 1) / chunk;
  parallel_for(num_chunks, [&](int64_t i) {
    const int64_t begin = i * chunk;
    f(begin, begin + chunk < n ? begin + chunk : n);
  });
}

// 64-byte aligned scratch of one thread, kept between calls and grown on demand. Contents are undefined.
class ThreadScratch {
 public:
  ~ThreadScratch() { std::free(data_); }
  float* floats(int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(float) + 63) / 64 * 64;
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) std::abort();  // out of memory inside a parallel region: nothing to unwind to
    }
    return static_cast<float*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace DF_CPU_NAMESPACE
}  // namespace dalle_fast
