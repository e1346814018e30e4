#include "split.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sgemm.h"

namespace mmc {
namespace {

constexpr double kRoundoff = 0x1p-24, kSmallest = 0x1p-126, kMargin = 1 + 0x1p-10;
constexpr double kLargest = 0x1p62;  // norms beyond: a partial sum might overflow
constexpr int64_t kDeepest = int64_t{1} << 21;
constexpr double kMostSecond = 0x1p-7, kMostRest[] = {0x1p-7, 0x1p-14};  // of a norm, where nothing is subnormal; by parts
constexpr int64_t kLaneBlocks = 8;  // blocks of lanes that are multiplied at a time: in L2 while the rows pass by
constexpr float kInfinity = std::numeric_limits<float>::infinity();

float upwards(double value) { return static_cast<float>(value * (1 + 0x1p-22)); }

struct Norms {
  double all, second, rest;
};

Norms norms(const double* squares, int64_t depth) {
  const double lost = squares[0] == 0 ? 0 : 4 * std::sqrt(static_cast<double>(depth)) * kSmallest;
  return {std::sqrt(squares[0]) + lost, std::sqrt(squares[1]) + lost, std::sqrt(squares[2]) + lost};
}

}  // namespace

void SplitOperand::pack(const MatrixTiles& tiles, const Matrix& rows, bool lanes, uint16_t* out, double* squares,
                        const Pool& pool) const {
  const int64_t panel = steps_ * parts_ * kTileSize;
  parallel_for(pool, round_up(rows.rows, kTileBlock) / kTile, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t count = std::clamp<int64_t>(rows.rows - t * kTile, 0, kTile);
      tiles.split({rows.data + (count ? t * kTile : 0) * rows.row_stride, rows.row_stride, rows.col_stride, count, depth_, parts_,
                   lanes, out + t * panel, squares + 3 * kTile * t});
    }
  });
}

void SplitOperand::multiply(const MatrixTiles& tiles, int64_t rows, int64_t lanes, const uint16_t* left, const uint16_t* right,
                            float* c, int64_t ldc) const {
  const int64_t block = kBlockTiles * steps_ * parts_ * kTileSize, blocks = ceil_div(lanes, kTileBlock);
  for (int64_t j = 0; j < blocks; j += kLaneBlocks)
    tiles.product({ceil_div(rows, kTileBlock), std::min(kLaneBlocks, blocks - j), steps_, parts_, left, right + j * block,
                   c + j * kTileBlock, ldc});
}

SplitLayer::SplitLayer(const MatrixTiles& tiles, const Matrix& weight, const float* bias, int parts, const Pool& pool)
    : tiles_(tiles), units_(weight.rows), depth_(weight.cols), parts_(parts), bias_(bias), operand_(depth_, parts),
      packed_(operand_.size(units_)), squares_(3 * round_up(units_, kTileBlock)) {
  operand_.pack(tiles, weight, false, packed_.get(), squares_.get(), pool);
}

int64_t SplitLayer::scratch(int64_t samples) const {
  const int64_t width = round_up(samples, kWordBits), units = round_up(units_, kTileBlock);
  return units * width + 2 * round_up(units_, 16) + 6 * width + operand_.size(width) / 2;
}

SplitLayer::Signs SplitLayer::multiply(const Matrix& x, float* norm, float* scratch) const {
  const int64_t width = round_up(x.rows, kWordBits), units = round_up(units_, kTileBlock);
  float *z = scratch, *scale = z + units * width, *offset = scale + round_up(units_, 16);
  double* squares = reinterpret_cast<double*>(offset + round_up(units_, 16));
  uint16_t* lanes = reinterpret_cast<uint16_t*>(squares + 3 * width);
  std::fill(squares + 3 * round_up(x.rows, kTileBlock), squares + 3 * width, 0.0);
  operand_.pack(tiles_, x, true, lanes, squares, serial_pool());
  operand_.multiply(tiles_, units_, x.rows, packed_.get(), lanes, z, width);

  double second = 0, rest = 0;
  for (int64_t s = 0; s < width; ++s) {
    const Norms of = norms(squares + 3 * s, depth_);
    // false for NaN
    const bool usual = of.all < kLargest && of.second <= kMostSecond * of.all && of.rest <= kMostRest[parts_ - 1] * of.all;
    norm[s] = usual ? upwards(of.all) : kInfinity;
    if (!usual || of.all == 0) continue;
    second = std::max(second, of.second / of.all), rest = std::max(rest, of.rest / of.all);
  }
  const double n = static_cast<double>((2 * parts_ - 1) * depth_ + 1), gamma = n * kRoundoff / (1 - n * kRoundoff);
  const double f = depth_ < kDeepest ? (n / 2 + 1) * kRoundoff * (1 + 2 * gamma) : kInfinity, g = 1 + n * kRoundoff;
  for (int64_t i = 0; i < units_; ++i) {
    const Norms of = norms(squares_.get() + 3 * i, depth_);
    const double size = of.all + 2 * of.second + of.rest, bias = bias_ ? std::fabs(static_cast<double>(bias_[i])) : 0;
    const double dropped = second * of.second + (1 + rest) * of.rest + rest * of.all;
    const bool small = of.all < kLargest && bias < kLargest * kLargest;
    scale[i] = small ? upwards(kMargin * (f * (1 + 2 * second + rest) * size + g * dropped) + 4 * kSmallest) : kInfinity;
    offset[i] = small ? upwards(kMargin * f * bias + (4 * n + 8) * kSmallest) : kInfinity;
  }
  return {z, scale, offset, width};
}

bool split_product(int64_t m, int64_t n, int64_t k, const Strided& a, const Strided& b, int parts, float* c, int64_t ldc,
                   const Pool& pool) {
  const MatrixTiles* tiles = current_tiles();
  if (!tiles || k < tiles->least_depth || m == 0 || n == 0) return false;
  const SplitOperand operand(k, parts);
  const Buffer<uint16_t> left(operand.size(m)), right(operand.size(n));
  const Buffer<double> squares(3 * round_up(std::max(m, n), kTileBlock));
  operand.pack(*tiles, {a.data, m, k, a.row, a.col}, false, left.get(), squares.get(), pool);
  operand.pack(*tiles, {b.data, n, k, b.col, b.row}, true, right.get(), squares.get(), pool);
  const int64_t bands = ceil_div(n, kLaneBlocks * kTileBlock), rows = ceil_div(m, kTileBlock);
  parallel_for(pool, bands * rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t width = kLaneBlocks * kTileBlock, step = operand.size(kTileBlock);
    const Buffer<float> block(kTileBlock * width);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / bands * kTileBlock, j = t % bands * width, columns = std::min(width, n - j);
      operand.multiply(*tiles, kTileBlock, columns, left.get() + i / kTileBlock * step, right.get() + j / kTileBlock * step,
                       block.get(), width);
      for (int64_t r = i; r < std::min(m, i + kTileBlock); ++r)
        std::copy_n(block.get() + (r - i) * width, columns, c + r * ldc + j);
    }
  });
  return true;
}

}  // namespace mmc
