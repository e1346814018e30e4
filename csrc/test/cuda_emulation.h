// CUDA kernels on the CPU, for tests of their arithmetic: one fibre per CUDA thread, blocks one after another.
// Ends the process with one line where threads of a block or warp wait at different places (divergence) or for ever.
// Shared memory is garbage at the start of a block. With a seed, threads and blocks run in a random order between barriers,
// and one warp runs as far ahead of the others as barriers let it, so that a missing one shows as wrong numbers. Not
// modelled: time, caches, memory order between blocks.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 thread;
  int rank;
  State state;
  int site;  // line of the barrier it waits at
};

struct Machine {
  dim3 grid, block;
  uint3 block_index;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<std::vector<uint32_t>> exchange;  // per warp: what its lanes published
  std::map<int, std::vector<char>> shared;      // per declaring line
  Fibre* running = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  bool shuffle = false;
  std::mt19937 random;
  long launches = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulation: %s (block %u %u)\n", what, machine.block_index.x, machine.block_index.y);
  exit(70);
}

inline void wait(State state, int site) {
  machine.running->state = state;
  machine.running->site = site;
  swapcontext(&machine.running->context, &machine.scheduler);
}

inline void enter() {
  machine.body();
  machine.running->state = State::done;
}

// Wakes a group whose live fibres all wait at one barrier; returns whether it did.
inline bool release(size_t begin, size_t end, State barrier, const char* divergence) {
  size_t waiting = 0, live = 0;
  int site = -1;
  bool same = true;
  for (size_t i = begin; i < end; ++i) {
    const Fibre& fibre = *machine.fibres[i];
    if (fibre.state == State::done) continue;
    ++live;
    if (fibre.state != barrier) continue;
    same = same && (site < 0 || site == fibre.site);
    site = fibre.site;
    ++waiting;
  }
  if (waiting == 0 || waiting != live) return false;
  if (!same) fail(divergence);
  // a fibre that ended while others wait has left the barrier out
  if (live != end - begin) fail(divergence);
  for (size_t i = begin; i < end; ++i) machine.fibres[i]->state = State::ready;
  return true;
}

// Runs what is ready of one warp and wakes it where all its lanes wait for each other; returns whether anything moved.
inline bool run_warp(size_t warp, bool& live) {
  const size_t begin = warp * kWarp, end = std::min(machine.fibres.size(), begin + kWarp);
  std::vector<size_t> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  if (machine.shuffle) std::shuffle(order.begin(), order.end(), machine.random);
  bool moved = false;
  for (const size_t i : order) {
    Fibre& fibre = *machine.fibres[i];
    if (fibre.state == State::ready) {
      machine.running = &fibre;
      swapcontext(&machine.scheduler, &fibre.context);
      moved = true;
    }
    live = live || fibre.state != State::done;
  }
  return release(begin, end, State::at_warp_barrier, "lanes of a warp diverge") || moved;
}

inline void run_block() {
  const size_t threads = machine.fibres.size();
  for (auto& item : machine.shared) std::fill(item.second.begin(), item.second.end(), static_cast<char>(0xa5));
  for (auto& owned : machine.fibres) {
    Fibre& fibre = *owned;
    fibre.state = State::ready;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &machine.scheduler;
    makecontext(&fibre.context, enter, 0);
  }
  std::vector<size_t> warps((threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), size_t{0});
  for (;;) {
    if (machine.shuffle) std::shuffle(warps.begin(), warps.end(), machine.random);
    bool moved = true, live = false;
    while (moved) {  // the first warp that can still move goes ahead, until all wait for the block
      moved = live = false;
      for (const size_t warp : warps)
        if (run_warp(warp, live)) {
          moved = true;
          break;
        }
    }
    if (!live) return;
    if (!release(0, threads, State::at_block_barrier, "threads of a block diverge at a barrier"))
      fail("deadlock: some threads wait at a barrier that others never reach");
  }
}

inline void seed(unsigned value) {
  machine.shuffle = true;
  machine.random.seed(value);
}

template <class Kernel, class... Arguments>
int launch(Kernel kernel, dim3 grid, unsigned threads, Arguments... arguments) {
  machine.grid = grid;
  machine.block = dim3(threads);
  machine.body = [=] { kernel(arguments...); };
  machine.exchange.assign((threads + kWarp - 1) / kWarp, std::vector<uint32_t>(kWarp * 8));
  machine.shared.clear();
  machine.fibres.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    if (!machine.fibres[i]) machine.fibres[i] = std::make_unique<Fibre>();
    machine.fibres[i]->thread = {i, 0, 0};
    machine.fibres[i]->rank = static_cast<int>(i);
  }
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (machine.shuffle) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  for (const unsigned block : blocks) {
    machine.block_index = {block % grid.x, block / grid.x, 0};
    run_block();
  }
  ++machine.launches;
  return 0;
}

template <class T>
T* shared(int line, size_t count) {
  std::vector<char>& bytes = machine.shared[line];
  if (bytes.empty()) bytes.assign(count * sizeof(T), static_cast<char>(0xa5));
  return reinterpret_cast<T*>(bytes.data());
}

// mma.sync.m16n8k32 row.col s32.s8.s8.s32 by its definition: every lane publishes its fragments, then each computes its four
// results from whichever lanes hold the operands (PTX ISA, matrix fragments for mma.m16n8k32).
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int site) {
  Fibre& me = *machine.running;
  const int lane = me.rank % kWarp;
  std::vector<uint32_t>& slots = machine.exchange[me.rank / kWarp];
  std::copy(a, a + 4, &slots[lane * 8]);
  std::copy(b, b + 2, &slots[lane * 8 + 4]);
  wait(State::at_warp_barrier, site);
  const auto byte = [&](int from, int reg, int index) {
    return static_cast<int>(static_cast<int8_t>(slots[from * 8 + reg] >> (8 * index)));
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + 8 * (e / 2), column = 2 * (lane % 4) + e % 2;
    for (int k = 0; k < 32; ++k) {
      const int within = (k % 16) / 4;  // the lane of its group of four that holds this k
      const int left = byte((row % 8) * 4 + within, row / 8 + 2 * (k / 16), k % 4);
      const int right = byte(column * 4 + within, 4 + k / 16, k % 4);
      d[e] += left * right;
    }
  }
  wait(State::at_warp_barrier, -site);  // nobody publishes anew before all have read
}

}  // namespace emulation

#define threadIdx (::emulation::machine.running->thread)
#define blockIdx (::emulation::machine.block_index)
#define blockDim (::emulation::machine.block)
#define gridDim (::emulation::machine.grid)
#define MMC_SHARED(type, name, count) type* const name = ::emulation::shared<type>(__LINE__, count)
#define MMC_SYNC() ::emulation::wait(::emulation::State::at_block_barrier, __LINE__)
#define mma_s8(d, a, b) ::emulation::mma_s8(d, a, b, __LINE__)
#define MMC_LAUNCH(kernel, grid, stream, ...) \
  ((void)(stream), ::emulation::launch(kernel, grid, mmc_cuda::kThreads, __VA_ARGS__))

inline int __popc(uint32_t word) { return __builtin_popcount(word); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  const unsigned long long before = *at;
  *at = before + value;
  return before;
}
