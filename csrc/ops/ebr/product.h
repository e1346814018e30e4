// Matrix products of the EBR step per dtype, each by the way that csrc/core/ways.h names for its class. Tiles: the register tiles of
// csrc/core with their epilogue; float16 and bfloat16 are widened to float32, multiplied there and rounded once. BLAS: ATen, then
// one pass for the epilogue.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "internal.h"
#include "sgemm.h"
#include "ways.h"

namespace mmc::ebr {

// Scratch of one call: pieces of a few blocks. A Scope gives back at its end what was taken inside it. The first block belongs
// to the thread and stays, because the allocator would take longer than a small step.
class Arena {
 public:
  Arena() {
    Block& first = thread_block();
    if (first.size == 0) return;
    blocks_.push_back(std::move(first));
    first.size = 0;
    borrowed_ = true;
  }
  ~Arena() {
    if (!borrowed_ && (blocks_.empty() || blocks_[0].size > kThreadBlock)) return;
    Block& first = thread_block();
    if (first.size == 0) first = std::move(blocks_[0]);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ~Scope() { arena_.block_ = block_, arena_.used_ = used_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Arena& arena_;
    size_t block_;
    int64_t used_;
  };

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(T)), 64);
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) ++block_, used_ = 0;
    if (block_ == blocks_.size()) {
      const int64_t size = std::max(bytes, kThreadBlock);
      blocks_.push_back(Block{Buffer<char>(size), size});
      used_ = 0;
    }
    char* piece = blocks_[block_].bytes.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(piece);
  }

 private:
  static constexpr int64_t kThreadBlock = 256 * 1024;
  struct Block {
    Buffer<char> bytes;
    int64_t size = 0;
  };
  static Block& thread_block() {
    thread_local Block block;
    return block;
  }
  std::vector<Block> blocks_;
  bool borrowed_ = false;
  size_t block_ = 0;
  int64_t used_ = 0;
};

// A matrix; element (i, j) at data + i * row + j * col.
template <class T>
struct View {
  const T* data;
  int64_t row, col;
};
template <class T>
View<T> dense(const T* data, int64_t columns) {
  return {data, columns, 1};
}
template <class T>
View<T> transposed(const T* data, int64_t columns) {
  return {data, 1, columns};
}

// As Epilogue of csrc/core/sgemm.h, in T. The gate has the shape of the result and is dense.
template <class T>
struct Finish {
  const T* bias = nullptr;
  const T* gate = nullptr;
  float scale = 1;
  bool relu = false;
  bool add = false;
};

// Threads and the ways to multiply on them.
struct Workers : Pool {
  Ways ways[kNumbers];
};
Pool torch_pool();

// c [m, n], dense = finish(a [m, k] times b [k, n]); row_sums [m], if given, takes the sums of a's rows along k.
void product(int64_t m, int64_t n, int64_t k, View<float> a, View<float> b, float* c, const Finish<float>& finish,
             float* row_sums, const Workers& workers);
template <class T>
void product(int64_t m, int64_t n, int64_t k, View<T> a, View<T> b, T* c, const Finish<T>& finish, T* row_sums,
             const Workers& workers);

template <class T>
void widen(const T* src, float* dst, int64_t count, const Pool& pool);
template <class T>
void narrow(const float* src, T* dst, int64_t count, const Pool& pool);

// src in float32: itself, or a copy in the arena
inline const float* widened(const float* src, int64_t, Arena&, const Pool&) { return src; }
template <class T>
const float* widened(const T* src, int64_t count, Arena& arena, const Pool& pool) {
  float* out = arena.take<float>(count);
  widen(src, out, count, pool);
  return out;
}

}  // namespace mmc::ebr
