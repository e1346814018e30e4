// The bits of a float32. For instruction-set units too: static, so the linker never takes one unit's copy for another's.
#pragma once
#include <cstdint>

namespace mmc {

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace mmc
