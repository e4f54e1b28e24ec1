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

// A token's numbers times scale, and zeros up to whole vectors.
template <class E, class Real>
KDFAST_LOCAL void read_token(const E* token, int64_t number, int64_t size, Real scale, Real* to) {
  if constexpr (sizeof(Real) == sizeof(float)) {
    if (number == 1) {
      return for_vectors<E>(size, [&](int64_t i, int count, int) __attribute__((always_inline)) {
        store(to + i, scale * load_or_zeros(token + i, count));
      });
    }
  }
  for (int64_t i = 0; i < size; ++i) to[i] = scale * widened(token[i * number]);
  clear(to + size, padded<Real>(size) - size);
}
// `n` tokens from `first` on to rows of a panel; only zeros where a token does not count.
template <class Real>
void read_tokens(Element type, const QkTokens& from, const bool* counted, int64_t first, int64_t n, int64_t size,
                 double scale, Real* to, int64_t to_row) {
  auto read_all = [&](auto element) __attribute__((always_inline)) {
    for (int64_t t = first; t < first + n; ++t, to += to_row) {
      if (counted && !counted[t]) {
        clear(to, padded<Real>(size));
      } else {
        read_token((const decltype(element)*)from.data + t * from.token, from.number, size, Real(scale), to);
      }
    }
  };
  if constexpr (sizeof(Real) == sizeof(double)) {
    if (type == Element::f64) return read_all(double{});
  }
  with_element(type, read_all);
}
// a - b, of whole vectors; a null: zeros.
template <class Real>
KDFAST_LOCAL void subtract(const Real* a, const Real* b, int64_t n, Real* to) {
  for (int64_t i = 0; i < n; i += WideOf<Real>::count) {
    Wide<Real> x{}, y;
    if (a) memcpy(&x, a + i, sizeof x);
    memcpy(&y, b + i, sizeof y);
    x -= y;
    memcpy(to + i, &x, sizeof x);
  }
}

// a[0], b[0], a[1], b[1], … of the first halves, and of the second.
template <class V>
KDFAST_LOCAL void interleave(V a, V b, V& first, V& second) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  if constexpr (L == 2) {
    first = __builtin_shufflevector(a, b, 0, 2);
    second = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (L == 4) {
    first = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    second = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (L == 8) {
    first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    first = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}
// [tokens, columns] to [columns, tokens], and zeros up to whole vectors of tokens: squares of vectors, which are turned
// when their upper and lower halves have been interleaved log2(lanes) times.
template <class Real>
void transpose(const Real* from, int64_t tokens, int64_t columns, Real* to, int64_t to_row) {
  using V = Wide<Real>;
  constexpr int L = WideOf<Real>::count;
  for (int64_t t = 0; t < tokens; t += L) {
    for (int64_t c = 0; c < columns; c += L) {
      V rows[L]{}, turned[L];
      for (int i = 0; i < L && t + i < tokens; ++i) memcpy(&rows[i], from + (t + i) * columns + c, sizeof(V));
#pragma GCC unroll 4
      for (int step = 1; step < L; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; ++i) interleave(rows[i], rows[i + L / 2], turned[2 * i], turned[2 * i + 1]);
        memcpy(rows, turned, sizeof rows);
      }
      for (int i = 0; i < L; ++i) memcpy(to + (c + i) * to_row + t, &rows[i], sizeof(V));
    }
  }
}
// `tokens` rows of a panel, times factor, to a tensor's contiguous tokens.
template <class Real>
KDFAST_LOCAL void write_tokens(Element type, const Real* from, int64_t from_row, int64_t tokens, int64_t size,
                               double factor, void* to, int64_t first) {
  const Real f = Real(factor);
  for (int64_t t = 0; t < tokens; ++t) {
    const Real* numbers = from + t * from_row;
    const int64_t at = (first + t) * size;
    if (type == Element::f64) {
      for (int64_t i = 0; i < size; ++i) ((double*)to)[at + i] = f * numbers[i];
      continue;
    }
    with_element(type, [&](auto element) __attribute__((always_inline)) {
      using E = decltype(element);
      E* row = (E*)to + at;
      if constexpr (sizeof(Real) == sizeof(float)) {
        for_vectors<E>(size, [&](int64_t i, int count, int)
                                 __attribute__((always_inline)) { store(row + i, f * load(numbers + i), count); });
      } else {
        for (int64_t i = 0; i < size; ++i) narrow_to(row[i], float(f * numbers[i]));
      }
    });
  }
}

// Sums of a row are Reals, those of rows doubles.
template <class Real>
double dot(const Real* a, int64_t a_row, const Real* b, int64_t b_row, int64_t rows, int64_t columns) {
  using V = Wide<Real>;
  constexpr int L = WideOf<Real>::count;
  using Doubles = typename WideOf<Real>::Doubles;
  Doubles all{};
  for (int64_t r = 0; r < rows; ++r) {
    V sums{};
    for (int64_t i = 0; i < columns; i += L) {
      V x, y;
      memcpy(&x, a + r * a_row + i, sizeof x);
      memcpy(&y, b + r * b_row + i, sizeof y);
      sums += x * y;
    }
    all += __builtin_convertvector(sums, Doubles);
  }
  double total = 0;
  for (int i = 0; i < L; ++i) total += all[i];
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
