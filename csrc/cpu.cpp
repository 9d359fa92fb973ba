#include "cpu.h"

#include <stdexcept>

namespace openmimo {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found{&kernels_scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512_bf16);
    }
  }
#endif
  return found;
}

const Kernels& choose_kernels(const std::string& name) {
  const auto found = available_kernels();
  if (name.empty()) return *found.back();
  std::string names;
  for (const Kernels* kernels : found) {
    if (name == kernels->name) return *kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("no kernels \"" + name + "\" on this processor; available: " + names);
}

}  // namespace openmimo
