// Exact co-activation counts: pre-activations by register tiles, signs that are certain packed 64 samples to a word as they leave the
// registers, the few others decided one by one, then and + popcount over the upper triangle. No float mask and no pre-activation is
// ever stored.
#include <algorithm>
#include <cstring>

#include "certificate.h"
#include "split.h"
#include "ways.h"

namespace mmc {
namespace {

// Samples of a chunk. 128 words: a panel of them stays in L1. From this many units on the counts no longer stay in cache, and
// twice the samples pay for reading and writing them.
constexpr int64_t kChunk = 8192, kWideChunk = 16384, kWideUnits = 1536;
constexpr int64_t kBlockFloats = 96 * 1024;  // packed samples of one block: they stay in L2 while the weights pass by

constexpr int64_t kProductFloats = 256 * 1024;  // pre-activations of one block by a product: in L2 until their signs are taken
constexpr int64_t kProductWords = 1024 / kWordBits;

constexpr int kParts = 2;  // of a split product: its signs are as certain as those of float32

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

constexpr int64_t kByteWords = 32;  // words that are spread into bytes at a time: what one thread multiplies stays in its L2
constexpr int64_t kByteColumn = 8;  // blocks of units j that pass by the units i

// the same by matrix tiles, 32 units a block
void count_bytes(const MatrixTiles& tiles, const uint64_t* words, int64_t per_unit, int64_t units, int64_t* counts, int64_t ld,
                 const Pool& pool) {
  const int64_t blocks = ceil_div(units, kTileBlock), columns = ceil_div(blocks, kByteColumn), width = kByteColumn * kTileBlock;
  const int64_t size = std::min(kByteWords, per_unit) * 2 * kTileSize;  // of kTile units
  const Buffer<uint8_t> rows(blocks * kBlockTiles * size), lanes(blocks * kBlockTiles * size);
  const Buffer<uint64_t> nothing(kByteWords * kPanel);
  std::memset(nothing.get(), 0, kByteWords * kPanel * sizeof(uint64_t));
  for (int64_t w = 0; w < per_unit; w += kByteWords) {
    const int64_t count = std::min(kByteWords, per_unit - w);
    parallel_for(pool, blocks * kBlockTiles, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const uint64_t* of[kTile];
        for (int64_t r = 0, unit = t * kTile; r < kTile; ++r, ++unit)
          of[r] = unit < units ? words + panel_offset(unit, per_unit) + w * kPanel : nothing.get();
        tiles.spread(of, kPanel, count, rows.get() + t * size, lanes.get() + t * size);
      }
    });
    // blocks i, each with a column of blocks j that reaches the diagonal
    parallel_for(pool, columns * blocks, 1, [&](int64_t begin, int64_t end) {
      const Buffer<int32_t> found(kTileBlock * width);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t i = t % blocks, j = std::max(i, t / blocks * kByteColumn), last = std::min(blocks, (t / blocks + 1) * kByteColumn);
        if (j >= last) continue;
        tiles.count(count, last - j, rows.get() + i * kBlockTiles * size, lanes.get() + j * kBlockTiles * size, found.get(), width);
        const int64_t first = j * kTileBlock, end_unit = std::min(units, last * kTileBlock);
        for (int64_t r = i * kTileBlock; r < std::min(units, (i + 1) * kTileBlock); ++r)
          for (int64_t l = std::max(r, first); l < end_unit; ++l)
            counts[r * ld + l] += found[(r - i * kTileBlock) * width + l - first];
      }
    });
  }
}

std::atomic<PreactivationProduct> product{nullptr};

// The signs of a block of samples, whose first word begins a word of `words`.
struct Block {
  const KernelTable& table;
  const Certificate& certificate;
  Matrix x;
  int64_t units;
  uint64_t* words;  // of unit u: words + panel_offset(u, per_unit), kPanel apart
  int64_t per_unit;
  float *norms, *row;
  bool bad = false;

