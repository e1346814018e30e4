// Gram matrices of activation derivatives or of given rows, and the final product of the AGOP: float32 register tiles over
// the upper triangle, float64 accumulators.
#include <algorithm>
#include <cstring>

#include "internal.h"

namespace mmc {
namespace {

constexpr int64_t kChunk = 1024;           // samples whose derivatives live at a time
constexpr int64_t kDepthBlock = 512;       // a lanes panel of that depth stays in L2, a rows panel in L1
constexpr int64_t kBlockFloats = 64 * 1024;  // packed samples of one block

// The derivatives of one chunk in both panel forms: lanes[jp][sample][lanes] and rows[it][sample][rows].
struct GramOperand {
  const KernelTable& table;
  int64_t units, capacity;  // capacity: samples, a multiple of table.rows
  Buffer<float> lanes, rows;

  GramOperand(const KernelTable& t, int64_t h, int64_t samples)
      : table(t),
        units(h),
        capacity(samples),
        lanes(lane_panels() * samples * t.lanes),
        rows(row_panels() * samples * t.rows) {}
  int64_t lane_panels() const { return ceil_div(units, table.lanes); }
  int64_t row_panels() const { return ceil_div(units, table.rows); }
  float* lanes_at(int64_t panel, int64_t sample) const { return lanes.get() + (panel * capacity + sample) * table.lanes; }
  float* rows_at(int64_t panel, int64_t sample) const { return rows.get() + (panel * capacity + sample) * table.rows; }

  // rows panels of samples [begin, end) from the lanes panels
  void fill_rows(int64_t begin, int64_t end) const {
    for (int64_t it = 0; it < row_panels(); ++it)
      for (int64_t r = 0; r < table.rows;) {
        const int64_t unit = it * table.rows + r, lane = unit % table.lanes;
        const int64_t count = std::min(table.rows - r, table.lanes - lane);
        float* dst = rows_at(it, begin) + r;
        if (unit / table.lanes >= lane_panels()) {
          for (int64_t n = 0; n < end - begin; ++n) std::memset(dst + n * table.rows, 0, count * sizeof(float));
        } else {
          const float* src = lanes_at(unit / table.lanes, begin) + lane;
          if (count == table.rows) {
            table.pack(src, table.lanes, 1, end - begin, count, count, dst);
          } else {
            for (int64_t n = 0; n < end - begin; ++n)
              for (int64_t l = 0; l < count; ++l) dst[n * table.rows + l] = src[n * table.lanes + l];
          }
        }
        r += count;
      }
  }
};

// gram += upper triangle of operand^T operand over `samples`; total += column sums
void add_gram(const GramOperand& op, int64_t samples, double* gram, int64_t ld, double* total, const Pool& pool) {
  const KernelTable& table = op.table;
  const int64_t units = op.units, L = table.lanes, R = table.rows;
  std::vector<int64_t> first_pair(op.lane_panels() + 1, 0);  // pairs of the panels before: tiles that touch j >= i
  for (int64_t jp = 0; jp < op.lane_panels(); ++jp)
    first_pair[jp + 1] = first_pair[jp] + ceil_div(std::min((jp + 1) * L, units), R);
  parallel_for(pool, first_pair.back(), 4, [&](int64_t begin, int64_t end) {
    double edge[kMaxRows * kMaxLanes];
    int64_t jp = std::upper_bound(first_pair.begin(), first_pair.end(), begin) - first_pair.begin() - 1;
    for (int64_t t = begin; t < end; ++t) {
      while (t >= first_pair[jp + 1]) ++jp;
      const int64_t it = t - first_pair[jp], i0 = it * R, j0 = jp * L;
      if (total && it == 0) {
        double sums[kMaxLanes] = {};
        table.column_sums(op.lanes_at(jp, 0), samples, sums);
        for (int64_t l = 0; l < std::min(L, units - j0); ++l) total[j0 + l] += sums[l];
      }
      if (i0 + R <= j0 && j0 + L <= units) {
        table.gram_tile(samples, op.lanes_at(jp, 0), op.rows_at(it, 0), gram + i0 * ld + j0, ld);
        continue;
      }
      std::fill_n(edge, R * L, 0.0);
      table.gram_tile(samples, op.lanes_at(jp, 0), op.rows_at(it, 0), edge, L);
      for (int64_t r = 0; r < std::min(R, units - i0); ++r)
        for (int64_t l = std::max<int64_t>(0, i0 + r - j0); l < std::min(L, units - j0); ++l)
          gram[(i0 + r) * ld + j0 + l] += edge[r * L + l];
    }
  });
}

int64_t chunk_samples(int64_t requested, int64_t samples, const KernelTable& table) {
  return round_up(std::min(requested > 0 ? requested : kChunk, samples), table.rows);
}

}  // namespace

bool derivative_gram_update(const Matrix& x, const Matrix& weight, const float* bias, Activation activation, float alpha,
                            float beta, double* gram, int64_t ld, double* total, int64_t chunk, const Pool& pool) {
  const KernelTable& table = kernels(kDerivativeGram);
  const int64_t samples = x.rows, depth = x.cols, units = weight.rows, L = table.lanes, R = table.rows;
  if (samples == 0 || units == 0) return false;
  GramOperand op(table, units, chunk_samples(chunk, samples, table));

  const Panels weights{weight.data, weight.col_stride, weight.row_stride, depth, units, L};
  Buffer<float> packed(weights.size());
  pack_panels(table, weights, packed.get(), pool);
  Buffer<float> padded_bias(op.lane_panels() * L);
  std::fill_n(padded_bias.get(), op.lane_panels() * L, 0.0f);
  if (bias) std::copy_n(bias, units, padded_bias.get());

  const int64_t fair = round_up(ceil_div(op.capacity, pool.threads), R);
  const int64_t block = std::min(fair, std::max<int64_t>(R, kBlockFloats / std::max<int64_t>(1, depth) / R * R));
  Scratch<float> scratch(pool.threads + 1, block * depth);
  std::atomic<bool> bad{false};

  for (int64_t start = 0; start < samples; start += op.capacity) {
    const int64_t size = std::min(op.capacity, samples - start);
    scratch.reset();
    parallel_for(pool, ceil_div(size, block), 1, [&](int64_t begin, int64_t end) {
      Buffer<float> own;
      float* panels = scratch.take();
      if (!panels) own = Buffer<float>(block * depth), panels = own.get();
      bool any = false;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = b * block, count = std::min(block, size - first);
        const Panels rows{x.data + (start + first) * x.row_stride, x.col_stride, x.row_stride, depth, count, R};
        pack_panels(table, rows, panels, serial_pool());
        for (int64_t jp = 0; jp < op.lane_panels(); ++jp) {
          float* z = op.lanes_at(jp, first);
          for (int64_t n = 0; n < rows.panels() * R; ++n)
            std::memcpy(z + n * L, padded_bias.get() + jp * L, L * sizeof(float));
          for (int64_t p = 0; p < rows.panels(); ++p)
            table.gemm_tile(depth, packed.get() + jp * depth * L, panels + p * depth * R, z + p * R * L, L);
          any |= table.derivative(activation, alpha, beta, z, count * L);
        }
        op.fill_rows(first, first + count);
      }
      if (any) bad.store(true);
    });
    add_gram(op, size, gram, ld, total, pool);
  }
  return bad.load();
}

