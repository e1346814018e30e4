// The AMX instructions that amx.cpp uses, as Intel's manual defines them, in plain C++: for tests on any machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace mmc {
namespace amx_emulated {
namespace {

struct Registers {
  unsigned char tile[8][1024];
};
thread_local Registers registers;

inline void _tile_loadconfig(const void*) { std::memset(&registers, 0xff, sizeof(registers)); }
inline void _tile_release() {}
inline void _tile_zero(int t) { std::memset(registers.tile[t], 0, 1024); }
inline void _tile_loadd(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(registers.tile[t] + 64 * r, static_cast<const char*>(from) + r * stride, 64);
}
inline void _tile_stored(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, registers.tile[t] + 64 * r, 64);
}

inline float flushed(uint32_t bits) {  // subnormal numbers count as zero
  if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float flushed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return flushed(bits);
}

inline void _tile_dpbf16ps(int c, int a, int b) {
  for (int m = 0; m < 16; ++m) {
    float sums[16] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n)
        for (int half = 0; half < 2; ++half) {
          uint16_t left, right;
          std::memcpy(&left, registers.tile[a] + 64 * m + 4 * k + 2 * half, 2);
          std::memcpy(&right, registers.tile[b] + 64 * k + 4 * n + 2 * half, 2);
          sums[n] = flushed(std::fma(flushed(uint32_t{left} << 16), flushed(uint32_t{right} << 16), sums[n]));
        }
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, registers.tile[c] + 64 * m + 4 * n, 4);
      sum = flushed(flushed(sum) + sums[n]);
      std::memcpy(registers.tile[c] + 64 * m + 4 * n, &sum, 4);
    }
  }
}

inline void _tile_dpbuud(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t sum;
      std::memcpy(&sum, registers.tile[c] + 64 * m + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int q = 0; q < 4; ++q)
          sum += uint32_t{registers.tile[a][64 * m + 4 * k + q]} * registers.tile[b][64 * k + 4 * n + q];
      std::memcpy(registers.tile[c] + 64 * m + 4 * n, &sum, 4);
    }
}

}  // namespace
}  // namespace amx_emulated
}  // namespace mmc
