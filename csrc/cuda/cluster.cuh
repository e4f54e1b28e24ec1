// The state of a row that is spread over the threads of a block, or over a cluster of blocks.
#pragma once
#include "common/rowmath.h"
#include "cuda/block.cuh"
#include "cuda/plan.h"

namespace kdfast::cuda {

constexpr int kMaxCluster = 16;
constexpr int kMaxRowThreads = 512;

// What the warps and blocks of a row exchange, at the start of shared memory. Its size decides whether three blocks of
// 1/8 of a 151936-column row fit a Hopper multiprocessor.
struct alignas(16) Exchange {
  float4 block_sums[kMaxCluster];  // max_s, sum_s, max_t, sum_t
  float block_dots[kMaxCluster];
  RowState<float> warps[kMaxRowThreads / 32];
  PushBarrier barrier;
};
static_assert(sizeof(Exchange) <= kExchangeBytes);

// Maxima first, then sums: merging pair by pair would rescale five times.
KDFAST_DEVICE RowState<float> warp_merge(const RowState<float>& mine, float k) {
  RowState<float> all = referred(mine, warp_max(mine.max_s), warp_max(mine.max_t), k);
  all.sum_s = warp_sum(all.sum_s);
  all.sum_t = warp_sum(all.sum_t);
  all.dot = warp_sum(all.dot);
  return all;
}

// Before the loads are waited for: says that this block runs, so that peers may push to it.
KDFAST_DEVICE void row_begin(Exchange* exchange, int blocks) {
  if (blocks > 1) cluster_announce(&exchange->barrier, blocks * int(sizeof(float4) + sizeof(float)));
}

// The states of the cluster's blocks, each pushed to all.
KDFAST_DEVICE RowState<float> cluster_merge(const RowState<float>& block, float k, Exchange* exchange, int blocks) {
  const int lane = threadIdx.x % 32, rank = cluster_rank();
  if (lane < blocks) {
    cluster_push(&exchange->block_sums[rank], &exchange->barrier, lane,
                 float4{block.max_s, block.sum_s, block.max_t, block.sum_t});
    cluster_push(&exchange->block_dots[rank], &exchange->barrier, lane, block.dot);
  }
  pushes_arrived(&exchange->barrier);
  RowState<float> state;
  if (lane < blocks) {
    const float4 sums = exchange->block_sums[lane];
    state = {sums.x, sums.y, sums.z, sums.w, exchange->block_dots[lane]};
  }
  return warp_merge(state, k);
}

// `warp` is the state of this warp, the same in all its lanes; all threads of the row get the row's. Warp 0 does the
// work of the block, so that the others can wait in hardware.
KDFAST_DEVICE RowState<float> row_merge(const RowState<float>& warp, float k, Exchange* exchange, int blocks) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) exchange->warps[threadIdx.x / 32] = warp;
  __syncthreads();  // every warp's state is written, and so is the barrier that thread 0 made
  if (blocks > 1) cluster_ready();
  if (threadIdx.x < 32) {
    RowState<float> state;
    if (lane < int(blockDim.x / 32)) state = exchange->warps[lane];
    state = warp_merge(state, k);
    if (blocks > 1) state = cluster_merge(state, k, exchange, blocks);
    if (lane == 0) exchange->warps[0] = state;
  }
  __syncthreads();  // the merged state is written
  return exchange->warps[0];
}

}  // namespace kdfast::cuda
