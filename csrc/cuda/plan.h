// Which kernel a row operator takes, and in which shape: plain arithmetic on the host, tested without a GPU.
#pragma once
#include <stdint.h>

#include <algorithm>

namespace kdfast::cuda {

struct DeviceLimits {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes
  int max_cluster;                                      // blocks; 1 where there are no clusters
  bool wgmma = false;                                   // it has Hopper's matrix instructions, and so has this build
};

struct RowCase {
  int64_t rows, columns;
  int element_size;
  bool same_elements;  // student and teacher have one dtype and neighbouring columns
  bool alike;          // ... and their rows and the gradient's are misaligned alike: 16-byte accesses after an edge
  bool aligned;        // ... and start on 16-byte boundaries and hold whole vectors: no edges
  bool again;         // rows are looked at again once their sums are known: for a gradient, or by the divergence itself
  bool given;         // the rows' states are: no first look
  bool topk = false;  // the teacher has some of the columns only: `alike` is of the student and the gradient
  // Several dtypes, but neighbouring columns whose groups of four start alike in all rows: float32 on the way.
  bool widened = false;
};

enum class RowKernel {
  registers,   // several rows per block, each in the registers of 1 to 32 lanes
  on_chip,     // a row in the shared memory of a block or a cluster
  two_reads,   // a row per block, read again for every further look
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
  bool widened = false;     // to float32 (on_chip, two_reads)
};

// In whole vectors, or column by column: then more would be more code than they are worth.
constexpr int64_t kRegisterColumns = 1024, kSingleColumns = 256;
constexpr int kRegisterThreads = 128;
// Threads of a block that has a row for itself, or a share of one. Two such blocks fit a multiprocessor with 80
// registers per thread: with 512 threads there would be 64, which are too few for most divergences.
constexpr int kMaxRowThreads = 384;
// Shared memory that the blocks and the warps of a row exchange, beside the row (cluster.cuh).
constexpr int64_t exchange_bytes(int threads) { return 560 + threads; }
// A bit for each column, behind up to 7 that are none, and a word of its own for what is wrong with them.
constexpr int64_t bitmap_bytes(int64_t columns) { return 4 * ((columns + 7 + 31) / 32 + 1); }
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
// Of a teacher that has some of the columns, which they are: of the share, and of single ones at the row's edges.
inline int64_t shared_bytes(const RowCase& c, int cluster, int threads) {
  const int64_t student = 16 * share(c, cluster);
  const int64_t teacher = c.topk ? bitmap_bytes((student + 2 * 16) / c.element_size) : student;
  return student + teacher + exchange_bytes(threads);
}

inline RowPlan in_registers(const RowCase& c) {
  RowPlan plan{RowKernel::registers, kRegisterThreads, 0};
  if (c.columns <= 8) {
    plan.lanes = 1, plan.held = 8;
  } else if (c.columns <= 64) {
    plan.lanes = 8, plan.held = 8;
  } else {
    plan.lanes = 32, plan.held = c.aligned ? 32 : 8, plan.vectors = c.aligned;
  }
  const int rows_per_block = kRegisterThreads / plan.lanes;
  plan.blocks = (c.rows + rows_per_block - 1) / rows_per_block;
  return plan;
}

inline RowPlan row_per_block(const RowCase& c) {
  const bool vectors = c.alike || c.widened;
  const int width = vectors ? 16 / c.element_size : 1;
  const int threads = threads_for(c.columns / width, 4, vectors ? kMaxRowThreads : 256);
  const RowKernel kernel = vectors || c.topk ? RowKernel::two_reads : RowKernel::any_layout;
  const int64_t shared = exchange_bytes(threads) + (c.topk ? bitmap_bytes(c.columns) : 0);
  return {kernel, threads, c.rows, 1, 0, 0, false, shared, c.widened};
}

}  // namespace detail

inline RowPlan plan_rows(const RowCase& c, const DeviceLimits& device) {
  using namespace detail;
  if (c.same_elements && c.columns <= (c.aligned ? kRegisterColumns : kSingleColumns)) return in_registers(c);
  // For one look one read is enough, unless the rows are too few to keep every multiprocessor busy.
  const bool few = c.rows < device.multiprocessors;
  const bool one_read = !c.again && !few;
  if (!(c.alike || c.widened) || c.given || one_read) return row_per_block(c);
  // The smallest cluster that lets three blocks share a multiprocessor, so that one loads while others compute, or the
  // largest. More blocks per row where rows are so few that multiprocessors would idle.
  int cluster = 1;
  const int64_t third = device.shared_per_multiprocessor / 3 - kReservedShared;
  // More threads where only one or two such blocks fit a multiprocessor.
  auto most_threads = [&] { return shared_bytes(c, cluster, 256) > third ? kMaxRowThreads : 256; };
  while (most_threads() > 256 && cluster < device.max_cluster) cluster *= 2;
  if (shared_bytes(c, cluster, most_threads()) > device.shared_per_block) return row_per_block(c);
  auto idle = [&] { return c.rows * cluster < device.multiprocessors; };
  while (idle() && cluster < device.max_cluster && share(c, cluster) > kLeastShare) cluster *= 2;
  const int threads = threads_for(share(c, cluster), 4, most_threads());
  const int64_t shared = shared_bytes(c, cluster, threads);
  return {RowKernel::on_chip, threads, c.rows * cluster, cluster, 0, 0, false, shared, c.widened};
}

// The same, where the device has room for its clusters: `has_room(plan)` tells of one. Half as many blocks as long as
// it has not; what does not fit a block in the end is read twice.
template <class HasRoom>
RowPlan plan_rows(const RowCase& c, DeviceLimits device, HasRoom has_room) {
  RowPlan plan = plan_rows(c, device);
  while (plan.cluster > 1 && !has_room(plan)) {
    device.max_cluster = plan.cluster / 2;
    plan = plan_rows(c, device);
  }
  return plan;
}

}  // namespace kdfast::cuda
