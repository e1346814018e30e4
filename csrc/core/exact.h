// The sign of a dot product of floats as a real number: integers alone, so no rounding, no flag of the processor and no compiler
// option can change it. No torch in here.
#pragma once
#include "core.h"

namespace mmc {

constexpr int kNotFinite = 2;

// -1, 0 or 1: the sign of sum_k x[k * x_stride] w[k * w_stride] + bias. kNotFinite: an operand is NaN or infinite, or the sum
// rounded to T is infinite. Time O(depth) with a constant of some ten additions.
MMC_API int exact_sign(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float bias);
MMC_API int exact_sign(const double* x, int64_t x_stride, const double* w, int64_t w_stride, int64_t depth, double bias);

}  // namespace mmc
