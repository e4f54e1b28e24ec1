// Threads in place of torch's, in a library that is built with ThreadSanitizer (tools/sanitize.sh): it sees these begin
// and end. It does not know the barriers of GCC's OpenMP, by which torch shares work: there, everything that a thread
// reads of another would be a race.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" {

int32_t torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return 0;
}

int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*work)(int64_t, int64_t, void*),
                           void* context) {
  const int64_t share = std::max((end - begin + kThreads - 1) / kThreads, grain);
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += share)
    threads.emplace_back(work, from, std::min(from + share, end), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
}
