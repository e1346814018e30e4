// Packing, activation derivatives and column sums: plain loops, compiled once per instruction set into its namespace
// (MMC_ISA). No header with inline C++ functions that are not static may be included here (see kernel_table.h).
#include "../bits.h"
#include "../kernel_table.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mmc {
namespace MMC_ISA {
namespace {

constexpr int64_t kLanes = MMC_LANES;

template <int kWidth>
void copy_full(const float* src, int64_t stride_k, int64_t depth, float* dst) {
  for (int64_t k = 0; k < depth; ++k) __builtin_memcpy(dst + k * kWidth, src + k * stride_k, kWidth * sizeof(float));
}

// dst[k * width + l] = src[l * ld + k], l < count: 4 x 4 or 16 x 16 blocks in registers
#if defined(__AVX512F__)
void transpose_block(const float* src, int64_t ld, int64_t depth, int64_t count, int64_t width, float* dst) {
  const __mmask16 columns = static_cast<__mmask16>((1u << depth) - 1);
  const __mmask16 out = static_cast<__mmask16>((1u << count) - 1);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int l = 0; l < 16; ++l) a[l] = l < count ? _mm512_maskz_loadu_ps(columns, src + l * ld) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int l = 0; l < 16; l += 2) {
    b[l] = _mm512_unpacklo_ps(a[l], a[l + 1]);
    b[l + 1] = _mm512_unpackhi_ps(a[l], a[l + 1]);
  }
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {  // a[g + c]: column 4 L + c of rows g..g+3 in 128-bit lane L
    a[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[g]), _mm512_castps_pd(b[g + 2])));
    a[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[g]), _mm512_castps_pd(b[g + 2])));
    a[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[g + 1]), _mm512_castps_pd(b[g + 3])));
    a[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[g + 1]), _mm512_castps_pd(b[g + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    b[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    b[12 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k)
    if (k < depth) _mm512_mask_storeu_ps(dst + k * width, out, b[k]);
}
constexpr int64_t kBlock = 16;
#elif defined(__SSE2__)
void transpose_block(const float* src, int64_t ld, int64_t depth, int64_t count, int64_t width, float* dst) {
  if (depth < 4 || count < 4) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t l = 0; l < count; ++l) dst[k * width + l] = src[l * ld + k];
    return;
  }
  __m128 a = _mm_loadu_ps(src), b = _mm_loadu_ps(src + ld), c = _mm_loadu_ps(src + 2 * ld), d = _mm_loadu_ps(src + 3 * ld);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(dst, a);
  _mm_storeu_ps(dst + width, b);
  _mm_storeu_ps(dst + 2 * width, c);
  _mm_storeu_ps(dst + 3 * width, d);
}
constexpr int64_t kBlock = 4;
#else
void transpose_block(const float* src, int64_t ld, int64_t depth, int64_t count, int64_t width, float* dst) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t l = 0; l < count; ++l) dst[k * width + l] = src[l * ld + k];
}
constexpr int64_t kBlock = 4;
#endif

// exp(x) for x <= 0, relative error below 2e-7; 0 below the smallest normal number
inline float exp_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shift = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const float shifted = clamped * 1.44269504089f + shift;
  const float n = shifted - shift;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float scale = from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

inline float magnitude(float x) { return x < 0 ? -x : x; }

