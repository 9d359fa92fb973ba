#include "isa_avx512.h"
#include "kernels_impl.h"

OPENMIMO_KERNELS(kernels_avx512_bf16, "avx512_bf16");
