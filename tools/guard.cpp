// Memory of tensors and workspaces between pages that no one may read or write, also after it is freed: for
// instructions that AddressSanitizer does not know, as masked ones of AVX-512 are. Loaded before all else
// (tools/sanitize.sh guard).
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>

extern "C" void __libc_free(void*);

namespace {

constexpr size_t kPage = 4096, kArena = size_t(1) << 42;

char* reserved(size_t bytes, int protection) {
  void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return at == MAP_FAILED ? (std::abort(), nullptr) : (char*)at;
}

// Never used twice: it lasts for any test.
char* arena() {
  static char* const at = reserved(kArena, PROT_NONE);
  return at;
}
// Of the allocation that begins in a page.
size_t& size_at(const char* p) {
  static auto* const sizes = (size_t*)reserved(kArena / kPage * sizeof(size_t), PROT_READ | PROT_WRITE);
  return sizes[(p - arena()) / kPage];
}

// Its end is a page's, whatever the alignment: numbers are as long as they are aligned.
void* guarded(size_t bytes) {
  static std::atomic<size_t> used{kPage};
  const size_t room = (bytes + kPage - 1) / kPage * kPage;
  char* const first = arena() + used.fetch_add(room + kPage);
  if (first + room > arena() + kArena || mprotect(first, room, PROT_READ | PROT_WRITE)) std::abort();
  char* const data = first + room - bytes;
  size_at(data) = room;
  return data;
}

}  // namespace

extern "C" int posix_memalign(void** to, size_t, size_t bytes) {
  *to = guarded(bytes);
  return 0;
}
void* operator new[](size_t bytes) { return guarded(bytes); }

extern "C" void free(void* p) {
  char* const at = (char*)p;
  if (at < arena() || at >= arena() + kArena) return __libc_free(p);
  char* const first = (char*)(uintptr_t(at) / kPage * kPage);
  mmap(first, size_at(first), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}
