// The ceiling of co-activation counting: and + popcount + add on registers alone, in bit multiply-adds per second of this thread.
// bench_agop.py compiles it for the instruction set that it times; prints one number.
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <ctime>

static double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

#ifdef __AVX512VPOPCNTDQ__
constexpr int kChains = 24;
using Vector = __m512i;
static Vector load(const uint64_t* p) { return _mm512_loadu_si512(p); }
static Vector step(Vector sum, Vector a, Vector b) { return _mm512_add_epi64(sum, _mm512_popcnt_epi64(_mm512_and_si512(a, b))); }
static Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
static void store(uint64_t* p, Vector v) { _mm512_storeu_si512(p, v); }
#else
constexpr int kChains = 8;
using Vector = __m256i;
static Vector load(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
static Vector step(Vector sum, Vector a, Vector b) {
  const Vector nibble = _mm256_set1_epi8(15), bits = _mm256_and_si256(a, b);
  const Vector ones = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Vector low = _mm256_shuffle_epi8(ones, _mm256_and_si256(bits, nibble));
  const Vector high = _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble));
  return _mm256_add_epi8(sum, _mm256_add_epi8(low, high));
}
static Vector add(Vector a, Vector b) { return _mm256_add_epi8(a, b); }
static void store(uint64_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }
#endif

int main() {
  constexpr int64_t repeats = 100000;
  double best = 1e9;
  uint64_t words[16];
  for (int i = 0; i < 16; ++i) words[i] = 0x9e3779b97f4a7c15u * (i + 1);
  for (int trial = 0; trial < 20; ++trial) {
    Vector sums[kChains], word = load(words);
    const Vector other = load(words + 8);
    for (Vector& s : sums) s = step(word, word, word);
    const double start = thread_seconds();
    for (int64_t n = 0; n < repeats; ++n) {
#pragma GCC unroll 24
      for (int t = 0; t < kChains; ++t) {
        asm volatile("" : "+v"(word));  // a new value to the compiler, so that no two products are shared
        sums[t] = step(sums[t], word, other);
      }
    }
    const double seconds = thread_seconds() - start;
    if (seconds < best) best = seconds;
    for (int t = 1; t < kChains; ++t) sums[0] = add(sums[0], sums[t]);
    store(words, sums[0]);
  }
  std::printf("%.4e\n", repeats * kChains * 8.0 * sizeof(Vector) / best);
}
