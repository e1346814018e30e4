// sgemm: panels of b packed by the thread that uses them, rows of a read in place (or packed where they run along k).
#include "sgemm.h"

#include <algorithm>

#include "internal.h"
#include "sgemm_tile.h"

namespace mmc {
namespace {

constexpr int64_t kChain = 1024;           // longest float32 chain, and depth of a packed panel
constexpr int64_t kBlockFloats = 128 * 1024;  // of a that stay in L2 while the panels of b pass by
constexpr int64_t kSlabFloats = 256 * 1024;   // of packed b that all blocks of rows share
constexpr int64_t kThin = 4;               // so few rows, or so short sums, do not pay for packing
constexpr int64_t kThinDepth = 128;        // a panel of that depth stays in L1 between packing and use
constexpr double kParallelFlops = 2e6;     // below that a second thread costs more than it brings

struct Unit {
  void (*tile)(const TileCall&);
  void (*pack_rows)(const float*, int64_t, int64_t, int64_t, float*, float*);
  void (*thin)(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t);
  void (*finish)(int64_t, int64_t, const TileCall&);
  void (*add_rows)(int64_t, int64_t, const float*, int64_t, float*);
};

Unit unit_of(const KernelTable& table) {
#ifdef MMC_X86
  if (table.lanes == 32) return {avx512::sgemm_tile, avx512::pack_rows, avx512::sgemm_thin, avx512::sgemm_finish, avx512::add_rows};
  if (table.lanes == 16) return {avx2::sgemm_tile, avx2::pack_rows, avx2::sgemm_thin, avx2::sgemm_finish, avx2::add_rows};
#endif
  return {base::sgemm_tile, base::pack_rows, base::sgemm_thin, base::sgemm_finish, base::add_rows};
}

// Buffers of this thread, kept between calls: an allocation per product would cost more than a small product.
struct Kept {
  Buffer<float> buffer;
  int64_t capacity = 0;
  float* get(int64_t size) {
    if (size > capacity) buffer = Buffer<float>(size), capacity = size;
    return buffer.get();
  }
};

float* panel_buffer(int64_t size) {
  thread_local Kept kept;
  return kept.get(size);
}

constexpr int64_t kKeptFloats = 512 * 1024;  // larger packed rows are allocated and given back

float* rows_buffer(int64_t size) {
  thread_local Kept kept;
  return kept.get(size);
}

float* slab_buffer(int64_t size) {
  thread_local Kept kept;
  return kept.get(size);
}

struct Product {
  const KernelTable& table;
  Unit unit;
  int64_t m, n, depth;
  Strided a, b;          // at the block's first k
  const float* packed_a;  // rows panels [tile][depth][rows], or null: a is read in place
  const float* packed_b;  // lanes panels of full width from `panel_begin` on, or null: packed by run
  int64_t panel_begin;
  float* c;
  int64_t ldc;
  Epilogue epilogue;

  // of the panel from column j on: half as wide where that is enough
  int64_t width_of(int64_t j) const { return n - j <= table.lanes / 2 ? table.lanes / 2 : table.lanes; }

  // panels [begin, end) of b, packed for all rows
  void pack_panels(int64_t begin, int64_t end, float* out) const {
    const int64_t L = table.lanes;
    for (int64_t p = begin; p < end; ++p)
      table.pack(b.data + p * L * b.col, b.row, b.col, depth, std::min(L, n - p * L), width_of(p * L),
                 out + (p - panel_begin) * L * depth);
  }

