// Tests of the CUDA co-activation kernels through the emulation, against counting by hand on drawn shapes.
//   test_cuda [seed] [rounds]     every check, the seed is printed
//   test_cuda broken NAME         runs a kernel that is wrong on purpose; the emulation has to stop it or the numbers differ
// Built with AddressSanitizer where there is one, so that an access outside a buffer ends the test.
#define MMC_EMULATED 1
#include "../ops/agop/cuda/coactivation.cu"

#include <cmath>
#include <limits>

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  printf("FAILED: %s\n", what);
}

// The fragments of two drawn matrices laid out by the tables of the PTX manual, element by element.
void one_mma(const int8_t* a, const int8_t* b, int* d) {
  const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, in_group = lane % 4;
  uint32_t left[4] = {}, right[2] = {};
  int out[4] = {1, 2, 3, 4};
  for (int i = 0; i < 16; ++i) {
    const int row = (i < 4 || (8 <= i && i < 12)) ? group : group + 8;
    const int column = in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
    left[i / 4] |= uint32_t{static_cast<uint8_t>(a[row * 32 + column])} << (8 * (i % 4));
  }
  for (int i = 0; i < 8; ++i) {
    const int row = in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
    right[i / 4] |= uint32_t{static_cast<uint8_t>(b[row * 8 + group])} << (8 * (i % 4));
  }
  mma_s8(out, left, right);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = out[i] - (i + 1);
}

void test_mma(std::mt19937& random) {
  int8_t a[16 * 32], b[32 * 8];
  int d[16 * 8];
  for (auto& x : a) x = static_cast<int8_t>(random());
  for (auto& x : b) x = static_cast<int8_t>(random());
  emulation::launch(one_mma, dim3(1), 32u, static_cast<const int8_t*>(a), static_cast<const int8_t*>(b), static_cast<int*>(d));
  bool same = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[i * 32 + k] * b[k * 8 + j];
      same = same && sum == d[i * 8 + j];
    }
  expect(same, "mma.m16n8k32 s8 multiplies what its fragments hold");
  for (int q = 0; q < 8; ++q)
    expect(mmc_cuda::spread_nibble(0xb0000000u >> (28 - 4 * q), q) == 0x01000101u, "a nibble becomes four bytes");
}

void reverse_without_barrier(const int* x, int* y) {
  MMC_SHARED(int, tile, 64);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

void barrier_of_some(int* y) {
  if (threadIdx.x < 16) MMC_SYNC();
  y[threadIdx.x] = 1;
}

void barriers_in_two_places(int* y) {
  if (threadIdx.x < 16) {
    MMC_SYNC();
  } else {
    MMC_SYNC();
  }
  y[threadIdx.x] = 1;
}

void warp_in_two_places(int* y) {
  int d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < 16) {
    mma_s8(d, a, b);
  } else {
    mma_s8(d, a, b);
  }
  y[threadIdx.x] = d[0];
}

int run_broken(const char* name) {
  int x[64], y[64] = {};
  std::iota(x, x + 64, 0);
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  if (is("missing-barrier")) {
    int wrong = 0;
    for (unsigned seed = 0; seed < 3; ++seed) {
      emulation::seed(seed);
      emulation::launch(reverse_without_barrier, dim3(1), 64u, static_cast<const int*>(x), static_cast<int*>(y));
      for (int i = 0; i < 64; ++i) wrong += y[i] != x[63 - i];
    }
    return wrong ? 70 : 0;
  }
  if (is("barrier-of-some")) emulation::launch(barrier_of_some, dim3(1), 32u, static_cast<int*>(y));
  if (is("barriers-in-two-places")) emulation::launch(barriers_in_two_places, dim3(1), 32u, static_cast<int*>(y));
  if (is("warp-in-two-places")) emulation::launch(warp_in_two_places, dim3(1), 32u, static_cast<int*>(y));
  return 0;
}

int64_t pick(std::mt19937& random, std::initializer_list<int64_t> options) {
  return *(options.begin() + random() % options.size());
}

// bits of a dtype: sign, exponent and mantissa drawn, with zeros, infinities and NaN among them where asked
uint32_t draw_value(std::mt19937& random, int bits, int exponent, bool finite) {
  const uint32_t mantissa = static_cast<uint32_t>(bits - 1 - exponent), mask = (uint64_t{1} << bits) - 1;
  const uint32_t infinity = ((1u << exponent) - 1) << mantissa;
  uint32_t value = static_cast<uint32_t>(random()) & mask;
  if (random() % 8 == 0) value &= 1u << (bits - 1);              // zero of either sign
  if (random() % 64 == 0) value = (value & (1u << (bits - 1))) | 1;  // the smallest number
  while (finite && (value & infinity) == infinity) value = static_cast<uint32_t>(random()) & mask;
  if (!finite && random() % 16 == 0) value |= infinity;
  return value;
}