inline float sigmoid(float x) {
  const float e = exp_negative(-magnitude(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

struct Identity {
  float operator()(float) const { return 1.0f; }
};
struct LeakyRelu {
  float alpha;
  float operator()(float z) const { return z > 0 ? 1.0f : alpha; }
};
struct Gelu {  // Phi(z) + z phi(z), with Phi(-|z|) = exp(-z^2 / 2) P(t), P fitted here: |error| < 2e-8
  float operator()(float z) const {
    const float t = 1.0f / (1.0f + 0.48f * 0.70710678f * magnitude(z));
    const float e = exp_negative(-0.5f * z * z);
    float p = 0.04430833086371422f;
    p = p * t - 0.1991390883922577f;
    p = p * t + 0.26315469548729394f;
    p = p * t - 0.029437916353344917f;
    p = p * t + 0.15558412671089172f;
    p = p * t + 0.12976926565170288f;
    p = p * t + 0.1357605904340744f;
    const float tail = p * t * e;
    return (z < 0 ? tail : 1.0f - tail) + z * 0.39894228f * e;
  }
};
struct GeluTanh {
  float operator()(float z) const {
    const float inner = 0.79788456f * (z + 0.044715f * z * z * z);
    const float slope = 0.79788456f * (1.0f + 0.134145f * z * z);
    const float e = exp_negative(-2.0f * magnitude(inner));
    const float inverse = 1.0f / (1.0f + e);
    const float upper = (inner < 0 ? e : 1.0f) * inverse;  // (1 + tanh) / 2
    // e underflows long before slope overflows, so the product is 0 there and never inf * 0 for finite cubes
    return e == 0.0f ? upper : upper + 2.0f * z * e * inverse * inverse * slope;
  }
};
struct Silu {
  float operator()(float z) const {
    const float s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
  }
};
struct Tanh {  // 1 - tanh^2 without the cancellation
  float operator()(float z) const {
    const float e = exp_negative(-2.0f * magnitude(z));
    const float inverse = 1.0f / (1.0f + e);
    return 4.0f * e * inverse * inverse;
  }
};
struct Sigmoid {
  float operator()(float z) const {
    const float e = exp_negative(-magnitude(z));
    const float inverse = 1.0f / (1.0f + e);
    return e * inverse * inverse;
  }
};
struct Elu {
  float alpha;
  float operator()(float z) const { return z > 0 ? 1.0f : alpha * exp_negative(z > 0 ? 0.0f : z); }
};
struct Softplus {
  float beta, threshold;
  float operator()(float z) const { return z * beta > threshold ? 1.0f : sigmoid(z * beta); }
};

template <class F>
bool apply(F f, float* z, int64_t size) {
  int32_t bad = 0;
  for (int64_t i = 0; i < size; ++i) {
    const float value = z[i];
    bad |= magnitude(value) <= 3.402823466e38f ? 0 : 1;
    z[i] = f(value);
  }
  return bad != 0;
}

}  // namespace

void pack(const float* src, int64_t stride_k, int64_t stride_l, int64_t depth, int64_t count, int64_t width, float* dst) {
  if (count < width) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t l = count; l < width; ++l) dst[k * width + l] = 0.0f;
  }
  if (stride_l == 1 && count == width && width == kLanes) {
    copy_full<kLanes>(src, stride_k, depth, dst);
  } else if (stride_l == 1 && count == width && width == MMC_ROWS) {
    copy_full<MMC_ROWS>(src, stride_k, depth, dst);
  } else if (stride_k == 1 && stride_l != 1) {
    for (int64_t l = 0; l < count; l += kBlock)
      for (int64_t k = 0; k < depth; k += kBlock)
        transpose_block(src + l * stride_l + k, stride_l, depth - k < kBlock ? depth - k : kBlock,
                        count - l < kBlock ? count - l : kBlock, width, dst + k * width + l);
  } else {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t l = 0; l < count; ++l) dst[k * width + l] = src[k * stride_k + l * stride_l];
  }
}

bool derivative(Activation activation, float alpha, float beta, float* z, int64_t size) {
  switch (activation) {
    case Activation::kIdentity: return apply(Identity{}, z, size);
    case Activation::kRelu: return apply(LeakyRelu{0.0f}, z, size);
    case Activation::kLeakyRelu: return apply(LeakyRelu{alpha}, z, size);
    case Activation::kGelu: return apply(Gelu{}, z, size);
    case Activation::kGeluTanh: return apply(GeluTanh{}, z, size);
    case Activation::kSilu: return apply(Silu{}, z, size);
    case Activation::kTanh: return apply(Tanh{}, z, size);
    case Activation::kSigmoid: return apply(Sigmoid{}, z, size);
    case Activation::kElu: return apply(Elu{alpha}, z, size);
    case Activation::kSoftplus: return apply(Softplus{alpha, beta}, z, size);
  }
  return true;
}

void column_sums(const float* panel, int64_t depth, double* total) {
  constexpr int64_t kChain = 64;  // float32 partial sums stay short
  for (int64_t k = 0; k < depth; k += kChain) {
    float partial[kLanes] = {};
    const int64_t end = k + kChain < depth ? k + kChain : depth;
    for (int64_t n = k; n < end; ++n)
      for (int64_t l = 0; l < kLanes; ++l) partial[l] += panel[n * kLanes + l];
    for (int64_t l = 0; l < kLanes; ++l) total[l] += partial[l];
  }
}

void column_squares(const float* panel, int64_t depth, float* squares) {
  float sum[kLanes] = {};
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t l = 0; l < kLanes; ++l) sum[l] += panel[k * kLanes + l] * panel[k * kLanes + l];
  for (int64_t l = 0; l < kLanes; ++l) squares[l] = sum[l];
}

void dot(const float* x, const float* w, int64_t depth, double* sum, double* size) {
  constexpr int kParts = 16;
  double sums[kParts] = {}, sizes[kParts] = {};
  int64_t k = 0;
  for (; k + kParts <= depth; k += kParts)
    for (int p = 0; p < kParts; ++p) {
      const double product = static_cast<double>(x[k + p]) * w[k + p];
      sums[p] += product;
      sizes[p] += __builtin_fabs(product);
    }
  for (int p = 0; k < depth; ++k, ++p) {
    const double product = static_cast<double>(x[k]) * w[k];
    sums[p] += product;
    sizes[p] += __builtin_fabs(product);
  }
  *sum = *size = 0;
  for (int p = 0; p < kParts; ++p) *sum += sums[p], *size += sizes[p];
}

}  // namespace MMC_ISA
}  // namespace mmc
