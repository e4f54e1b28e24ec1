#include "cpu/variant.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "host/build_info.h"

namespace kdfast {
namespace {

struct Candidate {
  Variant variant;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_bf16() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16"); }

// Here a dot product of bfloat16 takes as long as four multiply-adds of float32, of which two do the same.
bool has_slow_dots() { return has_bf16() && __builtin_cpu_is("intel") && !__builtin_cpu_is("cooperlake"); }

// Tiles of AMX are larger than what the system saves of a thread unless a process asks for it, once.
bool has_amx() {
#if defined(__linux__)
  constexpr int kAskPermission = 0x1023, kTileData = 18;
  static const bool allowed =
      has_bf16() && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

// The best that runs here is last.
const Candidate kCandidates[] = {
    {{"portable", &portable::kKernels, false, false}, [] { return true; }},
#if defined(__x86_64__)
    {{"avx2", &avx2::kKernels, false, false},
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {{"avx512", &avx512::kKernels, true, false},
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {{"avx512_bf16", &avx512_bf16::kPairKernels, true, true}, has_bf16},
    {{"avx512_bf16_fma", &avx512_bf16::kKernels, true, false}, has_slow_dots},
    {{"amx", &avx512_bf16::kAmxKernels, true, true}, has_amx},
#endif
};

const Variant& find(const std::string& name) {
  std::string known;
  for (const Candidate& c : kCandidates) {
    if (!c.runs_here()) continue;
    if (name == c.variant.name) return c.variant;
    known += known.empty() ? c.variant.name : std::string(", ") + c.variant.name;
  }
  throw std::invalid_argument("kdfast: CPU variant: expected one that this processor runs (" + known + "), got '" +
                              name + "'");
}

std::atomic<const Variant*> chosen{nullptr};

}  // namespace

std::vector<std::string> cpu_variants() {
  std::vector<std::string> names;
  for (const Candidate& c : kCandidates) {
    if (c.runs_here()) names.push_back(c.variant.name);
  }
  return names;
}

void set_cpu_variant(const std::string& name) { chosen = &find(name); }

std::string cpu_variant_name() { return cpu_variant().name; }

// MKL, which is torch's library for float32, takes its AVX-512 kernels on Intel's processors alone: on others half of
// their speed is left. No library multiplies bfloat16 into float32 here, and to widen it first takes four times as
// long.
bool own_products([[maybe_unused]] bool bf16) {
#if defined(__x86_64__)
  static const bool slow_vendor = !__builtin_cpu_is("intel");
  return (cpu_variant().avx512 && slow_vendor) || (bf16 && cpu_variant().bf16);
#else
  return false;
#endif
}

void vector_exp2(const float* x, float* y, int64_t count) { cpu_variant().kernels->exp2(x, y, count); }

void vector_log2(const float* x, float* y, int64_t count) { cpu_variant().kernels->log2(x, y, count); }

const Variant& cpu_variant() {
  if (!chosen) {
    const char* forced = std::getenv("KDFAST_CPU_VARIANT");
    set_cpu_variant(forced ? forced : cpu_variants().back());
  }
  return *chosen;
}

}  // namespace kdfast
