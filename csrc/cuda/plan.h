// Which kernel a row operator takes, and in which shape: plain arithmetic on the host, tested without a GPU.
#pragma once
#include <stdint.h>

#include <algorithm>

namespace kdfast::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
  int max_cluster;                                      // blocks; 1 where there are no clusters
};

struct RowCase {
  int64_t rows, columns;
  int element_size;
  bool same_elements;  // student and teacher have one dtype and neighbouring columns
  bool alike;          // ... and their rows and the gradient's are misaligned alike: 16-byte accesses after an edge
  bool aligned;        // ... and start on 16-byte boundaries and hold whole vectors: no edges
  bool gradient;       // wanted
  bool given;          // the rows' states are: no first look
};

enum class RowKernel {
  registers,   // several rows per block, each in the registers of 1 to 32 lanes
  on_chip,     // a row in the shared memory of a block or a cluster
  two_reads,   // a row per block, read again for the gradient
  any_layout,  // the same, column by column: any strides, any pair of dtypes
};

struct RowPlan {
  RowKernel kernel;
  int threads;              // per block
  int64_t blocks;           // of the grid
  int cluster = 1;          // blocks per row (on_chip)
  int lanes = 0, held = 0;  // lanes per row, and columns that each holds (registers)
  bool vectors = false;     // 16-byte accesses (registers)
  int64_t shared = 0;       // bytes of dynamic shared memory per block
};

constexpr int64_t kRegisterColumns = 1024;
constexpr int kRegisterThreads = 128;
// Shared memory that the warps and blocks of a row exchange, beside the row (cluster.cuh).
constexpr int64_t kExchangeBytes = 832;
// What the driver takes of a multiprocessor's shared memory for each block.
constexpr int64_t kReservedShared = 1024;
// Vectors: a block's share of a row below this is not worth a further split.
constexpr int64_t kLeastShare = 512;

namespace detail {

inline int threads_for(int64_t units, int64_t each, int most) {
  const int64_t warps = (units + each * 32 - 1) / (each * 32);
  return int(std::clamp<int64_t>(warps * 32, 64, most));
}

// 16-byte vectors of each of the logits that a block takes of a row.
inline int64_t share(const RowCase& c, int cluster) {
  const int64_t vectors = (c.columns * c.element_size + 15) / 16;
  return (vectors + cluster - 1) / cluster;
}
inline int64_t shared_bytes(const RowCase& c, int cluster) { return 2 * 16 * share(c, cluster) + kExchangeBytes; }

inline RowPlan in_registers(const RowCase& c) {
  RowPlan plan{RowKernel::registers, kRegisterThreads, 0};
  if (c.columns <= 8) {
    plan.lanes = 1, plan.held = 8;
  } else if (c.columns <= 64) {
    plan.lanes = 8, plan.held = 8;
  } else {
    plan.lanes = 32, plan.held = 32, plan.vectors = c.aligned;
  }
  const int rows_per_block = kRegisterThreads / plan.lanes;
  plan.blocks = (c.rows + rows_per_block - 1) / rows_per_block;
  return plan;
}

inline RowPlan row_per_block(const RowCase& c) {
  const int width = c.alike ? 16 / c.element_size : 1;
  return {c.alike ? RowKernel::two_reads : RowKernel::any_layout,
          threads_for(c.columns / width, 4, c.alike ? 512 : 256),
          c.rows,
          1,
          0,
          0,
          false,
          kExchangeBytes};
}

}  // namespace detail

inline RowPlan plan_rows(const RowCase& c, const DeviceLimits& device) {
  using namespace detail;
  if (c.same_elements && c.columns <= kRegisterColumns) return in_registers(c);
  // Without a gradient one read is enough, unless the rows are too few to keep every multiprocessor busy.
  const bool few = c.rows < device.multiprocessors;
  if (!c.alike || c.given || (!c.gradient && !few)) return row_per_block(c);
  // The smallest cluster that lets three blocks share a multiprocessor, so that one loads while others compute, or the
  // largest. More blocks per row where rows are so few that multiprocessors would idle.
  int cluster = 1;
  const int64_t third = device.shared_per_multiprocessor / 3 - kReservedShared;
  while (shared_bytes(c, cluster) > third && cluster < device.max_cluster) cluster *= 2;
  const int64_t most = device.shared_per_block;
  if (shared_bytes(c, cluster) > most) return row_per_block(c);
  auto idle = [&] { return c.rows * cluster < device.multiprocessors; };
  while (idle() && cluster < device.max_cluster && share(c, cluster) > kLeastShare) cluster *= 2;
  const int64_t shared = shared_bytes(c, cluster);
  // More threads where only one or two such blocks fit a multiprocessor.
  const int threads = threads_for(share(c, cluster), 4, shared > third ? 512 : 256);
  return {RowKernel::on_chip, threads, c.rows * cluster, cluster, 0, 0, false, shared};
}

}  // namespace kdfast::cuda
