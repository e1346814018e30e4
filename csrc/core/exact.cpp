#include "exact.h"

#include <cstring>
#include <limits>
#include <type_traits>

namespace mmc {
namespace {

// value = (negative ? -1 : 1) * mantissa * 2^exponent * (smallest number above zero)
struct Parts {
  uint64_t mantissa;
  int exponent;
  bool negative, finite;
};

template <class T>
Parts parts(T value) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1, kExponent = 8 * sizeof(T) - 1 - kMantissa;
  Bits bits;
  std::memcpy(&bits, &value, sizeof(T));
  const int exponent = static_cast<int>(bits >> kMantissa) & ((1 << kExponent) - 1);
  const Bits fraction = bits & ((Bits{1} << kMantissa) - 1);
  return {exponent ? fraction | Bits{1} << kMantissa : fraction, exponent ? exponent - 1 : 0,
          static_cast<bool>(bits >> (8 * sizeof(T) - 1)), exponent != (1 << kExponent) - 1};
}

// An integer as wide as a sum of products of two Ts, in units of the square of the smallest T: 32 bits to a limb, and limbs that
// have not been carried yet. A limb takes less than 2^32 at a time, so it holds 2^30 additions.
template <class T>
class Accumulator {
 public:
  static constexpr int kUnit = std::numeric_limits<T>::digits - std::numeric_limits<T>::min_exponent;  // smallest: 2^-kUnit
  static constexpr int kLimbs = (2 * (kUnit + std::numeric_limits<T>::max_exponent) + 128) / 32;
  static constexpr int64_t kAdditions = int64_t{1} << 28;

  void add(uint64_t value, int exponent, bool negative) {
    const int limb = exponent / 32, shift = exponent % 32;
    const uint64_t low = value << shift, high = shift ? value >> (64 - shift) : 0;
    const int64_t sign = negative ? -1 : 1;
    limbs_[limb] += sign * static_cast<int64_t>(low & 0xffffffffu);
    limbs_[limb + 1] += sign * static_cast<int64_t>(low >> 32);
    limbs_[limb + 2] += sign * static_cast<int64_t>(high);
  }

  void add_product(const Parts& a, const Parts& b) {
    const int exponent = a.exponent + b.exponent;
    const bool negative = a.negative != b.negative;
    if constexpr (sizeof(T) == 4) {
      add(a.mantissa * b.mantissa, exponent, negative);
    } else {  // 53 bits as 26 and 27: four exact products
      constexpr uint64_t kHalf = (uint64_t{1} << 27) - 1;
      const uint64_t a0 = a.mantissa & kHalf, a1 = a.mantissa >> 27, b0 = b.mantissa & kHalf, b1 = b.mantissa >> 27;
      add(a0 * b0, exponent, negative);
      add(a0 * b1 + a1 * b0, exponent + 27, negative);
      add(a1 * b1, exponent + 54, negative);
    }
  }

  int carry() {  // to limbs in [0, 2^32) with a signed carry on top; returns the sign
    int64_t carry = 0;
    bool zero = true;
    for (int i = 0; i < kLimbs - 1; ++i) {
      const int64_t value = limbs_[i] + carry;
      carry = value >> 32;
      limbs_[i] = value & 0xffffffff;
      zero &= limbs_[i] == 0;
    }
    limbs_[kLimbs - 1] += carry;
    const int64_t top = limbs_[kLimbs - 1];
    return top < 0 ? -1 : top > 0 || !zero ? 1 : 0;
  }

 private:
  int64_t limbs_[kLimbs] = {};
};

template <class T>
int sign(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, T bias) {
  using Sum = Accumulator<T>;
  Sum sum;
  const Parts last = parts(bias);
  bool finite = last.finite;
  for (int64_t k = 0; k < depth; ++k) {
    const Parts a = parts(x[k * x_stride]), b = parts(w[k * w_stride]);
    finite &= a.finite && b.finite;
    if (!finite) return kNotFinite;
    if (a.mantissa && b.mantissa) sum.add_product(a, b);
    if ((k + 1) % Sum::kAdditions == 0) sum.carry();
  }
  if (!finite) return kNotFinite;
  sum.add(last.mantissa, last.exponent + Sum::kUnit, last.negative);
  const int result = sum.carry();
  // from half a unit above the largest number on, a sum rounds to infinity
  constexpr int kDigits = std::numeric_limits<T>::digits;
  constexpr int kTop = std::numeric_limits<T>::max_exponent - kDigits - 1 + 2 * Sum::kUnit;
  sum.add((uint64_t{1} << (kDigits + 1)) - 1, kTop, result > 0);
  const int beyond = sum.carry();
  return result != 0 && (beyond == 0 || beyond == result) ? kNotFinite : result;
}

}  // namespace

int exact_sign(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth, float bias) {
  return sign(x, x_stride, w, w_stride, depth, bias);
}

int exact_sign(const double* x, int64_t x_stride, const double* w, int64_t w_stride, int64_t depth, double bias) {
  return sign(x, x_stride, w, w_stride, depth, bias);
}

}  // namespace mmc
