// Conversion of bfloat16 and float16 rows and the epilogue in those dtypes: plain loops, compiled once per instruction set into
// its namespace (MMC_ISA). No header with inline C++ functions that are not static may be included here (see kernel_table.h).
#include "../bits.h"
#include "../lowp_rows.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mmc {
namespace MMC_ISA {
namespace {

constexpr int64_t kBlock = 256;  // elements that are float32 at a time, in L1

// float16 to float32: the exponent is moved by a product, which is exact and also right for subnormal numbers
inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  const float scaled = from_bits(magnitude) * from_bits(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : to_bits(scaled);
  return from_bits(special | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// float32 to float16, ties to even
inline uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // subnormal: the addition rounds to a multiple of 2^-24
    result = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace

void widen(Low type, const uint16_t* src, float* dst, int64_t count) {
  if (type == Low::bfloat16) {
    for (int64_t i = 0; i < count; ++i) dst[i] = from_bits(static_cast<uint32_t>(src[i]) << 16);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
  for (; i < count; ++i) dst[i] = half_to_float(src[i]);
}

void narrow(Low type, const float* src, uint16_t* dst, int64_t count) {
  if (type == Low::bfloat16) {
    for (int64_t i = 0; i < count; ++i) dst[i] = float_to_bfloat(src[i]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
  for (; i < count; ++i) dst[i] = float_to_half(src[i]);
}

void finish_low_row(Low type, const LowRow& row) {
  float value[kBlock], other[kBlock];
  for (int64_t start = 0; start < row.count; start += kBlock) {
    const int64_t count = row.count - start < kBlock ? row.count - start : kBlock;
    if (row.wide_c) {
      for (int64_t l = 0; l < count; ++l) value[l] = row.wide_c[start + l];
    } else {
      widen(type, row.c + start, value, count);
    }
    if (row.scale != 1.0f)
      for (int64_t l = 0; l < count; ++l) value[l] *= row.scale;
    if (row.bias)
      for (int64_t l = 0; l < count; ++l) value[l] += row.bias[start + l];
    if (row.add) {
      widen(type, row.out + start, other, count);
      for (int64_t l = 0; l < count; ++l) value[l] += other[l];
    }
    if (row.relu)
      for (int64_t l = 0; l < count; ++l) value[l] = value[l] < 0 ? 0.0f : value[l];
    if (row.gate) {
      widen(type, row.gate + start, other, count);
      for (int64_t l = 0; l < count; ++l) value[l] = other[l] <= 0 ? 0.0f : value[l];
    }
    narrow(type, value, row.out + start, count);
  }
}

void add_low_row(Low type, const uint16_t* row, float* sums, int64_t count) {
  float value[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    widen(type, row + start, value, size);
    for (int64_t l = 0; l < size; ++l) sums[start + l] += value[l];
  }
}

}  // namespace MMC_ISA
}  // namespace mmc
