// How long a product of the EBR step takes by each way, with the epilogue that such a product has in a step: what mmc_fast chooses by.
#include <ATen/core/grad_mode.h>
#include <c10/util/BFloat16.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <chrono>
#include <ctime>

#include "product.h"

namespace mmc::ebr {
namespace {

constexpr double kSample = 4e-5;  // seconds that a sample takes at least
constexpr int kSamples = 3;       // of which the best counts

void run_in_torch(int64_t begin, int64_t end, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  struct Call {
    void (*body)(void*, int64_t, int64_t);
    void* context;
  } call{body, context};
  const auto forward = [](int64_t b, int64_t e, void* c) {
    const Call* inner = static_cast<Call*>(c);
    inner->body(inner->context, b, e);
  };
  TORCH_CHECK(torch_parallel_for(begin, end, grain, forward, &call) == 0, "ebr_step: torch's thread pool failed");
}

// One thread: its own time, which no neighbour adds to. Several: the clock on the wall.
double seconds(bool own) {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  if (own) {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  }
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
double time_product(Order order, int64_t m, int64_t n, int64_t k, Workers workers) {
  Arena arena;
  const auto filled = [&](int64_t count) {
    T* out = arena.take<T>(count);
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<float>((i & 31) - 16) / 16.0f);
    return out;
  };
  const T *a = filled(m * k), *b = filled(k * n), *bias = filled(n), *gate = filled(m * n);
  T *c = filled(m * n), *sums = filled(m);
  Finish<T> finish;
  if (order == Order::forward) finish.bias = bias, finish.relu = true;
  if (order == Order::input_gradient) finish.gate = gate;
  const bool across = order == Order::weight_gradient;
  const auto run = [&] {
    product(m, n, k, across ? transposed(a, m) : dense(a, k), order == Order::forward ? transposed(b, k) : dense(b, n), c, finish,
            across ? sums : nullptr, workers);
  };
  const auto sample = [&](int64_t repeats) {
    const double start = seconds(workers.threads == 1);
    for (int64_t i = 0; i < repeats; ++i) run();
    return (seconds(workers.threads == 1) - start) / static_cast<double>(repeats);
  };
  run();
  double best = sample(1);
  const auto repeats = std::clamp<int64_t>(static_cast<int64_t>(kSample / std::max(best, 1e-9)), 1, 1000);
  for (int i = 0; i < kSamples; ++i) best = std::min(best, sample(repeats));
  return best;
}

double timed(Number number, Order order, int64_t m, int64_t n, int64_t k, bool blas) {
  const at::NoGradGuard guard;
  const Pool pool = torch_pool();
  if (number == Number::float32)
    return time_product<float>(order, m, n, k, Workers{pool, {blas ? ~Ways{0} : Ways{0}, 0}});
  const Ways wide = has_ways(Number::float32, pool.threads) ? ways(Number::float32, pool.threads, false) : Ways{0};
  return time_product<c10::BFloat16>(order, m, n, k, Workers{pool, {wide, blas ? ~Ways{0} : Ways{0}}});
}

[[maybe_unused]] const bool registered = (set_product_timer(timed), true);

}  // namespace

Pool torch_pool() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {run_in_torch, static_cast<int>(threads)};
}

}  // namespace mmc::ebr
