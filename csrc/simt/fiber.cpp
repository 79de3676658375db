// SPDX-License-Identifier: MIT
#include "fiber.h"

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#if defined(__x86_64__)
void* scheduler = nullptr;
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
#else
ucontext_t scheduler;
#endif
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_bytes = 0;
#endif

}  // namespace

void Stack::prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)  // frames that a failed launch left behind
  __asan_unpoison_memory_region(memory_.get(), kBytes);
#endif
#if defined(__x86_64__)
  auto top = reinterpret_cast<std::uintptr_t>(memory_.get() + kBytes) / 16 * 16;
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // where a caller's return address would be
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  pointer_ = slot;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_.get();
  context_.uc_stack.ss_size = kBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Stack::resume() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, memory_.get(), kBytes);
#endif
#if defined(__x86_64__)
  dalle_fast_simt_switch(&scheduler, pointer_);
#else
  swapcontext(&scheduler, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Stack::suspend(bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_bytes);
#endif
  (void)for_good;
#if defined(__x86_64__)
  dalle_fast_simt_switch(&pointer_, scheduler);
#else
  swapcontext(&context_, &scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Stack::begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
}

}  // namespace simt
