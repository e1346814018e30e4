// Exact co-activation counts: pre-activations by register tiles, signs that are certain packed 64 samples to a word as they leave the
// registers, the few others decided one by one, then and + popcount over the upper triangle. No float mask and no pre-activation is
// ever stored.
#include <algorithm>
#include <cstring>

#include "certificate.h"

namespace mmc {
namespace {

// Samples of a chunk. 128 words: a panel of them stays in L1. From this many units on the counts no longer stay in cache, and
// twice the samples pay for reading and writing them.
constexpr int64_t kChunk = 8192, kWideChunk = 16384, kWideUnits = 1536;
constexpr int64_t kBlockFloats = 96 * 1024;  // packed samples of one block: they stay in L2 while the weights pass by

static_assert(kPanel % kCountRows == 0, "tiles cover a panel");

constexpr int64_t kColumn = 8;  // panels j of a column of tiles: they stay in L2 while the panels i pass by once

// More threads, longer chunks: every chunk ends in two barriers.
int64_t default_chunk(int64_t units, const Pool& pool) {
  return (units < kWideUnits ? kChunk : kWideChunk) * std::min(pool.threads, 4);
}

// Pair t of panels i <= j, in columns of kColumn panels j, row by row: (0, 0) .. (0, 7), (1, 1) .. (1, 7), .. (7, 7), (0, 8) ..
struct Pair {
  int64_t panels, first = 0, i = 0, j;  // first: of the column

  Pair(int64_t all, int64_t t) : panels(all) {
    for (int64_t size; t >= (size = end() * (end() + 1) / 2 - first * (first + 1) / 2); t -= size) first = end();
    for (; t >= end() - std::max(i, first); ++i) t -= end() - std::max(i, first);
    j = std::max(i, first) + t;
  }
  int64_t end() const { return std::min(first + kColumn, panels); }
  void next() {
    if (++j < end()) return;
    if (++i == end()) first = end(), i = 0;
    j = std::max(i, first);
  }
};

int64_t panel_offset(int64_t unit, int64_t words) { return (unit / kPanel) * words * kPanel + unit % kPanel; }

// counts += upper triangle, words laid out [panel][word][kPanel]
void count_upper(const KernelTable& table, const uint64_t* words, int64_t per_unit, int64_t units, int64_t* counts, int64_t ld,
                 const Pool& pool) {
  const int64_t panels = ceil_div(units, kPanel);
  const int64_t pairs = panels * (panels + 1) / 2;
  parallel_for(pool, pairs, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, per_unit)), [&](int64_t begin, int64_t end) {
    Pair pair(panels, begin);
    int64_t edge[kCountRows * kPanel];
    for (int64_t t = begin; t < end; ++t, pair.next()) {
      const int64_t i0 = pair.i * kPanel, j0 = pair.j * kPanel;
      const uint64_t* ip = words + pair.i * per_unit * kPanel;
      const uint64_t* jp = words + pair.j * per_unit * kPanel;
      const int64_t cols = std::min(kPanel, units - j0);
      for (int64_t r0 = 0; r0 < kPanel && i0 + r0 < units; r0 += kCountRows) {
        if (pair.i != pair.j && cols == kPanel) {
          table.count_tile(per_unit, ip + r0, jp, counts + (i0 + r0) * ld + j0, ld);
          continue;
        }
        std::memset(edge, 0, sizeof(edge));
        table.count_tile(per_unit, ip + r0, jp, edge, kPanel);
        const int64_t rows = std::min(kCountRows, units - i0 - r0);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t l = pair.i == pair.j ? r0 + r : 0; l < cols; ++l)
            counts[(i0 + r0 + r) * ld + j0 + l] += edge[r * kPanel + l];
      }
    }
  });
}

}  // namespace

void pack_panels(const KernelTable& table, const Panels& p, float* out, const Pool& pool) {
  parallel_for(pool, p.panels(), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.depth * p.width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   table.pack(p.src + i * p.width * p.stride_l, p.stride_k, p.stride_l, p.depth,
                              std::min(p.width, p.count - i * p.width), p.width, out + i * p.depth * p.width);
               });
}

