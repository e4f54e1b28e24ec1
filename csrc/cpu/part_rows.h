// What the dispatcher (parts.cpp) hands to a CPU variant (part_rows.cpp): rows of a matrix of which some columns live.
#pragma once
#include "cpu/element.h"

namespace kdfast {

// What all rows of a call share. Packed rows hold the live columns alone: those of `index`, or where it is null all;
// `live`: a bit for each column, in words of 32.
struct PartShape {
  Element type;
  int64_t columns, packed;  // how many of a row, and of a packed one
  const int64_t* index;
  const uint32_t* live;
};

struct PartKernels {
  void (*pack)(const PartShape&, const void* row, void* packed);
  void (*add)(const PartShape&, const void* packed, void* row);     // to the live columns
  void (*spread)(const PartShape&, const void* packed, void* row);  // zeros elsewhere
};

}  // namespace kdfast
