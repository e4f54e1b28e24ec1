// The only file, beside mma.cuh and wgmma.cuh, that knows whether a kernel is compiled by nvcc or by the test-only host
// shim (tests/cuda_host): whatever is an instruction rather than C++ stands here, and the shim offers the same names.
//
// Kernels keep to what both have: launches through launch.cuh, one dynamic shared base, full-warp shuffles of float,
// __syncthreads and the functions below; block sizes are multiples of 32, and no thread relies on lockstep.
#pragma once
#include <stdint.h>

namespace kdfast::cuda {
// Elements as memory holds them; vector.cuh widens them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
}  // namespace kdfast::cuda

#if !defined(__CUDACC__)
#include "cuda_host.h"
#else
#include <cuda_runtime.h>

#define KDFAST_DEVICE __device__ __forceinline__
#define KDFAST_DEVICE_CALL static __device__ __noinline__  // rarely run, and much code

namespace kdfast::cuda {

KDFAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// 2 ulp; denormal results are 0.
KDFAST_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Its absolute error is below 2^-22 between 1/2 and 2, its relative error beyond. Denormal arguments are 0.
KDFAST_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 ulp.
KDFAST_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KDFAST_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
KDFAST_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// ---- 16 bytes of memory ----
// Logits are read once: they need not push anything else out of L1.
KDFAST_DEVICE uint4 load16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
KDFAST_DEVICE uint2 load8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
// As assembly: nvcc 13 was seen to split the assignment of a uint4 into four stores.
KDFAST_DEVICE void store16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
KDFAST_DEVICE void store8(void* p, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
// Sets bits of a word in shared memory that other threads set too; returns those that were set.
KDFAST_DEVICE uint32_t shared_or(uint32_t* word, uint32_t bits) { return atomicOr(word, bits) & bits; }
KDFAST_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Global to shared memory without a register in between; past L1.
KDFAST_DEVICE void copy16_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Waits for this thread's own copies: they are visible to this thread only.
KDFAST_DEVICE void copies_arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- pairs of 16-bit elements; the first argument only names the type ----
KDFAST_DEVICE void widen_pair(BFloat16, uint32_t pair, float* x) {
  x[0] = as_float(pair << 16);
  x[1] = as_float(pair & 0xffff0000u);
}
KDFAST_DEVICE void widen_pair(Float16, uint32_t pair, float* x) {
  asm("{\n .reg .f16 lo, hi;\n mov.b32 {lo, hi}, %2;\n cvt.f32.f16 %0, lo;\n cvt.f32.f16 %1, hi;\n}"
      : "=f"(x[0]), "=f"(x[1])
      : "r"(pair));
}
KDFAST_DEVICE uint32_t narrow_pair(BFloat16, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
KDFAST_DEVICE uint32_t narrow_pair(Float16, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
// The larger of each; beside a NaN, the number.
KDFAST_DEVICE uint32_t max_pair(BFloat16, uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}
KDFAST_DEVICE uint32_t max_pair(Float16, uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// ---- clusters: blocks that write into each other's shared memory ----
// Completes once, when the bytes that it expects have been pushed.
struct alignas(8) PushBarrier {
  uint64_t state;
};
#if __CUDA_ARCH__ >= 900
KDFAST_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
// Makes two barriers and tells the cluster that this block runs. Relaxed: a release here costs a full memory barrier,
// and the fence has published what peers need. All threads call it.
KDFAST_DEVICE void cluster_announce(PushBarrier* barriers, int first_bytes, int second_bytes) {
  if (threadIdx.x == 0) {
    const uint32_t first = shared_address(barriers), second = shared_address(barriers + 1);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(first) : "memory");
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(second) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    auto expect = [](uint32_t at, int bytes) {
      asm volatile("mbarrier.arrive.expect_tx.relaxed.cta.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                   : "memory");
    };
    expect(first, first_bytes);
    expect(second, second_bytes);
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// Waits until every block of the cluster has announced itself. All threads call it.
KDFAST_DEVICE void cluster_ready() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

KDFAST_DEVICE uint32_t peer_address(const void* own, int rank) {
  uint32_t at;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(own)), "r"(rank));
  return at;
}
// Writes to where `to` lies in block `rank`, and counts the bytes at that block's barrier.
KDFAST_DEVICE void cluster_push(float4* to, PushBarrier* barrier, int rank, float4 v) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   peer_address(to, rank)),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(peer_address(barrier, rank))
               : "memory");
}
KDFAST_DEVICE void cluster_push(float2* to, PushBarrier* barrier, int rank, float2 v) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   peer_address(to, rank)),
               "f"(v.x), "f"(v.y), "r"(peer_address(barrier, rank))
               : "memory");
}
KDFAST_DEVICE void pushes_arrived(PushBarrier* barrier) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n @!done bra again;\n}" ::"r"(
          shared_address(barrier))
      : "memory");
}
#else
// Before sm_90 the plan never asks for clusters; the same kernels still have to compile.
KDFAST_DEVICE int cluster_rank() { return 0; }
KDFAST_DEVICE void cluster_announce(PushBarrier*, int, int) {}
KDFAST_DEVICE void cluster_ready() {}
KDFAST_DEVICE void cluster_push(float4*, PushBarrier*, int, float4) {}
KDFAST_DEVICE void cluster_push(float2*, PushBarrier*, int, float2) {}
KDFAST_DEVICE void pushes_arrived(PushBarrier*) {}
#endif

}  // namespace kdfast::cuda
#endif
