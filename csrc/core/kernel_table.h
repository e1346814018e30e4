// What every instruction-set unit provides. Included by those units, so it holds declarations only: an inline function
// here could be emitted with AVX-512 code and be the copy that the linker keeps for everyone.
#pragma once
#include <cstdint>

namespace mmc {

constexpr int64_t kWordBits = 64;
constexpr int64_t kPanel = 24;     // units of one panel of packed words, laid out [word][kPanel]
constexpr int64_t kCountRows = 8;  // units i of one co-activation tile; its j are a whole panel
constexpr int64_t kMaxLanes = 32;
constexpr int64_t kMaxRows = 12;

enum class Activation : int {
  kIdentity = 0,
  kRelu = 1,
  kLeakyRelu = 2,
  kGelu = 3,
  kGeluTanh = 4,
  kSilu = 5,
  kTanh = 6,
  kSigmoid = 7,
  kElu = 8,
  kSoftplus = 9,
};
constexpr int kActivations = 10;

// Pre-activations z[r][l] = bias[r] + sum_k rows[k][r] * lanes[k][l] of one tile, of which only the certain signs are kept. A bound
// of the error of z, norm[l] * scale[r] + offset[r], says which these are (see certificate.h).
struct SignTile {
  int64_t depth;
  const float* lanes;
  const float* rows;
  const float* norm;  // [lanes]
  const float* bias;  // [rows], as the next two
  const float* scale;
  const float* offset;
  unsigned char* out;  // bit l of the lanes bits at out + 8 r: z > bound
  uint32_t* unsure;    // [rows], bit l: not |z| > bound
};

// The same of one unit from given z without bias: word w at words + w * stride has bit l where z[64 w + l] + bias > bound.
struct SignRow {
  int64_t count;  // words
  const float* z;     // [64 count], as norm
  const float* norm;
  float bias, scale, offset;
  uint64_t* words;
  int64_t stride;
  uint64_t* unsure;  // [count]
};

// Register tiles multiply a "lanes" panel [depth][lanes] by a "rows" panel [depth][rows] into c[rows][lanes].
struct KernelTable {
  const char* name;
  int64_t lanes;
  int64_t rows;
  // c[r][l] += sum_k rows[k][r] * lanes[k][l], one float32 chain that starts at c
  void (*gemm_tile)(int64_t depth, const float* lanes, const float* rows, float* c, int64_t ldc);
  // the same into float64: float32 chains of bounded length, added to c in float64
  void (*gram_tile)(int64_t depth, const float* lanes, const float* rows, double* c, int64_t ldc);
  bool (*sign_tile)(const SignTile& tile);  // whether any sign is unsure
  bool (*sign_row)(const SignRow& row);
  // c[r][l] += sum_w popcount(i[w * kPanel + r] & j[w * kPanel + l]), r < kCountRows, l < kPanel
  void (*count_tile)(int64_t words, const uint64_t* i, const uint64_t* j, int64_t* c, int64_t ldc);
  // dst[k * width + l] = src[k * stride_k + l * stride_l] for l < count, 0 for count <= l < width
  void (*pack)(const float* src, int64_t stride_k, int64_t stride_l, int64_t depth, int64_t count, int64_t width,
               float* dst);
  // z[i] = s'(z[i]); true if an input is not finite
  bool (*derivative)(Activation activation, float alpha, float beta, float* z, int64_t size);
  // total[l] += sum_k panel[k * lanes + l] for l < lanes
  void (*column_sums)(const float* panel, int64_t depth, double* total);
  // squares[l] = sum_k panel[k * lanes + l]^2 for l < lanes
  void (*column_squares)(const float* panel, int64_t depth, float* squares);
  // sum of the products x[k] w[k], which are exact in float64, and of their magnitudes
  void (*dot)(const float* x, const float* w, int64_t depth, double* sum, double* size);
};

namespace base {
extern const KernelTable table;
void pack(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
bool derivative(Activation, float, float, float*, int64_t);
void column_sums(const float*, int64_t, double*);
void column_squares(const float*, int64_t, float*);
void dot(const float*, const float*, int64_t, double*, double*);
}  // namespace base

namespace avx2 {
extern const KernelTable table;
void pack(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
bool derivative(Activation, float, float, float*, int64_t);
void column_sums(const float*, int64_t, double*);
void column_squares(const float*, int64_t, float*);
void dot(const float*, const float*, int64_t, double*, double*);
}  // namespace avx2

namespace avx512 {
extern const KernelTable table;
void gemm_tile(int64_t, const float*, const float*, float*, int64_t);
void gram_tile(int64_t, const float*, const float*, double*, int64_t);
bool sign_tile(const SignTile&);
bool sign_row(const SignRow&);
void pack(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
bool derivative(Activation, float, float, float*, int64_t);
void column_sums(const float*, int64_t, double*);
void column_squares(const float*, int64_t, float*);
void dot(const float*, const float*, int64_t, double*, double*);
}  // namespace avx512

namespace avx512_vpopcntdq {
extern const KernelTable table;
}  // namespace avx512_vpopcntdq

}  // namespace mmc
