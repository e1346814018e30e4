// AVX-512 F/BW/DQ/VL register tiles. No header with inline C++ functions may be included here (see kernel_table.h).
#include <immintrin.h>

#include "../kernel_table.h"

namespace mmc {
namespace avx512 {
namespace {

constexpr int kRows = 12;
constexpr int kVectors = 2;
constexpr int kLanes = 16 * kVectors;
constexpr int64_t kChain = 512;  // longest float32 chain of a Gram element

static_assert(kLanes <= kMaxLanes && kRows <= kMaxRows, "tile larger than the drivers' edge buffers");

__attribute__((always_inline)) inline void multiply(int64_t depth, const float* lanes, const float* rows,
                                                    __m512 (&acc)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 a0 = _mm512_loadu_ps(lanes + k * kLanes);
    const __m512 a1 = _mm512_loadu_ps(lanes + k * kLanes + 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512 b = _mm512_set1_ps(rows[k * kRows + r]);
      acc[r][0] = _mm512_fmadd_ps(a0, b, acc[r][0]);
      acc[r][1] = _mm512_fmadd_ps(a1, b, acc[r][1]);
    }
  }
}

void count_tile(int64_t words, const uint64_t* i, const uint64_t* j, int64_t* c, int64_t ldc) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i ones = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  constexpr int kBlockRows = 4;
  for (int r0 = 0; r0 < kCountRows; r0 += kBlockRows) {
    __m512i acc[kBlockRows][3];
    for (int r = 0; r < kBlockRows; ++r)
      for (int v = 0; v < 3; ++v) acc[r][v] = _mm512_setzero_si512();
    for (int64_t w0 = 0; w0 < words; w0 += 31) {  // 31 words: a byte counts to 248 at most
      const int64_t w1 = w0 + 31 < words ? w0 + 31 : words;
      __m512i bytes[kBlockRows][3];
      for (int r = 0; r < kBlockRows; ++r)
        for (int v = 0; v < 3; ++v) bytes[r][v] = _mm512_setzero_si512();
      for (int64_t w = w0; w < w1; ++w) {
        __m512i jv[3];
        for (int v = 0; v < 3; ++v) jv[v] = _mm512_loadu_si512(j + w * kPanel + 8 * v);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r) {
          const __m512i iv = _mm512_set1_epi64(static_cast<long long>(i[w * kPanel + r0 + r]));
#pragma GCC unroll 3
          for (int v = 0; v < 3; ++v) {
            const __m512i both = _mm512_and_si512(iv, jv[v]);
            const __m512i low = _mm512_shuffle_epi8(ones, _mm512_and_si512(both, nibble));
            const __m512i high = _mm512_shuffle_epi8(ones, _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble));
            bytes[r][v] = _mm512_add_epi8(bytes[r][v], _mm512_add_epi8(low, high));
          }
        }
      }
      for (int r = 0; r < kBlockRows; ++r)
        for (int v = 0; v < 3; ++v)
          acc[r][v] = _mm512_add_epi64(acc[r][v], _mm512_sad_epu8(bytes[r][v], _mm512_setzero_si512()));
    }
    for (int r = 0; r < kBlockRows; ++r)
      for (int v = 0; v < 3; ++v) {
        int64_t* out = c + (r0 + r) * ldc + 8 * v;
        _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_loadu_si512(out), acc[r][v]));
      }
  }
}

}  // namespace

void gemm_tile(int64_t depth, const float* lanes, const float* rows, float* c, int64_t ldc) {
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_loadu_ps(c + r * ldc + 16 * v);
  multiply(depth, lanes, rows, acc);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
}

void gram_tile(int64_t depth, const float* lanes, const float* rows, double* c, int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kChain) {
    __m512 acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_ps();
    multiply(depth - k < kChain ? depth - k : kChain, lanes + k * kLanes, rows + k * kRows, acc);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        double* out = c + r * ldc + 16 * v;
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(acc[r][v]));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(acc[r][v], 1));
        _mm512_storeu_pd(out, _mm512_add_pd(_mm512_loadu_pd(out), low));
        _mm512_storeu_pd(out + 8, _mm512_add_pd(_mm512_loadu_pd(out + 8), high));
      }
  }
}

bool sign_tile(const SignTile& t) {
  __m512 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_set1_ps(t.bias[r]);
  multiply(t.depth, t.lanes, t.rows, acc);
  const __m512 norm[kVectors] = {_mm512_loadu_ps(t.norm), _mm512_loadu_ps(t.norm + 16)};
  unsigned any = 0;
  for (int r = 0; r < kRows; ++r) {
    const __m512 scale = _mm512_set1_ps(t.scale[r]), offset = _mm512_set1_ps(t.offset[r]);
    unsigned positive = 0, negative = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 above = _mm512_cmp_ps_mask(acc[r][v], _mm512_fmadd_ps(norm[v], scale, offset), _CMP_GT_OQ);
      const __mmask16 below = _mm512_cmp_ps_mask(acc[r][v], _mm512_fnmsub_ps(norm[v], scale, offset), _CMP_LT_OQ);
      positive |= static_cast<unsigned>(above) << 16 * v;
      negative |= static_cast<unsigned>(below) << 16 * v;
    }
    __builtin_memcpy(t.out + 8 * r, &positive, 4);
    t.unsure[r] = ~(positive | negative);
    any |= t.unsure[r];
  }
  return any != 0;
}

bool sign_row(const SignRow& row) {
  const __m512 bias = _mm512_set1_ps(row.bias), scale = _mm512_set1_ps(row.scale), offset = _mm512_set1_ps(row.offset);
  uint64_t any = 0;
  for (int64_t w = 0; w < row.count; ++w) {
    uint64_t positive = 0, negative = 0;
    for (int q = 0; q < 4; ++q) {
      const int64_t at = kWordBits * w + 16 * q;
      const __m512 z = _mm512_add_ps(_mm512_loadu_ps(row.z + at), bias), norm = _mm512_loadu_ps(row.norm + at);
      const __mmask16 above = _mm512_cmp_ps_mask(z, _mm512_fmadd_ps(norm, scale, offset), _CMP_GT_OQ);
      const __mmask16 below = _mm512_cmp_ps_mask(z, _mm512_fnmsub_ps(norm, scale, offset), _CMP_LT_OQ);
      positive |= static_cast<uint64_t>(above) << 16 * q;
      negative |= static_cast<uint64_t>(below) << 16 * q;
    }
    row.words[w * row.stride] = positive;
    row.unsure[w] = ~(positive | negative);
    any |= row.unsure[w];
  }
  return any != 0;
}

const KernelTable table = {"avx512", kLanes,     kRows, gemm_tile,  gram_tile,
                           sign_tile, sign_row, count_tile, pack,  derivative, column_sums, column_squares, dot};

}  // namespace avx512
}  // namespace mmc
