// Hopper's products of whole warpgroups (four warps), and what feeds them: boxes of a matrix that the copy engine
// brings to shared memory, and barriers that tell when they are there. Only for sm_90a.
//
// An operand is made of squares: 64 rows of 64 16-bit numbers as a box brings them (tensor_map.h), from a multiple of
// 1024 bytes on. "Deep": its rows are the product's (a's rows, b's columns), with the numbers of a sum side by side.
// "Wide": its rows are the numbers of a sum, with the product's rows or columns side by side. A square has 64 of them
// either way, and the next 64 are in the next square.
//
// Of c [64, columns] lane l of warp w (of the four) has, with g = l / 4 and q = l % 4: c[4 n + 2 h + i] is at row
// 16 w + 8 h + g, column 8 n + 2 q + i.
#pragma once
#include "cuda/device.h"
#include "cuda/tensor_map.h"

namespace kdfast::cuda {

constexpr int kSquare = 64 * 128;  // bytes
constexpr int kWarpgroup = 128;    // threads
constexpr int kDepth = 16;         // numbers of a sum in one instruction

// The 64-bit descriptor of an operand, from its first square's shared address on, for `k` to `k + 15` of the 64 numbers
// of a sum: address, leading and stride offset in units of 16 bytes, and the swizzle of 128-byte rows. Stride: eight
// rows. Leading: wide squares; deep ones have no use for it.
KDFAST_DEVICE uint64_t operand(bool wide, uint32_t squares, int k) {
  const uint32_t at = squares + (wide ? 128 * k : 2 * k);
  const uint64_t leading = wide ? kSquare / 16 : 1, stride = 8 * 128 / 16, swizzle_128 = 1;
  return (at & 0x3ffffu) >> 4 | leading << 16 | stride << 32 | swizzle_128 << 62;
}

}  // namespace kdfast::cuda

#if !defined(__CUDACC__)
#include "wgmma_host.h"
#else
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile this source for sm_90a alone"
#endif

namespace kdfast::cuda {

// ---- barriers ----
// Phases follow each other: one is over when as many threads have arrived as the barrier was made for, and as many
// bytes have come as these expect.
struct alignas(8) StageBarrier {
  uint64_t state;
};
KDFAST_DEVICE void barrier_make(StageBarrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
// Shows the barriers that this thread made to the copy engine; to other threads, __syncthreads does.
KDFAST_DEVICE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KDFAST_DEVICE void barrier_arrive(StageBarrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
KDFAST_DEVICE void barrier_expect(StageBarrier* b, int bytes) {  // and arrives
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
// Until the last phase of this parity is over: the first one has 0, and "the one before it" is over.
KDFAST_DEVICE void barrier_wait(StageBarrier* b, unsigned parity) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra again;\n}" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
}

// ---- copies ----
// The box whose first number is at (row, column); its bytes count at the barrier.
KDFAST_DEVICE void copy_box(void* to, const TensorMap& map, StageBarrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// ---- registers of a thread, between warpgroups; by all threads of one ----
template <int kCount>
KDFAST_DEVICE void registers_down_to() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
KDFAST_DEVICE void registers_up_to() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- products, by all threads of a warpgroup ----
// Products are issued, committed in groups and waited for. Before the first of a group: sums are what threads made
// them.
KDFAST_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KDFAST_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until all groups but the last `kOpen` are done.
template <int kOpen>
KDFAST_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kOpen) : "memory");
}
// Keeps the compiler from moving what is done with the sums to before a wait.
template <int kM, int kN>
KDFAST_DEVICE void sums_arrived(float (&c)[kM][kN]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(c[m][i])::"memory");
  }
}

#define KDFAST_SUMS_8(c, i)                                                                                   \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), \
      "+f"(c[i + 7])
#define KDFAST_SUMS_32(c, i) \
  KDFAST_SUMS_8(c, i), KDFAST_SUMS_8(c, i + 8), KDFAST_SUMS_8(c, i + 16), KDFAST_SUMS_8(c, i + 24)
#define KDFAST_REGISTERS_32                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define KDFAST_REGISTERS_64                                                                                          \
  KDFAST_REGISTERS_32                                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// Sums of a type in `columns` columns; then the operands, to be added to the sums, not negated, and which are wide.
#define KDFAST_PRODUCT(type, columns, registers, a, b, wide_a, wide_b)                                \
  "{\n .reg .pred add;\n setp.eq.u32 add, 0, 0;\n"                                                    \
  " wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" registers "}, " a ", " b \
  ", add, 1, 1, " wide_a ", " wide_b ";\n}"

// c += a b over 16 numbers of each sum; the first argument only names the type of a and b.
template <bool kWideA, bool kWideB>
KDFAST_DEVICE void product(BFloat16, float (&c)[32], uint64_t a, uint64_t b) {
  asm volatile(KDFAST_PRODUCT("bf16", "64", KDFAST_REGISTERS_32, "%32", "%33", "%34", "%35")
               : KDFAST_SUMS_32(c, 0)
               : "l"(a), "l"(b), "n"(int(kWideA)), "n"(int(kWideB)));
}
template <bool kWideA, bool kWideB>
KDFAST_DEVICE void product(Float16, float (&c)[32], uint64_t a, uint64_t b) {
  asm volatile(KDFAST_PRODUCT("f16", "64", KDFAST_REGISTERS_32, "%32", "%33", "%34", "%35")
               : KDFAST_SUMS_32(c, 0)
               : "l"(a), "l"(b), "n"(int(kWideA)), "n"(int(kWideB)));
}
template <bool kWideA, bool kWideB>
KDFAST_DEVICE void product(BFloat16, float (&c)[64], uint64_t a, uint64_t b) {
  asm volatile(KDFAST_PRODUCT("bf16", "128", KDFAST_REGISTERS_64, "%64", "%65", "%66", "%67")
               : KDFAST_SUMS_32(c, 0), KDFAST_SUMS_32(c, 32)
               : "l"(a), "l"(b), "n"(int(kWideA)), "n"(int(kWideB)));
}
template <bool kWideA, bool kWideB>
KDFAST_DEVICE void product(Float16, float (&c)[64], uint64_t a, uint64_t b) {
  asm volatile(KDFAST_PRODUCT("f16", "128", KDFAST_REGISTERS_64, "%64", "%65", "%66", "%67")
               : KDFAST_SUMS_32(c, 0), KDFAST_SUMS_32(c, 32)
               : "l"(a), "l"(b), "n"(int(kWideA)), "n"(int(kWideB)));
}
#undef KDFAST_PRODUCT
#undef KDFAST_REGISTERS_64
#undef KDFAST_REGISTERS_32
#undef KDFAST_SUMS_32
#undef KDFAST_SUMS_8

}  // namespace kdfast::cuda
#endif
