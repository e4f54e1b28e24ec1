// Products on tensor cores: c[16, 8] += a[16, k] b[k, 8], by a whole warp, in float32; and what feeds them from shared
// memory. Each lane has those numbers of a, b and c that the PTX ISA's tables of fragments give it, with g = lane / 4
// and q = lane % 4:
//   c[i]           is at row g + 8 (i / 2), column 2 q + i % 2
//   mma16: a[i]    is at row g + 8 (i % 2), the pair of columns 2 q + 8 (i / 2) and the next
//          b[i]    is the pair of rows 2 q + 8 i and the next, column g
//   mma_tf32: a[i] is at row g + 8 (i % 2), column q + 4 (i / 2)
//          b[i]    is at row q + 4 i, column g
//
// Tensor cores cut off what their sums cannot hold: long sums are added up outside of them, as `multiply_split` does.
#pragma once
#include "cuda/device.h"

#if !defined(__CUDACC__)
#include "mma_host.h"
#else
namespace kdfast::cuda {

// k = 16; the first argument only names the type of a and b.
KDFAST_DEVICE void mma16(BFloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
KDFAST_DEVICE void mma16(Float16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// k = 8; of the operands' floats the upper 19 bits count.
KDFAST_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 16 bytes in shared memory: lane i names row i % 8 of matrix i / 8. Of matrix j a lane gets
// in v[j] the 4 bytes q of row g; transposed, as 16-bit numbers, those of rows 2 q and 2 q + 1 in column g.
KDFAST_DEVICE void load_matrices(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}
KDFAST_DEVICE void load_matrices_transposed(uint32_t (&v)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared_address(row))
               : "memory");
}

// As assembly, for the reason that store16 has.
KDFAST_DEVICE uint4 shared_load16(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(p))
               : "memory");
  return v;
}
KDFAST_DEVICE void shared_store16(void* p, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

}  // namespace kdfast::cuda
#endif

namespace kdfast::cuda {

// x = big + small to 2^-22 of it, both in the bits that tf32 has. Rounded, not cut off: cut-off parts would all err
// towards 0. A NaN stays in `small`, whatever the addition makes of its bits.
struct Split {
  uint32_t big, small;

  KDFAST_DEVICE explicit Split(float x) {
    big = (as_bits(x) + 0x1000u) & 0xffffe000u;
    small = as_bits(x - as_float(big));
  }
};

// The lane's numbers of the operands of k = 8, from `at(row or column, k)`.
template <int kCount>
struct SplitNumbers {
  uint32_t big[kCount], small[kCount];

  KDFAST_DEVICE void set(int i, float number) {
    const Split x(number);
    big[i] = x.big, small[i] = x.small;
  }
};
struct SplitA : SplitNumbers<4> {
  template <class At>
  KDFAST_DEVICE void load(At at) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) set(i, at(g + i % 2 * 8, q + i / 2 * 4));
  }
};
struct SplitB : SplitNumbers<2> {
  template <class At>
  KDFAST_DEVICE void load(At at) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) set(i, at(g, q + i * 4));
  }
};

// The same of k = 16 from rows in shared memory that hold k side by side, `row` floats apart: 16 rows of a, 8 of b (its
// columns). A 16-byte row of a matrix of load_matrices is four floats of one of them.
KDFAST_DEVICE void load_rows(SplitA (&a)[2], const float* rows, int row) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    uint32_t bits[4];
    load_matrices(bits, rows + (matrix % 2 * 8 + lane % 8) * row + 8 * k + matrix / 2 * 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k].set(i, as_float(bits[i]));
  }
}
KDFAST_DEVICE void load_rows(SplitB (&b)[2], const float* rows, int row) {
  const int lane = threadIdx.x % 32;
  uint32_t bits[4];
  load_matrices(bits, rows + lane % 8 * row + lane / 8 * 4);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, as_float(bits[i]));
}

// c += a b over k = 16, for all that float32 holds: the three products that matter, the small ones first.
KDFAST_DEVICE void multiply_split(float (&c)[4], const SplitA (&a)[2], const SplitB (&b)[2]) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    mma_tf32(part, a[k].small, b[k].big);
    mma_tf32(part, a[k].big, b[k].small);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) mma_tf32(part, a[k].big, b[k].big);
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] += part[i];
}

}  // namespace kdfast::cuda
