// The losses of queries and keys (qk_grams.cu, qk_scores.cu, qk_relations.cu): a head's tokens, and what is written of
// it.
#pragma once
#include "cuda/block.cuh"
#include "cuda/mma.cuh"
#include "cuda/qk.h"
#include "cuda/vector.cuh"

namespace kdfast::cuda {

// Tokens of a block's own, and those that it meets at a time.
constexpr int kThreads = 128, kOwn = kQkTile, kMet = 32;

// The tokens of a head: its queries or keys, of either side. Those that do not count are zeros, and are not read.
struct Tokens {
  const unsigned char* data;
  Element type;
  bool vectors;           // 16 bytes at a time
  int64_t token, number;  // elements
  const bool* counted;
  int length, size;

  KDFAST_DEVICE Tokens(const QkMemory& m, Element type, int batch, int head, const bool* counted, int length, int size)
      : type(type), token(m.token), number(m.number), counted(counted), length(length), size(size) {
    const int bytes = size_of(type);
    data = (const unsigned char*)m.data + (batch * m.batch + head * m.head) * bytes;
    vectors = number == 1 && (uintptr_t(data) | uintptr_t(token * bytes) | uintptr_t(size * bytes)) % 16 == 0;
  }
  KDFAST_DEVICE bool counts(int i) const { return i < length && (!counted || counted[i]); }
  KDFAST_DEVICE const void* at(int i, int c) const { return data + (i * token + c) * size_of(type); }
  KDFAST_DEVICE float load(int i, int c) const { return load_any(type, data, i * token + c * number); }
};

struct Head {
  int64_t index;  // of all heads
  int batch, layer, head, teacher;
  float weight;  // over the divisor, without the upstream factor
  bool skipped;

  KDFAST_DEVICE Head(const QkArgs& args, int64_t index) : index(index) {
    head = int(index % args.heads);
    batch = int(index / args.heads % args.batch);
    layer = int(index / args.heads / args.batch);
    const int entry = layer * args.heads + head, of_teacher = args.table.teacher[entry];
    skipped = of_teacher < 0;
    teacher = skipped ? 0 : of_teacher;
    const float divisor = args.divisor ? *args.divisor : 1.f;
    weight = divisor > 0.f ? args.table.weight[entry] / divisor : 0.f;
  }
  KDFAST_DEVICE float factor(const QkArgs& args) const {
    return args.upstream ? weight * args.upstream[args.per_head ? index : 0] : weight;
  }
  KDFAST_DEVICE Tokens learned(const QkArgs& args, bool keys) const {
    const QkLayer& from = args.layer[layer];
    return {keys ? from.student_k : from.student_q,
            args.student_type,
            batch,
            keys ? head / (args.heads / args.key_heads) : head,
            counted(args, keys),
            args.length,
            args.student_size};
  }
  KDFAST_DEVICE Tokens taught(const QkArgs& args, bool keys) const {
    const QkLayer& from = args.layer[layer];
    return {keys ? from.teacher_k : from.teacher_q,
            args.teacher_type,
            batch,
            keys ? teacher / args.teacher_shared : teacher,
            counted(args, keys),
            args.length,
            args.teacher_size};
  }

 private:
  KDFAST_DEVICE const bool* counted(const QkArgs& args, bool keys) const {
    const bool* mask = keys ? args.key_mask : args.query_mask;
    return mask ? mask + int64_t(batch) * args.length : nullptr;
  }
};

// Where a lane's numbers of a product are (mma.cuh).
KDFAST_DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
KDFAST_DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// The gradient of a head's queries or keys, [L, d] contiguous: what the lane has of products of 16 tokens from `token`
// on, 8 numbers from `first` on. Tokens that do not count get zeros whatever was computed.
struct TokenGradient {
  unsigned char* to;
  Element type;
  Tokens tokens;
  bool pairs;

  KDFAST_DEVICE TokenGradient(const QkArgs& args, const Head& h, bool keys)
      : type(args.student_type), tokens(h.learned(args, keys)) {
    const QkLayer& layer = args.layer[h.layer];
    const int64_t head = keys ? int64_t(h.batch) * args.key_heads + h.head / (args.heads / args.key_heads)
                              : int64_t(h.batch) * args.heads + h.head;
    to = (unsigned char*)(keys ? layer.dk : layer.dq) + head * tokens.length * tokens.size * size_of(type);
    pairs = tokens.size % 2 == 0 && uintptr_t(to) % (2 * size_of(type)) == 0;
  }
  KDFAST_DEVICE void write(int token, int first, const float (&c)[4], float factor) const {
    const int column = first + lane_column();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = token + lane_row() + 8 * half;
      if (row >= tokens.length || column >= tokens.size) continue;
      const bool counts = tokens.counts(row);
      const float x = counts ? factor * c[2 * half] : 0.f, y = counts ? factor * c[2 * half + 1] : 0.f;
      write_pair(int64_t(row) * tokens.size + column, x, y, column + 1 < tokens.size);
    }
  }

 private:
  KDFAST_DEVICE void write_pair(int64_t at, float x, float y, bool both) const {
    if (!pairs) {
      store_any(type, to, at, x);
      if (both) store_any(type, to, at + 1, y);
    } else if (type == Element::f32) {
      store8(to + 4 * at, {as_bits(x), as_bits(y)});
    } else {
      *(uint32_t*)(to + 2 * at) = type == Element::bf16 ? narrow_pair(BFloat16{}, x, y) : narrow_pair(Float16{}, x, y);
    }
  }
};

}  // namespace kdfast::cuda
