// AVX2 + FMA register tiles. No header with inline C++ functions may be included here (see kernel_table.h).
#include <immintrin.h>

#include "../kernel_table.h"

namespace mmc {
namespace avx2 {
namespace {

constexpr int kRows = 6;
constexpr int kVectors = 2;
constexpr int kLanes = 8 * kVectors;
constexpr int64_t kChain = 512;  // longest float32 chain of a Gram element

static_assert(kLanes <= kMaxLanes && kRows <= kMaxRows, "tile larger than the drivers' edge buffers");

__attribute__((always_inline)) inline void multiply(int64_t depth, const float* lanes, const float* rows,
                                                    __m256 (&acc)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    const __m256 a0 = _mm256_loadu_ps(lanes + k * kLanes);
    const __m256 a1 = _mm256_loadu_ps(lanes + k * kLanes + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 b = _mm256_set1_ps(rows[k * kRows + r]);
      acc[r][0] = _mm256_fmadd_ps(a0, b, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(a1, b, acc[r][1]);
    }
  }
}

__attribute__((always_inline)) inline __m256i byte_counts(__m256i both, __m256i ones, __m256i nibble) {
  const __m256i low = _mm256_shuffle_epi8(ones, _mm256_and_si256(both, nibble));
  const __m256i high = _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi32(both, 4), nibble));
  return _mm256_add_epi8(low, high);
}

void gemm_tile(int64_t depth, const float* lanes, const float* rows, float* c, int64_t ldc) {
  __m256 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_loadu_ps(c + r * ldc + 8 * v);
  multiply(depth, lanes, rows, acc);
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(c + r * ldc + 8 * v, acc[r][v]);
}

void gram_tile(int64_t depth, const float* lanes, const float* rows, double* c, int64_t ldc) {
  for (int64_t k = 0; k < depth; k += kChain) {
    __m256 acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_setzero_ps();
    multiply(depth - k < kChain ? depth - k : kChain, lanes + k * kLanes, rows + k * kRows, acc);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        double* out = c + r * ldc + 8 * v;
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(acc[r][v]));
        const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(acc[r][v], 1));
        _mm256_storeu_pd(out, _mm256_add_pd(_mm256_loadu_pd(out), low));
        _mm256_storeu_pd(out + 4, _mm256_add_pd(_mm256_loadu_pd(out + 4), high));
      }
  }
}

bool sign_tile(const SignTile& t) {
  __m256 acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm256_set1_ps(t.bias[r]);
  multiply(t.depth, t.lanes, t.rows, acc);
  const __m256 norm[kVectors] = {_mm256_loadu_ps(t.norm), _mm256_loadu_ps(t.norm + 8)};
  unsigned any = 0;
  for (int r = 0; r < kRows; ++r) {
    const __m256 scale = _mm256_set1_ps(t.scale[r]), offset = _mm256_set1_ps(t.offset[r]);
    unsigned positive = 0, negative = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __m256 above = _mm256_cmp_ps(acc[r][v], _mm256_fmadd_ps(norm[v], scale, offset), _CMP_GT_OQ);
      const __m256 below = _mm256_cmp_ps(acc[r][v], _mm256_fnmsub_ps(norm[v], scale, offset), _CMP_LT_OQ);
      positive |= static_cast<unsigned>(_mm256_movemask_ps(above)) << 8 * v;
      negative |= static_cast<unsigned>(_mm256_movemask_ps(below)) << 8 * v;
    }
    __builtin_memcpy(t.out + 8 * r, &positive, 2);
    t.unsure[r] = ~(positive | negative) & 0xffffu;
    any |= t.unsure[r];
  }
  return any != 0;
}

bool sign_row(const SignRow& row) {
  const __m256 bias = _mm256_set1_ps(row.bias), scale = _mm256_set1_ps(row.scale), offset = _mm256_set1_ps(row.offset);
  uint64_t any = 0;
  for (int64_t w = 0; w < row.count; ++w) {
    uint64_t positive = 0, negative = 0;
    for (int q = 0; q < 8; ++q) {
      const int64_t at = kWordBits * w + 8 * q;
      const __m256 z = _mm256_add_ps(_mm256_loadu_ps(row.z + at), bias), norm = _mm256_loadu_ps(row.norm + at);
      const __m256 above = _mm256_cmp_ps(z, _mm256_fmadd_ps(norm, scale, offset), _CMP_GT_OQ);
      const __m256 below = _mm256_cmp_ps(z, _mm256_fnmsub_ps(norm, scale, offset), _CMP_LT_OQ);
      positive |= static_cast<uint64_t>(_mm256_movemask_ps(above)) << 8 * q;
      negative |= static_cast<uint64_t>(_mm256_movemask_ps(below)) << 8 * q;
    }
    row.words[w * row.stride] = positive;
    row.unsure[w] = ~(positive | negative);
    any |= row.unsure[w];
  }
  return any != 0;
}

void count_tile(int64_t words, const uint64_t* i, const uint64_t* j, int64_t* c, int64_t ldc) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  constexpr int kBlockRows = 4;
  constexpr int kBlockVectors = 2;  // 4 x 2 accumulators, and the table, the mask and temporaries in 16 registers
  constexpr int kBlockLanes = 4 * kBlockVectors;
  for (int64_t w0 = 0; w0 < words; w0 += 31) {  // 31 words: a byte counts to 248 at most
    const int64_t w1 = w0 + 31 < words ? w0 + 31 : words;
    for (int r0 = 0; r0 < kCountRows; r0 += kBlockRows)
      for (int l0 = 0; l0 < kPanel; l0 += kBlockLanes) {
        __m256i bytes[kBlockRows][kBlockVectors];
        for (int r = 0; r < kBlockRows; ++r)
          for (int v = 0; v < kBlockVectors; ++v) bytes[r][v] = _mm256_setzero_si256();
        for (int64_t w = w0; w < w1; ++w) {
          const uint64_t* jw = j + w * kPanel + l0;
          const __m256i j0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(jw));
          const __m256i j1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(jw + 4));
#pragma GCC unroll 4
          for (int r = 0; r < kBlockRows; ++r) {
            const __m256i iv = _mm256_set1_epi64x(static_cast<long long>(i[w * kPanel + r0 + r]));
            bytes[r][0] = _mm256_add_epi8(bytes[r][0], byte_counts(_mm256_and_si256(iv, j0), ones, nibble));
            bytes[r][1] = _mm256_add_epi8(bytes[r][1], byte_counts(_mm256_and_si256(iv, j1), ones, nibble));
          }
        }
        for (int r = 0; r < kBlockRows; ++r)
          for (int v = 0; v < kBlockVectors; ++v) {
            __m256i* out = reinterpret_cast<__m256i*>(c + (r0 + r) * ldc + l0 + 4 * v);
            const __m256i sum = _mm256_sad_epu8(bytes[r][v], _mm256_setzero_si256());
            _mm256_storeu_si256(out, _mm256_add_epi64(_mm256_loadu_si256(out), sum));
          }
      }
  }
}

}  // namespace

const KernelTable table = {"avx2",    kLanes,     kRows, gemm_tile,  gram_tile,
                           sign_tile, sign_row, count_tile, pack,  derivative, column_sums, column_squares, dot};

}  // namespace avx2
}  // namespace mmc
