// The architectures nvcc compiled for, ended by 0; fastmeta/_extension.py reads them.
extern "C" __attribute__((visibility("default"))) const int fastmeta_cuda_architectures[] = {
#ifdef __CUDA_ARCH_LIST__
    __CUDA_ARCH_LIST__,
#endif
    0};
