// Test-only: the instructions of csrc/cuda/mma.cuh for the CPU. Every lane leaves its registers to the others of its
// warp, and takes its results from theirs by the fragment tables of the PTX ISA.
#pragma once
#include "cuda_host.h"

namespace cuda_host {

// The words of all lanes of this warp, once all of them are here.
template <size_t count>
const uint32_t (*exchanged(const uint32_t (&words)[count])) [kWarpWords] {
  static_assert(count <= kWarpWords);
  Machine& machine = cuda_host::machine();
  Fiber& me = machine.current();
  Warp& warp = me.block->warps[me.thread / 32];
  if (warp.meeting.members != 32) machine.fail("a matrix instruction that is not by a whole warp");
  auto& set = warp.words[me.shuffles++ % 2];
  std::memcpy(set[me.thread % 32], words, sizeof(words));
  machine.meet(warp.meeting);
  return set;
}

// c[i] += the products of the elements that `a(words, row, k)` and `b(words, k, column)` find among the lanes' words.
template <class A, class B>
void multiply(int depth, float (&c)[4], const uint32_t (&a_words)[4], const uint32_t (&b_words)[2], A a, B b) {
  uint32_t words[6];
  std::memcpy(words, a_words, sizeof(a_words));
  std::memcpy(words + 4, b_words, sizeof(b_words));
  const auto* all = exchanged(words);
  const int lane = int(threadIdx.x % 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < depth; ++k) c[i] += a(all, row, k) * b(all, k, column);
  }
}

}  // namespace cuda_host

namespace kdfast::cuda {

template <class T>
void mma16(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Words = const uint32_t (*)[cuda_host::kWarpWords];
  auto half = [](uint32_t pair, int which) { return widen_bits<T>(uint16_t(pair >> (16 * which))); };
  cuda_host::multiply(
      16, c, a, b,
      [&](Words all, int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2); },
      [&](Words all, int k, int column) { return half(all[column * 4 + k % 8 / 2][4 + k / 8], k % 2); });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using Words = const uint32_t (*)[cuda_host::kWarpWords];
  auto cut = [](uint32_t bits) { return as_float(bits & 0xffffe000u); };
  cuda_host::multiply(
      8, c, a, b, [&](Words all, int row, int k) { return cut(all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2]); },
      [&](Words all, int k, int column) { return cut(all[column * 4 + k % 4][4 + k / 4]); });
}

inline uint4 shared_load16(const void* p) { return load16(p); }
inline void shared_store16(void* p, uint4 v) { store16(p, v); }

// All lanes' rows, read by lane i: which 16-bit numbers of the rows that `pick(matrix, half)` says.
template <class Pick>
void load_rows(uint32_t (&v)[4], const void* row, Pick pick) {
  check_aligned(row);
  uint32_t words[4];
  std::memcpy(words, row, 16);
  const auto* all = cuda_host::exchanged(words);
  for (int matrix = 0; matrix < 4; ++matrix) {
    v[matrix] = 0;
    for (int half = 0; half < 2; ++half) {
      const auto [line, number] = pick(half);
      const uint32_t word = all[matrix * 8 + line][number / 2];
      v[matrix] |= (word >> (16 * (number % 2)) & 0xffffu) << (16 * half);
    }
  }
}
inline void load_matrices(uint32_t (&v)[4], const void* row) {
  const int g = int(threadIdx.x % 32 / 4), q = int(threadIdx.x % 4);
  load_rows(v, row, [&](int half) { return std::pair{g, 2 * q + half}; });
}
inline void load_matrices_transposed(uint32_t (&v)[4], const void* row) {
  const int g = int(threadIdx.x % 32 / 4), q = int(threadIdx.x % 4);
  load_rows(v, row, [&](int half) { return std::pair{2 * q + half, g}; });
}

}  // namespace kdfast::cuda
