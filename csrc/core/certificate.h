// Which signs of computed pre-activations are certain, and what the others are: AGOP counts the sign of the exact real number
// w.x + b of the given floats, and any product may serve.
//
// A float32 value z' of z = sum_k x_k w_k + b, summed in any order, fused or not, comes from n - 1 additions, n = depth + 1, each of
// which errs by at most u = 2^-24 of its result, and from rounded products. With S = |x|.|w| + |b|, exact partial sums lie within
// (S + |z|) / 2, so |z' - z| <= u (n / 2 + 1) (1 + 2 gamma_n) S + u n |z| / 2, and z' of another sign than z (or z = 0) is at most
//     u (n / 2 + 1) (1 + 2 gamma_n) S + what underflows,  |x|.|w| <= ||x|| ||w||  (Cauchy, Schwarz; gamma_n = n u / (1 - n u)).
// It holds where subnormal numbers count as zero, and not for products that are no sums of products (Strassen) or round their
// operands (TF32).
#pragma once
#include "exact.h"
#include "internal.h"

namespace mmc {

class Certificate {
 public:
  // slots >= weight.rows: room for the units of whole tiles, of which those beyond the last are off
  Certificate(const KernelTable& table, const Matrix& weight, const float* bias, int64_t slots, const Pool& pool);

  const float* bias() const { return values_.get(); }  // [slots], as the next two
  const float* scale() const { return values_.get() + slots_; }
  const float* offset() const { return values_.get() + 2 * slots_; }

  // norm [lanes]: an upper bound of each column's norm; infinite where it is so large that a pre-activation may overflow,
  // zero where a column is zero
  void norms(const float* panel, float* norm) const;

  // the sign of an exact pre-activation: float64 with a bound of its own, then integers; kNotFinite as exact_sign
  int sign(const float* x, int64_t x_stride, int64_t unit, float norm, float* scratch) const;

 private:
  const KernelTable& table_;
  int64_t depth_, slots_;
  const float* weight_;  // rows contiguous
  int64_t weight_stride_;
  Buffer<float> copy_, values_;
  Buffer<double> norm_;  // of the rows of weight
};

}  // namespace mmc
