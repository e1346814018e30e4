// Which instruction set runs: the best that the processor has, or the one that is forced.
#include "internal.h"
#ifdef MMC_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mmc {
namespace {

struct Level {
  const char* name;
  const KernelTable& table;
  const MatrixTiles* tiles = nullptr;
};

const Level kLevels[] = {
    {"amx_emulated", base::table, &amx_emulated::tiles},
    {"base", base::table},
#ifdef MMC_X86
    {"avx2", avx2::table},
    {"avx512", avx512::table},
    {"avx512_vpopcntdq", avx512_vpopcntdq::table},
#endif
#ifdef MMC_AMX
    {"amx", avx512_vpopcntdq::table, &amx::tiles},
#endif
};
constexpr int kCount = sizeof(kLevels) / sizeof(kLevels[0]), kBase = 1;
const char* const kPrimitiveNames[kPrimitives] = {"relu_coactivation_update", "derivative_gram_update", "syrk_update",
                                                  "agop_finalise", "ebr_step", "ebr_step_backward"};

std::atomic<int> current{-1};
std::atomic<int64_t> calls[kPrimitives][kCount];

#ifdef MMC_AMX
// Tiles are part of the state of a process only where its kernel grants that. An emulator's are right and slow.
bool ask_for_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __cpuid(0x40000000, a, b, c, d);
  const bool emulated = b == 0x54474354;  // "TCGT", qemu
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return !emulated && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool supported(int index) {
#ifdef MMC_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (index) {
    case 2: return has_avx2;
    case 3: return has_avx512;
    case 4: return has_avx512 && __builtin_cpu_supports("avx512vpopcntdq");
#ifdef MMC_AMX
    case 5: {
      static const bool has_tiles = has_avx512 && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("amx-tile") &&
                                    __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("amx-int8") && ask_for_tiles();
      return has_tiles;
    }
#endif
  }
#endif
  return index <= kBase;
}

int best() {  // matrix tiles have never run on hardware: they are asked for by name
  int index = kCount - 1;
  while (kLevels[index].tiles || !supported(index)) --index;
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
  for (const auto& level : kLevels) names.push_back(level.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kCount; ++i)
    if (supported(i)) names.push_back(kLevels[i].name);
  return names;
}

std::string select_isa(const char* name) {
  if (!name || !*name) {
    current.store(best());
    return "";
  }
  for (int i = 0; i < kCount; ++i) {
    if (std::string(kLevels[i].name) != name) continue;
    if (!supported(i))
      return "this processor has no " + std::string(name) + "; it can run: " + join(supported_isas());
    current.store(i);
    return "";
  }
  return "unknown instruction set '" + std::string(name) + "'; this build has: " + join(compiled_isas());
}

const char* current_isa() { return kLevels[current_index()].name; }

const KernelTable& kernels(Primitive primitive) {
  const int index = current_index();
  calls[primitive][index].fetch_add(1, std::memory_order_relaxed);
  return kLevels[index].table;
}

const KernelTable& current_kernels() { return kLevels[current_index()].table; }

const MatrixTiles* current_tiles() { return kLevels[current_index()].tiles; }

int64_t split_depth() { return current_tiles() ? current_tiles()->least_depth : 0; }

std::vector<Count> dispatch_counts() {
  std::vector<Count> out;
  for (int p = 0; p < kPrimitives; ++p)
    for (int i = 0; i < kCount; ++i)
      if (const int64_t n = calls[p][i].load()) out.push_back({std::string(kPrimitiveNames[p]) + "/" + kLevels[i].name, n});
  return out;
}

void reset_dispatch_counts() {
  for (auto& row : calls)
    for (auto& count : row) count.store(0);
}

}  // namespace mmc
