// Columns of rows in any layout: what other kernels read in vectors, one by one.
#pragma once
#include "cuda/divergence_rows.cuh"

namespace kdfast::cuda {

// Column by column, with dtypes and strides known only at run time: types are looked at once for a few columns.
struct AnyColumns {
  static constexpr int kBatch = 8;
  const DivergenceArgs& args;
  const char *student, *teacher;
  char* gradient;

  KDFAST_DEVICE AnyColumns(const DivergenceArgs& args, int64_t row, float)
      : args(args),
        student((const char*)args.student + offset(args.student_rows, row) * size_of(args.student_type)),
        teacher((const char*)args.teacher + offset(args.teacher_rows, row) * size_of(args.teacher_type)),
        gradient(gradient_of(args, row)) {}

  KDFAST_DEVICE float student_at(int64_t column) const {
    return load_any(args.student_type, student, column * args.student_stride);
  }
  KDFAST_DEVICE float teacher_at(int64_t column) const {
    return load_any(args.teacher_type, teacher, column * args.teacher_stride);
  }
  KDFAST_DEVICE void store(int64_t column, float x) const { store_any(args.gradient_type, gradient, column, x); }

  // Columns from `begin` on, blockDim.x apart: f(u, column) of those that exist.
  template <class F>
  KDFAST_DEVICE void each_of(int64_t begin, F f) const {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t column = begin + u * blockDim.x;
      if (column < args.columns) f(u, column);
    }
  }
  KDFAST_DEVICE void load(Element type, const char* row, int64_t stride, int64_t begin, float* x) const {
#pragma unroll
    for (int u = 0; u < kBatch; ++u) x[u] = -INFINITY;
    if (type == Element::f32) {
      each_of(begin, [&](int u, int64_t c) { x[u] = ((const float*)row)[c * stride]; });
    } else if (type == Element::bf16) {
      each_of(begin, [&](int u, int64_t c) { x[u] = Vector<BFloat16>::widen_one(((const BFloat16*)row)[c * stride]); });
    } else {
      each_of(begin, [&](int u, int64_t c) { x[u] = Vector<Float16>::widen_one(((const Float16*)row)[c * stride]); });
    }
  }
  KDFAST_DEVICE void store(int64_t begin, const float* x) const {
    if (args.gradient_type == Element::f32) {
      each_of(begin, [&](int u, int64_t c) { ((float*)gradient)[c] = x[u]; });
    } else if (args.gradient_type == Element::bf16) {
      each_of(begin, [&](int u, int64_t c) { ((BFloat16*)gradient)[c] = Vector<BFloat16>::narrow_one(x[u]); });
    } else {
      each_of(begin, [&](int u, int64_t c) { ((Float16*)gradient)[c] = Vector<Float16>::narrow_one(x[u]); });
    }
  }
  // f(batch, first column)
  template <class F>
  KDFAST_DEVICE void each_batch(F f) const {
#pragma unroll 1
    for (int64_t begin = threadIdx.x; begin < args.columns; begin += kBatch * blockDim.x) {
      Logits<kBatch> z;
      load(args.student_type, student, args.student_stride, begin, z.s);
      load(args.teacher_type, teacher, args.teacher_stride, begin, z.t);
      f(z, begin);
    }
  }
  template <class F>
  KDFAST_DEVICE void look(F f) const {
    each_batch([&](const Logits<kBatch>& z, int64_t begin) {
      int n = 0;
      each_of(begin, [&](int, int64_t) { ++n; });
      f(z, n);
    });
  }
  template <class Gradient>
  KDFAST_DEVICE void write(Gradient of) const {
    each_batch([&](const Logits<kBatch>& z, int64_t begin) {
      float g[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) g[u] = of(z.s[u], z.t[u]);
      store(begin, g);
    });
  }
  template <class Gradient>
  KDFAST_DEVICE void write_label(int column, Gradient of, float less) const {
    if (column % int(blockDim.x) == int(threadIdx.x)) store(column, of(student_at(column), teacher_at(column)) - less);
  }
};

}  // namespace kdfast::cuda
