// Products of a block's own 64 tokens, 16 of a warp, with 32 tokens that it meets, from rows in shared memory: their
// scores, and what these times the met tokens' numbers add to the own tokens' gradient. Scores stay where a product of
// them finds them: the lane that has a number of c has it as one of a, if that product takes the tokens in the order
// that fits.
#pragma once
#include "cuda/qk_heads.cuh"

namespace kdfast::cuda {

constexpr int kMetColumns = kMet / 8, kOwnColumns = 64 / 8;  // products of 16 x 8 side by side
using Scores = float[kMetColumns][4];
using Sums = float[kOwnColumns][4];

// += over `depth` numbers, a multiple of 16, of rows of `row` floats. `own` is the warp's first token.
template <int row>
KDFAST_DEVICE void add_scores(Scores& c, const float* own, const float* met, int depth) {
#pragma unroll 1
  for (int first = 0; first < depth; first += 16) {
    SplitA a[2];
    load_rows(a, own + first, row);
#pragma unroll
    for (int n = 0; n < kMetColumns; ++n) {
      SplitB b[2];
      load_rows(b, met + 8 * n * row + first, row);
      multiply_split(c[n], a, b);
    }
  }
}
// += scores times `met(token, number)`, of `size` numbers. Number i of k = 8 is token 2 i, and from i = 4 on token
// 2 (i - 4) + 1.
template <class Met>
KDFAST_DEVICE void add_products(Sums& sums, const Scores& scores, Met met, int size) {
#pragma unroll
  for (int pair = 0; pair < kMetColumns / 2; ++pair) {
    SplitA a[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float* c = scores[2 * pair + k];
      a[k].set(0, c[0]), a[k].set(1, c[2]), a[k].set(2, c[1]), a[k].set(3, c[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (32 * half < size) {
#pragma unroll
        for (int i = 0; i < kOwnColumns / 2; ++i) {
          const int n = half * kOwnColumns / 2 + i;
          SplitB b[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            b[k].load([&](int number, int i) { return met(16 * pair + 8 * k + i % 4 * 2 + i / 4, 8 * n + number); });
          }
          multiply_split(sums[n], a, b);
        }
      }
    }
  }
}

// The same of 16-bit numbers. Their products are exact; scores that are multiplied again are the sum of two numbers, to
// 2^-17 (bfloat16) or 2^-22 (float16). Sums stay in the tensor cores: what these cut off is far less than what the
// gradient's own rounding to 16 bits does.
template <class T, int row>
KDFAST_DEVICE void add_scores(Scores& c, const T* own, const T* met, int depth) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const T* a_row = own + (matrix % 2 * 8 + lane % 8) * row + matrix / 2 * 8;
  const T* b_row = met + (matrix / 2 * 8 + lane % 8) * row + matrix % 2 * 8;
#pragma unroll 2
  for (int first = 0; first < depth; first += 16) {
    uint32_t a[4];
    load_matrices(a, a_row + first);
#pragma unroll
    for (int n = 0; n < kMetColumns; n += 2) {
      uint32_t both[4];
      load_matrices(both, b_row + 8 * n * row + first);
      const uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
      mma16(T{}, c[n], a, b[0]);
      mma16(T{}, c[n + 1], a, b[1]);
    }
  }
}
template <class T>
KDFAST_DEVICE void split_pair(float x, float y, uint32_t& big, uint32_t& small) {
  float back[2];
  big = narrow_pair(T{}, x, y);
  widen_pair(T{}, big, back);
  small = narrow_pair(T{}, x - back[0], y - back[1]);
}
template <class T, int row>
KDFAST_DEVICE void add_products(Sums& sums, const Scores& scores, const T* met, int size) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const T* b_row = met + (matrix % 2 * 8 + lane % 8) * row + matrix / 2 * 8;
#pragma unroll
  for (int pair = 0; pair < kMetColumns / 2; ++pair) {
    uint32_t big[4], small[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* c = scores[2 * pair + i / 2] + i % 2 * 2;
      split_pair<T>(c[0], c[1], big[i], small[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (32 * half < size) {
#pragma unroll
        for (int j = 0; j < kOwnColumns / 4; ++j) {
          const int n = half * kOwnColumns / 2 + 2 * j;
          uint32_t both[4];
          load_matrices_transposed(both, b_row + 16 * pair * row + 8 * n);
          const uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma16(T{}, sums[n + i], small, b[i]);
            mma16(T{}, sums[n + i], big, b[i]);
          }
        }
      }
    }
  }
}

// f(row in the warp's 16, met token, score)
template <class F>
KDFAST_DEVICE void each_score(Scores& c, F f) {
#pragma unroll
  for (int i = 0; i < 4 * kMetColumns; ++i) {
    f(lane_row() + i % 4 / 2 * 8, i / 4 * 8 + lane_column() + i % 2, c[i / 4][i % 4]);
  }
}

// The block's place: of a head (of queries or keys), its own tokens, and of their gradient the 64 numbers it makes.
struct OwnTokens {
  int64_t head;  // the first of those that share keys
  int first, panel, share;

  KDFAST_DEVICE OwnTokens(const QkArgs& args, bool keys, bool gradient) {
    const int wide = gradient ? (args.student_size + 63) / 64 : 1;
    const int64_t place = blockIdx.x / wide;
    panel = int(blockIdx.x) % wide;
    first = int(place % args.tiles()) * kOwn;
    share = keys ? args.heads / args.key_heads : 1;
    head = place / args.tiles() * share;
  }
};
inline int64_t blocks_of(const QkArgs& args, bool keys, bool gradient) {
  const int64_t heads = args.all_heads() / args.heads * (keys ? args.key_heads : args.heads);
  return heads * args.tiles() * (gradient ? (args.student_size + 63) / 64 : 1);
}

// The sum of what the block's threads have goes to the head's part of these queries.
KDFAST_DEVICE void write_part(const QkArgs& args, const OwnTokens& own, double sum) {
  __syncthreads();  // what is in shared memory is read
  sum = block_sum(sum, (double*)shared_memory());
  if (threadIdx.x == 0) args.parts[own.head * args.tiles() + own.first / kOwn] = float(sum);
}

}  // namespace kdfast::cuda
