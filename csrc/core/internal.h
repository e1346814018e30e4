// Shared by the drivers, which are compiled without instruction-set flags.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "core.h"
#include "matrix_tiles.h"

namespace mmc {

enum Primitive : int { kCoactivation, kDerivativeGram, kSyrk, kFinalise, kEbrStep, kEbrStepBackward, kPrimitives };

const KernelTable& kernels(Primitive primitive);  // the current table; counts the call
const KernelTable& current_kernels();             // the current table, for parts of a call that was counted
const MatrixTiles* current_tiles();                // null where the current instruction set has none

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// 64-byte aligned, uninitialised; padded so that a full vector past the end may be touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : data_(static_cast<T*>(std::aligned_alloc(64, round_up(size * sizeof(T) + 64, 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
};

template <class F>
void parallel_for(const Pool& pool, int64_t end, int64_t grain, F&& body) {
  if (end <= 0) return;
  auto call = [](void* context, int64_t b, int64_t e) { (*static_cast<std::remove_reference_t<F>*>(context))(b, e); };
  if (pool.threads <= 1 || end <= grain) {
    body(int64_t{0}, end);
  } else {
    pool.run(0, end, grain, call, &body);
  }
}

// Scratch that is allocated once and handed to whichever thread asks: at most `threads` hold a piece at a time.
template <class T>
class Scratch {
 public:
  Scratch(int pieces, int64_t size) : size_(size), buffer_(pieces * round_up(size, 64)), pieces_(pieces) {}
  void reset() { next_.store(0); }
  T* take() {
    const int piece = next_.fetch_add(1);
    if (piece < pieces_) return buffer_.get() + piece * round_up(size_, 64);
    return nullptr;
  }

 private:
  int64_t size_;
  Buffer<T> buffer_;
  int pieces_;
  std::atomic<int> next_{0};
};

// Panels of a matrix for the register tiles.
//   lanes or rows panel p: out + p * depth * width, laid out [depth][width], zero beyond `count`
struct Panels {
  const float* src;
  int64_t stride_k, stride_l, depth, count, width;
  int64_t panels() const { return ceil_div(count, width); }
  int64_t size() const { return panels() * depth * width; }
};
void pack_panels(const KernelTable& table, const Panels& panels, float* out, const Pool& pool);

}  // namespace mmc