  // bits of samples [first, first + 64) of a unit that a product has left open
  void decide(int64_t unit, int64_t first, uint64_t unsure) {
    for (; unsure; unsure &= unsure - 1) {
      const int64_t sample = first + __builtin_ctzll(unsure);
      if (sample >= x.rows) return;
      const int sign = certificate.sign(x.data + sample * x.row_stride, x.col_stride, unit, norms[sample], row);
      bad |= sign == kNotFinite;
      words[panel_offset(unit, per_unit) + sample / kWordBits * kPanel] |= uint64_t{sign == 1} << sample % kWordBits;
    }
  }

  // clears the bits beyond the last sample
  void finish(int64_t unit, int64_t count) {
    if (x.rows % kWordBits == 0) return;
    uint64_t* out = words + panel_offset(unit, per_unit) + x.rows / kWordBits * kPanel;
    for (int64_t r = 0; r < count; ++r) out[r] &= (uint64_t{1} << (x.rows % kWordBits)) - 1;
  }

  void by_tiles(const float* weights, float* panels) {
    const int64_t depth = x.cols, lanes = table.lanes;
    const Panels rows{x.data, x.col_stride, x.row_stride, depth, x.rows, lanes};
    pack_panels(table, rows, panels, serial_pool());
    // whole words: lanes beyond the last sample are zero vectors, and their bits are cleared below
    const int64_t filled = rows.panels(), needed = round_up(x.rows, kWordBits) / lanes;
    std::memset(panels + filled * depth * lanes, 0, (needed - filled) * depth * lanes * sizeof(float));
    for (int64_t p = 0; p < needed; ++p) certificate.norms(panels + p * depth * lanes, norms + p * lanes);
    for (int64_t unit = 0; unit < units; unit += table.rows) {
      // a row tile never straddles two panels of words: kPanel is a multiple of every table's rows
      uint64_t* out = words + panel_offset(unit, per_unit);
      for (int64_t sample = 0; sample < needed * lanes; sample += lanes) {
        const int64_t shift = sample % kWordBits;
        uint32_t unsure[kMaxRows];
        const SignTile tile{depth, panels + sample * depth, weights + unit * depth, norms + sample,
                            certificate.bias() + unit, certificate.scale() + unit, certificate.offset() + unit,
                            reinterpret_cast<unsigned char*>(out + sample / kWordBits * kPanel) + shift / 8, unsure};
        if (!table.sign_tile(tile)) continue;
        for (int64_t r = 0; r < std::min(table.rows, units - unit); ++r) decide(unit + r, sample - shift, uint64_t{unsure[r]} << shift);
      }
      finish(unit, table.rows);
    }
  }

  // the signs of pre-activations z [units, width] without bias
  void take(float* z, int64_t width, const float* scale, const float* offset) {
    uint64_t unsure[kProductWords];
    for (int64_t unit = 0; unit < units; ++unit) {
      std::fill(z + unit * width + x.rows, z + (unit + 1) * width, 0.0f);
      const SignRow signs{width / kWordBits, z + unit * width, norms, certificate.bias()[unit], scale[unit],
                          offset[unit], words + panel_offset(unit, per_unit), kPanel, unsure};
      if (table.sign_row(signs))
        for (int64_t w = 0; w < signs.count; ++w) decide(unit, w * kWordBits, unsure[w]);
      finish(unit, 1);
    }
  }

  void by_split(const SplitLayer& layer, float* memory) {
    const SplitLayer::Signs signs = layer.multiply(x, norms, memory);
    take(signs.z, signs.width, signs.scale, signs.offset);
  }

  bool by_product(const Matrix& weight, float* memory) {
    const int64_t depth = x.cols, lanes = table.lanes, width = round_up(x.rows, kWordBits);
    float *panel = memory, *z = panel + lanes * depth;
    if (!product.load()(weight, x, z, width)) return false;
    for (int64_t p = 0; p < width; p += lanes) {
      table.pack(x.data + p * x.row_stride, x.col_stride, x.row_stride, depth, std::clamp<int64_t>(x.rows - p, 0, lanes), lanes, panel);
      certificate.norms(panel, norms + p);
    }
    take(z, width, certificate.scale(), certificate.offset());
    return true;
  }
};

}  // namespace

void pack_panels(const KernelTable& table, const Panels& p, float* out, const Pool& pool) {
  parallel_for(pool, p.panels(), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, p.depth * p.width)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   table.pack(p.src + i * p.width * p.stride_l, p.stride_k, p.stride_l, p.depth,
                              std::min(p.width, p.count - i * p.width), p.width, out + i * p.depth * p.width);
               });
}

