#include "ways.h"

#include <algorithm>
#include <atomic>

namespace mmc {
namespace {

constexpr int64_t kNarrow = 16;
constexpr int kMostThreads = 512;  // more share a slot

struct Slot {
  std::atomic<bool> known{false};
  std::atomic<Ways> blas{0};
};
Slot slots[kNumbers][kMostThreads];

constexpr const char* kPins[] = {"auto", "tiles", "blas"};
std::atomic<int> pin{0};
std::atomic<void (*)(Number, int)> source{nullptr};
std::atomic<ProductTimer> timer{nullptr};

Slot& slot(Number number, int threads) {
  return slots[static_cast<int>(number)][std::clamp(threads, 1, kMostThreads) - 1];
}

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") || __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace

int product_class(Order order, int64_t m, int64_t n, int64_t k) {
  const int64_t least = std::min({m, n, k});
  const int narrow = least >= kNarrow ? 0 : least == m ? 1 : least == n ? 2 : 3;
  const double flops = 2.0 * m * n * k;
  const int size = flops < 0x1p18 ? 0 : flops < 0x1p22 ? 1 : flops < 0x1p26 ? 2 : 3;
  return (static_cast<int>(order) * 4 + narrow) * 4 + size;
}

Ways fixed_ways(Number number) {
  if (number == Number::float32) return 0;
  static const bool fast = multiplies_bfloat16();
  Ways large = 0;
  for (int c = 0; c < kProductClasses; ++c)
    if (c % 4 >= 2) large |= Ways{1} << c;
  return fast ? large : 0;
}

Ways ways(Number number, int threads, bool fixed) {
  const int pinned = pin.load(std::memory_order_relaxed);
  if (pinned) return pinned == 1 ? Ways{0} : ~Ways{0};
  if (fixed) return fixed_ways(number);
  Slot& here = slot(number, threads);
  if (!here.known.load(std::memory_order_acquire)) {
    if (const auto ask = source.load()) ask(number, threads);
    if (!here.known.load(std::memory_order_acquire)) return fixed_ways(number);
  }
  return here.blas.load(std::memory_order_relaxed);
}

void set_ways(Number number, int threads, Ways measured) {
  Slot& here = slot(number, threads);
  here.blas.store(measured, std::memory_order_relaxed);
  here.known.store(true, std::memory_order_release);
}

void forget_ways() {
  for (auto& row : slots)
    for (auto& s : row) s.known.store(false);
}

bool has_ways(Number number, int threads) { return slot(number, threads).known.load(); }

std::string pin_ways(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name != kPins[i]) continue;
    pin.store(i);
    return "";
  }
  return "unknown way to multiply '" + name + "'; allowed are auto, tiles and blas";
}

const char* pinned_ways() { return kPins[pin.load()]; }

void set_ways_source(void (*given)(Number, int)) { source.store(given); }
void set_product_timer(ProductTimer given) { timer.store(given); }
ProductTimer product_timer() { return timer.load(); }

}  // namespace mmc
