#define OPENMIMO_EMULATE_AMX
#include "kernels_amx.h"

OPENMIMO_TILE_KERNELS(kernels_amx_emulated, "amx_emulated");
