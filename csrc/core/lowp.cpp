#include "lowp.h"

#include "internal.h"

namespace mmc {

#ifdef MMC_X86
#define MMC_CALL(function, ...)                                          \
  switch (current_kernels().lanes) {                                     \
    case 32: return avx512::function(__VA_ARGS__);                       \
    case 16: return avx2::function(__VA_ARGS__);                         \
    default: return base::function(__VA_ARGS__);                         \
  }
#else
#define MMC_CALL(function, ...) return base::function(__VA_ARGS__);
#endif

void widen(Low type, const uint16_t* src, float* dst, int64_t count) { MMC_CALL(widen, type, src, dst, count) }
void narrow(Low type, const float* src, uint16_t* dst, int64_t count) { MMC_CALL(narrow, type, src, dst, count) }
void finish_low_row(Low type, const LowRow& row) { MMC_CALL(finish_low_row, type, row) }
void add_low_row(Low type, const uint16_t* row, float* sums, int64_t count) { MMC_CALL(add_low_row, type, row, sums, count) }

}  // namespace mmc
