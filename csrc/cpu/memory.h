// Large fresh outputs cost more in page faults than in arithmetic: ask for huge pages.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdfast {

// Over 4 MB (smaller ones may be reused heap memory, and lose little). Only a hint: its failure changes no result.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t first = (uintptr_t(data) + kHuge - 1) & ~(kHuge - 1), last = (uintptr_t(data) + bytes) & ~(kHuge - 1);
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace kdfast
