// The architectures nvcc compiled for, as 800 for sm_80, then zeros; fastmeta/_extension.py reads them.
extern "C" __attribute__((visibility("default"))) const int fastmeta_cuda_architectures[16] = {
#ifdef __CUDA_ARCH_LIST__
    __CUDA_ARCH_LIST__
#endif
};
