#include "cpu.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace openmimo {

// Linux hands out the tile state on request only; once granted it holds for all threads.
bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AMX_INT8 = 1u << 25, ALL = AMX_BF16 | AMX_TILE | AMX_INT8;
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & ALL) != ALL) return false;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found{&kernels_scalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512);
      if (__builtin_cpu_supports("avx512vnni")) {
        found.push_back(&kernels_avx512_vnni);
        if (__builtin_cpu_supports("avx512bf16")) {
          found.push_back(&kernels_amx_emulated);
          found.push_back(&kernels_avx512_bf16);
          if (amx_granted()) found.push_back(&kernels_amx);
        }
      }
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
