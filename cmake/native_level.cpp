// SPDX-License-Identifier: MIT
// Prints the number of this processor's level (core/dispatch.h), for -DDF_CPU_LEVELS=native.
#include <cstdio>

#include "core/cpu_features.h"

int main() {
  std::printf("%d", static_cast<int>(dalle_fast::processor_level()));
  return 0;
}
