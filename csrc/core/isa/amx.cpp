// AMX: matrix tiles for split products and for co-activation counts; everything else comes from another unit. Compiled twice, into
// the namespace MMC_ISA: for the processor's tiles, and for their emulation. No header with inline C++ functions that are not
// static may be included here (see kernel_table.h), but the emulation's.
#include "../bits.h"
#include "../matrix_tiles.h"
#if defined(MMC_EMULATED)
#include "amx_emulation.h"
#else
#include <immintrin.h>
#endif

namespace mmc {
namespace MMC_ISA {
namespace {

#if defined(MMC_EMULATED)
constexpr int64_t kLeastDepth = 1;
#else
constexpr int64_t kLeastDepth = 16;  // three products of 32 at a sixteenth of the time of float32 multiply-adds
#endif

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
const Config config;  // not on a stack: the compiler does not see that the instruction reads all of it

// the nearest bfloat16 number, ties to even; subnormal numbers become zero, every NaN stays one
inline uint32_t nearest(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const uint32_t kept = (rounded & 0x7f800000u) == 0 ? 0 : rounded;
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : kept;
}

// One row; whether it has an element other than zero.
template <class Sum>
bool split_row(const SplitRows& s, int64_t r, double* squares) {
  Sum sums[3][kTile] = {};
  uint32_t any = 0;
  for (int64_t k0 = 0; k0 < s.depth; k0 += kStep) {
    float x[kStep] = {};
    const int64_t count = s.depth - k0 < kStep ? s.depth - k0 : kStep;
    const float* src = s.src + r * s.row + k0 * s.col;
    if (s.col == 1) {
      __builtin_memcpy(x, src, count * sizeof(float));
    } else {
      for (int64_t k = 0; k < count; ++k) x[k] = src[k * s.col];
    }
    alignas(64) uint16_t part[2][kStep];
    for (int k = 0; k < kStep; ++k) any |= to_bits(x[k]) << 1;
    for (int k = 0; k < kStep; ++k) {
      const uint32_t first = nearest(to_bits(x[k]));
      const float rest = x[k] - from_bits(first);
      const uint32_t second = s.parts == 2 ? nearest(to_bits(rest)) : 0;
      const Sum value = x[k], small = from_bits(second), left = rest - from_bits(second);
      part[0][k] = static_cast<uint16_t>(first >> 16), part[1][k] = static_cast<uint16_t>(second >> 16);
      sums[0][k % kTile] += value * value;
      sums[1][k % kTile] += small * small;
      sums[2][k % kTile] += left * left;
    }
    for (int p = 0; p < s.parts; ++p) {
      uint16_t* tile = s.out + (k0 / kStep * s.parts + p) * kTileSize;
      if (s.lanes) {
        for (int pair = 0; pair < kTile; ++pair) __builtin_memcpy(tile + 2 * (kTile * pair + r), part[p] + 2 * pair, 4);
      } else {
        __builtin_memcpy(tile + kStep * r, part[p], sizeof(part[p]));
      }
    }
  }
  for (int i = 0; i < 3; ++i) {
    double total = 0;
    for (const Sum value : sums[i]) total += value;
    squares[i] = total;
  }
  return any != 0;
}

void split(const SplitRows& s) {
  __builtin_memset(s.out, 0, (s.depth + kStep - 1) / kStep * s.parts * kTileSize * sizeof(uint16_t));
  for (int64_t i = 0; i < 3 * kTile; ++i) s.squares[i] = 0;
  for (int64_t r = 0; r < s.rows; ++r) {
    double* squares = s.squares + 3 * r;
    double lost = 0x1p-124;  // of each square that underflows, if it is a float32
    bool any = split_row<float>(s, r, squares);
    if (any && squares[0] < 0x1p-40) split_row<double>(s, r, squares), lost = 0x1p-500;
    for (int i = 0; i < 3; ++i) squares[i] = any ? squares[i] * (1 + (s.depth + 8) * 0x1p-23) + s.depth * lost : 0;
  }
}

void product(const SplitProduct& p) {
  _tile_loadconfig(&config);
  const int64_t step = p.parts * kTileSize, panel = p.steps * step, next = p.parts == 2 ? kTileSize : 0;
  for (int64_t i = 0; i < p.row_blocks; ++i)
    for (int64_t j = 0; j < p.lane_blocks; ++j) {
      const uint16_t *rows = p.rows + kBlockTiles * i * panel, *lanes = p.lanes + kBlockTiles * j * panel;
      _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
      for (int64_t s = 0; s < p.steps; ++s, rows += step, lanes += step) {
        _tile_loadd(4, lanes, 64); _tile_loadd(5, lanes + panel, 64);
        if (next) {  // x1 w2
          _tile_loadd(6, rows + next, 64); _tile_loadd(7, rows + panel + next, 64);
          _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5);
        }
        _tile_loadd(6, rows, 64); _tile_loadd(7, rows + panel, 64);
        _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5);
        if (next) {  // x2 w1
          _tile_loadd(4, lanes + next, 64); _tile_loadd(5, lanes + panel + next, 64);
          _tile_dpbf16ps(0, 6, 4); _tile_dpbf16ps(1, 6, 5); _tile_dpbf16ps(2, 7, 4); _tile_dpbf16ps(3, 7, 5);
        }
      }
      float* c = p.c + kTileBlock * (i * p.ldc + j);
      const int64_t row = p.ldc * static_cast<int64_t>(sizeof(float));
      _tile_stored(0, c, row); _tile_stored(1, c + kTile, row);
      _tile_stored(2, c + kTile * p.ldc, row); _tile_stored(3, c + kTile * p.ldc + kTile, row);
    }
  _tile_release();
}

// byte 8 s + j of a row is bit 8 j + s of its word; lanes hold four of these bytes each
void spread(const uint64_t* const* units, int64_t stride, int64_t words, uint8_t* rows, uint8_t* lanes) {
  for (int64_t w = 0; w < words; ++w, rows += 1024, lanes += 1024) {
    uint32_t half[2][kTile];
    for (int r = 0; r < kTile; ++r) {
      const uint64_t word = units[r][w * stride];
      uint64_t bytes[8];
      for (int s = 0; s < 8; ++s) bytes[s] = (word >> s) & 0x0101010101010101u;
      __builtin_memcpy(rows + 64 * r, bytes, 64);
      half[0][r] = static_cast<uint32_t>(word), half[1][r] = static_cast<uint32_t>(word >> 32);
    }
    for (int q = 0; q < kTile; ++q) {
      uint32_t four[kTile];
      for (int r = 0; r < kTile; ++r) four[r] = (half[q & 1][r] >> (q / 2)) & 0x01010101u;
      __builtin_memcpy(lanes + 64 * q, four, 64);
    }
  }
}

void count(int64_t words, int64_t lane_blocks, const uint8_t* rows, const uint8_t* lanes, int32_t* counts, int64_t ld) {
  _tile_loadconfig(&config);
  const int64_t panel = 1024 * words, row = ld * static_cast<int64_t>(sizeof(int32_t));
  for (int64_t j = 0; j < lane_blocks; ++j, lanes += kBlockTiles * panel, counts += kTileBlock) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t w = 0; w < panel; w += 1024) {
      _tile_loadd(4, lanes + w, 64); _tile_loadd(5, lanes + panel + w, 64);
      _tile_loadd(6, rows + w, 64); _tile_loadd(7, rows + panel + w, 64);
      _tile_dpbuud(0, 6, 4); _tile_dpbuud(1, 6, 5); _tile_dpbuud(2, 7, 4); _tile_dpbuud(3, 7, 5);
    }
    _tile_stored(0, counts, row); _tile_stored(1, counts + kTile, row);
    _tile_stored(2, counts + kTile * ld, row); _tile_stored(3, counts + kTile * ld + kTile, row);
  }
  _tile_release();
}

}  // namespace

const MatrixTiles tiles = {kLeastDepth, split, product, spread, count};

}  // namespace MMC_ISA
}  // namespace mmc
