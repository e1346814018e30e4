// Co-activation counts on packed signs: kernels without torch, for nvcc and, through csrc/test/cuda_emulation.h, for a
// host compiler. Integers throughout: results do not depend on the order of blocks.
#pragma once
#include <stdint.h>

#ifdef MMC_EMULATED
#include "cuda_emulation.h"
#else
#define MMC_SHARED(type, name, count) __shared__ type name[count]
#define MMC_SYNC() __syncthreads()
#endif

namespace mmc_cuda {

constexpr int kTile = 64;           // units per side of a block's tile
constexpr int kThreads = 128;       // four warps, each a quarter of 32 x 32 units
constexpr int kStep = 32;           // words of each unit in shared memory at a time
constexpr int kPitch = kStep + 1;   // rows of shared memory start in different banks
constexpr int kPackWords = 4;       // words that one thread of the packing kernel makes

// Bits 4 q .. 4 q + 3 of a word as four bytes of 0 or 1: the operand layout of an int8 matrix instruction.
__device__ inline uint32_t spread_nibble(uint32_t word, int q) {
  return (((word >> (4 * q)) & 0xfu) * 0x00204081u) & 0x01010101u;
}

#ifndef MMC_EMULATED
// d [16, 8] += a [16, 32] b [32, 8], int8 into int32; lane 4 g + t holds of a: rows g (registers 0, 2) and g + 8 (1, 3),
// columns 4 t .. 4 t + 3 (0, 1) and 16 more (2, 3); of b: column g, rows as the columns of a; of d: rows g, g, g + 8, g + 8,
// columns 2 t, 2 t + 1 in turn.
__device__ inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Tile (i, j), i <= j, number t of the upper triangle, columns in order.
__device__ inline void upper_tile(int t, int& i, int& j) {
  j = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) * 0.5f);
  while ((j + 1) * (j + 2) / 2 <= t) ++j;  // the square root is rounded
  while (j * (j + 1) / 2 > t) --j;
  i = t - j * (j + 1) / 2;
}

// Words [first, first + kStep) of the units of one tile into shared memory, zeros outside.
__device__ inline void load_tile(const uint32_t* words, int64_t units, int64_t pitch, int64_t unit0, int64_t first, int64_t end,
                                 uint32_t* tile) {
  for (int at = threadIdx.x; at < kTile * kStep; at += kThreads) {
    const int64_t unit = unit0 + at / kStep, word = first + at % kStep;
    tile[(at / kStep) * kPitch + at % kStep] = unit < units && word < end ? words[unit * pitch + word] : 0u;
  }
}

// What a block works on: first units of its two sides, and its words.
struct Part {
  int64_t i0, j0, begin, end;
};

__device__ inline Part part_of_block(int64_t words_per_unit, int64_t split) {
  int ti, tj;
  upper_tile(blockIdx.x, ti, tj);
  const int64_t begin = blockIdx.y * split, end = begin + split;
  return {int64_t{ti} * kTile, int64_t{tj} * kTile, begin, end < words_per_unit ? end : words_per_unit};
}

// One entry of the result: the upper triangle alone, by an atomic because the words may be split over blocks.
__device__ inline void add_count(int64_t* counts, int64_t ld, int64_t units, int64_t row, int64_t col, int value) {
  if (row <= col && col < units)
    atomicAdd(reinterpret_cast<unsigned long long*>(counts + row * ld + col), static_cast<unsigned long long>(value));
}

// grid: (tiles of the upper triangle, splits of the words), block: kThreads. At most 2^25 words of a unit in a launch.
__global__ void __launch_bounds__(kThreads) coactivation_mma(const uint32_t* words, int64_t units, int64_t words_per_unit,
                                                             int64_t split, int64_t* counts, int64_t ld) {
  MMC_SHARED(uint32_t, left, kTile * kPitch);
  MMC_SHARED(uint32_t, right, kTile * kPitch);
  const Part part = part_of_block(words_per_unit, split);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4, row0 = (warp / 2) * 32, col0 = (warp % 2) * 32;
  int acc[2][4][4] = {};
  for (int64_t first = part.begin; first < part.end; first += kStep) {
    load_tile(words, units, words_per_unit, part.i0, first, part.end, left);
    load_tile(words, units, words_per_unit, part.j0, first, part.end, right);
    MMC_SYNC();
    for (int w = 0; w < kStep; ++w) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t low = left[(row0 + 16 * m + g) * kPitch + w], high = left[(row0 + 16 * m + g + 8) * kPitch + w];
        a[m][0] = spread_nibble(low, t), a[m][1] = spread_nibble(high, t);
        a[m][2] = spread_nibble(low, t + 4), a[m][3] = spread_nibble(high, t + 4);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t word = right[(col0 + 8 * n + g) * kPitch + w];
        const uint32_t b[2] = {spread_nibble(word, t), spread_nibble(word, t + 4)};
        mma_s8(acc[0][n], a[0], b);
        mma_s8(acc[1][n], a[1], b);
      }
    }
    MMC_SYNC();
  }
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        add_count(counts, ld, units, part.i0 + row0 + 16 * m + g + 8 * (e / 2), part.j0 + col0 + 8 * n + 2 * t + e % 2,
                  acc[m][n][e]);
}

