// Launchers of the CUDA co-activation kernels: raw device pointers, no torch. Every function returns a cudaError_t as int,
// 0 for success; `stream` is a cudaStream_t. Nothing synchronises.
#pragma once
#include <stdint.h>

#if defined(_WIN32) || defined(MMC_EMULATED)
#define MMC_CUDA_API extern "C"
#else
#define MMC_CUDA_API extern "C" __attribute__((visibility("default")))
#endif

// codes of mmc_cuda_pack_signs: dtype of z
enum { MMC_FLOAT32 = 0, MMC_FLOAT16 = 1, MMC_BFLOAT16 = 2 };

// words[u * words_per_unit + w]: bit b is z[32 w + b, u] > 0, bits past the last sample 0; adds the number of values of z
// that are not finite to *nonfinite. z [samples, units] with strides in elements; words_per_unit a multiple of 4 and at
// least ceil(samples / 32).
MMC_CUDA_API int mmc_cuda_pack_signs(const void* z, int dtype, int64_t samples, int64_t units, int64_t stride_n,
                                     int64_t stride_u, uint32_t* words, int64_t words_per_unit, int64_t* nonfinite,
                                     void* stream);

// counts[i * ld + j] += sum_w popcount(words_iw & words_jw) for j >= i; below the diagonal untouched. plain != 0: popcounts
// in place of the int8 matrix units. At most 2^25 words per unit.
MMC_CUDA_API int mmc_cuda_coactivation(const uint32_t* words, int64_t units, int64_t words_per_unit, int64_t* counts,
                                       int64_t ld, int plain, void* stream);

// number of usable devices, or the negative error code
MMC_CUDA_API int mmc_cuda_devices(void);
MMC_CUDA_API const char* mmc_cuda_error_text(int code);
