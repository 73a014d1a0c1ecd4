// Picks the kernels of the processor's instruction set.
#include "isa.h"
#include "row_program.h"

namespace fastmeta {

namespace baseline {
template <class A>
const RowKernels<A>& kernels();
}
namespace avx2 {
template <class A>
const RowKernels<A>& kernels();
}
namespace avx512 {
template <class A>
const RowKernels<A>& kernels();
}

template <class A>
const RowKernels<A>& row_kernels() {
#if FASTMETA_X86
  if (isa() == Isa::avx512) return avx512::kernels<A>();
  if (isa() == Isa::avx2) return avx2::kernels<A>();
#endif
  return baseline::kernels<A>();
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();

}  // namespace fastmeta
