#include "certificate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mmc {
namespace {

constexpr double kRoundoff = 0x1p-24, kRoundoff64 = 0x1p-53;
constexpr double kSmallest = 0x1p-126;  // what an operation may lose where subnormal numbers count as zero
constexpr double kMargin = 1 + 0x1p-10;  // covers the rounding of the bound itself
constexpr double kLargest = 0x1p62;      // norms beyond: a partial sum might overflow
constexpr int64_t kDeepest = int64_t{1} << 22;  // beyond, n u is no longer small
constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool is_zero(const float* values, int64_t stride, int64_t count) {  // from the bits: subnormal numbers are not zero
  for (int64_t k = 0; k < count; ++k) {
    uint32_t bits;
    std::memcpy(&bits, values + k * stride, 4);
    if (bits << 1) return false;
  }
  return true;
}

float upwards(double value) { return static_cast<float>(value * (1 + 0x1p-22)); }

}  // namespace

Certificate::Certificate(const KernelTable& table, const Matrix& weight, const float* bias, int64_t slots, const Pool& pool)
    : table_(table), depth_(weight.cols), slots_(slots), weight_(weight.data), weight_stride_(weight.row_stride),
      values_(3 * slots), norm_(slots) {
  if (weight.col_stride != 1) {
    copy_ = Buffer<float>(weight.rows * depth_);
    for (int64_t i = 0; i < weight.rows; ++i)
      for (int64_t k = 0; k < depth_; ++k)
        copy_[i * depth_ + k] = weight.data[i * weight.row_stride + k * weight.col_stride];
    weight_ = copy_.get(), weight_stride_ = depth_;
  }
  const double root = std::sqrt(static_cast<double>(depth_)), n = static_cast<double>(depth_ + 1), gamma = n * kRoundoff / (1 - n * kRoundoff);
  const double factor = depth_ < kDeepest ? (n / 2 + 1) * kRoundoff * (1 + 2 * gamma) * kMargin : kInfinity;
  float *b = values_.get(), *scale = b + slots, *offset = scale + slots;
  parallel_for(pool, weight.rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double squares, same;
      table.dot(weight_ + i * weight_stride_, weight_ + i * weight_stride_, depth_, &squares, &same);
      b[i] = bias ? bias[i] : 0.0f;
      norm_[i] = std::sqrt(squares) * kMargin + root * kSmallest;
      const bool small = norm_[i] < kLargest && std::fabs(b[i]) < kLargest * kLargest;  // false for NaN
      scale[i] = small ? upwards(factor * norm_[i] + 2 * root * kSmallest) : kInfinity;
      offset[i] = small ? upwards(factor * std::fabs(b[i]) + (2 * root * norm_[i] + 4 * n + 8) * kSmallest) : kInfinity;
    }
  });
  for (int64_t i = weight.rows; i < slots; ++i) b[i] = -1.0f, scale[i] = offset[i] = 0.0f, norm_[i] = 0;
}

void Certificate::norms(const float* panel, float* norm) const {
  const double loss = std::sqrt(static_cast<double>(depth_)) * 0x1p-62;  // squares that underflow
  const double factor = 1 + (depth_ + 4) * 2 * kRoundoff;                // rounding of their sum and of its root
  table_.column_squares(panel, depth_, norm);
  for (int64_t l = 0; l < table_.lanes; ++l) {
    const double value = std::sqrt(static_cast<double>(norm[l])) * factor + loss;
    if (norm[l] == 0 && is_zero(panel + l, table_.lanes, depth_)) {
      norm[l] = 0;
    } else {
      norm[l] = value < kLargest ? upwards(value) : kInfinity;  // infinite for NaN
    }
  }
}

int Certificate::sign(const float* x, int64_t x_stride, int64_t unit, float norm, float* scratch) const {
  const float bias = values_[unit];
  const float* w = weight_ + unit * weight_stride_;
  const double root = std::sqrt(static_cast<double>(depth_));
  // a row or a unit of zeros, and nothing infinite or NaN on the other side: the bias alone
  const bool zero_row = norm == 0 && scale()[unit] < kInfinity;
  const bool zero_unit = norm < kInfinity && norm_[unit] <= root * kSmallest && is_zero(w, 1, depth_);
  if (zero_row || zero_unit) return exact_sign(x, 1, w, 1, 0, bias);
  if (x_stride != 1) {
    for (int64_t k = 0; k < depth_; ++k) scratch[k] = x[k * x_stride];
    x = scratch;
  }
  double sum, size;
  table_.dot(x, w, depth_, &sum, &size);
  sum += bias, size += std::fabs(bias);
  const double bound = (depth_ + 20) * 2 * kRoundoff64 * size + 2 * (root * (norm + norm_[unit]) + 1) * kSmallest;
  if (std::fabs(sum) > bound && size < 0x1p126) return sum > 0 ? 1 : -1;
  return exact_sign(x, 1, w, 1, depth_, bias);
}

}  // namespace mmc