// The same with popcounts: each thread an 8 x 4 block of pairs. grid and block as above.
__global__ void __launch_bounds__(kThreads) coactivation_plain(const uint32_t* words, int64_t units, int64_t words_per_unit,
                                                               int64_t split, int64_t* counts, int64_t ld) {
  MMC_SHARED(uint32_t, left, kTile * kPitch);
  MMC_SHARED(uint32_t, right, kTile * kPitch);
  const Part part = part_of_block(words_per_unit, split);
  const int r = threadIdx.x / 16, c = threadIdx.x % 16;
  int acc[8][4] = {};
  for (int64_t first = part.begin; first < part.end; first += kStep) {
    load_tile(words, units, words_per_unit, part.i0, first, part.end, left);
    load_tile(words, units, words_per_unit, part.j0, first, part.end, right);
    MMC_SYNC();
    for (int w = 0; w < kStep; ++w) {
      uint32_t a[8], b[4];
#pragma unroll
      for (int p = 0; p < 8; ++p) a[p] = left[(r + 8 * p) * kPitch + w];
#pragma unroll
      for (int q = 0; q < 4; ++q) b[q] = right[(c + 16 * q) * kPitch + w];
#pragma unroll
      for (int p = 0; p < 8; ++p)
#pragma unroll
        for (int q = 0; q < 4; ++q) acc[p][q] += __popc(a[p] & b[q]);
    }
    MMC_SYNC();
  }
#pragma unroll
  for (int p = 0; p < 8; ++p)
#pragma unroll
    for (int q = 0; q < 4; ++q) add_count(counts, ld, units, part.i0 + r + 8 * p, part.j0 + c + 16 * q, acc[p][q]);
}

// Sign and finiteness from the bits of a value, which every dtype shares: positive is not zero, not NaN, not negative.
template <int kBits, int kExponent>
__device__ inline bool positive(uint32_t bits, bool& bad) {
  constexpr uint32_t kMantissa = kBits - 1 - kExponent;
  constexpr uint32_t kInfinity = ((1u << kExponent) - 1) << kMantissa;
  const uint32_t size = bits & ((1u << (kBits - 1)) - 1);
  bad = size >= kInfinity;
  return size != 0 && size <= kInfinity && (bits >> (kBits - 1)) == 0;
}

// grid: (units / kThreads, words / kPackWords), block: kThreads, each thread kPackWords words of one unit.
template <class Bits, int kBits, int kExponent>
__global__ void __launch_bounds__(kThreads) pack_signs(const Bits* z, int64_t samples, int64_t units, int64_t stride_n,
                                                       int64_t stride_u, uint32_t* words, int64_t words_per_unit,
                                                       int64_t* nonfinite) {
  const int64_t unit = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (unit >= units) return;
  int wrong = 0;
  const int64_t stride = int64_t{gridDim.y} * kPackWords;
  for (int64_t first = int64_t{blockIdx.y} * kPackWords; first < words_per_unit; first += stride) {
    for (int k = 0; k < kPackWords; ++k) {
      uint32_t word = 0;
      const int64_t n0 = (first + k) * 32;
#pragma unroll 8
      for (int b = 0; b < 32; ++b) {
        if (n0 + b >= samples) break;
        bool bad;
        word |= static_cast<uint32_t>(positive<kBits, kExponent>(z[(n0 + b) * stride_n + unit * stride_u], bad)) << b;
        wrong += bad;
      }
      words[unit * words_per_unit + first + k] = word;
    }
  }
  if (wrong) atomicAdd(reinterpret_cast<unsigned long long*>(nonfinite), static_cast<unsigned long long>(wrong));
}

}  // namespace mmc_cuda
