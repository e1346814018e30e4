// Row kernels of lowp.h, one set per instruction set. Declarations only: see kernel_table.h.
#pragma once
#include <cstdint>

namespace mmc {

enum class Low : int { bfloat16 = 0, float16 = 1 };

// out[l] = relu(scale * c[l] + bias[l] + (add ? out[l] : 0)), then zero where gate[l] <= 0
struct LowRow {
  const uint16_t* c;
  const float* wide_c;
  uint16_t* out;
  int64_t count;
  const float* bias;
  const uint16_t* gate;
  float scale;
  bool relu, add;
};

#define MMC_LOW_ROWS                                              \
  void widen(Low, const uint16_t*, float*, int64_t);              \
  void narrow(Low, const float*, uint16_t*, int64_t);             \
  void finish_low_row(Low, const LowRow&);                        \
  void add_low_row(Low, const uint16_t*, float*, int64_t);
namespace base {
MMC_LOW_ROWS
}
namespace avx2 {
MMC_LOW_ROWS
}
namespace avx512 {
MMC_LOW_ROWS
}
#undef MMC_LOW_ROWS

}  // namespace mmc
