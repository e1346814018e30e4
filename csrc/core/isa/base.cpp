// Portable tiles: any 64-bit little-endian machine, no instruction-set flag.
#include "../kernel_table.h"

namespace mmc {
namespace base {
namespace {

constexpr int kRows = 4;
constexpr int kLanes = 8;
constexpr int64_t kChain = 512;  // longest float32 chain of a Gram element

// a * b + c rounded once, as the hardware's fused multiply-add does: the product is exact in float64, and the float64 sum
// rounded to odd keeps what the final rounding needs. Signs of pre-activations are then the same bits on every machine.
float fused(float a, float b, float c) {
  const double product = static_cast<double>(a) * b;
  const double addend = c;
  double sum = product + addend;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (addend - back);
  int64_t bits;
  __builtin_memcpy(&bits, &sum, 8);
  if (lost != 0 && (bits & 1) == 0) {
    bits += (lost > 0) == (sum > 0) ? 1 : -1;
    __builtin_memcpy(&sum, &bits, 8);
  }
  return static_cast<float>(sum);
}

int64_t popcount(uint64_t word) {
  word -= (word >> 1) & 0x5555555555555555u;
  word = (word & 0x3333333333333333u) + ((word >> 2) & 0x3333333333333333u);
  word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int64_t>((word * 0x0101010101010101u) >> 56);
}

void gemm_tile(int64_t depth, const float* lanes, const float* rows, float* c, int64_t ldc) {
  float acc[kRows][kLanes];
  for (int r = 0; r < kRows; ++r)
    for (int l = 0; l < kLanes; ++l) acc[r][l] = c[r * ldc + l];
  for (int64_t k = 0; k < depth; ++k)
    for (int r = 0; r < kRows; ++r)
      for (int l = 0; l < kLanes; ++l) acc[r][l] += rows[k * kRows + r] * lanes[k * kLanes + l];
  for (int r = 0; r < kRows; ++r)
    for (int l = 0; l < kLanes; ++l) c[r * ldc + l] = acc[r][l];
}

void gram_tile(int64_t depth, const float* lanes, const float* rows, double* c, int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kChain) {
    float acc[kRows * kLanes] = {};
    gemm_tile(depth - k < kChain ? depth - k : kChain, lanes + k * kLanes, rows + k * kRows, acc, kLanes);
    for (int r = 0; r < kRows; ++r)
      for (int l = 0; l < kLanes; ++l) c[r * ldc + l] += acc[r * kLanes + l];
  }
}

bool sign_tile(int64_t depth, const float* lanes, const float* rows, const float* bias, unsigned char* out) {
  bool bad = false;
  for (int r = 0; r < kRows; ++r) {
    float acc[kLanes];
    for (int l = 0; l < kLanes; ++l) acc[l] = bias[r];
    for (int64_t k = 0; k < depth; ++k)
      for (int l = 0; l < kLanes; ++l) acc[l] = fused(rows[k * kRows + r], lanes[k * kLanes + l], acc[l]);
    unsigned bits = 0;
    for (int l = 0; l < kLanes; ++l) {
      bits |= (acc[l] > 0 ? 1u : 0u) << l;
      bad |= !(acc[l] - acc[l] == 0);
    }
    out[8 * r] = static_cast<unsigned char>(bits);
  }
  return bad;
}

void count_tile(int64_t words, const uint64_t* i, const uint64_t* j, int64_t* c, int64_t ldc) {
  for (int r = 0; r < kCountRows; ++r) {
    int64_t acc[kPanel] = {};
    for (int64_t w = 0; w < words; ++w)
      for (int l = 0; l < kPanel; ++l) acc[l] += popcount(i[w * kPanel + r] & j[w * kPanel + l]);
    for (int l = 0; l < kPanel; ++l) c[r * ldc + l] += acc[l];
  }
}

}  // namespace

const KernelTable table = {"base",    kLanes,     kRows, gemm_tile,  gram_tile,
                           sign_tile, count_tile, pack,  derivative, column_sums};

}  // namespace base
}  // namespace mmc
