#include "isa_avx512.h"
#include "kernels_impl.h"

OPENMIMO_KERNELS(kernels_avx512_vnni, "avx512_vnni");
