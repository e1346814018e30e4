#include "coactivation.h"

#include "coactivation.cuh"

#ifndef MMC_EMULATED
#include <cuda_runtime.h>
// a bad launch configuration shows in cudaGetLastError, which this thread's earlier errors must not colour
#define MMC_LAUNCH(kernel, grid, stream, ...)                                                               \
  (cudaGetLastError(), kernel<<<grid, mmc_cuda::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
#endif

namespace {

constexpr int kInvalid = 1;  // cudaErrorInvalidValue
constexpr int64_t kMostWords = int64_t{1} << 25;
constexpr int64_t kBlocks = 528;  // fewer tiles than this are split along the samples

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Bits, int kBits, int kExponent>
int pack(const void* z, int64_t samples, int64_t units, int64_t stride_n, int64_t stride_u, uint32_t* words,
         int64_t words_per_unit, int64_t* nonfinite, void* stream) {
  int64_t rows = words_per_unit / mmc_cuda::kPackWords;
  if (rows > 65535) rows = 65535;  // the kernel loops over the rest
  const dim3 grid(static_cast<unsigned>(divide_up(units, mmc_cuda::kThreads)), static_cast<unsigned>(rows));
  return MMC_LAUNCH((mmc_cuda::pack_signs<Bits, kBits, kExponent>), grid, stream, static_cast<const Bits*>(z), samples, units,
                    stride_n, stride_u, words, words_per_unit, nonfinite);
}

}  // namespace

MMC_CUDA_API int mmc_cuda_pack_signs(const void* z, int dtype, int64_t samples, int64_t units, int64_t stride_n,
                                     int64_t stride_u, uint32_t* words, int64_t words_per_unit, int64_t* nonfinite,
                                     void* stream) {
  if (samples < 0 || units < 0 || words_per_unit % mmc_cuda::kPackWords != 0 || words_per_unit * 32 < samples) return kInvalid;
  if (units == 0 || words_per_unit == 0) return 0;
  switch (dtype) {
    case MMC_FLOAT32:
      return pack<uint32_t, 32, 8>(z, samples, units, stride_n, stride_u, words, words_per_unit, nonfinite, stream);
    case MMC_FLOAT16:
      return pack<uint16_t, 16, 5>(z, samples, units, stride_n, stride_u, words, words_per_unit, nonfinite, stream);
    case MMC_BFLOAT16:
      return pack<uint16_t, 16, 8>(z, samples, units, stride_n, stride_u, words, words_per_unit, nonfinite, stream);
    default:
      return kInvalid;
  }
}

MMC_CUDA_API int mmc_cuda_coactivation(const uint32_t* words, int64_t units, int64_t words_per_unit, int64_t* counts,
                                       int64_t ld, int plain, void* stream) {
  const int64_t side = divide_up(units, mmc_cuda::kTile), tiles = side * (side + 1) / 2;
  if (units < 0 || words_per_unit < 0 || words_per_unit > kMostWords || ld < units || tiles > (int64_t{1} << 23))
    return kInvalid;
  if (units == 0 || words_per_unit == 0) return 0;
  const int64_t steps = divide_up(words_per_unit, mmc_cuda::kStep);
  int64_t splits = divide_up(kBlocks, tiles);
  if (splits > steps) splits = steps;
  const int64_t split = divide_up(steps, splits) * mmc_cuda::kStep;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(divide_up(words_per_unit, split)));
  return plain ? MMC_LAUNCH(mmc_cuda::coactivation_plain, grid, stream, words, units, words_per_unit, split, counts, ld)
               : MMC_LAUNCH(mmc_cuda::coactivation_mma, grid, stream, words, units, words_per_unit, split, counts, ld);
}

#ifndef MMC_EMULATED
MMC_CUDA_API int mmc_cuda_devices(void) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? count : -static_cast<int>(error);
}

MMC_CUDA_API const char* mmc_cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif
