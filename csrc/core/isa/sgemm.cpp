// Register tiles of sgemm in vector extensions, compiled once per instruction set into its namespace (MMC_ISA).
// No header with inline C++ functions may be included here (see kernel_table.h).
#include "../sgemm_tile.h"

namespace mmc {
namespace MMC_ISA {
namespace {

constexpr int kRows = MMC_ROWS;
constexpr int kLanes = MMC_LANES;
constexpr int kVector = kLanes / 2;

typedef float Vector __attribute__((vector_size(kVector * 4), aligned(4)));

__attribute__((always_inline)) inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
__attribute__((always_inline)) inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }

inline float finish(float value, int64_t r, int64_t l, const TileCall& t) {
  value *= t.scale;
  if (t.bias) value += t.bias[l];
  if (t.add) value += t.c[r * t.ldc + l];
  if (t.relu && value < 0) value = 0;  // keeps NaN
  if (t.gate && t.gate[r * t.gate_row + l] <= 0) value = 0;
  return value;
}

template <int kR, int kV, bool kPacked>
void tile(const TileCall& t) {
  constexpr int kWidth = kV * kVector;
  Vector acc[kR][kV];
  if (t.resume && t.lanes < kWidth) {
    float edge[kWidth] = {};
    for (int r = 0; r < kR; ++r) {
      for (int64_t l = 0; l < t.lanes; ++l) edge[l] = t.c[r * t.ldc + l];
      for (int v = 0; v < kV; ++v) acc[r][v] = load(edge + v * kVector);
    }
  } else if (t.resume) {
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] = load(t.c + r * t.ldc + v * kVector);
  } else {
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] = Vector{};
  }
  const float* a = t.a;
  const float* b = t.b;
  const int64_t row = t.a_row;
  for (int64_t k = 0; k < t.depth; ++k) {
    Vector bv[kV];
#pragma GCC unroll 2
    for (int v = 0; v < kV; ++v) bv[v] = load(b + v * kVector);
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const float value = kPacked ? a[r] : a[r * row];
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) acc[r][v] += value * bv[v];
    }
    a += kPacked ? kRows : 1;
    b += kWidth;
  }
  if (t.lanes < kWidth) {
    float edge[kWidth];
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) store(edge + v * kVector, acc[r][v]);
      for (int64_t l = 0; l < t.lanes; ++l) t.c[r * t.ldc + l] = finish(edge[l], r, l, t);
    }
    return;
  }
  if (t.scale != 1.0f)
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] *= t.scale;
  if (t.bias)
    for (int v = 0; v < kV; ++v) {
      const Vector bias = load(t.bias + v * kVector);
      for (int r = 0; r < kR; ++r) acc[r][v] += bias;
    }
  if (t.add)
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] += load(t.c + r * t.ldc + v * kVector);
  const Vector zero{};
  if (t.relu)
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) acc[r][v] = acc[r][v] < zero ? zero : acc[r][v];
  if (t.gate)
    for (int r = 0; r < kR; ++r)
      for (int v = 0; v < kV; ++v) {
        const Vector gate = load(t.gate + r * t.gate_row + v * kVector);
        acc[r][v] = gate <= zero ? zero : acc[r][v];
      }
  for (int r = 0; r < kR; ++r)
    for (int v = 0; v < kV; ++v) store(t.c + r * t.ldc + v * kVector, acc[r][v]);
}

using Tile = void (*)(const TileCall&);

#define MMC_TILES(r) {{tile<r, 1, false>, tile<r, 1, true>}, {tile<r, 2, false>, tile<r, 2, true>}}
const Tile kTiles[][2][2] = {
    MMC_TILES(1), MMC_TILES(2), MMC_TILES(3), MMC_TILES(4),
#if MMC_ROWS > 4
    MMC_TILES(5), MMC_TILES(6),
#endif
#if MMC_ROWS > 6
    MMC_TILES(7), MMC_TILES(8), MMC_TILES(9), MMC_TILES(10), MMC_TILES(11), MMC_TILES(12),
#endif
};
static_assert(sizeof(kTiles) / sizeof(kTiles[0]) == kRows, "a tile for every number of rows");

}  // namespace

void sgemm_tile(const TileCall& t) { kTiles[t.rows - 1][t.width == kLanes][t.a_col != 1](t); }

