// The ceiling of float32 products: fused multiply-adds on registers alone, in flop/s of this thread. bench_products.py compiles it
// for the instruction set that it times, as a library, so that the loop runs in the process of what is held against it.
#include <immintrin.h>

#include <cstdint>
#include <ctime>

#ifdef __AVX512F__
constexpr int kChains = 24, kLanes = 16;
using Vector = __m512;
static Vector fill(float v) { return _mm512_set1_ps(v); }
static Vector step(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(sum, a, b); }
#else
constexpr int kChains = 12, kLanes = 8;
using Vector = __m256;
static Vector fill(float v) { return _mm256_set1_ps(v); }
static Vector step(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(sum, a, b); }
#endif

static double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

extern "C" double fma_rate(int64_t repeats) {
  Vector sums[kChains], factor = fill(0.999f);
  const Vector term = fill(1e-3f);
  for (Vector& s : sums) s = term;
  const double start = thread_seconds();
  for (int64_t n = 0; n < repeats; ++n) {
    asm volatile("" : "+v"(factor));  // a new value to the compiler, so that nothing is hoisted
#pragma GCC unroll 24
    for (int t = 0; t < kChains; ++t) sums[t] = step(sums[t], factor, term);
  }
  const double seconds = thread_seconds() - start;
  for (int t = 1; t < kChains; ++t) sums[0] += sums[t];
  volatile float kept = sums[0][0];
  (void)kept;
  return 2.0 * kLanes * kChains * static_cast<double>(repeats) / seconds;
}
