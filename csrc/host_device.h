// Marks functions that kernels and host tests share.
#pragma once
#ifdef __CUDACC__
#define OPENSORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OPENSORA_HOST_DEVICE inline
#endif
