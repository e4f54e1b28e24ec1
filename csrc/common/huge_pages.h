// Memory in pages of 2 MB: large fresh results cost more in page faults than in arithmetic.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace kdfast {

// Asks for them over 4 MB: less may be reused heap memory, and loses little. Only a hint: its failure changes no
// result.
inline void ask_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t first = (uintptr_t(data) + kHuge - 1) & ~(kHuge - 1), last = (uintptr_t(data) + bytes) & ~(kHuge - 1);
  if (bytes >= 2 * kHuge && first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace kdfast
