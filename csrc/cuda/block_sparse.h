// Block-sparse products on the GPU: their kernel and its shape, plain arithmetic that is tested without one, and what
// the launcher (block_sparse.cpp) hands to the kernels: block_sparse.cu, and on Hopper block_sparse_wgmma.cu.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/target.h"

namespace kdfast::cuda {

// A block of threads makes so many rows of a block row; the inner dimension passes in steps, of two panels in turn.
constexpr int kBlockThreads = 256, kBlockTile = 128, kBlockStep = 32, kBlockStages = 2;

// By wgmma: a warpgroup copies, two multiply. Each of these makes 128 rows of a block row, or one block's gradient. A
// step is 64 numbers of the sums: rows of 128 bytes (wgmma.cuh).
constexpr int kWgmmaThreads = 384, kWgmmaTile = 256, kWgmmaStep = 64;
// What a block of threads has of a Hopper multiprocessor's shared memory, beside what barriers and alignment take.
constexpr int kWgmmaShared = 225 << 10, kWgmmaExtra = 1024 + 256;
// Bytes of a step's operands, and how many steps fit: those that are not multiplied yet are on their way.
constexpr int wgmma_step_bytes(int width, int depth, bool of_weight) {
  return 2 * kWgmmaStep * (of_weight ? 2 * (width + depth) : kWgmmaTile + width);
}
constexpr int wgmma_stages(int step_bytes) { return kWgmmaShared / step_bytes; }

struct BlockCase {
  int64_t rows, outer;  // of x; block rows of the result
  int64_t all, live;    // blocks of the weight
  int width, depth;     // of a block, along the result and along the sums; of a gradient its rows and columns
  int element_size;
  bool turned;             // blocks are [width, depth]
  bool of_weight = false;  // the gradient of the blocks: sums are over rows
  bool apart = true;       // rows in memory do not overlap
};

struct BlockPlan {
  bool wgmma;
  int threads, tile_rows, stages;
  int64_t shared, blocks;
  bool dense;  // the vendor library's dense product is expected to be faster
};

// A row of a panel, in elements: a step deep or a block wide, and what keeps eight of them off each other's banks.
constexpr int deep_row(int size) { return kBlockStep + 16 / size; }
constexpr int wide_row(int width) { return width + 8; }

// Below so many rows a tile is mostly empty.
constexpr int64_t kLeastBlockRows = 64;
// The share of live blocks up to which sums of these alone win: mma.sync has some 0.6 of the speed of the library's
// wgmma in 16 bits, less where narrow blocks reuse less of a panel. Dense float32 has no tensor cores. Our own wgmma
// kernels should win beyond that: not before it is measured.
constexpr double most_block_density(int element_size, int narrowest) {
  const bool narrow = narrowest < 64;
  return element_size == 2 ? (narrow ? 0.35 : 0.5) : (narrow ? 0.7 : 0.9);
}

namespace detail {

// What the copy engine and the instructions take: sides of whole boxes, and numbers of rows that fit 32 bits.
inline bool takes_wgmma(const BlockCase& c, const DeviceLimits& device) {
  constexpr int64_t kMostRows = (int64_t(1) << 31) - kWgmmaTile;
  const bool sides = c.width % kWgmmaStep == 0 && c.depth % kWgmmaStep == 0;
  const bool some = c.rows > 0 && c.live > 0 && c.rows < kMostRows && c.live * std::max(c.width, c.depth) < kMostRows;
  return device.wgmma && c.element_size == 2 && sides && some && c.apart;
}

// As many blocks of threads as multiprocessors, each of which makes one tile after the other.
inline BlockPlan wgmma_plan(const BlockCase& c, const DeviceLimits& device, bool dense) {
  const int bytes = wgmma_step_bytes(c.width, c.depth, c.of_weight), stages = wgmma_stages(bytes);
  const int64_t tiles = c.of_weight ? (c.live + 1) / 2 : (c.rows + kWgmmaTile - 1) / kWgmmaTile * c.outer;
  return {true,
          kWgmmaThreads,
          c.of_weight ? c.width : kWgmmaTile,
          stages,
          int64_t(stages) * bytes + kWgmmaExtra,
          std::min<int64_t>(tiles, device.multiprocessors),
          dense};
}

}  // namespace detail

inline BlockPlan plan_blocks(const BlockCase& c, const DeviceLimits& device) {
  const double density = c.all ? double(c.live) / double(c.all) : 0.0;
  const bool dense = c.element_size > 4 || c.rows < kLeastBlockRows ||
                     density > most_block_density(c.element_size, std::min(c.width, c.depth));
  if (detail::takes_wgmma(c, device)) return detail::wgmma_plan(c, device, dense);
  const int64_t deep = deep_row(c.element_size), wide = wide_row(c.width);
  const int64_t tile = c.of_weight ? c.width : kBlockTile, columns = c.of_weight ? c.depth : c.width;
  int64_t panel = kBlockTile * deep + (c.turned ? c.width * deep : kBlockStep * wide);
  if (c.of_weight) panel = kBlockStep * (wide + wide_row(c.depth));
  // The result passes through the same memory.
  const int64_t shared = std::max(kBlockStages * panel, tile * wide_row(int(columns))) * c.element_size;
  const int64_t tiles = (c.rows + kBlockTile - 1) / kBlockTile;
  return {false, kBlockThreads, int(tile), kBlockStages, shared, c.of_weight ? c.live : tiles * c.outer, dense};
}

struct BlockArgs {
  Element type;
  const void *left, *right;  // x and the blocks; the upstream gradient and x
  const void* bias;          // null: none
  void* to;
  const int64_t *begin, *index, *place;
  int64_t rows, outer, live, left_columns, right_columns;
  int64_t left_step, right_step;  // from row to row, in elements
  int width, depth;               // as in BlockCase
  bool turned, by_rows;
};

void launch_block_product(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan);
void launch_block_gradient(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan);
// Where the plan says wgmma.
void launch_wgmma_product(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan);
void launch_wgmma_gradient(const char* op, const Target& target, const BlockArgs& args, const BlockPlan& plan);

}  // namespace kdfast::cuda