bool relu_coactivation_update(const Matrix& x, const Matrix& weight, const float* bias, int64_t* counts, int64_t ld,
                              int64_t chunk, const Pool& pool) {
  const KernelTable& table = kernels(kCoactivation);
  const int64_t samples = x.rows, depth = x.cols, units = weight.rows;
  if (samples == 0 || units == 0) return false;
  chunk = std::min(round_up(chunk > 0 ? chunk : default_chunk(units, pool), kWordBits), round_up(samples, kWordBits));

  const Panels weights{weight.data, weight.col_stride, weight.row_stride, depth, units, table.rows};
  Buffer<float> packed(weights.size());
  pack_panels(table, weights, packed.get(), pool);
  const int64_t tiles = weights.panels();
  const Certificate certificate(table, weight, bias, tiles * table.rows, pool);

  // panels of one unit more than the last row tile may write
  const int64_t unit_slots = round_up(tiles * table.rows, kPanel);
  Buffer<uint64_t> words(unit_slots * (chunk / kWordBits));
  std::memset(words.get(), 0, unit_slots * (chunk / kWordBits) * sizeof(uint64_t));

  const int64_t block = std::min(chunk, std::max(kWordBits, kBlockFloats / std::max<int64_t>(1, depth) / kWordBits * kWordBits));
  const int64_t scratch_size = (block + 1) * (depth + 1);  // panels, norms of their columns, one row
  Scratch<float> scratch(pool.threads + 1, scratch_size);
  std::atomic<bool> bad{false};

  for (int64_t start = 0; start < samples; start += chunk) {
    const int64_t size = std::min(chunk, samples - start);
    const int64_t per_unit = ceil_div(size, kWordBits);
    scratch.reset();
    // ranges of words, not of blocks: no thread waits for another's last block
    parallel_for(pool, per_unit, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> own;
      float* panels = scratch.take();
      if (!panels) own = Buffer<float>(scratch_size), panels = own.get();
      float *norms = panels + block * depth, *row = norms + block;
      bool any = false;
      const int64_t last = std::min(size, end * kWordBits);
      for (int64_t first = begin * kWordBits; first < last; first += block) {
        const int64_t count = std::min(block, last - first);
        const Panels rows{x.data + (start + first) * x.row_stride, x.col_stride, x.row_stride, depth, count, table.lanes};
        pack_panels(table, rows, panels, serial_pool());
        // whole words: lanes beyond the last sample are zero vectors, and their bits are cleared below
        const int64_t filled = rows.panels(), needed = round_up(count, kWordBits) / table.lanes;
        std::memset(panels + filled * depth * table.lanes, 0, (needed - filled) * depth * table.lanes * sizeof(float));
        for (int64_t p = 0; p < needed; ++p) certificate.norms(panels + p * depth * table.lanes, norms + p * table.lanes);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t unit = tile * table.rows;
          // a row tile never straddles two panels of words: kPanel is a multiple of every table's rows
          uint64_t* out = words.get() + panel_offset(unit, per_unit);
          for (int64_t p = 0; p < needed; ++p) {
            const int64_t lane0 = p * table.lanes, sample = first + lane0;
            uint32_t unsure[kMaxRows];
            const SignTile tile{depth, panels + lane0 * depth, packed.get() + unit * depth, norms + lane0,
                                certificate.bias() + unit, certificate.scale() + unit, certificate.offset() + unit,
                                reinterpret_cast<unsigned char*>(out + (sample / kWordBits) * kPanel) + (sample % kWordBits) / 8,
                                unsure};
            if (!table.sign_tile(tile)) continue;
            const int64_t lanes = std::min(table.lanes, count - lane0), rows_left = std::min(table.rows, units - unit);
            for (int64_t r = 0; r < rows_left; ++r)
              for (int64_t l = 0; l < lanes && unsure[r] >> l; ++l) {
                if (!(unsure[r] >> l & 1)) continue;
                const int sign = certificate.sign(x.data + (start + sample + l) * x.row_stride, x.col_stride, unit + r,
                                                  tile.norm[l], row);
                any |= sign == kNotFinite;
                out[sample / kWordBits * kPanel + r] |= uint64_t{sign == 1} << ((sample + l) % kWordBits);
              }
          }
          if (count % kWordBits)
            for (int64_t r = 0; r < table.rows; ++r)
              out[((first + count) / kWordBits) * kPanel + r] &= (uint64_t{1} << (count % kWordBits)) - 1;
        }
      }
      if (any) bad.store(true);
    });
    count_upper(table, words.get(), per_unit, units, counts, ld, pool);
  }
  return bad.load();
}

}  // namespace mmc
