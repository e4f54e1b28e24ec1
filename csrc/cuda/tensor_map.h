// Matrices as Hopper's copy engine (TMA) takes them.
#pragma once
#include <stdint.h>

#include "cuda/element.h"

namespace kdfast::cuda {

// A CUtensorMap: what is in it is the driver's business (tensor_map.cpp), or the host shim's.
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

// Rows of 16-bit numbers: they start on 16 bytes and do not overlap, and there is at least one.
struct BoxedRows {
  Element type;
  const void* start;
  int64_t rows, columns, step;  // from row to row, in elements
};

// A box is 64 numbers of `box_rows` rows, at most 256. It comes in rows of 128 bytes, of which row i has its 16-byte
// vectors j at i ^ j (mod 8), so that neither rows nor columns of them meet in a bank. Beyond the matrix are zeros.
constexpr int kBoxColumns = 64;
TensorMap tensor_map(const char* op, const BoxedRows& matrix, int box_rows);

// Whether the driver makes them.
bool has_tensor_maps();

}  // namespace kdfast::cuda