void syrk_update(const Matrix& rows, double* gram, int64_t ld, int64_t chunk, const Pool& pool) {
  const KernelTable& table = kernels(kSyrk);
  const int64_t samples = rows.rows, units = rows.cols;
  if (samples == 0 || units == 0) return;
  GramOperand op(table, units, chunk_samples(chunk, samples, table));
  for (int64_t start = 0; start < samples; start += op.capacity) {
    const int64_t size = std::min(op.capacity, samples - start);
    const float* src = rows.data + start * rows.row_stride;
    parallel_for(pool, op.lane_panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        table.pack(src + p * table.lanes * rows.col_stride, rows.row_stride, rows.col_stride, size,
                   std::min(table.lanes, units - p * table.lanes), table.lanes, op.lanes_at(p, 0));
    });
    parallel_for(pool, ceil_div(size, 64), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) op.fill_rows(b * 64, std::min(size, b * 64 + 64));
    });
    add_gram(op, size, gram, ld, nullptr, pool);
  }
}

// With U the upper triangle of S and half its diagonal, S = U + U^T, so W^T S W = M + M^T with M = W^T (U W): the triangular
// product costs h^2 d instead of 2 h^2 d multiply-adds, and the sum with the transpose is exactly symmetric.
void agop_finalise(const Matrix& weight, const Matrix* outer, const int64_t* inner_counts, const double* inner_gram, int64_t ld,
                   float* out, const Pool& pool) {
  const KernelTable& table = kernels(kFinalise);
  const int64_t h = weight.rows, d = weight.cols, L = table.lanes, R = table.rows;
  std::fill_n(out, d * d, 0.0f);
  if (h == 0 || d == 0) return;
  const int64_t row_tiles = ceil_div(h, R), lane_tiles = ceil_div(h, L), d_lanes = ceil_div(d, L), d_rows = ceil_div(d, R);

  // U as rows panels [it][k][R], zero below the diagonal
  Buffer<float> upper(row_tiles * h * R);
  Buffer<float> outer_lanes, outer_rows;
  if (outer) {
    const Panels lanes{outer->data, outer->row_stride, outer->col_stride, outer->rows, h, L};
    const Panels rows{outer->data, outer->row_stride, outer->col_stride, outer->rows, h, R};
    outer_lanes = Buffer<float>(lanes.size());
    outer_rows = Buffer<float>(rows.size());
    pack_panels(table, lanes, outer_lanes.get(), pool);
    pack_panels(table, rows, outer_rows.get(), pool);
  }
  parallel_for(pool, ceil_div(row_tiles, 2), 1, [&](int64_t begin, int64_t end) {
    float product[kMaxRows * kMaxLanes];
    std::fill_n(product, kMaxRows * kMaxLanes, 1.0f);
    // tiles from both ends, so that every range holds as much of the triangle as any other
    for (int64_t t = 2 * begin; t < std::min(2 * end, row_tiles); ++t) {
      const int64_t it = t % 2 ? row_tiles - 1 - t / 2 : t / 2, i0 = it * R;
      float* dst = upper.get() + it * h * R;
      std::fill_n(dst, std::min(h, i0 + R) * R, 0.0f);
      for (int64_t jp = i0 / L; jp < lane_tiles; ++jp) {
        const int64_t j0 = jp * L;
        if (outer) {
          std::fill_n(product, R * L, 0.0f);
          table.gemm_tile(outer->rows, outer_lanes.get() + jp * outer->rows * L, outer_rows.get() + it * outer->rows * R,
                          product, L);
        }
        for (int64_t l = std::max<int64_t>(0, i0 - j0); l < std::min(L, h - j0); ++l)
          for (int64_t r = 0; r < R; ++r) {
            const int64_t i = i0 + r, j = j0 + l;
            if (i >= h || i > j) {
              dst[j * R + r] = 0.0f;
              continue;
            }
            const double inner = inner_counts ? static_cast<double>(inner_counts[i * ld + j]) : inner_gram[i * ld + j];
            dst[j * R + r] = static_cast<float>(product[r * L + l] * inner * (i == j ? 0.5 : 1.0));
          }
      }
    }
  });

  // T = U W as lanes panels [dp][i][L]
  Buffer<float> weight_lanes(d_lanes * h * L), product(d_lanes * row_tiles * R * L);
  const Panels by_lanes{weight.data, weight.row_stride, weight.col_stride, h, d, L};
  pack_panels(table, by_lanes, weight_lanes.get(), pool);
  std::fill_n(product.get(), d_lanes * row_tiles * R * L, 0.0f);
  parallel_for(pool, d_lanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t dp = begin; dp < end; ++dp)
      for (int64_t k0 = 0; k0 < h; k0 += kDepthBlock)
        for (int64_t it = 0; it * R < std::min(h, k0 + kDepthBlock); ++it) {
          const int64_t k = std::max(k0, it * R), depth = std::min(h, k0 + kDepthBlock) - k;
          table.gemm_tile(depth, weight_lanes.get() + (dp * h + k) * L, upper.get() + (it * h + k) * R,
                          product.get() + (dp * row_tiles + it) * R * L, L);
        }
  });

  // M = W^T T, then M + M^T
  Buffer<float> weight_rows(d_rows * h * R);
  const Panels by_rows{weight.data, weight.row_stride, weight.col_stride, h, d, R};
  pack_panels(table, by_rows, weight_rows.get(), pool);
  parallel_for(pool, d_lanes, 1, [&](int64_t begin, int64_t end) {
    float edge[kMaxRows * kMaxLanes];
    for (int64_t dp = begin; dp < end; ++dp)
      for (int64_t k0 = 0; k0 < h; k0 += kDepthBlock)
        for (int64_t it = 0; it < d_rows; ++it) {
          const int64_t depth = std::min(kDepthBlock, h - k0), a0 = it * R, b0 = dp * L;
          const float* lanes = product.get() + (dp * row_tiles * R + k0) * L;
          const float* rows = weight_rows.get() + (it * h + k0) * R;
          if (a0 + R <= d && b0 + L <= d) {
            table.gemm_tile(depth, lanes, rows, out + a0 * d + b0, d);
            continue;
          }
          std::fill_n(edge, R * L, 0.0f);
          table.gemm_tile(depth, lanes, rows, edge, L);
          for (int64_t r = 0; r < std::min(R, d - a0); ++r)
            for (int64_t l = 0; l < std::min(L, d - b0); ++l) out[(a0 + r) * d + b0 + l] += edge[r * L + l];
        }
  });
  constexpr int64_t kTile = 32;  // both a tile and its mirror image stay in L1
  const int64_t tiles = ceil_div(d, kTile);
  // tile rows from both ends, as above
  parallel_for(pool, ceil_div(tiles, 2), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = 2 * begin; t < std::min(2 * end, tiles); ++t) {
      const int64_t a0 = (t % 2 ? tiles - 1 - t / 2 : t / 2) * kTile;
      for (int64_t b0 = a0; b0 < d; b0 += kTile)
        for (int64_t a = a0; a < std::min(d, a0 + kTile); ++a)
          for (int64_t b = std::max(a, b0); b < std::min(d, b0 + kTile); ++b) {
            const float sum = out[a * d + b] + out[b * d + a];
            out[a * d + b] = sum;
            out[b * d + a] = sum;
          }
    }
  });
}

}  // namespace mmc
