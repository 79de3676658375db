// SPDX-License-Identifier: MIT
// How much shared memory a block may have, static and dynamic together, on the devices that there are. Each kernel's
// plan is a constant expression of the limit, and static_assert holds it to all of them.
#pragma once

#include <cstddef>

namespace dalle_fast {

constexpr std::size_t kSharedLimits[] = {
    std::size_t{99} << 10,   // sm_86, 89, 120, 121
    std::size_t{163} << 10,  // sm_80, 87
    std::size_t{227} << 10,  // sm_90, 100, 103, 110
};
constexpr std::size_t kLeastSharedLimit = kSharedLimits[0];
constexpr std::size_t kMostStatic = 48 << 10;     // declared by a kernel, and without allow_dynamic_shared in all
constexpr std::size_t kReservedShared = 1 << 10;  // what the system takes of an SM for each block

// Blocks of so many bytes that an SM holds: it has the limit of one block and what is reserved for it.
constexpr std::size_t resident_blocks(std::size_t bytes, std::size_t limit) {
  return (limit + kReservedShared) / (bytes + kReservedShared);
}

// Of two plans: the large one where `blocks` of it are resident, or where it fits and the small one is not so either.
constexpr bool takes_large_plan(std::size_t large, std::size_t small, std::size_t blocks, std::size_t limit) {
  if (resident_blocks(large, limit) >= blocks) return true;
  return large <= limit && resident_blocks(small, limit) < blocks;
}

// Whether bytes_at(limit), which a plan takes on a device, is within the limit on every device.
template <typename F>
constexpr bool fits_every_device(F bytes_at) {
  for (const std::size_t limit : kSharedLimits)
    if (bytes_at(limit) > limit) return false;
  return true;
}

}  // namespace dalle_fast
