// The kernels for the instruction set every processor of the architecture has.
#include "kernel_headers.h"

#define FASTMETA_TARGET baseline
#define FASTMETA_VECTOR_BYTES 16
#include "kernels.h"
