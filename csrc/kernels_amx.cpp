#include "kernels_amx.h"

OPENMIMO_TILE_KERNELS(kernels_amx, "amx");
