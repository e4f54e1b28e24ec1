// The state of a row that is spread over the threads of a block, or over a cluster of blocks. `Terms` are those of a
// divergence (common/divergence_terms.h), `labels` tells whether rows have a cross-entropy too.
#pragma once
#include "common/divergence_terms.h"
#include "cuda/block.cuh"
#include "cuda/plan.h"

namespace kdfast::cuda {

constexpr int kMaxCluster = 16;

// Which of a state's sums the first look makes.
template <class Terms>
constexpr bool kMomentT = Terms::kOfTeacher || Terms::kDifference;
template <class Terms>
constexpr bool kMomentS = Terms::kOfStudent || Terms::kRest;

// A state without its label, which is read where it is needed.
struct PackedState {
  float4 sums;   // max_s, sum_s, max_t, sum_t
  float2 terms;  // a, b
  float2 ones;   // sum_one, total
};
KDFAST_DEVICE PackedState packed(const RowState<float>& s) {
  return {{s.max_s, s.sum_s, s.max_t, s.sum_t}, {s.moment_t, s.moment_s}, {s.sum_one, s.total}};
}
KDFAST_DEVICE RowState<float> unpacked(const PackedState& p) {
  return {p.sums.x, p.sums.y, p.sums.z, p.sums.w, p.terms.x, p.terms.y, p.ones.x, p.ones.y, 0.f};
}

// What the warps and blocks of a row exchange, at the start of shared memory; a PackedState per warp follows. Its size
// decides whether three blocks of 1/8 of a 151936-column row fit a Hopper multiprocessor. What peers push lies where
// this block itself writes nothing: they may be a look ahead.
struct alignas(16) Exchange {
  float4 block_sums[kMaxCluster];
  float2 block_terms[kMaxCluster];  // by whichever look makes them
  float2 block_ones[kMaxCluster];
  PackedState row;
  PushBarrier barriers[2];  // of the looks
};
static_assert(sizeof(Exchange) + kMaxRowThreads / 32 * sizeof(PackedState) == exchange_bytes(kMaxRowThreads));

// Over groups of `lanes` neighbours.
template <class Terms, int lanes = 32>
KDFAST_DEVICE void warp_sums(RowState<float>& state, bool labels) {
  if constexpr (!Terms::kDifference) {
    state.sum_s = warp_sum<lanes>(state.sum_s);
    state.sum_t = warp_sum<lanes>(state.sum_t);
  }
  if constexpr (kMomentT<Terms>) state.moment_t = warp_sum<lanes>(state.moment_t);
  if constexpr (kMomentS<Terms>) state.moment_s = warp_sum<lanes>(state.moment_s);
  if (!labels) return;
  state.sum_one = warp_sum<lanes>(state.sum_one);
  state.total = warp_sum<lanes>(state.total);
}

// Maxima first, then sums: merging pair by pair would rescale five times.
template <class Terms>
KDFAST_DEVICE RowState<float> warp_merge(const RowState<float>& mine, float k, bool labels) {
  RowState<float> all = referred<Terms>(mine, warp_max(mine.max_s), warp_max(mine.max_t), k);
  warp_sums<Terms>(all, labels);
  return all;
}

// Before the loads are waited for: says that this block runs, so that peers may push to it.
template <class Terms>
KDFAST_DEVICE void row_begin(Exchange* exchange, int blocks, bool labels) {
  if (blocks == 1) return;
  const int pair = int(sizeof(float2)), terms = kMomentT<Terms> || kMomentS<Terms> ? pair : 0;
  cluster_announce(exchange->barriers, blocks * (int(sizeof(float4)) + terms + (labels ? pair : 0)), blocks * pair);
}

// The states of the cluster's blocks, each pushed to all. By warp 0.
template <class Terms>
KDFAST_DEVICE RowState<float> cluster_merge(const RowState<float>& block, float k, Exchange* exchange, int blocks,
                                            bool labels) {
  constexpr bool kTerms = kMomentT<Terms> || kMomentS<Terms>;
  const int lane = threadIdx.x % 32, rank = cluster_rank();
  PushBarrier* barrier = &exchange->barriers[0];
  if (lane < blocks) {
    const PackedState mine = packed(block);
    cluster_push(&exchange->block_sums[rank], barrier, lane, mine.sums);
    if (kTerms) cluster_push(&exchange->block_terms[rank], barrier, lane, mine.terms);
    if (labels) cluster_push(&exchange->block_ones[rank], barrier, lane, mine.ones);
  }
  pushes_arrived(barrier);
  RowState<float> state = no_columns<float>();
  if (lane < blocks) {
    const float2 none = {0.f, 0.f};
    state = unpacked({exchange->block_sums[lane], kTerms ? exchange->block_terms[lane] : none,
                      labels ? exchange->block_ones[lane] : none});
  }
  return warp_merge<Terms>(state, k, labels);
}

// `warp` is the state of this warp, the same in all its lanes; all threads of the row get the row's. Warp 0 does the
// work of the block, so that the others can wait in hardware.
template <class Terms>
KDFAST_DEVICE RowState<float> row_merge(const RowState<float>& warp, float k, Exchange* exchange, int blocks,
                                        bool labels) {
  const int lane = threadIdx.x % 32;
  auto* warps = (PackedState*)(exchange + 1);
  if (lane == 0) warps[threadIdx.x / 32] = packed(warp);
  __syncthreads();  // every warp's state is written, and so are the barriers that thread 0 made
  if (blocks > 1) cluster_ready();
  if (threadIdx.x < 32) {
    RowState<float> state = no_columns<float>();
    if (lane < int(blockDim.x / 32)) state = unpacked(warps[lane]);
    state = warp_merge<Terms>(state, k, labels);
    if (blocks > 1) state = cluster_merge<Terms>(state, k, exchange, blocks, labels);
    if (lane == 0) exchange->row = packed(state);
  }
  __syncthreads();  // the merged state is written
  return unpacked(exchange->row);
}

// The same for the two sums of a second look, `mine` being a thread's.
KDFAST_DEVICE float2 row_merge_again(float2 mine, Exchange* exchange, int blocks) {
  auto sums = [](float2 x) { return float2{warp_sum(x.x), warp_sum(x.y)}; };
  const int lane = threadIdx.x % 32;
  auto* warps = (PackedState*)(exchange + 1);
  mine = sums(mine);
  if (lane == 0) warps[threadIdx.x / 32].terms = mine;
  __syncthreads();  // every warp's sums are written, and nobody reads the first look's any more
  if (threadIdx.x < 32) {
    const float2 none = {0.f, 0.f};
    float2 all = sums(lane < int(blockDim.x / 32) ? warps[lane].terms : none);
    if (blocks > 1) {
      PushBarrier* barrier = &exchange->barriers[1];
      if (lane < blocks) cluster_push(&exchange->block_terms[cluster_rank()], barrier, lane, all);
      pushes_arrived(barrier);
      all = sums(lane < blocks ? exchange->block_terms[lane] : none);
    }
    if (lane == 0) exchange->row.terms = all;
  }
  __syncthreads();  // the merged sums are written
  return exchange->row.terms;
}

}  // namespace kdfast::cuda