// dst[k * kRows + r] = src[k * stride + r] for r < count, 0 up to kRows; sums[r] += the column's sum over depth
void pack_rows(const float* src, int64_t stride, int64_t depth, int64_t count, float* dst, float* sums) {
  constexpr int kPart = kRows % 4 == 0 ? 4 : 2;
  typedef float Part __attribute__((vector_size(kPart * 4), aligned(4)));
  float total[kRows] = {};
  if (count == kRows) {
    Part sum[kRows / kPart] = {};
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 3
      for (int p = 0; p < kRows / kPart; ++p) {
        const Part value = *reinterpret_cast<const Part*>(src + k * stride + p * kPart);
        *reinterpret_cast<Part*>(dst + k * kRows + p * kPart) = value;
        sum[p] += value;
      }
    __builtin_memcpy(total, sum, sizeof(total));
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int r = 0; r < kRows; ++r) {
        const float value = r < count ? src[k * stride + r] : 0.0f;
        dst[k * kRows + r] = value;
        total[r] += value;
      }
  }
  if (sums)
    for (int64_t r = 0; r < count; ++r) sums[r] += total[r];
}

// c[r][l] (+)= sum_k a[r * a_row + k * a_col] * b[k * b_row + l]: few rows or few k, b read once and in its order.
// The chain of an element is that of the tile.
void sgemm_thin(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                float* c, int64_t ldc) {
  constexpr int kStep = 4;
  const int64_t whole = n / kVector * kVector;
  for (int64_t k0 = 0; k0 < k; k0 += kStep) {
    const int64_t steps = k - k0 < kStep ? k - k0 : kStep;
    const float* row[kStep];
    for (int s = 0; s < kStep; ++s) row[s] = b + (k0 + (s < steps ? s : 0)) * b_row;
    for (int64_t r = 0; r < m; ++r) {
      float value[kStep];
      for (int s = 0; s < kStep; ++s) value[s] = s < steps ? a[r * a_row + (k0 + s) * a_col] : 0.0f;
      float* out = c + r * ldc;
      if (steps == kStep) {
        for (int64_t l = 0; l < whole; l += kVector) {
          Vector acc = k0 ? load(out + l) : Vector{};
#pragma GCC unroll 4
          for (int s = 0; s < kStep; ++s) acc += value[s] * load(row[s] + l);
          store(out + l, acc);
        }
      } else {
        for (int64_t l = 0; l < whole; l += kVector) {
          Vector acc = k0 ? load(out + l) : Vector{};
          for (int64_t s = 0; s < steps; ++s) acc += value[s] * load(row[s] + l);
          store(out + l, acc);
        }
      }
      for (int64_t l = whole; l < n; ++l) {
        float acc = k0 ? out[l] : 0.0f;
        for (int64_t s = 0; s < steps; ++s) acc = acc + value[s] * row[s][l];
        out[l] = acc;
      }
    }
  }
}

// The epilogue, but for `add`, on a product that lies in c.
void sgemm_finish(int64_t m, int64_t n, const TileCall& t) {
  for (int64_t r = 0; r < m; ++r) {
    float* c = t.c + r * t.ldc;
    const float* gate = t.gate ? t.gate + r * t.gate_row : nullptr;
    if (t.scale != 1.0f)
      for (int64_t l = 0; l < n; ++l) c[l] *= t.scale;
    if (t.bias)
      for (int64_t l = 0; l < n; ++l) c[l] += t.bias[l];
    if (t.relu)
      for (int64_t l = 0; l < n; ++l) c[l] = c[l] < 0 ? 0 : c[l];
    if (gate)
      for (int64_t l = 0; l < n; ++l) c[l] = gate[l] <= 0 ? 0 : c[l];
  }
}

// sums[l] += sum_r a[r * row + l], in registers over all rows of the call
void add_rows(int64_t rows, int64_t n, const float* a, int64_t row, float* sums) {
  constexpr int kStrip = 4;
  int64_t l = 0;
  for (; l + kStrip * kVector <= n; l += kStrip * kVector) {
    Vector total[kStrip] = {};
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kStrip; ++v) total[v] += load(a + r * row + l + v * kVector);
    for (int v = 0; v < kStrip; ++v) store(sums + l + v * kVector, load(sums + l + v * kVector) + total[v]);
  }
  for (; l < n; ++l) {
    float total = 0;
    for (int64_t r = 0; r < rows; ++r) total += a[r * row + l];
    sums[l] += total;
  }
}

}  // namespace MMC_ISA
}  // namespace mmc
