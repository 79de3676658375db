// SPDX-License-Identifier: MIT
#pragma once

#include <string>

namespace dalle_fast {

// "ok", or in the runtime's words why no kernel can run here. Never throws, needs no driver.
std::string cuda_status();

}  // namespace dalle_fast