void set_preactivation_product(PreactivationProduct given) { product.store(given); }

bool relu_coactivation_update(const Matrix& x, const Matrix& weight, const float* bias, int64_t* counts, int64_t ld,
                              int64_t chunk, const Pool& pool) {
  const KernelTable& table = kernels(kCoactivation);
  const int64_t samples = x.rows, depth = x.cols, units = weight.rows;
  if (samples == 0 || units == 0) return false;
  chunk = std::min(round_up(chunk > 0 ? chunk : default_chunk(units, pool), kWordBits), round_up(samples, kWordBits));
  const MatrixTiles* tiles = current_tiles();
  const std::unique_ptr<SplitLayer> split(tiles && depth >= tiles->least_depth ? new SplitLayer(*tiles, weight, bias, kParts, pool) : nullptr);
  const bool blas = !split && depth > 0 && product.load() &&
                    ways(Number::float32, pool.threads, false) >> product_class(Order::forward, chunk, units, depth) & 1;

  const Panels weights{weight.data, weight.col_stride, weight.row_stride, depth, units, table.rows};
  Buffer<float> packed(blas || split ? 0 : weights.size());
  if (!blas && !split) pack_panels(table, weights, packed.get(), pool);
  const Certificate certificate(table, weight, bias, weights.panels() * table.rows, pool);

  // panels of one unit more than the last row tile may write
  const int64_t unit_slots = round_up(weights.panels() * table.rows, kPanel);
  Buffer<uint64_t> words(unit_slots * (chunk / kWordBits));
  std::memset(words.get(), 0, unit_slots * (chunk / kWordBits) * sizeof(uint64_t));

  const int64_t wanted = blas || split ? std::clamp<int64_t>(kProductFloats / units, 256, 1024) : kBlockFloats / std::max<int64_t>(1, depth);
  const int64_t block = std::min(chunk, std::max(kWordBits, wanted / kWordBits * kWordBits));
  // panels or pre-activations, norms of the samples, one row
  const int64_t row_size = round_up(depth, 16);
  const int64_t rest_size = split ? split->scratch(block) : blas ? units * block + table.lanes * depth : block * depth;
  const int64_t scratch_size = rest_size + block + row_size;
  Scratch<float> scratch(pool.threads + 1, scratch_size);
  std::atomic<bool> bad{false};

  for (int64_t start = 0; start < samples; start += chunk) {
    const int64_t size = std::min(chunk, samples - start);
    const int64_t per_unit = ceil_div(size, kWordBits);
    scratch.reset();
    // ranges of words, not of blocks: no thread waits for another's last block
    parallel_for(pool, per_unit, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> own;
      float* memory = scratch.take();
      if (!memory) own = Buffer<float>(scratch_size), memory = own.get();
      float *norms = memory, *row = norms + block, *rest = row + row_size;
      bool any = false;
      const int64_t last = std::min(size, end * kWordBits);
      for (int64_t first = begin * kWordBits; first < last; first += block) {
        const Matrix part{x.data + (start + first) * x.row_stride, std::min(block, last - first), depth, x.row_stride, x.col_stride};
        Block signs{table, certificate, part, units, words.get() + first / kWordBits * kPanel, per_unit, norms, row};
        if (split) {
          signs.by_split(*split, rest);
        } else if (!blas || !signs.by_product(weight, rest)) {
          if (blas) {  // refused: rare enough to pack the weights again
            Buffer<float> panels(part.rows * depth + kWordBits * depth), again(weights.size());
            pack_panels(table, weights, again.get(), serial_pool());
            signs.by_tiles(again.get(), panels.get());
          } else {
            signs.by_tiles(packed.get(), rest);
          }
        }
        any |= signs.bad;
      }
      if (any) bad.store(true);
    });
    if (tiles) {
      count_bytes(*tiles, words.get(), per_unit, units, counts, ld, pool);
    } else {
      count_upper(table, words.get(), per_unit, units, counts, ld, pool);
    }
  }
  return bad.load();
}

}  // namespace mmc