  // columns [j, j + lanes) for rows [begin, end)
  void run(int64_t panel, int64_t begin, int64_t end) const {
    const int64_t L = table.lanes, R = table.rows, j = panel * L, lanes = std::min(L, n - j);
    const int64_t width = width_of(j);
    const bool thin = !packed_b && end - begin <= kThin && b.row == 1 && !epilogue.add && depth > kThinDepth;
    const int64_t step = thin ? kThinDepth : depth;
    float* packed = packed_b ? nullptr : panel_buffer(step * width);
    TileCall t{};
    t.b = packed_b ? packed_b + (panel - panel_begin) * L * depth : packed;
    t.ldc = ldc;
    t.lanes = lanes;
    t.width = width;
    t.a_row = packed_a ? 1 : a.row;
    t.a_col = packed_a ? R : 1;
    t.scale = 1.0f;
    for (int64_t k = 0; k == 0 || k < depth; k += step) {
      t.depth = std::min(step, depth - k);
      t.resume = k > 0;
      if (k + step >= depth) set_epilogue(t, j);
      if (packed) table.pack(b.data + k * b.row + j * b.col, b.row, b.col, t.depth, lanes, width, packed);
      for (int64_t i = begin; i < end; i += R) {
        t.rows = std::min(R, end - i);
        t.a = packed_a ? packed_a + i * depth + k * R : a.data + i * a.row + k;
        t.c = c + i * ldc + j;
        t.gate = t.gate_row ? epilogue.gate + i * epilogue.gate_row + j : nullptr;
        unit.tile(t);
      }
    }
  }

  // rows [begin, end) and columns [j, j + lanes) with b read in place
  void run_thin(int64_t begin, int64_t end, int64_t j, int64_t lanes) const {
    const bool plain = !epilogue.bias && !epilogue.gate && !epilogue.relu && !epilogue.add && epilogue.scale == 1.0f;
    float* out = c + begin * ldc + j;
    float* product = epilogue.add ? panel_buffer((end - begin) * lanes) : out;
    const int64_t product_row = epilogue.add ? lanes : ldc;
    const float* first = a.data + begin * a.row;
    if (depth == 0) {
      for (int64_t r = 0; r < end - begin; ++r) std::fill_n(product + r * product_row, lanes, 0.0f);
    }
    unit.thin(end - begin, lanes, depth, first, a.row, a.col, b.data + j, b.row, product, product_row);
    if (plain) return;
    for (int64_t r = 0; epilogue.add && r < end - begin; ++r)
      for (int64_t l = 0; l < lanes; ++l) out[r * ldc + l] += epilogue.scale * product[r * lanes + l];
    TileCall t{};
    t.c = out;
    t.ldc = ldc;
    set_epilogue(t, j);
    if (epilogue.add) t.scale = 1.0f;
    t.gate = t.gate_row ? epilogue.gate + begin * epilogue.gate_row + j : nullptr;
    unit.finish(end - begin, lanes, t);
  }

 private:
  void set_epilogue(TileCall& t, int64_t j) const {
    t.bias = epilogue.bias ? epilogue.bias + j : nullptr;
    t.gate_row = epilogue.gate ? epilogue.gate_row : 0;
    t.scale = epilogue.scale;
    t.relu = epilogue.relu;
    t.add = epilogue.add;
  }
};

// few rows: columns in blocks that stay in L1 beside them; short sums: rows as they are
void thin_product(int64_t m, int64_t n, int64_t k, const Strided& a, const Strided& b, float* c, int64_t ldc,
                  const Epilogue& epilogue, float* row_sums, const Pool& pool) {
  const KernelTable& table = current_kernels();
  const Product p{table, unit_of(table), m, n, k, a, b, nullptr, nullptr, 0, c, ldc, epilogue};
  const Pool used = 2.0 * m * n * std::max<int64_t>(1, k) < kParallelFlops / 4 ? serial_pool() : pool;
  const int64_t rows = m <= kThin ? m : round_up(ceil_div(m, used.threads), 4);
  const int64_t columns = m <= kThin ? round_up(std::max<int64_t>(256, ceil_div(n, used.threads)), 64) : n;
  const int64_t row_blocks = ceil_div(m, rows), column_blocks = ceil_div(n, columns);
  parallel_for(used, row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t / column_blocks * rows, j = t % column_blocks * columns;
      p.run_thin(i, std::min(m, i + rows), j, std::min(columns, n - j));
    }
  });
  for (int64_t i = 0; row_sums && i < m; ++i)
    for (int64_t l = 0; l < k; ++l) row_sums[i] += a.data[i * a.row + l * a.col];
}

}  // namespace

void finish_product(int64_t rows, int64_t n, float* c, int64_t ldc, const Epilogue& epilogue) {
  TileCall t{};
  t.c = c, t.ldc = ldc;
  t.bias = epilogue.bias, t.gate = epilogue.gate, t.gate_row = epilogue.gate_row;
  t.scale = epilogue.scale, t.relu = epilogue.relu;
  unit_of(current_kernels()).finish(rows, n, t);
}

