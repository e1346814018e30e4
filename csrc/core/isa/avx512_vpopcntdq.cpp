// The co-activation tile on AVX-512 VPOPCNTDQ; everything else comes from the AVX-512 unit.
#include <immintrin.h>

#include "../kernel_table.h"

namespace mmc {
namespace avx512_vpopcntdq {
namespace {

constexpr int kVectors = 3;
constexpr int64_t kAhead = 16;  // words: the i operand is one line of every third, which the hardware does not foresee
static_assert(kVectors * 8 == kPanel, "one tile covers a panel");

void count_tile(int64_t words, const uint64_t* i, const uint64_t* j, int64_t* c, int64_t ldc) {
  __m512i acc[kCountRows][kVectors];
  for (int r = 0; r < kCountRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = _mm512_setzero_si512();
      _mm_prefetch(reinterpret_cast<const char*>(c + r * ldc + 8 * v), _MM_HINT_T0);  // needed when the loop ends
    }
  for (int64_t w = 0; w < words; ++w) {
    _mm_prefetch(reinterpret_cast<const char*>(i + (w + kAhead) * kPanel), _MM_HINT_T0);
    const __m512i j0 = _mm512_loadu_si512(j + w * kPanel);
    const __m512i j1 = _mm512_loadu_si512(j + w * kPanel + 8);
    const __m512i j2 = _mm512_loadu_si512(j + w * kPanel + 16);
#pragma GCC unroll 8
    for (int r = 0; r < kCountRows; ++r) {
      const __m512i iv = _mm512_set1_epi64(static_cast<long long>(i[w * kPanel + r]));
      acc[r][0] = _mm512_add_epi64(acc[r][0], _mm512_popcnt_epi64(_mm512_and_si512(iv, j0)));
      acc[r][1] = _mm512_add_epi64(acc[r][1], _mm512_popcnt_epi64(_mm512_and_si512(iv, j1)));
      acc[r][2] = _mm512_add_epi64(acc[r][2], _mm512_popcnt_epi64(_mm512_and_si512(iv, j2)));
    }
  }
  for (int r = 0; r < kCountRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      int64_t* out = c + r * ldc + 8 * v;
      _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_loadu_si512(out), acc[r][v]));
    }
}

}  // namespace

const KernelTable table = {"avx512_vpopcntdq",
                           kMaxLanes,
                           kMaxRows,
                           avx512::gemm_tile,
                           avx512::gram_tile,
                           avx512::sign_tile,
                           avx512::sign_row,
                           count_tile,
                           avx512::pack,
                           avx512::derivative,
                           avx512::column_sums,
                           avx512::column_squares,
                           avx512::dot};

}  // namespace avx512_vpopcntdq
}  // namespace mmc
