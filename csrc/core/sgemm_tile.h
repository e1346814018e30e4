// The register tile of sgemm, one per instruction set. Declarations only: see kernel_table.h.
#pragma once
#include <cstdint>

namespace mmc {

// c[r][l] = epilogue(sum_k a[r * a_row + k * a_col] * b[k * width + l]), r < rows, l < lanes.
// width is the instruction set's lanes, or half of them where lanes is at most that.
struct TileCall {
  int64_t depth;
  const float* a;
  int64_t a_row, a_col;  // (any, 1), or (1, rows of a full tile) for a packed panel
  const float* b;
  float* c;
  int64_t ldc, rows, lanes, width;
  const float* bias;
  const float* gate;
  int64_t gate_row;
  float scale;
  bool relu, add;
  bool resume;  // the chain goes on from c instead of from zero; not with add
};

namespace base {
void sgemm_tile(const TileCall&);
void pack_rows(const float*, int64_t, int64_t, int64_t, float*, float*);
void sgemm_thin(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t);
void sgemm_finish(int64_t, int64_t, const TileCall&);
void add_rows(int64_t, int64_t, const float*, int64_t, float*);
}
namespace avx2 {
void sgemm_tile(const TileCall&);
void pack_rows(const float*, int64_t, int64_t, int64_t, float*, float*);
void sgemm_thin(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t);
void sgemm_finish(int64_t, int64_t, const TileCall&);
void add_rows(int64_t, int64_t, const float*, int64_t, float*);
}
namespace avx512 {
void sgemm_tile(const TileCall&);
void pack_rows(const float*, int64_t, int64_t, int64_t, float*, float*);
void sgemm_thin(int64_t, int64_t, int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t);
void sgemm_finish(int64_t, int64_t, const TileCall&);
void add_rows(int64_t, int64_t, const float*, int64_t, float*);
}

}  // namespace mmc
