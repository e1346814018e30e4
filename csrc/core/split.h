// Pre-activations from bfloat16 products with float32 sums (AMX), and which of their signs are certain.
//
// A float32 vector is split into x = x1 (+ x2) + rest by rounding to bfloat16 (split of matrix_tiles.h). One part each gives the
// product x1.w1, two give x1.w1 + x1.w2 + x2.w1: p = 1 or 3 sums of d products. With norms N = ||x||, T = ||x2||, R = ||rest|| of a
// sample and N', T', R' of a unit, B = N + 2T + R, n = p d + 1 terms with the bias, u = 2^-24, f = u (n / 2 + 1) (1 + 2 gamma_n):
// z' with another sign than z = x.w + b, or where z = 0, is at most
//     f (B B' + |b|) + (1 + n u) (T T' + (N + R) R' + R N') + 2 n 2^-126.
// Proof. x.w less the kept products is x2.w2 + (x1 + x2).rest' + rest.w, at most D = T T' + (N + R) R' + R N' (Cauchy, Schwarz). The
// kept ones are exact in float32, 8 bits times 8, and the sum of their magnitudes is S <= B B'. For their sum with b, in any
// order, fused or not, certificate.h has |z' - kept| <= f (S + |b|) + u n |kept| / 2 where sums round to the nearest number, and
// if z <= 0 then kept <= D. TDPBF16PS and VDPBF16PS round so, take subnormal numbers for zero and give zero for them: those of
// the operands belong to the rest, and each of the 2 n results loses less than 2^-126.
//
// The bound is brought to the form norm[sample] * scale[unit] + offset[unit]: of T / N and R / N of a sample the largest of its
// block counts. A sample where they are larger than roundings make them (its numbers are nearly subnormal) has no certain sign.
#pragma once
#include "internal.h"

namespace mmc {

// Rows of a matrix [count, depth] as parts for matrix tiles, in blocks of kTileBlock.
class SplitOperand {
 public:
  SplitOperand(int64_t depth, int parts) : depth_(depth), steps_(ceil_div(depth, kStep)), parts_(parts) {}
  int64_t size(int64_t count) const { return round_up(count, kTileBlock) * steps_ * kStep * parts_; }  // 16-bit numbers
  // squares [3 * round_up(count, kTileBlock)], as SplitRows has them
  void pack(const MatrixTiles& tiles, const Matrix& rows, bool lanes, uint16_t* out, double* squares, const Pool& pool) const;
  // c [rows, lanes], whole blocks, rows ldc apart
  void multiply(const MatrixTiles& tiles, int64_t rows, int64_t lanes, const uint16_t* left, const uint16_t* right, float* c,
                int64_t ldc) const;

 private:
  int64_t depth_, steps_;
  int parts_;
};

// A layer, split, with what its units add to the bound.
class SplitLayer {
 public:
  SplitLayer(const MatrixTiles& tiles, const Matrix& weight, const float* bias, int parts, const Pool& pool);

  // floats that pre-activations of a block of samples need; samples round up to whole words
  int64_t scratch(int64_t samples) const;
  struct Signs {
    float* z;  // [units, width], without bias
    const float *scale, *offset;
    int64_t width;
  };
  // norm [round_up(x.rows, kWordBits)]: upper bounds; infinite where no sign is certain, zero where a sample is zero
  Signs multiply(const Matrix& x, float* norm, float* scratch) const;

 private:
  const MatrixTiles& tiles_;
  int64_t units_, depth_;
  int parts_;
  const float* bias_;
  SplitOperand operand_;
  Buffer<uint16_t> packed_;
  Buffer<double> squares_;
};

}  // namespace mmc
