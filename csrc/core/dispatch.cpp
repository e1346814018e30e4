// Which instruction set runs: the best that the processor has, or the one that is forced.
#include "internal.h"

namespace mmc {
namespace {

const KernelTable* const kTables[] = {
    &base::table,
#ifdef MMC_X86
    &avx2::table,
    &avx512::table,
    &avx512_vpopcntdq::table,
#endif
};
constexpr int kCount = sizeof(kTables) / sizeof(kTables[0]);
const char* const kPrimitiveNames[kPrimitives] = {"relu_coactivation_update", "derivative_gram_update", "syrk_update",
                                                  "agop_finalise", "ebr_step", "ebr_step_backward"};

std::atomic<int> current{-1};
std::atomic<int64_t> calls[kPrimitives][kCount];

bool supported(int index) {
#ifdef MMC_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (index) {
    case 1: return has_avx2;
    case 2: return has_avx512;
    case 3: return has_avx512 && __builtin_cpu_supports("avx512vpopcntdq");
  }
#endif
  return index == 0;
}

int best() {
  int index = kCount - 1;
  while (!supported(index)) --index;
  return index;
}

int current_index() {
  int index = current.load(std::memory_order_relaxed);
  if (index < 0) {
    index = best();
    current.store(index);
  }
  return index;
}

std::string join(const std::vector<std::string>& names) {
  std::string out;
  for (const auto& name : names) out += (out.empty() ? "" : ", ") + name;
  return out;
}

void run_serially(int64_t begin, int64_t end, int64_t, void (*body)(void*, int64_t, int64_t), void* context) {
  body(context, begin, end);
}

}  // namespace

Pool serial_pool() { return {run_serially, 1}; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const auto* table : kTables) names.push_back(table->name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kCount; ++i)
    if (supported(i)) names.push_back(kTables[i]->name);
  return names;
}

std::string select_isa(const char* name) {
  if (!name || !*name) {
    current.store(best());
    return "";
  }
  for (int i = 0; i < kCount; ++i) {
    if (std::string(kTables[i]->name) != name) continue;
    if (!supported(i))
      return "this processor has no " + std::string(name) + "; it can run: " + join(supported_isas());
    current.store(i);
    return "";
  }
  return "unknown instruction set '" + std::string(name) + "'; this build has: " + join(compiled_isas());
}

const char* current_isa() { return kTables[current_index()]->name; }

const KernelTable& kernels(Primitive primitive) {
  const int index = current_index();
  calls[primitive][index].fetch_add(1, std::memory_order_relaxed);
  return *kTables[index];
}

const KernelTable& current_kernels() { return *kTables[current_index()]; }

std::vector<Count> dispatch_counts() {
  std::vector<Count> out;
  for (int p = 0; p < kPrimitives; ++p)
    for (int i = 0; i < kCount; ++i)
      if (const int64_t n = calls[p][i].load()) out.push_back({std::string(kPrimitiveNames[p]) + "/" + kTables[i]->name, n});
  return out;
}

void reset_dispatch_counts() {
  for (auto& row : calls)
    for (auto& count : row) count.store(0);
}

}  // namespace mmc
