// SPDX-License-Identifier: MIT
// Stacks of their own for the threads of a block, and switching between them and the scheduler's.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Stack {
 public:
  void prepare(void (*entry)());  // `entry` begins anew at the next resume(); it never returns
  void resume();                  // from the scheduler, until the stack suspends
  void suspend(bool for_good);    // from code on the stack, back to the scheduler
  static void begin();            // the first thing an entry does

 private:
  static constexpr std::size_t kBytes = 128 << 10;
  std::unique_ptr<char[]> memory_{new char[kBytes]};
#if defined(__x86_64__)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace simt
