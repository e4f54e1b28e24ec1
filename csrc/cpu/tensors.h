// Tensors as the dispatchers on the CPU read and make them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>
#include <memory>
#include <vector>

#include "common/checks.h"
#include "cpu/element.h"

namespace kdfast {

inline Element element_of(ScalarType t) {
  if (t == ScalarType::Double) return Element::f64;
  if (t == ScalarType::BFloat16) return Element::bf16;
  return t == ScalarType::Half ? Element::f16 : Element::f32;
}

// float or double memory, by the call.
class Reals {
 public:
  Reals(const Tensor& t, bool is_double) : data_(t.mutable_data_ptr()), double_(is_double) {}
  void set(int64_t i, double x) const { double_ ? void(((double*)data_)[i] = x) : void(((float*)data_)[i] = float(x)); }
  double get(int64_t i) const { return double_ ? ((const double*)data_)[i] : ((const float*)data_)[i]; }
  std::vector<double> all(int64_t count) const {
    std::vector<double> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = get(i);
    return values;
  }

 private:
  void* data_;
  bool double_;
};

// Large fresh outputs cost more in page faults than in arithmetic: asks for huge pages over 4 MB (smaller ones may be
// reused heap memory, and lose little). Only a hint: its failure changes no result.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  if (bytes < 2 * kHuge) return;
  const uintptr_t first = (uintptr_t(data) + kHuge - 1) & ~(kHuge - 1), last = (uintptr_t(data) + bytes) & ~(kHuge - 1);
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// Workspace of a thread, on a cache line.
class Room {
 public:
  explicit Room(int64_t bytes) : memory_(new char[bytes + 64]) {}
  char* data() const { return (char*)((uintptr_t(memory_.get()) + 63) & ~uintptr_t(63)); }

 private:
  std::unique_ptr<char[]> memory_;
};

inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = torch::stable::new_empty(like, sizes, dtype);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * t.element_size());
  return t;
}

inline Tensor empty_gradient(const Tensor& student) {
  Tensor t = torch::stable::new_empty(student, std::vector<int64_t>(student.sizes().begin(), student.sizes().end()),
                                      student.scalar_type());
  advise_huge_pages(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
  return t;
}
inline std::vector<Tensor> empty_gradients(const std::vector<Tensor>& of) {
  std::vector<Tensor> all;
  for (const Tensor& t : of) all.push_back(empty_gradient(t));
  return all;
}

}  // namespace kdfast