void add_product_rows(int64_t rows, int64_t n, const float* a, int64_t row, float* sums) {
  unit_of(current_kernels()).add_rows(rows, n, a, row, sums);
}

void count_ebr_step(bool backward) { kernels(backward ? kEbrStepBackward : kEbrStep); }

void sgemm(int64_t m, int64_t n, int64_t k, const Strided& a, const Strided& b, float* c, int64_t ldc,
           const Epilogue& epilogue, float* row_sums, const Pool& pool) {
  const KernelTable& table = current_kernels();
  const Unit unit = unit_of(table);
  const int64_t L = table.lanes, R = table.rows;
  if (row_sums) std::fill_n(row_sums, m, 0.0f);
  if (m == 0 || n == 0) return;
  if (b.col == 1 && ((m <= kThin && k <= kChain) || k <= kThin)) {
    thin_product(m, n, k, a, b, c, ldc, epilogue, row_sums, pool);
    return;
  }
  const bool pack_a = a.col != 1 || row_sums;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(k, pack_a ? kChain / 2 : kChain));
  const int64_t depth = std::max<int64_t>(1, ceil_div(k, chunks));
  const int64_t row_tiles = ceil_div(m, R), panels = ceil_div(n, L);
  const int64_t packed_size = pack_a ? row_tiles * R * depth : 0;
  const Buffer<float> own = packed_size > kKeptFloats ? Buffer<float>(packed_size) : Buffer<float>();
  float* packed_a = packed_size > kKeptFloats ? own.get() : pack_a ? rows_buffer(packed_size) : nullptr;

  // enough tasks for every thread, and rows in blocks of whole tiles
  const Pool used = 2.0 * m * n * std::max<int64_t>(1, k) < kParallelFlops ? serial_pool() : pool;
  int64_t blocks = ceil_div(m, std::max(8 * R, kBlockFloats / depth));
  if (used.threads > 1) blocks = std::max(blocks, ceil_div(2 * used.threads, panels));
  const int64_t block = round_up(ceil_div(m, blocks), R);
  blocks = ceil_div(m, block);
  const int64_t slab = blocks > 1 ? std::min(panels, std::max<int64_t>(1, kSlabFloats / (depth * L))) : panels;
  float* packed_b = blocks > 1 ? slab_buffer(slab * L * depth) : nullptr;

  for (int64_t k0 = 0; k0 < std::max<int64_t>(1, k); k0 += depth) {
    const int64_t size = std::max<int64_t>(0, std::min(depth, k - k0));
    const bool last = k0 + depth >= k;
    Product p{table, unit, m, n, size, a, b, nullptr, nullptr, 0, c, ldc, epilogue};
    p.a.data += k0 * a.col;
    p.b.data += k0 * b.row;
    p.epilogue.add = epilogue.add || k0 > 0;
    if (!last) p.epilogue.bias = p.epilogue.gate = nullptr, p.epilogue.relu = false;
    if (pack_a) {
      p.packed_a = packed_a;
      parallel_for(used, row_tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * R; i < std::min(m, end * R); i += R) {
          float* out = packed_a + i * size;
          const float* src = p.a.data + i * a.row;
          if (a.row == 1) {
            unit.pack_rows(src, a.col, size, std::min(R, m - i), out, row_sums ? row_sums + i : nullptr);
          } else {
            table.pack(src, a.col, a.row, size, std::min(R, m - i), R, out);
          }
        }
      });
    }
    for (int64_t first = 0; first < panels; first += slab) {
      const int64_t count = std::min(slab, panels - first);
      p.panel_begin = first;
      if (packed_b) {
        parallel_for(used, count, 1, [&](int64_t begin, int64_t end) { p.pack_panels(first + begin, first + end, packed_b); });
        p.packed_b = packed_b;
      }
      parallel_for(used, count * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t row = t / count * block;
          p.run(first + t % count, row, std::min(m, row + block));
        }
      });
    }
  }
}

}  // namespace mmc