template <class Bits>
void test_shape(std::mt19937& random, int dtype, int bits, int exponent, bool wide) {
  const int64_t samples = pick(random, {1, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 300}) + (wide ? 5000 : 0);
  const int64_t units = pick(random, {1, 15, 16, 17, 63, 64, 65, 127, 129, 131});
  const int64_t words = mmc_cuda::kPackWords * ((samples + 127) / 128 + (random() % 4 == 0));
  const int64_t stride_u = pick(random, {1, 3}), stride_n = units * stride_u + pick(random, {0, 5});
  const bool finite = random() % 2 == 0;
  const uint32_t infinity = ((1u << exponent) - 1) << (bits - 1 - exponent);
  std::vector<Bits> z((samples - 1) * stride_n + (units - 1) * stride_u + 1, static_cast<Bits>(infinity | 1));
  std::vector<std::vector<bool>> active(units, std::vector<bool>(samples));
  int64_t bad = 0;
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t u = 0; u < units; ++u) {
      const uint32_t value = draw_value(random, bits, exponent, finite);
      z[n * stride_n + u * stride_u] = static_cast<Bits>(value);
      const bool infinite = (value & infinity) == infinity, nan = infinite && (value & (infinity >> exponent >> 1 | ((1u << (bits - 1 - exponent)) - 1)));
      bad += infinite;
      active[u][n] = !nan && (value >> (bits - 1)) == 0 && value != 0;
    }
  std::vector<uint32_t> packed(units * words, 0xdeadbeefu);
  int64_t nonfinite = 0;
  expect(mmc_cuda_pack_signs(z.data(), dtype, samples, units, stride_n, stride_u, packed.data(), words, &nonfinite, nullptr) == 0,
         "pack_signs runs");
  expect(nonfinite == bad, "every value that is not finite is counted");
  bool same = true;
  for (int64_t u = 0; u < units; ++u)
    for (int64_t n = 0; n < words * 32; ++n)
      same = same && ((packed[u * words + n / 32] >> (n % 32)) & 1u) == (n < samples && active[u][n]);
  expect(same, "packed signs are those of the values, zeros past the last sample");
  const int64_t ld = units + pick(random, {0, 7});
  // as launched, a small matrix is split so finely that no block takes a second step: the last two runs do
  for (int run = 0; run < (wide ? 4 : 2); ++run) {
    const int plain = run % 2;
    std::vector<int64_t> counts((units - 1) * ld + units, -3);
    if (run < 2) {
      expect(mmc_cuda_coactivation(packed.data(), units, words, counts.data(), ld, plain, nullptr) == 0, "coactivation runs");
    } else {
      const int64_t side = (units + mmc_cuda::kTile - 1) / mmc_cuda::kTile, split = 3 * mmc_cuda::kStep;
      const dim3 grid(static_cast<unsigned>(side * (side + 1) / 2), static_cast<unsigned>((words + split - 1) / split));
      emulation::launch(plain ? mmc_cuda::coactivation_plain : mmc_cuda::coactivation_mma, grid, mmc_cuda::kThreads,
                        static_cast<const uint32_t*>(packed.data()), units, words, split, counts.data(), ld);
    }
    bool equal = true;
    for (int64_t i = 0; i < units; ++i)
      for (int64_t j = 0; j < units; ++j) {
        int64_t expected = -3;
        if (j >= i)
          for (int64_t n = 0; n < samples; ++n) expected += active[i][n] && active[j][n];
        equal = equal && counts[i * ld + j] == expected;
      }
    expect(equal, plain ? "counts by popcounts" : "counts by int8 matrix instructions");
  }
  if (failures) printf("  shape: samples %ld units %ld words %ld dtype %d\n", long(samples), long(units), long(words), dtype);
}

void test_arguments() {
  uint32_t words[4] = {};
  int64_t counts = 0, bad = 0;
  const float z = 1;
  expect(mmc_cuda_pack_signs(&z, 7, 1, 1, 1, 1, words, 4, &bad, nullptr) != 0, "an unknown dtype is refused");
  expect(mmc_cuda_pack_signs(&z, 0, 1, 1, 1, 1, words, 3, &bad, nullptr) != 0, "a ragged number of words is refused");
  expect(mmc_cuda_pack_signs(&z, 0, 129, 1, 1, 1, words, 4, &bad, nullptr) != 0, "too few words are refused");
  expect(mmc_cuda_coactivation(words, 2, 4, &counts, 1, 0, nullptr) != 0, "a short row of counts is refused");
  expect(mmc_cuda_coactivation(words, 1, int64_t{1} << 26, &counts, 1, 0, nullptr) != 0, "sums that could overflow are refused");
  const long before = emulation::machine.launches;
  expect(mmc_cuda_coactivation(words, 0, 4, &counts, 0, 0, nullptr) == 0, "nothing to count is no error");
  expect(mmc_cuda_pack_signs(&z, 0, 0, 1, 1, 1, words, 0, &bad, nullptr) == 0, "nothing to pack is no error");
  expect(emulation::machine.launches == before, "and launches nothing");
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && strcmp(arguments[1], "broken") == 0) return run_broken(arguments[2]);
  const unsigned seed = count > 1 ? static_cast<unsigned>(atoi(arguments[1])) : std::random_device{}();
  const int rounds = count > 2 ? atoi(arguments[2]) : 4;
  printf("seed %u\n", seed);
  std::mt19937 random(seed);
  emulation::seed(seed + 1);
  test_mma(random);
  test_arguments();
  for (int round = 0; round < rounds; ++round) {
    test_shape<uint32_t>(random, MMC_FLOAT32, 32, 8, round == 0);
    test_shape<uint16_t>(random, MMC_FLOAT16, 16, 5, false);
    test_shape<uint16_t>(random, MMC_BFLOAT16, 16, 8, false);
  }
  printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}
