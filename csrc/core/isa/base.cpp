// Portable tiles: any 64-bit little-endian machine, no instruction-set flag.
#include "../kernel_table.h"

namespace mmc {
namespace base {
namespace {

constexpr int kRows = 4;
constexpr int kLanes = 8;
constexpr int64_t kChain = 512;  // longest float32 chain of a Gram element

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

bool sign_tile(const SignTile& t) {
  unsigned any = 0;
  for (int r = 0; r < kRows; ++r) {
    float acc[kLanes];
    for (int l = 0; l < kLanes; ++l) acc[l] = t.bias[r];
    for (int64_t k = 0; k < t.depth; ++k)
      for (int l = 0; l < kLanes; ++l) acc[l] += t.rows[k * kRows + r] * t.lanes[k * kLanes + l];
    unsigned positive = 0, negative = 0;
    for (int l = 0; l < kLanes; ++l) {
      const float bound = t.norm[l] * t.scale[r] + t.offset[r];
      positive |= (acc[l] > bound ? 1u : 0u) << l;
      negative |= (acc[l] < -bound ? 1u : 0u) << l;
    }
    t.out[8 * r] = static_cast<unsigned char>(positive);
    t.unsure[r] = ~(positive | negative) & ((1u << kLanes) - 1);
    any |= t.unsure[r];
  }
  return any != 0;
}

bool sign_row(const SignRow& row) {
  uint64_t any = 0;
  for (int64_t w = 0; w < row.count; ++w) {
    uint64_t positive = 0, negative = 0;
    for (int l = 0; l < kWordBits; ++l) {
      const float z = row.z[kWordBits * w + l] + row.bias, bound = row.norm[kWordBits * w + l] * row.scale + row.offset;
      positive |= uint64_t{z > bound} << l;
      negative |= uint64_t{z < -bound} << l;
    }
    row.words[w * row.stride] = positive;
    row.unsure[w] = ~(positive | negative);
    any |= row.unsure[w];
  }
  return any != 0;
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
                           sign_tile, sign_row, count_tile, pack,  derivative, column_sums, column_squares, dot};

}  // namespace base
}  // namespace mmc
