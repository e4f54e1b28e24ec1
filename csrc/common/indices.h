// Indices of rows or columns that live.
#pragma once
#include <cstdint>

namespace kdfast {

// How many from the first on are sorted, each once, from 0 to below `all`.
inline int64_t sorted_once(const int64_t* indices, int64_t count, int64_t all) {
  int64_t i = 0;
  for (int64_t least = 0; i < count && indices[i] >= least && indices[i] < all; ++i) least = indices[i] + 1;
  return i;
}

}  // namespace kdfast
