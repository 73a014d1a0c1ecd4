// One source, compiled for each instruction set; run_best() picks one at run time (isa.h).
//
// A kernel is a struct with a static FASTMETA_INLINE run(arguments...): plain loops, which the compiler vectorizes for
// the function they are inlined into.
#pragma once

#include "cpu/isa.h"

#define FASTMETA_INLINE inline __attribute__((always_inline))

namespace fastmeta {

template <class Kernel, class... Arguments>
void run_baseline(Arguments... arguments) {
  Kernel::run(arguments...);
}

#if FASTMETA_X86
template <class Kernel, class... Arguments>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(Arguments... arguments) {
  Kernel::run(arguments...);
}

template <class Kernel, class... Arguments>
__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))) void run_avx512(Arguments... arguments) {
  Kernel::run(arguments...);
}
#endif

template <class Kernel, class... Arguments>
void run_best(Arguments... arguments) {
#if FASTMETA_X86
  if (isa() == Isa::avx512) return run_avx512<Kernel>(arguments...);
  if (isa() == Isa::avx2) return run_avx2<Kernel>(arguments...);
#endif
  run_baseline<Kernel>(arguments...);
}

}  // namespace fastmeta
