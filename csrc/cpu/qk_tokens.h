// Panels of tokens for the losses of queries and keys: rows of whole vectors, ready for multiply().
#pragma once
#include "cpu/blocks.h"
#include "cpu/matmul.h"
#include "cpu/qk_rows.h"

namespace kdfast::KDFAST_VARIANT {

// Query rows that are taken at a time: whole tiles, and a panel of 64 + 64 numbers stays in L1.
constexpr int64_t kChunk = 48;

// Hands out the workspace; without one it only counts.
class Room {
 public:
  explicit Room(char* at) : at_(at) {}
  // A few more can be read than are asked for: the last tile's.
  template <class Real>
  Real* take(int64_t rows, int64_t columns) {
    Real* taken = at_ ? (Real*)(at_ + bytes_) : nullptr;
    bytes_ += rounded_up((rounded_up(rows, kTileRows) * columns + kTileRows) * int64_t(sizeof(Real)), 64);
    return taken;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* at_;
  int64_t bytes_ = 0;
};

template <class Real>
KDFAST_LOCAL void clear(Real* to, int64_t n) {
  memset(to, 0, n * sizeof(Real));
}

// `n` of a token's numbers from `begin` on times scale, and zeros up to whole vectors.
KDFAST_LOCAL void read_numbers(Element type, const QkTokens& from, int64_t token, int64_t begin, int64_t n, float scale,
                               float* to) {
  alignas(64) float made[kBlock];
  const char* row = (const char*)from.data + token * from.token * size_of(type);
  const float* numbers = read(type, row, from.number, begin, n, made);
  for_vectors<float>(n, [&](int64_t i, int count, int) __attribute__((always_inline)) {
    store(to + i, scale * load_or_zeros(numbers + i, count));
  });
}
KDFAST_LOCAL void read_numbers(Element type, const QkTokens& from, int64_t token, int64_t begin, int64_t n,
                               double scale, double* to) {
  if (type == Element::f64) {
    const double* row = (const double*)from.data + token * from.token;
    for (int64_t i = 0; i < n; ++i) to[i] = scale * row[(begin + i) * from.number];
  } else {
    alignas(64) float made[kBlock];
    read_numbers(type, from, token, begin, n, 1.f, made);
    for (int64_t i = 0; i < n; ++i) to[i] = scale * made[i];
  }
  for (int64_t i = n; i < padded<double>(n); ++i) to[i] = 0;
}

// A token's numbers times scale, and zeros up to whole vectors; only zeros where the token does not count.
template <class Real>
KDFAST_LOCAL void read_token(Element type, const QkTokens& from, const bool* counted, int64_t token, int64_t size,
                             double scale, Real* to) {
  if (counted && !counted[token]) return clear(to, padded<Real>(size));
  for (int64_t at = 0; at < size; at += kBlock) {
    read_numbers(type, from, token, at, size - at < kBlock ? size - at : kBlock, Real(scale), to + at);
  }
}

// [tokens, columns] to [columns, tokens], and zeros up to `to_row` tokens.
template <class Real>
KDFAST_LOCAL void transpose(const Real* from, int64_t from_row, int64_t tokens, int64_t columns, Real* to,
                            int64_t to_row) {
  constexpr int64_t kLine = 16;  // tokens at a time, so that what is written shares cache lines
  for (int64_t begin = 0; begin < tokens; begin += kLine) {
    const int64_t end = begin + kLine < tokens ? begin + kLine : tokens;
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t t = begin; t < end; ++t) to[c * to_row + t] = from[t * from_row + c];
    }
  }
  for (int64_t c = 0; tokens < to_row && c < columns; ++c) clear(to + c * to_row + tokens, to_row - tokens);
}
// `tokens` rows of a panel, times factor, to a tensor's contiguous tokens.
template <class Real>
KDFAST_LOCAL void write_tokens(Element type, const Real* from, int64_t from_row, int64_t tokens, int64_t size,
                               double factor, void* to, int64_t first) {
  alignas(64) float made[kBlock];
  const Real f = Real(factor);
  for (int64_t t = 0; t < tokens; ++t) {
    char* row = (char*)to + (first + t) * size * size_of(type);
    for (int64_t at = 0; at < size; at += kBlock) {
      const int64_t n = size - at < kBlock ? size - at : kBlock;
      const Real* numbers = from + t * from_row + at;
      if constexpr (sizeof(Real) == sizeof(float)) {
        float* g = gradient_place(type, row, at, made);
        for_vectors<float>(n, [&](int64_t i, int count, int)
                                  __attribute__((always_inline)) { store(g + i, f * load(numbers + i), count); });
        write(type, g, n, row, at);
      } else if (type == Element::f64) {
        for (int64_t i = 0; i < n; ++i) ((double*)row)[at + i] = f * numbers[i];
      } else {
        float* g = gradient_place(type, row, at, made);
        for (int64_t i = 0; i < n; ++i) g[i] = float(f * numbers[i]);
        write(type, g, n, row, at);
      }
    }
  }
}

template <class Real>
double dot(const Real* a, int64_t a_row, const Real* b, int64_t b_row, int64_t rows, int64_t columns) {
  using V = Wide<Real>;
  constexpr int L = WideOf<Real>::count;
  double total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    V sums{};
    for (int64_t i = 0; i < columns; i += L) {
      V x, y;
      memcpy(&x, a + r * a_row + i, sizeof x);
      memcpy(&y, b + r * b_row + i, sizeof y);
      sums += x * y;
    }
    for (int i = 0; i < L; ++i) total += sums[i];
  }
  return total;
}

// The kernels of a Loss<Real> over heads, which is made of a shape, a head and a workspace (without one it only
// counts).
template <template <class> class Loss>
struct QkOf {
  template <class Real>
  static void write_all(const QkShape& shape, const void* sums, void* to) {
    write_tokens(shape.student, (const Real*)sums, padded<Real>(shape.student_size), shape.length, shape.student_size,
                 1, to, 0);
  }
  static int64_t workspace(const QkShape& shape) {
    return Loss<float>::in_double(shape) ? Loss<double>(shape, nullptr, nullptr).bytes()
                                         : Loss<float>(shape, nullptr, nullptr).bytes();
  }
  static int64_t key_sums(const QkShape& shape) {
    Room room(nullptr);
    Loss<float>::in_double(shape) ? void(room.take<double>(shape.length, padded<double>(shape.student_size)))
                                  : void(room.take<float>(shape.length, padded<float>(shape.student_size)));
    return room.bytes();
  }
  static void head(const QkShape& shape, QkHead& of, char* workspace) {
    of.value = 0;
    Loss<float>::in_double(shape) ? Loss<double>(shape, &of, workspace).run()
                                  : Loss<float>(shape, &of, workspace).run();
  }
  static void write_keys(const QkShape& shape, const void* sums, void* to) {
    (Loss<float>::in_double(shape) ? write_all<double> : write_all<float>)(shape, sums, to);
  }
};
template <template <class> class Loss>
constexpr QkKernels qk_kernels() {
  using Of = QkOf<Loss>;
  return {Of::workspace, Of::key_sums, Of::head, Of::write_keys};
}

}  // namespace kdfast::KDFAST_VARIANT
