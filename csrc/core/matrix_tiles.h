// Matrix tiles (AMX): products of 16 x 16 results, bfloat16 into float32 and bytes into int32. Declarations only: see kernel_table.h.
#pragma once
#include <cstdint>

namespace mmc {

constexpr int64_t kTile = 16;         // rows or lanes of a tile
constexpr int64_t kStep = 32;         // bfloat16 numbers of a tile along k
constexpr int64_t kTileSize = 512;    // the same as 16-bit numbers: 1024 bytes
constexpr int64_t kBlockTiles = 2;    // tiles on each side of what stays in registers
constexpr int64_t kTileBlock = kTile * kBlockTiles;

// 16 rows of a float32 matrix as sums of bfloat16 numbers: x = x1 (+ x2) + rest, each the nearest to what is left, subnormal
// numbers zero. out [step][part][kTileSize]: rows lie one after the other, lanes side by side in pairs along k; zero beyond the end.
struct SplitRows {
  const float* src;
  int64_t row, col, rows, depth;  // rows at most kTile; strides in elements
  int parts;                      // 1 or 2
  bool lanes;
  uint16_t* out;
  double* squares;  // [kTile][3]: upper bounds of |x|^2, |x2|^2, |rest|^2 but for subnormal numbers; zero for a row of zeros alone
};

// c[r][l] = x1 w1 (+ x1 w2 + x2 w1) along k, in blocks of kTileBlock rows and lanes
struct SplitProduct {
  int64_t row_blocks, lane_blocks, steps;
  int parts;
  const uint16_t *rows, *lanes;
  float* c;
  int64_t ldc;
};

struct MatrixTiles {
  int64_t least_depth;  // products of less along k do not pay
  void (*split)(const SplitRows& rows);
  void (*product)(const SplitProduct& product);
  // bits of 16 units as bytes 0 or 1: rows and lanes [word][1024 bytes], the samples of a word in an order of their own
  void (*spread)(const uint64_t* const* units, int64_t stride, int64_t words, uint8_t* rows, uint8_t* lanes);
  // counts[r][l], r < kTileBlock, l < kTileBlock * lane_blocks, of operands that spread made
  void (*count)(int64_t words, int64_t lane_blocks, const uint8_t* rows, const uint8_t* lanes, int32_t* counts, int64_t ld);
};

namespace amx {
extern const MatrixTiles tiles;
}
namespace amx_emulated {
extern const MatrixTiles tiles;
}

}  // namespace mmc
