// Every ordinary header the kernels need, included before a target is switched on.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "buffer.h"
#include "isa.h"
#include "row_program.h"

#if FASTMETA_X86
#include <immintrin.h>
#endif
