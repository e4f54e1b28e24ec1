// What the launchers of the distances between layers (layers.cpp, qk.cpp) hand to their kernels: plain data, by value.
#pragma once
#include <stdint.h>

#include <vector>

#include "common/layer_terms.h"
#include "cuda/divider.h"
#include "cuda/element.h"
#include "cuda/target.h"

namespace kdfast::cuda {

// More are launched in turns: all of it has to fit the 32 KB that a kernel's parameters may take.
constexpr int kMostLayers = 48, kMostHeads = 1024;

// The teacher's head and the weight of every layer and student head in turn.
struct HeadTable {
  int16_t teacher[kMostHeads];  // -1: skipped
  float weight[kMostHeads];
};

// Steps are in elements, from one to the next of [B, H, R, C].
struct LayerMemory {
  const void* data;
  int64_t batch, head, row, column;
};
struct LayerPair {
  LayerMemory student, teacher;
  void* gradient;  // contiguous; null: not wanted
};

struct LayerArgs {
  Distance kind;
  int layers, heads;
  int64_t batch, rows, columns;
  Element student_type, teacher_type;
  const bool *row_mask = nullptr, *column_mask = nullptr;  // [B, R], [B, C]
  const float* divisor = nullptr;
  const float* upstream = nullptr;  // of the loss, or of every row
  bool per_row;
  float floor;    // NaN: none
  float* values;  // of every row, or of every block a sum
  LayerPair layer[kMostLayers];
  HeadTable table;
  // The launch's own.
  Divider by_rows, by_heads, by_batch;
  uint32_t all_rows, rows_of_layer;
  int log_lanes;  // that share a row
};

// Returns how many values it writes: the rows, or the blocks.
int64_t launch_layers(const char* op, const Target& target, LayerArgs args, int multiprocessors);
int64_t layer_values(const LayerArgs& args, int multiprocessors);
std::vector<NamedKernel> layer_kernels();

}  // namespace kdfast::cuda
