// Which kernels this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace openmimo {

// The kernel tables that work here, slowest first but for the emulated one, which is never the last.
std::vector<const Kernels*> available_kernels();

// The table named by `name`, or the fastest when it is empty. Throws std::invalid_argument for one that is not available.
const Kernels& choose_kernels(const std::string& name);

}  // namespace openmimo
