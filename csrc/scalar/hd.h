// SPDX-License-Identifier: MIT
// Marks functions that host and device share. static: each CPU level compiles its own copy.
#pragma once

#if defined(__CUDACC__)
#define DF_HD static __host__ __device__ __forceinline__
#else
#define DF_HD static inline __attribute__((always_inline))
#endif
